//! At-least-once messages on their way out: kept here, and only here, until the broker confirmed them.

use std::collections::{HashSet, VecDeque};

use commlib_core::Confirm;
use tokio::sync::OwnedSemaphorePermit;

use crate::packet::Publish;

/// Packet ids of publishes end here; those above belong to subscribing, so the two never meet.
pub(crate) const LAST_ID: u16 = 0x7FFF;

/// How many messages may be unconfirmed at the broker.
const WINDOW: usize = 256;

/// One message that waits for its confirmation.
#[derive(Debug)]
pub(crate) struct Entry {
    /// The message; its packet id and `dup` flag are set when it is sent.
    pub(crate) publish: Publish,
    /// Told when the broker confirmed.
    pub(crate) confirm: Confirm,
    /// The room it takes: one of the messages and its bytes.
    pub(crate) _room: Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)>,
}

/// The messages in the order in which they were accepted.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    /// Sent or to be sent again, with their packet ids.
    sent: VecDeque<Entry>,
    /// How many of `sent` are to be sent again; they are its last ones.
    again: usize,
    /// Not sent over this session.
    waiting: VecDeque<Entry>,
    last_id: u16,
    /// The packet ids in `sent`.
    used: HashSet<u16>,
}

impl Outbox {
    /// Takes a message in.
    pub(crate) fn push(&mut self, entry: Entry) {
        self.waiting.push_back(entry);
    }

    /// How many messages are not confirmed.
    pub(crate) fn len(&self) -> usize {
        self.sent.len() + self.waiting.len()
    }

    /// The next message to write, if the window has room for one.
    pub(crate) fn next(&mut self) -> Option<&Publish> {
        if self.again > 0 {
            let index = self.sent.len() - self.again;
            self.again -= 1;
            return self.sent.get(index).map(|entry| &entry.publish);
        }
        if self.sent.len() >= WINDOW {
            return None;
        }
        let mut entry = self.waiting.pop_front()?;
        entry.publish.pkid = self.take_id();
        self.sent.push_back(entry);
        self.sent.back().map(|entry| &entry.publish)
    }

    /// The broker confirmed a packet id. False if no message has it.
    pub(crate) fn confirmed(&mut self, id: u16) -> bool {
        // Brokers confirm in order, so this mostly looks at the first entry only.
        let Some(index) = self.sent.iter().position(|entry| entry.publish.pkid == id) else {
            return false;
        };
        if index >= self.sent.len() - self.again {
            // Confirmed late, which spares it the second time.
            self.again -= 1;
        }
        self.used.remove(&id);
        if let Some(entry) = self.sent.remove(index) {
            entry.confirm.confirm(Ok(()));
        }
        true
    }

    /// There is a new link: what was sent and not confirmed is to be sent again, first and in order.
    ///
    /// A resumed session knows the packet ids; a new one gets new ones.
    pub(crate) fn restart(&mut self, resumed: bool) {
        for entry in &mut self.sent {
            entry.publish.dup = true;
        }
        if resumed {
            self.again = self.sent.len();
        } else {
            self.again = 0;
            self.used.clear();
            self.sent.append(&mut self.waiting);
            std::mem::swap(&mut self.sent, &mut self.waiting);
        }
    }

    /// Takes a packet id. The window is far smaller than their number, so one is soon found.
    fn take_id(&mut self) -> u16 {
        loop {
            self.last_id = self.last_id % LAST_ID + 1;
            if self.used.insert(self.last_id) {
                return self.last_id;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::QoS;
    use commlib_core::Receipt;

    fn push(outbox: &mut Outbox, text: &str) -> Receipt {
        let (confirm, receipt) = Receipt::pending();
        outbox.push(Entry {
            publish: Publish::new("t", QoS::AtLeastOnce, text),
            confirm,
            _room: None,
        });
        receipt
    }

    fn drain(outbox: &mut Outbox) -> Vec<(String, u16, bool)> {
        std::iter::from_fn(|| {
            outbox.next().map(|publish| {
                let text = String::from_utf8_lossy(&publish.payload).into_owned();
                (text, publish.pkid, publish.dup)
            })
        })
        .collect()
    }

    fn all(from: u16, texts: &[&str], dup: bool) -> Vec<(String, u16, bool)> {
        (from..)
            .zip(texts)
            .map(|(id, text)| ((*text).to_owned(), id, dup))
            .collect()
    }

    #[tokio::test]
    async fn kept_until_confirmed_and_sent_once() {
        let mut outbox = Outbox::default();
        let first = push(&mut outbox, "a");
        let second = push(&mut outbox, "b");
        assert_eq!(drain(&mut outbox), all(1, &["a", "b"], false));
        assert!(drain(&mut outbox).is_empty());
        assert_eq!(outbox.len(), 2);
        assert!(outbox.confirmed(2) && !outbox.confirmed(2) && !outbox.confirmed(9));
        second.await.unwrap();
        drop(outbox);
        assert!(first.await.is_err());
    }

    #[test]
    fn a_resumed_session_gets_the_same_ids_and_a_new_one_new_ids() {
        let mut outbox = Outbox::default();
        for text in ["a", "b", "c"] {
            drop(push(&mut outbox, text));
        }
        drain(&mut outbox);
        outbox.confirmed(1);
        drop(push(&mut outbox, "d"));
        outbox.restart(true);
        let mut expected = all(2, &["b", "c"], true);
        expected.extend(all(4, &["d"], false));
        assert_eq!(drain(&mut outbox), expected);
        outbox.restart(false);
        drop(push(&mut outbox, "e"));
        let mut expected = all(5, &["b", "c", "d"], true);
        expected.extend(all(8, &["e"], false));
        assert_eq!(drain(&mut outbox), expected);
        assert_eq!(outbox.len(), 4);
    }

    #[test]
    fn a_link_lost_in_the_middle_of_sending_again_starts_over() {
        let mut outbox = Outbox::default();
        for text in ["a", "b", "c"] {
            drop(push(&mut outbox, text));
        }
        drain(&mut outbox);
        outbox.restart(true);
        assert!(outbox.next().is_some());
        outbox.restart(true);
        assert!(outbox.confirmed(1) && outbox.confirmed(3));
        assert_eq!(drain(&mut outbox), all(2, &["b"], true));
    }

    #[test]
    fn the_window_holds_and_ids_never_meet() {
        let mut outbox = Outbox::default();
        for _ in 0..WINDOW + 10 {
            drop(push(&mut outbox, "x"));
        }
        assert_eq!(drain(&mut outbox).len(), WINDOW);
        assert!(outbox.confirmed(7));
        assert_eq!(drain(&mut outbox).len(), 1);
        // Id 1 stays unconfirmed while the others go round more than once.
        for _ in 0..2 * usize::from(LAST_ID) {
            drop(push(&mut outbox, "x"));
            let newest = outbox.sent.back().unwrap().publish.pkid;
            assert!(outbox.confirmed(newest));
            for (_, id, _) in drain(&mut outbox) {
                assert!(id != 1 && (1..=LAST_ID).contains(&id));
            }
        }
    }
}
