//! The task that owns the link: it connects, sends commands, and keeps all that listens together.
//!
//! A link is several connections: one for commands, which this task owns, one for topics, and one for each blocking
//! read; each of those has a task that is a [`Member`]. They stand and fall together: if one is lost all are made
//! again, so there is one state, one epoch, and no half of a link to think of.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use commlib_core::{Backoff, Error, ErrorKind, LinkState, Result};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use crate::config::RedisConfig;
use crate::outbound::{Answers, Command, Entry, Outbox};
use crate::wire::{self, Failure, Wire};

/// A link that stood this long was a good one.
const STABLE: Duration = Duration::from_secs(10);

/// How long everything that listens may take to be in place again.
const RESTORE: Duration = Duration::from_secs(10);

/// How many commands are taken at once.
const BATCH: usize = 256;

/// How many commands may be without an answer.
const WINDOW: usize = 8192;

/// Told how something ended.
pub(crate) type Waiting = oneshot::Sender<Result<()>>;

/// How far the link is, for its members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// There is none.
    Down,
    /// The command connection of this epoch stands; members connect.
    Up(u64),
    /// It will end: members finish what they have begun.
    Closing,
}

/// What the supervisor is told.
#[derive(Debug)]
pub(crate) enum Event {
    /// A member joins.
    Join(u64),
    /// A member listens in this epoch. `kept` unless the server lost what it kept for it.
    Ready { id: u64, epoch: u64, kept: bool },
    /// A member lost its connection of this epoch.
    Failed { epoch: u64, cause: String },
    /// A member has ended.
    Leave(u64),
    /// Send this, now or never.
    Run(Command),
    /// Take this into the outbox.
    Store(Entry),
    /// End the connection.
    Close(Waiting),
}

/// The way to the supervisor for its members, that does not keep the connection alive.
#[derive(Debug, Clone)]
pub(crate) struct Events(pub(crate) mpsc::UnboundedSender<Event>);

impl Events {
    /// Sends commands, if the link is up. Never waits; used for what the members themselves need, a few commands for
    /// each message at most.
    pub(crate) fn run(&self, command: Command) {
        self.tell(Event::Run(command));
    }

    pub(crate) fn tell(&self, event: Event) {
        // The supervisor may have ended; then nothing matters any more.
        let _ = self.0.send(event);
    }
}

/// What it takes to become a [`Member`].
#[derive(Debug, Clone)]
pub(crate) struct Club {
    pub(crate) config: Arc<RedisConfig>,
    pub(crate) events: Events,
    pub(crate) phase: watch::Receiver<Phase>,
}

/// A task with a connection of its own, as part of the link.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) config: Arc<RedisConfig>,
    pub(crate) events: Events,
    phase: watch::Receiver<Phase>,
    id: u64,
    /// The epoch of the connection, or of the last attempt to make one.
    epoch: u64,
}

impl Club {
    /// From now on the link is up only if the new member is.
    pub(crate) fn join(&self) -> Member {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        self.events.tell(Event::Join(id));
        Member {
            config: self.config.clone(),
            events: self.events.clone(),
            phase: self.phase.clone(),
            id,
            epoch: 0,
        }
    }
}

impl Member {
    /// A connection, as soon as the link allows one; `None` when the link closes. Cancel safe.
    pub(crate) async fn open(&mut self, patience: Duration) -> Option<Wire> {
        loop {
            let last = self.epoch;
            let next = |phase: &Phase| !matches!(phase, Phase::Down) && *phase != Phase::Up(last);
            let phase = *self.phase.wait_for(next).await.ok()?;
            let Phase::Up(epoch) = phase else { return None };
            self.epoch = epoch;
            let config = self.config.clone();
            tokio::select! {
                wire = Wire::open(&config, patience) => match wire {
                    Ok(wire) => return Some(wire),
                    Err(failure) => self.failed(failure.cause),
                },
                () = self.down() => {}
            }
        }
    }

