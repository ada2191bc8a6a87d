//! A real Redis server, started for a test.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::conformance::Outage;
use crate::mosquitto::brokers_required;
use crate::port::free_port;
use crate::process::{Process, Signal, find};

/// How long a server may take to start or to stop before a test fails.
const LIMIT: Duration = Duration::from_secs(20);

/// How often another port is tried, or the same one again.
const ATTEMPTS: usize = 10;

/// The file in its folder that holds what it prints.
const LOG: &str = "redis.log";

/// What to do when there is no Redis.
pub(crate) const MISSING: &str = "there is no `redis-server` in PATH or /usr/sbin; \
     install it (Debian, Ubuntu: `apt-get install redis-server`; macOS: `brew install redis`)";

/// A Redis server of its own on a free loopback port, with its data in a temporary folder.
///
/// It writes to its file what it has confirmed, so that nothing is missing after a [`kill9`](Self::kill9). It is killed
/// when dropped, and by a watchdog when this process ends without dropping it. All methods take `&self`, so a fixture
/// can share it; they must not run at the same time.
#[derive(Debug)]
pub struct Redis {
    program: PathBuf,
    folder: TempDir,
    port: u16,
    login: Option<(String, String)>,
    process: Mutex<Option<Process>>,
}

/// What is special about a [`Redis`].
#[derive(Debug, Clone, Default)]
#[must_use = "call `start`"]
pub struct RedisBuilder {
    login: Option<(String, String)>,
    settings: String,
}

impl RedisBuilder {
    /// Refuses everybody but this user, who may do everything. The URL of the server names the user.
    pub fn login(mut self, user: &str, password: &str) -> Self {
        self.login = Some((user.to_owned(), password.to_owned()));
        self.setting("user default off")
            .setting(&format!("user {user} on >{password} ~* &* +@all"))
    }

    /// Adds a line to the configuration, such as `maxmemory 2mb`.
    pub fn setting(mut self, line: &str) -> Self {
        self.settings.push_str(line);
        self.settings.push('\n');
        self
    }

    /// Starts it, and waits until it accepts connections.
    ///
    /// # Panics
    /// If it cannot be started; the text holds what the server printed.
    pub async fn start(self) -> Redis {
        match self.try_start().await {
            Ok(server) => server,
            Err(error) => panic!("{error}"),
        }
    }

    /// As [`start`](Self::start), without the panic.
    ///
    /// # Errors
    /// The reason, with what the server printed.
    pub async fn try_start(self) -> io::Result<Redis> {
        let program =
            find("redis-server").ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, MISSING))?;
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let port = free_port();
            let server = Redis {
                program: program.clone(),
                folder: self.prepare(port)?,
                port,
                login: self.login.clone(),
                process: Mutex::new(None),
            };
            match server.run().await {
                Ok(()) => return Ok(server),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| io::Error::other("redis-server found no free port")))
    }

    /// Writes the configuration into a new folder.
    fn prepare(&self, port: u16) -> io::Result<TempDir> {
        let folder = TempDir::with_prefix("commlib-redis-")?;
        let path = folder.path();
        // `save ""`: with the log of all writes there is no need for snapshots, and no second truth.
        let mut text = format!(
            "port {port}\nbind 127.0.0.1\ndaemonize no\nsave \"\"\nappendonly yes\nappendfsync everysec\n"
        );
        let _ = writeln!(text, "dir \"{}\"", path.display());
        text.push_str(&self.settings);
        std::fs::write(path.join("redis.conf"), text)?;
        Ok(folder)
    }
}

impl Redis {
    /// Starts one that keeps what it has confirmed even when it is killed.
    ///
    /// # Panics
    /// As [`RedisBuilder::start`].
    pub async fn start() -> Self {
        Self::builder().start().await
    }

    /// One with other settings.
    pub fn builder() -> RedisBuilder {
        RedisBuilder::default()
    }

    /// Whether Redis is installed, and wanted: not with `COMMLIB_TEST_BROKERS=skip`. If it is not, says so, once for
    /// each call: the test is skipped.
    ///
    /// # Panics
    /// If it is not installed although the environment demands it: with `COMMLIB_TEST_BROKERS=require` or `CI=true`.
    pub fn available() -> bool {
        if std::env::var("COMMLIB_TEST_BROKERS").is_ok_and(|text| text == "skip") {
            println!("skipped: COMMLIB_TEST_BROKERS=skip");
            return false;
        }
        let installed = find("redis-server").is_some();
        if !installed {
            assert!(!brokers_required(), "{MISSING}");
            println!("skipped: {MISSING}");
        }
        installed
    }

