//! Restore: from a restore point to files or block devices that a machine can be started from.
//!
//! ```text
//! plan ──► write files ──► write devices ──► compare ──► names ──► definition
//! checks   temporary        in place          (--compare)   rename    machine.json, qemu-command.txt
//! ```
//!
//! * **First everything is checked**: disks, names, targets, free space. Until then nothing is written but the
//!   (empty) directory.
//! * **Whole or not at all.** Files get their names only when all disks are written (and compared), so a restore that
//!   fails leaves what was there before. Block devices are written in place, after the files; an error says when the
//!   content of one is undefined.
//! * **A crash** leaves `*.tmp` files beside the targets, which the next restore to the same names removes, and a block
//!   device that was being written in an undefined state. A crash while files get their names leaves some of them, whole;
//!   the definition is written last.
//! * **Cancelling**: when `interrupted` is set the restore ends within about a second, as with an error; only a flush that
//!   has begun (one at the end of each disk) is waited for.
//! * **Memory**: about 3 MiB a thread, and 48 bytes for each 256 chunks with data.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::repo::{Manifest, Reader, Repository};

mod chunks;
mod compare;
mod definition;
mod device;
mod error;
mod place;
mod plan;
mod qcow2;
mod write;

pub use error::RestoreError;

/// Threads for each processor: each reads, decompresses and writes in turn, past the page cache, and so waits for storage for
/// most of its time.
const THREADS_PER_PROCESSOR: usize = 2;
/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// What files are made of disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes as they are; zeroes are holes.
    #[default]
    Raw,
    /// A qcow2 image without a backing file.
    Qcow2,
}

impl Format {
    /// The format's name, as QEMU has it; also the ending of files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// A disk to restore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskTarget {
    /// Its name in the point.
    pub disk: String,
    /// A file (made) or block device (overwritten); `None` is `DIR/DISK.raw` or `DIR/DISK.qcow2`.
    pub target: Option<PathBuf>,
}

/// What is restored, where to, and how.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// Where files are made; created if it is not there.
    pub dir: PathBuf,
    /// Which disks; all when empty.
    pub disks: Vec<DiskTarget>,
    /// What files are made of disks.
    pub format: Format,
    /// Existing files may be replaced, block devices overwritten.
    pub force: bool,
    /// Read what was written back from the storage, and compare it.
    pub compare: bool,
    /// Worker threads; 0 means two a processor.
    pub threads: usize,
}

impl RestoreOptions {
    /// All disks, raw, into this directory.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        let (dir, disks) = (dir.into(), Vec::new());
        Self { dir, disks, format: Format::Raw, force: false, compare: false, threads: 0 }
    }
}

/// How far a restore is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes to write (zeroes not counted), and as many to compare.
    pub total_bytes: u64,
    /// Of them done.
    pub done_bytes: u64,
    /// The disk or file that is worked on.
    pub disk: String,
}

/// A disk that was restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoredDisk {
    /// Its name.
    pub disk: String,
    /// The file or block device.
    pub path: PathBuf,
    /// What is in it: `raw` for a block device.
    pub format: Format,
    /// Size that the guest sees.
    pub size_bytes: u64,
    /// Bytes of the chunks with data.
    pub data_bytes: u64,
    /// The rest.
    pub zero_bytes: u64,
    /// Whether it was read back and found equal.
    pub compared: bool,
}

/// What was restored.
#[derive(Clone, Debug)]
pub struct RestoreReport {
    /// The disks, in the order in which they were asked for (else that of the point).
    pub disks: Vec<RestoredDisk>,
    /// The point's other files: kernel, firmware, …
    pub files: Vec<PathBuf>,
    /// The machine's definition.
    pub definition: PathBuf,
    /// The recorded command line, with the restored disks; if one was recorded.
    pub command: Option<PathBuf>,
    /// How long it took.
    pub elapsed: Duration,
}

/// What all steps share.
struct Job<'a> {
    reader: &'a Reader,
    vm: &'a str,
    threads: usize,
    interrupted: &'a AtomicBool,
    done_bytes: AtomicU64,
    total_bytes: u64,
}

impl Job<'_> {
    fn check_interrupted(&self) -> Result<(), RestoreError> {
        match self.interrupted.load(Ordering::Relaxed) {
            true => Err(RestoreError::Interrupted),
            false => Ok(()),
        }
    }

    fn add_done(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Does the work on another thread, and tells progress on this one.
    fn watched<T: Send>(
        &self,
        disk: &str,
        progress: &mut dyn FnMut(Progress),
        work: impl FnOnce() -> Result<T, RestoreError> + Send,
    ) -> Result<T, RestoreError> {
        let mut tell = || {
            let done_bytes = self.done_bytes.load(Ordering::Relaxed);
            progress(Progress { total_bytes: self.total_bytes, done_bytes, disk: disk.to_owned() });
        };
        thread::scope(|scope| {
            let (working, ended) = channel::<()>();
            let worker = scope.spawn(move || {
                // Dropped when the work ends, however it ends.
                let _working = working;
                work()
            });
            while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(PROGRESS_EVERY) {
                tell();
            }
            tell();
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// Restores disks of a point, its other files and the machine's definition. Blocks; `progress` is called on this thread, a
/// few times a second.
pub fn restore(
    repo: &Repository,
    manifest: &Manifest,
    options: &RestoreOptions,
    interrupted: &AtomicBool,
    progress: &mut dyn FnMut(Progress),
) -> Result<RestoreReport, RestoreError> {
    let begun = Instant::now();
    let reader = repo.reader()?;
    let threads = match options.threads {
        0 => THREADS_PER_PROCESSOR * thread::available_parallelism().map_or(2, usize::from),
        threads => threads,
    };
    let done_bytes = AtomicU64::new(0);
    let mut job = Job { reader: &reader, vm: &manifest.vm, threads, interrupted, done_bytes, total_bytes: 0 };

    let mut plan = plan::make(repo, manifest, options, &job)?;
    job.total_bytes = plan.items.iter().map(|item| item.data_bytes()).sum::<u64>() * (1 + u64::from(options.compare));

    for item in &mut plan.items {
        item.begin()?;
    }
    let (devices, files): (Vec<_>, Vec<_>) = plan.items.iter().partition(|item| item.place.is_device());
    for item in files.into_iter().chain(devices) {
        job.watched(&item.name, progress, || write::write(&job, item))?;
        if options.compare {
            job.watched(&item.name, progress, || compare::compare(&job, item))?;
        }
    }
    job.check_interrupted()?;
    crate::fault::point("restore.written");

    for item in &mut plan.items {
        item.commit()?;
        crate::fault::point("restore.named");
    }
    let (definition, command) = definition::write(manifest, &plan, options)?;
    plan.done();
    let disk = |item: &plan::Item| RestoredDisk {
        disk: item.name.clone(),
        path: item.place.path().to_owned(),
        format: item.place.format(),
        size_bytes: item.image.size_bytes,
        data_bytes: item.data_bytes(),
        zero_bytes: item.image.size_bytes - item.data_bytes(),
        compared: options.compare,
    };
    Ok(RestoreReport {
        disks: plan.items.iter().filter(|item| item.is_disk).map(disk).collect(),
        files: plan.items.iter().filter(|i| !i.is_disk).map(|item| item.place.path().to_owned()).collect(),
        definition,
        command,
        elapsed: begun.elapsed(),
    })
}
