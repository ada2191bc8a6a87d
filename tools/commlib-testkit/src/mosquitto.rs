//! A real Mosquitto, started for a test.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tempfile::TempDir;

use crate::conformance::Outage;
use crate::port::free_port;
use crate::process::{Process, Signal, find};

/// How long a broker may take to start or to stop before a test fails.
const LIMIT: Duration = Duration::from_secs(20);

/// How often another port is tried, or the same one again.
const ATTEMPTS: usize = 10;

/// The file in its folder that holds what it prints.
const LOG: &str = "mosquitto.log";

/// Settings with which Mosquitto keeps what it has confirmed when it is killed.
const DURABLE: &str = "persistence true\nautosave_on_changes true\nautosave_interval 1\n\
                       max_inflight_messages 0\nmax_queued_messages 0\n";

/// A Mosquitto of its own on a free loopback port, with its data in a temporary folder.
///
/// It is killed when dropped, and by a watchdog when this process ends without dropping it. All methods take `&self`,
/// so a fixture can share it; they must not run at the same time.
#[derive(Debug)]
pub struct Mosquitto {
    // Dropped in this order: a broker that lives would write into its folder while that is being removed.
    process: Mutex<Option<Process>>,
    folder: TempDir,
    program: PathBuf,
    port: u16,
    login: Option<(String, String)>,
}

/// What is special about a [`Mosquitto`].
#[derive(Debug, Clone, Default)]
#[must_use = "call `start`"]
pub struct MosquittoBuilder {
    forgetful: bool,
    login: Option<(String, String)>,
    acl: Option<String>,
    settings: String,
    listener: String,
}

impl MosquittoBuilder {
    /// Refuses everybody but this user. The URL of the broker names the user.
    pub fn login(mut self, user: &str, password: &str) -> Self {
        self.login = Some((user.to_owned(), password.to_owned()));
        self
    }

    /// The text of an access control file, such as `topic read #`.
    pub fn acl(mut self, text: &str) -> Self {
        self.acl = Some(text.to_owned());
        self
    }

    /// Keeps Mosquitto's own defaults, with which a killed broker forgets what it has confirmed.
    pub fn forgetful(mut self) -> Self {
        self.forgetful = true;
        self
    }

    /// Adds a global line to the configuration, such as `max_packet_size 20000`.
    pub fn setting(mut self, line: &str) -> Self {
        self.settings.push_str(line);
        self.settings.push('\n');
        self
    }

    /// Adds a line about the listener, such as `max_connections 2`.
    pub fn listener(mut self, line: &str) -> Self {
        self.listener.push_str(line);
        self.listener.push('\n');
        self
    }

    /// Starts it, and waits until it accepts connections.
    ///
    /// # Panics
    /// If it cannot be started; the text holds what the broker printed.
    pub async fn start(self) -> Mosquitto {
        match self.try_start().await {
            Ok(broker) => broker,
            Err(error) => panic!("{error}"),
        }
    }

    /// As [`start`](Self::start), without the panic.
    ///
    /// # Errors
    /// The reason, with what the broker printed.
    pub async fn try_start(self) -> io::Result<Mosquitto> {
        let program =
            find("mosquitto").ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, MISSING))?;
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let port = free_port();
            let folder = self.prepare(port)?;
            let broker = Mosquitto {
                program: program.clone(),
                folder,
                port,
                login: self.login.clone(),
                process: Mutex::new(None),
            };
            match broker.run().await {
                Ok(()) => return Ok(broker),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| io::Error::other("mosquitto found no free port")))
    }

    /// Writes the configuration into a new folder.
    fn prepare(&self, port: u16) -> io::Result<TempDir> {
        let folder = TempDir::with_prefix("commlib-mosquitto-")?;
        let path = folder.path();
        // Without `user root` a Mosquitto started by root becomes a user who may not read the folder. For others
        // the line means nothing.
        // To stderr, because stdout is buffered when it is a file.
        let mut text = "user root\nlog_dest stderr\n".to_owned();
        if !self.forgetful {
            text.push_str(DURABLE);
            let _ = writeln!(text, "persistence_location {}/", path.display());
        }
        if let Some((user, password)) = &self.login {
            let file = path.join("passwords");
            hash_password(&file, user, password)?;
            let _ = writeln!(
                text,
                "allow_anonymous false\npassword_file {}",
                file.display()
            );
        } else {
            text.push_str("allow_anonymous true\n");
        }
        if let Some(acl) = &self.acl {
            let file = path.join("acl");
            std::fs::write(&file, format!("{acl}\n"))?;
            let _ = writeln!(text, "acl_file {}", file.display());
        }
        let _ = write!(
            text,
            "{}listener {port} 127.0.0.1\n{}",
            self.settings, self.listener
        );
        std::fs::write(path.join("mosquitto.conf"), text)?;
        Ok(folder)
    }
}

impl Mosquitto {
    /// Starts one that keeps what it has confirmed even when it is killed.
    ///
    /// # Panics
    /// As [`MosquittoBuilder::start`].
    pub async fn start() -> Self {
        Self::builder().start().await
    }

    /// One with other settings.
    pub fn builder() -> MosquittoBuilder {
        MosquittoBuilder::default()
    }

