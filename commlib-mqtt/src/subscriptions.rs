//! Who listens to what, and what the broker is asked for because of it.
//!
//! A broker may send one copy of a message for each subscription that matches it (MQTT 3.1.1, 3.3.5). So it is asked
//! only for filters that no other one covers; whoever listens to a covered filter is served from the wide one.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use commlib_core::{Error, ErrorKind, Gap, GapCause};

use crate::filter::{covers, is_wild, overlap};
use crate::listener::{Listener, Waiting};
use crate::packet::QoS;

/// The table of listeners, and what the broker knows of it.
#[derive(Debug, Default)]
pub(crate) struct Subscriptions {
    exact: HashMap<String, Group>,
    wild: BTreeMap<String, Group>,
    listeners: HashMap<u64, Arc<Listener>>,
    waiting: HashMap<u64, Waiting>,
    asked: HashMap<String, Asked>,
    /// Something changed since the last look, in this filter alone or anywhere.
    stale: Stale,
    /// Some filters that the broker was asked for may match one topic.
    overlapping: bool,
    /// Some filters are to be given up once others that replace them are granted.
    surplus: bool,
}

#[derive(Debug, Default)]
enum Stale {
    #[default]
    Nothing,
    Exact(Vec<String>),
    All,
}

/// The listeners of one filter.
#[derive(Debug)]
struct Group {
    listeners: Vec<Arc<Listener>>,
    qos: QoS,
    durable: bool,
}

impl Default for Group {
    fn default() -> Self {
        Self {
            listeners: Vec::new(),
            qos: QoS::AtMostOnce,
            durable: false,
        }
    }
}

/// What the broker was asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Asked {
    qos: QoS,
    state: State,
    /// How many answers are still to come: only the last counts.
    answers: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// On an earlier link of the same session.
    Before,
    Pending,
    Granted,
}

/// What to tell the broker, subscriptions first.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Changes {
    pub(crate) subscribe: Vec<(String, QoS)>,
    pub(crate) unsubscribe: Vec<String>,
}

impl Subscriptions {
    /// Adds a listener; `waiting` is told once the broker serves it.
    pub(crate) fn join(&mut self, listener: &Arc<Listener>, waiting: Waiting) {
        let (filter, qos, durable) = (&listener.filter, listener.qos, listener.durable);
        self.mark(filter);
        let group = self.group_or_new(filter);
        group.listeners.push(listener.clone());
        group.durable |= durable;
        group.qos = max(group.qos, qos);
        self.listeners.insert(listener.id, listener.clone());
        if self.serves(listener) {
            let _ = waiting.send(Ok(()));
        } else {
            self.waiting.insert(listener.id, waiting);
        }
    }

    /// Removes a listener. The broker is still asked for its filter if others or a durable name need it.
    pub(crate) fn leave(&mut self, id: u64) -> Option<Arc<Listener>> {
        self.waiting.remove(&id);
        let listener = self.listeners.remove(&id)?;
        if let Some(group) = self.group(&listener.filter) {
            group.listeners.retain(|other| other.id != id);
            if group.listeners.is_empty() && !group.durable {
                self.remove_group(&listener.filter);
                self.mark(&listener.filter);
            }
        }
        Some(listener)
    }

    /// A listener by its id.
    pub(crate) fn listener(&self, id: u64) -> Option<&Arc<Listener>> {
        self.listeners.get(&id)
    }

    /// All listeners.
    pub(crate) fn listeners(&self) -> impl Iterator<Item = &Arc<Listener>> {
        self.listeners.values()
    }

    /// Listeners that the broker has served before.
    pub(crate) fn confirmed(&self) -> impl Iterator<Item = &Arc<Listener>> {
        self.listeners
            .values()
            .filter(|listener| !self.waiting.contains_key(&listener.id))
    }

    /// Appends the listeners that get a message on this topic.
    pub(crate) fn route(&self, topic: &str, to: &mut Vec<Arc<Listener>>) {
        if let Some(group) = self.exact.get(topic) {
            to.extend(group.listeners.iter().cloned());
        }
        for (filter, group) in &self.wild {
            if covers(filter, topic) {
                to.extend(group.listeners.iter().cloned());
            }
        }
    }

