//! `pub` and `sub` against a real broker.

use commlib_testkit::mqtt_url;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Running, run, run_with, unique};

/// The data of printed messages.
fn data(lines: &[Value]) -> Vec<Value> {
    lines.iter().map(|line| line["data"].clone()).collect()
}

#[tokio::test]
async fn a_message_arrives_with_topic_data_and_header() {
    let Some(url) = mqtt_url().await else { return };
    let topic = unique("sonar.front");
    let pattern = topic.replace("front", "*");
    let sub = Running::ready(&url, &["sub", &pattern, "--count", "1"]).await;
    let json = "{\"b\": 1.50, \"a\":\n[]}";
    let published = run(&url, &["pub", &topic, json]).await;
    assert_eq!((published.code, &*published.stdout), (Some(0), ""));
    assert_eq!(published.stderr, "");

    let ended = sub.finish().await;
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
    let line = &ended.lines()[0];
    assert_eq!(line["topic"], topic.as_str());
    assert!(line["header"]["timestamp"].is_u64(), "{line}");
    // The text of the data stays as it is, on one line, and the keys stand in this order.
    let start = format!("{{\"topic\":\"{topic}\",\"data\":{{\"b\": 1.50, \"a\": []}},\"header\":");
    assert!(ended.stdout.starts_with(&start), "{}", ended.stdout);
}

#[tokio::test]
async fn lines_of_stdin_are_messages() {
    let Some(url) = mqtt_url().await else { return };
    let topic = unique("lines");
    let mut sub = Running::ready(&url, &["sub", &topic]).await;
    let input = "1\n\n  {\"a\": 2}\r\nthree\n4";
    let published = run_with(&url, &["pub", &topic], input).await;
    assert_eq!(published.code, Some(1));
    assert_eq!(published.stdout, "");
    assert!(
        published.error().starts_with("line 4: not JSON"),
        "{}",
        published.stderr
    );
    for expected in [json!(1), json!({"a": 2}), json!(4)] {
        assert_eq!(sub.line().await["data"], expected);
    }
}

#[tokio::test]
async fn stdin_is_streamed() {
    let Some(url) = mqtt_url().await else { return };
    let topic = unique("stream");
    let mut sub = Running::ready(&url, &["sub", &topic]).await;
    let mut publisher = Running::start(&url, &["pub", &topic, "--confirm"]);
    for number in 1..=3 {
        publisher.write(&format!("{number}\n")).await;
        assert_eq!(
            publisher.line().await,
            json!({"n": number, "confirmed": true})
        );
        assert_eq!(sub.line().await["data"], number);
    }
    assert_eq!(publisher.finish().await.code, Some(0));
}

#[tokio::test]
async fn confirmations_come_in_order_and_count_messages() {
    let Some(url) = mqtt_url().await else { return };
    let topic = unique("confirmed");
    let ended = run_with(&url, &["pub", &topic, "--confirm"], "1\nno\n2\n3\n").await;
    assert_eq!(ended.code, Some(1));
    let expected = [1, 2, 3].map(|n| json!({"n": n, "confirmed": true}));
    assert_eq!(ended.lines(), expected);
}

#[tokio::test]
async fn count_repeats_a_message_and_limits_stdin() {
    let Some(url) = mqtt_url().await else { return };
    let topic = unique("count");
    let sub = Running::ready(&url, &["sub", &topic, "--count", "5"]).await;
    let args = ["pub", &topic, "7", "--count", "3", "--interval", "20ms"];
    assert_eq!(run(&url, &args).await.code, Some(0));
    let args = ["pub", &topic, "--count", "2"];
    assert_eq!(run_with(&url, &args, "8\n9\n10\n").await.code, Some(0));
    let lines = sub.finish().await.lines();
    assert_eq!(data(&lines), [7, 7, 7, 8, 9]);
}

