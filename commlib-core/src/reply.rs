//! Reply addresses: leased for one call, given back by dropping the lease.

use std::fmt;
use std::sync::Arc;

/// Hands out [`ReplyLease`]s; belongs to an inbox of replies. Cheap to clone.
#[derive(Clone)]
pub struct Leases(Arc<dyn Fn() -> ReplyLease + Send + Sync>);

/// A reply address for one call. Dropping it frees or retires the address; a reply that comes later finds nobody.
pub struct ReplyLease {
    /// What goes into the request as its reply address.
    pub address: String,
    /// What a reply to it carries as [`Arrival::key`](crate::Arrival::key). If the address is shared by several
    /// calls this is also the correlation id of the request.
    pub key: String,
    on_drop: Option<Box<dyn FnOnce() + Send + Sync>>,
}

impl Leases {
    /// Leases made by a function.
    pub fn new(lease: impl Fn() -> ReplyLease + Send + Sync + 'static) -> Self {
        Self(Arc::new(lease))
    }

    /// A new lease.
    pub fn lease(&self) -> ReplyLease {
        (self.0)()
    }
}

impl ReplyLease {
    /// A lease of an address that needs no giving back.
    pub fn new(address: impl Into<String>, key: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            key: key.into(),
            on_drop: None,
        }
    }

    /// Runs `give_back` when the lease is dropped.
    #[must_use]
    pub fn on_drop(mut self, give_back: impl FnOnce() + Send + Sync + 'static) -> Self {
        self.on_drop = Some(Box::new(give_back));
        self
    }
}

impl Drop for ReplyLease {
    fn drop(&mut self) {
        if let Some(give_back) = self.on_drop.take() {
            give_back();
        }
    }
}

impl fmt::Debug for ReplyLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplyLease")
            .field("address", &self.address)
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Leases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Leases")
    }
}
