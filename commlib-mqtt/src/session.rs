//! What a connection remembers from link to link, and what it answers to packets and commands. No I/O: what is to be
//! sent is appended to `out`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use commlib_core::{AckReply, Gap, GapCause};
use rumqttc::mqttbytes::v4::{PubComp, SubAck};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::acks::{Ledger, Verdict};
use crate::config::{MqttConfig, Session as Keep};
use crate::inbound::{Decoded, Recent};
use crate::listeners::{Kind, Listener, Listeners, Waiting};
use crate::outbox::{Entry, LAST_ID, Outbox};
use crate::packet::{self, Packet, QoS, SubscribeReasonCode};
use crate::subscriptions::Subscriptions;

/// Nothing more is appended to `out` of publishes while it is longer than this.
pub(crate) const OUT_CAP: usize = 256 << 10;

/// How long at-least-once messages that nobody listens for wait for a listener to come.
const GRACE: Duration = Duration::from_secs(30);

/// What the handles ask of the connection task.
#[derive(Debug)]
pub(crate) enum Control {
    /// Take a message into the outbox.
    Publish(Entry),
    /// Add a listener.
    Listen(Arc<Listener>, Waiting),
    /// An inbox is gone.
    Stop(u64),
    /// End, and say how it went.
    Close(Waiting),
}

/// The state of a connection without its link.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) config: Arc<MqttConfig>,
    pub(crate) listeners: Listeners,
    pub(crate) subscriptions: Subscriptions,
    pub(crate) outbox: Outbox,
    pub(crate) ledger: Ledger,
    pub(crate) acks: mpsc::UnboundedSender<AckReply>,
    /// What is to be written.
    pub(crate) out: BytesMut,
    /// Answers to PINGREQ since the last look.
    pub(crate) answered_probes: u32,
    /// Those who wait for the end, once it is wanted.
    pub(crate) closing: Option<Vec<Waiting>>,
    /// SUBSCRIBE packets without an answer, and their filters.
    pending: HashMap<u16, Vec<String>>,
    last_id: u16,
    /// Until when messages that nobody listens for are kept; `None` if the session keeps nothing.
    pub(crate) grace_end: Option<Instant>,
    /// Empty between packets; kept for its memory.
    pub(crate) route: Vec<Arc<Listener>>,
    pub(crate) recent: Recent,
}

/// Why a packet ends the link.
pub(crate) type Fatal = String;

impl Session {
    pub(crate) fn new(config: Arc<MqttConfig>, acks: mpsc::UnboundedSender<AckReply>) -> Self {
        Self {
            config,
            listeners: Listeners::default(),
            subscriptions: Subscriptions::default(),
            outbox: Outbox::default(),
            ledger: Ledger::default(),
            acks,
            out: BytesMut::new(),
            answered_probes: 0,
            closing: None,
            pending: HashMap::new(),
            last_id: LAST_ID,
            grace_end: None,
            route: Vec::new(),
            recent: Recent::default(),
        }
    }

    /// There is a link. `again` is false for the first one.
    pub(crate) fn link_up(&mut self, resumed: bool, again: bool, now: Instant) {
        self.out = BytesMut::new();
        self.pending.clear();
        self.answered_probes = 0;
        self.recent = Recent::default();
        self.subscriptions.link_up(resumed);
        if !resumed {
            self.ledger.clear();
        }
        self.outbox.restart(resumed);
        self.grace_end = (self.config.session == Keep::Persistent).then(|| now + GRACE);
        if again {
            // Before anything new arrives: what came between is missing here.
            for listener in self.listeners.served() {
                let kept = resumed && listener.qos == QoS::AtLeastOnce;
                if !kept && !matches!(listener.kind, Kind::Replies(_)) {
                    listener.inbox.gap(Gap::new(GapCause::LinkLost, None));
                }
            }
        }
    }

    /// The link is gone.
    pub(crate) fn link_lost(&mut self) {
        self.subscriptions.link_lost();
        self.ledger.link_lost();
        for listener in self.listeners.iter() {
            if matches!(listener.kind, Kind::Replies(_)) {
                listener.inbox.gap(Gap::new(GapCause::LinkLost, None));
            }
        }
    }

