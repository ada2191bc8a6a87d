//! Beginnings and ends: connections, nodes, handles.

use std::sync::Arc;
use std::time::Duration;

use commlib_core::{
    Delivery, ErrorKind, Handle, Header, LinkState, ListenOptions, Message, Node, PubSub,
    PublisherOptions, Received, Rpc, SendOptions, Source, Subscriber, Target,
};
use tokio::sync::{Semaphore, mpsc};

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
    let mut gate = Gate::new(&fixture.connect().await, &service).await;
    let connection = fixture.connect().await;
    let client = connection.rpc_client::<u64, u64>(&service).expect("client");
    let call = tokio::spawn(async move { client.call_within(&1, Duration::from_secs(600)).await });
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

/// A service whose handlers say that they run and then wait for a permit.
struct Gate {
    handle: Handle,
    running: mpsc::UnboundedReceiver<()>,
    permits: Arc<Semaphore>,
}

impl Gate {
    async fn new(on: &(impl Rpc + Sync), service: &str) -> Self {
        let (started, running) = mpsc::unbounded_channel();
        let permits = Arc::new(Semaphore::new(0));
        let gate = permits.clone();
        let handle = on.rpc_service(service, move |n: u64| {
            let _ = started.send(());
            let gate = gate.clone();
            async move {
                gate.acquire().await?.forget();
                Ok(n)
            }
        });
        let handle = within("a service", handle).await.expect("serve");
        Self {
            handle,
            running,
            permits,
        }
    }

    async fn running(&mut self) {
        within("a handler to run", self.running.recv())
            .await
            .expect("the service runs");
    }
}

/// Names on a node are prefixed with its namespace; a leading dot marks an absolute one.
pub async fn a_namespace_prefixes_names(fixture: &dyn Fixture) {
    let space = unique("space");
    let other = fixture.connect().await;
    let mut all = subscribe::<u64>(&other, &format!("{space}.*")).await;
    let node = Node::builder("r1")
        .namespace(format!("{space}.r1"))
        .device_id("device");
    let node = node.start(fixture.connect().await).await.expect("node");
    assert_eq!(
        (node.name().as_str(), node.device_id()),
        ("r1", Some("device"))
    );
    let mut inside = node.subscriber::<u64>("battery").await.expect("subscribe");
    let mut outside = node
        .subscriber::<u64>(&format!(".{space}.absolute"))
        .await
        .expect("subscribe");
    for (topic, full) in [
        ("battery", format!("{space}.r1.battery")),
        (&*format!(".{space}.absolute"), format!("{space}.absolute")),
    ] {
        let publisher = node.publisher::<u64>(topic).expect("publisher");
        assert_eq!(publisher.topic().as_str(), full);
        publisher.publish(&1).await.expect("publish");
        assert_eq!(next::<u64>(&mut all).await.topic.as_str(), full);
    }
    next(&mut inside).await;
    next(&mut outside).await;
    let multi = node.multi_publisher::<u64>().expect("publisher");
    multi.publish("battery", &2).await.expect("publish");
    assert_eq!(next(&mut inside).await.data, 2);

    let handle = node.rpc_service("echo", |n: u64| async move { Ok(n) });
    let _handle = within("a service", handle).await.expect("serve");
    let by_full_name = other
        .rpc_client::<u64, u64>(&format!("{space}.r1.echo"))
        .expect("client");
    assert_eq!(
        within("a reply", by_full_name.call(&1))
            .await
            .expect("call"),
        1
    );
    let by_short_name = node.rpc_client::<u64, u64>("echo").expect("client");
    assert_eq!(
        within("a reply", by_short_name.call(&2))
            .await
            .expect("call"),
        2
    );
    let plain = Node::builder("r2")
        .start(other.clone())
        .await
        .expect("node");
    assert_eq!(
        plain
            .publisher::<u64>("battery")
            .expect("publisher")
            .topic()
            .as_str(),
        "battery"
    );
}

/// `shutdown` lets running handlers finish and their replies leave, and takes nothing new.
pub async fn shutdown_waits_for_running_handlers(fixture: &dyn Fixture) {
    let service = unique("draining");
    let node = Node::builder("draining")
        .start(fixture.connect().await)
        .await
        .expect("node");
    let connection = node.connection().clone();
    let mut gate = Gate::new(&node, &service).await;
    gate.handle.detach();
    let client = fixture
        .connect()
        .await
        .rpc_client::<u64, u64>(&service)
        .expect("client");
    let call = tokio::spawn(async move { client.call(&7).await });
    within("a handler to run", gate.running.recv())
        .await
        .expect("it runs");
    let shutdown = tokio::spawn(node.shutdown(Duration::from_secs(60)));
    // The link closes only after the handler has answered.
    assert!(connection.link().state().is_connected());
    gate.permits.add_permits(1);
    assert_eq!(
        within("the reply", call)
            .await
            .expect("no panic")
            .expect("call"),
        7
    );
    within("the shutdown", shutdown)
        .await
        .expect("no panic")
        .expect("shutdown");
    assert!(matches!(
        connection.link().state(),
        LinkState::Closed { .. }
    ));
}

