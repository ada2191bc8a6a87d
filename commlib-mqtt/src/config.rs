//! What a connection needs to know, in code or as a URL.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use commlib_core::{BrokerUrl, Connection, DEFAULT_MAX_PAYLOAD, Dialect, Error, ErrorKind, Result};

use crate::transport::MqttTransport;

const DEFAULT_PORT: u16 = 1883;
/// MQTT cannot write longer packets; the difference leaves room for topic and header.
const MAX_HARD_LIMIT: usize = (256 << 20) - (1 << 20);

/// What the broker keeps for a client while it is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Session {
    /// Nothing. At-least-once subscribing is not possible.
    #[default]
    Clean,
    /// Subscriptions and the at-least-once messages for them, under the client id, which must be set.
    Persistent,
}

impl FromStr for Session {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "clean" => Ok(Self::Clean),
            "persistent" => Ok(Self::Persistent),
            _ => Err("write `clean` or `persistent`"),
        }
    }
}

/// How to reach an MQTT broker, and what to expect of it.
///
/// As a URL: `mqtt://[user:password@]host[:1883]?option=value&…`. Options are `client_id`, `session` (`clean`,
/// `persistent`), `keep_alive`, `connect_timeout`, `close_timeout`, `start` (`online`, `offline`), `dialect`,
/// `max_payload`, `hard_limit`, `outbox`, `outbox_bytes` and `unacked_bytes`; they mean what the fields say. `protocol`
/// is `3.1.1`.
///
/// ```
/// # use std::time::Duration;
/// use commlib_mqtt::MqttConfig;
///
/// let in_code = MqttConfig::new("localhost:1883").keep_alive(Duration::from_secs(5));
/// let as_url = MqttConfig::from_url("mqtt://localhost:1883?keep_alive=5s")?;
/// assert_eq!(in_code.keep_alive, as_url.keep_alive);
/// # Ok::<(), commlib_core::Error>(())
/// ```
#[derive(Clone, PartialEq)]
#[non_exhaustive]
pub struct MqttConfig {
    /// The broker, `host` or `host:port`. IPv6 addresses with a port stand in brackets.
    pub address: String,
    /// The user name, if the broker wants one.
    pub username: Option<String>,
    /// The password, if the broker wants one. `Debug` does not show it.
    pub password: Option<String>,
    /// The name of this client at the broker; two clients of one name evict each other. Made up if `None`.
    pub client_id: Option<String>,
    /// What the broker keeps while this client is away.
    pub session: Session,
    /// How often a quiet link is probed, in whole seconds. A dead link is noticed within one and a half times this,
    /// or later by as long as what was written before may be under way on a slow link. Default 10 s.
    pub keep_alive: Duration,
    /// How long `connect` keeps trying. Default 10 s.
    pub connect_timeout: Duration,
    /// How long `close` waits for outstanding confirmations. Default 5 s.
    pub close_timeout: Duration,
    /// Makes `connect` return at once and the first connection in the background.
    pub start_offline: bool,
    /// How messages are written unless an endpoint says otherwise.
    pub dialect: Dialect,
    /// The largest data to send, and to accept, in bytes. Default 1 MiB.
    pub max_payload: usize,
    /// The largest packet to read at all. One between `max_payload` and this is reported as malformed; a larger one
    /// costs the link. Default 16 MiB.
    pub hard_limit: usize,
    /// How many at-least-once messages may wait for the broker's confirmation. Default 1,000.
    pub outbox: usize,
    /// How many bytes of at-least-once messages may wait for the broker's confirmation. Default 64 MiB.
    pub outbox_bytes: usize,
    /// How many bytes of received messages may be unacknowledged. MQTT 3.1.1 has no window for them, so more ends the
    /// link until half of what waits has been taken. Default 64 MiB.
    pub unacked_bytes: usize,
}

