//! `{"header":…,"data":…}`: how messages are written where the broker itself carries no header.
//!
//! Encoding splices: the header is written by hand and the already encoded data is copied behind it.
//! Decoding slices: the header is parsed and the data stays a slice of the packet it came in.

use std::fmt;

use bytes::Bytes;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::codec::{self, RawValue, reason};
use crate::error::{Error, ErrorKind, Result};
use crate::header::{looks_like_header, parse_header};
use crate::message::{Dialect, Header, Message};

/// What a payload is for: the dialects differ in which of them carry an envelope.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// A message on a topic.
    Topic,
    /// A request or a reply.
    Rpc,
}

/// Writes a message as the payload of a broker without headers.
///
/// In the bare dialects a message on a topic is its data alone. `data` comes last, so that a reader can find
/// the end of the header without scanning the rest.
///
/// # Errors
/// [`ErrorKind::Encode`] if an extra header field has no JSON form.
pub fn encode(message: &Message, usage: Use, dialect: Dialect) -> Result<Bytes> {
    if usage == Use::Topic && dialect.is_bare() {
        return Ok(message.data.clone());
    }
    let mut out = Vec::with_capacity(message.data.len() + 320);
    out.extend_from_slice(b"{\"header\":{");
    let mut fields = Fields {
        out: &mut out,
        first: true,
    };
    match dialect {
        Dialect::Envelope => envelope_header(&mut fields, &message.header, usage)?,
        Dialect::CommlibPy => {
            py_reply_to(&mut fields, &message.header)?;
            fields.write("correlation_id", &message.header.correlation_id)?;
            fields.write("timestamp", &message.header.timestamp.unwrap_or(0))?;
            py_constants(&mut fields)?;
            extensions(&mut fields, &message.header)?;
        }
        Dialect::CommlibPy011 => {
            py_reply_to(&mut fields, &message.header)?;
            let ms = message.header.timestamp.unwrap_or(0) / 1_000_000;
            fields.write("timestamp", &ms)?;
            py_constants(&mut fields)?;
            extensions(&mut fields, &message.header)?;
        }
    }
    out.extend_from_slice(b"},\"data\":");
    out.extend_from_slice(&message.data);
    out.push(b'}');
    Ok(out.into())
}

fn envelope_header(fields: &mut Fields<'_>, header: &Header, usage: Use) -> Result<()> {
    if let Some(reply_to) = &header.reply_to {
        fields.write("reply_to", &reply_to.address)?;
    }
    fields.some("correlation_id", &header.correlation_id)?;
    fields.write("timestamp", &header.timestamp.unwrap_or(0))?;
    if usage == Use::Rpc {
        // commlib-py reads these three; our own readers skip them.
        py_constants(fields)?;
    }
    fields.some("sender", &header.sender.as_deref())?;
    fields.some("message_id", &header.message_id)?;
    fields.some("seq", &header.seq)?;
    extensions(fields, header)?;
    fields.key("properties")?;
    fields.out.push(b'{');
    let mut properties = Fields {
        out: fields.out,
        first: true,
    };
    properties.write("content_type", header.content_type())?;
    properties.write("content_encoding", header.content_encoding())?;
    for (key, value) in &header.properties {
        if !matches!(key.as_str(), "content_type" | "content_encoding") {
            properties.write(key, value)?;
        }
    }
    fields.out.push(b'}');
    Ok(())
}

/// An old client matches a reply by its address alone and wants the field empty.
fn py_reply_to(fields: &mut Fields<'_>, header: &Header) -> Result<()> {
    let address = header.reply_to.as_ref().map_or("", |r| r.address.as_str());
    fields.write("reply_to", address)
}

fn py_constants(fields: &mut Fields<'_>) -> Result<()> {
    fields.write("content_type", "json")?;
    fields.write("encoding", "utf8")?;
    fields.write("agent", "commlib")
}

