//! What a connection needs to know, in code or as a URL.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use commlib_core::{BrokerUrl, Connection, DEFAULT_MAX_PAYLOAD, Dialect, Error, ErrorKind, Result};

use crate::RedisTransport;

const DEFAULT_PORT: u16 = 6379;

/// The largest string that a Redis server takes (`proto-max-bulk-len`).
const MAX_HARD_LIMIT: usize = 512 << 20;

/// The version of the protocol that is spoken with the server. Nothing but the bytes depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    /// Every server speaks it.
    #[default]
    Resp2,
    /// Needs Redis 6 or later.
    Resp3,
}

impl FromStr for Protocol {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "resp2" => Ok(Self::Resp2),
            "resp3" => Ok(Self::Resp3),
            _ => Err("write `resp2` or `resp3`"),
        }
    }
}

/// How to reach a Redis server, and what to expect of it.
///
/// As a URL: `redis://[user:password@]host[:6379][/database]?option=value&…`. Options are `protocol` (`resp2`,
/// `resp3`), `streams` (`on`, `off`), `stream_length`, `client_id`, `keep_alive`, `connect_timeout`, `close_timeout`,
/// `start` (`online`, `offline`), `dialect`, `max_payload`, `hard_limit`, `outbox` and `outbox_bytes`; they mean what
/// the fields say.
///
/// ```
/// # use std::time::Duration;
/// use commlib_redis::RedisConfig;
///
/// let in_code = RedisConfig::new("localhost").keep_alive(Duration::from_secs(5)).streams(true);
/// let as_url = RedisConfig::from_url("redis://localhost?keep_alive=5s&streams=on")?;
/// assert_eq!(in_code.streams, as_url.streams);
/// # Ok::<(), commlib_core::Error>(())
/// ```
#[derive(Clone, PartialEq)]
#[non_exhaustive]
pub struct RedisConfig {
    /// The server, `host` or `host:port`. IPv6 addresses with a port stand in brackets.
    pub address: String,
    /// The user name, if the server knows users (Redis 6).
    pub username: Option<String>,
    /// The password, if the server wants one. `Debug` does not show it.
    pub password: Option<String>,
    /// The number of the database. Lists and streams are kept there; topics are common to all databases.
    pub database: u32,
    /// The version of the protocol.
    pub protocol: Protocol,
    /// Makes at-least-once topics possible: their messages are kept in streams as well.
    pub streams: bool,
    /// How many messages the stream of a topic keeps, approximately. A subscriber that falls behind by more misses the
    /// oldest, and sees a gap. Default 100,000.
    pub stream_length: usize,
    /// The name of this client in the server's `CLIENT LIST`.
    pub client_id: Option<String>,
    /// How long a link may be silent before it counts as lost; a quiet one is probed at half of this. Default 10 s.
    pub keep_alive: Duration,
    /// How long `connect` keeps trying. Default 10 s.
    pub connect_timeout: Duration,
    /// How long `close` waits for outstanding answers. Default 5 s.
    pub close_timeout: Duration,
    /// Makes `connect` return at once and the first connection in the background.
    pub start_offline: bool,
    /// How messages are written unless an endpoint says otherwise.
    pub dialect: Dialect,
    /// The largest data to send, and to accept, in bytes. Default 1 MiB.
    pub max_payload: usize,
    /// The largest value to read at all. One between `max_payload` and this is reported as malformed; a larger one
    /// costs the link. Default 16 MiB.
    pub hard_limit: usize,
    /// How many at-least-once messages may wait for the server's confirmation. Default 1,000.
    pub outbox: usize,
    /// How many bytes of at-least-once messages may wait for the server's confirmation. Default 64 MiB.
    pub outbox_bytes: usize,
}

