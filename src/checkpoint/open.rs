//! Opening a log: reads what is there and mends what a crash left. The order of writes that it relies on is in
//! [`log`](super::log).

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::bitmap::Bitmap;
use super::epoch::{Epoch, FILE_NAME, State};
use super::error::LogError;
use super::format::{Decoder, Header};
use super::log::{Damaged, ENDING, Log};
use crate::durable::{self, DurableError};
use crate::units::{CheckpointId, EpochId};

impl Log {
    /// Opens the log in `dir`, or creates it. Reads headers, not bitmaps; mends what a crash left. Damaged files are
    /// remembered in [`Log::damaged`].
    ///
    /// # Errors
    /// When the directory cannot be read or written.
    pub fn open(dir: &Path) -> Result<Self, LogError> {
        durable::create_dir(dir)?;
        durable::remove_temporaries(dir)?;
        let mut damaged = Vec::new();
        let state = State::read(dir)?.unwrap_or_else(|reason| {
            damaged.push(Damaged { file: dir.join(FILE_NAME), reason });
            State::default()
        });
        let mut log = Self { dir: dir.to_owned(), state, chain: vec![], cut_off: vec![], damaged, poisoned: false };
        let mut found = log.read_headers()?;
        if let Some(epoch) = log.state.epoch.clone() {
            log.remove_strays(&mut found, epoch.id)?;
            log.adopt(&found)?;
            log.link(found)?;
        }
        Ok(log)
    }

    /// Every checkpoint file that has a good header.
    fn read_headers(&mut self) -> Result<HashMap<CheckpointId, Header>, LogError> {
        let mut found = HashMap::new();
        for entry in std::fs::read_dir(&self.dir).map_err(DurableError::at("list", &self.dir))? {
            let file = entry.map_err(DurableError::at("list", &self.dir))?.path();
            if file.extension().is_none_or(|e| e != ENDING) {
                continue;
            }
            match Header::read_file(&file) {
                Ok(header) if self.path(header.id) == file => {
                    found.insert(header.id, header);
                }
                Ok(header) => {
                    let reason = format!("holds checkpoint {}: it was renamed", header.id);
                    self.damaged.push(Damaged { file, reason });
                }
                Err(e) => self.damaged.push(Damaged { file, reason: e.to_string() }),
            }
        }
        Ok(found)
    }

    /// Removes what an interrupted change of epochs left.
    fn remove_strays(&self, found: &mut HashMap<CheckpointId, Header>, epoch: EpochId) -> Result<(), LogError> {
        let strays: Vec<_> = found.extract_if(|_, header| header.epoch != epoch).map(|(id, _)| id).collect();
        for id in strays {
            durable::remove_file(&self.path(id))?;
        }
        Ok(())
    }

    /// Finishes a seal that was interrupted between the file and the head. A file that is not whole is left alone: the
    /// bitmap is still in QEMU then.
    fn adopt(&mut self, found: &HashMap<CheckpointId, Header>) -> Result<(), LogError> {
        let Some(epoch) = self.state.epoch.clone() else { return Ok(()) };
        let mut followers = found.values().filter(|h| h.prev == Some(epoch.last));
        let (Some(next), None) = (followers.next(), followers.next()) else { return Ok(()) };
        let mut bitmap = Bitmap::with_granule(epoch.size_bytes, next.granule_bytes.into());
        let read = Decoder::new().map_err(|e| e.to_string());
        if let Err(reason) = read.and_then(|mut decoder| self.read_into(&mut decoder, next, &mut bitmap)) {
            self.damaged.push(Damaged { file: self.path(next.id), reason });
            return Ok(());
        }
        tracing::info!(log = %self.dir.display(), checkpoint = %next.id, "finishing an interrupted seal");
        let mut state = self.state.clone();
        state.epoch = Some(Epoch { last: next.id, number: next.number, ..epoch });
        state.write(&self.dir)?;
        self.state = state;
        Ok(())
    }

    /// Follows the chain from the head to the first checkpoint or a gap.
    fn link(&mut self, mut found: HashMap<CheckpointId, Header>) -> Result<(), LogError> {
        let mut wanted = self.state.epoch.as_ref().map(|e| e.last);
        while let Some(id) = wanted {
            let Some(header) = found.remove(&id) else {
                let file = self.path(id);
                if !self.damaged.iter().any(|d| d.file == file) {
                    self.damaged.push(Damaged { file, reason: "is missing".to_owned() });
                }
                break;
            };
            wanted = header.prev;
            self.chain.push(header);
        }
        self.chain.reverse();
        // A merge that was interrupted leaves a file that a merged one answers for.
        let covered: HashSet<_> = self.chain.iter().flat_map(|h| &h.covers).collect();
        let merged: Vec<_> = found.extract_if(|id, _| covered.contains(id)).map(|(id, _)| id).collect();
        for id in merged {
            durable::remove_file(&self.path(id))?;
        }
        self.cut_off = found.into_values().collect();
        Ok(())
    }
}
