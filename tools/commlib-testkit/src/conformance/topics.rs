//! Publish and subscribe, best effort.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use commlib_core::{
    Dialect, ErrorKind, GapCause, Header, Incoming, PubSub, Received, Rpc, Subscriber,
    SubscriberOptions,
};
use tokio::sync::mpsc;

use super::peer::{next, next_gap, numbered, pair, send, send_as, subscribe, until};
use super::{Fixture, unique, within};

/// The value that ends a row of numbers.
const END: u64 = u64::MAX;

/// Two hundred messages of one publisher arrive once each, in order.
pub async fn order_from_one_publisher(fixture: &dyn Fixture) {
    let (publisher, mut subscriber) = pair(fixture, "order").await;
    for n in (0..200).chain([END]) {
        publisher.publish(&n).await.expect("publish");
    }
    let arrived = until(&mut subscriber, &END).await;
    assert_eq!(arrived, (0..200).collect::<Vec<_>>());
}

/// Subscribers on one connection and on another get all messages.
pub async fn two_subscribers_each_get_all(fixture: &dyn Fixture) {
    let topic = unique("each");
    let (one, two) = (fixture.connect().await, fixture.connect().await);
    let mut all = [
        subscribe::<u64>(&one, &topic).await,
        subscribe::<u64>(&two, &topic).await,
        subscribe::<u64>(&two, &topic).await,
    ];
    let publisher = one.publisher::<u64>(&topic).expect("publisher");
    for n in (0..20).chain([END]) {
        publisher.publish(&n).await.expect("publish");
    }
    for subscriber in &mut all {
        assert_eq!(until(subscriber, &END).await, (0..20).collect::<Vec<_>>());
    }
}

/// What is published the moment after subscribing arrives, twenty times over.
pub async fn first_message_after_subscribing_arrives(fixture: &dyn Fixture) {
    let (here, there) = (fixture.connect().await, fixture.connect().await);
    for n in 0..20_u64 {
        let topic = unique("first");
        let mut subscriber = subscribe::<u64>(&here, &topic).await;
        there
            .publisher(&topic)
            .expect("publisher")
            .publish(&n)
            .await
            .expect("publish");
        assert_eq!(next(&mut subscriber).await.data, n);
    }
}

/// A new subscriber sees nothing of what was published after the drop of the one before, and nothing twice.
pub async fn a_dropped_subscriber_gets_nothing_more(fixture: &dyn Fixture) {
    let prefix = unique("dropped");
    let topic = format!("{prefix}.a");
    let connection = fixture.connect().await;
    let mut witness = subscribe::<u64>(&connection, &format!("{prefix}.*")).await;
    let publisher = connection.publisher::<u64>(&topic).expect("publisher");
    for round in 0..5 {
        let mut subscriber = subscribe::<u64>(&connection, &topic).await;
        publisher.publish(&round).await.expect("publish");
        assert_eq!(next(&mut subscriber).await.data, round);
        drop(subscriber);
        publisher.publish(&(100 + round)).await.expect("publish");
        // Once the witness has it, it is not under way to this connection any more.
        assert_eq!(until(&mut witness, &(100 + round)).await, [round]);
    }
    let mut subscriber = subscribe::<u64>(&connection, &topic).await;
    publisher.publish(&7).await.expect("publish");
    publisher.publish(&END).await.expect("publish");
    assert_eq!(until(&mut subscriber, &END).await, [7]);
}

/// Several subscriptions of one connection that match the same topic get each message once.
pub async fn overlapping_subscriptions_get_each_message_once(fixture: &dyn Fixture) {
    let prefix = unique("overlap");
    let connection = fixture.connect().await;
    let topic = format!("{prefix}.a.b");
    let mut all = Vec::new();
    for pattern in [
        topic.clone(),
        topic.clone(),
        format!("{prefix}.*"),
        format!("{prefix}.*.b"),
        format!("{prefix}.a.*"),
    ] {
        all.push((subscribe(&connection, &pattern).await, pattern));
    }
    let publisher = fixture
        .connect()
        .await
        .publisher::<u64>(&topic)
        .expect("publisher");
    for n in (0..10).chain([END]) {
        publisher.publish(&n).await.expect("publish");
    }
    for (subscriber, pattern) in &mut all {
        let arrived = until(subscriber, &END).await;
        assert_eq!(arrived, (0..10).collect::<Vec<_>>(), "on {pattern}");
    }
}

