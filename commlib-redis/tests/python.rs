//! The real commlib-py 0.13.2 on the other end, through a real Redis server.
//!
//! Needs a Python that has it: `COMMLIB_TEST_PYTHON=/path/to/venv/bin/python` (`./test` makes one). Without it the tests
//! are skipped with a notice, and fail where `CI=true`.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is how a test fails"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use commlib_core::{
    Connection, ErrorKind, Gap, Header, PubSub, Received, Rpc, RpcError, RpcServiceOptions,
    Subscriber, Value, json,
};
use commlib_redis::RedisConfig;
use commlib_testkit::Redis;
use futures_util::future::join_all;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Starting an interpreter on a busy machine takes seconds; nothing else here takes nearly as long.
const LIMIT: Duration = Duration::from_secs(60);

/// The interpreter to use; `None`, with a notice, where the test is to be skipped.
fn python() -> Option<String> {
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
    python.filter(|_| Redis::available())
}

/// A running `python/peer.py`, killed when dropped. What it prints besides its answers is shown if the test fails.
struct Peer {
    child: Child,
    stdin: ChildStdin,
    lines: mpsc::UnboundedReceiver<String>,
    log: Arc<Mutex<String>>,
}

impl Peer {
    /// Starts one and waits until it is connected.
    async fn start(python: &str, server: &Redis, role: &[&str]) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/peer.py");
        let mut child = Command::new(python)
            .arg(script)
            .arg(server.port().to_string())
            .args(role)
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
        assert_eq!(peer.line().await, "ready", "{role:?}");
        peer
    }

    async fn line(&mut self) -> String {
        timeout(LIMIT, self.lines.recv())
            .await
            .expect("Python says nothing")
            .expect("Python has ended")
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

/// Waits for so many subscriptions: commlib-py does not say when they are in place, but the server does.
async fn subscribed(server: &Redis, count: &str) {
    let all = async {
        while server.command(&["PUBSUB", "NUMPAT"]).await != [count] {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LIMIT, all)
        .await
        .expect("Python does not subscribe");
}

/// A connection of ours, with these options in its URL.
async fn connect(server: &Redis, options: &str) -> Connection {
    let url = format!("{}{options}", server.url());
    let config = RedisConfig::from_url(&url).unwrap();
    timeout(LIMIT, config.connect()).await.unwrap().unwrap()
}

async fn receive(subscriber: &mut Subscriber<Value>) -> Received<Value> {
    timeout(LIMIT, subscriber.recv())
        .await
        .expect("nothing arrives")
        .expect("the subscriber has ended")
        .expect("the message cannot be read")
}

/// Both ways of speaking; a reader and a service understand old peers in either.
const DIALECTS: [&str; 2] = ["?dialect=commlib-py", ""];

/// What robots send: text of every kind, numbers of every kind, nested, and with a `header` and `data` of its own.
fn messages() -> [Value; 4] {
    [
        json!({"distance": 1.5, "count": -5, "text": "caf\u{e9} a/b \u{1f916} \"quoted\"", "on": true, "none": null}),
        json!({"nested": {"list": [1, 2.5, [], {}], "big": 9_007_199_254_740_993_i64}}),
        json!({"header": {"frame_id": "map", "timestamp": 1.5}, "data": [0, 1]}),
        json!({}),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn python_subscribers_get_the_bare_data_we_publish() {
    let Some(python) = python() else { return };
    let server = Redis::start().await;
    let ours = connect(&server, "?dialect=commlib-py").await;
    let (mut exact, mut pattern) = tokio::join!(
        Peer::start(&python, &server, &["sub", "sensors.sonar"]),
        Peer::start(&python, &server, &["psub", "sensors.*"]),
    );
    subscribed(&server, "2").await;
    let sonar = ours.publisher::<Value>("sensors.sonar").unwrap();
    for message in messages() {
        sonar.publish(&message).await.unwrap();
        assert_eq!(exact.next().await, json!({ "data": message }));
        let seen = pattern.next().await;
        assert_eq!(seen, json!({"data": message, "topic": "sensors.sonar"}));
    }
    // The exact subscriber must not see the others, and both see them in the order they were sent.
    let many = ours.multi_publisher::<Value>().unwrap();
    for n in 0..50 {
        many.publish(&format!("sensors.ir.n{n}"), &json!({ "n": n }))
            .await
            .unwrap();
    }
    sonar.publish(&json!({"last": true})).await.unwrap();
    for n in 0..50 {
        let seen = pattern.next().await;
        assert_eq!(
            seen,
            json!({"data": {"n": n}, "topic": format!("sensors.ir.n{n}")})
        );
    }
    assert_eq!(exact.next().await, json!({"data": {"last": true}}));
}

/// Why owners of a Python fleet must set the dialect: the default puts an envelope around messages, which commlib-py
/// neither sends nor opens.
#[tokio::test(flavor = "multi_thread")]
async fn python_subscribers_see_the_envelope_of_the_default_dialect() {
    let Some(python) = python() else { return };
    let server = Redis::start().await;
    let ours = connect(&server, "").await;
    let mut peer = Peer::start(&python, &server, &["sub", "sensors.sonar"]).await;
    subscribed(&server, "1").await;
    let publisher = ours.publisher::<Value>("sensors.sonar").unwrap();
    publisher.publish(&json!({"distance": 1})).await.unwrap();
    let seen = peer.next().await;
    assert_eq!(seen["data"]["data"], json!({"distance": 1}));
    assert!(seen["data"]["header"]["timestamp"].is_u64(), "{seen}");
    assert_eq!(seen["data"].as_object().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn we_get_what_python_publishes() {
    let Some(python) = python() else { return };
    let server = Redis::start().await;
    let mut peer = Peer::start(&python, &server, &["pub"]).await;
    for options in DIALECTS {
        let ours = connect(&server, options).await;
        let mut exact = ours.subscriber::<Value>("sensors.sonar").await.unwrap();
        let mut pattern = ours.subscriber::<Value>("sensors.*").await.unwrap();
        for message in messages() {
            peer.tell(&json!({"topic": "sensors.sonar", "data": message}));
            for subscriber in [&mut exact, &mut pattern] {
                let received = receive(subscriber).await;
                assert_eq!(received.topic.as_str(), "sensors.sonar");
                assert_eq!(received.data, message, "{options}");
                assert_eq!(
                    received.header,
                    Header::default(),
                    "commlib-py sends no header"
                );
                assert_eq!(received.gap, None::<Gap>);
            }
        }
        for n in 0..50 {
            peer.tell(&json!({"topic": format!("sensors.deep.er.n{n}"), "data": {"n": n}}));
        }
        peer.tell(&json!({"topic": "sensors.sonar", "data": {"last": true}}));
        for n in 0..50 {
            let received = receive(&mut pattern).await;
            assert_eq!(received.topic.as_str(), format!("sensors.deep.er.n{n}"));
            assert_eq!(received.data, json!({ "n": n }));
        }
        assert_eq!(receive(&mut exact).await.data, json!({"last": true}));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn we_call_a_python_service() {
    let Some(python) = python() else { return };
    let server = Redis::start().await;
    let mut peer = Peer::start(&python, &server, &["service", "ops.add"]).await;
    // Requests are envelopes in every dialect, and Python reads all of them.
    for options in DIALECTS {
        let ours = connect(&server, options).await;
        let add = ours.rpc_client::<Value, Value>("ops.add").unwrap();
        let reply = add.call(&json!({"a": 40, "b": 2})).await.unwrap();
        assert_eq!(reply, json!({"c": 42}), "{options}");
        let seen = peer.next().await;
        assert_eq!(seen, json!({"request": {"a": 40, "b": 2, "fail": false}}));

        // Each caller gets its own answer, although commlib-py echoes nothing but the reply address.
        let requests: Vec<_> = (0..20).map(|n| json!({"a": n, "b": 100})).collect();
        let replies = join_all(requests.iter().map(|request| add.call(request))).await;
        for (n, reply) in replies.into_iter().enumerate() {
            assert_eq!(reply.unwrap(), json!({"c": n + 100}), "{options}");
            peer.next().await;
        }
    }
}

/// On Redis commlib-py answers with nothing in it when a handler raises, as if that were the answer.
#[tokio::test(flavor = "multi_thread")]
async fn an_exception_in_a_python_handler_is_an_empty_reply() {
    let Some(python) = python() else { return };
    let server = Redis::start().await;
    let mut peer = Peer::start(&python, &server, &["service", "ops.add"]).await;
    let ours = connect(&server, "?dialect=commlib-py").await;
    let add = ours.rpc_client::<Value, Value>("ops.add").unwrap();
    let reply = add.call(&json!({"fail": true})).await.unwrap();
    assert_eq!(reply, json!({}));
    assert_eq!(peer.next().await["request"]["fail"], true);
    // Neither side is the worse for it.
    let reply = add.call(&json!({"a": 1, "b": 2})).await.unwrap();
    assert_eq!(reply, json!({"c": 3}));
}

/// A call to a name that nobody serves ends with the caller's patience on either side, and a service that comes later
/// is not bothered by our request, which was taken back.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_serves() {
    let Some(python) = python() else { return };
    let server = Redis::start().await;
    let ours = connect(&server, "?dialect=commlib-py").await;
    let add = ours.rpc_client::<Value, Value>("ops.add").unwrap();
    let error = add
        .call_within(&json!({"a": 1}), Duration::from_millis(300))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    let mut client = Peer::start(&python, &server, &["client", "ops.add"]).await;
    client.tell(&json!({"a": 1, "b": 2, "within": 1}));
    assert_eq!(client.next().await, json!({"timeout": true}));
    assert_eq!(
        server.command(&["LLEN", "ops.add"]).await,
        ["1"],
        "Python's own request stays"
    );
    let mut service = Peer::start(&python, &server, &["service", "ops.add"]).await;
    assert_eq!(service.next().await["request"]["b"], 2);
    let reply = add.call(&json!({"a": 4, "b": 4})).await.unwrap();
    assert_eq!(reply, json!({"c": 8}));
}

#[tokio::test(flavor = "multi_thread")]
async fn python_calls_our_service() {
    let Some(python) = python() else { return };
    let server = Redis::start().await;
    let add = |q: Value| async move {
        if q["fail"] == true {
            return Err(RpcError::new("told_to_fail", "as asked"));
        }
        let sum = q["a"].as_i64().zip(q["b"].as_i64()).map(|(a, b)| a + b);
        Ok(json!({ "c": sum }))
    };
    let mut peer = Peer::start(&python, &server, &["client", "ops.add"]).await;
    // A service answers in the form it was asked in, whatever its own dialect.
    for options in DIALECTS {
        let ours = connect(&server, options).await;
        let service = ours
            .rpc_service_with("ops.add", RpcServiceOptions::default(), add)
            .await
            .unwrap();
        for n in 0..5 {
            peer.tell(&json!({"a": n, "b": 10}));
            assert_eq!(
                peer.next().await,
                json!({"reply": {"c": n + 10}}),
                "{options}"
            );
        }
        // It has no notion of errors and fills in its defaults; it must not wait for its timeout, and not break.
        let started = Instant::now();
        peer.tell(&json!({"fail": true, "within": 20}));
        assert_eq!(
            peer.next().await,
            json!({"reply": {"c": 0}}),
            "{options}: an error"
        );
        assert!(started.elapsed() < Duration::from_secs(10));
        peer.tell(&json!({"a": 1, "b": 1}));
        assert_eq!(peer.next().await, json!({"reply": {"c": 2}}), "{options}");
        service.stop().await;
    }
}
