//! vhost-user-blk block source: a disk's snapshot read from QEMU through shared memory.
//!
//! QEMU's `vhost-user-blk` export listens on a unix socket. Over it we agree on a ring of requests and lend QEMU a piece of
//! memory; then QEMU reads the disk straight into that memory and no byte passes through a socket. One reader at a time:
//! QEMU leaves a second one waiting until the first has gone.
//!
//! ```text
//!  futures ── inbox ──► reader thread ── ring + eventfd ──► QEMU ─┐ reads the disk
//!     ▲                      │                                    ▼
//!     └─ Bytes over a slot ◄─┴───────────────── slot of the pool (memfd, mapped by both)
//! ```
//!
//! * `link`: the connection, a handshake under a deadline, and a socket that shows QEMU's end.
//! * `pool`: the shared memory; a slot travels with the [`Bytes`] that a read returns.
//! * `worker`: the thread that owns the ring.
//!
//! **States**: connecting → open → gone. Once gone (QEMU died, the export was deleted, the ring makes no sense) every waiting
//! and later request fails with [`SourceError::Gone`]; a new source is needed. A QEMU that is merely stopped is waited
//! for without a limit: the caller knows how long it can wait.
//!
//! **Cancelling** a read drops its future. What QEMU has of it is completed first, and then the slot is free again.
//!
//! **Closing**: [`VhostSource::close`] returns when QEMU has closed its end too. Only then may the export be deleted from a QEMU
//! before 10 whose disk lives in an I/O thread: `block-export-del` with a reader connected, in either mode, stops its main
//! loop for good there (`vhost_user_server_stop` waits for the I/O thread and holds the lock that this thread needs). The
//! same happens when such a QEMU is told to quit while a reader is connected.
//!
//! **Crash**: when this process dies, QEMU sees the socket close, finishes what it has, and serves the next reader. That it
//! survives this is not given: `worker` says what must hold in the ring. [`wait_until_free`] takes the place of `close`.
//! Nothing of ours stays: the memory is anonymous, and the private socket's path is removed as soon as it is bound.
//!
//! **Faults of QEMU 10** that a reader cannot shut out. An export is drained, its I/O context taken away for a moment, when its
//! own nodes are (a device is unplugged or reset), and when any block node or export is added or removed
//! (`bdrv_graph_wrlock`). Three things may go wrong there (`vhost-user-server.c`):
//! * With the handshake's `SET_VRING_KICK` in the socket, not yet read, QEMU dies: it watches the descriptor in a context that is
//!   not there. The message is there for some 50 us of each connection; an unplug aimed at the handshake met it once in 100.
//! * An export in an I/O thread may close the connection, when its thread finds no context and then, an instant later, one.
//!   Eight nodes and exports that came and went meanwhile met that once in 90 backups.
//! * An export in an I/O thread is drained, too, when the guest is stopped by whoever runs it (`stop`, `virsh suspend`, a migration).
//!   About one `stop` in a hundred during a backup killed QEMU 10.0 (SIGSEGV); without an I/O thread none in a hundred did, nor
//!   one over NBD. So a disk in an I/O thread of QEMU 10 is read over NBD where that can be had.
//!
//! So nothing is added to QEMU or removed from it from the first connection of a session until the last is closed.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blkio::{Blkio, Blkioq, MemoryRegion};
use bytes::Bytes;
use tokio::sync::oneshot;

use crate::block::{BlockSource, BoxFuture, Reading, SourceError, SourceRules};
use crate::extent::Extent;
use crate::limits::{MAX_DISCARD_BYTES, MAX_DISK_BYTES, MAX_READ_BYTES};
use crate::units::{GIB, GRANULE_BYTES};

use link::{PrivateSocket, RelayEnd};
use pool::Pool;
use worker::{Command, Inbox, Kind, Parts, RING_ENTRIES, Worker};

mod link;
mod pool;
mod worker;

/// What errors call this transport.
const TRANSPORT: &str = "vhost-user-blk";
/// The unit of the ring's offsets and lengths.
const SECTOR_BYTES: u64 = 512;
/// How long a connection may take until the first read can be sent.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long QEMU may take to let go of a reader that leaves.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// The shortest pool: the longest read, which may have to be widened to whole sectors at both ends.
const MIN_POOL_BYTES: u64 = MAX_READ_BYTES + GRANULE_BYTES;
/// The longest pool.
const MAX_POOL_BYTES: u64 = 4 * GIB;

