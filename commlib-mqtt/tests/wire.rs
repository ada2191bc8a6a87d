//! Frames recorded from released versions of commlib-py: all of them are read, and ours are shaped like them.
//!
//! What the frames are and how they are stored: `vectors/commlib-py/README.md`.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is how a test fails"
)]

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::future::Future;
use std::time::Duration;

use commlib_core::envelope::{self, Use};
use commlib_core::{
    Connection, Dialect, ErrorKind, Header, Inbox, Incoming, ListenOptions, Message, Name, Pattern,
    RawValue, ReplyTo, RpcError, SendOptions, Source, Target, Value,
};
use commlib_mqtt::MqttConfig;
use commlib_testkit::Mosquitto;
use rumqttc::{AsyncClient, Event, MqttOptions, Packet, Publish, QoS};
use serde_json::json;
use tokio::sync::mpsc;

/// The recorded versions: the file's text, how that version writes calls, and how many frames of which kind it holds
/// (requests, replies, messages, compressed messages). The counts make sure that no line is passed over.
const RECORDED: [(&str, &str, Dialect, [usize; 4]); 5] = [
    (
        "0.6.9",
        include_str!("vectors/commlib-py/0.6.9.jsonl"),
        Dialect::CommlibPy011,
        [5, 5, 5, 0],
    ),
    (
        "0.8.0",
        include_str!("vectors/commlib-py/0.8.0.jsonl"),
        Dialect::CommlibPy011,
        [14, 13, 7, 1],
    ),
    (
        "0.11.5",
        include_str!("vectors/commlib-py/0.11.5.jsonl"),
        Dialect::CommlibPy011,
        [15, 9, 9, 0],
    ),
    (
        "0.13.2",
        include_str!("vectors/commlib-py/0.13.2.jsonl"),
        Dialect::CommlibPy,
        [16, 14, 12, 2],
    ),
    (
        "0.13.2+perf",
        include_str!("vectors/commlib-py/0.13.2+perf.jsonl"),
        Dialect::CommlibPy,
        [3, 3, 2, 0],
    ),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Request,
    Reply,
    Message,
    Compressed,
}

struct Frame {
    version: &'static str,
    dialect: Dialect,
    kind: Kind,
    /// For messages of failed assertions.
    id: String,
    endpoint: String,
    trace: bool,
    topic: String,
    payload: Vec<u8>,
}

impl Frame {
    fn parse(version: &'static str, dialect: Dialect, line: &str) -> Self {
        let frame: Value = serde_json::from_str(line).unwrap();
        let text = |field: &str| frame[field].as_str().unwrap().to_owned();
        let endpoint = text("endpoint");
        let compressed = frame.get("payload_hex").is_some();
        let payload = if compressed {
            unhex(&text("payload_hex"))
        } else {
            text("payload").into_bytes()
        };
        let kind = match &*endpoint {
            _ if compressed => Kind::Compressed,
            e if e.ends_with("_request") => Kind::Request,
            e if e.ends_with("_response") => Kind::Reply,
            _ => Kind::Message,
        };
        Self {
            version,
            dialect,
            kind,
            id: format!("{version} {endpoint}"),
            endpoint,
            trace: frame.get("trace").is_some(),
            topic: text("topic"),
            payload,
        }
    }

    fn decode(&self, usage: Use, dialect: Dialect) -> Result<Message, commlib_core::Error> {
        envelope::decode(&self.payload.clone().into(), usage, dialect)
    }

    /// Header and data as they were recorded, by a reader that shares no code with ours.
    fn recorded(&self) -> (BTreeMap<String, Value>, &str) {
        let mut envelope: BTreeMap<&str, &RawValue> =
            serde_json::from_slice(&self.payload).unwrap();
        let header = envelope.remove("header").unwrap().get();
        let data = envelope.remove("data").unwrap().get();
        assert!(envelope.is_empty(), "{}", self.id);
        (serde_json::from_str(header).unwrap(), data)
    }

