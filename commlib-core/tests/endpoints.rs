//! Endpoints on the in-memory broker: what is about their own API rather than about a transport.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use commlib_core::{
    Arrival, Connection, Delivery, ErrorKind, Gap, GapCause, ListenOptions, Malformed,
    MemoryConfig, MessageHandler, Node, PubSub, Received, Rpc, RpcClientOptions, RpcContext,
    RpcError, RpcHandler, RpcServiceOptions, SendOptions, Source, SubscriberOptions, Target, Value,
    json,
};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc};

#[derive(Debug, Serialize, Deserialize, PartialEq)]
struct Add {
    a: i64,
    b: i64,
}

#[derive(Debug, Serialize, Deserialize, PartialEq)]
struct Sum {
    c: i64,
}

async fn memory(name: &str) -> Connection {
    MemoryConfig::new(format!("endpoints-{name}"))
        .connect()
        .await
        .unwrap()
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), future)
        .await
        .expect("took longer than 10 s")
}

#[tokio::test]
async fn call_and_errors() {
    let connection = memory("call").await;
    let service = connection
        .rpc_service("math.add", |q: Add| async move {
            if q.a < 0 {
                return Err(RpcError::new("negative", "no negatives").with_data(json!({"a": q.a})));
            }
            let doubled: i64 = "2".parse()?;
            Ok(Sum {
                c: q.a + q.b + doubled - 2,
            })
        })
        .await
        .unwrap();
    let add = connection.rpc_client::<Add, Sum>("math.add").unwrap();
    assert_eq!(add.call(&Add { a: 40, b: 2 }).await.unwrap(), Sum { c: 42 });

    let error = add.call(&Add { a: -1, b: 0 }).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Remote);
    let remote = error.remote().unwrap();
    assert_eq!(
        (&*remote.code, &remote.data),
        ("negative", &Some(json!({"a": -1})))
    );
    assert_eq!(
        error.to_string(),
        "call to `math.add`: negative: no negatives"
    );

    let odd = connection.rpc_client::<Value, Value>("math.add").unwrap();
    let error = odd.call(&json!({"a": "x"})).await.unwrap_err();
    assert_eq!(error.remote().unwrap().code, RpcError::BAD_REQUEST);

    let wrong = connection.rpc_client::<Add, String>("math.add").unwrap();
    let error = wrong.call(&Add { a: 1, b: 1 }).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Decode);

    service.stop().await;
    let error = add.call(&Add { a: 1, b: 1 }).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoService);
}

#[tokio::test]
async fn panics_and_blocking_handlers() {
    let connection = memory("panics").await;
    connection
        .rpc_service("boom", |q: i64| async move {
            assert!(q != 13, "unlucky {q}");
            Ok(q)
        })
        .await
        .unwrap()
        .detach();
    connection
        .rpc_service_blocking("slow", |q: i64| {
            std::thread::sleep(Duration::from_millis(5));
            Ok(q + 1)
        })
        .await
        .unwrap()
        .detach();
    let boom = connection.rpc_client::<i64, i64>("boom").unwrap();
    let error = boom.call(&13).await.unwrap_err();
    assert_eq!(error.remote().unwrap().code, RpcError::PANIC);
    assert!(error.to_string().contains("unlucky 13"), "{error}");
    assert_eq!(boom.call(&1).await.unwrap(), 1);
    let slow = connection.rpc_client::<i64, i64>("slow").unwrap();
    assert_eq!(slow.call(&1).await.unwrap(), 2);
}

#[tokio::test]
async fn server_serves_its_methods_and_stops_them_together() {
    let connection = memory("server").await;
    let server = connection
        .rpc_server("math")
        .unwrap()
        .method("negate", |q: i64| async move { Ok(-q) })
        .method_blocking("double", |q: i64| Ok(q * 2))
        .start()
        .await
        .unwrap();
    let negate = connection.rpc_client::<i64, i64>("math.negate").unwrap();
    let double = connection.rpc_client::<i64, i64>("math.double").unwrap();
    assert_eq!(
        (
            negate.call(&4).await.unwrap(),
            double.call(&4).await.unwrap()
        ),
        (-4, 8)
    );
    server.stop().await;
    assert_eq!(
        negate.call(&4).await.unwrap_err().kind(),
        ErrorKind::NoService
    );
    let bad = connection
        .rpc_server("math")
        .unwrap()
        .method("no way", |q: i64| async move { Ok(q) });
    assert_eq!(
        bad.start().await.unwrap_err().kind(),
        ErrorKind::InvalidAddress
    );
}

