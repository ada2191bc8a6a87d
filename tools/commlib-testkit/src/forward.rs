//! An inbox between an inbox and its user.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

use commlib_core::{Inbox, InboxSender, Incoming, ListenOptions, Source};

/// Inboxes that their users have dropped and that listen on all the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Leftovers(Arc<Mutex<Vec<(Source, Inbox)>>>);

impl Leftovers {
    /// The oldest of a source.
    pub(crate) fn take(&self, source: &Source) -> Option<Inbox> {
        let mut all = self.0.lock().unwrap();
        let index = all.iter().position(|(other, _)| other == source)?;
        Some(all.remove(index).1)
    }

    /// Whether there is one whose source is as wanted.
    pub(crate) fn any(&self, wanted: impl Fn(&Source) -> bool) -> bool {
        self.0
            .lock()
            .unwrap()
            .iter()
            .any(|(source, _)| wanted(source))
    }
}

/// An inbox that gets from `inner` what `pass` hands on. Dropping it drops `inner` at once, or moves it to `keep`.
pub(crate) fn forward<F>(
    inner: Inbox,
    options: &ListenOptions,
    keep: Option<(Leftovers, Source)>,
    mut pass: F,
) -> Inbox
where
    F: FnMut(Incoming, &InboxSender) + Send + 'static,
{
    let (sender, outer) = Inbox::new(options);
    let inner = Arc::new(Mutex::new(Some(inner)));
    let end = End {
        inner: inner.clone(),
        keep,
    };
    tokio::spawn(async move {
        loop {
            let next = poll_fn(|context| {
                let mut inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
                match &mut *inner {
                    Some(inbox) => inbox.poll_recv(context),
                    None => Poll::Ready(None),
                }
            });
            match next.await {
                Some(incoming) => pass(incoming, &sender),
                None => return,
            }
        }
    });
    outer.on_drop(end)
}

/// Hands over what arrived.
pub(crate) fn hand_over(incoming: Incoming, to: &InboxSender) {
    match incoming {
        Incoming::Message(arrival) => to.deliver(arrival),
        Incoming::Gap(gap) => to.gap(gap),
        Incoming::Malformed(malformed) => to.malformed(malformed),
    };
}

/// What becomes of the inner inbox when the outer one is dropped.
struct End {
    inner: Arc<Mutex<Option<Inbox>>>,
    keep: Option<(Leftovers, Source)>,
}

impl Drop for End {
    fn drop(&mut self) {
        let inner = self
            .inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match (inner, self.keep.take()) {
            (Some(inner), Some((leftovers, source))) => {
                leftovers.0.lock().unwrap().push((source, inner));
            }
            // Outside the lock: it may call back.
            (inner, _) => drop(inner),
        }
    }
}
