//! Everything that lives as long as one connection of the client crate.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use commlib_core::{Backoff, Error, ErrorKind, Result};
use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, ConfirmSelectOptions, ExchangeDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Connection, Consumer, ExchangeKind};
use tokio::sync::{Mutex as AsyncMutex, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::config::AmqpConfig;
use crate::lane::{Kept, Outgoing, unconfirmed};
use crate::listener::{Kind, Listener, Reader, Routes};
use crate::net::{self, Failure, Wire};
use crate::topics::{self, Change};
use crate::{address, consumer};

/// The pseudo-queue of direct replies.
pub(crate) const REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// How many best-effort messages wait on each way out.
const QUEUE: usize = 256;

/// What the tasks of a session need.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) epoch: u64,
    pub(crate) exchange: ShortString,
    pub(crate) dead_letter: Option<ShortString>,
    pub(crate) expires_ms: i64,
    pub(crate) reader: Reader,
    connection: Arc<Connection>,
    held: Arc<Mutex<Vec<Held>>>,
    reports: mpsc::UnboundedSender<Report>,
    closing: watch::Receiver<bool>,
}

/// Keeps a channel and its consumer until the channel is closed in so many words, or the session ends.
///
/// The client crate closes a channel and cancels a consumer that are dropped, and ends the whole connection if that
/// fails, which it does when something else closes them at the same time.
struct Held {
    channel: Channel,
    _consumer: Option<Consumer>,
}

/// What the tasks of a session tell the one that made them.
pub(crate) enum Report {
    /// A listener is served, or cannot be.
    Attached(u64, Result<Attached>),
}

/// A listener is served.
pub(crate) struct Attached {
    /// Nothing was missed.
    pub(crate) kept: bool,
}

impl Context {
    /// Opens a channel. It lives as long as the session if it is not [closed](Self::close).
    pub(crate) async fn channel(&self) -> lapin::Result<Channel> {
        let channel = self.connection.create_channel().await?;
        self.hold(&channel, None);
        Ok(channel)
    }

    /// Consumes a queue, one for each channel.
    pub(crate) async fn consume(
        &self,
        channel: &Channel,
        queue: ShortString,
        no_ack: bool,
    ) -> lapin::Result<Consumer> {
        let options = BasicConsumeOptions {
            no_ack,
            ..BasicConsumeOptions::default()
        };
        let tag = address::unique("consumer");
        let arguments = FieldTable::default();
        let consumer = channel
            .basic_consume(queue, tag, options, arguments)
            .await?;
        self.hold(channel, Some(consumer.clone()));
        Ok(consumer)
    }

    fn hold(&self, channel: &Channel, consumer: Option<Consumer>) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|other| other.channel.status().connected());
        held.push(Held {
            channel: channel.clone(),
            _consumer: consumer,
        });
    }

    /// Closes a channel, if it is open still.
    pub(crate) async fn close(&self, channel: &Channel) {
        if channel.status().connected()
            && let Err(error) = channel.close(200, "OK".into()).await
        {
            tracing::debug!(%error, "closed already");
        }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.connection.status().connected()
    }

    pub(crate) fn report(&self, report: Report) {
        // Nobody is interested in a session that has ended.
        let _ = self.reports.send(report);
    }

    /// Resolves once the connection is being closed.
    pub(crate) async fn closing(&mut self) {
        if self.closing.wait_for(|closing| *closing).await.is_err() {
            std::future::pending().await
        }
    }

    /// Between attempts to repair a channel.
    pub(crate) fn backoff(&self) -> Backoff {
        Backoff::new(Duration::from_millis(100), Duration::from_secs(10))
    }

    /// After the end of a channel: waits a little. False if the connection is gone as well.
    pub(crate) async fn repair(&self, what: &str, cause: &str, backoff: &mut Backoff) -> bool {
        if !self.is_up() {
            return false;
        }
        let delay = backoff.next_delay();
        tracing::warn!(
            what,
            cause,
            ?delay,
            "a channel was closed and is opened again"
        );
        sleep(delay).await;
        self.is_up()
    }
}

