//! What a connection needs to know, in code or as a URL.

use std::fmt;
use std::time::Duration;

use commlib_core::{
    BrokerUrl, Connection, DEFAULT_MAX_PAYLOAD, Dialect, Error, ErrorKind, Result, unescape_segment,
};

use crate::transport::AmqpTransport;

const DEFAULT_PORT: u16 = 5672;

/// The longest text of AMQP's own kind for names (4.2.5.3, short strings).
const MAX_SHORT: usize = 255;

/// How to reach an AMQP broker, and what to expect of it.
///
/// As a URL: `amqp://[user:password@]host[:5672]/[vhost]?option=value&…`. The virtual host is percent-encoded; without
/// one it is `/`, the broker's default. Options are `heartbeat`, `exchange`, `auth` (`password`, `external`),
/// `dead_letter`, `expires`, `connect_timeout`, `close_timeout`, `start` (`online`, `offline`), `dialect`,
/// `max_payload`, `outbox`, `outbox_bytes` and `prefetch`; they mean what the fields say.
///
/// ```
/// # use std::time::Duration;
/// use commlib_amqp::AmqpConfig;
///
/// let in_code = AmqpConfig::new("localhost:5672").vhost("plant/1").heartbeat(Duration::from_secs(5));
/// let as_url = AmqpConfig::from_url("amqp://localhost:5672/plant%2f1?heartbeat=5s")?;
/// assert_eq!(in_code, as_url);
/// # Ok::<(), commlib_core::Error>(())
/// ```
#[derive(Clone, PartialEq)]
#[non_exhaustive]
pub struct AmqpConfig {
    /// The broker, `host` or `host:port`. IPv6 addresses with a port stand in brackets.
    pub address: String,
    /// The virtual host. Default `/`.
    pub vhost: String,
    /// The user name. Default `guest`, who may come from the broker's own machine only.
    pub username: String,
    /// The password. `Debug` does not show it.
    pub password: String,
    /// Lets the transport below AMQP say who this is (SASL EXTERNAL) instead of name and password.
    pub external_auth: bool,
    /// How often a quiet link is probed, in whole seconds. A dead link is noticed within twice this. Default 10 s.
    pub heartbeat: Duration,
    /// The topic exchange for topics, which must exist. Default `amq.topic`.
    pub exchange: String,
    /// The exchange that gets messages which at-least-once subscribers and services have given up, which must exist.
    /// It is part of a queue's definition: all who share a durable subscription or a service must say the same.
    pub dead_letter: Option<String>,
    /// How long the broker keeps a durable subscription that nobody listens to. Default a week.
    pub expires: Duration,
    /// How long `connect` keeps trying. Default 10 s.
    pub connect_timeout: Duration,
    /// How long `close` waits for outstanding confirmations. Default 5 s.
    pub close_timeout: Duration,
    /// Makes `connect` return at once and the first connection in the background.
    pub start_offline: bool,
    /// How messages are written unless an endpoint says otherwise.
    pub dialect: Dialect,
    /// The largest data to send, and to accept, in bytes. Default 1 MiB. Larger ones that come in are reported as
    /// malformed; how large they can be is a setting of the broker (`max_message_size`).
    pub max_payload: usize,
    /// How many at-least-once messages may wait for the broker's confirmation. Default 1,000.
    pub outbox: usize,
    /// How many bytes of at-least-once messages may wait for the broker's confirmation. Default 64 MiB.
    pub outbox_bytes: usize,
    /// How many requests of one service may be here without an answer; what is beyond goes to other services or waits
    /// at the broker. Default 256.
    pub prefetch: usize,
}

impl Default for AmqpConfig {
    /// The broker at `localhost:5672` as its user `guest`.
    fn default() -> Self {
        Self {
            address: format!("localhost:{DEFAULT_PORT}"),
            vhost: "/".to_owned(),
            username: "guest".to_owned(),
            password: "guest".to_owned(),
            external_auth: false,
            heartbeat: Duration::from_secs(10),
            exchange: "amq.topic".to_owned(),
            dead_letter: None,
            expires: Duration::from_secs(7 * 24 * 3600),
            connect_timeout: Duration::from_secs(10),
            close_timeout: Duration::from_secs(5),
            start_offline: false,
            dialect: Dialect::default(),
            max_payload: DEFAULT_MAX_PAYLOAD,
            outbox: 1000,
            outbox_bytes: 64 << 20,
            prefetch: 256,
        }
    }
}

