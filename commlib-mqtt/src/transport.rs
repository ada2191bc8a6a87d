//! The handle of a connection: [`Transport`] for MQTT.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use commlib_core::envelope::{self, Use};
use commlib_core::{
    AbsentService, Capabilities, Delivery, Error, ErrorKind, Inbox, Leases, Link, LinkState,
    ListenOptions, Message, Name, QueueKind, Receipt, ReplyKind, ReplyLease, Result, SendOptions,
    Source, Target, Transport,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::address;
use crate::config::{MqttConfig, Session as Keep};
use crate::conn::Conn;
use crate::listeners::{Kind, Listener};
use crate::outbox::Entry;
use crate::packet::{Publish, QoS};
use crate::room::{BestEffort, LARGE_ROOM, Room, take, within};
use crate::session::{Control, Session};

/// How many best-effort messages wait for the task.
const QUEUE: usize = 256;

/// Best-effort messages above this size also take room by their bytes.
const LARGE: usize = 64 << 10;

/// A connection to an MQTT broker.
///
/// One task owns the link and ends when it is closed, or when this handle and all inboxes are dropped; both disconnect
/// cleanly. While the link is down it connects again for ever: best-effort messages are refused with
/// [`ErrorKind::ConnectionLost`], at-least-once messages wait in the outbox, and listening waits for the link.
///
/// Every service of a name gets each request, and requests and replies are best effort: MQTT 3.1.1 has no queues.
pub struct MqttTransport {
    config: Arc<MqttConfig>,
    link: Link,
    control: mpsc::UnboundedSender<Control>,
    best_effort: mpsc::Sender<BestEffort>,
    room: Room,
    last_id: AtomicU64,
    /// What the reply addresses of this connection start with.
    replies: Arc<str>,
    last_lease: Arc<AtomicU64>,
}

impl MqttTransport {
    /// The transport that [`MqttConfig::connect`] wraps, with the same behaviour and errors.
    ///
    /// # Errors
    /// As there.
    pub async fn connect(config: MqttConfig) -> Result<Self> {
        config.check()?;
        let (first, connected) = oneshot::channel();
        let first =
            (!config.start_offline).then(|| (first, Instant::now() + config.connect_timeout));
        let waits = first.is_some();
        let this = Self::spawn(config, first);
        if waits {
            connected
                .await
                .unwrap_or_else(|_| Err(this.closed("connect")))?;
        }
        Ok(this)
    }

    fn spawn(config: MqttConfig, first: Option<(oneshot::Sender<Result<()>>, Instant)>) -> Self {
        let config = Arc::new(config);
        let (link, state) = Link::new(format!("mqtt://{}", config.address), capabilities(&config));
        let (control, controls) = mpsc::unbounded_channel();
        let (best_effort, best_efforts) = mpsc::channel(QUEUE);
        let (ack, acks) = mpsc::unbounded_channel();
        let room = Room::new(&config);
        let conn = Conn {
            client_id: client_id(&config),
            session: Session::new(config.clone(), ack),
            config: config.clone(),
            control: controls,
            best_effort: best_efforts,
            acks,
            state,
            room: room.clone(),
            first,
        };
        tokio::spawn(conn.run());
        Self {
            config,
            link,
            control,
            best_effort,
            room,
            last_id: AtomicU64::new(0),
            replies: format!("rpc-{}/", commlib_core::random_id()).into(),
            last_lease: Arc::new(AtomicU64::new(0)),
        }
    }

    /// Sends without keeping.
    async fn send_once(
        &self,
        to: &Target,
        publish: Publish,
        options: &SendOptions,
    ) -> Result<Receipt> {
        const OPERATION: &str = "send to";
        self.link.check_up(OPERATION, to)?;
        let size = publish.payload.len();
        let mut message = BestEffort {
            publish,
            _room: None,
        };
        if size <= LARGE {
            // The usual case: there is room, and nothing to wait for.
            message = match self.best_effort.try_send(message) {
                Ok(()) => return Ok(Receipt::ready()),
                Err(refused) => refused.into_inner(),
            };
        }
        let queue = async {
            if size > LARGE {
                let room = take(&self.room.large, size.min(LARGE_ROOM)).await;
                message._room = Some(room.ok_or(())?);
            }
            self.best_effort.send(message).await.map_err(drop)
        };
        let mut state = self.link.watch();
        // The queue is not emptied while the link is down, and what is best effort does not wait for that to pass.
        let lost = state.wait_for(|state| !state.is_connected());
        tokio::select! {
            biased;
            queued = within(options.timeout, queue) => match queued {
                Some(Ok(())) => Ok(Receipt::ready()),
                Some(Err(())) => Err(self.closed(OPERATION).at(to)),
                None => Err(no_room(OPERATION, to, options)),
            },
            _ = lost => {
                self.link.check_up(OPERATION, to)?;
                Err(self.closed(OPERATION).at(to))
            }
        }
    }

    /// Sends through the outbox.
    async fn send_kept(
        &self,
        to: &Target,
        publish: Publish,
        options: &SendOptions,
    ) -> Result<Receipt> {
        const OPERATION: &str = "publish to";
        let bytes = (publish.topic.len() + publish.payload.len()).min(self.config.outbox_bytes);
        let room = async {
            let message = take(&self.room.messages, 1).await?;
            Some((message, take(&self.room.bytes, bytes).await?))
        };
        let room = match within(options.timeout, room).await {
            Some(Some(room)) => room,
            Some(None) => return Err(self.closed(OPERATION).at(to)),
            None => return Err(no_room(OPERATION, to, options)),
        };
        let (confirm, receipt) = Receipt::pending();
        let entry = Entry {
            publish,
            confirm,
            _room: Some(room),
        };
        self.control
            .send(Control::Publish(entry))
            .map_err(|_| self.closed(OPERATION).at(to))?;
        Ok(receipt)
    }

    /// What is to be listened to; the rest of a [`Listener`] comes from the options.
    fn listened(&self, from: &Source, options: &ListenOptions) -> Result<Listened> {
        Ok(match from {
            Source::Topic(pattern) => Listened {
                filter: address::filter(pattern)?,
                kind: Kind::Topic,
                qos: match options.delivery {
                    Delivery::BestEffort => QoS::AtMostOnce,
                    Delivery::AtLeastOnce => QoS::AtLeastOnce,
                },
                name: pattern.exact(),
            },
            Source::Queue(name) => Listened {
                filter: address::topic(name)?,
                kind: Kind::Queue,
                qos: QoS::AtMostOnce,
                name: Some(name.clone()),
            },
            Source::Replies => Listened {
                filter: format!("{}#", self.replies),
                kind: Kind::Replies(self.replies.len()),
                qos: QoS::AtMostOnce,
                name: Some(address::name(self.replies.trim_end_matches('/'))),
            },
        })
    }

    fn leases(&self) -> Leases {
        let (replies, last) = (self.replies.clone(), self.last_lease.clone());
        Leases::new(move |_| {
            let key = (last.fetch_add(1, Ordering::Relaxed) + 1).to_string();
            ReplyLease::new(format!("{replies}{key}"), key)
        })
    }

    fn closed(&self, operation: &'static str) -> Error {
        let cause = match self.link.state() {
            LinkState::Closed { cause } => cause,
            _ => "the connection is being closed".to_owned(),
        };
        Error::new(ErrorKind::Closed, operation).because(cause)
    }
}

struct Listened {
    filter: String,
    kind: Kind,
    qos: QoS,
    name: Option<Name>,
}

#[async_trait]
impl Transport for MqttTransport {
    fn link(&self) -> &Link {
        &self.link
    }

    async fn send(&self, to: &Target, message: Message, options: SendOptions) -> Result<Receipt> {
        let size = message.data.len();
        let max = self.config.max_payload;
        let too_large = |size: usize, limit: &str, max: usize| {
            Error::new(ErrorKind::TooLarge, "send to")
                .at(to)
                .because(format_args!("{size} bytes, and `{limit}` is {max}"))
        };
        if size > max {
            return Err(too_large(size, "max_payload", max));
        }
        let (topic, usage, dialect) = match to {
            Target::Topic(name) => (address::topic(name)?, Use::Topic, options.dialect),
            Target::Queue(name) => (address::topic(name)?, Use::Rpc, options.dialect),
            Target::Reply(reply) => (
                address::reply_topic(&reply.address)?.to_owned(),
                Use::Rpc,
                reply.form,
            ),
        };
        let payload = envelope::encode(&message, usage, dialect)?;
        if payload.len() > self.config.hard_limit {
            return Err(too_large(
                payload.len(),
                "hard_limit",
                self.config.hard_limit,
            ));
        }
        let kept = options.delivery == Delivery::AtLeastOnce;
        if kept && !matches!(to, Target::Topic(_)) {
            return Err(Error::new(ErrorKind::Unsupported, "send to")
                .at(to)
                .because("requests and replies are best effort on MQTT"));
        }
        if kept {
            let publish = Publish::from_bytes(topic, QoS::AtLeastOnce, payload);
            return self.send_kept(to, publish, &options).await;
        }
        let publish = Publish::from_bytes(topic, QoS::AtMostOnce, payload);
        self.send_once(to, publish, &options).await
    }

    /// While the link is down this waits until it is back.
    async fn listen(&self, from: &Source, options: ListenOptions) -> Result<Inbox> {
        const OPERATION: &str = "listen to";
        let listened = self.listened(from, &options)?;
        let persistent = self.config.session == Keep::Persistent;
        let lasting = options.delivery == Delivery::AtLeastOnce || options.durable.is_some();
        if lasting && !(persistent && listened.kind == Kind::Topic) {
            let why = if listened.kind == Kind::Topic {
                "at-least-once and durable subscribing need a session that the broker keeps: set `session=persistent` and a `client_id` of its own"
            } else {
                "requests and replies are best effort on MQTT"
            };
            return Err(Error::new(ErrorKind::Unsupported, OPERATION)
                .at(from)
                .because(why));
        }
        let (sender, inbox) = Inbox::new(&options);
        let id = self.last_id.fetch_add(1, Ordering::Relaxed);
        let stop = Stop {
            id,
            control: self.control.clone(),
        };
        let mut inbox = inbox.on_drop(stop);
        if matches!(listened.kind, Kind::Replies(_)) {
            inbox = inbox.with_leases(self.leases());
        }
        let listener = Arc::new(Listener {
            id,
            filter: listened.filter,
            kind: listened.kind,
            qos: listened.qos,
            dialect: options.dialect,
            durable: options.durable.is_some(),
            inbox: sender,
            name: listened.name,
        });
        let (waiting, served) = oneshot::channel();
        let closed = || self.closed(OPERATION).at(from);
        self.control
            .send(Control::Listen(listener, waiting))
            .map_err(|_| closed())?;
        served.await.unwrap_or_else(|_| Err(closed()))?;
        Ok(inbox)
    }

    async fn close(&self) -> Result<()> {
        let (waiting, closed) = oneshot::channel();
        // Without a task, or without its word, it is closed already.
        if self.control.send(Control::Close(waiting)).is_err() {
            return Ok(());
        }
        closed.await.unwrap_or(Ok(()))
    }
}

impl fmt::Debug for MqttTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MqttTransport")
            .field("url", &self.link.url())
            .field("state", &self.link.state())
            .finish_non_exhaustive()
    }
}