    /// The same message, made from the recorded values as an endpoint of ours makes it.
    fn rebuilt(&self) -> Message {
        let (recorded, data) = self.recorded();
        let number = recorded["timestamp"].as_u64().unwrap();
        let mut header = Header::default();
        header.timestamp = Some(match self.dialect {
            Dialect::CommlibPy => number,
            _ => number * 1_000_000,
        });
        header.reply_to = match recorded["reply_to"].as_str().unwrap() {
            "" => None,
            address => Some(ReplyTo {
                address: address.to_owned(),
                correlation_id: None,
                form: self.dialect,
            }),
        };
        Message {
            header,
            data: data.as_bytes().to_vec().into(),
        }
    }
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

fn frames() -> Vec<Frame> {
    RECORDED
        .iter()
        .flat_map(|&(version, text, dialect, _)| {
            text.lines()
                .map(move |line| Frame::parse(version, dialect, line))
        })
        .collect()
}

#[test]
fn every_recorded_frame_is_here() {
    let frames = frames();
    for (version, text, _, counts) in RECORDED {
        let of = |kind| {
            frames
                .iter()
                .filter(|f| f.version == version && f.kind == kind)
                .count()
        };
        let found = [Kind::Request, Kind::Reply, Kind::Message, Kind::Compressed].map(of);
        assert_eq!(found, counts, "{version}");
        assert_eq!(
            text.lines().count(),
            counts.iter().sum::<usize>(),
            "{version}"
        );
    }
    assert_eq!(frames.len(), 135);
    // A file dropped into the folder and forgotten here would be a vector that nothing tests.
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors/commlib-py");
    let files: BTreeSet<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let mut known: BTreeSet<_> = RECORDED.iter().map(|r| format!("{}.jsonl", r.0)).collect();
    known.insert("README.md".to_owned());
    assert_eq!(files, known);
}

#[test]
fn topics_become_names_and_come_back() {
    for frame in frames() {
        let name = Name::from_foreign(frame.topic.split('/'));
        // Nothing in these topics needs an escape, so the rule for people holds: a slash is a dot.
        assert_eq!(name.as_str(), frame.topic.replace('/', "."), "{}", frame.id);
        assert!(Name::new(&name).is_ok(), "{}", frame.id);
        let back: Vec<_> = name
            .segments()
            .map(|s| commlib_core::unescape_segment(s, |_| true).into_owned())
            .collect();
        assert_eq!(back.join(&b'/'), frame.topic.as_bytes(), "{}", frame.id);
    }
}

/// A call is read the same on a connection of any dialect: a service does not know in advance who asks.
#[test]
fn requests_and_replies_are_read_as_envelopes() {
    for frame in frames() {
        if !matches!(frame.kind, Kind::Request | Kind::Reply) {
            continue;
        }
        let expected = frame.rebuilt();
        for dialect in Dialect::ALL {
            let message = frame.decode(Use::Rpc, dialect).expect(&frame.id);
            assert_eq!(message, expected, "{}", frame.id);
        }
        let ns = expected.header.timestamp.unwrap();
        assert!(
            (1_795_000_000..1_796_000_000).contains(&(ns / 1_000_000_000)),
            "{}: {ns} is not the day of the recording in nanoseconds",
            frame.id
        );
        assert_eq!(
            expected.header.reply_to.is_some(),
            frame.kind == Kind::Request
        );
    }
}

/// The form of the request is what a service answers in, so it must be told right.
#[test]
fn requests_tell_the_form_their_sender_reads() {
    for frame in frames().iter().filter(|f| f.kind == Kind::Request) {
        let header = frame
            .decode(Use::Rpc, Dialect::Envelope)
            .expect(&frame.id)
            .header;
        let reply_to = header.reply_to.expect(&frame.id);
        assert_eq!(reply_to.form, frame.dialect, "{}", frame.id);
        assert_eq!(reply_to.correlation_id, None, "{}", frame.id);
        assert!(reply_to.address.starts_with("rpc-"), "{}", frame.id);
        assert_eq!((header.sender, header.message_id), (None, None));
    }
}

/// Each conversation: a reply goes to the address of the request before it, and to no other.
#[test]
fn replies_answer_the_request_before_them() {
    let mut pairs = 0;
    for (version, ..) in RECORDED {
        let mut waiting: HashSet<String> = HashSet::new();
        for frame in frames()
            .iter()
            .filter(|f| f.version == version && f.trace && f.endpoint.starts_with("rpc_"))
        {
            let header = frame
                .decode(Use::Rpc, Dialect::CommlibPy)
                .expect(&frame.id)
                .header;
            match header.reply_to {
                Some(reply_to) => assert!(waiting.insert(reply_to.address), "{}", frame.id),
                None => {
                    assert!(waiting.remove(&frame.topic), "{}", frame.id);
                    pairs += 1;
                }
            }
        }
        assert!(waiting.is_empty(), "{version}: {waiting:?} never answered");
    }
    assert!(pairs >= 5, "only {pairs} calls were found");
}

/// Also in the default dialect, and also for events, which have a `header` with a `timestamp` of their own.
#[test]
fn messages_on_topics_are_bare_data() {
    let mut with_header = 0;
    for frame in frames().iter().filter(|f| f.kind == Kind::Message) {
        for dialect in Dialect::ALL {
            let message = frame.decode(Use::Topic, dialect).expect(&frame.id);
            assert_eq!(message.data, frame.payload, "{}", frame.id);
            assert_eq!(message.header, Header::default(), "{}", frame.id);
        }
        let value: Value = commlib_core::decode(&frame.payload).expect(&frame.id);
        with_header += usize::from(value.get("header").is_some());
    }
    assert_eq!(
        with_header, 3,
        "the events of 0.11.5, 0.13.2 and 0.13.2+perf"
    );
}

/// Compression has no mark on the wire; what cannot be read is a notice to the subscriber, never data.
#[test]
fn compressed_messages_are_decode_errors() {
    for frame in frames().iter().filter(|f| f.kind == Kind::Compressed) {
        for usage in [Use::Topic, Use::Rpc] {
            for dialect in Dialect::ALL {
                let error = frame.decode(usage, dialect).expect_err(&frame.id);
                assert_eq!(error.kind(), ErrorKind::Decode, "{}", frame.id);
            }
        }
    }
}

/// A frame cut short (a device that lost power while writing, a truncating gateway) is an error and no panic.
#[test]
fn cut_frames_are_decode_errors() {
    for frame in frames() {
        for len in 0..frame.payload.len() {
            let cut = frame.payload[..len].to_vec().into();
            let error = envelope::decode(&cut, Use::Rpc, Dialect::Envelope).expect_err(&frame.id);
            assert_eq!(error.kind(), ErrorKind::Decode, "{} at {len}", frame.id);
        }
    }
}

#[test]
fn messages_on_topics_are_produced_byte_for_byte() {
    for frame in frames().iter().filter(|f| f.kind == Kind::Message) {
        let mut message = Message::new(frame.payload.clone());
        // What our publishers add stays off the wire in these dialects.
        message.header.sender = Some("s".into());
        message.header.message_id = Some("1".into());
        message.header.seq = Some(1);
        let bytes = envelope::encode(&message, Use::Topic, frame.dialect).unwrap();
        assert_eq!(bytes, frame.payload, "{}", frame.id);
    }
}

#[test]
fn calls_of_the_newer_versions_are_produced_byte_for_byte() {
    let mut checked = 0;
    for frame in frames() {
        let calls = matches!(frame.kind, Kind::Request | Kind::Reply);
        if !calls || !["0.11.5", "0.13.2", "0.13.2+perf"].contains(&frame.version) {
            continue;
        }
        let bytes = envelope::encode(&frame.rebuilt(), Use::Rpc, frame.dialect).unwrap();
        let (ours, theirs) = (
            String::from_utf8_lossy(&bytes),
            String::from_utf8_lossy(&frame.payload),
        );
        assert_eq!(ours, theirs, "{}", frame.id);
        checked += 1;
    }
    assert_eq!(checked, 16 + 14 + 3 + 3 + 15 + 9);
}

/// The oldest versions send fewer header fields; what they do send is there, with the same values and types.
#[test]
fn calls_of_the_older_versions_are_a_subset_of_ours() {
    let mut checked = 0;
    for frame in frames() {
        let calls = matches!(frame.kind, Kind::Request | Kind::Reply);
        if !calls || !["0.6.9", "0.8.0"].contains(&frame.version) {
            continue;
        }
        let bytes = envelope::encode(&frame.rebuilt(), Use::Rpc, frame.dialect).unwrap();
        let ours: Value = serde_json::from_slice(&bytes).unwrap();
        let (header, data) = frame.recorded();
        for (field, value) in header {
            assert_eq!(ours["header"][&field], value, "{} {field}", frame.id);
        }
        assert_eq!(
            ours["data"],
            serde_json::from_str::<Value>(data).unwrap(),
            "{}",
            frame.id
        );
        assert_eq!(
            ours.as_object().unwrap().len(),
            2,
            "{}: only header and data",
            frame.id
        );
        checked += 1;
    }
    assert_eq!(checked, 5 + 5 + 14 + 13);
}

/// The default dialect answers and calls old peers too: its calls hold every field they look at.
#[test]
fn calls_in_the_default_dialect_hold_what_old_peers_read() {
    for frame in frames() {
        if !matches!(frame.kind, Kind::Request | Kind::Reply) {
            continue;
        }
        let bytes = envelope::encode(&frame.rebuilt(), Use::Rpc, Dialect::Envelope).unwrap();
        let ours: Value = serde_json::from_slice(&bytes).unwrap();
        for (field, value) in frame.recorded().0 {
            let have = &ours["header"][&field];
            match &*field {
                // We always write nanoseconds; the older versions never look at the number.
                "timestamp" => assert!(have.is_u64(), "{}", frame.id),
                // Absent means the same as null, and absent as empty in a reply.
                "correlation_id" => assert!(have.is_null(), "{}", frame.id),
                "reply_to" if value == "" => assert!(have.is_null(), "{}", frame.id),
                _ => assert_eq!(*have, value, "{} {field}", frame.id),
            }
        }
    }
}

/// Our own fields ride along in the header of a reply, behind the fields an old client reads.
#[test]
fn an_error_reply_in_an_old_form_keeps_its_shape() {
    let mut message = Message::new("{}");
    message.header.timestamp = Some(1_795_217_089_525_711_146);
    message.header.error = Some(RpcError::new("busy", "try later"));
    let header = |dialect| -> Value {
        let bytes = envelope::encode(&message, Use::Rpc, dialect).unwrap();
        serde_json::from_slice::<Value>(&bytes).unwrap()["header"].take()
    };
    assert_eq!(
        header(Dialect::CommlibPy),
        json!({
            "reply_to": "", "correlation_id": null, "timestamp": 1_795_217_089_525_711_146_u64,
            "content_type": "json", "encoding": "utf8", "agent": "commlib",
            "error": { "code": "busy", "message": "try later" },
        })
    );
    assert_eq!(
        header(Dialect::CommlibPy011),
        json!({
            "reply_to": "", "timestamp": 1_795_217_089_525_u64,
            "content_type": "json", "encoding": "utf8", "agent": "commlib",
            "error": { "code": "busy", "message": "try later" },
        })
    );
}

// --- The same frames through a real broker, sent by a client that is not ours ----------------------------------------

/// Everything here takes moments.
async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .expect("nothing happens")
}

