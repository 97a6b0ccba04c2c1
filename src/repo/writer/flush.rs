//! The flusher: makes packs durable, one after the other, off everybody's way; keeps the journal; writes the index.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use crate::repo::digest::Digest;
use crate::repo::error::RepoError;
use crate::repo::index::format::{PackRef, RawEntry, encode_entry};
use crate::repo::index::merge;
use crate::repo::index::set::IndexSet;
use crate::repo::journal::Journal;
use crate::repo::packfile::SealedPack;
use crate::repo::writer::shared::Shared;

/// With so many entries of durable packs in memory, an index file is written before the end, to bound memory.
const MAX_ENTRIES: usize = if cfg!(test) { 300 } else { 100_000 };

pub(super) struct ToFlush {
    pub pack: SealedPack,
    /// Number of a data pack, 1, 2, …; none for a tree pack.
    pub number: Option<u64>,
}

pub(super) fn run(shared: &Shared, packs: &Receiver<ToFlush>, journal: Journal) -> Result<(), RepoError> {
    let mut this = Flusher { shared, journal, packs: Vec::new(), entries: Vec::new(), count: 0 };
    let mut failed = false;
    for to_flush in packs {
        // Also when the writer is being dropped, what is whole is kept for the next one; not after a failure.
        if failed {
            to_flush.pack.discard();
        } else if let Err(error) = this.take(to_flush) {
            shared.fail(error);
            failed = true;
        }
    }
    if !shared.is_finishing() {
        return this.journal.abandon();
    }
    if let Err(error) = this.write_index() {
        this.journal.abandon()?;
        return Err(error);
    }
    shared.finished(|finished| finished.packs = this.count);
    this.journal.finish()?;
    // Not needed for what was written, so its failure is none of the backup's.
    if let Err(error) = merge::merge_if_many(&shared.layout) {
        tracing::warn!(%error, "index files could not be merged");
    }
    Ok(())
}

struct Flusher<'a> {
    shared: &'a Shared,
    journal: Journal,
    /// Durable and in no index file yet.
    packs: Vec<PackRef>,
    entries: Vec<RawEntry>,
    count: u64,
}

impl Flusher<'_> {
    fn take(&mut self, to_flush: ToFlush) -> Result<(), RepoError> {
        if let Err(error) = to_flush.pack.make_durable(&self.shared.layout) {
            to_flush.pack.discard();
            return Err(error);
        }
        let pack = to_flush.pack;
        self.journal.record(&pack.pack)?;
        let number = self.packs.len() as u32;
        self.entries.extend(pack.blobs.iter().map(|blob| encode_entry(&blob.digest, number, &blob.placed)));
        self.packs.push(pack.pack);
        self.count += 1;
        if let Some(number) = to_flush.number {
            self.shared.is_durable(number)?;
        }
        if self.entries.len() >= MAX_ENTRIES { self.write_index() } else { Ok(()) }
    }

    fn write_index(&mut self) -> Result<(), RepoError> {
        if self.packs.is_empty() {
            return Ok(());
        }
        self.entries.sort_unstable();
        let file = merge::write(&self.shared.layout, &self.packs, self.entries.iter().copied())?;
        let mut index = (*self.shared.index()).clone();
        index.add(Arc::new(file));
        self.shared.set_index(index);
        let digests: Vec<_> = self.entries.iter().filter_map(|raw| Digest::from_slice(raw)).collect();
        self.shared.claims.forget(digests.iter());
        self.packs.clear();
        self.entries.clear();
        if !self.shared.is_finishing() && merge::merge_if_many(&self.shared.layout)?.is_some() {
            self.shared.set_index(IndexSet::open_for_writer(&self.shared.layout)?);
        }
        Ok(())
    }
}
