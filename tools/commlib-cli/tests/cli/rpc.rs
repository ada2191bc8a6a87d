//! `call` and `serve` against a real broker.

use std::time::{Duration, Instant};

use commlib_testkit::mqtt_url;
use serde_json::json;

use crate::support::{Running, run, unique};

#[tokio::test]
async fn a_command_adds() {
    let Some(url) = mqtt_url().await else { return };
    let service = unique("math.add");
    // The shell takes the numbers out of the JSON: no other program is needed.
    let add =
        r#"read -r line; set -- $(echo "$line" | tr -dc '0-9 -'); echo "{\"c\": $(($1 + $2))}""#;
    let mut serve = Running::ready(&url, &["serve", &service, "--exec", add]).await;
    let request = r#"{"a": 19, "b": 23}"#;
    let call = run(&url, &["call", &service, request]).await;
    assert_eq!((call.code, &*call.stderr), (Some(0), ""));
    assert_eq!(call.stdout, "{\"c\": 42}\n");
    assert_eq!(serve.line().await, json!({"request": {"a": 19, "b": 23}}));
    assert_eq!(serve.terminate().await.code, Some(0));
}

#[tokio::test]
async fn echo_and_fixed_replies() {
    let Some(url) = mqtt_url().await else { return };
    let service = unique("echo");
    let serve = Running::ready(&url, &["serve", &service, "--echo", "--count", "4"]).await;
    assert_eq!(run(&url, &["call", &service]).await.stdout, "{}\n");
    let call = run(&url, &["call", &service, "[1.0]", "--count", "3"]).await;
    assert_eq!(call.stdout, "[1.0]\n[1.0]\n[1.0]\n");
    // The fourth request was its last.
    let ended = serve.finish().await;
    assert_eq!((ended.code, ended.lines().len()), (Some(0), 4));

    let service = unique("fixed");
    let _serve = Running::ready(&url, &["serve", &service, "--reply", "{\"ok\":true}"]).await;
    let call = run(&url, &["call", &service, "-1"]).await;
    assert_eq!(call.stdout, "{\"ok\":true}\n");
}

#[tokio::test]
async fn failing_commands_are_error_replies() {
    let Some(url) = mqtt_url().await else { return };
    for (command, expected) in [
        ("echo out of fuel >&2; exit 3", "exec_failed: out of fuel"),
        ("exit 4", "exec_failed: exit status: 4"),
        ("echo hello", "not JSON"),
    ] {
        let service = unique("fails");
        let _serve = Running::ready(&url, &["serve", &service, "--exec", command]).await;
        let call = run(&url, &["call", &service]).await;
        assert_eq!((call.code, &*call.stdout), (Some(1), ""));
        assert!(call.error().contains(&service), "{}", call.stderr);
        assert!(call.error().contains(expected), "{}", call.stderr);
    }
}

#[tokio::test]
async fn nobody_answers() {
    let Some(url) = mqtt_url().await else { return };
    let service = unique("nobody");
    let start = Instant::now();
    let call = run(&url, &["call", &service, "--timeout", "300ms"]).await;
    assert_eq!(call.code, Some(1));
    assert!(call.error().contains("300ms"), "{}", call.stderr);
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn running_commands_end_with_the_service() {
    let Some(url) = mqtt_url().await else { return };
    let service = unique("slow");
    let mut serve = Running::ready(&url, &["serve", &service, "--exec", "sleep 60"]).await;
    let call = tokio::spawn({
        let (url, service) = (url.clone(), service.clone());
        async move { run(&url, &["call", &service]).await }
    });
    serve.line().await;
    assert_eq!(serve.terminate().await.code, Some(0));
    // The caller is told, and does not wait for its timeout.
    let call = call.await.unwrap();
    assert_eq!(call.code, Some(1));
    assert!(call.error().contains("ended"), "{}", call.stderr);
}

#[tokio::test]
async fn the_time_limit_ends_it_cleanly() {
    let Some(url) = mqtt_url().await else { return };
    let service = unique("limit");
    let serve = Running::ready(&url, &["serve", &service, "--echo", "--for", "100ms"]).await;
    let ended = serve.finish().await;
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
}
