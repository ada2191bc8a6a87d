//! One connection to a [`MemoryBroker`].

use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use async_trait::async_trait;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::broker::{MemoryBroker, Refusal};
use crate::ack::AckReply;
use crate::address::{Name, Pattern, Source, Target};
use crate::connection::random_id;
use crate::error::{Error, ErrorKind, Result};
use crate::inbox::{Inbox, InboxSender};
use crate::link::{Link, LinkState, ReplyKind};
use crate::message::{Message, ReplyTo};
use crate::receipt::Receipt;
use crate::reply::{Leases, ReplyLease};
use crate::transport::{Delivery, ListenOptions, SendOptions, Transport};

/// A connection to a broker in this process.
#[derive(Debug)]
pub struct MemoryTransport {
    broker: Arc<MemoryBroker>,
    link: Link,
    state: Arc<watch::Sender<LinkState>>,
    id: String,
    /// What is listening, to be ended by `close`. Inboxes take themselves out when they are dropped.
    listening: Arc<Mutex<Vec<Weak<Listening>>>>,
    /// Keeps `state` up to date; ends with the connection.
    _follow: JoinSet<()>,
}

impl MemoryTransport {
    /// A connection to a broker. Must be called within a tokio runtime.
    pub fn new(broker: Arc<MemoryBroker>) -> Self {
        let url = format!("memory:{}", broker.name());
        let (link, state) = Link::new(url, broker.capabilities().clone());
        let state = Arc::new(state);
        let mut follow = JoinSet::new();
        follow.spawn(copy_states(&broker, state.clone()));
        Self {
            broker,
            link,
            state,
            id: format!("rpc-{}", random_id()),
            listening: Arc::default(),
            _follow: follow,
        }
    }

    /// The broker it is connected to.
    pub fn broker(&self) -> &Arc<MemoryBroker> {
        &self.broker
    }

    async fn publish(&self, topic: &Name, message: &Message, options: &SendOptions) -> Result<()> {
        if options.delivery == Delivery::BestEffort {
            self.link.check_up("publish to", topic)?;
            // Best effort is never refused for want of room.
            let _ = self.broker.tables().publish(topic, message, false);
            return Ok(());
        }
        if !self.link.capabilities().confirms {
            return Err(unsupported("at-least-once publish to", topic));
        }
        let taken = self.publish_until_taken(topic, message);
        let Some(limit) = options.timeout else {
            return taken.await;
        };
        tokio::time::timeout(limit, taken)
            .await
            .unwrap_or_else(|_| {
                Err(Error::new(ErrorKind::Timeout, "publish to")
                    .at(topic)
                    .because("an at-least-once subscriber has no room, or the broker is down"))
            })
    }

    async fn publish_until_taken(&self, topic: &Name, message: &Message) -> Result<()> {
        loop {
            // Registered before the look, so that room made in between is not missed.
            let room = self.broker.room.notified();
            // The sender lives as long as `self`.
            let mut watch = self.link.watch();
            let settled = |state: &LinkState| !matches!(state, LinkState::Reconnecting { .. });
            let _ = watch.wait_for(settled).await;
            self.link.check_up("publish to", topic)?;
            let outcome = self.broker.tables().publish(topic, message, true);
            match outcome {
                Err(Refusal::Full) => room.await,
                Ok(()) | Err(Refusal::NoService) => return Ok(()),
            }
        }
    }

    fn request(&self, service: &Name, message: Message) -> Result<()> {
        self.link.check_up("request to", service)?;
        let outcome = self
            .broker
            .tables()
            .request(service, message, self.link.capabilities());
        outcome.map_err(|refusal| match refusal {
            Refusal::NoService => Error::new(ErrorKind::NoService, "request to")
                .at(service)
                .because("nobody serves this name"),
            Refusal::Full => Error::new(ErrorKind::Broker, "request to")
                .at(service)
                .because("too many requests wait for a service of this name"),
        })
    }

