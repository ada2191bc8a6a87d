//! The handle of a connection: [`Transport`] for AMQP.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use commlib_core::envelope::Use;
use commlib_core::{
    AbsentService, Capabilities, Delivery, Error, ErrorKind, Inbox, Leases, Link, LinkState,
    ListenOptions, Message, QueueKind, Receipt, ReplyKind, ReplyLease, Result, SendOptions, Source,
    Target, Transport,
};
use lapin::types::ShortString;
use tokio::sync::{Mutex as AsyncMutex, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout};

use crate::acks::Tries;
use crate::config::AmqpConfig;
use crate::conn::{Conn, Control, Room};
use crate::lane::{Kept, Outgoing};
use crate::listener::{Kind, Listener, Routes, lease_key};
use crate::session::{REPLY_TO, SharedWays, Ways, lock};
use crate::{address, properties};

/// How long best-effort messages and requests wait for room, when the broker takes nothing or takes it slowly.
const DEADLINE: Duration = Duration::from_secs(5);

/// How many requests may be on their way without a confirmation.
const REQUESTS: usize = 1024;

/// Best-effort messages above this size also take room by their bytes.
const LARGE: usize = 64 << 10;

/// How many bytes of large best-effort messages wait.
const LARGE_ROOM: usize = 16 << 20;

/// A connection to an AMQP broker.
///
/// One task owns the link and ends when it is closed, or when this handle is dropped; both disconnect cleanly. While the
/// link is down it connects again for ever: best-effort messages and requests are refused with
/// [`ErrorKind::ConnectionLost`], at-least-once messages wait in the outbox, and listening waits for the link.
pub struct AmqpTransport {
    config: Arc<AmqpConfig>,
    link: Link,
    control: mpsc::UnboundedSender<Control>,
    ways: SharedWays,
    room: Room,
    last_id: AtomicU64,
}

impl AmqpTransport {
    /// The transport that [`AmqpConfig::connect`] wraps, with the same behaviour and errors.
    ///
    /// # Errors
    /// As there.
    pub async fn connect(config: AmqpConfig) -> Result<Self> {
        config.check()?;
        let (first, connected) = oneshot::channel();
        let waits = !config.start_offline;
        let first = waits.then(|| (first, Instant::now() + config.connect_timeout));
        let this = Self::spawn(config, first);
        if waits {
            connected
                .await
                .unwrap_or_else(|_| Err(this.closed("connect to")))?;
        }
        Ok(this)
    }

    fn spawn(config: AmqpConfig, first: Option<(oneshot::Sender<Result<()>>, Instant)>) -> Self {
        let config = Arc::new(config);
        let (link, state) = Link::new(config.shown_url(), capabilities(&config));
        let (control, controls) = mpsc::unbounded_channel();
        let (outbox, kept) = mpsc::unbounded_channel();
        let ways = Arc::new(Mutex::new(Ways {
            lanes: None,
            outbox: Some(outbox),
        }));
        let semaphore = |permits: usize| Arc::new(Semaphore::new(permits.min(u32::MAX as usize)));
        let room = Room {
            messages: semaphore(config.outbox),
            bytes: semaphore(config.outbox_bytes),
            requests: semaphore(REQUESTS),
            large: semaphore(LARGE_ROOM),
        };
        let conn = Conn {
            config: config.clone(),
            control: controls,
            state,
            ways: ways.clone(),
            outbox: Arc::new(AsyncMutex::new(Kept::new(kept))),
            room: room.clone(),
            first,
            last_cause: String::new(),
            listeners: HashMap::new(),
            routes: Routes::default(),
            closing: None,
        };
        tokio::spawn(conn.run());
        Self {
            config,
            link,
            control,
            ways,
            room,
            last_id: AtomicU64::new(0),
        }
    }

    /// Sends without keeping.
    async fn send_once(
        &self,
        to: &Target,
        mut message: Outgoing,
        options: &SendOptions,
    ) -> Result<Receipt> {
        const OPERATION: &str = "send to";
        self.link.check_up(OPERATION, to)?;
        let Some(lanes) = lock(&self.ways).lanes.clone() else {
            return Err(self.down(OPERATION).at(to));
        };
        let queue = async {
            let size = message.body.len();
            if size > LARGE {
                message
                    ._room
                    .push(take(&self.room.large, size.min(LARGE_ROOM)).await?);
            }
            match to {
                Target::Topic(_) => lanes.topics.send(message).await.ok()?,
                Target::Reply(_) => lanes.replies.send(message).await.ok()?,
                Target::Queue(_) => {
                    message._room.push(take(&self.room.requests, 1).await?);
                    let (confirm, receipt) = Receipt::pending();
                    message.confirm = Some(confirm);
                    lanes.requests.send(message).ok()?;
                    return Some(receipt);
                }
            }
            Some(Receipt::ready())
        };
        let limit = options.timeout.unwrap_or(DEADLINE);
        match timeout(limit, queue).await {
            Ok(Some(receipt)) => Ok(receipt),
            Ok(None) => Err(self.down(OPERATION).at(to)),
            Err(_) => Err(no_room(OPERATION, to, limit, &self.link)),
        }
    }

