//! Locks: who may do what in a repository at the same time.
//!
//! | running \ starting       | backup of VM a | backup of VM b | restore, verify, list | prune (future) |
//! |--------------------------|----------------|----------------|-----------------------|----------------|
//! | backup of VM a           | refused        | goes on        | goes on               | refused        |
//! | restore, verify          | goes on        | goes on        | goes on               | refused        |
//! | list                     | goes on        | goes on        | goes on               | goes on        |
//! | prune (future)           | refused        | refused        | refused               | refused        |
//!
//! A backup holds `locks/vm-VM` exclusively; everything that reads or writes packs holds `locks/repository` shared, a
//! prune exclusively. A writer also holds a lock on its journal, so that others know a dead writer's journal from a
//! running one's; who merges index files holds `locks/index`.
//!
//! Locks are `flock` on open files: the kernel releases them when the holder dies, however it dies, so none is ever
//! stale. The files stay (removing a lock file while another process opens it would give two holders). The exclusive
//! holder of a lock writes who it is into it, for messages only. **Network file systems:** NFS (v4, or v3 with its lock
//! daemon) and CIFS carry `flock` between hosts, some FUSE file systems keep it to one host; a file system that has none
//! is refused ([`RepoError::NoLocks`]), one that is remote is warned about, since it may lie. **Read-only media:** who only reads
//! locks a file that is there, or its directory.

use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::repo::error::RepoError;
use crate::repo::layout::{Layout, directory_of_vm};

/// Who holds an exclusive lock.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its process id, on its host.
    pub pid: u32,
    /// Its host.
    pub host: String,
    /// Since when.
    pub since: Option<Timestamp>,
}

impl Holder {
    fn this_process() -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        Self { pid: std::process::id(), host: host.trim().to_owned(), since: Some(Timestamp::now()) }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.since {
            Some(since) => write!(f, "process {} on {}, since {since:.0}", self.pid, self.host),
            None => write!(f, "a process that has only just started"),
        }
    }
}

/// A held lock; dropping it releases it.
#[derive(Debug)]
pub struct Lock {
    file: File,
    exclusive: bool,
}

impl Drop for Lock {
    fn drop(&mut self) {
        if self.exclusive {
            let _ = self.file.set_len(0);
        }
        // Not left to the closing of the file: a child process may have been forked and still hold it.
        let _ = self.file.unlock();
    }
}

enum Refusal {
    Held(Holder),
    Error(RepoError),
}

fn take(path: &Path, exclusive: bool) -> Result<Lock, Refusal> {
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    let open = match open {
        // Who only reads may have a repository that it cannot write to. Whoever can, holds these locks all the same.
        Err(e) if !exclusive && matches!(e.kind(), ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied) => {
            let instead = || path.parent().map_or_else(|| Err(e), File::open);
            File::open(path).or_else(|_| instead())
        }
        opened => opened,
    };
    let mut file = open.map_err(|e| Refusal::Error(RepoError::io("open the lock file", path)(e)))?;
    let taken = if exclusive { file.try_lock() } else { file.try_lock_shared() };
    match taken {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = Vec::new();
            let _ = (&mut file).take(4096).read_to_end(&mut text);
            return Err(Refusal::Held(serde_json::from_slice(&text).unwrap_or_default()));
        }
        Err(TryLockError::Error(source)) => {
            return Err(Refusal::Error(RepoError::NoLocks { path: path.to_owned(), source }));
        }
    }
    if exclusive {
        // For messages only: a full disk must not stop a prune.
        let holder = serde_json::to_vec(&Holder::this_process()).unwrap_or_default();
        let _ = file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).and_then(|_| file.write_all(&holder));
    }
    Ok(Lock { file, exclusive })
}

fn busy(refusal: Refusal, who: impl FnOnce(Holder) -> RepoError) -> RepoError {
    match refusal {
        Refusal::Held(holder) => who(holder),
        Refusal::Error(error) => error,
    }
}

