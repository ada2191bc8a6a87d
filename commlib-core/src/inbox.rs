//! Where arrivals wait for a user: bounded, without a way to make the connection task wait.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use futures_core::Stream;

use crate::ack::Ack;
use crate::address::Name;
use crate::error::Error;
use crate::message::Message;
use crate::reply::{Leases, ReplyLease};
use crate::transport::{Delivery, ListenOptions};

/// What an [`Inbox`] yields, and, with decoded messages, what a [`Subscriber`](crate::Subscriber) yields.
#[derive(Debug)]
pub enum Incoming<M = Arrival> {
    /// A message.
    Message(M),
    /// Messages that were or may have been missed.
    Gap(Gap),
    /// A message that could not be read. It has been acknowledged and is not repeated.
    Malformed(Malformed),
}

/// A message that arrived.
#[derive(Debug)]
pub struct Arrival {
    /// The topic or service it was sent to.
    pub name: Name,
    /// The message.
    pub message: Message,
    /// On replies: the key of the [`ReplyLease`] it answers.
    pub key: Option<String>,
    /// On at-least-once arrivals: the duty to acknowledge it.
    pub ack: Option<Ack>,
}

impl Arrival {
    /// An arrival that needs no acknowledgement.
    pub fn new(name: Name, message: Message) -> Self {
        Self {
            name,
            message,
            key: None,
            ack: None,
        }
    }
}

/// Why messages are missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum GapCause {
    /// The link was down, and the broker kept nothing for this subscription.
    LinkLost,
    /// This receiver was too slow; the oldest waiting messages made room for new ones.
    SlowConsumer,
    /// The sender's count jumped: messages were lost between its broker and ours.
    SequenceJump,
    /// The receiver failed to take a message as often as the transport tries.
    GivenUp,
}

/// Messages that were or may have been missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Gap {
    /// How many, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missed: Option<u64>,
    /// Why.
    pub cause: GapCause,
}

impl Gap {
    /// A gap of `missed` messages, or of an unknown number.
    pub fn new(cause: GapCause, missed: Option<u64>) -> Self {
        Self { missed, cause }
    }
}

/// A message that could not be read.
#[derive(Debug)]
#[non_exhaustive]
pub struct Malformed {
    /// Where it arrived.
    pub name: Name,
    /// What is wrong with it.
    pub error: Error,
    /// On replies: the key of the [`ReplyLease`] it answers, so that its call can fail.
    pub key: Option<String>,
}

impl Malformed {
    /// What arrived where, and what is wrong with it.
    pub fn new(name: Name, error: Error) -> Self {
        Self {
            name,
            error,
            key: None,
        }
    }
}

/// The receiving half: a stream of [`Incoming`] that ends when the connection is closed. Dropping it ends the listening.
pub struct Inbox {
    shared: Arc<Shared>,
    leases: Option<Leases>,
    // Dropped with the inbox, before what waits in it; tells the transport to stop.
    stop: Option<Box<dyn StopGuard>>,
}

/// Anything a transport wants dropped together with an inbox.
pub trait StopGuard: Send + Sync {}
impl<T: Send + Sync> StopGuard for T {}

/// The transport's half of an [`Inbox`]. No method of it ever waits. Dropping the last clone ends the inbox.
pub struct InboxSender {
    shared: Arc<Shared>,
}

struct Shared {
    queue: Mutex<Queue>,
    lossless: bool,
    max_len: usize,
    max_bytes: usize,
}

#[derive(Default)]
struct Queue {
    items: VecDeque<Incoming>,
    bytes: usize,
    waker: Option<Waker>,
    senders: usize,
    receiver_gone: bool,
}

impl Inbox {
    /// For transports: an inbox for these options, and the half that fills it.
    ///
    /// A best-effort inbox is bounded by `prefetch` and `max_bytes`: the oldest message makes room, and a gap takes its
    /// place. An at-least-once inbox never drops; the broker's window bounds it.
    pub fn new(options: &ListenOptions) -> (InboxSender, Self) {
        Self::build(options, options.delivery == Delivery::AtLeastOnce)
    }

