//! What travels: a header and the still encoded data.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::codec::Value;
use crate::error::{Error, ErrorKind};

/// The only content type that is sent unless the application sets another.
pub const DEFAULT_CONTENT_TYPE: &str = "application/json";
/// The only content encoding that is sent unless the application sets another.
pub const DEFAULT_CONTENT_ENCODING: &str = "utf8";

/// One message: a [`Header`], and `data` as JSON text that nothing below the endpoints parses.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Message {
    /// Facts about the message.
    pub header: Header,
    /// The JSON text of the data. Cheap to clone: it is a slice of the packet it came in.
    pub data: Bytes,
}

impl Message {
    /// A message with the time of now and nothing else in its header.
    pub fn new(data: impl Into<Bytes>) -> Self {
        Self {
            header: Header {
                timestamp: Some(now()),
                ..Header::default()
            },
            data: data.into(),
        }
    }
}

/// Facts about a message. All are optional on input; unknown fields of other programs are kept in `extra`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Header {
    /// When it was sent, in nanoseconds since 1970 by the sender's clock. Information only: devices may
    /// have no real-time clock, so no decision rests on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<u64>,
    /// Where the answer goes; set on requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<ReplyTo>,
    /// Ties a reply to its request where the reply address alone does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// Who sent it: an id that is new for each connection of ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sender: Option<Arc<str>>,
    /// Identifies the message among all of the same sender.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message_id: Option<String>,
    /// Counts the messages of one sender on one topic from 1, so that receivers notice what is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
    /// On requests: how long the caller waits, in milliseconds, counted by the receiver from arrival.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// On replies: why the service could not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<RpcError>,
    /// The bridges it has passed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hops: Vec<String>,
    /// Free text fields such as `traceparent`. `content_type` and `content_encoding` stand here only when they
    /// differ from [`DEFAULT_CONTENT_TYPE`] and [`DEFAULT_CONTENT_ENCODING`].
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<String, String>,
    /// Header fields that commlib does not know, passed on as they came.
    #[serde(flatten)]
    pub extra: BTreeMap<String, Value>,
}

impl Header {
    /// The `content_type` property or its default.
    pub fn content_type(&self) -> &str {
        self.property("content_type")
            .unwrap_or(DEFAULT_CONTENT_TYPE)
    }

    /// The `content_encoding` property or its default.
    pub fn content_encoding(&self) -> &str {
        self.property("content_encoding")
            .unwrap_or(DEFAULT_CONTENT_ENCODING)
    }

    /// A property by name.
    pub fn property(&self, name: &str) -> Option<&str> {
        self.properties.get(name).map(String::as_str)
    }
}

/// How a peer writes messages. The default is commlib's own envelope; the others are for fleets of commlib-py programs.
///
/// It is set per connection (`?dialect=…`) or per endpoint. A service always answers in the form it was asked in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize)]
#[non_exhaustive]
pub enum Dialect {
    /// `{"header":…,"data":…}` around everything.
    #[default]
    #[serde(rename = "envelope")]
    Envelope,
    /// commlib-py 0.13: bare data on topics, its envelope around requests and replies.
    #[serde(rename = "commlib-py")]
    CommlibPy,
    /// commlib-py 0.11 and older: bare data on topics, the older envelope around requests and replies.
    #[serde(rename = "commlib-py-0.11")]
    CommlibPy011,
}

impl Dialect {
    /// All dialects, in the order of the documentation.
    pub const ALL: [Self; 3] = [Self::Envelope, Self::CommlibPy, Self::CommlibPy011];

    /// The name used in URLs and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Envelope => "envelope",
            Self::CommlibPy => "commlib-py",
            Self::CommlibPy011 => "commlib-py-0.11",
        }
    }

    /// True if topics carry the data alone, without a header.
    pub fn is_bare(self) -> bool {
        self != Self::Envelope
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Dialect {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|dialect| dialect.as_str() == text)
            .ok_or_else(|| {
                Error::new(ErrorKind::Config, "dialect").at(text).because(
                    "it is none of `envelope`, `commlib-py` (0.13) and `commlib-py-0.11` (and older)",
                )
            })
    }
}

/// Where a reply goes: opaque text of the broker, and the form the caller spoke.
///
/// The address is never checked as a [`Name`](crate::Name): foreign peers send slashes and `amq.…`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReplyTo {
    /// The broker's own text.
    pub address: String,
    /// What the reply must echo, if the caller asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// How the caller writes messages, and so how it reads them.
    pub form: Dialect,
}

/// A service's error, as it travels in the reply header: a code for programs, a sentence for people, more data if wanted.
///
/// Any [`std::error::Error`] converts into one with the code [`RpcError::INTERNAL`], so `?` works in handlers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RpcError {
    /// Short, stable text to branch on.
    pub code: String,
    /// What went wrong, for people.
    #[serde(default)]
    pub message: String,
    /// Anything else the service wants to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Value>,
}

impl RpcError {
    /// The code of errors that a handler returned without naming one.
    pub const INTERNAL: &'static str = "internal";
    /// The code for a request that is not what the service expects.
    pub const BAD_REQUEST: &'static str = "bad_request";
    /// The code for a handler that panicked.
    pub const PANIC: &'static str = "panic";
    /// The code for a request that waited longer than its caller does.
    pub const DEADLINE_EXCEEDED: &'static str = "deadline_exceeded";
    /// The code for a request that found the service's queue full.
    pub const OVERLOADED: &'static str = "overloaded";

    /// The code for a request that reached a service while it was stopping.
    pub const UNAVAILABLE: &'static str = "unavailable";

    /// An error with a code and a message.
    pub fn new(code: impl Into<String>, message: impl fmt::Display) -> Self {
        Self {
            code: code.into(),
            message: message.to_string(),
            data: None,
        }
    }

    /// Adds data.
    #[must_use]
    pub fn with_data(mut self, data: Value) -> Self {
        self.data = Some(data);
        self
    }
}

impl fmt::Display for RpcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.message.as_str() {
            "" => f.write_str(&self.code),
            message => write!(f, "{}: {message}", self.code),
        }
    }
}

// `RpcError` itself is no `std::error::Error`: that would make this conversion overlap with `From<T> for T`.
impl<E: std::error::Error> From<E> for RpcError {
    fn from(error: E) -> Self {
        Self::new(Self::INTERNAL, error)
    }
}

/// Now, in nanoseconds since 1970; 0 on a clock that stands before.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}
