//! The broker: who listens to what. One lock, held for moments; no tasks of its own.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::{Notify, watch};

use super::acked::Acked;
use crate::address::{Name, Pattern};
use crate::inbox::{Arrival, Gap, GapCause, InboxSender};
use crate::link::{AbsentService, Capabilities, LinkState, QueueKind};
use crate::message::Message;

/// How many requests wait for a service that is not there yet, where they are kept.
const MAX_KEPT_REQUESTS: usize = 1024;

/// A broker in this process. Connections keep it alive.
pub struct MemoryBroker {
    name: String,
    capabilities: Capabilities,
    /// The state of all links: they go down together.
    pub(super) state: watch::Sender<LinkState>,
    /// Told when a full subscription may have room again.
    pub(super) room: Notify,
    tables: Mutex<Tables>,
}

#[derive(Default)]
pub(super) struct Tables {
    next_id: u64,
    topics: HashMap<u64, Subscription>,
    exact: HashMap<Name, Vec<u64>>,
    patterns: Vec<u64>,
    queues: HashMap<Name, Queue>,
    replies: HashMap<String, InboxSender>,
}

pub(super) struct Subscription {
    pattern: Pattern,
    durable: Option<Name>,
    kind: Kind,
}

enum Kind {
    BestEffort(InboxSender),
    AtLeastOnce(Acked),
}

#[derive(Default)]
struct Queue {
    services: Vec<(u64, InboxSender)>,
    turn: usize,
    kept: Vec<Message>,
}

/// Why a message was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// A subscription that must not lose it has no room.
    Full,
    /// Nobody serves the name.
    NoService,
}

impl MemoryBroker {
    /// The broker of this name, made with these capabilities if nobody is connected to it.
    pub fn named(name: &str, capabilities: &Capabilities) -> Arc<Self> {
        static BROKERS: LazyLock<Mutex<HashMap<String, Weak<MemoryBroker>>>> =
            LazyLock::new(Mutex::default);
        let mut brokers = BROKERS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(broker) = brokers.get(name).and_then(Weak::upgrade) {
            return broker;
        }
        brokers.retain(|_, broker| broker.strong_count() > 0);
        let broker = Arc::new(Self {
            name: name.to_owned(),
            capabilities: capabilities.clone(),
            state: watch::Sender::new(LinkState::Connected { resumed: false }),
            room: Notify::new(),
            tables: Mutex::default(),
        });
        brokers.insert(name.to_owned(), Arc::downgrade(&broker));
        broker
    }

    /// The name it was made with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it can do.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// For tests: takes the broker down, as a crash would. Links are lost, calls in flight fail.
    pub fn stop(&self) {
        self.state.send_if_modified(|state| {
            let up = state.is_connected();
            if up {
                *state = LinkState::Reconnecting {
                    attempt: 1,
                    cause: "the broker was stopped".into(),
                };
            }
            up
        });
        for replies in self.tables().replies.values() {
            replies.gap(Gap::new(GapCause::LinkLost, None));
        }
    }

    /// For tests: brings the broker back, with what it kept for at-least-once subscriptions or without.
    pub fn start(&self, keep_data: bool) {
        let mut tables = self.tables();
        tables
            .queues
            .values_mut()
            .for_each(|queue| queue.kept.clear());
        for subscription in tables.topics.values_mut() {
            match &mut subscription.kind {
                Kind::BestEffort(inbox) => {
                    inbox.gap(Gap::new(GapCause::LinkLost, None));
                }
                Kind::AtLeastOnce(acked) if keep_data => acked.redeliver(),
                Kind::AtLeastOnce(acked) => acked.forget(),
            }
        }
        drop(tables);
        self.state
            .send_replace(LinkState::Connected { resumed: keep_data });
    }

    pub(super) fn tables(&self) -> MutexGuard<'_, Tables> {
        // No code panics while it holds the lock.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tables {
    /// Hands a message to all who listen to its topic. If it must not be lost, to all or to none.
    pub(super) fn publish(
        &mut self,
        topic: &Name,
        message: &Message,
        must_not_lose: bool,
    ) -> Result<(), Refusal> {
        let exact = self.exact.get(topic).map_or(&[][..], Vec::as_slice);
        let hits = || exact.iter().chain(&self.patterns);
        if must_not_lose {
            for id in hits() {
                if let Some(subscription) = self.topics.get(id)
                    && let Kind::AtLeastOnce(acked) = &subscription.kind
                    && acked.is_full()
                    && subscription.pattern.matches(topic)
                {
                    return Err(Refusal::Full);
                }
            }
        }
        for id in hits() {
            let Some(subscription) = self.topics.get_mut(id) else {
                continue;
            };
            if !subscription.pattern.matches(topic) {
                continue;
            }
            match &mut subscription.kind {
                Kind::BestEffort(inbox) => {
                    inbox.deliver(Arrival::new(topic.clone(), message.clone()));
                }
                Kind::AtLeastOnce(acked) => acked.offer(topic, message),
            }
        }
        Ok(())
    }