    /// Whether an at-least-once message on this topic that nobody takes now may be meant for a listener to come: for a
    /// durable name, or for what an earlier process asked of this session.
    pub(crate) fn expects_listener(&self, topic: &str) -> bool {
        let durable = |group: &Group| group.durable && group.listeners.is_empty();
        self.exact.get(topic).is_some_and(durable)
            || self
                .wild
                .iter()
                .any(|(f, g)| durable(g) && covers(f, topic))
            || !self
                .asked
                .iter()
                .any(|(f, asked)| asked.qos != QoS::AtMostOnce && covers(f, topic))
    }

    /// Whether the broker may send several copies of a message on this topic.
    pub(crate) fn may_repeat(&self, topic: &str) -> bool {
        self.overlapping && self.asked.keys().filter(|f| covers(f, topic)).count() > 1
    }

    /// There is a new link. A session that was not resumed knows of no filter.
    pub(crate) fn link_up(&mut self, resumed: bool) {
        if resumed {
            for asked in self.asked.values_mut() {
                asked.state = State::Before;
                asked.answers = 0;
            }
        } else {
            self.asked.clear();
        }
        self.stale = Stale::All;
    }

    /// Whether the broker answered all that it was asked.
    pub(crate) fn settled(&self) -> bool {
        matches!(self.stale, Stale::Nothing)
            && !self
                .asked
                .values()
                .any(|asked| asked.state == State::Pending)
    }

    /// What changed since the last call; the broker must be told now.
    pub(crate) fn changes(&mut self) -> Changes {
        match std::mem::take(&mut self.stale) {
            Stale::Nothing => Changes::default(),
            Stale::Exact(filters) => self.changes_of(filters),
            Stale::All => self.all_changes(),
        }
    }

    /// The filters that are not to outlive a clean end.
    pub(crate) fn passing(&self) -> Vec<String> {
        let durable = |filter: &str| {
            self.groups()
                .any(|(other, group)| group.durable && covers(filter, other))
        };
        self.asked.keys().filter(|f| !durable(f)).cloned().collect()
    }

    /// The broker answered; `None` is a refusal. Listeners that it does not serve are told and removed.
    pub(crate) fn answered(&mut self, filter: &str, granted: Option<QoS>) {
        let Some(asked) = self.asked.get_mut(filter) else {
            return;
        };
        asked.answers = asked.answers.saturating_sub(1);
        match granted {
            Some(_) if asked.answers > 0 => {}
            Some(qos) => {
                asked.state = State::Granted;
                self.granted(filter, qos);
            }
            None => {
                self.asked.remove(filter);
                self.refuse(
                    |listener| listener.filter == filter,
                    ErrorKind::Broker,
                    "the broker refused the subscription; check its access rules",
                );
                // Filters that this one covered are to be asked for themselves.
                self.remove_group(filter);
                self.stale = Stale::All;
            }
        }
        if self.surplus {
            self.stale = Stale::All;
        }
    }

    fn granted(&mut self, filter: &str, qos: QoS) {
        self.refuse(
            |listener| listener.qos > qos && covers(filter, &listener.filter),
            ErrorKind::Unsupported,
            "the broker grants no at-least-once delivery here",
        );
        let served: Vec<u64> = self
            .waiting
            .keys()
            .filter(|id| {
                self.listeners
                    .get(id)
                    .is_some_and(|listener| covers(filter, &listener.filter))
            })
            .copied()
            .collect();
        for waiting in served.iter().filter_map(|id| self.waiting.remove(id)) {
            let _ = waiting.send(Ok(()));
        }
    }

    fn refuse(&mut self, whom: impl Fn(&Listener) -> bool, kind: ErrorKind, why: &str) {
        let refused: Vec<_> = self
            .listeners
            .values()
            .filter(|listener| whom(listener))
            .cloned()
            .collect();
        for listener in refused {
            let waiting = self.waiting.remove(&listener.id);
            self.leave(listener.id);
            if let Some(waiting) = waiting {
                let error = Error::new(kind, "subscribe to")
                    .at(&listener.filter)
                    .because(why);
                let _ = waiting.send(Err(error));
            } else {
                // It was served on an earlier link: it sees a gap, then its end.
                tracing::error!(filter = %listener.filter, why, "subscription ended");
                listener.inbox.gap(Gap::new(GapCause::LinkLost, None));
            }
        }
    }

