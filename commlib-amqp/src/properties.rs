//! The header of a message as AMQP properties and headers table, and back.
//!
//! The body is the bare data, but for requests and replies in the form of commlib-py 0.13, which has an envelope there.

use std::collections::BTreeMap;
use std::fmt::Display;

use bytes::Bytes;
use commlib_core::envelope::{self, Use};
use commlib_core::{
    DEFAULT_CONTENT_ENCODING, DEFAULT_CONTENT_TYPE, Dialect, Error, ErrorKind, Header, Message,
    ReplyTo, Result, Value,
};
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldArray, FieldTable, LongString, ShortString};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The `app_id` that tells our messages.
const APP_ID: &str = "commlib";

const PREFIX: &str = "x-commlib-";
const SENDER: &str = "x-commlib-sender";
const SEQ: &str = "x-commlib-seq";
const TIMEOUT: &str = "x-commlib-timeout-ms";
const ERROR: &str = "x-commlib-error";
const HOPS: &str = "x-commlib-hops";
/// Header fields of other programs, as one JSON object: AMQP's types and JSON's do not map onto each other.
const EXTRA: &str = "x-commlib-extra";
/// Free keys that cannot stand in the table under their own name, as one JSON object.
const PROPERTIES: &str = "x-commlib-properties";

/// The properties and the body that say what a message says.
///
/// # Errors
/// [`ErrorKind::Encode`] if a field has no form in AMQP.
pub(crate) fn encode(
    message: &Message,
    usage: Use,
    dialect: Dialect,
) -> Result<(BasicProperties, Bytes)> {
    let header = &message.header;
    let enveloped = usage == Use::Rpc && dialect == Dialect::CommlibPy;
    let body = if enveloped {
        envelope::encode(message, usage, dialect)?
    } else {
        message.data.clone()
    };
    let mut properties = BasicProperties::default()
        .with_content_type(short("content_type", header.content_type())?)
        .with_content_encoding(short("content_encoding", header.content_encoding())?);
    if let Some(ns) = header.timestamp {
        // Not the seconds that AMQP asks for, but what commlib-py sends and reads.
        let unit = if dialect == Dialect::CommlibPy011 {
            1_000_000
        } else {
            1
        };
        properties = properties.with_timestamp(ns / unit);
    }
    if let Some(id) = &header.message_id {
        properties = properties.with_message_id(short("message_id", id)?);
    }
    if let Some(id) = &header.correlation_id {
        properties = properties.with_correlation_id(short("correlation_id", id)?);
    }
    if let Some(reply_to) = &header.reply_to {
        properties = properties.with_reply_to(short("reply_to", &reply_to.address)?);
        if let Some(ms) = header.timeout_ms {
            // The broker drops a request that has waited longer than its caller does.
            properties = properties.with_expiration(short("timeout_ms", &ms.max(1).to_string())?);
        }
    }
    let mut table = FieldTable::default();
    if dialect == Dialect::Envelope {
        properties = properties.with_app_id(APP_ID.into());
        put_identity(&mut table, header)?;
    }
    if dialect == Dialect::Envelope || (usage == Use::Rpc && !enveloped) {
        put_extensions(&mut table, header)?;
    }
    if !table.inner().is_empty() {
        properties = properties.with_headers(table);
    }
    Ok((properties, body))
}

/// What only our own messages carry.
fn put_identity(table: &mut FieldTable, header: &Header) -> Result<()> {
    if let Some(sender) = &header.sender {
        put(table, SENDER, text(sender));
    }
    if let Some(seq) = header.seq {
        put(table, SEQ, number(seq));
    }
    if !header.extra.is_empty() {
        put(table, EXTRA, encoded(&header.extra)?);
    }
    let mut awkward = BTreeMap::new();
    for (key, value) in &header.properties {
        match key.as_str() {
            "content_type" | "content_encoding" => {}
            _ if is_reserved(key) => drop(awkward.insert(key, value)),
            _ => put(table, key, text(value)),
        }
    }
    if !awkward.is_empty() {
        put(table, PROPERTIES, encoded(&awkward)?);
    }
    Ok(())
}

/// What old peers ignore and ours and bridges need, in every form.
fn put_extensions(table: &mut FieldTable, header: &Header) -> Result<()> {
    if let Some(ms) = header.timeout_ms {
        put(table, TIMEOUT, number(ms));
    }
    if let Some(error) = &header.error {
        put(table, ERROR, encoded(error)?);
    }
    if !header.hops.is_empty() {
        let hops: Vec<_> = header.hops.iter().map(|hop| text(hop)).collect();
        put(table, HOPS, AMQPValue::FieldArray(FieldArray::from(hops)));
    }
    Ok(())
}

