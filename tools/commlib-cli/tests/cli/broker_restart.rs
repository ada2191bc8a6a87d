//! The broker is killed in the middle. Each test has a broker of its own.

use std::collections::BTreeSet;

use commlib_testkit::Mosquitto;
use serde_json::Value;

use crate::support::{Running, run, run_with, within};

const MESSAGES: u64 = 4000;

fn lines(numbers: impl Iterator<Item = u64>) -> String {
    numbers.map(|number| format!("{number}\n")).collect()
}

#[tokio::test]
async fn nothing_confirmed_is_lost_at_least_once() {
    if !Mosquitto::available() {
        return;
    }
    let broker = Mosquitto::start().await;
    let url = broker.url();
    let args = [
        "sub",
        "load.*",
        "--delivery",
        "at-least-once",
        "--name",
        "load",
    ];
    let mut sub = Running::ready(&url, &args).await;
    let mut publisher = Running::start(&url, &["pub", "load.lines", "--confirm"]);
    publisher.write(&lines(1..=MESSAGES / 2)).await;
    // Messages are on their way in both directions when the broker dies.
    let confirmed = publisher.line().await;
    assert_eq!(confirmed["n"], 1);
    broker.kill9();
    // More come in while it is away: they wait.
    publisher
        .write(&lines(MESSAGES / 2 + 1..=MESSAGES / 2 + 100))
        .await;
    broker.restart().await;
    publisher.write(&lines(MESSAGES / 2 + 101..=MESSAGES)).await;

    let published = publisher.finish().await;
    assert_eq!((published.code, &*published.stderr), (Some(0), ""));
    let numbers: Vec<_> = published.lines().iter().map(|l| l["n"].as_u64()).collect();
    let expected: Vec<_> = (2..=MESSAGES).map(Some).collect();
    assert_eq!(numbers, expected);

    let mut missing: BTreeSet<u64> = (1..=MESSAGES).collect();
    within("all messages", async {
        while !missing.is_empty() {
            let line = sub.line().await;
            if let Some(number) = line["data"].as_u64() {
                missing.remove(&number);
            }
        }
    })
    .await;
    assert_eq!(sub.terminate().await.code, Some(0));
}

#[tokio::test]
async fn without_a_broken_link_every_message_comes_once_and_in_order() {
    if !Mosquitto::available() {
        return;
    }
    let broker = Mosquitto::start().await;
    let url = broker.url();
    let count = MESSAGES.to_string();
    let args = [
        "sub",
        "load.*",
        "--delivery",
        "at-least-once",
        "--count",
        &count,
    ];
    let sub = Running::ready(&url, &args).await;
    let input = lines(1..=MESSAGES);
    let (published, received) = tokio::join!(
        run_with(&url, &["pub", "load.lines", "--confirm"], &input),
        sub.finish()
    );
    assert_eq!(published.code, Some(0));
    assert_eq!(received.code, Some(0));
    let numbers: Vec<_> = received
        .lines()
        .iter()
        .map(|l| l["data"].as_u64())
        .collect();
    let expected: Vec<_> = (1..=MESSAGES).map(Some).collect();
    assert_eq!(numbers, expected);
}

#[tokio::test]
async fn a_best_effort_subscriber_is_told_of_the_gap() {
    if !Mosquitto::available() {
        return;
    }
    let broker = Mosquitto::start().await;
    let url = broker.url();
    let mut sub = Running::ready(&url, &["sub", "a.*"]).await;
    assert_eq!(run(&url, &["pub", "a.b", "1"]).await.code, Some(0));
    assert_eq!(sub.line().await["data"], 1);
    broker.kill9();
    broker.restart().await;
    let gap = sub.line().await;
    assert_eq!(gap["gap"]["cause"], "link-lost", "{gap}");
    // The gap comes when the subscription stands again: nothing behind it is missed.
    assert_eq!(run(&url, &["pub", "a.b", "2"]).await.code, Some(0));
    assert_eq!(sub.line().await["data"], Value::from(2));
    assert_eq!(sub.terminate().await.code, Some(0));
}

#[tokio::test]
async fn what_meets_a_broken_link_without_confirm_is_counted() {
    if !Mosquitto::available() {
        return;
    }
    let broker = Mosquitto::start().await;
    let url = broker.url();
    let mut sub = Running::ready(&url, &["sub", "a"]).await;
    let mut publisher = Running::start(&url, &["pub", "a"]);
    publisher.write("1\n").await;
    assert_eq!(sub.line().await["data"], 1);
    broker.kill9();
    // The subscriber and the publisher notice by themselves; write until the publisher has.
    let noticed = within("the broken link", async {
        loop {
            publisher.write("2\n").await;
            let wait = std::time::Duration::from_millis(20);
            if let Ok(line) = tokio::time::timeout(wait, publisher.error_line()).await {
                break line;
            }
        }
    })
    .await;
    assert!(noticed.starts_with("error: line "), "{noticed}");
    publisher.write("3\n4\n").await;
    let ended = publisher.finish().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(
        ended.error().ends_with("messages were not sent"),
        "{ended:?}"
    );
}

#[tokio::test]
async fn a_signal_ends_a_publisher_that_waits_for_its_broker() {
    if !Mosquitto::available() {
        return;
    }
    let broker = Mosquitto::start().await;
    let mut publisher = Running::start(&broker.url(), &["pub", "a", "--confirm"]);
    publisher.write("1\n").await;
    publisher.line().await;
    broker.kill9();
    // More than the pipe and the buffers hold: once it is written, some of it waits for the broker.
    let line = format!("\"{}\"\n", "x".repeat(1000));
    publisher.write(&line.repeat(500)).await;
    let ended = publisher.terminate().await;
    assert_eq!((ended.code, &*ended.stdout), (Some(1), ""), "{ended:?}");
    assert!(
        ended.stderr.contains("not confirmed") || ended.stderr.contains("not sent"),
        "{ended:?}"
    );
}
