//! Who listens to what: the inboxes of a connection, as its task sees them.

use std::collections::HashMap;
use std::sync::Arc;

use commlib_core::{Dialect, Error, ErrorKind, Gap, GapCause, InboxSender, Name, Result};
use tokio::sync::oneshot;

use crate::filter::{FilterMap, covers};
use crate::packet::{QoS, higher};

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

/// Told how a wish ended, such as a subscription that the broker confirmed or refused.
pub(crate) type Waiting = oneshot::Sender<Result<()>>;

/// All listeners of a connection.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    groups: FilterMap<Group>,
    by_id: HashMap<u64, Arc<Listener>>,
    /// Those that the broker has not served yet, by id.
    waiting: HashMap<u64, Waiting>,
    changed: Vec<String>,
}

/// The listeners of one filter.
#[derive(Debug, Default)]
struct Group {
    listeners: Vec<Arc<Listener>>,
    /// What a durable name wants here, whether anyone listens now or not.
    durable: Option<QoS>,
}

impl Group {
    /// The highest delivery that anyone wants; `None` if nobody wants any.
    fn wanted(&self) -> Option<QoS> {
        let listeners = self.listeners.iter().map(|listener| listener.qos);
        listeners.chain(self.durable).reduce(higher)
    }
}

impl Listeners {
    /// Adds a listener; `waiting` is told once the broker serves it.
    pub(crate) fn join(&mut self, listener: &Arc<Listener>, waiting: Waiting) {
        let group = self.groups.get_or_default(&listener.filter);
        let before = group.wanted();
        group.listeners.push(listener.clone());
        if listener.durable {
            let before = group.durable.unwrap_or(listener.qos);
            group.durable = Some(higher(before, listener.qos));
        }
        if group.wanted() > before {
            self.changed.push(listener.filter.clone());
        }
        self.by_id.insert(listener.id, listener.clone());
        self.waiting.insert(listener.id, waiting);
    }

    /// Removes a listener. Its filter stays if others or a durable name want it.
    pub(crate) fn leave(&mut self, id: u64) -> Option<Arc<Listener>> {
        self.waiting.remove(&id);
        let listener = self.by_id.remove(&id)?;
        if let Some(group) = self.groups.get_mut(&listener.filter) {
            group.listeners.retain(|other| other.id != id);
        }
        self.tidy(&listener.filter);
        Some(listener)
    }

    /// A listener by its id.
    pub(crate) fn get(&self, id: u64) -> Option<&Arc<Listener>> {
        self.by_id.get(&id)
    }

