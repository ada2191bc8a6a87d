//! Frames recorded from released versions of commlib-py, through a real server: all of them are read, and ours are
//! shaped like them. What the envelope itself must do is tested with the frames of MQTT.
//!
//! What the frames are and how they are stored: `vectors/commlib-py/README.md`.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is how a test fails"
)]

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::time::Duration;

use commlib_core::{
    Connection, Dialect, Header, Inbox, Incoming, ListenOptions, Message, Name, Pattern, PubSub,
    Rpc, RpcClientOptions, SendOptions, Source, Target, Value, json,
};
use commlib_redis::RedisConfig;
use commlib_testkit::Redis;

/// The recorded versions: the file's text, how that version writes calls, and how many frames of which kind it holds
/// (requests, replies, messages). The counts make sure that no line is passed over.
const RECORDED: [(&str, &str, Dialect, [usize; 3]); 4] = [
    (
        "0.6.9",
        include_str!("vectors/commlib-py/0.6.9.jsonl"),
        Dialect::CommlibPy011,
        [5, 5, 4],
    ),
    (
        "0.8.0",
        include_str!("vectors/commlib-py/0.8.0.jsonl"),
        Dialect::CommlibPy011,
        [14, 12, 7],
    ),
    (
        "0.11.5",
        include_str!("vectors/commlib-py/0.11.5.jsonl"),
        Dialect::CommlibPy011,
        [14, 9, 7],
    ),
    (
        "0.13.2",
        include_str!("vectors/commlib-py/0.13.2.jsonl"),
        Dialect::CommlibPy,
        [16, 16, 12],
    ),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Request,
    Reply,
    Message,
}

#[derive(Debug)]
struct Frame {
    version: &'static str,
    dialect: Dialect,
    kind: Kind,
    key: String,
    payload: String,
    /// For messages of failed assertions.
    id: String,
}

impl Frame {
    fn parse(version: &'static str, dialect: Dialect, line: &str) -> Self {
        let frame: Value = serde_json::from_str(line).unwrap();
        let text = |field: &str| frame[field].as_str().unwrap().to_owned();
        let endpoint = text("endpoint");
        let kind = match &*endpoint {
            e if e.ends_with("_request") => Kind::Request,
            e if e.ends_with("_response") => Kind::Reply,
            _ => Kind::Message,
        };
        let command = if kind == Kind::Message {
            "PUBLISH"
        } else {
            "RPUSH"
        };
        assert_eq!(text("command"), command, "{version} {endpoint}");
        Self {
            version,
            dialect,
            kind,
            key: text("key"),
            payload: text("payload"),
            id: format!("{version} {endpoint}"),
        }
    }

    fn recorded(&self) -> (BTreeMap<String, Value>, Value) {
        let envelope: Value = serde_json::from_str(&self.payload).unwrap();
        let header = serde_json::from_value(envelope["header"].clone()).unwrap();
        (header, envelope["data"].clone())
    }
}

fn frames() -> Vec<Frame> {
    let lines = |&(version, text, dialect, _): &(&'static str, &'static str, Dialect, _)| {
        text.lines()
            .map(move |line| Frame::parse(version, dialect, line))
    };
    RECORDED.iter().flat_map(lines).collect()
}

/// Everything here takes moments.
async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .expect("nothing happens")
}

async fn connect(server: &Redis, dialect: Dialect) -> Connection {
    let config = RedisConfig::from_url(&server.url())
        .unwrap()
        .dialect(dialect);
    soon(config.connect()).await.unwrap()
}

async fn listen(connection: &Connection, source: Source) -> Inbox {
    let options = ListenOptions::default().dialect(connection.dialect());
    soon(connection.transport().listen(&source, options))
        .await
        .unwrap()
}

/// The next item of a list.
async fn pop(server: &Redis, list: &str) -> Value {
    let popped = server.command(&["BLPOP", list, "10"]).await;
    serde_json::from_str(&popped[1]).unwrap()
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
        let found = [Kind::Request, Kind::Reply, Kind::Message].map(of);
        assert_eq!(found, counts, "{version}");
        assert_eq!(
            text.lines().count(),
            counts.iter().sum::<usize>(),
            "{version}"
        );
    }
}

/// Pub/sub of every version is bare data, in every dialect of ours, on names and on patterns.
#[tokio::test(flavor = "multi_thread")]
async fn every_recorded_message_arrives() {
    if !Redis::available() {
        return;
    }
    let server = Redis::start().await;
    let ours = connect(&server, Dialect::Envelope).await;
    let mut all = Vec::new();
    for dialect in Dialect::ALL {
        let ours = ours.clone().with_dialect(dialect);
        all.push(listen(&ours, Source::Topic(Pattern::new("*").unwrap())).await);
    }
    for frame in frames().iter().filter(|f| f.kind == Kind::Message) {
        let name = Name::new(&frame.key).unwrap();
        let mut exact = listen(&ours, Source::Topic(name.clone().into())).await;
        server
            .command(&["PUBLISH", &frame.key, &frame.payload])
            .await;
        for inbox in all.iter_mut().chain([&mut exact]) {
            let Some(Incoming::Message(arrival)) = soon(inbox.recv()).await else {
                panic!("{}: no message", frame.id);
            };
            assert_eq!(arrival.name, name, "{}", frame.id);
            assert_eq!(arrival.message.data, frame.payload, "{}", frame.id);
            assert_eq!(arrival.message.header, Header::default(), "{}", frame.id);
        }
    }
}

