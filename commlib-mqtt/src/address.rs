//! Dotted names and MQTT topics: the only file that knows slashes, `+` and `#`.
//!
//! A level of a topic is a segment of a name. What a segment cannot hold is escaped on the way in and unescaped on the
//! way out, so a bridge hands foreign topics through unchanged.

use std::borrow::Cow;

use commlib_core::{Error, ErrorKind, Name, Pattern, Result, unescape_segment};

/// The longest text that an MQTT packet can carry as a topic or filter.
const MAX_LEN: usize = u16::MAX as usize;

/// The topic of a name.
pub(crate) fn topic(name: &Name) -> Result<String> {
    fits(join(name.segments().map(level)), name.as_str())
}

/// The filter of a pattern: `*` becomes `#` at the end and `+` elsewhere.
pub(crate) fn filter(pattern: &Pattern) -> Result<String> {
    let last = pattern.segments().count() - 1;
    let levels = pattern
        .segments()
        .enumerate()
        .map(|(index, segment)| match segment {
            "*" if index == last => Cow::Borrowed("#"),
            "*" => Cow::Borrowed("+"),
            segment => level(segment),
        });
    fits(join(levels), pattern.as_str())
}

/// The name of a topic that a broker delivered. Never fails.
pub(crate) fn name(topic: &str) -> Name {
    Name::from_foreign(topic.split('/').map(segment))
}

/// The topic of a reply address. It is the caller's own text, and a broker would cut the link over a bad one.
pub(crate) fn reply_topic(address: &str) -> Result<&str> {
    let bad = |why: &str| {
        Err(Error::new(ErrorKind::InvalidAddress, "reply to")
            .at(address.escape_debug())
            .because(why))
    };
    if address.is_empty() || address.len() > MAX_LEN {
        return bad("an MQTT topic has 1 to 65535 bytes");
    }
    if address.contains(['+', '#']) || !speakable(address) {
        return bad("an MQTT topic holds no `+`, `#` or control characters");
    }
    Ok(address)
}

/// A segment as a level. Escapes of what a level cannot hold stay as they are written.
fn level(segment: &str) -> Cow<'_, str> {
    match unescape_segment(segment, |byte| !kept_escaped(byte)) {
        Cow::Borrowed(bytes) => Cow::Borrowed(std::str::from_utf8(bytes).unwrap_or(segment)),
        Cow::Owned(bytes) => match String::from_utf8(bytes) {
            Ok(text) if speakable(&text) => Cow::Owned(text),
            _ => Cow::Borrowed(segment),
        },
    }
}

/// A level as the bytes of a segment, to be escaped by [`Name::from_foreign`].
fn segment(level: &str) -> Cow<'_, [u8]> {
    // Written out, the escape of an empty level is a level of three letters.
    if level == "%00" {
        return Cow::Borrowed(level.as_bytes());
    }
    unescape_segment(level, kept_escaped)
}

/// Bytes that stay escaped within a level: separators, wildcards, and control characters, over which Mosquitto cuts
/// the link.
fn kept_escaped(byte: u8) -> bool {
    matches!(byte, b'/' | b'+' | b'#') || byte.is_ascii_control()
}

/// Whether brokers take a text: MQTT 3.1.1, 1.5.3 lets them cut the link over control and non-characters.
fn speakable(text: &str) -> bool {
    !text
        .chars()
        .any(|c| c.is_control() || u32::from(c) & 0xFFFE == 0xFFFE)
}

fn join<'a>(levels: impl Iterator<Item = Cow<'a, str>>) -> String {
    let mut text = String::with_capacity(64);
    for (index, level) in levels.enumerate() {
        if index > 0 {
            text.push('/');
        }
        text.push_str(&level);
    }
    text
}

fn fits(text: String, name: &str) -> Result<String> {
    if text.is_empty() || text.len() > MAX_LEN {
        return Err(Error::new(ErrorKind::InvalidAddress, "MQTT topic of")
            .at(name)
            .because("an MQTT topic has 1 to 65535 bytes"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn topic_of(text: &str) -> String {
        topic(&Name::new(text).unwrap()).unwrap()
    }

    #[test]
    fn names_become_topics_and_come_back() {
        for (text, expected) in [
            ("a", "a"),
            ("sensors.sonar.front", "sensors/sonar/front"),
            ("a.%00.b", "a//b"),
            ("v1%2E5.x", "v1.5/x"),
            ("a%20b", "a b"),
            ("a%2Fb.%2B.%23", "a%2Fb/%2B/%23"),
            ("a%00.%07", "a%00/%07"),
            ("$SYS.x", "$SYS/x"),
        ] {
            assert_eq!(topic_of(text), expected);
            assert_eq!(name(expected).as_str(), text);
        }
    }

    #[test]
    fn patterns_become_filters() {
        for (text, expected) in [
            ("a.b", "a/b"),
            ("*", "#"),
            ("a.*", "a/#"),
            ("a.*.c", "a/+/c"),
            ("*.*", "+/#"),
        ] {
            assert_eq!(filter(&Pattern::new(text).unwrap()).unwrap(), expected);
        }
    }

    #[test]
    fn what_mqtt_cannot_carry_is_an_invalid_address() {
        let long = Name::from_foreign(vec!["x"; 40_000]);
        assert_eq!(topic(&long).unwrap_err().kind(), ErrorKind::InvalidAddress);
        assert!(topic(&Name::new("%00").unwrap()).is_err());
        for bad in ["", "a/+", "#", "a\0", "a\u{ffff}", &"x".repeat(65_536)] {
            let error = reply_topic(bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidAddress);
        }
        assert_eq!(reply_topic("rpc-1/2.3").unwrap(), "rpc-1/2.3");
    }

    proptest! {
        #[test]
        fn every_topic_survives_a_bridge(text in "[A-Z%.0-9é /]{1,30}") {
            prop_assert_eq!(topic(&name(&text)).unwrap(), text);
        }

        #[test]
        fn every_name_makes_a_topic_that_brokers_take(text in "[a-c%.0-9]{1,20}") {
            if let Ok(name) = Name::new(&text) && let Ok(topic) = topic(&name) {
                prop_assert!(reply_topic(&topic).is_ok());
            }
        }
    }
}
