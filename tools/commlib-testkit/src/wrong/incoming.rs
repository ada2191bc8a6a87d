//! Faults of listening.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use commlib_core::{
    Ack, Arrival, GapCause, Inbox, InboxSender, Incoming, LinkState, ListenOptions, Name, Pattern,
    Result, Source, Value,
};
use tokio::sync::{mpsc, watch};

use super::{Fault, Wrong};
use crate::forward::{Leftovers, forward, hand_over};

/// What the inboxes of one connection share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Inboxes that were dropped and go on in secret.
    leftovers: Leftovers,
    /// The patterns of all inboxes.
    patterns: Mutex<Vec<Pattern>>,
    /// Sender and id of what was delivered.
    seen: Mutex<HashSet<(String, String)>>,
    /// The far ends of all inboxes.
    ends: Mutex<Vec<InboxSender>>,
    /// Acks that go nowhere.
    acks: Mutex<Vec<Ack>>,
}

impl Wrong {
    pub(super) async fn listen_wrongly(
        &self,
        from: &Source,
        mut options: ListenOptions,
    ) -> Result<Inbox> {
        if self.fault == Fault::ForgetsDurable {
            options.durable = None;
        }
        if let (Fault::ListensLate, Source::Topic(_)) = (self.fault, from) {
            return Ok(self.listen_late(from.clone(), options));
        }
        let room = options.prefetch;
        if self.fault == Fault::HidesGaps {
            options.prefetch = usize::MAX;
        }
        let inner = self.inner.transport().listen(from, options.clone()).await?;
        let leases = inner.leases();
        if let Source::Topic(pattern) = from {
            self.shared.patterns.lock().unwrap().push(pattern.clone());
        }
        let mut states = self.inner.link().watch();
        states.borrow_and_update();
        let mut way = Way {
            fault: self.fault,
            from: from.clone(),
            shared: self.shared.clone(),
            states,
            room,
            deaf: false,
        };
        let stale = match (self.fault, from) {
            (Fault::StaleMessages, Source::Topic(_)) => self.shared.leftovers.take(from),
            _ => None,
        };
        let keep = match (self.fault, from) {
            (Fault::StaleMessages | Fault::DropsNeighbours, Source::Topic(_))
            | (Fault::KeepsListening, Source::Queue(_)) => {
                Some((self.shared.leftovers.clone(), from.clone()))
            }
            _ => None,
        };
        let mut stale = stale;
        let outer = forward(inner, &options, keep, move |incoming, out| {
            while let Some(old) = stale.as_mut().and_then(Inbox::try_recv) {
                hand_over(old, out);
            }
            way.pass(incoming, out);
        });
        Ok(match leases {
            Some(leases) => outer.with_leases(leases),
            None => outer,
        })
    }

    /// An inbox that is filled only a little later.
    fn listen_late(&self, from: Source, options: ListenOptions) -> Inbox {
        let (sender, outer) = Inbox::new(&options);
        let inner = self.inner.clone();
        let task = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            if let Ok(mut inbox) = inner.transport().listen(&from, options).await {
                while let Some(incoming) = inbox.recv().await {
                    hand_over(incoming, &sender);
                }
            }
        });
        outer.on_drop(AbortOnDrop(task.abort_handle()))
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// From one inbox to another.
struct Way {
    fault: Fault,
    from: Source,
    shared: Arc<Shared>,
    states: watch::Receiver<LinkState>,
    room: usize,
    deaf: bool,
}

