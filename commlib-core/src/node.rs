//! A node: a named part of a system, with the endpoints and tasks that live and end with it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::address::Name;
use crate::connection::{Connection, random_id};
use crate::error::{Error, ErrorKind, Result};
use crate::scope::{Scope, Scoped};
use crate::tasks::Tasks;

/// How long [`Node::run_until_signal`] gives running handlers to finish.
const SIGNAL_LIMIT: Duration = Duration::from_secs(10);

/// A software component with a name: it makes endpoints, and ends them together.
///
/// Names given to its endpoints are prefixed with its namespace, if it has one; a leading dot marks an absolute name.
/// [`shutdown`](Self::shutdown) ends it in good order; dropping it aborts its services and subscriber loops.
///
/// ```
/// use std::time::Duration;
/// use commlib_core::{MemoryConfig, Node, PubSub};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> commlib_core::Result<()> {
/// let broker = MemoryConfig::new("doc-node").connect().await?;
/// let node = Node::builder("robot-7").namespace("robots.r7").start(broker).await?;
/// let battery = node.publisher::<f64>("battery")?;
/// assert_eq!(battery.topic().as_str(), "robots.r7.battery");
/// battery.publish(&0.93).await?;
/// node.shutdown(Duration::from_secs(5)).await
/// # }
/// ```
#[derive(Debug)]
#[must_use = "dropping a node ends its services"]
pub struct Node {
    scope: Scope,
    name: Name,
    namespace: Option<Name>,
    device_id: Option<String>,
}

/// Settings of a [`Node`] before it starts.
#[derive(Debug, Clone)]
#[must_use = "a node does nothing before `start`"]
pub struct NodeBuilder {
    name: String,
    namespace: Option<String>,
    device_id: Option<String>,
}

impl Node {
    /// Settings for a node of this name. An empty name becomes a random one.
    #[doc(alias = "node_name")]
    pub fn builder(name: impl Into<String>) -> NodeBuilder {
        NodeBuilder {
            name: name.into(),
            namespace: None,
            device_id: None,
        }
    }

    /// The node's name.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// What the names of its endpoints are prefixed with.
    pub fn namespace(&self) -> Option<&Name> {
        self.namespace.as_ref()
    }

    /// The device it runs on, if told.
    pub fn device_id(&self) -> Option<&str> {
        self.device_id.as_deref()
    }

    /// The connection it works over.
    pub fn connection(&self) -> &Connection {
        self.scope.connection()
    }

    /// Waits for SIGINT or SIGTERM (Ctrl-C elsewhere than on Unix), then shuts down with a limit of 10 s.
    ///
    /// # Errors
    /// As [`shutdown`](Self::shutdown), and [`ErrorKind::Config`] if signals cannot be listened to.
    #[doc(alias = "run_forever")]
    pub async fn run_until_signal(self) -> Result<()> {
        signal().await.map_err(|e| {
            Error::new(ErrorKind::Config, "listening for signals in node")
                .at(&self.name)
                .because(e)
        })?;
        self.shutdown(SIGNAL_LIMIT).await
    }

    /// Ends in good order: stops the intake, lets running handlers finish, flushes the outbox, closes the connection;
    /// all of it within `limit`. What has not ended by then is dropped.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] that says what did not end in time; otherwise as [`Connection::close`].
    pub async fn shutdown(self, limit: Duration) -> Result<()> {
        let started = Instant::now();
        let late = |why: String| {
            Err(Error::new(ErrorKind::Timeout, "shutdown of node")
                .at(&self.name)
                .because(why))
        };
        // Closing needs a moment of the limit even if handlers use up theirs.
        let reserve = (limit / 4).min(Duration::from_secs(1));
        self.scope.tasks().stop();
        let idle = self.scope.tasks().idle(limit - reserve).await;
        self.scope.tasks().abort();
        let left = limit.saturating_sub(started.elapsed());
        let closed = tokio::time::timeout(left, self.connection().close()).await;
        match (idle, closed) {
            (Err(running), _) => late(format!(
                "handlers of {running} endpoints still ran after {limit:?} and were dropped"
            )),
            (Ok(()), Err(_)) => late(format!("the connection was not closed within {limit:?}")),
            (Ok(()), Ok(closed)) => closed,
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.scope.tasks().abort();
    }
}

impl Scoped for Node {
    fn scope(&self) -> Scope {
        self.scope.clone()
    }
}

impl NodeBuilder {
    /// Prefixes the names of the node's endpoints.
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = Some(namespace.into());
        self
    }

    /// Says which device the node runs on.
    pub fn device_id(mut self, device_id: impl Into<String>) -> Self {
        self.device_id = Some(device_id.into());
        self
    }

    /// Starts the node on a connection, which belongs to the node from now on: its shutdown closes it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidAddress`] for a bad name or namespace.
    pub async fn start(self, connection: Connection) -> Result<Node> {
        let name = match self.name.as_str() {
            "" => random_id(),
            name => name.to_owned(),
        };
        let name = Name::new(name)?;
        let namespace = self.namespace.map(Name::new).transpose()?;
        Ok(Node {
            scope: Scope::new(connection, namespace.clone(), Arc::new(Tasks::new())),
            name,
            namespace,
            device_id: self.device_id,
        })
    }
}

#[cfg(unix)]
async fn signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

#[cfg(not(unix))]
async fn signal() -> std::io::Result<()> {
    tokio::signal::ctrl_c().await
}