    fn reply(&self, to: &ReplyTo, message: Message) -> Result<()> {
        self.link.check_up("reply to", &to.address)?;
        let (owner, key) = match self.link.capabilities().replies {
            ReplyKind::AddressPerCall => to.address.split_once('/').unwrap_or((&to.address, "")),
            ReplyKind::CorrelationId => (
                &*to.address,
                to.correlation_id.as_deref().unwrap_or_default(),
            ),
        };
        let name = Name::from_foreign([to.address.as_bytes()]);
        self.broker
            .tables()
            .reply(owner, name, key.to_owned(), message);
        Ok(())
    }

    fn listen_topic(&self, pattern: &Pattern, options: &ListenOptions) -> Result<Inbox> {
        let (sender, inbox) = Inbox::new(options);
        let mut tables = self.broker.tables();
        if options.delivery == Delivery::BestEffort {
            let id = tables.add_best_effort(pattern.clone(), sender.clone());
            drop(tables);
            return Ok(self.guard(inbox, sender, Place::Topic(id)));
        }
        if !self.link.capabilities().acks {
            drop(tables);
            return Err(unsupported("at-least-once subscription to", pattern));
        }
        let Some(id) = tables.add_at_least_once(pattern, options.durable.as_ref()) else {
            drop(tables);
            return Err(Error::new(ErrorKind::Broker, "subscription to")
                .at(pattern)
                .because("somebody else listens to the durable subscription of this name"));
        };
        let (acks, replies) = mpsc::unbounded_channel();
        if let Some(acked) = tables.acked(id) {
            acked.attach(sender.clone(), options.prefetch, acks);
        }
        drop(tables);
        let replies = Arc::new(Mutex::new(replies));
        tokio::spawn(settle(Arc::downgrade(&self.broker), id, replies.clone()));
        Ok(self.guard(inbox, sender, Place::Acked(id, replies)))
    }

    fn listen_queue(&self, service: &Name, options: &ListenOptions) -> Inbox {
        let (sender, inbox) = Inbox::new(options);
        let id = self.broker.tables().add_service(service, sender.clone());
        self.guard(inbox, sender, Place::Queue(service.clone(), id))
    }

    fn listen_replies(&self, options: &ListenOptions) -> Inbox {
        let (sender, inbox) = Inbox::new(options);
        self.broker
            .tables()
            .add_replies(self.id.clone(), sender.clone());
        let (id, next) = (self.id.clone(), AtomicU64::new(0));
        let kind = self.link.capabilities().replies;
        let leases = Leases::new(move |_| {
            let key = next.fetch_add(1, Ordering::Relaxed).to_string();
            match kind {
                ReplyKind::AddressPerCall => ReplyLease::new(format!("{id}/{key}"), key),
                ReplyKind::CorrelationId => ReplyLease::new(&*id, key).correlated(),
            }
        });
        self.guard(inbox, sender, Place::Replies(self.id.clone()))
            .with_leases(leases)
    }

    fn check_open(&self, from: &Source) -> Result<()> {
        match self.link.state() {
            LinkState::Closed { .. } => self.link.check_up("listen to", from),
            _ => Ok(()),
        }
    }

    /// Ties the end of the inbox to its place at the broker, both ways.
    fn guard(&self, inbox: Inbox, sender: InboxSender, place: Place) -> Inbox {
        let listening = Arc::new(Listening {
            broker: self.broker.clone(),
            place: Mutex::new(Some((place, sender))),
        });
        let mut all = self
            .listening
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        all.retain(|other| other.strong_count() > 0);
        all.push(Arc::downgrade(&listening));
        drop(all);
        inbox.on_drop(listening)
    }
}

#[async_trait]
impl Transport for MemoryTransport {
    fn link(&self) -> &Link {
        &self.link
    }

    async fn send(&self, to: &Target, message: Message, options: SendOptions) -> Result<Receipt> {
        let max = self.link.capabilities().max_payload;
        if message.data.len() > max {
            return Err(Error::new(ErrorKind::TooLarge, "message to")
                .at(to)
                .because(format_args!(
                    "{} bytes are more than the limit of {max}",
                    message.data.len()
                )));
        }
        match to {
            Target::Topic(topic) => self.publish(topic, &message, &options).await?,
            Target::Queue(service) => self.request(service, message)?,
            Target::Reply(reply_to) => self.reply(reply_to, message)?,
        }
        Ok(Receipt::ready())
    }

