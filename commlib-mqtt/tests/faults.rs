//! What goes wrong with brokers and links, against a real Mosquitto. One test for each trap that MQTT clients fall into.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use commlib_core::{
    ErrorKind, GapCause, Inbox, Incoming, LinkState, Message, Receipt, SendOptions, Transport,
};
use commlib_mqtt::{MqttConfig, MqttTransport, Session};
use commlib_testkit::{Mosquitto, Proxy};
use common::*;
use tokio::time::{Instant, sleep};

/// A broker, if there is one.
macro_rules! broker {
    () => {
        match Mosquitto::available() {
            true => Mosquitto::start().await,
            false => return,
        }
    };
}

fn quick(address: impl Into<String>) -> MqttConfig {
    MqttConfig::new(address).keep_alive(Duration::from_secs(1))
}

fn kept(address: impl Into<String>, id: &str) -> MqttConfig {
    quick(address).client_id(id).session(Session::Persistent)
}

/// Publishes numbers at least once without waiting for their confirmations.
async fn publish_numbers(link: &MqttTransport, numbers: std::ops::Range<usize>) -> Vec<Receipt> {
    let mut receipts = Vec::new();
    for n in numbers {
        receipts.push(publish(link, "numbers", number(n)).await);
    }
    receipts
}

/// The first arrivals of `count` different numbers, in their order; repeats are allowed and left out.
async fn receive_numbers(inbox: &mut Inbox, count: usize) -> Vec<usize> {
    let mut seen = BTreeSet::new();
    let mut order = Vec::new();
    while order.len() < count {
        if let Incoming::Message(mut arrival) = next(inbox).await {
            let n = std::str::from_utf8(&arrival.message.data).unwrap();
            let n = n.parse().unwrap();
            if let Some(ack) = arrival.ack.take() {
                ack.accept();
            }
            if seen.insert(n) {
                order.push(n);
            }
        }
    }
    order
}

async fn confirmed(receipts: Vec<Receipt>) {
    for receipt in receipts {
        soon(receipt).await.unwrap();
    }
}

/// Trap 1.1: a client that forgets what was queued when the link broke.
#[tokio::test]
async fn fifty_of_fifty_survive_a_killed_broker() {
    for session in [Session::Clean, Session::Persistent] {
        let broker = broker!();
        let receiver = connect(kept(broker.address(), "receiver")).await;
        let mut inbox = listen_acked(&receiver, "numbers").await;
        let config = kept(broker.address(), "sender").session(session);
        let sender = connect(config).await;
        // A stopped broker confirms nothing, so these are in flight when it dies; the rest never saw a link.
        broker.pause();
        let mut receipts = publish_numbers(&sender, 0..25).await;
        broker.kill9();
        until_down(&sender).await;
        receipts.extend(publish_numbers(&sender, 25..50).await);
        broker.restart().await;
        confirmed(receipts).await;
        let order = receive_numbers(&mut inbox, 50).await;
        assert!(order.is_sorted(), "{order:?}");
    }
}

/// Trap 1.2: a client that waits for ever for a confirmation that the lost session will never send.
#[tokio::test]
async fn a_lost_session_is_no_end() {
    let broker = broker!();
    let sender = connect(kept(broker.address(), "sender")).await;
    broker.pause();
    let mut receipts = publish_numbers(&sender, 0..400).await;
    broker.kill9();
    broker.restart_without_data().await;
    receipts.extend(publish_numbers(&sender, 400..500).await);
    confirmed(receipts).await;
}

/// Trap 1.3: packet ids of subscriptions and publishes that collide when everything is asked for anew.
#[tokio::test]
async fn many_subscriptions_and_publishes_come_back_together() {
    let broker = broker!();
    let proxy = Proxy::start(broker.address()).await;
    let link = connect(quick(proxy.address())).await;
    let mut inboxes = Vec::new();
    for n in 0..300 {
        inboxes.push(listen(&link, &format!("many.{n}")).await);
    }
    broker.pause();
    let receipts = publish_numbers(&link, 0..400).await;
    proxy.cut();
    until_down(&link).await;
    broker.resume();
    confirmed(receipts).await;
    until_up(&link).await;
    for (n, inbox) in inboxes.iter_mut().enumerate() {
        assert_eq!(gap(inbox).await.cause, GapCause::LinkLost);
        post(&link, &format!("many.{n}"), number(n)).await;
        assert_eq!(data(inbox).await, n.to_string());
    }
}

