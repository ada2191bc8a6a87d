//! What happens to a payload that arrives.

use bytes::Bytes;
use commlib_core::envelope::{self, Use};
use commlib_core::{Dialect, Error, ErrorKind, Message, Name, Result};

/// How much longer than its data a payload may be.
const HEADER_ROOM: usize = 64 << 10;

/// Reads a payload.
///
/// # Errors
/// [`ErrorKind::TooLarge`] beyond `max` bytes of data, [`ErrorKind::Decode`] if it is not JSON or a broken envelope.
pub(crate) fn decode(
    name: &Name,
    payload: &Bytes,
    usage: Use,
    dialect: Dialect,
    max: usize,
) -> Result<Message> {
    let too_large = |size: usize| {
        Error::new(ErrorKind::TooLarge, "message on")
            .at(name)
            .because(format_args!("{size} bytes, and `max_payload` is {max}"))
    };
    if payload.len() > max.saturating_add(HEADER_ROOM) {
        return Err(too_large(payload.len()));
    }
    let message = envelope::decode(payload, usage, dialect)?;
    if message.data.len() > max {
        return Err(too_large(message.data.len()));
    }
    Ok(message)
}
