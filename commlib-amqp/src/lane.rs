//! Ways out: each has a channel of its own, so that what goes wrong on one leaves the others alone.

use std::collections::VecDeque;
use std::fmt;

use bytes::Bytes;
use commlib_core::{Confirm, Error, ErrorKind, Result};
use futures_util::FutureExt;
use futures_util::future::{Either, ready};
use lapin::message::BasicReturnMessage;
use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation, PublisherConfirm};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use crate::net;

/// How many messages may be on their way without a confirmation.
const WINDOW: usize = 256;

/// How many messages are handed to the client crate at a time.
const BATCH: usize = 64;

/// A message on its way out.
pub(crate) struct Outgoing {
    pub(crate) exchange: ShortString,
    pub(crate) key: ShortString,
    pub(crate) properties: BasicProperties,
    pub(crate) body: Bytes,
    /// The broker returns it if no queue takes it.
    pub(crate) mandatory: bool,
    /// Told what became of it. One that is still here when the message is dropped is told that the link was lost.
    pub(crate) confirm: Option<Confirm>,
    /// What the broker said when it returned it.
    pub(crate) returned: Option<String>,
    /// The room it takes while it waits.
    pub(crate) _room: Vec<OwnedSemaphorePermit>,
}

impl Outgoing {
    async fn publish(&self, channel: &Channel) -> lapin::Result<PublisherConfirm> {
        let options = BasicPublishOptions {
            mandatory: self.mandatory,
            ..BasicPublishOptions::default()
        };
        let (exchange, key) = (self.exchange.clone(), self.key.clone());
        channel
            .basic_publish(exchange, key, options, &self.body, self.properties.clone())
            .await
    }

    pub(crate) fn settle(mut self, outcome: Result<()>) {
        if let Some(confirm) = self.confirm.take() {
            confirm.confirm(outcome);
        }
    }

    fn confirmed(self, ack: bool) {
        let (is_request, key) = (self.exchange.as_str().is_empty(), self.key.to_string());
        let outcome = match &self.returned {
            Some(_) if is_request => Err(Error::new(ErrorKind::NoService, "request to")
                .at(&key)
                .because("nobody serves this name")),
            Some(said) => Err(Error::new(ErrorKind::Broker, "publish to")
                .at(&key)
                .because(format_args!(
                    "nobody subscribes to it, so that the broker kept nothing ({said})"
                ))),
            None if !ack && is_request => Err(Error::new(ErrorKind::Broker, "request to")
                .at(&key)
                .because("too many requests wait for a service of this name")),
            None if !ack => Err(Error::new(ErrorKind::Broker, "publish to")
                .at(&key)
                .because("the broker could not take it; is a queue full?")),
            None => Ok(()),
        };
        self.settle(outcome);
    }

    /// Whether this is what came back. The broker changes the reply address.
    fn is(&self, returned: &BasicReturnMessage) -> bool {
        let (came, went) = (&returned.properties, &self.properties);
        returned.routing_key == self.key
            && returned.exchange == self.exchange
            && came.message_id() == went.message_id()
            && came.correlation_id() == went.correlation_id()
            && came.timestamp() == went.timestamp()
            && returned.data == self.body
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if let Some(confirm) = self.confirm.take() {
            let lost = Error::new(ErrorKind::ConnectionLost, "message to")
                .at(&self.key)
                .because("the link was lost before the broker confirmed it")
                .possibly_executed();
            confirm.confirm(Err(lost));
        }
    }
}

impl fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outgoing")
            .field("exchange", &self.exchange)
            .field("key", &self.key)
            .field("bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// Hands messages to the client crate and waits until they are written, which is what bounds their number there.
async fn publish_all<'a>(
    channel: &Channel,
    messages: impl Iterator<Item = &'a Outgoing>,
) -> lapin::Result<Vec<PublisherConfirm>> {
    let mut writing = Vec::new();
    for message in messages {
        // The first poll queues the frames: so they are in order, and written together.
        let mut publish = Box::pin(message.publish(channel));
        writing.push(match (&mut publish).now_or_never() {
            Some(written) => Either::Left(ready(written)),
            None => Either::Right(publish),
        });
    }
    let mut written = Vec::with_capacity(writing.len());
    for publish in writing {
        written.push(publish.await?);
    }
    Ok(written)
}

/// Sends what comes, unconfirmed, until nothing more can come.
///
/// # Errors
/// Why the channel ended.
pub(crate) async fn unconfirmed(
    channel: &Channel,
    queue: &mut mpsc::Receiver<Outgoing>,
) -> lapin::Result<()> {
    let mut batch = Vec::new();
    while queue.recv_many(&mut batch, BATCH).await > 0 {
        publish_all(channel, batch.iter()).await?;
        batch.clear();
    }
    Ok(())
}

/// Messages that wait for the broker's word, in their order. Outlives the channel they are sent on.
#[derive(Debug)]
pub(crate) struct Kept {
    queue: mpsc::UnboundedReceiver<Outgoing>,
    entries: VecDeque<Outgoing>,
    /// So many of the first are sent one at a time, because one of them closed the last channel.
    suspects: usize,
}

impl Kept {
    pub(crate) fn new(queue: mpsc::UnboundedReceiver<Outgoing>) -> Self {
        Self {
            queue,
            entries: VecDeque::new(),
            suspects: 0,
        }
    }