/// A handler that does not end is dropped when the limit is over, and the error says so.
pub async fn shutdown_keeps_its_limit(fixture: &dyn Fixture) {
    let service = unique("hanging");
    let node = Node::builder("hanging")
        .start(fixture.connect().await)
        .await
        .expect("node");
    let connection = node.connection().clone();
    let mut gate = Gate::new(&node, &service).await;
    gate.handle.detach();
    let client = fixture
        .connect()
        .await
        .rpc_client::<u64, u64>(&service)
        .expect("client");
    let call = tokio::spawn(async move { client.call(&7).await });
    within("a handler to run", gate.running.recv())
        .await
        .expect("it runs");
    let outcome = within("the shutdown", node.shutdown(Duration::from_millis(100))).await;
    assert_eq!(
        outcome.expect_err("a handler hangs").kind(),
        ErrorKind::Timeout
    );
    within("the handler to be dropped", async {
        while gate.running.recv().await.is_some() {}
    })
    .await;
    let closed = async {
        let mut states = connection.link().watch();
        let _ = states
            .wait_for(|state| matches!(state, LinkState::Closed { .. }))
            .await;
    };
    within("the connection to close", closed).await;
    call.abort();
}

/// Dropping the handle of a service or loop ends it.
pub async fn a_dropped_handle_stops(fixture: &dyn Fixture) {
    let topic = unique("handle");
    let connection = fixture.connect().await;
    let (seen, mut handled) = mpsc::unbounded_channel();
    let handler = subscribe(&connection, &topic)
        .await
        .on_message(move |message: Received<u64>| {
            let _ = seen.send(message.data);
            async {}
        });
    send(&connection, &topic, Header::default(), "1").await;
    assert_eq!(within("the handler", handled.recv()).await, Some(1));
    drop(handler);
    assert_eq!(
        within("the handler to be dropped", handled.recv()).await,
        None
    );
    let gate = Gate::new(&connection, &topic).await;
    let mut running = gate.running;
    drop(gate.handle);
    assert_eq!(
        within("the service to be dropped", running.recv()).await,
        None
    );
    let client = connection.rpc_client::<u64, u64>(&topic).expect("client");
    let gone = client.call_within(&1, Duration::from_millis(200)).await;
    let kind = gone.expect_err("it was stopped").kind();
    assert!(
        matches!(kind, ErrorKind::Timeout | ErrorKind::NoService),
        "{kind:?}"
    );
}

/// `stop` resolves when the running handlers have ended; their callers get their replies.
pub async fn a_stopped_handle_waits(fixture: &dyn Fixture) {
    let service = unique("stopped");
    let connection = fixture.connect().await;
    let mut gate = Gate::new(&connection, &service).await;
    let client = fixture
        .connect()
        .await
        .rpc_client::<u64, u64>(&service)
        .expect("client");
    let call = tokio::spawn(async move { client.call(&7).await });
    gate.running().await;
    let permits = gate.permits.clone();
    let mut stop = Box::pin(gate.handle.stop());
    let early = futures_util::FutureExt::now_or_never(&mut stop);
    assert!(early.is_none(), "it must wait for the handler");
    permits.add_permits(1);
    within("the service to stop", stop).await;
    assert_eq!(
        within("the reply", call)
            .await
            .expect("no panic")
            .expect("call"),
        7
    );
}

/// A detached service goes on without its handle, and ends with its node.
pub async fn a_detached_service_lives_as_long_as_its_node(fixture: &dyn Fixture) {
    let service = unique("detached");
    let connection = fixture.connect().await;
    let node = Node::builder("detached")
        .start(connection.clone())
        .await
        .expect("node");
    let mut gate = Gate::new(&node, &service).await;
    gate.handle.detach();
    gate.permits.add_permits(3);
    let client = connection.rpc_client::<u64, u64>(&service).expect("client");
    for n in 0..3 {
        assert_eq!(within("a reply", client.call(&n)).await.expect("call"), n);
        within("a handler to run", gate.running.recv()).await;
    }
    drop(node);
    assert_eq!(
        within("the service to be dropped", gate.running.recv()).await,
        None
    );
    assert!(
        connection.link().state().is_connected(),
        "the connection is not the node's alone"
    );
}
