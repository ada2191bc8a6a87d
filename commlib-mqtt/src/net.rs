//! One link to the broker: opening it, and its two halves.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use futures_util::StreamExt;
use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Instant, timeout};
use tokio_util::codec::FramedRead;

use crate::config::MqttConfig;
use crate::packet::{self, Codec, CodecError, ConnectReturnCode, Packet};

/// How long one attempt may take, from the look-up of the name to the broker's answer.
const ATTEMPT: Duration = Duration::from_secs(5);

/// How long a closing broker may take to let go.
const GOODBYE: Duration = Duration::from_secs(1);

/// What is read at once.
const READ_BUFFER: usize = 32 << 10;

/// A link on which the broker accepted the login.
#[derive(Debug)]
pub(crate) struct Wire {
    pub(crate) packets: FramedRead<Watched, Codec>,
    pub(crate) writer: OwnedWriteHalf,
    /// The broker still has the session.
    pub(crate) session_present: bool,
}

/// Why there is no link.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) cause: String,
    /// Trying again is pointless until someone acts.
    pub(crate) fatal: bool,
}

/// Connects and logs in. The host name is looked up anew each time: brokers move.
pub(crate) async fn open(config: Arc<MqttConfig>, client_id: Arc<str>) -> Result<Wire, Failure> {
    timeout(ATTEMPT, log_in(&config, &client_id))
        .await
        .unwrap_or_else(|_| {
            Err(Failure {
                cause: format!("no answer within {ATTEMPT:?}"),
                fatal: false,
            })
        })
}

async fn log_in(config: &MqttConfig, client_id: &str) -> Result<Wire, Failure> {
    let transient = |cause: String| Failure {
        cause,
        fatal: false,
    };
    let io = |error: io::Error| transient(error.to_string());
    let endpoint = config.endpoint().map_err(|e| transient(e.to_string()))?;
    let stream = TcpStream::connect(endpoint).await.map_err(io)?;
    // Small packets must not wait for each other: Nagle's algorithm costs 44 ms per call.
    stream.set_nodelay(true).map_err(io)?;
    // A cut link is noticed by the system even while much that was written is not acknowledged.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket2::SockRef::from(&stream)
        .set_tcp_user_timeout(Some(config.keep_alive * 3 / 2))
        .map_err(io)?;
    let (reader, mut writer) = stream.into_split();
    let mut packets =
        FramedRead::with_capacity(Watched::new(reader), packet::codec(config), READ_BUFFER);
    let mut out = BytesMut::new();
    packet::put(&mut out, &packet::connect(config, client_id));
    writer.write_all(&out).await.map_err(io)?;
    match packets.next().await {
        Some(Ok(Packet::ConnAck(ack))) if ack.code == ConnectReturnCode::Success => Ok(Wire {
            packets,
            writer,
            session_present: ack.session_present,
        }),
        Some(Ok(Packet::ConnAck(ack))) => {
            let (cause, fatal) = packet::refusal(ack.code, client_id);
            Err(Failure { cause, fatal })
        }
        Some(Ok(_)) => Err(transient(
            "the broker answered the login with another packet".to_owned(),
        )),
        Some(Err(error)) => Err(transient(read_error(&error, config))),
        None => Err(transient(
            "the broker closed the connection instead of answering the login".to_owned(),
        )),
    }
}

impl Wire {
    /// Writes the last bytes and waits for the broker to let go, so that it has read them.
    ///
    /// Closing at once would reset the connection if anything was still unread here, and with that discard what the
    /// broker has not read yet.
    pub(crate) async fn finish(mut self, out: &mut BytesMut) {
        let farewell = async {
            self.writer.write_all_buf(out).await?;
            self.writer.shutdown().await?;
            while let Some(Ok(_)) = self.packets.next().await {}
            Ok::<_, io::Error>(())
        };
        match timeout(GOODBYE, farewell).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "goodbye"),
            Err(_) => tracing::debug!("the broker did not let go within {GOODBYE:?}"),
        }
    }
}

/// The reason to end the link after an error of the codec.
pub(crate) fn read_error(error: &CodecError, config: &MqttConfig) -> String {
    match error {
        CodecError::PayloadSizeLimitExceeded(size) => format!(
            "PacketTooLarge: a packet of {size} bytes, and `hard_limit` is {}",
            config.hard_limit
        ),
        CodecError::Io(error) => error.to_string(),
        error => format!("what the broker sends is not MQTT 3.1.1: {error}"),
    }
}

/// Notes when bytes arrive, be they a whole packet or not.
#[derive(Debug)]
pub(crate) struct Watched {
    inner: OwnedReadHalf,
    last_read: Instant,
}

impl Watched {
    fn new(inner: OwnedReadHalf) -> Self {
        Self {
            inner,
            last_read: Instant::now(),
        }
    }

    /// When bytes arrived last.
    pub(crate) fn last_read(&self) -> Instant {
        self.last_read
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.last_read = Instant::now();
        }
        polled
    }
}
