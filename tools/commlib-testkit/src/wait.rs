//! Bounded waits.

use std::future::Future;
use std::panic::Location;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

static PATIENCE_MS: AtomicU64 = AtomicU64::new(10_000);

/// Sets how long [`within`] waits in this process. Default: 10 seconds.
pub fn set_patience(patience: Duration) {
    let ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
    PATIENCE_MS.store(ms, Ordering::Relaxed);
}

/// How long [`within`] waits.
pub(crate) fn patience() -> Duration {
    Duration::from_millis(PATIENCE_MS.load(Ordering::Relaxed))
}

/// Waits for something that happens soon on every transport.
///
/// # Panics
/// If it does not; the text names `what` and the place of the call.
#[track_caller]
pub fn within<F: Future>(what: &str, future: F) -> impl Future<Output = F::Output> {
    let place = Location::caller();
    let limit = patience();
    async move {
        match tokio::time::timeout(limit, future).await {
            Ok(output) => output,
            Err(_) => panic!("{place}: waited {limit:?} in vain for {what}"),
        }
    }
}