    /// Everything is in place on the connection.
    pub(crate) fn ready(&self, kept: bool) {
        let (id, epoch) = (self.id, self.epoch);
        self.events.tell(Event::Ready { id, epoch, kept });
    }

    /// The connection is of no more use, and so is the link.
    pub(crate) fn failed(&self, cause: String) {
        let epoch = self.epoch;
        self.events.tell(Event::Failed { epoch, cause });
    }

    /// Resolves when the link that the connection belongs to is lost or closing. Cancel safe.
    pub(crate) async fn down(&mut self) {
        let mine = Phase::Up(self.epoch);
        // An error is the end of the supervisor.
        let _ = self.phase.wait_for(|phase| *phase != mine).await;
    }

    /// Whether the link is closing or has ended.
    pub(crate) fn is_closing(&self) -> bool {
        *self.phase.borrow() == Phase::Closing || self.phase.has_changed().is_err()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.events.tell(Event::Leave(self.id));
    }
}

/// The task.
#[derive(Debug)]
pub(crate) struct Supervisor {
    pub(crate) config: Arc<RedisConfig>,
    pub(crate) state: watch::Sender<LinkState>,
    pub(crate) phase: watch::Sender<Phase>,
    pub(crate) events: mpsc::UnboundedReceiver<Event>,
    /// Best-effort commands. Closed when the connection closes.
    pub(crate) commands: mpsc::Receiver<Command>,
    /// Ends when the last handle is dropped.
    pub(crate) handles: mpsc::Receiver<Infallible>,
    /// Told about the first connection, if somebody waits for it.
    pub(crate) first: Option<(Waiting, Instant)>,
    pub(crate) members: HashMap<u64, Readiness>,
    pub(crate) outbox: Outbox,
    pub(crate) closing: Option<Closing>,
}

/// Whether a member listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Readiness {
    Waiting,
    Ready { kept: bool },
}

/// The end is wanted.
#[derive(Debug)]
pub(crate) struct Closing {
    waiting: Vec<Waiting>,
    deadline: Instant,
}

/// Why a link ended.
enum End {
    /// Closed from this side.
    Closed,
    /// Lost.
    Lost(String),
}

impl Supervisor {
    /// Runs until the connection is closed or given up.
    pub(crate) async fn run(mut self) {
        let cause = match self.supervise().await {
            Ok(()) => "closed by this side".to_owned(),
            Err(cause) => cause,
        };
        self.commands.close();
        self.state.send_replace(LinkState::Closed { cause });
        self.phase.send_replace(Phase::Closing);
        let left = self.outbox.len();
        for waiting in self.closing.into_iter().flat_map(|closing| closing.waiting) {
            let outcome = match left {
                0 => Ok(()),
                left => Err(Error::new(ErrorKind::Timeout, "close of")
                    .at(self.config.url())
                    .because(format_args!("{left} messages were not confirmed"))),
            };
            // Whoever asked may have stopped waiting.
            let _ = waiting.send(outcome);
        }
    }

