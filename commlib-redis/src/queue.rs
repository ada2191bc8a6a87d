//! Requests to one service: a list, read on a connection of its own.
//!
//! A request is handed back to the list, for another service, if this one ends before it has handled it: everything
//! that was popped is remembered until its [`Ack`] has come. What remains is the moment between the server's pop and
//! the arrival of its answer here: a request is lost if the link is lost in it.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use commlib_core::envelope::Use;
use commlib_core::{
    Ack, AckOutcome, AckReply, Arrival, Dialect, Error, ErrorKind, InboxSender, Malformed, Name,
};
use redis::Value;
use tokio::sync::{mpsc, oneshot};

use crate::inbound;
use crate::lists::{Popped, Reader, WAIT};
use crate::outbound::Command;
use crate::supervisor::{Events, Member, Waiting};
use crate::wire::{Event, Wire};

/// What old commlib-py programs push to make a list exist.
const PLACEHOLDER: &[u8] = b"QueueInit";

/// How many bytes may wait in the inbox before reading pauses. The rest waits in the list, where others can take it.
const MAX_WAITING: usize = 8 << 20;

/// How many requests may be unacknowledged before reading pauses.
const MAX_OUT: usize = 10_000;

/// What a queue is, to be run by [`run`].
#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) name: Name,
    pub(crate) key: Vec<u8>,
    /// A list that ends a read when something is pushed to it.
    pub(crate) wake: Vec<u8>,
    pub(crate) dialect: Dialect,
    /// Until the end.
    pub(crate) inbox: Option<InboxSender>,
    /// Told when the list can be read, or why not.
    pub(crate) waiting: Option<Waiting>,
    /// Resolves when the inbox is dropped.
    pub(crate) stop: oneshot::Receiver<()>,
}

/// Reads the list until the inbox is dropped or the link closes; then waits for what is being handled.
pub(crate) async fn run(queue: Queue, mut member: Member, reader: Arc<Reader>) {
    let mut pending = Pending::new(queue, &member);
    let patience = WAIT + member.config.keep_alive;
    while !pending.stopping {
        let opened = tokio::select! {
            wire = member.open(patience) => wire,
            _ = &mut pending.queue.stop => None,
        };
        let Some(mut wire) = opened else { break };
        match pending.serve(&mut wire, &mut member, &reader).await {
            Ok(End::Down) => {}
            Ok(End::Stopped) => break,
            Err(cause) => member.failed(cause),
        }
    }
    // What is still handled needs no connection of its own.
    drop(member);
    pending.finish().await;
}

/// Why a connection was served no longer.
enum End {
    /// The link is lost.
    Down,
    /// Nobody listens any more.
    Stopped,
}

/// A queue with the requests that are not acknowledged.
struct Pending {
    queue: Queue,
    events: Events,
    max_payload: usize,
    acks: mpsc::UnboundedSender<AckReply>,
    replies: mpsc::UnboundedReceiver<AckReply>,
    out: BTreeMap<u64, Bytes>,
    next_id: u64,
    /// The end was asked for.
    stopping: bool,
}

impl Pending {
    fn new(queue: Queue, member: &Member) -> Self {
        let (acks, replies) = mpsc::unbounded_channel();
        Self {
            queue,
            events: member.events.clone(),
            max_payload: member.config.max_payload,
            acks,
            replies,
            out: BTreeMap::new(),
            next_id: 0,
            stopping: false,
        }
    }

    async fn serve(
        &mut self,
        wire: &mut Wire,
        member: &mut Member,
        reader: &Reader,
    ) -> Result<End, String> {
        // A read that does not wait, because its answer shows whether the list can be read.
        wire.put(&[b"LPOP", &self.queue.key]);
        let first = match self.answer(wire, member).await? {
            None => return Ok(End::Down),
            Some(Value::BulkString(item)) => Popped::Items(Bytes::new(), vec![item.into()]),
            Some(other) => reader.answer(other),
        };
        if !self.take(first, wire, member, reader).await? {
            return Ok(End::Stopped);
        }
        member.ready(true);
        if let Some(waiting) = self.queue.waiting.take() {
            // Whoever asked may have stopped waiting, and will drop the inbox.
            let _ = waiting.send(Ok(()));
        }
        loop {
            while self.is_full() && !self.stopping {
                tokio::select! {
                    Some(reply) = self.replies.recv() => self.settle(reply),
                    _ = &mut self.queue.stop => self.stopping = true,
                    () = member.down() => return Ok(End::Down),
                }
            }
            if self.stopping {
                return Ok(End::Stopped);
            }
            let keys = [self.queue.wake.as_slice(), &self.queue.key];
            reader.ask(wire, keys.into_iter());
            let Some(value) = self.answer(wire, member).await? else {
                return Ok(End::Down);
            };
            if !self
                .take(reader.answer(value), wire, member, reader)
                .await?
            {
                return Ok(End::Stopped);
            }
        }
    }