#[tokio::test]
async fn handler_types_see_the_context() {
    struct Echo;
    impl RpcHandler<Value> for Echo {
        type Response = Value;
        async fn handle(&self, _: Value, context: RpcContext) -> Result<Value, RpcError> {
            Ok(json!({
                "service": context.service.as_str(),
                "remaining": context.remaining().is_some_and(|left| left <= Duration::from_secs(7)),
                "sender": context.header.sender.as_deref(),
            }))
        }
    }
    let connection = memory("context").await;
    connection.rpc_service("echo", Echo).await.unwrap().detach();
    let options = RpcClientOptions::default().timeout(Duration::from_secs(7));
    let echo = connection
        .rpc_client_with::<Value, Value>("echo", options)
        .unwrap();
    let reply = echo.call(&json!(null)).await.unwrap();
    let sender = connection.sender_id();
    assert_eq!(
        reply,
        json!({"service": "echo", "remaining": true, "sender": sender})
    );
}

#[tokio::test(start_paused = true)]
async fn timeouts_and_requests_that_waited_too_long() {
    let connection = memory("timeout").await;
    let (started, mut starts) = mpsc::unbounded_channel();
    let go = Arc::new(Notify::new());
    let gate = go.clone();
    let options = RpcServiceOptions::default().concurrency(1).queue_limit(1);
    connection
        .rpc_service_with("slow", options, move |q: i64| {
            let (gate, started) = (gate.clone(), started.clone());
            async move {
                started.send(q).unwrap();
                gate.notified().await;
                Ok(q)
            }
        })
        .await
        .unwrap()
        .detach();
    let slow = Arc::new(connection.rpc_client::<i64, i64>("slow").unwrap());
    let call = |q: i64, seconds: u64| {
        let slow = slow.clone();
        tokio::spawn(async move { slow.call_within(&q, Duration::from_secs(seconds)).await })
    };
    let first = call(1, 60);
    assert_eq!(starts.recv().await, Some(1));
    // Waits its turn for longer than its caller does: answered, never run.
    let second = call(2, 5);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let third = call(3, 60).await.unwrap().unwrap_err();
    assert_eq!(third.remote().unwrap().code, RpcError::OVERLOADED);
    let error = second.await.unwrap().unwrap_err();
    assert!(error.is_timeout() && error.maybe_executed());
    assert_eq!(error.to_string(), "call to `slow`: no reply within 5s");
    go.notify_one();
    assert_eq!(first.await.unwrap().unwrap(), 1);
    let fourth = call(4, 60);
    assert_eq!(starts.recv().await, Some(4), "2 was never run");
    go.notify_one();
    assert_eq!(fourth.await.unwrap().unwrap(), 4);
}

/// A request of a peer whose clock is ten years off, straight through the transport.
#[tokio::test]
async fn peer_clocks_do_not_matter() {
    let connection = memory("clocks").await;
    connection
        .rpc_service("echo", |q: Value| async move { Ok(q) })
        .await
        .unwrap()
        .detach();
    let transport = connection.transport();
    let mut replies = transport
        .listen(&Source::Replies, ListenOptions::default())
        .await
        .unwrap();
    let ten_years = 10 * 365 * 86_400 * 1_000_000_000_u64;
    let mut message = commlib_core::Message::new("5");
    let now = message.header.timestamp.unwrap();
    for timestamp in [now - ten_years, now + ten_years] {
        let lease = replies.lease().unwrap();
        message.header.timestamp = Some(timestamp);
        message.header.timeout_ms = Some(50);
        message.header.reply_to = Some(commlib_core::ReplyTo {
            address: lease.address.clone(),
            correlation_id: None,
            form: commlib_core::Dialect::Envelope,
        });
        let target = Target::Queue("echo".parse().unwrap());
        drop(
            transport
                .send(&target, message.clone(), SendOptions::default())
                .await
                .unwrap(),
        );
        let Some(commlib_core::Incoming::Message(Arrival { message: reply, .. })) =
            within(replies.recv()).await
        else {
            panic!("no reply");
        };
        assert_eq!((&reply.data[..], reply.header.error), (&b"5"[..], None));
    }
}

