//! Transfer: the needed set of an open fleece, read and handed to the client as events.
//!
//! Disk by disk, in ascending order, in pieces of up to 1 MiB with several reads under way. What the client acknowledges is
//! discarded from the fleece, so that the guest's writes there cost nothing any more and the scratch shrinks. Bytes in
//! flight are bounded by the source; a client that stops reading stops the reader, and the scratch's limits end it.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::mpsc;

use super::Transport;
use super::compare::{Compared, Expected, Out, Read, hash};
use super::fleece::Fleece;
use super::internal;
use super::pace::Pace;
use super::reach::reach;
use crate::block::{BlockSource, Reading, SourceError, SourceRules};
use crate::checkpoint::Bitmap;
use crate::extent::Extent;
use crate::limits::{MAX_DISCARD_BYTES, MAX_READ_BYTES};
use crate::machine::Disk;
use crate::monitor::Monitor;
use crate::nbd::{self, NbdSource, SourceOptions};
use crate::units::{GRANULE_BYTES, MIB};
use crate::vhost::VhostSource;
use crate::wire::message::{Event, Failure, FailureCode};

/// Bytes in flight of one session, shared by its disks.
const IN_FLIGHT_BYTES: u64 = 32 * MIB;
/// Bytes in flight of one disk.
const DISK_IN_FLIGHT_BYTES: u64 = 16 * MIB;
/// Reads under way at once: so many for the sake of short ones, with which both sides then wake each other less often. Long
/// ones are bounded by the bytes in flight.
const READS: usize = 48;

/// Longest request over NBD, where no boundary is nearer: beside one of 64 KiB it took a full of 1.5 GiB (over two connections, QEMU 10,
/// all in memory) from 2.7 s to 2.3 s, and QEMU's processor time from 1.75 s to 1.35 s; 1 MiB is no better.
const NBD_REQUEST_BYTES: u64 = 256 << 10;

/// A source of either transport, to be closed in its own way.
pub enum Source {
    /// Closed before its export is deleted.
    Vhost(VhostSource),
    /// Closed after its export is deleted.
    Nbd(NbdSource),
}

impl Source {
    fn block(&self) -> &dyn BlockSource {
        match self {
            Source::Vhost(source) => source,
            Source::Nbd(source) => source,
        }
    }
}

/// What must be read of a disk.
pub struct Needed {
    /// In whole chunks.
    pub bitmap: Bitmap,
    /// What of it is compared with what the client knows.
    pub compared: Compared,
}

/// A disk that is ready to be read.
pub struct ReadyDisk {
    /// Where its bytes come from.
    pub source: Arc<Source>,
    /// What must be read, in whole chunks.
    pub needed: Bitmap,
    /// What of it may be something else than zeroes, in whole chunks.
    pub data: Bitmap,
    /// What of it is compared with what the client knows.
    compared: Compared,
    /// Chunk size of the client.
    pub chunk_bytes: u64,
    /// Whether the source takes discards.
    discards: bool,
    name: String,
    /// How fast it is read.
    pace: Arc<Pace>,
}

impl ReadyDisk {
    /// Some bytes of the disk at the instant, at most [`MAX_READ_BYTES`], which the fleece must have.
    pub async fn bytes(&self, extent: Extent) -> Result<Bytes, Failure> {
        self.source.block().read(extent).await.map_err(|e| broken(&self.name, &e))
    }

    /// Leaves out some whole chunks: they are sent as zeroes, and what of them the client has as zeroes (`lacks`) not at all.
    pub async fn leave_out(&mut self, chunks: Extent, lacks: &[Extent]) {
        self.data.clear(chunks);
        self.compared.forget(chunks.offset_bytes / self.chunk_bytes..chunks.end().div_ceil(self.chunk_bytes));
        self.needed.set(chunks);
        let (chunk_bytes, size_bytes) = (self.chunk_bytes, self.needed.size_bytes());
        let zero = lacks.iter().filter_map(|extent| extent.whole_chunks(chunk_bytes, size_bytes));
        zero.filter_map(|zero| zero.shared(chunks)).for_each(|both| self.needed.clear(both));
        self.discard(chunks).await;
    }

    /// Lets the fleece forget these bytes, as far as they are whole granules.
    pub async fn discard(&self, extent: Extent) {
        let Some(granules) = self.granules(extent).filter(|_| self.discards) else { return };
        for piece in granules.split_at_multiples(MAX_DISCARD_BYTES) {
            if let Err(error) = self.source.block().discard(piece).await {
                // The fleece goes on copying there: slower, not wrong.
                tracing::debug!(disk = self.name, "a discard failed: {error}");
            }
        }
    }

    /// The whole granules of an extent, without the disk's last one if that is cut.
    fn granules(&self, extent: Extent) -> Option<Extent> {
        let start = extent.offset_bytes.checked_next_multiple_of(GRANULE_BYTES)?;
        let end = extent.end().min(self.needed.size_bytes()) / GRANULE_BYTES * GRANULE_BYTES;
        (start < end).then(|| Extent::between(start, end))
    }
}

