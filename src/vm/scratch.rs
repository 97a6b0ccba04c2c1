//! Scratch: where copy-before-write puts old data.
//!
//! An unlinked file on a local file system (or tmpfs), handed to QEMU as a descriptor, so that nothing stays after any
//! crash. Its growth is watched: the fleece lets go before the budget or the file system's reserve is used up, since the
//! guest's own disks may lie on the same file system.
//!
//! **A scratch that hangs** (its device or server does not answer) holds QEMU up when its node goes. So when a session is
//! over, [`Scratch::release`] first gives all space back, and when the session has failed, it also writes, syncs and reads
//! a little through our own descriptor, on a thread that may hang; until that has come back, the filter stays.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::statfs::{self, FsType};
use nix::sys::statvfs::statvfs;
use tokio::sync::oneshot;

use crate::durable;
use crate::units::{GIB, MIB, PackId, human_bytes};
use crate::wire::message::{Failure, FailureCode};

/// File systems over a network or through another process: they may hang, and a hung scratch holds QEMU up.
const NOT_LOCAL: [(i64, &str); 8] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB2"),
    (0x6573_5546, "FUSE"),
    (0x00c3_6400, "Ceph"),
    (0x0102_1997, "9p"),
    (0x0bd0_0bd0, "Lustre"),
];
/// The largest reserve that is left alone.
const MAX_RESERVE_BYTES: u64 = GIB;
/// What must be free beyond the reserve before a fleece is opened.
const MIN_ROOM_BYTES: u64 = 16 * MIB;

/// A directory for scratch files, and how much of it may be used.
#[derive(Clone, Debug)]
pub struct ScratchDir {
    dir: PathBuf,
    budget_bytes: Option<u64>,
}

impl ScratchDir {
    /// Takes a directory, making it if it is missing. `budget_bytes` bounds a session's scratch, all disks together.
    pub fn open(dir: &Path, budget_bytes: Option<u64>) -> Result<Self, Failure> {
        durable::create_dir(dir).map_err(|e| no_scratch(dir, e))?;
        let kind = statfs::statfs(dir).map_err(|e| no_scratch(dir, e))?.filesystem_type();
        if let Some((_, name)) = NOT_LOCAL.iter().find(|(magic, _)| kind == FsType(*magic)) {
            return Err(no_scratch(
                dir,
                format!("it is on {name}, and scratch must be local: a server that hangs would hold the guest up"),
            ));
        }
        let this = Self { dir: dir.to_owned(), budget_bytes };
        let (free, reserve) = this.free_and_reserve().map_err(|e| no_scratch(dir, e))?;
        if free < reserve + MIN_ROOM_BYTES {
            return Err(Failure::new(
                FailureCode::NoSpace,
                format!(
                    "no space for scratch in {}: {} are free and {} stay reserved; free some, or name another \
                     directory with --scratch",
                    dir.display(),
                    human_bytes(free),
                    human_bytes(reserve)
                ),
            ));
        }
        Ok(this)
    }

    /// Free space of its file system; 0 when that cannot be told.
    pub fn free_bytes(&self) -> u64 {
        self.free_and_reserve().map_or(0, |(free, _)| free)
    }

    fn free_and_reserve(&self) -> nix::Result<(u64, u64)> {
        let fs = statvfs(&self.dir)?;
        let unit = fs.fragment_size();
        let reserve = (fs.blocks() * unit / 20).min(MAX_RESERVE_BYTES);
        Ok((fs.blocks_available() * unit, reserve))
    }

    /// A new scratch file of this size, sparse, with its path if it still has one (it has when the file system cannot
    /// make files without a name, or a name is asked for because the monitor cannot take descriptors).
    pub fn file(&self, size_bytes: u64, named: bool) -> Result<(File, Option<PathBuf>), Failure> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        let unnamed = (!named).then(|| options.custom_flags(nix::libc::O_TMPFILE).open(&self.dir));
        let (file, path) = match unnamed {
            Some(Ok(file)) => (file, None),
            _ => {
                let path = self.dir.join(format!("scratch-{}", PackId::random()));
                let mut options = OpenOptions::new();
                options.read(true).write(true).mode(0o600).create_new(true);
                (options.open(&path).map_err(|e| no_scratch(&self.dir, e))?, Some(path))
            }
        };
        file.set_len(size_bytes).map_err(|e| no_scratch(&self.dir, e))?;
        Ok((file, path))
    }

    /// Why the fleece must let go now, if it must.
    pub fn exhausted(&self, used_bytes: u64) -> Option<String> {
        if let Some(budget) = self.budget_bytes.filter(|budget| used_bytes > *budget) {
            return Some(format!(
                "scratch reached its budget of {} because the guest wrote faster than the backup was read; \
                 raise the budget or give the backup a faster target",
                human_bytes(budget)
            ));
        }
        let (free, reserve) = self.free_and_reserve().ok()?;
        (free < reserve).then(|| {
            format!(
                "only {} are left in {}, where {} stay reserved, and scratch uses {}; make room, or name another \
                 directory with --scratch",
                human_bytes(free),
                self.dir.display(),
                human_bytes(reserve),
                human_bytes(used_bytes)
            )
        })
    }
}

