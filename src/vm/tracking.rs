//! Tracking: which bitmaps are in QEMU, what they mean, and what a backup must read.
//!
//! ```text
//!  log:   … C(n-1) ──── C(n) = head                      C(n+1) = next
//!  QEMU:               since-C(n) records ─────────────┐
//!                                    since-C(n+1) ──────┴── records
//!                                                 instant
//! ```
//!
//! The bitmap `since-C` records what is written after checkpoint C. The next one is added before the instant and the old
//! one disabled after it, so a write between is in both. The old one is read, sealed as C(n+1)'s bitmap, and only then
//! removed. Whoever dies in between, the other still has it:
//!
//! * died before the seal: QEMU has both, the log's head is C(n). [`recover`] makes `since-C(n)` record again and
//!   merges the younger one into it;
//! * died after the seal: QEMU has both, the head is C(n+1). The older one is removed.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde_json::{Value, json};

use super::evidence::{self, Proof, Recording, Seen};
use super::graph::{self, Graph};
use super::names::Names;
use super::place::not_kept;
use super::{internal, persist, qemu_failed, undo};
use crate::checkpoint::{Bitmap, EpochStart, Log, Medium, QemuInstance, Sealed};
use crate::extent::Extent;
use crate::machine::{Disk, Taken};
use crate::monitor::{Monitor, MonitorError};
use crate::repo::layout::directory_of_vm;
use crate::units::{CheckpointId, EpochId};
use crate::wire::contract::AUDIT_FLOOR_CHUNKS;
use crate::wire::digests::ChunkDigest;
use crate::wire::message::{AuditChunk, Begin, Failure, KnownAreas};

/// What a checkpoint of a disk needs of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Track {
    /// No checkpoint is taken.
    No,
    /// The epoch goes on: from its last checkpoint to the next.
    Continue {
        /// The epoch's last checkpoint.
        head: CheckpointId,
        /// The one to be taken.
        next: CheckpointId,
    },
    /// A new epoch begins with this checkpoint.
    Begin {
        /// The one to be taken.
        next: CheckpointId,
    },
}

impl Track {
    /// The checkpoint to be taken.
    pub fn next(&self) -> Option<CheckpointId> {
        match self {
            Track::No => None,
            Track::Continue { next, .. } | Track::Begin { next } => Some(*next),
        }
    }

    /// The checkpoint whose bitmap records now.
    pub fn head(&self) -> Option<CheckpointId> {
        match self {
            Track::Continue { head, .. } => Some(*head),
            _ => None,
        }
    }
}

/// Directory of a disk's log.
pub fn log_dir(disks: &Path, disk: &str) -> Result<PathBuf, Failure> {
    Ok(disks.join(directory_of_vm(disk).map_err(internal)?))
}

/// The log of a disk.
pub fn open_log(disks: &Path, disk: &str) -> Result<Log, Failure> {
    Log::open(&log_dir(disks, disk)?).map_err(not_kept)
}

/// State of the bitmap that records since the log's last checkpoint. Where a sidecar died between two checkpoints, the image
/// must have kept both.
pub fn recording(log: &Log, names: &Names, graph: &Graph, node: &str) -> Recording {
    let Some(last) = log.last() else { return Recording::Missing };
    let younger = |kept: bool| {
        let ours = graph.bitmaps(node).iter().filter(|b| b.recording && (b.persistent || !kept));
        let mut ids = ours.filter_map(|b| names.checkpoint_of(b.name.as_deref()?));
        ids.any(|id| id != last && !log.checkpoints().iter().any(|h| h.id == id))
    };
    match graph.bitmap(node, &names.since(last)) {
        None => Recording::Missing,
        Some(b) if b.inconsistent => Recording::Inconsistent,
        Some(b) if b.persistent && (b.recording || younger(true)) => Recording::Stored,
        Some(b) if b.recording || younger(false) => Recording::Unbroken,
        Some(_) => Recording::Stopped,
    }
}

/// Whether a sentinel is there, and each that is there has its bit.
pub fn has_sentinel(names: &Names, graph: &Graph, node: &str) -> bool {
    let good = |b: &graph::Bitmap| !b.recording && !b.inconsistent && b.count_bytes > 0;
    let mut found = graph.bitmaps(node).iter().filter(|b| b.name.as_deref().is_some_and(|n| names.is_sentinel(n)));
    found.clone().next().is_some() && found.all(good)
}

