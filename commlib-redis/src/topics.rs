//! Topics: one connection for all subscriptions.
//!
//! Redis sends a copy of a message for each subscription that matches, and each copy names the subscription it is for.
//! Every inbox belongs to exactly one, so it gets each message once.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use commlib_core::envelope::Use;
use commlib_core::{
    Arrival, Dialect, Error, ErrorKind, Gap, GapCause, InboxSender, Malformed, Pattern,
};
use redis::{PushKind, Value};
use tokio::sync::mpsc;

use crate::address;
use crate::inbound;
use crate::outbound::COPY_MARK;
use crate::supervisor::{Club, Member, Waiting};
use crate::wire::{Event, Wire, array, bytes, error_text};

/// A subscription at the server: a channel or a glob.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Filter {
    Channel(Bytes),
    Glob(Bytes),
}

impl Filter {
    pub(crate) fn new(pattern: &Pattern) -> Self {
        match pattern.exact() {
            Some(name) => Self::Channel(address::key(&name).into()),
            None => Self::Glob(address::glob(pattern).into()),
        }
    }

    fn text(&self) -> &Bytes {
        match self {
            Self::Channel(text) | Self::Glob(text) => text,
        }
    }

    fn put(&self, wire: &mut Wire, subscribe: bool) {
        let command: &[u8] = match (self, subscribe) {
            (Self::Channel(_), true) => b"SUBSCRIBE",
            (Self::Channel(_), false) => b"UNSUBSCRIBE",
            (Self::Glob(_), true) => b"PSUBSCRIBE",
            (Self::Glob(_), false) => b"PUNSUBSCRIBE",
        };
        wire.put(&[command, self.text()]);
    }
}

/// An inbox and what it wants.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) filter: Filter,
    pub(crate) dialect: Dialect,
    pub(crate) inbox: InboxSender,
    /// It reads the stream as well: copies of what is there are not for it, and its inbox drops nothing by itself.
    pub(crate) at_least_once: bool,
    /// How many bytes may wait in an at-least-once inbox before best-effort messages are dropped.
    pub(crate) max_bytes: usize,
}

/// What the task is told.
#[derive(Debug)]
pub(crate) enum Change {
    Listen(u64, Listener, Waiting),
    Stop(u64),
}

/// Ends a subscription when dropped.
#[derive(Debug)]
pub(crate) struct StopTopic(pub(crate) u64, pub(crate) mpsc::UnboundedSender<Change>);

impl Drop for StopTopic {
    fn drop(&mut self) {
        // The task may have ended before.
        let _ = self.1.send(Change::Stop(self.0));
    }
}

/// The task that owns the connection.
#[derive(Debug)]
pub(crate) struct Topics {
    club: Club,
    changes: mpsc::UnboundedReceiver<Change>,
    listeners: HashMap<u64, Slot>,
    /// The listeners that the server has confirmed since the link is up.
    active: HashMap<Filter, Vec<u64>>,
    /// What is asked of the server and not answered.
    asked: VecDeque<Asked>,
}

#[derive(Debug)]
struct Slot {
    listener: Listener,
    /// Told about the first confirmation.
    waiting: Option<Waiting>,
}

#[derive(Debug)]
enum Asked {
    Subscribe(u64),
    Other,
}

impl Topics {
    pub(crate) fn new(club: Club, changes: mpsc::UnboundedReceiver<Change>) -> Self {
        Self {
            club,
            changes,
            listeners: HashMap::new(),
            active: HashMap::new(),
            asked: VecDeque::new(),
        }
    }

    /// Runs until the link closes or nobody can listen any more. Connects when somebody listens for the first time.
    pub(crate) async fn run(mut self) {
        let Some(first) = self.changes.recv().await else {
            return;
        };
        let mut member = self.club.join();
        self.change(first, None);
        loop {
            let opened = {
                let opening = member.open(self.club.config.keep_alive);
                tokio::pin!(opening);
                loop {
                    tokio::select! {
                        wire = &mut opening => break wire,
                        Some(change) = self.changes.recv() => self.change(change, None),
                    }
                }
            };
            let Some(mut wire) = opened else { return };
            self.active.clear();
            self.asked.clear();
            for (id, slot) in &self.listeners {
                slot.listener.filter.put(&mut wire, true);
                self.asked.push_back(Asked::Subscribe(*id));
            }
            if let Err(cause) = self.serve(&mut wire, &mut member).await {
                member.failed(cause);
            }
        }
    }