/// A plain MQTT client: publishes recorded frames and sees what arrives.
struct Raw {
    client: AsyncClient,
    arrived: mpsc::UnboundedReceiver<Publish>,
}

impl Raw {
    async fn connect(broker: &Mosquitto) -> Self {
        let options = MqttOptions::new("raw", "127.0.0.1", broker.port());
        let (client, mut events) = AsyncClient::new(options, 100);
        let (sender, arrived) = mpsc::unbounded_channel();
        let (ready, subscribed) = tokio::sync::oneshot::channel();
        tokio::spawn(async move {
            let mut ready = Some(ready);
            loop {
                match events.poll().await {
                    Ok(Event::Incoming(Packet::SubAck(_))) => {
                        let _ = ready.take().map(|ready| ready.send(()));
                    }
                    Ok(Event::Incoming(Packet::Publish(publish))) => {
                        let _ = sender.send(publish);
                    }
                    Ok(_) => {}
                    Err(_) => return,
                }
            }
        });
        client.subscribe("#", QoS::AtMostOnce).await.unwrap();
        soon(subscribed).await.unwrap();
        Self { client, arrived }
    }

    async fn publish(&self, frame: &Frame) {
        let payload = frame.payload.clone();
        self.client
            .publish(&frame.topic, QoS::AtLeastOnce, false, payload)
            .await
            .unwrap();
    }

