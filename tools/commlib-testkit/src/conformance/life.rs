//! The beginning and the end of a connection.

use std::time::Duration;

use commlib_core::{
    Delivery, ErrorKind, Header, LinkState, ListenOptions, Message, PubSub, PublisherOptions,
    Received, Rpc, RpcServiceOptions, SendOptions, Source, Subscriber, Target, Value, json,
};

use super::gate::Gate;
use super::peer::{name, next, send, subscribe, until};
use super::{Fixture, unique, within};

/// A fresh connection is up and says where it goes.
pub async fn the_link_is_connected(fixture: &dyn Fixture) {
    let connection = fixture.connect().await;
    within("the link", connection.connected())
        .await
        .expect("connected");
    let link = connection.link();
    assert!(
        matches!(link.state(), LinkState::Connected { .. }),
        "{:?}",
        link.state()
    );
    assert!(link.url().contains(':'), "{}", link.url());
    assert!(link.capabilities().max_payload >= 1024);
}

/// Closing twice is fine, also at once and by different clones.
pub async fn close_is_idempotent(fixture: &dyn Fixture) {
    let connection = fixture.connect().await;
    let clone = connection.clone();
    let both = async { tokio::join!(connection.close(), clone.close()) };
    let (one, two) = within("the close", both).await;
    assert!(one.is_ok() && two.is_ok(), "{one:?}, {two:?}");
    within("another close", connection.close())
        .await
        .expect("close again");
    assert!(matches!(
        connection.link().state(),
        LinkState::Closed { .. }
    ));
}

/// Every operation on a closed connection is [`ErrorKind::Closed`], at once.
pub async fn use_after_close_is_closed(fixture: &dyn Fixture) {
    let topic = unique("closed");
    let connection = fixture.connect().await;
    let publisher = connection.publisher::<u64>(&topic).expect("publisher");
    let client = connection.rpc_client::<u64, u64>(&topic).expect("client");
    let handle = connection.rpc_service(&topic, |n: u64| async move { Ok(n) });
    let handle = within("a service", handle).await.expect("serve");
    assert_eq!(within("a reply", client.call(&1)).await.expect("call"), 1);
    let fresh = connection
        .rpc_client::<u64, u64>(&unique("closed"))
        .expect("client");
    let confirms = connection.link().capabilities().confirms;
    within("the close", connection.close())
        .await
        .expect("close");

    let mut outcomes = vec![
        (
            "publish",
            within("publish", publisher.publish(&1)).await.err(),
        ),
        (
            "subscribe",
            within("subscribe", connection.subscriber::<u64>(&topic))
                .await
                .err(),
        ),
        ("call", within("call", client.call(&1)).await.err()),
        ("another call", within("call", fresh.call(&1)).await.err()),
        (
            "connected",
            within("connected", connection.connected()).await.err(),
        ),
    ];
    let serve = connection.rpc_service(&topic, |n: u64| async move { Ok(n) });
    outcomes.push(("serve", within("serve", serve).await.err()));
    if confirms {
        let options = PublisherOptions::default().delivery(Delivery::AtLeastOnce);
        let publisher = connection
            .publisher_with::<u64>(&topic, options)
            .expect("publisher");
        outcomes.push((
            "publish at least once",
            within("publish", publisher.publish(&1)).await.err(),
        ));
    }
    let transport = connection.transport();
    for target in [Target::Topic(name(&topic)), Target::Queue(name(&topic))] {
        let sent = transport.send(&target, Message::new("1"), SendOptions::default());
        outcomes.push(("send", within("send", sent).await.err()));
    }
    for source in [
        Source::Topic(name(&topic).into()),
        Source::Queue(name(&topic)),
        Source::Replies,
    ] {
        let listen = transport.listen(&source, ListenOptions::default());
        outcomes.push(("listen", within("listen", listen).await.err()));
    }
    for (operation, outcome) in outcomes {
        assert_eq!(
            outcome.map(|e| e.kind()),
            Some(ErrorKind::Closed),
            "{operation}"
        );
    }
    within("the service to end", handle.stop()).await;
}

