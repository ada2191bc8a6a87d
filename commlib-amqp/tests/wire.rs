//! Messages recorded from released versions of commlib-py: all of them are read, and ours are shaped like them.
//!
//! What they are and how they are stored: `vectors/commlib-py/README.md`.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

mod common;

use std::collections::BTreeSet;

use commlib_amqp::AmqpConfig;
use commlib_core::{
    Arrival, Dialect, ListenOptions, Message, ReplyTo, RpcError, SendOptions, Source, Target,
    Transport, Value, json,
};
use commlib_testkit::amqp_url;
use common::*;
use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Consumer};

/// The recorded versions: the file's text, how that version writes calls, and how many messages of which kind it holds
/// (requests, replies, messages). The counts make sure that no line is passed over.
const RECORDED: [(&str, Dialect, [usize; 3]); 4] = [
    (
        include_str!("vectors/commlib-py/0.6.9.jsonl"),
        Dialect::CommlibPy011,
        [3, 3, 5],
    ),
    (
        include_str!("vectors/commlib-py/0.8.0.jsonl"),
        Dialect::CommlibPy011,
        [14, 10, 8],
    ),
    (
        include_str!("vectors/commlib-py/0.11.5.jsonl"),
        Dialect::CommlibPy011,
        [14, 9, 9],
    ),
    (
        include_str!("vectors/commlib-py/0.13.2.jsonl"),
        Dialect::CommlibPy,
        [14, 12, 9],
    ),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Request,
    Reply,
    Message,
}

struct Frame {
    dialect: Dialect,
    kind: Kind,
    /// For messages of failed assertions.
    id: String,
    fields: Value,
}

impl Frame {
    fn text(&self, field: &str) -> Option<&str> {
        self.fields[field].as_str()
    }

    fn payload(&self) -> &str {
        self.text("payload").unwrap()
    }

    /// What the application said.
    fn data(&self) -> Value {
        let body: Value = serde_json::from_str(self.payload()).unwrap();
        match (self.kind, self.dialect) {
            (Kind::Request | Kind::Reply, Dialect::CommlibPy) => body["data"].clone(),
            _ => body,
        }
    }

    /// The properties as they were, at a time of our choice.
    fn properties(&self) -> BasicProperties {
        let unit = if self.text("timestamp_unit") == Some("ns") {
            1
        } else {
            1_000_000
        };
        let mut properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_content_encoding("utf8".into())
            .with_timestamp(TIME / unit);
        if let Some(id) = self.text("message_id") {
            properties = properties.with_message_id(id.into());
        }
        properties
    }
}

/// Some time, in nanoseconds, at a whole millisecond.
const TIME: u64 = 1_795_217_169_713_000_000;

fn frames() -> Vec<Frame> {
    let mut all = Vec::new();
    for (text, dialect, counts) in RECORDED {
        let mut found = [0; 3];
        for line in text.lines() {
            let fields: Value = serde_json::from_str(line).unwrap();
            let endpoint = fields["endpoint"].as_str().unwrap();
            let kind = match endpoint {
                _ if endpoint.ends_with("_request") => Kind::Request,
                _ if endpoint.ends_with("_response") => Kind::Reply,
                _ => Kind::Message,
            };
            found[kind as usize] += 1;
            let id = format!("{dialect}: {line}");
            all.push(Frame {
                dialect,
                kind,
                id,
                fields,
            });
        }
        assert_eq!(found, counts, "{dialect}");
    }
    all
}

async fn config() -> Option<AmqpConfig> {
    Some(AmqpConfig::from_url(&amqp_url().await?).unwrap())
}

async fn send(
    channel: &Channel,
    exchange: &str,
    key: &str,
    properties: BasicProperties,
    body: &str,
) {
    let options = BasicPublishOptions::default();
    let sent = channel.basic_publish(
        exchange.into(),
        key.into(),
        options,
        body.as_bytes(),
        properties,
    );
    drop(sent.await.unwrap());
}

