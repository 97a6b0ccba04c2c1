//! Journal: what a running writer has already made durable, so that a killed one's work is not lost.
//!
//! ```text
//! journal/<id>/packs        record × n; locked (flock) while its writer lives
//! journal/<id>/<PackId>     the pack that is being written, moved to packs/ when it is whole and flushed
//! record = PackId 16 ‖ length u64 ‖ kind u8 ‖ 0 × 3 ‖ crc32 u32 of the 28 bytes before        32 bytes
//! ```
//!
//! A pack's record is appended and flushed after the pack is durable under its own name, and before anybody is told so.
//! `finish` writes the index and then removes the directory. What a killed writer leaves is adopted by the next one:
//! packs that no index lists yet are listed in a new index file, from their own directories, so that the same chunks need
//! not be sent or stored again; if no restore point ever refers to them, they are garbage like any other. The pack that
//! was being written is dropped. What a backup over a connection needs to go on where a killed one was lies beside the
//! journals, one file a VM: see `session_log`.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::durable;
use crate::repo::error::{FormatError, RepoError};
use crate::repo::fields::u32_at;
use crate::repo::index::format::{PackRef, encode_entry};
use crate::repo::index::merge;
use crate::repo::index::set::IndexSet;
use crate::repo::layout::Layout;
use crate::repo::packfile;
use crate::units::PackId;

const RECORD_BYTES: usize = 32;
/// Longest list that is read: a million packs, 64 TiB.
const MAX_JOURNAL_BYTES: u64 = (RECORD_BYTES as u64) << 20;
const LIST: &str = "packs";

/// A running writer's journal.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    list: File,
    records: u64,
}