    /// Sends through the outbox.
    async fn send_kept(
        &self,
        to: &Target,
        mut message: Outgoing,
        options: &SendOptions,
    ) -> Result<Receipt> {
        const OPERATION: &str = "publish to";
        let bytes = message.body.len().clamp(1, self.config.outbox_bytes);
        let room = async {
            let room = take(&self.room.messages, 1).await?;
            Some(vec![room, take(&self.room.bytes, bytes).await?])
        };
        let room = match options.timeout {
            None => room.await,
            Some(limit) => timeout(limit, room)
                .await
                .map_err(|_| no_room(OPERATION, to, limit, &self.link))?,
        };
        message._room = room.ok_or_else(|| self.closed(OPERATION).at(to))?;
        let (confirm, receipt) = Receipt::pending();
        message.confirm = Some(confirm);
        match &lock(&self.ways).outbox {
            // It is read until the last sender is gone.
            Some(outbox) => drop(outbox.send(message)),
            None => return Err(self.closed(OPERATION).at(to)),
        }
        Ok(receipt)
    }

    fn outgoing(&self, to: &Target, message: &Message, options: &SendOptions) -> Result<Outgoing> {
        let (exchange, key, usage, dialect) = match to {
            Target::Topic(name) => (
                self.config.exchange.as_str().into(),
                address::key(name)?,
                Use::Topic,
                options.dialect,
            ),
            Target::Queue(name) => (
                ShortString::default(),
                address::key(name)?,
                Use::Rpc,
                options.dialect,
            ),
            Target::Reply(reply_to) => (
                ShortString::default(),
                address::short(&reply_to.address, reply_to.address.clone())?,
                Use::Rpc,
                reply_to.form,
            ),
        };
        let (mut properties, body) = properties::encode(message, usage, dialect)?;
        let kept = options.delivery == Delivery::AtLeastOnce;
        if kept {
            properties = properties.with_delivery_mode(PERSISTENT);
        }
        Ok(Outgoing {
            exchange,
            key,
            properties,
            body,
            mandatory: match to {
                Target::Topic(_) => kept,
                Target::Queue(_) => true,
                // A caller that has gone is nothing unusual.
                Target::Reply(_) => false,
            },
            confirm: None,
            returned: None,
            _room: Vec::new(),
        })
    }

    fn kind(&self, from: &Source, options: &ListenOptions) -> Result<Kind> {
        Ok(match from {
            Source::Topic(pattern) => {
                let binding = address::binding(pattern)?;
                match (options.delivery, &options.durable) {
                    (Delivery::BestEffort, _) => Kind::Topic {
                        pattern: pattern.clone(),
                        binding,
                    },
                    (Delivery::AtLeastOnce, None) => Kind::Acked {
                        queue: address::unique("subscription"),
                        binding,
                        durable: false,
                    },
                    (Delivery::AtLeastOnce, Some(name)) => Kind::Acked {
                        queue: address::durable(name)?,
                        binding,
                        durable: true,
                    },
                }
            }
            Source::Queue(name) => Kind::Service {
                queue: address::key(name)?,
            },
            Source::Replies => Kind::Replies,
        })
    }

    fn closed(&self, operation: &'static str) -> Error {
        let cause = match self.link.state() {
            LinkState::Closed { cause } => cause,
            _ => "the connection is being closed".to_owned(),
        };
        Error::new(ErrorKind::Closed, operation).because(cause)
    }

    /// Why a message finds no way out.
    fn down(&self, operation: &'static str) -> Error {
        if lock(&self.ways).outbox.is_none() {
            return self.closed(operation);
        }
        Error::new(ErrorKind::ConnectionLost, operation)
            .because(format_args!("the link to {} is down", self.link.url()))
    }
}

#[async_trait]
impl Transport for AmqpTransport {
    fn link(&self) -> &Link {
        &self.link
    }

