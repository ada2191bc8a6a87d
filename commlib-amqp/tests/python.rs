//! The real commlib-py 0.13.2 on the other end, through a real RabbitMQ.
//!
//! Needs a Python that has it: `COMMLIB_TEST_PYTHON=/path/to/venv/bin/python` (`./test` makes one), with the package `pika`.
//! Without it the tests are skipped with a notice, and fail where `CI=true`.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is how a test fails"
)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use commlib_amqp::AmqpConfig;
use commlib_core::{
    Connection, Delivery, ErrorKind, PubSub, PublisherOptions, Rpc, RpcClient, RpcError, Value,
    json,
};
use commlib_testkit::amqp_url;
use common::{soon, unique};
use futures_util::future::join_all;
use tokio::sync::mpsc;

/// The interpreter to use and the broker; `None`, with a notice, where the test is to be skipped.
async fn python() -> Option<(String, AmqpConfig)> {
    let python = std::env::var("COMMLIB_TEST_PYTHON")
        .ok()
        .filter(|path| !path.is_empty());
    if python.is_none() {
        let notice = "COMMLIB_TEST_PYTHON does not name a Python that has commlib-py 0.13.2 (`./test` makes one)";
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "CI=true, and {notice}"
        );
        println!("skipped: {notice}");
    }
    let config = AmqpConfig::from_url(&amqp_url().await?).unwrap();
    Some((python?, config))
}

/// A running `python/peer.py`, killed when dropped. What it prints besides its answers is shown if the test fails.
struct Peer {
    child: Child,
    stdin: ChildStdin,
    lines: mpsc::UnboundedReceiver<String>,
    log: Arc<Mutex<String>>,
}

impl Peer {
    async fn start(python: &str, config: &AmqpConfig, role: &str, name: &str) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/peer.py");
        let port = config.address.rsplit_once(':').unwrap().1;
        let mut child = Command::new(python)
            .args([script, port, role, name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("COMMLIB_TEST_PYTHON={python}: {e}"));
        let (sender, lines) = mpsc::unbounded_channel();
        let stdout = child.stdout.take().unwrap();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let log = Arc::new(Mutex::new(String::new()));
        let mut stderr = child.stderr.take().unwrap();
        let writer = log.clone();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = stderr.read(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..len]);
                writer.lock().unwrap().push_str(&text);
            }
        });
        let stdin = child.stdin.take().unwrap();
        let mut peer = Self {
            child,
            stdin,
            lines,
            log,
        };
        assert_eq!(peer.line().await, "ready", "{role}");
        peer
    }

    async fn line(&mut self) -> String {
        soon(self.lines.recv()).await.expect("Python has ended")
    }

    /// The next thing it has to say.
    async fn next(&mut self) -> Value {
        let line = self.line().await;
        serde_json::from_str(&line).expect(&line)
    }

    /// Tells it to publish or to call.
    fn tell(&mut self, line: &Value) {
        writeln!(self.stdin, "{line}").unwrap();
        self.stdin.flush().unwrap();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("Python printed:\n{}", self.log.lock().unwrap());
        }
    }
}

async fn connect(config: &AmqpConfig, dialect: commlib_core::Dialect) -> Connection {
    soon(config.clone().dialect(dialect).connect())
        .await
        .unwrap()
}

/// Both ways of speaking to 0.13; a reader and a service understand old peers in either.
const DIALECTS: [commlib_core::Dialect; 2] = [
    commlib_core::Dialect::CommlibPy,
    commlib_core::Dialect::Envelope,
];

/// What robots send: text of every kind, numbers of every kind, nested, and with a `header` and `data` of its own.
fn messages() -> [Value; 4] {
    [
        json!({"distance": 1.5, "count": -5, "text": "caf\u{e9} a/b \u{1f916} \"quoted\"", "on": true, "none": null}),
        json!({"nested": {"list": [1, 2.5, [], {}], "big": 9_007_199_254_740_993_i64}}),
        json!({"header": {"frame_id": "map", "timestamp": 1.5}, "data": [0, 1]}),
        json!({}),
    ]
}