impl Default for MqttConfig {
    /// The broker at `localhost:1883`.
    fn default() -> Self {
        Self {
            address: format!("localhost:{DEFAULT_PORT}"),
            username: None,
            password: None,
            client_id: None,
            session: Session::default(),
            keep_alive: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            close_timeout: Duration::from_secs(5),
            start_offline: false,
            dialect: Dialect::default(),
            max_payload: DEFAULT_MAX_PAYLOAD,
            hard_limit: 16 << 20,
            outbox: 1000,
            outbox_bytes: 64 << 20,
            unacked_bytes: 64 << 20,
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

impl MqttConfig {
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
    /// [`ErrorKind::Unsupported`] for TLS and MQTT 5, which are not available yet.
    pub fn from_url(url: &str) -> Result<Self> {
        let mut url = BrokerUrl::parse(url)?;
        let wrong = |why: &str| Error::new(ErrorKind::Config, "MQTT URL").because(why);
        match url.scheme.as_str() {
            "mqtt" => {}
            "mqtts" => return Err(not_yet("mqtts:// (TLS)")),
            _ => return Err(wrong("it starts with `mqtt://`")),
        }
        if url.host.is_empty() {
            return Err(wrong("the host is missing: write `mqtt://localhost:1883`"));
        }
        if !matches!(url.path.as_str(), "" | "/") {
            return Err(wrong("nothing may stand between host and `?`"));
        }
        let host = if url.host.contains(':') {
            format!("[{}]", url.host)
        } else {
            url.host.clone()
        };
        let mut config = Self::new(format!("{host}:{}", url.port.unwrap_or(DEFAULT_PORT)));
        config.username = url.username.take();
        config.password = url.password.take();
        config.client_id = url.take("client_id");
        match url.take("protocol").as_deref() {
            None | Some("3.1.1") => {}
            Some("5") => return Err(not_yet("protocol=5")),
            Some(_) => return Err(wrong("`protocol` is 3.1.1")),
        }
        set(&mut config.session, url.take_parsed("session")?);
        set(&mut config.keep_alive, url.take_duration("keep_alive")?);
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
        set(&mut config.hard_limit, url.take_parsed("hard_limit")?);
        set(&mut config.outbox, url.take_parsed("outbox")?);
        set(&mut config.outbox_bytes, url.take_parsed("outbox_bytes")?);
        set(&mut config.unacked_bytes, url.take_parsed("unacked_bytes")?);
        let start = url.take_with("start", |text| match text {
            "online" => Ok(false),
            "offline" => Ok(true),
            _ => Err("write `online` or `offline`".to_owned()),
        })?;
        set(&mut config.start_offline, start);
        url.finish()?;
        config.check()?;
        Ok(config)
    }

    setters! {
        /// Sets the name of this client at the broker.
        client_id: impl Into<String> => Some(client_id.into());
        /// Sets what the broker keeps while this client is away.
        session: Session => session;
        /// Sets how often a quiet link is probed.
        keep_alive: Duration => keep_alive;
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
        /// Sets the largest packet to read at all.
        hard_limit: usize => hard_limit;
        /// Sets how many at-least-once messages may wait for confirmation.
        outbox: usize => outbox;
        /// Sets how many bytes of at-least-once messages may wait for confirmation.
        outbox_bytes: usize => outbox_bytes;
        /// Sets how many bytes of received messages may be unacknowledged.
        unacked_bytes: usize => unacked_bytes;
    }

    /// Sets the user name and password.
    #[must_use]
    pub fn login(mut self, username: impl Into<String>, password: impl Into<String>) -> Self {
        self.username = Some(username.into());
        self.password = Some(password.into());
        self
    }

    /// Connects. Needs a tokio runtime, on which the connection then runs.
    ///
    /// Tries until `connect_timeout` is over, or returns at once with `start_offline`. Cancel safe: a dropped call
    /// leaves no connection behind.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] before any socket opens; [`ErrorKind::Connect`] if the broker could not be reached in time
    /// or refused the login.
    pub async fn connect(self) -> Result<Connection> {
        let dialect = self.dialect;
        let transport = MqttTransport::connect(self).await?;
        Ok(Connection::new(transport).with_dialect(dialect))
    }

    /// Finds what cannot work, before any socket opens.
    pub(crate) fn check(&self) -> Result<()> {
        let seconds = self.keep_alive.as_secs();
        let rules = [
            (
                self.keep_alive.subsec_nanos() == 0 && (1..=65_535).contains(&seconds),
                "`keep_alive` is 1s to 65535s, in whole seconds",
            ),
            (
                !self.connect_timeout.is_zero(),
                "`connect_timeout` is more than zero",
            ),
            (
                self.session == Session::Clean || self.client_id.is_some(),
                "`session=persistent` needs a `client_id`: the broker keeps the session under it",
            ),
            (
                self.client_id.as_ref().is_none_or(|id| {
                    (1..=65_535).contains(&id.len()) && !id.contains(char::is_control)
                }),
                "`client_id` has 1 to 65535 bytes and no control characters",
            ),
            (
                self.password.is_none() || self.username.is_some(),
                "a password needs a user name",
            ),
            (
                [&self.username, &self.password]
                    .into_iter()
                    .flatten()
                    .all(|text| text.len() <= 65_535),
                "user name and password have at most 65535 bytes",
            ),
            (
                (1..=self.hard_limit).contains(&self.max_payload)
                    && self.hard_limit <= MAX_HARD_LIMIT,
                "`max_payload` is at least 1 and at most `hard_limit`, and that at most 255 MiB",
            ),
            (
                self.outbox >= 1 && self.outbox_bytes >= 1 && self.unacked_bytes >= 1,
                "`outbox`, `outbox_bytes` and `unacked_bytes` are at least 1",
            ),
        ];
        for (holds, rule) in rules {
            if !holds {
                return Err(Error::new(ErrorKind::Config, "MQTT configuration").because(rule));
            }
        }
        self.endpoint().map(drop)
    }

    /// Host and port.
    pub(crate) fn endpoint(&self) -> Result<(&str, u16)> {
        let bad = || {
            Error::new(ErrorKind::Config, "MQTT broker")
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
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn not_yet(what: &str) -> Error {
    Error::new(ErrorKind::Unsupported, "MQTT URL").because(format_args!(
        "{what} is not available yet; use mqtt:// with MQTT 3.1.1"
    ))
}

impl fmt::Debug for MqttConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MqttConfig")
            .field("address", &self.address)
            .field("username", &self.username)
            .field("password", &self.password.as_ref().map(|_| "***"))
            .field("client_id", &self.client_id)
            .field("session", &self.session)
            .field("keep_alive", &self.keep_alive)
            .field("connect_timeout", &self.connect_timeout)
            .field("close_timeout", &self.close_timeout)
            .field("start_offline", &self.start_offline)
            .field("dialect", &self.dialect)
            .field("max_payload", &self.max_payload)
            .field("hard_limit", &self.hard_limit)
            .field("outbox", &self.outbox)
            .field("outbox_bytes", &self.outbox_bytes)
            .field("unacked_bytes", &self.unacked_bytes)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_the_same_as_code() {
        let url = "mqtt://me:s%40fe@[::1]:1884?client_id=c1&session=persistent&keep_alive=5s&start=offline\
                   &connect_timeout=2s&close_timeout=1s&dialect=commlib-py&max_payload=10&hard_limit=20&outbox=3\
                   &outbox_bytes=4&unacked_bytes=5&protocol=3.1.1";
        let config = MqttConfig::new("[::1]:1884")
            .login("me", "s@fe")
            .client_id("c1")
            .session(Session::Persistent)
            .keep_alive(Duration::from_secs(5))
            .start_offline(true)
            .connect_timeout(Duration::from_secs(2))
            .close_timeout(Duration::from_secs(1))
            .dialect(Dialect::CommlibPy)
            .max_payload(10)
            .hard_limit(20)
            .outbox(3)
            .outbox_bytes(4)
            .unacked_bytes(5);
        assert_eq!(MqttConfig::from_url(url).unwrap(), config);
        assert_eq!(config.endpoint().unwrap(), ("::1", 1884));
        assert!(!format!("{config:?}").contains("s@fe"));
    }

    #[test]
    fn endpoints() {
        for (address, expected) in [
            ("h", ("h", 1883)),
            ("h:1", ("h", 1)),
            ("::1", ("::1", 1883)),
            ("[::1]", ("::1", 1883)),
        ] {
            let config = MqttConfig::new(address);
            assert_eq!(config.endpoint().unwrap(), expected);
        }
        for address in ["", ":1", "h:", "h:x", "h:70000", "mqtt://h", "u@h"] {
            let error = MqttConfig::new(address).check().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config, "{address}");
        }
    }

    #[test]
    fn what_cannot_work_is_refused() {
        for (url, kind) in [
            ("mqtts://h", ErrorKind::Unsupported),
            ("mqtt://h?protocol=5", ErrorKind::Unsupported),
            ("mqtt://h?protocol=4", ErrorKind::Config),
            ("redis://h", ErrorKind::Config),
            ("mqtt:", ErrorKind::Config),
            ("mqtt://h/path", ErrorKind::Config),
            ("mqtt://h?keepalive=1s", ErrorKind::Config),
            ("mqtt://h?keep_alive=500ms", ErrorKind::Config),
            ("mqtt://h?keep_alive=20h", ErrorKind::Config),
            ("mqtt://h?session=persistent", ErrorKind::Config),
            ("mqtt://h?session=maybe", ErrorKind::Config),
            ("mqtt://h?start=later", ErrorKind::Config),
            ("mqtt://h?client_id=", ErrorKind::Config),
            ("mqtt://h?max_payload=0", ErrorKind::Config),
            (
                "mqtt://h?max_payload=2000&hard_limit=1000",
                ErrorKind::Config,
            ),
            ("mqtt://h?connect_timeout=0s", ErrorKind::Config),
            ("mqtt://h?outbox=0", ErrorKind::Config),
            ("mqtt://:pw@h", ErrorKind::Config),
        ] {
            let error = MqttConfig::from_url(url).expect_err(url);
            assert_eq!(error.kind(), kind, "{url}: {error}");
        }
    }
}