impl Default for RedisConfig {
    /// The server at `localhost:6379`.
    fn default() -> Self {
        Self {
            address: format!("localhost:{DEFAULT_PORT}"),
            username: None,
            password: None,
            database: 0,
            protocol: Protocol::default(),
            streams: false,
            stream_length: 100_000,
            client_id: None,
            keep_alive: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            close_timeout: Duration::from_secs(5),
            start_offline: false,
            dialect: Dialect::default(),
            max_payload: DEFAULT_MAX_PAYLOAD,
            hard_limit: 16 << 20,
            outbox: 1000,
            outbox_bytes: 64 << 20,
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

impl RedisConfig {
    /// The server at `host` or `host:port`, everything else as in [`default`](Self::default).
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
        let wrong = |why: &str| Error::new(ErrorKind::Config, "Redis URL").because(why);
        match url.scheme.as_str() {
            "redis" => {}
            "rediss" => {
                return Err(Error::new(ErrorKind::Unsupported, "Redis URL")
                    .because("rediss:// (TLS) is not available yet; use redis://"));
            }
            _ => return Err(wrong("it starts with `redis://`")),
        }
        if url.host.is_empty() {
            return Err(wrong("the host is missing: write `redis://localhost:6379`"));
        }
        let database = match url.path.trim_start_matches('/') {
            "" => 0,
            number => number
                .parse()
                .map_err(|_| wrong("after the host stands the number of the database"))?,
        };
        let host = if url.host.contains(':') {
            format!("[{}]", url.host)
        } else {
            url.host.clone()
        };
        let mut config = Self::new(format!("{host}:{}", url.port.unwrap_or(DEFAULT_PORT)));
        config.username = url.username.take();
        config.password = url.password.take();
        config.database = database;
        config.client_id = url.take("client_id");
        set(&mut config.protocol, url.take_parsed("protocol")?);
        let streams = url.take_with("streams", |text| switch(text, "on", "off"))?;
        set(&mut config.streams, streams);
        set(&mut config.stream_length, url.take_parsed("stream_length")?);
        set(&mut config.keep_alive, url.take_duration("keep_alive")?);
        let connect_timeout = url.take_duration("connect_timeout")?;
        set(&mut config.connect_timeout, connect_timeout);
        let close_timeout = url.take_duration("close_timeout")?;
        set(&mut config.close_timeout, close_timeout);
        let start = url.take_with("start", |text| switch(text, "offline", "online"))?;
        set(&mut config.start_offline, start);
        set(&mut config.dialect, url.take_parsed("dialect")?);
        set(&mut config.max_payload, url.take_parsed("max_payload")?);
        set(&mut config.hard_limit, url.take_parsed("hard_limit")?);
        set(&mut config.outbox, url.take_parsed("outbox")?);
        set(&mut config.outbox_bytes, url.take_parsed("outbox_bytes")?);
        url.finish()?;
        config.check()?;
        Ok(config)
    }

    /// Connects. Must be called within a tokio runtime. Cancelling it ends the attempt.
    ///
    /// # Errors
    /// As [`RedisTransport::connect`].
    pub async fn connect(&self) -> Result<Connection> {
        let transport = RedisTransport::connect(self.clone()).await?;
        Ok(Connection::new(transport).with_dialect(self.dialect))
    }

    setters! {
        /// Sets the number of the database.
        database: u32 => database;
        /// Sets the version of the protocol.
        protocol: Protocol => protocol;
        /// Sets whether at-least-once topics are possible.
        streams: bool => streams;
        /// Sets how many messages the stream of a topic keeps.
        stream_length: usize => stream_length;
        /// Sets the name of this client at the server.
        client_id: impl Into<String> => Some(client_id.into());
        /// Sets how long a link may be silent.
        keep_alive: Duration => keep_alive;
        /// Sets how long `connect` keeps trying.
        connect_timeout: Duration => connect_timeout;
        /// Sets how long `close` waits for outstanding answers.
        close_timeout: Duration => close_timeout;
        /// Sets whether `connect` returns before there is a connection.
        start_offline: bool => start_offline;
        /// Sets how messages are written.
        dialect: Dialect => dialect;
        /// Sets the largest data to send and to accept.
        max_payload: usize => max_payload;
        /// Sets the largest value to read at all.
        hard_limit: usize => hard_limit;
        /// Sets how many at-least-once messages may wait for confirmation.
        outbox: usize => outbox;
        /// Sets how many bytes of at-least-once messages may wait for confirmation.
        outbox_bytes: usize => outbox_bytes;
    }

    /// Sets the user name and password.
    #[must_use]
    pub fn login(mut self, username: impl Into<String>, password: impl Into<String>) -> Self {
        self.username = Some(username.into());
        self.password = Some(password.into());
        self
    }

    /// Finds what cannot work, before any socket opens.
    pub(crate) fn check(&self) -> Result<()> {
        let day = Duration::from_secs(86_400);
        let rules = [
            (
                (Duration::from_millis(100)..=day).contains(&self.keep_alive),
                "`keep_alive` is 100ms to 24h",
            ),
            (
                !self.connect_timeout.is_zero(),
                "`connect_timeout` is more than zero",
            ),
            (
                self.password.is_some() || self.username.is_none(),
                "a user name needs a password",
            ),
            (
                self.client_id.as_ref().is_none_or(|id| {
                    !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_graphic())
                }),
                "`client_id` has no spaces and only ASCII characters",
            ),
            (
                (1..=self.hard_limit).contains(&self.max_payload)
                    && self.hard_limit <= MAX_HARD_LIMIT,
                "`max_payload` is at least 1 and at most `hard_limit`, and that at most 512 MiB",
            ),
            (
                self.outbox >= 1 && self.outbox_bytes >= 1 && self.stream_length >= 1,
                "`outbox`, `outbox_bytes` and `stream_length` are at least 1",
            ),
        ];
        for (holds, rule) in rules {
            if !holds {
                return Err(Error::new(ErrorKind::Config, "Redis configuration").because(rule));
            }
        }
        self.endpoint().map(drop)
    }

    /// Host and port.
    pub(crate) fn endpoint(&self) -> Result<(&str, u16)> {
        let bad = || {
            Error::new(ErrorKind::Config, "Redis server")
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

    /// The server's URL without login and options.
    pub(crate) fn url(&self) -> String {
        match self.database {
            0 => format!("redis://{}", self.address),
            database => format!("redis://{}/{database}", self.address),
        }
    }
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn switch(text: &str, yes: &str, no: &str) -> Result<bool, String> {
    match text {
        _ if text == yes => Ok(true),
        _ if text == no => Ok(false),
        _ => Err(format!("write `{yes}` or `{no}`")),
    }
}

impl fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisConfig")
            .field("address", &self.address)
            .field("username", &self.username)
            .field("password", &self.password.as_ref().map(|_| "***"))
            .field("database", &self.database)
            .field("protocol", &self.protocol)
            .field("streams", &self.streams)
            .field("stream_length", &self.stream_length)
            .field("client_id", &self.client_id)
            .field("keep_alive", &self.keep_alive)
            .field("connect_timeout", &self.connect_timeout)
            .field("close_timeout", &self.close_timeout)
            .field("start_offline", &self.start_offline)
            .field("dialect", &self.dialect)
            .field("max_payload", &self.max_payload)
            .field("hard_limit", &self.hard_limit)
            .field("outbox", &self.outbox)
            .field("outbox_bytes", &self.outbox_bytes)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_the_same_as_code() {
        let url = "redis://me:s%40fe@[::1]:6380/3?protocol=resp3&streams=on&stream_length=7&client_id=c1&keep_alive=5s\
                   &start=offline&connect_timeout=2s&close_timeout=1s&dialect=commlib-py&max_payload=10&hard_limit=20\
                   &outbox=3&outbox_bytes=4";
        let config = RedisConfig::new("[::1]:6380")
            .login("me", "s@fe")
            .database(3)
            .protocol(Protocol::Resp3)
            .streams(true)
            .stream_length(7)
            .client_id("c1")
            .keep_alive(Duration::from_secs(5))
            .start_offline(true)
            .connect_timeout(Duration::from_secs(2))
            .close_timeout(Duration::from_secs(1))
            .dialect(Dialect::CommlibPy)
            .max_payload(10)
            .hard_limit(20)
            .outbox(3)
            .outbox_bytes(4);
        assert_eq!(RedisConfig::from_url(url).unwrap(), config);
        assert_eq!(config.endpoint().unwrap(), ("::1", 6380));
        assert_eq!(config.url(), "redis://[::1]:6380/3");
        assert!(!format!("{config:?}").contains("s@fe"));
        let password_only = RedisConfig::from_url("redis://:secret@h/").unwrap();
        assert_eq!(password_only.password.as_deref(), Some("secret"));
        assert_eq!(password_only.username, None);
    }

    #[test]
    fn what_cannot_work_is_refused() {
        for (url, kind, text) in [
            ("rediss://h", ErrorKind::Unsupported, "TLS"),
            ("mqtt://h", ErrorKind::Config, "redis://"),
            ("redis:", ErrorKind::Config, "host"),
            ("redis://h/db", ErrorKind::Config, "database"),
            ("redis://h/-1", ErrorKind::Config, "database"),
            ("redis://h?stream=on", ErrorKind::Config, "stream_length"),
            ("redis://h?streams=yes", ErrorKind::Config, "`on` or `off`"),
            ("redis://h?protocol=3", ErrorKind::Config, "resp3"),
            ("redis://h?keep_alive=1ms", ErrorKind::Config, "100ms"),
            ("redis://h?connect_timeout=0s", ErrorKind::Config, "zero"),
            ("redis://me@h", ErrorKind::Config, "password"),
            ("redis://h?client_id=a%20b", ErrorKind::Config, "spaces"),
            ("redis://h?max_payload=0", ErrorKind::Config, "max_payload"),
            ("redis://h?outbox=0", ErrorKind::Config, "outbox"),
        ] {
            let error = RedisConfig::from_url(url).unwrap_err();
            assert_eq!(error.kind(), kind, "{url}");
            assert!(error.to_string().contains(text), "{url}: {error}");
        }
        for address in ["", ":1", "h:", "h:x", "h:70000", "redis://h", "u@h"] {
            let error = RedisConfig::new(address).check().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config, "{address}");
        }
    }
}
