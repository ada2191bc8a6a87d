//! The task that owns the connection: connects, watches over it, connects again.

use std::collections::{HashMap, HashSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use commlib_core::{Backoff, Error, ErrorKind, LinkState, Result};
use futures_util::StreamExt;
use lapin::Event;
use tokio::sync::{Mutex as AsyncMutex, Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use crate::config::AmqpConfig;
use crate::lane::Kept;
use crate::listener::{Kind, Listener, Routes};
use crate::net::{self, Failure};
use crate::session::{Attached, Report, Session, SharedWays, lock};
use crate::topics::Change;

/// A link that held this long is a good one: the next loss starts with a short delay again.
const STABLE: Duration = Duration::from_secs(5);

/// How long one attempt to connect may take.
const ATTEMPT: Duration = Duration::from_secs(10);

/// Told when something is done.
pub(crate) type Waiting = oneshot::Sender<Result<()>>;

/// What the handles ask of the connection task.
pub(crate) enum Control {
    /// Serve a listener.
    Listen(Arc<Listener>, Waiting),
    /// Its inbox is gone.
    Stop(u64),
    /// End, and say how it went.
    Close(Waiting),
}

/// One listener with those who wait for it.
pub(crate) struct Entry {
    listener: Arc<Listener>,
    waiting: Option<Waiting>,
    /// Dropped to tell the task that serves it that its inbox is gone.
    left: Option<oneshot::Sender<()>>,
}

/// What messages take while they wait. Closed when the connection closes.
#[derive(Debug, Clone)]
pub(crate) struct Room {
    /// At-least-once messages, by number and by bytes.
    pub(crate) messages: Arc<Semaphore>,
    pub(crate) bytes: Arc<Semaphore>,
    /// Requests that the broker has not confirmed.
    pub(crate) requests: Arc<Semaphore>,
    /// Bytes of large best-effort messages.
    pub(crate) large: Arc<Semaphore>,
}

impl Room {
    fn close(&self) {
        for room in [&self.messages, &self.bytes, &self.requests, &self.large] {
            room.close();
        }
    }
}

/// The connection task.
pub(crate) struct Conn {
    pub(crate) config: Arc<AmqpConfig>,
    pub(crate) control: mpsc::UnboundedReceiver<Control>,
    pub(crate) state: watch::Sender<LinkState>,
    pub(crate) ways: SharedWays,
    pub(crate) outbox: Arc<AsyncMutex<Kept>>,
    /// Closed to end the intake.
    pub(crate) room: Room,
    /// Told about the first connection, if somebody waits for it.
    pub(crate) first: Option<(Waiting, Instant)>,
    /// Why the last attempt failed.
    pub(crate) last_cause: String,
    pub(crate) listeners: HashMap<u64, Entry>,
    pub(crate) routes: Routes,
    /// Those who wait for the end, once it is wanted, and until when it is to be clean.
    pub(crate) closing: Option<(Vec<Waiting>, Instant)>,
}

/// Why a link ended.
enum End {
    /// This side closes.
    Closing,
    /// Lost.
    Lost(String),
}

impl Conn {
    /// Runs until the connection is closed or given up.
    pub(crate) async fn run(mut self) {
        let outcome = self.supervise().await;
        let cause = match &outcome {
            Err(error) if error.kind() == ErrorKind::Connect => error.to_string(),
            _ => "closed by this side".to_owned(),
        };
        self.room.close();
        lock(&self.ways).close();
        self.state.send_replace(LinkState::Closed {
            cause: cause.clone(),
        });
        let closed = || {
            let error = Error::new(ErrorKind::Closed, "message to the broker").because(&cause);
            error.possibly_executed()
        };
        self.outbox.lock().await.fail_all(closed);
        // Ends the inboxes.
        self.routes.clear();
        self.listeners.clear();
        self.control.close();
        while let Some(control) = self.control.recv().await {
            // Those who want to listen are told by the end of the channel.
            if let Control::Close(waiting) = control {
                let _ = waiting.send(Ok(()));
            }
        }
        // The first to ask gets the error, if there is one.
        let mut outcome = Some(outcome);
        let closers = self
            .closing
            .take()
            .map_or_else(Vec::new, |(closers, _)| closers);
        for waiting in self
            .first
            .take()
            .map(|(first, _)| first)
            .into_iter()
            .chain(closers)
        {
            let _ = waiting.send(outcome.take().unwrap_or(Ok(())));
        }
    }

    async fn supervise(&mut self) -> Result<()> {
        let mut backoff = Backoff::default();
        let (mut attempt, mut epoch) = (0, 0);
        loop {
            epoch += 1;
            let (config, routes, ways) =
                (self.config.clone(), self.routes.clone(), self.ways.clone());
            let opening = async move {
                let wire = net::open(&config).await?;
                Session::start(wire, &config, epoch, &routes, ways).await
            };
            let late = Failure {
                cause: format!("no answer within {ATTEMPT:?}"),
                fatal: None,
            };
            let opening = async { timeout(ATTEMPT, opening).await.unwrap_or(Err(late)) };
            let Some(opened) = self.while_down(opening).await else {
                return self.end_while_down(attempt);
            };
            let cause = match opened {
                Ok(mut session) => {
                    let since = Instant::now();
                    let end = self.serve(&mut session, epoch).await;
                    let End::Lost(cause) = end else {
                        return self.finish(session).await;
                    };
                    self.lost(session, &cause).await;
                    attempt = 0;
                    if since.elapsed() >= STABLE {
                        backoff.reset();
                    }
                    cause
                }
                Err(Failure {
                    fatal: Some(error), ..
                }) if self.first.is_some() => return Err(error),
                Err(failure) => failure.cause,
            };
            attempt += 1;
            let delay = backoff.next_delay();
            tracing::warn!(broker = %self.config.shown_url(), %cause, attempt, ?delay, "not connected");
            self.last_cause.clone_from(&cause);
            if self.first.is_none() {
                self.state
                    .send_replace(LinkState::Reconnecting { attempt, cause });
            }
            if self.while_down(sleep(delay)).await.is_none() {
                return self.end_while_down(attempt);
            }
        }
    }

    /// Does something while there is no link, and what handles ask meanwhile. `None` ends the task.
    async fn while_down<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        let deadline = self.first.as_ref().map(|(_, deadline)| *deadline);
        loop {
            if self.closing.is_some() {
                // Whoever closes does not wait for a link.
                return None;
            }
            tokio::select! {
                biased;
                done = &mut work => return Some(done),
                control = self.control.recv() => drop(self.take(control)),
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => return None,
            }
        }
    }

    /// What to say of an end without a link.
    fn end_while_down(&self, attempts: u32) -> Result<()> {
        match &self.closing {
            Some(_) => self.outcome(),
            None => Err(Error::new(ErrorKind::Connect, "connect to")
                .at(self.config.shown_url())
                .because(format_args!(
                    "no connection within {:?} and {attempts} attempts: {}",
                    self.config.connect_timeout, self.last_cause
                ))),
        }
    }

    /// Everything was confirmed, or not.
    fn outcome(&self) -> Result<()> {
        let left = self.outbox.try_lock().map_or(1, |outbox| outbox.len());
        if left == 0 {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Timeout, "close of")
            .at(self.config.shown_url())
            .because(format_args!("{left} messages were not confirmed")))
    }

    /// Takes a request of a handle; gives back what a session has to do about it.
    fn take(&mut self, control: Option<Control>) -> Option<Todo> {
        match control {
            Some(Control::Listen(listener, waiting)) => {
                self.routes.join(&listener);
                let id = listener.id;
                let entry = Entry {
                    listener,
                    waiting: Some(waiting),
                    left: None,
                };
                self.listeners.insert(id, entry);
                Some(Todo::Serve(id))
            }
            Some(Control::Stop(id)) => {
                let entry = self.listeners.remove(&id)?;
                self.routes.leave(&entry.listener);
                // Dropping `left` tells the task that serves it.
                Some(Todo::Leave(entry.listener))
            }
            // All handles are gone: nobody waits for the end.
            other => {
                let deadline = Instant::now() + self.config.close_timeout;
                let (waiting, _) = self.closing.get_or_insert_with(|| (Vec::new(), deadline));
                if let Some(Control::Close(closer)) = other {
                    waiting.push(closer);
                }
                None
            }
        }
    }

    /// Watches over a connection until it ends.
    async fn serve(&mut self, session: &mut Session, epoch: u64) -> End {
        // First all listen again, then what is unconfirmed is sent again, then the link is announced.
        let mut missing: HashSet<u64> = self.listeners.keys().copied().collect();
        for entry in self.listeners.values_mut() {
            entry.serve(session);
        }
        let (resent, mut announce) = oneshot::channel();
        let mut resent = Some(resent);
        let mut state = LinkState::Connected { resumed: epoch > 1 };
        let mut announced = false;
        loop {
            if self.closing.is_some() {
                if let Some(resent) = resent.take() {
                    session.start_outbox(self.outbox.clone(), resent);
                }
                return End::Closing;
            }
            if missing.is_empty()
                && let Some(resent) = resent.take()
            {
                session.start_outbox(self.outbox.clone(), resent);
            }
            tokio::select! {
                biased;
                event = session.wire.events.next() => match event {
                    Some(Event::ConnectionBlocked(reason)) => {
                        announced = true;
                        self.announce(LinkState::Degraded { reason });
                    }
                    Some(Event::ConnectionUnblocked) => self.announce(state.clone()),
                    Some(Event::Error(error)) if !session.context.is_up() => {
                        return End::Lost(net::text(&error));
                    }
                    // Errors of channels reach those who use them.
                    Some(_) => {}
                    None => return End::Lost("the client crate ended it".to_owned()),
                },
                Some(Report::Attached(id, outcome)) = session.reports.recv() => {
                    missing.remove(&id);
                    if let (Ok(Attached { kept: false }), LinkState::Connected { resumed }) = (&outcome, &mut state) {
                        *resumed = false;
                    }
                    self.attached(id, outcome.map(drop));
                }
                control = self.control.recv() => match self.take(control) {
                    Some(Todo::Serve(id)) => if let Some(entry) = self.listeners.get_mut(&id) {
                        entry.serve(session);
                    },
                    Some(Todo::Leave(listener)) => {
                        missing.remove(&listener.id);
                        if let Kind::Topic { .. } = &listener.kind {
                            session.change(Change::Left(listener));
                        }
                    }
                    None => {}
                },
                _ = &mut announce, if !announced => {
                    announced = true;
                    self.announce(state.clone());
                }
            }
        }
    }

    fn announce(&mut self, state: LinkState) {
        tracing::debug!(broker = %self.config.shown_url(), ?state, "link");
        self.state.send_replace(state);
        if let Some((first, _)) = self.first.take() {
            let _ = first.send(Ok(()));
        }
    }

    /// A listener is served, or cannot be. Only who waits for it is told: later it is tried again.
    fn attached(&mut self, id: u64, outcome: Result<()>) {
        let Some(waiting) = self
            .listeners
            .get_mut(&id)
            .and_then(|entry| entry.waiting.take())
        else {
            return;
        };
        if outcome.is_err()
            && let Some(entry) = self.listeners.remove(&id)
        {
            self.routes.leave(&entry.listener);
        }
        let _ = waiting.send(outcome);
    }

    async fn lost(&mut self, session: Session, cause: &str) {
        // In this order: whoever is told of a lost call finds the link down.
        lock(&self.ways).lanes = None;
        let (attempt, cause) = (1, cause.to_owned());
        self.state
            .send_replace(LinkState::Reconnecting { attempt, cause });
        self.routes.replies_lost();
        session.abandon().await;
    }

    /// Closes cleanly, as far as the time allows.
    async fn finish(&mut self, mut session: Session) -> Result<()> {
        self.room.close();
        let deadline = self
            .closing
            .as_ref()
            .map_or_else(Instant::now, |(_, deadline)| *deadline);
        lock(&self.ways).close();
        let clean = timeout_at(deadline, session.finish()).await.is_ok();
        session.abandon().await;
        if !clean {
            tracing::debug!("closed before everything was said");
        }
        self.outcome()
    }
}

/// What is left to do for a session.
enum Todo {
    Serve(u64),
    Leave(Arc<Listener>),
}

impl Entry {
    fn serve(&mut self, session: &mut Session) {
        let (left, gone) = oneshot::channel();
        self.left = Some(left);
        session.serve(&self.listener, gone);
    }
}
