//! Commands on their way out, and the at-least-once messages that wait for their confirmation.

use std::collections::VecDeque;

use commlib_core::envelope::{self, Use};
use commlib_core::{Confirm, Dialect, Error, ErrorKind, Message, Name, Receipt, ReplyTo, Result};
use redis::{ServerError, Value};
use tokio::sync::OwnedSemaphorePermit;

use crate::address;
use crate::wire::{error_text, is_passing, put};

/// How many seconds a reply that nobody fetches is kept.
const REPLY_TTL: &[u8] = b"60";

/// What ends the copy on the channel of a message that is in the stream as well. JSON may end with white space, so
/// every reader takes it, and at-least-once subscribers, who read the stream, know what to leave out. No encoder
/// writes just this.
pub(crate) const COPY_MARK: &[u8] = b" \t ";

/// Commands that leave together, and who wants to know how it went.
#[derive(Debug)]
pub(crate) struct Command {
    /// In the protocol's form.
    pub(crate) bytes: Vec<u8>,
    /// How many replies they have.
    pub(crate) replies: usize,
    /// For the log and for errors.
    pub(crate) what: &'static str,
    /// Told how it went.
    pub(crate) confirm: Option<Confirm>,
    /// The room that it takes while it waits.
    pub(crate) room: Option<OwnedSemaphorePermit>,
}

impl Command {
    pub(crate) fn new(what: &'static str, commands: &[&[&[u8]]]) -> Self {
        let arguments = commands.iter().flat_map(|command| command.iter());
        let size: usize = arguments.map(|argument| argument.len() + 16).sum();
        let mut bytes = Vec::with_capacity(size + 16 * commands.len());
        for command in commands {
            put(&mut bytes, command);
        }
        Self {
            bytes,
            replies: commands.len(),
            what,
            confirm: None,
            room: None,
        }
    }

    /// Publishes on a topic, best effort.
    pub(crate) fn publish(topic: &Name, message: &Message, dialect: Dialect) -> Result<Self> {
        let payload = envelope::encode(message, Use::Topic, dialect)?;
        let publish: &[&[u8]] = &[b"PUBLISH", &address::key(topic), &payload];
        Ok(Self::new("publish", &[publish]))
    }

    /// Publishes on a topic and keeps the message in the topic's stream, both or nothing.
    pub(crate) fn store(
        topic: &Name,
        message: &Message,
        dialect: Dialect,
        stream_length: usize,
    ) -> Result<Self> {
        // The stream is read by commlib alone and always keeps the header.
        let stored = envelope::encode(message, Use::Topic, Dialect::Envelope)?;
        let copy = match dialect {
            Dialect::Envelope => stored.clone(),
            bare => envelope::encode(message, Use::Topic, bare)?,
        };
        let length = stream_length.to_string();
        let add: &[&[u8]] = &[
            b"XADD",
            &address::stream(topic),
            b"MAXLEN",
            b"~",
            length.as_bytes(),
            b"*",
            b"m",
            &stored,
        ];
        let publish: &[&[u8]] = &[
            b"PUBLISH",
            &address::key(topic),
            &[&copy, COPY_MARK].concat(),
        ];
        Ok(Self::new(
            "publish",
            &[&[b"MULTI"], add, publish, &[b"EXEC"]],
        ))
    }

    /// Appends a request to the list of a service.
    pub(crate) fn request(key: &[u8], payload: &[u8]) -> Self {
        Self::new("request", &[&[b"RPUSH", key, payload]])
    }

    /// Appends a reply to the caller's list.
    pub(crate) fn reply(to: &ReplyTo, message: &Message) -> Result<Self> {
        let payload = envelope::encode(message, Use::Rpc, to.form)?;
        Ok(Self::temporary("reply", to.address.as_bytes(), &payload))
    }

    /// Ends a blocking read that looks at the list `key` too.
    pub(crate) fn wake(key: &[u8]) -> Self {
        Self::temporary("wake", key, b"1")
    }

    /// Appends to a list that vanishes by itself.
    fn temporary(what: &'static str, key: &[u8], item: &[u8]) -> Self {
        Self::new(
            what,
            &[&[b"RPUSH", key, item], &[b"EXPIRE", key, REPLY_TTL]],
        )
    }

    /// Asks for word of how it went.
    pub(crate) fn confirmed(mut self) -> (Self, Receipt) {
        let (confirm, receipt) = Receipt::pending();
        self.confirm = Some(confirm);
        (self, receipt)
    }

    /// It will not be carried out, or nobody will know whether it was.
    pub(crate) fn fail(self, error: impl FnOnce() -> Error) {
        if let Some(confirm) = self.confirm {
            confirm.confirm(Err(error()));
        }
    }
}

/// What replies are due, in the order of the commands.
#[derive(Debug, Default)]
pub(crate) struct Answers(VecDeque<Due>);

#[derive(Debug)]
struct Due {
    replies: usize,
    what: &'static str,
    error: Option<String>,
    then: Then,
}

/// What to do when the replies are there.
#[derive(Debug)]
enum Then {
    Tell(Option<Confirm>),
    Confirm,
}

impl Answers {
    /// The replies to a command are due; `confirm` is told.
    pub(crate) fn expect(&mut self, replies: usize, what: &'static str, confirm: Option<Confirm>) {
        self.0.push_back(Due {
            replies,
            what,
            error: None,
            then: Then::Tell(confirm),
        });
    }

