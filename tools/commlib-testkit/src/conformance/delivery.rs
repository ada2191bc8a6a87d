//! Publish and subscribe, at least once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use commlib_core::{
    Connection, Delivery, ErrorKind, Header, PubSub, Publisher, PublisherOptions, Received,
    Subscriber, SubscriberOptions,
};
use futures_util::FutureExt;
use tokio::sync::mpsc;

use super::peer::{next, numbered, send_surely, subscribe, until};
use super::{Fixture, unique, within};

/// The value that ends a row of numbers.
const END: u64 = u64::MAX;

/// A subscriber at least once; durable if it has a name.
async fn surely(on: &Connection, topic: &str, durable: Option<&str>) -> Subscriber<u64> {
    let mut options = SubscriberOptions::default().delivery(Delivery::AtLeastOnce);
    if let Some(durable) = durable {
        options = options.durable(durable);
    }
    within("a subscription", on.subscriber_with(topic, options))
        .await
        .expect("subscribe at least once")
}

/// The surest publisher that there is.
fn publisher(on: &Connection, topic: &str) -> Publisher<u64> {
    let delivery = if on.link().capabilities().confirms {
        Delivery::AtLeastOnce
    } else {
        Delivery::BestEffort
    };
    let options = PublisherOptions::default().delivery(delivery);
    on.publisher_with(topic, options).expect("publisher")
}

/// Publishes, and waits for the confirmation if there is one.
async fn publish(publisher: &Publisher<u64>, value: u64) {
    within("the confirmation", publisher.publish(&value))
        .await
        .expect("publish");
}

/// What the broker has confirmed is on its way to every subscriber, in order.
pub async fn confirmed_messages_arrive(fixture: &dyn Fixture) {
    let topic = unique("confirmed");
    let mut subscriber = subscribe::<u64>(&fixture.connect().await, &topic).await;
    let publisher = publisher(&fixture.connect().await, &topic);
    assert_eq!(publisher.guarantee().delivery, Delivery::AtLeastOnce);
    for n in (0..20).chain([END]) {
        publish(&publisher, n).await;
    }
    assert_eq!(
        until(&mut subscriber, &END).await,
        (0..20).collect::<Vec<_>>()
    );
}

/// Many may be under way; each receipt resolves.
pub async fn many_receipts_are_confirmed_in_order(fixture: &dyn Fixture) {
    let topic = unique("receipts");
    let mut subscriber = subscribe::<u64>(&fixture.connect().await, &topic).await;
    let publisher = publisher(&fixture.connect().await, &topic);
    let mut receipts = Vec::new();
    for n in (0..100).chain([END]) {
        receipts.push(
            within("room", publisher.enqueue(&n))
                .await
                .expect("enqueue"),
        );
    }
    for receipt in receipts {
        within("a confirmation", receipt).await.expect("confirmed");
    }
    assert_eq!(
        until(&mut subscriber, &END).await,
        (0..100).collect::<Vec<_>>()
    );
}

/// Asking for more than broker and session can give fails when the endpoint is built.
pub async fn what_cannot_be_promised_is_refused(fixture: &dyn Fixture) {
    let topic = unique("refused");
    let connection = fixture.connect().await;
    let capabilities = connection.link().capabilities().clone();
    let options = PublisherOptions::default().delivery(Delivery::AtLeastOnce);
    let publisher = connection.publisher_with::<u64>(&topic, options);
    let refused = publisher.map(drop).map_err(|e| e.kind());
    let expected = if capabilities.confirms {
        Ok(())
    } else {
        Err(ErrorKind::Unsupported)
    };
    assert_eq!(refused, expected, "a publisher at least once");
    let options = SubscriberOptions::default().delivery(Delivery::AtLeastOnce);
    let pattern = format!("{topic}.*");
    let patterns = capabilities.acks && capabilities.ack_patterns;
    for (what, possible) in [(&topic, capabilities.acks), (&pattern, patterns)] {
        let subscriber = connection.subscriber_with::<u64>(what, options.clone());
        let refused = subscriber.await.map(drop).map_err(|e| e.kind());
        let expected = if possible {
            Ok(())
        } else {
            Err(ErrorKind::Unsupported)
        };
        assert_eq!(refused, expected, "a subscriber of {what} at least once");
    }
    let options = SubscriberOptions::default().durable("name");
    let subscriber = connection.subscriber_with::<u64>(&topic, options).await;
    let refused = subscriber.map(drop).map_err(|e| e.kind());
    assert_eq!(
        refused,
        Err(ErrorKind::Unsupported),
        "durable, but best effort"
    );
}