    /// The next message on this topic.
    async fn on(&mut self, topic: &str) -> Publish {
        loop {
            let publish = soon(self.arrived.recv()).await.unwrap();
            if publish.topic == topic {
                return publish;
            }
        }
    }
}

async fn connect(broker: &Mosquitto) -> Connection {
    let config = MqttConfig::from_url(&broker.url()).unwrap();
    soon(config.connect()).await.unwrap()
}

async fn listen(connection: &Connection, source: Source) -> Inbox {
    let listening = connection
        .transport()
        .listen(&source, ListenOptions::default());
    soon(listening).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_recorded_message_arrives_through_a_broker() {
    if !Mosquitto::available() {
        return;
    }
    let broker = Mosquitto::start().await;
    let raw = Raw::connect(&broker).await;
    let ours = connect(&broker).await;
    let mut inbox = listen(&ours, Source::Topic(Pattern::new("*").unwrap())).await;
    for frame in frames() {
        if !matches!(frame.kind, Kind::Message | Kind::Compressed) {
            continue;
        }
        raw.publish(&frame).await;
        let name = frame.topic.replace('/', ".");
        match soon(inbox.recv()).await {
            Some(Incoming::Message(arrival)) => {
                assert_eq!(frame.kind, Kind::Message, "{}", frame.id);
                assert_eq!(arrival.name.as_str(), name, "{}", frame.id);
                assert_eq!(arrival.message.data, frame.payload, "{}", frame.id);
            }
            Some(Incoming::Malformed(malformed)) => {
                assert_eq!(frame.kind, Kind::Compressed, "{}: {malformed:?}", frame.id);
                assert_eq!(malformed.name.as_str(), name, "{}", frame.id);
            }
            other => panic!("{}: {other:?}", frame.id),
        }
    }
}

/// Each recorded request reaches a service, and the reply it gets looks like the one that was recorded.
#[tokio::test(flavor = "multi_thread")]
async fn every_recorded_request_is_answered_in_its_own_form() {
    if !Mosquitto::available() {
        return;
    }
    let broker = Mosquitto::start().await;
    let mut raw = Raw::connect(&broker).await;
    let ours = connect(&broker).await;
    let mut services: HashMap<String, Inbox> = HashMap::new();
    let frames = frames();
    for frame in frames.iter().filter(|f| f.kind == Kind::Request) {
        if !services.contains_key(&frame.topic) {
            let name = Name::from_foreign(frame.topic.split('/'));
            let inbox = listen(&ours, Source::Queue(name)).await;
            services.insert(frame.topic.clone(), inbox);
        }
        raw.publish(frame).await;
        let inbox = services.get_mut(&frame.topic).unwrap();
        let Some(Incoming::Message(arrival)) = soon(inbox.recv()).await else {
            panic!("{}: no request", frame.id);
        };
        assert_eq!(arrival.message, frame.rebuilt(), "{}", frame.id);

        let reply_to = arrival.message.header.reply_to.unwrap();
        let topic = reply_to.address.clone();
        let recorded = frames
            .iter()
            .find(|f| f.kind == Kind::Reply && f.topic == topic);
        // Some were never answered; any reply of that version shows the shape.
        let shape = recorded
            .or_else(|| {
                frames
                    .iter()
                    .find(|f| f.kind == Kind::Reply && f.version == frame.version)
            })
            .unwrap();
        let (header, data) = shape.recorded();
        let target = Target::Reply(reply_to);
        let sent = ours.transport().send(
            &target,
            Message::new(data.to_owned()),
            SendOptions::default(),
        );
        drop(soon(sent).await.unwrap());
        let reply = raw.on(&topic).await;
        let reply: Value = serde_json::from_slice(&reply.payload).unwrap();
        assert_eq!(reply["data"], serde_json::from_str::<Value>(data).unwrap());
        for (field, value) in header {
            let have = &reply["header"][&field];
            if field == "timestamp" {
                // The same unit: a number with as many digits.
                let digits = |value: &Value| value.to_string().len();
                assert_eq!(digits(have), digits(&value), "{}: {have}", frame.id);
            } else {
                assert_eq!(*have, value, "{} {field}", frame.id);
            }
        }
    }
    assert!(services.len() >= 5);
}