    /// How many are not confirmed.
    pub(crate) fn len(&self) -> usize {
        self.entries.len() + self.queue.len()
    }

    /// Gives up what was sent or is about to be, and tells everybody who waits.
    pub(crate) fn fail(&mut self, error: impl Fn() -> Error) {
        for message in self.entries.drain(..) {
            message.settle(Err(error()));
        }
        self.suspects = 0;
    }

    /// As [`fail`](Self::fail), with what came meanwhile.
    pub(crate) fn fail_all(&mut self, error: impl Fn() -> Error) {
        while let Ok(message) = self.queue.try_recv() {
            self.entries.push_back(message);
        }
        self.fail(error);
    }

    /// Sends what was kept, tells `resent`, and goes on with what comes, until nothing more can come and all is
    /// confirmed.
    ///
    /// # Errors
    /// Why the channel ended. What is not confirmed is kept. If it was one message that closed the channel, it is taken
    /// out and its sender told.
    pub(crate) async fn send(
        &mut self,
        channel: &Channel,
        resent: &mut Option<oneshot::Sender<()>>,
    ) -> lapin::Result<()> {
        let mut sent = 0;
        let outcome = self.exchange(channel, &mut sent, resent).await;
        if let Err(error) = &outcome
            && net::is_exception(error)
        {
            if sent > 1 {
                self.suspects = sent;
            } else if let Some(culprit) = self.entries.pop_front() {
                self.suspects = self.suspects.saturating_sub(1);
                let told = net::refused("publish to", culprit.key.as_str(), error);
                culprit.settle(Err(told));
            }
        }
        outcome
    }

    /// `sent` is how many of the entries were sent and are not confirmed.
    async fn exchange(
        &mut self,
        channel: &Channel,
        sent: &mut usize,
        resent: &mut Option<oneshot::Sender<()>>,
    ) -> lapin::Result<()> {
        let mut confirms = VecDeque::new();
        let mut old = self.entries.len();
        let mut open = true;
        let mut incoming = Vec::new();
        loop {
            let window = if self.suspects > 0 { 1 } else { WINDOW };
            let (first, end) = (*sent, window.min(self.entries.len()));
            if first < end {
                *sent = end;
                match publish_all(channel, self.entries.range(first..end)).await {
                    Ok(written) => confirms.extend(written),
                    // The channel is closed. Why, only those know who wait.
                    Err(error) => return Err(cause(&mut confirms).await.unwrap_or(error)),
                }
            }
            if *sent >= old
                && let Some(resent) = resent.take()
            {
                let _ = resent.send(());
            }
            if !open && self.entries.is_empty() {
                return Ok(());
            }
            let room = WINDOW.saturating_sub(self.entries.len()).min(BATCH);
            tokio::select! {
                biased;
                first = oldest(&mut confirms), if !confirms.is_empty() => {
                    let (done, rest) = self.settle(channel, &mut confirms, first?);
                    *sent -= done;
                    old = old.saturating_sub(done);
                    rest?;
                }
                count = self.queue.recv_many(&mut incoming, room), if open && room > 0 => {
                    open = count > 0;
                    self.entries.extend(incoming.drain(..));
                }
            }
        }
    }

    /// The oldest is confirmed, and those behind it that came in the same frame. Gives their number, and the error that
    /// stands behind them.
    fn settle(
        &mut self,
        channel: &Channel,
        confirms: &mut VecDeque<PublisherConfirm>,
        first: Confirmation,
    ) -> (usize, lapin::Result<()>) {
        confirms.pop_front();
        let mut rest = Ok(());
        let mut done = vec![first];
        // One frame may confirm many. The client crate resolves them in any order and gives a returned message to any of
        // them, all under one lock, which this call takes as well: when it is back, all of them are resolved.
        let _ = channel.wait_for_confirms().now_or_never();
        while let Some(next) = confirms.front_mut()
            && let Some(outcome) = next.now_or_never()
        {
            match outcome {
                Ok(confirmation) => done.push(confirmation),
                Err(error) => {
                    rest = Err(error);
                    break;
                }
            }
            confirms.pop_front();
        }
        let acks: Vec<_> = done
            .iter()
            .map(|confirmation| !confirmation.is_nack())
            .collect();
        for returned in done.into_iter().filter_map(Confirmation::take_message) {
            // Found by what it says. Equal messages end equally, so any of them will do.
            let mut entries = self.entries.iter_mut();
            if let Some(entry) =
                entries.find(|entry| entry.returned.is_none() && entry.is(&returned))
            {
                entry.returned = Some(returned.reply_text.to_string());
            }
        }
        for (message, ack) in self.entries.drain(..acks.len()).zip(&acks) {
            message.confirmed(*ack);
        }
        self.suspects = self.suspects.saturating_sub(acks.len());
        (acks.len(), rest)
    }
}

async fn oldest(confirms: &mut VecDeque<PublisherConfirm>) -> lapin::Result<Confirmation> {
    match confirms.front_mut() {
        Some(oldest) => oldest.await,
        None => std::future::pending().await,
    }
}

/// The first error among those who wait for a confirmation.
async fn cause(confirms: &mut VecDeque<PublisherConfirm>) -> Option<lapin::Error> {
    for confirm in confirms {
        if let Err(error) = confirm.await {
            return Some(error);
        }
    }
    None
}
