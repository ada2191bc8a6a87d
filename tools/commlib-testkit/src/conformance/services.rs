//! Services: what they answer when all is not well.

use std::sync::Mutex;
use std::time::Duration;

use commlib_core::{
    Dialect, ErrorKind, Header, Rpc, RpcContext, RpcError, RpcHandler, RpcServiceOptions, Value,
    json,
};
use tokio::sync::mpsc;

use super::gate::{Gate, call, echo};
use super::peer::{Call, Caller, numbered};
use super::{Fixture, unique, within};

/// A handler's error arrives with code, message and data.
pub async fn a_handlers_error_is_remote(fixture: &dyn Fixture) {
    let service = unique("refusing");
    let connection = fixture.connect().await;
    let sent = RpcError::new("out_of_range", "only 0 to 9 – \u{fc}").with_data(json!({"max": 9}));
    let answer = sent.clone();
    let handle = connection.rpc_service(&service, move |_: u64| {
        let answer = answer.clone();
        async move { Err::<u64, _>(answer) }
    });
    let _handle = within("a service", handle).await.expect("serve");
    let client = fixture
        .connect()
        .await
        .rpc_client::<u64, u64>(&service)
        .expect("client");
    let error = within("a reply", client.call(&10))
        .await
        .expect_err("it refuses");
    assert_eq!(error.kind(), ErrorKind::Remote);
    assert_eq!(error.remote(), Some(&sent));
    assert!(!error.is_retryable());
}

/// A panic of a handler is an error reply with its own code; the service goes on.
pub async fn a_handlers_panic_is_remote(fixture: &dyn Fixture) {
    let service = unique("panicking");
    let connection = fixture.connect().await;
    let handle = connection.rpc_service(&service, |n: u64| async move {
        assert!(n != 0, "this panic is part of the test");
        Ok(n)
    });
    let _handle = within("a service", handle).await.expect("serve");
    let client = fixture
        .connect()
        .await
        .rpc_client::<u64, u64>(&service)
        .expect("client");
    for _ in 0..3 {
        let error = within("a reply", client.call(&0))
            .await
            .expect_err("it panics");
        assert_eq!(
            error.remote().expect("a remote error").code,
            RpcError::PANIC
        );
        assert_eq!(within("a reply", client.call(&1)).await.expect("call"), 1);
    }
}

/// A handler that blocks its thread delays no call to another service of the connection.
pub async fn a_blocked_handler_delays_no_other(fixture: &dyn Fixture) {
    let (service, other) = (unique("blocking"), unique("other"));
    let connection = fixture.connect().await;
    let (release, wait) = std::sync::mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let (started, mut running) = mpsc::unbounded_channel();
    let handle = connection.rpc_service_blocking(&service, move |n: u64| {
        let _ = started.send(());
        // Ends when the case does, however it does.
        let _ = wait.lock().map(|wait| wait.recv());
        Ok(n)
    });
    let _blocking = within("a service", handle).await.expect("serve");
    let _handle = echo(&connection, &other).await;
    let blocked = connection.rpc_client::<u64, u64>(&service).expect("client");
    let blocked = tokio::spawn(async move { blocked.call(&7).await });
    within("the handler to run", running.recv()).await;
    let client = connection.rpc_client(&other).expect("client");
    for n in 0..10 {
        assert_eq!(call(&client, json!(n)).await, n);
    }
    drop(release);
    let answer = within("the reply", blocked).await.expect("no panic");
    assert_eq!(answer.expect("call"), 7);
}

/// A request that is not what the service takes is answered with [`RpcError::BAD_REQUEST`].
pub async fn an_undecodable_request_is_answered(fixture: &dyn Fixture) {
    let service = unique("numbers");
    let connection = fixture.connect().await;
    let handle = connection.rpc_service(&service, |n: u64| async move { Ok(n) });
    let _handle = within("a service", handle).await.expect("serve");
    let client = fixture
        .connect()
        .await
        .rpc_client::<Value, Value>(&service)
        .expect("client");
    for bad in [json!("text"), json!({}), json!(null), json!(-1)] {
        let error = within("a reply", client.call(&bad))
            .await
            .expect_err("not a number");
        assert_eq!(
            error.remote().expect("a remote error").code,
            RpcError::BAD_REQUEST,
            "{bad}"
        );
    }
    assert_eq!(call(&client, json!(1)).await, 1);
}