    /// Hands a request to those who serve the name.
    pub(super) fn request(
        &mut self,
        name: &Name,
        message: Message,
        capabilities: &Capabilities,
    ) -> Result<(), Refusal> {
        let served = self.queues.get_mut(name);
        let Some(queue) = served.filter(|queue| !queue.services.is_empty()) else {
            return match capabilities.absent_service {
                AbsentService::Refused => Err(Refusal::NoService),
                AbsentService::Dropped => Ok(()),
                AbsentService::Kept => {
                    let kept = &mut self.queues.entry(name.clone()).or_default().kept;
                    if kept.len() >= MAX_KEPT_REQUESTS {
                        return Err(Refusal::Full);
                    }
                    kept.push(message);
                    Ok(())
                }
            };
        };
        match capabilities.queue {
            QueueKind::FanOut => {
                for (_, inbox) in &queue.services {
                    inbox.deliver(Arrival::new(name.clone(), message.clone()));
                }
            }
            QueueKind::Competing => {
                queue.turn = (queue.turn + 1) % queue.services.len();
                if let Some((_, inbox)) = queue.services.get(queue.turn) {
                    inbox.deliver(Arrival::new(name.clone(), message));
                }
            }
        }
        Ok(())
    }

    /// Hands a reply to the connection that owns the address; a vanished one is normal.
    pub(super) fn reply(&self, owner: &str, name: Name, key: String, message: Message) {
        if let Some(inbox) = self.replies.get(owner) {
            let mut arrival = Arrival::new(name, message);
            arrival.key = Some(key);
            inbox.deliver(arrival);
        }
    }

    pub(super) fn add_best_effort(&mut self, pattern: Pattern, inbox: InboxSender) -> u64 {
        self.add(pattern, None, Kind::BestEffort(inbox))
    }

    /// The subscription for an at-least-once listener: the durable one of that name, or a new one. `None` if somebody
    /// else listens to the durable one.
    pub(super) fn add_at_least_once(
        &mut self,
        pattern: &Pattern,
        durable: Option<&Name>,
    ) -> Option<u64> {
        let known = durable.and_then(|name| {
            self.topics
                .iter()
                .find(|(_, subscription)| subscription.durable.as_ref() == Some(name))
                .map(|(id, _)| *id)
        });
        match known {
            None => {
                let kind = Kind::AtLeastOnce(Acked::new());
                Some(self.add(pattern.clone(), durable.cloned(), kind))
            }
            Some(id) => {
                if self.acked(id)?.has_consumer() {
                    return None;
                }
                self.unindex(id);
                self.topics.get_mut(&id)?.pattern = pattern.clone();
                self.index(id, pattern);
                Some(id)
            }
        }
    }

    /// The state of an at-least-once subscription.
    pub(super) fn acked(&mut self, id: u64) -> Option<&mut Acked> {
        match &mut self.topics.get_mut(&id)?.kind {
            Kind::AtLeastOnce(acked) => Some(acked),
            Kind::BestEffort(_) => None,
        }
    }

    /// A topic listener is gone; a durable subscription stays.
    pub(super) fn remove_listener(&mut self, id: u64) {
        let Some(subscription) = self.topics.get_mut(&id) else {
            return;
        };
        match &mut subscription.kind {
            Kind::AtLeastOnce(acked) if subscription.durable.is_some() => acked.detach(),
            _ => {
                self.unindex(id);
                self.topics.remove(&id);
            }
        }
    }

    pub(super) fn add_service(&mut self, name: &Name, inbox: InboxSender) -> u64 {
        let id = self.new_id();
        let queue = self.queues.entry(name.clone()).or_default();
        for message in queue.kept.drain(..) {
            inbox.deliver(Arrival::new(name.clone(), message));
        }
        queue.services.push((id, inbox));
        id
    }

    pub(super) fn remove_service(&mut self, name: &Name, id: u64) {
        if let Some(queue) = self.queues.get_mut(name) {
            queue.services.retain(|(service, _)| *service != id);
            if queue.services.is_empty() && queue.kept.is_empty() {
                self.queues.remove(name);
            }
        }
    }

    pub(super) fn add_replies(&mut self, owner: String, inbox: InboxSender) {
        self.replies.insert(owner, inbox);
    }

    pub(super) fn remove_replies(&mut self, owner: &str) {
        self.replies.remove(owner);
    }

    fn add(&mut self, pattern: Pattern, durable: Option<Name>, kind: Kind) -> u64 {
        let id = self.new_id();
        self.index(id, &pattern);
        let subscription = Subscription {
            pattern,
            durable,
            kind,
        };
        self.topics.insert(id, subscription);
        id
    }

    fn index(&mut self, id: u64, pattern: &Pattern) {
        match pattern.exact() {
            Some(name) => self.exact.entry(name).or_default().push(id),
            None => self.patterns.push(id),
        }
    }

    fn unindex(&mut self, id: u64) {
        self.patterns.retain(|known| *known != id);
        let exact = self.topics.get(&id).and_then(|s| s.pattern.exact());
        if let Some(name) = exact
            && let Some(ids) = self.exact.get_mut(&name)
        {
            ids.retain(|known| *known != id);
            if ids.is_empty() {
                self.exact.remove(&name);
            }
        }
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

impl fmt::Debug for MemoryBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryBroker")
            .field("name", &self.name)
            .field("capabilities", &self.capabilities)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_for_nobody_leave_nothing_behind() {
        let mut tables = Tables::default();
        let name = Name::from_foreign(["nobody"]);
        let refused = tables.request(&name, Message::default(), &Capabilities::default());
        assert_eq!(refused, Err(Refusal::NoService));
        assert!(tables.queues.is_empty());
    }
}