/// Dropping one of several subscriptions to the same topics leaves the others as they were.
pub async fn a_dropped_subscription_leaves_overlapping_ones_alone(fixture: &dyn Fixture) {
    let prefix = unique("overlap");
    let connection = fixture.connect().await;
    let topic = format!("{prefix}.a");
    let publisher = connection.publisher::<u64>(&topic).expect("publisher");
    let mut exact = subscribe::<u64>(&connection, &topic).await;
    let mut pattern = subscribe::<u64>(&connection, &format!("{prefix}.*")).await;
    for (n, dropped) in [topic.clone(), format!("{prefix}.*")]
        .into_iter()
        .enumerate()
    {
        drop::<Subscriber<u64>>(subscribe(&connection, &dropped).await);
        publisher.publish(&(n as u64)).await.expect("publish");
        publisher.publish(&END).await.expect("publish");
        for subscriber in [&mut exact, &mut pattern] {
            assert_eq!(
                until(subscriber, &END).await,
                [n as u64],
                "after dropping another {dropped}"
            );
        }
    }
}

/// Subscribing again right after a drop starts anew: the end of the one does not end the other.
pub async fn resubscribing_at_once_loses_nothing(fixture: &dyn Fixture) {
    let topic = unique("again");
    let (here, there) = (fixture.connect().await, fixture.connect().await);
    let publisher = there.publisher::<u64>(&topic).expect("publisher");
    for n in 0..20 {
        let mut subscriber = subscribe::<u64>(&here, &topic).await;
        publisher.publish(&n).await.expect("publish");
        assert_eq!(next(&mut subscriber).await.data, n);
    }
}

/// One publisher, many topics.
pub async fn a_multi_publisher_names_each_topic(fixture: &dyn Fixture) {
    let prefix = unique("multi");
    let connection = fixture.connect().await;
    let mut subscriber = subscribe::<u64>(&connection, &format!("{prefix}.*")).await;
    let publisher = connection.multi_publisher::<u64>().expect("publisher");
    for n in 0..10 {
        publisher
            .publish(&format!("{prefix}.{n}"), &n)
            .await
            .expect("publish");
    }
    for n in 0..10 {
        let message = next(&mut subscriber).await;
        assert_eq!(
            (message.topic.as_str(), message.data),
            (&*format!("{prefix}.{n}"), n)
        );
    }
}

/// One that reads nothing loses messages and is told how many; its neighbour on the connection gets all.
pub async fn a_slow_subscriber_stalls_nobody_and_sees_a_gap(fixture: &dyn Fixture) {
    let topic = unique("slow");
    let connection = fixture.connect().await;
    let options = SubscriberOptions::default().prefetch(8);
    let slow = connection.subscriber_with::<u64>(&topic, options);
    let mut slow = within("a subscription", slow).await.expect("subscribe");
    let mut fast = subscribe::<u64>(&connection, &topic).await;
    let publisher = fixture
        .connect()
        .await
        .publisher::<u64>(&topic)
        .expect("publisher");
    for n in 0..200 {
        publisher.publish(&n).await.expect("publish");
        assert_eq!(next(&mut fast).await.data, n);
    }
    let first = within("the gap of a slow subscriber", slow.recv_incoming()).await;
    let Some(Incoming::Gap(gap)) = first else {
        panic!("a slow subscriber sees {first:?} instead of a gap");
    };
    assert_eq!(gap.cause, GapCause::SlowConsumer);
    let missed = gap.missed.expect("the number is known");
    assert!(missed >= 192, "{missed} missed with room for 8 of 200");
    for n in missed..200 {
        assert_eq!(next(&mut slow).await.data, n);
    }
}

/// What a slow subscriber missed is counted once, although both its inbox and the count of the sender tell of it.
pub async fn missed_messages_are_counted_once(fixture: &dyn Fixture) {
    let topic = unique("counted");
    let connection = fixture.connect().await;
    let options = SubscriberOptions::default().prefetch(8);
    let slow = connection.subscriber_with::<u64>(&topic, options);
    let mut slow = within("a subscription", slow).await.expect("subscribe");
    let mut fast = subscribe::<u64>(&connection, &topic).await;
    let publisher = fixture
        .connect()
        .await
        .publisher::<u64>(&topic)
        .expect("publisher");
    publisher.publish(&0).await.expect("publish");
    assert_eq!(next(&mut slow).await.data, 0);
    for n in 1..100 {
        publisher.publish(&n).await.expect("publish");
    }
    until(&mut fast, &99).await;
    let message = next(&mut slow).await;
    let missed = message.gap.and_then(|gap| gap.missed);
    assert_eq!(
        missed,
        Some(message.data - 1),
        "missed before message {}",
        message.data
    );
}

/// Numbers that a sender left out are reported as missed, between the messages around them.
pub async fn a_sequence_jump_is_a_gap(fixture: &dyn Fixture) {
    let topic = unique("jump");
    let connection = fixture.connect().await;
    let mut subscriber: Subscriber<u64> = subscribe(&connection, &topic).await;
    let sender = unique("sender");
    for id in [1, 2, 5, 6] {
        send(&connection, &topic, numbered(&sender, id), &id.to_string()).await;
    }
    for id in [1, 2] {
        assert_eq!(next(&mut subscriber).await.data, id);
    }
    let gap = next_gap(&mut subscriber).await;
    assert_eq!((gap.cause, gap.missed), (GapCause::SequenceJump, Some(2)));
    for id in [5, 6] {
        let message = next(&mut subscriber).await;
        assert_eq!((message.data, message.gap), (id, None));
    }
}

