//! The appender: puts results back in order and writes what is new into data packs.
//!
//! It is no thread of its own. A worker that has a result leaves it here; if nobody is appending, it does so itself, as long as
//! the next result is there. Who leaves one while another appends goes back to work: the other looks again before it goes.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::mpsc::SyncSender;

use crate::repo::digest::Digest;
use crate::repo::error::RepoError;
use crate::repo::pack::PackKind;
use crate::repo::packfile::OpenPack;
use crate::repo::session_log::{encode_digests, encode_zero};
use crate::repo::tree::Image;
use crate::repo::writer::flush::ToFlush;
use crate::repo::writer::shared::{Shared, lock};
use crate::repo::writer::trees;
use crate::repo::writer::work::{Chunk, Done, From, Outcome, Place};
use crate::repo::writer::{DiskStats, FinishedDisk};
use crate::units::PackId;

/// Messages for the tree thread that are sent at once: waking it for each costs more than what it does.
const TREE_BATCH: usize = 32;

/// Results in any order, and who writes them in theirs.
pub(super) struct Append {
    early: Mutex<Early>,
    /// Nothing once ended.
    appender: Mutex<Option<Appender>>,
}

#[derive(Default)]
struct Early {
    results: BTreeMap<u64, Done>,
    next: u64,
}

impl Early {
    fn has_next(&self) -> bool {
        self.results.first_key_value().is_some_and(|(number, _)| *number == self.next)
    }

    fn take_next(&mut self) -> Option<Done> {
        let done = self.results.remove(&self.next)?;
        self.next += 1;
        Some(done)
    }
}

impl Append {
    pub fn new(trees: SyncSender<Vec<trees::Message>>, flusher: SyncSender<ToFlush>) -> Self {
        let appender = Appender { trees, for_trees: Vec::new(), flusher, open: None, sealed: 0, stats: Vec::new() };
        Self { early: Mutex::default(), appender: Mutex::new(Some(appender)) }
    }

    /// Takes a result, and appends what is next unless somebody does.
    pub fn take(&self, shared: &Shared, done: Done) {
        lock(&self.early).results.insert(done.number, done);
        loop {
            // Taken by who looks again; or a panic there, which is the writer's failure already.
            let Ok(mut appender) = self.appender.try_lock() else { return };
            let Some(working) = appender.as_mut() else { return };
            loop {
                let next = lock(&self.early).take_next();
                let Some(done) = next else { break };
                if !shared.is_stopped()
                    && let Err(error) = working.take(shared, done)
                {
                    // Before anybody else may go on with what follows.
                    shared.fail(error);
                }
            }
            drop(appender);
            // Somebody may have left the next one between the last look and letting go.
            if !lock(&self.early).has_next() {
                return;
            }
        }
    }

    /// When all workers have ended: seals the open pack, or drops it where the writer is given up, and lets go of the other
    /// threads, which then find what failed recorded.
    pub fn end(&self, shared: &Shared) {
        let Some(mut appender) = lock(&self.appender).take() else { return };
        // Of a writer that is dropped, what has come is kept for the next one; not after a failure.
        shared.record(if shared.has_failed() { Ok(()) } else { appender.seal() });
        if let Some(open) = appender.open.take() {
            open.discard();
        }
        appender.send_to_trees();
        let stats = std::mem::take(&mut appender.stats);
        shared.finished(|finished| {
            for (disk, stats) in stats.into_iter().enumerate() {
                entry(&mut finished.disks, disk).stats = stats;
            }
        });
    }
}

/// The entry of a disk, made if need be.
pub(super) fn entry(disks: &mut Vec<FinishedDisk>, disk: usize) -> &mut FinishedDisk {
    let empty = Image { root: Digest::ZERO, size_bytes: 0, chunk_bytes: 0 };
    if disks.len() <= disk {
        disks.resize(disk + 1, FinishedDisk { image: empty, stats: DiskStats::default() });
    }
    &mut disks[disk]
}

struct Appender {
    trees: SyncSender<Vec<trees::Message>>,
    /// Not sent yet.
    for_trees: Vec<trees::Message>,
    flusher: SyncSender<ToFlush>,
    open: Option<OpenPack>,
    /// Number of the last sealed pack; the open one has the next.
    sealed: u64,
    stats: Vec<DiskStats>,
}

