//! The sending end of a [trunk](super::trunk): a stream whose bytes are cut into parts, and the connections that take them.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncWrite;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use super::frame::{Encoded, MAX_PART_BYTES};
use super::link::LinkError;
use super::message::{Failure, FailureCode};
use super::pool::Pool;
use super::trunk::QUEUED_PARTS;
use super::writer::FrameWriter;

/// What the connections of one trunk share; clones are the same trunk.
#[derive(Clone, Debug, Default)]
pub(super) struct Lines(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// There is a part, or an end.
    more: Notify,
    /// Nothing more comes.
    closed: watch::Sender<bool>,
    lost: watch::Sender<Option<Failure>>,
    /// Connections that have something to carry yet.
    carrying: watch::Sender<usize>,
}

#[derive(Debug, Default)]
struct Queue {
    parts: VecDeque<Encoded>,
    /// The next part's.
    number: u64,
    /// Who waits for room.
    writer: Option<Waker>,
}

impl Lines {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stream to write to. When it is dropped before it was shut down, all is lost.
    pub fn spread(&self) -> Spread {
        Spread { lines: self.clone(), pool: Pool::default() }
    }

    /// For one more connection.
    pub fn line(&self) -> Line {
        Line { lines: self.clone() }
    }

    /// A connection is lost, and so are all; only the first word counts. Nothing can be written any more.
    pub fn fail(&self, failure: Failure) {
        self.0.lost.send_if_modified(|lost| {
            let first = lost.is_none();
            if first {
                *lost = Some(failure);
            }
            first
        });
        if let Some(writer) = self.queue().writer.take() {
            writer.wake();
        }
    }

    fn is_closed(&self) -> bool {
        *self.0.closed.borrow()
    }

    /// Resolves when nothing more comes, and all was well.
    pub async fn closed(&self) {
        // The sender lives as long as we do.
        let _ = self.0.closed.subscribe().wait_for(|closed| *closed).await;
    }

    /// Resolves when no connection carries anything any more.
    pub async fn carried(&self) {
        let _ = self.0.carrying.subscribe().wait_for(|count| *count == 0).await;
    }

    /// Why all is lost, if it is.
    pub fn reason(&self) -> Option<Failure> {
        self.0.lost.borrow().clone()
    }

    /// Resolves when a connection is lost.
    pub async fn lost(&self) -> Failure {
        let mut lost = self.0.lost.subscribe();
        let _ = lost.wait_for(Option::is_some).await;
        self.reason().unwrap_or_else(|| Failure::new(FailureCode::Disconnected, "the session's connections are gone"))
    }
}

/// One connection's end.
#[derive(Debug)]
pub(super) struct Line {
    lines: Lines,
}

impl Line {
    /// The trunk.
    pub fn lines(&self) -> &Lines {
        &self.lines
    }

    /// The next part; none when nothing more comes. May be cancelled and called again.
    async fn next(&self) -> Option<Encoded> {
        loop {
            // Made before the look, so that nothing is missed in between; and the last part was there before the end.
            let more = self.lines.0.more.notified();
            let closed = self.lines.is_closed();
            {
                let mut queue = self.lines.queue();
                if let Some(part) = queue.parts.pop_front() {
                    if let Some(writer) = queue.writer.take() {
                        writer.wake();
                    }
                    // One wake-up may have stood for two parts.
                    if !queue.parts.is_empty() {
                        self.lines.0.more.notify_one();
                    }
                    return Some(part);
                }
            }
            if closed {
                return None;
            }
            more.await;
        }
    }

    /// Writes parts as fast as they are taken, and signs of life in between; at the end that it is one, and nothing more.
    ///
    /// # Errors
    /// What happened to the connection.
    pub async fn carry(&self, writer: &mut FrameWriter, alive_every: Duration) -> Result<(), LinkError> {
        let _carrying = Carrying::new(&self.lines);
        loop {
            writer.flush().await?;
            let last = match timeout(alive_every, self.next()).await {
                Ok(Some(part)) => {
                    writer.push(part);
                    continue;
                }
                Ok(None) => Encoded::part(self.lines.queue().number, Bytes::new()),
                Err(_) => {
                    writer.push(Encoded::alive());
                    continue;
                }
            };
            last.into_iter().for_each(|last| writer.push(last));
            return writer.close().await;
        }
    }
}

/// Counts a connection among those that carry.
struct Carrying<'a>(&'a Lines);

impl<'a> Carrying<'a> {
    fn new(lines: &'a Lines) -> Self {
        lines.0.carrying.send_modify(|count| *count += 1);
        Self(lines)
    }
}

impl Drop for Carrying<'_> {
    fn drop(&mut self) {
        self.0.0.carrying.send_modify(|count| *count -= 1);
    }
}

/// The stream.
#[derive(Debug)]
pub(super) struct Spread {
    lines: Lines,
    pool: Pool,
}

impl Drop for Spread {
    fn drop(&mut self) {
        if !self.lines.is_closed() {
            self.lines.fail(Failure::new(FailureCode::Disconnected, "the session's first connection has ended"));
        }
    }
}

impl AsyncWrite for Spread {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // Before the look, so that who fails finds whom to wake.
        let mut queue = self.lines.queue();
        if self.lines.is_closed() || self.lines.0.lost.borrow().is_some() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if queue.parts.len() >= QUEUED_PARTS {
            queue.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let number = queue.number;
        queue.number += 1;
        // Nobody else writes.
        drop(queue);
        let len = slices.iter().map(|slice| slice.len()).sum::<usize>().min(MAX_PART_BYTES);
        let mut part = self.pool.take(len);
        let mut room = part.bytes_mut();
        for slice in slices {
            let (now, rest) = room.split_at_mut(slice.len().min(room.len()));
            now.copy_from_slice(&slice[..now.len()]);
            room = rest;
        }
        let part = Encoded::part(number, part.freeze()).map_err(io::Error::other)?;
        self.lines.queue().parts.push_back(part);
        self.lines.0.more.notify_one();
        Poll::Ready(Ok(len))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connections write as fast as they can anyway.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.lines.0.lost.borrow().is_some() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        self.lines.0.closed.send_replace(true);
        self.lines.0.more.notify_waiters();
        Poll::Ready(Ok(()))
    }
}
