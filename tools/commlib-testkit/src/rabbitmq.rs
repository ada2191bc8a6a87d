//! A real RabbitMQ, started for a test.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::mosquitto::brokers_required;
use crate::port::free_port;
use crate::process::{Process, Signal, find};

/// How long a broker may take to start or to stop before a test fails. It takes ten seconds on a quiet machine.
const LIMIT: Duration = Duration::from_secs(120);

/// How often other ports are tried.
const ATTEMPTS: usize = 5;

/// The file in its folder that holds what it prints.
const LOG: &str = "rabbitmq.log";

/// The program itself: what Debian has in /usr/sbin changes the user and the folder.
const SERVER: &str = "/usr/lib/rabbitmq/bin/rabbitmq-server";
const CTL: &str = "/usr/lib/rabbitmq/bin/rabbitmqctl";

/// What to do when there is no RabbitMQ.
const MISSING: &str = "there is no `rabbitmq-server` in /usr/lib/rabbitmq/bin or PATH; \
     install it (Debian, Ubuntu: `apt-get install rabbitmq-server`; macOS: `brew install rabbitmq`)";

/// A RabbitMQ of its own on free loopback ports, with its own node, cookie and name server, and its data in a temporary
/// folder. The user is `guest`, the password too.
///
/// It is killed when dropped, and by a watchdog when this process ends without dropping it. All methods take `&self`,
/// so a fixture can share it; they must not run at the same time. Starting it takes ten seconds: share it where nothing
/// is broken.
#[derive(Debug)]
pub struct RabbitMq {
    ports: Ports,
    // Before the folder, so that it is gone when the folder is removed.
    broker: Mutex<Option<Process>>,
    _names: Process,
    folder: TempDir,
}

#[derive(Debug, Clone, Copy)]
struct Ports {
    amqp: u16,
    /// Between Erlang nodes, which the control program is.
    nodes: u16,
    /// Where nodes find each other.
    names: u16,
}

impl RabbitMq {
    /// Starts one and waits until it accepts connections.
    ///
    /// # Panics
    /// If it cannot be started; the text holds what it printed.
    pub async fn start() -> Self {
        match Self::try_start().await {
            Ok(broker) => broker,
            Err(error) => panic!("{error}"),
        }
    }