    async fn listen(&self, from: &Source, options: ListenOptions) -> Result<Inbox> {
        self.check_open(from)?;
        let inbox = match from {
            Source::Topic(pattern) => self.listen_topic(pattern, &options)?,
            Source::Queue(service) => self.listen_queue(service, &options),
            Source::Replies => self.listen_replies(&options),
        };
        // A `close` at the same time may have missed it.
        self.check_open(from)?;
        Ok(inbox)
    }

    async fn close(&self) -> Result<()> {
        self.state.send_replace(LinkState::Closed {
            cause: "closed by this side".into(),
        });
        let all = std::mem::take(
            &mut *self
                .listening
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for listening in all.iter().filter_map(Weak::upgrade) {
            listening.end();
        }
        // Publishers that wait for room learn that there will be none.
        self.broker.room.notify_waiters();
        Ok(())
    }
}

type AckReplies = Arc<Mutex<mpsc::UnboundedReceiver<AckReply>>>;

/// Brings acks to their subscription until all of them have been given.
async fn settle(broker: Weak<MemoryBroker>, id: u64, replies: AckReplies) {
    // Taken and settled under one lock, so that the end of the subscription sees every ack that was given before it.
    let next = || {
        poll_fn(|context| {
            let mut replies = replies.lock().unwrap_or_else(PoisonError::into_inner);
            replies.poll_recv(context).map(|reply| {
                let (reply, broker) = (reply?, broker.upgrade()?);
                if let Some(acked) = broker.tables().acked(id) {
                    acked.settle(reply);
                }
                Some(broker)
            })
        })
    };
    while let Some(broker) = next().await {
        broker.room.notify_waiters();
    }
}

/// Copies the broker's state to a link, now and whenever it changes, unless the link is closed.
fn copy_states(
    broker: &MemoryBroker,
    link: Arc<watch::Sender<LinkState>>,
) -> impl Future<Output = ()> + use<> {
    let mut states = broker.state.subscribe();
    let copy = move |state: &LinkState| {
        link.send_if_modified(|current| {
            let open = !matches!(current, LinkState::Closed { .. });
            if open {
                current.clone_from(state);
            }
            open
        });
    };
    copy(&states.borrow_and_update());
    async move {
        while states.changed().await.is_ok() {
            let state = states.borrow_and_update().clone();
            copy(&state);
        }
    }
}

#[derive(Debug)]
enum Place {
    Topic(u64),
    Acked(u64, AckReplies),
    Queue(Name, u64),
    Replies(String),
}

/// Something that listens: takes itself out of the broker's tables when dropped.
#[derive(Debug)]
struct Listening {
    broker: Arc<MemoryBroker>,
    place: Mutex<Option<(Place, InboxSender)>>,
}

impl Listening {
    fn end(&self) {
        let place = self
            .place
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some((place, _sender)) = place else {
            return;
        };
        let tables = || self.broker.tables();
        match place {
            Place::Topic(id) => tables().remove_listener(id),
            Place::Acked(id, replies) => {
                // Acks that were given before the end count. The locks are taken in the order of `settle`.
                let mut replies = replies.lock().unwrap_or_else(PoisonError::into_inner);
                let mut tables = tables();
                if let Some(acked) = tables.acked(id) {
                    while let Ok(reply) = replies.try_recv() {
                        acked.settle(reply);
                    }
                }
                tables.remove_listener(id);
            }
            Place::Queue(service, id) => tables().remove_service(&service, id),
            Place::Replies(owner) => tables().remove_replies(&owner),
        }
        self.broker.room.notify_waiters();
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.end();
    }
}

fn unsupported(operation: &'static str, address: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Unsupported, operation)
        .at(address)
        .because("this broker was made without that capability")
}