/// The ways out for best-effort messages, while there is a link.
#[derive(Debug, Clone)]
pub(crate) struct Lanes {
    pub(crate) topics: mpsc::Sender<Outgoing>,
    pub(crate) requests: mpsc::UnboundedSender<Outgoing>,
    pub(crate) replies: mpsc::Sender<Outgoing>,
}

/// The ways out, shared with the handles.
#[derive(Debug, Default)]
pub(crate) struct Ways {
    /// `None` while there is no link.
    pub(crate) lanes: Option<Lanes>,
    /// `None` once the connection closes.
    pub(crate) outbox: Option<mpsc::UnboundedSender<Outgoing>>,
}

impl Ways {
    /// Ends the intake: tasks end when they have sent what is there.
    pub(crate) fn close(&mut self) {
        *self = Self::default();
    }
}

pub(crate) type SharedWays = Arc<Mutex<Ways>>;

pub(crate) fn lock(ways: &SharedWays) -> MutexGuard<'_, Ways> {
    ways.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One connection with its channels and tasks.
pub(crate) struct Session {
    pub(crate) wire: Wire,
    pub(crate) context: Context,
    pub(crate) reports: mpsc::UnboundedReceiver<Report>,
    changes: mpsc::UnboundedSender<Change>,
    closing: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Session {
    /// Starts the tasks of a connection that has just been opened.
    ///
    /// # Errors
    /// If the connection was lost again, or the exchange does not exist.
    pub(crate) async fn start(
        wire: Wire,
        config: &AmqpConfig,
        epoch: u64,
        routes: &Routes,
        ways: SharedWays,
    ) -> Result<Self, Failure> {
        let (reports, reported) = mpsc::unbounded_channel();
        let (closing, close) = watch::channel(false);
        let context = Context {
            epoch,
            exchange: config.exchange.as_str().into(),
            dead_letter: config.dead_letter.as_deref().map(Into::into),
            expires_ms: i64::try_from(config.expires.as_millis()).unwrap_or(i64::MAX),
            reader: Reader {
                max_payload: config.max_payload,
            },
            connection: wire.connection.clone(),
            held: Arc::default(),
            reports,
            closing: close,
        };
        check_exchange(&context, config).await?;
        let (changes, changed) = mpsc::unbounded_channel();
        let (topics, topics_queue) = mpsc::channel(QUEUE);
        let (requests, requests_queue) = mpsc::unbounded_channel();
        let (replies, replies_queue) = mpsc::channel(QUEUE);
        let mut tasks = JoinSet::new();
        tasks.spawn(publish(context.clone(), "publishing", topics_queue));
        tasks.spawn(publish(context.clone(), "replies", replies_queue));
        tasks.spawn(call(context.clone(), routes.clone(), requests_queue));
        tasks.spawn(topics::run(context.clone(), routes.clone(), changed));
        lock(&ways).lanes = Some(Lanes {
            topics,
            requests,
            replies,
        });
        Ok(Self {
            wire,
            context,
            reports: reported,
            changes,
            closing,
            tasks,
        })
    }

    /// Sends at-least-once messages; `resent` is told once those were sent that were kept from before.
    pub(crate) fn start_outbox(
        &mut self,
        outbox: Arc<AsyncMutex<Kept>>,
        resent: oneshot::Sender<()>,
    ) {
        let context = self.context.clone();
        self.tasks.spawn(async move {
            let mut outbox = outbox.lock().await;
            let mut resent = Some(resent);
            let mut backoff = context.backoff();
            loop {
                let sent = async {
                    let channel = context.channel().await?;
                    let confirm = ConfirmSelectOptions::default();
                    channel.confirm_select(confirm).await?;
                    outbox.send(&channel, &mut resent).await
                };
                let Err(error) = sent.await else { return };
                if !context
                    .repair("outbox", &net::text(&error), &mut backoff)
                    .await
                {
                    return;
                }
            }
        });
    }

    /// Serves a listener. Its inbox is gone when `left` is, or says so.
    pub(crate) fn serve(&mut self, listener: &Arc<Listener>, left: oneshot::Receiver<()>) {
        match &listener.kind {
            Kind::Topic { .. } => self.change(Change::Joined(listener.clone())),
            Kind::Replies => {
                // Replies are listened to from the start.
                listener.established.store(true, Ordering::Relaxed);
                self.context
                    .report(Report::Attached(listener.id, Ok(Attached { kept: true })));
            }
            Kind::Acked { .. } | Kind::Service { .. } => {
                self.tasks
                    .spawn(consumer::run(self.context.clone(), listener.clone(), left));
            }
        }
    }

    /// Tells the shared queue about a change.
    pub(crate) fn change(&self, change: Change) {
        // Its task ends with the connection only.
        let _ = self.changes.send(change);
    }

    /// Ends what is accepted, once nothing more can come: messages leave, acknowledgements are written.
    pub(crate) async fn finish(&mut self) {
        self.closing.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
        let closed = self.wire.connection.close(200, "OK".into()).await;
        tracing::debug!(?closed, "connection closed");
    }

    /// Ends all tasks and waits until they are gone.
    pub(crate) async fn abandon(mut self) {
        self.tasks.shutdown().await;
    }
}

/// Found out here and not by the first message, which would only close its channel.
async fn check_exchange(context: &Context, config: &AmqpConfig) -> Result<(), Failure> {
    let passive = ExchangeDeclareOptions {
        passive: true,
        ..ExchangeDeclareOptions::default()
    };
    let lost = |error: &lapin::Error| Failure {
        cause: net::text(error),
        fatal: None,
    };
    let channel = context.channel().await.map_err(|e| lost(&e))?;
    let name = context.exchange.clone();
    let found = channel
        .exchange_declare(name, ExchangeKind::Topic, passive, FieldTable::default())
        .await;
    match found {
        Err(error) if net::is_exception(&error) => {
            let refused = Error::new(ErrorKind::Connect, "connect to")
                .at(config.shown_url())
                .because(format_args!(
                    "check the option `exchange`: {} ({})",
                    config.exchange,
                    net::text(&error)
                ));
            Err(Failure {
                cause: refused.to_string(),
                fatal: Some(refused),
            })
        }
        Err(error) => Err(lost(&error)),
        Ok(()) => {
            context.close(&channel).await;
            Ok(())
        }
    }
}

/// A way out without confirmations.
async fn publish(context: Context, what: &'static str, mut queue: mpsc::Receiver<Outgoing>) {
    let mut backoff = context.backoff();
    loop {
        let sent = async {
            let channel = context.channel().await?;
            unconfirmed(&channel, &mut queue).await
        };
        let Err(error) = sent.await else { return };
        if !context.repair(what, &net::text(&error), &mut backoff).await {
            return;
        }
    }
}

/// Requests and the replies to them. RabbitMQ wants both on one channel.
async fn call(mut context: Context, routes: Routes, queue: mpsc::UnboundedReceiver<Outgoing>) {
    let mut kept = Kept::new(queue);
    let mut backoff = context.backoff();
    loop {
        let exchanged = async {
            let channel = context.channel().await?;
            // Confirmed, because a request that is returned is told before the next confirmation only.
            let confirm = ConfirmSelectOptions::default();
            channel.confirm_select(confirm).await?;
            let mut replies = context.consume(&channel, REPLY_TO.into(), true).await?;
            let receive = async {
                while let Some(reply) = replies.next().await {
                    routes.deliver_reply(reply?, context.reader);
                }
                Ok(())
            };
            let mut nobody = None;
            tokio::select! {
                sent = kept.send(&channel, &mut nobody) => sent,
                ended = receive => {
                    context.close(&channel).await;
                    ended.and(Err(lapin::ErrorKind::InvalidChannel(channel.id()).into()))
                }
            }
        };
        let Err(error) = exchanged.await else { return };
        if !context.is_up() || net::ends_connection(&error) {
            // Nobody is told before the state of the link says so: this task is ended then, or by closing.
            return context.closing().await;
        }
        // The address that the replies go to is gone with the channel.
        kept.fail(|| net::refused("request to", "a service", &error));
        routes.replies_lost();
        if !context
            .repair("calls", &net::text(&error), &mut backoff)
            .await
        {
            return;
        }
    }
}