/// What was used is not delivered again, neither in this session nor in the next.
pub async fn every_message_is_acknowledged_by_use(fixture: &dyn Fixture) {
    let (topic, session, name) = (unique("used"), unique("session"), unique("durable"));
    let connection = fixture.connect_durable(&session).await;
    let mut subscriber = surely(&connection, &topic, Some(&name)).await;
    let guarantee = subscriber.guarantee();
    assert_eq!(
        (guarantee.delivery, guarantee.durable),
        (Delivery::AtLeastOnce, true)
    );
    let publisher = publisher(&fixture.connect().await, &topic);
    for n in [1, 2, 3, END] {
        publish(&publisher, n).await;
    }
    assert_eq!(until(&mut subscriber, &END).await, [1, 2, 3]);
    // Asking for the next one acknowledges the last.
    assert!(subscriber.recv().now_or_never().is_none(), "nothing waits");
    drop(subscriber);
    within("the close", connection.close())
        .await
        .expect("close");
    publish(&publisher, 4).await;
    let connection = fixture.connect_durable(&session).await;
    let mut subscriber = surely(&connection, &topic, Some(&name)).await;
    assert_eq!(next(&mut subscriber).await.data, 4);
}

/// A message that was in use when the session ended comes again in the next; the one before it does not.
pub async fn unhandled_messages_come_again_in_a_new_session(fixture: &dyn Fixture) {
    let (topic, session, name) = (unique("unhandled"), unique("session"), unique("durable"));
    let connection = fixture.connect_durable(&session).await;
    let mut subscriber = surely(&connection, &topic, Some(&name)).await;
    let publisher = publisher(&fixture.connect().await, &topic);
    for n in [1, 2, 3] {
        publish(&publisher, n).await;
    }
    assert_eq!(next(&mut subscriber).await.data, 1);
    // This acknowledges the first, and leaves the second in use.
    let second = next(&mut subscriber).await;
    within("the close", connection.close())
        .await
        .expect("close");
    drop((second, subscriber));
    let connection = fixture.connect_durable(&session).await;
    let mut subscriber = surely(&connection, &topic, Some(&name)).await;
    for n in [2, 3] {
        assert_eq!(next(&mut subscriber).await.data, n);
    }
}

/// Fails on the first try of each message as `fail` says; what the handler saw, until it has seen `2` twice.
async fn failing<F>(fixture: &dyn Fixture, fail: F) -> Vec<u64>
where
    F: Fn(Received<u64>) -> Result<(), String> + Send + Sync + 'static,
{
    let topic = unique("failing");
    let connection = fixture.connect_durable(&unique("session")).await;
    let subscriber = surely(&connection, &topic, None).await;
    let (seen, mut handled) = mpsc::unbounded_channel();
    let tries = Arc::new([
        AtomicUsize::new(0),
        AtomicUsize::new(0),
        AtomicUsize::new(0),
    ]);
    let fail = Arc::new(fail);
    let handle = subscriber.on_message(move |message: Received<u64>| {
        let index = usize::try_from(message.data).expect("small");
        let first = tries[index].fetch_add(1, Ordering::SeqCst) == 0;
        let _ = seen.send(message.data);
        let fail = fail.clone();
        async move { if first { fail(message) } else { Ok(()) } }
    });
    let publisher = publisher(&connection, &topic);
    for n in [1, 2] {
        publish(&publisher, n).await;
    }
    let mut all = Vec::new();
    while all.iter().filter(|n| **n == 2).count() < 2 || all.iter().filter(|n| **n == 1).count() < 2
    {
        let n = within("every message again", handled.recv())
            .await
            .expect("the handler runs");
        all.push(n);
    }
    within("the handler to stop", handle.stop()).await;
    assert!(
        handled.try_recv().is_err(),
        "a message came again after it was handled"
    );
    all.sort_unstable();
    all
}

/// After an `Err` of the handler the message comes again, until an `Ok`.
pub async fn a_failed_handler_gets_the_message_again(fixture: &dyn Fixture) {
    let seen = failing(fixture, |_| Err("not now".to_owned())).await;
    assert_eq!(seen, [1, 1, 2, 2]);
}

/// A panic of the handler is a failure like another; the loop goes on.
pub async fn a_panicked_handler_gets_the_message_again(fixture: &dyn Fixture) {
    let seen = failing(fixture, |_| panic!("this panic is part of the test")).await;
    assert_eq!(seen, [1, 1, 2, 2]);
}

/// A message whose acknowledgement was taken and dropped comes again.
pub async fn a_dropped_ack_brings_the_message_again(fixture: &dyn Fixture) {
    let topic = unique("dropped-ack");
    let connection = fixture.connect_durable(&unique("session")).await;
    let mut subscriber = surely(&connection, &topic, None).await;
    publish(&publisher(&connection, &topic), 1).await;
    let mut message = next(&mut subscriber).await;
    drop(
        message
            .take_ack()
            .expect("an at-least-once message has an ack"),
    );
    assert!(message.take_ack().is_none(), "the ack was taken");
    let mut again = next(&mut subscriber).await;
    assert_eq!(again.data, 1);
    again.take_ack().expect("an ack").accept();
    publish(&publisher(&connection, &topic), 2).await;
    assert_eq!(next(&mut subscriber).await.data, 2);
}

