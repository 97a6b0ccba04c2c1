//! The appender: puts results back in order and writes what is new into data packs.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, SyncSender};

use crate::repo::digest::Digest;
use crate::repo::error::RepoError;
use crate::repo::pack::PackKind;
use crate::repo::packfile::OpenPack;
use crate::repo::session_log::{encode_digests, encode_zero};
use crate::repo::tree::Image;
use crate::repo::writer::flush::ToFlush;
use crate::repo::writer::shared::Shared;
use crate::repo::writer::trees;
use crate::repo::writer::work::{Chunk, Done, From, Outcome, Place};
use crate::repo::writer::{DiskStats, FinishedDisk};
use crate::units::PackId;

pub(super) fn run(
    shared: &Shared,
    results: &Receiver<Done>,
    trees: &SyncSender<trees::Message>,
    flusher: &SyncSender<ToFlush>,
) -> Result<(), RepoError> {
    let mut this = Appender { shared, trees, flusher, open: None, sealed: 0, stats: Vec::new() };
    let result = this.run(results);
    let result = result.and_then(|()| if shared.is_finishing() { this.seal() } else { Ok(()) });
    if let Some(open) = this.open.take() {
        open.discard();
    }
    let stats = std::mem::take(&mut this.stats);
    shared.finished(|finished| {
        for (disk, stats) in stats.into_iter().enumerate() {
            entry(&mut finished.disks, disk).stats = stats;
        }
    });
    result
}

/// The entry of a disk, made if need be.
pub(super) fn entry(disks: &mut Vec<FinishedDisk>, disk: usize) -> &mut FinishedDisk {
    let empty = Image { root: Digest::ZERO, size_bytes: 0, chunk_bytes: 0 };
    if disks.len() <= disk {
        disks.resize(disk + 1, FinishedDisk { image: empty, stats: DiskStats::default() });
    }
    &mut disks[disk]
}

struct Appender<'a> {
    shared: &'a Shared,
    trees: &'a SyncSender<trees::Message>,
    flusher: &'a SyncSender<ToFlush>,
    open: Option<OpenPack>,
    /// Number of the last sealed pack; the open one has the next.
    sealed: u64,
    stats: Vec<DiskStats>,
}

impl Appender<'_> {
    fn run(&mut self, results: &Receiver<Done>) -> Result<(), RepoError> {
        let mut early = BTreeMap::new();
        let mut next = 0;
        for done in results {
            early.insert(done.number, done);
            while let Some(done) = early.remove(&next) {
                next += 1;
                if !self.shared.is_stopped() {
                    self.take(done)?;
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, done: Done) -> Result<(), RepoError> {
        let disk = usize::from(done.disk.0);
        let first_chunk = done.extent.offset_bytes / u64::from(done.chunk_bytes);
        if self.stats.len() <= disk {
            self.stats.resize(disk + 1, DiskStats::default());
        }
        match done.outcome {
            Outcome::Data { chunks, given, made } => {
                let pack = self.store(disk, &chunks, &given, &made)?;
                self.stats[disk].data_bytes += done.extent.len_bytes;
                // The bytes are in the file: let the source and the next puts have the room.
                self.shared.give_back(made);
                drop((given, done.permit));
                let digests: Vec<_> = chunks.into_iter().map(|chunk| chunk.digest).collect();
                let record = || encode_digests(done.disk.0, first_chunk, &digests);
                self.shared.durable_with(pack, done.disk, done.extent, record)?;
                self.tell_trees(trees::Message::Chunks { disk, first_chunk, digests });
                if self.open.as_ref().is_some_and(OpenPack::is_full) {
                    self.seal()?;
                }
            }
            Outcome::Zero => {
                self.stats[disk].zero_bytes += done.extent.len_bytes;
                let to_chunk = done.extent.end().div_ceil(done.chunk_bytes.into());
                let record = || encode_zero(done.disk.0, first_chunk, to_chunk - first_chunk);
                self.shared.durable_with(0, done.disk, done.extent, record)?;
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
    fn store(&mut self, disk: usize, chunks: &[Chunk], given: &[u8], made: &[u8]) -> Result<u64, RepoError> {
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
                    durable_with = durable_with.max(self.shared.claims.pack(&chunk.digest));
                    continue;
                }
                Place::New { from: From::Given, at, len, codec } => (&given[at..at + len], codec),
                Place::New { from: From::Made, at, len, codec } => (&made[at..at + len], codec),
            };
            if !self.shared.claims.append(&chunk.digest, current) {
                durable_with = durable_with.max(self.shared.claims.pack(&chunk.digest));
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
                    let path = self.shared.unfinished.join(id.to_string());
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

    fn tell_trees(&self, message: trees::Message) {
        // A tree thread that has ended has said why.
        let _ = self.trees.send(message);
    }
}