#[tokio::test]
async fn malformed_messages_are_told() {
    let Some(url) = mqtt_url().await else { return };
    let topic = unique("malformed");
    let mut sub = Running::ready(&url, &["sub", &topic]).await;
    // What is not JSON cannot come from `pub`: write it as a client of another kind would.
    let connection = commlib::connect(&url).await.unwrap();
    let target = commlib::Target::Topic(commlib::Name::new(&topic).unwrap());
    let options = commlib::SendOptions::default().dialect(commlib::Dialect::CommlibPy);
    let message = commlib::Message::new("{oops");
    let transport = connection.transport();
    drop(transport.send(&target, message, options).await.unwrap());
    let line = sub.line().await;
    assert_eq!(line["malformed"]["topic"], topic.as_str());
    assert!(line["malformed"]["reason"].is_string(), "{line}");
    connection.close().await.unwrap();
}

#[tokio::test]
async fn the_bare_dialect_is_heard_and_spoken() {
    let Some(url) = mqtt_url().await else { return };
    let topic = unique("bare");
    let args = ["--dialect", "commlib-py", "sub", &topic, "--count", "1"];
    let sub = Running::ready(&url, &args).await;
    let args = ["--dialect", "commlib-py", "pub", &topic, "{\"x\":1}"];
    assert_eq!(run(&url, &args).await.code, Some(0));
    let line = &sub.finish().await.lines()[0];
    assert_eq!(line["data"], json!({"x": 1}));
    assert_eq!(line["header"].get("message_id"), None, "{line}");
}

#[tokio::test]
async fn signals_and_the_time_limit_end_it_cleanly() {
    let Some(url) = mqtt_url().await else { return };
    let topic = unique("end");
    for signal in [Signal::INT, Signal::TERM] {
        let sub = Running::ready(&url, &["sub", &topic]).await;
        sub.signal(signal);
        assert_eq!(sub.finish().await.code, Some(0));
    }
    let sub = Running::ready(&url, &["sub", &topic, "--for", "100ms"]).await;
    let ended = sub.finish().await;
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
}

#[tokio::test]
async fn a_closed_stdout_ends_quietly() {
    let Some(url) = mqtt_url().await else { return };
    let topic = unique("closed");
    let mut sub = Running::ready(&url, &["sub", &topic]).await;
    sub.close_stdout();
    assert_eq!(run(&url, &["pub", &topic, "1"]).await.code, Some(0));
    let ended = sub.finish().await;
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
}

#[tokio::test]
async fn a_named_subscription_keeps_what_comes_while_nobody_listens() {
    let Some(url) = mqtt_url().await else { return };
    let topic = unique("durable");
    let name = topic.replace('.', "-");
    let args = [
        "sub",
        &topic,
        "--delivery",
        "at-least-once",
        "--name",
        &name,
    ];
    let sub = Running::ready(&url, &args).await;
    assert_eq!(sub.terminate().await.code, Some(0));

    let kept = run_with(&url, &["pub", &topic, "--confirm"], "1\n2\n3\n").await;
    assert_eq!(kept.code, Some(0));
    // The first two are acknowledged, the third waits for the next run.
    let first = Running::start(&url, &[&args[..], &["--count", "2"]].concat());
    assert_eq!(data(&first.finish_after_ready().await), [1, 2]);
    let second = Running::start(&url, &[&args[..], &["--count", "1"]].concat());
    assert_eq!(data(&second.finish_after_ready().await), [3]);
    remove_session(&url, &format!("commlib-{name}")).await;
}

#[tokio::test]
async fn a_made_up_subscription_is_removed() {
    let Some(url) = mqtt_url().await else { return };
    let topic = unique("made-up");
    let args = ["sub", &topic, "--delivery", "at-least-once", "--count", "1"];
    let sub = Running::ready(&url, &args).await;
    let published = run(&url, &["pub", &topic, "1", "--confirm"]).await;
    assert_eq!(published.code, Some(0));
    let ended = sub.finish().await;
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
    assert_eq!(data(&ended.lines()), [1]);
}

/// Leaves nothing behind on a broker that others use.
async fn remove_session(url: &str, client_id: &str) {
    let separator = if url.contains('?') { '&' } else { '?' };
    let url = format!("{url}{separator}client_id={client_id}&session=clean");
    let connection = commlib::connect(&url).await.expect("the broker runs");
    connection.close().await.expect("nothing waits");
}
