//! One connection of the client crate: opened, understood when it fails, and taken down for sure.

use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use commlib_core::{Error, ErrorKind, Result};
use futures_util::{Stream, StreamExt};
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::tcp::AsyncTcpStream;
use lapin::uri::{
    AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo, SASLMechanism,
};
use lapin::{Connection, ConnectionProperties, Event};
use socket2::{SockRef, Socket};
use tokio::net::lookup_host;

use crate::config::AmqpConfig;

/// An open connection. Dropping it closes the socket, whatever the client crate is waiting for.
pub(crate) struct Wire {
    pub(crate) connection: Arc<Connection>,
    /// Blocked, unblocked, lost. The client crate keeps what is not taken.
    pub(crate) events: Pin<Box<dyn Stream<Item = Event> + Send>>,
    _hangup: Hangup,
}

/// Why a connection could not be opened.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) cause: String,
    /// Set if another attempt would fail in the same way.
    pub(crate) fatal: Option<Error>,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self {
            cause: error.to_string(),
            fatal: None,
        }
    }
}

/// Shuts the socket down when dropped.
///
/// The client crate's thread waits on the socket for ever in two cases: during a handshake that the broker does not go
/// on with, and while the broker blocks the connection.
struct Hangup(Socket);

impl Drop for Hangup {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// Opens a connection; names are resolved anew. Cancel safe: a cancelled attempt leaves nothing behind.
pub(crate) async fn open(config: &AmqpConfig) -> Result<Wire, Failure> {
    let failure = |error: &lapin::Error| Failure {
        cause: if config.external_auth {
            // A broker that does not know the mechanism just hangs up.
            format!("{}; does the broker accept `auth=external`?", text(error))
        } else {
            text(error)
        },
        fatal: refusal(config, error),
    };
    let runtime = lapin::runtime::default_runtime().map_err(|e| failure(&e))?;
    let (host, port) = config.endpoint().map_err(|e| Failure {
        cause: e.to_string(),
        fatal: Some(e),
    })?;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
    let mut stream = None;
    for address in lookup_host((host, port)).await? {
        match AsyncTcpStream::connect(&runtime, address).await {
            Ok(open) => {
                stream = Some(open);
                break;
            }
            Err(error) => last = error,
        }
    }
    let stream = stream.ok_or(last)?;
    let AsyncTcpStream::Plain(socket) = &stream else {
        return Err(io::Error::other("the connection is not a plain one").into());
    };
    let hangup = Hangup(SockRef::from(socket.get_ref()).try_clone()?);
    // Taken by the one connect that the client crate makes: its own recovery is off.
    let stream = Mutex::new(Some(stream));
    let connect = async move |_: AMQPUri, _| {
        let stream = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        stream.ok_or_else(|| io::Error::other("connected already").into())
    };
    let name = format!("commlib {}", std::process::id());
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let connection = Connection::connector(uri(config, host, port), runtime, connect, properties)
        .await
        .map_err(|e| failure(&e))?;
    Ok(Wire {
        events: connection.events_listener().boxed(),
        connection: Arc::new(connection),
        _hangup: hangup,
    })
}

fn uri(config: &AmqpConfig, host: &str, port: u16) -> AMQPUri {
    AMQPUri {
        scheme: AMQPScheme::AMQP,
        authority: AMQPAuthority {
            userinfo: AMQPUserInfo {
                username: config.username.clone(),
                password: config.password.clone(),
            },
            host: host.to_owned(),
            port,
        },
        vhost: config.vhost.clone(),
        query: AMQPQueryString {
            heartbeat: u16::try_from(config.heartbeat.as_secs()).ok(),
            auth_mechanism: config.external_auth.then_some(SASLMechanism::External),
            ..AMQPQueryString::default()
        },
    }
}

/// The broker's word that it will not have this connection, now or later.
fn refusal(config: &AmqpConfig, error: &lapin::Error) -> Option<Error> {
    let lapin::ErrorKind::ProtocolError(refused) = error.kind() else {
        return None;
    };
    let message = refused.get_message().as_str();
    let advice = match refused.kind() {
        AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) if config.external_auth => {
            "check how the connection proves who it is (`auth=external`)".to_owned()
        }
        AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => {
            let remote = match config.username.as_str() {
                "guest" => "; `guest` may only come from the broker's own machine",
                _ => "",
            };
            format!("check the password of user `{}`{remote}", config.username)
        }
        // Also said of too many connections and of a virtual host that is starting, which pass.
        AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED)
            if message.contains("not found")
                || (message.contains("refused") && !message.contains("limit")) =>
        {
            format!(
                "check that the virtual host `{}` exists and user `{}` may use it",
                config.vhost, config.username
            )
        }
        _ => return None,
    };
    let error = Error::new(ErrorKind::Connect, "connect to")
        .at(config.shown_url())
        .because(format_args!("{advice} (the broker says: {message})"));
    Some(error)
}

/// An error of the client crate in words, the broker's own where it said something.
pub(crate) fn text(error: &lapin::Error) -> String {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(refused) => {
            format!("the broker closed it: {}", refused.get_message())
        }
        lapin::ErrorKind::IOError(io) if io.kind() == io::ErrorKind::ConnectionAborted => {
            "the connection was closed".to_owned()
        }
        lapin::ErrorKind::MissingHeartbeatError => "the broker has fallen silent".to_owned(),
        lapin::ErrorKind::IOError(io) => io.to_string(),
        _ => error.to_string(),
    }
}

/// Whether the broker closed a channel over what was asked of it.
pub(crate) fn is_exception(error: &lapin::Error) -> bool {
    error.is_amqp_soft_error()
}

/// Whether more than a channel is gone. The connection's own state may not say so yet.
pub(crate) fn ends_connection(error: &lapin::Error) -> bool {
    use lapin::ErrorKind::{InvalidChannel, InvalidChannelState};
    !is_exception(error) && !matches!(error.kind(), InvalidChannel(_) | InvalidChannelState(..))
}

/// Whether the broker does not know what was named.
pub(crate) fn is_missing(error: &lapin::Error) -> bool {
    matches!(error.kind(), lapin::ErrorKind::ProtocolError(refused)
        if *refused.kind() == AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND))
}

/// The error for whoever asked for what the broker refused.
pub(crate) fn refused(operation: &'static str, address: &str, error: &lapin::Error) -> Error {
    let (kind, advice) = match error.kind() {
        lapin::ErrorKind::ProtocolError(refused) => match refused.kind() {
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => (
                ErrorKind::Broker,
                "the user lacks the right, or the name is one of the broker's own",
            ),
            AMQPErrorKind::Soft(AMQPSoftError::RESOURCELOCKED) => (
                ErrorKind::Broker,
                "another connection holds the queue for itself, as commlib-py services do",
            ),
            AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) => (
                ErrorKind::Broker,
                "it exists with other settings: use the same everywhere, or delete it at the broker",
            ),
            AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => {
                (ErrorKind::Broker, "it does not exist")
            }
            _ => (ErrorKind::Broker, "the broker refused"),
        },
        _ => (ErrorKind::ConnectionLost, "the link was lost"),
    };
    Error::new(kind, operation)
        .at(address)
        .because(format_args!("{advice} ({})", text(error)))
}
