//! What a broker can do, and how the connection to it stands.

use tokio::sync::watch;

use crate::error::{Error, ErrorKind};

/// How requests to one service name are shared out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueKind {
    /// One of the services that serve the name gets each request.
    Competing,
    /// Every service gets each request; the first reply wins.
    FanOut,
}

/// How a reply finds its call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyKind {
    /// Each call has a reply address of its own. Peers need to echo nothing.
    AddressPerCall,
    /// All calls share an address and are told apart by the correlation id that peers echo.
    CorrelationId,
}

/// What happens to a request for a name that nobody serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AbsentService {
    /// It waits for a service to come.
    Kept,
    /// It vanishes; the caller times out.
    Dropped,
    /// The caller is told at once.
    Refused,
}

/// Facts about a broker and session. A field exists only if core or the conformance suite reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// How requests are shared among services of one name.
    pub queue: QueueKind,
    /// How replies find their call.
    pub replies: ReplyKind,
    /// What becomes of requests that nobody serves.
    pub absent_service: AbsentService,
    /// The largest data that may be sent, in bytes.
    pub max_payload: usize,
    /// Whether publishing at least once is possible: the broker confirms what it has taken.
    pub confirms: bool,
    /// Whether subscribing at least once is possible: the session keeps and repeats what is not acknowledged.
    pub acks: bool,
    /// Whether at-least-once subscriptions may be patterns, and not only names.
    pub ack_patterns: bool,
}

impl Default for Capabilities {
    /// What the in-memory broker has: everything.
    fn default() -> Self {
        Self {
            queue: QueueKind::Competing,
            replies: ReplyKind::AddressPerCall,
            absent_service: AbsentService::Refused,
            max_payload: DEFAULT_MAX_PAYLOAD,
            confirms: true,
            acks: true,
            ack_patterns: true,
        }
    }
}

/// The default of [`Capabilities::max_payload`]: 1 MiB.
pub const DEFAULT_MAX_PAYLOAD: usize = 1 << 20;

/// How the connection to the broker stands. A value to watch, see [`Link::watch`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum LinkState {
    /// The first connection is being made.
    Connecting,
    /// Everything works: subscriptions are in place again, unconfirmed messages were sent again.
    Connected {
        /// The broker kept the session: nothing was missed by at-least-once subscribers.
        resumed: bool,
    },
    /// Connected, but the broker takes no messages for now.
    Degraded {
        /// Why, in the broker's words.
        reason: String,
    },
    /// The connection was lost and is being made again, for ever.
    Reconnecting {
        /// Counts the attempts since the loss, from 1.
        attempt: u32,
        /// Why the link was lost or the last attempt failed.
        cause: String,
    },
    /// Closed by this side, or given up.
    Closed {
        /// Why.
        cause: String,
    },
}

impl LinkState {
    /// True while messages can be handed to the broker.
    pub fn is_connected(&self) -> bool {
        matches!(self, Self::Connected { .. } | Self::Degraded { .. })
    }
}

/// Facts about a connection: where it goes, what the broker can do, how it stands. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Link {
    url: String,
    capabilities: Capabilities,
    state: watch::Receiver<LinkState>,
}

impl Link {
    /// For transports: the link and the sender of its state. `url` must hold no password.
    pub fn new(
        url: impl Into<String>,
        capabilities: Capabilities,
    ) -> (Self, watch::Sender<LinkState>) {
        let (sender, state) = watch::channel(LinkState::Connecting);
        let link = Self {
            url: url.into(),
            capabilities,
            state,
        };
        (link, sender)
    }

    /// The broker's address for people and messages, without user or password.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What the broker and session can do.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// How the connection stands now.
    pub fn state(&self) -> LinkState {
        self.state.borrow().clone()
    }

    /// A receiver that sees every later state (the newest, if several pass between two looks).
    pub fn watch(&self) -> watch::Receiver<LinkState> {
        self.state.clone()
    }

    /// The error for an operation that needs the link up, or `Ok`.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] after the end, [`ErrorKind::ConnectionLost`] while the link is down.
    pub fn check_up(
        &self,
        operation: &'static str,
        address: impl std::fmt::Display,
    ) -> Result<(), Error> {
        match &*self.state.borrow() {
            LinkState::Connected { .. } | LinkState::Degraded { .. } => Ok(()),
            LinkState::Closed { cause } => Err(Error::new(ErrorKind::Closed, operation)
                .at(address)
                .because(cause)),
            LinkState::Connecting => Err(Error::new(ErrorKind::ConnectionLost, operation)
                .at(address)
                .because(format_args!("not connected to {} yet", self.url))),
            LinkState::Reconnecting { cause, .. } => {
                Err(Error::new(ErrorKind::ConnectionLost, operation)
                    .at(address)
                    .because(format_args!("the link to {} is down ({cause})", self.url)))
            }
        }
    }
}
