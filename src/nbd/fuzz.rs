//! The decoders against any bytes: one function per fuzz target, also run by the tests.
//!
//! None needs a runtime: the stream is memory and never waits.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

use super::negotiate::{Export, Wanted, list_exports, negotiate};
use super::pool::Buffer;
use super::proto::CMD_READ;
use super::reader::{Ended, read_replies};
use super::server::handshake::shake_hands;
use super::server::request::{Asked, Terms, next_request};
use super::server::{Disk, MAX_READ_BYTES, Offer, Piece, Run};
use super::table::{Operation, Outcome, Part, Table, Work};
use crate::block::BoxFuture;
use crate::extent::Extent;

/// A peer that says these bytes and closes, and hears nothing.
struct Said<'a>(&'a [u8]);

impl AsyncRead for Said<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let (head, tail) = self.0.split_at(self.0.len().min(into.remaining()));
        into.put_slice(head);
        self.0 = tail;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Said<'_> {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn ready<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => unreachable!("memory never makes anybody wait"),
    }
}

/// A server's side of a whole negotiation for export `disk` with the context `qemu:dirty-bitmap:b`.
pub fn negotiation(server: &[u8]) -> Option<Export> {
    let wanted = Wanted { export: "disk".into(), contexts: vec![super::dirty_bitmap_context("b")] };
    ready(negotiate(&mut Said(server), "fuzz", &wanted)).ok()
}

/// A server's side of listing its exports; how many.
pub fn listing(server: &[u8]) -> Option<usize> {
    ready(list_exports(&mut Said(server), "fuzz")).ok().map(|found| found.len())
}

/// Length of the read that [`replies`] waits for, in two parts of half that.
pub const READ_BYTES: usize = 8192;

/// Replies to three operations: cookie 1<<16, a read of [`READ_BYTES`] from 4096 on in two parts (1<<16 and
/// 1<<16 | 1); 2<<16, a trim; 3<<16, the block status of context 1 over 1 MiB from 0 on. The first byte says whether
/// replies are structured. Returns the read's data if it was answered well, and how many operations were answered.
pub fn replies(server: &[u8]) -> (Option<Vec<u8>>, usize) {
    let Some((first, server)) = server.split_first() else { return (None, 0) };
    let table = Table::default();
    let half = READ_BYTES as u32 / 2;
    let read = Work::Read { buffer: Some(Buffer::plain(READ_BYTES)), offset: 4096 };
    let status = Work::Status { contexts: vec![1], found: vec![] };
    let works = [
        (read, vec![Part::new(4096, half), Part::new(4096 + u64::from(half), half)]),
        (Work::Plain, vec![Part::new(0, 65536)]),
        (status, vec![Part::new(0, 1 << 20)]),
    ];
    let answers = works.map(|(work, parts)| {
        let (reply, answer) = oneshot::channel();
        let left = parts.len();
        let _ = table.insert(Operation { work, parts, reply, places: None, left, failed: None });
        answer
    });
    let ended: Ended = ready(read_replies(Said(server), &table, first & 1 != 0));
    table.end(&ended.to_string());
    let mut data = None;
    let mut answered = 0;
    for mut answer in answers {
        match answer.try_recv() {
            Ok(Outcome::Read(buffer)) => {
                data = Some(buffer.into_vec());
                answered += 1;
            }
            Ok(Outcome::Status(found)) => {
                let total: u64 = found.iter().flat_map(|(_, d)| d).map(|(len, _)| u64::from(*len)).sum();
                assert!((1..=1 << 20).contains(&total));
                answered += 1;
            }
            Ok(Outcome::Done) => answered += 1,
            Ok(Outcome::Failed(errno, _)) => {
                assert_ne!(errno, 0);
                answered += 1;
            }
            Ok(Outcome::Gone(_)) => {}
            Err(e) => unreachable!("an operation without an end: {e}"),
        }
    }
    (data, answered)
}

/// Size of the disk that [`server`] offers.
pub const DISK_BYTES: u64 = (1 << 30) + 512;

/// A disk that nobody reads.
struct Unread;

impl Disk for Unread {
    fn size_bytes(&self) -> u64 {
        DISK_BYTES
    }
    fn preferred_bytes(&self) -> u32 {
        128 << 10
    }
    fn read(&self, _: Extent) -> BoxFuture<'_, Vec<Piece>> {
        Box::pin(std::future::ready(vec![]))
    }
    fn runs(&self, _: Extent, _: usize) -> BoxFuture<'_, Vec<Run>> {
        Box::pin(std::future::ready(vec![]))
    }
    fn expect(&self, _: Extent) {}
}

/// A client's side of a whole session with a server of the disk `disk`: its handshake and its requests. How many of them
/// were well formed, and how many of those would be done; nothing when it did not choose the disk.
pub fn server(client: &[u8]) -> Option<(usize, usize)> {
    let offers = [Offer { name: "disk".into(), description: "words".into(), disk: Arc::new(Unread) }];
    let mut stream = Said(client);
    let chosen = ready(shake_hands(&mut stream, &offers)).ok()??;
    assert_eq!(chosen.offer, 0);
    assert!(chosen.structured || !chosen.allocation);
    let terms = Terms { size_bytes: DISK_BYTES, structured: chosen.structured, allocation: chosen.allocation };
    let (mut heard, mut taken) = (0, 0);
    while let Ok((request, asked)) = ready(next_request(&mut stream, &terms)) {
        heard += 1;
        taken += usize::from(!matches!(asked, Asked::Refuse(..)));
        match asked {
            Asked::Read { extent, whole } => {
                assert!(request.command == CMD_READ && (terms.structured || !whole));
                assert!((1..=u64::from(MAX_READ_BYTES)).contains(&extent.len_bytes) && extent.fits(DISK_BYTES));
            }
            Asked::Status { extent, .. } => {
                assert!(terms.allocation && extent.len_bytes > 0 && extent.fits(DISK_BYTES));
            }
            Asked::Expect(extent) => assert!(extent.fits(DISK_BYTES)),
            Asked::Refuse(errno, why) => assert!(errno != 0 && !why.is_empty()),
            Asked::Disconnect => break,
            Asked::Flush => {}
        }
    }
    Some((heard, taken))
}
