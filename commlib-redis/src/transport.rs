//! What core sees of a connection.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use commlib_core::envelope::{self, Use};
use commlib_core::{
    AbsentService, Capabilities, Delivery, Error, ErrorKind, Inbox, Link, LinkState, ListenOptions,
    Message, Name, Pattern, QueueKind, Receipt, ReplyKind, Result, SendOptions, Source, Target,
    Transport,
};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};

use crate::address;
use crate::config::RedisConfig;
use crate::lists::Reader;
use crate::outbound::{Command, Entry, Outbox};
use crate::queue::{self, Queue};
use crate::replies::{Lists, Replies};
use crate::stream::{self, Subscription};
use crate::supervisor::{Club, Event, Events, Phase, Supervisor};
use crate::topics::{Change, Filter, Listener, StopTopic, Topics};

/// How many best-effort commands may wait to be written.
const WAITING_COMMANDS: usize = 1024;

/// A best-effort command longer than this takes room, of which there is [`LARGE_BYTES`].
const LARGE: usize = 16 << 10;

/// How many bytes of large best-effort commands may wait to be written; one that is larger goes alone.
const LARGE_BYTES: usize = 16 << 20;

/// How long an at-least-once message waits for room unless it says otherwise.
const DEFAULT_WAIT: Duration = Duration::from_secs(30);

/// A connection to a Redis server.
///
/// Dropping it, and all inboxes it made, disconnects in the background; [`close`](Transport::close) does so and waits.
pub struct RedisTransport {
    link: Link,
    config: Arc<RedisConfig>,
    club: Club,
    commands: mpsc::Sender<Command>,
    topics: mpsc::UnboundedSender<Change>,
    reader: Arc<Reader>,
    /// Of those who listen for replies: core does once.
    lists: Mutex<Vec<Weak<Lists>>>,
    /// What at-least-once messages take while they wait: of the messages, and of the bytes.
    room: (Arc<Semaphore>, Arc<Semaphore>),
    large: Arc<Semaphore>,
    /// Keeps the connection alive. The inboxes hold one each.
    handle: mpsc::Sender<Infallible>,
    next: AtomicU64,
}

impl RedisTransport {
    /// Connects. Must be called within a tokio runtime. Cancelling it ends the attempt.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] before any socket opens; [`ErrorKind::Connect`] if the server could not be reached within
    /// `connect_timeout`, and at once if it refused the login. With `start_offline` only the former.
    pub async fn connect(config: RedisConfig) -> Result<Self> {
        config.check()?;
        let config = Arc::new(config);
        let capabilities = {
            let mut capabilities = Capabilities::default();
            capabilities.queue = QueueKind::Competing;
            capabilities.replies = ReplyKind::AddressPerCall;
            capabilities.absent_service = AbsentService::Kept;
            capabilities.max_payload = config.max_payload;
            capabilities.confirms = config.streams;
            capabilities.acks = config.streams;
            capabilities.ack_patterns = false;
            capabilities
        };
        let (link, state) = Link::new(config.url(), capabilities);
        let (phase, phases) = watch::channel(Phase::Down);
        let (events, told) = mpsc::unbounded_channel();
        let (commands, accepted) = mpsc::channel(WAITING_COMMANDS);
        let (handle, handles) = mpsc::channel(1);
        let (first, connected) = oneshot::channel();
        let deadline = Instant::now() + config.connect_timeout;
        let supervisor = Supervisor {
            config: config.clone(),
            state,
            phase,
            events: told,
            commands: accepted,
            handles,
            first: (!config.start_offline).then_some((first, deadline)),
            members: HashMap::new(),
            outbox: Outbox::default(),
            closing: None,
        };
        tokio::spawn(supervisor.run());
        let club = Club {
            config: config.clone(),
            events: Events(events),
            phase: phases,
        };
        let (topics, changes) = mpsc::unbounded_channel();
        tokio::spawn(Topics::new(club.clone(), changes).run());
        let transport = Self {
            lists: Mutex::default(),
            link,
            club,
            commands,
            topics,
            reader: Arc::default(),
            room: (semaphore(config.outbox), semaphore(config.outbox_bytes)),
            large: semaphore(LARGE_BYTES),
            config,
            handle,
            next: AtomicU64::new(0),
        };
        if !transport.config.start_offline {
            connected
                .await
                .unwrap_or_else(|_| Err(transport.closed("connect to")))?;
        }
        Ok(transport)
    }

