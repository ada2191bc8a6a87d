//! Stdout: one JSON object per line, or indented where a person reads it.

use std::future::Future;
use std::io::{self, ErrorKind, IsTerminal};
use std::pin::pin;
use std::time::Duration;

use futures_util::FutureExt;
use serde::Serialize;
use tokio::io::{AsyncWriteExt, Stdout};
use tokio::time::timeout;

use crate::failure::Failure;

/// More than this many bytes are written without waiting for a pause in the input.
const FULL: usize = 64 * 1024;

/// How long a reader that does not read may keep us after a signal.
pub(crate) const LAST_FLUSH: Duration = Duration::from_secs(1);

/// Buffers lines until [`flush`](Self::flush). Call that before every wait: readers want to see each line at once.
#[derive(Debug)]
pub(crate) struct Output {
    stdout: Stdout,
    buffer: Vec<u8>,
    /// How much of the buffer stdout has taken already.
    written: usize,
    for_people: bool,
}

impl Output {
    pub(crate) fn new() -> Self {
        Self {
            stdout: tokio::io::stdout(),
            buffer: Vec::new(),
            written: 0,
            for_people: io::stdout().is_terminal(),
        }
    }

    /// Adds a value on a line of its own.
    pub(crate) fn line(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let start = self.buffer.len();
        serde_json::to_writer(&mut self.buffer, value)
            .map_err(|e| Failure::because("encode output", &e))?;
        if self.for_people {
            let text = self.buffer.split_off(start);
            indent(&text, &mut self.buffer);
        } else {
            // Data is passed on as it was written, and that may be over several lines. Line ends within JSON are
            // always white space: strings hold them escaped.
            for byte in self.buffer.iter_mut().skip(start) {
                if matches!(byte, b'\n' | b'\r') {
                    *byte = b' ';
                }
            }
        }
        self.buffer.push(b'\n');
        Ok(())
    }

    /// Whether so much waits that it should be flushed even when more follows at once.
    pub(crate) fn is_full(&self) -> bool {
        self.buffer.len() >= FULL
    }

    /// Writes what waits. When this returns, the reader has it. Cancel safe: nothing is written twice.
    ///
    /// # Errors
    /// [`Failure::OutputClosed`] if there is no reader any more.
    pub(crate) async fn flush(&mut self) -> Result<(), Failure> {
        self.write().await.map_err(|e| match e.kind() {
            ErrorKind::BrokenPipe => Failure::OutputClosed,
            _ => Failure::because("stdout", &e),
        })
    }

    /// The last flush after a signal: a reader that does not read must not keep us for ever. False if it did not read.
    pub(crate) async fn last_flush(&mut self) -> Result<bool, Failure> {
        match timeout(LAST_FLUSH, self.flush()).await {
            Ok(flushed) => flushed.map(|()| true),
            Err(_) => Ok(false),
        }
    }

    async fn write(&mut self) -> io::Result<()> {
        while let Some(rest) = self.buffer.get(self.written..).filter(|r| !r.is_empty()) {
            self.written += self.stdout.write(rest).await?;
        }
        self.buffer.clear();
        self.written = 0;
        self.stdout.flush().await
    }

    /// Waits for `next`, and flushes before if it is not there already.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    pub(crate) async fn flush_before<T>(
        &mut self,
        next: impl Future<Output = T>,
    ) -> Result<T, Failure> {
        let mut next = pin!(next);
        if let Some(output) = next.as_mut().now_or_never() {
            return Ok(output);
        }
        self.flush().await?;
        Ok(next.await)
    }
}

/// Indents JSON text. Works on the text, so that numbers and the order of keys stay as they were written.
fn indent(json: &[u8], out: &mut Vec<u8>) {
    let new_line = |out: &mut Vec<u8>, depth: usize| {
        out.push(b'\n');
        out.resize(out.len() + 2 * depth, b' ');
    };
    let (mut depth, mut in_string, mut escaped, mut opened) = (0_usize, false, false, false);
    for &byte in json {
        if in_string {
            out.push(byte);
            in_string = escaped || byte != b'"';
            escaped = !escaped && byte == b'\\';
            continue;
        }
        if byte.is_ascii_whitespace() {
            continue;
        }
        let closes = matches!(byte, b'}' | b']');
        if closes {
            depth = depth.saturating_sub(1);
        }
        // An empty object or array stays on its line.
        if opened != closes {
            new_line(out, depth);
        }
        opened = matches!(byte, b'{' | b'[');
        if opened {
            depth += 1;
        }
        in_string = byte == b'"';
        out.push(byte);
        match byte {
            b':' => out.push(b' '),
            b',' => new_line(out, depth),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indents_without_touching_values() {
        let json = br#"{"b":[1.50, 2],"a":{},"s":"{\"[,:\\","e":[]}"#;
        let mut out = Vec::new();
        indent(json, &mut out);
        let expected = r#"{
  "b": [
    1.50,
    2
  ],
  "a": {},
  "s": "{\"[,:\\",
  "e": []
}"#;
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn a_line_is_one_line() {
        let mut output = Output::new();
        output.for_people = false;
        let raw = commlib::RawValue::from_string("{\n\"a\":\r\n\"\\n\"}".to_owned()).unwrap();
        output.line(&raw).unwrap();
        assert_eq!(output.buffer, b"{ \"a\":  \"\\n\"}\n");
    }
}
