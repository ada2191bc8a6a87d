//! The in-memory broker under the suite that every transport passes.

use std::sync::Arc;

use async_trait::async_trait;
use commlib_core::{
    AbsentService, Capabilities, Connection, MemoryBroker, MemoryConfig, QueueKind, ReplyKind,
};
use commlib_testkit::conformance::{CASES, Case, Fixture, Outage, run, unique};
use tokio::task::JoinSet;

struct Memory {
    config: MemoryConfig,
    broker: Arc<MemoryBroker>,
}

impl Memory {
    /// A broker for one case alone.
    fn new(capabilities: Capabilities) -> Self {
        let config = MemoryConfig::new(unique("conformance")).capabilities(capabilities);
        let broker = MemoryBroker::named(&config.name, &config.capabilities);
        Self { config, broker }
    }
}

#[async_trait]
impl Fixture for Memory {
    fn capabilities(&self) -> Capabilities {
        self.config.capabilities.clone()
    }

    async fn connect(&self) -> Connection {
        self.config.connect().await.expect("connects always")
    }

    fn outage(&self) -> Option<&dyn Outage> {
        Some(self)
    }
}

#[async_trait]
impl Outage for Memory {
    async fn down(&self) {
        self.broker.stop();
    }

    async fn up(&self) {
        self.broker.start(true);
    }
}

async fn memory(_: &'static Case) -> Option<Memory> {
    Some(Memory::new(Capabilities::default()))
}

commlib_testkit::conformance!(memory);

/// Each branch of core that asks for a capability is taken, without a broker: every combination passes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_combination_of_capabilities() {
    let mut failures = Vec::new();
    // A few at a time: most cases wait for something, and all at once would wait for the machine.
    for some in combinations().chunks(4) {
        let mut running = JoinSet::new();
        for capabilities in some {
            for case in CASES {
                let fixture = Memory::new(capabilities.clone());
                running.spawn(async move {
                    let outcome = run(case, &fixture).await;
                    outcome.map_err(|why| {
                        format!("{case}: {why}\n  with {:?}", fixture.capabilities())
                    })
                });
            }
        }
        while let Some(outcome) = running.join_next().await {
            failures.extend(outcome.expect("panics are caught").err());
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn combinations() -> Vec<Capabilities> {
    let mut all = Vec::new();
    for queue in [QueueKind::Competing, QueueKind::FanOut] {
        for replies in [ReplyKind::AddressPerCall, ReplyKind::CorrelationId] {
            for absent_service in [
                AbsentService::Kept,
                AbsentService::Dropped,
                AbsentService::Refused,
            ] {
                for (confirms, acks) in [(false, false), (false, true), (true, false), (true, true)]
                {
                    let mut capabilities = Capabilities::default();
                    capabilities.queue = queue;
                    capabilities.replies = replies;
                    capabilities.absent_service = absent_service;
                    capabilities.confirms = confirms;
                    capabilities.acks = acks;
                    all.push(capabilities);
                }
            }
        }
    }
    all
}
