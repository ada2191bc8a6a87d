//! Publish and subscribe.

mod handler;
mod publisher;
mod sequence;
mod subscriber;

use std::future::Future;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::Result;
use crate::scope::Scoped;
use crate::transport::Delivery;

pub use handler::{MessageHandler, Outcome};
pub use publisher::{MultiPublisher, Publisher, PublisherOptions};
pub use subscriber::{Received, Subscriber, SubscriberOptions};

/// What an endpoint promises. Asking for more than broker and session can give fails when the endpoint is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Guarantee {
    /// How sure delivery is.
    pub delivery: Delivery,
    /// Whether the broker keeps messages for this subscription while nobody listens.
    pub durable: bool,
}

/// Makes publishers and subscribers. Implemented by [`Connection`](crate::Connection) and [`Node`](crate::Node).
pub trait PubSub: Scoped {
    /// A publisher on one topic, best effort.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidAddress`](crate::ErrorKind::InvalidAddress) for a bad name.
    #[doc(alias = "create_publisher")]
    fn publisher<T: Serialize + Sync>(&self, topic: &str) -> Result<Publisher<T>> {
        self.publisher_with(topic, PublisherOptions::default())
    }

    /// A publisher on one topic with options.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidAddress`](crate::ErrorKind::InvalidAddress) for a bad name,
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if the broker cannot give the delivery.
    fn publisher_with<T: Serialize + Sync>(
        &self,
        topic: &str,
        options: PublisherOptions,
    ) -> Result<Publisher<T>> {
        Publisher::new(&self.scope(), topic, &options)
    }

    /// A publisher that names the topic with each message, best effort.
    ///
    /// # Errors
    /// None with default options; see [`multi_publisher_with`](Self::multi_publisher_with).
    #[doc(alias = "create_mpublisher")]
    fn multi_publisher<T: Serialize + Sync>(&self) -> Result<MultiPublisher<T>> {
        self.multi_publisher_with(PublisherOptions::default())
    }

    /// A publisher that names the topic with each message, with options.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if the broker cannot give the delivery.
    fn multi_publisher_with<T: Serialize + Sync>(
        &self,
        options: PublisherOptions,
    ) -> Result<MultiPublisher<T>> {
        MultiPublisher::new(self.scope(), &options)
    }

    /// Subscribes to a name or pattern, best effort. Resolves once the broker has confirmed it: what is published
    /// after that arrives. Cancel safe: a cancelled subscription is undone.
    ///
    /// # Errors
    /// See [`subscriber_with`](Self::subscriber_with).
    #[doc(alias = "create_subscriber")]
    #[doc(alias = "create_psubscriber")]
    fn subscriber<T: DeserializeOwned>(
        &self,
        pattern: &str,
    ) -> impl Future<Output = Result<Subscriber<T>>> + Send {
        self.subscriber_with(pattern, SubscriberOptions::default())
    }

    /// Subscribes to a name or pattern, with options. Cancel safe: a cancelled subscription is undone.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidAddress`](crate::ErrorKind::InvalidAddress) for a bad pattern,
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if broker and session cannot give the delivery,
    /// [`ErrorKind::Broker`](crate::ErrorKind::Broker) if the broker refuses,
    /// [`ErrorKind::Closed`](crate::ErrorKind::Closed) after the end of the connection.
    fn subscriber_with<T: DeserializeOwned>(
        &self,
        pattern: &str,
        options: SubscriberOptions,
    ) -> impl Future<Output = Result<Subscriber<T>>> + Send {
        let scope = self.scope();
        let pattern = scope.pattern(pattern);
        async move { Subscriber::start(scope, pattern?, options).await }
    }
}

impl<S: Scoped> PubSub for S {}
