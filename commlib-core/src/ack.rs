//! Acknowledgements: how a receiver tells the connection task what became of a message.

use tokio::sync::mpsc;

/// What the receiver did with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AckOutcome {
    /// Done with it; the broker may forget it.
    Accept,
    /// Not done. `requeue` asks for another try, here or at another receiver.
    Reject {
        /// Whether to try again.
        requeue: bool,
    },
    /// Dropped without a word, by a cancelled or panicked handler: another try, as many as the transport allows.
    Dropped,
}

/// One receiver's word on one message, as the connection task gets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AckReply {
    /// The id the transport gave the arrival.
    pub id: u64,
    /// The connection it came over; a reply from an earlier one is stale and ignored.
    pub epoch: u64,
    /// What became of it.
    pub outcome: AckOutcome,
}

/// The right and duty to acknowledge one message. None of its methods ever waits.
///
/// Dropped without a call, it counts as [`AckOutcome::Dropped`].
#[derive(Debug)]
#[must_use = "a message that is not accepted will be delivered again"]
pub struct Ack {
    id: u64,
    epoch: u64,
    // Unbounded, and yet bounded: at most one reply per message that the broker's window let through.
    replies: Option<mpsc::UnboundedSender<AckReply>>,
}

impl Ack {
    /// For transports: an acknowledgement that reports to `replies`.
    pub fn new(id: u64, epoch: u64, replies: mpsc::UnboundedSender<AckReply>) -> Self {
        Self {
            id,
            epoch,
            replies: Some(replies),
        }
    }

    /// Done with the message.
    pub fn accept(mut self) {
        self.reply(AckOutcome::Accept);
    }

    /// Not done with the message; `requeue` asks for another try.
    pub fn reject(mut self, requeue: bool) {
        self.reply(AckOutcome::Reject { requeue });
    }

    fn reply(&mut self, outcome: AckOutcome) {
        if let Some(replies) = self.replies.take() {
            // The connection may have ended; then the broker repeats the message by itself.
            let _ = replies.send(AckReply {
                id: self.id,
                epoch: self.epoch,
                outcome,
            });
        }
    }
}

impl Drop for Ack {
    fn drop(&mut self) {
        self.reply(AckOutcome::Dropped);
    }
}