#[tokio::test]
async fn a_request_that_comes_twice_runs_once() {
    let connection = memory("twice").await;
    let runs = Arc::new(AtomicUsize::new(0));
    let counter = runs.clone();
    connection
        .rpc_service("count", move |_: Value| {
            let counter = counter.clone();
            async move { Ok(counter.fetch_add(1, Ordering::SeqCst)) }
        })
        .await
        .unwrap()
        .detach();
    let transport = connection.transport();
    let mut replies = transport
        .listen(&Source::Replies, ListenOptions::default())
        .await
        .unwrap();
    let lease = replies.lease().unwrap();
    let mut request = commlib_core::Message::new("null");
    request.header.sender = Some("peer".into());
    request.header.message_id = Some("1".into());
    request.header.reply_to = Some(commlib_core::ReplyTo {
        address: lease.address.clone(),
        correlation_id: None,
        form: commlib_core::Dialect::Envelope,
    });
    let target = Target::Queue("count".parse().unwrap());
    for _ in 0..3 {
        drop(
            transport
                .send(&target, request.clone(), SendOptions::default())
                .await
                .unwrap(),
        );
        let Some(commlib_core::Incoming::Message(reply)) = within(replies.recv()).await else {
            panic!("no reply");
        };
        assert_eq!(&reply.message.data[..], b"0");
    }
    assert_eq!(runs.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn stream_goes_on_after_bad_input_and_carries_gaps() {
    let connection = memory("stream").await;
    let mut numbers = connection.subscriber::<i64>("n.*").await.unwrap();
    let publisher = connection.multi_publisher::<Value>().unwrap();
    publisher.publish("n.a", &json!(1)).await.unwrap();
    publisher.publish("n.a", &json!("one")).await.unwrap();
    // A message that never arrives: its number is missing.
    let mut lost = commlib_core::Message::new("7");
    lost.header.sender = Some(connection.sender_id().into());
    lost.header.seq = Some(6);
    let topic = Target::Topic("n.a".parse().unwrap());
    drop(
        connection
            .transport()
            .send(&topic, lost, SendOptions::default())
            .await
            .unwrap(),
    );

    assert_eq!(numbers.next().await.unwrap().unwrap().data, 1);
    let error = numbers.next().await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Decode);
    assert!(
        error.to_string().starts_with("message on `n.a`:"),
        "{error}"
    );
    let received = numbers.next().await.unwrap().unwrap();
    assert_eq!(received.data, 7);
    assert_eq!(
        received.gap,
        Some(Gap::new(GapCause::SequenceJump, Some(3)))
    );
    connection.close().await.unwrap();
    assert!(numbers.next().await.is_none());
}

#[tokio::test]
async fn handlers_get_messages_gaps_and_malformed() {
    struct Collect(mpsc::UnboundedSender<String>);
    impl MessageHandler<i64> for Collect {
        async fn handle(&self, message: Received<i64>) -> Result<(), String> {
            self.0
                .send(format!("{}", message.data))
                .map_err(|e| e.to_string())
        }
        fn on_gap(&self, gap: Gap) {
            drop(self.0.send(format!("gap {:?}", gap.missed)));
        }
        fn on_malformed(&self, malformed: Malformed) {
            drop(self.0.send(format!("malformed {}", malformed.name)));
        }
    }
    let connection = memory("handlers").await;
    let (sender, mut seen) = mpsc::unbounded_channel();
    let handle = connection
        .subscriber::<i64>("n")
        .await
        .unwrap()
        .on_message(Collect(sender));
    let publisher = connection.publisher::<Value>("n").unwrap();
    for value in [json!(1), json!("x"), json!(3)] {
        publisher.publish(&value).await.unwrap();
    }
    for expected in ["1", "malformed n", "3"] {
        assert_eq!(within(seen.recv()).await.as_deref(), Some(expected));
    }
    handle.stop().await;
    assert!(
        seen.recv().await.is_none(),
        "the handler is dropped with its loop"
    );
}

#[tokio::test]
async fn at_least_once_comes_again_after_a_failure_and_dedup_drops_only_what_was_done() {
    let connection = memory("acks").await;
    let options = SubscriberOptions::default()
        .delivery(Delivery::AtLeastOnce)
        .prefetch(1)
        .dedup(16);
    let (sender, mut seen) = mpsc::unbounded_channel();
    let tries = Arc::new(AtomicUsize::new(0));
    let _handle = connection
        .subscriber_with::<i64>("n", options)
        .await
        .unwrap()
        .on_message(move |message: Received<i64>| {
            let (sender, tries) = (sender.clone(), tries.clone());
            async move {
                let attempt = tries.fetch_add(1, Ordering::SeqCst);
                sender.send((message.data, attempt)).unwrap();
                match attempt {
                    0 => Err("not yet"),
                    1 => panic!("not now"),
                    _ => Ok(()),
                }
            }
        });
    let publisher = connection.publisher::<i64>("n").unwrap();
    publisher.publish(&1).await.unwrap();
    publisher.publish(&2).await.unwrap();
    for expected in [(1, 0), (1, 1), (1, 2), (2, 3)] {
        assert_eq!(within(seen.recv()).await, Some(expected));
    }
}

#[tokio::test]
async fn a_durable_subscription_keeps_messages_and_what_was_not_acknowledged() {
    let connection = memory("durable").await;
    let options = || {
        SubscriberOptions::default()
            .delivery(Delivery::AtLeastOnce)
            .durable("sub-1")
    };
    let mut subscriber = connection
        .subscriber_with::<i64>("n", options())
        .await
        .unwrap();
    assert!(subscriber.guarantee().durable);
    let publisher = connection.publisher::<i64>("n").unwrap();
    for n in 1..=3 {
        publisher.publish(&n).await.unwrap();
    }
    assert_eq!(subscriber.recv().await.unwrap().unwrap().data, 1);
    // Asking for 2 acknowledges 1; 2 is never acknowledged.
    assert_eq!(subscriber.recv().await.unwrap().unwrap().data, 2);
    drop(subscriber);
    publisher.publish(&4).await.unwrap();
    let mut again = connection
        .subscriber_with::<i64>("n", options())
        .await
        .unwrap();
    for n in 2..=4 {
        assert_eq!(within(again.recv()).await.unwrap().unwrap().data, n);
    }
    let refused = connection
        .subscriber_with::<i64>("n", options())
        .await
        .unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Broker);
    let best_effort = SubscriberOptions::default().durable("x");
    let refused = connection
        .subscriber_with::<i64>("n", best_effort)
        .await
        .unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
}

