//! When to end: SIGINT, SIGTERM, or the time of `--for`.

use std::future::pending;
use std::pin::Pin;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Sleep;

use crate::failure::Failure;

/// From its creation on, SIGINT and SIGTERM no longer kill the process; [`wait`](Self::wait) tells of them.
#[derive(Debug)]
pub(crate) struct Stop {
    interrupt: Signal,
    terminate: Signal,
    deadline: Option<Pin<Box<Sleep>>>,
    stopped: bool,
}

impl Stop {
    pub(crate) fn new() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(|e| Failure::because("signal handler", &e));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            deadline: None,
            stopped: false,
        })
    }

    /// Also stops after `limit`, counted from now.
    pub(crate) fn after(&mut self, limit: Option<Duration>) {
        self.deadline = limit.map(|limit| Box::pin(tokio::time::sleep(limit)));
    }

    /// Resolves when it is time to end, and at once ever after. Cancel safe.
    pub(crate) async fn wait(&mut self) {
        if self.stopped {
            return;
        }
        let deadline = async {
            match &mut self.deadline {
                Some(sleep) => sleep.await,
                None => pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            () = deadline => {}
        }
        self.stopped = true;
    }

    /// Runs `work` to its end, or `None` if it is time to stop first.
    pub(crate) async fn or<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.wait() => None,
            output = work => Some(output),
        }
    }
}
