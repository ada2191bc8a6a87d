//! The broker-independent heart of commlib: one messaging API, any broker.
//!
//! Applications depend on the crate `commlib`, which adds `connect(url)`; authors of transports depend on this one.
//!
//! ```
//! use commlib_core::{MemoryConfig, Node, PubSub, Rpc};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> commlib_core::Result<()> {
//! let broker = MemoryConfig::new("crate-page").connect().await?;
//! let node = Node::builder("robot-7").start(broker).await?;
//!
//! let mut readings = node.subscriber::<f64>("sensors.*").await?;
//! node.publisher::<f64>("sensors.sonar.front")?.publish(&1.2).await?;
//! assert_eq!(readings.recv().await.expect("open")?.data, 1.2);
//!
//! node.rpc_service("math.add", |(a, b): (i64, i64)| async move { Ok(a + b) }).await?.detach();
//! assert_eq!(node.rpc_client::<_, i64>("math.add")?.call(&(40, 2)).await?, 42);
//! # Ok(()) }
//! ```
//!
//! # Where to find what
//!
//! | word | made by | type |
//! |---|---|---|
//! | Node | [`Node::builder`] | [`Node`] |
//! | Publisher | [`PubSub::publisher`] | [`Publisher`], [`MultiPublisher`] |
//! | Subscriber | [`PubSub::subscriber`], exact or pattern | [`Subscriber`] |
//! | RPC client | [`Rpc::rpc_client`] | [`RpcClient`] |
//! | RPC service | [`Rpc::rpc_service`], [`Rpc::rpc_server`] | [`RpcHandler`], [`RpcServer`], [`Handle`] |
//! | envelope | | [`Message`], [`Header`], [`mod@envelope`], [`Dialect`] |
//! | transport | [`Connection::new`] | [`Transport`], [`Capabilities`], [`Inbox`] |
//!
//! # Three layers
//!
//! A [`Transport`] moves single messages between three kinds of address and is all that a broker crate implements. A
//! [`Connection`] is what users hold. Endpoints are built on it here, once, and mean the same on every broker.
//!
//! # Nothing is lost in silence
//!
//! Every way to fail has an [`ErrorKind`] or a notice: what a subscriber missed is a [`Gap`], what it could not read a
//! [`Malformed`], how the link stands a [`LinkState`].

mod ack;
mod address;
mod backoff;
mod codec;
mod config;
mod connection;
pub mod envelope;
mod error;
mod header;
mod inbox;
mod link;
mod memory;
mod message;
mod node;
mod panic;
mod pubsub;
mod receipt;
mod reply;
mod rpc;
mod scope;
mod tasks;
mod transport;

pub use ack::{Ack, AckOutcome, AckReply};
pub use address::{MAX_NAME_LEN, Name, Pattern, Source, Target, escape_segment, unescape_segment};
pub use backoff::Backoff;
pub use codec::{RawValue, Value, decode, encode, json};
pub use config::{BrokerUrl, parse_duration};
pub use connection::{Connection, random_id};
pub use error::{Error, ErrorKind, Result};
pub use inbox::{Arrival, Gap, GapCause, Inbox, InboxSender, Incoming, Malformed, StopGuard};
pub use link::{
    AbsentService, Capabilities, DEFAULT_MAX_PAYLOAD, Link, LinkState, QueueKind, ReplyKind,
};
pub use memory::{MemoryBroker, MemoryConfig, MemoryTransport};
pub use message::{
    DEFAULT_CONTENT_ENCODING, DEFAULT_CONTENT_TYPE, Dialect, Header, Message, ReplyTo, RpcError,
};
pub use node::{Node, NodeBuilder};
pub use pubsub::{
    Guarantee, MessageHandler, MultiPublisher, Outcome, PubSub, Publisher, PublisherOptions,
    Received, Subscriber, SubscriberOptions,
};
pub use receipt::{Confirm, Receipt};
pub use reply::{Leases, ReplyLease};
pub use rpc::{
    Rpc, RpcClient, RpcClientOptions, RpcContext, RpcHandler, RpcServer, RpcServiceOptions,
};
pub use scope::{Scope, Scoped};
pub use tasks::Handle;
pub use transport::{Delivery, ListenOptions, SendOptions, Transport};
