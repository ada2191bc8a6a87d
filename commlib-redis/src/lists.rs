//! Blocking reads of lists.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use redis::Value;

use crate::wire::{Wire, array, bytes, error_text, is_passing};

/// How long the server waits for something to come. Finite, so that a dead server shows.
pub(crate) const WAIT: Duration = Duration::from_secs(5);

/// [`WAIT`] in the protocol's form.
const WAIT_TEXT: &[u8] = b"5";

/// How many items a read takes at once where the server can.
const COUNT: &[u8] = b"128";

/// What a read of several lists brought.
#[derive(Debug, PartialEq)]
pub(crate) enum Popped {
    /// Nothing came within the server's wait.
    Nothing,
    /// Items of one list, in order.
    Items(Bytes, Vec<Bytes>),
    /// The server refused, in its own words.
    Refused(String),
    /// The server cannot at the moment; another connection may find one that can.
    Unable(String),
    /// Ask again: the server is too old for the command.
    Again,
}

/// Reads lists in the newest way that the server knows.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    /// It is older than Redis 7.
    old: AtomicBool,
}

impl Reader {
    /// Asks for the first items that one of the lists has or gets.
    pub(crate) fn ask<'a>(&self, wire: &mut Wire, keys: impl Iterator<Item = &'a [u8]>) {
        let keys: Vec<&[u8]> = keys.collect();
        wire.listen_again();
        if self.old.load(Ordering::Relaxed) {
            let head: &[&[u8]] = &[b"BLPOP"];
            wire.put(&[head, &keys, &[WAIT_TEXT]].concat());
        } else {
            let count = keys.len().to_string();
            let head: [&[u8]; 3] = [b"BLMPOP", WAIT_TEXT, count.as_bytes()];
            let tail: [&[u8]; 3] = [b"LEFT", b"COUNT", COUNT];
            wire.put(&[&head[..], &keys, &tail].concat());
        }
    }

    /// Understands the answer.
    pub(crate) fn answer(&self, value: Value) -> Popped {
        if let Value::ServerError(error) = &value {
            let text = error_text(error);
            let unknown = text.contains("unknown command");
            if unknown && !self.old.swap(true, Ordering::Relaxed) {
                return Popped::Again;
            }
            return match is_passing(error) {
                true => Popped::Unable(text),
                false => Popped::Refused(text),
            };
        }
        let mut parts = array(value);
        let Some(key) = parts.next().and_then(bytes) else {
            return Popped::Nothing;
        };
        let items = match parts.next() {
            Some(Value::Array(items)) => items.into_iter().filter_map(bytes).collect(),
            // The older command brings a single one.
            item => item.and_then(bytes).into_iter().collect(),
        };
        Popped::Items(key, items)
    }
}
