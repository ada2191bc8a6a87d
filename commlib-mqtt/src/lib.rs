//! MQTT as a transport of commlib: MQTT 3.1.1 over TCP.
//!
//! A [`MqttConfig`] makes the connection, in code or from a URL; everything else is in `commlib-core`.
//!
//! | | on the wire |
//! |---|---|
//! | name `a.b.c` | topic `a/b/c` |
//! | pattern `a.*.c`, `a.*` | filter `a/+/c`, `a/#` |
//! | best effort | QoS 0 |
//! | at least once | QoS 1; subscribing so needs [`Session::Persistent`] |
//! | request, reply | QoS 0; replies go to `rpc-<id>/<n>`, below one subscription per connection |
//!
//! # When things fail
//! The link is made again for ever, with exponential backoff and full jitter up to 30 s: subscriptions first, then the
//! unconfirmed at-least-once messages in their order. What may have been missed shows as a
//! [`Gap`](commlib_core::Gap). A dead peer is noticed within one and a half times [`MqttConfig::keep_alive`],
//! later if much was written that may still be under way on a slow link.
//!
//! At-least-once messages that a receiver does not accept are delivered again by this crate, five times in all, because
//! MQTT has no way to return one. They are acknowledged to the broker in the order in which they came, as MQTT wants it,
//! so one slow handler delays the acknowledgement of what came after.
//!
//! # What MQTT 3.1.1 cannot do
//! * A broker may send a message once for each of several overlapping filters. Filters that another one covers are
//!   therefore not sent to the broker; where two overlap only in part (`a.*.c` and `a.b.*`), copies are recognised if the
//!   message names its sender, as those of commlib do.
//! * An inbox that joins a filter which is already subscribed does not get the retained messages again.
//! * The broker cannot be told to slow down: see [`MqttConfig::unacked_bytes`].
//! * Packets above [`MqttConfig::hard_limit`] cost the link.

mod acks;
mod address;
mod config;
mod conn;
mod filter;
mod inbound;
mod keepalive;
mod listeners;
mod net;
mod outbox;
mod packet;
mod room;
mod serve;
mod session;
mod subscriptions;
mod transport;

pub use config::{MqttConfig, Session};
pub use transport::MqttTransport;
