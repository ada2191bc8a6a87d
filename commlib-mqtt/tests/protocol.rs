//! What goes over the wire in which order, against a broker whose every packet the test decides.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use commlib_core::{ErrorKind, GapCause, Incoming, LinkState, ListenOptions, Message, Transport};
use commlib_mqtt::{MqttConfig, Session};
use common::*;
use rumqttc::mqttbytes::QoS::{AtLeastOnce, AtMostOnce};
use rumqttc::mqttbytes::v4::{ConnectReturnCode, Packet, PubAck};

fn persistent(fake: &Fake) -> MqttConfig {
    fake.config().client_id("c1").session(Session::Persistent)
}

#[tokio::test]
async fn login_says_what_was_configured() {
    let fake = Fake::start().await;
    let config = persistent(&fake)
        .login("me", "secret")
        .keep_alive(std::time::Duration::from_secs(7));
    let (_link, peer) = fake.pair(config).await;
    let connect = peer.connect;
    assert_eq!((connect.client_id.as_str(), connect.keep_alive), ("c1", 7));
    assert!(!connect.clean_session);
    assert!(connect.login.unwrap().validate("me", "secret"));
}

#[tokio::test]
async fn a_refused_login_fails_at_once() {
    for (code, word) in [
        (ConnectReturnCode::BadUserNamePassword, "password"),
        (ConnectReturnCode::NotAuthorized, "not authorized"),
        (ConnectReturnCode::BadClientId, "client id"),
    ] {
        let fake = Fake::start().await;
        let (refused, _peer) = tokio::join!(
            soon(commlib_mqtt::MqttTransport::connect(fake.config())),
            fake.answer(code, false)
        );
        let error = refused.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Connect);
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[tokio::test]
async fn a_refused_subscription_is_an_error_that_names_the_filter() {
    let fake = Fake::start().await;
    let (link, mut peer) = fake.pair(fake.config()).await;
    let (refused, _) = tokio::join!(
        try_listen(&link, "secret.*", ListenOptions::default()),
        peer.subscribed(&[None])
    );
    let error = refused.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broker);
    assert!(error.to_string().contains("secret/#"), "{error}");
    // The connection is none the worse for it.
    let (_inbox, filters) =
        tokio::join!(listen(&link, "open"), peer.subscribed(&[Some(AtMostOnce)]));
    assert_eq!(filters, [("open".to_owned(), AtMostOnce)]);
}

#[tokio::test]
async fn a_subscription_refused_after_a_reconnect_ends_with_a_gap() {
    let fake = Fake::start().await;
    let (link, mut peer) = fake.pair(fake.config()).await;
    let (mut inbox, _) = tokio::join!(listen(&link, "a"), peer.subscribed(&[Some(AtMostOnce)]));
    drop(peer);
    let mut peer = fake.accept(false).await;
    peer.subscribed(&[None]).await;
    assert_eq!(gap(&mut inbox).await.cause, GapCause::LinkLost);
    while let Some(last) = soon(inbox.recv()).await {
        assert!(matches!(last, Incoming::Gap(_)), "{last:?}");
    }
    until_up(&link).await;
}

#[tokio::test]
async fn a_lower_grant_than_asked_for_is_no_silent_downgrade() {
    let fake = Fake::start().await;
    let (link, mut peer) = fake.pair(persistent(&fake)).await;
    let (refused, _) = tokio::join!(
        try_listen(&link, "a", acked()),
        peer.subscribed(&[Some(AtMostOnce)])
    );
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unsupported);
}

#[tokio::test]
async fn acknowledgements_leave_in_the_order_of_arrival() {
    let fake = Fake::start().await;
    let (link, mut peer) = fake.pair(persistent(&fake)).await;
    let (mut inbox, _) = tokio::join!(
        listen_acked(&link, "a"),
        peer.subscribed(&[Some(AtLeastOnce)])
    );
    for id in [21, 22, 23] {
        peer.publish("a", AtLeastOnce, id, "1").await;
    }
    let mut acks = Vec::new();
    for _ in 0..3 {
        acks.push(arrival(&mut inbox).await.ack.unwrap());
    }
    acks.pop().unwrap().accept();
    peer.quiet().await;
    acks.remove(0).accept();
    assert_eq!(peer.puback().await, 21);
    acks.remove(0).accept();
    assert_eq!((peer.puback().await, peer.puback().await), (22, 23));
}

