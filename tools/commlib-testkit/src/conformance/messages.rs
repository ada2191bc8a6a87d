//! What travels: data, names and headers.

use commlib_core::{Dialect, ErrorKind, Header, PubSub, RawValue, Rpc, Subscriber, Value, json};

use super::peer::{Caller, name, next, pair, send, send_as, subscribe};
use super::{Fixture, unique, within};

/// Publishes each value and expects it back.
async fn round_trips(fixture: &dyn Fixture, values: Vec<Value>) {
    let (publisher, mut subscriber) = pair::<Value>(fixture, "values").await;
    for value in values {
        publisher.publish(&value).await.expect("publish");
        assert_eq!(next(&mut subscriber).await.data, value);
    }
}

/// Every kind of JSON, the smallest first.
pub async fn empty_and_odd_values(fixture: &dyn Fixture) {
    let values = vec![
        json!({}),
        json!([]),
        json!(null),
        json!(""),
        json!(0),
        json!(true),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(0.1),
        json!({"header": {}, "data": {}}),
        json!({"a": {"b": [{"c": null}]}}),
        json!("quote \" backslash \\ brace } newline \n nul \u{0}"),
    ];
    round_trips(fixture, values).await;
}

/// Names and data hold any script.
pub async fn unicode_names_and_data(fixture: &dyn Fixture) {
    let texts = [
        "gr\u{fc}\u{df}e",
        "\u{65e5}\u{672c}\u{8a9e}",
        "\u{1f916}",
        "\u{5d0}\u{5d1}",
        "e\u{301}",
    ];
    round_trips(
        fixture,
        texts.iter().map(|text| json!({ *text: text })).collect(),
    )
    .await;
    let connection = fixture.connect().await;
    let prefix = unique("unicode");
    let mut subscriber: Subscriber = subscribe(&connection, &format!("{prefix}.*")).await;
    let publisher = connection.multi_publisher().expect("publisher");
    for text in texts {
        let topic = format!("{prefix}.{text}");
        publisher.publish(&topic, &json!(1)).await.expect("publish");
        assert_eq!(next(&mut subscriber).await.topic.as_str(), topic);
        // Elsewhere: there are brokers on which a subscriber of a service's name sees its requests.
        let service = unique(text);
        let handle = connection.rpc_service(&service, |data: Value| async move { Ok(data) });
        let _handle = within("a service", handle).await.expect("serve");
        let client = connection
            .rpc_client::<Value, Value>(&service)
            .expect("client");
        assert_eq!(
            within("a reply", client.call(&json!(text)))
                .await
                .expect("call"),
            text
        );
    }
}

/// 255 bytes are a legal name of a topic and of a service.
pub async fn the_longest_name(fixture: &dyn Fixture) {
    let mut topic = unique("long");
    while topic.len() < 255 {
        topic.push_str(if topic.len() % 10 == 8 && topic.len() < 254 {
            "."
        } else {
            "x"
        });
    }
    let connection = fixture.connect().await;
    let mut subscriber = subscribe::<u64>(&connection, &topic).await;
    connection
        .publisher::<u64>(&topic)
        .expect("publisher")
        .publish(&1)
        .await
        .expect("publish");
    assert_eq!(next::<u64>(&mut subscriber).await.topic.as_str(), topic);
    let handle = connection.rpc_service(&topic, |n: u64| async move { Ok(n) });
    let _handle = within("a service", handle).await.expect("serve");
    let client = connection.rpc_client::<u64, u64>(&topic).expect("client");
    assert_eq!(within("a reply", client.call(&1)).await.expect("call"), 1);
}

/// Names that stand for foreign ones go out and come back as they are.
pub async fn escaped_names(fixture: &dyn Fixture) {
    let prefix = unique("escaped");
    let connection = fixture.connect().await;
    let mut below: Subscriber<u64> = subscribe(&connection, &format!("{prefix}.*")).await;
    for segment in [
        "a%2Fb", "a%23", "%2B", "a%20b", "a%2Eb", "%25", "a%00b", "%00", "$x",
    ] {
        let topic = format!("{prefix}.{segment}");
        assert_eq!(name(&topic).as_str(), topic);
        let mut exact = subscribe::<u64>(&connection, &topic).await;
        connection
            .publisher(&topic)
            .expect("publisher")
            .publish(&1)
            .await
            .expect("publish");
        assert_eq!(next::<u64>(&mut exact).await.topic.as_str(), topic);
        assert_eq!(next(&mut below).await.topic.as_str(), topic);
    }
}