    /// Whether a granted filter already brings what the listener wants.
    fn serves(&self, listener: &Listener) -> bool {
        let granted = |asked: &Asked| asked.state == State::Granted && asked.qos >= listener.qos;
        self.asked.get(&listener.filter).is_some_and(granted)
            || (!self.wild.is_empty()
                && self
                    .asked
                    .iter()
                    .any(|(f, asked)| granted(asked) && covers(f, &listener.filter)))
    }

    /// Changes in exact filters alone: those that a wildcard touches make everything stale instead.
    fn changes_of(&mut self, filters: Vec<String>) -> Changes {
        let mut changes = Changes::default();
        for filter in filters {
            let wanted = self.exact.get(&filter).map(|group| group.qos);
            let asked = self.asked.get(&filter);
            match (wanted, asked) {
                (Some(qos), asked) if asked.is_none_or(|asked| asked.qos < qos) => {
                    self.ask(filter, qos, &mut changes);
                }
                (None, Some(asked)) if asked.state == State::Pending => self.surplus = true,
                (None, Some(_)) => {
                    self.asked.remove(&filter);
                    changes.unsubscribe.push(filter);
                }
                _ => {}
            }
        }
        changes
    }

    fn all_changes(&mut self) -> Changes {
        let wanted = self.wanted();
        let mut changes = Changes::default();
        for (filter, &qos) in &wanted {
            let known = self.asked.get(filter);
            if known.is_none_or(|asked| asked.state == State::Before || asked.qos < qos) {
                self.ask(filter.clone(), qos, &mut changes);
            }
        }
        // A filter that is wanted no more goes when what replaces it is granted, so that nothing is missed.
        let pending: Vec<&String> = wanted
            .keys()
            .filter(|f| {
                self.asked
                    .get(*f)
                    .is_none_or(|asked| asked.state != State::Granted)
            })
            .collect();
        self.surplus = false;
        let mut surplus = Vec::new();
        for (filter, asked) in &self.asked {
            if wanted.contains_key(filter) {
                continue;
            }
            if asked.state == State::Pending || pending.iter().any(|other| overlap(other, filter)) {
                self.surplus = true;
            } else {
                surplus.push(filter.clone());
            }
        }
        for filter in &surplus {
            self.asked.remove(filter);
        }
        changes.unsubscribe = surplus;
        changes.subscribe.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        self.overlapping = self.asked.keys().filter(|f| is_wild(f)).any(|wild| {
            self.asked
                .keys()
                .any(|other| other != wild && overlap(wild, other))
        });
        changes
    }

    /// The widest filters with the highest delivery that anyone below them wants.
    fn wanted(&self) -> HashMap<String, QoS> {
        let roots: Vec<&str> = self
            .wild
            .keys()
            .map(String::as_str)
            .filter(|f| !self.wild.keys().any(|w| w != f && covers(w, f)))
            .collect();
        let mut wanted = HashMap::new();
        for (filter, group) in self.groups() {
            let root = roots.iter().find(|root| covers(root, filter));
            let root = root.copied().unwrap_or(filter);
            let qos = wanted.entry(root.to_owned()).or_insert(group.qos);
            *qos = max(*qos, group.qos);
        }
        wanted
    }

    fn ask(&mut self, filter: String, qos: QoS, changes: &mut Changes) {
        let before = self.asked.get(&filter).map_or(0, |asked| asked.answers);
        let asked = Asked {
            qos,
            state: State::Pending,
            answers: before + 1,
        };
        self.asked.insert(filter.clone(), asked);
        changes.subscribe.push((filter, qos));
    }

    fn mark(&mut self, filter: &str) {
        let touched = |wild: &String| covers(wild, filter);
        if is_wild(filter) || self.surplus || self.wild.iter().any(|(wild, _)| touched(wild)) {
            self.stale = Stale::All;
        }
        match &mut self.stale {
            Stale::Nothing => self.stale = Stale::Exact(vec![filter.to_owned()]),
            Stale::Exact(filters) => filters.push(filter.to_owned()),
            Stale::All => {}
        }
    }

    fn groups(&self) -> impl Iterator<Item = (&str, &Group)> {
        let exact = self.exact.iter().map(|(f, g)| (f.as_str(), g));
        exact.chain(self.wild.iter().map(|(f, g)| (f.as_str(), g)))
    }

