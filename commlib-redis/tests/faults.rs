//! What goes wrong with servers and links, against a real Redis. One test for each trap that Redis clients fall into.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is how a test fails"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::time::Duration;

use commlib_core::{
    Connection, Delivery, Dialect, ErrorKind, GapCause, Incoming, LinkState, ListenOptions,
    Message, Name, PubSub, Publisher, PublisherOptions, Rpc, RpcClient, SendOptions, Source,
    Subscriber, SubscriberOptions, Target, Transport, Value, json,
};
use commlib_redis::{Protocol, RedisConfig, RedisTransport};
use commlib_testkit::{Proxy, Redis};
use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep};

/// A server, if there is one.
macro_rules! server {
    () => {
        server!(Redis::builder())
    };
    ($builder:expr) => {
        match Redis::available() {
            true => $builder.start().await,
            false => return,
        }
    };
}

/// Waits for what happens soon.
#[track_caller]
fn soon<F: Future>(future: F) -> impl Future<Output = F::Output> {
    let place = std::panic::Location::caller();
    async move {
        match tokio::time::timeout(Duration::from_secs(20), future).await {
            Ok(output) => output,
            Err(_) => panic!("{place}: waited in vain"),
        }
    }
}

fn quick(address: impl Into<String>) -> RedisConfig {
    RedisConfig::new(address).keep_alive(Duration::from_secs(1))
}

async fn connect(config: RedisConfig) -> Connection {
    soon(config.connect()).await.unwrap()
}

async fn transport(config: RedisConfig) -> RedisTransport {
    soon(RedisTransport::connect(config)).await.unwrap()
}

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

async fn subscribe(on: &Connection, pattern: &str) -> Subscriber<u64> {
    soon(on.subscriber(pattern)).await.unwrap()
}

async fn surely(on: &Connection, topic: &str, durable: Option<&str>) -> Subscriber<u64> {
    let mut options = SubscriberOptions::default().delivery(Delivery::AtLeastOnce);
    if let Some(durable) = durable {
        options = options.durable(durable);
    }
    soon(on.subscriber_with(topic, options)).await.unwrap()
}

fn sure_publisher(on: &Connection, topic: &str) -> Publisher<u64> {
    let options = PublisherOptions::default().delivery(Delivery::AtLeastOnce);
    on.publisher_with(topic, options).unwrap()
}

/// The next number; gaps are skipped.
async fn number(subscriber: &mut Subscriber<u64>) -> u64 {
    soon(subscriber.recv()).await.unwrap().unwrap().data
}

async fn until_down(connection: &Connection) -> String {
    let mut states = connection.link().watch();
    let down = states.wait_for(|state| matches!(state, LinkState::Reconnecting { .. }));
    match soon(down).await.unwrap().clone() {
        LinkState::Reconnecting { cause, .. } => cause,
        _ => unreachable!(),
    }
}

async fn until_up(connection: &Connection) {
    let mut states = connection.link().watch();
    let up = states.wait_for(|state| matches!(state, LinkState::Connected { .. }));
    soon(up).await.unwrap();
}

async fn echo(on: &Connection, service: &str) {
    let handle = on.rpc_service(service, |n: u64| async move { Ok(n) });
    soon(handle).await.unwrap().detach();
}

fn client(on: &Connection, service: &str) -> RpcClient<u64, u64> {
    on.rpc_client(service).unwrap()
}

/// The next item that somebody pushes to a list.
async fn popped(server: &Redis, list: &str) -> Value {
    let popped = server.command(&["BLPOP", list, "10"]).await;
    serde_json::from_str(&popped[1]).unwrap()
}

/// Trap 2.1: a client that gives up on a blocking read after half a second, and eats what comes later. Longer than the
/// server's wait as well.
#[tokio::test]
async fn a_long_wait_for_a_request_eats_nothing() {
    let server = server!();
    let connection = connect(RedisConfig::new(server.address())).await;
    echo(&connection, "patient").await;
    let client = client(
        &connect(RedisConfig::new(server.address())).await,
        "patient",
    );
    for pause in [700, 5500] {
        assert_eq!(soon(client.call(&pause)).await.unwrap(), pause);
        sleep(Duration::from_millis(pause)).await;
    }
    assert_eq!(soon(client.call(&1)).await.unwrap(), 1);
}