/// Larger than any buffer on the way.
pub async fn two_hundred_kilobytes(fixture: &dyn Fixture) {
    let text: String = (0..40_000)
        .map(|n| char::from(b'a' + (n % 26) as u8))
        .collect();
    round_trips(
        fixture,
        vec![json!([text, text, text, text, text]), json!(1)],
    )
    .await;
    let connection = fixture.connect().await;
    let service = unique("large");
    let handle = connection.rpc_service(&service, |data: String| async move { Ok(data) });
    let _handle = within("a service", handle).await.expect("serve");
    let client = connection
        .rpc_client::<String, String>(&service)
        .expect("client");
    let text = text.repeat(5);
    assert!(
        within("a reply", client.call(&text)).await.expect("call") == text,
        "it changed on the way"
    );
}

/// Data of exactly the limit arrives.
pub async fn the_largest_payload(fixture: &dyn Fixture) {
    let (publisher, mut subscriber) = pair::<String>(fixture, "largest").await;
    let text = "x".repeat(fixture.capabilities().max_payload - 2);
    publisher.publish(&text).await.expect("publish");
    assert!(
        next(&mut subscriber).await.data == text,
        "it changed on the way"
    );
}

/// One byte more is refused before anything is sent, on every way out; the connection goes on.
pub async fn too_large_is_refused_before_sending(fixture: &dyn Fixture) {
    let (publisher, mut subscriber) = pair::<String>(fixture, "too-large").await;
    let text = "x".repeat(fixture.capabilities().max_payload - 1);
    let refused = publisher.publish(&text).await.expect_err("too large");
    assert_eq!(refused.kind(), ErrorKind::TooLarge);
    publisher
        .publish(&"next".to_owned())
        .await
        .expect("publish");
    let message = next(&mut subscriber).await;
    assert_eq!(
        (&*message.data, message.gap),
        ("next", None),
        "a refused message leaves no gap"
    );
    let connection = fixture.connect().await;
    let service = unique("too-large");
    let handle = connection.rpc_service(&service, |data: String| async move { Ok(data.len()) });
    let _handle = within("a service", handle).await.expect("serve");
    let client = connection
        .rpc_client::<String, usize>(&service)
        .expect("client");
    let refused = within("the refusal", client.call(&text))
        .await
        .expect_err("too large");
    assert_eq!(refused.kind(), ErrorKind::TooLarge);
    assert!(!refused.maybe_executed(), "it was not sent");
    assert_eq!(
        within("a reply", client.call(&"abc".to_owned()))
            .await
            .expect("call"),
        3
    );
}

/// What cannot be read is an error in its place among the others, never a silence, and ends nothing.
pub async fn malformed_is_reported_and_skipped(fixture: &dyn Fixture) {
    let topic = unique("malformed");
    let connection = fixture.connect().await;
    let mut subscriber: Subscriber<u64> = subscribe(&connection, &topic).await;
    let bad = ["{\"a\": ", "nonsense", "\"text\"", "1 2", ""];
    for (n, data) in (0..).zip(bad) {
        for dialect in [Dialect::Envelope, Dialect::CommlibPy] {
            send_as(&connection, &topic, Header::default(), data, dialect).await;
            send(&connection, &topic, Header::default(), &n.to_string()).await;
            let notice = within("a notice", subscriber.recv())
                .await
                .expect("the stream goes on");
            let error = notice.map(|message| message.data).expect_err(data);
            assert_eq!(error.kind(), ErrorKind::Decode, "{data:?} as {dialect}");
            assert_eq!(next(&mut subscriber).await.data, n);
        }
    }
}

/// A service reads on behind requests that nobody can read.
pub async fn a_malformed_request_is_harmless(fixture: &dyn Fixture) {
    let service = unique("malformed");
    let connection = fixture.connect().await;
    let handle = connection.rpc_service(&service, |n: u64| async move { Ok(n) });
    let _handle = within("a service", handle).await.expect("serve");
    let caller = Caller::new(fixture).await;
    for data in ["{\"a\": ", "nonsense", ""] {
        for dialect in Dialect::ALL {
            caller
                .request_raw(&service, Header::default(), data.into(), dialect)
                .await;
        }
    }
    let client = caller
        .connection
        .rpc_client::<u64, u64>(&service)
        .expect("client");
    assert_eq!(within("a reply", client.call(&1)).await.expect("call"), 1);
}

