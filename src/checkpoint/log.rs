//! The sealed log of one disk: a directory with a file a checkpoint and `epoch.json`.
//!
//! ```text
//! DIR/ epoch.json        the running epoch with its latest checkpoint (the head), and why the last epoch ended
//!      ID.ckpt           one a checkpoint, named by its id; see `format`
//! ```
//!
//! Checkpoint C(n)'s bitmap holds every granule written between C(n-1) and C(n). The first of an epoch has no checkpoint
//! before it; its bitmap is empty. "What changed since C(k)?" is the union of the bitmaps after C(k).
//!
//! **Order of a seal**: the checkpoint's file, durably; then the head, durably. Only then may the caller delete the bitmap
//! in QEMU. A crash between the two leaves a whole file whose `prev` is the head: [`Log::open`] adopts it. **Order of a new
//! epoch**: its first checkpoint's file; then `epoch.json`; then the old files are removed. A crash leaves the old epoch
//! running with a stray file, or the new one with old files; [`Log::open`] removes either.
//!
//! **Damage is no error**: a file that is missing or damaged breaks the chain there. What comes after it goes on
//! answering; what came before is "unknown", so that its owner reads the whole disk. A damaged `epoch.json` means
//! that no epoch runs.
//!
//! **Growth** is bounded: a seal that leaves the log over its limits merges old neighbours, see [`merge`](super::merge).
//!
//! Only one process may have a log open; the caller holds the lock of the state directory. All calls that take or give a
//! bitmap block on files: keep them off an async runtime's threads.

use std::path::PathBuf;

use jiff::Timestamp;

use super::bitmap::Bitmap;
use super::epoch::{Epoch, EpochEnd, FILE_NAME, MAX_ENDED_CHECKPOINTS, QemuInstance, State};
use super::error::{LogError, NotInLog};
use super::format::{Content, Decoder, FormatError, Header};
use super::merge::Limits;
use super::stamp::{Closed, Medium};
use crate::durable::{self, DurableError, Replace};
use crate::fault;
use crate::limits::MAX_DISK_BYTES;
use crate::units::{CheckpointId, EpochId};

/// Ending of checkpoint files.
pub const ENDING: &str = "ckpt";

/// A file of the log that is missing or was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damaged {
    /// Which one.
    pub file: PathBuf,
    /// What is wrong with it, to be read after its name.
    pub reason: String,
}

/// What starts an epoch: its first checkpoint, and what it is bound to.
#[derive(Clone, Debug)]
pub struct EpochStart {
    /// Its name.
    pub id: EpochId,
    /// The first checkpoint: QEMU's bitmap records from here on.
    pub first: CheckpointId,
    /// The instant of the first checkpoint.
    pub time: Timestamp,
    /// Size of the disk.
    pub size_bytes: u64,
    /// The QEMU that tracks.
    pub qemu: QemuInstance,
    /// The disk's root node there.
    pub node: String,
    /// What the disk is made of there.
    pub medium: Option<Medium>,
}

/// A checkpoint to be sealed.
#[derive(Clone, Debug)]
pub struct Sealed<'a> {
    /// Its name.
    pub id: CheckpointId,
    /// The one before: must be the epoch's last.
    pub prev: Option<CheckpointId>,
    /// For people; [`Log::next_number`].
    pub number: u64,
    /// The instant.
    pub time: Timestamp,
    /// What was written between the two.
    pub bitmap: &'a Bitmap,
}

/// The sealed log of one disk.
#[derive(Debug)]
pub struct Log {
    pub(super) dir: PathBuf,
    pub(super) state: State,
    /// The running epoch's checkpoints without a gap up to the last, oldest first.
    pub(super) chain: Vec<Header>,
    /// Headers of the running epoch before the gap, if there is one.
    pub(super) cut_off: Vec<Header>,
    pub(super) damaged: Vec<Damaged>,
    pub(super) poisoned: bool,
}

impl Log {
    /// The running epoch.
    pub fn epoch(&self) -> Option<&Epoch> {
        self.state.epoch.as_ref()
    }

