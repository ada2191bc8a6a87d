//! A TCP proxy that breaks links on purpose.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until};

use crate::port::free_port;

/// Stands in front of a broker and lets links fail in chosen ways. Connections end when it is dropped.
///
/// Bytes that wait for a delay or in a black hole are kept, as TCP keeps them, and flow on when the fault is over.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    faults: watch::Sender<Faults>,
    listening: mpsc::Sender<(bool, oneshot::Sender<()>)>,
    counts: Arc<Counts>,
}

/// How many connections a [`Proxy`] has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connections {
    /// All that it has accepted.
    pub total: usize,
    /// Those that are open.
    pub open: usize,
}

#[derive(Debug, Clone)]
struct Faults {
    target: String,
    /// Connections made in an earlier generation are reset.
    generation: u64,
    black_hole: bool,
    delay: Duration,
    bytes_per_second: Option<u64>,
}

#[derive(Debug, Default)]
struct Counts {
    total: AtomicUsize,
    open: AtomicUsize,
    changed: Notify,
}

impl Proxy {
    /// Starts one in front of `target`, such as `127.0.0.1:1883`.
    ///
    /// # Panics
    /// If no port is free.
    pub async fn start(target: impl Into<String>) -> Self {
        let mut listener = None;
        for _ in 0..10 {
            if let Ok(bound) = bind(free_port()).await {
                listener = Some(bound);
                break;
            }
        }
        let listener = listener.expect("ten free ports were taken at once");
        let port = listener.local_addr().map_or(0, |address| address.port());
        let (faults, seen) = watch::channel(Faults {
            target: target.into(),
            generation: 0,
            black_hole: false,
            delay: Duration::ZERO,
            bytes_per_second: None,
        });
        let (listening, commands) = mpsc::channel(1);
        let counts = Arc::new(Counts::default());
        tokio::spawn(accept(listener, port, seen, commands, counts.clone()));
        Self {
            port,
            faults,
            listening,
            counts,
        }
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Host and port it listens on.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Resets all open connections. New ones are welcome.
    pub fn cut(&self) {
        self.faults.send_modify(|faults| faults.generation += 1);
    }

    /// Stops listening, so that new connections are refused, or listens again. Open ones stay.
    ///
    /// # Panics
    /// If the port was taken meanwhile.
    pub async fn refuse(&self, refuse: bool) {
        let (done, wait) = oneshot::channel();
        let sent = self.listening.send((!refuse, done)).await;
        assert!(
            sent.is_ok() && wait.await.is_ok(),
            "the proxy ended; was its port {} taken?",
            self.port
        );
    }

    /// Takes bytes and passes none, in both directions: to either end the other looks silent, not gone.
    pub fn black_hole(&self, on: bool) {
        self.faults.send_modify(|faults| faults.black_hole = on);
    }

    /// Holds every byte back for so long, in both directions.
    pub fn delay(&self, delay: Duration) {
        self.faults.send_modify(|faults| faults.delay = delay);
    }

    /// Passes no more than this in each direction of each connection; `None` passes all.
    pub fn throttle(&self, bytes_per_second: Option<u64>) {
        self.faults
            .send_modify(|faults| faults.bytes_per_second = bytes_per_second);
    }

    /// Leads new connections to another address.
    pub fn retarget(&self, target: impl Into<String>) {
        self.faults
            .send_modify(|faults| faults.target = target.into());
    }

    /// How many connections there were and are.
    pub fn connections(&self) -> Connections {
        Connections {
            total: self.counts.total.load(Ordering::SeqCst),
            open: self.counts.open.load(Ordering::SeqCst),
        }
    }

    /// Waits until the connections are as `wanted` says.
    ///
    /// # Panics
    /// If that takes longer than 20 seconds.
    pub async fn wait_for(&self, wanted: impl Fn(Connections) -> bool) {
        let limit = Instant::now() + Duration::from_secs(20);
        loop {
            let changed = self.counts.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if wanted(self.connections()) {
                return;
            }
            if tokio::time::timeout_at(limit, changed).await.is_err() {
                panic!("the proxy waits in vain; it has {:?}", self.connections());
            }
        }
    }
}

async fn bind(port: u16) -> io::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await
}

