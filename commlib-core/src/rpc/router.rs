//! Brings replies to the calls that wait for them. One per connection, started by the first call.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use super::pending::Pending;
use crate::address::{Name, Source};
use crate::error::{Error, ErrorKind, Result};
use crate::inbox::{GapCause, Inbox, Incoming};
use crate::message::{Dialect, Message};
use crate::reply::{Leases, ReplyLease};
use crate::transport::{ListenOptions, Transport};

/// Replies that may wait to be brought to their calls. Bringing them is quick, so it never fills in practice;
/// a reply that finds it full is lost and its call times out.
const WAITING_REPLIES: usize = 65_536;

type Waiter = oneshot::Sender<Result<Message>>;
type Calls = Arc<Mutex<Pending<Waiter>>>;

/// The listener for replies and the calls that wait for them.
#[derive(Debug)]
pub(crate) struct ReplyRouter {
    leases: Leases,
    inbox: Arc<Mutex<Inbox>>,
    calls: Calls,
    task: AbortHandle,
}

impl Drop for ReplyRouter {
    fn drop(&mut self) {
        // Its inbox would keep the link of a dropped connection alive.
        self.task.abort();
    }
}

/// One call that waits. Dropping it forgets the call and gives back its reply address.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) lease: ReplyLease,
    reply: oneshot::Receiver<Result<Message>>,
    calls: Calls,
}

impl ReplyRouter {
    pub(crate) async fn start(transport: &dyn Transport, dialect: Dialect) -> Result<Self> {
        let options = ListenOptions::default()
            .dialect(dialect)
            .prefetch(WAITING_REPLIES)
            .max_bytes(64 << 20);
        let inbox = transport.listen(&Source::Replies, options).await?;
        let leases = inbox.leases().ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, "calls over")
                .at(transport.link().url())
                .because("its transport leases no reply addresses")
        })?;
        let calls = Arc::new(Mutex::new(Pending::new()));
        let inbox = Arc::new(Mutex::new(inbox));
        let task = tokio::spawn(route(inbox.clone(), calls.clone())).abort_handle();
        Ok(Self {
            leases,
            inbox,
            calls,
            task,
        })
    }

    /// Prepares for the reply to one call to a service.
    pub(super) fn wait(&self, service: &Name) -> Result<Waiting> {
        let lease = self.leases.lease(service);
        let (waiter, reply) = oneshot::channel();
        // What has arrived is older than this call: a lost link that nobody has looked at yet must not fail it.
        let mut inbox = lock(&self.inbox);
        while let Some(incoming) = inbox.try_recv() {
            bring(incoming, &self.calls);
        }
        lock(&self.calls)
            .register(lease.key.clone(), waiter)
            .map_err(|_| closed())?;
        Ok(Waiting {
            lease,
            reply,
            calls: self.calls.clone(),
        })
    }
}

impl Waiting {
    /// The reply, or why none can come. Cancel safe.
    pub(super) async fn reply(&mut self) -> Result<Message> {
        (&mut self.reply).await.unwrap_or_else(|_| Err(closed()))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        lock(&self.calls).take(&self.lease.key);
    }
}

async fn route(inbox: Arc<Mutex<Inbox>>, calls: Calls) {
    // Taken and brought under one lock, which new calls take as well.
    let next = || {
        poll_fn(|context| {
            let mut inbox = lock(&inbox);
            inbox
                .poll_recv(context)
                .map(|incoming| incoming.map(|incoming| bring(incoming, &calls)))
        })
    };
    while next().await.is_some() {}
    for waiter in lock(&calls).close() {
        let _ = waiter.send(Err(closed().possibly_executed()));
    }
}

/// Brings a reply to its call, or a lost link to all of them.
fn bring(incoming: Incoming, calls: &Calls) {
    match incoming {
        Incoming::Message(arrival) => {
            let waiter = arrival.key.and_then(|key| lock(calls).take(&key));
            match waiter {
                // The caller may have given up in this very moment.
                Some(waiter) => drop(waiter.send(Ok(arrival.message))),
                None => tracing::debug!(reply = %arrival.name, "late or repeated reply"),
            }
        }
        Incoming::Malformed(malformed) => {
            let waiter = malformed.key.and_then(|key| lock(calls).take(&key));
            match waiter {
                Some(waiter) => drop(waiter.send(Err(malformed.error))),
                None => tracing::warn!(error = %malformed.error, "unreadable reply"),
            }
        }
        Incoming::Gap(gap) if gap.cause == GapCause::LinkLost => {
            for waiter in lock(calls).drain() {
                let error = Error::new(ErrorKind::ConnectionLost, "call over a link")
                    .because("the link was lost before the reply came; the service may have acted on the request")
                    .possibly_executed();
                let _ = waiter.send(Err(error));
            }
        }
        Incoming::Gap(gap) => tracing::warn!(missed = gap.missed, "replies were lost"),
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "call").because("the connection was closed")
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
