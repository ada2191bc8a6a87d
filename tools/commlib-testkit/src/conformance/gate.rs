//! Services that cases use.

use std::sync::Arc;

use commlib_core::{Handle, Rpc, RpcClient, RpcServiceOptions, Value};
use tokio::sync::{Semaphore, mpsc};

use super::within;

/// A service that answers with the request itself.
pub(super) async fn echo(on: &(impl Rpc + Sync), service: &str) -> Handle {
    let handle = on.rpc_service(service, |data: Value| async move { Ok(data) });
    within("a service", handle).await.expect("serve")
}

/// A service whose handlers say that they run and then wait for a permit.
pub(super) struct Gate {
    handle: Option<Handle>,
    /// What the handlers say; ends with the service and its handlers.
    pub(super) started: mpsc::UnboundedReceiver<Value>,
    permits: Arc<Semaphore>,
}

impl Gate {
    pub(super) async fn new(
        on: &(impl Rpc + Sync),
        service: &str,
        options: RpcServiceOptions,
    ) -> Self {
        let (started, running) = mpsc::unbounded_channel();
        let permits = Arc::new(Semaphore::new(0));
        let gate = permits.clone();
        let handle = on.rpc_service_with(service, options, move |data: Value| {
            let _ = started.send(data.clone());
            let gate = gate.clone();
            async move {
                gate.acquire().await?.forget();
                Ok(data)
            }
        });
        let handle = within("a service", handle).await.expect("serve");
        Self {
            handle: Some(handle),
            started: running,
            permits,
        }
    }

    /// The handle, once.
    pub(super) fn handle(&mut self) -> Handle {
        self.handle.take().expect("the handle was not taken")
    }

    /// The request of the next handler that runs.
    pub(super) async fn running(&mut self) -> Value {
        within("a handler to run", self.started.recv())
            .await
            .expect("the service runs")
    }

    /// Lets handlers finish.
    pub(super) fn let_go(&self, handlers: usize) {
        self.permits.add_permits(handlers);
    }
}

/// A call that must succeed.
pub(super) async fn call(client: &RpcClient<Value, Value>, request: Value) -> Value {
    within("a reply", client.call(&request))
        .await
        .expect("call")
}