/// Keys that mean something else: ours, and RabbitMQ's extra recipients. Longer ones do not fit.
fn is_reserved(key: &str) -> bool {
    key.starts_with(PREFIX) || key == "CC" || key == "BCC" || key.len() > 255
}

/// The message that came in.
///
/// One with our `app_id` has the bare data as its body. Any other may hold an envelope there, which is recognised as on
/// brokers without headers; what the properties say goes before what it says.
///
/// # Errors
/// [`ErrorKind::Decode`] if the body is not JSON, or one of our own fields is not what it should be.
pub(crate) fn decode(
    properties: &BasicProperties,
    body: Bytes,
    usage: Use,
    dialect: Dialect,
) -> Result<Message> {
    let ours = properties
        .app_id()
        .as_ref()
        .is_some_and(|id| id.as_str() == APP_ID);
    let size = body.len();
    let mut message = if ours {
        let header = Header::default();
        Message { header, data: body }
    } else {
        envelope::decode(&body, usage, dialect)?
    };
    let enveloped = message.data.len() != size;
    let header = &mut message.header;
    if let Some(ns) = properties.timestamp().and_then(nanoseconds) {
        header.timestamp = Some(ns);
    }
    let owned = |text: &Option<ShortString>| text.as_ref().map(ToString::to_string);
    if let Some(id) = owned(properties.message_id()) {
        header.message_id = Some(id);
    }
    if let Some(id) = owned(properties.correlation_id()) {
        header.correlation_id = Some(id);
    }
    for (key, value, default) in [
        (
            "content_type",
            properties.content_type(),
            DEFAULT_CONTENT_TYPE,
        ),
        (
            "content_encoding",
            properties.content_encoding(),
            DEFAULT_CONTENT_ENCODING,
        ),
    ] {
        if let Some(value) = value.as_ref().filter(|value| value.as_str() != default) {
            header.properties.insert(key.to_owned(), value.to_string());
        }
    }
    let inner = header.reply_to.take().map(|reply_to| reply_to.address);
    let address = owned(properties.reply_to()).filter(|address| !address.is_empty());
    header.reply_to = address.or(inner).map(|address| ReplyTo {
        address,
        correlation_id: header.correlation_id.clone(),
        form: match (ours, enveloped) {
            (true, _) => Dialect::Envelope,
            (false, true) => Dialect::CommlibPy,
            (false, false) => Dialect::CommlibPy011,
        },
    });
    if let Some(table) = properties.headers() {
        for (key, value) in table {
            take(header, key.as_str(), value)?;
        }
    }
    Ok(message)
}

/// One field of the headers table.
fn take(header: &mut Header, key: &str, value: &AMQPValue) -> Result<()> {
    let wrong = |why: &dyn Display| {
        Error::new(ErrorKind::Decode, "message header")
            .at(key)
            .because(why)
    };
    let string = || as_text(value).ok_or_else(|| wrong(&"it is not a text"));
    let count = || as_count(value).ok_or_else(|| wrong(&"it is not a count"));
    match key {
        SENDER => header.sender = Some(string()?.into()),
        SEQ => header.seq = Some(count()?),
        TIMEOUT => header.timeout_ms = Some(count()?),
        ERROR => header.error = Some(parse(&string()?).map_err(|e| wrong(&e))?),
        HOPS => {
            let AMQPValue::FieldArray(hops) = value else {
                return Err(wrong(&"it is not a list"));
            };
            let hops: Option<Vec<_>> = hops.as_slice().iter().map(as_text).collect();
            header.hops = hops.ok_or_else(|| wrong(&"it is not a list of texts"))?;
        }
        EXTRA => header
            .extra
            .extend(parse::<BTreeMap<String, Value>>(&string()?).map_err(|e| wrong(&e))?),
        PROPERTIES => {
            let all: BTreeMap<String, String> = parse(&string()?).map_err(|e| wrong(&e))?;
            header.properties.extend(all);
        }
        // The broker's own account of dead letters.
        _ if key == "x-death"
            || key.starts_with("x-first-death-")
            || key.starts_with("x-last-death-") => {}
        _ => match as_text(value) {
            Some(text) => drop(header.properties.insert(key.to_owned(), text)),
            None => drop(header.extra.insert(key.to_owned(), as_json(value))),
        },
    }
    Ok(())
}

