//! Writes frames to a stream, several in one system call, without copying a payload. A call that is cancelled loses
//! nothing: the writer keeps what is left of a frame.

use std::collections::VecDeque;
use std::io::{self, IoSlice};

use tokio::io::{AsyncWrite, AsyncWriteExt};

use super::frame::Encoded;
use super::link::LinkError;
use crate::limits::MAX_READ_BYTES;

/// Frames that go into one system call at most, each with its head and body.
const FRAMES_AT_ONCE: usize = 32;

/// Writes frames.
pub struct FrameWriter {
    inner: Box<dyn AsyncWrite + Send + Unpin>,
    peer: String,
    queue: VecDeque<Encoded>,
    queued_bytes: usize,
    /// Bytes of the first frame in the queue that are out.
    begun_bytes: usize,
}

impl FrameWriter {
    /// Writes to `writer`.
    pub fn new(writer: Box<dyn AsyncWrite + Send + Unpin>, peer: String) -> Self {
        Self { inner: writer, peer, queue: VecDeque::new(), queued_bytes: 0, begun_bytes: 0 }
    }

    /// Puts a frame behind those that wait.
    pub fn push(&mut self, frame: Encoded) {
        self.queued_bytes += frame.len_bytes();
        self.queue.push_back(frame);
    }

    /// Whether enough waits to fill a system call.
    pub fn is_full(&self) -> bool {
        self.queue.len() >= FRAMES_AT_ONCE || self.queued_bytes >= MAX_READ_BYTES as usize
    }

    /// Writes all that waits. May be cancelled and called again.
    pub async fn flush(&mut self) -> Result<(), LinkError> {
        while !self.queue.is_empty() {
            let mut slices = [IoSlice::new(&[]); 2 * FRAMES_AT_ONCE];
            let mut used = 0;
            let mut skip = self.begun_bytes;
            for part in self.queue.iter().take(FRAMES_AT_ONCE).flat_map(|f| [f.head(), &f.body()[..]]) {
                let left = &part[skip.min(part.len())..];
                skip -= part.len() - left.len();
                if !left.is_empty() {
                    slices[used] = IoSlice::new(left);
                    used += 1;
                }
            }
            let written = self.inner.write_vectored(&slices[..used]).await;
            let written = written.and_then(|n| if n == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(n) });
            let n = written.map_err(|source| LinkError::Io { peer: self.peer.clone(), source })?;
            self.wrote(n);
        }
        self.inner.flush().await.map_err(|source| LinkError::Io { peer: self.peer.clone(), source })
    }

    fn wrote(&mut self, n: usize) {
        self.begun_bytes += n;
        self.queued_bytes -= n;
        while let Some(first) = self.queue.front().filter(|f| f.len_bytes() <= self.begun_bytes) {
            self.begun_bytes -= first.len_bytes();
            self.queue.pop_front();
        }
    }

    /// Writes what waits and says that nothing more comes.
    pub async fn close(&mut self) -> Result<(), LinkError> {
        self.flush().await?;
        self.inner.shutdown().await.map_err(|source| LinkError::Io { peer: self.peer.clone(), source })
    }
}