const _: () = assert!(MAX_READ_BYTES + 2 * SECTOR_BYTES <= MIN_POOL_BYTES);
const _: () = assert!(GRANULE_BYTES.is_multiple_of(SECTOR_BYTES));

/// Why there is no connection to an export.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// The rules make no sense.
    #[error(
        "cannot read under {rules:?}: the boundary must be a multiple of {GRANULE_BYTES}, \
         and {MAX_READ_BYTES} to {MAX_POOL_BYTES} bytes must be allowed in flight"
    )]
    Rules {
        /// What was asked for.
        rules: SourceRules,
    },
    /// The size makes no sense.
    #[error("a disk of {size_bytes} bytes cannot be read: not a multiple of 512, or larger than {MAX_DISK_BYTES}")]
    BadSize {
        /// What was expected.
        size_bytes: u64,
    },
    /// The system has no memory, descriptor or thread for us.
    #[error("cannot {what} for reading a disk: {source}")]
    Resources {
        /// What failed.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Nobody listens.
    #[error("cannot connect to the vhost-user-blk export at {socket}: {source}; is the export still there?")]
    Connect {
        /// Its socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody listens, but does not answer.
    #[error(
        "the vhost-user-blk export did not answer within {waited:?}: QEMU is stopped or busy, \
         or another reader holds the export (it serves one at a time)"
    )]
    NoAnswer {
        /// How long we waited.
        waited: Duration,
    },
    /// QEMU, or what poses as it, refused us or does not speak the protocol.
    #[error("the handshake with the vhost-user-blk export failed: {reason}; it must be a writable export of this QEMU")]
    Handshake {
        /// What was seen.
        reason: String,
    },
    /// The export is of another size than the disk.
    #[error(
        "the vhost-user-blk export has {found} bytes and the disk has {expected}: it was resized, or is another disk's"
    )]
    Size {
        /// Size of the disk.
        expected: u64,
        /// Size of the export.
        found: u64,
    },
}

/// QEMU did not let go of a reader that left.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "QEMU did not let go of the reader of its vhost-user-blk export within {CLOSE_TIMEOUT:?}: \
     leave the export alone until it is back"
)]
pub struct StillHeld;

/// What an export allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Writable,
    ReadOnly,
}

/// One disk's snapshot, read over vhost-user-blk.
///
/// Dropping it ends the connection in the background; [`VhostSource::close`] waits.
pub struct VhostSource {
    size_bytes: u64,
    pool: Arc<Pool>,
    inbox: Arc<Inbox>,
    /// Whether QEMU has let go; said when the thread has let go of everything.
    ended: Option<oneshot::Receiver<bool>>,
}

impl VhostSource {
    /// Connects to the export that listens at `socket`, which must have exactly `size_bytes`, within [`CONNECT_TIMEOUT`].
    /// Blocks.
    pub fn connect(socket: &Path, size_bytes: u64, rules: SourceRules) -> Result<VhostSource, VhostError> {
        Self::connect_within(CONNECT_TIMEOUT, socket, size_bytes, rules)
    }

    /// As [`VhostSource::connect`], for an export that is not writable; it takes no discards.
    pub fn connect_read_only(socket: &Path, size_bytes: u64, rules: SourceRules) -> Result<VhostSource, VhostError> {
        Self::dial(CONNECT_TIMEOUT, socket, size_bytes, rules, Access::ReadOnly)
    }

    /// As [`VhostSource::connect`], with another limit.
    pub fn connect_within(
        timeout: Duration,
        socket: &Path,
        size_bytes: u64,
        rules: SourceRules,
    ) -> Result<VhostSource, VhostError> {
        Self::dial(timeout, socket, size_bytes, rules, Access::Writable)
    }