impl Journal {
    /// Begins a journal.
    pub fn create(layout: &Layout) -> Result<Self, RepoError> {
        // Another process may take the still empty journal for a dead one's: then simply begin another.
        for _ in 0..10 {
            match Self::try_create(layout) {
                Err(RepoError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(RepoError::Durable { error }) if error.source.kind() == io::ErrorKind::NotFound => {}
                Err(RepoError::Busy { .. }) => {}
                other => return other,
            }
        }
        Self::try_create(layout)
    }

    fn try_create(layout: &Layout) -> Result<Self, RepoError> {
        let dir = layout.journal().join(PackId::random().to_string());
        durable::create_dir(&dir)?;
        let path = dir.join(LIST);
        let list = OpenOptions::new()
            .read(true)
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(RepoError::io("create", &path))?;
        list.try_lock().map_err(|e| match e {
            TryLockError::Error(source) => RepoError::NoLocks { path, source },
            TryLockError::WouldBlock => RepoError::Busy { who: "a process that adopts a new journal".to_owned() },
        })?;
        durable::sync_dir(&dir)?;
        Ok(Self { dir, list, records: 0 })
    }

    /// Where packs lie while they are written.
    pub fn unfinished_dir(&self) -> PathBuf {
        self.dir.clone()
    }

    /// Records a durable pack, durably.
    pub fn record(&mut self, pack: &PackRef) -> Result<(), RepoError> {
        let path = self.dir.join(LIST);
        self.list.write_all(&encode(pack)).map_err(RepoError::io("write", &path))?;
        self.list.sync_data().map_err(RepoError::io("flush", &path))?;
        self.records += 1;
        Ok(())
    }

    /// Removes the journal: an index lists its packs.
    pub fn finish(self) -> Result<(), RepoError> {
        remove(&self.dir)
    }

    /// Leaves the journal to the next writer; removes it if there is nothing to adopt.
    pub fn abandon(self) -> Result<(), RepoError> {
        if self.records == 0 {
            return remove(&self.dir);
        }
        Ok(())
    }
}

fn remove(dir: &Path) -> Result<(), RepoError> {
    match fs::remove_dir_all(dir) {
        // Another writer, looking for what to adopt, was quicker.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(RepoError::io("remove", dir)),
    }
}

fn encode(pack: &PackRef) -> [u8; RECORD_BYTES] {
    let mut out = pack.encode();
    let crc = crc32fast::hash(&out[..28]);
    out[28..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// The packs that a journal's list names. Ends at the first record that is not whole: the writer was killed there.
pub fn decode(list: &[u8]) -> Vec<PackRef> {
    let (records, _) = list.as_chunks::<RECORD_BYTES>();
    let decoded = records.iter().map(|record| {
        if u32_at(record, 28) != Some(crc32fast::hash(&record[..28])) {
            return Err(FormatError::bad("checksum"));
        }
        PackRef::decode(record)
    });
    decoded.map_while(Result::ok).collect()
}

/// The packs of all journals: they are listed in an index when their writer ends, or by who adopts them.
pub(crate) fn packs(layout: &Layout) -> Result<HashSet<PackId>, RepoError> {
    let journals = layout.journal();
    let at = || RepoError::io("list", &journals);
    let mut found = HashSet::new();
    for entry in fs::read_dir(&journals).map_err(at())? {
        let path = entry.map_err(at())?.path().join(LIST);
        // One that has just gone lists nothing.
        if let Ok(list) = File::open(&path) {
            found.extend(read_list(&list, &path)?.into_iter().map(|pack| pack.id));
        }
    }
    Ok(found)
}

fn read_list(list: &File, path: &Path) -> Result<Vec<PackRef>, RepoError> {
    let mut bytes = Vec::new();
    list.take(MAX_JOURNAL_BYTES).read_to_end(&mut bytes).map_err(RepoError::io("read", path))?;
    Ok(decode(&bytes))
}

/// Adopts what dead writers left: see the module. Returns how many packs were found and listed.
pub fn adopt(layout: &Layout) -> Result<usize, RepoError> {
    let journals = layout.journal();
    let at = || RepoError::io("list", &journals);
    let mut adopted = 0;
    for entry in fs::read_dir(&journals).map_err(at())? {
        adopted += adopt_one(layout, &entry.map_err(at())?.path())?;
    }
    Ok(adopted)
}

fn adopt_one(layout: &Layout, dir: &Path) -> Result<usize, RepoError> {
    let path = dir.join(LIST);
    let list = match OpenOptions::new().read(true).write(true).open(&path) {
        Ok(list) => list,
        // A writer that has just begun or just ended, or one that was killed while it began: nothing to adopt.
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            let _ = fs::remove_dir(dir);
            return Ok(0);
        }
        Err(e) => return Err(RepoError::io("open", &path)(e)),
    };
    match list.try_lock() {
        Err(TryLockError::WouldBlock) => return Ok(0),
        Err(TryLockError::Error(source)) => return Err(RepoError::NoLocks { path, source }),
        Ok(()) => {}
    }
    let meta = list.metadata().map_err(RepoError::io("look at", &path))?;
    if meta.nlink() == 0 {
        return Ok(0);
    }
    let listed: HashSet<_> = IndexSet::open(layout)?.packs()?.into_iter().map(|p| p.id).collect();
    let (mut packs, mut entries) = (Vec::new(), Vec::new());
    for pack in read_list(&list, &path)?.into_iter().filter(|pack| !listed.contains(&pack.id)) {
        match packfile::read_directory(&layout.pack(pack.id)) {
            Ok((found, blobs)) if found == pack => {
                let number = packs.len() as u32;
                entries.extend(blobs.iter().map(|blob| encode_entry(&blob.digest, number, &blob.placed)));
                packs.push(pack);
            }
            Ok(_) => tracing::warn!(pack = %pack.id, "a dead writer's pack is not what its journal says; left alone"),
            Err(error) => tracing::warn!(%error, "a dead writer's pack cannot be adopted"),
        }
    }
    if !packs.is_empty() {
        entries.sort_unstable();
        merge::write(layout, &packs, entries.into_iter())?;
    }
    remove(dir)?;
    Ok(packs.len())
}
