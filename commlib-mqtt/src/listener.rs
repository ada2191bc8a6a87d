//! One inbox, as the connection task sees it.

use commlib_core::{Dialect, InboxSender, Name, Result};
use tokio::sync::oneshot;

use crate::packet::QoS;

/// One inbox.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) id: u64,
    pub(crate) filter: String,
    pub(crate) kind: Kind,
    pub(crate) qos: QoS,
    pub(crate) dialect: Dialect,
    /// The broker keeps the subscription when the inbox goes.
    pub(crate) durable: bool,
    pub(crate) inbox: InboxSender,
    /// The name of everything that arrives, if it can be but one.
    pub(crate) name: Option<Name>,
}

/// What a listener is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Topic,
    Queue,
    /// Replies; the key of a reply stands behind this many bytes of its topic.
    Replies(usize),
}

/// Told when the broker has confirmed or refused.
pub(crate) type Waiting = oneshot::Sender<Result<()>>;