    /// Does what a handle asks for, link or not.
    pub(crate) fn control(&mut self, control: Control, now: Instant) {
        match control {
            Control::Publish(entry) => self.outbox.push(entry),
            Control::Listen(listener, waiting) => {
                self.listeners.join(&listener, waiting);
                if self.subscriptions.serves(&listener) {
                    self.listeners.serve(listener.id);
                }
                if listener.qos == QoS::AtLeastOnce {
                    self.hand_over_held(&listener);
                }
            }
            Control::Stop(id) => {
                if self.listeners.leave(id).is_some_and(|l| l.durable) {
                    self.extend_grace(now);
                }
            }
            Control::Close(waiting) => self.closing.get_or_insert_default().push(waiting),
        }
    }

    /// Takes in a packet.
    ///
    /// # Errors
    /// The reason to end the link.
    pub(crate) fn packet(&mut self, packet: Packet, now: Instant) -> Result<(), Fatal> {
        match packet {
            Packet::Publish(publish) => self.arrived(&publish, now),
            Packet::PubAck(ack) => {
                if !self.outbox.confirmed(ack.pkid) {
                    tracing::debug!(id = ack.pkid, "confirmation of nothing");
                }
            }
            Packet::SubAck(ack) => self.subscribed(&ack)?,
            // Only a session that another program opened has messages at exactly-once; they come as best effort.
            Packet::PubRel(release) => {
                packet::put(&mut self.out, &Packet::PubComp(PubComp::new(release.pkid)));
            }
            Packet::PingResp => self.answered_probes += 1,
            Packet::UnsubAck(_) => {}
            other => return Err(format!("the broker sent an unexpected packet: {other:?}")),
        }
        Ok(())
    }

    /// Appends what is due to `out`; of the outbox only if `sending`.
    pub(crate) fn pump(&mut self, sending: bool) {
        while let Some(id) = self.ledger.next_finished() {
            packet::put_puback(&mut self.out, id);
        }
        let changed = self.listeners.take_changed();
        let changes = self.subscriptions.changes(&self.listeners, &changed);
        let (pending, last_id) = (&mut self.pending, &mut self.last_id);
        packet::put_subscribes(&mut self.out, &changes.subscribe, |filters| {
            let id = next_id(last_id, pending);
            pending.insert(id, filters);
            id
        });
        packet::put_unsubscribes(&mut self.out, &changes.unsubscribe, || {
            next_id(last_id, pending)
        });
        while sending && self.out.len() < OUT_CAP {
            let Some(publish) = self.outbox.next() else {
                break;
            };
            packet::put_publish(&mut self.out, publish);
        }
    }

    /// Gives back the memory of a large burst once it is written.
    pub(crate) fn trim(&mut self) {
        if self.out.is_empty() && self.out.capacity() > 4 * OUT_CAP {
            self.out = BytesMut::new();
        }
    }

    /// Appends the end of a clean close.
    pub(crate) fn goodbye(&mut self) {
        if self.config.session == Keep::Persistent {
            let passing = self.subscriptions.passing(&self.listeners);
            let (pending, last_id) = (&self.pending, &mut self.last_id);
            packet::put_unsubscribes(&mut self.out, &passing, || next_id(last_id, pending));
        }
        packet::put(&mut self.out, &Packet::Disconnect);
    }

    /// When held messages are to be let go of.
    pub(crate) fn release_at(&self) -> Option<Instant> {
        self.grace_end.filter(|_| self.ledger.holds())
    }

    /// Lets go of held messages if their time is over.
    pub(crate) fn release(&mut self, now: Instant) {
        if self.release_at().is_some_and(|end| now >= end) {
            let messages = self.ledger.release();
            tracing::warn!(
                messages,
                "at-least-once messages acknowledged that nobody listened for within {GRACE:?}"
            );
        }
    }

    /// Whether more is unacknowledged than may be.
    pub(crate) fn flooded(&self) -> bool {
        self.ledger.bytes() > self.config.unacked_bytes
    }