/// A disk that QEMU shows as it was at the instant. All disks are shown before the first is connected: QEMU 10 takes all exports
/// out of their I/O contexts for a moment whenever a block node or an export is added or removed, and may close the connection
/// to one in an I/O thread then, or worse (see [`vhost`](crate::vhost)).
pub struct ShownDisk {
    disk: Disk,
    export: Export,
    needed: Needed,
    data: Bitmap,
    rules: SourceRules,
}

enum Export {
    Vhost(PathBuf),
    Nbd(PathBuf, String),
}

/// Shows a disk over the transport that this QEMU and the options allow.
pub async fn show(
    fleece: &mut Fleece,
    i: usize,
    needed: Needed,
    chunk_bytes: u64,
    transport: Transport,
) -> Result<ShownDisk, Failure> {
    let disk = fleece.disks[i].plan.disk.clone();
    let capabilities = fleece.bench().capabilities.clone();
    let node = fleece.show(i).await?;
    let mut data = fleece.data(i, &node, &needed.bitmap).await?;
    data.round_out(chunk_bytes);
    let count = fleece.disks.len() as u64;
    let rules = SourceRules {
        boundary_bytes: capabilities.snapshot_boundary_bytes,
        in_flight_bytes: (IN_FLIGHT_BYTES / count).clamp(2 * MIB, DISK_IN_FLIGHT_BYTES),
    };
    if transport == Transport::Vhost && !capabilities.vhost_user_blk {
        return Err(Failure::new(
            FailureCode::Qemu,
            format!(
                "this QEMU ({}) has no vhost-user-blk exports, and no other transport is allowed",
                capabilities.version
            ),
        ));
    }
    // A stop of the guest by its owner may kill a QEMU with such an export of a disk in an iothread, see `vhost`.
    let is_risky = disk.iothread && capabilities.nbd_safe_in_iothread;
    let nbd_can = capabilities.nbd_export && !capabilities.nbd_server_running;
    let avoided = transport == Transport::Auto && is_risky && nbd_can;
    let export = if capabilities.vhost_user_blk && transport != Transport::Nbd && !avoided {
        Export::Vhost(fleece.export_vhost(i, &node).await?)
    } else {
        if disk.iothread && !capabilities.nbd_safe_in_iothread {
            return Err(Failure::new(
                FailureCode::Qemu,
                format!(
                    "disk {} runs in an iothread, and this QEMU ({}) aborts when a reader of such a disk's NBD export goes \
                     away; leave it out with --exclude {}, use QEMU 10, or a QEMU with vhost-user-blk exports",
                    disk.name, capabilities.version, disk.name
                ),
            ));
        }
        let (socket, name) = fleece.export_nbd(i, &node).await?;
        Export::Nbd(socket, name)
    };
    Ok(ShownDisk { disk, export, needed, data, rules })
}

impl ShownDisk {
    /// Opens the disk's source.
    pub async fn connect(self, monitor: &Monitor, chunk_bytes: u64, pace: Arc<Pace>) -> Result<ReadyDisk, Failure> {
        let Self { disk, export, needed: Needed { bitmap: needed, compared }, data, rules } = self;
        let source = match export {
            Export::Vhost(socket) => {
                let connect = if disk.read_only { VhostSource::connect_read_only } else { VhostSource::connect };
                let size_bytes = disk.size_bytes;
                let connected = tokio::task::spawn_blocking(move || connect(&socket, size_bytes, rules)).await;
                Source::Vhost(connected.map_err(internal)?.map_err(internal)?)
            }
            Export::Nbd(socket, export) => {
                let options = SourceOptions {
                    address: nbd::Address::Unix(socket),
                    export,
                    connections: 2,
                    rules,
                    request_bytes: Some(rules.boundary_bytes.min(NBD_REQUEST_BYTES)),
                    connect: Default::default(),
                };
                Source::Nbd(reach(monitor, || NbdSource::open(&options)).await?)
            }
        };
        let (source, discards, name) = (Arc::new(source), !disk.read_only, disk.name);
        Ok(ReadyDisk { source, needed, data, compared, chunk_bytes, discards, name, pace })
    }
}

/// A run of the needed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    Data(Extent),
    Zero(Extent),
}

/// The needed set, in order, cut into what is read and what is known to be zero. Made as it is asked for: a large disk in
/// small pieces has millions of runs.
fn runs<'a>(needed: &'a Bitmap, data: &'a Bitmap) -> impl Iterator<Item = Run> + use<'a> {
    let mut needs = needed.extents();
    let mut data = data.extents().peekable();
    let mut left: Option<Extent> = None;
    std::iter::from_fn(move || {
        let need = left.take().or_else(|| needs.next())?;
        let at = need.offset_bytes;
        while data.peek().is_some_and(|d| d.end() <= at) {
            data.next();
        }
        let run = match data.peek() {
            Some(d) if d.offset_bytes <= at => Run::Data(Extent::between(at, d.end().min(need.end()))),
            Some(d) => Run::Zero(Extent::between(at, d.offset_bytes.min(need.end()))),
            None => Run::Zero(need),
        };
        let (Run::Data(extent) | Run::Zero(extent)) = run;
        left = (extent.end() < need.end()).then(|| Extent::between(extent.end(), need.end()));
        Some(run)
    })
}

