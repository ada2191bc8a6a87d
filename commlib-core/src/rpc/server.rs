//! Several services under one prefix.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;

use super::handler::{Blocking, Erased, RpcHandler, erase};
use super::service::{RpcServiceOptions, Service};
use crate::address::Name;
use crate::error::Result;
use crate::message::RpcError;
use crate::scope::Scope;
use crate::tasks::Handle;

/// Several services under one prefix, started and stopped together: `math.add` and `math.negate` of `math`.
///
/// Each method is a service of its own on the broker, so any client can call it, and other programs may serve other
/// methods below the same prefix.
#[doc(alias = "RPCServer")]
#[must_use = "a server serves nothing before `start`"]
pub struct RpcServer {
    scope: Scope,
    prefix: Name,
    options: RpcServiceOptions,
    methods: Vec<(String, Erased)>,
}

impl RpcServer {
    pub(super) fn new(scope: Scope, prefix: Name) -> Self {
        Self {
            scope,
            prefix,
            options: RpcServiceOptions::default(),
            methods: Vec::new(),
        }
    }

    /// Sets the options of each method.
    pub fn options(mut self, options: RpcServiceOptions) -> Self {
        self.options = options;
        self
    }

    /// Adds a method. A bad name is reported by [`start`](Self::start).
    pub fn method<Q>(mut self, method: &str, handler: impl RpcHandler<Q>) -> Self
    where
        Q: DeserializeOwned + Send + 'static,
    {
        self.methods.push((method.to_owned(), erase(handler)));
        self
    }

    /// Adds a method whose handler may block.
    pub fn method_blocking<Q, R, F>(self, method: &str, handler: F) -> Self
    where
        Q: DeserializeOwned + Send + 'static,
        R: Serialize + Send + 'static,
        F: Fn(Q) -> Result<R, RpcError> + Send + Sync + 'static,
    {
        self.method(method, Blocking(Arc::new(handler)))
    }

    /// Starts all methods. Resolves once requests to all of them arrive. If one cannot be started, none is.
    /// Cancel safe: a cancelled start is undone.
    ///
    /// # Errors
    /// As [`Rpc::rpc_service_with`](crate::Rpc::rpc_service_with).
    pub async fn start(self) -> Result<Handle> {
        let mut methods = Vec::with_capacity(self.methods.len());
        for (method, handler) in self.methods {
            let name = self.prefix.join(&method)?;
            let options = self.options.clone();
            methods.push(Service::listen(self.scope.connection(), name, options, handler).await?);
        }
        Ok(self.scope.tasks().spawn(|stop| async move {
            let mut running: JoinSet<()> = methods
                .into_iter()
                .map(|method| method.run(stop.clone()))
                .collect();
            while running.join_next().await.is_some() {}
        }))
    }
}

impl fmt::Debug for RpcServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let methods: Vec<_> = self.methods.iter().map(|(method, _)| method).collect();
        f.debug_struct("RpcServer")
            .field("prefix", &self.prefix)
            .field("methods", &methods)
            .finish_non_exhaustive()
    }
}
