//! Rate: how fast bytes may go, for who shares a line with others.
//!
//! A bucket fills at the rate, up to a burst. Taking more than it has is allowed, and paid for by waiting afterwards: so a piece of
//! any size goes whole, and over any time not more than `burst + rate × time` and one piece have gone.
//!
//! A server's limit is for all that it sends together; whoever sends takes turns by waiting.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::AsyncWrite;
use tokio::time::{Instant, Sleep, sleep};

use crate::units::{KIB, MIB};

/// Lowest rate of one backup: slower than this, its other end would take it for stuck.
pub const MIN_RATE: u64 = 64 * KIB;
/// Lowest rate of a server, which many may share.
pub const MIN_SHARED_RATE: u64 = MIB;
/// Most that is written at once under a limit.
const PIECE_BYTES: usize = 64 * KIB as usize;
/// For so long a time a bucket fills.
const BURST: Duration = Duration::from_millis(100);

/// A bucket. Pure: it is told what time it is.
#[derive(Debug)]
struct Bucket {
    bytes_per_s: u64,
    /// When it would be empty of debts.
    clear: Instant,
}

impl Bucket {
    /// Takes bytes; says how long to wait before the next.
    fn take(&mut self, now: Instant, bytes: u64) -> Duration {
        let full = now.checked_sub(BURST).unwrap_or(now);
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_s);
        self.clear = self.clear.max(full) + Duration::from_nanos(nanos.min(u64::MAX.into()) as u64);
        self.clear.saturating_duration_since(now)
    }
}

/// A limit; clones share it.
#[derive(Clone, Debug)]
pub struct Limit(Arc<Mutex<Bucket>>);

impl Limit {
    /// So many bytes a second (at least one).
    pub fn new(bytes_per_s: u64) -> Self {
        Self(Arc::new(Mutex::new(Bucket { bytes_per_s: bytes_per_s.max(1), clear: Instant::now() })))
    }

    fn take(&self, bytes: u64) -> Duration {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now(), bytes)
    }

    /// Notes that bytes have gone, and waits until more may.
    pub async fn pass(&self, bytes: u64) {
        let wait = self.take(bytes);
        if !wait.is_zero() {
            sleep(wait).await;
        }
    }
}

/// A writer under a limit.
pub(super) struct Limited<W> {
    inner: W,
    limit: Limit,
    wait: Option<Pin<Box<Sleep>>>,
}

impl<W> Limited<W> {
    pub(super) fn new(inner: W, limit: Limit) -> Self {
        Self { inner, limit, wait: None }
    }
}

impl<W: AsyncWrite + Unpin> Limited<W> {
    /// Writes once there is leave to.
    fn poll_limited(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut W>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if let Some(wait) = &mut self.wait {
            ready!(wait.as_mut().poll(cx));
            self.wait = None;
        }
        let written = ready!(write(Pin::new(&mut self.inner), cx))?;
        let wait = self.limit.take(written as u64);
        self.wait = (!wait.is_zero()).then(|| Box::pin(sleep(wait)));
        Poll::Ready(Ok(written))
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Limited<W> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let piece = &bytes[..bytes.len().min(PIECE_BYTES)];
        self.get_mut().poll_limited(cx, |inner, cx| inner.poll_write(cx, piece))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let first = slices.iter().find(|slice| !slice.is_empty()).map_or(&[][..], |slice| &slice[..]);
        self.poll_write(cx, first)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    proptest! {
        #[test]
        fn never_more_than_the_rate_allows(
            rate in 1u64..1 << 32, pieces in prop::collection::vec((1u64..1 << 21, 0u64..200), 1..60),
        ) {
            let start = Instant::now();
            let mut bucket = Bucket { bytes_per_s: rate, clear: start };
            let (mut now, mut gone, mut largest) = (start, 0, 0);
            for (bytes, idle_ms) in pieces {
                let elapsed = now.duration_since(start).as_secs_f64() + BURST.as_secs_f64();
                prop_assert!(gone as f64 <= elapsed * rate as f64 * 1.000_001 + largest as f64 + 1.0);
                let wait = bucket.take(now, bytes);
                (gone, largest) = (gone + bytes, largest.max(bytes));
                now += wait + Duration::from_millis(idle_ms);
            }
        }
    }

    #[tokio::test]
    async fn a_limited_writer_writes_all_of_it_and_not_too_soon() {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let mut writer = Limited::new(near, Limit::new(8 * MIB));
        let start = Instant::now();
        let sent: Vec<u8> = (0..3 << 20).map(|i| (i >> 8) as u8).collect();
        let expected = sent.clone();
        let reading = tokio::spawn(async move {
            let mut got = vec![0; expected.len()];
            far.read_exact(&mut got).await.unwrap();
            got == expected
        });
        writer.write_all(&sent).await.unwrap();
        writer.flush().await.unwrap();
        assert!(reading.await.unwrap());
        // Later is always possible. A burst and a piece go at once.
        assert!(start.elapsed() >= Duration::from_millis(250), "{:?}", start.elapsed());
    }
}
