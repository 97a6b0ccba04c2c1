//! Plan: from which earlier point each disk goes on. Pure.
//!
//! A disk goes on from the newest point that has a checkpoint of it (for a differential: the newest full one), if that is
//! of the same size in chunks of the same size. A point of the level `copy` has no checkpoints and so is never a parent.
//! Whether the checkpoint still holds is for the sidecar to say; where it does not, or there is none, the disk is compared with
//! the newest point that has it at all, of the same size in chunks of the same size: a scan. Else it is sent whole.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::area::Areas;
use crate::machine::{FoundDisk, Taken, Verdict};
use crate::repo::Image;
use crate::repo::point::{AuditRecord, Level, Manifest, PointDisk};
use crate::units::{CheckpointId, EpochId, PointId};
use crate::wire::contract::MAX_KNOWN_EXTENTS;
use crate::wire::message::KnownAreas;

/// The level that was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LevelChoice {
    /// Incremental where possible, else full.
    #[default]
    Auto,
    /// Everything is read.
    Full,
    /// What was written since the newest point; refused where a disk would have to be read whole.
    Incremental,
    /// What was written since the newest full point.
    Differential,
    /// Everything is read, and no checkpoint is taken.
    Copy,
}

impl LevelChoice {
    /// All of them, with their names.
    pub const ALL: [(&str, Self); 5] = [
        ("auto", Self::Auto),
        ("full", Self::Full),
        ("incremental", Self::Incremental),
        ("differential", Self::Differential),
        ("copy", Self::Copy),
    ];
}

impl fmt::Display for LevelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Self::ALL.iter().find(|(_, level)| level == self).map_or(Ok(()), |(name, _)| f.write_str(name))
    }
}

impl FromStr for LevelChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(name, _)| *name == text);
        found.map(|(_, level)| *level).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|(name, _)| *name).collect();
            format!("a level is one of {}", names.join(", "))
        })
    }
}

/// Why a level is not possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotPossible {
    /// The repository has no point of the VM.
    #[error("the repository has no restore point of it yet")]
    NoPoint,
    /// It has points, but none to go on from.
    #[error("no restore point of it has a checkpoint of its disks as they are now")]
    NoCheckpoint,
    /// It has no full point to go on from.
    #[error("no full restore point of it has a checkpoint of its disks as they are now")]
    NoFull,
}

/// What a disk goes on from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// The point.
    pub point: PointId,
    /// Its checkpoint of the disk.
    pub checkpoint: CheckpointId,
    /// Its epoch of the disk.
    pub epoch: Option<EpochId>,
    /// Its content of the disk.
    pub image: Image,
    /// How far the disk's audit has come.
    pub audit: Option<AuditRecord>,
    /// What was left out there, and is zero in its content.
    pub areas: Areas,
    /// How many chunks were sent for it, if it was an incremental: a guess at what the next one needs.
    pub changed_chunks: Option<u64>,
}

/// What to ask the sidecar for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// By name what disks go on from. A disk that is not named is read whole.
    pub bases: BTreeMap<String, Base>,
    /// By name what disks that are read whole are compared with.
    pub scans: BTreeMap<String, (PointId, Image)>,
    /// The newest point that a disk goes on from.
    pub parent: Option<PointId>,
    /// Why disks without a base are read whole.
    pub full_reason: Option<String>,
}

impl Plan {
    /// By disk the checkpoint that the repository has.
    pub fn since(&self) -> BTreeMap<String, CheckpointId> {
        self.bases.iter().map(|(disk, base)| (disk.clone(), base.checkpoint)).collect()
    }

    /// By disk what the repository lacks of the point that it goes on from.
    pub fn areas(&self) -> BTreeMap<String, KnownAreas> {
        let known = self.bases.iter().filter(|(_, base)| !base.areas.is_empty()).map(|(disk, base)| {
            let known = KnownAreas { left_out: base.areas.left_out().collect(), seen: base.areas.seen.clone() };
            (disk.clone(), known)
        });
        let mut known: BTreeMap<_, _> = known.collect();
        let extents = known.values().map(|k: &KnownAreas| k.left_out.len() + k.seen.len()).sum::<usize>();
        if extents > MAX_KNOWN_EXTENTS {
            // What was seen only saves the next backup some reading.
            known.values_mut().for_each(|known| known.seen.clear());
        }
        known
    }

    /// Takes away what a disk goes on from: it cannot be believed. Gives that back.
    pub fn distrust(&mut self, disk: &str, reason: &str) -> Option<Base> {
        self.full_reason = Some(reason.to_owned());
        self.bases.remove(disk)
    }

    fn whole(reason: &str) -> Self {
        Self { full_reason: Some(reason.to_owned()), ..Self::default() }
    }
}

