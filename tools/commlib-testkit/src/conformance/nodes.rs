//! Nodes, and the handles of what runs on them.

use std::time::Duration;

use commlib_core::{
    ErrorKind, Header, LinkState, Node, PubSub, Received, Rpc, RpcServiceOptions, Value, json,
};
use tokio::sync::mpsc;

use super::gate::{Gate, call};
use super::peer::{next, send, subscribe};
use super::{Fixture, unique, within};

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
    let mut gate = Gate::new(&node, &service, RpcServiceOptions::default()).await;
    gate.handle().detach();
    let client = fixture
        .connect()
        .await
        .rpc_client::<Value, Value>(&service)
        .expect("client");
    let call = tokio::spawn(async move { client.call(&json!(7)).await });
    gate.running().await;
    let shutdown = tokio::spawn(node.shutdown(Duration::from_secs(60)));
    // The link closes only after the handler has answered.
    assert!(connection.link().state().is_connected());
    gate.let_go(1);
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
    let mut gate = Gate::new(&node, &service, RpcServiceOptions::default()).await;
    gate.handle().detach();
    let client = fixture
        .connect()
        .await
        .rpc_client::<Value, Value>(&service)
        .expect("client");
    let call = tokio::spawn(async move { client.call(&json!(7)).await });
    gate.running().await;
    let outcome = within("the shutdown", node.shutdown(Duration::from_millis(100))).await;
    assert_eq!(
        outcome.expect_err("a handler hangs").kind(),
        ErrorKind::Timeout
    );
    within("the handler to be dropped", async {
        while gate.started.recv().await.is_some() {}
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
    let mut gate = Gate::new(&connection, &topic, RpcServiceOptions::default()).await;
    drop(gate.handle());
    assert_eq!(
        within("the service to be dropped", gate.started.recv()).await,
        None
    );
    let client = connection
        .rpc_client::<Value, Value>(&topic)
        .expect("client");
    let gone = client
        .call_within(&json!(1), Duration::from_millis(200))
        .await;
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
    let mut gate = Gate::new(&connection, &service, RpcServiceOptions::default()).await;
    let client = fixture
        .connect()
        .await
        .rpc_client::<Value, Value>(&service)
        .expect("client");
    let call = tokio::spawn(async move { client.call(&json!(7)).await });
    gate.running().await;
    let mut stop = Box::pin(gate.handle().stop());
    let early = futures_util::FutureExt::now_or_never(&mut stop);
    assert!(early.is_none(), "it must wait for the handler");
    gate.let_go(1);
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
    let mut gate = Gate::new(&node, &service, RpcServiceOptions::default()).await;
    gate.handle().detach();
    gate.let_go(3);
    let client = connection
        .rpc_client::<Value, Value>(&service)
        .expect("client");
    for n in 0..3 {
        assert_eq!(call(&client, json!(n)).await, n);
        gate.running().await;
    }
    drop(node);
    assert_eq!(
        within("the service to be dropped", gate.started.recv()).await,
        None
    );
    assert!(
        connection.link().state().is_connected(),
        "the connection is not the node's alone"
    );
}