    /// The URL to connect to, with the login if there is one.
    pub fn url(&self) -> String {
        match &self.login {
            Some((user, password)) => format!("redis://{user}:{password}@127.0.0.1:{}", self.port),
            None => format!("redis://127.0.0.1:{}", self.port),
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

    /// What the server answers to a command, on a connection of its own: the lines of the answer without the signs of
    /// the protocol, so that a test need not rest on the client that it tests.
    ///
    /// # Panics
    /// If there is no answer.
    pub async fn command(&self, arguments: &[&str]) -> Vec<String> {
        let exchange = async {
            let mut stream = TcpStream::connect(self.address()).await?;
            if let Some((user, password)) = &self.login {
                stream.write_all(&encode(&["AUTH", user, password])).await?;
            }
            stream.write_all(&encode(arguments)).await?;
            let mut reader = BufReader::new(stream);
            if self.login.is_some() {
                answer(&mut reader).await?;
            }
            answer(&mut reader).await
        };
        match tokio::time::timeout(LIMIT, exchange).await {
            Ok(Ok(answer)) => answer,
            other => panic!("{arguments:?}: {other:?}"),
        }
    }

    /// The names of all keys, sorted.
    ///
    /// # Panics
    /// As [`command`](Self::command).
    pub async fn keys(&self) -> Vec<String> {
        let mut keys = self.command(&["KEYS", "*"]).await;
        keys.sort();
        keys
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

    /// As [`restart`](Self::restart), after deleting the saved data.
    ///
    /// # Panics
    /// If it does not start.
    pub async fn restart_without_data(&self) {
        self.stop().await;
        // A folder since Redis 7, a file before; missing if nothing was saved yet.
        let _ = std::fs::remove_dir_all(self.folder().join("appendonlydir"));
        let _ = std::fs::remove_file(self.folder().join("appendonly.aof"));
        self.restart().await;
    }

    async fn run(&self) -> io::Result<()> {
        let config = self.folder().join("redis.conf");
        let mut process = Process::spawn(&self.program, &[&config], self.folder(), LOG)?;
        // The server's own word, because an answer on the port might come from somebody else's server.
        let ready = "Ready to accept connections";
        if let Err(printed) = process.wait_for(ready, LIMIT).await {
            let kind = if printed.contains("Address already in use") {
                io::ErrorKind::AddrInUse
            } else {
                io::ErrorKind::Other
            };
            let text = format!("redis-server does not start; it printed:\n{printed}");
            return Err(io::Error::new(kind, text));
        }
        *self.process() = Some(process);
        Ok(())
    }

    fn signal(&self, signal: Signal) {
        let process = self.process();
        let process = process.as_ref().expect("redis-server does not run");
        if let Err(error) = process.signal(signal) {
            panic!("{error}");
        }
    }

    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Taken away without warning; it keeps what it has confirmed.
#[async_trait]
impl Outage for Redis {
    async fn down(&self) {
        self.kill9();
    }

    async fn up(&self) {
        self.restart().await;
    }
}

fn encode(arguments: &[&str]) -> Vec<u8> {
    let mut text = format!("*{}\r\n", arguments.len());
    for argument in arguments {
        let _ = write!(text, "${}\r\n{argument}\r\n", argument.len());
    }
    text.into_bytes()
}

/// One value of the protocol's second version, flattened.
async fn answer(reader: &mut BufReader<TcpStream>) -> io::Result<Vec<String>> {
    let mut values = Vec::new();
    let mut due = 1_usize;
    while due > 0 {
        due -= 1;
        let mut line = String::new();
        reader.read_line(&mut line).await?;
        let line = line.trim_end();
        let (sign, rest) = line
            .split_at_checked(1)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        match (sign, rest.parse::<usize>()) {
            ("*", Ok(elements)) => due += elements,
            ("$", Ok(length)) => {
                let mut text = vec![0; length + 2];
                reader.read_exact(&mut text).await?;
                text.truncate(length);
                values.push(String::from_utf8_lossy(&text).into_owned());
            }
            // A length of -1: nothing.
            ("*" | "$", Err(_)) => {}
            _ => values.push(rest.to_owned()),
        }
    }
    Ok(values)
}
