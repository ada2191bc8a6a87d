//! Handlers of messages, and the loop that feeds them.

use std::fmt;
use std::future::{Future, poll_fn};
use std::sync::Arc;

use serde::de::DeserializeOwned;
use tokio::task::JoinSet;

use super::subscriber::{Received, Subscriber, settle};
use crate::inbox::{Gap, Incoming, Malformed};
use crate::panic::{catch, run_blocking};
use crate::tasks::Stop;

/// What a message handler may return: nothing, or a `Result` whose error is written to the log.
pub trait Outcome {
    /// The error as text, if there is one.
    fn into_result(self) -> Result<(), String>;
}

impl Outcome for () {
    fn into_result(self) -> Result<(), String> {
        Ok(())
    }
}

impl<E: fmt::Display> Outcome for Result<(), E> {
    fn into_result(self) -> Result<(), String> {
        self.map_err(|e| e.to_string())
    }
}

/// Takes the messages of a [`Subscriber`]. Closures `|message: Received<T>| async move { … }` are handlers.
///
/// Implement it for a type of your own to react to gaps and unreadable messages as well.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler for messages of type `{T}`",
    note = "a handler is a closure `|message: Received<{T}>| async move {{ … }}` that returns `()` or `Result<(), E>` with a printable `E`, \
            and whose future is `Send`; for code that blocks use `on_message_blocking`"
)]
pub trait MessageHandler<T>: Send + Sync + 'static {
    /// Takes one message. An `Err` is logged; an at-least-once message then comes again.
    fn handle(&self, message: Received<T>) -> impl Future<Output = Result<(), String>> + Send;

    /// Takes note of missed messages. Writes a warning to the log unless implemented.
    fn on_gap(&self, gap: Gap) {
        tracing::warn!(missed = gap.missed, cause = ?gap.cause, "messages were missed");
    }

    /// Takes note of an unreadable message. Writes a warning to the log unless implemented.
    fn on_malformed(&self, malformed: Malformed) {
        tracing::warn!(topic = %malformed.name, error = %malformed.error, "unreadable message");
    }
}

impl<T, F, Fut> MessageHandler<T> for F
where
    F: Fn(Received<T>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output: Outcome> + Send,
    T: Send + 'static,
{
    async fn handle(&self, message: Received<T>) -> Result<(), String> {
        self(message).await.into_result()
    }
}

/// A closure that may block.
pub(super) struct Blocking<F>(pub(super) Arc<F>);

impl<T, F, O> MessageHandler<T> for Blocking<F>
where
    F: Fn(Received<T>) -> O + Send + Sync + 'static,
    O: Outcome + Send + 'static,
    T: Send + 'static,
{
    async fn handle(&self, message: Received<T>) -> Result<(), String> {
        let handler = self.0.clone();
        run_blocking(move || handler(message).into_result()).await
    }
}

/// Feeds a handler until it is stopped or the connection is closed; then waits for what runs.
pub(super) async fn run<T, H>(mut subscriber: Subscriber<T>, handler: H, mut stop: Stop)
where
    T: DeserializeOwned + Send + 'static,
    H: MessageHandler<T>,
{
    let handler = Arc::new(handler);
    let mut running = JoinSet::new();
    loop {
        let full = running.len() >= subscriber.concurrency;
        tokio::select! {
            biased;
            () = stop.stopped() => break,
            Some(_) = running.join_next(), if !running.is_empty() => {}
            incoming = poll_fn(|context| subscriber.poll_unsettled(context)), if !full => {
                let noted = match incoming {
                    None => break,
                    Some(Incoming::Gap(gap)) => catch(async { handler.on_gap(gap) }).await,
                    Some(Incoming::Malformed(malformed)) => {
                        catch(async { handler.on_malformed(malformed) }).await
                    }
                    Some(Incoming::Message(message)) => {
                    let handler = handler.clone();
                    let dedup = subscriber.dedup.clone();
                    running.spawn(async move {
                        let topic = message.topic.clone();
                        let unsettled = message.unsettled.clone();
                        match catch(handler.handle(message)).await {
                            Ok(Ok(())) => settle(dedup.as_deref(), &unsettled),
                            Ok(Err(error)) | Err(error) => {
                                tracing::warn!(%topic, %error, "message handler failed");
                                if let Some(ack) = unsettled.take().and_then(|settle| settle.ack) {
                                    ack.reject(true);
                                }
                            }
                        }
                    });
                    Ok(())
                }
                };
                if let Err(panic) = noted {
                    tracing::error!(pattern = %subscriber.pattern(), %panic, "message handler failed over a notice");
                }
            }
        }
    }
    // Ends the subscription before the wait: what nobody takes should go elsewhere soon.
    drop(subscriber);
    while running.join_next().await.is_some() {}
}
