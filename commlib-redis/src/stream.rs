//! An at-least-once subscription: a reader of the topic's stream, on a connection of its own.
//!
//! A durable one is a consumer group, which the server keeps; what was read and not acknowledged is read again first
//! after a restart. One without a name leaves nothing at the server: it reads from where it stands, and what is not
//! acknowledged is remembered here. The topic's channel is listened to as well (see `topics`), for messages that were
//! only published; the copies of what is in the stream are left out there.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::pin::Pin;

use bytes::Bytes;
use commlib_core::envelope::Use;
use commlib_core::{
    Ack, AckOutcome, AckReply, Arrival, Dialect, Error, ErrorKind, Gap, GapCause, InboxSender,
    Malformed, Message, Name,
};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use redis::Value;
use tokio::sync::{mpsc, oneshot};

use crate::inbound;
use crate::lists::WAIT;
use crate::outbound::Command;
use crate::supervisor::{Events, Member, Waiting};
use crate::topics::StopTopic;
use crate::wire::{Event, Wire, array, bytes, error_text, is_passing};

/// How long the server waits for something to come, in milliseconds: [`WAIT`].
const BLOCK: &[u8] = b"5000";

/// The one consumer of each group. Sharing it lets a restarted program find what it had read.
const CONSUMER: &[u8] = b"commlib";

/// How often a message is tried before it is given up.
const MAX_TRIES: u32 = 5;

/// The most messages that are read at once.
const COUNT: usize = 512;

/// What an at-least-once subscription is, to be run by [`run`].
#[derive(Debug)]
pub(crate) struct Subscription {
    pub(crate) name: Name,
    pub(crate) stream: Vec<u8>,
    /// The name of the group; `None` for a subscription that ends with the connection.
    pub(crate) group: Option<Name>,
    pub(crate) prefetch: usize,
    pub(crate) inbox: InboxSender,
    /// Told when nothing that comes is missed any more, or why not.
    pub(crate) waiting: Option<Waiting>,
    /// Resolves when the inbox is dropped.
    pub(crate) stop: oneshot::Receiver<()>,
    /// The subscription to the channel, which ends together with this one.
    pub(crate) _channel: StopTopic,
}

/// Reads the stream until the inbox is dropped or the link closes.
pub(crate) async fn run(subscription: Subscription, mut member: Member) {
    let mut reader = Reader::new(subscription, &member);
    let patience = WAIT + member.config.keep_alive;
    loop {
        let opened = tokio::select! {
            wire = member.open(patience) => wire,
            _ = &mut reader.subscription.stop => None,
        };
        let Some(mut wire) = opened else { break };
        let (wire, member) = (&mut wire, &mut member);
        match reader.serve(wire, member).await {
            End::Down => {}
            End::Lost(cause) => member.failed(cause),
            End::Stopped => break,
            End::Refused(why) => {
                reader.refused(why);
                break;
            }
        }
    }
    reader.finish();
}

/// Why a connection was served no longer.
enum End {
    /// The link is lost.
    Down,
    /// The connection is of no more use.
    Lost(String),
    /// Nobody listens any more, or the link closes.
    Stopped,
    /// The server refuses to read this stream.
    Refused(String),
}

/// The id of an entry, which orders the entries of a stream.
type Id = (u64, u64);

/// A message that was handed out.
#[derive(Debug)]
struct Stored {
    id: Id,
    message: Message,
    tries: u32,
}

/// An entry of the stream; no payload if it was deleted before it could be read again.
type Entry = (Id, Option<Bytes>);

/// Acknowledgements on their way to the server, which come back if nobody knows whether they arrived.
type Acking = Pin<Box<dyn Future<Output = Vec<Id>> + Send>>;