    /// Why the epoch before ended.
    pub fn last_end(&self) -> Option<&EpochEnd> {
        self.state.last_end.as_ref()
    }

    /// Files that are missing or were not taken.
    pub fn damaged(&self) -> &[Damaged] {
        &self.damaged
    }

    /// The checkpoints of the running epoch that are linked to the last one, oldest first.
    pub fn checkpoints(&self) -> &[Header] {
        &self.chain
    }

    /// The latest checkpoint of the running epoch.
    pub fn last(&self) -> Option<CheckpointId> {
        self.state.epoch.as_ref().map(|e| e.last)
    }

    /// The number for the next checkpoint; numbers go on from epoch to epoch.
    pub fn next_number(&self) -> u64 {
        let last = self.state.epoch.as_ref().map(|e| e.number).or(self.state.last_end.as_ref().map(|e| e.number));
        last.unwrap_or(0).saturating_add(1)
    }

    /// Begins an epoch with its first checkpoint, durably, and removes the files of the one before. `reason` says why
    /// that one ended, if it was still running; an end that was recorded already stays as it is.
    ///
    /// # Errors
    /// When it cannot be made durable; the log is poisoned if nobody knows how far it came.
    pub fn begin_epoch(&mut self, start: EpochStart, reason: &str) -> Result<(), LogError> {
        self.check_poison()?;
        if start.size_bytes > MAX_DISK_BYTES {
            return Err(LogError::WrongSize { epoch_bytes: MAX_DISK_BYTES, found_bytes: start.size_bytes });
        }
        let number = self.next_number();
        let empty = Bitmap::new(start.size_bytes);
        let first = Sealed { id: start.first, prev: None, number, time: start.time, bitmap: &empty };
        let header = self.write_checkpoint(start.id, &first)?;
        fault::point("epoch.first");
        let epoch = Epoch {
            id: start.id,
            started: start.time,
            size_bytes: start.size_bytes,
            qemu: start.qemu,
            node: start.node,
            last: start.first,
            number,
            medium: start.medium,
            closed: None,
            kept: false,
        };
        self.write_state(State { epoch: Some(epoch), last_end: self.ended(reason) })?;
        fault::point("epoch.begun");
        self.chain = vec![header];
        self.cut_off.clear();
        self.damaged.clear();
        self.remove_other_files(start.first)
    }

    fn remove_other_files(&self, keep: CheckpointId) -> Result<(), LogError> {
        let keep = self.path(keep);
        for entry in std::fs::read_dir(&self.dir).map_err(DurableError::at("list", &self.dir))? {
            let file = entry.map_err(DurableError::at("list", &self.dir))?.path();
            if file.extension().is_some_and(|e| e == ENDING) && file != keep {
                std::fs::remove_file(&file).map_err(DurableError::at("remove", &file))?;
            }
        }
        Ok(durable::sync_dir(&self.dir)?)
    }

    /// Ends the running epoch, durably: what was written from now on is unknown. No epoch running is no error.
    ///
    /// # Errors
    /// When it cannot be made durable; the log is poisoned then. The caller must not go on as if the epoch had ended,
    /// nor as if it had not.
    pub fn end_epoch(&mut self, reason: &str) -> Result<(), LogError> {
        self.check_poison()?;
        if self.state.epoch.is_none() {
            return Ok(());
        }
        self.write_state(State { epoch: None, last_end: self.ended(reason) })?;
        self.chain.clear();
        self.cut_off.clear();
        Ok(())
    }

    /// Carries the running epoch over to another QEMU, durably. The caller has the proof that nothing was written in
    /// between. No epoch running is no error.
    ///
    /// # Errors
    /// When it cannot be made durable; the log is poisoned then.
    pub fn carry_epoch(&mut self, qemu: QemuInstance, node: &str, medium: Option<Medium>) -> Result<(), LogError> {
        self.check_poison()?;
        let mut state = self.state.clone();
        let Some(epoch) = &mut state.epoch else { return Ok(()) };
        (epoch.qemu, epoch.node) = (qemu, node.to_owned());
        (epoch.medium, epoch.closed) = (medium, None);
        self.write_state(state)
    }