impl Way {
    fn pass(&mut self, incoming: Incoming, out: &InboxSender) {
        match (incoming, self.from.clone()) {
            (Incoming::Message(arrival), Source::Topic(pattern)) => {
                self.pass_message(arrival, &pattern, out);
            }
            (Incoming::Message(arrival), Source::Queue(_)) => {
                let interrupted = self.states.has_changed().unwrap_or(true);
                if !(self.fault == Fault::IdleAfterOutage && interrupted) {
                    out.deliver(arrival);
                }
            }
            (Incoming::Message(mut arrival), Source::Replies) => {
                if self.fault == Fault::WrongKeys {
                    let key = arrival
                        .key
                        .as_deref()
                        .and_then(|key| key.parse::<u64>().ok());
                    arrival.key = key.map(|key| (key ^ 1).to_string());
                }
                out.deliver(arrival);
            }
            (Incoming::Gap(gap), source) => {
                let topic = matches!(source, Source::Topic(_));
                let lost = gap.cause == GapCause::LinkLost;
                self.deaf |= lost && self.fault == Fault::DeafAfterOutage;
                let hidden = match self.fault {
                    Fault::HidesGaps => true,
                    Fault::HidesLostLinks => lost && topic,
                    Fault::KeepsCallersWaiting => lost && !topic,
                    _ => false,
                };
                if !hidden {
                    out.gap(gap);
                }
            }
            (Incoming::Malformed(malformed), _) => {
                if self.fault != Fault::SwallowsMalformed {
                    out.malformed(malformed);
                }
            }
        }
    }

    fn pass_message(&mut self, mut arrival: Arrival, pattern: &Pattern, out: &InboxSender) {
        if self.deaf || self.loses(&arrival, pattern, out) {
            return;
        }
        match self.fault {
            Fault::WrongName => {
                if let Ok(name) = Name::new(pattern.as_str().replace('*', "x")) {
                    arrival.name = name;
                }
            }
            Fault::EachForEach => {
                let patterns = self.shared.patterns.lock().unwrap();
                let matching = patterns.iter().filter(|other| other.matches(&arrival.name));
                for _ in 1..matching.count() {
                    out.deliver(Arrival::new(arrival.name.clone(), arrival.message.clone()));
                }
            }
            Fault::AcksEarly => {
                if let Some(ack) = arrival.ack.take() {
                    ack.accept();
                }
            }
            Fault::LosesAcks => {
                let nowhere = Ack::new(0, 0, mpsc::unbounded_channel().0);
                if let Some(ack) = arrival.ack.replace(nowhere) {
                    self.shared.acks.lock().unwrap().push(ack);
                }
            }
            Fault::NeverRedelivers => arrival.ack = arrival.ack.take().map(accepting),
            Fault::NeverEnds => self.shared.ends.lock().unwrap().push(out.clone()),
            _ => {}
        }
        out.deliver(arrival);
    }

    fn loses(&self, arrival: &Arrival, pattern: &Pattern, out: &InboxSender) -> bool {
        let shared = &self.shared;
        match self.fault {
            Fault::ShallowStars => arrival.name.segments().count() != pattern.segments().count(),
            Fault::NoInnerStars => pattern.as_str().trim_end_matches('*').contains('*'),
            Fault::OneOfOverlapping => {
                let header = &arrival.message.header;
                let sender = header.sender.as_deref().unwrap_or_default().to_owned();
                let id = header.message_id.clone().unwrap_or_default();
                !shared.seen.lock().unwrap().insert((sender, id))
            }
            Fault::DropsNeighbours => shared.leftovers.any(|source| match source {
                Source::Topic(other) => other.matches(&arrival.name),
                _ => false,
            }),
            Fault::HidesGaps => out.waiting_bytes() >= self.room,
            Fault::StallsForTheSlow => {
                let mut ends = shared.ends.lock().unwrap();
                ends.push(out.clone());
                ends.iter().any(|end| end.waiting_bytes() > 16)
            }
            Fault::SwallowsMalformed => {
                commlib_core::decode::<Value>(&arrival.message.data).is_err()
            }
            _ => false,
        }
    }
}

/// An ack that accepts whatever its holder says.
fn accepting(ack: Ack) -> Ack {
    let (replies, mut reply) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        reply.recv().await;
        ack.accept();
    });
    Ack::new(0, 0, replies)
}
