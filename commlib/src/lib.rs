//! One messaging API for any broker; the broker is a URL.
//!
//! ```
//! use commlib::prelude::*;
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Debug, Serialize, Deserialize)]
//! struct Sonar {
//!     distance: f64,
//! }
//!
//! #[tokio::main]
//! async fn main() -> commlib::Result<()> {
//!     // `mqtt://localhost:1883` runs the same program on an MQTT broker.
//!     let connection = commlib::connect("memory:").await?;
//!
//!     // Publish and subscribe. A trailing `*` stands for one or more segments.
//!     let mut readings = connection.subscriber::<Sonar>("sensors.*").await?;
//!     let sonar = connection.publisher("sensors.sonar.front")?;
//!     sonar.publish(&Sonar { distance: 1.2 }).await?;
//!     if let Some(reading) = readings.recv().await {
//!         let reading = reading?;
//!         assert_eq!(reading.topic.as_str(), "sensors.sonar.front");
//!         assert_eq!(reading.data.distance, 1.2);
//!     }
//!
//!     // Serve and call. The service runs for as long as its handle is held.
//!     let _adder = connection
//!         .rpc_service("math.add", |(a, b): (i64, i64)| async move {
//!             a.checked_add(b)
//!                 .ok_or_else(|| RpcError::new("overflow", "the sum has no 64 bits"))
//!         })
//!         .await?;
//!     let sum: i64 = connection.rpc_client("math.add")?.call(&(1, 2)).await?;
//!     assert_eq!(sum, 3);
//!
//!     connection.close().await
//! }
//! ```
//!
//! # Where to look
//! * [`connect`] makes a [`Connection`]; a [`Node`] adds a name and a namespace. Both make endpoints through the traits
//!   [`PubSub`] and [`Rpc`].
//! * [`Delivery`] tells best effort from at least once; every endpoint answers what it really gives.
//! * [`Dialect`] is for fleets of commlib-py programs.
//! * Settings that stand in the query of a URL are fields of the broker's config, such as `MqttConfig`, as well.
//!
//! # Brokers
//! | URL | feature | |
//! |---|---|---|
//! | `memory:NAME` | always there | all who connect to `NAME` within one process |
//! | `mqtt://[user:password@]host[:1883]` | `mqtt` | MQTT 3.1.1 |
//! | `redis://[user:password@]host[:6379][/database]` | `redis` | Redis and what speaks its protocol |
//! | `amqp://[user:password@]host[:5672]/[vhost]` | `amqp` | AMQP 0-9-1, RabbitMQ |
//!
//! `mqtts://`, `rediss://` and `amqps://` (TLS) are known and not there yet: they give [`ErrorKind::Unsupported`].

#[doc(inline)]
pub use commlib_core::*;

/// The AMQP transport.
#[cfg(feature = "amqp")]
pub mod amqp {
    #[doc(inline)]
    pub use commlib_amqp::*;
}

/// The MQTT transport.
#[cfg(feature = "mqtt")]
pub mod mqtt {
    #[doc(inline)]
    pub use commlib_mqtt::*;
}

/// The Redis transport.
#[cfg(feature = "redis")]
pub mod redis {
    #[doc(inline)]
    pub use commlib_redis::*;
}

/// Connects to the broker that `url` names, and resolves when the connection stands.
///
/// The scheme picks the transport; see [the table of brokers](crate#brokers). Cancelling it ends the attempt.
///
/// # Errors
/// [`ErrorKind::Config`] before any socket opens, if the URL or one of its options is wrong, if nobody knows its
/// scheme, or if the feature of its broker is off; [`ErrorKind::Connect`] if the broker could not be reached within
/// its `connect_timeout` (10 s unless the URL says otherwise) or refused the login.
pub async fn connect(url: &str) -> Result<Connection> {
    let scheme = BrokerUrl::parse(url)?.scheme;
    match scheme.as_str() {
        "memory" => MemoryConfig::from_url(url)?.connect().await,
        #[cfg(feature = "mqtt")]
        "mqtt" | "mqtts" => mqtt::MqttConfig::from_url(url)?.connect().await,
        #[cfg(not(feature = "mqtt"))]
        "mqtt" | "mqtts" => Err(feature_off(&scheme, "mqtt")),
        #[cfg(feature = "redis")]
        "redis" | "rediss" => redis::RedisConfig::from_url(url)?.connect().await,
        #[cfg(not(feature = "redis"))]
        "redis" | "rediss" => Err(feature_off(&scheme, "redis")),
        #[cfg(feature = "amqp")]
        "amqp" | "amqps" => amqp::AmqpConfig::from_url(url)?.connect().await,
        #[cfg(not(feature = "amqp"))]
        "amqp" | "amqps" => Err(feature_off(&scheme, "amqp")),
        _ => Err(Error::new(ErrorKind::Config, "broker URL scheme")
            .at(scheme)
            .because("it is unknown; known are memory, mqtt, mqtts, redis, rediss, amqp, amqps")),
    }
}

#[cfg(not(all(feature = "mqtt", feature = "redis", feature = "amqp")))]
fn feature_off(scheme: &str, feature: &str) -> Error {
    Error::new(ErrorKind::Config, "broker URL scheme")
        .at(scheme)
        .because(format_args!(
            "it needs the feature `{feature}` of the crate `commlib`, which is off in this build"
        ))
}

/// What most programs use: `use commlib::prelude::*;`.
///
/// It leaves out [`Result`], which would hide the one of the standard library.
pub mod prelude {
    pub use crate::{
        Connection, Delivery, Handle, MultiPublisher, Node, PubSub, Publisher, PublisherOptions,
        Received, Rpc, RpcClient, RpcError, Subscriber, SubscriberOptions,
    };
}

// The programs of the README are compiled and run as documentation tests. Not in the packed crate, where it lies elsewhere.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