/// Trap 1.4: a client that waits for itself when the one who receives also publishes.
#[tokio::test]
async fn receiving_and_publishing_do_not_wait_for_each_other() {
    let broker = broker!();
    let link = connect(quick(broker.address())).await;
    let mut numbers = listen(&link, "numbers").await;
    let mut echoes = listen(&link, "echo.*").await;
    drop(publish_numbers(&link, 0..300).await);
    for _ in 0..300 {
        let text = data(&mut numbers).await;
        post(&link, "echo.a", Message::new(text.clone())).await;
        drop(publish(&link, "echo.b", Message::new(text)).await);
    }
    for _ in 0..600 {
        data(&mut echoes).await;
    }
}

/// Trap 1.5: "queued" passed off as "delivered".
#[tokio::test]
async fn a_receipt_waits_for_the_broker() {
    let broker = broker!();
    let link = connect(kept(broker.address(), "c").keep_alive(Duration::from_secs(10))).await;
    broker.pause();
    let mut receipt = publish(&link, "a", number(1)).await;
    let early = tokio::time::timeout(Duration::from_millis(200), &mut receipt).await;
    assert!(early.is_err(), "confirmed by nobody");
    broker.resume();
    soon(receipt).await.unwrap();
}

/// Trap 1.5, at volume.
#[tokio::test]
async fn five_hundred_in_flight() {
    let broker = broker!();
    let link = connect(quick(broker.address())).await;
    let mut inbox = listen(&link, "numbers").await;
    let receipts = publish_numbers(&link, 0..500).await;
    assert_eq!(
        receive_numbers(&mut inbox, 500).await,
        Vec::from_iter(0..500)
    );
    confirmed(receipts).await;
}

/// Trap 1.7: a small default limit, and messages that vanish or come again for ever above it.
#[tokio::test]
async fn large_messages_arrive_and_larger_ones_are_reported() {
    let broker = broker!();
    let large = connect(quick(broker.address()).max_payload(4 << 20)).await;
    let link = connect(kept(broker.address(), "c")).await;
    let mut inbox = listen_acked(&link, "size").await;
    for size in [200 << 10, 1 << 20] {
        let text = format!("\"{}\"", "x".repeat(size - 2));
        soon(publish(&link, "size", Message::new(text.clone())).await)
            .await
            .unwrap();
        assert_eq!(data(&mut inbox).await, text);
    }
    let big = format!("\"{}\"", "x".repeat(2 << 20));
    let error = try_send(&link, "size", Message::new(big.clone()), surely()).await;
    assert_eq!(error.unwrap_err().kind(), ErrorKind::TooLarge);
    soon(publish(&large, "size", Message::new(big)).await)
        .await
        .unwrap();
    assert!(matches!(next(&mut inbox).await, Incoming::Malformed(_)));
    // It is acknowledged, and the link is none the worse for it.
    soon(publish(&link, "size", number(1)).await).await.unwrap();
    assert_eq!(data(&mut inbox).await, "1");
}

/// Trap 1.7: above the limit of the decoder the link has to go, but not in a spin.
#[tokio::test]
async fn a_packet_that_poisons_the_session_does_not_spin() {
    let broker = broker!();
    let proxy = Proxy::start(broker.address()).await;
    let config = kept(proxy.address(), "c")
        .max_payload(1000)
        .hard_limit(100_000);
    let link = connect(config).await;
    let _inbox = listen_acked(&link, "poison").await;
    let healthy = connect(quick(broker.address())).await;
    let poison = Message::new(format!("\"{}\"", "x".repeat(300_000)));
    drop(publish(&healthy, "poison", poison).await);
    let cause = until_down(&link).await;
    assert!(cause.contains("PacketTooLarge"), "{cause}");
    let before = proxy.connections().total;
    sleep(Duration::from_secs(2)).await;
    let attempts = proxy.connections().total - before;
    assert!(attempts < 30, "{attempts} connections in 2 s");
}