    async fn send(&self, to: &Target, message: Message, options: SendOptions) -> Result<Receipt> {
        let (size, max) = (message.data.len(), self.config.max_payload);
        if size > max {
            return Err(Error::new(ErrorKind::TooLarge, "message to")
                .at(to)
                .because(format_args!(
                    "{size} bytes are more than the limit of {max}"
                )));
        }
        let outgoing = self.outgoing(to, &message, &options)?;
        // RabbitMQ wants a request with a direct reply on the channel that gets the reply.
        let direct = message
            .header
            .reply_to
            .is_some_and(|reply_to| reply_to.address == REPLY_TO);
        match (options.delivery, to) {
            (Delivery::AtLeastOnce, Target::Topic(_) | Target::Queue(_)) if !direct => {
                self.send_kept(to, outgoing, &options).await
            }
            _ => self.send_once(to, outgoing, &options).await,
        }
    }

    async fn listen(&self, from: &Source, options: ListenOptions) -> Result<Inbox> {
        const OPERATION: &str = "listen to";
        let kind = self.kind(from, &options)?;
        let prefetch = match &kind {
            // One more than the service has room for, so that it sees that there are too many.
            Kind::Service { .. } => (options.prefetch + 1).min(self.config.prefetch),
            _ => options.prefetch.max(1),
        };
        // What is acknowledged is bounded by the broker's window and never dropped here.
        let acked = matches!(kind, Kind::Acked { .. } | Kind::Service { .. });
        let (sender, inbox) = Inbox::new(&if acked {
            options.clone().delivery(Delivery::AtLeastOnce)
        } else {
            options.clone()
        });
        let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let is_replies = matches!(kind, Kind::Replies);
        let listener = Listener {
            id,
            kind,
            dialect: options.dialect,
            prefetch: u16::try_from(prefetch).unwrap_or(u16::MAX),
            inbox: sender,
            established: AtomicBool::new(false),
            tries: Mutex::new(Tries::default()),
        };
        // Also when this call is cancelled. Weak: an inbox alone does not keep the connection.
        let inbox = inbox.on_drop(Stop {
            id,
            control: self.control.downgrade(),
        });
        let (waiting, served) = oneshot::channel();
        self.control
            .send(Control::Listen(Arc::new(listener), waiting))
            .map_err(|_| self.closed(OPERATION).at(from))?;
        served
            .await
            .unwrap_or_else(|_| Err(self.closed(OPERATION).at(from)))?;
        if !is_replies {
            return Ok(inbox);
        }
        let last = AtomicU64::new(0);
        Ok(inbox.with_leases(Leases::new(move |_| {
            ReplyLease::new(
                REPLY_TO,
                lease_key(id, last.fetch_add(1, Ordering::Relaxed)),
            )
            .correlated()
        })))
    }

    async fn close(&self) -> Result<()> {
        let (waiting, closed) = oneshot::channel();
        if self.control.send(Control::Close(waiting)).is_err() {
            // Closed before.
            return Ok(());
        }
        closed.await.unwrap_or(Ok(()))
    }
}

/// Stays on the broker's disk.
const PERSISTENT: u8 = 2;

/// Tells the connection task when an inbox is dropped.
struct Stop {
    id: u64,
    control: mpsc::WeakUnboundedSender<Control>,
}

impl Drop for Stop {
    fn drop(&mut self) {
        if let Some(control) = self.control.upgrade() {
            // The connection may have ended.
            let _ = control.send(Control::Stop(self.id));
        }
    }
}

fn capabilities(config: &AmqpConfig) -> Capabilities {
    let mut capabilities = Capabilities::default();
    capabilities.queue = QueueKind::Competing;
    capabilities.replies = ReplyKind::CorrelationId;
    capabilities.absent_service = AbsentService::Refused;
    capabilities.max_payload = config.max_payload;
    capabilities.confirms = true;
    capabilities.acks = true;
    capabilities
}

/// Room; `None` if the connection closes.
async fn take(room: &Arc<Semaphore>, permits: usize) -> Option<OwnedSemaphorePermit> {
    let permits = u32::try_from(permits).unwrap_or(u32::MAX);
    room.clone().acquire_many_owned(permits).await.ok()
}

fn no_room(operation: &'static str, to: &Target, limit: Duration, link: &Link) -> Error {
    let why = match link.state() {
        LinkState::Degraded { reason } => format!("the broker takes no messages: {reason}"),
        _ => "too many messages wait for the broker".to_owned(),
    };
    Error::new(ErrorKind::Timeout, operation)
        .at(to)
        .because(format_args!("no room within {limit:?}; {why}"))
}

impl fmt::Debug for AmqpTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmqpTransport")
            .field("url", &self.link.url())
            .field("state", &self.link.state())
            .finish_non_exhaustive()
    }
}
