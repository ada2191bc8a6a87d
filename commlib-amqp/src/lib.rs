//! AMQP 0-9-1 as a transport of commlib: RabbitMQ, LavinMQ and what speaks the same.
//!
//! An [`AmqpConfig`] makes the connection, in code or from a URL; everything else is in `commlib-core`.
//!
//! | | at the broker |
//! |---|---|
//! | topic `a.b.c` | routing key `a.b.c` on the exchange `amq.topic` |
//! | pattern `a.*.c`, `a.*` | binding key `a.*.c`, `a.#` |
//! | best-effort subscribers | one exclusive queue of the connection with a binding for each pattern |
//! | at-least-once subscriber | a queue of its own; `durable(NAME)` is the durable queue `commlib.durable.NAME` |
//! | service `a.b.c` | durable queue `a.b.c`, shared by all who serve it, gone a minute after the last |
//! | call | to the default exchange, mandatory; the reply comes by direct reply-to with a correlation id |
//! | header | properties and headers table; the body is the bare data |
//!
//! # When things fail
//! The link is made again for ever, with exponential backoff and full jitter up to 30 s: subscriptions first, then the
//! unconfirmed at-least-once messages in their order. What may have been missed shows as a
//! [`Gap`](commlib_core::Gap). A dead peer is noticed within twice [`AmqpConfig::heartbeat`]. What the broker refuses
//! closes one channel, which is opened again, and is told to whom it concerns.
//!
//! A broker that is short of memory or disk blocks the connection: the link is
//! [`Degraded`](commlib_core::LinkState::Degraded), best-effort messages and requests fail after a few seconds without
//! room, at-least-once messages wait. Acknowledgements wait as well, because it reads nothing.
//!
//! # Good to know
//! * An at-least-once message on a topic that nobody subscribes to is an error, since the broker keeps it nowhere.
//! * A message that is rejected or dropped five times is given up: it goes to [`AmqpConfig::dead_letter`] or is gone, and
//!   its subscriber sees a gap. Each process counts for itself, by what the message says.
//! * Messages survive the broker's death in a durable queue and if published at least once.
//! * In the dialects of commlib-py a service takes its queue for itself, as those programs do.

mod acks;
mod address;
mod config;
mod conn;
mod consumer;
mod lane;
mod listener;
mod net;
mod properties;
mod session;
mod topics;
mod transport;

pub use config::AmqpConfig;
pub use transport::AmqpTransport;