#[tokio::test]
async fn what_is_not_accepted_comes_again_five_times_in_all() {
    let fake = Fake::start().await;
    let (link, mut peer) = fake.pair(persistent(&fake)).await;
    let (mut inbox, _) = tokio::join!(
        listen_acked(&link, "a"),
        peer.subscribed(&[Some(AtLeastOnce)])
    );
    peer.publish("a", AtLeastOnce, 7, "1").await;
    for round in 0..5 {
        let again = arrival(&mut inbox).await;
        match round % 2 {
            0 => drop(again),
            _ => again.ack.unwrap().reject(true),
        }
    }
    let missed = gap(&mut inbox).await;
    assert_eq!((missed.cause, missed.missed), (GapCause::GivenUp, Some(1)));
    assert_eq!(peer.puback().await, 7);
    peer.publish("a", AtLeastOnce, 8, "2").await;
    arrival(&mut inbox).await.ack.unwrap().reject(false);
    assert_eq!(peer.puback().await, 8);
}

#[tokio::test]
async fn malformed_input_is_acknowledged_with_its_notice() {
    let fake = Fake::start().await;
    let (link, mut peer) = fake.pair(persistent(&fake).max_payload(10)).await;
    let (mut inbox, _) = tokio::join!(
        listen_acked(&link, "a"),
        peer.subscribed(&[Some(AtLeastOnce)])
    );
    for (id, payload, kind) in [
        (1, "{", ErrorKind::Decode),
        (2, "12345678901", ErrorKind::TooLarge),
    ] {
        peer.publish("a", AtLeastOnce, id, payload).await;
        match next(&mut inbox).await {
            Incoming::Malformed(malformed) => assert_eq!(malformed.error.kind(), kind),
            other => panic!("{other:?}"),
        }
        assert_eq!(peer.puback().await, id);
    }
}

#[tokio::test]
async fn one_message_for_several_inboxes_is_acknowledged_when_all_are_done() {
    let fake = Fake::start().await;
    let (link, mut peer) = fake.pair(persistent(&fake)).await;
    let (mut wide, _) = tokio::join!(
        listen_acked(&link, "a.*"),
        peer.subscribed(&[Some(AtLeastOnce)])
    );
    // Covered by what the broker granted already: it is not asked again.
    let mut narrow = listen_acked(&link, "a.b").await;
    let mut casual = listen(&link, "a.b").await;
    peer.publish("a/b", AtLeastOnce, 5, "1").await;
    arrival(&mut casual).await;
    arrival(&mut wide).await.ack.unwrap().accept();
    peer.quiet().await;
    data(&mut narrow).await;
    assert_eq!(peer.puback().await, 5);
    // The wide one goes: the narrow one is asked for before it is given up.
    drop(wide);
    let subscribe = peer.subscribe().await;
    assert_eq!(subscribe.filters[0].path, "a/b");
    peer.quiet().await;
    peer.grant(&subscribe, &[Some(AtLeastOnce)]).await;
    assert_eq!(peer.unsubscribed().await, ["a/#"]);
    drop(casual);
    peer.quiet().await;
    drop(narrow);
    assert_eq!(peer.unsubscribed().await, ["a/b"]);
}

#[tokio::test]
async fn a_wider_filter_takes_over_only_when_granted() {
    let fake = Fake::start().await;
    let (link, mut peer) = fake.pair(fake.config()).await;
    let (mut narrow, _) = tokio::join!(listen(&link, "a.b"), peer.subscribed(&[Some(AtMostOnce)]));
    let (refused, _) = tokio::join!(
        try_listen(&link, "a.*", ListenOptions::default()),
        peer.subscribed(&[None])
    );
    refused.unwrap_err();
    peer.publish("a/b", AtMostOnce, 0, "1").await;
    assert_eq!(data(&mut narrow).await, "1");
    let (_wide, _) = tokio::join!(listen(&link, "a.*"), peer.subscribed(&[Some(AtMostOnce)]));
    assert_eq!(peer.unsubscribed().await, ["a/b"]);
    peer.publish("a/b", AtMostOnce, 0, "2").await;
    assert_eq!(data(&mut narrow).await, "2");
}

