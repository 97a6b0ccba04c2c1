//! Why something in a repository failed: what happened, to what, and what to do next.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::durable::DurableError;
use crate::repo::digest::Digest;
use crate::repo::lock::Holder;

/// Why stored bytes were not taken. Pure decoders return it; [`FormatError::at`] adds the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Written by a later livebackup.
    #[error("format version {version} is newer than this program knows (up to {supported})")]
    Newer {
        /// What the file says.
        version: u32,
        /// What this program reads.
        supported: u32,
    },
    /// Not what it should be.
    #[error("{0}")]
    Bad(String),
}

impl FormatError {
    /// A format error with this reason.
    pub fn bad(reason: impl Into<String>) -> Self {
        Self::Bad(reason.into())
    }

    /// Adds what the file is and where.
    pub fn at(self, what: &'static str, path: &Path) -> RepoError {
        let path = path.to_owned();
        match self {
            Self::Newer { version, supported } => RepoError::Newer { what, path, version, supported },
            Self::Bad(reason) => RepoError::Corrupt { what, path, reason },
        }
    }
}

/// An error of the repository.
#[derive(Debug, thiserror::Error)]
pub enum RepoError {
    /// The system refused something.
    #[error("cannot {what} {}: {source}{}", path.display(), advice(source))]
    Io {
        /// `open`, `read`, `write`, …
        what: &'static str,
        /// Which file or directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A durable write failed.
    #[error("{error}{}", advice(&error.source))]
    Durable {
        /// What was tried, and the system's error.
        #[from]
        error: DurableError,
    },
    /// There is no repository here.
    #[error("{} is no livebackup repository: {reason}; `livebackup init` makes one", path.display())]
    NotARepository {
        /// Where it was looked for.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// The repository's config is missing or damaged.
    #[error(
        "{} is {reason}: put it back from a copy of the repository, or (once it is away) make a new one with `livebackup init \
         {}`, and the --chunk-size that the repository had unless that was the usual one: its restore points stay",
        path.display(),
        path.parent().unwrap_or(path).display()
    )]
    BadConfig {
        /// The config.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// `init` found something.
    #[error("{} cannot become a repository: {reason}", path.display())]
    CannotInit {
        /// Where it was to be.
        path: PathBuf,
        /// What is in the way.
        reason: String,
    },
    /// A later livebackup wrote it.
    #[error(
        "{what} {} has format version {version}; this program reads up to {supported}: use a newer livebackup",
        path.display()
    )]
    Newer {
        /// `repository`, `pack`, `index`, `restore point`.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the file says.
        version: u32,
        /// What this program reads.
        supported: u32,
    },
    /// A file is damaged.
    #[error("{what} {} is damaged: {reason}; `livebackup verify` shows what it holds", path.display())]
    Corrupt {
        /// `repository config`, `pack`, `index`, `restore point`, `journal`.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Stored bytes are not what was stored.
    #[error("pack {} at offset {offset_bytes} (length {stored_len}) does not hold {digest}: {reason}", path.display())]
    DamagedBlob {
        /// Which pack.
        path: PathBuf,
        /// Where in it.
        offset_bytes: u64,
        /// How many bytes are stored.
        stored_len: u32,
        /// What they should be.
        digest: Digest,
        /// What is wrong with them.
        reason: String,
    },
    /// No index knows the digest.
    #[error("no index of the repository knows {digest}: an index or pack is missing; run `livebackup verify`")]
    Missing {
        /// What was looked for.
        digest: Digest,
    },
    /// Points of a VM cannot be read, and the latest may be one of them.
    #[error(
        "which point of {vm:?} is the latest cannot be said: {source}; name one: the newest that can be read is {newest}"
    )]
    LatestUnknown {
        /// Which VM.
        vm: String,
        /// What is wrong with one of them.
        source: Box<RepoError>,
        /// The id of the newest one that can be read, shortened.
        newest: String,
    },
    /// A part of what a disk goes on from cannot be read.
    #[error("what disk {disk} goes on from cannot be read: {source}")]
    BaseLost {
        /// The writer's number of the disk.
        disk: usize,
        /// Why.
        source: Box<RepoError>,
    },
    /// Compressed bytes that were to be stored are not what they are said to be.
    #[error("the piece at {offset_bytes} of disk {disk} {reason}")]
    BadPiece {
        /// The writer's number of the disk.
        disk: usize,
        /// Where it belongs.
        offset_bytes: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// Another backup of the same VM is running.
    #[error("another backup of {vm:?} into this repository is running: {holder}; wait for it or end it")]
    VmBusy {
        /// Which VM.
        vm: String,
        /// Who holds the lock.
        holder: Holder,
    },
    /// Another operation excludes this one.
    #[error("the repository is in use by {who}; wait for it or end it")]
    Busy {
        /// Who holds the lock.
        who: String,
    },
    /// The file system cannot lock.
    #[error(
        "the file system of {} does not support locks (flock): {source}; keep the repository on one that does",
        path.display()
    )]
    NoLocks {
        /// The lock file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// No such restore point.
    #[error("no restore point {point:?} of {vm:?}: {reason}")]
    NoPoint {
        /// Which VM.
        vm: String,
        /// How it was named.
        point: String,
        /// What there is instead.
        reason: String,
    },
    /// The caller asked for something that cannot be.
    #[error("{0}")]
    Refused(String),
    /// The writer failed before; nothing more is taken. The source says why.
    #[error("{0}")]
    Failed(Arc<RepoError>),
}

impl RepoError {
    /// Adds what was tried and where to the system's error.
    pub fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }

    /// Whether the repository's file system is full.
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::Io { source, .. } => no_space(source),
            Self::Durable { error } => error.is_no_space(),
            Self::Failed(error) => error.is_no_space(),
            _ => false,
        }
    }

    /// The writer's disk of which the base cannot be read, if it failed by that.
    pub fn base_lost(&self) -> Option<usize> {
        match self {
            Self::BaseLost { disk, .. } => Some(*disk),
            Self::Failed(error) => error.base_lost(),
            _ => None,
        }
    }
}

impl RepoError {
    /// Whether who gave the writer its bytes is at fault.
    pub fn is_bad_piece(&self) -> bool {
        match self {
            Self::BadPiece { .. } => true,
            Self::Failed(error) => error.is_bad_piece(),
            _ => false,
        }
    }
}

fn no_space(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

fn advice(error: &io::Error) -> &'static str {
    match no_space(error) {
        true => "; make space in the repository's file system: all earlier restore points are intact",
        false => "",
    }
}
