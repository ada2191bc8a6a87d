//! One broker for all tests that break nothing.

use tokio::sync::OnceCell;

use crate::mosquitto::Mosquitto;
use crate::rabbitmq::RabbitMq;
use crate::redis::Redis;

/// The environment variable that names an MQTT broker for tests that break nothing: one for a whole test run, which
/// `commlib-testkit run` sets, or your own.
pub const MQTT_URL: &str = "COMMLIB_TEST_MQTT_URL";

static MOSQUITTO: OnceCell<Mosquitto> = OnceCell::const_new();

/// The MQTT broker for tests that break nothing: the one that [`MQTT_URL`] names, or a Mosquitto that is started at the
/// first call and serves this process until its end. `None` if there is neither; then the test is skipped.
///
/// # Panics
/// If there is none although the environment demands it, see [`Mosquitto::available`].
pub async fn mqtt_url() -> Option<String> {
    if let Some(url) = given_mqtt_url() {
        return Some(url);
    }
    if !Mosquitto::available() {
        return None;
    }
    // Never dropped, as statics are: the watchdog ends it together with this process.
    Some(MOSQUITTO.get_or_init(Mosquitto::start).await.url())
}

/// What [`MQTT_URL`] says; empty is as good as missing.
pub fn given_mqtt_url() -> Option<String> {
    std::env::var(MQTT_URL).ok().filter(|url| !url.is_empty())
}

/// As [`MQTT_URL`], for an AMQP broker.
pub const AMQP_URL: &str = "COMMLIB_TEST_AMQP_URL";

static RABBITMQ: OnceCell<RabbitMq> = OnceCell::const_new();

/// The AMQP broker for tests that break nothing: the one that [`AMQP_URL`] names, or a RabbitMQ that is started at the
/// first call and serves this process until its end. `None` if there is neither; then the test is skipped.
///
/// # Panics
/// If there is none although the environment demands it, see [`RabbitMq::available`].
pub async fn amqp_url() -> Option<String> {
    if let Some(url) = given_amqp_url() {
        return Some(url);
    }
    if !RabbitMq::available() {
        return None;
    }
    Some(RABBITMQ.get_or_init(RabbitMq::start).await.url())
}

/// What [`AMQP_URL`] says; empty is as good as missing.
pub fn given_amqp_url() -> Option<String> {
    std::env::var(AMQP_URL).ok().filter(|url| !url.is_empty())
}

/// As [`MQTT_URL`], for a Redis server.
pub const REDIS_URL: &str = "COMMLIB_TEST_REDIS_URL";

static REDIS: OnceCell<Redis> = OnceCell::const_new();

/// The Redis server for tests that break nothing: the one that [`REDIS_URL`] names, or one that is started at the first
/// call and serves this process until its end. `None` if there is neither; then the test is skipped.
///
/// # Panics
/// If there is none although the environment demands it, see [`Redis::available`].
pub async fn redis_url() -> Option<String> {
    if let Some(url) = given_redis_url() {
        return Some(url);
    }
    if !Redis::available() {
        return None;
    }
    Some(REDIS.get_or_init(Redis::start).await.url())
}

/// What [`REDIS_URL`] says; empty is as good as missing.
pub fn given_redis_url() -> Option<String> {
    std::env::var(REDIS_URL).ok().filter(|url| !url.is_empty())
}
