//! The one task that sends a session's replies.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::Server;
use super::session::Ended;

/// Replies that are put into one write where they wait.
const AT_ONCE: usize = 16;

/// Bytes to send, and what is given back when they are sent.
pub(super) struct Reply {
    pub bytes: Vec<Bytes>,
    pub _held: Option<Held>,
}

/// Room that is taken: of the connection, and of the server.
pub(super) struct Held {
    pub connection: OwnedSemaphorePermit,
    pub server: OwnedSemaphorePermit,
}

impl Held {
    /// The share of `len` bytes, to be given back by itself.
    pub fn split(&mut self, len: usize) -> Option<Held> {
        Some(Held { connection: self.connection.split(len)?, server: self.server.split(len)? })
    }
}

/// Pieces of memory that are sent one after the other.
#[derive(Default)]
struct Segments(VecDeque<Bytes>);

impl Segments {
    fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.0.push_back(bytes);
        }
    }
}

impl Buf for Segments {
    fn remaining(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }

    fn chunk(&self) -> &[u8] {
        self.0.front().map_or(&[], |first| first)
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [io::IoSlice<'a>]) -> usize {
        let filled = slices.iter_mut().zip(&self.0);
        filled.map(|(slice, bytes)| *slice = io::IoSlice::new(bytes)).count()
    }

    fn advance(&mut self, mut n: usize) {
        while let Some(first) = self.0.front_mut()
            && n > 0
        {
            let some = n.min(first.len());
            first.advance(some);
            n -= some;
            if first.is_empty() {
                self.0.pop_front();
            }
        }
    }
}

/// Sends what is queued until nothing more can come.
pub(super) async fn write_replies<W>(
    mut stream: W,
    mut replies: mpsc::Receiver<Reply>,
    server: Arc<Server>,
) -> Result<(), Ended>
where
    W: AsyncWrite + Unpin,
{
    let patience = server.options.patience;
    let mut waiting = Vec::with_capacity(AT_ONCE);
    let mut segments = Segments::default();
    while replies.recv_many(&mut waiting, AT_ONCE).await > 0 {
        waiting.iter_mut().flat_map(|reply| reply.bytes.drain(..)).for_each(|bytes| segments.push(bytes));
        while segments.has_remaining() {
            match tokio::time::timeout(patience, stream.write_buf(&mut segments)).await {
                Ok(Ok(0)) => return Err(Ended::Io(io::ErrorKind::WriteZero.into())),
                Ok(written) => drop(written?),
                Err(_) if server.is_short_of_room() => return Err(Ended::Unread(patience)),
                Err(_) => {}
            }
        }
        stream.flush().await?;
        // Their room is given back.
        waiting.clear();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_one_stream() {
        let mut segments = Segments::default();
        ["abc", "", "de", "f"].into_iter().for_each(|text| segments.push(Bytes::from_static(text.as_bytes())));
        let mut slices = [io::IoSlice::new(&[]); 2];
        assert_eq!((segments.remaining(), segments.chunks_vectored(&mut slices)), (6, 2));
        assert_eq!((&*slices[0], &*slices[1]), (&b"abc"[..], &b"de"[..]));
        segments.advance(4);
        assert_eq!((segments.chunk(), segments.remaining()), (&b"e"[..], 2));
        segments.advance(2);
        assert!(!segments.has_remaining() && segments.chunk().is_empty());
    }
}