/// Trap 2.2: a reader that is dropped while the server pops for it. Every request is seen exactly once by someone.
#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_service_loses_no_request() {
    const COUNT: u64 = 3000;
    let server = server!();
    let sender = transport(RedisConfig::new(server.address())).await;
    let sending = tokio::spawn(async move {
        for n in 0..COUNT {
            let target = Target::Queue(name("work"));
            let message = Message::new(n.to_string());
            let sent = sender.send(&target, message, SendOptions::default());
            sent.await.unwrap().await.unwrap();
        }
    });
    let receiver = transport(RedisConfig::new(server.address())).await;
    let source = Source::Queue(name("work"));
    let mut seen = BTreeMap::<u64, usize>::new();
    let mut rounds = 0_u64;
    while seen.len() < usize::try_from(COUNT).unwrap() {
        let mut inbox = soon(receiver.listen(&source, ListenOptions::default()))
            .await
            .unwrap();
        rounds += 1;
        // Drops most inboxes early, with requests in them and with a read under way.
        for _ in 0..rounds % 60 {
            let Some(Incoming::Message(mut arrival)) = soon(inbox.recv()).await else {
                panic!("no request");
            };
            arrival.ack.take().unwrap().accept();
            let text = std::str::from_utf8(&arrival.message.data).unwrap();
            *seen.entry(text.parse().unwrap()).or_default() += 1;
            if seen.len() == usize::try_from(COUNT).unwrap() {
                break;
            }
        }
    }
    soon(sending).await.unwrap();
    assert!(
        seen.values().all(|times| *times == 1),
        "a request was seen twice"
    );
    soon(receiver.close()).await.unwrap();
    assert_eq!(server.keys().await, [""; 0], "after {rounds} rounds");
}

/// Trap 2.3: a blocking read that everything else waits behind.
#[tokio::test]
async fn nothing_waits_behind_a_blocking_read() {
    let server = server!();
    let connection = connect(RedisConfig::new(server.address())).await;
    for n in 0..5 {
        echo(&connection, &format!("idle.{n}")).await;
    }
    let mut subscriber = subscribe(&connection, "numbers").await;
    let publisher = connection.publisher::<u64>("numbers").unwrap();
    let started = Instant::now();
    for n in 0..20 {
        publisher.publish(&n).await.unwrap();
        assert_eq!(number(&mut subscriber).await, n);
        assert_eq!(
            soon(client(&connection, "idle.3").call(&n)).await.unwrap(),
            n
        );
    }
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "{:?}",
        started.elapsed()
    );
}

/// Trap 2.4: a subscription that ends in silence when its connection is killed.
#[tokio::test]
async fn a_killed_subscription_comes_back_with_a_gap() {
    let server = server!();
    for protocol in [Protocol::Resp2, Protocol::Resp3] {
        let connection = connect(quick(server.address()).protocol(protocol)).await;
        let mut subscribers = Vec::new();
        for pattern in ["numbers.a", "numbers.*"] {
            subscribers.push(subscribe(&connection, pattern).await);
        }
        server.command(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
        until_down(&connection).await;
        until_up(&connection).await;
        let publisher = connection.publisher::<u64>("numbers.a").unwrap();
        publisher.publish(&7).await.unwrap();
        for subscriber in &mut subscribers {
            let message = soon(subscriber.recv()).await.unwrap().unwrap();
            assert_eq!(message.data, 7);
            assert_eq!(message.gap.map(|gap| gap.cause), Some(GapCause::LinkLost));
        }
    }
}

/// Trap 2.6: a reader so slow that the server cuts it off at 32 MB. The connection reads on; the slow inbox drops.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_consumer_does_not_fill_the_server() {
    let server = server!();
    let connection = connect(RedisConfig::new(server.address())).await;
    let slow =
        connection.subscriber_with::<String>("flood", SubscriberOptions::default().prefetch(8));
    let mut slow = soon(slow).await.unwrap();
    let publisher = connect(RedisConfig::new(server.address())).await;
    let publisher = publisher.publisher::<String>("flood").unwrap();
    let text = "x".repeat(100_000);
    for _ in 0..1000 {
        soon(publisher.publish(&text)).await.unwrap();
    }
    let mut fast = subscribe(&connection, "end").await;
    connection
        .publisher::<u64>("end")
        .unwrap()
        .publish(&1)
        .await
        .unwrap();
    assert_eq!(number(&mut fast).await, 1);
    let Some(Incoming::Gap(gap)) = soon(slow.recv_incoming()).await else {
        panic!("no gap");
    };
    assert_eq!(gap.cause, GapCause::SlowConsumer);
    let state = connection.link().state();
    assert_eq!(state, LinkState::Connected { resumed: false });
    assert!(!server.log().contains("closed ASAP"), "{}", server.log());
}

/// Trap 2.7: a link on which the other side is silent, not gone.
#[tokio::test]
async fn a_half_open_link_is_noticed() {
    let server = server!();
    let proxy = Proxy::start(server.address()).await;
    let connection = connect(quick(proxy.address())).await;
    echo(&connection, "echo").await;
    let mut subscriber = subscribe(&connection, "numbers").await;
    let client = client(&connection, "echo");
    assert_eq!(soon(client.call(&1)).await.unwrap(), 1);
    proxy.black_hole(true);
    let started = Instant::now();
    let error = soon(client.call_within(&2, Duration::from_secs(60)))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionLost);
    assert!(error.maybe_executed());
    let cause = until_down(&connection).await;
    assert!(cause.contains("silent for 1s"), "{cause}");
    assert!(
        started.elapsed() < Duration::from_secs(3),
        "{:?}",
        started.elapsed()
    );
    proxy.black_hole(false);
    until_up(&connection).await;
    connection
        .publisher::<u64>("numbers")
        .unwrap()
        .publish(&3)
        .await
        .unwrap();
    assert_eq!(number(&mut subscriber).await, 3);
    assert_eq!(soon(client.call(&4)).await.unwrap(), 4);
}