    /// A best-effort command. Waits while too many wait to be written.
    async fn run(&self, mut command: Command, to: &Target) -> Result<()> {
        let size = command.bytes.len();
        if size > LARGE {
            let permits = u32::try_from(size.min(LARGE_BYTES)).unwrap_or(u32::MAX);
            let room = self.large.clone().acquire_many_owned(permits).await;
            command.room = room.ok();
        }
        self.commands.send(command).await.map_err(|_| {
            let operation = self.link.check_up("send to", to);
            operation.err().unwrap_or_else(|| self.closed("send to"))
        })
    }

    /// An at-least-once command. Waits for room in the outbox.
    async fn store(&self, command: Command, to: &Target, options: &SendOptions) -> Result<Receipt> {
        let size = command.bytes.len().min(self.config.outbox_bytes);
        let permits = u32::try_from(size).unwrap_or(u32::MAX);
        let room = async {
            let message = self.room.0.clone().acquire_owned().await;
            let bytes = self.room.1.clone().acquire_many_owned(permits).await;
            message.ok().zip(bytes.ok())
        };
        let mut watch = self.link.watch();
        let room = tokio::select! {
            room = timeout(options.timeout.unwrap_or(DEFAULT_WAIT), room) => room.map_err(|_| {
                Error::new(ErrorKind::Timeout, "publish to")
                    .at(to)
                    .because("too many messages wait for the server's confirmation")
            })?,
            _ = watch.wait_for(|state| matches!(state, LinkState::Closed { .. })) => None,
        };
        let Some(room) = room else {
            return Err(self.closed("publish to").at(to));
        };
        let (command, receipt) = command.confirmed();
        self.club.events.tell(Event::Store(Entry {
            command,
            _room: room,
        }));
        Ok(receipt)
    }