    /// Serves a connection until the link is lost or closing; `Err` is why this connection is of no more use.
    async fn serve(&mut self, wire: &mut Wire, member: &mut Member) -> Result<(), String> {
        let mut ready = false;
        loop {
            if !ready && self.asked.is_empty() {
                ready = true;
                member.ready(true);
            }
            tokio::select! {
                biased;
                event = wire.next() => match event? {
                    Event::Value(value) => self.take(value)?,
                    Event::Quiet => {
                        wire.put(&[b"PING"]);
                        self.asked.push_back(Asked::Other);
                    }
                },
                Some(change) = self.changes.recv() => self.change(change, Some(wire)),
                () = member.down() => return Ok(()),
            }
        }
    }

    fn change(&mut self, change: Change, wire: Option<&mut Wire>) {
        match change {
            Change::Listen(id, listener, waiting) => {
                if let Some(wire) = wire {
                    // Asked for again even if it is in place: what was sent before the answer is not for this inbox.
                    listener.filter.put(wire, true);
                    self.asked.push_back(Asked::Subscribe(id));
                }
                let waiting = Some(waiting);
                self.listeners.insert(id, Slot { listener, waiting });
            }
            Change::Stop(id) => {
                let Some(slot) = self.listeners.remove(&id) else {
                    return;
                };
                let filter = slot.listener.filter;
                if let Some(ids) = self.active.get_mut(&filter) {
                    ids.retain(|other| *other != id);
                }
                let others = self.listeners.values();
                if others
                    .into_iter()
                    .any(|other| other.listener.filter == filter)
                {
                    return;
                }
                self.active.remove(&filter);
                if let Some(wire) = wire {
                    filter.put(wire, false);
                    self.asked.push_back(Asked::Other);
                }
            }
        }
    }

    /// Takes in what the server sent.
    fn take(&mut self, value: Value) -> Result<(), String> {
        let (kind, mut rest) = match value {
            Value::ServerError(error) => return self.answered(Some(&error_text(&error))),
            Value::Push { kind, data } => (kind, data.into_iter()),
            value => {
                let mut values = array(value);
                let kind = match values.next().and_then(bytes).as_deref() {
                    Some(b"message") => PushKind::Message,
                    Some(b"pmessage") => PushKind::PMessage,
                    _ => PushKind::Other(String::new()),
                };
                (kind, values)
            }
        };
        let mut next = || rest.next().and_then(bytes).unwrap_or_default();
        match kind {
            PushKind::Message => {
                let channel = next();
                self.arrived(&Filter::Channel(channel.clone()), &channel, next());
            }
            PushKind::PMessage => {
                let filter = Filter::Glob(next());
                self.arrived(&filter, &next(), next());
            }
            _ => return self.answered(None),
        }
        Ok(())
    }

    fn answered(&mut self, refusal: Option<&str>) -> Result<(), String> {
        let asked = self.asked.pop_front();
        let Asked::Subscribe(id) = asked.ok_or("the server answered nothing that was asked")?
        else {
            return Ok(());
        };
        // It may have been dropped meanwhile.
        let Some(slot) = self.listeners.get_mut(&id) else {
            return Ok(());
        };
        let listener = &slot.listener;
        if let Some(why) = refusal {
            let filter = String::from_utf8_lossy(listener.filter.text());
            let error = Error::new(ErrorKind::Broker, "subscription to")
                .at(filter)
                .because(why);
            match slot.waiting.take() {
                Some(waiting) => drop(waiting.send(Err(error))),
                None => {
                    tracing::error!(%error, "a subscription ends, because it is refused after a reconnect")
                }
            }
            self.listeners.remove(&id);
            return Ok(());
        }
        match slot.waiting.take() {
            // Whoever asked may have stopped waiting, and will drop the inbox.
            Some(waiting) => drop(waiting.send(Ok(()))),
            None if listener.at_least_once => {}
            None => drop(listener.inbox.gap(Gap::new(GapCause::LinkLost, None))),
        }
        let active = self.active.entry(listener.filter.clone()).or_default();
        active.push(id);
        Ok(())
    }

    fn arrived(&self, filter: &Filter, channel: &Bytes, mut payload: Bytes) {
        let copy = payload.ends_with(COPY_MARK);
        if copy {
            payload.truncate(payload.len() - COPY_MARK.len());
        }
        let name = address::name(channel);
        let ids = self.active.get(filter).into_iter().flatten();
        for slot in ids.filter_map(|id| self.listeners.get(id)) {
            let listener = &slot.listener;
            if listener.at_least_once {
                if copy {
                    continue;
                }
                if listener.inbox.waiting_bytes() > listener.max_bytes {
                    let gap = Gap::new(GapCause::SlowConsumer, Some(1));
                    listener.inbox.gap(gap);
                    continue;
                }
            }
            let max = self.club.config.max_payload;
            match inbound::decode(&name, &payload, Use::Topic, listener.dialect, max) {
                Ok(message) => listener.inbox.deliver(Arrival::new(name.clone(), message)),
                Err(error) => listener
                    .inbox
                    .malformed(Malformed::new(name.clone(), error)),
            };
        }
    }
}
