//! The durable subscription behind `sub --delivery at-least-once`.

use std::time::Duration;

use commlib::{BrokerUrl, Name};
use url::Url;

use crate::broker::Broker;
use crate::failure::{Failure, note};

/// How long removing a subscription may take before we leave it to the user.
const LIMIT: Duration = Duration::from_secs(5);

/// A subscription that the broker keeps while nobody listens.
#[derive(Debug)]
pub(crate) struct Durable {
    name: String,
    /// Nobody will come back for it: it goes with us.
    made_up: bool,
    /// On MQTT the session belongs to the client id, and the user gave one.
    foreign_session: bool,
    mqtt: bool,
}

impl Durable {
    /// The subscription of that name, or a made-up one.
    pub(crate) fn new(name: Option<Name>, broker: &Broker) -> Result<Self, Failure> {
        let mut url = BrokerUrl::parse(broker.url())?;
        let made_up = name.is_none();
        let name = name.map_or_else(unique, |name| name.to_string());
        Ok(Self {
            name,
            made_up,
            foreign_session: url.take("client_id").is_some(),
            mqtt: matches!(url.scheme.as_str(), "mqtt" | "mqtts"),
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The broker with the options that such a subscription needs; those that the URL has already stay.
    pub(crate) fn prepare(&self, broker: &Broker) -> Result<Broker, Failure> {
        if !self.mqtt {
            return Ok(broker.with_url(broker.url().to_owned()));
        }
        let mut options = vec![("session", "persistent".to_owned())];
        if !self.foreign_session {
            options.push(("client_id", self.client_id()));
        }
        with_options(broker, &options, false)
    }

    /// Removes it from the broker if it was made up. What cannot be removed is told, and does not fail the command.
    pub(crate) async fn remove(&self, broker: &Broker) {
        if !self.made_up || !self.mqtt || self.foreign_session {
            return;
        }
        // A clean session under the same client id replaces the kept one and leaves nothing behind.
        let options = [
            ("session", "clean".to_owned()),
            ("client_id", self.client_id()),
        ];
        let replace = async {
            let connection = with_options(broker, &options, true)?.connect().await?;
            connection.close().await?;
            Ok::<(), Failure>(())
        };
        if !matches!(tokio::time::timeout(LIMIT, replace).await, Ok(Ok(()))) {
            let name = &self.name;
            note(format_args!(
                "warning: the broker could not be reached to remove the subscription `{name}`"
            ));
        }
    }

    fn client_id(&self) -> String {
        format!("commlib-{}", self.name)
    }
}

/// A name that nobody else has.
fn unique() -> String {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |now| now.as_nanos());
    format!("sub-{:x}-{now:x}", std::process::id())
}

/// The broker with these options in its URL, in place of its own ones or only where it has none.
fn with_options(
    broker: &Broker,
    options: &[(&str, String)],
    replace: bool,
) -> Result<Broker, Failure> {
    let mut url = Url::parse(broker.url()).map_err(|e| Failure::usage(format_args!("URL: {e}")))?;
    let mut pairs: Vec<(String, String)> = url.query_pairs().into_owned().collect();
    for (key, value) in options {
        if replace {
            pairs.retain(|(have, _)| have != key);
        }
        if pairs.iter().all(|(have, _)| have != key) {
            pairs.push(((*key).to_owned(), value.clone()));
        }
    }
    url.query_pairs_mut().clear().extend_pairs(pairs);
    Ok(broker.with_url(url.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broker(url: &str) -> Broker {
        Broker::new(Some(url.to_owned()), None).unwrap()
    }

    #[test]
    fn options_are_added_and_never_overridden() {
        let name = Name::new("logger").unwrap();
        for (url, expected) in [
            (
                "mqtt://u:p%40@h:1884",
                "mqtt://u:p%40@h:1884?session=persistent&client_id=commlib-logger",
            ),
            (
                "mqtt://h?client_id=a%20b&keep_alive=5s",
                "mqtt://h?client_id=a+b&keep_alive=5s&session=persistent",
            ),
            (
                "mqtt://h?session=clean",
                "mqtt://h?session=clean&client_id=commlib-logger",
            ),
        ] {
            let broker = broker(url);
            let durable = Durable::new(Some(name.clone()), &broker).unwrap();
            assert_eq!(durable.prepare(&broker).unwrap().url(), expected);
        }
    }

    #[test]
    fn made_up_names_are_names_and_differ() {
        let broker = broker("mqtt://h");
        let [a, b] = [(); 2].map(|()| Durable::new(None, &broker).unwrap());
        assert!(Name::new(a.name()).is_ok());
        assert_ne!(a.name(), b.name());
    }
}
