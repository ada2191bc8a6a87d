//! Handlers of requests: typed outside, bytes inside.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::address::Name;
use crate::codec;
use crate::message::{Header, RpcError};
use crate::panic::run_blocking;

/// What a handler may want to know beside the request.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RpcContext {
    /// The service that was called.
    pub service: Name,
    /// The request's header.
    pub header: Header,
    pub(super) deadline: Option<Instant>,
}

impl RpcContext {
    /// How long the caller still waits, counted from the request's arrival by this machine's own clock; `None` if it
    /// did not say.
    pub fn remaining(&self) -> Option<Duration> {
        self.deadline
            .map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }
}

/// Answers requests of type `Q`. Closures `|request: Q| async move { Ok(response) }` are handlers.
///
/// Implement it for a type of your own to see the [`RpcContext`].
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler for requests of type `{Q}`",
    note = "a handler is a closure `|request: {Q}| async move {{ Ok(response) }}` that returns `Result<R, RpcError>` with a \
            serializable `R`, and whose future is `Send`; for code that blocks use `rpc_service_blocking`"
)]
pub trait RpcHandler<Q>: Send + Sync + 'static {
    /// What it answers.
    type Response: Serialize;

    /// Answers one request. Several run at a time.
    fn handle(
        &self,
        request: Q,
        context: RpcContext,
    ) -> impl Future<Output = Result<Self::Response, RpcError>> + Send;
}

impl<Q, R, F, Fut> RpcHandler<Q> for F
where
    F: Fn(Q) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<R, RpcError>> + Send,
    R: Serialize,
    Q: Send,
{
    type Response = R;

    async fn handle(&self, request: Q, _: RpcContext) -> Result<R, RpcError> {
        self(request).await
    }
}

/// A closure that may block.
pub(super) struct Blocking<F>(pub(super) Arc<F>);

impl<Q, R, F> RpcHandler<Q> for Blocking<F>
where
    F: Fn(Q) -> Result<R, RpcError> + Send + Sync + 'static,
    Q: Send + 'static,
    R: Serialize + Send + 'static,
{
    type Response = R;

    async fn handle(&self, request: Q, _: RpcContext) -> Result<R, RpcError> {
        let handler = self.0.clone();
        run_blocking(move || handler(request)).await
    }
}

/// A handler from bytes to bytes.
pub(super) type Erased = Arc<dyn Fn(Bytes, RpcContext) -> Answer + Send + Sync>;
type Answer = Pin<Box<dyn Future<Output = Result<Bytes, RpcError>> + Send>>;

/// Hides the types of a handler: requests that are no `Q` become error replies.
pub(super) fn erase<Q, H>(handler: H) -> Erased
where
    Q: DeserializeOwned + Send + 'static,
    H: RpcHandler<Q>,
{
    let handler = Arc::new(handler);
    Arc::new(move |data: Bytes, context: RpcContext| {
        let handler = handler.clone();
        Box::pin(async move {
            let request =
                codec::decode::<Q>(&data).map_err(|e| RpcError::new(RpcError::BAD_REQUEST, e))?;
            let response = handler.handle(request, context).await;
            Ok(codec::encode(&response?)?)
        })
    })
}