/// Accepts connections until the [`Proxy`] is dropped.
async fn accept(
    listener: TcpListener,
    port: u16,
    faults: watch::Receiver<Faults>,
    mut commands: mpsc::Receiver<(bool, oneshot::Sender<()>)>,
    counts: Arc<Counts>,
) {
    let mut listener = Some(listener);
    loop {
        let accepted = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            command = commands.recv() => {
                let Some((listen, done)) = command else { return };
                if !listen {
                    listener = None;
                } else if listener.is_none() {
                    let Ok(bound) = bind(port).await else { return };
                    listener = Some(bound);
                }
                // Whoever asked may have stopped waiting.
                let _ = done.send(());
            }
            stream = accepted => {
                if let Ok((stream, _)) = stream {
                    tokio::spawn(serve(stream, faults.clone(), counts.clone()));
                }
            }
        }
    }
}

/// One connection, from its acceptance to its end.
async fn serve(mut client: TcpStream, faults: watch::Receiver<Faults>, counts: Arc<Counts>) {
    counts.total.fetch_add(1, Ordering::SeqCst);
    counts.open.fetch_add(1, Ordering::SeqCst);
    counts.changed.notify_waiters();
    let generation = faults.borrow().generation;
    let mut server = None;
    let mut cut = faults.clone();
    let reset = tokio::select! {
        // An error is a dropped proxy.
        _ = cut.wait_for(|faults| faults.generation != generation) => true,
        outcome = link(&mut client, &mut server, &faults) => outcome.is_err(),
    };
    if reset {
        for stream in [Some(&client), server.as_ref()].into_iter().flatten() {
            // Dropped with this option, a socket is reset instead of closed.
            let _ = stream.set_zero_linger();
        }
    }
    drop((client, server));
    counts.open.fetch_sub(1, Ordering::SeqCst);
    counts.changed.notify_waiters();
}

/// Connects to the target and carries bytes until both directions have ended.
async fn link(
    client: &mut TcpStream,
    server: &mut Option<TcpStream>,
    faults: &watch::Receiver<Faults>,
) -> io::Result<()> {
    out_of_black_hole(&mut faults.clone()).await?;
    let target = faults.borrow().target.clone();
    let server = server.insert(TcpStream::connect(target).await?);
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (client_read, client_write) = client.split();
    let (server_read, server_write) = server.split();
    tokio::try_join!(
        carry(client_read, server_write, faults.clone()),
        carry(server_read, client_write, faults.clone()),
    )?;
    Ok(())
}

/// One direction. Reading goes on while writing waits, so that a delay does not become a throttle.
async fn carry(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut faults: watch::Receiver<Faults>,
) -> io::Result<()> {
    let (chunks, mut arrived) = mpsc::channel::<(Instant, Vec<u8>)>(64);
    let read = async move {
        loop {
            let mut chunk = Vec::with_capacity(16 << 10);
            if from.read_buf(&mut chunk).await? == 0
                || chunks.send((Instant::now(), chunk)).await.is_err()
            {
                return io::Result::Ok(());
            }
        }
    };
    let write = async move {
        while let Some((at, chunk)) = arrived.recv().await {
            let delay = faults.borrow().delay;
            sleep_until(at + delay).await;
            let mut rest = chunk.as_slice();
            while !rest.is_empty() {
                out_of_black_hole(&mut faults).await?;
                let rate = faults.borrow().bytes_per_second;
                // Small pieces, twenty a second, make a smooth slow link.
                let piece = rate.map_or(rest.len(), |rate| {
                    usize::try_from(rate / 20).unwrap_or(usize::MAX).max(1)
                });
                let (now, later) = rest.split_at(piece.min(rest.len()));
                to.write_all(now).await?;
                rest = later;
                if let Some(rate) = rate {
                    let nanos = now.len() as u64 * 1_000_000_000 / rate.max(1);
                    sleep(Duration::from_nanos(nanos)).await;
                }
            }
        }
        out_of_black_hole(&mut faults).await?;
        to.shutdown().await
    };
    tokio::try_join!(read, write)?;
    Ok(())
}

/// Returns when bytes may pass.
async fn out_of_black_hole(faults: &mut watch::Receiver<Faults>) -> io::Result<()> {
    match faults.wait_for(|faults| !faults.black_hole).await {
        Ok(_) => Ok(()),
        Err(_) => Err(io::Error::other("the proxy was dropped")),
    }
}
