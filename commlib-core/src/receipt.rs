//! The second completion of a publish: confirmed by the broker.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::oneshot;

use crate::error::{Error, ErrorKind, Result};

/// Resolves when the broker has confirmed a message. Dropping it means "not interested" and changes nothing else.
///
/// A best-effort message has no confirmation; its receipt resolves at once.
///
/// # Errors
/// [`ErrorKind::Broker`] if the broker refused the message, [`ErrorKind::Closed`] if the connection was closed before
/// the confirmation came (the message may have arrived).
#[must_use = "a receipt tells whether the broker took the message; drop it explicitly if that does not matter"]
pub struct Receipt(Option<oneshot::Receiver<Result<()>>>);

/// The transport's half of a [`Receipt`]. Dropped without a word, the receipt fails with [`ErrorKind::Closed`].
#[derive(Debug)]
pub struct Confirm(oneshot::Sender<Result<()>>);

impl Receipt {
    /// A receipt that resolves at once.
    pub fn ready() -> Self {
        Self(None)
    }

    /// A receipt and the half that resolves it.
    pub fn pending() -> (Confirm, Self) {
        let (sender, receiver) = oneshot::channel();
        (Confirm(sender), Self(Some(receiver)))
    }
}

impl Confirm {
    /// Resolves the receipt.
    pub fn confirm(self, outcome: Result<()>) {
        // The other half may be gone: nobody is interested.
        let _ = self.0.send(outcome);
    }
}

impl Future for Receipt {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        let Some(receiver) = &mut self.0 else {
            return Poll::Ready(Ok(()));
        };
        Pin::new(receiver).poll(context).map(|outcome| {
            outcome.unwrap_or_else(|_| {
                Err(Error::new(ErrorKind::Closed, "confirmation of a message")
                    .because("the connection ended first")
                    .possibly_executed())
            })
        })
    }
}

impl fmt::Debug for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receipt")
            .field("pending", &self.0.is_some())
            .finish()
    }
}