/// Whether the image keeps a sentinel of the disk.
pub fn has_kept_sentinel(names: &Names, graph: &Graph, disk: &Disk) -> bool {
    graph.bitmap(&disk.node, &names.kept_sentinel()).is_some()
}

/// Where a disk is judged.
#[derive(Clone, Copy, Debug)]
pub struct Bench<'a> {
    /// Our names.
    pub names: &'a Names,
    /// The machine's block graph.
    pub graph: &'a Graph,
    /// The QEMU process.
    pub qemu: &'a QemuInstance,
    /// Its run state.
    pub run_state: &'a str,
}

/// Whether the log's epoch goes on, by which proof, and why not. `stamp` is how the medium compares with the epoch's
/// stamp, looked at after its bitmap was added.
pub fn judge(
    log: &Log,
    bench: Bench<'_>,
    disk: &Disk,
    medium: &Medium,
    stamp: Option<&Result<(), String>>,
) -> Result<Proof, String> {
    let Bench { names, graph, qemu, run_state } = bench;
    let Some(epoch) = log.epoch() else {
        return Err(match log.last_end() {
            Some(end) => format!("tracking was interrupted: {}", end.reason),
            None => "the disk was not tracked before".into(),
        });
    };
    let cannot_keep = persist::can_keep(graph, disk).err();
    let seen = Seen {
        qemu,
        run_state,
        node: &disk.node,
        size_bytes: disk.size_bytes,
        shared: disk.shared.as_deref(),
        medium,
        bitmap: recording(log, names, graph, &disk.node),
        sentinel: has_sentinel(names, graph, &disk.node),
        cannot_keep: cannot_keep.as_deref(),
        stamp,
    };
    evidence::decide(epoch, &seen).map_err(|doubt| doubt.to_string())
}

/// Brings QEMU's bitmaps of a disk to what the log says: `since-HEAD` and the sentinel, nothing else of ours. Without a
/// head all of ours go.
pub async fn recover(
    monitor: &Monitor,
    names: &Names,
    graph: &Graph,
    node: &str,
    log: &Log,
) -> Result<(), MonitorError> {
    let head = log.last();
    if graph.bitmaps(node).iter().any(|b| b.persistent) {
        // Taking one out of the image flushes it with QEMU's main loop held.
        undo::sync_image(monitor, node).await;
    }
    for bitmap in graph.bitmaps(node) {
        let Some(name) = bitmap.name.as_deref().filter(|n| names.is_ours(n)) else { continue };
        let id = names.checkpoint_of(name);
        match head {
            Some(head) if id == Some(head) || (id.is_none() && names.is_sentinel(name)) => {}
            // Younger than the head and never sealed: what it recorded belongs to the head's. The head records again
            // before the other stops, all at once.
            Some(head) if id.is_some_and(|id| !log.checkpoints().iter().any(|h| h.id == id)) => {
                let target = names.since(head);
                let actions = json!({"actions": [
                    {"type": "block-dirty-bitmap-enable", "data": {"node": node, "name": target}},
                    {"type": "block-dirty-bitmap-merge", "data": {"node": node, "target": target, "bitmaps": [name]}},
                    {"type": "block-dirty-bitmap-remove", "data": {"node": node, "name": name}},
                ]});
                monitor.raw("transaction", actions).await?;
            }
            _ => remove_bitmap(monitor, node, name).await?,
        }
    }
    Ok(())
}

/// Removes a bitmap; one that is gone already is no error.
pub async fn remove_bitmap(monitor: &Monitor, node: &str, name: &str) -> Result<(), MonitorError> {
    match monitor.raw("block-dirty-bitmap-remove", json!({"node": node, "name": name})).await {
        Err(e) if e.refusal().is_some() => {
            tracing::warn!(node, name, "QEMU does not remove the bitmap: {e}");
            Ok(())
        }
        other => other.map(drop),
    }
}

/// Adds a bitmap with our granularity.
pub async fn add_bitmap(
    monitor: &Monitor,
    node: &str,
    name: &str,
    granularity: u64,
    disabled: bool,
) -> Result<Value, MonitorError> {
    let mut arguments = json!({"node": node, "name": name, "granularity": granularity});
    if disabled {
        arguments["disabled"] = json!(true);
    }
    monitor.raw("block-dirty-bitmap-add", arguments).await
}

