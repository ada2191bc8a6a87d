//! The broker that the command line names.

use std::future::Future;
use std::time::Duration;

use commlib::{BrokerUrl, Connection, Dialect};

use crate::failure::Failure;

/// How long a broker that has accepted us may take to confirm that we listen.
const LIMIT: Duration = Duration::from_secs(10);

/// A broker and how its other programs write messages.
#[derive(Debug)]
pub(crate) struct Broker {
    url: String,
    dialect: Option<Dialect>,
}

impl Broker {
    pub(crate) fn new(url: Option<String>, dialect: Option<Dialect>) -> Result<Self, Failure> {
        let url = url.filter(|url| !url.is_empty()).ok_or_else(|| {
            Failure::usage("no broker: give --url before the command, or set COMMLIB_URL")
        })?;
        if BrokerUrl::parse(&url)?.scheme == "memory" {
            return Err(Failure::usage(
                "`memory:` is a broker within one process, and this command would be alone in it; \
                 give the URL of a broker that others reach too, such as mqtt://localhost:1883",
            ));
        }
        Ok(Self { url, dialect })
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// The same broker with other options in its URL.
    pub(crate) fn with_url(&self, url: String) -> Self {
        Self { url, ..*self }
    }

    pub(crate) async fn connect(&self) -> Result<Connection, Failure> {
        let connection = commlib::connect(&self.url).await?;
        Ok(match self.dialect {
            Some(dialect) => connection.with_dialect(dialect),
            None => connection,
        })
    }
}

/// Waits for `listening`, which never ends if the broker goes away at that very moment.
pub(crate) async fn confirmed<T>(
    listening: impl Future<Output = commlib::Result<T>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(LIMIT, listening).await {
        Ok(outcome) => Ok(outcome?),
        Err(_) => Err(Failure::failed(
            "the broker did not confirm within 10 s that it lets us listen",
        )),
    }
}