/// Closing ends subscribers, after what has arrived, and services.
pub async fn closing_ends_endpoints(fixture: &dyn Fixture) {
    let topic = unique("ending");
    let connection = fixture.connect().await;
    let mut subscriber: Subscriber<u64> = subscribe(&connection, &topic).await;
    let mut witness: Subscriber<u64> = subscribe(&connection, &topic).await;
    send(&connection, &topic, Header::default(), "1").await;
    assert_eq!(next(&mut witness).await.data, 1);
    let handler = witness.on_message(|_: Received<u64>| async {});
    let service = connection.rpc_service(&topic, |n: u64| async move { Ok(n) });
    let service = within("a service", service).await.expect("serve");
    assert!(!handler.is_finished() && !service.is_finished());
    within("the close", connection.close())
        .await
        .expect("close");
    assert_eq!(next(&mut subscriber).await.data, 1, "it had arrived");
    let end = within("the end of the subscription", subscriber.recv()).await;
    assert!(end.is_none(), "{end:?}");
    within("the loop to end", handler.stop()).await;
    within("the service to end", service.stop()).await;
}

/// A call in flight fails when its own side closes the connection; it does not run into its timeout.
pub async fn closing_fails_calls_in_flight(fixture: &dyn Fixture) {
    let service = unique("in-flight");
    let mut gate = Gate::new(
        &fixture.connect().await,
        &service,
        RpcServiceOptions::default(),
    )
    .await;
    let connection = fixture.connect().await;
    let client = connection
        .rpc_client::<Value, Value>(&service)
        .expect("client");
    let call = tokio::spawn(async move {
        client
            .call_within(&json!(1), Duration::from_secs(600))
            .await
    });
    gate.running().await;
    within("the close", connection.close())
        .await
        .expect("close");
    let error = within("the call", call)
        .await
        .expect("no panic")
        .expect_err("closed");
    assert_eq!(error.kind(), ErrorKind::Closed);
    assert!(error.maybe_executed(), "the handler runs");
}

/// What was accepted leaves before the connection closes, confirmed or not.
pub async fn accepted_messages_leave_before_the_close(fixture: &dyn Fixture) {
    const END: u64 = u64::MAX;
    let topic = unique("flushed");
    let mut subscriber = subscribe::<u64>(&fixture.connect().await, &topic).await;
    let connection = fixture.connect().await;
    let options = PublisherOptions::default().delivery(Delivery::AtLeastOnce);
    let publisher = connection
        .publisher_with(&topic, options)
        .expect("publisher");
    let mut receipts = Vec::new();
    for n in (0..50).chain([END]) {
        receipts.push(
            within("room", publisher.enqueue(&n))
                .await
                .expect("enqueue"),
        );
    }
    within("the close", connection.close())
        .await
        .expect("close");
    for receipt in receipts {
        within("the receipt", receipt)
            .await
            .expect("confirmed before the close");
    }
    assert_eq!(
        until(&mut subscriber, &END).await,
        (0..50).collect::<Vec<_>>()
    );
}

/// Clones are one connection: dropping one changes nothing, closing one closes all.
pub async fn clones_share_the_end(fixture: &dyn Fixture) {
    let topic = unique("clones");
    let connection = fixture.connect().await;
    let clone = connection.clone();
    let mut subscriber = subscribe::<u64>(&connection, &topic).await;
    drop(connection);
    let publisher = clone.publisher::<u64>(&topic).expect("publisher");
    publisher.publish(&1).await.expect("publish");
    assert_eq!(next(&mut subscriber).await.data, 1);
    let last = clone.clone();
    within("the close", clone.close()).await.expect("close");
    assert!(matches!(last.link().state(), LinkState::Closed { .. }));
    assert!(within("the end", subscriber.recv()).await.is_none());
}