#[tokio::test]
async fn node_prefixes_names_and_shutdown_waits_for_handlers() {
    let observer = memory("node").await;
    let node = Node::builder("robot-7")
        .namespace("robots.r7")
        .device_id("arm-1")
        .start(memory("node").await)
        .await
        .unwrap();
    assert_eq!(
        (node.name().as_str(), node.device_id()),
        ("robot-7", Some("arm-1"))
    );
    assert_eq!(
        node.publisher::<i64>(".alarms").unwrap().topic().as_str(),
        "alarms"
    );
    let (started, mut starts) = mpsc::unbounded_channel();
    let gate = Arc::new(Notify::new());
    let go = gate.clone();
    node.rpc_service("move", move |q: i64| {
        let (gate, started) = (gate.clone(), started.clone());
        async move {
            started.send(()).unwrap();
            gate.notified().await;
            Ok(q)
        }
    })
    .await
    .unwrap()
    .detach();
    let client = observer.rpc_client::<i64, i64>("robots.r7.move").unwrap();
    let call = tokio::spawn(async move { client.call(&5).await });
    starts.recv().await.unwrap();
    let shutdown = tokio::spawn(node.shutdown(Duration::from_secs(10)));
    tokio::task::yield_now().await;
    assert!(!shutdown.is_finished());
    go.notify_one();
    assert_eq!(within(call).await.unwrap().unwrap(), 5);
    within(shutdown).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn shutdown_has_a_limit_and_dropping_a_node_aborts() {
    let connection = memory("limit").await;
    let hang = |_: Value| std::future::pending::<Result<Value, RpcError>>();
    let node = Node::builder("stuck")
        .start(memory("limit").await)
        .await
        .unwrap();
    node.rpc_service("hang", hang).await.unwrap().detach();
    let client = Arc::new(connection.rpc_client::<Value, Value>("hang").unwrap());
    let caller = client.clone();
    let call = tokio::spawn(async move { caller.call(&json!(1)).await });
    tokio::time::sleep(Duration::from_millis(10)).await;
    let error = node.shutdown(Duration::from_secs(2)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(
        error.to_string().contains("1 endpoints still ran"),
        "{error}"
    );
    call.abort();

    let node = Node::builder("")
        .start(memory("limit").await)
        .await
        .unwrap();
    node.rpc_service("hang", hang).await.unwrap().detach();
    drop(node);
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(
        client.call(&json!(1)).await.unwrap_err().kind(),
        ErrorKind::NoService
    );
}

#[tokio::test]
async fn a_lost_link_fails_calls_in_flight_at_once() {
    let name = "endpoints-lost";
    let connection = MemoryConfig::new(name).connect().await.unwrap();
    let broker = commlib_core::MemoryBroker::named(name, connection.link().capabilities());
    let (started, mut starts) = mpsc::unbounded_channel();
    connection
        .rpc_service("hang", move |_: Value| {
            started.send(()).unwrap();
            std::future::pending::<Result<Value, RpcError>>()
        })
        .await
        .unwrap()
        .detach();
    let client = connection.rpc_client::<Value, Value>("hang").unwrap();
    let call = tokio::spawn(async move { client.call(&json!(1)).await });
    starts.recv().await.unwrap();
    let mut numbers = connection.subscriber::<i64>("n").await.unwrap();
    broker.stop();
    let error = within(call).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionLost);
    assert!(error.maybe_executed());
    let mut watch = connection.link().watch();
    within(watch.wait_for(|state| !state.is_connected()))
        .await
        .unwrap();
    let error = connection
        .publisher::<i64>("n")
        .unwrap()
        .publish(&1)
        .await
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.maybe_executed()),
        (ErrorKind::ConnectionLost, false)
    );
    broker.start(true);
    within(connection.connected()).await.unwrap();
    connection
        .publisher::<i64>("n")
        .unwrap()
        .publish(&2)
        .await
        .unwrap();
    let received = within(numbers.recv()).await.unwrap().unwrap();
    assert_eq!(
        (received.data, received.gap),
        (2, Some(Gap::new(GapCause::LinkLost, None)))
    );
}

#[tokio::test]
async fn dropping_the_last_handle_ends_the_link() {
    let name = "endpoints-drop";
    let connection = MemoryConfig::new(name).connect().await.unwrap();
    let capabilities = connection.link().capabilities().clone();
    let broker = Arc::downgrade(&commlib_core::MemoryBroker::named(name, &capabilities));
    let service = connection
        .rpc_service("echo", |q: Value| async move { Ok(q) })
        .await
        .unwrap();
    let echo = connection.rpc_client::<Value, Value>("echo").unwrap();
    echo.call(&json!(1)).await.unwrap();
    drop((connection, echo));
    assert!(broker.upgrade().is_some(), "the service still needs it");
    service.stop().await;
    within(async {
        while broker.upgrade().is_some() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