    /// Whether receivers are done with half of what may be unacknowledged.
    pub(crate) fn drained(&self) -> bool {
        self.ledger.bytes() <= self.config.unacked_bytes / 2
    }

    /// A receiver's word on a message.
    pub(crate) fn acked(&mut self, reply: AckReply, now: Instant) {
        match self.ledger.settle(reply) {
            Verdict::Settled => {}
            Verdict::GivenUp { listener } => {
                if let Some(listener) = self.listeners.get(listener) {
                    listener.inbox.gap(Gap::new(GapCause::GivenUp, Some(1)));
                }
            }
            Verdict::Again { listener, publish } => {
                let listener = self.listeners.get(listener).cloned();
                if let Some(listener) = listener.as_ref().filter(|l| !l.inbox.is_gone()) {
                    self.deliver(listener, &publish, Some(reply.id), &mut Decoded::default());
                    return;
                }
                // What waited in a durable inbox when it was dropped is for the next one of its name.
                let hold = match listener {
                    Some(listener) => listener.durable,
                    None => self.expects_listener(&publish.topic),
                };
                if hold {
                    self.extend_grace(now);
                }
                self.ledger.gone(reply.id, hold && self.grace_end.is_some());
            }
        }
    }

    /// Whether an at-least-once message on this topic that nobody takes now may be meant for a listener to come: for a
    /// durable name, or for what an earlier process asked of this session.
    pub(crate) fn expects_listener(&self, topic: &str) -> bool {
        self.listeners.awaited(topic) || !self.subscriptions.explains(topic)
    }

    fn extend_grace(&mut self, now: Instant) {
        self.grace_end = self.grace_end.map(|end| end.max(now + GRACE));
    }

    fn subscribed(&mut self, ack: &SubAck) -> Result<(), Fatal> {
        let Some(filters) = self.pending.remove(&ack.pkid) else {
            return Ok(());
        };
        if filters.len() != ack.return_codes.len() {
            return Err("the broker answered other subscriptions than it was asked for".to_owned());
        }
        for (filter, code) in filters.iter().zip(&ack.return_codes) {
            let granted = match code {
                SubscribeReasonCode::Success(qos) => Some(*qos),
                SubscribeReasonCode::Failure => None,
            };
            if let Some(asked) = self.subscriptions.answered(filter, granted) {
                self.listeners.answered(filter, asked, granted);
            }
        }
        Ok(())
    }
}

