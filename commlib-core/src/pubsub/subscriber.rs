//! Subscribers: messages in, decoded in the receiving task; gaps and unreadable messages as notices.

use std::fmt;
use std::future::poll_fn;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use futures_core::Stream;
use serde::de::DeserializeOwned;

use super::Guarantee;
use super::handler::{self, Blocking, MessageHandler, Outcome};
use super::sequence::{Dedup, MessageKey, SequenceWatch, message_key};
use crate::ack::Ack;
use crate::address::{Name, Pattern, Source};
use crate::codec::{self, Value};
use crate::error::{Error, ErrorKind, Result};
use crate::inbox::{Arrival, Gap, GapCause, Inbox, Incoming, Malformed};
use crate::message::{Dialect, Header};
use crate::scope::Scope;
use crate::tasks::Handle;
use crate::transport::{Delivery, ListenOptions};

/// Options of a [`Subscriber`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SubscriberOptions {
    /// How sure delivery is. Default: best effort.
    pub delivery: Delivery,
    /// Keep the subscription, and what arrives for it, at the broker under this name while nobody listens.
    /// Needs at-least-once delivery.
    pub durable: Option<String>,
    /// Drop repetitions among this many last messages, by sender and message id. Default 0: drop none.
    pub dedup: usize,
    /// How many messages may wait here (best effort) or be unacknowledged (at least once). Default 1,024.
    pub prefetch: usize,
    /// How many messages [`Subscriber::on_message`] handles at a time. Default 1, which keeps their order.
    pub concurrency: usize,
    /// How input without our own marks is read. Default: as the connection says.
    pub dialect: Option<Dialect>,
}

impl Default for SubscriberOptions {
    fn default() -> Self {
        Self {
            delivery: Delivery::default(),
            durable: None,
            dedup: 0,
            prefetch: ListenOptions::default().prefetch,
            concurrency: 1,
            dialect: None,
        }
    }
}

impl SubscriberOptions {
    /// Sets the delivery.
    #[must_use]
    pub fn delivery(mut self, delivery: Delivery) -> Self {
        self.delivery = delivery;
        self
    }

    /// Sets the name under which the broker keeps the subscription.
    #[must_use]
    pub fn durable(mut self, name: impl Into<String>) -> Self {
        self.durable = Some(name.into());
        self
    }

    /// Drops repetitions among the last `window` messages.
    #[must_use]
    pub fn dedup(mut self, window: usize) -> Self {
        self.dedup = window;
        self
    }

    /// Sets how many messages may wait.
    #[must_use]
    pub fn prefetch(mut self, prefetch: usize) -> Self {
        self.prefetch = prefetch;
        self
    }

    /// Sets how many messages a handler gets at a time.
    #[must_use]
    pub fn concurrency(mut self, concurrency: usize) -> Self {
        self.concurrency = concurrency;
        self
    }

    /// Sets the dialect.
    #[must_use]
    pub fn dialect(mut self, dialect: Dialect) -> Self {
        self.dialect = Some(dialect);
        self
    }
}

/// A message as a subscriber gets it.
#[derive(Debug)]
#[non_exhaustive]
pub struct Received<T> {
    /// The topic it was published on.
    pub topic: Name,
    /// The decoded data.
    pub data: T,
    /// Facts about the message.
    pub header: Header,
    /// What was or may have been missed since the message before, if anything.
    /// Always `None` from [`Subscriber::recv_incoming`], which yields gaps by themselves.
    pub gap: Option<Gap>,
    pub(super) unsettled: Unsettled,
}

impl<T> Received<T> {
    /// Takes over the duty to acknowledge; `None` on best-effort subscriptions.
    ///
    /// What is taken over is not remembered by [`SubscriberOptions::dedup`]: only its new owner knows whether it was done.
    ///
    /// Without this, the stream form acknowledges the message when the next one is asked for, and the handler form
    /// when the handler has returned `Ok`.
    pub fn take_ack(&mut self) -> Option<Ack> {
        let taken = self.unsettled.take()?;
        taken.ack
    }
}

/// A message that is in the user's hands: its ack, and what to remember once it is done. Shared between the message
/// and the subscriber, whoever settles it first.
#[derive(Debug, Clone, Default)]
pub(super) struct Unsettled(Option<Arc<Mutex<Option<Settle>>>>);

#[derive(Debug)]
pub(super) struct Settle {
    pub(super) ack: Option<Ack>,
    key: Option<MessageKey>,
}

