//! Names, patterns and what they may hold: dotted, neutral, the same on every broker.

use std::borrow::{Borrow, Cow};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::message::ReplyTo;

/// The longest name or pattern that an application may give, in bytes.
pub const MAX_NAME_LEN: usize = 255;

/// The name of a topic, a service or a node: segments joined by dots, `sensors.sonar.front`.
///
/// A segment is not empty and holds no `.` `*` `#` `+` `/`, no white space and no control characters;
/// `%` only starts the escape of a byte that cannot stand there itself, as [`escape_segment`] writes it. The whole is at most [`MAX_NAME_LEN`] bytes.
/// Names that come in from a broker and break these rules are escaped, not refused
/// (see [`escape_segment`]), and may then be longer. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Arc<str>);

impl Name {
    /// Checks and makes a name.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidAddress`] with the rule that was broken.
    pub fn new(text: impl AsRef<str>) -> Result<Self> {
        let text = text.as_ref();
        check(text, false).map_err(|why| invalid("name", text, why))?;
        Ok(Self(text.into()))
    }

    /// A name from the segments of a foreign one, each escaped as [`escape_segment`] does. Never fails.
    pub fn from_foreign<S: AsRef<[u8]>>(segments: impl IntoIterator<Item = S>) -> Self {
        let mut text = String::new();
        for (index, segment) in segments.into_iter().enumerate() {
            if index > 0 {
                text.push('.');
            }
            text.push_str(&escape_segment(segment.as_ref()));
        }
        if text.is_empty() {
            text.push_str(EMPTY_SEGMENT);
        }
        Self(text.into())
    }

    /// The text with its dots.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The segments between the dots.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.0.split('.')
    }

    /// `self` and `rest` joined by a dot.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidAddress`] if the result breaks the rules of a name.
    pub fn join(&self, rest: &str) -> Result<Self> {
        Self::new(format!("{self}.{rest}"))
    }
}

/// What to listen to: a [`Name`], in which `*` may stand as a whole segment.
///
/// In the middle `*` is exactly one segment, at the end **one or more**. This holds on every broker:
/// a transport may deliver more than was asked for and core checks each arrival with [`Pattern::matches`].
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pattern {
    text: Arc<str>,
    exact: bool,
}

impl Pattern {
    /// Checks and makes a pattern.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidAddress`] with the rule that was broken.
    pub fn new(text: impl AsRef<str>) -> Result<Self> {
        let text = text.as_ref();
        check(text, true).map_err(|why| invalid("pattern", text, why))?;
        Ok(Self {
            text: text.into(),
            exact: !text.contains('*'),
        })
    }

    /// The text with its dots and stars.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The segments between the dots.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.text.split('.')
    }

    /// The single name it stands for, if it holds no `*`.
    pub fn exact(&self) -> Option<Name> {
        self.exact.then(|| Name(self.text.clone()))
    }

    /// True if it holds no `*`.
    pub fn is_exact(&self) -> bool {
        self.exact
    }

    /// Whether `name` is one of those the pattern stands for. The only place that decides this.
    ///
    /// ```
    /// # use commlib_core::{Name, Pattern};
    /// let sensors = Pattern::new("sensors.*")?;
    /// assert!(sensors.matches(&Name::new("sensors.sonar.front")?));
    /// assert!(!sensors.matches(&Name::new("sensors")?));
    /// # Ok::<(), commlib_core::Error>(())
    /// ```
    pub fn matches(&self, name: &Name) -> bool {
        if self.exact {
            return *self.text == *name.0;
        }
        let mut names = name.segments();
        let mut wanted = self.segments().peekable();
        while let Some(want) = wanted.next() {
            let Some(have) = names.next() else {
                return false;
            };
            if want == "*" {
                if wanted.peek().is_none() {
                    return true;
                }
            } else if want != have {
                return false;
            }
        }
        names.next().is_none()
    }
}

impl From<Name> for Pattern {
    fn from(name: Name) -> Self {
        Self {
            text: name.0,
            exact: true,
        }
    }
}

/// Where a message goes. The three kinds are what brokers offer natively.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Every listener of a topic gets it.
    Topic(Name),
    /// A service gets it: one of those that serve the name, or all where the broker has no queues.
    Queue(Name),
    /// The caller that waits for this reply gets it.
    Reply(ReplyTo),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Topic(name) | Self::Queue(name) => f.write_str(name.as_str()),
            Self::Reply(reply) => f.write_str(&reply.address),
        }
    }
}

/// Where messages come from. The counterpart of [`Target`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// All messages on the topics that match.
    Topic(Pattern),
    /// Requests to a service.
    Queue(Name),
    /// Replies to this connection's own calls.
    Replies,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Topic(pattern) => f.write_str(pattern.as_str()),
            Self::Queue(name) => f.write_str(name.as_str()),
            Self::Replies => f.write_str("replies"),
        }
    }
}

/// An empty level of a foreign name, as it stands in ours.
const EMPTY_SEGMENT: &str = "%00";

/// Escapes one level of a foreign name so that it becomes a legal segment.
///
/// Bytes that a segment may not hold, and `%`, become `%XX`; an empty level becomes `%00`.
pub fn escape_segment(level: &[u8]) -> Cow<'_, str> {
    if level.is_empty() {
        return Cow::Borrowed(EMPTY_SEGMENT);
    }
    if let Ok(text) = std::str::from_utf8(level)
        && text.chars().all(|c| c != '%' && allowed(c))
    {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(level.len() + 8);
    for chunk in level.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c != '%' && allowed(c) {
                out.push(c);
            } else {
                escape_bytes(&mut out, c.encode_utf8(&mut [0; 4]).as_bytes());
            }
        }
        escape_bytes(&mut out, chunk.invalid());
    }
    Cow::Owned(out)
}

