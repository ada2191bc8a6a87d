//! JSON: the only file that names a JSON crate.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use serde_json::value::RawValue;
pub use serde_json::{Value, json};

use crate::error::{Error, ErrorKind, Result};

/// Encodes a value as JSON text.
///
/// # Errors
/// [`ErrorKind::Encode`] if the value has no JSON form, such as a map whose keys are not strings.
pub fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Bytes> {
    let mut out = Vec::with_capacity(128);
    write(&mut out, value)?;
    Ok(out.into())
}

/// Appends a value as JSON text to `out`.
pub(crate) fn write<T: Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) -> Result<()> {
    serde_json::to_writer(out, value)
        .map_err(|e| Error::new(ErrorKind::Encode, "encode message").because(e))
}

/// Decodes JSON text in one pass into the wanted type.
///
/// # Errors
/// [`ErrorKind::Decode`] with the line and column if the text is not JSON or not a `T`.
pub fn decode<T: DeserializeOwned>(text: &[u8]) -> Result<T> {
    decode_borrowed(text)
}

/// As [`decode`], for types that borrow from the text.
pub(crate) fn decode_borrowed<'a, T: serde::Deserialize<'a>>(text: &'a [u8]) -> Result<T> {
    serde_json::from_slice(text)
        .map_err(|e| Error::new(ErrorKind::Decode, "decode message").because(e))
}

/// The innermost sentence of a decoding error, without "decode message:".
pub(crate) fn reason(error: &Error) -> String {
    let text = error.to_string();
    text.strip_prefix("decode message: ")
        .map_or(text.clone(), str::to_owned)
}
