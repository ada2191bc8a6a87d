//! What the broker is asked for, because of those who listen.
//!
//! A broker may send one copy of a message for each subscription that matches it (MQTT 3.1.1, 3.3.5). So it is asked
//! only for filters that no other one covers; whoever listens to a covered filter is served from the wide one.

use std::collections::BTreeMap;

use crate::filter::{FilterMap, covers, is_wild, overlap};
use crate::listeners::{Listener, Listeners};
use crate::packet::{QoS, higher};

/// What the broker knows of the filters that are listened to.
#[derive(Debug, Default)]
pub(crate) struct Subscriptions {
    asked: FilterMap<Asked>,
    /// All filters are to be looked at, not only those that changed.
    stale: bool,
    /// Some filters are to be given up after one of the next answers.
    surplus: bool,
}

/// What the broker was asked for.
#[derive(Debug)]
struct Asked {
    qos: QoS,
    state: State,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// On an earlier link of the same session.
    Before,
    /// So many answers are still to come; only the last counts.
    Pending(u32),
    Granted(QoS),
}

impl Asked {
    fn is_pending(&self) -> bool {
        matches!(self.state, State::Pending(_))
    }
}

/// What to tell the broker, subscriptions first.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Changes {
    pub(crate) subscribe: Vec<(String, QoS)>,
    pub(crate) unsubscribe: Vec<String>,
}

impl Subscriptions {
    /// The link is gone: nobody is served until the broker has confirmed that anew.
    pub(crate) fn link_lost(&mut self) {
        for asked in self.asked.values_mut() {
            asked.state = State::Before;
        }
    }

    /// There is a new link. A session that was not resumed knows of no filter.
    pub(crate) fn link_up(&mut self, resumed: bool) {
        if !resumed {
            self.asked = FilterMap::default();
        }
        self.stale = true;
    }

    /// Whether the broker answered all that it was asked.
    pub(crate) fn settled(&self) -> bool {
        !self.stale && !self.asked.iter().any(|(_, asked)| asked.is_pending())
    }

    /// Whether a granted filter already brings what the listener wants.
    pub(crate) fn serves(&self, listener: &Listener) -> bool {
        self.asked
            .covering(&listener.filter)
            .any(|asked| matches!(asked.state, State::Granted(qos) if qos >= listener.qos))
    }

    /// Whether the broker was asked for at-least-once messages on this topic.
    pub(crate) fn explains(&self, topic: &str) -> bool {
        self.asked
            .covering(topic)
            .any(|asked| asked.qos != QoS::AtMostOnce)
    }

    /// Whether the broker may send several copies of a message on this topic.
    pub(crate) fn may_repeat(&self, topic: &str) -> bool {
        self.asked.covering(topic).nth(1).is_some()
    }

    /// The filters that are not to outlive a clean end.
    pub(crate) fn passing(&self, listeners: &Listeners) -> Vec<String> {
        let stays = |filter: &str| listeners.durable().any(|durable| covers(filter, durable));
        let asked = self.asked.iter().map(|(filter, _)| filter);
        asked.filter(|f| !stays(f)).map(str::to_owned).collect()
    }

    /// What to tell the broker now that these filters changed.
    pub(crate) fn changes(&mut self, listeners: &Listeners, changed: &[String]) -> Changes {
        // A filter below a wildcard is the business of that one, and a wildcard that of all it covers.
        let touches_others =
            |f: &String| is_wild(f) || listeners.wild().any(|wild| covers(wild, f));
        self.stale |= changed.iter().any(|f| self.surplus || touches_others(f));
        if std::mem::take(&mut self.stale) {
            self.surplus = false;
            let asked: Vec<String> = self.asked.iter().map(|(f, _)| f.to_owned()).collect();
            self.compare(&widest(listeners), &asked)
        } else {
            let wanted = changed.iter().map(String::as_str);
            let wanted = wanted.filter_map(|f| Some((f, listeners.wanted_on(f)?)));
            self.compare(&wanted.collect(), changed)
        }
    }