/// Ids of SUBSCRIBE and UNSUBSCRIBE packets lie above those of publishes.
fn next_id(last: &mut u16, pending: &HashMap<u16, Vec<String>>) -> u16 {
    loop {
        *last = last.checked_add(1).unwrap_or(LAST_ID + 1);
        if !pending.contains_key(last) {
            return *last;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listeners::tests::listener;
    use commlib_core::{Inbox, Incoming};
    use tokio::sync::oneshot;

    fn session() -> (Session, mpsc::UnboundedReceiver<AckReply>) {
        let config = MqttConfig::new("h")
            .client_id("c")
            .session(Keep::Persistent);
        let (sender, acks) = mpsc::unbounded_channel();
        (Session::new(Arc::new(config), sender), acks)
    }

    fn listen(session: &mut Session, id: u64, filter: &str, qos: QoS, now: Instant) -> Inbox {
        let (listener, inbox) = listener(id, filter, qos, true);
        let (waiting, _) = oneshot::channel();
        session.control(Control::Listen(listener, waiting), now);
        inbox
    }

    fn publish(session: &mut Session, topic: &str, qos: QoS, id: u16, now: Instant) {
        let mut publish = packet::Publish::new(topic, qos, "1");
        publish.pkid = id;
        session.packet(Packet::Publish(publish), now).unwrap();
        session.pump(true);
    }

    /// The ids of the PUBACKs in what is to be sent, which holds nothing else.
    fn acknowledged(session: &mut Session) -> Vec<u16> {
        let mut ids = Vec::new();
        while let Ok(packet) = Packet::read(&mut session.out, 1000) {
            match packet {
                Packet::PubAck(ack) => ids.push(ack.pkid),
                Packet::Subscribe(_) => {}
                other => panic!("{other:?}"),
            }
        }
        ids
    }

    #[test]
    fn what_nobody_comes_for_is_let_go_of_after_the_grace_time() {
        let start = Instant::now();
        let (mut session, _acks) = session();
        session.link_up(true, false, start);
        publish(&mut session, "a", QoS::AtLeastOnce, 1, start);
        publish(&mut session, "b", QoS::AtLeastOnce, 2, start);
        assert_eq!(session.release_at(), Some(start + GRACE));
        session.release(start + GRACE / 2);
        let mut inbox = listen(&mut session, 1, "b", QoS::AtLeastOnce, start + GRACE / 2);
        session.pump(true);
        assert!(acknowledged(&mut session).is_empty());
        session.release(start + GRACE);
        session.pump(true);
        assert_eq!(acknowledged(&mut session), [1]);
        assert!(matches!(inbox.try_recv(), Some(Incoming::Message(_))));
        // Later ones that nobody asked for are not kept at all.
        publish(&mut session, "c", QoS::AtLeastOnce, 3, start + GRACE);
        assert_eq!(session.release_at(), None);
    }

    #[test]
    fn a_durable_inbox_that_goes_has_the_grace_time_to_come_back() {
        let start = Instant::now();
        let (mut session, _acks) = session();
        session.link_up(false, false, start);
        drop(listen(&mut session, 1, "d", QoS::AtLeastOnce, start));
        session.pump(true);
        let later = start + 10 * GRACE;
        session.control(Control::Stop(1), later);
        publish(&mut session, "d", QoS::AtLeastOnce, 1, later);
        assert_eq!(session.release_at(), Some(later + GRACE));
        let mut inbox = listen(&mut session, 2, "d", QoS::AtLeastOnce, later);
        assert!(matches!(inbox.try_recv(), Some(Incoming::Message(_))));
    }

    #[test]
    fn best_effort_messages_do_not_pile_up_in_an_at_least_once_inbox() {
        let start = Instant::now();
        let (mut session, _acks) = session();
        session.link_up(false, false, start);
        let mut inbox = listen(&mut session, 1, "a", QoS::AtLeastOnce, start);
        for id in 1..=10 {
            publish(&mut session, "a", QoS::AtMostOnce, id, start);
        }
        let mut messages = 0;
        while let Some(Incoming::Message(_)) = inbox.try_recv() {
            messages += 1;
        }
        assert_eq!(messages, 3);
    }

    #[test]
    fn a_durable_inbox_may_come_back_while_the_link_is_down() {
        let start = Instant::now();
        let (mut session, mut acks) = session();
        session.link_up(false, false, start);
        let inbox = listen(&mut session, 1, "d", QoS::AtLeastOnce, start);
        publish(&mut session, "d", QoS::AtLeastOnce, 1, start);
        session.link_lost();
        drop(inbox);
        session.acked(acks.try_recv().unwrap(), start);
        session.control(Control::Stop(1), start);
        let mut inbox = listen(&mut session, 2, "d", QoS::AtLeastOnce, start);
        session.link_up(true, true, start);
        publish(&mut session, "d", QoS::AtLeastOnce, 1, start);
        let message = match inbox.try_recv() {
            Some(Incoming::Message(message)) => message,
            other => panic!("{other:?}"),
        };
        assert!(acknowledged(&mut session).is_empty());
        message.ack.unwrap().accept();
        session.acked(acks.try_recv().unwrap(), start);
        session.pump(true);
        assert_eq!(acknowledged(&mut session), [1]);
    }

    #[test]
    fn what_the_broker_does_not_send_again_is_let_go_of_too() {
        let start = Instant::now();
        let (mut session, mut acks) = session();
        session.link_up(false, false, start);
        let inbox = listen(&mut session, 1, "d", QoS::AtLeastOnce, start);
        publish(&mut session, "d", QoS::AtLeastOnce, 1, start);
        session.link_lost();
        drop(inbox);
        session.acked(acks.try_recv().unwrap(), start);
        session.link_up(true, true, start);
        assert_eq!(session.release_at(), Some(start + GRACE));
        session.release(start + GRACE);
        assert_eq!(session.release_at(), None);
    }
}
