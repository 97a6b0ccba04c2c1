//! The methods: what is done to the disk while the guest writes.
//!
//! | name | what happens |
//! |---|---|
//! | `none` | nothing: what the machine itself varies by |
//! | `bitmap` | a dirty bitmap records, as between two backups |
//! | `fleece` | livebackup, a full; scratch on the file system of the disk |
//! | `fleece-other` | the same, scratch on another file system |
//! | `fleece-memory` | the same, scratch in memory |
//! | `incremental` | livebackup, an incremental of 1/16 of the disk; the guest writes everywhere, quiet only at the instant |
//! | `incremental-busy` | the same, and the guest writes on at the instant |
//! | `acknowledged` | livebackup, a full; the guest writes only where the client has everything already |
//! | `qemu-fleece` | QEMU's backup job with `sync=none` onto qcow2, read over NBD: what libvirt does |
//! | `push` | QEMU's backup job with `sync=full` onto a raw file |
//! | `push-slow` | the same onto a slow target: what Proxmox does without fleecing |
//! | `overlay` | an external snapshot, a copy of the base, a commit back |
//! | `lvm` | an LVM snapshot of the disk, which lies on a logical volume for it, and a reader of it |
//!
//! Who reads throws away what is read: what a client does with it takes other resources, elsewhere. livebackup's reader
//! acknowledges what has arrived, as its client does in one process.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, Instant};

use super::OverheadOptions;
use super::error::OverheadError;
use super::load::Load;
use super::rig::{Rig, WorkDir};
use super::volume::{self, Volume};
use super::{ours, theirs};
use crate::units::{GRANULE_BYTES, human_bytes};
use crate::vm::Vm;

use serde_json::json;

/// What a backup is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    /// Nothing.
    Nothing,
    /// A dirty bitmap.
    Bitmap,
    /// A full of livebackup's.
    Fleece,
    /// Its scratch on another file system.
    FleeceOther,
    /// Its scratch in memory.
    FleeceMemory,
    /// An incremental of livebackup's.
    Incremental,
    /// The same of a guest that nobody makes quiet.
    IncrementalBusy,
    /// Writes to what is acknowledged.
    Acknowledged,
    /// QEMU's job, read over NBD.
    QemuFleece,
    /// QEMU's job to a fast target.
    Push,
    /// QEMU's job to a slow target.
    PushSlow,
    /// An overlay, and a commit.
    Overlay,
    /// An LVM snapshot.
    Lvm,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Nothing,
        Self::Bitmap,
        Self::Fleece,
        Self::FleeceOther,
        Self::FleeceMemory,
        Self::Incremental,
        Self::IncrementalBusy,
        Self::Acknowledged,
        Self::QemuFleece,
        Self::Push,
        Self::PushSlow,
        Self::Overlay,
        Self::Lvm,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nothing => "none",
            Self::Bitmap => "bitmap",
            Self::Fleece => "fleece",
            Self::FleeceOther => "fleece-other",
            Self::FleeceMemory => "fleece-memory",
            Self::Incremental => "incremental",
            Self::IncrementalBusy => "incremental-busy",
            Self::Acknowledged => "acknowledged",
            Self::QemuFleece => "qemu-fleece",
            Self::Push => "push",
            Self::PushSlow => "push-slow",
            Self::Overlay => "overlay",
            Self::Lvm => "lvm",
        }
    }

    /// What it is, for people.
    pub fn words(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Bitmap => "a dirty bitmap only",
            Self::Fleece => "livebackup, full; scratch beside the disk",
            Self::FleeceOther => "livebackup, full; scratch on another file system",
            Self::FleeceMemory => "livebackup, full; scratch in memory",
            Self::Incremental => "livebackup, incremental of 1/16 of the disk, quiet instant",
            Self::IncrementalBusy => "the same, the guest not quiet at the instant",
            Self::Acknowledged => "livebackup, full; writes where all is acknowledged",
            Self::QemuFleece => "QEMU's backup job to qcow2, read over NBD (as libvirt)",
            Self::Push => "QEMU's backup job to a raw file",
            Self::PushSlow => "QEMU's backup job to a target of 20 MiB/s",
            Self::Overlay => "external overlay, copy of the base, commit",
            Self::Lvm => "LVM snapshot of a logical volume, read, removed",
        }
    }

    /// Whether it is livebackup's own way of backing up.
    pub fn is_ours(self) -> bool {
        use Method::{Acknowledged, Fleece, FleeceMemory, FleeceOther, Incremental, IncrementalBusy};
        matches!(self, Fleece | FleeceOther | FleeceMemory | Incremental | IncrementalBusy | Acknowledged)
    }

    /// Whether a reader's speed makes a difference to it.
    pub fn reads(self) -> bool {
        !matches!(self, Self::Nothing | Self::Bitmap | Self::Acknowledged | Self::PushSlow)
    }

    /// Why it cannot be measured here.
    pub fn lacks(self, options: &OverheadOptions) -> Option<String> {
        match self {
            Self::FleeceOther if options.other.is_none() => {
                Some("name a directory on another file system with --other-dir".into())
            }
            Self::FleeceMemory if !Path::new(MEMORY_DIR).is_dir() => Some(format!("no {MEMORY_DIR}")),
            Self::Lvm => volume::lacks(),
            _ => None,
        }
    }
}