macro_rules! setters {
    ($($(#[$doc:meta])* $field:ident: $type:ty => $value:expr;)*) => {
        $($(#[$doc])*
        #[must_use]
        pub fn $field(mut self, $field: $type) -> Self {
            self.$field = $value;
            self
        })*
    };
}

impl AmqpConfig {
    /// The broker at `host` or `host:port`, everything else as in [`default`](Self::default).
    pub fn new(address: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            ..Self::default()
        }
    }

    /// Reads a URL.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for what is no such URL, and for unknown or wrong options;
    /// [`ErrorKind::Unsupported`] for TLS, which is not available yet.
    pub fn from_url(url: &str) -> Result<Self> {
        let mut url = BrokerUrl::parse(url)?;
        let wrong = |why: &str| Error::new(ErrorKind::Config, "AMQP URL").because(why);
        match url.scheme.as_str() {
            "amqp" => {}
            "amqps" => {
                return Err(Error::new(ErrorKind::Unsupported, "AMQP URL")
                    .because("amqps:// (TLS) is not available yet; use amqp://"));
            }
            _ => return Err(wrong("it starts with `amqp://`")),
        }
        if url.host.is_empty() {
            return Err(wrong("the host is missing: write `amqp://localhost:5672`"));
        }
        let host = if url.host.contains(':') {
            format!("[{}]", url.host)
        } else {
            url.host.clone()
        };
        let mut config = Self::new(format!("{host}:{}", url.port.unwrap_or(DEFAULT_PORT)));
        config.vhost = vhost_of(&url.path).ok_or_else(|| {
            wrong("the virtual host is one percent-encoded text: `/` in it is written %2f")
        })?;
        if let Some(username) = url.username.take() {
            config.username = username;
            config.password = url.password.take().unwrap_or_default();
        } else if url.password.is_some() {
            return Err(wrong("a password needs a user name"));
        }
        let auth = url.take_with("auth", |text| match text {
            "password" => Ok(false),
            "external" => Ok(true),
            _ => Err("write `password` or `external`".to_owned()),
        })?;
        let start = url.take_with("start", |text| match text {
            "online" => Ok(false),
            "offline" => Ok(true),
            _ => Err("write `online` or `offline`".to_owned()),
        })?;
        set(&mut config.external_auth, auth);
        set(&mut config.start_offline, start);
        set(&mut config.heartbeat, url.take_duration("heartbeat")?);
        set(&mut config.exchange, url.take("exchange"));
        config.dead_letter = url.take("dead_letter");
        set(&mut config.expires, url.take_duration("expires")?);
        set(
            &mut config.connect_timeout,
            url.take_duration("connect_timeout")?,
        );
        set(
            &mut config.close_timeout,
            url.take_duration("close_timeout")?,
        );
        set(&mut config.dialect, url.take_parsed("dialect")?);
        set(&mut config.max_payload, url.take_parsed("max_payload")?);
        set(&mut config.outbox, url.take_parsed("outbox")?);
        set(&mut config.outbox_bytes, url.take_parsed("outbox_bytes")?);
        set(&mut config.prefetch, url.take_parsed("prefetch")?);
        url.finish()?;
        config.check()?;
        Ok(config)
    }

    /// Connects. Cancel safe: a cancelled connect leaves nothing behind.
    ///
    /// # Errors
    /// [`ErrorKind::Connect`] if the broker cannot be reached within [`connect_timeout`](Self::connect_timeout), and at
    /// once if it refuses the login or the virtual host, or lacks the exchange; [`ErrorKind::Config`] for settings that
    /// cannot work.
    pub async fn connect(self) -> Result<Connection> {
        let dialect = self.dialect;
        let transport = AmqpTransport::connect(self).await?;
        Ok(Connection::new(transport).with_dialect(dialect))
    }

    setters! {
        /// Sets the virtual host, as it is, not percent-encoded.
        vhost: impl Into<String> => vhost.into();
        /// Sets whether the transport below AMQP says who this is.
        external_auth: bool => external_auth;
        /// Sets how often a quiet link is probed.
        heartbeat: Duration => heartbeat;
        /// Sets the topic exchange for topics.
        exchange: impl Into<String> => exchange.into();
        /// Sets the exchange for messages that were given up.
        dead_letter: impl Into<String> => Some(dead_letter.into());
        /// Sets how long the broker keeps a durable subscription that nobody listens to.
        expires: Duration => expires;
        /// Sets how long `connect` keeps trying.
        connect_timeout: Duration => connect_timeout;
        /// Sets how long `close` waits for outstanding confirmations.
        close_timeout: Duration => close_timeout;
        /// Sets whether `connect` returns before there is a connection.
        start_offline: bool => start_offline;
        /// Sets how messages are written.
        dialect: Dialect => dialect;
        /// Sets the largest data to send and to accept.
        max_payload: usize => max_payload;
        /// Sets how many at-least-once messages may wait for confirmation.
        outbox: usize => outbox;
        /// Sets how many bytes of at-least-once messages may wait for confirmation.
        outbox_bytes: usize => outbox_bytes;
        /// Sets how many requests of one service may be here without an answer.
        prefetch: usize => prefetch;
    }

    /// Sets the user name and password.
    #[must_use]
    pub fn login(mut self, username: impl Into<String>, password: impl Into<String>) -> Self {
        self.username = username.into();
        self.password = password.into();
        self
    }

    /// Finds what cannot work, before any socket opens.
    pub(crate) fn check(&self) -> Result<()> {
        let short = |text: &str| (1..=MAX_SHORT).contains(&text.len());
        let rules = [
            (
                self.heartbeat.subsec_nanos() == 0
                    && (1..=65_535).contains(&self.heartbeat.as_secs()),
                "`heartbeat` is 1s to 65535s, in whole seconds",
            ),
            (
                (1..=u128::from(u32::MAX)).contains(&self.expires.as_millis()),
                "`expires` is more than zero and at most 49 days",
            ),
            (
                !self.connect_timeout.is_zero(),
                "`connect_timeout` is more than zero",
            ),
            (
                short(&self.vhost)
                    && short(&self.exchange)
                    && self.dead_letter.as_deref().is_none_or(short),
                "the virtual host, `exchange` and `dead_letter` have 1 to 255 bytes",
            ),
            (
                self.max_payload >= 1 && self.outbox >= 1 && self.outbox_bytes >= 1,
                "`max_payload`, `outbox` and `outbox_bytes` are at least 1",
            ),
            (
                (1..=usize::from(u16::MAX)).contains(&self.prefetch),
                "`prefetch` is 1 to 65535",
            ),
        ];
        for (holds, rule) in rules {
            if !holds {
                return Err(Error::new(ErrorKind::Config, "AMQP configuration").because(rule));
            }
        }
        self.endpoint().map(drop)
    }

    /// Host and port.
    pub(crate) fn endpoint(&self) -> Result<(&str, u16)> {
        let bad = || {
            Error::new(ErrorKind::Config, "AMQP broker")
                .at(&self.address)
                .because("write `host` or `host:port`")
        };
        let address = self.address.as_str();
        let (host, port) = match address.rsplit_once(':') {
            // Several colons without brackets: an IPv6 address that has no port.
            Some((head, _)) if head.contains(':') && !head.ends_with(']') => (address, None),
            Some((head, port)) => (head, Some(port)),
            None => (address, None),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let port = port
            .map_or(Ok(DEFAULT_PORT), str::parse)
            .map_err(|_| bad())?;
        if host.is_empty() || host.contains(['/', '@']) {
            return Err(bad());
        }
        Ok((host, port))
    }

    /// The broker's address for people, without the login.
    pub(crate) fn shown_url(&self) -> String {
        match self.vhost.as_str() {
            "/" => format!("amqp://{}", self.address),
            vhost => format!(
                "amqp://{}/{}",
                self.address,
                vhost.replace('%', "%25").replace('/', "%2f")
            ),
        }
    }
}

/// The virtual host in the path of a URL. By the letter `amqp://host/` names the empty one, which no broker has: it is
/// taken for the default, as other clients do.
fn vhost_of(path: &str) -> Option<String> {
    let encoded = path.strip_prefix('/').unwrap_or(path);
    if encoded.contains('/') {
        return None;
    }
    match encoded {
        "" => Some("/".to_owned()),
        _ => String::from_utf8(unescape_segment(encoded, |_| true).into_owned()).ok(),
    }
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

impl fmt::Debug for AmqpConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmqpConfig")
            .field("address", &self.address)
            .field("vhost", &self.vhost)
            .field("username", &self.username)
            .field("password", &"***")
            .field("external_auth", &self.external_auth)
            .field("heartbeat", &self.heartbeat)
            .field("exchange", &self.exchange)
            .field("dead_letter", &self.dead_letter)
            .field("expires", &self.expires)
            .field("connect_timeout", &self.connect_timeout)
            .field("close_timeout", &self.close_timeout)
            .field("start_offline", &self.start_offline)
            .field("dialect", &self.dialect)
            .field("max_payload", &self.max_payload)
            .field("outbox", &self.outbox)
            .field("outbox_bytes", &self.outbox_bytes)
            .field("prefetch", &self.prefetch)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_the_same_as_code() {
        let url = "amqp://me:s%40fe@[::1]:5673/plant%2F1?heartbeat=5s&exchange=robots&auth=external&start=offline\
                   &dead_letter=dead&expires=1h&connect_timeout=2s&close_timeout=1s&dialect=commlib-py&max_payload=10\
                   &outbox=3&outbox_bytes=4&prefetch=5";
        let config = AmqpConfig::new("[::1]:5673")
            .login("me", "s@fe")
            .vhost("plant/1")
            .heartbeat(Duration::from_secs(5))
            .exchange("robots")
            .external_auth(true)
            .start_offline(true)
            .dead_letter("dead")
            .expires(Duration::from_secs(3600))
            .connect_timeout(Duration::from_secs(2))
            .close_timeout(Duration::from_secs(1))
            .dialect(Dialect::CommlibPy)
            .max_payload(10)
            .outbox(3)
            .outbox_bytes(4)
            .prefetch(5);
        assert_eq!(AmqpConfig::from_url(url).unwrap(), config);
        assert_eq!(config.endpoint().unwrap(), ("::1", 5673));
        assert_eq!(config.shown_url(), "amqp://[::1]:5673/plant%2f1");
        assert!(!format!("{config:?}").contains("s@fe"));
    }

    #[test]
    fn virtual_hosts() {
        for (path, vhost) in [
            ("", "/"),
            ("/", "/"),
            ("/%2f", "/"),
            ("/a", "a"),
            ("/a%20b%2Fc", "a b/c"),
        ] {
            let config = AmqpConfig::from_url(&format!("amqp://h{path}")).unwrap();
            assert_eq!(config.vhost, vhost, "{path}");
        }
    }

    #[test]
    fn a_login_without_password_has_an_empty_one() {
        let config = AmqpConfig::from_url("amqp://me@h").unwrap();
        assert_eq!((&*config.username, &*config.password), ("me", ""));
    }

    #[test]
    fn what_cannot_work_is_refused() {
        for (url, kind) in [
            ("amqps://h", ErrorKind::Unsupported),
            ("redis://h", ErrorKind::Config),
            ("amqp:", ErrorKind::Config),
            ("amqp://h/a/b", ErrorKind::Config),
            ("amqp://h/%ff", ErrorKind::Config),
            ("amqp://:pw@h", ErrorKind::Config),
            ("amqp://h?heart_beat=1s", ErrorKind::Config),
            ("amqp://h?heartbeat=500ms", ErrorKind::Config),
            ("amqp://h?heartbeat=0s", ErrorKind::Config),
            ("amqp://h?expires=9999h", ErrorKind::Config),
            ("amqp://h?exchange=", ErrorKind::Config),
            ("amqp://h?auth=guess", ErrorKind::Config),
            ("amqp://h?start=later", ErrorKind::Config),
            ("amqp://h?prefetch=0", ErrorKind::Config),
            ("amqp://h?prefetch=70000", ErrorKind::Config),
            ("amqp://h?connect_timeout=0s", ErrorKind::Config),
        ] {
            let error = AmqpConfig::from_url(url).expect_err(url);
            assert_eq!(error.kind(), kind, "{url}: {error}");
        }
        for address in ["", ":1", "h:", "h:x", "h:70000", "amqp://h", "u@h"] {
            let error = AmqpConfig::new(address).check().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config, "{address}");
        }
    }
}
