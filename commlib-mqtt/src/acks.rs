//! At-least-once messages on their way in: which of them the broker may forget.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use bytes::Bytes;
use commlib_core::{AckOutcome, AckReply};

use crate::packet::Publish;

/// How often a receiver is given a message that it does not accept.
const MAX_TRIES: u8 = 5;

/// What a message costs beside its topic and payload.
const OVERHEAD: usize = 128;

/// The received messages of a session until they are acknowledged to the broker, which is done in the order of their
/// arrival (MQTT 3.1.1, 4.6.0).
///
/// After a lost link the broker sends again what it did not see acknowledged, under the same packet ids (4.4.0). Such a
/// message is recognised: if its receivers are done with it by then it is acknowledged at once, otherwise it is theirs
/// already and not handed out a second time. Without that a receiver that is slower than its links would never get on.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    messages: HashMap<u64, Received>,
    /// Those that came over this link, in the order of their arrival.
    order: VecDeque<u64>,
    /// Those that came over earlier links and not again yet, by packet id.
    earlier: HashMap<u16, u64>,
    last_number: u64,
    /// The bytes of all that is not finished.
    bytes: usize,
    held: usize,
}

#[derive(Debug)]
struct Received {
    publish: Publish,
    /// Stands for the payload of a finished message, which is not kept.
    digest: Option<u64>,
    cost: usize,
    /// Kept for a receiver that has not come yet.
    held: bool,
    /// How many receivers are not done.
    open: usize,
    receivers: Vec<Receiver>,
}

#[derive(Debug)]
struct Receiver {
    listener: u64,
    tries: u8,
    open: bool,
}

/// What to do after a receiver's word.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Nothing.
    Settled,
    /// Deliver it to the same listener again, under the same id.
    Again {
        /// The listener.
        listener: u64,
        /// The message.
        publish: Publish,
    },
    /// Tell the listener that it missed one.
    GivenUp {
        /// The listener.
        listener: u64,
    },
}

impl Ledger {
    /// The link is gone: the broker will send again what it did not see acknowledged.
    pub(crate) fn link_lost(&mut self) {
        for number in std::mem::take(&mut self.order) {
            match self.messages.get(&number) {
                Some(message) if !message.held || message.open > 0 => {
                    self.earlier.insert(message.publish.pkid, number);
                }
                // Nobody has it, so nobody misses it until it comes again.
                _ => self.forget(number),
            }
        }
    }

    /// The session is gone, and with it the broker's memory.
    pub(crate) fn clear(&mut self) {
        *self = Self {
            // Numbers are not used twice: words on what was forgotten must not count for something else.
            last_number: self.last_number,
            ..Self::default()
        };
    }

    /// Enters a message; `None` if it came before and is known. Without a receiver or a hold it is finished.
    pub(crate) fn enter(&mut self, publish: &Publish) -> Option<u64> {
        if let Some(number) = self.earlier.remove(&publish.pkid) {
            if self.messages.get(&number).is_some_and(|m| m.is(publish)) {
                self.order.push_back(number);
                return None;
            }
            self.forget(number);
        }
        self.last_number += 1;
        let cost = publish.payload.len() + publish.topic.len() + OVERHEAD;
        let message = Received {
            publish: publish.clone(),
            digest: None,
            cost,
            held: false,
            open: 0,
            receivers: Vec::new(),
        };
        self.messages.insert(self.last_number, message);
        self.order.push_back(self.last_number);
        Some(self.last_number)
    }

    /// Adds a receiver to a message. The id is that of its [`Ack`](commlib_core::Ack).
    pub(crate) fn add_receiver(&mut self, number: u64, listener: u64) -> u64 {
        self.change(number, |message| {
            message.open += 1;
            message.receivers.push(Receiver {
                listener,
                tries: 1,
                open: true,
            });
            number << 16 | (message.receivers.len() as u64 - 1)
        })
        .unwrap_or(u64::MAX)
    }

    /// Keeps a message for a receiver that may come.
    pub(crate) fn hold(&mut self, number: u64) {
        self.change(number, |message| message.held = true);
    }

    /// Makes a newly come listener the receiver of the held messages that it wants. They are held no more.
    pub(crate) fn claim(
        &mut self,
        listener: u64,
        wants: impl Fn(&str) -> bool,
    ) -> Vec<(u64, Publish)> {
        let mut claimed = Vec::new();
        for number in self.held() {
            if let Some(message) = self.messages.get(&number)
                && wants(&message.publish.topic)
            {
                let publish = message.publish.clone();
                claimed.push((self.add_receiver(number, listener), publish));
                self.unhold(number);
            }
        }
        claimed
    }

    /// Whether anything is held.
    pub(crate) fn holds(&self) -> bool {
        self.held > 0
    }