/// A large message takes longer than the keep-alive on a slow link, and bytes that flow are a sign of life.
#[tokio::test]
async fn a_slow_link_is_not_taken_for_a_dead_one() {
    let server = server!();
    let proxy = Proxy::start(server.address()).await;
    let connection = connect(quick(proxy.address())).await;
    let mut subscriber = soon(connection.subscriber::<String>("large"))
        .await
        .unwrap();
    proxy.throttle(Some(100_000));
    let text = "x".repeat(300_000);
    let publisher = connect(RedisConfig::new(server.address())).await;
    publisher
        .publisher::<String>("large")
        .unwrap()
        .publish(&text)
        .await
        .unwrap();
    assert_eq!(soon(subscriber.recv()).await.unwrap().unwrap().data, text);
    assert!(connection.link().state().is_connected());
}

/// Trap 2.8: at-least-once messages that vanish with the server, or are sent twice by two owners.
#[tokio::test]
async fn fifty_of_fifty_survive_a_killed_server() {
    for durable in [None, Some("keeper")] {
        let server = server!();
        let config = quick(server.address()).streams(true);
        let receiver = connect(config.clone()).await;
        let mut subscriber = surely(&receiver, "numbers", durable).await;
        let sender = connect(config).await;
        let publisher = sure_publisher(&sender, "numbers");
        // A stopped server confirms nothing, so these are in flight when it dies; the rest never saw a link.
        server.pause();
        let mut receipts = Vec::new();
        for n in 0..25 {
            receipts.push(soon(publisher.enqueue(&n)).await.unwrap());
        }
        server.kill9();
        until_down(&sender).await;
        for n in 25..50 {
            receipts.push(soon(publisher.enqueue(&n)).await.unwrap());
        }
        server.restart().await;
        for receipt in receipts {
            soon(receipt).await.unwrap();
        }
        let mut seen = BTreeSet::new();
        let mut order = Vec::new();
        while order.len() < 50 {
            let n = number(&mut subscriber).await;
            if seen.insert(n) {
                order.push(n);
            }
        }
        assert!(order.is_sorted(), "{order:?}");
    }
}

/// Messages that were read and not acknowledged come again in the next life, and acknowledged ones do not.
#[tokio::test]
async fn a_restarted_subscriber_finds_what_it_had_not_done() {
    let server = server!();
    let config = quick(server.address()).streams(true);
    let first = connect(config.clone()).await;
    let mut subscriber = surely(&first, "numbers", Some("keeper")).await;
    let publisher = sure_publisher(&connect(config.clone()).await, "numbers");
    for n in 0..4 {
        soon(publisher.publish(&n)).await.unwrap();
    }
    assert_eq!(number(&mut subscriber).await, 0);
    assert_eq!(number(&mut subscriber).await, 1);
    // The server dies before it is told of more than the first, and so does the subscriber.
    server.kill9();
    drop((subscriber, first));
    server.restart().await;
    let second = connect(config).await;
    let mut subscriber = surely(&second, "numbers", Some("keeper")).await;
    let mut all = Vec::new();
    while all.last() != Some(&3) {
        all.push(number(&mut subscriber).await);
    }
    assert!(all == [1, 2, 3] || all == [0, 1, 2, 3], "{all:?}");
}

/// A server that has lost its data: subscribers are told, and go on.
#[tokio::test]
async fn lost_data_shows_as_a_gap() {
    let server = server!();
    let config = quick(server.address()).streams(true);
    for durable in [None, Some("keeper")] {
        let connection = connect(config.clone()).await;
        let mut subscriber = surely(&connection, "numbers", durable).await;
        let publisher = sure_publisher(&connection, "numbers");
        soon(publisher.publish(&1)).await.unwrap();
        assert_eq!(number(&mut subscriber).await, 1);
        server.kill9();
        until_down(&connection).await;
        let receipt = soon(publisher.enqueue(&2)).await.unwrap();
        server.restart_without_data().await;
        soon(receipt).await.unwrap();
        let message = soon(subscriber.recv()).await.unwrap().unwrap();
        assert_eq!(
            (message.data, message.gap.map(|gap| gap.cause)),
            (2, Some(GapCause::LinkLost))
        );
        assert_eq!(
            connection.link().state(),
            LinkState::Connected { resumed: false }
        );
        soon(connection.close()).await.unwrap();
    }
}

