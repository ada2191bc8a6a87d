//! One connection to the server: opening it, commands out, replies in.
//!
//! Of the client crate this uses the decoder alone. Its connections answer through further tasks, give up on a reply
//! after half a second and buffer messages without bound; here one task owns a socket and sees all that happens on it.

use std::fmt::Display;
use std::io::{self, Write as _};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::StreamExt;
use redis::io::tcp::socket2::{SockRef, TcpKeepalive};
use redis::{RedisError, ServerError, Value, ValueCodec};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Interval, MissedTickBehavior, interval, timeout};
use tokio_util::codec::{Decoder, FramedRead};

use crate::config::{Protocol, RedisConfig};

/// How long one attempt may take, from the look-up of the name to the server's answer.
const ATTEMPT: Duration = Duration::from_secs(5);

/// What is read at once.
const READ_BUFFER: usize = 32 << 10;

/// How much longer than `hard_limit` what is not decoded yet may be: headers, and the start of the next value.
const SLACK: usize = 128 << 10;

/// Nothing more should be put while this much waits to be written.
const OUT_CAP: usize = 256 << 10;

/// A connection on which the server accepted the login.
#[derive(Debug)]
pub(crate) struct Wire {
    reads: FramedRead<OwnedReadHalf, Limited>,
    write: OwnedWriteHalf,
    out: BytesMut,
    beat: Interval,
    silent_beats: u32,
    patience: Duration,
}

/// What happens on a connection.
#[derive(Debug)]
pub(crate) enum Event {
    /// The server sent this.
    Value(Value),
    /// The server has been silent for a while: time for a PING, unless it is expected to be.
    Quiet,
}

/// Why there is no connection.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) cause: String,
    /// Trying again is pointless until someone acts.
    pub(crate) fatal: bool,
}

impl Failure {
    pub(crate) fn transient(cause: impl Display) -> Self {
        Self {
            cause: cause.to_string(),
            fatal: false,
        }
    }
}

/// Appends a command, in the form that both versions of the protocol share.
pub(crate) fn put(out: &mut impl BufMut, arguments: &[&[u8]]) {
    // Writing to memory cannot fail.
    let _ = write!(out.writer(), "*{}\r\n", arguments.len());
    for argument in arguments {
        let _ = write!(out.writer(), "${}\r\n", argument.len());
        out.put_slice(argument);
        out.put_slice(b"\r\n");
    }
}

/// A server's error in its own words.
pub(crate) fn error_text(error: &ServerError) -> String {
    match error.details() {
        Some(details) => format!("{} {details}", error.code()),
        None => error.code().to_owned(),
    }
}

/// Whether this server cannot do it now but will, or another one can: it starts, or became somebody's replica.
pub(crate) fn is_passing(error: &ServerError) -> bool {
    matches!(
        error.code(),
        "LOADING" | "MASTERDOWN" | "READONLY" | "UNBLOCKED"
    )
}

/// The bytes of a string; `None` for any other value.
pub(crate) fn bytes(value: Value) -> Option<Bytes> {
    match value {
        Value::BulkString(bytes) => Some(bytes.into()),
        Value::SimpleString(text) => Some(text.into_bytes().into()),
        Value::VerbatimString { text, .. } => Some(text.into_bytes().into()),
        _ => None,
    }
}

/// The elements of an array; none for any other value.
pub(crate) fn array(value: Value) -> std::vec::IntoIter<Value> {
    match value {
        Value::Array(values) | Value::Set(values) | Value::Push { data: values, .. } => values,
        // What protocol 3 writes as a map is an array of pairs in protocol 2.
        Value::Map(pairs) => pairs
            .into_iter()
            .map(|(key, value)| Value::Array(vec![key, value]))
            .collect(),
        _ => Vec::new(),
    }
    .into_iter()
}

impl Wire {
    /// Connects and logs in. The host name is looked up anew each time: servers move.
    ///
    /// `patience` is how long the server may be silent before it counts as gone.
    pub(crate) async fn open(config: &RedisConfig, patience: Duration) -> Result<Self, Failure> {
        let attempt = async {
            let mut wire = Self::connect(config, patience).await?;
            wire.log_in(config).await?;
            Ok(wire)
        };
        timeout(ATTEMPT, attempt).await.unwrap_or_else(|_| {
            let cause = format!("no answer within {ATTEMPT:?}");
            Err(Failure::transient(cause))
        })
    }

