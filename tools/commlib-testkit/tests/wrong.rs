//! The suite can fail: each fault of a wrong transport is noticed by the case that is there for it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use commlib_core::{Capabilities, Connection, MemoryBroker, MemoryConfig};
use commlib_testkit::conformance::{CASES, Case, Fixture, Outage, run, set_patience, unique};
use commlib_testkit::wrong::{Fault, wrong};
use tokio::task::JoinSet;

/// Memory with a fault.
struct Faulty {
    config: MemoryConfig,
    broker: Arc<MemoryBroker>,
    fault: Fault,
}

impl Faulty {
    fn new(fault: Fault) -> Self {
        let config = MemoryConfig::new(unique("wrong"));
        let broker = MemoryBroker::named(&config.name, &config.capabilities);
        Self {
            config,
            broker,
            fault,
        }
    }
}

#[async_trait]
impl Fixture for Faulty {
    fn capabilities(&self) -> Capabilities {
        self.config.capabilities.clone()
    }

    async fn connect(&self) -> Connection {
        wrong(
            self.config.connect().await.expect("connects always"),
            self.fault,
        )
    }

    fn outage(&self) -> Option<&dyn Outage> {
        Some(self)
    }
}

#[async_trait]
impl Outage for Faulty {
    async fn down(&self) {
        self.broker.stop();
    }

    async fn up(&self) {
        self.broker.start(true);
    }
}

/// The outcomes of cases on transports with faults, all at once.
async fn outcomes(
    pairs: impl Iterator<Item = (Fault, &'static Case)>,
) -> Vec<(Fault, &'static Case, Result<(), String>)> {
    set_patience(Duration::from_secs(3));
    let mut running = JoinSet::new();
    for (fault, case) in pairs {
        running.spawn(async move { (fault, case, run(case, &Faulty::new(fault)).await) });
    }
    running.join_all().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_is_noticed() {
    let pairs = Fault::ALL.iter().map(|fault| {
        let name = fault.caught_by().expect("a fault has its case");
        (*fault, Case::named(name).expect(name))
    });
    let mut passed = Vec::new();
    for (fault, case, outcome) in outcomes(pairs).await {
        match outcome {
            Ok(()) => passed.push(format!("{fault:?} passes {case}")),
            Err(why) => println!(
                "{fault:?} fails {case}: {}",
                why.lines().next().unwrap_or_default()
            ),
        }
    }
    assert!(passed.is_empty(), "{passed:#?}");
}

/// Otherwise a fault might be noticed for the wrapping alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_transport_without_a_fault_passes() {
    let all = outcomes(CASES.iter().map(|case| (Fault::None, case))).await;
    assert_eq!(all.len(), CASES.len());
    let failed: Vec<_> = all
        .into_iter()
        .filter_map(|(_, case, outcome)| Some((case.to_string(), outcome.err()?)))
        .collect();
    assert!(failed.is_empty(), "{failed:#?}");
}