/// A link that was only cut: nothing is missed, and the state says so.
#[tokio::test]
async fn a_cut_link_is_resumed() {
    let server = server!();
    let proxy = Proxy::start(server.address()).await;
    let connection = connect(quick(proxy.address()).streams(true)).await;
    let mut kept = surely(&connection, "numbers", Some("keeper")).await;
    let mut passing = surely(&connection, "numbers", None).await;
    let publisher = connect(quick(server.address()).streams(true)).await;
    let publisher = sure_publisher(&publisher, "numbers");
    for round in 0..4 {
        soon(publisher.publish(&(2 * round))).await.unwrap();
        proxy.cut();
        until_down(&connection).await;
        soon(publisher.publish(&(2 * round + 1))).await.unwrap();
        until_up(&connection).await;
        assert_eq!(
            connection.link().state(),
            LinkState::Connected { resumed: true }
        );
    }
    for subscriber in [&mut kept, &mut passing] {
        for n in 0..8 {
            let message = soon(subscriber.recv()).await.unwrap().unwrap();
            assert_eq!((message.data, message.gap), (n, None));
        }
    }
}

/// At-least-once subscribers get each message once, whichever way it took, in every dialect.
#[tokio::test]
async fn stream_and_channel_bring_a_message_once() {
    let server = server!();
    let connection = connect(RedisConfig::new(server.address()).streams(true)).await;
    for dialect in Dialect::ALL {
        let connection = connection.clone().with_dialect(dialect);
        let mut sure = surely(&connection, "numbers", None).await;
        let mut plain = subscribe(&connection, "numbers").await;
        for n in 0..20 {
            match n % 3 {
                0 => soon(sure_publisher(&connection, "numbers").publish(&n))
                    .await
                    .unwrap(),
                1 => connection
                    .publisher("numbers")
                    .unwrap()
                    .publish(&n)
                    .await
                    .unwrap(),
                _ => drop(
                    server
                        .command(&["PUBLISH", "numbers", &n.to_string()])
                        .await,
                ),
            }
            assert_eq!(number(&mut plain).await, n, "{dialect}");
            assert_eq!(number(&mut sure).await, n, "{dialect}");
        }
    }
}

/// A message that nobody can handle is given up after five tries, with a notice, and blocks nothing.
#[tokio::test]
async fn a_poison_message_is_given_up() {
    let server = server!();
    let connection = connect(RedisConfig::new(server.address()).streams(true)).await;
    let mut subscriber = surely(&connection, "numbers", Some("keeper")).await;
    soon(sure_publisher(&connection, "numbers").publish(&1))
        .await
        .unwrap();
    for _ in 0..5 {
        let mut message = soon(subscriber.recv()).await.unwrap().unwrap();
        drop(message.take_ack());
    }
    let Some(Incoming::Gap(gap)) = soon(subscriber.recv_incoming()).await else {
        panic!("no notice");
    };
    assert_eq!((gap.cause, gap.missed), (GapCause::GivenUp, Some(1)));
    drop(subscriber);
    soon(connection.close()).await.unwrap();
    let pending = server
        .command(&["XPENDING", "commlib:stream:numbers", "keeper"])
        .await;
    assert_eq!(pending, ["0"]);
}

