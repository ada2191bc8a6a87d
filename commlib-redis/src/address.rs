//! Dotted names, Redis channels and keys: the only file that knows glob signs.
//!
//! A channel or key is the name unchanged. What a name cannot hold is escaped on the way in and unescaped on the way
//! out, so a bridge hands foreign names through unchanged. One does not survive: a part that is a single NUL byte comes
//! out empty, because `%00` stands for an empty segment.

use std::borrow::Cow;

use commlib_core::{Name, Pattern, unescape_segment};

/// What the stream of a topic is called, before its channel.
const STREAM: &[u8] = b"commlib:stream:";

/// The channel or key of a name.
pub(crate) fn key(name: &Name) -> Vec<u8> {
    join(name.segments().map(segment))
}

/// The stream of a topic.
pub(crate) fn stream(name: &Name) -> Vec<u8> {
    [STREAM, &key(name)].concat()
}

/// The glob of a pattern. `*` crosses dots in a glob, so it brings more than was asked for; core checks that.
pub(crate) fn glob(pattern: &Pattern) -> Vec<u8> {
    join(pattern.segments().map(|part| match part {
        "*" => Cow::Borrowed(b"*".as_slice()),
        literal => escape_glob(segment(literal)),
    }))
}

/// The name of a channel or key that came from the server. Never fails.
pub(crate) fn name(key: &[u8]) -> Name {
    if let Ok(text) = std::str::from_utf8(key)
        && !text.contains('%')
        && let Ok(name) = Name::new(text)
    {
        return name;
    }
    Name::from_foreign(key.split(|&byte| byte == b'.').map(foreign_segment))
}

fn segment(segment: &str) -> Cow<'_, [u8]> {
    unescape_segment(segment, |byte| byte != b'.')
}

/// A part of a foreign channel as the bytes of a segment, to be escaped by [`Name::from_foreign`].
fn foreign_segment(part: &[u8]) -> Cow<'_, [u8]> {
    match std::str::from_utf8(part) {
        // Written out, the escape of an empty segment is a part of three letters.
        Ok(text) if text != "%00" => unescape_segment(text, |byte| byte == b'.'),
        _ => Cow::Borrowed(part),
    }
}

fn escape_glob(literal: Cow<'_, [u8]>) -> Cow<'_, [u8]> {
    let special = |byte: &u8| matches!(byte, b'*' | b'?' | b'[' | b']' | b'\\');
    if !literal.iter().any(special) {
        return literal;
    }
    let mut out = Vec::with_capacity(literal.len() + 4);
    for byte in literal.iter() {
        if special(byte) {
            out.push(b'\\');
        }
        out.push(*byte);
    }
    Cow::Owned(out)
}

fn join<'a>(parts: impl Iterator<Item = Cow<'a, [u8]>>) -> Vec<u8> {
    let mut out = Vec::with_capacity(64);
    for (index, part) in parts.enumerate() {
        if index > 0 {
            out.push(b'.');
        }
        out.extend_from_slice(&part);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_become_keys_and_come_back() {
        for (text, expected) in [
            ("a", "a"),
            ("sensors.sonar.front", "sensors.sonar.front"),
            ("a.%00.b", "a..b"),
            ("%00", ""),
            ("v1%2E5.x", "v1%2E5.x"),
            ("a%20b", "a b"),
            ("robot.pb%2Fx%2Fy", "robot.pb/x/y"),
            ("a%25b", "a%b"),
            ("a%00", "a\0"),
        ] {
            assert_eq!(key(&Name::new(text).unwrap()), expected.as_bytes());
            assert_eq!(name(expected.as_bytes()).as_str(), text);
        }
        assert_eq!(name(b"a\xff.b").as_str(), "a%FF.b");
        assert_eq!(
            stream(&Name::new("a.b").unwrap()),
            b"commlib:stream:a.b".as_slice()
        );
    }

    #[test]
    fn patterns_become_globs() {
        for (text, expected) in [
            ("a.b", "a.b"),
            ("*", "*"),
            ("a.*", "a.*"),
            ("a.*.c", "a.*.c"),
            ("a[1].b?.*", r"a\[1\].b\?.*"),
            (r"a\b.%2A.*", r"a\\b.\*.*"),
        ] {
            assert_eq!(glob(&Pattern::new(text).unwrap()), expected.as_bytes());
        }
    }

    proptest! {
        #[test]
        fn every_key_survives_a_bridge(bytes in proptest::collection::vec(any::<u8>(), 0..30)) {
            prop_assume!(!bytes.split(|byte| *byte == b'.').any(|part| part == b"\0"));
            prop_assert_eq!(key(&name(&bytes)), bytes);
        }

        #[test]
        fn so_does_text_with_escapes(text in "[A-F%.0-9é /*]{0,30}") {
            prop_assert_eq!(key(&name(text.as_bytes())), text.as_bytes());
        }
    }
}