/// Merges bitmaps, each a (node, name), into a target.
pub async fn merge(monitor: &Monitor, target: (&str, &str), sources: &[(&str, &str)]) -> Result<(), MonitorError> {
    let bitmaps: Vec<_> = sources.iter().map(|(node, name)| json!({"node": node, "name": name})).collect();
    let arguments = json!({"node": target.0, "target": target.1, "bitmaps": bitmaps});
    monitor.raw("block-dirty-bitmap-merge", arguments).await.map(drop)
}

/// A disk's part of a backup.
#[derive(Debug)]
pub struct Plan {
    /// The disk.
    pub disk: Disk,
    /// Its log.
    pub log: Log,
    /// Whole or since a checkpoint.
    pub taken: Taken,
    /// For an incremental: what was sealed since the client's checkpoint, up to the head.
    pub sealed: Option<Bitmap>,
    /// What happens to the log.
    pub track: Track,
    /// What the disk is made of, for the log of a new epoch.
    pub medium: Option<Medium>,
    /// Chunks to be confirmed by the way.
    pub audit: Vec<AuditChunk>,
    /// Whether the image is to keep the next checkpoint's bitmap.
    pub keep: bool,
    /// Whether a sentinel is to be set: the disk has none, or none that is kept.
    pub needs_sentinel: bool,
    /// What the client lacks, of a disk that is taken since a checkpoint.
    pub known: KnownAreas,
    /// Places that are read, and not sent, to find out what is left out.
    pub probes: Vec<Extent>,
}

impl Plan {
    /// Takes up what the client can do: a disk of which it has digests is scanned where it would be taken whole, and of one
    /// that is taken since a checkpoint it may have some chunks confirmed.
    pub fn compare(&mut self, begin: &Begin) {
        let chunk_bytes = u64::from(begin.chunk_bytes);
        if let Taken::Full { reason } = &self.taken
            && begin.digests.contains(&self.disk.name)
        {
            self.taken = Taken::Scan { reason: reason.clone() };
        }
        if let (Some(audit), Some(sealed)) = (&begin.audit, &self.sealed)
            && let Some(wanted) = audit.disks.get(&self.disk.name)
        {
            let mut needed = sealed.clone();
            needed.round_out(chunk_bytes);
            let share = u128::from(needed.count_bytes() / chunk_bytes) * u128::from(audit.permille) / 1000;
            let most = share.max(AUDIT_FLOOR_CHUNKS.into()).min(wanted.len() as u128) as usize;
            self.audit = wanted[..most].to_vec();
        }
        if let (Some(known), true) = (&begin.areas, self.sealed.is_some()) {
            self.known = known.get(&self.disk.name).cloned().unwrap_or_default();
        }
    }

    /// What is read of a disk that is taken since a checkpoint, whatever was written: what is audited, what the client
    /// lacks, and what tells of areas to be left out.
    pub fn also_read(&self, chunk_bytes: u64) -> impl Iterator<Item = Extent> {
        let audited = self.audited(chunk_bytes).map(|(chunk, _)| chunk);
        audited.chain(self.known.left_out.iter().copied()).chain(self.probes.iter().copied())
    }

    /// The chunks to be confirmed, by their bytes; none that the disk does not have.
    pub fn audited(&self, chunk_bytes: u64) -> impl Iterator<Item = (Extent, ChunkDigest)> {
        let size_bytes = self.disk.size_bytes;
        self.audit.iter().filter_map(move |one| {
            let from = one.chunk.checked_mul(chunk_bytes).filter(|from| *from < size_bytes)?;
            Some((Extent::between(from, from.saturating_add(chunk_bytes).min(size_bytes)), one.digest))
        })
    }
}

/// What the client asks for one disk.
#[derive(Clone, Debug)]
pub struct Wish<'a> {
    /// The checkpoint that it has.
    pub since: Option<CheckpointId>,
    /// Why it has none.
    pub full_reason: Option<&'a str>,
    /// Whether a checkpoint is to be taken.
    pub checkpoint: bool,
}

