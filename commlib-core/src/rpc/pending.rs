//! Calls that wait for a reply, as a state machine: no I/O, no clock, no runtime.

use std::collections::HashMap;

/// Waiting calls by key. Each is taken out exactly once: by its reply, by its caller giving up, or by the end of the link.
#[derive(Debug)]
pub(super) struct Pending<T> {
    waiting: HashMap<String, T>,
    closed: bool,
}

impl<T> Pending<T> {
    pub(super) fn new() -> Self {
        Self {
            waiting: HashMap::new(),
            closed: false,
        }
    }

    /// A call waits from now on. Gives the waiter back if no reply can come any more.
    pub(super) fn register(&mut self, key: String, waiter: T) -> Result<(), T> {
        if self.closed {
            return Err(waiter);
        }
        self.waiting.insert(key, waiter);
        Ok(())
    }

    /// A reply came, or the caller gave up. `None` for a key that waits no more: a late or repeated reply.
    pub(super) fn take(&mut self, key: &str) -> Option<T> {
        self.waiting.remove(key)
    }

    /// The link was lost: all calls that wait now fail.
    pub(super) fn drain(&mut self) -> Vec<T> {
        self.waiting.drain().map(|(_, waiter)| waiter).collect()
    }

    /// The connection has ended: all calls fail, and later ones at once.
    pub(super) fn close(&mut self) -> Vec<T> {
        self.closed = true;
        self.drain()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_call_is_taken_once_in_any_order() {
        let mut pending = Pending::new();
        for key in ["a", "b", "c"] {
            pending.register(key.into(), key.to_uppercase()).unwrap();
        }
        assert_eq!(pending.take("b").as_deref(), Some("B"));
        assert_eq!(pending.take("b"), None, "repeated reply");
        assert_eq!(pending.take("x"), None, "reply to nobody");
        let mut rest = pending.drain();
        rest.sort();
        assert_eq!(rest, ["A", "C"]);
        assert_eq!(pending.take("a"), None, "late reply");
        assert_eq!(pending.len(), 0);
    }

    #[test]
    fn nothing_waits_after_the_end() {
        let mut pending = Pending::new();
        pending.register("a".into(), 1).unwrap();
        assert_eq!(pending.close(), [1]);
        assert_eq!(pending.register("b".into(), 2), Err(2));
    }
}