    /// All listeners.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Listener>> {
        self.by_id.values()
    }

    /// Listeners that the broker has served before.
    pub(crate) fn served(&self) -> impl Iterator<Item = &Arc<Listener>> {
        self.iter()
            .filter(|listener| !self.waiting.contains_key(&listener.id))
    }

    /// Appends the listeners that get a message on this topic.
    pub(crate) fn route(&self, topic: &str, to: &mut Vec<Arc<Listener>>) {
        for group in self.groups.covering(topic) {
            to.extend(group.listeners.iter().cloned());
        }
    }

    /// Whether a durable name to which nobody listens now wants messages on this topic.
    pub(crate) fn awaited(&self, topic: &str) -> bool {
        self.groups
            .covering(topic)
            .any(|group| group.durable.is_some() && group.listeners.is_empty())
    }

    /// The highest delivery that anyone wants on this very filter.
    pub(crate) fn wanted_on(&self, filter: &str) -> Option<QoS> {
        self.groups.get(filter)?.wanted()
    }

    /// All filters with the highest delivery that anyone wants on them.
    pub(crate) fn wanted(&self) -> impl Iterator<Item = (&str, QoS)> {
        self.groups
            .iter()
            .filter_map(|(filter, group)| Some((filter, group.wanted()?)))
    }

    /// The filters with a wildcard.
    pub(crate) fn wild(&self) -> impl Iterator<Item = &str> {
        self.groups.wild()
    }

    /// The filters of durable names.
    pub(crate) fn durable(&self) -> impl Iterator<Item = &str> {
        self.groups
            .iter()
            .filter_map(|(filter, group)| group.durable.is_some().then_some(filter))
    }

    /// The filters on which more is wanted since the last call, or nothing any more.
    pub(crate) fn take_changed(&mut self) -> Vec<String> {
        std::mem::take(&mut self.changed)
    }

    /// Tells a listener that the broker serves it.
    pub(crate) fn serve(&mut self, id: u64) {
        if let Some(waiting) = self.waiting.remove(&id) {
            // Gone if whoever listens gave up; then the inbox is gone too.
            let _ = waiting.send(Ok(()));
        }
    }

    /// The broker's last word on a filter that it was asked for with this delivery; `None` is a refusal. Listeners that
    /// it does not serve are told and removed.
    pub(crate) fn answered(&mut self, filter: &str, asked: QoS, granted: Option<QoS>) {
        let Some(granted) = granted else {
            self.refuse(
                |other, _| other == filter,
                ErrorKind::Broker,
                "the broker refused the subscription; check its access rules",
            );
            return;
        };
        if granted < asked {
            self.refuse(
                |other, qos| qos > granted && covers(filter, other),
                ErrorKind::Unsupported,
                "the broker grants no at-least-once delivery here",
            );
        }
        let served = |id: &u64| {
            let listener = self.by_id.get(id);
            listener.is_some_and(|l| l.qos <= granted && covers(filter, &l.filter))
        };
        let served: Vec<u64> = self.waiting.keys().copied().filter(served).collect();
        for id in served {
            self.serve(id);
        }
    }

    /// Ends the listeners and durable names of these filters and deliveries.
    fn refuse(&mut self, whom: impl Fn(&str, QoS) -> bool, kind: ErrorKind, why: &str) {
        let refused =
            |(filter, group): &(&str, &Group)| group.durable.is_some_and(|q| whom(filter, q));
        let names = self.groups.iter().filter(refused);
        let names: Vec<String> = names.map(|(filter, _)| filter.to_owned()).collect();
        for filter in names {
            if let Some(group) = self.groups.get_mut(&filter) {
                group.durable = None;
            }
            self.tidy(&filter);
        }
        let refused = self.iter().filter(|l| whom(&l.filter, l.qos));
        let refused: Vec<_> = refused.cloned().collect();
        for listener in refused {
            if let Some(waiting) = self.waiting.remove(&listener.id) {
                let error = Error::new(kind, "subscribe to")
                    .at(&listener.filter)
                    .because(why);
                let _ = waiting.send(Err(error));
            } else {
                // It was served on an earlier link: it sees a gap, then its end.
                tracing::error!(filter = %listener.filter, why, "subscription ended");
                listener.inbox.gap(Gap::new(GapCause::LinkLost, None));
            }
            self.leave(listener.id);
        }
    }

    /// Forgets a filter that nobody wants any more.
    fn tidy(&mut self, filter: &str) {
        if self
            .groups
            .get(filter)
            .is_some_and(|g| g.wanted().is_none())
        {
            self.groups.remove(filter);
            self.changed.push(filter.to_owned());
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::packet::QoS::{AtLeastOnce, AtMostOnce};
    use commlib_core::{Delivery, Inbox, ListenOptions};

    /// A listener to a topic, and its inbox for three messages.
    pub(crate) fn listener(
        id: u64,
        filter: &str,
        qos: QoS,
        durable: bool,
    ) -> (Arc<Listener>, Inbox) {
        let delivery = match qos {
            AtMostOnce => Delivery::BestEffort,
            _ => Delivery::AtLeastOnce,
        };
        let options = ListenOptions::default().delivery(delivery).prefetch(3);
        let (inbox, receiver) = Inbox::new(&options);
        let listener = Listener {
            id,
            filter: filter.to_owned(),
            kind: Kind::Topic,
            qos,
            dialect: Dialect::default(),
            durable,
            inbox,
            name: None,
        };
        (Arc::new(listener), receiver)
    }

    fn join(table: &mut Listeners, id: u64, filter: &str, qos: QoS, durable: bool) {
        let (waiting, _) = oneshot::channel();
        table.join(&listener(id, filter, qos, durable).0, waiting);
    }

    #[test]
    fn each_gets_what_it_listens_to() {
        let mut table = Listeners::default();
        for (id, filter) in ["a/b", "a/b", "a/+", "#", "a/b/c"].into_iter().enumerate() {
            join(&mut table, id as u64, filter, AtMostOnce, false);
        }
        table.leave(1);
        let route = |topic: &str| {
            let mut to = Vec::new();
            table.route(topic, &mut to);
            let mut ids: Vec<_> = to.iter().map(|listener| listener.id).collect();
            ids.sort_unstable();
            ids
        };
        assert_eq!(route("a/b"), [0, 2, 3]);
        assert_eq!(route("a/b/c"), [3, 4]);
        assert!(route("$SYS/x").is_empty());
    }

    #[test]
    fn only_what_matters_to_the_broker_is_a_change() {
        let mut table = Listeners::default();
        join(&mut table, 1, "a", AtMostOnce, false);
        join(&mut table, 2, "a", AtMostOnce, false);
        assert_eq!(table.take_changed(), ["a"]);
        join(&mut table, 3, "a", AtLeastOnce, false);
        assert_eq!(table.take_changed(), ["a"]);
        assert_eq!(table.wanted_on("a"), Some(AtLeastOnce));
        table.leave(3);
        table.leave(1);
        assert!(table.take_changed().is_empty());
        assert_eq!(table.wanted_on("a"), Some(AtMostOnce));
        table.leave(2);
        assert_eq!(table.take_changed(), ["a"]);
        assert_eq!(table.wanted().count(), 0);
    }

    #[test]
    fn a_durable_name_is_wanted_without_listeners() {
        let mut table = Listeners::default();
        join(&mut table, 1, "d/#", AtLeastOnce, true);
        assert!(!table.awaited("d/1"));
        table.take_changed();
        table.leave(1);
        assert!(table.take_changed().is_empty());
        assert!(table.awaited("d/1") && !table.awaited("e"));
        assert_eq!(table.wanted().collect::<Vec<_>>(), [("d/#", AtLeastOnce)]);
        assert_eq!(table.durable().collect::<Vec<_>>(), ["d/#"]);
        table.answered("d/#", AtLeastOnce, None);
        assert_eq!(table.take_changed(), ["d/#"]);
        assert_eq!(table.durable().count(), 0);
    }
}
