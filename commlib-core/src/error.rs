//! The one error type: a kind to branch on, and a sentence for people.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;

use crate::message::RpcError;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure an [`Error`] is. Branch on this, never on the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A setting is wrong: a bad URL, an unknown option, an impossible combination. Nothing was sent.
    Config,
    /// A name or pattern breaks the rules of [`Name`](crate::Name) or [`Pattern`](crate::Pattern). Nothing was sent.
    InvalidAddress,
    /// The broker could not be reached in time, or refused the login.
    Connect,
    /// The link to the broker went down. See [`Error::maybe_executed`].
    ConnectionLost,
    /// The connection, node or endpoint was closed by this side.
    Closed,
    /// No answer, or no room, within the limit that was set.
    Timeout,
    /// A value could not be turned into JSON.
    Encode,
    /// Received bytes are not what was expected: not JSON, a malformed envelope, or another type.
    Decode,
    /// The service answered with an error. See [`Error::remote`].
    Remote,
    /// Nobody serves that name, as far as the broker can tell.
    NoService,
    /// The message is larger than the limit of this connection. Nothing was sent.
    TooLarge,
    /// The broker or the session cannot give the guarantee that was asked for.
    Unsupported,
    /// The broker refused the operation.
    Broker,
}

/// What failed, on which address, why, and the cause below it.
///
/// The text is one lower-case clause without the cause; causes are in [`source`](StdError::source).
/// One pointer wide, so that results stay small.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    operation: Cow<'static, str>,
    address: Option<String>,
    reason: Option<String>,
    maybe_executed: bool,
    remote: Option<RpcError>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of `kind` in `operation`, a verb with its preposition: `"publish to"`, `"connect to"`.
    pub fn new(kind: ErrorKind, operation: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner {
            kind,
            operation: operation.into(),
            address: None,
            reason: None,
            maybe_executed: false,
            remote: None,
            source: None,
        }))
    }

    /// Adds the address the operation was about: a topic, a service, a broker. Never pass a URL with a password.
    #[must_use]
    pub fn at(mut self, address: impl fmt::Display) -> Self {
        self.0.address = Some(address.to_string());
        self
    }

    /// Adds why it failed, and what to do about it.
    #[must_use]
    pub fn because(mut self, reason: impl fmt::Display) -> Self {
        self.0.reason = Some(reason.to_string());
        self
    }

    /// Adds the cause, kept for [`source`](StdError::source).
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Says that the other side may have acted on the request although no answer came.
    #[must_use]
    pub fn possibly_executed(mut self) -> Self {
        self.0.maybe_executed = true;
        self
    }

    /// A service's own error, as it came back in a reply.
    pub(crate) fn from_remote(service: impl fmt::Display, error: RpcError) -> Self {
        let mut this = Self::new(ErrorKind::Remote, "call to")
            .at(service)
            .because(&error);
        this.0.remote = Some(error);
        this
    }

    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The error the service answered with; `Some` exactly for [`ErrorKind::Remote`].
    pub fn remote(&self) -> Option<&RpcError> {
        self.0.remote.as_ref()
    }

    /// True for [`ErrorKind::Timeout`].
    pub fn is_timeout(&self) -> bool {
        self.0.kind == ErrorKind::Timeout
    }

    /// True if the same operation may succeed later without a change: the broker was away, busy or slow.
    ///
    /// Check [`maybe_executed`](Self::maybe_executed) before repeating something that must not happen twice.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self.0.kind,
            ErrorKind::Connect
                | ErrorKind::ConnectionLost
                | ErrorKind::Timeout
                | ErrorKind::NoService
        )
    }

    /// True if the request had been handed to the broker, so that the other side may have acted on it.
    pub fn maybe_executed(&self) -> bool {
        self.0.maybe_executed
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.operation)?;
        if let Some(address) = &self.0.address {
            write!(f, " `{address}`")?;
        }
        match &self.0.reason {
            Some(reason) => write!(f, ": {reason}"),
            None => f.write_str(" failed"),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Error");
        out.field("kind", &self.0.kind)
            .field("text", &self.to_string());
        if self.0.maybe_executed {
            out.field("maybe_executed", &true);
        }
        if let Some(source) = &self.0.source {
            out.field("source", source);
        }
        out.finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0
            .source
            .as_deref()
            .map(|source| source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_names_operation_address_and_reason() {
        let error = Error::new(ErrorKind::Timeout, "call to")
            .at("math.add")
            .because("no reply within 5s");
        assert_eq!(error.to_string(), "call to `math.add`: no reply within 5s");
        assert!(error.is_timeout() && error.is_retryable() && !error.maybe_executed());
    }

    #[test]
    fn cause_is_in_source_not_in_the_text() {
        let io = std::io::Error::other("refused");
        let error = Error::new(ErrorKind::Connect, "connect to")
            .at("mqtt://h:1")
            .caused_by(io);
        assert_eq!(error.to_string(), "connect to `mqtt://h:1` failed");
        assert_eq!(
            error.source().map(ToString::to_string).as_deref(),
            Some("refused")
        );
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }
}
