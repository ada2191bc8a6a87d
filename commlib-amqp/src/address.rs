//! Names as routing keys and queue names, and back. The only file that knows `#`.

use std::borrow::Cow;

use commlib_core::{Error, ErrorKind, Name, Pattern, Result, unescape_segment};
use lapin::types::ShortString;

/// The routing key of a topic and the queue of a service: the name as it is, escapes undone.
pub(crate) fn key(name: &Name) -> Result<ShortString> {
    short(name.as_str(), joined(name.segments().map(literal)))
}

/// The binding key of a pattern: a `*` in the middle is one word, the last one is any number of words.
///
/// `#` also stands for no word at all, and an escaped `*` or `#` in the pattern becomes a wildcard here. Core checks
/// every arrival against the pattern, so more may come than was asked for.
pub(crate) fn binding(pattern: &Pattern) -> Result<ShortString> {
    let last = pattern.segments().count() - 1;
    let words = pattern
        .segments()
        .enumerate()
        .map(|(index, segment)| match segment {
            "*" if index == last => "#".to_owned(),
            "*" => "*".to_owned(),
            literal_word => literal(literal_word),
        });
    short(pattern.as_str(), joined(words))
}

/// The name of a routing key. Never fails.
pub(crate) fn name(key: &str) -> Name {
    Name::from_foreign(key.split('.').map(|word| match word {
        // Written out, the escape of an empty word is a word of three letters.
        "%00" => Cow::Borrowed(word.as_bytes()),
        _ => unescape_segment(word, stays_escaped),
    }))
}

/// The queue of a durable subscription, apart from those of services.
pub(crate) fn durable(name: &Name) -> Result<ShortString> {
    short(name.as_str(), format!("commlib.durable.{}", key(name)?))
}

/// A name that this client makes up. Names made by the broker (`amq.gen-…`) cannot be asked for again.
pub(crate) fn unique(what: &str) -> ShortString {
    format!("commlib.{what}.{}", commlib_core::random_id()).into()
}

/// Text of at most 255 bytes, as AMQP wants it for names.
pub(crate) fn short(shown: &str, text: String) -> Result<ShortString> {
    ShortString::try_new(text).map_err(|_| {
        Error::new(ErrorKind::InvalidAddress, "name")
            .at(shown)
            .because("AMQP has room for 255 bytes")
    })
}

/// A segment with its escapes undone. What a word cannot hold, and the client crate cannot send, stays escaped.
fn literal(segment: &str) -> String {
    let text =
        |keep: fn(u8) -> bool| String::from_utf8(unescape_segment(segment, keep).into_owned());
    text(|byte| byte != b'.')
        .or_else(|_| text(|byte| !stays_escaped(byte)))
        .unwrap_or_else(|_| segment.to_owned())
}

/// Dots separate words, and the client crate knows UTF-8 only.
fn stays_escaped(byte: u8) -> bool {
    byte == b'.' || !byte.is_ascii()
}

fn joined(words: impl Iterator<Item = String>) -> String {
    words.collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_travel_unchanged() {
        for text in ["a", "a.b-c.d_e", "größe.温度"] {
            let name_in = Name::new(text).unwrap();
            assert_eq!(key(&name_in).unwrap().as_str(), text);
            assert_eq!(name(text), name_in);
        }
    }

    #[test]
    fn foreign_keys_come_back_as_they_were() {
        for foreign in [
            "a b", "a/b.c", "", ".", "a..b", "100%", "x*y.#", "a+b", "%2E", "%00", "%41",
        ] {
            let ours = name(foreign);
            assert!(Name::new(ours.as_str()).is_ok(), "{ours}");
            assert_eq!(key(&ours).unwrap().as_str(), foreign);
        }
    }

    #[test]
    fn what_a_word_cannot_hold_stays_escaped() {
        for (text, wire) in [
            ("a%2Eb", "a%2Eb"),
            ("a%FF%20b", "a%FF b"),
            ("%C2%A0", "\u{a0}"),
        ] {
            let ours = Name::new(text).unwrap();
            assert_eq!(key(&ours).unwrap().as_str(), wire);
            assert_eq!(name(wire), ours);
        }
    }

    #[test]
    fn patterns() {
        for (pattern, expected) in [
            ("a.b", "a.b"),
            ("*", "#"),
            ("a.*", "a.#"),
            ("a.*.c", "a.*.c"),
            ("*.*", "*.#"),
            ("*.b.*", "*.b.#"),
        ] {
            let pattern = Pattern::new(pattern).unwrap();
            assert_eq!(binding(&pattern).unwrap().as_str(), expected);
        }
    }

    #[test]
    fn too_long_is_refused() {
        let longest = Name::new("x".repeat(255)).unwrap();
        assert!(key(&longest).is_ok());
        let escaped = name(&"/".repeat(255));
        assert!(key(&escaped).is_ok(), "longer in our form only");
        let error = key(&name(&"x".repeat(256))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidAddress);
    }
}
