//! What cases use beside the endpoints: the transport itself, spoken to as a peer of another make would.

use std::collections::HashMap;

use commlib_core::{
    Arrival, Connection, Delivery, Dialect, Gap, Header, Inbox, Incoming, ListenOptions, Message,
    Name, PubSub, Publisher, Received, ReplyLease, ReplyTo, SendOptions, Source, Subscriber,
    Target, Value, json,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Fixture, unique, within};

/// A name that obeys the rules.
pub(super) fn name(text: &str) -> Name {
    Name::new(text).expect("a legal name")
}

/// A publisher and a subscriber of one topic, on connections of their own.
pub(super) async fn pair<T>(fixture: &dyn Fixture, stem: &str) -> (Publisher<T>, Subscriber<T>)
where
    T: Serialize + Sync + DeserializeOwned,
{
    let topic = unique(stem);
    let subscriber = subscribe(&fixture.connect().await, &topic).await;
    let publisher = fixture
        .connect()
        .await
        .publisher(&topic)
        .expect("publisher");
    (publisher, subscriber)
}

/// A best-effort subscriber.
pub(super) async fn subscribe<T: DeserializeOwned>(
    on: &Connection,
    pattern: &str,
) -> Subscriber<T> {
    within("a subscription", on.subscriber(pattern))
        .await
        .expect("subscribe")
}

/// The next message; panics at the end of the stream and on anything unreadable.
pub(super) async fn next<T: DeserializeOwned>(subscriber: &mut Subscriber<T>) -> Received<T> {
    within("a message", subscriber.recv())
        .await
        .expect("the subscription goes on")
        .expect("a readable message")
}

/// The data of the messages up to the one that equals `last`, without it.
pub(super) async fn until<T>(subscriber: &mut Subscriber<T>, last: &T) -> Vec<T>
where
    T: DeserializeOwned + PartialEq + Send + Sync,
{
    let mut all = Vec::new();
    loop {
        let data = next(subscriber).await.data;
        if data == *last {
            return all;
        }
        all.push(data);
    }
}

/// The next gap; messages before it are skipped.
pub(super) async fn next_gap<T: DeserializeOwned>(subscriber: &mut Subscriber<T>) -> Gap {
    let gap = async {
        loop {
            match subscriber.recv_incoming().await {
                Some(Incoming::Gap(gap)) => return gap,
                Some(_) => {}
                None => panic!("the subscription ended instead of reporting a gap"),
            }
        }
    };
    within("a gap", gap).await
}

/// Sends a message on a topic past the publisher.
pub(super) async fn send(on: &Connection, topic: &str, header: Header, data: &str) {
    send_as(on, topic, header, data, Dialect::Envelope).await;
}

/// As [`send`], in a dialect.
pub(super) async fn send_as(
    on: &Connection,
    topic: &str,
    header: Header,
    data: &str,
    dialect: Dialect,
) {
    let options = SendOptions::default().dialect(dialect);
    send_with(on, topic, header, data, options).await;
}

/// As [`send`], at least once if the broker can.
pub(super) async fn send_surely(on: &Connection, topic: &str, header: Header, data: &str) {
    let mut options = SendOptions::default();
    if on.link().capabilities().confirms {
        options = options.delivery(Delivery::AtLeastOnce);
    }
    send_with(on, topic, header, data, options).await;
}

async fn send_with(on: &Connection, topic: &str, header: Header, data: &str, options: SendOptions) {
    let mut message = Message::new(data.to_owned());
    let now = message.header.timestamp;
    message.header = header;
    message.header.timestamp = message.header.timestamp.or(now);
    let target = Target::Topic(name(topic));
    let sent = on.transport().send(&target, message, options);
    drop(within("a send", sent).await.expect("send"));
}

/// The header of a message with a sender and a number, as another connection of ours would set it.
pub(super) fn numbered(sender: &str, id: u64) -> Header {
    let mut header = Header::default();
    header.sender = Some(sender.into());
    header.message_id = Some(id.to_string());
    header.seq = Some(id);
    header
}

/// A caller that sets the header of its requests itself.
pub(super) struct Caller {
    pub(super) connection: Connection,
    replies: Inbox,
    early: HashMap<String, Message>,
}

