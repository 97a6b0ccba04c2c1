//! Durability's one home: a file is either there whole or not at all.
//!
//! Order: write a temporary file beside the target, fsync it, rename it, fsync the directory. A crash before the rename
//! leaves a `*.tmp` file that [`remove_temporaries`] collects; after it, the new content.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Ending of files that are being written.
pub const TEMPORARY_ENDING: &str = "tmp";

/// A durable write that failed, with the path.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}: {source}", path.display())]
pub struct DurableError {
    /// `create`, `write`, `flush`, `rename`, …
    pub what: &'static str,
    /// Which file or directory.
    pub path: PathBuf,
    /// The system's error.
    pub source: io::Error,
}

impl DurableError {
    /// Adds what was tried and where to the system's error.
    pub fn at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self { what, path, source }
    }

    /// Whether the file system is full (or a quota or file size limit was met).
    pub fn is_no_space(&self) -> bool {
        is_full(&self.source)
    }
}

/// Whether the first cause of an error that is the system's says that a file system is full (or a quota or file size limit
/// was met).
pub fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    let causes = std::iter::successors(Some(error), |error| error.source());
    let found = causes.into_iter().find_map(|cause| cause.downcast_ref::<io::Error>());
    found.is_some_and(|error| matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge))
}

/// Whether an existing target may be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replace {
    /// The target may exist and is replaced atomically.
    Yes,
    /// The target must not exist; if it does, the write fails with `AlreadyExists` and changes nothing.
    No,
}

/// A file that appears under its name only when [`Pending::commit`] is called.
#[derive(Debug)]
pub struct Pending {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
    done: bool,
}

impl Pending {
    /// Opens the temporary file of `target`, with access for the owner only.
    pub fn create(target: &Path) -> Result<Self, DurableError> {
        let mut name = target.file_name().unwrap_or(OsStr::new("unnamed")).to_owned();
        name.push(format!(".{}.{TEMPORARY_ENDING}", crate::units::PackId::random().short()));
        let temporary = target.with_file_name(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(DurableError::at("create", &temporary))?;
        Ok(Self { file, temporary, target: target.to_owned(), done: false })
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where the bytes are until the commit.
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Where they will be.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Makes the content durable and visible under its name.
    pub fn commit(mut self, replace: Replace) -> Result<File, DurableError> {
        crate::fault::point("durable.written");
        self.file.sync_all().map_err(DurableError::at("flush", &self.temporary))?;
        crate::fault::point("durable.flushed");
        match replace {
            Replace::Yes => fs::rename(&self.temporary, &self.target),
            // A hard link fails when the target exists, where rename would replace it.
            Replace::No => fs::hard_link(&self.temporary, &self.target).and_then(|()| fs::remove_file(&self.temporary)),
        }
        .map_err(DurableError::at("rename to", &self.target))?;
        self.done = true;
        crate::fault::point("durable.renamed");
        if let Some(parent) = self.target.parent() {
            sync_dir(parent)?;
        }
        self.file.try_clone().map_err(DurableError::at("reopen", &self.target))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.done {
            // Best effort: a left-over is collected by `remove_temporaries`.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Writes `content` as the whole of `target`, durably and atomically.
pub fn write_file(target: &Path, content: &[u8], replace: Replace) -> Result<(), DurableError> {
    let pending = Pending::create(target)?;
    pending.file().write_all(content).map_err(DurableError::at("write", pending.temporary()))?;
    pending.commit(replace).map(drop)
}

/// Creates `dir` and its missing parents, durably, with access for the owner only.
pub fn create_dir(dir: &Path) -> Result<(), DurableError> {
    use std::os::unix::fs::DirBuilderExt;
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent().filter(|p| !p.as_os_str().is_empty()) {
        create_dir(parent)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => {}
        other => other.map_err(DurableError::at("create the directory", dir))?,
    }
    match dir.parent() {
        Some(p) if !p.as_os_str().is_empty() => sync_dir(p),
        _ => Ok(()),
    }
}

/// Makes the names in `dir` durable.
pub fn sync_dir(dir: &Path) -> Result<(), DurableError> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir).and_then(|d| d.sync_all()).map_err(DurableError::at("flush the directory", dir))
}

/// Removes a file and makes that durable. A file that is not there is no error.
pub fn remove_file(path: &Path) -> Result<(), DurableError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(DurableError::at("remove", path))?,
    }
    path.parent().map_or(Ok(()), sync_dir)
}

/// Removes what crashed writers left in `dir`. Only for a directory that no other process writes to now.
pub fn remove_temporaries(dir: &Path) -> Result<usize, DurableError> {
    let mut removed = 0;
    for entry in fs::read_dir(dir).map_err(DurableError::at("list", dir))? {
        let path = entry.map_err(DurableError::at("list", dir))?.path();
        if path.extension() == Some(OsStr::new(TEMPORARY_ENDING)) {
            fs::remove_file(&path).map_err(DurableError::at("remove", &path))?;
            removed += 1;
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a");
        let pending = Pending::create(&target).unwrap();
        pending.file().write_all(b"half").unwrap();
        assert!(!target.exists());
        drop(pending);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "an abandoned write leaves nothing");

        write_file(&target, b"one", Replace::No).unwrap();
        let refused = write_file(&target, b"two", Replace::No).unwrap_err();
        assert_eq!(refused.source.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&target).unwrap(), b"one");
        write_file(&target, b"two", Replace::Yes).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn left_overs_are_collected() {
        let dir = tempfile::tempdir().unwrap();
        std::mem::forget(Pending::create(&dir.path().join("x")).unwrap());
        write_file(&dir.path().join("keep"), b"k", Replace::No).unwrap();
        assert_eq!(remove_temporaries(dir.path()).unwrap(), 1);
        assert!(dir.path().join("keep").exists());
    }
}