    fn dial(
        timeout: Duration,
        socket: &Path,
        size_bytes: u64,
        rules: SourceRules,
        access: Access,
    ) -> Result<VhostSource, VhostError> {
        let deadline = Instant::now() + timeout;
        let qemu = link::dial(socket, deadline).map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => VhostError::NoAnswer { waited: timeout },
            _ => VhostError::Connect { socket: socket.to_owned(), source },
        })?;
        let left = deadline.saturating_duration_since(Instant::now());
        Self::open(left, qemu, size_bytes, rules, access)
    }

    /// As [`VhostSource::connect_within`], over a connection to the export that is there already: for a listening socket
    /// that was passed to QEMU as a descriptor and may have no path any more.
    pub fn over(
        timeout: Duration,
        qemu: UnixStream,
        size_bytes: u64,
        rules: SourceRules,
    ) -> Result<VhostSource, VhostError> {
        Self::open(timeout, qemu, size_bytes, rules, Access::Writable)
    }

    fn open(
        timeout: Duration,
        qemu: UnixStream,
        size_bytes: u64,
        rules: SourceRules,
        access: Access,
    ) -> Result<VhostSource, VhostError> {
        let SourceRules { boundary_bytes, in_flight_bytes } = rules;
        if boundary_bytes == 0
            || !boundary_bytes.is_multiple_of(GRANULE_BYTES)
            || !(MAX_READ_BYTES..=MAX_POOL_BYTES).contains(&in_flight_bytes)
        {
            return Err(VhostError::Rules { rules });
        }
        if !size_bytes.is_multiple_of(SECTOR_BYTES) || size_bytes > MAX_DISK_BYTES {
            return Err(VhostError::BadSize { size_bytes });
        }
        let resources = |what| move |source| VhostError::Resources { what, source };
        let deadline = Instant::now() + timeout;
        let pool = Pool::new(in_flight_bytes.max(MIN_POOL_BYTES)).map_err(resources("share memory"))?;
        let (inbox, wake) = Inbox::new().map_err(resources("make a pipe"))?;
        let private = PrivateSocket::new().map_err(resources("make a private socket"))?;
        let (done, done_writer) = io::pipe().map_err(resources("make a pipe"))?;
        let (results, result) = mpsc::channel();
        let (sockets, both) = mpsc::channel::<(UnixStream, UnixStream)>();
        let (ends, ended) = oneshot::channel();

        let thread = {
            let (pool, inbox, path) = (pool.clone(), inbox.clone(), private.path());
            std::thread::Builder::new().name("vhost-reader".into()).spawn(move || {
                let (device, queue) = match handshake(&path, &pool, size_bytes, access) {
                    Ok(both) => both,
                    Err(error) => {
                        let _ = results.send(Err(error));
                        return;
                    }
                };
                let _ = results.send(Ok(()));
                drop(done_writer);
                // Without the sockets the connecting thread has given up.
                let Ok((private, qemu)) = both.recv() else { return };
                let parts = Parts { queue, device, inbox, wake, pool, private, qemu, boundary_bytes };
                let let_go = Worker::new(parts).run();
                let _ = ends.send(let_go);
            })
        };
        let thread = thread.map_err(resources("start a thread"))?;

        let error = match link::relay(private, &qemu, &done, deadline) {
            RelayEnd::Done(private) => match (result.recv(), private) {
                (Ok(Ok(())), Some(private)) => {
                    // The thread is the last to let go of its end of the channel.
                    let _ = sockets.send((private, qemu));
                    return Ok(VhostSource { size_bytes, pool, inbox, ended: Some(ended) });
                }
                (Ok(Err(error)), _) => error,
                (Ok(Ok(())), None) | (Err(_), _) => {
                    VhostError::Handshake { reason: "the reader ended before it was connected".into() }
                }
            },
            RelayEnd::TimedOut => VhostError::NoAnswer { waited: timeout },
            RelayEnd::HungUp => VhostError::Handshake { reason: "QEMU closed the connection".into() },
            RelayEnd::Failed(e) => VhostError::Handshake { reason: e.to_string() },
        };
        drop((sockets, qemu));
        join(thread);
        Err(error)
    }

    /// Ends the connection, and waits until QEMU has completed what it had in hand and closed its end, and nothing is left
    /// here but buffers that readers hold. Requests that QEMU has not been
    /// given yet fail. See the module's words on when this must be waited for.
    pub async fn close(mut self) -> Result<(), StillHeld> {
        self.inbox.stop();
        let Some(ended) = self.ended.take() else { return Ok(()) };
        // The thread keeps to its limit, unless a peer wrote such nonsense into the ring that blkio never comes back.
        match tokio::time::timeout(2 * CLOSE_TIMEOUT, ended).await {
            Ok(Ok(true)) => Ok(()),
            _ => Err(StillHeld),
        }
    }
}

/// Waits until no reader is connected to the export that listens at `socket`: for one that died, before its export is
/// deleted (see the module's words). Blocks.
pub fn wait_until_free(socket: &Path, timeout: Duration) -> Result<(), VhostError> {
    let deadline = Instant::now() + timeout;
    let no_answer = VhostError::NoAnswer { waited: timeout };
    let connect = |source| VhostError::Connect { socket: socket.to_owned(), source };
    let qemu = link::dial(socket, deadline).map_err(connect)?;
    // QEMU takes us when the reader before us is gone, finds that we have left, and closes its end.
    if link::leave(&qemu, deadline).map_err(connect)? { Ok(()) } else { Err(no_answer) }
}

