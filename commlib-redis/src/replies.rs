//! Replies to this connection's own calls.
//!
//! Each call has a list of its own, because old services echo nothing: which list a reply comes on tells which call it
//! answers. One blocking read watches all of them. Names are used once, so a repeated reply can never be taken for the
//! answer to another call; some are prepared and watched before anyone needs them, so that most calls need not restart
//! the read.
//!
//! A read of many lists costs the server time for each, so services that echo the correlation id, as all of ours do,
//! are remembered: further calls to them share one list, from which many replies are taken at once.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use commlib_core::envelope::{self, Use};
use commlib_core::{
    Arrival, Dialect, Gap, GapCause, InboxSender, Leases, Malformed, Name, ReplyLease,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::address;
use crate::inbound;
use crate::lists::{Popped, Reader, WAIT};
use crate::outbound::Command;
use crate::supervisor::{Events, Member, Waiting};
use crate::wire::{Event, Wire};

/// How many names are watched before anyone needs them.
const PREPARED: usize = 2;

/// How long the list of a call that was given up is still watched, so that a late reply does not stay for ever.
const GRACE: Duration = Duration::from_secs(60);

/// How many such lists are watched at most.
const MAX_RETIRED: usize = 1024;

/// The lists of one connection, shared by those who call and the task that reads.
#[derive(Debug)]
pub(crate) struct Lists {
    /// The list that calls to echoing services share, and the start of all other names.
    shared: Arc<str>,
    /// A list that ends a read when something is pushed to it.
    wake: Arc<str>,
    commands: mpsc::Sender<Command>,
    events: Events,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Calls whose lease is held, by key. The key of a call with a list of its own is the list's name.
    calls: HashMap<Arc<str>, Call>,
    /// Names that nobody has used.
    prepared: VecDeque<Arc<str>>,
    /// Lists of calls that were given up, and until when they are watched.
    retired: VecDeque<(Instant, Arc<str>)>,
    /// Services that echo the correlation id.
    echoing: HashSet<Name>,
    /// A reply without a correlation id came on the shared list: some service of an echoing name does not echo.
    never_share: bool,
    /// The read was told already that there are more names.
    woken: bool,
    last: u64,
}

#[derive(Debug)]
struct Call {
    service: Name,
    shared: bool,
    answered: bool,
    /// The list that the request went to, and the request: it is taken back if nobody waits for the reply any more.
    request: Option<(Vec<u8>, Bytes)>,
}

impl Lists {
    pub(crate) fn new(commands: mpsc::Sender<Command>, events: Events) -> Self {
        let shared = format!("rpc-{}", commlib_core::random_id());
        Self {
            wake: format!("{shared}-wake").into(),
            shared: shared.into(),
            commands,
            events,
            state: Mutex::default(),
        }
    }

    /// The source of reply addresses for core.
    pub(crate) fn leases(self: &Arc<Self>) -> Leases {
        let lists = self.clone();
        Leases::new(move |service| {
            let (address, key) = lists.lease(service);
            let (lists, given) = (lists.clone(), key.clone());
            ReplyLease::new(&*address, &*key)
                .correlated()
                .on_drop(move || lists.give_back(&given))
        })
    }

    /// An address for the reply of a service, and the key by which it is recognised.
    fn lease(&self, service: &Name) -> (Arc<str>, Arc<str>) {
        let mut state = self.lock();
        let shared = !state.never_share && state.echoing.contains(service);
        let (address, key) = if shared {
            (self.shared.clone(), state.fresh(&self.shared))
        } else {
            if state.prepared.is_empty() {
                // As many again as there are, so that a burst of calls restarts the read only now and then.
                let more = state.calls.len().max(PREPARED);
                state.prepare(&self.shared, more);
                if !std::mem::replace(&mut state.woken, true) {
                    self.events.run(Command::wake(self.wake.as_bytes()));
                }
            }
            let prepared = state.prepared.pop_front();
            let name = prepared.unwrap_or_else(|| state.fresh(&self.shared));
            (name.clone(), name)
        };
        let call = Call {
            service: service.clone(),
            shared,
            answered: false,
            request: None,
        };
        state.calls.insert(key.clone(), call);
        drop(state);
        (address, key)
    }

    /// The request of a call is on its way.
    pub(crate) fn requested(&self, key: &str, list: &[u8], request: &Bytes) {
        if let Some(call) = self.lock().calls.get_mut(key) {
            call.request = Some((list.to_vec(), request.clone()));
        }
    }

    /// A reply came, and echoed this correlation id.
    fn answered(&self, key: Option<&str>, echoed: Option<&str>) {
        let mut state = self.lock();
        let state = &mut *state;
        let Some(key) = key else {
            state.never_share = true;
            return;
        };
        let Some(call) = state.calls.get_mut(key) else {
            return;
        };
        call.answered = true;
        if echoed == Some(key) && !state.echoing.contains(&call.service) {
            state.echoing.insert(call.service.clone());
        }
    }

    /// Nobody waits for this reply any more; if it has not come it will be late.
    fn give_back(&self, key: &Arc<str>) {
        let mut state = self.lock();
        let Some(call) = state.calls.remove(key) else {
            return;
        };
        if call.answered {
            return;
        }
        state.echoing.remove(&call.service);
        if !call.shared {
            state
                .retired
                .push_back((Instant::now() + GRACE, key.clone()));
        }
        drop(state);
        if let Some((list, request)) = call.request {
            // A service that has not taken the request need not. Behind the request, so not past its queue; if that
            // is full the request stays in the list.
            let remove: &[&[u8]] = &[b"LREM", &list, b"1", &request];
            let _ = self.commands.try_send(Command::new("take back", &[remove]));
        }
    }

    /// The lists that the next read watches.
    fn watched(&self) -> Vec<Arc<str>> {
        let mut state = self.lock();
        let missing = PREPARED.saturating_sub(state.prepared.len());
        state.prepare(&self.shared, missing);
        let (now, too_many) = (
            Instant::now(),
            state.retired.len().saturating_sub(MAX_RETIRED),
        );
        state.retired.drain(..too_many);
        while state
            .retired
            .front()
            .is_some_and(|(until, _)| *until <= now)
        {
            state.retired.pop_front();
        }
        let private = state.calls.iter().filter(|(_, call)| !call.shared);
        let retired = state.retired.iter().map(|(_, name)| name);
        [&self.wake]
            .into_iter()
            .chain(private.map(|(name, _)| name))
            .chain([&self.shared])
            .chain(&state.prepared)
            .chain(retired)
            .cloned()
            .collect()
    }

    /// A link is new: what was learnt about services may be true no more.
    fn restart(&self) {
        let mut state = self.lock();
        state.echoing.clear();
        state.woken = false;
    }

    /// Deletes all lists.
    fn delete(&self) {
        let state = self.lock();
        let private = state.calls.iter().filter(|(_, call)| !call.shared);
        let retired = state.retired.iter().map(|(_, name)| name);
        let names = private.map(|(name, _)| name).chain(retired);
        let names = names
            .chain([&self.shared, &self.wake])
            .map(|name| name.as_bytes());
        let command: Vec<_> = [b"DEL".as_slice()].into_iter().chain(names).collect();
        self.events.run(Command::new("delete", &[&command]));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// A name that was never used.
    fn fresh(&mut self, base: &str) -> Arc<str> {
        self.last += 1;
        format!("{base}-{}", self.last).into()
    }

    fn prepare(&mut self, base: &str, count: usize) {
        for _ in 0..count {
            let name = self.fresh(base);
            self.prepared.push_back(name);
        }
    }
}

/// The task that reads replies.
#[derive(Debug)]
pub(crate) struct Replies {
    pub(crate) lists: Arc<Lists>,
    pub(crate) reader: Arc<Reader>,
    pub(crate) dialect: Dialect,
    pub(crate) inbox: InboxSender,
    /// Told when replies can come.
    pub(crate) waiting: Option<Waiting>,
    /// Resolves when the inbox is dropped.
    pub(crate) stop: oneshot::Receiver<()>,
}

impl Replies {
    /// Runs until the inbox is dropped or the link closes.
    pub(crate) async fn run(mut self, mut member: Member) {
        let patience = WAIT + member.config.keep_alive;
        loop {
            let opened = tokio::select! {
                wire = member.open(patience) => wire,
                _ = &mut self.stop => None,
            };
            let Some(mut wire) = opened else { break };
            self.lists.restart();
            member.ready(true);
            if let Some(waiting) = self.waiting.take() {
                // Whoever asked may have stopped waiting, and will drop the inbox.
                let _ = waiting.send(Ok(()));
            }
            match self.serve(&mut wire, &mut member).await {
                Ok(true) => {}
                Ok(false) => break,
                Err(cause) => member.failed(cause),
            }
            self.inbox.gap(Gap::new(GapCause::LinkLost, None));
        }
        self.lists.delete();
    }

    /// Reads until the link is lost; false if nobody waits for replies any more.
    async fn serve(&mut self, wire: &mut Wire, member: &mut Member) -> Result<bool, String> {
        loop {
            let names = self.lists.watched();
            self.reader
                .ask(wire, names.iter().map(|name| name.as_bytes()));
            let value = loop {
                tokio::select! {
                    biased;
                    event = wire.next() => if let Event::Value(value) = event? {
                        break value;
                    },
                    _ = &mut self.stop => return Ok(false),
                    () = member.down() => return Ok(!member.is_closing()),
                }
            };
            match self.reader.answer(value) {
                Popped::Items(list, items) => {
                    for item in items {
                        self.arrived(&list, &item, member.config.max_payload);
                    }
                }
                Popped::Nothing | Popped::Again => {}
                Popped::Unable(why) | Popped::Refused(why) => return Err(why),
            }
        }
    }

    fn arrived(&self, list: &Bytes, item: &Bytes, max_payload: usize) {
        let lists = &self.lists;
        let shared = list == lists.shared.as_bytes();
        if list == lists.wake.as_bytes() {
            lists.lock().woken = false;
            return;
        }
        let name = address::name(list);
        let private = || String::from_utf8_lossy(list).into_owned();
        match inbound::decode(&name, item, Use::Rpc, self.dialect, max_payload) {
            Ok(message) => {
                let echoed = message.header.correlation_id.as_deref();
                let key = if shared {
                    echoed.map(str::to_owned)
                } else {
                    Some(private())
                };
                lists.answered(key.as_deref(), echoed);
                let mut arrival = Arrival::new(name, message);
                arrival.key = key;
                self.inbox.deliver(arrival);
            }
            Err(error) => {
                let key = if shared {
                    envelope::peek(item).and_then(|header| header.correlation_id)
                } else {
                    Some(private())
                };
                lists.answered(key.as_deref(), key.as_deref());
                let mut malformed = Malformed::new(name, error);
                malformed.key = key;
                self.inbox.malformed(malformed);
            }
        }
    }
}
