//! The broker goes and comes back.

use std::time::Duration;

use commlib_core::{
    Connection, Delivery, ErrorKind, GapCause, Header, Incoming, LinkState, PubSub,
    PublisherOptions, Rpc, Subscriber, SubscriberOptions,
};
use tokio::sync::mpsc;

use super::peer::{next, send, subscribe, until};
use super::{Fixture, Outage, unique, within};

/// The value that ends a row of numbers.
const END: u64 = u64::MAX;

fn outage(fixture: &dyn Fixture) -> &dyn Outage {
    fixture.outage().expect("the case is gated on an outage")
}

async fn lost(connection: &Connection) {
    let mut states = connection.link().watch();
    let lost = states.wait_for(|state| matches!(state, LinkState::Reconnecting { .. }));
    within("the state Reconnecting", lost)
        .await
        .expect("the link lives");
}

async fn back(connection: &Connection) {
    let mut states = connection.link().watch();
    let back = states.wait_for(|state| matches!(state, LinkState::Connected { .. }));
    within("the state Connected", back)
        .await
        .expect("the link lives");
}

/// Takes the link away and brings it back, for each of the connections.
async fn interrupt(fixture: &dyn Fixture, connections: &[&Connection]) {
    outage(fixture).down().await;
    for connection in connections {
        lost(connection).await;
    }
    outage(fixture).up().await;
    for connection in connections {
        back(connection).await;
    }
}

/// The state tells what happens, twice in a row.
pub async fn states_go_reconnecting_then_connected(fixture: &dyn Fixture) {
    let connection = fixture.connect().await;
    for _ in 0..2 {
        assert!(connection.link().state().is_connected());
        outage(fixture).down().await;
        lost(&connection).await;
        let state = connection.link().state();
        let LinkState::Reconnecting { attempt, cause } = state else {
            panic!("{state:?}");
        };
        assert!(
            attempt >= 1 && !cause.is_empty(),
            "attempt {attempt} because of {cause:?}"
        );
        outage(fixture).up().await;
        back(&connection).await;
        within("the link", connection.connected())
            .await
            .expect("connected");
    }
}

/// Subscriptions are in place again before the state says so, and tell that they may have missed something.
pub async fn subscribers_resume_and_see_a_gap(fixture: &dyn Fixture) {
    let prefix = unique("resumed");
    let connection = fixture.connect().await;
    let topic = format!("{prefix}.a");
    let mut subscribers = Vec::new();
    for pattern in [topic.clone(), format!("{prefix}.*")] {
        subscribers.push(subscribe::<u64>(&connection, &pattern).await);
    }
    send(&connection, &topic, Header::default(), "1").await;
    for subscriber in &mut subscribers {
        assert_eq!(next(subscriber).await.data, 1);
    }
    interrupt(fixture, &[&connection]).await;
    send(&connection, &topic, Header::default(), "2").await;
    for subscriber in &mut subscribers {
        let notice = within("the gap", subscriber.recv_incoming()).await;
        let Some(Incoming::Gap(gap)) = notice else {
            panic!("a subscriber sees {notice:?} instead of a gap");
        };
        assert_eq!((gap.cause, gap.missed), (GapCause::LinkLost, None));
        assert_eq!(next(subscriber).await.data, 2);
    }
}

/// Services and clients of before the outage work after it.
pub async fn services_and_clients_resume(fixture: &dyn Fixture) {
    let service = unique("resumed");
    let (here, there) = (fixture.connect().await, fixture.connect().await);
    let handle = here.rpc_service(&service, |n: u64| async move { Ok(n) });
    let handle = within("a service", handle).await.expect("serve");
    let client = there.rpc_client::<u64, u64>(&service).expect("client");
    for n in 0..3 {
        assert_eq!(within("a reply", client.call(&n)).await.expect("call"), n);
        interrupt(fixture, &[&here, &there]).await;
    }
    assert_eq!(within("a reply", client.call(&9)).await.expect("call"), 9);
    let fresh = fixture.connect().await;
    let client = fresh.rpc_client::<u64, u64>(&service).expect("client");
    assert_eq!(within("a reply", client.call(&10)).await.expect("call"), 10);
    assert!(!handle.is_finished());
}

/// Calls in flight fail the moment the link is lost, not at their timeout, and say that they may have been executed.
pub async fn calls_in_flight_fail_at_once(fixture: &dyn Fixture) {
    let service = unique("in-flight");
    let (here, there) = (fixture.connect().await, fixture.connect().await);
    let (started, mut running) = mpsc::unbounded_channel();
    let handle = here.rpc_service(&service, move |_: u64| {
        let _ = started.send(());
        std::future::pending::<Result<u64, _>>()
    });
    let _handle = within("a service", handle).await.expect("serve");
    let client = std::sync::Arc::new(there.rpc_client::<u64, u64>(&service).expect("client"));
    let mut calls = Vec::new();
    for n in 0..5 {
        let client = client.clone();
        calls.push(tokio::spawn(async move {
            client.call_within(&n, Duration::from_secs(600)).await
        }));
        within("a handler to run", running.recv()).await;
    }
    outage(fixture).down().await;
    for call in calls {
        let error = within("the call to fail", call)
            .await
            .expect("no panic")
            .expect_err("the link is lost");
        assert_eq!(error.kind(), ErrorKind::ConnectionLost);
        assert!(error.maybe_executed() && error.is_retryable(), "{error:?}");
    }
    lost(&there).await;
    let error = within("the call to fail", client.call(&9))
        .await
        .expect_err("the link is down");
    assert_eq!(error.kind(), ErrorKind::ConnectionLost);
    assert!(!error.maybe_executed(), "it was not sent");
    outage(fixture).up().await;
    back(&there).await;
}

