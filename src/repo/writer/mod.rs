//! Writer: takes disks in and stores what is new of them.
//!
//! ```text
//!          jobs               results, put back in order             sealed packs
//! put ─────────► workers ───────────────────► one of them ────────────────► flusher ──► (disk, extents) durable
//!  ▲  permits    zero? hash, look up,         appends them    │ digests      flush, rename, journal,
//!  └─ in bytes   compress                     to data packs   └────► trees ──► index
//! ```
//!
//! * **Few hand-overs.** Small pieces come by the thousand, and waking a thread costs as much as hashing some of it: a job wakes
//!   one worker at most, results are appended by whichever worker is there, digests go to the trees in batches. There is one
//!   worker more than processors, for the one that waits for the file.
//!
//! * **Back-pressure counts bytes.** A `put` waits for room; the permit travels with the bytes and is given back when they
//!   are in a pack's file. The flusher lets two sealed packs wait, so a slow disk holds `put` up, not memory.
//! * **No copies.** With compression off, bytes go from the caller's buffer to the file. With compression on, the buffer
//!   is dropped as soon as all its chunks are compressed. If lent memory changes while it is held, what is stored does not
//!   match its digest, and a read says so.
//! * **Once.** A digest that is new is claimed under a lock by the earliest chunk in order (`claims`), so that two equal
//!   chunks in flight are stored once.
//! * **Durable** means: the pack is flushed, under its name, and in the journal. Chunks that were there before are durable
//!   at once; a duplicate of a chunk in flight is durable with it.
//! * **Failing.** The first error stops everything; every later call says it again. Durable packs stay in the journal for
//!   the next writer. Dropping a writer does the same, and ends the open pack first: what was put into it is not sent again.
//! * **Memory.** Bytes in flight (32 MiB unless told otherwise), what is known of digests since the last index file
//!   (about 20 MB), the open pack's directories, and a few MiB a thread for zstd.

use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::codec::Packed;
use crate::extent::Extent;
use crate::limits::{MAX_DISKS, MAX_READ_BYTES};
use crate::repo::digest::Digest;
use crate::repo::error::RepoError;
use crate::repo::index::heal;
use crate::repo::index::set::IndexSet;
use crate::repo::journal::{self, Journal};
use crate::repo::layout::Layout;
use crate::repo::lock::{self, Lock};
use crate::repo::reader::Reader;
use crate::repo::reader::image::processors;
use crate::repo::session_log::{SessionLog, encode_same};
use crate::repo::tree::Image;
use crate::repo::tree::build::Broken;
use crate::units::MIB;

mod append;
mod claims;
mod flush;
mod shared;
#[cfg(test)]
mod tests;
mod trees;
mod work;

use append::Append;
use shared::Shared;
use work::{Job, Jobs, What};

/// Whether chunks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// No.
    None,
    /// zstd at this level. What would not get 3 % smaller is stored as it is.
    Zstd(i32),
}

/// How a writer works.
#[derive(Clone, Copy, Debug)]
pub struct WriterOptions {
    /// Whether chunks are compressed. zstd 1 unless told otherwise.
    pub compression: Compression,
    /// Worker threads; 0 means one a processor, and one.
    pub threads: usize,
    /// Bytes that were put and are not in a pack yet, at most (at least 2 MiB are taken).
    pub in_flight_bytes: u32,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self { compression: Compression::Zstd(1), threads: 0, in_flight_bytes: 32 * MIB as u32 }
    }
}

/// A disk of a writer: index in [`Finished::disks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DiskHandle(pub u16);

/// What was done for one disk, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskStats {
    /// Given to `put`.
    pub data_bytes: u64,
    /// Given to `zero`, or found to be zero in what was put.
    pub zero_bytes: u64,
    /// Stored anew, before compression.
    pub new_bytes: u64,
    /// Stored anew, as it lies in packs.
    pub stored_bytes: u64,
}

/// A disk that was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FinishedDisk {
    /// Its content.
    pub image: Image,
    /// What was done for it.
    pub stats: DiskStats,
}