    /// As [`start`](Self::start), without the panic.
    ///
    /// # Errors
    /// The reason, with what it printed.
    pub async fn try_start() -> io::Result<Self> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, MISSING);
        if server().is_none() {
            return Err(last);
        }
        for _ in 0..ATTEMPTS {
            let ports = Ports {
                amqp: free_port(),
                nodes: free_port(),
                names: free_port(),
            };
            match Self::start_on(ports).await {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
                outcome => return outcome,
            }
        }
        Err(last)
    }

    async fn start_on(ports: Ports) -> io::Result<Self> {
        let folder = TempDir::with_prefix("commlib-rabbitmq-")?;
        let path = folder.path();
        let write = |name: &str, text: String| std::fs::write(path.join(name), text);
        // The disk limit is about this machine, not about what is tested.
        write(
            "rabbitmq.conf",
            format!(
                "listeners.tcp.1 = 127.0.0.1:{}\nlog.console = true\nlog.console.level = info\nlog.file = false\n\
                 disk_free_limit.absolute = 10MB\n",
                ports.amqp
            ),
        )?;
        write("enabled_plugins", "[].\n".to_owned())?;
        let names = start_names(path, ports.names).await?;
        let this = Self {
            ports,
            broker: Mutex::new(None),
            _names: names,
            folder,
        };
        this.run().await?;
        Ok(this)
    }

    /// Whether RabbitMQ is installed, and wanted: not with `COMMLIB_TEST_BROKERS=skip`. If it is not, says so, once for
    /// each call: the test is skipped.
    ///
    /// # Panics
    /// If it is not installed although the environment demands it: with `COMMLIB_TEST_BROKERS=require` or `CI=true`.
    pub fn available() -> bool {
        if std::env::var("COMMLIB_TEST_BROKERS").is_ok_and(|text| text == "skip") {
            println!("skipped: COMMLIB_TEST_BROKERS=skip");
            return false;
        }
        let installed = server().is_some();
        if !installed {
            assert!(!brokers_required(), "{MISSING}");
            println!("skipped: {MISSING}");
        }
        installed
    }

    /// The URL to connect to.
    pub fn url(&self) -> String {
        format!("amqp://127.0.0.1:{}", self.ports.amqp)
    }

    /// The port it listens on. It stays the same over restarts.
    pub fn port(&self) -> u16 {
        self.ports.amqp
    }

    /// Host and port, for clients that want no URL.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.ports.amqp)
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

    /// Runs `rabbitmqctl` with these arguments and gives what it printed. It takes two seconds.
    ///
    /// # Panics
    /// If it fails; the text holds what it printed.
    pub async fn ctl(&self, arguments: &[&str]) -> String {
        let ctl = Path::new(CTL);
        let ctl = if ctl.is_file() {
            ctl.to_owned()
        } else {
            find("rabbitmqctl").expect(MISSING)
        };
        let mut command = Command::new(ctl);
        command
            .arg("--quiet")
            .args(arguments)
            .envs(self.environment());
        let output = tokio::task::spawn_blocking(move || command.output()).await;
        let output = output.expect("no panic").expect("rabbitmqctl runs");
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "rabbitmqctl {arguments:?}: {printed}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        printed
    }

    /// Kills it without warning. When this returns, it is gone.
    pub fn kill9(&self) {
        drop(self.broker().take());
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
        let process = self.broker().take();
        if let Some(process) = process {
            process.stop(LIMIT).await;
        }
    }

    /// Starts it again on the same ports with the data it has saved; stops it first if it runs.
    ///
    /// # Panics
    /// If it does not start.
    pub async fn restart(&self) {
        self.stop().await;
        if let Err(error) = self.run().await {
            panic!("restart: {error}");
        }
    }

    /// As [`restart`](Self::restart), after deleting the saved data: a broker that knows nothing any more.
    ///
    /// # Panics
    /// If it does not start.
    pub async fn restart_without_data(&self) {
        self.stop().await;
        // Missing if nothing was saved yet.
        let _ = std::fs::remove_dir_all(self.folder().join("data"));
        self.restart().await;
    }

    async fn run(&self) -> io::Result<()> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, MISSING);
        let env = find("env").ok_or_else(missing)?;
        let server = server().ok_or_else(missing)?;
        let variables = self
            .environment()
            .map(|(name, value)| format!("{name}={value}"));
        let mut arguments: Vec<&Path> = variables.iter().map(Path::new).collect();
        arguments.push(&server);
        let mut process = Process::spawn(&env, &arguments, self.folder(), LOG)?;
        let failed = |printed: String| {
            let kind = if printed.contains("eaddrinuse") {
                io::ErrorKind::AddrInUse
            } else {
                io::ErrorKind::Other
            };
            io::Error::new(
                kind,
                format!("rabbitmq-server does not start; it printed:\n{printed}"),
            )
        };
        // The broker's own word, because an answer on the port might come from somebody else's broker.
        process
            .wait_for("Server startup complete", LIMIT)
            .await
            .map_err(failed)?;
        *self.broker() = Some(process);
        greet(self.ports.amqp).await
    }

    fn environment(&self) -> [(&'static str, String); 14] {
        let at = |name: &str| self.folder().join(name).display().to_string();
        let Ports { nodes, names, .. } = self.ports;
        [
            ("RABBITMQ_NODENAME", format!("commlib-{nodes}@localhost")),
            ("RABBITMQ_CONFIG_FILE", at("rabbitmq.conf")),
            ("RABBITMQ_CONF_ENV_FILE", at("none")),
            ("RABBITMQ_ENABLED_PLUGINS_FILE", at("enabled_plugins")),
            ("RABBITMQ_MNESIA_BASE", at("data")),
            ("RABBITMQ_LOG_BASE", at("logs")),
            ("RABBITMQ_GENERATED_CONFIG_DIR", at("generated")),
            ("RABBITMQ_DIST_PORT", nodes.to_string()),
            (
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                DISTRIBUTION.to_owned(),
            ),
            // Makes the script become the broker instead of its parent.
            ("RUNNING_UNDER_SYSTEMD", "true".to_owned()),
            ("ERL_EPMD_PORT", names.to_string()),
            ("ERL_EPMD_ADDRESS", "127.0.0.1".to_owned()),
            // The cookie is there.
            ("HOME", at("")),
            ("LC_ALL", "C.UTF-8".to_owned()),
        ]
    }

    fn signal(&self, signal: Signal) {
        let process = self.broker();
        let process = process.as_ref().expect("rabbitmq-server does not run");
        if let Err(error) = process.signal(signal) {
            panic!("{error}");
        }
    }

    fn broker(&self) -> MutexGuard<'_, Option<Process>> {
        self.broker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Loopback only, two schedulers, and none of them spins while it waits.
const DISTRIBUTION: &str =
    "-kernel inet_dist_use_interface {127,0,0,1} +S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none";

fn server() -> Option<PathBuf> {
    let direct = Path::new(SERVER);
    if direct.is_file() {
        return Some(direct.to_owned());
    }
    find("rabbitmq-server")
}

/// Starts Erlang's name server. The broker would start one itself, which would outlive it.
async fn start_names(folder: &Path, port: u16) -> io::Result<Process> {
    let missing = || {
        io::Error::new(
            io::ErrorKind::NotFound,
            "there is no `epmd`, which comes with Erlang",
        )
    };
    let epmd = find("epmd").ok_or_else(missing)?;
    let port_text = port.to_string();
    let arguments = ["-port", &port_text, "-address", "127.0.0.1"].map(Path::new);
    let mut process = Process::spawn(&epmd, &arguments, folder, "epmd.log")?;
    let end = Instant::now() + LIMIT;
    while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
        if process.exited().is_some() || Instant::now() >= end {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!("epmd: {}", process.printed()),
            ));
        }
        sleep(Duration::from_millis(5)).await;
    }
    Ok(process)
}

/// Says hello as an AMQP client and waits for the answer.
async fn greet(port: u16) -> io::Result<()> {
    let hello = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.write_all(b"AMQP\x00\x00\x09\x01").await?;
        stream.read_u8().await.map(drop)
    };
    timeout(LIMIT, hello)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
