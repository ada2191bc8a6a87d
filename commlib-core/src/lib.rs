//! The broker-independent heart of commlib.

mod ack;
mod address;
mod backoff;
mod codec;
mod config;
pub mod envelope;
mod error;
mod inbox;
mod link;
mod message;
mod receipt;
mod reply;
mod transport;

pub use ack::{Ack, AckOutcome, AckReply};
pub use address::{MAX_NAME_LEN, Name, Pattern, Source, Target, escape_segment, unescape_segment};
pub use backoff::Backoff;
pub use codec::{RawValue, Value, decode, encode, json};
pub use config::{BrokerUrl, parse_duration};
pub use error::{Error, ErrorKind, Result};
pub use inbox::{Arrival, Gap, GapCause, Inbox, InboxSender, Incoming, Malformed, StopGuard};
pub use link::{
    AbsentService, Capabilities, DEFAULT_MAX_PAYLOAD, Link, LinkState, QueueKind, ReplyKind,
};
pub use message::{
    DEFAULT_CONTENT_ENCODING, DEFAULT_CONTENT_TYPE, Dialect, Header, Message, ReplyTo, RpcError,
};
pub use receipt::{Confirm, Receipt};
pub use reply::{Leases, ReplyLease};
pub use transport::{Delivery, ListenOptions, SendOptions, Transport};
