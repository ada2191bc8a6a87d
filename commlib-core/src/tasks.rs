//! Background tasks of a node or connection, and the handles that stop them.

use std::fmt;
use std::future::Future;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A running service or subscriber loop. Dropping it stops it; [`detach`](Self::detach) lets it live until its node or
/// connection is shut down.
///
/// Stopping ends the intake. Handlers that run already finish in the background.
#[must_use = "dropping a handle stops what it stands for; keep it, or call `.detach()`"]
pub struct Handle {
    stop: Option<watch::Sender<bool>>,
    task: JoinHandle<()>,
}

impl Handle {
    /// Lets it run until its node or connection is shut down, or its node is dropped.
    pub fn detach(mut self) {
        self.stop = None;
    }

    /// Stops the intake and waits until the handlers that run already have finished.
    ///
    /// Cancel safe: a cancelled `stop` has still stopped the intake.
    pub async fn stop(mut self) {
        self.signal();
        // An aborted or panicked task has ended as well.
        let _ = (&mut self.task).await;
    }

    /// True if it has ended by itself: the connection was closed, or its node shut down.
    pub fn is_finished(&self) -> bool {
        self.task.is_finished()
    }

    fn signal(&mut self) {
        if let Some(stop) = self.stop.take() {
            stop.send_replace(true);
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.signal();
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle")
            .field("finished", &self.is_finished())
            .finish_non_exhaustive()
    }
}

/// How far the end of a group has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Phase {
    Running,
    Stopping,
    Aborted,
}

/// All background tasks of one node or connection.
#[derive(Debug)]
pub(crate) struct Tasks {
    phase: watch::Sender<Phase>,
    running: watch::Sender<usize>,
}

impl Tasks {
    pub(crate) fn new() -> Self {
        Self {
            phase: watch::Sender::new(Phase::Running),
            running: watch::Sender::new(0),
        }
    }

    /// Runs a task that ends soon after its [`Stop`] says so.
    pub(crate) fn spawn<F, Fut>(&self, task: F) -> Handle
    where
        F: FnOnce(Stop) -> Fut,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let (stop, own) = watch::channel(false);
        let running = Running::new(&self.running);
        let mut aborted = self.phase.subscribe();
        let future = task(Stop {
            group: self.phase.subscribe(),
            own,
        });
        let task = tokio::spawn(async move {
            let _running = running;
            tokio::select! {
                () = future => {}
                // If the group is gone without an abort the task lives on: handlers that run finish.
                Ok(_) = aborted.wait_for(|phase| *phase == Phase::Aborted) => {}
            }
        });
        Handle {
            stop: Some(stop),
            task,
        }
    }

    /// Asks every task to stop.
    pub(crate) fn stop(&self) {
        self.advance(Phase::Stopping);
    }

    /// Drops every task where it stands.
    pub(crate) fn abort(&self) {
        self.advance(Phase::Aborted);
    }

    /// Waits until no task runs; the number that still run when the limit is over.
    pub(crate) async fn idle(&self, limit: Duration) -> Result<(), usize> {
        let mut running = self.running.subscribe();
        let idle = tokio::time::timeout(limit, running.wait_for(|count| *count == 0)).await;
        match idle {
            Ok(_) => Ok(()),
            Err(_) => Err(*self.running.borrow()),
        }
    }

    fn advance(&self, to: Phase) {
        self.phase.send_if_modified(|phase| {
            let forward = *phase < to;
            if forward {
                *phase = to;
            }
            forward
        });
    }
}

/// Tells a task that it should end: by its handle, or by its group.
#[derive(Debug, Clone)]
pub(crate) struct Stop {
    group: watch::Receiver<Phase>,
    own: watch::Receiver<bool>,
}

impl Stop {
    /// Resolves when the task should end. Cancel safe.
    pub(crate) async fn stopped(&mut self) {
        let own = async {
            if self.own.wait_for(|stop| *stop).await.is_err() {
                // The handle was detached.
                std::future::pending::<()>().await;
            }
        };
        let group = async {
            let stopping = self.group.wait_for(|phase| *phase != Phase::Running);
            if stopping.await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = own => {}
            () = group => {}
        }
    }
}

/// Counts a task for as long as it lives.
struct Running(watch::Sender<usize>);

impl Running {
    fn new(count: &watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}