    /// Lets go of what is held, and says how many that were.
    pub(crate) fn release(&mut self) -> usize {
        let held = self.held();
        for &number in &held {
            self.unhold(number);
        }
        held.len()
    }

    /// The numbers of what is held, in the order of arrival; over which link it came does not matter.
    fn held(&self) -> Vec<u64> {
        let mut held = Vec::new();
        if self.held > 0 {
            let messages = self.messages.iter().filter(|(_, m)| m.held);
            held.extend(messages.map(|(number, _)| *number));
            held.sort_unstable();
        }
        held
    }

    fn unhold(&mut self, number: u64) {
        self.change(number, |message| message.held = false);
    }

    /// A receiver's word.
    pub(crate) fn settle(&mut self, reply: AckReply) -> Verdict {
        let index = usize::try_from(reply.id & 0xFFFF).unwrap_or(usize::MAX);
        let refused = match reply.outcome {
            AckOutcome::Accept | AckOutcome::Reject { requeue: false } => false,
            AckOutcome::Reject { requeue: true } | AckOutcome::Dropped => true,
        };
        self.change(reply.id >> 16, |message| {
            let receiver = message.receivers.get_mut(index).filter(|r| r.open)?;
            let listener = receiver.listener;
            if refused && receiver.tries < MAX_TRIES {
                receiver.tries += 1;
                let publish = message.publish.clone();
                return Some(Verdict::Again { listener, publish });
            }
            receiver.open = false;
            message.open -= 1;
            refused.then_some(Verdict::GivenUp { listener })
        })
        .flatten()
        .unwrap_or(Verdict::Settled)
    }

    /// The receiver of an id is gone: done with it, and kept for the next one if `hold`.
    pub(crate) fn gone(&mut self, id: u64, hold: bool) {
        let index = usize::try_from(id & 0xFFFF).unwrap_or(usize::MAX);
        self.change(id >> 16, |message| {
            if let Some(receiver) = message.receivers.get_mut(index)
                && std::mem::replace(&mut receiver.open, false)
            {
                message.open -= 1;
                message.held |= hold;
            }
        });
    }

    /// The packet id to acknowledge next, if the oldest message of this link is finished.
    pub(crate) fn next_finished(&mut self) -> Option<u16> {
        let number = *self.order.front()?;
        if self.messages.get(&number).is_some_and(|m| !m.is_finished()) {
            return None;
        }
        self.order.pop_front();
        self.messages.remove(&number).map(|m| m.publish.pkid)
    }

    /// The bytes of all that is not finished.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Changes a message and what is counted of it.
    fn change<T>(&mut self, number: u64, change: impl FnOnce(&mut Received) -> T) -> Option<T> {
        let message = self.messages.get_mut(&number)?;
        self.bytes -= message.open_cost();
        self.held -= usize::from(message.held);
        let result = change(message);
        self.bytes += message.open_cost();
        self.held += usize::from(message.held);
        // The oldest one is acknowledged next; the others may wait long for that, but without their payload.
        if message.is_finished() && self.order.front() != Some(&number) {
            message
                .digest
                .get_or_insert_with(|| digest(&message.publish.payload));
            message.publish.payload = Bytes::new();
        }
        Some(result)
    }

    fn forget(&mut self, number: u64) {
        if let Some(message) = self.messages.remove(&number) {
            self.bytes -= message.open_cost();
            self.held -= usize::from(message.held);
        }
    }
}

impl Received {
    fn is_finished(&self) -> bool {
        self.open == 0 && !self.held
    }

    fn open_cost(&self) -> usize {
        if self.is_finished() { 0 } else { self.cost }
    }

    fn is(&self, publish: &Publish) -> bool {
        self.publish.topic == publish.topic
            && match self.digest {
                Some(known) => known == digest(&publish.payload),
                None => self.publish.payload == publish.payload,
            }
    }
}

