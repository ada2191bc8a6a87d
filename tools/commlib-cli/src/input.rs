//! JSON text from the command line and from stdin, passed on as it was written.

use std::fmt;

use commlib::RawValue;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Stdin};

use crate::failure::Failure;

/// The longest line that is read. No broker takes as much; without a limit a file without line ends fills the memory.
const MAX_LINE: u64 = 16 << 20;

/// JSON text, checked and otherwise untouched.
pub(crate) fn json(text: &str) -> Result<Box<RawValue>, NotJson> {
    from_slice(text.as_bytes())
}

/// As [`json`], from bytes that may not even be text.
pub(crate) fn from_slice(text: &[u8]) -> Result<Box<RawValue>, NotJson> {
    serde_json::from_slice(text).map_err(|e| NotJson(e.to_string()))
}

/// Why a text is not JSON.
#[derive(Debug)]
pub(crate) struct NotJson(String);

impl fmt::Display for NotJson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A text of one line needs no line number.
        let reason = self.0.replace(" at line 1 column ", " at column ");
        write!(f, "not JSON: {reason}")
    }
}

impl std::error::Error for NotJson {}

/// The lines of stdin that are not empty, with their numbers.
#[derive(Debug)]
pub(crate) struct Lines {
    stdin: BufReader<Stdin>,
    line: Vec<u8>,
    number: u64,
}

impl Lines {
    pub(crate) fn new() -> Self {
        Self {
            stdin: BufReader::with_capacity(64 * 1024, tokio::io::stdin()),
            line: Vec::new(),
            number: 0,
        }
    }

    /// The next line that is not empty; `None` at the end of the input.
    pub(crate) async fn next(&mut self) -> Result<Option<(u64, &[u8])>, Failure> {
        loop {
            self.line.clear();
            self.number += 1;
            let number = self.number;
            let read = (&mut self.stdin)
                .take(MAX_LINE)
                .read_until(b'\n', &mut self.line)
                .await
                .map_err(|e| Failure::because("stdin", &e))?;
            if read == 0 {
                return Ok(None);
            }
            if read as u64 == MAX_LINE && !self.line.ends_with(b"\n") {
                return Err(Failure::failed(format_args!(
                    "line {number}: longer than 16 MiB"
                )));
            }
            if !self.line.trim_ascii().is_empty() {
                break;
            }
        }
        Ok(Some((self.number, self.line.trim_ascii())))
    }
}