    async fn listen_topic(&self, pattern: &Pattern, options: &ListenOptions) -> Result<Inbox> {
        let at_least_once = options.delivery == Delivery::AtLeastOnce;
        let refuse = |why: &str| {
            Error::new(ErrorKind::Unsupported, "at-least-once subscription to")
                .at(pattern)
                .because(why)
        };
        if at_least_once && !self.config.streams {
            return Err(refuse("Redis keeps no topics; connect with `streams=on`"));
        }
        let stream = match (at_least_once, pattern.exact()) {
            (false, _) => None,
            (true, Some(name)) => Some(name),
            (true, None) => {
                let why = "a stream has one topic, so a pattern is possible only with best effort";
                return Err(refuse(why));
            }
        };
        let (sender, inbox) = Inbox::new(options);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (waiting, confirmed) = oneshot::channel();
        let listener = Listener {
            filter: Filter::new(pattern),
            dialect: options.dialect,
            inbox: sender.clone(),
            at_least_once,
            max_bytes: options.max_bytes,
        };
        // The task may have ended; then the change is dropped, and with it `waiting`.
        let _ = self.topics.send(Change::Listen(id, listener, waiting));
        let channel = StopTopic(id, self.topics.clone());
        let Some(name) = stream else {
            drop(sender);
            let inbox = inbox.on_drop((channel, self.handle.clone()));
            self.confirmed(confirmed, pattern).await?;
            return Ok(inbox);
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let inbox = inbox.on_drop((stop, self.handle.clone()));
        self.confirmed(confirmed, pattern).await?;
        let (waiting, confirmed) = oneshot::channel();
        let subscription = Subscription {
            stream: address::stream(&name),
            name,
            group: options.durable.clone(),
            prefetch: options.prefetch,
            inbox: sender,
            waiting: Some(waiting),
            stop: stopped,
            _channel: channel,
        };
        tokio::spawn(stream::run(subscription, self.club.join()));
        self.confirmed(confirmed, pattern).await?;
        Ok(inbox)
    }

    async fn listen_queue(&self, name: &Name, options: &ListenOptions) -> Result<Inbox> {
        // Nothing is dropped: what does not fit waits in the list.
        let options = options.clone().delivery(Delivery::AtLeastOnce);
        let (sender, inbox) = Inbox::new(&options);
        let (stop, stopped) = oneshot::channel::<()>();
        let inbox = inbox.on_drop((stop, self.handle.clone()));
        let (waiting, confirmed) = oneshot::channel();
        let queue = Queue {
            key: address::key(name),
            name: name.clone(),
            wake: format!("commlib:wake:{}", commlib_core::random_id()).into(),
            dialect: options.dialect,
            inbox: Some(sender),
            waiting: Some(waiting),
            stop: stopped,
        };
        tokio::spawn(queue::run(queue, self.club.join(), self.reader.clone()));
        self.confirmed(confirmed, name).await?;
        Ok(inbox)
    }

    async fn listen_replies(&self, options: &ListenOptions) -> Result<Inbox> {
        let (sender, inbox) = Inbox::new(options);
        let (stop, stopped) = oneshot::channel::<()>();
        let inbox = inbox.on_drop((stop, self.handle.clone()));
        let (waiting, confirmed) = oneshot::channel();
        let (commands, events) = (self.commands.clone(), self.club.events.clone());
        let lists = Arc::new(Lists::new(commands, events));
        {
            let mut all = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain(|other| other.strong_count() > 0);
            all.push(Arc::downgrade(&lists));
        }
        let replies = Replies {
            lists: lists.clone(),
            reader: self.reader.clone(),
            dialect: options.dialect,
            inbox: sender,
            waiting: Some(waiting),
            stop: stopped,
        };
        tokio::spawn(replies.run(self.club.join()));
        self.confirmed(confirmed, &Source::Replies).await?;
        Ok(inbox.with_leases(lists.leases()))
    }

    /// Waits for the word of a task that listens.
    async fn confirmed(
        &self,
        confirmed: oneshot::Receiver<Result<()>>,
        what: impl fmt::Display,
    ) -> Result<()> {
        let outcome = confirmed.await;
        outcome.unwrap_or_else(|_| Err(self.closed("listen to").at(what)))
    }

    fn closed(&self, operation: &'static str) -> Error {
        Error::new(ErrorKind::Closed, operation)
            .at(self.link.url())
            .because("the connection was closed")
    }
}

#[async_trait]
impl Transport for RedisTransport {
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
        let stored = options.delivery == Delivery::AtLeastOnce && matches!(to, Target::Topic(_));
        if !stored || matches!(self.link.state(), LinkState::Closed { .. }) {
            self.link.check_up("send to", to)?;
        }
        match to {
            Target::Topic(topic) if stored => {
                if !self.config.streams {
                    return Err(
                        Error::new(ErrorKind::Unsupported, "at-least-once publish to")
                            .at(topic)
                            .because("Redis keeps no topics; connect with `streams=on`"),
                    );
                }
                let length = self.config.stream_length;
                let command = Command::store(topic, &message, options.dialect, length)?;
                self.store(command, to, &options).await
            }
            Target::Topic(topic) => {
                let command = Command::publish(topic, &message, options.dialect)?;
                self.run(command, to).await?;
                Ok(Receipt::ready())
            }
            Target::Queue(service) => {
                let payload = envelope::encode(&message, Use::Rpc, options.dialect)?;
                let key = address::key(service);
                let (command, receipt) = Command::request(&key, &payload).confirmed();
                self.run(command, to).await?;
                self.requested(&message, &key, &payload);
                Ok(receipt)
            }
            Target::Reply(reply_to) => {
                self.run(Command::reply(reply_to, &message)?, to).await?;
                Ok(Receipt::ready())
            }
        }
    }

    async fn listen(&self, from: &Source, options: ListenOptions) -> Result<Inbox> {
        if let LinkState::Closed { .. } = self.link.state() {
            self.link.check_up("listen to", from)?;
        }
        match from {
            Source::Topic(pattern) => self.listen_topic(pattern, &options).await,
            Source::Queue(name) => self.listen_queue(name, &options).await,
            Source::Replies => self.listen_replies(&options).await,
        }
    }

    async fn close(&self) -> Result<()> {
        let (waiting, closed) = oneshot::channel();
        self.club.events.tell(Event::Close(waiting));
        // Nobody answers if it was closed before.
        closed.await.unwrap_or(Ok(()))
    }
}

impl RedisTransport {
    /// Remembers a request for as long as somebody waits for its reply.
    fn requested(&self, message: &Message, key: &[u8], payload: &Bytes) {
        if let Some(reply_to) = &message.header.reply_to {
            let call = reply_to.correlation_id.as_ref();
            let call = call.unwrap_or(&reply_to.address);
            let all = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
            for lists in all.iter().filter_map(Weak::upgrade) {
                lists.requested(call, key, payload);
            }
        }
    }
}

impl fmt::Debug for RedisTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisTransport")
            .field("config", &self.config)
            .field("state", &self.link.state())
            .finish_non_exhaustive()
    }
}

fn semaphore(permits: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS)))
}