/// By disk, our ends.
type Files = Arc<Mutex<Vec<(usize, Arc<File>)>>>;

/// The scratch of one session. Clones share its files.
#[derive(Clone, Debug)]
pub struct Scratch {
    dir: ScratchDir,
    files: Files,
}

impl Scratch {
    /// Without files yet.
    pub fn new(dir: ScratchDir) -> Self {
        Self { dir, files: Arc::default() }
    }

    /// A new file for the disk with this index, as [`ScratchDir::file`] makes it; it is watched from now on.
    pub fn add(&self, disk: usize, size_bytes: u64, named: bool) -> Result<(Arc<File>, Option<PathBuf>), Failure> {
        let (file, path) = self.dir.file(size_bytes, named)?;
        let file = Arc::new(file);
        self.files.lock().unwrap_or_else(PoisonError::into_inner).push((disk, file.clone()));
        Ok((file, path))
    }

    fn files(&self) -> Vec<(usize, Arc<File>)> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Bytes in use, by disk up to the last that has a file.
    pub fn used_by_disk(&self) -> Vec<u64> {
        let files = self.files();
        let mut used = vec![0; files.iter().map(|(disk, _)| disk + 1).max().unwrap_or(0)];
        files.iter().for_each(|(disk, file)| used[*disk] = used_bytes(file));
        used
    }

    /// Why the fleece must let go now, if it must.
    pub fn exhausted(&self) -> Option<String> {
        self.dir.exhausted(self.used_by_disk().iter().sum())
    }

    /// Gives all space back, which nobody reads any more, and resolves when the file system has answered. It may never do.
    /// `probe`: whether it must have stored something, too.
    pub fn release(&self, probe: bool) -> oneshot::Receiver<()> {
        let (answered, answer) = oneshot::channel();
        let files = self.files();
        // A thread of its own: the runtime would wait for one of its own to come back.
        let thread = std::thread::Builder::new().name("scratch-release".into()).spawn(move || {
            for (_, file) in files {
                // An error is an answer.
                if let Err(error) = release(&file, probe) {
                    tracing::debug!("releasing scratch: {error}");
                }
            }
            let _ = answered.send(());
        });
        if let Err(error) = thread {
            tracing::warn!("scratch cannot be asked whether it answers: {error}");
        }
        answer
    }
}

fn release(file: &File, probe: bool) -> std::io::Result<()> {
    let mut page = [0; 4096];
    file.set_len(0)?;
    if !probe {
        return Ok(());
    }
    file.write_all_at(&page, 0)?;
    file.sync_data()?;
    file.read_exact_at(&mut page, 0)?;
    file.set_len(0)
}

/// Bytes that a scratch file takes.
fn used_bytes(file: &File) -> u64 {
    file.metadata().map_or(0, |m| m.blocks() * 512)
}

fn no_scratch(dir: &Path, why: impl Into<Box<dyn std::error::Error>>) -> Failure {
    let why = why.into();
    let code = if durable::is_full(&*why) { FailureCode::NoSpace } else { FailureCode::Internal };
    Failure::new(
        code,
        format!("cannot use {} for scratch: {why}; name another directory with --scratch", dir.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_directory_is_not_taken_for_a_full_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let failure = ScratchDir::open(file.path(), None).unwrap_err();
        assert_eq!(failure.code, FailureCode::Internal, "{failure}");
        assert!(
            failure.message.contains(file.path().to_str().unwrap()) && failure.message.contains("--scratch"),
            "{failure}"
        );
    }

    #[test]
    fn files_have_no_name_and_budgets_count() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = ScratchDir::open(&dir.path().join("new"), Some(MIB)).unwrap();
        let (file, path) = scratch.file(10 * MIB, false).unwrap();
        assert_eq!((file.metadata().unwrap().len(), path), (10 * MIB, None));
        assert_eq!(used_bytes(&file), 0);
        assert_eq!(scratch.exhausted(MIB), None);
        assert!(scratch.exhausted(MIB + 1).unwrap().contains("budget"));
        let (_, path) = scratch.file(MIB, true).unwrap();
        assert!(path.as_ref().unwrap().exists());
    }
}
