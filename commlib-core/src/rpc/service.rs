//! The serving side: takes requests, runs handlers side by side, answers every caller.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::handler::{Erased, RpcContext};
use super::window::{ReplyWindow, RequestKey, Seen, request_key};
use crate::ack::Ack;
use crate::address::{Name, Source, Target};
use crate::connection::Connection;
use crate::error::{ErrorKind, Result};
use crate::inbox::{Arrival, Inbox, Incoming};
use crate::message::{Header, Message, ReplyTo, RpcError};
use crate::panic::catch;
use crate::tasks::Stop;
use crate::transport::{ListenOptions, SendOptions};

/// How long a request is remembered whose caller did not say how long it waits.
const DEFAULT_KEEP: Duration = Duration::from_secs(30);

/// Requests that may wait to be looked at. They leave the inbox at once, so that one too many for a small queue is
/// answered and not lost in a burst.
const MIN_INBOX: usize = 16_384;

/// Options of an RPC service.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RpcServiceOptions {
    /// How many requests are handled at a time. Default: 32.
    pub concurrency: usize,
    /// How many more may wait for their turn; one that finds no room is answered with [`RpcError::OVERLOADED`].
    /// Default: 1,024.
    pub queue_limit: usize,
    /// How many recent requests are remembered with their replies, so that one that comes twice runs once. Default:
    /// 1,024; also bounded by 8 MiB of replies and by the caller's timeout.
    pub reply_window: usize,
}

impl Default for RpcServiceOptions {
    fn default() -> Self {
        Self {
            concurrency: 32,
            queue_limit: 1024,
            reply_window: 1024,
        }
    }
}

impl RpcServiceOptions {
    /// Sets how many requests are handled at a time.
    #[must_use]
    pub fn concurrency(mut self, concurrency: usize) -> Self {
        self.concurrency = concurrency;
        self
    }

    /// Sets how many requests may wait for their turn.
    #[must_use]
    pub fn queue_limit(mut self, queue_limit: usize) -> Self {
        self.queue_limit = queue_limit;
        self
    }

    /// Sets how many recent requests are remembered.
    #[must_use]
    pub fn reply_window(mut self, reply_window: usize) -> Self {
        self.reply_window = reply_window;
        self
    }
}

/// A service whose requests arrive already.
pub(super) struct Service {
    shared: Arc<Shared>,
    inbox: Inbox,
    options: RpcServiceOptions,
    waiting: VecDeque<Request>,
    running: JoinSet<()>,
}

/// What running handlers share.
struct Shared {
    connection: Connection,
    name: Name,
    handler: Erased,
    window: Mutex<ReplyWindow>,
}

struct Request {
    header: Header,
    data: Bytes,
    reply_to: ReplyTo,
    key: Option<RequestKey>,
    deadline: Option<Instant>,
    ack: Option<Ack>,
}

impl Service {
    pub(super) async fn listen(
        connection: &Connection,
        name: Name,
        options: RpcServiceOptions,
        handler: Erased,
    ) -> Result<Self> {
        let at_once = options.queue_limit.saturating_add(options.concurrency);
        let listen = ListenOptions::default()
            .dialect(connection.dialect())
            .prefetch(at_once.max(MIN_INBOX))
            .max_bytes(64 << 20);
        let inbox = connection
            .transport()
            .listen(&Source::Queue(name.clone()), listen)
            .await?;
        Ok(Self {
            shared: Arc::new(Shared {
                connection: connection.clone(),
                name,
                handler,
                window: Mutex::new(ReplyWindow::new(options.reply_window)),
            }),
            inbox,
            options,
            waiting: VecDeque::new(),
            running: JoinSet::new(),
        })
    }

    /// Serves until it is stopped or the connection is closed; then waits for what runs.
    pub(super) async fn run(mut self, mut stop: Stop) {
        loop {
            tokio::select! {
                biased;
                () = stop.stopped() => break,
                Some(_) = self.running.join_next(), if !self.running.is_empty() => {}
                incoming = self.inbox.recv() => match incoming {
                    None => break,
                    Some(incoming) => self.take(incoming),
                },
            }
            self.start_waiting();
        }
        self.inbox.stop();
        while let Some(incoming) = self.inbox.try_recv() {
            self.take(incoming);
        }
        for request in std::mem::take(&mut self.waiting) {
            // With a duty to acknowledge, dropping it sends the request to another service.
            if request.ack.is_none() {
                let stopping = RpcError::new(RpcError::UNAVAILABLE, "the service is stopping");
                self.refuse(request, stopping);
            }
        }
        while self.running.join_next().await.is_some() {}
    }

    fn take(&mut self, incoming: Incoming) {
        let service = &self.shared.name;
        match incoming {
            Incoming::Message(arrival) => self.take_request(arrival),
            Incoming::Gap(gap) => {
                tracing::warn!(%service, missed = gap.missed, cause = ?gap.cause, "requests were missed");
            }
            Incoming::Malformed(malformed) => {
                tracing::warn!(%service, error = %malformed.error, "unreadable request");
            }
        }
    }