/// A method, and how fast its reader may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Case {
    /// What a backup is made with.
    pub method: Method,
    /// Bytes in a second; as fast as it can when absent.
    pub reader: Option<u64>,
}

impl Case {
    /// Each method with each reader; what has no reader, once.
    pub fn all(methods: &[Method], readers: &[Option<u64>]) -> Vec<Self> {
        let each = |method: Method| match method.reads() {
            true => readers.to_vec(),
            false => vec![None],
        };
        methods
            .iter()
            .flat_map(|method| each(*method).into_iter().map(|reader| Self { method: *method, reader }))
            .collect()
    }
}

/// The method's name, and the rate of a reader that has one.
impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reader {
            None => f.write_str(self.method.name()),
            Some(rate) => write!(f, "{}, {}/s", self.method, human_bytes(rate)),
        }
    }
}

/// A file system in memory.
pub const MEMORY_DIR: &str = "/dev/shm";

impl FromStr for Method {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|m| m.name() == text).ok_or_else(|| format!("a method is one of {}", names()))
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a method works with.
pub struct Bench<'a> {
    /// The machine.
    pub rig: &'a Rig,
    /// Its directory.
    pub work: &'a WorkDir,
    /// The guest.
    pub load: &'a Load,
    /// How it is measured.
    pub options: &'a OverheadOptions,
    /// How fast the reader may be, in bytes a second; as fast as it can when absent.
    pub reader: Option<u64>,
    /// Where livebackup's scratch goes.
    pub scratch: &'a Path,
    /// What the disk lies on, where a method needs it.
    pub volume: Option<&'a Volume>,
}

impl Bench<'_> {
    /// When a backup that has not ended is broken off.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.options.during()
    }
}

/// How it went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// When it began, in nanoseconds of the load's time.
    pub began_ns: u64,
    /// When all of it was out of QEMU again.
    pub ended_ns: u64,
    /// Whether it came to its end, or was broken off.
    pub finished: bool,
    /// What was read or copied of the disk.
    pub read_bytes: u64,
    /// What livebackup copied to scratch, as far as it knows.
    pub copied_bytes: Option<u64>,
}

/// What is there before the first phase.
pub enum Ready {
    /// Nothing.
    Plain,
    /// livebackup has the machine, as its service would.
    Attached(Vm),
}

impl Ready {
    /// Before the guest is measured.
    pub async fn make(method: Method, work: &WorkDir, scratch: &Path) -> Result<Self, OverheadError> {
        if !method.is_ours() {
            return Ok(Self::Plain);
        }
        work.remove("state");
        Ok(Self::Attached(ours::attach(work, scratch).await?))
    }

    /// The backup itself.
    pub async fn run(&self, method: Method, bench: &Bench<'_>) -> Result<Outcome, OverheadError> {
        match (method, self) {
            (Method::Incremental, Self::Attached(vm)) => ours::incremental(bench, vm, true).await,
            (Method::IncrementalBusy, Self::Attached(vm)) => ours::incremental(bench, vm, false).await,
            (Method::Acknowledged, Self::Attached(vm)) => ours::acknowledged(bench, vm).await,
            (_, Self::Attached(vm)) => ours::full(bench, vm).await,
            (Method::Bitmap, _) => bitmap(bench).await,
            (Method::QemuFleece, _) => theirs::fleece(bench).await,
            (Method::Push, _) => theirs::push(bench, None).await,
            (Method::PushSlow, _) => theirs::push(bench, Some(theirs::SLOW_BYTES_PER_SECOND)).await,
            (Method::Overlay, _) => theirs::overlay(bench).await,
            (Method::Lvm, _) => volume::backup(bench).await,
            _ => nothing(bench).await,
        }
    }
}

async fn nothing(bench: &Bench<'_>) -> Result<Outcome, OverheadError> {
    let began_ns = bench.load.now_ns();
    tokio::time::sleep(bench.options.during() / 2).await;
    Ok(Outcome { began_ns, ended_ns: bench.load.now_ns(), finished: true, ..Outcome::default() })
}

async fn bitmap(bench: &Bench<'_>) -> Result<Outcome, OverheadError> {
    let began_ns = bench.load.now_ns();
    let (monitor, node, name) = (&bench.rig.monitor, super::rig::NODE, "tracking");
    let arguments = json!({"node": node, "name": name, "granularity": GRANULE_BYTES});
    monitor.raw("block-dirty-bitmap-add", arguments).await?;
    tokio::time::sleep(bench.options.during() / 2).await;
    monitor.raw("block-dirty-bitmap-remove", json!({"node": node, "name": name})).await?;
    Ok(Outcome { began_ns, ended_ns: bench.load.now_ns(), finished: true, ..Outcome::default() })
}

/// Waits until so many bytes may have been read.
pub async fn keep_pace(began: Instant, bytes: u64, rate: Option<u64>) {
    if let Some(rate) = rate {
        let due = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        tokio::time::sleep(due.saturating_sub(began.elapsed())).await;
    }
}
