//! What users hold: a transport with the state that all endpoints on it share.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::{Mutex as AsyncMutex, OnceCell};

use crate::address::Name;
use crate::error::{Error, ErrorKind, Result};
use crate::link::{Link, LinkState};
use crate::message::{Dialect, Message};
use crate::rpc::ReplyRouter;
use crate::scope::{Scope, Scoped};
use crate::tasks::Tasks;
use crate::transport::Transport;

/// Topics of one connection that count their messages; beyond them messages carry no `seq`.
const MAX_COUNTED_TOPICS: usize = 65_536;

/// The counter behind [`Header::seq`](crate::Header::seq). Held while a message is handed over, so that the order of
/// the numbers is the order of the messages.
pub(crate) type Sequence = Arc<AsyncMutex<u64>>;

/// A connection to a broker: cheap to clone, all clones are one connection.
///
/// It makes endpoints through the traits [`PubSub`](crate::PubSub) and [`Rpc`](crate::Rpc). Dropping all clones and
/// endpoints disconnects in the background; [`close`](Self::close) does so and waits.
///
/// ```
/// use commlib_core::{MemoryConfig, PubSub};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> commlib_core::Result<()> {
/// let connection = MemoryConfig::new("doc-connection").connect().await?;
/// let mut readings = connection.subscriber::<f64>("sonar.*").await?;
/// connection.publisher::<f64>("sonar.front")?.publish(&1.2).await?;
/// let reading = readings.recv().await.expect("the connection is open")?;
/// assert_eq!((reading.topic.as_str(), reading.data), ("sonar.front", 1.2));
/// connection.close().await
/// # }
/// ```
#[derive(Clone)]
#[doc(alias = "ConnectionParameters")]
#[doc(alias = "endpoint_factory")]
pub struct Connection {
    inner: Arc<Inner>,
    scope: Arc<ScopeParts>,
    dialect: Dialect,
}

struct Inner {
    transport: Box<dyn Transport>,
    sender: Arc<str>,
    next_message: AtomicU64,
    sequences: Mutex<HashMap<Name, Sequence>>,
    replies: OnceCell<ReplyRouter>,
}

/// What makes a connection a scope of its own: the tasks that were started on it directly.
struct ScopeParts {
    tasks: Arc<Tasks>,
}

impl Connection {
    /// A connection over a transport.
    pub fn new(transport: impl Transport) -> Self {
        Self {
            inner: Arc::new(Inner {
                transport: Box::new(transport),
                sender: random_id().into(),
                next_message: AtomicU64::new(1),
                sequences: Mutex::default(),
                replies: OnceCell::new(),
            }),
            scope: Arc::new(ScopeParts {
                tasks: Arc::new(Tasks::new()),
            }),
            dialect: Dialect::default(),
        }
    }

    /// The same connection with another default dialect for the endpoints that this handle makes.
    #[must_use]
    pub fn with_dialect(mut self, dialect: Dialect) -> Self {
        self.dialect = dialect;
        self
    }

    /// The default dialect of endpoints.
    pub fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// Where it goes, what the broker can do, how the connection stands.
    pub fn link(&self) -> &Link {
        self.inner.transport.link()
    }

    /// The transport below, for tests and bridges; applications use endpoints.
    pub fn transport(&self) -> &dyn Transport {
        &*self.inner.transport
    }

    /// The id under which this connection's messages travel. New for each connection.
    pub fn sender_id(&self) -> &str {
        &self.inner.sender
    }

    /// Waits until the link is up. Cancel safe.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] if it will never be.
    pub async fn connected(&self) -> Result<()> {
        let closed = |cause: &str| {
            Error::new(ErrorKind::Closed, "connection to")
                .at(self.link().url())
                .because(cause)
        };
        let mut watch = self.link().watch();
        let state = watch
            .wait_for(|state| state.is_connected() || matches!(state, LinkState::Closed { .. }))
            .await
            .map_err(|_| closed("its task ended"))?;
        match &*state {
            LinkState::Closed { cause } => Err(closed(cause)),
            _ => Ok(()),
        }
    }

    /// Flushes, disconnects, ends every endpoint. Idempotent. Running handlers are not waited for: shut down the
    /// [`Node`](crate::Node) for that.
    ///
    /// # Errors
    /// If messages that were accepted could not be confirmed in time; the connection is closed all the same.
    pub async fn close(&self) -> Result<()> {
        self.scope.tasks.stop();
        self.inner.transport.close().await
    }

    /// A new message from this connection.
    pub(crate) fn message(&self, data: Bytes) -> Message {
        let mut message = Message::new(data);
        let id = self.inner.next_message.fetch_add(1, Ordering::Relaxed);
        message.header.sender = Some(self.inner.sender.clone());
        message.header.message_id = Some(id.to_string());
        message
    }

    /// The counter of a topic; `None` beyond the number of topics that are counted.
    pub(crate) fn sequence(&self, topic: &Name) -> Option<Sequence> {
        let mut all = self
            .inner
            .sequences
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(sequence) = all.get(topic) {
            return Some(sequence.clone());
        }
        if all.len() >= MAX_COUNTED_TOPICS {
            return None;
        }
        let sequence = Sequence::default();
        all.insert(topic.clone(), sequence.clone());
        Some(sequence)
    }

    /// The listener for replies, started by the first call.
    pub(crate) async fn replies(&self) -> Result<&ReplyRouter> {
        self.inner
            .replies
            .get_or_try_init(|| ReplyRouter::start(self.transport(), self.dialect))
            .await
    }
}

impl Scoped for Connection {
    fn scope(&self) -> Scope {
        Scope::new(self.clone(), None, self.scope.tasks.clone())
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("url", &self.link().url())
            .field("state", &self.link().state())
            .finish_non_exhaustive()
    }
}

/// 128 random bits in hexadecimal, for names that no other program may choose.
///
/// They come from the operating system: `fastrand` is seeded by the clock, and robots that boot together without a
/// clock of their own must not take each other's replies.
pub fn random_id() -> String {
    let half = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", half(), half())
}
