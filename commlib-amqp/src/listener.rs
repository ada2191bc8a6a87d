//! Who listens to what, and how a delivery becomes an arrival.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use commlib_core::envelope::Use;
use commlib_core::{
    Arrival, Dialect, Error, ErrorKind, Gap, GapCause, InboxSender, Malformed, Message, Name,
    Pattern, Result,
};
use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::types::ShortString;

use crate::acks::Tries;
use crate::{address, properties};

/// One inbox.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) id: u64,
    pub(crate) kind: Kind,
    pub(crate) dialect: Dialect,
    pub(crate) prefetch: u16,
    pub(crate) inbox: InboxSender,
    /// The broker has served it before, so that what it misses now is a gap.
    pub(crate) established: AtomicBool,
    pub(crate) tries: Mutex<Tries>,
}

/// What a listener listens to.
#[derive(Debug)]
pub(crate) enum Kind {
    /// A topic or pattern at best effort: all share one queue.
    Topic {
        pattern: Pattern,
        binding: ShortString,
    },
    /// A topic or pattern at least once, by a queue of its own, which a durable name keeps.
    Acked {
        queue: ShortString,
        binding: ShortString,
        durable: bool,
    },
    /// Requests to a service.
    Service { queue: ShortString },
    /// Replies to this connection's calls.
    Replies,
}

impl Listener {
    pub(crate) fn is_established(&self) -> bool {
        self.established.load(Ordering::Relaxed)
    }

    /// Something may have been missed, if there was a time before.
    pub(crate) fn gap(&self) {
        if self.is_established() {
            self.inbox.gap(Gap::new(GapCause::LinkLost, None));
        }
    }
}

/// The queue that the listener has to itself, for messages about it.
impl Kind {
    pub(crate) fn queue(&self) -> Option<&ShortString> {
        match self {
            Self::Acked { queue, .. } | Self::Service { queue } => Some(queue),
            Self::Topic { .. } | Self::Replies => None,
        }
    }
}

/// Reads messages within the limit on their size.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader {
    pub(crate) max_payload: usize,
}

impl Reader {
    pub(crate) fn read(
        self,
        properties: &BasicProperties,
        body: Bytes,
        usage: Use,
        dialect: Dialect,
    ) -> Result<Message> {
        let message = properties::decode(properties, body, usage, dialect)?;
        let (size, max) = (message.data.len(), self.max_payload);
        if size > max {
            return Err(
                Error::new(ErrorKind::TooLarge, "received message").because(format_args!(
                    "{size} bytes are more than the limit of {max}"
                )),
            );
        }
        Ok(message)
    }
}

/// The listeners that share a queue. Shared between those who change it and those who read it.
#[derive(Debug, Default, Clone)]
pub(crate) struct Routes(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    exact: HashMap<Name, Vec<Arc<Listener>>>,
    wild: Vec<Arc<Listener>>,
    replies: Vec<Arc<Listener>>,
}

impl Routes {
    pub(crate) fn join(&self, listener: &Arc<Listener>) {
        let mut table = self.lock();
        match &listener.kind {
            Kind::Topic { pattern, .. } => match pattern.exact() {
                Some(name) => table.exact.entry(name).or_default().push(listener.clone()),
                None => table.wild.push(listener.clone()),
            },
            Kind::Replies => table.replies.push(listener.clone()),
            Kind::Acked { .. } | Kind::Service { .. } => {}
        }
    }

    pub(crate) fn leave(&self, listener: &Listener) {
        let mut table = self.lock();
        let others = |all: &mut Vec<Arc<Listener>>| all.retain(|other| other.id != listener.id);
        match &listener.kind {
            Kind::Topic { pattern, .. } => match pattern.exact() {
                Some(name) => {
                    if let Some(all) = table.exact.get_mut(&name) {
                        others(all);
                        if all.is_empty() {
                            table.exact.remove(&name);
                        }
                    }
                }
                None => others(&mut table.wild),
            },
            Kind::Replies => others(&mut table.replies),
            Kind::Acked { .. } | Kind::Service { .. } => {}
        }
    }

    /// The listeners to topics.
    pub(crate) fn topics(&self) -> Vec<Arc<Listener>> {
        let table = self.lock();
        let exact = table.exact.values().flatten();
        exact.chain(&table.wild).cloned().collect()
    }

    /// Whether somebody listens to what this binding brings.
    pub(crate) fn needs(&self, pattern: &Pattern) -> bool {
        let table = self.lock();
        match pattern.exact() {
            Some(name) => table.exact.contains_key(&name),
            None => table.wild.iter().any(
                |listener| matches!(&listener.kind, Kind::Topic { pattern: other, .. } if other == pattern),
            ),
        }
    }

    /// Gives a message on a topic to all who listen to it.
    pub(crate) fn deliver(&self, delivery: Delivery, reader: Reader) {
        let name = address::name(delivery.routing_key.as_str());
        let table = self.lock();
        let exact = table.exact.get(&name).into_iter().flatten();
        let wild = table.wild.iter().filter(
            |listener| matches!(&listener.kind, Kind::Topic { pattern, .. } if pattern.matches(&name)),
        );
        let body = Bytes::from(delivery.data);
        let mut read: Option<(bool, Message)> = None;
        for listener in exact.chain(wild) {
            let bare = listener.dialect.is_bare();
            let message = match &read {
                Some((same, message)) if *same == bare => Ok(message.clone()),
                _ => reader.read(
                    &delivery.properties,
                    body.clone(),
                    Use::Topic,
                    listener.dialect,
                ),
            };
            match message {
                Ok(message) => {
                    read = Some((bare, message.clone()));
                    listener.inbox.deliver(Arrival::new(name.clone(), message));
                }
                Err(error) => drop(
                    listener
                        .inbox
                        .malformed(Malformed::new(name.clone(), error)),
                ),
            }
        }
    }

    /// Gives a reply to the one whose lease it answers.
    pub(crate) fn deliver_reply(&self, delivery: Delivery, reader: Reader) {
        let name = Name::from_foreign([delivery.routing_key.as_str()]);
        let body = Bytes::from(delivery.data);
        let read = reader.read(&delivery.properties, body, Use::Rpc, Dialect::default());
        let echoed = delivery
            .properties
            .correlation_id()
            .as_ref()
            .map(ToString::to_string);
        let inner = || {
            read.as_ref()
                .ok()
                .and_then(|message| message.header.correlation_id.clone())
        };
        let key = echoed.or_else(inner);
        let table = self.lock();
        let owner = key.as_deref().and_then(lease_owner);
        let Some(listener) = table
            .replies
            .iter()
            .find(|listener| Some(listener.id) == owner)
        else {
            tracing::debug!(?key, "a reply that nobody waits for");
            return;
        };
        match read {
            Ok(message) => {
                let mut arrival = Arrival::new(name, message);
                arrival.key = key;
                listener.inbox.deliver(arrival);
            }
            Err(error) => {
                let mut malformed = Malformed::new(name, error);
                malformed.key = key;
                listener.inbox.malformed(malformed);
            }
        }
    }

    /// Replies to what was asked before will not come.
    pub(crate) fn replies_lost(&self) {
        for listener in &self.lock().replies {
            listener.gap();
        }
    }

    pub(crate) fn clear(&self) {
        *self.lock() = Table::default();
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The key of the n-th lease of a replies inbox.
pub(crate) fn lease_key(listener: u64, n: u64) -> String {
    format!("{listener}.{n}")
}

fn lease_owner(key: &str) -> Option<u64> {
    key.split_once('.')?.0.parse().ok()
}
