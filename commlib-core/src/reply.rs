//! Reply addresses: leased for one call, given back by dropping the lease.

use std::fmt;
use std::sync::Arc;

use crate::address::Name;

/// Hands out [`ReplyLease`]s; belongs to an inbox of replies. Cheap to clone.
#[derive(Clone)]
pub struct Leases(Arc<dyn Fn(&Name) -> ReplyLease + Send + Sync>);

/// A reply address for one call. Dropping it frees or retires the address; a reply that comes later finds nobody.
pub struct ReplyLease {
    /// What goes into the request as its reply address.
    pub address: String,
    /// What a reply to it carries as [`Arrival::key`](crate::Arrival::key).
    pub key: String,
    /// What the request carries as its correlation id; set if the transport looks at what replies echo.
    pub correlation_id: Option<String>,
    on_drop: Option<Box<dyn FnOnce() + Send + Sync>>,
}

impl Leases {
    /// Leases made by a function of the service that will reply.
    pub fn new(lease: impl Fn(&Name) -> ReplyLease + Send + Sync + 'static) -> Self {
        Self(Arc::new(lease))
    }

    /// A new lease for the reply of a service. What the transport knows of the service may decide the address.
    pub fn lease(&self, service: &Name) -> ReplyLease {
        (self.0)(service)
    }
}

impl ReplyLease {
    /// A lease of an address that needs no giving back.
    pub fn new(address: impl Into<String>, key: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            key: key.into(),
            correlation_id: None,
            on_drop: None,
        }
    }

    /// Makes the key the correlation id of the request: the address is shared by several calls, or the transport wants
    /// to know which services echo it.
    #[must_use]
    pub fn correlated(mut self) -> Self {
        self.correlation_id = Some(self.key.clone());
        self
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