    /// Notes durably that the epoch's QEMU ended with nothing unseen after the last checkpoint. No epoch running is no
    /// error.
    ///
    /// # Errors
    /// When it cannot be made durable; the log is poisoned then.
    pub fn close_epoch(&mut self, closed: Closed) -> Result<(), LogError> {
        self.check_poison()?;
        let mut state = self.state.clone();
        let Some(epoch) = &mut state.epoch else { return Ok(()) };
        epoch.closed = Some(closed);
        self.write_state(state)
    }

    /// Notes durably whether the image keeps the bitmap that records now. No epoch running is no error.
    ///
    /// # Errors
    /// When it cannot be made durable; the log is poisoned then.
    pub fn note_kept(&mut self, kept: bool) -> Result<(), LogError> {
        self.check_poison()?;
        let mut state = self.state.clone();
        let Some(epoch) = state.epoch.as_mut().filter(|e| e.kept != kept) else { return Ok(()) };
        epoch.kept = kept;
        self.write_state(state)
    }

    /// The record of the running epoch's end now; the recorded one when none runs.
    fn ended(&self, reason: &str) -> Option<EpochEnd> {
        let Some(epoch) = &self.state.epoch else { return self.state.last_end.clone() };
        let mut known: Vec<_> = self.cut_off.iter().chain(&self.chain).collect();
        known.sort_by_key(|h| h.number);
        let known: Vec<_> = known.iter().flat_map(|h| h.covers.iter().copied().chain([h.id])).collect();
        let newest = &known[known.len().saturating_sub(MAX_ENDED_CHECKPOINTS)..];
        Some(EpochEnd {
            epoch: epoch.id,
            time: Timestamp::now(),
            reason: reason.to_owned(),
            number: epoch.number,
            checkpoints: newest.to_vec(),
        })
    }

    /// Seals a checkpoint: its file durably first, then the head moves to it. After `Ok` the bitmap may go from QEMU;
    /// after an error it must stay: open the log again, and [`Log::last`] says whether the checkpoint made it.
    ///
    /// # Errors
    /// When it does not follow the last one, is of another size, or cannot be made durable.
    pub fn seal(&mut self, sealed: Sealed<'_>) -> Result<(), LogError> {
        self.check_poison()?;
        let mut epoch = self.state.epoch.clone().ok_or(LogError::NoEpoch(sealed.id))?;
        if sealed.prev != Some(epoch.last) || sealed.id == epoch.last {
            return Err(LogError::OutOfOrder { id: sealed.id, prev: sealed.prev, last: epoch.last });
        }
        if sealed.bitmap.size_bytes() != epoch.size_bytes {
            let found_bytes = sealed.bitmap.size_bytes();
            return Err(LogError::WrongSize { epoch_bytes: epoch.size_bytes, found_bytes });
        }
        let header = self.write_checkpoint(epoch.id, &sealed)?;
        fault::point("seal.written");
        (epoch.last, epoch.number) = (sealed.id, sealed.number);
        self.write_state(State { epoch: Some(epoch), last_end: self.state.last_end.clone() })?;
        self.chain.push(header);
        fault::point("seal.done");
        // The checkpoint is sealed, whatever becomes of older ones.
        if let Err(error) = self.merge_old(Limits::default()) {
            tracing::warn!(log = %self.dir.display(), "old checkpoints cannot be merged: {error}");
        }
        Ok(())
    }

    /// Everything written after checkpoint `id` up to the last checkpoint; empty for the last one itself.
    ///
    /// # Errors
    /// When the log cannot tell. The bitmaps are read from their files now, so that damage may be found only here.
    pub fn since(&self, id: CheckpointId) -> Result<Bitmap, NotInLog> {
        let Some(epoch) = &self.state.epoch else { return Err(self.not_in_log(id)) };
        if id == epoch.last {
            return Ok(Bitmap::new(epoch.size_bytes));
        }
        let from = self.position(id).ok_or_else(|| self.not_in_log(id))?;
        let union = self.union(&self.chain[from..], epoch.size_bytes);
        union.map_err(|(header, reason)| NotInLog::Damaged { id, file: self.path(header.id), reason })
    }