/// Cuts data into what one read may ask for.
fn pieces(run: Run) -> impl Iterator<Item = Run> {
    let (Run::Data(extent) | Run::Zero(extent)) = run;
    let longest = match run {
        Run::Data(_) => MAX_READ_BYTES,
        Run::Zero(_) => u64::MAX,
    };
    extent.split_at_multiples(longest).map(move |piece| match run {
        Run::Data(_) => Run::Data(piece),
        Run::Zero(_) => Run::Zero(piece),
    })
}

/// What was sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sent {
    /// As data.
    pub data_bytes: u64,
    /// As zeroes.
    pub zero_bytes: u64,
    /// Not at all: the client has it.
    pub same_bytes: u64,
}

/// Sends what is `needed` of one disk. `sent` is told of every event.
pub async fn send(
    ready: &ReadyDisk,
    disk: u16,
    needed: &Bitmap,
    expected: &mut Expected,
    events: &mpsc::Sender<Result<Event, Failure>>,
    sent: impl FnMut(Sent),
) -> Result<(), Failure> {
    let runs = futures_util::stream::iter(runs(needed, &ready.data).flat_map(pieces));
    let started = runs.then(|run| start(ready, run)).boxed();
    let mut reads = started.map(|started| read(ready, started)).buffered(READS).boxed();
    let mut out = Out::new(disk, &ready.name, ready.chunk_bytes, events, sent);
    while let Some(read) = reads.next().await {
        match &ready.compared {
            Compared::Nothing => out.whole(read?).await?,
            Compared::All => out.scanned(read?, expected).await?,
            Compared::Some(audit) => out.audited(read?, audit).await?,
        }
    }
    out.finish().await
}

/// What is under way of a run, if it is data.
type Started<'a> = Result<(Extent, Option<Reading<'a>>), Failure>;

/// In its turn: see [`BlockSource::start`].
async fn start(ready: &ReadyDisk, run: Run) -> Started<'_> {
    let extent = match run {
        Run::Zero(extent) => return Ok((extent, None)),
        Run::Data(extent) => extent,
    };
    ready.pace.turn(extent.len_bytes).await;
    let reading = ready.source.block().start(extent).await.map_err(|e| broken(&ready.name, &e))?;
    Ok((extent, Some(reading)))
}

async fn read(ready: &ReadyDisk, started: Started<'_>) -> Result<Read, Failure> {
    let (extent, reading) = started?;
    let Some(reading) = reading else { return Ok(Read { extent, bytes: None, digests: vec![] }) };
    let bytes = reading.await.map_err(|e| broken(&ready.name, &e))?;
    if is_zero(&bytes) {
        return Ok(Read { extent, bytes: None, digests: vec![] });
    }
    let chunks = extent.offset_bytes / ready.chunk_bytes..extent.end().div_ceil(ready.chunk_bytes);
    if !ready.compared.wants(chunks) {
        return Ok(Read { extent, bytes: Some(bytes), digests: vec![] });
    }
    let (bytes, digests) = hash(bytes, ready.chunk_bytes).await?;
    Ok(Read { extent, bytes: Some(bytes), digests })
}

/// Whether all bytes are zero. Reads words from the front, so that data is told from its first bytes.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(4096).all(|piece| piece.iter().fold(0, |seen, byte| seen | byte) == 0)
}

fn broken(disk: &str, error: &SourceError) -> Failure {
    Failure::new(
        FailureCode::Broken,
        format!(
            "the point in time of disk {disk} was lost ({error}): its scratch was full or too slow, somebody changed the \
             disk's chain, or the disk cannot be read there (the host's log says so then); the guest was not harmed; run the \
             backup again, with --scratch on a faster or larger file system"
        ),
    )
}

/// The client went away.
pub fn left() -> Failure {
    Failure::new(FailureCode::Disconnected, "the client left before it had everything")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_cover_the_needed_set_and_read_all_data(
            size in 1u64..(1 << 22), needed in prop::collection::vec((0u64..64, 1u64..8), 0..12),
            data in prop::collection::vec((0u64..64, 1u64..8), 0..12),
        ) {
            let bitmap = |list: &[(u64, u64)]| {
                let mut b = Bitmap::new(size);
                list.iter().for_each(|(at, len)| b.set(Extent::new(at * GRANULE_BYTES, len * GRANULE_BYTES)));
                b
            };
            let (needed, data) = (bitmap(&needed), bitmap(&data));
            let (mut covered, mut at) = (Bitmap::new(size), 0);
            for run in runs(&needed, &data) {
                let (Run::Data(extent) | Run::Zero(extent)) = run;
                prop_assert!(extent.len_bytes > 0 && extent.offset_bytes >= at);
                at = extent.end();
                covered.set(extent);
                match run {
                    Run::Data(e) => prop_assert!(e.split_at_multiples(GRANULE_BYTES).all(|g| data.is_set(g.offset_bytes))),
                    Run::Zero(e) => prop_assert!(!data.intersects(e)),
                }
            }
            prop_assert_eq!(covered, needed);
        }
    }
}