/// What we publish in their dialects is their data, without a header.
#[tokio::test(flavor = "multi_thread")]
async fn our_messages_are_theirs() {
    if !Redis::available() {
        return;
    }
    let server = Redis::start().await;
    for dialect in [Dialect::CommlibPy, Dialect::CommlibPy011] {
        let ours = connect(&server, dialect).await;
        // What arrives, read as it stands: nothing here has our marks.
        let mut inbox = listen(&ours, Source::Topic(Pattern::new("*").unwrap())).await;
        for frame in frames().iter().filter(|f| f.kind == Kind::Message) {
            let value: Value = serde_json::from_str(&frame.payload).unwrap();
            let publisher = ours.publisher::<Value>(&frame.key).unwrap();
            soon(publisher.publish(&value)).await.unwrap();
            let Some(Incoming::Message(arrival)) = soon(inbox.recv()).await else {
                panic!("{}: no message", frame.id);
            };
            assert_eq!(arrival.name.as_str(), frame.key);
            let data: Value = serde_json::from_slice(&arrival.message.data).unwrap();
            assert_eq!(data, value, "{}", frame.id);
            assert_eq!(arrival.message.header, Header::default(), "{}", frame.id);
        }
    }
}

/// Each recorded request reaches a service, and the reply it gets looks like the one that was recorded.
#[tokio::test(flavor = "multi_thread")]
async fn every_recorded_request_is_answered_in_its_own_form() {
    if !Redis::available() {
        return;
    }
    let server = Redis::start().await;
    let ours = connect(&server, Dialect::Envelope).await;
    let mut services: HashMap<String, Inbox> = HashMap::new();
    let frames = frames();
    for frame in frames.iter().filter(|f| f.kind == Kind::Request) {
        if !services.contains_key(&frame.key) {
            let source = Source::Queue(Name::new(&frame.key).unwrap());
            services.insert(frame.key.clone(), listen(&ours, source).await);
        }
        server.command(&["RPUSH", &frame.key, &frame.payload]).await;
        let inbox = services.get_mut(&frame.key).unwrap();
        let Some(Incoming::Message(arrival)) = soon(inbox.recv()).await else {
            panic!("{}: no request", frame.id);
        };
        let (_, data) = frame.recorded();
        let arrived: Value = serde_json::from_slice(&arrival.message.data).unwrap();
        assert_eq!(arrived, data, "{}", frame.id);
        let reply_to = arrival.message.header.reply_to.unwrap();
        assert_eq!(reply_to.form, frame.dialect, "{}", frame.id);

        let address = reply_to.address.clone();
        let replies = || frames.iter().filter(|f| f.kind == Kind::Reply);
        // Some were never answered; any reply of that version shows the shape.
        let shape = replies()
            .find(|f| f.key == address)
            .or_else(|| replies().find(|f| f.version == frame.version))
            .unwrap();
        let (header, data) = shape.recorded();
        let message = Message::new(data.to_string());
        let target = Target::Reply(reply_to);
        let sent = ours
            .transport()
            .send(&target, message, SendOptions::default());
        drop(soon(sent).await.unwrap());
        let reply = pop(&server, &address).await;
        assert_eq!(reply["data"], data, "{}", frame.id);
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

/// Each recorded reply answers a call of ours, in whatever dialect it was made, on a list of its own.
#[tokio::test(flavor = "multi_thread")]
async fn every_recorded_reply_answers_a_call() {
    if !Redis::available() {
        return;
    }
    let server = Redis::start().await;
    let ours = connect(&server, Dialect::Envelope).await;
    let mut addresses = std::collections::HashSet::new();
    for frame in frames().iter().filter(|f| f.kind == Kind::Reply) {
        for dialect in Dialect::ALL {
            let options = RpcClientOptions::default().dialect(dialect);
            let client = ours
                .rpc_client_with::<Value, Value>("vec.ops.add", options)
                .unwrap();
            let call = tokio::spawn(async move { client.call(&json!({"a": 1})).await });
            let request = pop(&server, "vec.ops.add").await;
            let address = request["header"]["reply_to"].as_str().unwrap().to_owned();
            server.command(&["RPUSH", &address, &frame.payload]).await;
            let reply = soon(call).await.unwrap().unwrap();
            assert_eq!(reply, frame.recorded().1, "{}", frame.id);
            assert!(addresses.insert(address), "an address was used twice");
        }
    }
}

/// Our requests hold every field of theirs, with the same types; an old service looks at nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn our_requests_hold_what_old_services_read() {
    if !Redis::available() {
        return;
    }
    let server = Redis::start().await;
    let ours = connect(&server, Dialect::Envelope).await;
    for frame in frames().iter().filter(|f| f.kind == Kind::Request) {
        for dialect in [Dialect::Envelope, frame.dialect] {
            let options = RpcClientOptions::default().dialect(dialect);
            let client = ours
                .rpc_client_with::<Value, Value>(&frame.key, options)
                .unwrap();
            let (header, data) = frame.recorded();
            let sent = data.clone();
            let call = tokio::spawn(async move { client.call(&sent).await });
            let request = pop(&server, &frame.key).await;
            call.abort();
            assert_eq!(request["data"], data, "{}", frame.id);
            for (field, value) in header {
                let have = &request["header"][&field];
                match &*field {
                    "timestamp" => assert!(have.is_u64(), "{}", frame.id),
                    "reply_to" => {
                        assert!(have.as_str().unwrap().starts_with("rpc-"), "{}", frame.id)
                    }
                    // Theirs is null, and no service looks at it; ours tells services that echo it.
                    "correlation_id" => assert!(have.is_string(), "{}", frame.id),
                    _ => assert_eq!(*have, value, "{} {field}", frame.id),
                }
            }
        }
    }
}
