//! Real brokers, broken links and one list of cases for every transport of commlib.
//!
//! | for | there is |
//! |---|---|
//! | a broker of a test's own, to be killed, paused and restarted | [`Mosquitto`], [`Redis`], [`RabbitMq`] |
//! | a broker that all tests share | [`mqtt_url`], [`redis_url`], [`amqp_url`], and the program `commlib-testkit run -- COMMAND` |
//! | a link that is cut, silent, slow or refused | [`Proxy`] |
//! | what every transport must do | [`conformance`](mod@conformance) |
//! | the proof that those cases can fail | [`wrong`] |
//!
//! # For authors of a transport
//! Implement [`Transport`](commlib_core::Transport), whose documentation holds the rules. Then write a test file that
//! says how to connect, and ends in one macro call: the example is in [`conformance`](mod@conformance). What the transport declares in its
//! [`Capabilities`](commlib_core::Capabilities) decides which cases apply; each of the others prints why it does not.
//! With a [`Fixture::outage`](conformance::Fixture::outage) the cases about lost links apply as well: stop and start a
//! real broker, or put a [`Proxy`] before one that others use.
//!
//! ```
//! # async fn example() {
//! use commlib_testkit::{Mosquitto, Proxy};
//!
//! if !Mosquitto::available() {
//!     return; // It has said that the test is skipped.
//! }
//! let broker = Mosquitto::start().await;
//! let proxy = Proxy::start(broker.address()).await;
//! // Connect to proxy.address(), then:
//! proxy.black_hole(true); // the peer is silent, not gone
//! proxy.cut(); // every connection is reset
//! broker.kill9();
//! broker.restart().await; // the same port, the same data
//! # }
//! ```
//!
//! # Environment
//! * `COMMLIB_TEST_MQTT_URL`, `COMMLIB_TEST_REDIS_URL`, `COMMLIB_TEST_AMQP_URL`: tests that break nothing use this broker
//!   instead of starting one.
//! * `COMMLIB_TEST_BROKERS=skip`: tests that need a broker are skipped.
//! * `COMMLIB_TEST_BROKERS=require`, or `CI=true`: a missing broker program fails tests instead of skipping them.
//!
//! Everything here panics with a plain text when it cannot do its work, because that is how a test fails.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "test support: a panic is how a test fails"
)]

pub mod conformance;
mod forward;
mod mosquitto;
mod port;
mod process;
mod proxy;
mod rabbitmq;
mod redis;
mod shared;
mod spy;
mod wait;
pub mod wrong;

pub use mosquitto::{Mosquitto, MosquittoBuilder};
pub use port::free_port;
pub use proxy::{Connections, Proxy};
pub use rabbitmq::RabbitMq;
pub use redis::{Redis, RedisBuilder};
pub use shared::{
    AMQP_URL, MQTT_URL, REDIS_URL, amqp_url, given_amqp_url, given_mqtt_url, given_redis_url,
    mqtt_url, redis_url,
};
