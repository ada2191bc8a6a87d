//! A broker's process: killed when dropped, and ended by a watchdog if this process dies first.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// The watchdog waits on its copy of the pipe, of which this process holds the other end. The pipe closes when this
/// process ends, however it ends; then the broker is killed and its temporary folder removed. A line in the pipe says
/// that the broker is gone already and its process id may belong to somebody else.
///
/// `exec` makes the broker the direct child, so that its end is noticed and its process id is known.
const SUPERVISOR: &str = r#"
exec 3<&0
folder=$1; shift
( read -r _ <&3 || { kill -9 $$; rm -rf "$folder"; } ) >/dev/null 2>&1 &
exec "$@" </dev/null 3<&-
"#;

/// How often a file or a process is looked at where there is nothing to wait for.
const LOOK: Duration = Duration::from_millis(5);

/// A signal, by its name for `kill`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Signal {
    Term,
    Stop,
    Continue,
}

/// A running broker.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    lifeline: Option<ChildStdin>,
    log: PathBuf,
    log_start: usize,
}

impl Process {
    /// Starts `program`; what it prints goes to the end of the file `log` in its folder.
    pub(crate) fn spawn(
        program: &Path,
        args: &[&Path],
        folder: &Path,
        log: &str,
    ) -> io::Result<Self> {
        let log = folder.join(log);
        let file = File::options().create(true).append(true).open(&log)?;
        let log_start = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
        let mut child = Command::new("sh")
            .args(["-c", SUPERVISOR, "sh"])
            .arg(folder)
            .arg(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()?;
        let lifeline = child.stdin.take();
        Ok(Self {
            child,
            lifeline,
            log,
            log_start,
        })
    }

    /// What this process has printed so far.
    pub(crate) fn printed(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(log.get(self.log_start..).unwrap_or_default()).into_owned()
    }

    /// Waits until it has printed `text`. The error is what it printed instead.
    pub(crate) async fn wait_for(&mut self, text: &str, limit: Duration) -> Result<(), String> {
        let end = Instant::now() + limit;
        loop {
            let gone = self.exited().is_some();
            let printed = self.printed();
            if gone || Instant::now() >= end {
                return Err(printed);
            }
            if printed.contains(text) {
                return Ok(());
            }
            sleep(LOOK).await;
        }
    }

    /// How it ended, if it has.
    pub(crate) fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        let name = match signal {
            Signal::Term => "TERM",
            Signal::Stop => "STOP",
            Signal::Continue => "CONT",
        };
        // The shell's own `kill`: there need not be a program of that name.
        let status = Command::new("sh")
            .args(["-c", "kill -$0 $1", name, &self.child.id().to_string()])
            .status()?;
        if status.success() {
            Ok(())
        } else {
            Err(io::Error::other(format!("kill -{name} failed: {status}")))
        }
    }

    /// Sends SIGTERM and waits for the end; SIGKILL after `limit`.
    pub(crate) async fn stop(mut self, limit: Duration) {
        let end = Instant::now() + limit;
        // A stopped process gets the signal only when it goes on.
        if self.signal(Signal::Term).is_ok() && self.signal(Signal::Continue).is_ok() {
            while self.exited().is_none() && Instant::now() < end {
                sleep(LOOK).await;
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both only fail on a process that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(mut lifeline) = self.lifeline.take() {
            let _ = lifeline.write_all(b"gone\n");
        }
    }
}

/// Where a program is: in `PATH`, or in a folder for system programs that users may not have there.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}
