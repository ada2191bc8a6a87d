//! One at-least-once subscription: what waits, what is out, what comes back. No I/O, no clock.

use std::collections::{BTreeMap, VecDeque};

use tokio::sync::mpsc;

use crate::ack::{Ack, AckOutcome, AckReply};
use crate::address::Name;
use crate::inbox::{Arrival, Gap, GapCause, InboxSender};
use crate::message::Message;

/// How often a message is tried before it is given up.
const MAX_TRIES: u32 = 5;

/// How many messages may wait for a subscription. A publisher that confirms waits for room.
pub(super) const MAX_WAITING: usize = 65_536;

#[derive(Debug)]
pub(super) struct Acked {
    /// In the order of arrival.
    waiting: VecDeque<(u64, Stored)>,
    /// Handed out and not settled, by the number of arrival.
    out: BTreeMap<u64, Stored>,
    consumer: Option<Consumer>,
    next_id: u64,
    epoch: u64,
}

#[derive(Debug)]
struct Stored {
    name: Name,
    message: Message,
    tries: u32,
}

#[derive(Debug)]
struct Consumer {
    inbox: InboxSender,
    window: usize,
    acks: mpsc::UnboundedSender<AckReply>,
}

impl Acked {
    pub(super) fn new() -> Self {
        Self {
            waiting: VecDeque::new(),
            out: BTreeMap::new(),
            consumer: None,
            next_id: 0,
            epoch: 0,
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.waiting.len() >= MAX_WAITING
    }

    pub(super) fn has_consumer(&self) -> bool {
        self.consumer.is_some()
    }

    /// A message for this subscription. One that finds it full is lost and noted as such.
    pub(super) fn offer(&mut self, name: &Name, message: &Message) {
        if self.is_full() {
            if let Some(consumer) = &self.consumer {
                consumer
                    .inbox
                    .gap(Gap::new(GapCause::SlowConsumer, Some(1)));
            }
            return;
        }
        let stored = Stored {
            name: name.clone(),
            message: message.clone(),
            tries: 0,
        };
        self.waiting.push_back((self.next_id, stored));
        self.next_id += 1;
        self.hand_out();
    }

    /// Somebody listens from now on.
    pub(super) fn attach(
        &mut self,
        inbox: InboxSender,
        window: usize,
        acks: mpsc::UnboundedSender<AckReply>,
    ) {
        self.take_back();
        self.consumer = Some(Consumer {
            inbox,
            window,
            acks,
        });
        self.hand_out();
    }

    /// Nobody listens any more; what was not acknowledged waits again, in order.
    pub(super) fn detach(&mut self) {
        self.consumer = None;
        self.take_back();
    }

    /// The link was lost and is back: what was not acknowledged comes again.
    pub(super) fn redeliver(&mut self) {
        self.take_back();
        self.hand_out();
    }

    /// Forgets all messages, as a broker that lost its data.
    pub(super) fn forget(&mut self) {
        self.waiting.clear();
        self.out.clear();
        self.epoch += 1;
        if let Some(consumer) = &self.consumer {
            consumer.inbox.gap(Gap::new(GapCause::LinkLost, None));
        }
    }

    /// What the consumer did with a message.
    pub(super) fn settle(&mut self, reply: AckReply) {
        if reply.epoch != self.epoch {
            return;
        }
        let Some(mut stored) = self.out.remove(&reply.id) else {
            return;
        };
        match reply.outcome {
            AckOutcome::Accept | AckOutcome::Reject { requeue: false } => {}
            AckOutcome::Reject { requeue: true } | AckOutcome::Dropped => {
                stored.tries += 1;
                if stored.tries < MAX_TRIES {
                    self.wait_again(reply.id, stored);
                } else if let Some(consumer) = &self.consumer {
                    consumer.inbox.gap(Gap::new(GapCause::GivenUp, Some(1)));
                }
            }
        }
        self.hand_out();
    }

    fn take_back(&mut self) {
        self.epoch += 1;
        for (id, stored) in std::mem::take(&mut self.out) {
            self.wait_again(id, stored);
        }
    }

    fn wait_again(&mut self, id: u64, stored: Stored) {
        let place = self.waiting.partition_point(|(other, _)| *other < id);
        self.waiting.insert(place, (id, stored));
    }

    fn hand_out(&mut self) {
        let Some(consumer) = &self.consumer else {
            return;
        };
        while self.out.len() < consumer.window {
            let Some((id, stored)) = self.waiting.pop_front() else {
                return;
            };
            let mut arrival = Arrival::new(stored.name.clone(), stored.message.clone());
            arrival.ack = Some(Ack::new(id, self.epoch, consumer.acks.clone()));
            if !consumer.inbox.deliver(arrival) {
                // The inbox is going; its end will detach it.
                self.waiting.push_front((id, stored));
                return;
            }
            self.out.insert(id, stored);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inbox::{Inbox, Incoming};
    use crate::transport::{Delivery, ListenOptions};

    fn attach(acked: &mut Acked, window: usize) -> (Inbox, mpsc::UnboundedReceiver<AckReply>) {
        let options = ListenOptions::default().delivery(Delivery::AtLeastOnce);
        let (sender, inbox) = Inbox::new(&options);
        let (acks, replies) = mpsc::unbounded_channel();
        acked.attach(sender, window, acks);
        (inbox, replies)
    }

    fn offer(acked: &mut Acked, data: &'static str) {
        acked.offer(&Name::new("t").unwrap(), &Message::new(data));
    }

    fn next(inbox: &mut Inbox) -> Option<(String, Ack)> {
        match inbox.try_recv()? {
            Incoming::Message(mut arrival) => {
                let data = String::from_utf8(arrival.message.data.to_vec()).unwrap();
                Some((data, arrival.ack.take().unwrap()))
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn window_bounds_what_is_out_and_accepting_opens_it() {
        let mut acked = Acked::new();
        let (mut inbox, mut replies) = attach(&mut acked, 1);
        offer(&mut acked, "1");
        offer(&mut acked, "2");
        let (data, ack) = next(&mut inbox).unwrap();
        assert_eq!(data, "1");
        assert!(next(&mut inbox).is_none());
        ack.accept();
        acked.settle(replies.try_recv().unwrap());
        assert_eq!(next(&mut inbox).unwrap().0, "2");
    }

    #[test]
    fn rejected_and_dropped_come_again_until_given_up() {
        let mut acked = Acked::new();
        let (mut inbox, mut replies) = attach(&mut acked, 8);
        offer(&mut acked, "1");
        for _ in 0..MAX_TRIES {
            let (data, ack) = next(&mut inbox).unwrap();
            assert_eq!(data, "1");
            drop(ack);
            acked.settle(replies.try_recv().unwrap());
        }
        let Some(Incoming::Gap(gap)) = inbox.try_recv() else {
            panic!("expected a gap");
        };
        assert_eq!(gap, Gap::new(GapCause::GivenUp, Some(1)));
    }

    #[test]
    fn stale_acks_are_ignored_and_order_survives_a_change_of_consumer() {
        let mut acked = Acked::new();
        let (mut inbox, mut replies) = attach(&mut acked, 8);
        for data in ["1", "2", "3"] {
            offer(&mut acked, data);
        }
        let (_, stale) = next(&mut inbox).unwrap();
        acked.detach();
        stale.accept();
        acked.settle(replies.try_recv().unwrap());
        let (mut inbox, _replies) = attach(&mut acked, 8);
        for data in ["1", "2", "3"] {
            assert_eq!(next(&mut inbox).unwrap().0, data);
        }
    }
}
