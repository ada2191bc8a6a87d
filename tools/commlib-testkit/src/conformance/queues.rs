//! Who gets a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use commlib_core::{AbsentService, ErrorKind, Handle, Rpc, RpcClient, RpcError};
use tokio::sync::mpsc;

use super::{Fixture, unique, within};

/// A service that answers with its own number and counts its requests.
async fn numbered(on: &(impl Rpc + Sync), service: &str, number: u64) -> (Handle, Arc<AtomicU64>) {
    let count = Arc::new(AtomicU64::new(0));
    let counter = count.clone();
    let handle = on.rpc_service(service, move |_: u64| {
        counter.fetch_add(1, Ordering::SeqCst);
        async move { Ok(number) }
    });
    let handle = within("a service", handle).await.expect("serve");
    (handle, count)
}

async fn call(client: &RpcClient<u64, u64>, request: u64) -> u64 {
    within("a reply", client.call(&request))
        .await
        .expect("call")
}

/// Of two services of one name each request reaches one, and each gets some.
pub async fn services_share_the_work(fixture: &dyn Fixture) {
    let service = unique("shared");
    let (one, two) = (fixture.connect().await, fixture.connect().await);
    let (first, first_count) = numbered(&one, &service, 1).await;
    let (second, second_count) = numbered(&two, &service, 2).await;
    let client = fixture
        .connect()
        .await
        .rpc_client(&service)
        .expect("client");
    let mut answers = [0, 0, 0];
    for n in 0..60 {
        answers[usize::try_from(call(&client, n).await).expect("small")] += 1;
    }
    drop((first, second));
    let counts = [first_count, second_count].map(|count| count.load(Ordering::SeqCst));
    assert_eq!(counts.iter().sum::<u64>(), 60, "every request ran once");
    assert_eq!(counts, [answers[1], answers[2]]);
    assert!(
        counts.iter().all(|count| *count > 0),
        "one service had nothing to do: {counts:?}"
    );
}

/// Every service of one name gets every request; the caller takes one answer and is not confused by the other.
pub async fn every_service_gets_each_request(fixture: &dyn Fixture) {
    let service = unique("fan-out");
    let (one, two) = (fixture.connect().await, fixture.connect().await);
    let (seen, mut handled) = mpsc::unbounded_channel();
    let mut handles = Vec::new();
    for (number, connection) in [(1, &one), (2, &two)] {
        let seen = seen.clone();
        let handle = connection.rpc_service(&service, move |n: u64| {
            let _ = seen.send((number, n));
            async move { Ok(n) }
        });
        handles.push(within("a service", handle).await.expect("serve"));
    }
    let client = fixture
        .connect()
        .await
        .rpc_client(&service)
        .expect("client");
    let mut expected = Vec::new();
    for n in 0..10 {
        assert_eq!(call(&client, n).await, n);
        expected.extend([(1, n), (2, n)]);
    }
    let mut arrived = Vec::new();
    while arrived.len() < expected.len() {
        arrived.push(
            within("a request at each service", handled.recv())
                .await
                .expect("they run"),
        );
    }
    arrived.sort_unstable_by_key(|(number, n)| (*n, *number));
    assert_eq!(arrived, expected);
}

/// A call to a name that nobody serves ends as the capabilities say.
pub async fn a_request_for_nobody(fixture: &dyn Fixture) {
    let connection = fixture.connect().await;
    let client = connection
        .rpc_client::<u64, u64>(&unique("nobody"))
        .expect("client");
    let refused = connection.link().capabilities().absent_service == AbsentService::Refused;
    let limit = Duration::from_millis(if refused { 60_000 } else { 200 });
    let outcome = within("the end of the call", client.call_within(&1, limit)).await;
    let kind = outcome.expect_err("nobody answers").kind();
    let expected = if refused {
        ErrorKind::NoService
    } else {
        ErrorKind::Timeout
    };
    assert_eq!(kind, expected);
}

