//! What is unacknowledged on one channel, and what to tell the broker about it. No I/O.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use commlib_core::{AckOutcome, AckReply};
use lapin::message::Delivery;

/// How often a message is tried before it is given up.
const MAX_TRIES: u32 = 5;

/// How many failing messages are counted at a time.
const MAX_COUNTED: usize = 65_536;

/// How often messages failed here. RabbitMQ's classic queues only say that a message was delivered before, so it is
/// recognised by what it says. Each process counts for itself: of two that share a durable subscription both try.
#[derive(Debug, Default)]
pub(crate) struct Tries {
    counts: HashMap<u64, u32>,
    order: VecDeque<u64>,
}

impl Tries {
    /// Counts a failure; false if it was the last one allowed.
    fn again(&mut self, mark: u64) -> bool {
        let count = self.counts.entry(mark).or_insert_with(|| {
            self.order.push_back(mark);
            0
        });
        *count += 1;
        let again = *count < MAX_TRIES;
        if !again {
            self.forget(mark);
        }
        if self.order.len() > MAX_COUNTED
            && let Some(oldest) = self.order.pop_front()
        {
            self.counts.remove(&oldest);
        }
        again
    }

    fn forget(&mut self, mark: u64) {
        // The common case: nothing fails.
        if !self.counts.is_empty() && self.counts.remove(&mark).is_some() {
            self.order.retain(|other| *other != mark);
        }
    }
}

/// What tells a message from others.
pub(crate) fn mark(delivery: &Delivery) -> u64 {
    let mut hasher = DefaultHasher::new();
    let properties = &delivery.properties;
    delivery.routing_key.hash(&mut hasher);
    properties.message_id().hash(&mut hasher);
    properties.timestamp().hash(&mut hasher);
    delivery.data.hash(&mut hasher);
    hasher.finish()
}

/// A frame for the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Frame {
    /// Done with this message, and with `multiple` with all before it.
    Ack { tag: u64, multiple: bool },
    /// Not done. Without `requeue` it goes to the dead letters, if there are any.
    Nack { tag: u64, requeue: bool },
}

/// What was delivered and is not settled, by its number, with its mark.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    out: BTreeMap<u64, u64>,
}

impl Ledger {
    pub(crate) fn delivered(&mut self, tag: u64, mark: u64) {
        self.out.insert(tag, mark);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    /// Turns the words of receivers into frames, and counts what is given up. Once nobody listens any more
    /// (`leaving`), what is dropped was not tried.
    pub(crate) fn settle(
        &mut self,
        replies: impl IntoIterator<Item = AckReply>,
        tries: &mut Tries,
        leaving: bool,
    ) -> (Vec<Frame>, u64) {
        let (mut frames, mut accepted, mut given_up) = (Vec::new(), Vec::new(), 0);
        for AckReply {
            id: tag, outcome, ..
        } in replies
        {
            let Some(mark) = self.out.remove(&tag) else {
                continue;
            };
            match outcome {
                AckOutcome::Accept => {
                    tries.forget(mark);
                    accepted.push(tag);
                }
                AckOutcome::Reject { requeue: false } => {
                    tries.forget(mark);
                    frames.push(Frame::Nack {
                        tag,
                        requeue: false,
                    });
                }
                AckOutcome::Dropped if leaving => frames.push(Frame::Nack { tag, requeue: true }),
                AckOutcome::Reject { requeue: true } | AckOutcome::Dropped => {
                    let requeue = tries.again(mark);
                    given_up += u64::from(!requeue);
                    frames.push(Frame::Nack { tag, requeue });
                }
            }
        }
        accepted.sort_unstable();
        // One frame for all that have nothing unsettled before them; what is refused was refused above.
        let oldest = self.out.keys().next().copied().unwrap_or(u64::MAX);
        let split = accepted.partition_point(|tag| *tag < oldest);
        let (prefix, rest) = accepted.split_at(split);
        frames.extend(prefix.last().map(|tag| Frame::Ack {
            tag: *tag,
            multiple: true,
        }));
        frames.extend(rest.iter().map(|tag| Frame::Ack {
            tag: *tag,
            multiple: false,
        }));
        (frames, given_up)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACCEPT: AckOutcome = AckOutcome::Accept;

    fn replies(all: &[(u64, AckOutcome)]) -> Vec<AckReply> {
        let reply = |(id, outcome): &(u64, AckOutcome)| AckReply {
            id: *id,
            epoch: 0,
            outcome: *outcome,
        };
        all.iter().map(reply).collect()
    }

    fn ledger(tags: std::ops::RangeInclusive<u64>) -> Ledger {
        let mut ledger = Ledger::default();
        for tag in tags {
            ledger.delivered(tag, tag);
        }
        ledger
    }

    fn ack(tag: u64, multiple: bool) -> Frame {
        Frame::Ack { tag, multiple }
    }

    #[test]
    fn what_is_done_in_order_takes_one_frame() {
        let mut ledger = ledger(1..=5);
        let tries = &mut Tries::default();
        let (frames, _) = ledger.settle(
            replies(&[(2, ACCEPT), (1, ACCEPT), (5, ACCEPT)]),
            tries,
            false,
        );
        assert_eq!(frames, [ack(2, true), ack(5, false)]);
        let (frames, _) = ledger.settle(replies(&[(4, ACCEPT), (3, ACCEPT)]), tries, false);
        assert_eq!(frames, [ack(4, true)]);
        assert!(ledger.is_empty());
    }

    #[test]
    fn what_is_refused_is_not_acknowledged_with_the_rest() {
        let mut ledger = ledger(1..=3);
        let refuse = AckOutcome::Reject { requeue: true };
        let words = replies(&[(1, ACCEPT), (3, ACCEPT), (2, refuse)]);
        let (frames, given_up) = ledger.settle(words, &mut Tries::default(), false);
        assert_eq!(
            frames,
            [
                Frame::Nack {
                    tag: 2,
                    requeue: true
                },
                ack(3, true)
            ]
        );
        assert_eq!(given_up, 0);
    }

    #[test]
    fn words_about_nothing_are_ignored() {
        let mut ledger = ledger(1..=1);
        let words = replies(&[(7, ACCEPT), (1, ACCEPT), (1, AckOutcome::Dropped)]);
        let (frames, _) = ledger.settle(words, &mut Tries::default(), false);
        assert_eq!(frames, [ack(1, true)]);
    }

    #[test]
    fn the_fifth_failure_is_the_last() {
        let mut tries = Tries::default();
        for (tag, expected) in (1..=5).zip([true, true, true, true, false]) {
            let mut ledger = Ledger::default();
            ledger.delivered(tag, 42);
            let (frames, given_up) =
                ledger.settle(replies(&[(tag, AckOutcome::Dropped)]), &mut tries, false);
            assert_eq!(
                frames,
                [Frame::Nack {
                    tag,
                    requeue: expected
                }]
            );
            assert_eq!(given_up, u64::from(!expected));
        }
        assert!(tries.counts.is_empty() && tries.order.is_empty());
    }

    #[test]
    fn success_forgets_failures_and_leaving_is_none() {
        let mut tries = Tries::default();
        let mut ledger = ledger(1..=2);
        ledger.settle(replies(&[(1, AckOutcome::Dropped)]), &mut tries, false);
        assert_eq!(tries.counts.len(), 1);
        ledger.delivered(3, 1);
        ledger.settle(replies(&[(3, ACCEPT)]), &mut tries, false);
        ledger.settle(replies(&[(2, AckOutcome::Dropped)]), &mut tries, true);
        assert!(tries.counts.is_empty());
    }
}