/// What a writer has made durable.
#[derive(Clone, Debug, Default)]
pub struct Finished {
    /// By handle.
    pub disks: Vec<FinishedDisk>,
    /// Tree nodes stored anew, as they lie in packs.
    pub tree_bytes: u64,
    /// Packs written.
    pub packs: u64,
    /// Packs of dead writers that were adopted at the start.
    pub adopted_packs: u64,
}

/// What has become durable: a disk, and some of its bytes (not in order).
pub type Durable = (DiskHandle, Vec<Extent>);

struct Intake {
    disks: Vec<(Image, u64)>,
    next_job: u64,
}

/// Stores disks. All methods take `&self` but [`Writer::finish`]; puts of one disk must come in order.
pub struct Writer {
    shared: Arc<Shared>,
    intake: Mutex<Option<Intake>>,
    jobs: Arc<Jobs>,
    append: Arc<Append>,
    trees: Mutex<Option<SyncSender<Vec<trees::Message>>>>,
    durable: Option<UnboundedReceiver<Durable>>,
    workers: Vec<JoinHandle<()>>,
    /// Those that end when nobody sends to them any more.
    threads: Vec<JoinHandle<()>>,
    adopted_packs: u64,
    _lock: Lock,
}

impl Writer {
    pub(crate) fn begin(layout: Arc<Layout>, options: WriterOptions) -> Result<Self, RepoError> {
        let lock = lock::shared(&layout)?;
        heal::for_writer(&layout)?;
        let adopted_packs = journal::adopt(&layout)? as u64;
        let index = Arc::new(IndexSet::open_for_writer(&layout)?);
        let journal = Journal::create(&layout)?;
        let (notify, durable) = tokio::sync::mpsc::unbounded_channel();
        let shared = Arc::new(Shared::new(layout, options, index, journal.unfinished_dir(), notify));

        let (sealed, sealed_queue) = sync_channel(2);
        let (trees, tree_queue) = sync_channel(64);
        let jobs = Arc::new(Jobs::default());
        let append = Arc::new(Append::new(trees.clone(), sealed.clone()));
        let mut this = Self {
            shared,
            intake: Mutex::new(Some(Intake { disks: Vec::new(), next_job: 0 })),
            jobs,
            append,
            trees: Mutex::new(Some(trees)),
            durable: Some(durable),
            workers: Vec::new(),
            threads: Vec::new(),
            adopted_packs,
            _lock: lock,
        };
        let count = if options.threads == 0 { processors() + 1 } else { options.threads };
        for _ in 0..count {
            let (jobs, append) = (this.jobs.clone(), this.append.clone());
            let work = move |s: &Shared| s.record(work::run(s, &jobs, &append));
            this.workers.push(this.shared.spawn("repo-work", work)?);
        }
        let to_trees = move |s: &Shared| s.record(trees::run(s, &tree_queue, &sealed));
        this.threads.push(this.shared.spawn("repo-trees", to_trees)?);
        let to_flusher = move |s: &Shared| s.record(flush::run(s, &sealed_queue, journal));
        this.threads.push(this.shared.spawn("repo-flush", to_flusher)?);
        Ok(this)
    }

    /// Adds a disk. With a base, what is not put stays as it is there; else it is zero. The base must be of the same
    /// size and chunk size. May block for a moment.
    pub fn disk(&self, size_bytes: u64, chunk_bytes: u32, base: Option<Image>) -> Result<DiskHandle, RepoError> {
        self.add_disk(size_bytes, chunk_bytes, base, Arc::default())
    }

    /// Adds a disk with a base of which nodes may turn out to be unreadable. They must be known before anything below
    /// them is put, and then all of it must be: an [`Offer`](crate::repo::offer::Offer) sees to that.
    pub fn scanned_disk(
        &self,
        size_bytes: u64,
        chunk_bytes: u32,
        base: Image,
        broken: Arc<Broken>,
    ) -> Result<DiskHandle, RepoError> {
        self.add_disk(size_bytes, chunk_bytes, Some(base), broken)
    }