/// Properties, and fields that nobody knows, arrive with the message.
pub async fn header_fields_travel(fixture: &dyn Fixture) {
    let topic = unique("header");
    let connection = fixture.connect().await;
    let mut subscriber: Subscriber<u64> = subscribe(&connection, &topic).await;
    let mut header = Header::default();
    header.sender = Some("somebody".into());
    header.message_id = Some("17".into());
    header.correlation_id = Some("c-1".into());
    header.hops = vec!["bridge-1".into(), "bridge-2".into()];
    header
        .properties
        .insert("traceparent".into(), "00-4bf92f".into());
    header
        .properties
        .insert("gr\u{fc}n".into(), "\u{fc}".into());
    header
        .properties
        .insert("content_type".into(), "application/x-other".into());
    header
        .extra
        .insert("x_unknown".into(), json!({"deep": [1, "two", null]}));
    header.extra.insert("another".into(), json!("text"));
    send(&connection, &topic, header.clone(), "1").await;
    let mut arrived = next(&mut subscriber).await.header;
    assert!(arrived.timestamp.take().is_some(), "the time of sending");
    assert_eq!(arrived, header);
}

/// Published messages tell who sent them, when, and count.
pub async fn a_message_has_its_own_header(fixture: &dyn Fixture) {
    let (publisher, mut subscriber) = pair::<u64>(fixture, "own").await;
    let mut before: Option<Header> = None;
    for n in 1..4 {
        publisher.publish(&n).await.expect("publish");
        let header = next(&mut subscriber).await.header;
        assert_eq!(header.seq, Some(n));
        assert!(
            header.timestamp.is_some() && header.sender.is_some() && header.message_id.is_some()
        );
        assert!(
            header.properties.is_empty() && header.extra.is_empty(),
            "{header:?}"
        );
        if let Some(before) = before {
            assert_eq!(before.sender, header.sender);
            assert_ne!(before.message_id, header.message_id);
        }
        before = Some(header);
    }
}

/// A payload without an envelope, as other programs send it, is the data.
pub async fn bare_data_is_delivered(fixture: &dyn Fixture) {
    let topic = unique("bare");
    let connection = fixture.connect().await;
    let mut subscriber: Subscriber = subscribe(&connection, &topic).await;
    for data in [
        "{\"t\":21.5}",
        "[1,2]",
        "3",
        "\"text\"",
        "null",
        " { \"spaced\" : 1 } ",
    ] {
        send_as(
            &connection,
            &topic,
            Header::default(),
            data,
            Dialect::CommlibPy,
        )
        .await;
        let message = next(&mut subscriber).await;
        assert_eq!(message.data, data.parse::<Value>().expect("JSON"));
        assert_eq!(message.topic.as_str(), topic);
    }
}

/// A robot's message with a `header` and a `data` of its own is not an envelope.
pub async fn a_robots_own_header_and_data(fixture: &dyn Fixture) {
    let topic = unique("robot");
    let connection = fixture.connect().await;
    let mut subscriber: Subscriber = subscribe(&connection, &topic).await;
    let robots = [
        json!({"header": {"frame_id": "laser", "stamp": {"sec": 1, "nsec": 2}}, "data": [1, 2]}),
        json!({"header": {"seq": 4, "timestamp": 12.5}, "data": {}}),
        json!({"header": {"timestamp": 1, "frame_id": "x"}, "data": 1, "ranges": []}),
        json!({"header": "text", "data": 1}),
    ];
    for robot in robots {
        for dialect in [Dialect::CommlibPy, Dialect::Envelope] {
            send_as(
                &connection,
                &topic,
                Header::default(),
                &robot.to_string(),
                dialect,
            )
            .await;
            assert_eq!(next(&mut subscriber).await.data, robot, "as {dialect}");
        }
    }
}

/// The text of the data arrives as it was written: nothing on the way parses and rewrites it.
pub async fn json_text_is_untouched(fixture: &dyn Fixture) {
    let (publisher, mut subscriber) = pair::<Box<RawValue>>(fixture, "text").await;
    let texts = [
        "1.0",
        "1e3",
        "0.10",
        "123456789012345678901234567890",
        "{\"b\":1,\"a\":2,\"b\":3}",
        "\"\\u00fc\\/\"",
        "[1, 2 ,\t3]",
    ];
    for text in texts {
        let value = RawValue::from_string(text.to_owned()).expect("JSON");
        publisher.publish(&value).await.expect("publish");
        assert_eq!(next(&mut subscriber).await.data.get(), text);
    }
}