    async fn connect(config: &RedisConfig, patience: Duration) -> Result<Self, Failure> {
        let endpoint = config.endpoint().map_err(Failure::transient)?;
        let stream = TcpStream::connect(endpoint)
            .await
            .map_err(Failure::transient)?;
        // Small commands must not wait for each other.
        stream.set_nodelay(true).map_err(Failure::transient)?;
        // Keeps address translators on the way awake while a blocking read waits.
        let keepalive = TcpKeepalive::new().with_time(patience);
        if let Err(error) = SockRef::from(&stream).set_tcp_keepalive(&keepalive) {
            tracing::debug!(%error, "no TCP keepalive");
        }
        let (read, write) = stream.into_split();
        let codec = Limited {
            codec: ValueCodec::default(),
            limit: config.hard_limit,
            heard: false,
        };
        let mut beat = interval(patience / 2);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        beat.reset();
        Ok(Self {
            reads: FramedRead::with_capacity(read, codec, READ_BUFFER),
            write,
            out: BytesMut::new(),
            beat,
            silent_beats: 0,
            patience,
        })
    }

    async fn log_in(&mut self, config: &RedisConfig) -> Result<(), Failure> {
        let password = config.password.as_deref().map(str::as_bytes);
        let username = config.username.as_deref().unwrap_or("default").as_bytes();
        let database = config.database.to_string();
        let mut steps: Vec<(&str, Vec<&[u8]>)> = Vec::new();
        match (config.protocol, password) {
            (Protocol::Resp3, None) => steps.push(("protocol=resp3", vec![b"HELLO", b"3"])),
            (Protocol::Resp3, Some(password)) => steps.push((
                "the login",
                vec![b"HELLO", b"3", b"AUTH", username, password],
            )),
            (Protocol::Resp2, None) => {}
            // Servers before Redis 6 know no user names.
            (Protocol::Resp2, Some(password)) if config.username.is_none() => {
                steps.push(("the login", vec![b"AUTH", password]));
            }
            (Protocol::Resp2, Some(password)) => {
                steps.push(("the login", vec![b"AUTH", username, password]));
            }
        }
        if config.database != 0 {
            steps.push(("the database", vec![b"SELECT", database.as_bytes()]));
        }
        steps.push(("", vec![b"PING"]));
        if let Some(id) = &config.client_id {
            // Last: its answer does not matter, and what came before says more.
            steps.push(("", vec![b"CLIENT", b"SETNAME".as_slice(), id.as_bytes()]));
        }
        for (_, command) in &steps {
            self.put(command);
        }
        for (what, _) in steps {
            let value = loop {
                if let Event::Value(value) = self.next().await.map_err(Failure::transient)? {
                    break value;
                }
            };
            if let Value::ServerError(error) = value {
                refusal(what, &error)?;
            }
        }
        Ok(())
    }

    /// Prepares a command for writing, which [`next`](Self::next) does.
    pub(crate) fn put(&mut self, arguments: &[&[u8]]) {
        put(&mut self.out, arguments);
    }

    /// As [`put`](Self::put), for commands that are encoded already.
    pub(crate) fn put_encoded(&mut self, commands: &[u8]) {
        self.out.extend_from_slice(commands);
    }

    /// Whether more should be put.
    pub(crate) fn has_room(&self) -> bool {
        self.out.len() < OUT_CAP
    }

    /// Starts to count the server's silence from now, after a time in which nothing was asked of it.
    pub(crate) fn listen_again(&mut self) {
        self.silent_beats = 0;
        self.beat.reset();
    }

    /// Writes what is to be written until something comes in. Cancel safe.
    ///
    /// # Errors
    /// The reason why this connection is of no more use.
    pub(crate) async fn next(&mut self) -> Result<Event, String> {
        loop {
            tokio::select! {
                biased;
                value = self.reads.next() => return match value {
                    Some(Ok(value)) => {
                        self.silent_beats = 0;
                        Ok(Event::Value(value))
                    }
                    Some(Err(error)) => Err(error.to_string()),
                    None => Err("the server closed the connection".to_owned()),
                },
                written = self.write.write_buf(&mut self.out), if !self.out.is_empty() => match written {
                    Ok(0) => return Err("the server closed the connection".to_owned()),
                    Ok(_) => {}
                    Err(error) => return Err(error.to_string()),
                },
                _ = self.beat.tick() => {
                    // A large value on a slow link is no silence, although it is not whole yet.
                    if std::mem::take(&mut self.reads.decoder_mut().heard) {
                        self.silent_beats = 0;
                    }
                    self.silent_beats += 1;
                    match self.silent_beats {
                        1 => return Ok(Event::Quiet),
                        2 => {}
                        _ => return Err(format!("the server has been silent for {:?}", self.patience)),
                    }
                }
            }
        }
    }
}