/// With `dedup` a message of the same sender and id arrives once; without a sender nothing is dropped.
pub async fn repetitions_are_dropped_on_request(fixture: &dyn Fixture) {
    let topic = unique("dedup");
    let connection = fixture.connect().await;
    let options = SubscriberOptions::default().dedup(16);
    let subscriber = connection.subscriber_with::<u64>(&topic, options);
    let mut subscriber = within("a subscription", subscriber)
        .await
        .expect("subscribe");
    let mut plain = subscribe::<u64>(&connection, &topic).await;
    let sender = unique("sender");
    for id in [1, 1, 2, 1, 2] {
        send(&connection, &topic, numbered(&sender, id), &id.to_string()).await;
    }
    // Two with one id and no sender, as old peers send them.
    for _ in 0..2 {
        let mut header = Header::default();
        header.message_id = Some("0".into());
        send(&connection, &topic, header, "9").await;
    }
    send_as(
        &connection,
        &topic,
        Header::default(),
        &END.to_string(),
        Dialect::CommlibPy,
    )
    .await;
    assert_eq!(until(&mut plain, &END).await, [1, 1, 2, 1, 2, 9, 9]);
    assert_eq!(until(&mut subscriber, &END).await, [1, 2, 9, 9]);
}

/// The handler form takes messages one at a time, in order.
pub async fn handlers_get_messages_in_order(fixture: &dyn Fixture) {
    let (publisher, subscriber) = pair::<u64>(fixture, "handler").await;
    let (seen, mut handled) = mpsc::unbounded_channel();
    let busy = Arc::new(AtomicBool::new(false));
    let handle = subscriber.on_message(move |message: Received<u64>| {
        let (seen, busy) = (seen.clone(), busy.clone());
        async move {
            assert!(!busy.swap(true, Ordering::SeqCst), "two at a time");
            tokio::task::yield_now().await;
            busy.store(false, Ordering::SeqCst);
            let _ = seen.send(message.data);
        }
    });
    for n in 0..50 {
        publisher.publish(&n).await.expect("publish");
    }
    for n in 0..50 {
        assert_eq!(within("the handler", handled.recv()).await, Some(n));
    }
    within("the handler to stop", handle.stop()).await;
}

/// A handler that blocks its thread delays neither a neighbour on the connection nor calls.
pub async fn a_blocked_handler_delays_nobody(fixture: &dyn Fixture) {
    let topic = unique("blocking");
    let connection = fixture.connect().await;
    let (seen, mut handled) = mpsc::unbounded_channel();
    let (release, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Mutex::new(wait);
    let handle =
        subscribe(&connection, &topic)
            .await
            .on_message_blocking(move |message: Received<u64>| {
                let _ = seen.send(message.data);
                // Ends when the case does, however it does.
                let _ = wait.lock().map(|wait| wait.recv());
            });
    let mut fast = subscribe::<u64>(&connection, &topic).await;
    let publisher = connection.publisher::<u64>(&topic).expect("publisher");
    for n in 0..20 {
        publisher.publish(&n).await.expect("publish");
        assert_eq!(next(&mut fast).await.data, n);
    }
    assert_eq!(within("the handler", handled.recv()).await, Some(0));
    let service = unique("blocking-service");
    let serving = connection.rpc_service(&service, |n: u64| async move { Ok(n) });
    let serving = within("a service", serving).await.expect("serve");
    let client = connection.rpc_client::<u64, u64>(&service).expect("client");
    assert_eq!(within("a call", client.call(&1)).await.expect("call"), 1);
    drop((release, serving));
    within("the handler to stop", handle.stop()).await;
}

/// Names and patterns that break the rules are refused by every kind of endpoint.
pub async fn bad_names_are_refused(fixture: &dyn Fixture) {
    let connection = fixture.connect().await;
    for bad in ["", "a..b", "a b", "a/b", "a.#", "a.b*", "x\n", "50%"] {
        let mut kinds = vec![
            connection.publisher::<u64>(bad).err().map(|e| e.kind()),
            connection
                .subscriber::<u64>(bad)
                .await
                .err()
                .map(|e| e.kind()),
            connection
                .rpc_client::<u64, u64>(bad)
                .err()
                .map(|e| e.kind()),
        ];
        let service = connection
            .rpc_service(bad, |n: u64| async move { Ok(n) })
            .await;
        kinds.push(service.err().map(|e| e.kind()));
        let publisher = connection.multi_publisher::<u64>().expect("publisher");
        kinds.push(publisher.publish(bad, &1).await.err().map(|e| e.kind()));
        assert_eq!(kinds, [Some(ErrorKind::InvalidAddress); 5], "{bad:?}");
    }
    assert!(
        connection.publisher::<u64>("a.*").is_err(),
        "a pattern is no topic"
    );
}
