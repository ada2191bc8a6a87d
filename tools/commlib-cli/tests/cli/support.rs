//! The built command as a child process. Every wait is bounded, and children die with their test.

use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

/// How long anything may take before a test fails.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Waits for `future`, and fails the test if that takes too long.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(LIMIT, future).await {
        Ok(output) => output,
        Err(_) => panic!("{what} took longer than {LIMIT:?}"),
    }
}

/// What a command that has ended leaves behind.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// The only line on stderr, after `error: `.
    pub(crate) fn error(&self) -> &str {
        let text = self.stderr.strip_suffix('\n').unwrap_or(&self.stderr);
        assert!(!text.contains('\n'), "more than one line: {text}");
        text.strip_prefix("error: ")
            .unwrap_or_else(|| panic!("no error line: {self:?}"))
    }

    /// The lines of stdout as JSON.
    pub(crate) fn lines(&self) -> Vec<Value> {
        self.stdout.lines().map(parse).collect()
    }
}

/// Runs the command to its end.
pub(crate) async fn run(url: &str, args: &[&str]) -> Ended {
    Running::start(url, args).finish().await
}

/// Runs the command to its end with this text on its stdin.
pub(crate) async fn run_with(url: &str, args: &[&str], stdin: &str) -> Ended {
    let mut running = Running::start(url, args);
    let mut to = running.stdin.take().expect("stdin is piped");
    let stdin = stdin.to_owned();
    let feed = tokio::spawn(async move {
        // A command that has enough may end before.
        let _ = to.write_all(stdin.as_bytes()).await;
    });
    let ended = running.finish().await;
    feed.abort();
    ended
}

/// The command while it runs. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Option<Lines<BufReader<ChildStdout>>>,
    stderr: Lines<BufReader<ChildStderr>>,
}

impl Running {
    pub(crate) fn start(url: &str, args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_commlib"))
            .env("COMMLIB_URL", url)
            .env_remove("COMMLIB_LOG")
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the command starts");
        let stdout = child.stdout.take().expect("stdout is piped");
        let stderr = child.stderr.take().expect("stderr is piped");
        Self {
            stdin: child.stdin.take(),
            stdout: Some(BufReader::new(stdout).lines()),
            stderr: BufReader::new(stderr).lines(),
            child,
        }
    }

    /// Starts it and waits until it says that it listens.
    pub(crate) async fn ready(url: &str, args: &[&str]) -> Self {
        let mut running = Self::start(url, args);
        let line = within("ready", running.stderr.next_line()).await;
        assert_eq!(line.ok().flatten().as_deref(), Some("ready"), "{args:?}");
        running
    }

    /// The next line of stdout.
    pub(crate) async fn line(&mut self) -> Value {
        let stdout = self.stdout.as_mut().expect("stdout is open");
        let line = within("a line of stdout", stdout.next_line()).await;
        parse(&line.ok().flatten().expect("stdout has ended"))
    }

    /// The next line of stderr.
    pub(crate) async fn error_line(&mut self) -> String {
        let line = within("a line of stderr", self.stderr.next_line()).await;
        line.ok().flatten().expect("stderr has ended")
    }

    /// Writes to its stdin.
    pub(crate) async fn write(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().expect("stdin is open");
        let written = within("stdin", stdin.write_all(text.as_bytes())).await;
        written.expect("the command reads");
    }

    /// Ends its stdin.
    pub(crate) fn end_input(&mut self) {
        self.stdin = None;
    }

    /// Closes our end of its stdout, as `head` does when it has enough.
    pub(crate) fn close_stdout(&mut self) {
        self.stdout = None;
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let id = self.child.id().and_then(|id| i32::try_from(id).ok());
        let pid = id.and_then(Pid::from_raw).expect("it runs");
        kill_process(pid, signal).expect("it runs");
    }

    /// Waits for its end. What was read before is not repeated.
    pub(crate) async fn finish(mut self) -> Ended {
        self.end_input();
        let mut stdout = Vec::new();
        let mut stderr = Vec::new();
        let (out, err) = (self.stdout.take(), self.stderr);
        let read_stdout = async {
            if let Some(out) = out {
                let _ = out.into_inner().read_to_end(&mut stdout).await;
            }
        };
        let read_stderr = async {
            let _ = err.into_inner().read_to_end(&mut stderr).await;
        };
        let (status, (), ()) = within("the command", async {
            tokio::join!(self.child.wait(), read_stdout, read_stderr)
        })
        .await;
        Ended {
            code: status.expect("it can be waited for").code(),
            stdout: String::from_utf8(stdout).expect("stdout is text"),
            stderr: String::from_utf8(stderr).expect("stderr is text"),
        }
    }

    /// The lines it prints until it ends well, for commands that print at once when they listen.
    pub(crate) async fn finish_after_ready(self) -> Vec<Value> {
        let ended = self.finish().await;
        assert_eq!((ended.code, &*ended.stderr), (Some(0), "ready\n"));
        ended.lines()
    }

    /// Asks it to end with SIGTERM, and waits.
    pub(crate) async fn terminate(self) -> Ended {
        self.signal(Signal::TERM);
        self.finish().await
    }
}

fn parse(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|e| panic!("not JSON ({e}): {line}"))
}

/// A topic or service that no other test uses, on a broker that all share.
pub(crate) fn unique(name: &str) -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("cli-{}-{number}.{name}", std::process::id())
}
