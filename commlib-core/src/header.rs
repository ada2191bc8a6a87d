//! Reads the header of an envelope, in all the forms that peers write.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;

use crate::codec::{self, RawValue, Value, reason};
use crate::error::{Error, ErrorKind, Result};
use crate::message::{
    DEFAULT_CONTENT_ENCODING, DEFAULT_CONTENT_TYPE, Dialect, Header, ReplyTo, RpcError,
};

/// The two fields by which a header is recognised, whatever else it holds.
pub(crate) fn looks_like_header(raw: &RawValue) -> bool {
    #[derive(Deserialize)]
    struct Marks {
        #[serde(default)]
        timestamp: Value,
        #[serde(default)]
        reply_to: Value,
    }
    codec::decode_borrowed::<Marks>(raw.get().as_bytes()).is_ok_and(|marks| {
        marks.reply_to.is_string()
            || match &marks.timestamp {
                Value::Number(number) => !number.is_f64(),
                Value::String(text) => digits(text),
                _ => false,
            }
    })
}

fn digits(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
}

/// Reads the text of a header object.
pub(crate) fn parse_header(text: &str) -> Result<Header> {
    let wrong =
        |why: &dyn fmt::Display| Error::new(ErrorKind::Decode, "envelope header").because(why);
    let fields: BTreeMap<std::borrow::Cow<'_, str>, &RawValue> =
        codec::decode_borrowed(text.as_bytes()).map_err(|e| wrong(&reason(&e)))?;
    let mut header = Header::default();
    let mut timestamp = None;
    let mut reply_address = None;
    let mut has_correlation_id = false;
    for (key, raw) in fields {
        let field = |what: &str| wrong(&format_args!("`{key}` is not {what}"));
        let null = raw.get() == "null";
        match &*key {
            "timestamp" => timestamp = parse_timestamp(raw).map_err(|()| field("a number"))?,
            "reply_to" => reply_address = text_or_null(raw).map_err(|()| field("a string"))?,
            "correlation_id" => {
                has_correlation_id = true;
                header.correlation_id = text_or_null(raw).map_err(|()| field("a string"))?;
            }
            "sender" => {
                header.sender = text_or_null(raw)
                    .map_err(|()| field("a string"))?
                    .map(Into::into);
            }
            "message_id" => {
                header.message_id = text_or_null(raw).map_err(|()| field("a string"))?
            }
            "seq" if !null => header.seq = Some(parse(raw).map_err(|()| field("a count"))?),
            "timeout_ms" if !null => {
                header.timeout_ms =
                    Some(parse(raw).map_err(|()| field("a number of milliseconds"))?);
            }
            "error" if !null => {
                header.error =
                    Some(parse::<RpcError>(raw).map_err(|()| field("an error with a code"))?);
            }
            "hops" if !null => header.hops = parse(raw).map_err(|()| field("a list of strings"))?,
            "properties" if !null => {
                let all: BTreeMap<String, Value> = parse(raw).map_err(|()| field("an object"))?;
                header.properties = all.into_iter().filter_map(property).collect();
            }
            // Constants that commlib-py writes and nobody reads.
            "content_type" | "encoding" | "agent" => {}
            "seq" | "timeout_ms" | "error" | "hops" | "properties" => {}
            _ => {
                let value = parse(raw).map_err(|()| field("JSON"))?;
                header.extra.insert(key.into_owned(), value);
            }
        }
    }
    let form = if header.sender.is_some() && header.message_id.is_some() {
        Dialect::Envelope
    } else if has_correlation_id {
        Dialect::CommlibPy
    } else {
        Dialect::CommlibPy011
    };
    // Ours are always nanoseconds, also where a clock without a battery stands near 1970.
    header.timestamp = match form {
        Dialect::Envelope => timestamp,
        _ => timestamp.and_then(nanoseconds),
    };
    // An empty address is how commlib-py writes "none".
    header.reply_to = reply_address
        .filter(|address| !address.is_empty())
        .map(|address| ReplyTo {
            address,
            correlation_id: header.correlation_id.clone(),
            form,
        });
    Ok(header)
}

fn parse<'a, T: Deserialize<'a>>(raw: &'a RawValue) -> Result<T, ()> {
    codec::decode_borrowed(raw.get().as_bytes()).map_err(drop)
}

fn text_or_null(raw: &RawValue) -> Result<Option<String>, ()> {
    parse(raw)
}

/// A property as text; defaults are left out, as [`Header::properties`] says.
fn property((key, value): (String, Value)) -> Option<(String, String)> {
    let text = match value {
        Value::String(text) => text,
        Value::Null => return None,
        other => other.to_string(),
    };
    let default = match key.as_str() {
        "content_type" => text == DEFAULT_CONTENT_TYPE,
        "content_encoding" => text == DEFAULT_CONTENT_ENCODING,
        _ => false,
    };
    (!default).then_some((key, text))
}

/// A number or digits. What is not positive or beyond all time stands for "unknown".
fn parse_timestamp(raw: &RawValue) -> Result<Option<u64>, ()> {
    let text = match parse(raw)? {
        Value::Null => return Ok(None),
        Value::String(text) if digits(&text) => text,
        Value::Number(number) if !number.is_f64() => number.to_string(),
        _ => return Err(()),
    };
    Ok(text.parse().ok().filter(|number| *number > 0))
}

/// Nanoseconds since 1970 from a timestamp in any unit that commlib-py ever used.
///
/// The unit shows in the magnitude: 13 digits are milliseconds, 16 microseconds, 19 nanoseconds.
fn nanoseconds(timestamp: u64) -> Option<u64> {
    timestamp.checked_mul(match timestamp {
        0..100_000_000_000 => 1_000_000_000,
        100_000_000_000..100_000_000_000_000 => 1_000_000,
        100_000_000_000_000..100_000_000_000_000_000 => 1_000,
        _ => 1,
    })
}
