//! The Redis transport of commlib: topics on channels, services on lists, at-least-once topics on streams.
//!
//! ```no_run
//! use commlib_core::{PubSub, Rpc};
//! use commlib_redis::RedisConfig;
//!
//! # async fn run() -> commlib_core::Result<()> {
//! let connection = RedisConfig::from_url("redis://localhost:6379/0")?.connect().await?;
//! connection.publisher::<f64>("sensors.sonar.front")?.publish(&1.2).await?;
//! # Ok(()) }
//! ```
//!
//! # What goes where
//! | | at the server |
//! |---|---|
//! | topic `a.b` | channel `a.b`: `PUBLISH`, `SUBSCRIBE`, `PSUBSCRIBE` |
//! | service `a.b` | list `a.b`: `RPUSH`, `BLMPOP` (Redis 7) or `BLPOP` |
//! | reply | list `rpc-…`, read at once, expires by itself after a minute |
//! | topic `a.b`, at least once, with `streams=on` | stream `commlib:stream:a.b`, and the channel in the same transaction |
//!
//! Channels know no databases: topics are common to all of a server. Lists and streams are in the database of the URL.
//!
//! # What can be lost
//! * **Best effort**: what is published while a subscriber is not connected. It sees a gap.
//! * **At least once** (`streams=on`): a confirmed message is in the stream, and what the server itself forgets depends
//!   on its settings: `appendonly yes` loses at most a second at a power failure and nothing when the process is
//!   killed. A stream keeps about `stream_length` messages; a durable subscriber that stays away for longer misses the
//!   oldest. Patterns are not possible at least once, because a stream has one topic.
//! * **Requests**: they wait in the list for a service, until their caller gives up. One that was popped when the link
//!   broke is lost, and its caller times out.
//!
//! An at-least-once subscriber also gets what is only published, best effort, by others. The copies that at-least-once
//! publishers put on the channel end in white space by which it leaves them out.

mod address;
mod config;
mod inbound;
mod lists;
mod outbound;
mod queue;
mod replies;
mod stream;
mod supervisor;
mod topics;
mod transport;
mod wire;

pub use config::{Protocol, RedisConfig};
pub use transport::RedisTransport;
