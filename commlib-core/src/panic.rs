//! Panics of user code become values, so that no handler takes down what it runs in.

use std::any::Any;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;

/// Runs a future; a panic in it becomes an `Err` with the panic's message.
///
/// The future is dropped after a panic and never polled again, and what it shared with others is behind locks that
/// tell of a panic by themselves; that is why asserting unwind safety is sound in meaning.
pub(crate) async fn catch<F: Future>(future: F) -> Result<F::Output, String> {
    let mut future = pin!(future);
    poll_fn(
        |context| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context))) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(output)) => Poll::Ready(Ok(output)),
            Err(panic) => Poll::Ready(Err(message(&*panic))),
        },
    )
    .await
}

/// Runs a closure on a blocking thread. A panic in it goes on in the caller, to be caught there.
pub(crate) async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(output) => output,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down: nobody will see the outcome.
            Err(_) => std::future::pending().await,
        },
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("handler panicked: {}", text.unwrap_or("no message"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn panics_become_values_also_from_blocking_threads() {
        assert_eq!(catch(async { 1 }).await, Ok(1));
        let text = catch(async { panic!("boom {}", 7) }).await;
        assert_eq!(text.map(|()| 0), Err("handler panicked: boom 7".into()));
        let text = catch(run_blocking(|| panic!("bang"))).await;
        assert_eq!(text.map(|()| 0), Err("handler panicked: bang".into()));
    }
}