    fn group(&mut self, filter: &str) -> Option<&mut Group> {
        match is_wild(filter) {
            true => self.wild.get_mut(filter),
            false => self.exact.get_mut(filter),
        }
    }

    fn group_or_new(&mut self, filter: &str) -> &mut Group {
        let owned = filter.to_owned();
        match is_wild(filter) {
            true => self.wild.entry(owned).or_default(),
            false => self.exact.entry(owned).or_default(),
        }
    }

    fn remove_group(&mut self, filter: &str) {
        self.exact.remove(filter);
        self.wild.remove(filter);
    }
}

fn max(a: QoS, b: QoS) -> QoS {
    if a < b { b } else { a }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listener::Kind;
    use crate::packet::QoS::{AtLeastOnce, AtMostOnce};
    use commlib_core::{Dialect, Inbox, ListenOptions, Result};
    use tokio::sync::oneshot;

    struct Table {
        subscriptions: Subscriptions,
        last: u64,
        inboxes: Vec<Inbox>,
    }

    type Answer = oneshot::Receiver<Result<()>>;

    impl Table {
        fn new() -> Self {
            Self {
                subscriptions: Subscriptions::default(),
                last: 0,
                inboxes: Vec::new(),
            }
        }

        fn join(&mut self, filter: &str, qos: QoS, durable: bool) -> (u64, Answer) {
            let (inbox, receiver) = Inbox::new(&ListenOptions::default());
            self.inboxes.push(receiver);
            self.last += 1;
            let (waiting, answer) = oneshot::channel();
            let listener = Listener {
                id: self.last,
                filter: filter.to_owned(),
                kind: Kind::Topic,
                qos,
                dialect: Dialect::default(),
                durable,
                inbox,
                name: None,
            };
            self.subscriptions.join(&Arc::new(listener), waiting);
            (self.last, answer)
        }

        /// What the broker is told now, and grants at once.
        fn sync(&mut self) -> (Vec<String>, Vec<String>) {
            let changes = self.subscriptions.changes();
            for (filter, qos) in &changes.subscribe {
                self.subscriptions.answered(filter, Some(*qos));
            }
            let names = changes.subscribe.into_iter().map(|(f, _)| f).collect();
            (names, changes.unsubscribe)
        }

        fn route(&self, topic: &str) -> Vec<u64> {
            let mut to = Vec::new();
            self.subscriptions.route(topic, &mut to);
            let mut ids: Vec<_> = to.iter().map(|listener| listener.id).collect();
            ids.sort_unstable();
            ids
        }
    }

    fn served(answer: &mut Answer) -> bool {
        matches!(answer.try_recv(), Ok(Ok(())))
    }

    #[test]
    fn inboxes_on_one_filter_share_a_subscription() {
        let mut table = Table::new();
        let (a, mut first) = table.join("x", AtMostOnce, false);
        assert_eq!(
            table.subscriptions.changes().subscribe,
            [("x".into(), AtMostOnce)]
        );
        let (b, mut second) = table.join("x", AtMostOnce, false);
        assert_eq!(table.subscriptions.changes(), Changes::default());
        assert!(!served(&mut first) && !table.subscriptions.settled());
        table.subscriptions.answered("x", Some(AtMostOnce));
        assert!(served(&mut first) && served(&mut second) && table.subscriptions.settled());
        // A higher delivery is asked for anew, and the answer to it counts.
        let (c, mut third) = table.join("x", AtLeastOnce, false);
        assert_eq!(
            table.subscriptions.changes().subscribe,
            [("x".into(), AtLeastOnce)]
        );
        table.subscriptions.answered("x", Some(AtLeastOnce));
        assert!(served(&mut third));
        assert_eq!(table.route("x"), [a, b, c]);
        for id in [a, b] {
            table.subscriptions.leave(id);
            assert_eq!(table.subscriptions.changes(), Changes::default());
        }
        table.subscriptions.leave(c);
        assert_eq!(table.sync(), (vec![], vec!["x".to_owned()]));
        assert!(table.route("x").is_empty());
    }

    #[test]
    fn only_the_last_answer_for_a_filter_counts() {
        let mut table = Table::new();
        let (_, mut first) = table.join("x", AtMostOnce, false);
        table.subscriptions.changes();
        let (_, mut second) = table.join("x", AtLeastOnce, false);
        table.subscriptions.changes();
        table.subscriptions.answered("x", Some(AtMostOnce));
        assert!(!served(&mut second));
        table.subscriptions.answered("x", Some(AtLeastOnce));
        assert!(served(&mut first) && served(&mut second));
    }

    #[test]
    fn gone_while_asked_for() {
        let mut table = Table::new();
        let (id, _answer) = table.join("x", AtMostOnce, false);
        table.subscriptions.changes();
        table.subscriptions.leave(id);
        assert_eq!(table.subscriptions.changes(), Changes::default());
        table.subscriptions.answered("x", Some(AtMostOnce));
        assert_eq!(table.sync(), (vec![], vec!["x".to_owned()]));
    }

    #[test]
    fn the_widest_filter_with_the_highest_delivery_is_asked_for() {
        let mut table = Table::new();
        table.join("a/b", AtLeastOnce, false);
        table.sync();
        let (wide, _answer) = table.join("a/#", AtMostOnce, false);
        let changes = table.subscriptions.changes();
        assert_eq!(changes.subscribe, [("a/#".into(), AtLeastOnce)]);
        assert!(changes.unsubscribe.is_empty(), "not before it is granted");
        table.subscriptions.answered("a/#", Some(AtLeastOnce));
        assert_eq!(table.sync(), (vec![], vec!["a/b".to_owned()]));
        let (_, mut covered) = table.join("a/+/c", AtLeastOnce, false);
        assert!(served(&mut covered));
        assert_eq!(table.sync(), (vec![], vec![]));
        assert!(!table.subscriptions.may_repeat("a/b"));
        table.subscriptions.leave(wide);
        assert_eq!(
            table.sync(),
            (vec!["a/+/c".to_owned(), "a/b".to_owned()], vec![])
        );
        assert_eq!(table.sync(), (vec![], vec!["a/#".to_owned()]));
    }

    #[test]
    fn partial_overlap_is_known() {
        let mut table = Table::new();
        table.join("a/+/c", AtMostOnce, false);
        table.join("a/b/+", AtMostOnce, false);
        table.sync();
        assert!(table.subscriptions.may_repeat("a/b/c"));
        assert!(!table.subscriptions.may_repeat("a/b/d"));
    }

    #[test]
    fn a_durable_filter_outlives_its_inbox() {
        let mut table = Table::new();
        let (id, _answer) = table.join("d/#", AtLeastOnce, true);
        table.join("x", AtMostOnce, false);
        table.sync();
        assert!(!table.subscriptions.expects_listener("d/1"));
        assert!(
            table.subscriptions.expects_listener("y"),
            "asked for by an earlier process"
        );
        table.subscriptions.leave(id);
        assert_eq!(table.sync(), (vec![], vec![]));
        assert!(table.subscriptions.expects_listener("d/1"));
        assert_eq!(table.subscriptions.passing(), ["x"]);
    }

    #[test]
    fn a_resumed_session_hears_what_is_new_and_what_is_over() {
        let mut table = Table::new();
        let (old, _answer) = table.join("old", AtMostOnce, false);
        let (_, mut kept) = table.join("kept", AtMostOnce, false);
        table.sync();
        assert!(served(&mut kept));
        table.subscriptions.leave(old);
        table.join("new/#", AtMostOnce, false);
        table.subscriptions.link_up(true);
        assert!(!table.subscriptions.settled());
        let (subscribe, unsubscribe) = table.sync();
        assert_eq!(subscribe, ["kept", "new/#"]);
        assert_eq!(unsubscribe, ["old"]);
        table.subscriptions.link_up(false);
        assert_eq!(
            table.sync(),
            (vec!["kept".to_owned(), "new/#".to_owned()], vec![])
        );
    }

    #[test]
    fn what_a_refused_filter_covered_is_asked_for_itself() {
        let mut table = Table::new();
        let (_, mut wide) = table.join("a/#", AtMostOnce, false);
        let (narrow, mut answer) = table.join("a/b", AtMostOnce, false);
        assert_eq!(
            table.subscriptions.changes().subscribe,
            [("a/#".into(), AtMostOnce)]
        );
        table.subscriptions.answered("a/#", None);
        assert!(wide.try_recv().unwrap().is_err());
        assert!(!served(&mut answer));
        assert_eq!(table.sync().0, ["a/b"]);
        assert!(served(&mut answer));
        assert_eq!(table.route("a/b"), [narrow]);
    }
}
