//! Endpoints on the in-memory broker: what is about their own API rather than about a transport.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use commlib_core::{
    Arrival, Connection, Delivery, ErrorKind, Gap, GapCause, ListenOptions, Malformed,
    MemoryConfig, MessageHandler, Node, PubSub, PublisherOptions, Received, Rpc, RpcClientOptions,
    RpcContext, RpcError, RpcHandler, RpcServiceOptions, SendOptions, Source, SubscriberOptions,
    Target, Value, json,
};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
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
        let lease = replies
            .lease(&commlib_core::Name::new("service").unwrap())
            .unwrap();
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
    let lease = replies
        .lease(&commlib_core::Name::new("service").unwrap())
        .unwrap();
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

/// A handler that says when it starts, waits to be let go, and says when it has ended.
fn gated(
    gate: Arc<Notify>,
) -> (
    impl Fn() -> BoxFuture<'static, ()>,
    mpsc::UnboundedReceiver<&'static str>,
) {
    let (sender, seen) = mpsc::unbounded_channel();
    let run = move || {
        let (gate, sender) = (gate.clone(), sender.clone());
        async move {
            sender.send("started").unwrap();
            gate.notified().await;
            sender.send("ended").unwrap();
        }
        .boxed()
    };
    (run, seen)
}

#[tokio::test]
async fn stopping_waits_for_handlers_even_if_the_subscriber_was_the_last_to_hold_the_connection() {
    let connection = memory("last-holder").await;
    let gate = Arc::new(Notify::new());
    let (run, mut seen) = gated(gate.clone());
    let handle = connection
        .subscriber::<i64>("n")
        .await
        .unwrap()
        .on_message(move |_: Received<i64>| run());
    connection
        .publisher::<i64>("n")
        .unwrap()
        .publish(&1)
        .await
        .unwrap();
    assert_eq!(within(seen.recv()).await, Some("started"));
    drop(connection);
    let stop = tokio::spawn(handle.stop());
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!stop.is_finished());
    gate.notify_one();
    within(stop).await.unwrap();
    assert_eq!(seen.recv().await, Some("ended"));
}

#[tokio::test]
async fn a_stopped_server_takes_no_calls_while_a_handler_runs_on() {
    let connection = memory("server-stop").await;
    let gate = Arc::new(Notify::new());
    let (run, mut seen) = gated(gate.clone());
    let server = connection
        .rpc_server("s")
        .unwrap()
        .method("slow", move |_: i64| {
            let run = run();
            async move {
                run.await;
                Ok(1)
            }
        })
        .method("quick", |_: i64| async move { Ok(2) })
        .start()
        .await
        .unwrap();
    let slow = connection.rpc_client::<i64, i64>("s.slow").unwrap();
    let slow = tokio::spawn(async move { slow.call(&0).await });
    assert_eq!(within(seen.recv()).await, Some("started"));
    let stop = tokio::spawn(server.stop());
    tokio::time::sleep(Duration::from_millis(20)).await;
    let quick = connection.rpc_client::<i64, i64>("s.quick").unwrap();
    let refused = within(quick.call(&0)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NoService);
    gate.notify_one();
    assert_eq!(within(slow).await.unwrap().unwrap(), 1);
    within(stop).await.unwrap();
}