fn digest(payload: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    payload.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::QoS;

    fn publish(id: u16) -> Publish {
        let mut publish = Publish::new("a/b", QoS::AtLeastOnce, vec![7; 100]);
        publish.pkid = id;
        publish
    }

    fn reply(id: u64, outcome: AckOutcome) -> AckReply {
        AckReply {
            id,
            epoch: 0,
            outcome,
        }
    }

    fn finished(ledger: &mut Ledger) -> Vec<u16> {
        std::iter::from_fn(|| ledger.next_finished()).collect()
    }

    #[test]
    fn acknowledged_in_the_order_of_arrival() {
        let mut ledger = Ledger::default();
        let ids: Vec<_> = [11, 12, 13]
            .map(|pkid| {
                let number = ledger.enter(&publish(pkid)).unwrap();
                ledger.add_receiver(number, 1)
            })
            .into();
        ledger.enter(&publish(14));
        for (id, expected) in [
            (ids[2], vec![]),
            (ids[0], vec![11]),
            (ids[1], vec![12, 13, 14]),
        ] {
            ledger.settle(reply(id, AckOutcome::Accept));
            assert_eq!(finished(&mut ledger), expected);
        }
        assert_eq!((ledger.bytes(), ledger.messages.len()), (0, 0));
    }

    #[test]
    fn all_receivers_must_be_done() {
        let mut ledger = Ledger::default();
        let number = ledger.enter(&publish(1)).unwrap();
        let (a, b) = (
            ledger.add_receiver(number, 1),
            ledger.add_receiver(number, 2),
        );
        ledger.settle(reply(a, AckOutcome::Accept));
        // A second word of the same receiver does not count for the other.
        ledger.settle(reply(a, AckOutcome::Accept));
        assert!(finished(&mut ledger).is_empty());
        ledger.settle(reply(b, AckOutcome::Reject { requeue: false }));
        assert_eq!(finished(&mut ledger), [1]);
    }

    #[test]
    fn five_tries_and_no_more() {
        for outcome in [AckOutcome::Dropped, AckOutcome::Reject { requeue: true }] {
            let mut ledger = Ledger::default();
            let number = ledger.enter(&publish(1)).unwrap();
            let id = ledger.add_receiver(number, 9);
            for _ in 1..MAX_TRIES {
                match ledger.settle(reply(id, outcome)) {
                    Verdict::Again { listener, publish } => {
                        assert_eq!((listener, publish.payload.len()), (9, 100));
                    }
                    other => panic!("{other:?}"),
                }
                assert!(finished(&mut ledger).is_empty());
            }
            assert!(matches!(
                ledger.settle(reply(id, outcome)),
                Verdict::GivenUp { listener: 9 }
            ));
            assert_eq!(finished(&mut ledger), [1]);
        }
    }

    #[test]
    fn what_the_broker_repeats_on_a_new_link_is_recognised() {
        let mut ledger = Ledger::default();
        let ids = [1, 2, 3, 4].map(|pkid| {
            let number = ledger.enter(&publish(pkid)).unwrap();
            ledger.add_receiver(number, 1)
        });
        ledger.settle(reply(ids[1], AckOutcome::Accept));
        ledger.link_lost();
        ledger.settle(reply(ids[0], AckOutcome::Accept));
        assert!(
            finished(&mut ledger).is_empty(),
            "not before they come again"
        );
        let bytes = ledger.bytes();
        for pkid in [1, 2, 3] {
            assert!(ledger.enter(&publish(pkid)).is_none());
        }
        assert_eq!((finished(&mut ledger), ledger.bytes()), (vec![1, 2], bytes));
        ledger.settle(reply(ids[2], AckOutcome::Accept));
        assert_eq!(finished(&mut ledger), [3]);
        // Another message under the fourth id: the broker knows nothing of the old one any more.
        let mut other = publish(4);
        other.topic = "x".to_owned();
        assert!(ledger.enter(&other).is_some());
        ledger.settle(reply(ids[3], AckOutcome::Accept));
        assert_eq!((finished(&mut ledger), ledger.bytes()), (vec![4], 0));
    }

    #[test]
    fn words_on_a_lost_session_are_void() {
        let mut ledger = Ledger::default();
        let number = ledger.enter(&publish(1)).unwrap();
        let old = ledger.add_receiver(number, 1);
        ledger.link_lost();
        ledger.clear();
        assert_eq!(ledger.bytes(), 0);
        let number = ledger.enter(&publish(1)).unwrap();
        ledger.add_receiver(number, 1);
        ledger.settle(reply(old, AckOutcome::Accept));
        assert!(finished(&mut ledger).is_empty());
    }

    #[test]
    fn held_for_a_listener_that_comes() {
        let mut ledger = Ledger::default();
        for id in 1..=3 {
            let number = ledger.enter(&publish(id)).unwrap();
            ledger.hold(number);
            ledger.hold(number);
        }
        assert!(ledger.holds() && finished(&mut ledger).is_empty());
        assert!(ledger.claim(1, |topic| topic == "x").is_empty());
        let claimed = ledger.claim(1, |topic| topic == "a/b");
        let ids: Vec<_> = claimed.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids.len(), 3);
        assert!(!ledger.holds());
        // It goes before it is done: the third is for the next listener.
        ledger.settle(reply(ids[0], AckOutcome::Accept));
        ledger.gone(ids[1], false);
        ledger.gone(ids[2], true);
        assert_eq!(finished(&mut ledger), [1, 2]);
        assert!(ledger.holds());
        assert_eq!(ledger.release(), 1);
        assert_eq!(finished(&mut ledger), [3]);
    }
}
