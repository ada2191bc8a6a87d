//! The boundary: what a broker crate implements, and the options that cross it.
//!
//! Everything pleasant is built above this trait, once. A transport moves single one-way messages between three
//! kinds of address ([`Target`], [`Source`]); it knows nothing of calls, handlers or types.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;

use crate::address::{Name, Source, Target};
use crate::error::Result;
use crate::inbox::Inbox;
use crate::link::Link;
use crate::message::{Dialect, Message};
use crate::receipt::Receipt;

/// A connection to one broker.
///
/// # Rules for implementers
/// * One task owns the broker connection. It never runs user code and never waits for a user: everything that comes
///   in goes through an [`InboxSender`](crate::InboxSender), which cannot wait.
/// * `send` checks the size of the message against `Capabilities::max_payload`, and `listen` asks for nothing that
///   the capabilities exclude; a request beyond them is [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported).
/// * After a lost link: listen again first, then resend what is unconfirmed in order, announce
///   [`LinkState::Connected`](crate::LinkState::Connected) last. Replies inboxes get a
///   [`Gap`](crate::Gap) the moment the link is lost, topic and queue inboxes one when it is back and the
///   broker kept nothing for them.
/// * A topic inbox may be given more than its pattern asks for; core checks each arrival.
#[async_trait]
pub trait Transport: fmt::Debug + Send + Sync + 'static {
    /// Facts about the broker, and the state of the connection to it.
    fn link(&self) -> &Link;

    /// Hands over one message. Resolves when it is accepted here; the receipt resolves when the broker confirmed it.
    ///
    /// Cancel safe: a cancelled `send` has either not accepted the message or sends it whole.
    async fn send(&self, to: &Target, message: Message, options: SendOptions) -> Result<Receipt>;

    /// Starts receiving. Resolves only once the broker has confirmed it; dropping the inbox ends it.
    async fn listen(&self, from: &Source, options: ListenOptions) -> Result<Inbox>;

    /// Flushes what is accepted, disconnects, ends all inboxes. Idempotent.
    ///
    /// # Errors
    /// If accepted messages could not be confirmed in the transport's time for it; the connection is closed all the same.
    async fn close(&self) -> Result<()>;
}

/// How sure delivery is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Delivery {
    /// Sent once and not kept. What is lost on the way shows as a gap.
    #[default]
    BestEffort,
    /// Kept and sent again until confirmed. Receivers may see a message more than once.
    AtLeastOnce,
}

impl fmt::Display for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BestEffort => "best-effort",
            Self::AtLeastOnce => "at-least-once",
        })
    }
}

/// Options of [`Transport::send`].
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct SendOptions {
    /// How sure delivery is. At-least-once messages wait in a bounded outbox until the broker confirmed them.
    pub delivery: Delivery,
    /// How to write it. Ignored for [`Target::Reply`], which is written in the form of the request.
    pub dialect: Dialect,
    /// How long to wait for room in the outbox; `None` waits as long as it takes.
    pub timeout: Option<Duration>,
}

impl SendOptions {
    /// Sets the delivery.
    #[must_use]
    pub fn delivery(mut self, delivery: Delivery) -> Self {
        self.delivery = delivery;
        self
    }

    /// Sets the dialect.
    #[must_use]
    pub fn dialect(mut self, dialect: Dialect) -> Self {
        self.dialect = dialect;
        self
    }

    /// Sets how long to wait for room in the outbox.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }
}

/// Options of [`Transport::listen`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ListenOptions {
    /// How sure delivery is. At least once means: acknowledged only after use, and sent again otherwise.
    pub delivery: Delivery,
    /// How input without our own marks is read.
    pub dialect: Dialect,
    /// Keep the subscription and what arrives for it at the broker under this name while nobody listens.
    pub durable: Option<Name>,
    /// How many messages may wait in the inbox (best effort), or be unacknowledged (at least once). Default 1,024.
    pub prefetch: usize,
    /// How many bytes may wait in a best-effort inbox. Default 16 MiB.
    pub max_bytes: usize,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self {
            delivery: Delivery::default(),
            dialect: Dialect::default(),
            durable: None,
            prefetch: 1024,
            max_bytes: 16 << 20,
        }
    }
}

impl ListenOptions {
    /// Sets the delivery.
    #[must_use]
    pub fn delivery(mut self, delivery: Delivery) -> Self {
        self.delivery = delivery;
        self
    }

    /// Sets the dialect.
    #[must_use]
    pub fn dialect(mut self, dialect: Dialect) -> Self {
        self.dialect = dialect;
        self
    }

    /// Sets the name under which the broker keeps the subscription.
    #[must_use]
    pub fn durable(mut self, name: Option<Name>) -> Self {
        self.durable = name;
        self
    }

    /// Sets how many messages may wait.
    #[must_use]
    pub fn prefetch(mut self, prefetch: usize) -> Self {
        self.prefetch = prefetch.max(1);
        self
    }

    /// Sets how many bytes may wait.
    #[must_use]
    pub fn max_bytes(mut self, max_bytes: usize) -> Self {
        self.max_bytes = max_bytes;
        self
    }
}