/// Chooses. `points` are those of the VM, the oldest first; `found` are its devices now.
///
/// # Errors
/// `incremental` and `differential` need something to go on from.
pub fn choose(
    level: LevelChoice,
    points: &[Manifest],
    found: &[FoundDisk],
    chunk_bytes: u32,
) -> Result<Plan, NotPossible> {
    let only_full = match level {
        LevelChoice::Full => return Ok(Plan::whole("a full backup was asked for")),
        LevelChoice::Copy => return Ok(Plan::whole("a copy was asked for")),
        LevelChoice::Differential => true,
        LevelChoice::Auto | LevelChoice::Incremental => false,
    };
    let mut plan = Plan::default();
    let newest_first = || points.iter().rev().filter(|p| !only_full || p.level == Level::Full);
    let mut whole = BTreeMap::new();
    for FoundDisk { disk, .. } in found.iter().filter(|f| level != LevelChoice::Incremental && is_protectable(f)) {
        let kept = points
            .iter()
            .rev()
            .find_map(|point| Some((point.id, point.disks.iter().find(|k| k.disk.name == disk.name)?)));
        if let Some((point, kept)) = kept.filter(|(_, kept)| changed(kept, disk.size_bytes, chunk_bytes).is_none()) {
            plan.scans.insert(disk.name.clone(), (point, kept.image));
        }
    }
    for FoundDisk { disk, .. } in found.iter().filter(|f| is_protectable(f)) {
        let earlier = newest_first().find_map(|point| {
            let kept = point.disks.iter().find(|kept| kept.disk.name == disk.name)?;
            Some((point, kept, kept.checkpoint?))
        });
        match earlier {
            None => {
                whole.insert("it has no checkpoint in an earlier point", disk.name.clone());
            }
            Some((point, kept, checkpoint)) => match changed(kept, disk.size_bytes, chunk_bytes) {
                Some(reason) => {
                    whole.insert(reason, disk.name.clone());
                }
                None => {
                    let (point, epoch, image) = (point.id, kept.epoch, kept.image);
                    let audit = last_audit(points, kept).or(kept.audit);
                    let changed_bytes = kept.read_bytes.saturating_sub(kept.same_bytes);
                    let was_incremental = matches!(kept.taken, Taken::Incremental { .. });
                    let changed_chunks = was_incremental.then(|| changed_bytes / u64::from(chunk_bytes));
                    let areas = kept.areas.clone();
                    let base = Base { point, checkpoint, epoch, image, audit, areas, changed_chunks };
                    plan.bases.insert(disk.name.clone(), base);
                }
            },
        }
    }
    let newest = |is_one: &dyn Fn(PointId) -> bool| points.iter().rev().map(|p| p.id).find(|id| is_one(*id));
    plan.parent = newest(&|id| plan.bases.values().any(|base| base.point == id))
        .or_else(|| newest(&|id| plan.scans.values().any(|(point, _)| *point == id)));
    plan.full_reason = match whole.into_keys().collect::<Vec<_>>() {
        _ if points.is_empty() => Some("the repository has no restore point of the VM yet".to_owned()),
        reasons if reasons.is_empty() => None,
        reasons => Some(reasons.join(", or ")),
    };
    match (level, plan.bases.is_empty()) {
        (LevelChoice::Incremental | LevelChoice::Differential, true) if points.is_empty() => Err(NotPossible::NoPoint),
        (LevelChoice::Incremental, true) => Err(NotPossible::NoCheckpoint),
        (LevelChoice::Differential, true) => Err(NotPossible::NoFull),
        _ => Ok(plan),
    }
}

fn is_protectable(found: &FoundDisk) -> bool {
    found.verdict == Verdict::Protectable
}

/// How far the audit of a disk has come in its epoch. That may be later than what it goes on from: a round goes on from one
/// differential to the next, else each would look at the same chunks.
fn last_audit(points: &[Manifest], base: &PointDisk) -> Option<AuditRecord> {
    let epoch = base.epoch?;
    let same = |kept: &&PointDisk| {
        let image = (kept.image.size_bytes, kept.image.chunk_bytes);
        kept.disk.name == base.disk.name
            && kept.epoch == Some(epoch)
            && image == (base.image.size_bytes, base.image.chunk_bytes)
    };
    points.iter().rev().flat_map(|point| point.disks.iter().find(same)).find_map(|kept| kept.audit)
}

/// Why what was kept of a disk cannot be gone on from.
fn changed(kept: &PointDisk, size_bytes: u64, chunk_bytes: u32) -> Option<&'static str> {
    if kept.image.size_bytes != size_bytes {
        return Some("its size has changed since the last point");
    }
    (kept.image.chunk_bytes != chunk_bytes).then_some("the repository's chunk size is another one")
}

/// The level to record: what really happened. `whole` says for each disk whether it was.
pub fn happened(asked: LevelChoice, mut whole: impl Iterator<Item = bool>) -> Level {
    match asked {
        LevelChoice::Copy => Level::Copy,
        _ if whole.all(|whole| whole) => Level::Full,
        LevelChoice::Differential => Level::Differential,
        _ => Level::Incremental,
    }
}

#[cfg(test)]
mod tests;