fn put(table: &mut FieldTable, key: &str, value: AMQPValue) {
    table.insert(key.into(), value);
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

fn encoded<T: Serialize + ?Sized>(value: &T) -> Result<AMQPValue> {
    Ok(AMQPValue::LongString(LongString::from(
        commlib_core::encode(value)?.to_vec(),
    )))
}

fn parse<T: DeserializeOwned>(text: &str) -> Result<T> {
    commlib_core::decode(text.as_bytes())
}

/// AMQP's tables have signed numbers only.
fn number(number: u64) -> AMQPValue {
    AMQPValue::LongLongInt(i64::try_from(number).unwrap_or(i64::MAX))
}

fn short(field: &'static str, text: &str) -> Result<ShortString> {
    ShortString::try_new(text).map_err(|e| {
        Error::new(ErrorKind::Encode, "message header")
            .at(field)
            .because(e)
    })
}

fn as_text(value: &AMQPValue) -> Option<String> {
    match value {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok().map(str::to_owned),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        _ => None,
    }
}

fn as_count(value: &AMQPValue) -> Option<u64> {
    as_integer(value).and_then(|number| u64::try_from(number).ok())
}

fn as_integer(value: &AMQPValue) -> Option<i64> {
    Some(match value {
        AMQPValue::ShortShortInt(n) => (*n).into(),
        AMQPValue::ShortShortUInt(n) => (*n).into(),
        AMQPValue::ShortInt(n) => (*n).into(),
        AMQPValue::ShortUInt(n) => (*n).into(),
        AMQPValue::LongInt(n) => (*n).into(),
        AMQPValue::LongUInt(n) => (*n).into(),
        AMQPValue::LongLongInt(n) => *n,
        _ => return None,
    })
}

/// The nearest that JSON has.
fn as_json(value: &AMQPValue) -> Value {
    match value {
        AMQPValue::Boolean(b) => Value::from(*b),
        AMQPValue::Float(f) => Value::from(*f),
        AMQPValue::Double(f) => Value::from(*f),
        AMQPValue::Timestamp(t) => Value::from(*t),
        AMQPValue::DecimalValue(d) => Value::from(f64::from(d.value) / 10_f64.powi(d.scale.into())),
        AMQPValue::LongString(text) => Value::from(text.to_string()),
        AMQPValue::ByteArray(bytes) => Value::from(bytes.as_slice().to_vec()),
        AMQPValue::FieldArray(all) => all.as_slice().iter().map(as_json).collect(),
        AMQPValue::FieldTable(all) => all
            .into_iter()
            .map(|(key, value)| {
                (
                    key.to_string(),
                    as_text(value).map_or_else(|| as_json(value), Value::from),
                )
            })
            .collect(),
        other => as_integer(other).map_or(Value::Null, Value::from),
    }
}

/// Nanoseconds since 1970 from a timestamp of any unit: AMQP has seconds, commlib-py milliseconds or nanoseconds.
///
/// The unit shows in the magnitude: 10 digits are seconds, 13 milliseconds, 16 microseconds, 19 nanoseconds.
fn nanoseconds(timestamp: u64) -> Option<u64> {
    let scale = match timestamp {
        0 => return None,
        1..100_000_000_000 => 1_000_000_000,
        100_000_000_000..100_000_000_000_000 => 1_000_000,
        100_000_000_000_000..100_000_000_000_000_000 => 1_000,
        _ => 1,
    };
    timestamp.checked_mul(scale)
}

#[cfg(test)]
mod tests {
    use super::*;
    use commlib_core::{RpcError, json};

    fn message() -> Message {
        let mut message = Message::new(r#"{"a":1}"#);
        let header = &mut message.header;
        header.timestamp = Some(1_795_217_169_713_525_957);
        header.correlation_id = Some("c".to_owned());
        header.sender = Some("me".into());
        header.message_id = Some("7".to_owned());
        header.seq = Some(3);
        header.timeout_ms = Some(1500);
        header.error = Some(RpcError::new("code", "text").with_data(json!([1])));
        header.hops = vec!["one".to_owned(), "two".to_owned()];
        for (key, value) in [
            ("traceparent", "00-x"),
            ("content_type", "text/json"),
            ("x-commlib-seq", "mine"),
            ("CC", "nobody"),
        ] {
            header.properties.insert(key.to_owned(), value.to_owned());
        }
        header
            .extra
            .insert("odd".to_owned(), json!({"deep": [null, 1.5, "x"]}));
        message
    }

    fn request(form: Dialect) -> Message {
        let mut message = message();
        message.header.reply_to = Some(ReplyTo {
            address: "amq.rabbitmq.reply-to".to_owned(),
            correlation_id: Some("c".to_owned()),
            form,
        });
        message
    }

    #[test]
    fn our_own_come_back_as_they_were() {
        for message in [message(), request(Dialect::Envelope), Message::new("1")] {
            let (properties, body) = encode(&message, Use::Rpc, Dialect::Envelope).unwrap();
            assert_eq!(body, message.data);
            assert_eq!(
                decode(&properties, body, Use::Rpc, Dialect::CommlibPy).unwrap(),
                message
            );
        }
    }

    #[test]
    fn free_keys_stand_in_the_table_as_they_are() {
        let (properties, _) = encode(&message(), Use::Topic, Dialect::Envelope).unwrap();
        let table = properties.headers().clone().unwrap();
        assert_eq!(table.inner().get("traceparent"), Some(&text("00-x")));
        assert_eq!(table.inner().get("x-commlib-seq"), Some(&number(3)));
        assert!(!table.inner().contains_key("CC"), "it would send copies");
        assert_eq!(properties.expiration(), &None, "no request");
    }

    #[test]
    fn bare_dialects_send_what_old_peers_know() {
        for (dialect, timestamp) in [
            (Dialect::CommlibPy, 1_795_217_169_713_525_957),
            (Dialect::CommlibPy011, 1_795_217_169_713),
        ] {
            let (properties, body) = encode(&message(), Use::Topic, dialect).unwrap();
            assert_eq!(&body[..], br#"{"a":1}"#);
            assert_eq!((properties.app_id(), properties.headers()), (&None, &None));
            assert_eq!(properties.timestamp(), &Some(timestamp));
        }
    }

    #[test]
    fn requests_of_old_peers_tell_their_form() {
        for (dialect, has_envelope) in [(Dialect::CommlibPy, true), (Dialect::CommlibPy011, false)]
        {
            let (properties, body) = encode(&request(dialect), Use::Rpc, dialect).unwrap();
            assert_eq!(body.starts_with(b"{\"header\":"), has_envelope);
            assert_eq!(properties.expiration().as_ref().unwrap().as_str(), "1500");
            let read = decode(&properties, body, Use::Rpc, Dialect::Envelope).unwrap();
            assert_eq!(&read.data[..], br#"{"a":1}"#);
            assert_eq!(read.header.reply_to, request(dialect).header.reply_to);
            assert_eq!(read.header.timeout_ms, Some(1500));
            assert_eq!(read.header.error, message().header.error);
        }
    }

    #[test]
    fn timestamps_of_any_unit() {
        for (timestamp, expected) in [
            (1_795_217_169, Some(1_795_217_169_000_000_000)),
            (1_795_217_169_713, Some(1_795_217_169_713_000_000)),
            (1_795_217_169_713_525, Some(1_795_217_169_713_525_000)),
            (1_795_217_169_713_525_957, Some(1_795_217_169_713_525_957)),
            (0, None),
        ] {
            assert_eq!(nanoseconds(timestamp), expected);
        }
    }

    #[test]
    fn headers_of_other_programs_are_kept() {
        let mut table = FieldTable::default();
        put(&mut table, "name", text("x"));
        put(&mut table, "count", AMQPValue::LongInt(-3));
        put(
            &mut table,
            "x-death",
            AMQPValue::FieldArray(FieldArray::default()),
        );
        let properties = BasicProperties::default().with_headers(table);
        let read = decode(
            &properties,
            Bytes::from_static(b"[]"),
            Use::Topic,
            Dialect::Envelope,
        );
        let header = read.unwrap().header;
        assert_eq!(header.property("name"), Some("x"));
        assert_eq!(header.extra.get("count"), Some(&json!(-3)));
        assert_eq!(header.extra.len(), 1);
    }

    #[test]
    fn what_is_not_what_it_should_be_is_an_error() {
        let bad = |key: &str, value| {
            let mut table = FieldTable::default();
            put(&mut table, key, value);
            let properties = BasicProperties::default().with_headers(table);
            decode(
                &properties,
                Bytes::from_static(b"1"),
                Use::Topic,
                Dialect::Envelope,
            )
        };
        for (key, value) in [
            (SEQ, text("3")),
            (SEQ, AMQPValue::LongInt(-3)),
            (SENDER, number(3)),
            (HOPS, text("[]")),
            (
                HOPS,
                AMQPValue::FieldArray(FieldArray::from(vec![number(1)])),
            ),
            (ERROR, text("{}")),
            (EXTRA, text("[]")),
        ] {
            assert_eq!(
                bad(key, value).unwrap_err().kind(),
                ErrorKind::Decode,
                "{key}"
            );
        }
        let properties = BasicProperties::default();
        let garbage = decode(
            &properties,
            Bytes::from_static(b"{"),
            Use::Topic,
            Dialect::Envelope,
        );
        assert_eq!(garbage.unwrap_err().kind(), ErrorKind::Decode);
        let mut long = message();
        long.header.message_id = Some("x".repeat(256));
        let error = encode(&long, Use::Topic, Dialect::Envelope).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Encode);
    }
}