    /// `Err` is why the first connection was given up.
    async fn supervise(&mut self) -> Result<(), String> {
        let mut backoff = Backoff::default();
        let (mut attempt, mut epoch) = (0, 0);
        loop {
            epoch += 1;
            let cause = match self.open().await {
                None => return Ok(()),
                Some(Ok(wire)) => {
                    let mut up_since = None;
                    let end = self.serve(wire, epoch, &mut up_since).await;
                    self.phase.send_if_modified(|phase| {
                        let up = *phase == Phase::Up(epoch);
                        if up {
                            *phase = Phase::Down;
                        }
                        up
                    });
                    let End::Lost(cause) = end else { return Ok(()) };
                    if let Some(since) = up_since {
                        attempt = 0;
                        if since.elapsed() >= STABLE {
                            backoff.reset();
                        }
                    }
                    cause
                }
                Some(Err(failure)) => {
                    if let Some((first, _)) = self.first.take_if(|_| failure.fatal) {
                        let _ = first.send(Err(self.no_connection(&failure.cause)));
                        return Err(failure.cause);
                    }
                    failure.cause
                }
            };
            attempt += 1;
            let delay = backoff.next_delay();
            tracing::warn!(server = %self.config.address, %cause, attempt, ?delay, "not connected");
            if self.first.is_none() {
                let cause = cause.clone();
                self.state
                    .send_replace(LinkState::Reconnecting { attempt, cause });
            } else if let Some((first, _)) = self
                .first
                .take_if(|(_, deadline)| *deadline <= Instant::now() + delay)
            {
                let timeout = self.config.connect_timeout;
                let why = format!("no connection within {timeout:?}: {cause}");
                let _ = first.send(Err(self.no_connection(&why)));
                return Err(cause);
            }
            if self.while_down(sleep(delay)).await.is_none() {
                return Ok(());
            }
        }
    }

    /// One attempt to connect; `None` if the end is wanted.
    async fn open(&mut self) -> Option<Result<Wire, Failure>> {
        let config = self.config.clone();
        let deadline = self.first.as_ref().map(|(_, deadline)| *deadline);
        let attempt = async {
            let opening = Wire::open(&config, config.keep_alive);
            match deadline {
                None => opening.await,
                Some(deadline) => timeout_at(deadline, opening)
                    .await
                    .unwrap_or_else(|_| Err(Failure::transient("no answer"))),
            }
        };
        self.while_down(attempt).await
    }

    /// Waits without a link; `None` if the end is wanted.
    async fn while_down<T>(&mut self, what: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(what);
        loop {
            tokio::select! {
                done = &mut what => return Some(done),
                Some(event) = self.events.recv() => match event {
                    Event::Run(command) => command.fail(|| self.link_down()),
                    event => drop(self.note(event, 0)),
                },
                // Accepted in the moment in which the link was lost.
                Some(command) = self.commands.recv() => command.fail(|| self.link_down()),
                _ = self.handles.recv(), if self.closing.is_none() => self.close(None),
            }
            if self.closing.is_some() {
                return None;
            }
        }
    }

    /// A link, from the connection to its end.
    async fn serve(&mut self, mut wire: Wire, epoch: u64, up_since: &mut Option<Instant>) -> End {
        let mut answers = Answers::default();
        let mut batch = Vec::with_capacity(BATCH);
        self.outbox.restart();
        for readiness in self.members.values_mut() {
            *readiness = Readiness::Waiting;
        }
        self.phase.send_replace(Phase::Up(epoch));
        let mut deadline = Instant::now() + RESTORE;
        // How many messages are to be sent again before the link is up; `None` until all that listens is in place.
        let mut again = None;
        let cause = loop {
            if let Some(closing) = &self.closing {
                let idle = self.commands.is_empty() && answers.len() == 0 && self.outbox.len() == 0;
                if idle && self.members.is_empty() {
                    return End::Closed;
                }
                deadline = closing.deadline;
            }
            // First all that listens must be in place, then what is unconfirmed goes out again, and then the link is up.
            if again.is_none() && self.restored() {
                again = Some(self.outbox.len());
            }
            while again.is_some() && wire.has_room() && answers.len() < WINDOW {
                let Some(bytes) = self.outbox.next(&mut answers) else {
                    break;
                };
                wire.put_encoded(bytes);
                again = again.map(|count| count.saturating_sub(1));
            }
            if again == Some(0) && up_since.is_none() {
                *up_since = Some(Instant::now());
                self.announce(epoch);
            }
            tokio::select! {
                biased;
                event = wire.next() => {
                    let answered = match event {
                        Ok(wire::Event::Value(reply)) => answers.take(&reply, &mut self.outbox),
                        Ok(wire::Event::Quiet) => {
                            wire.put(&[b"PING"]);
                            answers.expect(1, "ping", None);
                            Ok(())
                        }
                        Err(cause) => Err(cause),
                    };
                    if let Err(cause) = answered {
                        break cause;
                    }
                }
                Some(event) = self.events.recv() => match event {
                    Event::Run(command) => put(command, &mut wire, &mut answers),
                    event => if let Err(cause) = self.note(event, epoch) {
                        break cause;
                    },
                },
                _ = self.commands.recv_many(&mut batch, BATCH), if wire.has_room()
                    && answers.len() < WINDOW && !self.commands_done() =>
                {
                    for command in batch.drain(..) {
                        put(command, &mut wire, &mut answers);
                    }
                }
                _ = self.handles.recv(), if self.closing.is_none() => self.close(None),
                () = sleep_until(deadline), if again.is_none() || self.closing.is_some() => {
                    if self.closing.is_some() {
                        return End::Closed;
                    }
                    break format!("not everything that listens was in place within {RESTORE:?}");
                }
            }
        };
        answers.lost(|| self.lost(&cause));
        while let Ok(command) = self.commands.try_recv() {
            command.fail(|| self.lost(&cause));
        }
        if self.closing.is_some() {
            return End::Closed;
        }
        End::Lost(cause)
    }