/// What we add in every form: old peers ignore it, ours (and bridges) need it.
fn extensions(fields: &mut Fields<'_>, header: &Header) -> Result<()> {
    fields.some("timeout_ms", &header.timeout_ms)?;
    fields.some("error", &header.error)?;
    if !header.hops.is_empty() {
        fields.write("hops", &header.hops)?;
    }
    for (key, value) in &header.extra {
        fields.write(key, value)?;
    }
    Ok(())
}

/// Writes the members of a JSON object.
struct Fields<'a> {
    out: &'a mut Vec<u8>,
    first: bool,
}

impl Fields<'_> {
    fn key(&mut self, key: &str) -> Result<()> {
        if !std::mem::take(&mut self.first) {
            self.out.push(b',');
        }
        codec::write(self.out, key)?;
        self.out.push(b':');
        Ok(())
    }

    fn write<T: serde::Serialize + ?Sized>(&mut self, key: &str, value: &T) -> Result<()> {
        self.key(key)?;
        codec::write(self.out, value)
    }

    fn some<T: serde::Serialize>(&mut self, key: &str, value: &Option<T>) -> Result<()> {
        value
            .as_ref()
            .map_or(Ok(()), |value| self.write(key, value))
    }
}

/// Reads a payload of a broker without headers.
///
/// It is an envelope only if its keys are exactly `header` and `data` and the header has a `timestamp` (a number
/// or digits in a string) or a string `reply_to`; robot messages often have a `header` and a `data` of their own.
/// Anything else is bare data with an empty header. On a connection set to a bare dialect, messages on topics that
/// lack our `message_id` are bare as well.
///
/// # Errors
/// [`ErrorKind::Decode`] if the payload is not JSON, or is an envelope with a header field of the wrong type.
pub fn decode(payload: &Bytes, usage: Use, dialect: Dialect) -> Result<Message> {
    if let Some((header, data)) = ours(payload) {
        return Ok(Message { header, data });
    }
    let bare = || Message {
        header: Header::default(),
        data: payload.clone(),
    };
    // Read to its end whatever it is: what is not JSON must not pass as bare data.
    let json: &RawValue = codec::decode_borrowed(payload)
        .map_err(|e| Error::new(ErrorKind::Decode, "payload").because(reason(&e)))?;
    let Ok(parts) = codec::decode_borrowed::<Parts<'_>>(json.get().as_bytes()) else {
        return Ok(bare());
    };
    let (Some(header), Some(data)) = (parts.header, parts.data) else {
        return Ok(bare());
    };
    if parts.foreign || !looks_like_header(header) {
        return Ok(bare());
    }
    let header = parse_header(header.get())?;
    if usage == Use::Topic && dialect.is_bare() && header.message_id.is_none() {
        return Ok(bare());
    }
    Ok(Message {
        header,
        data: payload.slice_ref(data.get().as_bytes()),
    })
}

/// The fast path for what we wrote ourselves: find the end of the header, leave the data unread.
///
/// Nothing is checked behind the header, so only a header with our own marks (`sender` and `message_id`) is
/// taken this way; whoever forges those gets a decoding error at the endpoint.
fn ours(payload: &Bytes) -> Option<(Header, Bytes)> {
    const MIDDLE: &[u8] = b",\"data\":";
    let (header, rest) = leading_header(payload)?;
    let data = rest.strip_prefix(MIDDLE)?.strip_suffix(b"}")?;
    (header.sender.is_some() && header.message_id.is_some())
        .then(|| (header, payload.slice_ref(data)))
}

/// Reads the header at the start of a payload, whatever stands behind it.
///
/// For payloads that [`decode`] refuses or that are too large to be used: the header tells whose they are.
pub fn peek(payload: &[u8]) -> Option<Header> {
    leading_header(payload).map(|(header, _)| header)
}

fn leading_header(payload: &[u8]) -> Option<(Header, &[u8])> {
    let rest = payload.strip_prefix(b"{\"header\":")?;
    let (header, rest) = rest.split_at_checked(object_end(rest)?)?;
    let header = parse_header(std::str::from_utf8(header).ok()?).ok()?;
    Some((header, rest))
}

/// How long the JSON object at the start of `text` is. Only braces and strings are looked at.
fn object_end(text: &[u8]) -> Option<usize> {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for (index, &byte) in text.iter().enumerate() {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' => depth += 1,
            b'}' => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some(index + 1);
                }
            }
            _ if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