/// Best effort does not wait: it says that the link is down, and works when it is back.
pub async fn best_effort_says_that_the_link_is_down(fixture: &dyn Fixture) {
    let topic = unique("down");
    let connection = fixture.connect().await;
    let mut subscriber = subscribe::<u64>(&connection, &topic).await;
    let publisher = connection.publisher::<u64>(&topic).expect("publisher");
    outage(fixture).down().await;
    lost(&connection).await;
    for n in 0..3 {
        let error = within("the refusal", publisher.publish(&n))
            .await
            .expect_err("the link is down");
        assert_eq!(error.kind(), ErrorKind::ConnectionLost);
    }
    outage(fixture).up().await;
    back(&connection).await;
    publisher.publish(&7).await.expect("publish");
    let message = next(&mut subscriber).await;
    let cause = message.gap.map(|gap| gap.cause);
    assert_eq!(
        (message.data, cause),
        (7, Some(GapCause::LinkLost)),
        "refused messages are not missed"
    );
}

/// At least once is confirmed after the outage, not during it, and arrives.
pub async fn at_least_once_waits_for_the_link(fixture: &dyn Fixture) {
    let topic = unique("outbox");
    let connection = fixture.connect().await;
    let options = PublisherOptions::default().delivery(Delivery::AtLeastOnce);
    let publisher = connection
        .publisher_with::<u64>(&topic, options)
        .expect("publisher");
    // On the same connection, because that subscription is in place before anything is sent again.
    let mut subscriber = subscribe::<u64>(&connection, &topic).await;
    outage(fixture).down().await;
    lost(&connection).await;
    let (confirmed, mut confirmations) = mpsc::unbounded_channel();
    let publishing = tokio::spawn(async move {
        for n in (0..20).chain([END]) {
            let outcome = publisher.publish(&n).await;
            let _ = confirmed.send(outcome.map(|()| n));
        }
    });
    // Long enough for a transport that confirms what it cannot have delivered.
    let early = tokio::time::timeout(Duration::from_millis(300), confirmations.recv()).await;
    assert!(early.is_err(), "confirmed without a link: {early:?}");
    outage(fixture).up().await;
    for n in (0..20).chain([END]) {
        let outcome = within("a confirmation", confirmations.recv())
            .await
            .expect("publishing goes on");
        assert_eq!(outcome.expect("published"), n);
    }
    within("publishing", publishing).await.expect("no panic");
    let mut arrived = until(&mut subscriber, &END).await;
    arrived.dedup();
    assert_eq!(arrived, (0..20).collect::<Vec<_>>());
}

/// A durable subscription gets everything that was confirmed before, during and after, in order.
pub async fn durable_subscriptions_miss_nothing(fixture: &dyn Fixture) {
    let (topic, session) = (unique("durable"), unique("session"));
    let receiving = fixture.connect_durable(&session).await;
    let sending = fixture.connect().await;
    let options = SubscriberOptions::default()
        .delivery(Delivery::AtLeastOnce)
        .durable(unique("name"));
    let subscriber = receiving.subscriber_with(&topic, options.dedup(1024));
    let mut subscriber: Subscriber<u64> = within("a subscription", subscriber)
        .await
        .expect("subscribe");
    let options = PublisherOptions::default().delivery(Delivery::AtLeastOnce);
    let publisher = sending.publisher_with(&topic, options).expect("publisher");
    for n in 0..10 {
        within("a confirmation", publisher.publish(&n))
            .await
            .expect("publish");
    }
    outage(fixture).down().await;
    lost(&sending).await;
    lost(&receiving).await;
    let publishing = tokio::spawn(async move {
        for n in (10..30).chain([END]) {
            publisher.publish(&n).await.expect("publish");
        }
    });
    outage(fixture).up().await;
    within("publishing", publishing).await.expect("no panic");
    let arrived = until(&mut subscriber, &END).await;
    assert_eq!(arrived, (0..30).collect::<Vec<_>>());
}

/// A connection can be closed while its link is down.
pub async fn closing_works_without_a_link(fixture: &dyn Fixture) {
    let connection = fixture.connect().await;
    let mut subscriber: Subscriber<u64> = subscribe(&connection, &unique("closing")).await;
    outage(fixture).down().await;
    lost(&connection).await;
    // There is nothing to flush.
    within("the close", connection.close())
        .await
        .expect("close");
    assert!(matches!(
        connection.link().state(),
        LinkState::Closed { .. }
    ));
    let end = async { while subscriber.recv_incoming().await.is_some() {} };
    within("the end of the subscription", end).await;
    outage(fixture).up().await;
}