/// Takes the lock of one VM for a backup. Held by another: ends at once and says by whom.
pub fn vm(layout: &Layout, vm: &str) -> Result<Lock, RepoError> {
    let path = layout.locks().join(format!("vm-{}", directory_of_vm(vm)?));
    take(&path, true).map_err(|r| busy(r, |holder| RepoError::VmBusy { vm: vm.to_owned(), holder }))
}

/// Takes part in the use of the repository, as all who read or write packs do.
pub fn shared(layout: &Layout) -> Result<Lock, RepoError> {
    take(&layout.locks().join("repository"), false)
        .map_err(|r| busy(r, |holder| RepoError::Busy { who: holder.to_string() }))
}

/// Takes the repository for this process alone, for what removes packs.
pub fn exclusive(layout: &Layout) -> Result<Lock, RepoError> {
    let who = |_| RepoError::Busy { who: "running backups, restores or verifications".to_owned() };
    take(&layout.locks().join("repository"), true).map_err(|r| busy(r, who))
}

/// Takes the right to merge index files, or `None` when another is at it.
pub(crate) fn index(layout: &Layout) -> Result<Option<Lock>, RepoError> {
    match take(&layout.locks().join("index"), true) {
        Ok(lock) => Ok(Some(lock)),
        Err(Refusal::Held(_)) => Ok(None),
        Err(Refusal::Error(error)) => Err(error),
    }
}

/// Warns when the repository lies on a file system whose locks may not reach other hosts.
pub(crate) fn warn_if_remote(layout: &Layout) {
    use nix::sys::statfs::{FUSE_SUPER_MAGIC, NFS_SUPER_MAGIC, SMB_SUPER_MAGIC, statfs};
    if let Ok(stat) = statfs(layout.root())
        && [FUSE_SUPER_MAGIC, NFS_SUPER_MAGIC, SMB_SUPER_MAGIC].contains(&stat.filesystem_type())
    {
        tracing::warn!(repository = %layout.root().display(),
            "the repository is on a network or FUSE file system: locks may not hold between hosts");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> (tempfile::TempDir, Layout) {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        std::fs::create_dir(layout.locks()).unwrap();
        (dir, layout)
    }

    #[test]
    fn a_second_backup_of_a_vm_is_told_who_has_it() {
        let (_dir, layout) = layout();
        let first = vm(&layout, "a").unwrap();
        let _other = vm(&layout, "b").unwrap();
        match vm(&layout, "a").unwrap_err() {
            RepoError::VmBusy { vm, holder } => {
                assert_eq!((vm.as_str(), holder.pid), ("a", std::process::id()));
                assert!(!holder.host.is_empty() && holder.since.is_some());
            }
            other => panic!("{other}"),
        }
        drop(first);
        vm(&layout, "a").unwrap();
    }

    #[test]
    fn many_share_or_one_has_all() {
        let (_dir, layout) = layout();
        let (one, two) = (shared(&layout).unwrap(), shared(&layout).unwrap());
        assert!(matches!(exclusive(&layout), Err(RepoError::Busy { .. })));
        drop((one, two));
        let all = exclusive(&layout).unwrap();
        let refused = shared(&layout).unwrap_err().to_string();
        assert!(refused.contains(&std::process::id().to_string()), "{refused}");
        drop(all);
        shared(&layout).unwrap();
    }

    #[test]
    fn rubbish_in_a_lock_file_is_no_harm() {
        let (_dir, layout) = layout();
        let _held = vm(&layout, "a").unwrap();
        std::fs::write(layout.locks().join("vm-a"), b"\xff\0{").unwrap();
        assert!(matches!(vm(&layout, "a"), Err(RepoError::VmBusy { .. })));
    }

    /// sysfs lets nobody make a file, root neither.
    #[test]
    fn who_only_reads_locks_what_it_cannot_write_to() {
        let path = Path::new("/sys/livebackup");
        assert!(take(path, false).is_ok());
        assert!(matches!(take(path, true), Err(Refusal::Error(RepoError::Io { .. }))));
    }
}