/// The two members of an envelope, if there are no others.
#[derive(Default)]
struct Parts<'a> {
    header: Option<&'a RawValue>,
    data: Option<&'a RawValue>,
    foreign: bool,
}

impl<'de> Deserialize<'de> for Parts<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(PartsVisitor)
    }
}

struct PartsVisitor;

impl<'de> Visitor<'de> for PartsVisitor {
    type Value = Parts<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Parts<'de>, A::Error> {
        let mut parts = Parts::default();
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            let slot = match &*key {
                "header" => &mut parts.header,
                "data" => &mut parts.data,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    parts.foreign = true;
                    continue;
                }
            };
            parts.foreign |= slot.is_some();
            *slot = Some(map.next_value()?);
        }
        Ok(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Value;
    use crate::message::RpcError;
    use proptest::prelude::*;

    fn payload(text: &str) -> Bytes {
        Bytes::copy_from_slice(text.as_bytes())
    }

    fn topic(text: &str) -> Result<Message> {
        decode(&payload(text), Use::Topic, Dialect::Envelope)
    }

    fn ours_with(data: &str) -> Message {
        let mut message = Message::new(payload(data));
        message.header.sender = Some("s1".into());
        message.header.message_id = Some("7".into());
        message.header.seq = Some(7);
        message
    }

    #[test]
    fn envelope_comes_back_whole_and_data_is_a_slice_of_the_packet() {
        let mut message = ours_with(r#"{"text":"}caf\u00e9\"","n":[1,{"a":2}]}"#);
        message.header.timeout_ms = Some(5);
        message.header.hops = vec!["b1".into()];
        message.header.error = Some(RpcError::new("x", "y").with_data(codec::json!([1])));
        message.header.correlation_id = Some("c\"}1".into());
        message
            .header
            .properties
            .insert("traceparent".into(), "00-1".into());
        message
            .header
            .extra
            .insert("odd \" key".into(), codec::json!({"k": "}"}));
        let bytes = encode(&message, Use::Topic, Dialect::Envelope).unwrap();
        let back = decode(&bytes, Use::Topic, Dialect::Envelope).unwrap();
        assert_eq!(back, message);
        assert!(bytes.as_ptr_range().contains(&back.data.as_ptr()));
    }

    #[test]
    fn header_carries_what_the_ancestor_documents() {
        let bytes = encode(&Message::new(payload("{}")), Use::Topic, Dialect::Envelope).unwrap();
        let value: Value = codec::decode(&bytes).unwrap();
        assert_eq!(
            value["header"]["properties"]["content_type"],
            "application/json"
        );
        assert_eq!(value["header"]["properties"]["content_encoding"], "utf8");
        assert!(value["header"]["timestamp"].is_u64());
        assert_eq!(value["data"], codec::json!({}));
    }

    #[test]
    fn messages_with_their_own_header_and_data_are_bare() {
        for text in [
            r#"{"header":{"frame_id":"map","stamp":{"sec":1}},"data":[1,2]}"#,
            r#"{"header":{"timestamp":1.5},"data":1}"#,
            r#"{"header":{"timestamp":"noon"},"data":1}"#,
            r#"{"header":{"timestamp":1},"data":1,"more":2}"#,
            r#"{"header":{"timestamp":1}}"#,
            r#"{"header":5,"data":{}}"#,
            r#"{"data":{}}"#,
            "5",
            "[1]",
            r#""text""#,
            "null",
            " {} ",
        ] {
            let message = topic(text).expect(text);
            assert_eq!(message.data, payload(text));
            assert_eq!(message.header, Header::default(), "{text}");
        }
    }

    #[test]
    fn key_order_and_space_do_not_matter() {
        let message =
            topic("{ \"data\" : {\"a\": 1} , \"header\" : {\"timestamp\":\"1795217089519\"} }")
                .unwrap();
        assert_eq!(&message.data[..], br#"{"a": 1}"#);
        assert_eq!(message.header.timestamp, Some(1_795_217_089_519_000_000));
    }

    #[test]
    fn timestamps_of_every_unit() {
        for (text, ns) in [
            ("1795217089", Some(1_795_217_089_000_000_000)),
            ("1795217089519", Some(1_795_217_089_519_000_000)),
            ("1795217089519662", Some(1_795_217_089_519_662_000)),
            ("1795217089519662058", Some(1_795_217_089_519_662_058)),
            ("\"-1\"", None),
            ("-1", None),
        ] {
            let text = format!(r#"{{"header":{{"timestamp":{text}}},"data":1}}"#);
            assert_eq!(topic(&text).unwrap().header.timestamp, ns, "{text}");
        }
    }

    #[test]
    fn wrong_types_and_broken_json_are_decode_errors() {
        for text in [
            "",
            "{",
            "not json",
            "{} trailing",
            r#"{"header":{"timestamp":1,"sender":5},"data":1}"#,
            r#"{"header":{"timestamp":1,"seq":-1},"data":1}"#,
            r#"{"header":{"timestamp":1,"error":"no"},"data":1}"#,
            r#"{"header":{"timestamp":1,"hops":"no"},"data":1}"#,
            r#"{"header":{"timestamp":true,"reply_to":"x"},"data":1}"#,
            r#"{"header":{"timestamp":1,"properties":7},"data":1}"#,
            "{\"header\":{\"timestamp\":1},\"data\":\"\u{1}\"}",
        ] {
            assert_eq!(
                topic(text).expect_err(text).kind(),
                ErrorKind::Decode,
                "{text}"
            );
        }
    }

    #[test]
    fn bare_dialects_take_only_our_own_envelopes_on_topics() {
        let foreign = payload(r#"{"header":{"timestamp":1},"data":1}"#);
        for dialect in [Dialect::CommlibPy, Dialect::CommlibPy011] {
            assert_eq!(decode(&foreign, Use::Topic, dialect).unwrap().data, foreign);
            assert_eq!(&decode(&foreign, Use::Rpc, dialect).unwrap().data[..], b"1");
            let own = encode(&ours_with("2"), Use::Topic, Dialect::Envelope).unwrap();
            assert_eq!(&decode(&own, Use::Topic, dialect).unwrap().data[..], b"2");
        }
    }

    proptest! {
        #[test]
        fn decoding_never_panics(text in "\\PC{0,60}|[{}\":,a-e0-9\\\\]{0,60}", dialect in 0..3_usize) {
            for usage in [Use::Topic, Use::Rpc] {
                let _ = decode(&payload(&text), usage, Dialect::ALL[dialect]);
            }
            let framed = format!("{{\"header\":{text},\"data\":{text}}}");
            let _ = decode(&payload(&framed), Use::Rpc, Dialect::Envelope);
        }

        #[test]
        fn any_header_text_survives(key in "\\PC{1,12}", value in "\\PC{0,30}", data in "\\PC{0,30}") {
            let mut message = ours_with(&codec::json!({ "d": data }).to_string());
            message.header.properties.insert(format!("x-{key}"), value.clone());
            message.header.extra.insert(format!("y-{key}"), value.into());
            let bytes = encode(&message, Use::Rpc, Dialect::Envelope).unwrap();
            prop_assert_eq!(decode(&bytes, Use::Rpc, Dialect::Envelope).unwrap(), message);
        }
    }

    #[test]
    fn our_own_clock_may_stand_near_1970() {
        let mut message = ours_with("1");
        message.header.timestamp = Some(100_000_000_000);
        let bytes = encode(&message, Use::Topic, Dialect::Envelope).unwrap();
        let back = decode(&bytes, Use::Topic, Dialect::Envelope).unwrap();
        assert_eq!(back.header.timestamp, message.header.timestamp);
    }

    #[test]
    fn a_timestamp_beyond_all_time_is_unknown() {
        let text = format!(
            r#"{{"header":{{"timestamp":"{}"}},"data":1}}"#,
            "9".repeat(60)
        );
        assert_eq!(topic(&text).unwrap().header.timestamp, None);
    }
}
