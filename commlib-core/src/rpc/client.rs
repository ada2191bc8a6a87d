//! The calling side.

use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::router::Waiting;
use crate::address::{Name, Target};
use crate::codec::{self, Value};
use crate::connection::Connection;
use crate::error::{Error, ErrorKind, Result};
use crate::message::{Dialect, Message, ReplyTo};
use crate::scope::Scope;
use crate::transport::SendOptions;

/// Options of an [`RpcClient`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RpcClientOptions {
    /// How long a call waits for its reply. Default: 30 s. It travels with the request; a service does not start on
    /// one whose caller has given up.
    pub timeout: Duration,
    /// How requests are written, and so what the reply looks like. Default: as the connection says.
    pub dialect: Option<Dialect>,
}

impl Default for RpcClientOptions {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(30),
            dialect: None,
        }
    }
}

impl RpcClientOptions {
    /// Sets the timeout.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets the dialect.
    #[must_use]
    pub fn dialect(mut self, dialect: Dialect) -> Self {
        self.dialect = Some(dialect);
        self
    }
}

/// Calls one service. May be shared between tasks, and is cheap to clone; calls run side by side.
#[doc(alias = "RPCClient")]
#[must_use]
pub struct RpcClient<Q = Value, R = Value> {
    connection: Connection,
    service: Name,
    target: Target,
    timeout: Duration,
    dialect: Dialect,
    types: PhantomData<fn(&Q) -> R>,
}

impl<Q: Serialize + Sync, R: DeserializeOwned> RpcClient<Q, R> {
    pub(super) fn new(scope: &Scope, service: &str, options: &RpcClientOptions) -> Result<Self> {
        let service = scope.name(service)?;
        let connection = scope.connection().clone();
        Ok(Self {
            target: Target::Queue(service.clone()),
            service,
            timeout: options.timeout,
            dialect: options.dialect.unwrap_or_else(|| connection.dialect()),
            connection,
            types: PhantomData,
        })
    }

    /// Sends a request and waits for its reply, as long as the client's timeout.
    ///
    /// Cancel safe in that a cancelled call leaves nothing behind; the service may still act on the request.
    ///
    /// # Errors
    /// * [`ErrorKind::Remote`]: the service answered with an error, see [`Error::remote`].
    /// * [`ErrorKind::Timeout`]: no reply came in time.
    /// * [`ErrorKind::ConnectionLost`]: the link was down or went down; [`Error::maybe_executed`] tells them apart.
    /// * [`ErrorKind::NoService`]: nobody serves the name, where the broker can tell.
    /// * [`ErrorKind::Decode`]: the reply is not an `R`.
    /// * [`ErrorKind::Encode`], [`ErrorKind::TooLarge`], [`ErrorKind::Closed`]: nothing was sent.
    pub async fn call(&self, request: &Q) -> Result<R> {
        self.call_within(request, self.timeout).await
    }

    /// As [`call`](Self::call), with a timeout of its own.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub async fn call_within(&self, request: &Q, timeout: Duration) -> Result<R> {
        let mut message = self.connection.message(codec::encode(request)?);
        message.header.timeout_ms = Some(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
        let mut sent = false;
        let exchange = self.exchange(message, &mut sent);
        let Ok(reply) = tokio::time::timeout(timeout, exchange).await else {
            let error = Error::new(ErrorKind::Timeout, "call to").at(&self.service);
            return Err(match sent {
                true => error
                    .because(format_args!("no reply within {timeout:?}"))
                    .possibly_executed(),
                false => error.because(format_args!(
                    "the broker could not be asked to deliver replies within {timeout:?}"
                )),
            });
        };
        let reply = reply?;
        if let Some(error) = reply.header.error {
            return Err(Error::from_remote(&self.service, error));
        }
        codec::decode(&reply.data).map_err(|e| {
            Error::new(ErrorKind::Decode, "reply from")
                .at(&self.service)
                .because(e)
        })
    }

    /// Sets `sent` before the request may have left.
    async fn exchange(&self, mut message: Message, sent: &mut bool) -> Result<Message> {
        let connection = &self.connection;
        let mut waiting: Waiting = connection.replies().await?.wait(&self.service)?;
        let correlation_id = waiting.lease.correlation_id.clone();
        message.header.correlation_id.clone_from(&correlation_id);
        message.header.reply_to = Some(ReplyTo {
            address: waiting.lease.address.clone(),
            correlation_id,
            form: self.dialect,
        });
        let options = SendOptions::default().dialect(self.dialect);
        *sent = true;
        let receipt = connection
            .transport()
            .send(&self.target, message, options)
            .await?;
        tokio::select! {
            biased;
            reply = waiting.reply() => reply,
            // A broker that can tell that nobody serves the name says so in the receipt.
            Err(refused) = receipt => Err(refused),
        }
    }

    /// The service's name, with the namespace.
    pub fn service(&self) -> &Name {
        &self.service
    }
}

impl<Q, R> Clone for RpcClient<Q, R> {
    fn clone(&self) -> Self {
        Self {
            connection: self.connection.clone(),
            service: self.service.clone(),
            target: self.target.clone(),
            types: PhantomData,
            ..*self
        }
    }
}

impl<Q, R> fmt::Debug for RpcClient<Q, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RpcClient")
            .field("service", &self.service)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}