/// Calls that time out, are cancelled or answered late leave no key behind, whoever answers.
#[tokio::test]
async fn no_key_is_left() {
    let server = server!();
    let connection = connect(RedisConfig::new(server.address())).await;
    let short = Duration::from_millis(50);
    // Nobody serves: the request itself is taken back.
    let nobody = client(&connection, "nobody");
    let calls = (0..20).map(|_| nobody.call_within(&1, short));
    for outcome in soon(join_all(calls)).await {
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Timeout);
    }
    // A foreign service answers late, and sets no expiry.
    let late = client(&connection, "late");
    assert!(late.call_within(&1, short).await.is_err());
    let call = tokio::spawn(async move { late.call_within(&2, Duration::from_millis(300)).await });
    let request = popped(&server, "late").await;
    let address = request["header"]["reply_to"].as_str().unwrap().to_owned();
    assert!(soon(call).await.unwrap().is_err());
    server
        .command(&["RPUSH", &address, r#"{"header":{"timestamp":1},"data":2}"#])
        .await;
    // A service of ours answers after the caller was dropped.
    let slow = connection.rpc_service("slow", |n: u64| async move {
        sleep(Duration::from_millis(200)).await;
        Ok(n)
    });
    let slow_service = soon(slow).await.unwrap();
    let slow = client(&connection, "slow");
    for n in 0..3 {
        assert!(slow.call_within(&n, short).await.is_err());
    }
    assert_eq!(soon(slow.call(&9)).await.unwrap(), 9);
    let empty = async {
        // The late replies are taken from their lists within moments, but nothing tells when.
        while !server.keys().await.is_empty() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    soon(empty).await;
    drop(slow_service);
    soon(connection.close()).await.unwrap();
    assert_eq!(server.keys().await, [""; 0]);
}

/// Services that echo the correlation id share a list, others never do, and one that changes its ways is noticed.
#[tokio::test]
async fn only_echoing_services_share_a_reply_list() {
    let server = server!();
    let connection = connect(RedisConfig::new(server.address())).await;
    let mut shared = None;
    for (n, echoes) in [false, true, true, true, false, true, true]
        .into_iter()
        .enumerate()
    {
        let client = client(&connection, "foreign");
        let limit = Duration::from_millis(if n == 4 { 200 } else { 10_000 });
        let call = tokio::spawn(async move { client.call_within(&1, limit).await });
        let request = popped(&server, "foreign").await;
        let header = &request["header"];
        let (address, id) = (&header["reply_to"], &header["correlation_id"]);
        let is_shared = address != id;
        // From the second echo on, until a reply without one came there.
        assert_eq!(is_shared, matches!(n, 2..=4), "call {n}");
        if is_shared {
            assert_eq!(shared.get_or_insert_with(|| address.clone()), address);
        }
        let id = if echoes { id.clone() } else { Value::Null };
        let reply = json!({"header": {"timestamp": 1, "correlation_id": id}, "data": 5});
        server
            .command(&["RPUSH", address.as_str().unwrap(), &reply.to_string()])
            .await;
        let outcome = soon(call).await.unwrap();
        assert_eq!(outcome.is_ok(), n != 4, "call {n}: {outcome:?}");
    }
}

/// What the design promises for peers that echo.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_calls_in_flight() {
    let server = server!();
    let there = connect(RedisConfig::new(server.address())).await;
    let options = commlib_core::RpcServiceOptions::default().queue_limit(20_000);
    let serving = there.rpc_service_with("echo", options, |n: u64| async move { Ok(n) });
    let _serving = soon(serving).await.unwrap();
    let here = connect(RedisConfig::new(server.address())).await;
    let client = client(&here, "echo");
    assert_eq!(soon(client.call(&0)).await.unwrap(), 0);
    let started = Instant::now();
    let numbers: Vec<u64> = (0..10_000).collect();
    let replies = soon(join_all(numbers.iter().map(|n| client.call(n)))).await;
    for (n, reply) in numbers.iter().zip(replies) {
        assert_eq!(reply.unwrap(), *n);
    }
    println!("10,000 calls in flight: {:?}", started.elapsed());
}

/// Servers before Redis 7 know no `BLMPOP`.
#[tokio::test]
async fn an_old_server_is_read_item_by_item() {
    let server = server!(Redis::builder().setting("rename-command BLMPOP \"\""));
    let connection = connect(RedisConfig::new(server.address())).await;
    echo(&connection, "echo").await;
    let client = client(&connection, "echo");
    for n in 0..20 {
        assert_eq!(soon(client.call(&n)).await.unwrap(), n);
    }
    assert!(connection.link().state().is_connected());
}

/// A placeholder that old commlib-py programs leave in lists is no request.
#[tokio::test]
async fn a_placeholder_is_no_request() {
    let server = server!();
    server.command(&["RPUSH", "old", "QueueInit"]).await;
    let link = transport(RedisConfig::new(server.address())).await;
    let source = Source::Queue(name("old"));
    let mut inbox = soon(link.listen(&source, ListenOptions::default()))
        .await
        .unwrap();
    server.command(&["RPUSH", "old", "QueueInit", "5"]).await;
    let Some(Incoming::Message(arrival)) = soon(inbox.recv()).await else {
        panic!("no request");
    };
    assert_eq!(&arrival.message.data[..], b"5");
}

/// Users, passwords and databases, in both versions of the protocol; refusals are final and say what to do.
#[tokio::test]
async fn logins() {
    let server = server!(Redis::builder().login("robot", "secret"));
    let url = |login: &str, rest: &str| format!("redis://{login}127.0.0.1:{}{rest}", server.port());
    for protocol in ["resp2", "resp3"] {
        let option = format!("?protocol={protocol}&client_id=robot-7");
        let config = RedisConfig::from_url(&url("robot:secret@", &format!("/5{option}"))).unwrap();
        let connection = connect(config).await;
        echo(&connection, "echo").await;
        assert_eq!(soon(client(&connection, "echo").call(&1)).await.unwrap(), 1);
        let clients = server.command(&["CLIENT", "LIST"]).await.concat();
        assert!(
            clients.contains("name=robot-7") && clients.contains("db=5"),
            "{clients}"
        );
        for (login, path, text) in [
            ("robot:wrong@", "/", "WRONGPASS"),
            ("nobody:secret@", "/", "WRONGPASS"),
            (":secret@", "/", "WRONGPASS"),
            ("", "/", "NOAUTH"),
            ("robot:secret@", "/99", "DB index is out of range"),
        ] {
            let config = RedisConfig::from_url(&url(login, &format!("{path}{option}"))).unwrap();
            let started = Instant::now();
            let error = soon(config.connect()).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Connect);
            assert!(error.to_string().contains(text), "{login}{path}: {error}");
            assert!(!error.to_string().contains("secret"), "{error}");
            assert!(
                started.elapsed() < Duration::from_secs(2),
                "tried again: {error}"
            );
        }
    }
    let no_password = server!();
    let config = RedisConfig::new(no_password.address()).login("default", "needless");
    // Redis 6 and later let the default user log in with any password if it has none.
    connect(config).await;
}