impl Unsettled {
    pub(super) fn take(&self) -> Option<Settle> {
        self.0
            .as_ref()?
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

/// Receives what is published on a name or pattern. A stream of `Result<Received<T>>`.
///
/// The stream ends when the connection is closed, not when the link is lost: it goes on by itself after a reconnect.
/// An unreadable message is an `Err` of kind [`ErrorKind::Decode`] and the stream goes on behind it; what was missed
/// stands in [`Received::gap`] of the next message, or comes by itself from [`recv_incoming`](Self::recv_incoming).
/// Dropping it ends the subscription.
#[doc(alias = "PSubscriber")]
#[doc(alias = "WSubscriber")]
#[must_use = "dropping a subscriber ends the subscription"]
pub struct Subscriber<T = Value> {
    inbox: Inbox,
    pattern: Pattern,
    guarantee: Guarantee,
    pub(super) concurrency: usize,
    sequence: SequenceWatch,
    pub(super) dedup: Option<Arc<Mutex<Dedup>>>,
    /// A message that waits behind the gap that was noticed with it.
    held: Option<Arrival>,
    /// The message that the user has now.
    current: Unsettled,
    /// A gap that waits for the next message of the stream, to ride on it.
    gap: Option<Gap>,
    scope: Scope,
    value: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Subscriber<T> {
    pub(super) async fn start(
        scope: Scope,
        pattern: Pattern,
        options: SubscriberOptions,
    ) -> Result<Self> {
        let connection = scope.connection();
        let refuse = |why: &str| {
            Err(
                Error::new(ErrorKind::Unsupported, "at-least-once subscription to")
                    .at(&pattern)
                    .because(why),
            )
        };
        if options.delivery == Delivery::AtLeastOnce {
            if !connection.link().capabilities().acks {
                return refuse(
                    "this connection keeps nothing; the URL may have an option for it, such as `session=persistent` with a `client_id`, or `streams=on`",
                );
            }
            if !pattern.is_exact() && !connection.link().capabilities().ack_patterns {
                return refuse("this broker keeps messages by topic; subscribe to a name");
            }
        } else if options.durable.is_some() {
            return refuse("a durable subscription needs at-least-once delivery");
        }
        let durable = options.durable.as_deref().map(Name::new).transpose()?;
        let guarantee = Guarantee {
            delivery: options.delivery,
            durable: durable.is_some(),
        };
        let listen = ListenOptions::default()
            .delivery(options.delivery)
            .dialect(options.dialect.unwrap_or_else(|| connection.dialect()))
            .durable(durable)
            .prefetch(options.prefetch);
        let inbox = connection
            .transport()
            .listen(&Source::Topic(pattern.clone()), listen)
            .await?;
        Ok(Self {
            inbox,
            pattern,
            guarantee,
            concurrency: options.concurrency.max(1),
            sequence: SequenceWatch::default(),
            dedup: (options.dedup > 0).then(|| Arc::new(Mutex::new(Dedup::new(options.dedup)))),
            held: None,
            current: Unsettled::default(),
            gap: None,
            scope,
            value: PhantomData,
        })
    }

    /// The next message; an `Err` for an unreadable one; `None` once the connection is closed. Cancel safe.
    pub async fn recv(&mut self) -> Option<Result<Received<T>>> {
        poll_fn(|context| self.poll_recv(context)).await
    }

    /// The next message, gap or unreadable message, each as soon as it is known; `None` once the connection is
    /// closed. Cancel safe.
    pub async fn recv_incoming(&mut self) -> Option<Incoming<Received<T>>> {
        poll_fn(|context| self.poll_incoming(context)).await
    }

    /// Gives each message to a handler, in a task of its own.
    ///
    /// The handler is a closure `|message: Received<T>| async move { … }` that returns `()` or `Result<(), E>`, or a
    /// [`MessageHandler`]. At-least-once messages are acknowledged after its `Ok`; after an `Err` or a panic they come
    /// again, as often as the transport tries. Must be called within a tokio runtime.
    pub fn on_message(mut self, handler: impl MessageHandler<T>) -> Handle
    where
        T: Send + 'static,
    {
        self.settle_current();
        let tasks = self.scope.tasks().clone();
        tasks.spawn(move |stop| handler::run(self, handler, stop))
    }

    /// As [`on_message`](Self::on_message) with a closure that may block: it runs on a blocking thread and holds up
    /// nothing else.
    pub fn on_message_blocking<F, O>(self, handler: F) -> Handle
    where
        F: Fn(Received<T>) -> O + Send + Sync + 'static,
        O: Outcome + Send + 'static,
        T: Send + 'static,
    {
        self.on_message(Blocking(Arc::new(handler)))
    }

    /// What is subscribed to, with the namespace.
    pub fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    /// What it promises.
    pub fn guarantee(&self) -> Guarantee {
        self.guarantee
    }

    fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Received<T>>>> {
        let mut gap = self.gap.take();
        let polled = loop {
            match self.poll_incoming(context) {
                Poll::Pending => break Poll::Pending,
                Poll::Ready(None) => break Poll::Ready(None),
                Poll::Ready(Some(Incoming::Gap(later))) => gap = Some(merge(gap, later)),
                Poll::Ready(Some(Incoming::Malformed(malformed))) => {
                    break Poll::Ready(Some(Err(malformed.error)));
                }
                Poll::Ready(Some(Incoming::Message(mut message))) => {
                    message.gap = gap.take();
                    break Poll::Ready(Some(Ok(message)));
                }
            }
        };
        self.gap = gap;
        polled
    }

    fn poll_incoming(&mut self, context: &mut Context<'_>) -> Poll<Option<Incoming<Received<T>>>> {
        self.settle_current();
        let incoming = ready!(self.poll_unsettled(context));
        if let Some(Incoming::Message(message)) = &incoming {
            self.current = message.unsettled.clone();
        }
        Poll::Ready(incoming)
    }

    /// The next arrival, which the caller settles.
    pub(super) fn poll_unsettled(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Incoming<Received<T>>>> {
        if let Some(gap) = self.gap.take() {
            return Poll::Ready(Some(Incoming::Gap(gap)));
        }
        loop {
            let arrival = match self.held.take() {
                Some(held) => held,
                None => match ready!(self.inbox.poll_recv(context)) {
                    None => return Poll::Ready(None),
                    Some(Incoming::Gap(gap)) => {
                        if gap.cause == GapCause::SlowConsumer {
                            // The jump in the count behind it is the same loss.
                            self.sequence = SequenceWatch::default();
                        }
                        return Poll::Ready(Some(Incoming::Gap(gap)));
                    }
                    Some(Incoming::Malformed(malformed)) => {
                        return Poll::Ready(Some(Incoming::Malformed(malformed)));
                    }
                    Some(Incoming::Message(arrival)) => {
                        let Some(arrival) = self.wanted(arrival) else {
                            continue;
                        };
                        if let Some(gap) =
                            self.sequence.note(&arrival.name, &arrival.message.header)
                        {
                            self.held = Some(arrival);
                            return Poll::Ready(Some(Incoming::Gap(gap)));
                        }
                        arrival
                    }
                },
            };
            return Poll::Ready(Some(self.decode(arrival)));
        }
    }

    /// Acknowledges and drops what the transport delivered too much, and repetitions.
    fn wanted(&self, mut arrival: Arrival) -> Option<Arrival> {
        let repeated = || {
            let dedup = self.dedup.as_ref()?;
            let key = message_key(&arrival.message.header)?;
            Some(
                dedup
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .knows(&key),
            )
        };
        if self.pattern.matches(&arrival.name) && !repeated().unwrap_or(false) {
            return Some(arrival);
        }
        if let Some(ack) = arrival.ack.take() {
            ack.accept();
        }
        None
    }

    fn decode(&self, mut arrival: Arrival) -> Incoming<Received<T>> {
        match codec::decode(&arrival.message.data) {
            Ok(data) => {
                let key = self
                    .dedup
                    .as_ref()
                    .and_then(|_| message_key(&arrival.message.header));
                let settle = Settle {
                    ack: arrival.ack.take(),
                    key,
                };
                let nothing = settle.ack.is_none() && settle.key.is_none();
                let unsettled = Unsettled((!nothing).then(|| Arc::new(Mutex::new(Some(settle)))));
                Incoming::Message(Received {
                    topic: arrival.name,
                    data,
                    header: arrival.message.header,
                    gap: None,
                    unsettled,
                })
            }
            Err(error) => {
                // It will not get better by being repeated.
                if let Some(ack) = arrival.ack.take() {
                    ack.accept();
                }
                let error = Error::new(ErrorKind::Decode, "message on")
                    .at(&arrival.name)
                    .because(error);
                Incoming::Malformed(Malformed::new(arrival.name, error))
            }
        }
    }

    /// The next message is asked for, so the one that the user has is done.
    fn settle_current(&mut self) {
        let current = std::mem::take(&mut self.current);
        settle(self.dedup.as_deref(), &current);
    }
}

/// Acknowledges a message that is done, and remembers it against repetitions. Not before: a message that failed must
/// not look like a repetition when it comes again.
pub(super) fn settle(dedup: Option<&Mutex<Dedup>>, unsettled: &Unsettled) {
    let Some(settle) = unsettled.take() else {
        return;
    };
    if let (Some(dedup), Some(key)) = (dedup, settle.key) {
        dedup
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remember(key);
    }
    if let Some(ack) = settle.ack {
        ack.accept();
    }
}

/// One gap for two: the later cause, and the sum where both are known.
fn merge(earlier: Option<Gap>, later: Gap) -> Gap {
    match earlier {
        None => later,
        Some(earlier) => Gap::new(
            later.cause,
            match (earlier.missed, later.missed) {
                (Some(a), Some(b)) => Some(a.saturating_add(b)),
                (a, b) => a.or(b),
            },
        ),
    }
}

impl<T: DeserializeOwned> Stream for Subscriber<T> {
    type Item = Result<Received<T>>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_recv(context)
    }
}

impl<T> fmt::Debug for Subscriber<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscriber")
            .field("pattern", &self.pattern)
            .field("guarantee", &self.guarantee)
            .field("inbox", &self.inbox)
            .finish_non_exhaustive()
    }
}
