//! Places that disks are written to, and whether they may be.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::durable::{Pending, Replace, TEMPORARY_ENDING};
use crate::restore::Format;
use crate::restore::device::Device;
use crate::restore::error::RestoreError;
use crate::restore::qcow2::Layout;

/// Longest name of a file that leaves room for the ending of its temporary one, `.xxxxxxxx.tmp`.
pub(super) const MAX_FILE_NAME_BYTES: usize = 255 - 13;

/// Where a disk is written to.
pub(super) enum Place {
    /// A file that is made.
    New {
        path: PathBuf,
        replace: Replace,
        /// Set when it is begun, taken when it is committed.
        pending: Option<Pending>,
        /// For qcow2: where in the file everything is.
        layout: Option<Layout>,
    },
    /// A block device, open and held.
    Device(Device),
    /// A file that is there already, with the right content.
    Kept(PathBuf),
}

impl Place {
    pub fn path(&self) -> &Path {
        match self {
            Self::New { path, .. } | Self::Kept(path) => path,
            Self::Device(device) => device.path(),
        }
    }

    pub fn is_device(&self) -> bool {
        matches!(self, Self::Device(_))
    }

    pub fn format(&self) -> Format {
        match self {
            Self::New { layout: Some(_), .. } => Format::Qcow2,
            _ => Format::Raw,
        }
    }
}

/// What makes two targets the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Key {
    Name(PathBuf),
    Device(u64),
}

/// Looks at a target; nothing is opened for writing yet.
pub(super) fn look(path: &Path, force: bool) -> Result<Key, RestoreError> {
    let not = |kind| RestoreError::NotATarget { path: path.to_owned(), kind };
    let name = path.file_name().ok_or_else(|| not("no file name"))?;
    if name.len() > MAX_FILE_NAME_BYTES {
        return Err(not("a name that is too long"));
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let parent = parent.canonicalize().map_err(RestoreError::io("find the directory", parent))?;
    let key = Key::Name(parent.join(name));
    let link = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(key),
        found => found.map_err(RestoreError::io("look at", path))?,
    };
    // Links are followed to block devices, as those under /dev are.
    let found = if link.is_symlink() { fs::metadata(path).ok() } else { Some(link) };
    match found.map(|found| (found.file_type(), found)) {
        Some((kind, found)) if kind.is_block_device() => match force {
            true => Ok(Key::Device(found.rdev())),
            false => Err(RestoreError::DeviceNeedsForce { path: path.to_owned() }),
        },
        _ if fs::symlink_metadata(path).is_ok_and(|m| m.is_symlink()) => Err(not("a symbolic link")),
        Some((kind, _)) if kind.is_file() => match force {
            true => in_use(path).map(|()| key),
            false => Err(RestoreError::Exists { path: path.to_owned() }),
        },
        Some((kind, _)) if kind.is_dir() => Err(not("a directory")),
        _ => Err(not("neither a file nor a block device")),
    }
}

fn in_use(path: &Path) -> Result<(), RestoreError> {
    let file = File::open(path).map_err(RestoreError::io("open", path))?;
    match is_locked(&file).map_err(RestoreError::io("look for locks on", path))? {
        true => {
            Err(RestoreError::InUse { path: path.to_owned(), by: "another program, perhaps QEMU, holds a lock on it" })
        }
        false => Ok(()),
    }
}

/// Whether another open of the file holds a lock on any of its bytes, as QEMU does on its images.
pub(super) fn is_locked(file: &File) -> io::Result<bool> {
    // SAFETY: all-zero bytes are a valid flock.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    match fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)) {
        Ok(_) => Ok(lock.l_type != libc::F_UNLCK as libc::c_short),
        // A file system without locks has none.
        Err(nix::errno::Errno::EINVAL | nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOLCK) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Begins a file: locked, so that another restore can tell it from what a dead one left.
pub(super) fn begin(path: &Path) -> Result<Pending, RestoreError> {
    let pending = Pending::create(path)?;
    // Where there are no locks, left-overs are not removed either.
    let _ = pending.file().try_lock();
    Ok(pending)
}

/// Removes temporary files of this target whose writer is dead.
pub(super) fn remove_left_overs(path: &Path) {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name().and_then(OsStr::to_str)) else { return };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let is_ours = |found: &str| {
        let middle = found.strip_prefix(name).and_then(|rest| rest.strip_prefix('.'));
        let random =
            middle.and_then(|rest| rest.strip_suffix(TEMPORARY_ENDING)).and_then(|rest| rest.strip_suffix('.'));
        random.is_some_and(|r| r.len() == 8 && r.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
    };
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file && entry.file_name().to_str().is_some_and(is_ours) {
            let free = File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok());
            if free {
                tracing::info!(path = %entry.path().display(), "removing what an interrupted restore left");
                // Best effort: it only takes space.
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}