/// A request that came before the service is answered when the service comes.
pub async fn requests_wait_for_their_service(fixture: &dyn Fixture) {
    let service = unique("waited-for");
    let connection = fixture.connect().await;
    let client = fixture
        .connect()
        .await
        .rpc_client::<u64, u64>(&service)
        .expect("client");
    let early = client.call_within(&1, Duration::from_millis(200)).await;
    assert_eq!(
        early.expect_err("nobody serves yet").kind(),
        ErrorKind::Timeout
    );
    let waiting = tokio::spawn(async move { client.call(&2).await });
    // The first request has shown that requests reach the broker; this one is on its way behind it.
    let (seen, mut handled) = mpsc::unbounded_channel();
    let handle = connection.rpc_service(&service, move |n: u64| {
        let _ = seen.send(n);
        async move { Ok(n) }
    });
    let _handle = within("a service", handle).await.expect("serve");
    let answer = within("the reply", waiting).await.expect("no panic");
    assert_eq!(answer.expect("call"), 2);
    assert!(handled.recv().await.is_some(), "a handler ran");
}

/// A service that was stopped can be started again, here or elsewhere; no request is left behind.
pub async fn a_service_can_restart(fixture: &dyn Fixture) {
    let service = unique("restarted");
    let (one, two) = (fixture.connect().await, fixture.connect().await);
    let client = fixture
        .connect()
        .await
        .rpc_client(&service)
        .expect("client");
    for round in 0..4 {
        let connection = if round < 2 { &one } else { &two };
        let (handle, count) = numbered(connection, &service, round).await;
        for n in 0..5 {
            assert_eq!(call(&client, n).await, round);
        }
        within("the service to stop", handle.stop()).await;
        assert_eq!(count.load(Ordering::SeqCst), 5);
    }
}

/// Services of different names on one connection get their own requests only.
pub async fn services_do_not_mix(fixture: &dyn Fixture) {
    let (prefix, connection) = (unique("names"), fixture.connect().await);
    let names = ["a", "b", "a.b", "aa"].map(|name| format!("{prefix}.{name}"));
    let mut handles = Vec::new();
    for (number, service) in (0..).zip(&names) {
        handles.push(numbered(&connection, service, number).await);
    }
    let other = fixture.connect().await;
    for (number, service) in (0..).zip(&names) {
        let client = other.rpc_client(service).expect("client");
        for n in 0..3 {
            assert_eq!(call(&client, n).await, number, "{service}");
        }
    }
    assert!(
        handles
            .iter()
            .all(|(_, count)| count.load(Ordering::SeqCst) == 3)
    );
}

/// Several methods under one prefix start and stop together.
pub async fn a_server_serves_its_methods(fixture: &dyn Fixture) {
    let prefix = unique("server");
    let connection = fixture.connect().await;
    let server = connection.rpc_server(&prefix).expect("server");
    let server = server
        .method("add", |(a, b): (i64, i64)| async move { Ok(a + b) })
        .method_blocking("negate", |a: i64| Ok(-a))
        .method("fail", |_: i64| async move {
            Err::<i64, _>(RpcError::new("refused", "never"))
        });
    let handle = within("a server", server.start()).await.expect("start");
    let caller = fixture.connect().await;
    let add = caller
        .rpc_client::<(i64, i64), i64>(&format!("{prefix}.add"))
        .expect("client");
    let negate = caller
        .rpc_client::<i64, i64>(&format!("{prefix}.negate"))
        .expect("client");
    let fail = caller
        .rpc_client::<i64, i64>(&format!("{prefix}.fail"))
        .expect("client");
    assert_eq!(
        within("a reply", add.call(&(40, 2))).await.expect("call"),
        42
    );
    assert_eq!(within("a reply", negate.call(&7)).await.expect("call"), -7);
    let error = within("a reply", fail.call(&7))
        .await
        .expect_err("it always fails");
    assert_eq!(error.remote().expect("a remote error").code, "refused");
    within("the server to stop", handle.stop()).await;
    let gone = negate.call_within(&7, Duration::from_millis(200)).await;
    let kind = gone.expect_err("it was stopped").kind();
    assert!(
        matches!(kind, ErrorKind::Timeout | ErrorKind::NoService),
        "{kind:?}"
    );
}