/// Trap 1.8: no backoff. A broker that accepts and drops at once must not be hammered.
#[tokio::test]
async fn a_broker_that_drops_everyone_is_not_hammered() {
    let fake = Fake::start().await;
    let config = fake.config().start_offline(true);
    let link = connect(config).await;
    let mut attempts = 0;
    let end = Instant::now() + Duration::from_secs(2);
    while let Ok(peer) = tokio::time::timeout_at(end, fake.accept(false)).await {
        drop(peer);
        attempts += 1;
    }
    assert!((2..30).contains(&attempts), "{attempts} connections in 2 s");
    // Trap 1.13 looks like this too, and the cause says so.
    let suspicion = |state: &LinkState| matches!(state, LinkState::Reconnecting { cause, .. } if cause.contains("client id"));
    state(&link, suspicion).await;
}

/// Trap 1.9: a client that goes on, or comes back, after it was closed.
#[tokio::test]
async fn closed_is_closed() {
    let broker = broker!();
    let proxy = Proxy::start(broker.address()).await;
    let link = connect(quick(proxy.address())).await;
    let mut inbox = listen(&link, "a").await;
    let receipts = publish_numbers(&link, 0..100).await;
    soon(link.close()).await.unwrap();
    soon(link.close()).await.unwrap();
    confirmed(receipts).await;
    assert!(soon(inbox.recv()).await.is_none());
    assert!(matches!(link.link().state(), LinkState::Closed { .. }));
    for options in [surely(), SendOptions::default()] {
        let refused = try_send(&link, "a", number(1), options).await;
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Closed);
    }
    let refused = try_listen(&link, "b", Default::default()).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Closed);
    proxy.wait_for(|c| c.open == 0).await;
    sleep(Duration::from_millis(300)).await;
    assert_eq!(proxy.connections().total, 1);
}

/// Trap 1.9: what could not be confirmed in time is named, not kept quiet.
#[tokio::test]
async fn closing_names_what_was_not_confirmed() {
    let broker = broker!();
    let config = quick(broker.address())
        .keep_alive(Duration::from_secs(10))
        .close_timeout(Duration::from_millis(200));
    let link = connect(config).await;
    broker.pause();
    let receipts = publish_numbers(&link, 0..3).await;
    let error = soon(link.close()).await.unwrap_err();
    assert!(error.to_string().contains('3'), "{error}");
    for receipt in receipts {
        let error = soon(receipt).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed);
        assert!(error.maybe_executed());
    }
    broker.resume();
}

/// Trap 1.9: the task ends with its last handle, also while the broker is away.
#[tokio::test]
async fn dropping_every_handle_ends_the_task() {
    let broker = broker!();
    let proxy = Proxy::start(broker.address()).await;
    let link = connect(quick(proxy.address())).await;
    let inbox = listen(&link, "a").await;
    let mut watch = link.link().watch();
    drop(link);
    post(&connect(quick(broker.address())).await, "a", number(1)).await;
    let mut inbox = inbox;
    assert_eq!(data(&mut inbox).await, "1");
    drop(inbox);
    proxy.wait_for(|c| c.open == 0).await;
    let closed = |state: &LinkState| matches!(state, LinkState::Closed { .. });
    drop(soon(watch.wait_for(closed)).await.unwrap());
    let link = connect(quick(proxy.address())).await;
    let mut watch = link.link().watch();
    proxy.refuse(true).await;
    proxy.cut();
    until_down(&link).await;
    drop(link);
    drop(soon(watch.wait_for(closed)).await.unwrap());
}

/// Trap 1.10: something lost because a wait was given up in the middle.
#[tokio::test]
async fn a_cancelled_send_is_sent_whole_or_not_at_all() {
    let broker = broker!();
    let link = connect(quick(broker.address()).outbox(8)).await;
    let mut inbox = listen(&link, "numbers").await;
    let mut accepted = Vec::new();
    for n in 0..500 {
        let to = topic("numbers");
        let send = link.send(&to, number(n), surely());
        if tokio::time::timeout(Duration::from_micros(50), send)
            .await
            .is_ok()
        {
            accepted.push(n);
        }
    }
    soon(publish(&link, "numbers", number(500)).await)
        .await
        .unwrap();
    accepted.push(500);
    let got = receive_numbers(&mut inbox, accepted.len()).await;
    assert_eq!(got, accepted);
}

