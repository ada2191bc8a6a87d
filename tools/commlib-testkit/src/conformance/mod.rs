//! One list of cases that every transport passes.
//!
//! A transport is finished when it passes them. Its own test file says how to connect and names the list:
//!
//! ```
//! use async_trait::async_trait;
//! use commlib_core::{Capabilities, Connection, MemoryConfig};
//! use commlib_testkit::conformance::{Case, Fixture};
//!
//! struct Memory(MemoryConfig);
//!
//! #[async_trait]
//! impl Fixture for Memory {
//!     fn capabilities(&self) -> Capabilities {
//!         self.0.capabilities.clone()
//!     }
//!     async fn connect(&self) -> Connection {
//!         self.0.connect().await.expect("connects")
//!     }
//! }
//!
//! /// `None` skips the case: the broker is not installed.
//! async fn memory(case: &'static Case) -> Option<Memory> {
//!     Some(Memory(MemoryConfig::new(case.name)))
//! }
//!
//! commlib_testkit::conformance!(memory);
//! # fn main() {}
//! ```
//!
//! Cases use a transport through its [`Connection`] only, and wait for signals, never for a time to pass, except where
//! time is the subject. Every wait is bounded by [`within`].

pub mod delivery;
mod gate;
pub mod life;
mod list;
pub mod messages;
pub mod nodes;
pub mod outage;
pub mod patterns;
mod peer;
pub mod queues;
pub mod rpc;
mod runner;
pub mod services;
pub mod topics;

use std::fmt;
use std::future::Future;
use std::pin::Pin;

use async_trait::async_trait;
use commlib_core::{AbsentService, Capabilities, Connection, QueueKind};

pub use crate::wait::{set_patience, within};
pub use list::CASES;
pub use runner::{run, run_case};

/// What a case needs to know about a transport: how to get at it.
#[async_trait]
pub trait Fixture: Send + Sync {
    /// What the best session of this transport can do: that of [`connect_durable`](Self::connect_durable).
    fn capabilities(&self) -> Capabilities;

    /// A new connection with a session of its own, ready for use.
    async fn connect(&self) -> Connection;

    /// A connection that can subscribe at least once. The same name names the same session, which outlives the
    /// connection. Only asked for if the capabilities have `acks`.
    async fn connect_durable(&self, _session: &str) -> Connection {
        self.connect().await
    }

    /// The switch for the link of all connections; `None` if it cannot be broken.
    fn outage(&self) -> Option<&dyn Outage> {
        None
    }
}

/// Breaks the link of all connections of a [`Fixture`], and mends it.
#[async_trait]
pub trait Outage: Send + Sync {
    /// Takes the broker away; it keeps what it has confirmed.
    async fn down(&self);

    /// Brings the broker back.
    async fn up(&self);
}

/// What a transport must have for a case to apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Publishing at least once.
    Confirms,
    /// Subscribing at least once.
    Acks,
    /// Subscribing at least once to patterns.
    AckPatterns,
    /// Services that share the work.
    Competing,
    /// Services that all get every request.
    FanOut,
    /// Requests wait for a service to come.
    Kept,
    /// A link that can be broken.
    Outage,
}

impl Need {
    /// Whether a transport has it.
    pub fn is_met(self, capabilities: &Capabilities, outage: bool) -> bool {
        match self {
            Self::Confirms => capabilities.confirms,
            Self::Acks => capabilities.acks,
            Self::AckPatterns => capabilities.acks && capabilities.ack_patterns,
            Self::Competing => capabilities.queue == QueueKind::Competing,
            Self::FanOut => capabilities.queue == QueueKind::FanOut,
            Self::Kept => capabilities.absent_service == AbsentService::Kept,
            Self::Outage => outage,
        }
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Confirms => "`confirms`: the broker confirms nothing",
            Self::Acks => "`acks`: no session keeps what is not acknowledged",
            Self::AckPatterns => "`ack_patterns`: at least once is for names, not for patterns",
            Self::Competing => "`queue: Competing`: every service gets every request",
            Self::FanOut => "`queue: FanOut`: services share the work",
            Self::Kept => "`absent_service: Kept`: requests do not wait for a service",
            Self::Outage => "an outage: this fixture cannot break its link",
        })
    }
}

/// One case of the list.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// The module it is in.
    pub group: &'static str,
    /// The function's name.
    pub name: &'static str,
    /// What a transport must have for it to apply.
    pub needs: &'static [Need],
    /// The case itself. It panics when the transport fails it.
    pub run: for<'a> fn(&'a dyn Fixture) -> Running<'a>,
}

/// A running case.
pub type Running<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

impl Case {
    /// The case of this name, written `group::name`.
    pub fn named(name: &str) -> Option<&'static Self> {
        CASES.iter().find(|case| case.to_string() == name)
    }

    /// Whether it breaks the link, so that it must have the broker for itself.
    pub fn breaks_the_link(&self) -> bool {
        self.needs.contains(&Need::Outage)
    }

    /// The first need that a fixture does not meet: the case does not apply to it.
    pub fn unmet(&self, fixture: &dyn Fixture) -> Option<Need> {
        let (capabilities, outage) = (fixture.capabilities(), fixture.outage().is_some());
        let mut needs = self.needs.iter().copied();
        needs.find(|need| !need.is_met(&capabilities, outage))
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::{}", self.group, self.name)
    }
}

/// A name that no other case uses, also not on a broker that others use.
pub fn unique(stem: &str) -> String {
    format!("{stem}-{:016x}", fastrand::u64(..))
}
