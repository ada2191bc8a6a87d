//! Calls, as their callers see them.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use commlib_core::{Dialect, ErrorKind, Header, Rpc, RpcServiceOptions, Value, json};
use tokio::sync::oneshot;

use super::gate::{Gate, call, echo};
use super::peer::{Caller, Service};
use super::{Fixture, unique, within};
use crate::spy::Spy;

/// The plain case, from another connection and from the same.
pub async fn call_and_answer(fixture: &dyn Fixture) {
    let service = unique("echo");
    let (here, there) = (fixture.connect().await, fixture.connect().await);
    let _handle = echo(&here, &service).await;
    for connection in [&there, &here] {
        let client = connection.rpc_client(&service).expect("client");
        for n in 0..10 {
            assert_eq!(call(&client, json!({ "n": n })).await, json!({ "n": n }));
        }
    }
}

/// A hundred calls at a time, answered in reverse order, get their own answers.
pub async fn a_hundred_calls_answered_out_of_order(fixture: &dyn Fixture) {
    const CALLS: usize = 100;
    let service = unique("reverse");
    let connection = fixture.connect().await;
    let waiting = Arc::new(Mutex::new(Vec::<oneshot::Sender<()>>::new()));
    let options = RpcServiceOptions::default().concurrency(CALLS);
    let handle = connection.rpc_service_with(&service, options, move |n: usize| {
        let (turn, wait) = oneshot::channel();
        let mut all = waiting.lock().expect("no panic");
        all.push(turn);
        if all.len() == CALLS {
            // Each lets the one before it go.
            if let Some(last) = all.pop() {
                let _ = last.send(());
            }
        }
        drop(all);
        let waiting = waiting.clone();
        async move {
            wait.await?;
            let next = waiting.lock().expect("no panic").pop();
            next.map(|turn| turn.send(()));
            Ok(n)
        }
    });
    let _handle = within("a service", handle).await.expect("serve");
    let client = fixture
        .connect()
        .await
        .rpc_client::<usize, usize>(&service)
        .expect("client");
    let calls = (0..CALLS).map(|n| {
        let client = &client;
        async move { (n, client.call(&n).await) }
    });
    let answers = within("a hundred replies", futures_util::future::join_all(calls)).await;
    for (n, answer) in answers {
        assert_eq!(answer.expect("call"), n);
    }
}

/// No reply in time is [`ErrorKind::Timeout`], not before the time is over, and possibly executed.
pub async fn a_timeout_is_a_timeout(fixture: &dyn Fixture) {
    let service = unique("timeout");
    let connection = fixture.connect().await;
    let mut gate = Gate::new(&connection, &service, RpcServiceOptions::default()).await;
    let client = connection
        .rpc_client::<Value, Value>(&service)
        .expect("client");
    let limit = Duration::from_millis(150);
    let start = std::time::Instant::now();
    let error = within("the timeout", client.call_within(&json!(1), limit))
        .await
        .expect_err("nobody answers");
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.is_retryable() && error.maybe_executed(), "{error:?}");
    assert!(start.elapsed() >= limit, "after {:?}", start.elapsed());
    assert_eq!(gate.running().await, 1);
    gate.let_go(1);
    within("the service to stop", gate.handle().stop()).await;
}

/// A reply that comes after the caller gave up disturbs no later call.
pub async fn a_late_reply_is_harmless(fixture: &dyn Fixture) {
    let service = unique("late");
    let connection = fixture.connect().await;
    let mut gate = Gate::new(&connection, &service, RpcServiceOptions::default()).await;
    let client = fixture
        .connect()
        .await
        .rpc_client::<Value, Value>(&service)
        .expect("client");
    let late = client
        .call_within(&json!("late"), Duration::from_millis(100))
        .await;
    assert_eq!(late.expect_err("too late").kind(), ErrorKind::Timeout);
    assert_eq!(gate.running().await, "late");
    gate.let_go(1);
    for n in 0..5 {
        gate.let_go(1);
        assert_eq!(call(&client, json!(n)).await, n);
    }
}

/// A call that was cancelled gives its reply address back, and its reply disturbs nobody.
pub async fn a_cancelled_call_leaves_nothing(fixture: &dyn Fixture) {
    let service = unique("cancelled");
    let connection = fixture.connect().await;
    let mut gate = Gate::new(&connection, &service, RpcServiceOptions::default()).await;
    let spy = Spy::on(fixture.connect().await);
    let client = spy
        .connection()
        .rpc_client::<Value, Value>(&service)
        .expect("client");
    for _ in 0..3 {
        let request = json!("cancelled");
        tokio::select! {
            // First: a permit that was meant for the call before may be taken by this one, which runs all the same.
            biased;
            running = gate.running() => assert_eq!(running, "cancelled"),
            _ = client.call(&request) => panic!("nobody has answered"),
        }
        assert_eq!(spy.leases(), 0, "reply addresses that were not given back");
        gate.let_go(1);
    }
    for n in 0..5 {
        gate.let_go(1);
        assert_eq!(call(&client, json!(n)).await, n);
    }
    assert_eq!(spy.leases(), 0, "reply addresses that were not given back");
}

/// A reply that is not what the caller takes is [`ErrorKind::Decode`].
pub async fn an_undecodable_reply_is_told(fixture: &dyn Fixture) {
    let name = unique("texts");
    let mut service = Service::new(fixture, &name).await;
    let client = fixture
        .connect()
        .await
        .rpc_client::<u64, u64>(&name)
        .expect("client");
    for reply in ["\"text\"", "{\"no\": ", "2"] {
        let answer = async {
            let (to, _) = service.request().await;
            service.reply(&to, reply).await;
        };
        let (outcome, ()) = tokio::join!(within("a reply", client.call(&1)), answer);
        let outcome = outcome.map_err(|error| error.kind());
        let expected = if reply == "2" {
            Ok(2)
        } else {
            Err(ErrorKind::Decode)
        };
        assert_eq!(outcome, expected, "{reply}");
    }
}

/// Only the first of several replies counts, and later calls get their own.
pub async fn repeated_replies_are_ignored(fixture: &dyn Fixture) {
    let name = unique("stutter");
    let mut service = Service::new(fixture, &name).await;
    let client = fixture
        .connect()
        .await
        .rpc_client::<u64, u64>(&name)
        .expect("client");
    for n in 0..5 {
        let answer = async {
            let (to, data) = service.request().await;
            service.reply(&to, &data.to_string()).await;
            service.reply(&to, "99").await;
            service.reply(&to, &data.to_string()).await;
        };
        let (outcome, ()) = tokio::join!(within("a reply", client.call(&n)), answer);
        assert_eq!(outcome.expect("call"), n);
    }
}

/// A reply to a caller that has gone harms neither the service nor its connection.
pub async fn replies_to_nobody_are_harmless(fixture: &dyn Fixture) {
    let name = unique("orphaned");
    let mut service = Service::new(fixture, &name).await;
    let mut caller = Caller::new(fixture).await;
    let call_lost = caller.lease(Dialect::Envelope);
    caller
        .request(&name, &call_lost, Header::default(), &json!(1))
        .await;
    let (to, _) = service.request().await;
    within("the close", caller.connection.close())
        .await
        .expect("close");
    service.reply(&to, "1").await;
    service.reply(&to, "2").await;
    caller = Caller::new(fixture).await;
    let call = caller.lease(Dialect::Envelope);
    caller
        .request(&name, &call, Header::default(), &json!(2))
        .await;
    let (to, data) = service.request().await;
    assert_eq!(data, 2);
    service.reply(&to, "3").await;
    assert_eq!(&caller.reply(&call).await.data[..], b"3");
}
