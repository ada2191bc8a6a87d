//! Publishers: typed values in, messages with a count per topic out.

use std::fmt;
use std::marker::PhantomData;

use bytes::Bytes;
use serde::Serialize;

use super::Guarantee;
use crate::address::{Name, Target};
use crate::codec::{self, Value};
use crate::connection::{Connection, Sequence};
use crate::error::{Error, ErrorKind, Result};
use crate::message::Dialect;
use crate::receipt::Receipt;
use crate::scope::Scope;
use crate::transport::{Delivery, SendOptions};

/// Options of a [`Publisher`] or [`MultiPublisher`].
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct PublisherOptions {
    /// How sure delivery is. Default: best effort.
    pub delivery: Delivery,
    /// How messages are written. Default: as the connection says.
    pub dialect: Option<Dialect>,
}

impl PublisherOptions {
    /// Sets the delivery.
    #[must_use]
    pub fn delivery(mut self, delivery: Delivery) -> Self {
        self.delivery = delivery;
        self
    }

    /// Sets the dialect.
    #[must_use]
    pub fn dialect(mut self, dialect: Dialect) -> Self {
        self.dialect = Some(dialect);
        self
    }

    fn check(&self, connection: &Connection) -> Result<SendOptions> {
        let link = connection.link();
        if self.delivery == Delivery::AtLeastOnce && !link.capabilities().confirms {
            return Err(
                Error::new(ErrorKind::Unsupported, "at-least-once publisher on")
                    .at(link.url())
                    .because("this broker confirms nothing"),
            );
        }
        Ok(SendOptions::default()
            .delivery(self.delivery)
            .dialect(self.dialect.unwrap_or_else(|| connection.dialect())))
    }
}

/// Publishes values on one topic.
///
/// Messages of one publisher and its clones arrive in order. It may be shared between tasks, and is cheap to clone.
#[must_use]
pub struct Publisher<T = Value> {
    outlet: Outlet,
    topic: Target,
    name: Name,
    sequence: Option<Sequence>,
    value: PhantomData<fn(&T)>,
}

/// Publishes values on topics that are named with each message. Cheap to clone.
#[doc(alias = "MPublisher")]
#[doc(alias = "WPublisher")]
#[must_use]
pub struct MultiPublisher<T = Value> {
    outlet: Outlet,
    scope: Scope,
    value: PhantomData<fn(&T)>,
}

/// What both kinds of publisher do.
#[derive(Clone)]
struct Outlet {
    connection: Connection,
    options: SendOptions,
}

impl<T: Serialize + Sync> Publisher<T> {
    pub(super) fn new(scope: &Scope, topic: &str, options: &PublisherOptions) -> Result<Self> {
        let name = scope.name(topic)?;
        Ok(Self {
            outlet: Outlet::new(scope, options)?,
            topic: Target::Topic(name.clone()),
            sequence: scope.connection().sequence(&name),
            name,
            value: PhantomData,
        })
    }

    /// Publishes a value and waits for what the guarantee says: best effort until it is handed over here, at least
    /// once until the broker has confirmed it.
    ///
    /// Not cancel safe in this: a cancelled `publish` may have sent the message.
    ///
    /// # Errors
    /// [`ErrorKind::Encode`], [`ErrorKind::TooLarge`], [`ErrorKind::Closed`]; best effort also
    /// [`ErrorKind::ConnectionLost`] while the link is down; at least once also [`ErrorKind::Broker`] if it was refused.
    /// At least once has no time limit: it waits for the link to come back.
    pub async fn publish(&self, value: &T) -> Result<()> {
        let receipt = self.enqueue(value).await?;
        self.outlet.confirmed(receipt).await
    }

    /// Hands a value over and returns the receipt of the broker's confirmation: the way to have many messages under
    /// way. At least once waits for room in the outbox.
    ///
    /// # Errors
    /// As [`publish`](Self::publish), but for what comes with the receipt.
    pub async fn enqueue(&self, value: &T) -> Result<Receipt> {
        let data = codec::encode(value)?;
        self.outlet
            .send(&self.topic, self.sequence.as_ref(), data)
            .await
    }

    /// The topic, with the namespace.
    pub fn topic(&self) -> &Name {
        &self.name
    }

    /// What it promises.
    pub fn guarantee(&self) -> Guarantee {
        self.outlet.guarantee()
    }
}

impl<T: Serialize + Sync> MultiPublisher<T> {
    pub(super) fn new(scope: Scope, options: &PublisherOptions) -> Result<Self> {
        Ok(Self {
            outlet: Outlet::new(&scope, options)?,
            scope,
            value: PhantomData,
        })
    }

    /// Publishes a value on a topic; see [`Publisher::publish`].
    ///
    /// # Errors
    /// As [`Publisher::publish`], and [`ErrorKind::InvalidAddress`] for a bad name.
    pub async fn publish(&self, topic: &str, value: &T) -> Result<()> {
        let receipt = self.enqueue(topic, value).await?;
        self.outlet.confirmed(receipt).await
    }

    /// Hands a value over; see [`Publisher::enqueue`].
    ///
    /// # Errors
    /// As [`Publisher::enqueue`], and [`ErrorKind::InvalidAddress`] for a bad name.
    pub async fn enqueue(&self, topic: &str, value: &T) -> Result<Receipt> {
        let name = self.scope.name(topic)?;
        let data = codec::encode(value)?;
        let sequence = self.outlet.connection.sequence(&name);
        self.outlet
            .send(&Target::Topic(name), sequence.as_ref(), data)
            .await
    }

    /// What it promises.
    pub fn guarantee(&self) -> Guarantee {
        self.outlet.guarantee()
    }
}

impl Outlet {
    fn new(scope: &Scope, options: &PublisherOptions) -> Result<Self> {
        Ok(Self {
            options: options.check(scope.connection())?,
            connection: scope.connection().clone(),
        })
    }

    async fn send(&self, to: &Target, sequence: Option<&Sequence>, data: Bytes) -> Result<Receipt> {
        let mut message = self.connection.message(data);
        let transport = self.connection.transport();
        let Some(sequence) = sequence else {
            return transport.send(to, message, self.options.clone()).await;
        };
        let mut last = sequence.lock().await;
        message.header.seq = Some(*last + 1);
        let receipt = transport.send(to, message, self.options.clone()).await?;
        // Only what was accepted counts: a refused message leaves no gap.
        *last += 1;
        Ok(receipt)
    }

    async fn confirmed(&self, receipt: Receipt) -> Result<()> {
        match self.options.delivery {
            Delivery::BestEffort => Ok(()),
            Delivery::AtLeastOnce => receipt.await,
        }
    }

    fn guarantee(&self) -> Guarantee {
        Guarantee {
            delivery: self.options.delivery,
            durable: false,
        }
    }
}

impl<T> Clone for Publisher<T> {
    fn clone(&self) -> Self {
        Self {
            outlet: self.outlet.clone(),
            topic: self.topic.clone(),
            name: self.name.clone(),
            sequence: self.sequence.clone(),
            value: PhantomData,
        }
    }
}

impl<T> Clone for MultiPublisher<T> {
    fn clone(&self) -> Self {
        Self {
            outlet: self.outlet.clone(),
            scope: self.scope.clone(),
            value: PhantomData,
        }
    }
}

impl<T> fmt::Debug for Publisher<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher")
            .field("topic", &self.name)
            .field("delivery", &self.outlet.options.delivery)
            .finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for MultiPublisher<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MultiPublisher")
            .field("delivery", &self.outlet.options.delivery)
            .finish_non_exhaustive()
    }
}
