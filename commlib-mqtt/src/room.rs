//! Room for messages on their way to the connection task: what bounds the memory of a sender.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::MqttConfig;
use crate::packet::Publish;

/// How many bytes of large best-effort messages wait for the task.
pub(crate) const LARGE_ROOM: usize = 16 << 20;

/// A best-effort message on its way to the task, with the room that a large one takes.
#[derive(Debug)]
pub(crate) struct BestEffort {
    pub(crate) publish: Publish,
    pub(crate) _room: Option<OwnedSemaphorePermit>,
}

/// What at-least-once and large best-effort messages take while they wait. Closed when the connection closes.
#[derive(Debug, Clone)]
pub(crate) struct Room {
    pub(crate) messages: Arc<Semaphore>,
    pub(crate) bytes: Arc<Semaphore>,
    pub(crate) large: Arc<Semaphore>,
}

impl Room {
    pub(crate) fn new(config: &MqttConfig) -> Self {
        let messages = config.outbox.min(Semaphore::MAX_PERMITS);
        Self {
            messages: Arc::new(Semaphore::new(messages)),
            bytes: Arc::new(Semaphore::new(byte_permits(config.outbox_bytes) as usize)),
            large: Arc::new(Semaphore::new(LARGE_ROOM)),
        }
    }

    /// Whoever waits for room gets none, nor does anyone later.
    pub(crate) fn close(&self) {
        self.messages.close();
        self.bytes.close();
        self.large.close();
    }
}

/// Takes room; `None` when the connection closes.
pub(crate) async fn take(room: &Arc<Semaphore>, permits: usize) -> Option<OwnedSemaphorePermit> {
    let permits = byte_permits(permits);
    room.clone().acquire_many_owned(permits).await.ok()
}

/// Bytes as permits, of which a semaphore takes 32 bits at a time.
fn byte_permits(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// Waits for room as long as `limit` says.
pub(crate) async fn within<T: Send>(
    limit: Option<Duration>,
    wait: impl Future<Output = T> + Send,
) -> Option<T> {
    match limit {
        None => Some(wait.await),
        Some(limit) => tokio::time::timeout(limit, wait).await.ok(),
    }
}
