//! What the headers of arriving messages tell: what is missing, what is here again. No I/O, no clock.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use crate::address::Name;
use crate::inbox::{Gap, GapCause};
use crate::message::Header;

/// Pairs of sender and topic that are watched; a new one beyond them makes all start again.
const MAX_WATCHED: usize = 16_384;

/// Notices jumps in [`Header::seq`] per sender and topic.
#[derive(Debug, Default)]
pub(super) struct SequenceWatch(HashMap<(Name, Arc<str>), u64>);

impl SequenceWatch {
    /// Notes a message; the gap before it, if there is one. The first message of a sender starts the count.
    pub(super) fn note(&mut self, topic: &Name, header: &Header) -> Option<Gap> {
        let (sender, seq) = header.sender.as_ref().zip(header.seq)?;
        if self.0.len() >= MAX_WATCHED {
            self.0.clear();
        }
        let last = self.0.entry((topic.clone(), sender.clone())).or_insert(seq);
        let missed = seq.saturating_sub(*last).saturating_sub(1);
        // Lower numbers are repetitions.
        *last = seq.max(*last);
        (missed > 0).then(|| Gap::new(GapCause::SequenceJump, Some(missed)))
    }
}

/// Identifies a message for [`Dedup`]; messages without a sender have no key and are never dropped.
pub(super) type MessageKey = (Arc<str>, String);

/// The key of a message.
pub(super) fn message_key(header: &Header) -> Option<MessageKey> {
    header.sender.clone().zip(header.message_id.clone())
}

/// Remembers the last messages by sender and id.
#[derive(Debug)]
pub(super) struct Dedup {
    window: usize,
    order: VecDeque<MessageKey>,
    known: HashSet<MessageKey>,
}

impl Dedup {
    pub(super) fn new(window: usize) -> Self {
        Self {
            window,
            order: VecDeque::new(),
            known: HashSet::new(),
        }
    }

    /// Whether the message is among the remembered.
    pub(super) fn knows(&self, key: &MessageKey) -> bool {
        self.known.contains(key)
    }

    /// Remembers a message, and forgets the oldest beyond the window.
    pub(super) fn remember(&mut self, key: MessageKey) {
        if self.window == 0 || !self.known.insert(key.clone()) {
            return;
        }
        self.order.push_back(key);
        if self.order.len() > self.window
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(sender: &str, seq: u64) -> Header {
        Header {
            sender: Some(sender.into()),
            seq: Some(seq),
            message_id: Some(seq.to_string()),
            ..Header::default()
        }
    }

    #[test]
    fn jumps_are_counted_per_sender_and_topic_and_repetitions_are_not() {
        let mut watch = SequenceWatch::default();
        let topic = Name::new("a").unwrap();
        let mut missed = |sender: &str, seq: u64| {
            watch
                .note(&topic, &header(sender, seq))
                .and_then(|gap| gap.missed)
        };
        assert_eq!(missed("x", 5), None);
        assert_eq!(missed("x", 6), None);
        assert_eq!(missed("y", 1), None);
        assert_eq!(missed("x", 10), Some(3));
        assert_eq!(missed("x", 7), None);
        assert_eq!(missed("x", 11), None);
        assert_eq!(missed("x", u64::MAX), Some(u64::MAX - 12));
        assert_eq!(watch.note(&topic, &Header::default()), None);
    }

    #[test]
    fn dedup_remembers_its_window_and_no_more() {
        let mut dedup = Dedup::new(2);
        let keys: Vec<_> = (0..3)
            .filter_map(|n| message_key(&header("x", n)))
            .collect();
        for key in &keys {
            assert!(!dedup.knows(key));
            dedup.remember(key.clone());
            dedup.remember(key.clone());
            assert!(dedup.knows(key));
        }
        assert!(!dedup.knows(&keys[0]) && dedup.knows(&keys[1]));
        assert_eq!(message_key(&Header::default()), None);
    }
}