/// A queue of a plain client, for what is sent to it or bound to it.
async fn queue(channel: &Channel, name: &str, topic: Option<&str>) -> Consumer {
    let options = QueueDeclareOptions {
        exclusive: true,
        auto_delete: true,
        ..QueueDeclareOptions::default()
    };
    let table = FieldTable::default;
    channel
        .queue_declare(name.into(), options, table())
        .await
        .unwrap();
    if let Some(topic) = topic {
        let bind = QueueBindOptions::default();
        channel
            .queue_bind(name.into(), "amq.topic".into(), topic.into(), bind, table())
            .await
            .unwrap();
    }
    let options = BasicConsumeOptions {
        no_ack: true,
        ..BasicConsumeOptions::default()
    };
    channel
        .basic_consume(name.into(), name.into(), options, table())
        .await
        .unwrap()
}

async fn delivery(consumer: &mut Consumer) -> Delivery {
    soon(consumer.next()).await.unwrap().unwrap()
}

fn value(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

fn keys(value: &Value) -> BTreeSet<&str> {
    value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn recorded_messages_are_read() {
    let Some(config) = config().await else { return };
    let prefix = unique("vec");
    let (_plain, channel) = plain(&config.address).await;
    let link = connect(config).await;
    for dialect in Dialect::ALL {
        let options = ListenOptions::default().dialect(dialect);
        let mut inbox = listen(&link, &format!("{prefix}.*"), options).await;
        for frame in frames().iter().filter(|frame| frame.kind == Kind::Message) {
            assert_eq!(frame.text("exchange"), Some("amq.topic"));
            let key = format!("{prefix}.{}", frame.text("key").unwrap());
            send(
                &channel,
                "amq.topic",
                &key,
                frame.properties(),
                frame.payload(),
            )
            .await;
            let Arrival { name, message, .. } = arrival(&mut inbox).await;
            assert_eq!(name.as_str(), key);
            assert_eq!(value(&message.data), frame.data(), "{}", frame.id);
            assert_eq!(message.header.timestamp, Some(TIME), "{}", frame.id);
            assert_eq!(message.header.sender, None);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn recorded_requests_are_read_and_answered_in_their_form() {
    let Some(config) = config().await else { return };
    let (service, client) = (unique("service"), unique("client"));
    let (_plain, channel) = plain(&config.address).await;
    let link = connect(config).await;
    let source = Source::Queue(name(&service));
    let mut inbox = soon(link.listen(&source, ListenOptions::default()))
        .await
        .unwrap();
    let mut replies = queue(&channel, &client, None).await;
    let all = frames();
    for frame in all.iter().filter(|frame| frame.kind == Kind::Request) {
        assert_eq!(frame.text("exchange"), Some(""));
        let properties = frame.properties().with_reply_to(client.as_str().into());
        send(&channel, "", &service, properties, frame.payload()).await;
        let mut request = arrival(&mut inbox).await;
        assert_eq!(value(&request.message.data), frame.data(), "{}", frame.id);
        let reply_to = request.message.header.reply_to.take().unwrap();
        // What the property says goes before what an envelope says.
        assert_eq!(reply_to.address, client);
        assert_eq!(reply_to.form, frame.dialect, "{}", frame.id);
        request.ack.unwrap().accept();
        let mut reply = Message::new(r#"{"c":42}"#);
        reply.header.error = Some(RpcError::new("ignored", "by old peers"));
        drop(
            link.send(&Target::Reply(reply_to), reply, SendOptions::default())
                .await
                .unwrap(),
        );
        let reply = delivery(&mut replies).await;
        let recorded = all
            .iter()
            .find(|f| f.kind == Kind::Reply && f.dialect == frame.dialect)
            .unwrap();
        same_shape(&reply, recorded);
        let timestamp = reply.properties.timestamp().unwrap().to_string().len();
        assert_eq!(
            timestamp,
            if frame.dialect == Dialect::CommlibPy {
                19
            } else {
                13
            }
        );
    }
}

/// The properties are those of the recorded message, and the body is what its reader wants.
fn same_shape(ours: &Delivery, recorded: &Frame) {
    let (ours_body, recorded_body) = (value(&ours.data), value(recorded.payload().as_bytes()));
    let properties = &ours.properties;
    assert_eq!(
        properties.content_type().as_ref().unwrap().as_str(),
        "application/json"
    );
    assert_eq!(
        properties.content_encoding().as_ref().unwrap().as_str(),
        "utf8"
    );
    assert_eq!(
        (
            properties.app_id(),
            properties.kind(),
            properties.delivery_mode()
        ),
        (&None, &None, &None)
    );
    if recorded.kind != Kind::Message && recorded.dialect == Dialect::CommlibPy {
        assert_eq!(keys(&ours_body), keys(&recorded_body));
        let (ours, theirs) = (keys(&ours_body["header"]), keys(&recorded_body["header"]));
        assert!(
            theirs.is_subset(&ours),
            "{theirs:?} are not all in {ours:?}"
        );
        assert_eq!(ours_body["header"]["agent"], "commlib");
    } else {
        assert!(ours_body.get("header").is_none(), "{ours_body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn recorded_replies_are_read() {
    let Some(config) = config().await else { return };
    let service = unique("service");
    let (_plain, channel) = plain(&config.address).await;
    let mut requests = queue(&channel, &service, None).await;
    let link = connect(config).await;
    let mut replies = soon(link.listen(&Source::Replies, ListenOptions::default()))
        .await
        .unwrap();
    for frame in frames().iter().filter(|frame| frame.kind == Kind::Reply) {
        let lease = replies.lease(&name(&service)).unwrap();
        let mut request = Message::new(r#"{"a":40,"b":2}"#);
        request.header.timeout_ms = Some(5000);
        request.header.correlation_id = Some(lease.key.clone());
        request.header.reply_to = Some(ReplyTo {
            address: lease.address.clone(),
            correlation_id: Some(lease.key.clone()),
            form: frame.dialect,
        });
        let options = SendOptions::default().dialect(frame.dialect);
        let target = Target::Queue(name(&service));
        drop(link.send(&target, request, options).await.unwrap());
        let request = delivery(&mut requests).await;
        assert_eq!(data(&request, frame.dialect), json!({"a": 40, "b": 2}));
        let to = request.properties.reply_to().clone().unwrap();
        assert!(to.as_str().starts_with("amq.rabbitmq.reply-to."), "{to}");
        let echoed = request.properties.correlation_id().clone().unwrap();
        let properties = frame.properties().with_correlation_id(echoed);
        send(&channel, "", to.as_str(), properties, frame.payload()).await;
        let reply = arrival(&mut replies).await;
        assert_eq!(reply.key.as_deref(), Some(&*lease.key), "{}", frame.id);
        assert_eq!(value(&reply.message.data), frame.data(), "{}", frame.id);
    }
}

/// What an old service takes for the request.
fn data(request: &Delivery, dialect: Dialect) -> Value {
    let body = value(&request.data);
    match dialect {
        Dialect::CommlibPy => {
            assert_eq!(body["header"]["reply_to"], "amq.rabbitmq.reply-to");
            body["data"].clone()
        }
        _ => body,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ours_are_shaped_like_theirs() {
    let Some(config) = config().await else { return };
    let (service, topic) = (unique("service"), unique("topic"));
    let (_plain, channel) = plain(&config.address).await;
    let mut requests = queue(&channel, &service, None).await;
    let mut messages = queue(&channel, &unique("bound"), Some(&topic)).await;
    let link = connect(config).await;
    let all = frames();
    for dialect in [Dialect::CommlibPy, Dialect::CommlibPy011] {
        let like = |kind| {
            all.iter()
                .find(|f| f.kind == kind && f.dialect == dialect)
                .unwrap()
        };
        let options = SendOptions::default().dialect(dialect);
        let mut message = Message::new(r#"{"seq":0}"#);
        message.header.sender = Some("me".into());
        message.header.seq = Some(1);
        message
            .header
            .properties
            .insert("traceparent".to_owned(), "00-1".to_owned());
        drop(
            link.send(&common::topic(&topic), message.clone(), options.clone())
                .await
                .unwrap(),
        );
        let sent = delivery(&mut messages).await;
        assert_eq!(&sent.data[..], br#"{"seq":0}"#);
        assert_eq!(sent.properties.headers(), &None);
        same_shape(&sent, like(Kind::Message));
        message.header.reply_to = Some(ReplyTo {
            address: unique("anywhere"),
            correlation_id: None,
            form: dialect,
        });
        drop(
            link.send(&Target::Queue(name(&service)), message, options)
                .await
                .unwrap(),
        );
        same_shape(&delivery(&mut requests).await, like(Kind::Request));
    }
}
