//! A transport around another that counts what is leased.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use commlib_core::{
    Connection, Inbox, Leases, Link, ListenOptions, Message, Receipt, ReplyLease, Result,
    SendOptions, Source, Target, Transport,
};

use crate::forward::{forward, hand_over};

/// Watches the reply addresses of a connection.
pub(crate) struct Spy {
    connection: Connection,
    leases: Arc<AtomicUsize>,
}

impl Spy {
    /// Watches a connection that nobody else uses.
    pub(crate) fn on(inner: Connection) -> Self {
        let leases = Arc::new(AtomicUsize::new(0));
        let watched = Watched {
            inner,
            leases: leases.clone(),
        };
        Self {
            connection: Connection::new(watched),
            leases,
        }
    }

    /// The connection to use.
    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// How many reply addresses are out.
    pub(crate) fn leases(&self) -> usize {
        self.leases.load(Ordering::SeqCst)
    }
}

#[derive(Debug)]
struct Watched {
    inner: Connection,
    leases: Arc<AtomicUsize>,
}

#[async_trait]
impl Transport for Watched {
    fn link(&self) -> &Link {
        self.inner.link()
    }

    async fn send(&self, to: &Target, message: Message, options: SendOptions) -> Result<Receipt> {
        self.inner.transport().send(to, message, options).await
    }

    async fn listen(&self, from: &Source, options: ListenOptions) -> Result<Inbox> {
        let inbox = self.inner.transport().listen(from, options.clone()).await?;
        let Some(leases) = inbox.leases() else {
            return Ok(inbox);
        };
        let count = self.leases.clone();
        let counted = Leases::new(move |service| {
            let lease = leases.lease(service);
            count.fetch_add(1, Ordering::SeqCst);
            let count = count.clone();
            let mut counted = ReplyLease::new(lease.address.clone(), lease.key.clone());
            counted.correlation_id.clone_from(&lease.correlation_id);
            counted.on_drop(move || {
                count.fetch_sub(1, Ordering::SeqCst);
                drop(lease);
            })
        });
        Ok(forward(inbox, &options, None, hand_over).with_leases(counted))
    }

    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }
}