/// Tells the task that an inbox is gone. Also keeps the task going while there is one.
struct Stop {
    id: u64,
    control: mpsc::UnboundedSender<Control>,
}

impl Drop for Stop {
    fn drop(&mut self) {
        // Without a task there is nothing to stop.
        let _ = self.control.send(Control::Stop(self.id));
    }
}

fn capabilities(config: &MqttConfig) -> Capabilities {
    let mut capabilities = Capabilities::default();
    capabilities.queue = QueueKind::FanOut;
    capabilities.replies = ReplyKind::AddressPerCall;
    capabilities.absent_service = AbsentService::Dropped;
    capabilities.max_payload = config.max_payload;
    capabilities.confirms = true;
    capabilities.acks = config.session == Keep::Persistent;
    capabilities
}

/// The configured client id, or one that every broker takes: MQTT 3.1.1, 3.1.3 promises 23 letters and digits.
fn client_id(config: &MqttConfig) -> Arc<str> {
    match &config.client_id {
        Some(id) => id.as_str().into(),
        None => format!("commlib{:.16}", commlib_core::random_id()).into(),
    }
}

fn no_room(operation: &'static str, to: &Target, options: &SendOptions) -> Error {
    Error::new(ErrorKind::Timeout, operation)
        .at(to)
        .because(format_args!(
            "no room for another message within {:?}",
            options.timeout.unwrap_or_default()
        ))
}