/// Whether a refused step of the login ends the attempt.
fn refusal(what: &str, error: &ServerError) -> Result<(), Failure> {
    let text = error_text(error);
    let advice = match error.code() {
        _ if is_passing(error) => return Err(Failure::transient(text)),
        "BUSY" => return Err(Failure::transient(text)),
        "ERR" if text.contains("max number of clients") => return Err(Failure::transient(text)),
        "NOAUTH" => "; it wants a password: write redis://user:password@host",
        "WRONGPASS" => "; check user and password",
        "DENIED" => "",
        // A user who may not PING may still do all that is needed.
        _ if what.is_empty() => return Ok(()),
        "ERR" if text.contains("unknown command") => "; it needs Redis 6 or later",
        _ => "",
    };
    let what = if what.is_empty() { "the login" } else { what };
    Err(Failure {
        cause: format!("the server refused {what}: {text}{advice}"),
        fatal: true,
    })
}

/// The client crate's decoder with a limit on what it buffers.
struct Limited {
    codec: ValueCodec,
    limit: usize,
    /// Bytes have arrived since this was last reset.
    heard: bool,
}

impl std::fmt::Debug for Limited {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Limited").finish_non_exhaustive()
    }
}

impl Decoder for Limited {
    type Item = Value;
    type Error = io::Error;

    fn decode(&mut self, source: &mut BytesMut) -> io::Result<Option<Value>> {
        self.heard = true;
        let value = self
            .codec
            .decode(source)
            .map_err(|error| not_redis(&error))?;
        if value.is_none() && source.len() > self.limit.saturating_add(SLACK) {
            return Err(io::Error::other(format!(
                "PacketTooLarge: a value of more than {} bytes, which is `hard_limit`",
                self.limit
            )));
        }
        Ok(value)
    }
}

fn not_redis(error: &RedisError) -> io::Error {
    io::Error::other(format!(
        "what the server sends is not its protocol: {error}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limited(limit: usize) -> Limited {
        Limited {
            codec: ValueCodec::default(),
            limit,
            heard: false,
        }
    }

    #[test]
    fn commands_are_what_the_protocol_says() {
        let mut out = Vec::new();
        put(&mut out, &[b"RPUSH", b"", b"a\r\nb"]);
        assert_eq!(out, b"*3\r\n$5\r\nRPUSH\r\n$0\r\n\r\n$4\r\na\r\nb\r\n");
    }

    #[test]
    fn a_value_beyond_the_limit_is_an_error_before_it_is_whole() {
        let mut codec = limited(1000);
        let mut source = BytesMut::from(&b"$10000000\r\n"[..]);
        assert!(codec.decode(&mut source).unwrap().is_none() && codec.heard);
        source.extend_from_slice(&vec![0; SLACK + 1001]);
        let error = codec.decode(&mut source).unwrap_err();
        assert!(error.to_string().contains("PacketTooLarge"), "{error}");
    }

    #[test]
    fn refusals_say_what_to_do() {
        for (reply, what, cause, fatal) in [
            ("-LOADING Redis is loading", "", "LOADING", false),
            ("-ERR max number of clients reached", "", "clients", false),
            (
                "-NOAUTH Authentication required.",
                "",
                "user:password",
                true,
            ),
            ("-WRONGPASS invalid", "the login", "check user", true),
            ("-DENIED protected mode", "", "DENIED", true),
            (
                "-ERR unknown command 'HELLO'",
                "protocol=resp3",
                "Redis 6",
                true,
            ),
        ] {
            let reply = redis::parse_redis_value(format!("{reply}\r\n").as_bytes());
            let Ok(Value::ServerError(error)) = reply else {
                panic!("{reply:?}")
            };
            let failure = refusal(what, &error).unwrap_err();
            assert!(failure.cause.contains(cause), "{}", failure.cause);
            assert_eq!(failure.fatal, fatal, "{}", failure.cause);
        }
        let reply = redis::parse_redis_value(b"-NOPERM no PING for you\r\n").unwrap();
        let Value::ServerError(error) = reply else {
            panic!()
        };
        assert!(refusal("", &error).is_ok());
    }

    proptest! {
        #[test]
        fn whatever_the_server_sends_is_read_or_refused(
            bytes in "([*$:+%~>_,#(=!-][0-9a-z.-]{0,2}\r\n|[a-z]{1,3}\r\n){0,12}",
            cut in 0..60_usize,
        ) {
            let mut codec = limited(1000);
            let (head, tail) = bytes.as_bytes().split_at(cut.min(bytes.len()));
            let mut source = BytesMut::new();
            for part in [head, tail] {
                source.extend_from_slice(part);
                while let Ok(Some(value)) = codec.decode(&mut source) {
                    let _ = array(value).map(bytes_of).count();
                }
            }
        }
    }

    fn bytes_of(value: Value) -> Option<Bytes> {
        bytes(value)
    }
}