/// Waits for a thread that is about to end.
fn join(thread: JoinHandle<()>) {
    // It catches its panics, and what it had to say it said.
    let _ = thread.join();
}

/// Brings a device to where it can read, on the thread that will own it.
fn handshake(path: &Path, pool: &Pool, size_bytes: u64, access: Access) -> Result<(Blkio, Blkioq), VhostError> {
    let attempt = || -> Result<_, blkio::Error> {
        let mut device = Blkio::new("virtio-blk-vhost-user")?;
        device.set_str("path", &path.to_string_lossy())?;
        device.set_bool("read-only", access == Access::ReadOnly)?;
        device.connect()?;
        let found = device.get_u64("capacity")?;
        if found != size_bytes {
            return Ok(Err(VhostError::Size { expected: size_bytes, found }));
        }
        device.set_i32("num-queues", 1)?;
        device.set_i32("queue-size", RING_ENTRIES as i32)?;
        let mut outcome = device.start()?;
        device.map_mem_region(&MemoryRegion {
            addr: pool.address(),
            iova: 0,
            len: pool.len_bytes(),
            fd: pool.fd(),
            fd_offset: 0,
            flags: 0,
        })?;
        Ok(outcome
            .queues
            .pop()
            .map(|queue| (device, queue))
            .ok_or_else(|| VhostError::Handshake { reason: "it has no queue".into() }))
    };
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(attempt)) {
        Ok(Ok(result)) => result,
        Ok(Err(e)) => Err(VhostError::Handshake { reason: e.message().to_owned() }),
        Err(_) => Err(VhostError::Handshake { reason: "the answers make no sense".into() }),
    }
}

/// The whole sectors that hold `extent` (which is within the disk, a multiple of sectors long).
fn sectors(extent: Extent) -> Extent {
    let start = extent.offset_bytes / SECTOR_BYTES * SECTOR_BYTES;
    Extent::between(start, extent.end().next_multiple_of(SECTOR_BYTES))
}

impl BlockSource for VhostSource {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn start(&self, extent: Extent) -> BoxFuture<'_, Result<Reading<'_>, SourceError>> {
        Box::pin(async move {
            let size_bytes = self.size_bytes;
            if extent.len_bytes > MAX_READ_BYTES || !extent.fits(size_bytes) {
                return Err(SourceError::OutOfBounds { extent, size_bytes });
            }
            let (answer, answered) = oneshot::channel();
            if extent.len_bytes == 0 {
                let _ = answer.send(Ok(Bytes::new()));
            } else {
                let sectors = sectors(extent);
                let slot = self.pool.lend(sectors.len_bytes as usize).await.ok_or_else(|| self.inbox.gone())?;
                self.inbox.push(Command { sectors, kind: Kind::Read { slot, wanted: extent, answer } })?;
            }
            let reading: Reading<'_> =
                Box::pin(async move { answered.await.unwrap_or_else(|_| Err(self.inbox.gone())) });
            Ok(reading)
        })
    }

    fn discard(&self, extent: Extent) -> BoxFuture<'_, Result<(), SourceError>> {
        Box::pin(async move {
            let size_bytes = self.size_bytes;
            // Whole granules within the disk: so a last partial one is never touched. QEMU 7.2 hangs or aborts otherwise.
            let whole =
                extent.offset_bytes.is_multiple_of(GRANULE_BYTES) && extent.len_bytes.is_multiple_of(GRANULE_BYTES);
            if !whole || extent.len_bytes > MAX_DISCARD_BYTES || !extent.fits(size_bytes) {
                return Err(SourceError::OutOfBounds { extent, size_bytes });
            }
            if extent.len_bytes == 0 {
                return Ok(());
            }
            let (answer, answered) = oneshot::channel();
            self.inbox.push(Command { sectors: extent, kind: Kind::Discard { answer } })?;
            answered.await.unwrap_or_else(|_| Err(self.inbox.gone()))
        })
    }
}

impl Drop for VhostSource {
    fn drop(&mut self) {
        self.inbox.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_widened_to_sectors_and_no_further() {
        for (offset, len, start, end) in [(0, 512, 0, 512), (1, 1, 0, 512), (511, 2, 0, 1024), (512, 512, 512, 1024)] {
            assert_eq!(sectors(Extent::new(offset, len)), Extent::between(start, end));
        }
    }
}
