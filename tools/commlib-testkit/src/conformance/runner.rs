//! Runs one case against one fixture.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;

use super::{Case, Fixture};

/// How long a whole case may take, in times of the patience of a single wait.
const PATIENCES: u32 = 6;

/// Runs a case if it applies; otherwise says which need is not met.
///
/// # Errors
/// The text of the panic with which the transport failed.
pub async fn run(case: &Case, fixture: &dyn Fixture) -> Result<(), String> {
    if let Some(need) = case.unmet(fixture) {
        println!("{case}: not applicable: needs {need}");
        return Ok(());
    }
    let limit = crate::wait::patience() * PATIENCES;
    let running = AssertUnwindSafe((case.run)(fixture)).catch_unwind();
    match tokio::time::timeout(limit, running).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(panic)) => Err(text(&*panic)),
        Err(_) => Err(format!("{case} did not end within {limit:?}")),
    }
}

/// Runs the named case in a runtime of its own: the body of a `#[test]`.
///
/// # Panics
/// If the transport fails the case.
pub fn run_case<F, Fut, X>(name: &str, make: F)
where
    F: FnOnce(&'static Case) -> Fut,
    Fut: Future<Output = Option<X>>,
    X: Fixture,
{
    let case = Case::named(name).expect("the case is in the list");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let outcome = runtime.block_on(async {
        match make(case).await {
            Some(fixture) => run(case, &fixture).await,
            None => Ok(()),
        }
    });
    // Blocked handlers of a failed case must not hold up the others.
    runtime.shutdown_timeout(Duration::from_secs(1));
    if let Err(why) = outcome {
        panic!("{case}: {why}");
    }
}

fn text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without text".to_owned())
}