    /// Whether Mosquitto is installed, and wanted: not with `COMMLIB_TEST_BROKERS=skip`. If it is not, says so, once for
    /// each call: the test is skipped.
    ///
    /// # Panics
    /// If it is not installed although the environment demands it: with `COMMLIB_TEST_BROKERS=require` or `CI=true`.
    pub fn available() -> bool {
        if std::env::var("COMMLIB_TEST_BROKERS").is_ok_and(|text| text == "skip") {
            println!("skipped: COMMLIB_TEST_BROKERS=skip");
            return false;
        }
        let installed = find("mosquitto").is_some();
        if !installed {
            assert!(!brokers_required(), "{MISSING}");
            println!("skipped: {MISSING}");
        }
        installed
    }

    /// The URL to connect to, with the login if there is one.
    pub fn url(&self) -> String {
        match &self.login {
            Some((user, password)) => format!("mqtt://{user}:{password}@127.0.0.1:{}", self.port),
            None => format!("mqtt://127.0.0.1:{}", self.port),
        }
    }

    /// The port it listens on. It stays the same over restarts.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Host and port, for clients that want no URL.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The folder with its configuration and data.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Everything it has printed, over all starts.
    pub fn log(&self) -> String {
        let log = std::fs::read(self.folder().join(LOG)).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Kills it without warning. When this returns, it is gone.
    pub fn kill9(&self) {
        drop(self.process().take());
    }

    /// Stops it as a hanging machine would: connections stay open and nothing moves.
    ///
    /// # Panics
    /// If it does not run.
    pub fn pause(&self) {
        self.signal(Signal::Stop);
    }

    /// Lets it go on after [`pause`](Self::pause).
    ///
    /// # Panics
    /// If it does not run.
    pub fn resume(&self) {
        self.signal(Signal::Continue);
    }

    /// Ends it properly (SIGTERM) and waits until it is gone.
    pub async fn stop(&self) {
        let process = self.process().take();
        if let Some(process) = process {
            process.stop(LIMIT).await;
        }
    }

    /// Starts it again on the same port with the data it has saved; stops it first if it runs.
    ///
    /// # Panics
    /// If it does not start.
    pub async fn restart(&self) {
        self.stop().await;
        let mut outcome = self.run().await;
        for _ in 1..ATTEMPTS {
            match &outcome {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    outcome = self.run().await;
                }
                _ => break,
            }
        }
        if let Err(error) = outcome {
            panic!("restart: {error}");
        }
    }

    /// As [`restart`](Self::restart), after deleting the saved data: a broker that knows no session any more.
    ///
    /// # Panics
    /// If it does not start.
    pub async fn restart_without_data(&self) {
        self.stop().await;
        // Missing if nothing was saved yet.
        let _ = std::fs::remove_file(self.folder().join("mosquitto.db"));
        self.restart().await;
    }

    async fn run(&self) -> io::Result<()> {
        let config = self.folder().join("mosquitto.conf");
        let args = [Path::new("-c"), &config];
        let mut process = Process::spawn(&self.program, &args, self.folder(), LOG)?;
        // The broker's own word, because an answer on the port might come from somebody else's broker.
        if let Err(printed) = process.wait_for(" running", LIMIT).await {
            let kind = if printed.contains("Address already in use") {
                io::ErrorKind::AddrInUse
            } else {
                io::ErrorKind::Other
            };
            let text = format!("mosquitto does not start; it printed:\n{printed}");
            return Err(io::Error::new(kind, text));
        }
        *self.process() = Some(process);
        Ok(())
    }

    fn signal(&self, signal: Signal) {
        let process = self.process();
        let process = process.as_ref().expect("mosquitto does not run");
        if let Err(error) = process.signal(signal) {
            panic!("{error}");
        }
    }

    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Killed without warning, and started again with its data.
#[async_trait]
impl Outage for Mosquitto {
    async fn down(&self) {
        self.kill9();
    }

    async fn up(&self) {
        self.restart().await;
    }
}

/// What to do when there is no Mosquitto.
pub(crate) const MISSING: &str = "there is no `mosquitto` in PATH or /usr/sbin; \
     install it (Debian, Ubuntu: `apt-get install mosquitto`; macOS: `brew install mosquitto`)";

/// Whether tests without their broker fail instead of being skipped.
pub(crate) fn brokers_required() -> bool {
    let is = |name: &str, value: &str| std::env::var(name).is_ok_and(|text| text == value);
    is("COMMLIB_TEST_BROKERS", "require") || is("CI", "true")
}

/// Mosquitto 2 reads hashed passwords only; its own tool makes them.
fn hash_password(file: &Path, user: &str, password: &str) -> io::Result<()> {
    let tool = find("mosquitto_passwd").ok_or_else(|| {
        let text = "there is no `mosquitto_passwd`, which comes with mosquitto";
        io::Error::new(io::ErrorKind::NotFound, text)
    })?;
    let output = Command::new(tool)
        .args(["-b", "-c"])
        .arg(file)
        .args([user, password])
        .output()?;
    if output.status.success() {
        Ok(())
    } else {
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(io::Error::other(format!("mosquitto_passwd: {why}")))
    }
}