    /// Asks for what is wanted, and gives up what else is among `asked`.
    fn compare(&mut self, wanted: &BTreeMap<&str, QoS>, asked: &[String]) -> Changes {
        let mut changes = Changes::default();
        for (&filter, &qos) in wanted {
            let answers = match self.asked.get(filter) {
                Some(asked) => match asked.state {
                    State::Granted(granted) if granted >= qos => continue,
                    State::Pending(_) if asked.qos >= qos => continue,
                    State::Pending(answers) => answers,
                    State::Before | State::Granted(_) => 0,
                },
                None => 0,
            };
            let state = State::Pending(answers + 1);
            self.asked.insert(filter, Asked { qos, state });
            changes.subscribe.push((filter.to_owned(), qos));
        }
        // A filter that is wanted no more goes when what replaces it is granted, so that nothing is missed.
        let is_pending = |f: &str| self.asked.get(f).is_some_and(Asked::is_pending);
        let pending: Vec<&str> = wanted.keys().copied().filter(|f| is_pending(f)).collect();
        for filter in asked.iter().filter(|f| !wanted.contains_key(f.as_str())) {
            let Some(known) = self.asked.get(filter) else {
                continue;
            };
            if known.is_pending() || pending.iter().any(|p| overlap(p, filter)) {
                self.surplus = true;
            } else {
                self.asked.remove(filter);
                changes.unsubscribe.push(filter.clone());
            }
        }
        changes
    }

    /// The broker answered; `None` is a refusal. Returns what it was asked for if this is its last word on the filter.
    pub(crate) fn answered(&mut self, filter: &str, granted: Option<QoS>) -> Option<QoS> {
        let asked = self.asked.get_mut(filter)?;
        let qos = asked.qos;
        match (asked.state, granted) {
            (State::Pending(answers), _) if answers > 1 => {
                asked.state = State::Pending(answers - 1);
                return None;
            }
            (_, Some(granted)) => asked.state = State::Granted(granted),
            (_, None) => self.asked.remove(filter),
        }
        self.stale |= self.surplus;
        Some(qos)
    }
}

