//! The task that owns the connection: connects, keeps it alive, connects again.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use commlib_core::{AckReply, Backoff, Error, ErrorKind, LinkState, Result};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until};

use crate::config::MqttConfig;
use crate::net;
use crate::room::{BestEffort, Room};
use crate::serve::End;
use crate::session::{Control, Session};

/// A link that held this long is a good one: the next loss starts with a short delay again.
const STABLE: Duration = Duration::from_secs(5);

/// So many losses right after the login make another client of the same id likely.
const TAKEOVERS: u32 = 3;

/// The connection task.
#[derive(Debug)]
pub(crate) struct Conn {
    pub(crate) config: Arc<MqttConfig>,
    pub(crate) client_id: Arc<str>,
    pub(crate) session: Session,
    pub(crate) control: mpsc::UnboundedReceiver<Control>,
    pub(crate) best_effort: mpsc::Receiver<BestEffort>,
    pub(crate) acks: mpsc::UnboundedReceiver<AckReply>,
    pub(crate) state: watch::Sender<LinkState>,
    pub(crate) room: Room,
    /// Told about the first connection, if somebody waits for it.
    pub(crate) first: Option<(oneshot::Sender<Result<()>>, Instant)>,
}

/// Why the task ends; the error is for those who wait for the first connection.
struct Ending {
    cause: String,
    error: Option<Error>,
}

impl Ending {
    fn closed() -> Self {
        Self {
            cause: "closed by this side".to_owned(),
            error: None,
        }
    }
}

/// What is remembered from attempt to attempt.
#[derive(Debug, Default)]
struct History {
    backoff: Backoff,
    /// Attempts since the link was lost.
    attempt: u32,
    /// Links in a row that did not hold.
    short_lives: u32,
    /// There was a link before.
    again: bool,
    cause: String,
}

impl Conn {
    /// Runs until the connection is closed or given up.
    pub(crate) async fn run(mut self) {
        let mut history = History::default();
        let ending = loop {
            if let Err(ending) = self.attempt(&mut history).await {
                break ending;
            }
        };
        self.finish(ending);
    }

    /// Connects, serves the link until it is lost, and waits until it is time for the next attempt.
    async fn attempt(&mut self, history: &mut History) -> Result<(), Ending> {
        let opening = net::open(self.config.clone(), self.client_id.clone());
        let mut flooded = false;
        history.cause = match self.while_down(opening, &history.cause).await? {
            Ok(wire) => {
                let mut up_since = None;
                let end = self.serve(wire, history.again, &mut up_since).await;
                if self.session.closing.is_some() {
                    // Also if the link was lost meanwhile: whoever closes does not wait for it to come back.
                    return Err(Ending::closed());
                }
                history.again |= up_since.is_some();
                history.attempt = 0;
                history.short_lives += 1;
                if up_since.is_some_and(|since| since.elapsed() >= STABLE) {
                    history.backoff.reset();
                    history.short_lives = 0;
                }
                match end {
                    End::Closed => return Err(Ending::closed()),
                    End::Dropped(cause) => cause,
                    End::Lost(cause) => {
                        history.short_lives = 0;
                        cause
                    }
                    End::Flooded => {
                        flooded = true;
                        // It is not the broker's fault: the wait is for the receivers.
                        history.backoff.reset();
                        history.short_lives = 0;
                        format!(
                            "more than `unacked_bytes` ({}) of messages are not acknowledged: handlers are too slow",
                            self.config.unacked_bytes
                        )
                    }
                }
            }
            Err(failure) if failure.fatal && self.first.is_some() => {
                let error = self.not_connected().because(&failure.cause);
                return Err(Ending {
                    cause: failure.cause,
                    error: Some(error),
                });
            }
            Err(failure) => failure.cause,
        };
        if history.short_lives >= TAKEOVERS {
            let hint = format!(
                "; another client may be using the client id `{}`",
                self.client_id
            );
            history.cause.push_str(&hint);
        }
        history.attempt += 1;
        let delay = history.backoff.next_delay();
        let (attempt, cause) = (history.attempt, &history.cause);
        tracing::warn!(broker = %self.config.address, %cause, attempt, ?delay, "not connected");
        if self.first.is_none() {
            let cause = cause.clone();
            let state = LinkState::Reconnecting { attempt, cause };
            self.state.send_replace(state);
        }
        while flooded && !self.session.drained() {
            self.down_event(cause).await?;
        }
        self.while_down(sleep(delay), cause).await
    }

