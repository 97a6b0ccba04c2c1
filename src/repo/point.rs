//! Restore point: the manifest, in `points/VM/<PointId>.point` ([sealed](crate::repo::sealed) JSON).
//!
//! A point exists when its manifest does. Everything that it refers to is durable before.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::area::Areas;
pub use crate::grade::{Evidence, Grade};
use crate::impact::Impact;
use crate::limits::{MAX_DISKS, MAX_NAME_BYTES};
use crate::machine::{Disk, FoundDisk, Machine, Taken};
use crate::repo::error::FormatError;
use crate::repo::sealed::{self, Kind};
use crate::repo::tree::Image;
use crate::units::{CheckpointId, EpochId, PointId};

/// Version 2: areas were left out of a disk. Who does not know of that would go on from the point as if all were there.
const KIND: Kind = Kind { format: "livebackup-point", version: 2 };
const KIND_WHOLE: Kind = Kind { version: 1, ..KIND };
/// Most files that a point keeps.
const MAX_FILES: usize = 256;

/// What kind of backup made the point. Every point is a full one to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Everything was read.
    Full,
    /// What was written since the last point was read.
    Incremental,
    /// What was written since the last full one was read.
    Differential,
    /// Everything was read, and no checkpoint taken.
    Copy,
}

impl Level {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
            Self::Differential => "differential",
            Self::Copy => "copy",
        }
    }
}

/// How far the audit of a disk has come: where it is in the random order in which chunks are confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRecord {
    /// Names the order of this round.
    pub seed: u64,
    /// So many of the disk's chunks have had their turn in this round: confirmed, or taken because they were written.
    pub position: u64,
    /// In so many backups.
    pub runs: u64,
    /// Chunks that were compared and found right in this round.
    pub confirmed_chunks: u64,
    /// When all of the disk was last known to be right: it was read whole then, or a round that has ended began.
    pub trusted: Option<Timestamp>,
    /// When this round began.
    pub round_started: Timestamp,
}

/// A disk of a restore point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointDisk {
    /// What it was in the VM.
    pub disk: Disk,
    /// Its content.
    #[serde(flatten)]
    pub image: Image,
    /// The checkpoint taken at the instant: what a later backup starts from.
    pub checkpoint: Option<CheckpointId>,
    /// Its epoch.
    pub epoch: Option<EpochId>,
    /// How it was taken.
    #[serde(flatten)]
    pub taken: Taken,
    /// Bytes read from the VM.
    pub read_bytes: u64,
    /// Of those, bytes that an earlier point has: found equal in a scan, or confirmed in an audit.
    #[serde(default)]
    pub same_bytes: u64,
    /// Bytes added to the repository's packs.
    pub stored_bytes: u64,
    /// How far the audit has come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<AuditRecord>,
    /// What it cost the guest; none of a sidecar that does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub impact: Option<Impact>,
    /// What was left out, as the operator said: it is zero here.
    #[serde(default, skip_serializing_if = "Areas::is_empty")]
    pub areas: Areas,
}

/// A file kept with the point: a kernel, a firmware.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointFile {
    /// Its name, as the machine's definition has it.
    pub name: String,
    /// Its content.
    #[serde(flatten)]
    pub image: Image,
}

/// Sums over the point.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointTotals {
    /// Sizes of the disks.
    pub size_bytes: u64,
    /// Bytes read from the VM.
    pub read_bytes: u64,
    /// Bytes added to the repository's packs.
    pub stored_bytes: u64,
}

/// A restore point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its id.
    pub id: PointId,
    /// The VM.
    pub vm: String,
    /// When the backup began.
    pub started: Timestamp,
    /// The instant that the point shows.
    pub instant: Timestamp,
    /// When all data was stored.
    pub finished: Timestamp,
    /// What kind of backup it was.
    pub level: Level,
    /// The point that it was taken against, if any. Nothing to read it depends on that point.
    pub parent: Option<PointId>,
    /// In which state the guest's data is.
    pub grade: Grade,
    /// What the grade rests on: who was frozen and for how long, …
    #[serde(default)]
    pub evidence: Evidence,
    /// The VM's definition.
    pub machine: Machine,
    /// The disks.
    pub disks: Vec<PointDisk>,
    /// Files kept with it.
    #[serde(default)]
    pub files: Vec<PointFile>,
    /// Devices that were left out, with the reason.
    #[serde(default)]
    pub left_out: Vec<FoundDisk>,
    /// Sums.
    pub totals: PointTotals,
    /// Version of the livebackup that wrote it.
    pub livebackup: String,
}

/// Why disks cannot be chosen from a point.
#[derive(Debug, thiserror::Error)]
pub enum ChoiceError {
    /// A disk was named that the point does not have.
    #[error("the restore point {point} of {vm:?} has no disk {disk:?}; it has {known}")]
    Unknown {
        /// The VM.
        vm: String,
        /// The point.
        point: String,
        /// What was named.
        disk: String,
        /// What there is.
        known: String,
    },
    /// A disk was named twice.
    #[error("the disk {disk:?} is named twice; name it once")]
    Twice {
        /// Which.
        disk: String,
    },
}