    /// The replies to the next message of the outbox are due.
    fn expect_stored(&mut self, replies: usize) {
        self.0.push_back(Due {
            replies,
            what: "publish",
            error: None,
            then: Then::Confirm,
        });
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes a reply in.
    ///
    /// # Errors
    /// If none was due, or if it says that this server can do nothing for us now; at-least-once messages wait for
    /// another link then.
    pub(crate) fn take(&mut self, reply: &Value, outbox: &mut Outbox) -> Result<(), String> {
        let due = self
            .0
            .front_mut()
            .ok_or("the server answered nothing that was asked")?;
        if let Some(error) = first_error(reply) {
            let text = error_text(error);
            if is_passing(error) {
                return Err(text);
            }
            due.error.get_or_insert(text);
        }
        due.replies -= 1;
        if due.replies > 0 {
            return Ok(());
        }
        let Some(due) = self.0.pop_front() else {
            return Ok(());
        };
        let outcome = match due.error {
            None => Ok(()),
            Some(text) => Err(Error::new(ErrorKind::Broker, due.what).because(text)),
        };
        match due.then {
            Then::Confirm => outbox.confirmed(outcome),
            Then::Tell(Some(confirm)) => confirm.confirm(outcome),
            Then::Tell(None) => {
                if let Err(error) = outcome {
                    tracing::warn!(%error, "refused by the server");
                }
            }
        }
        Ok(())
    }

    /// The link is lost: nobody will know what became of the commands.
    pub(crate) fn lost(&mut self, error: impl Fn() -> Error) {
        for due in self.0.drain(..) {
            if let Then::Tell(Some(confirm)) = due.then {
                confirm.confirm(Err(error().possibly_executed()));
            }
        }
    }
}

/// The server's error in a reply: itself, or within the reply to a transaction.
fn first_error(reply: &Value) -> Option<&ServerError> {
    match reply {
        Value::ServerError(error) => Some(error),
        Value::Array(replies) => replies.iter().find_map(first_error),
        _ => None,
    }
}

/// One at-least-once message.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) command: Command,
    /// The room it takes: one of the messages and its bytes.
    pub(crate) _room: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

/// At-least-once messages in the order in which they were accepted: kept here, and only here, until they are confirmed.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    entries: VecDeque<Entry>,
    /// How many of them were sent over this link.
    sent: usize,
}

impl Outbox {
    /// Takes a message in.
    pub(crate) fn push(&mut self, entry: Entry) {
        self.entries.push_back(entry);
    }

    /// How many messages are not confirmed.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The next message to write.
    pub(crate) fn next(&mut self, answers: &mut Answers) -> Option<&[u8]> {
        let command = &self.entries.get(self.sent)?.command;
        self.sent += 1;
        answers.expect_stored(command.replies);
        Some(&command.bytes)
    }

    /// There is a new link: what is not confirmed is to be sent again, in order.
    pub(crate) fn restart(&mut self) {
        self.sent = 0;
    }

    /// The server answered for the first message.
    fn confirmed(&mut self, outcome: Result<()>) {
        let Some(entry) = self.entries.pop_front() else {
            return;
        };
        self.sent -= 1;
        if let Some(confirm) = entry.command.confirm {
            confirm.confirm(outcome);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tokio::sync::Semaphore;

    async fn push(outbox: &mut Outbox, text: &str) -> Receipt {
        let (command, receipt) = Command::new("publish", &[&[b"X", text.as_bytes()]]).confirmed();
        let room = Arc::new(Semaphore::new(2));
        let permit = || room.clone().try_acquire_owned().unwrap();
        outbox.push(Entry {
            command,
            _room: (permit(), permit()),
        });
        receipt
    }

    fn drain(outbox: &mut Outbox, answers: &mut Answers) -> Vec<String> {
        std::iter::from_fn(|| {
            let text = String::from_utf8_lossy(outbox.next(answers)?).into_owned();
            Some(text.lines().last().unwrap().to_owned())
        })
        .collect()
    }

    #[tokio::test]
    async fn kept_until_confirmed_and_sent_again_in_order() {
        let (mut outbox, mut answers) = (Outbox::default(), Answers::default());
        let first = push(&mut outbox, "a").await;
        let second = push(&mut outbox, "b").await;
        assert_eq!(drain(&mut outbox, &mut answers), ["a", "b"]);
        assert!(drain(&mut outbox, &mut answers).is_empty());
        answers.take(&Value::Okay, &mut outbox).unwrap();
        first.await.unwrap();
        answers.lost(|| Error::new(ErrorKind::ConnectionLost, "test"));
        outbox.restart();
        let third = push(&mut outbox, "c").await;
        assert_eq!(drain(&mut outbox, &mut answers), ["b", "c"]);
        let nested = redis::parse_redis_value(b"*2\r\n+OK\r\n-OOM too much\r\n").unwrap();
        answers.take(&nested, &mut outbox).unwrap();
        assert!(
            second
                .await
                .unwrap_err()
                .to_string()
                .contains("OOM too much")
        );
        assert_eq!(outbox.len(), 1);
        drop(outbox);
        assert_eq!(third.await.unwrap_err().kind(), ErrorKind::Closed);
        assert!(answers.take(&Value::Okay, &mut Outbox::default()).is_ok());
        assert!(answers.take(&Value::Okay, &mut Outbox::default()).is_err());
    }
}