#[tokio::test]
async fn a_copy_for_a_second_filter_is_dropped() {
    let fake = Fake::start().await;
    let (link, mut peer) = fake.pair(persistent(&fake)).await;
    let (mut left, _) = tokio::join!(
        listen_acked(&link, "a.*.c"),
        peer.subscribed(&[Some(AtLeastOnce)])
    );
    let (mut right, _) = tokio::join!(
        listen_acked(&link, "a.b.*"),
        peer.subscribed(&[Some(AtLeastOnce)])
    );
    let ours = r#"{"header":{"timestamp":1,"sender":"s","message_id":"1"},"data":1}"#;
    peer.publish("a/b/c", AtLeastOnce, 1, ours).await;
    peer.publish("a/b/c", AtLeastOnce, 2, ours).await;
    peer.publish("a/b/c", AtLeastOnce, 3, "2").await;
    for inbox in [&mut left, &mut right] {
        assert_eq!(
            (data(inbox).await, data(inbox).await),
            ("1".into(), "2".into())
        );
    }
    for id in 1..=3 {
        assert_eq!(peer.puback().await, id);
    }
}

#[tokio::test]
async fn unconfirmed_messages_are_sent_again_in_order_before_connected() {
    let fake = Fake::start().await;
    let (link, mut peer) = fake.pair(persistent(&fake)).await;
    let mut receipts = Vec::new();
    for n in 0..3 {
        receipts.push(publish(&link, "a", number(n)).await);
    }
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(peer.published().await.pkid);
    }
    peer.send(Packet::PubAck(PubAck::new(ids[0]))).await;
    soon(receipts.remove(0)).await.unwrap();
    drop(peer);
    until_down(&link).await;
    // Accepted without a link.
    receipts.push(publish(&link, "a", number(3)).await);
    let mut peer = fake.accept(true).await;
    for (n, id, dup) in [
        (1, Some(ids[1]), true),
        (2, Some(ids[2]), true),
        (3, None, false),
    ] {
        let again = peer.published().await;
        assert!(
            again
                .payload
                .ends_with(format!("\"data\":{n}}}").as_bytes())
        );
        assert_eq!(again.dup, dup);
        assert!(id.is_none_or(|id| id == again.pkid));
        peer.send(Packet::PubAck(PubAck::new(again.pkid))).await;
    }
    assert!(until_up(&link).await, "the session was resumed");
    for receipt in receipts {
        soon(receipt).await.unwrap();
    }
}

#[tokio::test]
async fn connected_is_announced_after_the_subscriptions() {
    let fake = Fake::start().await;
    let (link, mut peer) = fake.pair(fake.config()).await;
    let (mut inbox, _) = tokio::join!(listen(&link, "a"), peer.subscribed(&[Some(AtMostOnce)]));
    let receipt = publish(&link, "x", number(1)).await;
    peer.published().await;
    drop(peer);
    let mut peer = fake.accept(false).await;
    let subscribe = peer.subscribe().await;
    peer.quiet().await;
    assert!(!link.link().state().is_connected());
    peer.grant(&subscribe, &[Some(AtMostOnce)]).await;
    let again = peer.published().await;
    assert!(!until_up(&link).await);
    peer.publish("a", AtMostOnce, 0, "1").await;
    assert_eq!(gap(&mut inbox).await.cause, GapCause::LinkLost);
    assert_eq!(data(&mut inbox).await, "1");
    peer.send(Packet::PubAck(PubAck::new(again.pkid))).await;
    soon(receipt).await.unwrap();
}

