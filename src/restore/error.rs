//! Why a restore failed: what happened, to what, and what to do next.

use std::io;
use std::path::{Path, PathBuf};

use crate::durable::DurableError;
use crate::extent::Extent;
use crate::repo::RepoError;
use crate::repo::point::ChoiceError;
use crate::units::human_bytes;

/// An error of a restore. Unless it says otherwise, nothing was left behind and nothing that existed was changed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// No disks can be chosen.
    #[error(transparent)]
    Choice(#[from] ChoiceError),
    /// A name from the restore point cannot be a file's name.
    #[error("the {what} {name:?} of the restore point has a name that cannot safely be a file's name{}",
        if *what == "disk" { ": give it a target of its own (--disk DISK=TARGET)" } else { "" })]
    UnsafeName {
        /// `disk` or `file`.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// The target exists.
    #[error("{} exists; move it away, choose another target, or let it be replaced with --force", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The target cannot be one.
    #[error("{} cannot be a target: it is {kind}; name a new file or a block device", path.display())]
    NotATarget {
        /// What was named.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Writing to a block device was not allowed.
    #[error("{} is a block device: all that is on it would be overwritten; say --force if that is meant", path.display())]
    DeviceNeedsForce {
        /// The device.
        path: PathBuf,
    },
    /// The block device is too small.
    #[error("{} has {device_bytes} bytes, but the disk {disk:?} has {disk_bytes}; choose a larger device", path.display())]
    DeviceTooSmall {
        /// The disk.
        disk: String,
        /// The device.
        path: PathBuf,
        /// Size of the disk.
        disk_bytes: u64,
        /// Size of the device.
        device_bytes: u64,
    },
    /// Something uses the target.
    #[error("{} is in use ({by}); end what uses it, or choose another target", path.display())]
    InUse {
        /// The target.
        path: PathBuf,
        /// How that was seen.
        by: &'static str,
    },
    /// Two targets are one.
    #[error("{first:?} and {second:?} would both be restored to {}; give each a target of its own", path.display())]
    SameTarget {
        /// One of them.
        first: String,
        /// The other.
        second: String,
        /// The target.
        path: PathBuf,
    },
    /// The target lies in the repository.
    #[error("{} lies in the repository itself; restore to another place", path.display())]
    InRepository {
        /// The target.
        path: PathBuf,
    },
    /// The file system is too small.
    #[error(
        "{} is free on the file system of {}, but the restore writes {}; make space, choose another target, or restore \
         fewer disks at once",
        human_bytes(*available_bytes), path.display(), human_bytes(*needed_bytes)
    )]
    NoSpace {
        /// A directory on it.
        path: PathBuf,
        /// What the restore writes there.
        needed_bytes: u64,
        /// What is free.
        available_bytes: u64,
    },
    /// The format does not fit the target or the disk.
    #[error("{disk:?} cannot be restored as qcow2: {reason}; use the raw format")]
    NotAsQcow2 {
        /// The disk.
        disk: String,
        /// Why.
        reason: &'static str,
    },
    /// The repository does not give the bytes.
    #[error("{extent} of {disk:?} of {vm:?} cannot be read from the repository: {source}; {}", advice(disk))]
    Unreadable {
        /// The VM.
        vm: String,
        /// The disk or file.
        disk: String,
        /// Its bytes.
        extent: Extent,
        /// Why.
        source: Box<RepoError>,
    },
    /// The target does not take the bytes.
    #[error("cannot write {extent} of {disk:?} to {}: {source}{}", path.display(), space_advice(source))]
    Write {
        /// The disk or file.
        disk: String,
        /// The target.
        path: PathBuf,
        /// Bytes of the disk.
        extent: Extent,
        /// The system's error.
        source: io::Error,
    },
    /// The system refused something.
    #[error("cannot {what} {}: {source}{}", path.display(), space_advice(source))]
    Io {
        /// `open`, `flush`, …
        what: &'static str,
        /// Which file or directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A durable write failed.
    #[error("{error}{}", space_advice(&error.source))]
    Durable {
        /// What was tried, and the system's error.
        #[from]
        error: DurableError,
    },
    /// The repository cannot be used.
    #[error("{0}")]
    Repo(Box<RepoError>),
    /// What was written is not what is read back.
    #[error(
        "{} does not read back as it was written: {extent} of {disk:?} differ; suspect the target's hardware or file \
         system, and restore to another one", path.display()
    )]
    Differs {
        /// The disk or file.
        disk: String,
        /// The target.
        path: PathBuf,
        /// The first bytes that were found to differ.
        extent: Extent,
    },
    /// It was told to stop.
    #[error("the restore was interrupted")]
    Interrupted,
    /// It ended while a block device was being written.
    #[error("{source}; what {} holds now is undefined: it has some of {disk:?}, restore it again", path.display())]
    DeviceUndefined {
        /// The disk.
        disk: String,
        /// The device.
        path: PathBuf,
        /// Why it ended.
        source: Box<RestoreError>,
    },
}

impl RestoreError {
    /// Adds what was tried and where to the system's error.
    pub(super) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }

    /// Whether it ended because it was told to.
    pub fn is_interrupted(&self) -> bool {
        match self {
            Self::Interrupted => true,
            Self::DeviceUndefined { source, .. } => source.is_interrupted(),
            _ => false,
        }
    }

    /// Whether the target has no room.
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::NoSpace { .. } => true,
            Self::Write { source, .. } | Self::Io { source, .. } => no_space(source),
            Self::Durable { error } => error.is_no_space(),
            Self::DeviceUndefined { source, .. } => source.is_no_space(),
            _ => false,
        }
    }
}

impl From<RepoError> for RestoreError {
    fn from(error: RepoError) -> Self {
        Self::Repo(Box::new(error))
    }
}

fn no_space(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

fn space_advice(error: &io::Error) -> &'static str {
    match no_space(error) {
        true => "; make space there or choose another target",
        false => "",
    }
}

fn advice(disk: &str) -> String {
    format!("`livebackup verify` shows which points are whole; another point may hold {disk:?} intact")
}
