//! Repository: a directory that holds restore points, made once and opened many times.

use std::fs;
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;

use crate::durable::{self, Replace};
use crate::repo::config::{Config, is_chunk_size};
use crate::repo::error::{FormatError, RepoError};
use crate::repo::layout::Layout;
use crate::repo::lock::{self, Lock};
use crate::repo::reader::Reader;
use crate::repo::sealed::MAX_SEALED_BYTES;
use crate::repo::writer::{Writer, WriterOptions};
use crate::units::{KIB, RepositoryId};

/// Chunk size of a new repository.
///
/// What speaks for small chunks is what an incremental of scattered writes stores; for large ones, the size of the index
/// (48 bytes a chunk) and of trees (32). One run of `bench/repo.rs` on 1 GiB that zstd 1 makes 43 % of, on 2 processors
/// shared with other work (figures of processor time vary by a tenth), compressed with zstd 1 and, in brackets, not:
///
/// | chunk   | 1,600 writes of 4 KiB: MiB stored | full: stored | processor s/GiB | index + tree of 1 TiB stored |
/// |---------|-----------------------------------|--------------|-----------------|------------------------------|
/// | 64 KiB  | 43 (101)                          | 42.7 %       | 2.25 (0.99)     | 768 + 512 MiB                |
/// | 128 KiB | 85 (200)                          | 42.6 %       | 2.47 (0.86)     | 384 + 256 MiB                |
/// | 256 KiB | 170 (400)                         | 42.5 %       | 1.98 (0.89)     | 192 + 128 MiB                |
/// | 512 KiB | 340 (800)                         | 42.5 %       | 2.11 (0.91)     | 96 + 64 MiB                  |
/// | 1 MiB   | 425 (1000, the whole disk)        | 42.5 %       | 2.06 (0.95)     | 48 + 32 MiB                  |
///
/// Compression and processor time hardly depend on it, so the first column decides against large chunks; 128 KiB and not
/// 64 halves an index that is to stay in the page cache when a repository holds tens of TiB.
pub const DEFAULT_CHUNK_BYTES: u32 = 128 * KIB as u32;

/// An open repository. Cheap to clone; holds no lock.
#[derive(Clone, Debug)]
pub struct Repository {
    layout: Arc<Layout>,
    config: Arc<Config>,
}

/// Reads a whole file that is at most `max_bytes` long.
pub(crate) fn read_bounded(path: &Path, max_bytes: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(max_bytes + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > max_bytes {
        true => Err(std::io::Error::other(format!("it is longer than {max_bytes} bytes"))),
        false => Ok(bytes),
    }
}

impl Repository {
    /// Makes a repository in `dir`, which must be empty or not exist. The config is written last: a crash before leaves
    /// no repository, and `init` can be run again.
    pub fn init(dir: &Path, chunk_bytes: u32) -> Result<Self, RepoError> {
        let cannot = |reason: &str| RepoError::CannotInit { path: dir.to_owned(), reason: reason.to_owned() };
        if !is_chunk_size(chunk_bytes) {
            return Err(RepoError::Refused(format!(
                "a chunk size of {chunk_bytes} bytes is not possible: a power of two from 64 KiB to 1 MiB is"
            )));
        }
        let layout = Layout::new(dir);
        match fs::symlink_metadata(layout.config()) {
            Ok(_) => return Err(cannot("there is a repository already")),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound) => {}
            Err(e) => return Err(RepoError::io("look at", &layout.config())(e)),
        }
        durable::create_dir(dir)?;
        let dirs = [layout.packs(), layout.index(), layout.points(), layout.locks(), layout.journal()];
        for entry in fs::read_dir(dir).map_err(RepoError::io("list", dir))? {
            let path = entry.map_err(RepoError::io("list", dir))?.path();
            let left_over = path.extension().is_some_and(|e| e == durable::TEMPORARY_ENDING);
            if !left_over && !dirs.contains(&path) {
                return Err(cannot("the directory is not empty"));
            }
        }
        dirs.iter().try_for_each(|dir| durable::create_dir(dir))?;
        let config = Config { id: RepositoryId::random(), chunk_bytes, created: Timestamp::now() };
        let file = config.encode().map_err(|e| e.at("repository config", &layout.config()))?;
        durable::write_file(&layout.config(), &file, Replace::No)?;
        Self::open(dir)
    }

    /// Opens the repository in `dir`.
    pub fn open(dir: &Path) -> Result<Self, RepoError> {
        let layout = Layout::new(dir);
        let not = |reason: &str| RepoError::NotARepository { path: dir.to_owned(), reason: reason.to_owned() };
        let bad = |reason: String| RepoError::BadConfig { path: layout.config(), reason };
        let file = match read_bounded(&layout.config(), MAX_SEALED_BYTES) {
            Ok(file) => file,
            Err(e) => {
                return Err(match (e.kind(), dir.is_dir()) {
                    (ErrorKind::NotFound, true) if layout.packs().is_dir() && layout.points().is_dir() => {
                        bad("missing".to_owned())
                    }
                    (ErrorKind::NotFound, true) => not("the directory has no file `config`"),
                    (ErrorKind::NotFound, false) => not("there is no such directory"),
                    (ErrorKind::NotADirectory, _) => not("it is not a directory"),
                    _ => RepoError::io("read", &layout.config())(e),
                });
            }
        };
        let config = Config::decode(&file).map_err(|error| match error {
            FormatError::Bad(reason) => bad(format!("damaged ({reason})")),
            newer => newer.at("repository config", &layout.config()),
        })?;
        for dir in [layout.packs(), layout.index(), layout.points(), layout.locks(), layout.journal()] {
            if !dir.is_dir() {
                return Err(missing(&dir));
            }
        }
        lock::warn_if_remote(&layout);
        Ok(Self { layout: Arc::new(layout), config: Arc::new(config) })
    }

    /// What the repository is.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where its files are.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(crate) fn shared_layout(&self) -> Arc<Layout> {
        self.layout.clone()
    }

    /// Takes the lock of one VM for a backup: to be held until its manifest is committed.
    pub fn lock_vm(&self, vm: &str) -> Result<Lock, RepoError> {
        lock::vm(&self.layout, vm)
    }

    /// A reader of all that is in the repository now. Holds the shared lock.
    pub fn reader(&self) -> Result<Reader, RepoError> {
        Reader::open(self.layout.clone())
    }

    /// A writer, which stores disks. Holds the shared lock. Adopts what dead writers left.
    pub fn writer(&self, options: WriterOptions) -> Result<Writer, RepoError> {
        Writer::begin(self.layout.clone(), options)
    }
}

fn missing(dir: &Path) -> RepoError {
    RepoError::Corrupt {
        what: "repository",
        path: dir.parent().unwrap_or(dir).to_owned(),
        reason: format!("it has no directory {:?}", dir.file_name().unwrap_or_default()),
    }
}
