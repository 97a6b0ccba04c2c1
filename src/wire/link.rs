//! A connection before it is cut into frames: the stream, how long to wait for what, and what may go wrong.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use super::frame::FrameError;
use super::message::{Failure, FailureCode};
use super::rate::{Limit, Limited};

/// How long to wait for what. The defaults suit any network that a backup should run over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// To connect and say hello.
    pub hello: Duration,
    /// A sign of life is sent after this long without anything else to send.
    pub alive_every: Duration,
    /// No byte for this long from a peer that owes a sign of life: it is gone.
    pub silence: Duration,
    /// A server closes a connection that asks for nothing for this long.
    pub idle: Duration,
    /// A client that takes nothing for so long while something waits to be sent is stuck: its session ends.
    pub stuck: Duration,
    /// No session is longer than this.
    pub session: Duration,
    /// To tell a peer why the connection is closed.
    pub farewell: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            hello: Duration::from_secs(10),
            alive_every: Duration::from_secs(10),
            silence: Duration::from_secs(30),
            idle: Duration::from_secs(600),
            stuck: Duration::from_secs(120),
            session: Duration::from_secs(24 * 3600),
            farewell: Duration::from_secs(2),
        }
    }
}

/// Ticks for signs of life; the first after one period. What arrives from the peer must not put them off, else two ends
/// with the same period may silence each other.
pub(super) fn every(period: Duration) -> Interval {
    let mut ticks = interval_at(Instant::now() + period, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// A byte stream to a peer, whatever carries it.
pub struct Stream {
    pub(super) reader: Box<dyn AsyncRead + Send + Unpin>,
    pub(super) writer: Box<dyn AsyncWrite + Send + Unpin>,
    pub(super) peer: String,
}

impl Stream {
    /// A TCP connection. Nagle's delay is switched off: frames are written whole. The receive buffer is left to the
    /// kernel, which grows it further than `SO_RCVBUF` may ask for on most systems.
    pub fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let peer = stream.peer_addr()?.to_string();
        let (reader, writer) = stream.into_split();
        Ok(Self { reader: Box::new(reader), writer: Box::new(writer), peer })
    }

    /// A unix socket; `peer` names the other end in messages.
    pub fn unix(stream: UnixStream, peer: impl Into<String>) -> Self {
        let (reader, writer) = stream.into_split();
        Self { reader: Box::new(reader), writer: Box::new(writer), peer: peer.into() }
    }

    /// Any other stream (TLS, a pipe in a test).
    pub fn new(stream: impl AsyncRead + AsyncWrite + Send + 'static, peer: impl Into<String>) -> Self {
        let (reader, writer) = tokio::io::split(stream);
        Self { reader: Box::new(reader), writer: Box::new(writer), peer: peer.into() }
    }

    /// The same, with a limit on how fast it sends.
    pub fn limited(self, limit: Limit) -> Self {
        Self { writer: Box::new(Limited::new(self.writer, limit)), ..self }
    }

    /// The other end, for messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }
}

/// Why nothing more can be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The system's error.
    #[error("the connection to {peer} failed: {source}")]
    Io {
        /// The other end.
        peer: String,
        /// The error.
        source: io::Error,
    },
    /// The peer closed in the middle of a frame.
    #[error("{peer} closed the connection in the middle of a message")]
    Cut {
        /// The other end.
        peer: String,
    },
    /// Nothing came for too long.
    #[error("nothing was heard from {peer} for {}: it hangs, or the network is cut", secs(.silence))]
    Silent {
        /// The other end.
        peer: String,
        /// How long.
        silence: Duration,
    },
    /// The peer sent something that is no frame of the protocol.
    #[error("{peer} broke the protocol: {source}")]
    Frame {
        /// The other end.
        peer: String,
        /// What it sent.
        source: FrameError,
    },
}

fn secs(duration: &Duration) -> String {
    format!("{} s", duration.as_secs_f64())
}

impl From<LinkError> for Failure {
    fn from(error: LinkError) -> Self {
        let code = match error {
            LinkError::Frame { .. } => FailureCode::Protocol,
            LinkError::Io { .. } | LinkError::Cut { .. } | LinkError::Silent { .. } => FailureCode::Disconnected,
        };
        Failure::new(code, error.to_string())
    }
}