/// Missing rights refuse what was asked for and nothing else.
#[tokio::test]
async fn missing_rights() {
    let server = server!(
        Redis::builder()
            .setting("user guest on >guest ~open.* ~rpc-* ~commlib:wake:* &open.* +@all")
    );
    let config = RedisConfig::new(server.address()).login("guest", "guest");
    for protocol in [Protocol::Resp2, Protocol::Resp3] {
        let connection = connect(config.clone().protocol(protocol).streams(true)).await;
        let mut open = subscribe(&connection, "open.*").await;
        for secret in ["secret.a", "secret.*"] {
            let error = soon(connection.subscriber::<u64>(secret))
                .await
                .unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Broker);
            assert!(error.to_string().contains("NOPERM"), "{error}");
        }
        let error = soon(connection.rpc_service("secret.service", |n: u64| async move { Ok(n) }))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Broker);
        let error = soon(client(&connection, "secret.service").call(&1))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Broker);
        assert!(error.to_string().contains("NOPERM"), "{error}");
        let error = soon(sure_publisher(&connection, "open.a").publish(&1))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Broker);
        connection
            .publisher::<u64>("secret.a")
            .unwrap()
            .publish(&1)
            .await
            .unwrap();
        connection
            .publisher::<u64>("open.a")
            .unwrap()
            .publish(&2)
            .await
            .unwrap();
        assert_eq!(number(&mut open).await, 2);
        assert_eq!(
            connection.link().state(),
            LinkState::Connected { resumed: false }
        );
    }
}

/// A user who may use channels only, not even `PING`.
#[tokio::test]
async fn few_rights_are_enough_for_topics() {
    let server = server!(
        Redis::builder().setting("user sensor on >s &sensors.* +publish +subscribe +psubscribe")
    );
    let connection = connect(quick(server.address()).login("sensor", "s")).await;
    let mut subscriber = subscribe(&connection, "sensors.*").await;
    // Longer than the keep-alive: a refused PING is a sign of life.
    sleep(Duration::from_millis(2500)).await;
    connection
        .publisher::<u64>("sensors.a")
        .unwrap()
        .publish(&1)
        .await
        .unwrap();
    let message = soon(subscriber.recv()).await.unwrap().unwrap();
    assert_eq!((message.data, message.gap), (1, None));
}

/// A server that is out of memory refuses in its own words, and the link stays.
#[tokio::test]
async fn refusals_of_the_server_are_told() {
    let server = server!();
    let connection = connect(RedisConfig::new(server.address()).streams(true)).await;
    let publisher = sure_publisher(&connection, "numbers");
    server.command(&["CONFIG", "SET", "maxmemory", "1"]).await;
    let call = soon(client(&connection, "nobody").call(&1)).await;
    for error in [
        call.unwrap_err(),
        soon(publisher.publish(&1)).await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Broker);
        assert!(error.to_string().contains("OOM"), "{error}");
    }
    assert_eq!(
        connection.link().state(),
        LinkState::Connected { resumed: false }
    );
    server.command(&["CONFIG", "SET", "maxmemory", "0"]).await;
    soon(publisher.publish(&2)).await.unwrap();
}

/// A server that became a replica is left, in the hope of a better one; at-least-once messages wait for that.
#[tokio::test]
async fn a_replica_is_as_good_as_no_server() {
    let server = server!();
    let connection = connect(RedisConfig::new(server.address()).streams(true)).await;
    let publisher = sure_publisher(&connection, "numbers");
    server.command(&["REPLICAOF", "127.0.0.1", "1"]).await;
    let receipt = soon(publisher.enqueue(&1)).await.unwrap();
    let cause = until_down(&connection).await;
    assert!(cause.contains("READONLY"), "{cause}");
    let error = soon(client(&connection, "nobody").call(&1))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionLost);
    server.command(&["REPLICAOF", "NO", "ONE"]).await;
    soon(receipt).await.unwrap();
}

/// A key of another kind is no service and no stream.
#[tokio::test]
async fn a_key_of_another_kind_is_refused() {
    let server = server!();
    server.command(&["SET", "text", "x"]).await;
    server.command(&["SET", "commlib:stream:text", "x"]).await;
    let connection = connect(RedisConfig::new(server.address()).streams(true)).await;
    let service = connection.rpc_service("text", |n: u64| async move { Ok(n) });
    let error = soon(service).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broker);
    assert!(error.to_string().contains("WRONGTYPE"), "{error}");
    for durable in [None, Some("keeper")] {
        let mut options = SubscriberOptions::default().delivery(Delivery::AtLeastOnce);
        options.durable = durable.map(str::to_owned);
        let error = soon(connection.subscriber_with::<u64>("text", options))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Broker);
    }
    let error = soon(sure_publisher(&connection, "text").publish(&1))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("WRONGTYPE"), "{error}");
}

