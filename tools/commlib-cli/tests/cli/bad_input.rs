//! Each mistake is one line on stderr and the right exit code, before anything is sent.

use std::time::{Duration, Instant};

use commlib_testkit::{Mosquitto, free_port, mqtt_url};

use crate::support::{run, run_with, unique};

/// Nobody listens there, and mistakes are found before anybody looks.
const NOWHERE: &str = "mqtt://127.0.0.1:9";

/// Runs a command that is wrong and gives back what it says.
async fn usage(url: &str, args: &[&str]) -> String {
    let ended = run(url, args).await;
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert_eq!(ended.stdout, "");
    ended.error().to_owned()
}

#[tokio::test]
async fn memory_is_refused_with_the_reason() {
    let error = usage("memory:", &["pub", "a", "1"]).await;
    assert!(error.contains("within one process"), "{error}");
}

#[tokio::test]
async fn no_broker() {
    let error = usage("", &["pub", "a", "1"]).await;
    assert!(
        error.contains("--url") && error.contains("COMMLIB_URL"),
        "{error}"
    );
}

#[tokio::test]
async fn bad_url() {
    for url in ["nonsense", "mqtt://", "ftp://host", "mqtt://host:99999"] {
        usage(url, &["call", "a"]).await;
    }
    let error = usage("ftp://host", &["call", "a"]).await;
    assert!(error.contains("known are memory, mqtt"), "{error}");
}

#[tokio::test]
async fn the_option_goes_before_the_environment() {
    let error = usage(NOWHERE, &["--url", "ftp://host", "call", "a"]).await;
    assert!(error.contains("ftp"), "{error}");
}

#[tokio::test]
async fn unknown_url_option() {
    let url = format!("{NOWHERE}?keepalive=1s");
    for args in [
        &["sub", "a"][..],
        &["sub", "a", "--delivery", "at-least-once"],
    ] {
        let error = usage(&url, args).await;
        assert!(error.contains("`keepalive`"), "{error}");
        assert!(error.contains("keep_alive"), "{error}");
    }
}

#[tokio::test]
async fn a_password_never_shows() {
    let url = "mqtt://user:s3cret@127.0.0.1:9?bad=1";
    assert!(!usage(url, &["sub", "a"]).await.contains("s3cret"));
    let help = run(url, &["--help"]).await;
    assert!(!help.stdout.contains("s3cret"));
}

#[tokio::test]
async fn bad_names_and_patterns() {
    for args in [
        &["pub", "a/b", "1"][..],
        &["pub", "a.*", "1"],
        &["pub", "", "1"],
        &["sub", "a.b*"],
        &["sub", "a..b"],
        &["call", "a b"],
        &["serve", "a.#", "--echo"],
        &["sub", "a", "--delivery", "at-least-once", "--name", "a b"],
    ] {
        usage(NOWHERE, args).await;
    }
    let error = usage(NOWHERE, &["pub", "a/b", "1"]).await;
    assert!(error.contains("names are dotted"), "{error}");
}

#[tokio::test]
async fn bad_dialect() {
    let error = usage(NOWHERE, &["--dialect", "klingon", "sub", "a"]).await;
    assert!(error.contains("commlib-py-0.11"), "{error}");
}

#[tokio::test]
async fn arguments_that_are_not_json() {
    for args in [
        &["pub", "a", "{\"x\": }"][..],
        &["call", "a", "hello"],
        &["serve", "a", "--reply", "{"],
    ] {
        let error = usage(NOWHERE, args).await;
        assert!(error.contains("not JSON"), "{error}");
    }
}

#[tokio::test]
async fn bad_durations_and_counts() {
    for args in [
        &["sub", "a", "--for", "5"][..],
        &["sub", "a", "--count", "many"],
        &["call", "a", "--timeout", "soon"],
        &["pub", "a", "1", "--interval", "-1s"],
    ] {
        usage(NOWHERE, args).await;
    }
}

#[tokio::test]
async fn serve_wants_exactly_one_answer() {
    usage(NOWHERE, &["serve", "a"]).await;
    usage(NOWHERE, &["serve", "a", "--echo", "--reply", "1"]).await;
}

#[tokio::test]
async fn a_name_needs_a_durable_subscription() {
    let error = usage(NOWHERE, &["sub", "a", "--name", "log"]).await;
    assert!(error.contains("--delivery at-least-once"), "{error}");
}

#[tokio::test]
async fn arguments_that_are_missing_or_unknown() {
    usage(NOWHERE, &["pub"]).await;
    usage(NOWHERE, &["publish", "a"]).await;
    // Both options stand before the command.
    usage(NOWHERE, &["pub", "--url", NOWHERE, "a", "1"]).await;
}

#[tokio::test]
async fn help_shows_examples() {
    for args in [
        &["--help"][..],
        &["pub", "--help"],
        &["sub", "--help"],
        &["call", "--help"],
        &["serve", "--help"],
    ] {
        let ended = run("", args).await;
        assert_eq!(ended.code, Some(0));
        assert!(ended.stdout.contains("Examples:"), "{args:?}");
    }
}

#[tokio::test]
async fn a_message_that_is_too_large() {
    let Some(url) = mqtt_url().await else { return };
    let topic = unique("large");
    let line = format!("\"{}\"", "x".repeat(1 << 20));
    let input = format!("{line}\n1\n");
    for args in [&["pub", &topic][..], &["pub", &topic, "--confirm"]] {
        let ended = run_with(&url, args, &input).await;
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.error().starts_with("line 1: "), "{}", ended.stderr);
        assert!(ended.stderr.len() < 1000);
    }
}

#[tokio::test]
async fn a_broker_that_is_down_is_given_up_in_time() {
    let url = format!("mqtt://127.0.0.1:{}", free_port());
    let start = Instant::now();
    let commands = [
        &["pub", "a", "1"][..],
        &["pub", "a", "1", "--confirm"],
        &["sub", "a"],
        &["sub", "a", "--delivery", "at-least-once"],
        &["call", "a"],
        &["serve", "a", "--echo"],
    ];
    let ended = futures_util::future::join_all(commands.map(|args| run(&url, args))).await;
    for ended in ended {
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.error().contains("127.0.0.1"), "{}", ended.stderr);
    }
    let took = start.elapsed();
    assert!(took < Duration::from_secs(14), "{took:?}");
}

#[tokio::test]
async fn a_refused_login() {
    if !Mosquitto::available() {
        return;
    }
    let broker = Mosquitto::builder().login("robot", "s3cret").start().await;
    let url = format!("mqtt://robot:wr0ng@{}", broker.address());
    for url in [url, format!("mqtt://{}", broker.address())] {
        let ended = run(&url, &["pub", "a", "1", "--confirm"]).await;
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(!ended.error().contains("wr0ng"), "{}", ended.stderr);
    }
    let ended = run(&broker.url(), &["pub", "a", "1", "--confirm"]).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
}
