//! The running epoch of a disk and why the last one ended: one small file, `epoch.json`, replaced atomically.
//!
//! ```text
//! file = JSON object ‖ "\n" ‖ CRC-32 of the JSON, 8 lower-case hexadecimal digits ‖ "\n"
//! JSON = { "version": 1, "epoch": Epoch or null, "last_end": EpochEnd or null }
//! ```
//!
//! `epoch.medium`, `epoch.closed` and `epoch.kept` may be missing, as in files from before there were stamps, or persistent
//! bitmaps; `epoch.medium.migration` where no migration had ended.
//!
//! The file moves the log's head: a checkpoint counts once `epoch.last` names it. It is JSON for the operator's eyes, and
//! has a checksum because a turned digit would be believed otherwise.

use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::stamp::{Closed, Medium};
use crate::durable::{self, DurableError, Replace};
use crate::limits::MAX_DISK_BYTES;
use crate::units::{CheckpointId, EpochId};

/// Name of the file in a log's directory.
pub const FILE_NAME: &str = "epoch.json";
const VERSION: u32 = 1;
/// Longer files are damaged: an epoch, an end and [`MAX_ENDED_CHECKPOINTS`] ids need a few KiB.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Ids of an ended epoch that are remembered, the latest ones, so that their owners can be told why it ended.
pub const MAX_ENDED_CHECKPOINTS: usize = 256;

/// One QEMU process: ids of processes come again, so its start time and the boot belong to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuInstance {
    /// Process id.
    pub pid: i32,
    /// Field 22 of `/proc/PID/stat`: clock ticks after boot.
    pub start_time: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

/// An epoch that goes on: an unbroken run of checkpoints of one disk's medium.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoch {
    /// Its name.
    pub id: EpochId,
    /// When it began.
    pub started: Timestamp,
    /// Size of the disk; an epoch has one.
    pub size_bytes: u64,
    /// The QEMU that tracks.
    pub qemu: QemuInstance,
    /// The disk's root node there.
    pub node: String,
    /// The latest checkpoint: what QEMU's bitmap has recorded starts here.
    pub last: CheckpointId,
    /// Number of the latest checkpoint.
    pub number: u64,
    /// What the disk was made of when the epoch began or was carried over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub medium: Option<Medium>,
    /// That this QEMU ended with nothing unseen, and how the medium stood then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<Closed>,
    /// Whether the image keeps the bitmap that records since the latest checkpoint, when QEMU ends.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kept: bool,
}

/// An epoch that ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochEnd {
    /// Which one.
    pub epoch: EpochId,
    /// When the end was noticed.
    pub time: Timestamp,
    /// Why, in a sentence for an operator.
    pub reason: String,
    /// Number of its latest checkpoint.
    pub number: u64,
    /// Its checkpoints, oldest first; the latest 256 of them.
    #[serde(default)]
    pub checkpoints: Vec<CheckpointId>,
}

/// Content of `epoch.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    pub epoch: Option<Epoch>,
    pub last_end: Option<EpochEnd>,
}

#[derive(Serialize, Deserialize)]
struct Stored<E, L> {
    version: u32,
    epoch: E,
    last_end: L,
}

impl State {
    /// Reads the file in `dir`: `Ok(Err(why))` when it is damaged, an empty state when there is none.
    pub fn read(dir: &Path) -> Result<Result<Self, String>, DurableError> {
        let path = dir.join(FILE_NAME);
        let content = match std::fs::metadata(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Ok(Self::default())),
            Ok(meta) if meta.len() > MAX_FILE_BYTES => return Ok(Err(format!("is {} bytes long", meta.len()))),
            Ok(_) => std::fs::read(&path),
            Err(e) => Err(e),
        };
        Ok(Self::parse(&content.map_err(DurableError::at("read", &path))?))
    }

    fn parse(content: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(content).map_err(|_| "is no text")?;
        let (json, crc) = text.strip_suffix('\n').and_then(|t| t.rsplit_once('\n')).ok_or("was cut")?;
        if crc != checksum(json) {
            return Err("has a wrong checksum: it is damaged or was edited by hand".to_owned());
        }
        let stored: Stored<Option<Epoch>, Option<EpochEnd>> =
            serde_json::from_str(json).map_err(|e| format!("is not what it should be: {e}"))?;
        if stored.version != VERSION {
            return Err(format!("has version {}; this livebackup knows {VERSION}", stored.version));
        }
        if stored.epoch.as_ref().is_some_and(|e| e.size_bytes > MAX_DISK_BYTES) {
            return Err("has an impossible disk size".to_owned());
        }
        Ok(Self { epoch: stored.epoch, last_end: stored.last_end })
    }

    /// Makes this the file's content, durably.
    pub fn write(&self, dir: &Path) -> Result<(), DurableError> {
        let path = dir.join(FILE_NAME);
        let stored = Stored { version: VERSION, epoch: &self.epoch, last_end: &self.last_end };
        let json = serde_json::to_string(&stored).map_err(|e| DurableError::at("encode", &path)(e.into()))?;
        let content = format!("{json}\n{}\n", checksum(&json));
        durable::write_file(&path, content.as_bytes(), Replace::Yes)
    }
}

fn checksum(json: &str) -> String {
    format!("{:08x}", crc32fast::hash(json.as_bytes()))
}