/// A request that names no reply address harms nobody.
pub async fn a_request_without_reply_address_is_harmless(fixture: &dyn Fixture) {
    let service = unique("one-way");
    let connection = fixture.connect().await;
    let _handle = echo(&connection, &service).await;
    let caller = Caller::new(fixture).await;
    for dialect in Dialect::ALL {
        caller
            .request_raw(&service, Header::default(), "1".into(), dialect)
            .await;
    }
    let client = caller.connection.rpc_client(&service).expect("client");
    assert_eq!(call(&client, json!(2)).await, 2);
}

/// The error code of the reply to a call.
async fn code(caller: &mut Caller, call: &Call) -> Option<String> {
    caller
        .reply(call)
        .await
        .header
        .error
        .map(|error| error.code)
}

/// A request that waited longer than its caller does is not run and gets [`RpcError::DEADLINE_EXCEEDED`].
pub async fn expired_requests_are_answered(fixture: &dyn Fixture) {
    let service = unique("expired");
    let connection = fixture.connect().await;
    let options = RpcServiceOptions::default().concurrency(1);
    let mut gate = Gate::new(&connection, &service, options).await;
    let mut caller = Caller::new(fixture).await;
    let calls = [(); 3].map(|()| caller.lease(Dialect::Envelope));
    let mut hasty = Header::default();
    hasty.timeout_ms = Some(30);
    let headers = [Header::default(), hasty, Header::default()];
    for ((n, call), header) in (1..).zip(&calls).zip(headers) {
        caller.request(&service, call, header, &json!(n)).await;
    }
    assert_eq!(gate.running().await, 1);
    // Time is the subject here. The request itself may still be on its way, so this is only the least it takes.
    tokio::time::sleep(Duration::from_millis(300)).await;
    gate.let_go(1);
    gate.let_go(1);
    assert_eq!(code(&mut caller, &calls[0]).await, None);
    assert_eq!(
        code(&mut caller, &calls[1]).await.as_deref(),
        Some(RpcError::DEADLINE_EXCEEDED)
    );
    assert_eq!(code(&mut caller, &calls[2]).await, None);
    assert_eq!(gate.running().await, 3, "the expired one was not run");
}

/// A service whose queue is full answers [`RpcError::OVERLOADED`] at once.
pub async fn a_full_service_says_so(fixture: &dyn Fixture) {
    let service = unique("full");
    let connection = fixture.connect().await;
    let options = RpcServiceOptions::default().concurrency(1).queue_limit(2);
    let mut gate = Gate::new(&connection, &service, options).await;
    let mut caller = Caller::new(fixture).await;
    let calls = [(); 5].map(|()| caller.lease(Dialect::Envelope));
    for (n, call) in (0..).zip(&calls) {
        caller
            .request(&service, call, Header::default(), &json!(n))
            .await;
        if n == 0 {
            gate.running().await;
        }
    }
    for call in &calls[3..] {
        assert_eq!(
            code(&mut caller, call).await.as_deref(),
            Some(RpcError::OVERLOADED)
        );
    }
    for call in &calls[..3] {
        gate.let_go(1);
        assert_eq!(code(&mut caller, call).await, None);
    }
}