    /// Whether nothing can come from the handles any more.
    fn commands_done(&self) -> bool {
        self.commands.is_closed() && self.commands.is_empty()
    }

    /// Takes note of an event.
    ///
    /// # Errors
    /// The reason to end the link of this epoch.
    fn note(&mut self, event: Event, epoch: u64) -> Result<(), String> {
        match event {
            Event::Join(id) => drop(self.members.insert(id, Readiness::Waiting)),
            Event::Leave(id) => drop(self.members.remove(&id)),
            Event::Ready {
                id,
                epoch: of,
                kept,
            } if of == epoch => {
                if let Some(readiness) = self.members.get_mut(&id) {
                    *readiness = Readiness::Ready { kept };
                }
            }
            Event::Failed { epoch: of, cause } if of == epoch => return Err(cause),
            Event::Ready { .. } | Event::Failed { .. } | Event::Run(_) => {}
            Event::Store(entry) => self.outbox.push(entry),
            Event::Close(waiting) => self.close(Some(waiting)),
        }
        Ok(())
    }

    fn restored(&self) -> bool {
        !self
            .members
            .values()
            .any(|readiness| *readiness == Readiness::Waiting)
    }

    fn announce(&mut self, epoch: u64) {
        let kept = |readiness: &Readiness| *readiness == Readiness::Ready { kept: true };
        let resumed = epoch > 1 && self.config.streams && self.members.values().all(kept);
        self.state.send_replace(LinkState::Connected { resumed });
        if let Some((first, _)) = self.first.take() {
            // Whoever asked may have stopped waiting.
            let _ = first.send(Ok(()));
        }
    }

    /// Ends the intake; what is accepted still leaves.
    fn close(&mut self, waiting: Option<Waiting>) {
        let limit = self.config.close_timeout;
        let closing = self.closing.get_or_insert_with(|| Closing {
            waiting: Vec::new(),
            deadline: Instant::now() + limit,
        });
        closing.waiting.extend(waiting);
        self.commands.close();
        self.phase.send_replace(Phase::Closing);
    }

    fn no_connection(&self, why: &str) -> Error {
        Error::new(ErrorKind::Connect, "connect to")
            .at(self.config.url())
            .because(why)
    }

    fn lost(&self, cause: &str) -> Error {
        Error::new(ErrorKind::ConnectionLost, "send to")
            .at(self.config.url())
            .because(cause)
    }

    fn link_down(&self) -> Error {
        self.lost("the link was lost before it was sent")
    }
}

fn put(command: Command, wire: &mut Wire, answers: &mut Answers) {
    wire.put_encoded(&command.bytes);
    answers.expect(command.replies, command.what, command.confirm);
}