    /// Where in the chain the bitmaps after `id` start.
    fn position(&self, id: CheckpointId) -> Option<usize> {
        // The checkpoint's own bitmap is not needed, so that even a missing file at the gap answers for itself.
        if self.chain.first().is_some_and(|h| h.prev == Some(id)) {
            return Some(0);
        }
        self.chain.iter().enumerate().find_map(|(at, header)| {
            if header.id == id {
                return Some(at + 1);
            }
            header.covers.contains(&id).then_some(at)
        })
    }

    fn not_in_log(&self, id: CheckpointId) -> NotInLog {
        let cut = |headers: &[Header]| headers.iter().any(|h| h.id == id || h.covers.contains(&id));
        let own = self.path(id);
        if cut(&self.cut_off) || self.damaged.iter().any(|d| d.file == own) {
            // Name the file that broke the chain; the head's own if that is gone.
            let gap = self.chain.first().map_or(self.last(), |h| h.prev).map(|gap| self.path(gap)).unwrap_or(own);
            let why = self.damaged.iter().find(|d| d.file == gap).or(self.damaged.first());
            let (file, reason) = why.map_or((gap, "is missing".to_owned()), |d| (d.file.clone(), d.reason.clone()));
            return NotInLog::Damaged { id, file, reason };
        }
        match &self.state.last_end {
            Some(end) if end.checkpoints.contains(&id) => {
                NotInLog::OtherEpoch { id, time: end.time, reason: end.reason.clone() }
            }
            _ => match self.damaged.iter().find(|d| d.file.ends_with(FILE_NAME)) {
                Some(d) => NotInLog::Damaged { id, file: d.file.clone(), reason: d.reason.clone() },
                None => NotInLog::Unknown(id),
            },
        }
    }

    /// Joins a bitmap with what a checkpoint's file has, and holds the file to the header that was read when the log was
    /// opened. After an error some bits may be set.
    pub(super) fn read_into(&self, decoder: &mut Decoder, header: &Header, bitmap: &mut Bitmap) -> Result<(), String> {
        if header.size_bytes != bitmap.size_bytes() {
            return Err(format!("is of a disk of {} bytes, not {}", header.size_bytes, bitmap.size_bytes()));
        }
        let path = self.path(header.id);
        // The length is the header's: a file that grew since is not read without end.
        let found = std::fs::metadata(&path).map_err(|e| format!("cannot be read: {e}"))?.len();
        if found != header.file_bytes() {
            return Err(FormatError::Length { expected: header.file_bytes(), found }.to_string());
        }
        let file = std::fs::read(&path).map_err(|e| format!("cannot be read: {e}"))?;
        let again = decoder.union(&file, bitmap).map_err(|e| e.to_string())?;
        if again != *header { Err("was exchanged".to_owned()) } else { Ok(()) }
    }

    fn write_checkpoint(&self, epoch: EpochId, sealed: &Sealed<'_>) -> Result<Header, LogError> {
        let Sealed { id, prev, number, time, bitmap } = *sealed;
        let (header, file) = Content { id, prev, epoch, number, time, covers: &[], bitmap }
            .encode()
            .map_err(|source| LogError::Encode { id, source })?;
        // A seal that failed half-way may be tried again under the same id.
        durable::write_file(&self.path(id), &file, Replace::Yes)?;
        Ok(header)
    }

    fn write_state(&mut self, state: State) -> Result<(), LogError> {
        self.poisoned = true;
        state.write(&self.dir)?;
        self.poisoned = false;
        self.state = state;
        Ok(())
    }

    fn check_poison(&self) -> Result<(), LogError> {
        if self.poisoned { Err(LogError::Poisoned(self.dir.clone())) } else { Ok(()) }
    }

    pub(super) fn path(&self, id: CheckpointId) -> PathBuf {
        self.dir.join(format!("{id}.{ENDING}"))
    }
}