/// The widest filters with the highest delivery that anyone below them wants.
fn widest(listeners: &Listeners) -> BTreeMap<&str, QoS> {
    let covered = |f: &&str| listeners.wild().any(|wild| wild != *f && covers(wild, f));
    let roots: Vec<&str> = listeners.wild().filter(|f| !covered(f)).collect();
    let mut widest = BTreeMap::new();
    for (filter, wanted) in listeners.wanted() {
        // Of several that overlap each gets the delivery: whichever copy comes first is the one that counts.
        let above = roots.iter().copied().filter(|root| covers(root, filter));
        let alone = (!covered(&filter)).then_some(filter);
        for root in above.chain(alone) {
            let qos = widest.entry(root).or_insert(wanted);
            *qos = higher(*qos, wanted);
        }
    }
    widest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listeners::tests::listener;
    use crate::packet::QoS::{AtLeastOnce, AtMostOnce};
    use commlib_core::{ErrorKind, Inbox, Result};
    use proptest::prelude::*;
    use std::collections::VecDeque;
    use tokio::sync::oneshot;

    struct Table {
        listeners: Listeners,
        subscriptions: Subscriptions,
        last: u64,
        inboxes: Vec<Inbox>,
    }

    type Answer = oneshot::Receiver<Result<()>>;

    impl Table {
        fn new() -> Self {
            Self {
                listeners: Listeners::default(),
                subscriptions: Subscriptions::default(),
                last: 0,
                inboxes: Vec::new(),
            }
        }

        fn join(&mut self, filter: &str, qos: QoS, durable: bool) -> (u64, Answer) {
            self.last += 1;
            let (listener, inbox) = listener(self.last, filter, qos, durable);
            self.inboxes.push(inbox);
            let (waiting, answer) = oneshot::channel();
            self.listeners.join(&listener, waiting);
            if self.subscriptions.serves(&listener) {
                self.listeners.serve(listener.id);
            }
            (self.last, answer)
        }

        fn changes(&mut self) -> Changes {
            let changed = self.listeners.take_changed();
            self.subscriptions.changes(&self.listeners, &changed)
        }

        fn answered(&mut self, filter: &str, granted: Option<QoS>) {
            if let Some(asked) = self.subscriptions.answered(filter, granted) {
                self.listeners.answered(filter, asked, granted);
            }
        }

        /// What the broker is told now, and grants at once.
        fn sync(&mut self) -> (Vec<String>, Vec<String>) {
            let changes = self.changes();
            for (filter, qos) in &changes.subscribe {
                self.answered(filter, Some(*qos));
            }
            let names = changes.subscribe.into_iter().map(|(f, _)| f).collect();
            (names, changes.unsubscribe)
        }

        fn route(&self, topic: &str) -> Vec<u64> {
            let mut to = Vec::new();
            self.listeners.route(topic, &mut to);
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
        assert_eq!(table.changes().subscribe, [("x".into(), AtMostOnce)]);
        let (b, mut second) = table.join("x", AtMostOnce, false);
        assert_eq!(table.changes(), Changes::default());
        assert!(!served(&mut first) && !table.subscriptions.settled());
        table.answered("x", Some(AtMostOnce));
        assert!(served(&mut first) && served(&mut second) && table.subscriptions.settled());
        // A higher delivery is asked for anew, and the answer to it counts.
        let (c, mut third) = table.join("x", AtLeastOnce, false);
        assert_eq!(table.changes().subscribe, [("x".into(), AtLeastOnce)]);
        table.answered("x", Some(AtLeastOnce));
        assert!(served(&mut third));
        assert_eq!(table.route("x"), [a, b, c]);
        for id in [a, b] {
            table.listeners.leave(id);
            assert_eq!(table.changes(), Changes::default());
        }
        table.listeners.leave(c);
        assert_eq!(table.sync(), (vec![], vec!["x".to_owned()]));
        assert!(table.route("x").is_empty());
    }

    #[test]
    fn only_the_last_answer_for_a_filter_counts() {
        let mut table = Table::new();
        let (_, mut first) = table.join("x", AtMostOnce, false);
        table.changes();
        let (_, mut second) = table.join("x", AtLeastOnce, false);
        table.changes();
        table.answered("x", Some(AtMostOnce));
        assert!(!served(&mut second));
        table.answered("x", Some(AtLeastOnce));
        assert!(served(&mut first) && served(&mut second));
    }

    #[test]
    fn gone_while_asked_for() {
        let mut table = Table::new();
        let (id, _answer) = table.join("x", AtMostOnce, false);
        table.changes();
        table.listeners.leave(id);
        assert_eq!(table.changes(), Changes::default());
        table.answered("x", Some(AtMostOnce));
        assert_eq!(table.sync(), (vec![], vec!["x".to_owned()]));
    }

    #[test]
    fn the_widest_filter_with_the_highest_delivery_is_asked_for() {
        let mut table = Table::new();
        table.join("a/b", AtLeastOnce, false);
        table.sync();
        let (wide, _answer) = table.join("a/#", AtMostOnce, false);
        let changes = table.changes();
        assert_eq!(changes.subscribe, [("a/#".into(), AtLeastOnce)]);
        assert!(changes.unsubscribe.is_empty(), "not before it is granted");
        table.answered("a/#", Some(AtLeastOnce));
        assert_eq!(table.sync(), (vec![], vec!["a/b".to_owned()]));
        let (_, mut covered) = table.join("a/+/c", AtLeastOnce, false);
        assert!(served(&mut covered));
        assert_eq!(table.sync(), (vec![], vec![]));
        assert!(!table.subscriptions.may_repeat("a/b"));
        table.listeners.leave(wide);
        assert_eq!(
            table.sync(),
            (vec!["a/+/c".to_owned(), "a/b".to_owned()], vec![])
        );
        assert_eq!(table.sync(), (vec![], vec!["a/#".to_owned()]));
    }

    #[test]
    fn all_that_overlap_bring_what_a_covered_filter_wants() {
        let mut table = Table::new();
        table.join("a/+/c", AtMostOnce, false);
        table.join("a/b/+", AtMostOnce, false);
        let (_, mut answer) = table.join("a/b/c", AtLeastOnce, false);
        let both = ["a/+/c", "a/b/+"].map(|filter| (filter.to_owned(), AtLeastOnce));
        assert_eq!(table.changes().subscribe, both);
        table.answered("a/b/+", Some(AtLeastOnce));
        assert!(served(&mut answer));
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
        assert!(!table.listeners.awaited("d/1") && table.subscriptions.explains("d/1"));
        assert!(!table.subscriptions.explains("y"));
        table.listeners.leave(id);
        assert_eq!(table.sync(), (vec![], vec![]));
        assert!(table.listeners.awaited("d/1"));
        assert_eq!(table.subscriptions.passing(&table.listeners), ["x"]);
    }

    #[test]
    fn a_resumed_session_hears_what_is_new_and_what_is_over() {
        let mut table = Table::new();
        let (old, _answer) = table.join("old", AtMostOnce, false);
        let (_, mut kept) = table.join("kept", AtMostOnce, false);
        table.sync();
        assert!(served(&mut kept));
        table.listeners.leave(old);
        table.join("new/#", AtMostOnce, false);
        table.subscriptions.link_lost();
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
        assert_eq!(table.changes().subscribe, [("a/#".into(), AtMostOnce)]);
        table.answered("a/#", None);
        assert!(wide.try_recv().unwrap().is_err());
        assert!(!served(&mut answer));
        assert_eq!(table.sync().0, ["a/b"]);
        assert!(served(&mut answer));
        assert_eq!(table.route("a/b"), [narrow]);
    }

    #[test]
    fn a_lower_grant_ends_those_who_want_more_each_time() {
        let mut table = Table::new();
        let (_, mut casual) = table.join("x", AtMostOnce, false);
        table.sync();
        for _ in 0..2 {
            let (_, mut answer) = table.join("x", AtLeastOnce, true);
            assert_eq!(table.changes().subscribe, [("x".into(), AtLeastOnce)]);
            table.answered("x", Some(AtMostOnce));
            let error = answer.try_recv().unwrap().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert_eq!(table.changes(), Changes::default());
        }
        assert!(served(&mut casual));
        assert_eq!(table.subscriptions.passing(&table.listeners), ["x"]);
        let (_, mut answer) = table.join("y", AtLeastOnce, true);
        table.changes();
        table.answered("y", Some(AtMostOnce));
        assert!(answer.try_recv().unwrap().is_err());
        assert_eq!(table.sync(), (vec![], vec!["y".to_owned()]));
    }

    #[test]
    fn a_filter_given_up_before_it_is_granted_ends_nobody() {
        let mut table = Table::new();
        let (wide, _answer) = table.join("a/#", AtMostOnce, false);
        table.changes();
        table.listeners.leave(wide);
        let (_, mut answer) = table.join("a/b", AtLeastOnce, false);
        assert_eq!(table.changes().subscribe, [("a/b".into(), AtLeastOnce)]);
        table.answered("a/#", Some(AtMostOnce));
        assert!(answer.try_recv().is_err(), "neither served nor refused");
        assert_eq!(table.changes(), Changes::default());
        table.answered("a/b", Some(AtLeastOnce));
        assert!(served(&mut answer));
        assert_eq!(table.sync(), (vec![], vec!["a/#".to_owned()]));
    }

    #[test]
    fn without_a_link_nobody_is_served() {
        let mut table = Table::new();
        table.join("x", AtMostOnce, false);
        table.sync();
        table.subscriptions.link_lost();
        let (_, mut answer) = table.join("x", AtMostOnce, false);
        assert!(!served(&mut answer));
        table.subscriptions.link_up(true);
        table.sync();
        assert!(served(&mut answer));
    }

    /// One thing that happens, of the kind and with the filter of these numbers.
    fn happen(table: &mut Table, broker: &mut Broker, kind: usize, filter: usize) {
        const FILTERS: [&str; 8] = ["a", "a/b", "a/b/c", "a/#", "a/+", "a/+/c", "a/b/+", "#"];
        match kind {
            0..3 => {
                let qos = [AtMostOnce, AtLeastOnce, AtMostOnce][kind];
                broker.joined.push(table.join(FILTERS[filter], qos, false));
            }
            3 | 4 if !broker.joined.is_empty() => {
                let (id, _) = broker.joined.swap_remove(filter % broker.joined.len());
                table.listeners.leave(id);
            }
            5 => broker.hear(table.changes()),
            _ => broker.answer(table),
        }
    }

    #[derive(Default)]
    struct Broker {
        joined: Vec<(u64, Answer)>,
        unanswered: VecDeque<(String, QoS)>,
        subscribed: BTreeMap<String, QoS>,
    }

    impl Broker {
        fn hear(&mut self, changes: Changes) {
            self.subscribed.extend(changes.subscribe.iter().cloned());
            self.unanswered.extend(changes.subscribe);
            for filter in changes.unsubscribe {
                assert!(self.subscribed.remove(&filter).is_some());
            }
        }

        fn answer(&mut self, table: &mut Table) {
            if let Some((filter, qos)) = self.unanswered.pop_front() {
                table.answered(&filter, Some(qos));
            }
        }
    }

    proptest! {
        #[test]
        fn in_the_end_the_broker_knows_the_widest_filters_and_no_other(
            events in proptest::collection::vec((0..8_usize, 0..8_usize), 0..60)
        ) {
            let (mut table, mut broker) = (Table::new(), Broker::default());
            for (kind, filter) in events {
                happen(&mut table, &mut broker, kind, filter);
            }
            broker.hear(table.changes());
            while !broker.unanswered.is_empty() {
                broker.answer(&mut table);
                broker.hear(table.changes());
            }
            prop_assert!(table.subscriptions.settled());
            let wanted = widest(&table.listeners);
            prop_assert!(wanted.keys().eq(broker.subscribed.keys()));
            prop_assert!(wanted.iter().all(|(filter, qos)| broker.subscribed[*filter] >= *qos));
            prop_assert!(broker.joined.iter_mut().all(|(_, answer)| served(answer)));
        }
    }
}