    fn is_full(&self) -> bool {
        self.out.len() >= MAX_OUT || {
            let inbox = self.queue.inbox.as_ref();
            inbox.is_some_and(|inbox| inbox.waiting_bytes() > MAX_WAITING)
        }
    }

    /// The server's next answer; `None` if the link is lost. If the end is asked for meanwhile, a read is ended by the
    /// server, so that nothing is popped that nobody sees.
    async fn answer(
        &mut self,
        wire: &mut Wire,
        member: &mut Member,
    ) -> Result<Option<Value>, String> {
        loop {
            tokio::select! {
                biased;
                event = wire.next() => if let Event::Value(value) = event? {
                    return Ok(Some(value));
                },
                Some(reply) = self.replies.recv() => self.settle(reply),
                _ = &mut self.queue.stop, if !self.stopping => self.end(),
                () = member.down(), if !self.stopping => {
                    if !member.is_closing() {
                        return Ok(None);
                    }
                    self.end();
                }
            }
        }
    }

    fn end(&mut self) {
        self.stopping = true;
        self.events.run(Command::wake(&self.queue.wake));
    }

    /// Hands out what was read; false if this was the last read.
    async fn take(
        &mut self,
        popped: Popped,
        wire: &mut Wire,
        member: &mut Member,
        reader: &Reader,
    ) -> Result<bool, String> {
        let (woken, items) = match popped {
            Popped::Items(key, _) if key == self.queue.wake => (true, Vec::new()),
            Popped::Items(_, items) => (false, items),
            Popped::Nothing | Popped::Again => (false, Vec::new()),
            Popped::Unable(why) => return Err(why),
            Popped::Refused(why) => {
                self.refused(why);
                return Ok(false);
            }
        };
        if self.stopping {
            self.hand_back(&items, wire);
            if !woken {
                // The signal came too late for the read, and must not stay.
                reader.ask(wire, [self.queue.wake.as_slice()].into_iter());
            }
            let answers = usize::from(!items.is_empty()) + usize::from(!woken);
            for _ in 0..answers {
                self.answer(wire, member).await?;
            }
            return Ok(false);
        }
        for item in items.into_iter().filter(|item| &item[..] != PLACEHOLDER) {
            self.deliver(item);
        }
        Ok(true)
    }

    /// Puts back what nobody will see here, in one piece and in order.
    fn hand_back(&self, items: &[Bytes], wire: &mut Wire) {
        if !items.is_empty() {
            let head: [&[u8]; 2] = [b"LPUSH", &self.queue.key];
            let items = items.iter().rev().map(|item| &item[..]);
            wire.put(&head.into_iter().chain(items).collect::<Vec<_>>());
        }
    }

    fn deliver(&mut self, item: Bytes) {
        let queue = &self.queue;
        let Some(inbox) = &queue.inbox else { return };
        match inbound::decode(
            &queue.name,
            &item,
            Use::Rpc,
            queue.dialect,
            self.max_payload,
        ) {
            Ok(message) => {
                let id = self.next_id;
                self.next_id += 1;
                self.out.insert(id, item);
                let mut arrival = Arrival::new(queue.name.clone(), message);
                arrival.ack = Some(Ack::new(id, 0, self.acks.clone()));
                // If the inbox is gone this comes back as a dropped acknowledgement.
                inbox.deliver(arrival);
            }
            Err(error) => {
                inbox.malformed(Malformed::new(queue.name.clone(), error));
            }
        }
    }

    /// A receiver's word on a request.
    fn settle(&mut self, reply: AckReply) {
        let Some(item) = self.out.remove(&reply.id) else {
            return;
        };
        let again = match reply.outcome {
            AckOutcome::Accept => false,
            AckOutcome::Reject { requeue } => requeue,
            // A handler that was aborted while the service goes on would be run again and again.
            AckOutcome::Dropped => self.queue.inbox.as_ref().is_none_or(InboxSender::is_gone),
        };
        if again {
            let push: &[&[u8]] = &[b"LPUSH", &self.queue.key, &item];
            self.events.run(Command::new("hand back", &[push]));
        }
    }

    /// The server does not let this list be read.
    fn refused(&mut self, why: String) {
        let error = Error::new(ErrorKind::Broker, "service on")
            .at(&self.queue.name)
            .because(why);
        match self.queue.waiting.take() {
            Some(waiting) => drop(waiting.send(Err(error))),
            None => tracing::error!(%error, "a service ends"),
        }
    }

    /// Waits until everything that was handed out is acknowledged.
    async fn finish(mut self) {
        self.queue.inbox = None;
        while !self.out.is_empty() {
            let Some(reply) = self.replies.recv().await else {
                return;
            };
            self.settle(reply);
        }
    }
}
