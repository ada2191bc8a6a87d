//! What goes wrong with brokers, links and channels, against a real RabbitMQ. One test for each trap that AMQP clients
//! fall into.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use commlib_amqp::AmqpConfig;
use commlib_core::{
    Delivery, ErrorKind, GapCause, Inbox, Incoming, LinkState, ListenOptions, PubSub,
    PublisherOptions, Receipt, Rpc, RpcClient, SendOptions, Source, SubscriberOptions, Target,
    Transport,
};
use commlib_testkit::{Proxy, RabbitMq};
use common::*;
use lapin::options::{
    BasicConsumeOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::types::FieldTable;
use tokio::sync::OnceCell;
use tokio::time::Instant;

static BROKER: OnceCell<RabbitMq> = OnceCell::const_new();

/// A broker that all tests but one share, if there is one.
macro_rules! broker {
    () => {
        match RabbitMq::available() {
            true => BROKER.get_or_init(RabbitMq::start).await,
            false => return,
        }
    };
}

fn quick(address: impl Into<String>) -> AmqpConfig {
    AmqpConfig::new(address).heartbeat(Duration::from_secs(1))
}

/// The first arrivals of `count` different numbers, in their order, acknowledged; repeats are allowed and left out.
async fn receive_numbers(inbox: &mut Inbox, count: usize) -> Vec<usize> {
    let mut seen = BTreeSet::new();
    let mut order = Vec::new();
    while order.len() < count {
        let mut arrival = arrival(inbox).await;
        let n = read(&arrival);
        if let Some(ack) = arrival.ack.take() {
            ack.accept();
        }
        if seen.insert(n) {
            order.push(n);
        }
    }
    order
}

/// How many threads of the client crate this process has.
fn client_threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names =
        tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names
        .filter(|name| name.starts_with("lapin-io-loop"))
        .count()
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_of_fifty_over_cuts_in_order() {
    let broker = broker!();
    let proxy = Proxy::start(broker.address()).await;
    let topic = unique("fifty");
    let sender = connect(quick(proxy.address())).await;
    let receiver = connect(quick(proxy.address())).await;
    let mut inbox = listen(&receiver, &topic, acked()).await;
    let mut receipts: Vec<Receipt> = Vec::new();
    for n in 0..50 {
        receipts.push(publish(&sender, &topic, number(n)).await);
        if n % 20 == 10 {
            proxy.cut();
        }
    }
    for receipt in receipts {
        soon(receipt).await.unwrap();
    }
    // A queue of its own outlives the link: nothing is missed, so there is no gap.
    assert_eq!(
        receive_numbers(&mut inbox, 50).await,
        (0..50).collect::<Vec<_>>()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_shows_what_best_effort_may_have_missed() {
    let broker = broker!();
    let proxy = Proxy::start(broker.address()).await;
    let topic = unique("gap");
    let link = connect(quick(proxy.address())).await;
    let mut exact = listen(&link, &topic, ListenOptions::default()).await;
    let mut wild = listen(&link, "*", ListenOptions::default()).await;
    proxy.cut();
    reconnecting(&link).await;
    let sent = link
        .send(&common::topic(&topic), number(1), SendOptions::default())
        .await;
    assert_eq!(sent.unwrap_err().kind(), ErrorKind::ConnectionLost);
    connected(&link).await;
    post(&link, &topic, number(2)).await;
    assert_eq!(gap(&mut exact).await.cause, GapCause::LinkLost);
    assert_eq!(read(&arrival(&mut exact).await), 2);
    assert_eq!(gap(&mut wild).await.cause, GapCause::LinkLost);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_in_flight_fail_at_once_and_later_ones_work() {
    let broker = broker!();
    let proxy = Proxy::start(broker.address()).await;
    let service = unique("slow");
    let here = quick(broker.address()).connect().await.unwrap();
    let (started, mut running) = tokio::sync::mpsc::unbounded_channel();
    let _service = here
        .rpc_service(&service, move |wait: bool| {
            let _ = started.send(());
            async move {
                if wait {
                    std::future::pending::<()>().await;
                }
                Ok(wait)
            }
        })
        .await
        .unwrap();
    let there = quick(proxy.address()).connect().await.unwrap();
    let client: RpcClient<bool, bool> = there.rpc_client(&service).unwrap();
    let call = tokio::spawn(async move {
        let outcome = client.call(&true).await;
        (client, outcome)
    });
    soon(running.recv()).await.unwrap();
    proxy.cut();
    let (client, outcome) = soon(call).await.unwrap();
    let error = outcome.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionLost);
    assert!(error.maybe_executed());
    soon(there.connected()).await.unwrap();
    assert!(!soon(client.call(&false)).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn unroutable_messages_are_told_and_their_neighbours_confirmed() {
    let broker = broker!();
    let (heard, unheard) = (unique("heard"), unique("unheard"));
    let link = connect(quick(broker.address())).await;
    let _inbox = listen(&link, &heard, ListenOptions::default()).await;
    let mut receipts = Vec::new();
    for n in 0..300 {
        let topic = if n % 3 == 0 { &unheard } else { &heard };
        receipts.push(publish(&link, topic, number(n)).await);
    }
    for (n, receipt) in receipts.into_iter().enumerate() {
        let outcome = soon(receipt).await;
        match n % 3 {
            0 => {
                let error = outcome.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Broker);
                assert!(error.to_string().contains("nobody subscribes"), "{error}");
            }
            _ => outcome.unwrap(),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_broker_refuses_leaves_the_rest_alone() {
    let broker = broker!();
    let (topic, service) = (unique("alive"), unique("service"));
    let link = quick(broker.address()).connect().await.unwrap();
    let mut inbox = link.subscriber::<u64>(&topic).await.unwrap();
    let _service = link
        .rpc_service(&service, |n: u64| async move { Ok(n) })
        .await
        .unwrap();
    let client: RpcClient<u64, u64> = link.rpc_client(&service).unwrap();
    let publisher = link.publisher::<u64>(&topic).unwrap();
    let (_plain, channel) = plain(&broker.address()).await;

    // A name of the broker's own.
    let error = link
        .rpc_service("amq.mine", |n: u64| async move { Ok(n) })
        .await;
    let error = error.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broker);
    assert!(error.to_string().contains("lacks the right"), "{error}");

    // A queue with other settings.
    let other = unique("other");
    let options = QueueDeclareOptions {
        auto_delete: true,
        ..QueueDeclareOptions::default()
    };
    channel
        .queue_declare(other.as_str().into(), options, FieldTable::default())
        .await
        .unwrap();
    let error = link
        .rpc_service(&other, |n: u64| async move { Ok(n) })
        .await
        .map(drop)
        .unwrap_err();
    assert!(error.to_string().contains("other settings"), "{error}");

    // A queue that another connection has for itself.
    let locked = unique("locked");
    let options = QueueDeclareOptions {
        exclusive: true,
        ..QueueDeclareOptions::default()
    };
    channel
        .queue_declare(locked.as_str().into(), options, FieldTable::default())
        .await
        .unwrap();
    let error = link
        .rpc_service(&locked, |n: u64| async move { Ok(n) })
        .await
        .map(drop)
        .unwrap_err();
    assert!(error.to_string().contains("for itself"), "{error}");

    publisher.publish(&7).await.unwrap();
    let received = soon(inbox.recv()).await.unwrap().unwrap();
    assert_eq!((received.data, received.gap), (7, None));
    assert_eq!(soon(client.call(&8)).await.unwrap(), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_queue_is_made_again() {
    let broker = broker!();
    let (service, topic) = (unique("deleted"), unique("deleted"));
    let link = quick(broker.address()).connect().await.unwrap();
    let _service = link
        .rpc_service(&service, |n: u64| async move { Ok(n) })
        .await
        .unwrap();
    let options = SubscriberOptions::default()
        .delivery(Delivery::AtLeastOnce)
        .durable(&*topic);
    let mut subscriber = link.subscriber_with::<u64>(&topic, options).await.unwrap();
    let (_plain, channel) = plain(&broker.address()).await;
    for queue in [service.clone(), format!("commlib.durable.{topic}")] {
        let deleted = channel
            .queue_delete(queue.into(), QueueDeleteOptions::default())
            .await;
        assert_eq!(deleted.unwrap(), 0);
    }
    let options = PublisherOptions::default().delivery(Delivery::AtLeastOnce);
    let publisher = link.publisher_with::<u64>(&topic, options).unwrap();
    // The queue comes back within the first delays; until then a message has nowhere to go.
    let published = async {
        while publisher.publish(&1).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    soon(published).await;
    let received = soon(subscriber.recv()).await.unwrap().unwrap();
    assert_eq!(received.gap.map(|gap| gap.cause), Some(GapCause::LinkLost));
    let client: RpcClient<u64, u64> = link.rpc_client(&service).unwrap();
    let called = async {
        loop {
            match client.call(&1).await {
                Err(error) if error.kind() == ErrorKind::NoService => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                outcome => return outcome,
            }
        }
    };
    assert_eq!(soon(called).await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_consumer_stalls_nobody() {
    let broker = broker!();
    let topic = unique("slow");
    let link = connect(quick(broker.address())).await;
    let mut slow = listen(&link, &topic, ListenOptions::default().prefetch(10)).await;
    let mut quick = listen(&link, &topic, ListenOptions::default().prefetch(5000)).await;
    for n in 0..2000 {
        post(&link, &topic, number(n)).await;
    }
    for n in 0..2000 {
        assert_eq!(read(&arrival(&mut quick).await), n);
    }
    let missed = gap(&mut slow).await;
    assert_eq!(missed.cause, GapCause::SlowConsumer);
    let first = read(&arrival(&mut slow).await);
    assert_eq!(missed.missed, Some(first as u64));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_at_least_once_subscriber_gets_no_more_than_its_window() {
    let broker = broker!();
    let topic = unique("window");
    let link = connect(quick(broker.address())).await;
    let mut inbox = listen(&link, &topic, acked().prefetch(3)).await;
    for n in 0..10 {
        soon(publish(&link, &topic, number(n)).await).await.unwrap();
    }
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(arrival(&mut inbox).await);
    }
    // All ten are confirmed and three are here: a fourth would have come with them.
    assert!(inbox.try_recv().is_none());
    for arrival in held {
        arrival.ack.unwrap().accept();
    }
    assert_eq!(
        receive_numbers(&mut inbox, 7).await,
        (3..10).collect::<Vec<_>>()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_acks_are_ignored() {
    let broker = broker!();
    let proxy = Proxy::start(broker.address()).await;
    let topic = unique("stale");
    let link = connect(quick(proxy.address())).await;
    let mut inbox = listen(&link, &topic, acked()).await;
    for n in 0..2 {
        soon(publish(&link, &topic, number(n)).await).await.unwrap();
    }
    let stale = [arrival(&mut inbox).await, arrival(&mut inbox).await];
    proxy.cut();
    reconnecting(&link).await;
    connected(&link).await;
    let [first, second] = stale;
    first.ack.unwrap().accept();
    second.ack.unwrap().reject(false);
    // Neither was acknowledged as far as the broker knows; a wrong acknowledgement would close the channel.
    assert_eq!(receive_numbers(&mut inbox, 2).await, [0, 1]);
    soon(publish(&link, &topic, number(2)).await).await.unwrap();
    let mut last = arrival(&mut inbox).await;
    assert_eq!(read(&last), 2);
    last.ack.take().unwrap().accept();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_five_times_goes_to_the_dead_letters() {
    let broker = broker!();
    let (exchange, dead, topic) = (unique("dead"), unique("dead"), unique("failing"));
    let (_plain, channel) = plain(&broker.address()).await;
    let fanout = lapin::ExchangeKind::Fanout;
    let options = ExchangeDeclareOptions {
        auto_delete: true,
        ..ExchangeDeclareOptions::default()
    };
    let table = FieldTable::default;
    channel
        .exchange_declare(exchange.as_str().into(), fanout, options, table())
        .await
        .unwrap();
    let options = QueueDeclareOptions {
        exclusive: true,
        ..QueueDeclareOptions::default()
    };
    channel
        .queue_declare(dead.as_str().into(), options, table())
        .await
        .unwrap();
    let bind = QueueBindOptions::default();
    channel
        .queue_bind(
            dead.as_str().into(),
            exchange.as_str().into(),
            "".into(),
            bind,
            table(),
        )
        .await
        .unwrap();
    let consume = BasicConsumeOptions {
        no_ack: true,
        ..BasicConsumeOptions::default()
    };
    let mut letters = channel
        .basic_consume(dead.as_str().into(), "dead".into(), consume, table())
        .await
        .unwrap();

    let link = connect(quick(broker.address()).dead_letter(exchange)).await;
    let mut inbox = listen(&link, &topic, acked()).await;
    soon(publish(&link, &topic, number(7)).await).await.unwrap();
    for tries in 0..5 {
        let arrival = arrival(&mut inbox).await;
        match tries {
            0 | 2 => drop(arrival),
            _ => arrival.ack.unwrap().reject(true),
        }
    }
    let given_up = gap(&mut inbox).await;
    assert_eq!(
        (given_up.cause, given_up.missed),
        (GapCause::GivenUp, Some(1))
    );
    let letter = soon(futures_util::StreamExt::next(&mut letters))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (&letter.data[..], letter.routing_key.as_str()),
        (&b"7"[..], &*topic)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_broker_will_never_accept_fails_at_once() {
    let broker = broker!();
    for (url, advice) in [
        ("amqp://guest:secret@HOST", "password of user `guest`"),
        ("amqp://nobody:secret@HOST", "password of user `nobody`"),
        ("amqp://HOST/nowhere", "virtual host `nowhere`"),
        ("amqp://HOST?exchange=missing", "option `exchange`"),
    ] {
        let start = Instant::now();
        let config = AmqpConfig::from_url(&url.replace("HOST", &broker.address())).unwrap();
        let error = soon(config.connect()).await.map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Connect, "{error}");
        assert!(error.to_string().contains(advice), "{error}");
        assert!(!error.to_string().contains("secret"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(5), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn external_login_says_so_when_it_is_refused() {
    let broker = broker!();
    let config = quick(broker.address()).external_auth(true);
    let config = config.connect_timeout(Duration::from_secs(4));
    let error = soon(config.connect()).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connect);
    assert!(error.to_string().contains("auth=external"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_absent_broker_is_tried_until_the_timeout() {
    let broker = broker!();
    let proxy = Proxy::start(broker.address()).await;
    proxy.refuse(true).await;
    let config = quick(proxy.address()).connect_timeout(Duration::from_millis(700));
    let start = Instant::now();
    let error = soon(config.clone().connect()).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connect);
    assert!(
        start.elapsed() >= Duration::from_millis(700),
        "it was given up too early"
    );

    // Or it is waited for in the background.
    let link = connect(config.start_offline(true)).await;
    let topic = unique("early");
    let receipt = publish(&link, &topic, number(1)).await;
    let source = Source::Topic(commlib_core::Pattern::new(&topic).unwrap());
    let listening = link.listen(&source, acked());
    let ((), inbox) = soon(async { tokio::join!(proxy.refuse(false), listening) }).await;
    soon(receipt).await.unwrap();
    assert_eq!(
        read(&arrival(&mut inbox.unwrap()).await),
        1,
        "listening came first"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_handshake_ends_and_leaves_nothing() {
    let _broker = broker!();
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let before = client_threads();
    let config = quick(address).connect_timeout(Duration::from_millis(500));
    let error = soon(config.connect()).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connect);
    let gone = async {
        while client_threads() > before {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon(gone).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_link_is_noticed_and_made_again() {
    let broker = broker!();
    let proxy = Proxy::start(broker.address()).await;
    let topic = unique("silent");
    let link = connect(quick(proxy.address())).await;
    let mut inbox = listen(&link, &topic, ListenOptions::default()).await;
    proxy.black_hole(true);
    let start = Instant::now();
    reconnecting(&link).await;
    // Twice the heartbeat, and what the client crate's clock adds.
    assert!(
        start.elapsed() < Duration::from_secs(4),
        "{:?}",
        start.elapsed()
    );
    proxy.black_hole(false);
    connected(&link).await;
    assert_eq!(gap(&mut inbox).await.cause, GapCause::LinkLost);
    post(&link, &topic, number(1)).await;
    assert_eq!(read(&arrival(&mut inbox).await), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_link_with_large_messages_loses_nothing() {
    let broker = broker!();
    let proxy = Proxy::start(broker.address()).await;
    let topic = unique("large");
    let link = connect(AmqpConfig::new(proxy.address())).await;
    let mut inbox = listen(&link, &topic, ListenOptions::default().prefetch(64)).await;
    proxy.throttle(Some(8 << 20));
    proxy.delay(Duration::from_millis(20));
    let text = format!("\"{}\"", "x".repeat(300_000));
    for _ in 0..20 {
        post(&link, &topic, commlib_core::Message::new(text.clone())).await;
    }
    for _ in 0..20 {
        assert_eq!(arrival(&mut inbox).await.message.data.len(), text.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn oversize_in_and_out() {
    let broker = broker!();
    let (topic, service) = (unique("oversize"), unique("oversize"));
    let large = connect(quick(broker.address())).await;
    let small = connect(quick(broker.address()).max_payload(1000)).await;
    let message = || commlib_core::Message::new(format!("\"{}\"", "x".repeat(2000)));
    let error = small
        .send(&common::topic(&topic), message(), SendOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge);
    let queue = Source::Queue(name(&service));
    let mut requests = small
        .listen(&queue, ListenOptions::default())
        .await
        .unwrap();
    let mut kept = listen(&small, &topic, acked()).await;
    let mut passing = listen(&small, &topic, ListenOptions::default()).await;
    soon(publish(&large, &topic, message()).await)
        .await
        .unwrap();
    soon(publish(&large, &topic, number(1)).await)
        .await
        .unwrap();
    let target = Target::Queue(name(&service));
    drop(
        large
            .send(&target, message(), SendOptions::default())
            .await
            .unwrap(),
    );
    for inbox in [&mut kept, &mut passing, &mut requests] {
        match next(inbox).await {
            Incoming::Malformed(malformed) => {
                assert_eq!(malformed.error.kind(), ErrorKind::TooLarge)
            }
            other => panic!("{other:?}"),
        }
    }
    for inbox in [&mut kept, &mut passing] {
        assert_eq!(read(&arrival(inbox).await), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_during_silence_keeps_its_limit_and_dropping_frees_everything() {
    let broker = broker!();
    let proxy = Proxy::start(broker.address()).await;
    let topic = unique("close");
    let config = quick(proxy.address()).heartbeat(Duration::from_secs(60));
    let link = connect(config.close_timeout(Duration::from_millis(400))).await;
    let mut inbox = listen(&link, &topic, ListenOptions::default()).await;
    proxy.black_hole(true);
    let receipt = publish(&link, &topic, number(1)).await;
    let start = Instant::now();
    let error = soon(link.close()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(
        start.elapsed() < Duration::from_secs(3),
        "{:?}",
        start.elapsed()
    );
    let error = soon(receipt).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Closed && error.maybe_executed());
    assert!(soon(inbox.recv()).await.is_none());
    soon(link.close()).await.unwrap();
    proxy.black_hole(false);
    proxy.wait_for(|connections| connections.open == 0).await;

    let link = connect(quick(proxy.address())).await;
    let inbox = listen(&link, &topic, acked()).await;
    proxy.wait_for(|connections| connections.open == 1).await;
    drop(link);
    proxy.wait_for(|connections| connections.open == 0).await;
    drop(inbox);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_under_load_confirms_what_was_accepted() {
    let broker = broker!();
    let topic = unique("load");
    let sender = connect(quick(broker.address())).await;
    let receiver = connect(quick(broker.address())).await;
    let mut inbox = listen(&receiver, &topic, acked()).await;
    let mut receipts = Vec::new();
    for n in 0..500 {
        receipts.push(publish(&sender, &topic, number(n)).await);
    }
    soon(sender.close()).await.unwrap();
    for receipt in receipts {
        soon(receipt).await.unwrap();
    }
    assert_eq!(
        receive_numbers(&mut inbox, 500).await,
        (0..500).collect::<Vec<_>>()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_connections_leave_nothing_behind() {
    let broker = broker!();
    let proxy = Proxy::start(broker.address()).await;
    let (_plain, channel) = plain(&broker.address()).await;
    let topic = unique("leak");
    for n in 0..100 {
        let link = connect(quick(proxy.address())).await;
        let inbox = listen(&link, &topic, ListenOptions::default()).await;
        let acked = listen(&link, &topic, acked()).await;
        match n % 3 {
            0 => soon(link.close()).await.unwrap(),
            1 => proxy.cut(),
            _ => {}
        }
        drop((inbox, acked, link));
    }
    proxy.wait_for(|connections| connections.open == 0).await;
    let before = Instant::now();
    while client_threads() > 60 {
        assert!(
            before.elapsed() < Duration::from_secs(20),
            "{} threads",
            client_threads()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Nothing is bound to the topic any more, but what a cut connection leaves for a minute.
    drop(channel);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_moves_is_found() {
    let broker = broker!();
    let (one, two) = (
        Proxy::start(broker.address()).await,
        Proxy::start(broker.address()).await,
    );
    let front = Proxy::start(one.address()).await;
    let link = connect(quick(front.address())).await;
    front.retarget(two.address());
    drop(one);
    reconnecting(&link).await;
    connected(&link).await;
    assert_eq!(two.connections().open, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn replies_to_nobody_harm_nobody() {
    let broker = broker!();
    let service = unique("late");
    let here = quick(broker.address()).connect().await.unwrap();
    let (go, gate) = tokio::sync::watch::channel(false);
    let _service = here
        .rpc_service(&service, move |wait: bool| {
            let mut gate = gate.clone();
            async move {
                if wait {
                    let _ = gate.wait_for(|open| *open).await;
                }
                Ok(())
            }
        })
        .await
        .unwrap();
    let there = quick(broker.address()).connect().await.unwrap();
    let client: RpcClient<bool, ()> = there.rpc_client(&service).unwrap();
    let late = client.call_within(&true, Duration::from_millis(200)).await;
    assert!(late.unwrap_err().is_timeout());
    let gone = quick(broker.address()).connect().await.unwrap();
    let lost: RpcClient<bool, ()> = gone.rpc_client(&service).unwrap();
    assert!(
        lost.call_within(&true, Duration::from_millis(200))
            .await
            .unwrap_err()
            .is_timeout()
    );
    soon(gone.close()).await.unwrap();
    go.send_replace(true);
    for _ in 0..10 {
        soon(client.call(&false)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_forbidden_topic_does_not_fail_the_others() {
    let broker = broker!();
    let user = unique("limited");
    broker.ctl(&["add_user", &user, "pw"]).await;
    broker
        .ctl(&["set_permissions", &user, ".*", ".*", ".*"])
        .await;
    broker
        .ctl(&[
            "set_topic_permissions",
            &user,
            "amq.topic",
            "^allowed",
            ".*",
        ])
        .await;
    let link = connect(quick(broker.address()).login(&user, "pw")).await;
    let topic = unique("allowed");
    let mut inbox = listen(&link, &topic, acked()).await;
    let mut receipts = Vec::new();
    for n in 0..30 {
        let to = if n == 10 { "forbidden" } else { &topic };
        receipts.push(publish(&link, to, number(n)).await);
    }
    for (n, receipt) in receipts.into_iter().enumerate() {
        let outcome = soon(receipt).await;
        if n == 10 {
            assert!(outcome.unwrap_err().to_string().contains("lacks the right"));
        } else {
            outcome.unwrap();
        }
    }
    let expected: Vec<_> = (0..30).filter(|n| *n != 10).collect();
    assert_eq!(receive_numbers(&mut inbox, 29).await, expected);
}

/// Everything that needs a broker of its own, in one scenario, because each start takes its time.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_blocks_cuts_dies_and_forgets() {
    if !RabbitMq::available() {
        return;
    }
    let broker = RabbitMq::start().await;
    let link = quick(broker.address()).connect().await.unwrap();
    let surely = SubscriberOptions::default().delivery(Delivery::AtLeastOnce);
    let mut durable = link
        .subscriber_with::<usize>("scenario", surely.clone().durable("one"))
        .await
        .unwrap();
    let mut kept = link
        .subscriber_with::<usize>("scenario", surely)
        .await
        .unwrap();
    let mut passing = link.subscriber::<usize>("scenario").await.unwrap();
    let _service = link
        .rpc_service("echo", |n: u64| async move { Ok(n) })
        .await
        .unwrap();
    let _stuck = link
        .rpc_service("stuck", |(): ()| {
            std::future::pending::<Result<(), commlib_core::RpcError>>()
        })
        .await
        .unwrap();
    let options = PublisherOptions::default().delivery(Delivery::AtLeastOnce);
    let publisher = link.publisher_with::<usize>("scenario", options).unwrap();
    let echo: RpcClient<u64, u64> = link.rpc_client("echo").unwrap();
    publisher.publish(&0).await.unwrap();
    assert_eq!(soon(passing.recv()).await.unwrap().unwrap().data, 0);

    // Short of memory: it takes nothing until the alarm is over.
    broker.ctl(&["set_vm_memory_high_watermark", "0"]).await;
    let mut receipts = vec![publisher.enqueue(&1).await.unwrap()];
    let state = until(link.transport(), |state| {
        matches!(state, LinkState::Degraded { .. })
    })
    .await;
    assert!(
        matches!(&state, LinkState::Degraded { reason } if reason.contains("memory")),
        "{state:?}"
    );
    let start = Instant::now();
    let refused = soon(async {
        let best_effort = link.publisher::<usize>("other").unwrap();
        loop {
            if let Err(error) = best_effort.publish(&1).await {
                return error;
            }
        }
    });
    let error = refused.await;
    assert!(
        error.is_timeout() && error.to_string().contains("memory"),
        "{error}"
    );
    assert!(start.elapsed() < Duration::from_secs(10));
    broker.ctl(&["set_vm_memory_high_watermark", "0.4"]).await;
    until(link.transport(), |state| {
        matches!(state, LinkState::Connected { .. })
    })
    .await;
    soon(receipts.remove(0)).await.unwrap();

    // Closed by an operator.
    broker.ctl(&["close_all_connections", "maintenance"]).await;
    let state = until(link.transport(), |state| {
        matches!(state, LinkState::Reconnecting { .. })
    })
    .await;
    assert!(
        matches!(&state, LinkState::Reconnecting { cause, .. } if cause.contains("maintenance")),
        "{state:?}"
    );
    soon(link.connected()).await.unwrap();
    assert_eq!(soon(echo.call(&2)).await.unwrap(), 2);

    // Killed with calls and messages on their way.
    let stuck: RpcClient<(), ()> = link.rpc_client("stuck").unwrap();
    let call = tokio::spawn(async move { stuck.call(&()).await });
    for n in 2..100 {
        receipts.push(publisher.enqueue(&n).await.unwrap());
    }
    broker.kill9();
    let error = soon(call).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionLost);
    for n in 100..150 {
        receipts.push(publisher.enqueue(&n).await.unwrap());
    }
    broker.restart().await;
    let restarted = Instant::now();
    for receipt in receipts.drain(..) {
        soon(receipt).await.unwrap();
    }
    println!(
        "confirmed {:?} after the broker's return",
        restarted.elapsed()
    );
    for subscriber in [&mut durable, &mut kept] {
        let mut seen = BTreeSet::new();
        while seen.len() < 150 {
            let received = soon(subscriber.recv()).await.unwrap().unwrap();
            assert_eq!(received.gap, None, "nothing was missed");
            seen.insert(received.data);
        }
        assert_eq!(seen.last(), Some(&149));
    }
    let mut gaps = Vec::new();
    loop {
        let received = soon(passing.recv()).await.unwrap().unwrap();
        gaps.extend(received.gap);
        if received.data == 149 {
            break;
        }
    }
    assert!(
        gaps.iter().any(|gap| gap.cause == GapCause::LinkLost),
        "{gaps:?}"
    );
    assert_eq!(soon(echo.call(&3)).await.unwrap(), 3);

    // Back without its memory: the durable subscription is new, and says so.
    broker.restart_without_data().await;
    soon(link.connected()).await.unwrap();
    publisher.publish(&200).await.unwrap();
    for subscriber in [&mut durable, &mut kept] {
        let received = soon(subscriber.recv()).await.unwrap().unwrap();
        assert_eq!(received.data, 200);
        assert_eq!(received.gap.map(|gap| gap.cause), Some(GapCause::LinkLost));
    }
    assert_eq!(soon(echo.call(&4)).await.unwrap(), 4);
    soon(link.close()).await.unwrap();
}
