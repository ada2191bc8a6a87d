//! Broker URLs and durations, read the same way for every broker.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use url::Url;

use crate::error::{Error, ErrorKind, Result};

/// A broker's URL, taken apart: `scheme://[user[:password]@]host[:port][/path][?option=value&…]`.
///
/// User, password, host and options are percent-decoded, the path is not. A transport takes the options it knows and calls
/// [`finish`](Self::finish), which refuses the rest. `Debug` and `Display` show neither user nor password nor options.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BrokerUrl {
    /// The part before the first colon, in lower case.
    pub scheme: String,
    /// The host name or address; empty for schemes without one. IPv6 addresses stand without brackets.
    pub host: String,
    /// The port, if given.
    pub port: Option<u16>,
    /// The user name, if given.
    pub username: Option<String>,
    /// The password, if given.
    pub password: Option<String>,
    /// The path, as it is written.
    pub path: String,
    options: BTreeMap<String, String>,
    known: Vec<&'static str>,
}

impl BrokerUrl {
    /// Takes a URL apart.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if it is no URL, or names an option twice. The message never repeats a password.
    pub fn parse(text: &str) -> Result<Self> {
        // The text itself stays out of the message: it may hold a password.
        let bad = |why: &dyn fmt::Display| Error::new(ErrorKind::Config, "broker URL").because(why);
        let url = Url::parse(text).map_err(|e| {
            bad(&format_args!(
                "{e}; write it like `mqtt://localhost:1883` or `memory:`"
            ))
        })?;
        let decode = |text: &str| -> Result<String> {
            let bytes = percent_decode(text);
            String::from_utf8(bytes).map_err(|_| bad(&"a percent-escaped part is not UTF-8"))
        };
        let mut options = BTreeMap::new();
        for (key, value) in url.query_pairs() {
            if options
                .insert(key.to_string(), value.into_owned())
                .is_some()
            {
                return Err(bad(&format_args!("option `{key}` is given twice")));
            }
        }
        if url.fragment().is_some() {
            return Err(bad(
                &"`#` starts a fragment, which means nothing here; write it as %23",
            ));
        }
        let host = url.host_str().unwrap_or_default();
        Ok(Self {
            scheme: url.scheme().to_owned(),
            host: decode(host.trim_start_matches('[').trim_end_matches(']'))?,
            port: url.port(),
            username: match url.username() {
                "" => None,
                user => Some(decode(user)?),
            },
            password: url.password().map(decode).transpose()?,
            path: url.path().to_owned(),
            options,
            known: Vec::new(),
        })
    }

    /// Takes an option out. Names it as known for the message of [`finish`](Self::finish).
    pub fn take(&mut self, option: &'static str) -> Option<String> {
        self.known.push(option);
        self.options.remove(option)
    }

    /// Takes an option out and parses it.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] with the option's name and the reason.
    pub fn take_parsed<T: FromStr<Err: fmt::Display>>(
        &mut self,
        option: &'static str,
    ) -> Result<Option<T>> {
        self.take_with(option, |text| {
            text.parse().map_err(|e: T::Err| e.to_string())
        })
    }

    /// Takes a duration such as `250ms` out; see [`parse_duration`].
    ///
    /// # Errors
    /// [`ErrorKind::Config`] with the option's name and the reason.
    pub fn take_duration(&mut self, option: &'static str) -> Result<Option<Duration>> {
        self.take_with(option, |text| {
            parse_duration(text).map_err(|e| e.to_string())
        })
    }

    /// Takes an option out and reads it with a function; its error is the reason.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] with the option's name and the reason.
    pub fn take_with<T>(
        &mut self,
        option: &'static str,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>> {
        let Some(text) = self.take(option) else {
            return Ok(None);
        };
        read(&text).map(Some).map_err(|why| {
            Error::new(ErrorKind::Config, "URL option")
                .at(option)
                .because(why)
        })
    }

