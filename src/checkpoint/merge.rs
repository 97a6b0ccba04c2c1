//! Merging old checkpoints, so that a log stays within limits, and the union of many.
//!
//! ```text
//! before    A (prev Z)    B (prev A)    C (prev B)          a client with A needs B ∪ C
//! after     B (prev Z, covers A, bitmap A ∪ B)    C         it gets A ∪ B ∪ C: a superset
//! ```
//!
//! Which neighbours: those that lose the least, which is what they span beside their age. So what is recent stays fine, and
//! what is old gets coarse, by and by, as in a log of many clients with different rhythms it should. The last checkpoint is
//! never merged. Where a file would cover more than [`MAX_COVERS`] checkpoints, only the two oldest are merged and the
//! oldest ids are forgotten: whoever still has one of them is answered by a scan.
//!
//! **Order**: the merged file replaces B's, atomically and durably; then A's file is removed. A crash between the two leaves
//! A's file, which a file of the chain covers: [`Log::open`] removes it. A crash before leaves the log as it was.
//!
//! A file that turns out to be damaged breaks the chain, here as in an answer: it and what is older can answer nothing any
//! more, and goes.

use std::num::NonZero;
use std::thread;

use super::bitmap::Bitmap;
use super::error::LogError;
use super::format::{Content, Decoder, Header, MAX_COVERS};
use super::log::{Damaged, Log};
use crate::durable::{self, Replace};
use crate::fault;
use crate::units::MIB;

/// Most merges at one seal, while a fleece is open: each reads two files and writes one, flushed. A log that is further over
/// its limits comes back with the next seals.
const MAX_MERGES: usize = 16;
/// Most threads that read for one answer, and most memory that they take beside each other.
const MAX_THREADS: usize = 8;
const MAX_THREAD_BYTES: u64 = 256 * MIB;
/// A thread for fewer files is not worth it.
const FILES_A_THREAD: usize = 16;

/// How long a log of one disk may get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Checkpoint files.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
}

impl Default for Limits {
    /// Six weeks of hourly backups in full resolution, in what 1,000 checkpoints of a disk of 1 TiB with 1 % scattered
    /// change each take.
    fn default() -> Self {
        Self { files: 1000, bytes: 192 * MIB }
    }
}

impl Log {
    /// Merges old neighbours until the log is within its limits; gives up after a few, for the next call to go on. Gives the
    /// number of merges.
    ///
    /// # Errors
    /// When a merged file cannot be made durable. The log is as good as before.
    pub fn merge_old(&mut self, limits: Limits) -> Result<usize, LogError> {
        let mut merges = 0;
        while self.exceeds(limits)
            && merges < MAX_MERGES
            && let Some(at) = self.cheapest_pair()
        {
            self.merge_pair(at)?;
            merges += 1;
        }
        Ok(merges)
    }

    fn exceeds(&self, limits: Limits) -> bool {
        self.chain.len() > limits.files || self.chain.iter().map(Header::file_bytes).sum::<u64>() > limits.bytes
    }

    /// Index of the older one of the neighbours whose merge loses the least.
    fn cheapest_pair(&self) -> Option<usize> {
        let newest = self.chain.last()?.number;
        let cost = |at: usize| {
            let [older, younger] = [&self.chain[at], &self.chain[at + 1]];
            let span = older.covers.len() + younger.covers.len() + 2;
            (span as u128, u128::from(newest.saturating_sub(younger.number)) + 1)
        };
        let covered = |at: usize| self.chain[at].covers.len() + self.chain[at + 1].covers.len() + 1;
        let pairs = (0..self.chain.len().saturating_sub(2)).filter(|at| *at == 0 || covered(*at) <= MAX_COVERS);
        pairs.min_by(|one, other| {
            let ((span, age), (other_span, other_age)) = (cost(*one), cost(*other));
            (span * other_age).cmp(&(other_span * age))
        })
    }

    fn merge_pair(&mut self, at: usize) -> Result<(), LogError> {
        let (older, younger) = (self.chain[at].clone(), self.chain[at + 1].clone());
        let mut bitmap = Bitmap::with_granule(younger.size_bytes, younger.granule_bytes.into());
        let mut decoder = Decoder::new().map_err(|source| LogError::Encode { id: younger.id, source })?;
        for (i, header) in [&older, &younger].into_iter().enumerate() {
            if let Err(reason) = self.read_into(&mut decoder, header, &mut bitmap) {
                return self.cut(at + i, reason);
            }
        }
        let mut covers = older.covers;
        covers.push(older.id);
        covers.extend(&younger.covers);
        covers.drain(..covers.len().saturating_sub(MAX_COVERS));
        let Header { id, epoch, number, time, .. } = younger;
        let content = Content { id, prev: older.prev, epoch, number, time, covers: &covers, bitmap: &bitmap };
        let (header, file) = content.encode().map_err(|source| LogError::Encode { id, source })?;
        durable::write_file(&self.path(id), &file, Replace::Yes)?;
        fault::point("merge.written");
        self.chain[at + 1] = header;
        self.chain.remove(at);
        durable::remove_file(&self.path(older.id))?;
        fault::point("merge.done");
        Ok(())
    }

    /// Takes the chain's files up to a damaged one out of the log.
    fn cut(&mut self, damaged: usize, reason: String) -> Result<(), LogError> {
        let file = self.path(self.chain[damaged].id);
        tracing::warn!(file = %file.display(), reason, "a checkpoint is damaged: who has it or an older one gets a scan");
        let gone: Vec<_> = self.chain.drain(..=damaged).collect();
        if !self.damaged.iter().any(|d| d.file == file) {
            self.damaged.push(Damaged { file, reason });
        }
        for header in gone {
            durable::remove_file(&self.path(header.id))?;
            self.cut_off.push(header);
        }
        Ok(())
    }

    /// The union of these checkpoints' bitmaps; the error names the first that cannot be had.
    pub(super) fn union<'a>(&self, files: &'a [Header], size_bytes: u64) -> Result<Bitmap, (&'a Header, String)> {
        let bitmap_bytes = (size_bytes / crate::units::GRANULE_BYTES / 8).max(1);
        let affordable = usize::try_from(MAX_THREAD_BYTES / bitmap_bytes).unwrap_or(usize::MAX);
        let threads = thread::available_parallelism().map_or(1, NonZero::get).min(MAX_THREADS).min(affordable);
        let each = files.len().div_ceil(threads.max(1)).max(FILES_A_THREAD);
        if files.len() <= each {
            return self.union_here(files, size_bytes);
        }
        let parts: Vec<_> = thread::scope(|scope| {
            let part = |some| scope.spawn(move || self.union_here(some, size_bytes));
            let running: Vec<_> = files.chunks(each).map(part).collect();
            running
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        let mut all: Option<Bitmap> = None;
        for (part, some) in parts.into_iter().zip(files.chunks(each)) {
            let part = part?;
            match &mut all {
                None => all = Some(part),
                Some(all) => all.union_with(&part).map_err(|e| (&some[0], e.to_string()))?,
            }
        }
        Ok(all.unwrap_or_else(|| Bitmap::new(size_bytes)))
    }

    fn union_here<'a>(&self, files: &'a [Header], size_bytes: u64) -> Result<Bitmap, (&'a Header, String)> {
        let mut union = Bitmap::new(size_bytes);
        let Some(first) = files.first() else { return Ok(union) };
        let mut decoder = Decoder::new().map_err(|e| (first, e.to_string()))?;
        for header in files {
            self.read_into(&mut decoder, header, &mut union).map_err(|reason| (header, reason))?;
        }
        Ok(union)
    }
}