/// Too large for us: told and skipped. Too large to be read at all: it costs the link, and says so.
#[tokio::test]
async fn large_messages_are_reported_and_larger_ones_cost_the_link() {
    let server = server!();
    let config = quick(server.address())
        .max_payload(1000)
        .hard_limit(1 << 20);
    let connection = connect(config).await;
    echo(&connection, "echo").await;
    let mut subscriber = subscribe(&connection, "numbers").await;
    let foreign = connect(RedisConfig::new(server.address()).max_payload(8 << 20)).await;
    let large = foreign.publisher::<String>("numbers").unwrap();
    for size in [2000, 500_000] {
        large.publish(&"x".repeat(size)).await.unwrap();
        let error = soon(subscriber.recv()).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
    }
    large.publish(&"x".repeat(3 << 20)).await.unwrap();
    let cause = until_down(&connection).await;
    assert!(cause.contains("PacketTooLarge"), "{cause}");
    until_up(&connection).await;
    foreign
        .publisher::<u64>("numbers")
        .unwrap()
        .publish(&5)
        .await
        .unwrap();
    let message = soon(subscriber.recv()).await.unwrap().unwrap();
    assert_eq!(
        (message.data, message.gap.map(|gap| gap.cause)),
        (5, Some(GapCause::LinkLost))
    );
    assert_eq!(soon(client(&foreign, "echo").call(&6)).await.unwrap(), 6);
}

/// A reply too large for its caller fails the call, on a list of its own and on the shared one.
#[tokio::test]
async fn a_reply_too_large_for_the_caller_fails_its_call() {
    let server = server!();
    let there = connect(RedisConfig::new(server.address())).await;
    let serving = there.rpc_service("fill", |n: usize| async move { Ok("x".repeat(n)) });
    let _serving = soon(serving).await.unwrap();
    let here = connect(RedisConfig::new(server.address()).max_payload(1000)).await;
    let fill = here.rpc_client::<usize, String>("fill").unwrap();
    for _ in 0..2 {
        let error = soon(fill.call(&2000)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
        assert_eq!(soon(fill.call(&5)).await.unwrap(), "xxxxx");
    }
}

/// `connect` before there is a server: an error in time that says why, or in the background.
#[tokio::test]
async fn connecting_without_a_server() {
    let port = commlib_testkit::free_port();
    let config = quick(format!("127.0.0.1:{port}")).connect_timeout(Duration::from_secs(1));
    let started = Instant::now();
    let error = soon(config.connect()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connect);
    assert!(
        error.to_string().contains("within 1s: Connection refused"),
        "{error}"
    );
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "{:?}",
        started.elapsed()
    );

    let server = server!();
    let proxy = Proxy::start(server.address()).await;
    proxy.refuse(true).await;
    let connection = connect(quick(proxy.address()).start_offline(true)).await;
    let error = connection
        .publisher::<u64>("numbers")
        .unwrap()
        .publish(&1)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionLost);
    let late = tokio::spawn({
        let connection = connection.clone();
        async move { subscribe(&connection, "numbers").await }
    });
    until_down(&connection).await;
    proxy.refuse(false).await;
    until_up(&connection).await;
    let mut subscriber = soon(late).await.unwrap();
    connection
        .publisher::<u64>("numbers")
        .unwrap()
        .publish(&1)
        .await
        .unwrap();
    assert_eq!(number(&mut subscriber).await, 1);
}

/// A server that is not ready yet is waited for.
#[tokio::test]
async fn a_loading_server_is_waited_for() {
    let server = server!();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let target = server.address();
    tokio::spawn(async move {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = [0; 100];
            let _ = stream.read(&mut buffer).await.unwrap();
            let answer = b"-LOADING Redis is loading the dataset in memory\r\n";
            stream.write_all(answer).await.unwrap();
        }
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut server = tokio::net::TcpStream::connect(target).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut stream, &mut server).await;
    });
    let connection = connect(quick(address)).await;
    connection
        .publisher::<u64>("numbers")
        .unwrap()
        .publish(&1)
        .await
        .unwrap();
}

/// A server that moves: the name leads elsewhere after the reconnect.
#[tokio::test]
async fn a_server_that_moves_is_followed() {
    let (old, new) = (server!(), server!());
    let proxy = Proxy::start(old.address()).await;
    let connection = connect(quick(proxy.address())).await;
    let mut subscriber = subscribe(&connection, "numbers").await;
    echo(&connection, "echo").await;
    proxy.retarget(new.address());
    proxy.cut();
    until_down(&connection).await;
    until_up(&connection).await;
    let other = connect(quick(new.address())).await;
    other
        .publisher::<u64>("numbers")
        .unwrap()
        .publish(&1)
        .await
        .unwrap();
    assert_eq!(number(&mut subscriber).await, 1);
    assert_eq!(soon(client(&other, "echo").call(&2)).await.unwrap(), 2);
}

