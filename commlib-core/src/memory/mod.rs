//! Messaging within one process, with no broker: for tests, for a first try, and for parts that share a process.
//!
//! It does everything a broker does, in order and bounded, so a program that runs here runs on a broker.

mod acked;
mod broker;
mod transport;

use crate::config::BrokerUrl;
use crate::connection::Connection;
use crate::error::{Error, ErrorKind, Result};
use crate::link::Capabilities;
use crate::message::Dialect;

pub use broker::MemoryBroker;
pub use transport::MemoryTransport;

/// Settings of an in-memory connection. All connections of one broker name in the process meet each other.
///
/// URL: `memory:` or `memory:NAME`, options `dialect` and `max_payload`.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct MemoryConfig {
    /// The broker's name. Default: empty, the broker of `memory:`.
    pub name: String,
    /// The default dialect of endpoints. Nothing is written here, so it only decides which forms services see.
    pub dialect: Dialect,
    /// What the broker shall be able to do. Default: everything. The first connection to a broker decides.
    pub capabilities: Capabilities,
}

impl MemoryConfig {
    /// Settings for the broker of this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ..Self::default()
        }
    }

    /// Settings from a URL.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if it is no `memory:` URL or has unknown options.
    pub fn from_url(url: &str) -> Result<Self> {
        let mut url = BrokerUrl::parse(url)?;
        if url.scheme != "memory" || !url.host.is_empty() {
            return Err(Error::new(ErrorKind::Config, "broker URL")
                .at(&url)
                .because("an in-memory broker is written `memory:` or `memory:NAME`"));
        }
        let mut config = Self::new(url.path.clone());
        if let Some(dialect) = url.take_parsed("dialect")? {
            config.dialect = dialect;
        }
        if let Some(max_payload) = url.take_parsed("max_payload")? {
            config.capabilities.max_payload = max_payload;
        }
        url.finish()?;
        Ok(config)
    }

    /// Sets what the broker shall be able to do, to test programs under the limits of other brokers.
    #[must_use]
    pub fn capabilities(mut self, capabilities: Capabilities) -> Self {
        self.capabilities = capabilities;
        self
    }

    /// Sets the default dialect.
    #[must_use]
    pub fn dialect(mut self, dialect: Dialect) -> Self {
        self.dialect = dialect;
        self
    }

    /// Connects. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// None today; the signature is that of every transport.
    pub async fn connect(&self) -> Result<Connection> {
        let broker = MemoryBroker::named(&self.name, &self.capabilities);
        Ok(Connection::new(MemoryTransport::new(broker)).with_dialect(self.dialect))
    }
}

#[cfg(test)]
mod tests {
    #[tokio::test]
    async fn a_dropped_connection_leaves_no_task_behind() {
        let broker = super::MemoryBroker::named("no-task-left", &Default::default());
        let tasks = || {
            tokio::runtime::Handle::current()
                .metrics()
                .num_alive_tasks()
        };
        let before = tasks();
        drop(super::MemoryTransport::new(broker.clone()));
        tokio::task::yield_now().await;
        assert_eq!(tasks(), before);
        drop(broker);
    }
}
