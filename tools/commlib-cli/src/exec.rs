//! Runs a shell command as the handler of a request.

use std::process::Stdio;

use commlib::{RawValue, RpcError};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStderr, Command};

use crate::input;

/// The code of the error reply when a command fails.
const EXEC_FAILED: &str = "exec_failed";

/// How much of stderr goes into an error reply.
const MAX_STDERR: u64 = 8 * 1024;

/// Runs `command` through `sh -c` with the request on its stdin; its stdout is the reply.
///
/// Cancelled, it kills the command with all that it started.
///
/// # Errors
/// If the command cannot run, fails, or prints what is not JSON or longer than `max_reply`.
pub(crate) async fn run(
    command: &str,
    request: &RawValue,
    max_reply: usize,
) -> Result<Box<RawValue>, RpcError> {
    let mut child = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // `sh` starts others: a group of its own makes them all reachable.
        .process_group(0)
        .spawn()?;
    let group = Group::of(&child);
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A command need not read its input.
            let _ = stdin.write_all(request.get().as_bytes()).await;
        }
        Ok(())
    };
    let reply = async {
        let mut reply = Vec::new();
        if let Some(stdout) = stdout {
            let limit = max_reply as u64 + 1;
            stdout.take(limit).read_to_end(&mut reply).await?;
        }
        if reply.len() > max_reply {
            let why = format_args!("the command printed more than {max_reply} bytes");
            return Err(RpcError::new(EXEC_FAILED, why));
        }
        Ok(reply)
    };
    // Ends with the first error; then the command is killed.
    let ((), stdout, stderr) = tokio::try_join!(feed, reply, beginning(stderr))?;
    let status = child.wait().await?;
    group.ended();
    if !status.success() {
        let stderr = String::from_utf8_lossy(&stderr);
        let text = match stderr.trim() {
            "" => status.to_string(),
            text => text.to_owned(),
        };
        return Err(RpcError::new(EXEC_FAILED, text));
    }
    input::from_slice(&stdout)
        .map_err(|e| RpcError::new(EXEC_FAILED, format_args!("what the command printed is {e}")))
}

/// The beginning of stderr. Reads to its end: a command must not hang on a full pipe.
async fn beginning(stderr: Option<ChildStderr>) -> Result<Vec<u8>, RpcError> {
    let mut kept = Vec::new();
    if let Some(mut stderr) = stderr {
        (&mut stderr)
            .take(MAX_STDERR)
            .read_to_end(&mut kept)
            .await?;
        tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await?;
    }
    Ok(kept)
}

/// A command and all that it started. Dropped before it has ended, it is killed.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Self {
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        Self(id.and_then(Pid::from_raw))
    }

    /// The id may belong to somebody else from now on.
    fn ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // Fails if all have ended by themselves.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    async fn exec(command: &str, request: &str) -> Result<String, RpcError> {
        let request = input::json(request).unwrap();
        run(command, &request, 1000)
            .await
            .map(|reply| reply.get().to_owned())
    }

    #[tokio::test]
    async fn stdout_is_the_reply() {
        assert_eq!(exec("cat", "{\"a\": 1}").await.unwrap(), "{\"a\": 1}");
        assert_eq!(exec("echo 1", "[]").await.unwrap(), "1");
    }

    #[tokio::test]
    async fn failures_say_why() {
        for (command, expected) in [
            ("echo no fuel >&2; exit 3", "no fuel"),
            ("exit 3", "exit status: 3"),
            ("kill -9 $$", "signal: 9"),
            ("echo oops", "not JSON"),
            ("true", "not JSON"),
            ("yes", "more than 1000 bytes"),
        ] {
            let error = exec(command, "{}").await.unwrap_err();
            assert_eq!(error.code, EXEC_FAILED);
            assert!(error.message.contains(expected), "{command}: {error}");
        }
    }

    #[tokio::test]
    async fn a_cancelled_command_is_killed_with_its_children() {
        let marker = std::env::temp_dir().join(format!("commlib-exec-{}", std::process::id()));
        let command = format!("(sleep 1; echo x > {0}) & wait", marker.display());
        let run = tokio::time::timeout(Duration::from_millis(200), exec(&command, "{}"));
        assert!(run.await.is_err());
        tokio::time::sleep(Duration::from_millis(1300)).await;
        assert!(!marker.exists());
    }
}