/// Seven links in a row leave no task and no socket behind, and neither does the end.
#[tokio::test]
async fn nothing_leaks() {
    let server = server!();
    let proxy = Proxy::start(server.address()).await;
    let tasks = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let before = tasks();
    let connection = connect(quick(proxy.address()).streams(true)).await;
    let service = connection.rpc_service("echo", |n: u64| async move { Ok(n) });
    let service = soon(service).await.unwrap();
    let subscriber = subscribe(&connection, "numbers").await;
    let sure = surely(&connection, "numbers", Some("keeper")).await;
    assert_eq!(soon(client(&connection, "echo").call(&1)).await.unwrap(), 1);
    let running = tasks();
    let open = proxy.connections().open;
    assert_eq!(open, 5, "commands, topics, requests, replies, the stream");
    for _ in 0..6 {
        proxy.cut();
        until_down(&connection).await;
        until_up(&connection).await;
        soon(proxy.wait_for(|connections| connections.open == open)).await;
        assert_eq!(soon(client(&connection, "echo").call(&1)).await.unwrap(), 1);
    }
    assert_eq!(tasks(), running);
    drop((subscriber, sure, service, connection));
    soon(proxy.wait_for(|connections| connections.open == 0)).await;
    let ended = async {
        while tasks() > before {
            sleep(Duration::from_millis(5)).await;
        }
    };
    soon(ended).await;
    assert_eq!(server.keys().await, ["commlib:stream:numbers"]);
}

/// Closing under load: what was accepted is confirmed or refused, nothing hangs, and nothing is accepted later.
#[tokio::test(flavor = "multi_thread")]
async fn closing_under_load() {
    let server = server!();
    let connection = connect(RedisConfig::new(server.address()).streams(true)).await;
    echo(&connection, "echo").await;
    let mut loads = Vec::new();
    for _ in 0..8 {
        let publisher = sure_publisher(&connection, "numbers");
        let calls = client(&connection, "echo");
        loads.push(tokio::spawn(async move {
            let mut confirmed = 0_u64;
            loop {
                match publisher.publish(&1).await {
                    Ok(()) => confirmed += 1,
                    Err(error) => break (confirmed, error.kind()),
                }
                let _ = calls.call(&1).await;
            }
        }));
    }
    let mut witness = surely(
        &connect(RedisConfig::new(server.address()).streams(true)).await,
        "numbers",
        None,
    )
    .await;
    for _ in 0..200 {
        number(&mut witness).await;
    }
    soon(connection.close()).await.unwrap();
    let mut confirmed = 0;
    for load in loads {
        let (count, kind) = soon(load).await.unwrap();
        assert_eq!(kind, ErrorKind::Closed);
        confirmed += count;
    }
    let stored: u64 = server.command(&["XLEN", "commlib:stream:numbers"]).await[0]
        .parse()
        .unwrap();
    assert!(
        stored >= confirmed,
        "{confirmed} confirmed, {stored} stored"
    );
}

/// At-least-once messages that the server never confirms are named by the close.
#[tokio::test]
async fn closing_names_what_was_not_confirmed() {
    let server = server!();
    let config = RedisConfig::new(server.address()).streams(true);
    let connection = connect(config.close_timeout(Duration::from_millis(300))).await;
    let publisher = sure_publisher(&connection, "numbers");
    server.pause();
    let receipt = soon(publisher.enqueue(&1)).await.unwrap();
    let error = soon(connection.close()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(
        error.to_string().contains("1 messages were not confirmed"),
        "{error}"
    );
    assert_eq!(soon(receipt).await.unwrap_err().kind(), ErrorKind::Closed);
}

/// The outbox is bounded, and says so in time.
#[tokio::test]
async fn a_full_outbox_waits_and_times_out() {
    let server = server!();
    let config = RedisConfig::new(server.address()).streams(true).outbox(2);
    let link = transport(config).await;
    server.pause();
    let target = Target::Topic(name("numbers"));
    let options = SendOptions::default()
        .delivery(Delivery::AtLeastOnce)
        .timeout(Duration::from_millis(200));
    let mut receipts = Vec::new();
    for _ in 0..2 {
        let sent = link.send(&target, Message::new("1"), options.clone());
        receipts.push(soon(sent).await.unwrap());
    }
    let error = soon(link.send(&target, Message::new("1"), options.clone()))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    server.resume();
    for receipt in receipts {
        soon(receipt).await.unwrap();
    }
    drop(
        soon(link.send(&target, Message::new("1"), options))
            .await
            .unwrap(),
    );
}