/// Trap 1.11: acknowledged before anyone saw it.
#[tokio::test]
async fn what_was_not_accepted_comes_again_in_the_next_life() {
    let broker = broker!();
    let link = connect(kept(broker.address(), "c")).await;
    let mut inbox = soon(link.listen(&pattern("numbers"), durable()))
        .await
        .unwrap();
    let sender = connect(quick(broker.address())).await;
    confirmed(publish_numbers(&sender, 0..3).await).await;
    assert_eq!(data(&mut inbox).await, "0");
    let seen = arrival(&mut inbox).await;
    soon(link.close()).await.unwrap();
    drop(seen);
    confirmed(publish_numbers(&sender, 3..5).await).await;
    let link = connect(kept(broker.address(), "c")).await;
    assert!(until_up(&link).await, "the session was resumed");
    let mut inbox = soon(link.listen(&pattern("numbers"), durable()))
        .await
        .unwrap();
    assert_eq!(receive_numbers(&mut inbox, 4).await, [1, 2, 3, 4]);
}

/// What was accepted for a link that then broke must not come late: a robot would move minutes after the order.
#[tokio::test]
async fn best_effort_messages_do_not_outlive_their_link() {
    let broker = broker!();
    let proxy = Proxy::start(broker.address()).await;
    let link = connect(quick(proxy.address())).await;
    let watcher = connect(quick(broker.address())).await;
    let mut orders = listen(&watcher, "orders").await;
    proxy.black_hole(true);
    // Until every buffer is full, so that some are certainly still in our hands.
    let order = Message::new(format!("\"{}\"", "x".repeat(200_000)));
    let blocked = async {
        while try_send(&link, "orders", order.clone(), SendOptions::default())
            .await
            .is_ok()
        {}
    };
    soon(blocked).await;
    proxy.cut();
    proxy.black_hole(false);
    until_up(&link).await;
    post(&link, "orders", number(7)).await;
    assert_eq!(data(&mut orders).await, "7");
}

/// Trap 1.12: a dead peer noticed minutes later.
#[tokio::test]
async fn a_half_open_link_is_noticed_within_one_and_a_half_keep_alives() {
    let broker = broker!();
    for busy in [false, true] {
        let proxy = Proxy::start(broker.address()).await;
        let link = connect(quick(proxy.address())).await;
        proxy.black_hole(true);
        let start = Instant::now();
        let noise = async {
            if !busy {
                std::future::pending::<()>().await;
            }
            loop {
                let _ = link
                    .send(&topic("a"), number(1), SendOptions::default())
                    .await;
                sleep(Duration::from_millis(20)).await;
            }
        };
        let cause = tokio::select! {
            cause = until_down(&link) => cause,
            () = noise => unreachable!("it never ends"),
        };
        let took = start.elapsed();
        assert!(took < Duration::from_millis(2500), "{took:?}");
        assert!(cause.contains("keep_alive"), "{cause}");
        proxy.black_hole(false);
        until_up(&link).await;
    }
}

/// Trap 1.12, the other side of it: slow is not dead.
#[tokio::test]
async fn a_slow_link_is_not_taken_for_a_dead_one() {
    let broker = broker!();
    let proxy = Proxy::start(broker.address()).await;
    let link = connect(quick(proxy.address())).await;
    let mut inbox = listen(&link, "big").await;
    // One packet takes three keep-alives to arrive.
    proxy.throttle(Some(100_000));
    let text = format!("\"{}\"", "x".repeat(300_000));
    let sender = connect(quick(broker.address())).await;
    post(&sender, "big", Message::new(text.clone())).await;
    assert_eq!(data(&mut inbox).await, text);
    // And the same in the other direction.
    let mut far = listen(&sender, "back").await;
    post(&link, "back", Message::new(text.clone())).await;
    assert_eq!(data(&mut far).await, text);
    assert_eq!(proxy.connections().total, 1);
}

/// Trap 1.13: two clients of one id that evict each other in silence.
#[tokio::test]
async fn a_doubled_client_id_is_reported() {
    let broker = broker!();
    let config = quick(broker.address()).client_id("twin");
    let (one, two) = (connect(config.clone()).await, connect(config).await);
    let suspicion = |state: &LinkState| matches!(state, LinkState::Reconnecting { cause, .. } if cause.contains("`twin`"));
    tokio::select! {
        _ = state(&one, suspicion) => {}
        _ = state(&two, suspicion) => {}
    }
}

