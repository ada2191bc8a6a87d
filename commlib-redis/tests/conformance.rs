//! Redis under the suite that every transport passes, on a real server.

use async_trait::async_trait;
use commlib_core::{Capabilities, Connection};
use commlib_redis::{Protocol, RedisConfig};
use commlib_testkit::conformance::{Case, Fixture, Outage};
use commlib_testkit::{Redis, redis_url};

struct Server {
    config: RedisConfig,
    capabilities: Capabilities,
    /// A server that may be killed; the others are shared.
    own: Option<Redis>,
}

async fn server(case: &'static Case, protocol: Protocol, streams: bool) -> Option<Server> {
    let (url, own) = if case.breaks_the_link() {
        if !Redis::available() {
            return None;
        }
        let server = Redis::start().await;
        (server.url(), Some(server))
    } else {
        (redis_url().await?, None)
    };
    let config = RedisConfig::from_url(&url).expect("the server's URL");
    let config = config.protocol(protocol).streams(streams);
    let probe = config.connect().await.expect("connect");
    Some(Server {
        capabilities: probe.link().capabilities().clone(),
        config,
        own,
    })
}

#[async_trait]
impl Fixture for Server {
    fn capabilities(&self) -> Capabilities {
        self.capabilities.clone()
    }

    async fn connect(&self) -> Connection {
        self.config.connect().await.expect("connect")
    }

    fn outage(&self) -> Option<&dyn Outage> {
        self.own.as_ref().map(|server| server as &dyn Outage)
    }
}

/// Topics and services alone, in the protocol that every server speaks.
mod plain {
    use super::*;

    async fn fixture(case: &'static Case) -> Option<Server> {
        server(case, Protocol::Resp2, false).await
    }

    commlib_testkit::conformance!(fixture);
}

/// With at-least-once topics, in the newer protocol.
mod streams {
    use super::*;

    async fn fixture(case: &'static Case) -> Option<Server> {
        server(case, Protocol::Resp3, true).await
    }

    commlib_testkit::conformance!(fixture);
}