impl Appender {
    fn take(&mut self, shared: &Shared, done: Done) -> Result<(), RepoError> {
        let disk = usize::from(done.disk.0);
        let first_chunk = done.extent.offset_bytes / u64::from(done.chunk_bytes);
        if self.stats.len() <= disk {
            self.stats.resize(disk + 1, DiskStats::default());
        }
        match done.outcome {
            Outcome::Data { chunks, given, made } => {
                let pack = self.store(shared, disk, &chunks, &given, &made)?;
                self.stats[disk].data_bytes += done.extent.len_bytes;
                // The bytes are in the file: let the source and the next puts have the room.
                shared.give_back(made);
                drop((given, done.permit));
                let digests: Vec<_> = chunks.into_iter().map(|chunk| chunk.digest).collect();
                let record = || encode_digests(done.disk.0, first_chunk, &digests);
                shared.durable_with(pack, done.disk, done.extent, record)?;
                self.tell_trees(trees::Message::Chunks { disk, first_chunk, digests });
                if self.open.as_ref().is_some_and(OpenPack::is_full) {
                    self.seal()?;
                }
            }
            Outcome::Zero => {
                self.stats[disk].zero_bytes += done.extent.len_bytes;
                let to_chunk = done.extent.end().div_ceil(done.chunk_bytes.into());
                let record = || encode_zero(done.disk.0, first_chunk, to_chunk - first_chunk);
                shared.durable_with(0, done.disk, done.extent, record)?;
                self.tell_trees(trees::Message::Zero { disk, first_chunk, to_chunk });
            }
            Outcome::Known(Some(digests)) => self.tell_trees(trees::Message::Chunks { disk, first_chunk, digests }),
            Outcome::Known(None) => {
                let to_chunk = done.extent.end().div_ceil(done.chunk_bytes.into());
                self.tell_trees(trees::Message::Zero { disk, first_chunk, to_chunk });
            }
            Outcome::Flush => self.seal()?,
        }
        Ok(())
    }

    /// Appends what is new. Returns the number of the pack with which all of it is durable.
    fn store(
        &mut self,
        shared: &Shared,
        disk: usize,
        chunks: &[Chunk],
        given: &[u8],
        made: &[u8],
    ) -> Result<u64, RepoError> {
        let current = self.sealed + 1;
        let mut durable_with = 0;
        let mut pieces: Vec<&[u8]> = Vec::with_capacity(chunks.len());
        let mut blobs = Vec::with_capacity(chunks.len());
        let stats = &mut self.stats[disk];
        for chunk in chunks {
            let (piece, codec) = match chunk.place {
                Place::Zero => {
                    stats.zero_bytes += chunk.raw_len as u64;
                    continue;
                }
                Place::Indexed => continue,
                Place::Claimed => {
                    durable_with = durable_with.max(shared.claims.pack(&chunk.digest));
                    continue;
                }
                Place::New { from: From::Given, at, len, codec } => (&given[at..at + len], codec),
                Place::New { from: From::Made, at, len, codec } => (&made[at..at + len], codec),
            };
            if !shared.claims.append(&chunk.digest, current) {
                durable_with = durable_with.max(shared.claims.pack(&chunk.digest));
                continue;
            }
            durable_with = current;
            stats.new_bytes += chunk.raw_len as u64;
            stats.stored_bytes += piece.len() as u64;
            pieces.push(piece);
            blobs.push((chunk.digest, piece.len() as u32, chunk.raw_len as u32, codec));
        }
        if !blobs.is_empty() {
            let open = match &mut self.open {
                Some(open) => open,
                None => {
                    let id = PackId::random();
                    let path = shared.unfinished.join(id.to_string());
                    self.open.insert(OpenPack::create(id, PackKind::Data, path)?)
                }
            };
            open.append(&pieces, blobs.into_iter())?;
        }
        Ok(durable_with)
    }

    fn seal(&mut self) -> Result<(), RepoError> {
        let Some(open) = self.open.take() else { return Ok(()) };
        self.sealed += 1;
        // A flusher that has ended has said why.
        let _ = self.flusher.send(ToFlush { pack: open.seal()?, number: Some(self.sealed) });
        Ok(())
    }

    fn tell_trees(&mut self, message: trees::Message) {
        self.for_trees.push(message);
        if self.for_trees.len() >= TREE_BATCH {
            self.send_to_trees();
        }
    }

    fn send_to_trees(&mut self) {
        // A tree thread that has ended has said why.
        let _ = self.trees.send(std::mem::take(&mut self.for_trees));
    }
}