/// Undoes [`escape_segment`], for the way out to a foreign broker.
///
/// An escape whose byte `keep` refuses (because the broker cannot hold it within a level) stays as it is written.
pub fn unescape_segment(segment: &str, keep: impl Fn(u8) -> bool) -> Cow<'_, [u8]> {
    if segment == EMPTY_SEGMENT {
        return Cow::Borrowed(b"");
    }
    if !segment.contains('%') {
        return Cow::Borrowed(segment.as_bytes());
    }
    let mut out = Vec::with_capacity(segment.len());
    let mut rest = segment.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        match tail {
            [high, low, after @ ..] if byte == b'%' => {
                let escaped = hex(*high).zip(hex(*low)).map(|(h, l)| h << 4 | l);
                match escaped {
                    Some(value) if keep(value) => out.push(value),
                    _ => out.extend_from_slice(&[byte, *high, *low]),
                }
                rest = after;
            }
            _ => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    Cow::Owned(out)
}

fn escape_bytes(out: &mut String, bytes: &[u8]) {
    for byte in bytes {
        out.push_str(&format!("%{byte:02X}"));
    }
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|d| u8::try_from(d).ok())
}

fn allowed(c: char) -> bool {
    !matches!(c, '.' | '*' | '#' | '+' | '/') && !c.is_whitespace() && !c.is_control()
}

/// The rules of names and patterns in one place; the error is the rule that was broken.
fn check(text: &str, stars: bool) -> Result<(), &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.len() > MAX_NAME_LEN {
        return Err("it is longer than 255 bytes");
    }
    for segment in text.split('.') {
        if segment.is_empty() {
            return Err("a segment between dots is empty");
        }
        if segment == "*" {
            if stars {
                continue;
            }
            return Err("`*` is for patterns only");
        }
        if let Some(c) = segment.chars().find(|&c| !allowed(c)) {
            return Err(match c {
                '*' => "`*` must be a whole segment",
                '/' | '#' | '+' => {
                    "`/`, `#` and `+` are not allowed; names are dotted, like `sensors.sonar.front`"
                }
                _ => "white space and control characters are not allowed",
            });
        }
        // One way to write a name: another would never equal what arrives.
        if segment.contains('%') && escape_segment(&unescape_segment(segment, |_| true)) != segment
        {
            return Err(
                "`%` stands only before the two upper-case hexadecimal digits of a byte that a name cannot hold, as in `%2F`",
            );
        }
    }
    Ok(())
}

fn invalid(what: &'static str, text: &str, why: &str) -> Error {
    Error::new(ErrorKind::InvalidAddress, what)
        .at(text.escape_debug())
        .because(why)
}

macro_rules! text_type {
    ($type:ident, $field:tt) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.$field)
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.$field, f)
            }
        }
        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                &self.$field
            }
        }
        impl FromStr for $type {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self> {
                Self::new(text)
            }
        }
    };
}
text_type!(Name, 0);
text_type!(Pattern, text);

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rules_of_names() {
        for good in [
            "a",
            "sensors.sonar.front",
            "a-b_c.1",
            "caf\u{e9}.%2F",
            "$SYS.x",
        ] {
            assert!(Name::new(good).is_ok(), "{good}");
        }
        let long = "a".repeat(256);
        for bad in [
            "", ".", "a.", ".a", "a..b", "a b", "a\n", "a/b", "a.*", "a.b#", "+", "50%", "%2",
            "%zz", "%2f", "%41", "%C3%A9", &long,
        ] {
            let error = Name::new(bad).expect_err(bad);
            assert_eq!(error.kind(), ErrorKind::InvalidAddress);
        }
        assert!(Pattern::new("a.b*").is_err());
        assert!(Pattern::new("*.a.*").is_ok());
    }

    #[test]
    fn star_is_one_segment_inside_and_one_or_more_at_the_end() {
        let cases = [
            ("a.b", "a.b", true),
            ("a.b", "a.c", false),
            ("a.*", "a", false),
            ("a.*", "a.b", true),
            ("a.*", "a.b.c.d", true),
            ("a.*.c", "a.b.c", true),
            ("a.*.c", "a.b.b.c", false),
            ("a.*.c", "a.c", false),
            ("*", "a", true),
            ("*", "a.b", true),
            ("*.b", "a.b", true),
            ("*.b", "a.b.c", false),
            ("*.*", "a", false),
            ("*.*", "a.b.c", true),
        ];
        for (pattern, name, expected) in cases {
            let matches = Pattern::new(pattern)
                .unwrap()
                .matches(&Name::new(name).unwrap());
            assert_eq!(matches, expected, "{pattern} on {name}");
        }
    }

    proptest! {
        #[test]
        fn any_foreign_level_becomes_legal_and_comes_back(level in proptest::collection::vec(any::<u8>(), 0..40)) {
            prop_assume!(level != b"\0");
            let segment = escape_segment(&level);
            prop_assert!(segment.len() > MAX_NAME_LEN || Name::new(&segment).is_ok(), "{}", segment);
            let back = unescape_segment(&segment, |_| true).into_owned();
            prop_assert_eq!(back, level);
        }

        #[test]
        fn checks_never_panic(text in "\\PC{0,40}|[a-c.*%0-9]{0,12}") {
            let name = Name::new(&text);
            if let (Ok(name), Ok(pattern)) = (name, Pattern::new(&text)) {
                prop_assert!(pattern.matches(&name));
            }
        }
    }
}
