//! The memory of a service for requests that come twice. No I/O; time is an argument.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::message::{Header, Message};

/// The most bytes of replies that are remembered.
const MAX_BYTES: usize = 8 << 20;

/// Identifies a request: its sender and its id there.
pub(super) type RequestKey = (Arc<str>, String);

/// The key of a request; without one it cannot be recognised when it comes again.
pub(super) fn request_key(header: &Header) -> Option<RequestKey> {
    header.sender.clone().zip(header.message_id.clone())
}

/// What is known of a request.
#[derive(Debug, PartialEq)]
pub(super) enum Seen {
    /// Nothing: it is new, and noted as running from now on.
    New,
    /// It runs or waits to run; its reply will come.
    Running,
    /// It was answered with this.
    Answered(Box<Message>),
}

/// Recent requests with their replies, bounded in number, bytes and time.
#[derive(Debug)]
pub(super) struct ReplyWindow {
    capacity: usize,
    entries: HashMap<RequestKey, Entry>,
    order: VecDeque<Place>,
    serial: u64,
    bytes: usize,
}

/// A place in the order of forgetting. The serial tells it from a later entry of the same key.
#[derive(Debug)]
struct Place {
    key: RequestKey,
    serial: u64,
    until: Instant,
}

#[derive(Debug)]
struct Entry {
    serial: u64,
    reply: Option<Message>,
}

impl ReplyWindow {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            entries: HashMap::new(),
            order: VecDeque::new(),
            serial: 0,
            bytes: 0,
        }
    }

    /// Looks a request up and notes it if it is new, to be remembered for `keep`.
    pub(super) fn note(&mut self, key: &RequestKey, now: Instant, keep: Duration) -> Seen {
        self.forget_old(now);
        if let Some(entry) = self.entries.get(key) {
            return entry
                .reply
                .clone()
                .map_or(Seen::Running, |reply| Seen::Answered(Box::new(reply)));
        }
        if self.capacity > 0 {
            self.serial += 1;
            let serial = self.serial;
            let entry = Entry {
                serial,
                reply: None,
            };
            self.entries.insert(key.clone(), entry);
            self.order.push_back(Place {
                key: key.clone(),
                serial,
                until: now + keep,
            });
            self.bound();
        }
        Seen::New
    }

    /// Notes the reply of a request.
    pub(super) fn answered(&mut self, key: &RequestKey, reply: Message) {
        if let Some(entry) = self.entries.get_mut(key) {
            self.bytes += reply.data.len();
            let earlier = entry.reply.replace(reply);
            self.bytes -= earlier.map_or(0, |reply| reply.data.len());
            self.bound();
        }
    }

    /// Forgets a request that was not run, so that it runs when it comes again.
    pub(super) fn forget(&mut self, key: &RequestKey) {
        if let Some(entry) = self.entries.remove(key) {
            self.bytes -= entry.reply.map_or(0, |reply| reply.data.len());
            // The newest, as a request is that found the queue full, takes up no place. That of another stays for its time.
            if self
                .order
                .back()
                .is_some_and(|place| place.serial == entry.serial)
            {
                self.order.pop_back();
            }
        }
    }

    fn forget_old(&mut self, now: Instant) {
        while self.order.front().is_some_and(|place| place.until <= now) {
            self.forget_oldest();
        }
    }

    fn bound(&mut self) {
        while self.order.len() > self.capacity || self.bytes > MAX_BYTES {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        let Some(place) = self.order.pop_front() else {
            self.bytes = 0;
            return;
        };
        if self
            .entries
            .get(&place.key)
            .is_some_and(|entry| entry.serial == place.serial)
        {
            self.forget(&place.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP: Duration = Duration::from_secs(30);

    fn key(id: &str) -> RequestKey {
        ("sender".into(), id.into())
    }

    fn reply(size: usize) -> Message {
        Message {
            data: vec![b'1'; size].into(),
            ..Message::default()
        }
    }

    #[test]
    fn a_request_runs_once_and_its_reply_is_kept_for_its_time() {
        let now = Instant::now();
        let mut window = ReplyWindow::new(8);
        assert_eq!(window.note(&key("1"), now, KEEP), Seen::New);
        assert_eq!(window.note(&key("1"), now, KEEP), Seen::Running);
        window.answered(&key("1"), reply(3));
        let answered = Seen::Answered(Box::new(reply(3)));
        assert_eq!(window.note(&key("1"), now + KEEP / 2, KEEP), answered);
        assert_eq!(window.note(&key("1"), now + KEEP, KEEP), Seen::New);
    }

    #[test]
    fn bounded_in_number_and_bytes() {
        let now = Instant::now();
        let mut window = ReplyWindow::new(2);
        for id in ["1", "2", "3"] {
            assert_eq!(window.note(&key(id), now, KEEP), Seen::New);
        }
        assert_eq!(window.note(&key("1"), now, KEEP), Seen::New, "1 made room");
        assert_eq!(window.note(&key("3"), now, KEEP), Seen::Running);
        window.answered(&key("3"), reply(MAX_BYTES + 1));
        assert_eq!(window.bytes, 0);
        assert_eq!(window.note(&key("3"), now, KEEP), Seen::New);
    }

    #[test]
    fn a_request_that_was_not_run_is_forgotten() {
        let now = Instant::now();
        let mut window = ReplyWindow::new(8);
        window.note(&key("1"), now, KEEP);
        window.forget(&key("1"));
        assert_eq!(window.note(&key("1"), now, KEEP), Seen::New);
        assert_eq!(ReplyWindow::new(0).note(&key("1"), now, KEEP), Seen::New);
    }

    #[test]
    fn refused_requests_push_out_nothing_that_runs() {
        let now = Instant::now();
        let mut window = ReplyWindow::new(2);
        window.note(&key("runs"), now, KEEP);
        for id in ["2", "3", "4"] {
            window.note(&key(id), now, KEEP);
            window.forget(&key(id));
        }
        assert_eq!(window.note(&key("runs"), now, KEEP), Seen::Running);
    }

    #[test]
    fn a_reply_in_place_of_another_is_counted_once() {
        let mut window = ReplyWindow::new(2);
        window.note(&key("1"), Instant::now(), KEEP);
        window.answered(&key("1"), reply(5));
        window.answered(&key("1"), reply(3));
        assert_eq!(window.bytes, 3);
    }
}