    fn build(options: &ListenOptions, lossless: bool) -> (InboxSender, Self) {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                senders: 1,
                ..Queue::default()
            }),
            lossless,
            max_len: options.prefetch.max(1),
            max_bytes: options.max_bytes,
        });
        let inbox = Self {
            shared: shared.clone(),
            leases: None,
            stop: None,
        };
        (InboxSender { shared }, inbox)
    }

    /// For transports: `guard` is dropped together with the inbox.
    #[must_use]
    pub fn on_drop(mut self, guard: impl StopGuard + 'static) -> Self {
        self.stop = Some(Box::new(guard));
        self
    }

    /// For transports: an inbox of replies hands out these leases.
    #[must_use]
    pub fn with_leases(mut self, leases: Leases) -> Self {
        self.leases = Some(leases);
        self
    }

    /// A reply address for one call to a service; `None` if this is not an inbox of replies.
    pub fn lease(&self, service: &Name) -> Option<ReplyLease> {
        self.leases.as_ref().map(|leases| leases.lease(service))
    }

    /// The source of reply addresses; `None` if this is not an inbox of replies.
    pub fn leases(&self) -> Option<Leases> {
        self.leases.clone()
    }

    /// Ends the listening. What has arrived can still be taken.
    pub(crate) fn stop(&mut self) {
        self.stop = None;
    }

    /// The next arrival or notice; `None` once the connection is closed and everything was taken. Cancel safe.
    pub async fn recv(&mut self) -> Option<Incoming> {
        poll_fn(|context| self.poll_recv(context)).await
    }

    /// The next arrival or notice if one is there already.
    pub fn try_recv(&mut self) -> Option<Incoming> {
        self.shared.lock().pop()
    }

    /// Polls for the next arrival or notice.
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<Incoming>> {
        let mut queue = self.shared.lock();
        if let Some(item) = queue.pop() {
            return Poll::Ready(Some(item));
        }
        if queue.senders == 0 {
            return Poll::Ready(None);
        }
        if !queue
            .waker
            .as_ref()
            .is_some_and(|waker| waker.will_wake(context.waker()))
        {
            queue.waker = Some(context.waker().clone());
        }
        Poll::Pending
    }
}

impl Stream for Inbox {
    type Item = Incoming;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Incoming>> {
        self.get_mut().poll_recv(context)
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        // First, so that a transport can tell what nobody ever saw from what a user dropped.
        self.stop();
        let items = {
            let mut queue = self.shared.lock();
            queue.receiver_gone = true;
            queue.bytes = 0;
            std::mem::take(&mut queue.items)
        };
        // Outside the lock: dropping an arrival reports its ack as dropped.
        drop(items);
    }
}

impl InboxSender {
    /// Hands over an arrival. False if the inbox is gone.
    pub fn deliver(&self, arrival: Arrival) -> bool {
        self.push(Incoming::Message(arrival))
    }

    /// Hands over a notice of missed messages. Adjacent gaps of one cause become one. False if the inbox is gone.
    pub fn gap(&self, gap: Gap) -> bool {
        self.push(Incoming::Gap(gap))
    }

    /// Hands over a notice of an unreadable message. False if the inbox is gone.
    pub fn malformed(&self, malformed: Malformed) -> bool {
        self.push(Incoming::Malformed(malformed))
    }

    /// The bytes of data that wait here to be taken.
    pub fn waiting_bytes(&self) -> usize {
        self.shared.lock().bytes
    }

    /// Whether as much waits here as the options allow. A best-effort inbox makes room by itself; an at-least-once one
    /// takes more all the same.
    pub fn is_full(&self) -> bool {
        let queue = self.shared.lock();
        queue.items.len() >= self.shared.max_len || queue.bytes >= self.shared.max_bytes
    }

    /// Whether the receiving half has been dropped.
    pub fn is_gone(&self) -> bool {
        self.shared.lock().receiver_gone
    }