/// A request that comes twice runs once; the second gets the same answer, whether the first is done or not.
pub async fn a_repeated_request_runs_once(fixture: &dyn Fixture) {
    let service = unique("repeated");
    let connection = fixture.connect().await;
    let mut gate = Gate::new(&connection, &service, RpcServiceOptions::default()).await;
    let mut caller = Caller::new(fixture).await;
    let call = caller.lease(Dialect::Envelope);
    let sender = unique("sender");
    for _ in 0..2 {
        caller
            .request(&service, &call, numbered(&sender, 1), &json!("once"))
            .await;
    }
    assert_eq!(gate.running().await, "once");
    // One that runs behind the repeated one shows that the service has seen that, while the first is still running.
    let behind = caller.lease(Dialect::Envelope);
    caller
        .request(&service, &behind, numbered(&sender, 2), &json!("behind"))
        .await;
    assert_eq!(gate.running().await, "behind");
    gate.let_go(10);
    assert_eq!(&caller.reply(&call).await.data[..], b"\"once\"");
    caller
        .request(&service, &call, numbered(&sender, 1), &json!("once"))
        .await;
    assert_eq!(&caller.reply(&call).await.data[..], b"\"once\"");
    // The same id of another sender is another request.
    caller
        .request(
            &service,
            &call,
            numbered(&unique("sender"), 1),
            &json!("other"),
        )
        .await;
    assert_eq!(gate.running().await, "other", "instead of the repeated one");
    assert_eq!(&caller.reply(&call).await.data[..], b"\"other\"");
}

/// Notes the time that its caller still waits.
struct Remaining(mpsc::UnboundedSender<Option<Duration>>);

impl RpcHandler<Value> for Remaining {
    type Response = Value;

    async fn handle(&self, request: Value, context: RpcContext) -> Result<Value, RpcError> {
        let _ = self.0.send(context.remaining());
        Ok(request)
    }
}

/// Peers without a real-time clock are served like others: a timeout counts from the arrival.
pub async fn clocks_ten_years_off(fixture: &dyn Fixture) {
    let service = unique("clocks");
    let connection = fixture.connect().await;
    let (seen, mut remaining) = mpsc::unbounded_channel();
    let handle = connection.rpc_service(&service, Remaining(seen));
    let _handle = within("a service", handle).await.expect("serve");
    let mut caller = Caller::new(fixture).await;
    let ten_years = 10 * 365 * 86_400 * 1_000_000_000_u64;
    let now = commlib_core::Message::new("1")
        .header
        .timestamp
        .unwrap_or_default();
    for timestamp in [0, 1, now.saturating_sub(ten_years), now + ten_years] {
        let call = caller.lease(Dialect::Envelope);
        let mut header = Header::default();
        header.timestamp = Some(timestamp);
        header.timeout_ms = Some(20_000);
        caller.request(&service, &call, header, &json!(1)).await;
        let reply = caller.reply(&call).await;
        assert_eq!(
            (reply.header.error, &reply.data[..]),
            (None, &b"1"[..]),
            "at {timestamp}"
        );
        let left = remaining
            .recv()
            .await
            .flatten()
            .expect("the caller said how long it waits");
        assert!(
            left > Duration::from_secs(10) && left <= Duration::from_secs(20),
            "{left:?} left"
        );
    }
}

/// Callers in each dialect are answered in theirs.
pub async fn foreign_callers_are_answered(fixture: &dyn Fixture) {
    let service = unique("foreign");
    let connection = fixture.connect().await;
    let _handle = echo(&connection, &service).await;
    let mut caller = Caller::new(fixture).await;
    for dialect in Dialect::ALL {
        let call = caller.lease(dialect);
        let data = json!({ "dialect": dialect.as_str() });
        caller
            .request(&service, &call, Header::default(), &data)
            .await;
        let reply = caller.reply(&call).await;
        assert_eq!(
            commlib_core::decode::<Value>(&reply.data).expect("JSON"),
            data
        );
    }
}

/// A reply that cannot be sent becomes an error reply, not a silence.
pub async fn a_reply_too_large_is_an_error(fixture: &dyn Fixture) {
    let service = unique("verbose");
    let connection = fixture.connect().await;
    let limit = connection.link().capabilities().max_payload;
    let handle = connection.rpc_service(&service, move |n: usize| async move { Ok("x".repeat(n)) });
    let _handle = within("a service", handle).await.expect("serve");
    let client = connection
        .rpc_client::<usize, String>(&service)
        .expect("client");
    let error = within("a reply", client.call(&limit))
        .await
        .expect_err("too large");
    assert_eq!(
        error.remote().map(|error| error.code.as_str()),
        Some(RpcError::INTERNAL),
        "{error}"
    );
    assert_eq!(
        within("a reply", client.call(&3)).await.expect("call"),
        "xxx"
    );
}