/// The address for the reply to one request.
pub(super) struct Call {
    pub(super) lease: ReplyLease,
    pub(super) reply_to: ReplyTo,
}

impl Caller {
    pub(super) async fn new(fixture: &dyn Fixture) -> Self {
        let connection = fixture.connect().await;
        let listen = connection
            .transport()
            .listen(&Source::Replies, ListenOptions::default());
        let replies = within("listening for replies", listen)
            .await
            .expect("listen");
        Self {
            connection,
            replies,
            early: HashMap::new(),
        }
    }

    /// A reply address in a form.
    pub(super) fn lease(&self, form: Dialect) -> Call {
        // Of a service that nobody has called, so that no transport knows what it echoes.
        let service = name(&unique("service"));
        let lease = self
            .replies
            .lease(&service)
            .expect("an inbox of replies leases addresses");
        let reply_to = ReplyTo {
            address: lease.address.clone(),
            correlation_id: lease.correlation_id.clone(),
            form,
        };
        Call { lease, reply_to }
    }

    /// Sends a request whose reply goes to `call`.
    pub(super) async fn request(&self, service: &str, call: &Call, header: Header, data: &Value) {
        let mut header = header;
        header.reply_to = Some(call.reply_to.clone());
        header
            .correlation_id
            .clone_from(&call.reply_to.correlation_id);
        self.request_raw(service, header, data.to_string(), call.reply_to.form)
            .await;
    }

    /// Sends anything to a service.
    pub(super) async fn request_raw(
        &self,
        service: &str,
        header: Header,
        data: String,
        dialect: Dialect,
    ) {
        let mut message = Message::new(data);
        let now = message.header.timestamp;
        message.header = header;
        message.header.timestamp = message.header.timestamp.or(now);
        let options = SendOptions::default().dialect(dialect);
        let target = Target::Queue(name(service));
        let sent = self.connection.transport().send(&target, message, options);
        drop(
            within("a request to be sent", sent)
                .await
                .expect("send a request"),
        );
    }

    /// The reply to a call. Replies to others are kept for later.
    pub(super) async fn reply(&mut self, call: &Call) -> Message {
        if let Some(early) = self.early.remove(&call.lease.key) {
            return early;
        }
        let reply = async {
            loop {
                match self.replies.recv().await.expect("replies go on") {
                    Incoming::Message(Arrival { message, key, .. }) => match key {
                        Some(key) if key == call.lease.key => return message,
                        Some(key) => drop(self.early.insert(key, message)),
                        None => panic!("a reply without its key"),
                    },
                    other => panic!("instead of a reply: {other:?}"),
                }
            }
        };
        within("a reply", reply).await
    }
}

/// Answers requests by hand.
pub(super) struct Service {
    connection: Connection,
    requests: Inbox,
}

impl Service {
    pub(super) async fn new(fixture: &dyn Fixture, service: &str) -> Self {
        let connection = fixture.connect().await;
        let source = Source::Queue(name(service));
        let listen = connection
            .transport()
            .listen(&source, ListenOptions::default());
        let requests = within("listening for requests", listen)
            .await
            .expect("listen");
        Self {
            connection,
            requests,
        }
    }

    /// The reply address and the data of the next request.
    pub(super) async fn request(&mut self) -> (ReplyTo, Value) {
        let arrival = match within("a request", self.requests.recv()).await {
            Some(Incoming::Message(arrival)) => arrival,
            other => panic!("instead of a request: {other:?}"),
        };
        if let Some(ack) = arrival.ack {
            ack.accept();
        }
        let data = commlib_core::decode(&arrival.message.data).unwrap_or(json!(null));
        let reply_to = arrival.message.header.reply_to;
        (reply_to.expect("a request names a reply address"), data)
    }

    /// Replies with a text, which need not be JSON.
    pub(super) async fn reply(&self, to: &ReplyTo, data: &str) {
        let mut message = Message::new(data.to_owned());
        message.header.correlation_id.clone_from(&to.correlation_id);
        let target = Target::Reply(to.clone());
        let sent = self
            .connection
            .transport()
            .send(&target, message, SendOptions::default());
        drop(
            within("a reply to be sent", sent)
                .await
                .expect("send a reply"),
        );
    }
}