    /// Does a piece of work while handles and receivers are still heard.
    async fn while_down<T>(
        &mut self,
        work: impl Future<Output = T> + Send,
        cause: &str,
    ) -> Result<T, Ending> {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                event = self.down_event(cause) => event?,
            }
        }
    }

    /// Handles one thing that happens without a link. Cancel safe.
    async fn down_event(&mut self, cause: &str) -> Result<(), Ending> {
        let deadline = self.first.as_ref().map(|(_, deadline)| *deadline);
        let now = Instant::now();
        tokio::select! {
            command = self.control.recv() => match command {
                Some(command) => self.session.control(command, now),
                None => return Err(Ending::closed()),
            },
            Some(reply) = self.acks.recv() => self.session.acked(reply, now),
            () = sleep_until(deadline.unwrap_or(now)), if deadline.is_some() => {
                let cause = if cause.is_empty() { "no answer" } else { cause };
                let error = self.not_connected().because(format_args!(
                    "{cause}; tried for {:?}. Is a broker running there? `start=offline` connects in the background",
                    self.config.connect_timeout
                ));
                return Err(Ending { cause: cause.to_owned(), error: Some(error) });
            }
        }
        match self.session.closing {
            Some(_) => Err(Ending::closed()),
            None => Ok(()),
        }
    }

    /// Says that everything works again.
    pub(crate) fn announce(&mut self, resumed: bool) {
        // Accepted before the link was lost. A command that comes minutes late is worse than one that does not come; its
        // receivers see the gap, and a call among them has failed already.
        let mut stale = 0_u32;
        while self.best_effort.try_recv().is_ok() {
            stale += 1;
        }
        if stale > 0 {
            tracing::warn!(broker = %self.config.address, messages = stale, "best-effort messages were lost with the link");
        }
        tracing::info!(broker = %self.config.address, client_id = %self.client_id, resumed, "connected");
        self.state.send_replace(LinkState::Connected { resumed });
        if let Some((first, _)) = self.first.take() {
            // Gone if `connect` was cancelled; then the handles are gone too and end this task.
            let _ = first.send(Ok(()));
        }
    }

    fn finish(mut self, ending: Ending) {
        tracing::info!(broker = %self.config.address, cause = %ending.cause, "closed");
        self.room.close();
        self.best_effort.close();
        self.control.close();
        let mut waiting = self.session.closing.take().unwrap_or_default();
        let mut unconfirmed = self.session.outbox.len();
        while let Ok(command) = self.control.try_recv() {
            match command {
                Control::Publish(_) => unconfirmed += 1,
                Control::Close(waiter) => waiting.push(waiter),
                Control::Listen(..) | Control::Stop(_) => {}
            }
        }
        self.state.send_replace(LinkState::Closed {
            cause: ending.cause,
        });
        // Inboxes end and receipts fail before anyone is told that it is over.
        drop(self.session);
        for waiter in waiting {
            let _ = waiter.send(match unconfirmed {
                0 => Ok(()),
                _ => Err(Error::new(ErrorKind::Timeout, "close connection to")
                    .at(&self.config.address)
                    .because(format_args!(
                        "{unconfirmed} at-least-once messages were not confirmed by the broker"
                    ))),
            });
        }
        if let (Some((first, _)), Some(error)) = (self.first, ending.error) {
            let _ = first.send(Err(error));
        }
    }

    fn not_connected(&self) -> Error {
        Error::new(ErrorKind::Connect, "connect to")
            .at(format_args!("mqtt://{}", self.config.address))
    }
}