/// Rejected with `requeue` it comes again, without it does not.
pub async fn a_rejected_message_comes_again_or_not(fixture: &dyn Fixture) {
    let topic = unique("rejected");
    let connection = fixture.connect_durable(&unique("session")).await;
    let mut subscriber = surely(&connection, &topic, None).await;
    let publisher = publisher(&connection, &topic);
    publish(&publisher, 1).await;
    next(&mut subscriber)
        .await
        .take_ack()
        .expect("an ack")
        .reject(true);
    let mut again = next(&mut subscriber).await;
    assert_eq!(again.data, 1);
    again.take_ack().expect("an ack").reject(false);
    publish(&publisher, 2).await;
    assert_eq!(next(&mut subscriber).await.data, 2);
}

/// Unreadable data is reported once and does not come back.
pub async fn an_unreadable_message_is_acknowledged(fixture: &dyn Fixture) {
    let topic = unique("unreadable");
    let connection = fixture.connect_durable(&unique("session")).await;
    let mut subscriber = surely(&connection, &topic, None).await;
    send_surely(&connection, &topic, Header::default(), "\"text\"").await;
    send_surely(&connection, &topic, Header::default(), "1").await;
    let first = within("a notice", subscriber.recv())
        .await
        .expect("the stream goes on");
    assert_eq!(
        first.expect_err("text is no number").kind(),
        ErrorKind::Decode
    );
    assert_eq!(next(&mut subscriber).await.data, 1);
    send_surely(&connection, &topic, Header::default(), "2").await;
    assert_eq!(next(&mut subscriber).await.data, 2);
}

/// The broker keeps what arrives for a durable subscription while nobody listens, and forgets nothing of it.
pub async fn a_durable_subscription_keeps_messages_while_away(fixture: &dyn Fixture) {
    let (topic, session, name) = (unique("away"), unique("session"), unique("durable"));
    let connection = fixture.connect_durable(&session).await;
    drop(surely(&connection, &topic, Some(&name)).await);
    within("the close", connection.close())
        .await
        .expect("close");
    let publisher = publisher(&fixture.connect().await, &topic);
    for n in (0..50).chain([END]) {
        publish(&publisher, n).await;
    }
    let connection = fixture.connect_durable(&session).await;
    let mut subscriber = surely(&connection, &topic, Some(&name)).await;
    assert_eq!(
        until(&mut subscriber, &END).await,
        (0..50).collect::<Vec<_>>()
    );
}

/// A message that feeds several subscriptions of one connection comes once to each, whichever acknowledges first.
pub async fn overlapping_at_least_once_subscriptions(fixture: &dyn Fixture) {
    let prefix = unique("overlap");
    let connection = fixture.connect_durable(&unique("session")).await;
    let topic = format!("{prefix}.a");
    let mut exact = surely(&connection, &topic, None).await;
    let mut pattern = surely(&connection, &format!("{prefix}.*"), None).await;
    let mut plain = subscribe::<u64>(&connection, &format!("{prefix}.*")).await;
    let publisher = publisher(&connection, &topic);
    for n in (0..10).chain([END]) {
        publish(&publisher, n).await;
    }
    for subscriber in [&mut pattern, &mut plain, &mut exact] {
        assert_eq!(until(subscriber, &END).await, (0..10).collect::<Vec<_>>());
    }
}

/// `dedup` drops repetitions of what was handled, not of what failed.
pub async fn repetitions_after_failure_are_not_dropped(fixture: &dyn Fixture) {
    let topic = unique("dedup");
    let connection = fixture.connect_durable(&unique("session")).await;
    let options = SubscriberOptions::default()
        .delivery(Delivery::AtLeastOnce)
        .dedup(16);
    let subscriber = connection.subscriber_with::<u64>(&topic, options);
    let mut subscriber = within("a subscription", subscriber)
        .await
        .expect("subscribe");
    let sender = unique("sender");
    send_surely(&connection, &topic, numbered(&sender, 1), "1").await;
    drop(next(&mut subscriber).await.take_ack());
    // Again, because it failed; acknowledged by asking for the next one, which is not its repetition.
    assert_eq!(next(&mut subscriber).await.data, 1);
    let rest = async {
        send_surely(&connection, &topic, numbered(&sender, 1), "1").await;
        send_surely(&connection, &topic, numbered(&sender, 2), "2").await;
    };
    let (message, ()) = tokio::join!(next(&mut subscriber), rest);
    assert_eq!(message.data, 2);
}