struct Reader {
    subscription: Subscription,
    events: Events,
    max_payload: usize,
    acks: mpsc::UnboundedSender<AckReply>,
    replies: mpsc::UnboundedReceiver<AckReply>,
    /// Handed out and not settled, by the number of their acknowledgement.
    out: BTreeMap<u64, Stored>,
    next_number: u64,
    /// The last entry that was read; `None` before the first connection.
    last: Option<Id>,
    acking: FuturesUnordered<Acking>,
    /// To be acknowledged again.
    unacked: Vec<Id>,
}

impl Reader {
    fn new(subscription: Subscription, member: &Member) -> Self {
        let (acks, replies) = mpsc::unbounded_channel();
        Self {
            subscription,
            events: member.events.clone(),
            max_payload: member.config.max_payload,
            acks,
            replies,
            out: BTreeMap::new(),
            next_number: 0,
            last: None,
            acking: FuturesUnordered::new(),
            unacked: Vec::new(),
        }
    }

    /// Serves a connection. It never ends well.
    async fn serve(&mut self, wire: &mut Wire, member: &mut Member) -> End {
        match self.try_serve(wire, member).await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn try_serve(&mut self, wire: &mut Wire, member: &mut Member) -> Result<Infallible, End> {
        let kept = match self.subscription.group.clone() {
            Some(group) => self.take_up_group(group.as_str(), wire, member).await?,
            None => self.take_up(wire, member).await?,
        };
        if !kept {
            let gap = Gap::new(GapCause::LinkLost, None);
            self.subscription.inbox.gap(gap);
        }
        member.ready(kept);
        if let Some(waiting) = self.subscription.waiting.take() {
            // Whoever asked may have stopped waiting, and will drop the inbox.
            let _ = waiting.send(Ok(()));
        }
        loop {
            let room = self.subscription.prefetch.saturating_sub(self.out.len());
            if room == 0 {
                tokio::select! {
                    Some(reply) = self.replies.recv() => self.settle(reply),
                    _ = &mut self.subscription.stop => return Err(End::Stopped),
                    () = member.down() => return Err(down(member)),
                }
                continue;
            }
            let count = room.min(COUNT).to_string();
            let last = text(self.last.unwrap_or_default());
            let (count, stream) = (count.as_bytes(), self.subscription.stream.as_slice());
            wire.listen_again();
            match &self.subscription.group {
                Some(group) => {
                    let group: [&[u8]; 4] =
                        [b"XREADGROUP", b"GROUP", group.as_str().as_bytes(), CONSUMER];
                    let rest: [&[u8]; 7] =
                        [b"COUNT", count, b"BLOCK", BLOCK, b"STREAMS", stream, b">"];
                    wire.put(&[&group[..], &rest].concat());
                }
                None => wire.put(&[
                    b"XREAD",
                    b"COUNT",
                    count,
                    b"BLOCK",
                    BLOCK,
                    b"STREAMS",
                    stream,
                    last.as_bytes(),
                ]),
            }
            let value = self.answer(wire, member).await?;
            for entry in entries_of_one_stream(value) {
                self.deliver(entry);
            }
        }
    }

    /// Makes or finds the group and reads what it was given before and has not acknowledged. False if the server has
    /// lost the group since the last connection.
    async fn take_up_group(
        &mut self,
        group: &str,
        wire: &mut Wire,
        member: &mut Member,
    ) -> Result<bool, End> {
        let (group, stream) = (group.as_bytes(), self.subscription.stream.clone());
        let again = self.last.replace(Id::default()).is_some();
        // Where the group is gone, everything that is there came after it.
        let from: &[u8] = if again { b"0" } else { b"$" };
        wire.put(&[b"XGROUP", b"CREATE", &stream, group, from, b"MKSTREAM"]);
        let made = match self.answer_or_error(wire, member).await? {
            Value::ServerError(error) if error.code() == "BUSYGROUP" => false,
            other => {
                check(other)?;
                true
            }
        };
        let unacked = std::mem::take(&mut self.unacked);
        if !unacked.is_empty() {
            self.acknowledge(&unacked);
            // Over the other connection; the answer tells that what is read now does not hold these any more.
            while let Some(failed) = self.acking.next().await {
                self.unacked.extend(failed);
            }
        }
        let mut from = Id::default();
        let mut deleted = Vec::new();
        loop {
            let (count, start) = (COUNT.to_string(), text(from));
            wire.put(&[
                b"XREADGROUP",
                b"GROUP",
                group,
                CONSUMER,
                b"COUNT",
                count.as_bytes(),
                b"STREAMS",
                &stream,
                start.as_bytes(),
            ]);
            let value = self.answer(wire, member).await?;
            let page = entries_of_one_stream(value);
            let Some((last, _)) = page.last() else { break };
            from = *last;
            for (id, payload) in page {
                if payload.is_none() {
                    deleted.push(id);
                } else if !self.out.values().any(|stored| stored.id == id) {
                    self.deliver((id, payload));
                }
            }
        }
        if !deleted.is_empty() {
            let missed = u64::try_from(deleted.len()).ok();
            let gap = Gap::new(GapCause::SlowConsumer, missed);
            self.subscription.inbox.gap(gap);
            self.acknowledge(&deleted);
        }
        Ok(!(again && made))
    }

    /// Finds out where the stream ends, to read from there or from where the last connection stood. False if the server
    /// has lost what was there.
    async fn take_up(&mut self, wire: &mut Wire, member: &mut Member) -> Result<bool, End> {
        let stream = self.subscription.stream.as_slice();
        wire.put(&[b"XREVRANGE", stream, b"+", b"-", b"COUNT", b"1"]);
        let newest = entries(self.answer(wire, member).await?).pop();
        let newest = newest.map_or(Id::default(), |(id, _)| id);
        let kept = self.last.is_none_or(|last| newest >= last);
        if self.last.is_none() {
            self.last = Some(newest);
        } else if !kept {
            self.last = Some(Id::default());
        }
        Ok(kept)
    }

    /// The server's next answer, which is no error.
    async fn answer(&mut self, wire: &mut Wire, member: &mut Member) -> Result<Value, End> {
        check(self.answer_or_error(wire, member).await?)
    }

    async fn answer_or_error(
        &mut self,
        wire: &mut Wire,
        member: &mut Member,
    ) -> Result<Value, End> {
        loop {
            tokio::select! {
                biased;
                event = wire.next() => if let Event::Value(value) = event.map_err(End::Lost)? {
                    return Ok(value);
                },
                Some(reply) = self.replies.recv() => self.settle(reply),
                Some(failed) = self.acking.next() => self.unacked.extend(failed),
                _ = &mut self.subscription.stop => return Err(End::Stopped),
                () = member.down() => return Err(down(member)),
            }
        }
    }

    /// Hands out an entry.
    fn deliver(&mut self, (id, payload): Entry) {
        self.last = self.last.max(Some(id));
        let (name, max) = (&self.subscription.name, self.max_payload);
        let payload = payload.unwrap_or_default();
        match inbound::decode(name, &payload, Use::Topic, Dialect::Envelope, max) {
            Ok(message) => {
                let number = self.next_number;
                self.next_number += 1;
                let stored = Stored {
                    id,
                    message,
                    tries: 0,
                };
                self.hand_out(number, &stored);
                self.out.insert(number, stored);
            }
            Err(error) => {
                let malformed = Malformed::new(name.clone(), error);
                self.subscription.inbox.malformed(malformed);
                self.acknowledge(&[id]);
            }
        }
    }

    fn hand_out(&self, number: u64, stored: &Stored) {
        let name = self.subscription.name.clone();
        let mut arrival = Arrival::new(name, stored.message.clone());
        arrival.ack = Some(Ack::new(number, 0, self.acks.clone()));
        self.subscription.inbox.deliver(arrival);
    }

    /// Receivers' words on messages: this one, and others that are there already.
    fn settle(&mut self, reply: AckReply) {
        let mut done = Vec::new();
        let mut next = Some(reply);
        while let Some(reply) = next {
            done.extend(self.settled(reply));
            next = self.replies.try_recv().ok();
        }
        self.acknowledge(&done);
    }

    /// The entry to acknowledge, if it is not to be tried again.
    fn settled(&mut self, reply: AckReply) -> Option<Id> {
        let mut stored = self.out.remove(&reply.id)?;
        match reply.outcome {
            AckOutcome::Accept | AckOutcome::Reject { requeue: false } => return Some(stored.id),
            AckOutcome::Reject { requeue: true } | AckOutcome::Dropped => {}
        }
        let inbox = &self.subscription.inbox;
        if inbox.is_gone() {
            // It waits for the next who listens.
            return None;
        }
        stored.tries += 1;
        if stored.tries >= MAX_TRIES {
            inbox.gap(Gap::new(GapCause::GivenUp, Some(1)));
            return Some(stored.id);
        }
        self.hand_out(reply.id, &stored);
        self.out.insert(reply.id, stored);
        None
    }

    /// Tells the server that these are done with, over the command connection: this one waits.
    fn acknowledge(&mut self, ids: &[Id]) {
        let Some(group) = &self.subscription.group else {
            return;
        };
        if ids.is_empty() {
            return;
        }
        let texts: Vec<_> = ids.iter().copied().map(text).collect();
        let head: [&[u8]; 3] = [
            b"XACK",
            &self.subscription.stream,
            group.as_str().as_bytes(),
        ];
        let command: Vec<&[u8]> = head
            .into_iter()
            .chain(texts.iter().map(String::as_bytes))
            .collect();
        let (command, receipt) = Command::new("acknowledge", &[&command]).confirmed();
        self.events.run(command);
        let ids = ids.to_vec();
        self.acking.push(Box::pin(async move {
            match receipt.await {
                Ok(()) => Vec::new(),
                Err(_) => ids,
            }
        }));
    }

    /// The server does not let this stream be read.
    fn refused(&mut self, why: String) {
        let error = Error::new(ErrorKind::Broker, "at-least-once subscription to")
            .at(&self.subscription.name)
            .because(why);
        match self.subscription.waiting.take() {
            Some(waiting) => drop(waiting.send(Err(error))),
            None => tracing::error!(%error, "a subscription ends"),
        }
    }

    /// What was acknowledged before the end counts.
    fn finish(mut self) {
        if let Ok(reply) = self.replies.try_recv() {
            self.settle(reply);
        }
    }
}

/// What the end of the link means for a subscription.
fn down(member: &Member) -> End {
    if member.is_closing() {
        End::Stopped
    } else {
        End::Down
    }
}

fn check(value: Value) -> Result<Value, End> {
    let Value::ServerError(error) = &value else {
        return Ok(value);
    };
    let text = error_text(error);
    // A group can go with the data while the link stands; the next connection makes it anew.
    if is_passing(error) || error.code() == "NOGROUP" {
        return Err(End::Lost(text));
    }
    Err(End::Refused(text))
}

fn text((milliseconds, number): Id) -> String {
    format!("{milliseconds}-{number}")
}

/// The entries in the answer to a read of one stream, which may be none.
fn entries_of_one_stream(value: Value) -> Vec<Entry> {
    let stream = array(value).next().unwrap_or_default();
    array(stream).nth(1).map(entries).unwrap_or_default()
}

fn entries(value: Value) -> Vec<Entry> {
    array(value).filter_map(entry).collect()
}

fn entry(value: Value) -> Option<Entry> {
    let mut parts = array(value);
    let id = bytes(parts.next()?)?;
    let (milliseconds, number) = std::str::from_utf8(&id).ok()?.split_once('-')?;
    let id = (milliseconds.parse().ok()?, number.parse().ok()?);
    // One field, whose name does not matter.
    let payload = array(parts.next()?).nth(1).and_then(bytes);
    Some((id, payload))
}