/// Decides what happens to a disk, from the verdict on its epoch. Changes nothing.
pub fn plan(disk: Disk, log: Log, verdict: Result<(), String>, wish: &Wish<'_>) -> Plan {
    let full = |reason: String| (Taken::Full { reason }, None);
    let can_track = !disk.read_only && disk.shared.is_none();
    let (taken, sealed) = match (wish.since, &verdict) {
        _ if disk.read_only => full("the guest cannot write to it, so nothing is tracked".into()),
        _ if disk.shared.is_some() => {
            full(format!("the medium is shared: {}", disk.shared.as_deref().unwrap_or_default()))
        }
        (None, _) => full(wish.full_reason.unwrap_or("a full backup was asked for").to_owned()),
        (Some(_), _) if !wish.checkpoint => full("without a checkpoint a disk is taken whole".into()),
        (Some(_), Err(reason)) => full(reason.clone()),
        (Some(since), Ok(())) => match log.since(since) {
            Ok(sealed) => (Taken::Incremental { since }, Some(sealed)),
            Err(unknown) => full(unknown.to_string()),
        },
    };
    let next = CheckpointId::random();
    let track = match (log.last(), verdict) {
        _ if !wish.checkpoint || !can_track => Track::No,
        (Some(head), Ok(())) => Track::Continue { head, next },
        _ => Track::Begin { next },
    };
    let needs_sentinel = matches!(track, Track::Begin { .. });
    let (audit, known, probes) = (vec![], KnownAreas::default(), vec![]);
    Plan { disk, log, taken, sealed, track, medium: None, audit, keep: false, needs_sentinel, known, probes }
}

/// Makes the log follow what was done at the instant: seals, or begins an epoch. Blocks on files.
pub fn settle(
    plan: &mut Plan,
    harvest: Option<&Bitmap>,
    time: Timestamp,
    qemu: &QemuInstance,
    reason: &str,
) -> Result<Option<EpochId>, Failure> {
    match plan.track {
        Track::No => return Ok(None),
        Track::Continue { head, next } => {
            let bitmap = harvest.ok_or_else(|| internal("the bitmap of the last checkpoint was not read"))?;
            let number = plan.log.next_number();
            plan.log.seal(Sealed { id: next, prev: Some(head), number, time, bitmap }).map_err(not_kept)?;
        }
        Track::Begin { next } => {
            let start = EpochStart {
                id: EpochId::random(),
                first: next,
                time,
                size_bytes: plan.disk.size_bytes,
                qemu: qemu.clone(),
                node: plan.disk.node.clone(),
                medium: plan.medium.clone(),
            };
            plan.log.begin_epoch(start, reason).map_err(not_kept)?;
        }
    }
    plan.log.note_kept(plan.keep).map_err(not_kept)?;
    Ok(plan.log.epoch().map(|e| e.id))
}

/// Adds the sentinel: a disabled bitmap with the bit of the last granule, which a shrink cuts off. `helper` is a node of
/// the disk's size with a bitmap that has just that bit. Where `keep` says so and the image can, the image keeps it; one that
/// it does not keep goes then.
pub async fn set_sentinel(
    monitor: &Monitor,
    names: &Names,
    node: &str,
    source: (&str, &str),
    keep: bool,
) -> Result<(), Failure> {
    let (plain, kept) = (names.sentinel(), names.kept_sentinel());
    if keep && is_added(monitor, node, &kept, true).await? {
        merge(monitor, (node, &kept), &[source]).await.map_err(qemu_failed)?;
        let gone = monitor.raw("block-dirty-bitmap-remove", json!({"node": node, "name": plain})).await;
        return gone.map(drop).or_else(|e| e.refusal().map(drop).ok_or(e)).map_err(qemu_failed);
    }
    // One that is there already was looked at.
    match is_added(monitor, node, &plain, false).await? {
        true => merge(monitor, (node, &plain), &[source]).await.map_err(qemu_failed),
        false => Ok(()),
    }
}

/// Adds a disabled bitmap; false if QEMU refuses.
async fn is_added(monitor: &Monitor, node: &str, name: &str, keep: bool) -> Result<bool, Failure> {
    let mut arguments = persist::bitmap(node, name, keep);
    arguments["disabled"] = json!(true);
    match monitor.raw("block-dirty-bitmap-add", arguments).await {
        Err(e) if e.refusal().is_some() => Ok(false),
        added => added.map(|_| true).map_err(qemu_failed),
    }
}
