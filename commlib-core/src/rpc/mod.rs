//! Calls and services.

mod client;
mod handler;
mod pending;
mod router;
mod server;
mod service;
mod window;

use std::future::Future;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::Result;
use crate::message::RpcError;
use crate::scope::Scoped;
use crate::tasks::Handle;

pub use client::{RpcClient, RpcClientOptions};
pub use handler::{RpcContext, RpcHandler};
pub(crate) use router::ReplyRouter;
pub use server::RpcServer;
pub use service::RpcServiceOptions;
use service::Service;

/// Makes RPC clients and services. Implemented by [`Connection`](crate::Connection) and [`Node`](crate::Node).
///
/// ```
/// use commlib_core::{MemoryConfig, Rpc};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> commlib_core::Result<()> {
/// let connection = MemoryConfig::new("doc-rpc").connect().await?;
/// connection.rpc_service("math.add", |(a, b): (i64, i64)| async move { Ok(a + b) }).await?.detach();
/// let add = connection.rpc_client::<(i64, i64), i64>("math.add")?;
/// assert_eq!(add.call(&(40, 2)).await?, 42);
/// # Ok(()) }
/// ```
pub trait Rpc: Scoped {
    /// A client of one service. Nothing is sent before the first call.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidAddress`](crate::ErrorKind::InvalidAddress) for a bad name.
    #[doc(alias = "create_rpc_client")]
    fn rpc_client<Q: Serialize + Sync, R: DeserializeOwned>(
        &self,
        service: &str,
    ) -> Result<RpcClient<Q, R>> {
        self.rpc_client_with(service, RpcClientOptions::default())
    }

    /// A client of one service, with options.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidAddress`](crate::ErrorKind::InvalidAddress) for a bad name.
    fn rpc_client_with<Q: Serialize + Sync, R: DeserializeOwned>(
        &self,
        service: &str,
        options: RpcClientOptions,
    ) -> Result<RpcClient<Q, R>> {
        RpcClient::new(&self.scope(), service, &options)
    }

    /// Serves requests with a handler: a closure `|request: Q| async move { Ok(response) }`, or an [`RpcHandler`].
    /// Resolves once requests arrive. Cancel safe: a cancelled start is undone.
    ///
    /// # Errors
    /// As [`rpc_service_with`](Self::rpc_service_with).
    #[doc(alias = "create_rpc")]
    #[doc(alias = "RPCService")]
    fn rpc_service<Q: DeserializeOwned + Send + 'static>(
        &self,
        service: &str,
        handler: impl RpcHandler<Q>,
    ) -> impl Future<Output = Result<Handle>> + Send {
        self.rpc_service_with(service, RpcServiceOptions::default(), handler)
    }

    /// Serves requests with a handler, with options.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidAddress`](crate::ErrorKind::InvalidAddress) for a bad name,
    /// [`ErrorKind::Broker`](crate::ErrorKind::Broker) if the broker refuses,
    /// [`ErrorKind::Closed`](crate::ErrorKind::Closed) after the end of the connection.
    fn rpc_service_with<Q: DeserializeOwned + Send + 'static>(
        &self,
        service: &str,
        options: RpcServiceOptions,
        handler: impl RpcHandler<Q>,
    ) -> impl Future<Output = Result<Handle>> + Send {
        let scope = self.scope();
        let name = scope.name(service);
        async move {
            let handler = handler::erase(handler);
            let service = Service::listen(scope.connection(), name?, options, handler).await?;
            Ok(scope.tasks().spawn(|stop| service.run(stop)))
        }
    }

    /// As [`rpc_service`](Self::rpc_service) with a closure that may block: each call runs on a blocking thread.
    ///
    /// # Errors
    /// As [`rpc_service_with`](Self::rpc_service_with).
    fn rpc_service_blocking<Q, R, F>(
        &self,
        service: &str,
        handler: F,
    ) -> impl Future<Output = Result<Handle>> + Send
    where
        Q: DeserializeOwned + Send + 'static,
        R: Serialize + Send + 'static,
        F: Fn(Q) -> Result<R, RpcError> + Send + Sync + 'static,
    {
        self.rpc_service_blocking_with(service, RpcServiceOptions::default(), handler)
    }

    /// As [`rpc_service_with`](Self::rpc_service_with) with a closure that may block.
    ///
    /// # Errors
    /// As [`rpc_service_with`](Self::rpc_service_with).
    fn rpc_service_blocking_with<Q, R, F>(
        &self,
        service: &str,
        options: RpcServiceOptions,
        handler: F,
    ) -> impl Future<Output = Result<Handle>> + Send
    where
        Q: DeserializeOwned + Send + 'static,
        R: Serialize + Send + 'static,
        F: Fn(Q) -> Result<R, RpcError> + Send + Sync + 'static,
    {
        self.rpc_service_with(service, options, handler::Blocking(Arc::new(handler)))
    }

    /// A server: several services under one prefix, started and stopped together.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidAddress`](crate::ErrorKind::InvalidAddress) for a bad prefix.
    fn rpc_server(&self, prefix: &str) -> Result<RpcServer> {
        let scope = self.scope();
        let prefix = scope.name(prefix)?;
        Ok(RpcServer::new(scope, prefix))
    }
}

impl<S: Scoped> Rpc for S {}