    fn add_disk(
        &self,
        size_bytes: u64,
        chunk_bytes: u32,
        base: Option<Image>,
        broken: Arc<Broken>,
    ) -> Result<DiskHandle, RepoError> {
        let empty = Image::zero(size_bytes, chunk_bytes).map_err(|e| RepoError::Refused(e.to_string()))?;
        let image = base.unwrap_or(empty);
        if (image.size_bytes, image.chunk_bytes) != (size_bytes, chunk_bytes) {
            return Err(RepoError::Refused(format!(
                "a disk of {size_bytes} bytes in chunks of {chunk_bytes} cannot follow one of {} in chunks of {}: \
                 back it up in full",
                image.size_bytes, image.chunk_bytes
            )));
        }
        let mut intake = self.intake.lock().unwrap_or_else(PoisonError::into_inner);
        let trees = self.trees.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some(intake), Some(trees)) = (intake.as_mut(), trees.as_ref()) else { return Err(self.shared.failure()) };
        if intake.disks.len() >= MAX_DISKS {
            return Err(RepoError::Refused(format!("a restore point has at most {MAX_DISKS} disks")));
        }
        trees.send(vec![trees::Message::Disk(image, broken)]).map_err(|_| self.shared.failure())?;
        intake.disks.push((image, 0));
        Ok(DiskHandle(intake.disks.len() as u16 - 1))
    }

    /// Takes bytes of a disk: from a chunk's beginning, at most 1 MiB, whole chunks but for the disk's end. Waits for
    /// room. If it is cancelled, nothing was taken.
    pub async fn put(&self, disk: DiskHandle, offset_bytes: u64, bytes: Bytes) -> Result<(), RepoError> {
        if bytes.is_empty() || bytes.len() as u64 > MAX_READ_BYTES {
            return Err(RepoError::Refused(format!("{} bytes cannot be put at once", bytes.len())));
        }
        let permit = self.permit(bytes.len() as u32).await?;
        let extent = Extent::checked(offset_bytes, bytes.len() as u64);
        self.submit(Some(disk), extent, What::Data(bytes), permit)
    }

    /// [`Writer::put`] of chunks that are compressed already, one piece each. They are unpacked to be hashed, and stored as they
    /// came, unless the repository does not hold their codec or nothing is to be compressed. What does not unpack to exactly
    /// its chunk is [`RepoError::BadPiece`] of a later call.
    pub async fn put_packed(&self, disk: DiskHandle, offset_bytes: u64, packed: Packed) -> Result<(), RepoError> {
        let permit = self.permit(packed.raw_len()).await?;
        let extent = Extent::checked(offset_bytes, packed.raw_len().into());
        self.submit(Some(disk), extent, What::Packed(packed), permit)
    }

    /// [`Writer::put`] for a thread that may block.
    pub fn put_blocking(&self, disk: DiskHandle, offset_bytes: u64, bytes: Bytes) -> Result<(), RepoError> {
        shared::block_on(self.put(disk, offset_bytes, bytes))
    }

    /// Makes bytes of a disk zero: whole chunks but for the disk's end, of any length. In order with what is put.
    pub async fn zero(&self, disk: DiskHandle, extent: Extent) -> Result<(), RepoError> {
        if extent.len_bytes == 0 {
            return Ok(());
        }
        // A token permit, so that the queue is bounded.
        let permit = self.permit(1024).await?;
        self.submit(Some(disk), Extent::checked(extent.offset_bytes, extent.len_bytes), What::Zero, permit)
    }

    /// Takes chunks of a disk that an earlier writer has made durable, by their digests, which the index must have; without
    /// digests, zeroes. In order with what is put; nobody is told again that they are durable.
    pub async fn known(&self, disk: DiskHandle, extent: Extent, digests: Option<Vec<Digest>>) -> Result<(), RepoError> {
        let permit = self.permit(1024).await?;
        self.submit(Some(disk), Extent::checked(extent.offset_bytes, extent.len_bytes), What::Known(digests), permit)
    }

    /// Keeps a session's log of what becomes durable, before anybody is told so.
    pub fn log_session(&self, log: SessionLog) {
        self.shared.log_to(log);
    }

    /// Notes in the session's log, if there is one, that bytes are as in what the disk goes on from.
    pub fn log_same(&self, disk: DiskHandle, extent: Extent, chunk_bytes: u32) -> Result<(), RepoError> {
        let (first, past) =
            (extent.offset_bytes / u64::from(chunk_bytes), extent.end().div_ceil(u64::from(chunk_bytes)));
        self.shared.log(|| encode_same(disk.0, first, past - first))
    }

    /// [`Writer::zero`] for a thread that may block.
    pub fn zero_blocking(&self, disk: DiskHandle, extent: Extent) -> Result<(), RepoError> {
        shared::block_on(self.zero(disk, extent))
    }

    /// Ends the open pack, so that what was put before becomes durable soon, and not only when a pack is full. Costs a
    /// small pack: for when something waits for it (a scratch that fills), not as a routine.
    pub async fn flush(&self) -> Result<(), RepoError> {
        let permit = self.permit(1024).await?;
        self.submit(None, Some(Extent::new(0, 0)), What::Flush, permit)
    }

    /// Where it is told what has become durable. Can be taken once; ends when the writer has finished or failed.
    pub fn take_durable(&mut self) -> Option<UnboundedReceiver<Durable>> {
        self.durable.take()
    }

    /// The digest look-up of what is stored already: what a scan may offer, and a caller may ask.
    pub fn index(&self) -> Arc<IndexSet> {
        self.shared.index()
    }

    /// A reader with the same index, for the trees of what is there.
    pub fn reader(&self) -> Reader {
        Reader::with_index(self.shared.layout.clone(), (*self.shared.index()).clone())
    }

    /// Stores what is still in memory, the trees and the index, all durable when it returns. Blocks: call it off the
    /// async runtime's threads.
    pub fn finish(mut self) -> Result<Finished, RepoError> {
        self.shared.finishing();
        self.end();
        self.shared.check()?;
        let mut finished = self.shared.take_finished();
        finished.adopted_packs = self.adopted_packs;
        Ok(finished)
    }

    async fn permit(&self, bytes: u32) -> Result<OwnedSemaphorePermit, RepoError> {
        self.shared.permits.clone().acquire_many_owned(bytes).await.map_err(|_| self.shared.failure())
    }

    fn submit(
        &self,
        disk: Option<DiskHandle>,
        extent: Option<Extent>,
        what: What,
        permit: OwnedSemaphorePermit,
    ) -> Result<(), RepoError> {
        let mut intake = self.intake.lock().unwrap_or_else(PoisonError::into_inner);
        let intake = intake.as_mut().ok_or_else(|| self.shared.failure())?;
        let extent = extent.ok_or_else(|| RepoError::Refused("an extent ends past 2^64".to_owned()))?;
        let mut chunk_bytes = 1;
        if let Some(DiskHandle(number)) = disk {
            let Some((image, next)) = intake.disks.get_mut(usize::from(number)) else {
                return Err(RepoError::Refused(format!("there is no disk number {number}")));
            };
            chunk_bytes = image.chunk_bytes;
            let whole = |at: u64| at.is_multiple_of(chunk_bytes.into());
            if !whole(extent.offset_bytes) || !(whole(extent.end()) || extent.end() == image.size_bytes) {
                return Err(RepoError::Refused(format!("{extent} are no whole chunks of {chunk_bytes} bytes")));
            }
            if extent.offset_bytes < *next || !extent.fits(image.size_bytes) {
                let size = image.size_bytes;
                return Err(RepoError::Refused(format!("{extent} came out of order: {next}..{size} are left")));
            }
            if let What::Packed(packed) = &what
                && !packed.is_in_chunks_of(chunk_bytes)
            {
                return Err(RepoError::Refused(format!(
                    "{packed:?} are not the chunks of {chunk_bytes} bytes of {extent}"
                )));
            }
            *next = extent.end();
        }
        let job =
            Job { number: intake.next_job, disk: disk.unwrap_or(DiskHandle(0)), extent, chunk_bytes, what, permit };
        intake.next_job += 1;
        self.jobs.push(job);
        Ok(())
    }

    /// Closes the way in and waits until all threads have ended.
    fn end(&mut self) {
        self.intake.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.trees.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.jobs.close();
        // Panics were caught and recorded as failures.
        self.workers.drain(..).for_each(|worker| drop(worker.join()));
        self.append.end(&self.shared);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.workers.is_empty() || !self.threads.is_empty() {
            self.shared.abandon();
            self.end();
        }
    }
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("repository", &self.shared.layout.root()).finish_non_exhaustive()
    }
}
