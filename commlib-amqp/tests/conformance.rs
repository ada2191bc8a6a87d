//! AMQP under the suite that every transport passes, on a real broker.

use async_trait::async_trait;
use commlib_amqp::AmqpConfig;
use commlib_core::{Capabilities, Connection};
use commlib_testkit::conformance::{Case, Fixture, Outage};
use commlib_testkit::{Proxy, amqp_url};

struct Amqp {
    config: AmqpConfig,
    capabilities: Capabilities,
    /// In front of the shared broker, for the cases that break the link.
    link: Option<Link>,
}

struct Link(Proxy);

async fn amqp(case: &'static Case) -> Option<Amqp> {
    let mut config = AmqpConfig::from_url(&amqp_url().await?).expect("the broker's URL");
    let mut link = None;
    if case.breaks_the_link() {
        let proxy = Proxy::start(config.address.clone()).await;
        config.address = proxy.address();
        link = Some(Link(proxy));
    }
    let probe = config.clone().connect().await.expect("connect");
    Some(Amqp {
        capabilities: probe.link().capabilities().clone(),
        config,
        link,
    })
}

#[async_trait]
impl Fixture for Amqp {
    fn capabilities(&self) -> Capabilities {
        self.capabilities.clone()
    }

    async fn connect(&self) -> Connection {
        self.config.clone().connect().await.expect("connect")
    }

    fn outage(&self) -> Option<&dyn Outage> {
        self.link.as_ref().map(|link| link as &dyn Outage)
    }
}

/// A broker that restarts takes ten seconds; tests/faults.rs does that once.
#[async_trait]
impl Outage for Link {
    async fn down(&self) {
        self.0.refuse(true).await;
        self.0.cut();
    }

    async fn up(&self) {
        self.0.refuse(false).await;
    }
}

commlib_testkit::conformance!(amqp);