#[tokio::test]
async fn a_server_of_a_node_ends_with_its_connection() {
    let node = Node::builder("n")
        .start(memory("server-end").await)
        .await
        .unwrap();
    let server = node.rpc_server("s").unwrap();
    let server = server.method("a", |q: i64| async move { Ok(q) });
    let server = server.start().await.unwrap();
    node.connection().close().await.unwrap();
    within(async {
        while !server.is_finished() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_handler_takes_over_where_the_stream_stopped() {
    let connection = memory("take-over").await;
    let options = SubscriberOptions::default()
        .delivery(Delivery::AtLeastOnce)
        .prefetch(1);
    let mut subscriber = connection
        .subscriber_with::<i64>("n", options)
        .await
        .unwrap();
    let publisher = connection.publisher::<i64>("n").unwrap();
    publisher.publish(&1).await.unwrap();
    publisher.publish(&2).await.unwrap();
    assert_eq!(subscriber.recv().await.unwrap().unwrap().data, 1);
    let (sender, mut seen) = mpsc::unbounded_channel();
    let _handle = subscriber.on_message(move |message: Received<i64>| {
        let sent = sender.send(message.data);
        async move { sent.map_err(|e| e.to_string()) }
    });
    assert_eq!(within(seen.recv()).await, Some(2));
}

#[tokio::test]
async fn a_gap_is_told_whatever_takes_the_next_message() {
    let name = "endpoints-gap-told";
    let connection = MemoryConfig::new(name).connect().await.unwrap();
    let broker = commlib_core::MemoryBroker::named(name, connection.link().capabilities());
    let mut numbers = connection.subscriber::<i64>("n").await.unwrap();
    broker.stop();
    broker.start(true);
    let waiting = tokio::time::timeout(Duration::from_millis(5), numbers.recv());
    assert!(waiting.await.is_err());
    let Some(commlib_core::Incoming::Gap(gap)) = within(numbers.recv_incoming()).await else {
        panic!("expected a gap");
    };
    assert_eq!(gap.cause, GapCause::LinkLost);
}

#[tokio::test]
async fn a_handler_survives_its_own_panic_over_a_notice() {
    struct Touchy(mpsc::UnboundedSender<i64>);
    impl MessageHandler<i64> for Touchy {
        async fn handle(&self, message: Received<i64>) -> Result<(), String> {
            self.0.send(message.data).map_err(|e| e.to_string())
        }
        fn on_malformed(&self, _: Malformed) {
            panic!("did not expect that");
        }
    }
    let connection = memory("touchy").await;
    let (sender, mut seen) = mpsc::unbounded_channel();
    let subscriber = connection.subscriber::<i64>("n").await.unwrap();
    let _handle = subscriber.on_message(Touchy(sender));
    let publisher = connection.publisher::<Value>("n").unwrap();
    publisher.publish(&json!("x")).await.unwrap();
    publisher.publish(&json!(1)).await.unwrap();
    assert_eq!(within(seen.recv()).await, Some(1));
}

#[tokio::test]
async fn the_longest_durations_and_limits_do_not_overflow() {
    let connection = memory("longest").await;
    let options = RpcServiceOptions::default()
        .concurrency(usize::MAX)
        .queue_limit(usize::MAX);
    let node = Node::builder("n").start(connection.clone()).await.unwrap();
    node.rpc_service_with("echo", options, |q: i64| async move { Ok(q) })
        .await
        .unwrap()
        .detach();
    let echo = connection.rpc_client::<i64, i64>("echo").unwrap();
    assert_eq!(echo.call_within(&1, Duration::MAX).await.unwrap(), 1);
    let target = Target::Topic("n".parse().unwrap());
    let options = SendOptions::default()
        .delivery(Delivery::AtLeastOnce)
        .timeout(Duration::MAX);
    let message = commlib_core::Message::new("1");
    let sent = connection.transport().send(&target, message, options);
    sent.await.unwrap().await.unwrap();
    node.shutdown(Duration::MAX).await.unwrap();
}

#[tokio::test]
async fn absurd_counts_of_foreign_senders_do_no_harm() {
    let connection = memory("absurd").await;
    let mut numbers = connection.subscriber::<i64>("n").await.unwrap();
    let topic = Target::Topic("n".parse().unwrap());
    // Two gaps with nothing readable between them.
    for seq in [5, u64::MAX] {
        for sender in ["c", "d"] {
            let mut message = commlib_core::Message::new("\"x\"");
            message.header.sender = Some(sender.into());
            message.header.seq = Some(seq);
            let sent = connection
                .transport()
                .send(&topic, message, SendOptions::default());
            drop(sent.await.unwrap());
        }
    }
    for _ in 0..4 {
        assert!(numbers.recv().await.unwrap().is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn an_at_least_once_publish_waits_for_the_broker_without_spinning() {
    let name = "endpoints-wait-up";
    let connection = MemoryConfig::new(name).connect().await.unwrap();
    let broker = commlib_core::MemoryBroker::named(name, connection.link().capabilities());
    broker.stop();
    let mut watch = connection.link().watch();
    within(watch.wait_for(|state| !state.is_connected()))
        .await
        .unwrap();
    let target = Target::Topic("n".parse().unwrap());
    let options = SendOptions::default().delivery(Delivery::AtLeastOnce);
    let message = commlib_core::Message::new("1");
    let limited = options.clone().timeout(Duration::from_secs(5));
    let sent = connection
        .transport()
        .send(&target, message.clone(), limited);
    // The limit on polls stands for a time limit, which a future that is always ready again would never see.
    let mut sent = std::pin::pin!(sent);
    let mut polls = 0;
    let error = std::future::poll_fn(|context| {
        polls += 1;
        assert!(polls < 50, "it spins");
        sent.as_mut().poll(context)
    })
    .await
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    let sent = connection.transport().send(&target, message, options);
    let (sent, ()) = tokio::join!(sent, async {
        tokio::time::sleep(Duration::from_secs(3600)).await;
        broker.start(true);
    });
    sent.unwrap().await.unwrap();
}

#[tokio::test]
async fn closing_ends_a_publish_that_waits_for_room() {
    let connection = memory("room").await;
    let options = SubscriberOptions::default()
        .delivery(Delivery::AtLeastOnce)
        .prefetch(1);
    let _nobody_reads = memory("room")
        .await
        .subscriber_with::<i64>("n", options)
        .await
        .unwrap();
    let options = PublisherOptions::default().delivery(Delivery::AtLeastOnce);
    let publisher = connection.publisher_with::<i64>("n", options).unwrap();
    let filling = async {
        loop {
            if let Err(error) = publisher.publish(&1).await {
                return error;
            }
        }
    };
    let closing = async {
        // By then the other has filled the subscription and waits.
        tokio::time::sleep(Duration::from_millis(500)).await;
        connection.close().await.unwrap();
    };
    let (error, ()) = within(async { tokio::join!(filling, closing) }).await;
    assert_eq!(error.kind(), ErrorKind::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_was_never_sent_was_never_executed() {
    #[derive(Debug)]
    struct Offline(commlib_core::Link);
    #[async_trait::async_trait]
    impl commlib_core::Transport for Offline {
        fn link(&self) -> &commlib_core::Link {
            &self.0
        }
        async fn send(
            &self,
            _: &Target,
            _: commlib_core::Message,
            _: SendOptions,
        ) -> commlib_core::Result<commlib_core::Receipt> {
            unreachable!("nothing can be sent")
        }
        async fn listen(
            &self,
            _: &Source,
            _: ListenOptions,
        ) -> commlib_core::Result<commlib_core::Inbox> {
            std::future::pending().await
        }
        async fn close(&self) -> commlib_core::Result<()> {
            Ok(())
        }
    }
    let (link, _state) = commlib_core::Link::new("none:", commlib_core::Capabilities::default());
    let connection = Connection::new(Offline(link));
    let client = connection.rpc_client::<i64, i64>("s").unwrap();
    let error = client.call(&1).await.unwrap_err();
    assert!(error.is_timeout() && !error.maybe_executed(), "{error:?}");
}

/// Requests that come while a service stops are answered or refused, never left to time out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_is_left_without_an_answer_when_a_service_stops() {
    let connection = memory("stop-race").await;
    for _ in 0..200 {
        let service = connection
            .rpc_service("echo", |q: i64| async move { Ok(q) })
            .await
            .unwrap();
        let client = connection.rpc_client::<i64, i64>("echo").unwrap();
        let calls = tokio::spawn(async move {
            loop {
                match client.call_within(&1, Duration::from_secs(2)).await {
                    Ok(_) => {}
                    Err(error) => return error,
                }
            }
        });
        tokio::time::sleep(Duration::from_micros(200)).await;
        service.stop().await;
        let error = within(calls).await.unwrap();
        assert!(!error.is_timeout(), "{error}");
    }
}

#[test]
fn what_users_hold_may_be_kept_shared_and_printed() {
    fn held<T: std::fmt::Debug + Send + Sync + 'static>() {}
    fn cloned<T: Clone>() {}
    held::<Connection>();
    held::<Node>();
    held::<commlib_core::Publisher<std::cell::Cell<i64>>>();
    held::<commlib_core::MultiPublisher<std::cell::Cell<i64>>>();
    held::<commlib_core::Subscriber<std::cell::Cell<i64>>>();
    held::<Received<i64>>();
    held::<commlib_core::RpcClient<std::cell::Cell<i64>, std::cell::Cell<i64>>>();
    held::<commlib_core::RpcServer>();
    held::<commlib_core::Handle>();
    held::<commlib_core::Receipt>();
    held::<commlib_core::Ack>();
    held::<commlib_core::Inbox>();
    held::<commlib_core::InboxSender>();
    held::<commlib_core::Incoming>();
    held::<commlib_core::Error>();
    held::<commlib_core::Leases>();
    held::<commlib_core::ReplyLease>();
    held::<commlib_core::MemoryTransport>();
    held::<commlib_core::MemoryBroker>();
    held::<commlib_core::BrokerUrl>();
    cloned::<Connection>();
    cloned::<commlib_core::Publisher<std::cell::Cell<i64>>>();
    cloned::<commlib_core::MultiPublisher<std::cell::Cell<i64>>>();
    cloned::<commlib_core::RpcClient<std::cell::Cell<i64>, std::cell::Cell<i64>>>();
}