/// A consumer that takes nothing must not hold up the others.
#[tokio::test]
async fn a_slow_consumer_stalls_nobody() {
    let broker = broker!();
    let link = connect(kept(broker.address(), "c")).await;
    let _asleep = listen_acked(&link, "numbers").await;
    let mut dozing = listen(&link, "numbers").await;
    let mut awake = listen(&link, "other").await;
    let receipts = publish_numbers(&link, 0..3000).await;
    post(&link, "other", number(1)).await;
    assert_eq!(data(&mut awake).await, "1");
    confirmed(receipts).await;
    assert_eq!(gap(&mut dozing).await.cause, GapCause::SlowConsumer);
}

/// On MQTT 3.1.1 nothing but the end of the link stops a broker that sends faster than handlers work.
#[tokio::test]
async fn a_flood_ends_the_link_until_half_of_it_is_taken() {
    let broker = broker!();
    let link = connect(kept(broker.address(), "c").unacked_bytes(100_000)).await;
    let mut inbox = listen_acked(&link, "flood").await;
    let sender = connect(quick(broker.address())).await;
    let mut receipts = Vec::new();
    for n in 0..100 {
        let text = format!("\"{n:05}{}\"", "x".repeat(4000));
        receipts.push(publish(&sender, "flood", Message::new(text)).await);
    }
    confirmed(receipts).await;
    let cause = until_down(&link).await;
    assert!(cause.contains("unacked_bytes"), "{cause}");
    let mut seen = BTreeSet::new();
    while seen.len() < 100 {
        seen.insert(data(&mut inbox).await);
    }
}

/// While the broker is away.
#[tokio::test]
async fn connecting_without_a_broker() {
    let proxy = Proxy::start("127.0.0.1:1").await;
    proxy.refuse(true).await;
    let config = quick(proxy.address()).connect_timeout(Duration::from_millis(500));
    let start = Instant::now();
    let error = soon(MqttTransport::connect(config.clone()))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connect);
    assert!(
        start.elapsed() >= Duration::from_millis(500) && start.elapsed() < Duration::from_secs(2)
    );
    let text = error.to_string();
    assert!(
        text.contains(&proxy.address()) && text.contains("refused"),
        "{text}"
    );
    // In the background it goes on, and what was asked for meanwhile happens in the end.
    let broker = broker!();
    let link = connect(config.start_offline(true)).await;
    let receipt = publish(&link, "a", number(1)).await;
    let (_inbox, ()) = tokio::join!(listen(&link, "b"), async {
        until_down(&link).await;
        proxy.retarget(broker.address());
        proxy.refuse(false).await;
    });
    soon(receipt).await.unwrap();
}

/// What a receiver learns of a restart: best effort a gap, at least once nothing, because nothing is missing.
#[tokio::test]
async fn gaps_tell_the_truth_about_a_restart() {
    let broker = broker!();
    let link = connect(kept(broker.address(), "c")).await;
    let mut sure = listen_acked(&link, "sure").await;
    let mut casual = listen(&link, "casual").await;
    broker.stop().await;
    until_down(&link).await;
    broker.restart().await;
    assert!(until_up(&link).await);
    for name in ["sure", "casual"] {
        soon(publish(&link, name, number(1)).await).await.unwrap();
    }
    assert_eq!(gap(&mut casual).await.cause, GapCause::LinkLost);
    assert_eq!(
        (data(&mut casual).await, data(&mut sure).await),
        ("1".into(), "1".into())
    );
    broker.restart_without_data().await;
    assert_eq!(gap(&mut sure).await.cause, GapCause::LinkLost);
}

/// Overlapping filters on a broker that sends a copy for each.
#[tokio::test]
async fn every_inbox_gets_a_message_once() {
    let broker = broker!();
    let link = connect(quick(broker.address())).await;
    let mut inboxes = Vec::new();
    for text in ["a.b.c", "a.*", "a.b.*", "*", "a.*.c", "a.b.c"] {
        inboxes.push(listen(&link, text).await);
    }
    drop(inboxes.remove(3));
    for n in 1..=3 {
        soon(publish(&link, "a.b.c", number(n)).await)
            .await
            .unwrap();
    }
    for inbox in &mut inboxes {
        for n in 1..=3 {
            assert_eq!(data(inbox).await, n.to_string());
        }
    }
}