impl Manifest {
    /// The disks with these names, in that order; all when none is named.
    pub fn choose(&self, names: &[&str]) -> Result<Vec<&PointDisk>, ChoiceError> {
        if names.is_empty() {
            return Ok(self.disks.iter().collect());
        }
        let mut chosen: Vec<&PointDisk> = Vec::with_capacity(names.len());
        for name in names {
            let found = self.disks.iter().find(|disk| disk.disk.name == *name).ok_or_else(|| {
                let known: Vec<_> = self.disks.iter().map(|disk| format!("{:?}", disk.disk.name)).collect();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                ChoiceError::Unknown { vm: self.vm.clone(), point: self.id.short(), disk: (*name).to_owned(), known }
            })?;
            if chosen.iter().any(|other| other.disk.name == *name) {
                return Err(ChoiceError::Twice { disk: (*name).to_owned() });
            }
            chosen.push(found);
        }
        Ok(chosen)
    }

    /// The file.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        self.check()?;
        let whole = self.disks.iter().all(|disk| disk.areas.areas.is_empty());
        sealed::encode(if whole { KIND_WHOLE } else { KIND }, self)
    }

    /// The manifest in a file.
    pub fn decode(file: &[u8]) -> Result<Self, FormatError> {
        let this: Self = sealed::decode(KIND, file)?;
        this.check().map(|()| this)
    }

    fn check(&self) -> Result<(), FormatError> {
        if self.disks.len() > MAX_DISKS || self.files.len() > MAX_FILES {
            return Err(FormatError::bad("it has too many disks or files"));
        }
        if self.vm.is_empty() || self.vm.len() > MAX_NAME_BYTES {
            return Err(FormatError::bad("the name of its VM is empty or too long"));
        }
        let mut names: Vec<_> = self.disks.iter().map(|d| &d.disk.name).collect();
        names.sort();
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(FormatError::bad("two of its disks have the same name"));
        }
        if let Some(disk) = self.disks.iter().find(|d| d.disk.size_bytes != d.image.size_bytes) {
            return Err(FormatError::bad(format!("its disk {:?} has two sizes", disk.disk.name)));
        }
        for disk in &self.disks {
            if let Some(wrong) = disk.areas.wrong(disk.disk.size_bytes) {
                return Err(FormatError::bad(format!("its disk {:?} has {wrong}", disk.disk.name)));
            }
        }
        self.images().try_for_each(|(_, image)| image.check())
    }

    /// All content, with the names of disks and files.
    pub fn images(&self) -> impl Iterator<Item = (&str, Image)> {
        let disks = self.disks.iter().map(|d| (d.disk.name.as_str(), d.image));
        disks.chain(self.files.iter().map(|f| (f.name.as_str(), f.image)))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::machine::DiskKind;

    /// A disk with this name and content.
    pub(crate) fn point_disk(name: &str, image: Image) -> PointDisk {
        let disk = Disk {
            name: name.to_owned(),
            kind: DiskKind::Disk,
            device: "virtio-blk-device".to_owned(),
            qom_path: format!("/machine/peripheral/{name}"),
            node: "node0".to_owned(),
            size_bytes: image.size_bytes,
            read_only: false,
            iothread: false,
            discard_unmap: true,
            chain: Vec::new(),
            shared: None,
        };
        let taken = Taken::Full { reason: "the first backup".to_owned() };
        let (checkpoint, epoch) = (Some(CheckpointId::random()), Some(EpochId::random()));
        let (read_bytes, same_bytes, stored_bytes, audit, impact) = (1, 0, 2, None, None);
        let areas = Areas::default();
        PointDisk { disk, image, checkpoint, epoch, taken, read_bytes, same_bytes, stored_bytes, audit, impact, areas }
    }

    /// A manifest of these disks.
    pub(crate) fn manifest(vm: &str, disks: Vec<PointDisk>) -> Manifest {
        let now = Timestamp::now();
        Manifest {
            id: PointId::random(),
            vm: vm.to_owned(),
            started: now,
            instant: now,
            finished: now,
            level: Level::Full,
            parent: None,
            grade: Grade::Crash,
            evidence: Evidence::default(),
            machine: Machine::default(),
            disks,
            files: Vec::new(),
            left_out: Vec::new(),
            totals: PointTotals::default(),
            livebackup: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    #[test]
    fn a_manifest_survives_and_every_flipped_bit_is_found() {
        let image = Image { root: crate::repo::Digest::of(b"r"), size_bytes: 5, chunk_bytes: 65536 };
        let manifest = manifest("vm", vec![point_disk("a", image), point_disk("b", image)]);
        let file = manifest.encode().unwrap();
        assert_eq!(Manifest::decode(&file).unwrap(), manifest);
        for bit in 0..file.len() * 8 {
            let mut twin = file.clone();
            twin[bit / 8] ^= 1 << (bit % 8);
            assert!(Manifest::decode(&twin).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let image = Image { root: crate::repo::Digest::ZERO, size_bytes: 5, chunk_bytes: 65536 };
        let twice = manifest("vm", vec![point_disk("a", image), point_disk("a", image)]);
        assert!(twice.encode().is_err());
        let huge = Image { size_bytes: u64::MAX, ..image };
        assert!(manifest("vm", vec![point_disk("a", huge)]).encode().is_err());
        let odd = Image { chunk_bytes: 3, ..image };
        assert!(manifest("vm", vec![point_disk("a", odd)]).encode().is_err());
        assert!(manifest("", vec![]).encode().is_err());
    }
}