#[tokio::test]
async fn messages_of_a_resumed_session_wait_for_their_listener() {
    let fake = Fake::start().await;
    let (link, mut peer) = tokio::join!(connect(persistent(&fake)), fake.accept(true));
    peer.publish("a/b", AtLeastOnce, 4, "1").await;
    peer.publish("x", AtLeastOnce, 5, "2").await;
    peer.quiet().await;
    let (inbox, _) = tokio::join!(
        try_listen(&link, "a.*", durable()),
        peer.subscribed(&[Some(AtLeastOnce)])
    );
    let mut inbox = inbox.unwrap();
    let held = arrival(&mut inbox).await;
    assert_eq!(held.name.as_str(), "a.b");
    // The inbox goes without a word: the message is for the next one of the name.
    drop(inbox);
    drop(held);
    peer.quiet().await;
    let mut inbox = try_listen(&link, "a.*", durable()).await.unwrap();
    assert_eq!(data(&mut inbox).await, "1");
    assert_eq!(peer.puback().await, 4);
    // A clean end leaves the durable subscription, and what nobody took, at the broker.
    let (closed, end) = tokio::join!(soon(link.close()), peer.next());
    assert_eq!(end, Some(Packet::Disconnect));
    drop(peer);
    closed.unwrap();
}

#[tokio::test]
async fn a_clean_end_unsubscribes_what_is_not_durable() {
    let fake = Fake::start().await;
    let (link, mut peer) = fake.pair(persistent(&fake)).await;
    let (inbox, _) = tokio::join!(
        listen_acked(&link, "a"),
        peer.subscribed(&[Some(AtLeastOnce)])
    );
    // All handles go, one after the other: only then does the connection end.
    drop(link);
    peer.quiet().await;
    drop(inbox);
    assert_eq!(peer.unsubscribed().await, ["a"]);
    assert_eq!(peer.next().await, Some(Packet::Disconnect));
    assert_eq!(peer.next().await, None);
}

#[tokio::test]
async fn replies_learn_of_a_lost_link_at_once() {
    let fake = Fake::start().await;
    let (link, mut peer) = fake.pair(fake.config()).await;
    let (replies, filters) = tokio::join!(
        soon(link.listen(&commlib_core::Source::Replies, ListenOptions::default())),
        peer.subscribed(&[Some(AtMostOnce)])
    );
    let mut replies = replies.unwrap();
    let service = commlib_core::Name::new("service").unwrap();
    let (one, two) = (
        replies.lease(&service).unwrap(),
        replies.lease(&service).unwrap(),
    );
    assert!(filters[0].0.ends_with("/#") && one.address != two.address);
    peer.publish(&two.address, AtMostOnce, 0, "1").await;
    assert_eq!(arrival(&mut replies).await.key, Some(two.key.clone()));
    peer.publish(&one.address, AtMostOnce, 0, "{").await;
    match next(&mut replies).await {
        Incoming::Malformed(malformed) => assert_eq!(malformed.key, Some(one.key.clone())),
        other => panic!("{other:?}"),
    }
    drop((peer, fake));
    assert_eq!(gap(&mut replies).await.cause, GapCause::LinkLost);
    assert!(!matches!(link.link().state(), LinkState::Closed { .. }));
}

#[tokio::test]
async fn best_effort_does_not_wait_for_a_link() {
    let fake = Fake::start().await;
    let (link, mut peer) = fake.pair(fake.config()).await;
    post(&link, "a", number(1)).await;
    assert_eq!(peer.published().await.topic, "a");
    drop((peer, fake));
    until_down(&link).await;
    let refused = try_send(&link, "a", number(2), Default::default()).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionLost);
}

#[tokio::test]
async fn a_full_outbox_waits_or_times_out() {
    let fake = Fake::start().await;
    let (link, mut peer) = fake.pair(fake.config().outbox(1)).await;
    let first = publish(&link, "a", number(1)).await;
    let limit = std::time::Duration::from_millis(50);
    let full = try_send(&link, "a", number(2), surely().timeout(limit)).await;
    assert_eq!(full.unwrap_err().kind(), ErrorKind::Timeout);
    let id = peer.published().await.pkid;
    let waits = try_send(&link, "a", Message::new("3"), surely());
    let (waited, ()) = tokio::join!(waits, peer.send(Packet::PubAck(PubAck::new(id))));
    drop(waited.unwrap());
    soon(first).await.unwrap();
    assert!(peer.published().await.payload.ends_with(b"3}"));
}
