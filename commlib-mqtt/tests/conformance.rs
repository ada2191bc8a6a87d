//! MQTT under the suite that every transport passes, on a real broker.

use async_trait::async_trait;
use commlib_core::{Capabilities, Connection};
use commlib_mqtt::{MqttConfig, Session};
use commlib_testkit::conformance::{Case, Fixture, Outage, unique};
use commlib_testkit::{Mosquitto, mqtt_url};

struct Mqtt {
    config: MqttConfig,
    capabilities: Capabilities,
    /// A broker that may be killed; the others are shared.
    own: Option<Mosquitto>,
}

async fn mqtt(case: &'static Case) -> Option<Mqtt> {
    let (url, own) = if case.breaks_the_link() {
        if !Mosquitto::available() {
            return None;
        }
        let broker = Mosquitto::start().await;
        (broker.url(), Some(broker))
    } else {
        (mqtt_url().await?, None)
    };
    let config = MqttConfig::from_url(&url).expect("the broker's URL");
    let best = connect_durable(&config, &unique("probe")).await;
    Some(Mqtt {
        capabilities: best.link().capabilities().clone(),
        config,
        own,
    })
}

async fn connect_durable(config: &MqttConfig, session: &str) -> Connection {
    let config = config
        .clone()
        .client_id(session)
        .session(Session::Persistent);
    config.connect().await.expect("connect with a session")
}

#[async_trait]
impl Fixture for Mqtt {
    fn capabilities(&self) -> Capabilities {
        self.capabilities.clone()
    }

    async fn connect(&self) -> Connection {
        self.config.clone().connect().await.expect("connect")
    }

    async fn connect_durable(&self, session: &str) -> Connection {
        connect_durable(&self.config, session).await
    }

    fn outage(&self) -> Option<&dyn Outage> {
        self.own.as_ref().map(|broker| broker as &dyn Outage)
    }
}

commlib_testkit::conformance!(mqtt);