    fn push(&self, item: Incoming) -> bool {
        let mut evicted = None;
        let waker = {
            let mut queue = self.shared.lock();
            if queue.receiver_gone {
                drop(queue);
                return false;
            }
            queue.push(item);
            if !self.shared.lossless
                && (queue.items.len() > self.shared.max_len || queue.bytes > self.shared.max_bytes)
            {
                evicted = Some(queue.make_room(self.shared.max_len, self.shared.max_bytes));
            }
            queue.waker.take()
        };
        drop(evicted);
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }
}

impl Clone for InboxSender {
    fn clone(&self) -> Self {
        self.shared.lock().senders += 1;
        Self {
            shared: self.shared.clone(),
        }
    }
}

impl Drop for InboxSender {
    fn drop(&mut self) {
        let waker = {
            let mut queue = self.shared.lock();
            queue.senders -= 1;
            if queue.senders > 0 {
                return;
            }
            queue.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // No code panics while it holds the lock; if it did, the queue would still be whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn push(&mut self, item: Incoming) {
        if let (Incoming::Gap(new), Some(Incoming::Gap(last))) = (&item, self.items.back_mut())
            && new.cause == last.cause
        {
            last.missed = last
                .missed
                .zip(new.missed)
                .map(|(a, b)| a.saturating_add(b));
            return;
        }
        self.bytes += size(&item);
        self.items.push_back(item);
    }

    fn pop(&mut self) -> Option<Incoming> {
        let item = self.items.pop_front()?;
        self.bytes -= size(&item);
        Some(item)
    }

    /// Takes out the oldest items, all but the newest if need be, and puts one gap in the place of any.
    fn make_room(&mut self, max_len: usize, max_bytes: usize) -> Vec<Incoming> {
        let mut evicted = Vec::new();
        let mut missed = Some(0_u64);
        while self.items.len() > 1 && (self.items.len() >= max_len.max(2) || self.bytes > max_bytes)
        {
            let Some(item) = self.pop() else { break };
            let more = match &item {
                Incoming::Gap(gap) => gap.missed,
                Incoming::Message(_) | Incoming::Malformed(_) => Some(1),
            };
            missed = missed.zip(more).map(|(a, b)| a.saturating_add(b));
            evicted.push(item);
        }
        if !evicted.is_empty() {
            let gap = Gap::new(GapCause::SlowConsumer, missed);
            self.items.push_front(Incoming::Gap(gap));
        }
        evicted
    }
}

fn size(item: &Incoming) -> usize {
    match item {
        Incoming::Message(arrival) => arrival.message.data.len(),
        Incoming::Gap(_) | Incoming::Malformed(_) => 0,
    }
}

impl fmt::Debug for Inbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox")
            .field("waiting", &self.shared.lock().items.len())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for InboxSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InboxSender")
            .field("waiting", &self.shared.lock().items.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival(data: &'static str) -> Arrival {
        Arrival::new(Name::from_foreign(["t"]), Message::new(data))
    }

    #[test]
    fn one_message_beyond_the_limit_of_bytes_is_no_gap() {
        let (sender, mut inbox) = Inbox::new(&ListenOptions::default().max_bytes(1));
        sender.deliver(arrival("22"));
        assert!(matches!(inbox.try_recv(), Some(Incoming::Message(_))));
        sender.deliver(arrival("22"));
        sender.deliver(arrival("22"));
        let Some(Incoming::Gap(gap)) = inbox.try_recv() else {
            panic!("expected a gap");
        };
        assert_eq!(gap, Gap::new(GapCause::SlowConsumer, Some(1)));
    }

    #[test]
    fn a_gap_of_unknown_size_stays_one_when_it_makes_room() {
        let (sender, mut inbox) = Inbox::new(&ListenOptions::default().prefetch(2));
        sender.gap(Gap::new(GapCause::LinkLost, None));
        for _ in 0..3 {
            sender.deliver(arrival("1"));
        }
        let Some(Incoming::Gap(gap)) = inbox.try_recv() else {
            panic!("expected a gap");
        };
        assert_eq!(gap, Gap::new(GapCause::SlowConsumer, None));
    }
}