    fn take_request(&mut self, arrival: Arrival) {
        let mut header = arrival.message.header;
        let Some(reply_to) = header.reply_to.take() else {
            tracing::warn!(service = %self.shared.name, "request without a reply address ignored");
            if let Some(ack) = arrival.ack {
                ack.accept();
            }
            return;
        };
        let timeout = header.timeout_ms.map(Duration::from_millis);
        let key = request_key(&header);
        let mut request = Request {
            data: arrival.message.data,
            reply_to,
            deadline: timeout.and_then(|timeout| Instant::now().checked_add(timeout)),
            key,
            ack: arrival.ack,
            header,
        };
        if let Some(key) = &request.key {
            let now = Instant::now().into_std();
            let seen = self
                .shared
                .window()
                .note(key, now, timeout.unwrap_or(DEFAULT_KEEP));
            match seen {
                Seen::New => {}
                Seen::Running => {
                    if let Some(ack) = request.ack.take() {
                        ack.accept();
                    }
                    return;
                }
                Seen::Answered(reply) => {
                    let shared = self.shared.clone();
                    self.running
                        .spawn(async move { shared.send(request, *reply).await });
                    return;
                }
            }
        }
        if self.waiting.len() >= self.options.queue_limit.max(1) {
            let limit = self.options.queue_limit;
            let full = RpcError::new(
                RpcError::OVERLOADED,
                format_args!("{limit} requests are waiting already"),
            );
            self.refuse(request, full);
        } else {
            self.waiting.push_back(request);
        }
    }

    fn start_waiting(&mut self) {
        while self.running.len() < self.options.concurrency.max(1) {
            let Some(request) = self.waiting.pop_front() else {
                return;
            };
            if request
                .deadline
                .is_some_and(|deadline| deadline <= Instant::now())
            {
                let late = RpcError::new(
                    RpcError::DEADLINE_EXCEEDED,
                    "the request waited longer than its caller does",
                );
                self.refuse(request, late);
                continue;
            }
            let shared = self.shared.clone();
            self.running
                .spawn(async move { shared.handle(request).await });
        }
    }

    /// Answers a request that is not run, and forgets it, so that it may be tried again.
    fn refuse(&mut self, request: Request, error: RpcError) {
        if let Some(key) = &request.key {
            self.shared.window().forget(key);
        }
        let shared = self.shared.clone();
        self.running.spawn(async move {
            let reply = shared.reply(&request.reply_to, Err(error));
            shared.send(request, reply).await;
        });
    }
}

impl Shared {
    async fn handle(&self, mut request: Request) {
        let context = RpcContext {
            service: self.name.clone(),
            header: std::mem::take(&mut request.header),
            deadline: request.deadline,
        };
        let data = std::mem::take(&mut request.data);
        let outcome = match catch((self.handler)(data, context)).await {
            Ok(outcome) => outcome,
            Err(panic) => {
                tracing::error!(service = %self.name, %panic, "service handler panicked");
                Err(RpcError::new(RpcError::PANIC, panic))
            }
        };
        let reply = self.reply(&request.reply_to, outcome);
        if let Some(key) = &request.key {
            self.window().answered(key, reply.clone());
        }
        self.send(request, reply).await;
    }

    fn reply(&self, reply_to: &ReplyTo, outcome: Result<Bytes, RpcError>) -> Message {
        // Old peers expect an object even where they do not look.
        let (data, error) = match outcome {
            Ok(data) => (data, None),
            Err(error) => (Bytes::from_static(b"{}"), Some(error)),
        };
        let mut reply = self.connection.message(data);
        reply
            .header
            .correlation_id
            .clone_from(&reply_to.correlation_id);
        reply.header.error = error;
        reply
    }

    /// Sends a reply, then acknowledges the request.
    async fn send(&self, request: Request, reply: Message) {
        let target = Target::Reply(request.reply_to);
        let transport = self.connection.transport();
        let mut sent = transport.send(&target, reply, SendOptions::default()).await;
        if let Err(error) = &sent
            && error.kind() == ErrorKind::TooLarge
            && let Target::Reply(reply_to) = &target
        {
            // The caller should not wait for a reply that cannot be sent.
            let error = RpcError::new(RpcError::INTERNAL, error);
            let reply = self.reply(reply_to, Err(error));
            sent = transport.send(&target, reply, SendOptions::default()).await;
        }
        match sent {
            Ok(receipt) => drop(receipt),
            Err(error) => tracing::warn!(service = %self.name, %error, "reply was not sent"),
        }
        if let Some(ack) = request.ack {
            ack.accept();
        }
    }

    fn window(&self) -> MutexGuard<'_, ReplyWindow> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