/// On AMQP the header stands beside the data, so that Python subscribers understand every dialect.
#[tokio::test(flavor = "multi_thread")]
async fn python_subscribers_get_the_data_we_publish() {
    let Some((python, config)) = python().await else {
        return;
    };
    let topic = unique("sub");
    let mut peer = Peer::start(&python, &config, "sub", &topic).await;
    for dialect in DIALECTS {
        let ours = connect(&config, dialect).await;
        let options = PublisherOptions::default().delivery(Delivery::AtLeastOnce);
        let publisher = ours.publisher_with::<Value>(&topic, options).unwrap();
        // commlib-py does not say when it listens; the broker says whether somebody does.
        let listening = async {
            while publisher.publish(&json!({"first": true})).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        soon(listening).await;
        assert_eq!(peer.next().await, json!({"data": {"first": true}}));
        for message in messages() {
            publisher.publish(&message).await.unwrap();
            assert_eq!(peer.next().await, json!({ "data": message }), "{dialect}");
        }
        for n in 0..50 {
            publisher.publish(&json!({ "n": n })).await.unwrap();
        }
        for n in 0..50 {
            assert_eq!(peer.next().await, json!({"data": {"n": n}}));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn we_get_what_python_publishes() {
    let Some((python, config)) = python().await else {
        return;
    };
    let prefix = unique("pub");
    let topic = format!("{prefix}.deep.er");
    let mut peer = Peer::start(&python, &config, "pub", &topic).await;
    for dialect in DIALECTS {
        let ours = connect(&config, dialect).await;
        let mut exact = ours.subscriber::<Value>(&topic).await.unwrap();
        let mut pattern = ours
            .subscriber::<Value>(&format!("{prefix}.*"))
            .await
            .unwrap();
        let all = messages()
            .into_iter()
            .chain((0..50).map(|n| json!({ "n": n })));
        for message in all {
            peer.tell(&json!({ "data": message }));
            for subscriber in [&mut exact, &mut pattern] {
                let received = soon(subscriber.recv()).await.unwrap().unwrap();
                assert_eq!(received.topic.as_str(), topic);
                assert_eq!(received.data, message, "{dialect}");
                assert!(
                    received.header.timestamp.is_some(),
                    "it is in the properties"
                );
                assert_eq!((received.header.sender, received.gap), (None, None));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn we_call_a_python_service() {
    let Some((python, config)) = python().await else {
        return;
    };
    let service = unique("add");
    let ours = connect(&config, commlib_core::Dialect::CommlibPy).await;
    let add: RpcClient<Value, Value> = ours.rpc_client(&service).unwrap();
    let missing = soon(add.call(&json!({}))).await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NoService);
    let mut peer = Peer::start(&python, &config, "service", &service).await;
    let listening = async {
        loop {
            match add.call(&json!({"a": 40, "b": 2})).await {
                Err(error) if error.kind() == ErrorKind::NoService => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                outcome => return outcome,
            }
        }
    };
    assert_eq!(soon(listening).await.unwrap(), json!({"c": 42}));
    assert_eq!(
        peer.next().await,
        json!({"request": {"a": 40, "b": 2, "fail": false}})
    );
    // As many at a time as its queue holds, and each caller gets its own answer.
    let requests: Vec<_> = (0..20).map(|n| json!({"a": n, "b": 100})).collect();
    for some in requests.chunks(10) {
        let replies = soon(join_all(some.iter().map(|request| add.call(request)))).await;
        for (request, reply) in some.iter().zip(replies) {
            let sum = request["a"].as_i64().unwrap() + 100;
            assert_eq!(reply.unwrap(), json!({ "c": sum }));
            peer.next().await;
        }
    }
    // It has no notion of errors: an exception is an answer of defaults.
    let failed = soon(add.call(&json!({"fail": true}))).await.unwrap();
    assert_eq!(failed, json!({"c": 0}));
}

#[tokio::test(flavor = "multi_thread")]
async fn python_calls_our_service() {
    let Some((python, config)) = python().await else {
        return;
    };
    let service = unique("add");
    let add = |q: Value| async move {
        if q["fail"] == true {
            return Err(RpcError::new("told_to_fail", "as asked"));
        }
        let sum = q["a"].as_i64().zip(q["b"].as_i64()).map(|(a, b)| a + b);
        Ok(json!({ "c": sum }))
    };
    let mut peer = Peer::start(&python, &config, "client", &service).await;
    // A service answers in the form it was asked in, whatever its own dialect.
    for dialect in DIALECTS {
        let ours = connect(&config, dialect).await;
        let handle = ours.rpc_service(&service, add).await.unwrap();
        for n in 0..5 {
            peer.tell(&json!({"a": n, "b": 10}));
            assert_eq!(
                peer.next().await,
                json!({"reply": {"c": n + 10}}),
                "{dialect}"
            );
        }
        // It fills in its defaults; it must not wait for its timeout, and not break.
        peer.tell(&json!({"fail": true, "within": 25}));
        assert_eq!(
            peer.next().await,
            json!({"reply": {"c": 0}}),
            "{dialect}: an error"
        );
        peer.tell(&json!({"a": 1, "b": 1}));
        assert_eq!(peer.next().await, json!({"reply": {"c": 2}}), "{dialect}");
        soon(handle.stop()).await;
        soon(ours.close()).await.unwrap();
    }
}