    /// Refuses options that nobody took.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] that names the option and the known ones.
    pub fn finish(self) -> Result<()> {
        let Some(unknown) = self.options.keys().next() else {
            return Ok(());
        };
        let mut known = self.known;
        known.sort_unstable();
        Err(Error::new(ErrorKind::Config, "URL option")
            .at(unknown)
            .because(format_args!(
                "it is unknown; known are {}",
                known.join(", ")
            )))
    }
}

impl fmt::Display for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.scheme)?;
        if !self.host.is_empty() {
            if self.host.contains(':') {
                write!(f, "//[{}]", self.host)?;
            } else {
                write!(f, "//{}", self.host)?;
            }
        }
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        f.write_str(&self.path)
    }
}

impl fmt::Debug for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BrokerUrl({self})")
    }
}

/// Reads a duration: a whole number with a unit of `ms`, `s`, `m` or `h`, such as `250ms`, `5s`, `2m`.
///
/// # Errors
/// [`ErrorKind::Config`] if it is anything else.
pub fn parse_duration(text: &str) -> Result<Duration> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let scale = match unit {
        "ms" => Some(1),
        "s" => Some(1_000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        _ => None,
    };
    number
        .parse::<u64>()
        .ok()
        .zip(scale)
        .and_then(|(number, scale)| number.checked_mul(scale))
        .map(Duration::from_millis)
        .ok_or_else(|| {
            Error::new(ErrorKind::Config, "duration")
                .at(text)
                .because("write a whole number and a unit, like 250ms, 5s or 2m")
        })
}

/// `url` keeps user, password and host encoded and offers no decoder of its own.
fn percent_decode(text: &str) -> Vec<u8> {
    crate::address::unescape_segment(text, |_| true).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parts_are_decoded() {
        let mut url = BrokerUrl::parse(
            "mqtt://us%40er:p%3Aw%2F@[::1]:1884/%2f?keep_alive=10s&client_id=a%20b",
        )
        .unwrap();
        assert_eq!(
            (&*url.scheme, &*url.host, url.port),
            ("mqtt", "::1", Some(1884))
        );
        assert_eq!(url.username.as_deref(), Some("us@er"));
        assert_eq!(url.password.as_deref(), Some("p:w/"));
        assert_eq!(url.path, "/%2f");
        assert_eq!(
            url.take_duration("keep_alive").unwrap(),
            Some(Duration::from_secs(10))
        );
        assert_eq!(url.take("client_id").as_deref(), Some("a b"));
        assert_eq!(url.to_string(), "mqtt://[::1]:1884/%2f");
        assert!(!format!("{url:?}").contains("p:w"));
        url.finish().unwrap();
    }

    #[test]
    fn unknown_and_bad_options_are_named() {
        let mut url = BrokerUrl::parse("mqtt://h?keep_alive=soon&keepalive=1s").unwrap();
        let error = url.take_duration("keep_alive").unwrap_err();
        assert!(error.to_string().contains("keep_alive") && error.to_string().contains("soon"));
        let error = url.finish().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert_eq!(
            error.to_string(),
            "URL option `keepalive`: it is unknown; known are keep_alive"
        );
    }

    #[test]
    fn what_is_no_url_is_refused_without_repeating_it() {
        for text in [
            "",
            "localhost:pass word",
            "://",
            "mqtt://u:secret@host:99999",
            "mqtt://h#secret",
        ] {
            let Err(error) = BrokerUrl::parse(text) else {
                assert!(text.starts_with("localhost"), "{text}");
                continue;
            };
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn durations() {
        for (text, millis) in [
            ("250ms", 250),
            ("5s", 5_000),
            ("2m", 120_000),
            ("1h", 3_600_000),
        ] {
            assert_eq!(parse_duration(text).unwrap(), Duration::from_millis(millis));
        }
        for bad in [
            "",
            "5",
            "s",
            "-1s",
            "1.5s",
            "5 s",
            "99999999999999999999s",
            "5d",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "(mqtt|memory):(//)?\\PC{0,40}") {
            let _ = BrokerUrl::parse(&text).map(BrokerUrl::finish);
        }
    }
}
