//! What a virtual machine is made of: its definition and its disks, as found in QEMU, carried over the wire and kept in
//! every restore point.

use serde::{Deserialize, Serialize};

use crate::units::CheckpointId;

/// What kind of medium a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskKind {
    /// A guest block device.
    Disk,
    /// A parallel flash chip: firmware code or EFI variables.
    Pflash,
}

/// One file or device of a disk's chain, the guest-visible layer first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MediumFile {
    /// Format driver of the layer: `raw`, `qcow2`, …
    pub format: String,
    /// Protocol driver below it: `file`, `host_device`, `nbd`, …
    pub protocol: String,
    /// Path or address as QEMU prints it.
    pub filename: String,
    /// Whether QEMU opened it for reading only.
    pub read_only: bool,
}

/// A guest block device with a medium that we can protect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// DISK: the device's id, else a stable name. Unique in the machine.
    pub name: String,
    /// Disk or pflash.
    pub kind: DiskKind,
    /// QOM type of the device that owns the medium: `virtio-blk-device`, `scsi-hd`, …
    pub device: String,
    /// Full QOM path of the object that has the `drive` property.
    pub qom_path: String,
    /// Name of the root node that belongs to the disk: what the guest sees, below any filter of ours.
    pub node: String,
    /// Size that the guest sees, to the byte.
    pub size_bytes: u64,
    /// Whether the guest cannot write to it.
    pub read_only: bool,
    /// Whether the device runs in an iothread.
    pub iothread: bool,
    /// Whether the node passes the guest's discards on (`discard=unmap`): our filter must do the same.
    pub discard_unmap: bool,
    /// The chain of files.
    pub chain: Vec<MediumFile>,
    /// Why the medium counts as shared (never incremental), if it does.
    pub shared: Option<String>,
}

/// What a backup does with a device that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", content = "reason", rename_all = "kebab-case")]
pub enum Verdict {
    /// A backup takes it.
    Protectable,
    /// Left out, and said so (a CD drive, a floppy, an empty drive).
    LeftOut(String),
    /// Its writes cannot be followed or a filter would break it: an error unless it is excluded by name.
    NotProtectable(String),
}

/// A device that was found, with what a backup does with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundDisk {
    /// The device.
    #[serde(flatten)]
    pub disk: Disk,
    /// What a backup does with it.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// How a backup takes a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "taken", rename_all = "kebab-case")]
pub enum Taken {
    /// Whole.
    Full {
        /// Why, in a sentence.
        reason: String,
    },
    /// What was written since a checkpoint.
    Incremental {
        /// The client's checkpoint.
        since: CheckpointId,
    },
    /// All is read, and what differs from an earlier point is taken.
    Scan {
        /// Why, in a sentence.
        reason: String,
    },
}

/// The virtual machine's definition: enough to start it again by hand.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// QEMU's `-name`, if any.
    pub name: Option<String>,
    /// The machine's UUID, if one was set.
    pub uuid: Option<String>,
    /// QEMU's version, `10.0.2`.
    pub qemu_version: String,
    /// QEMU's target, `x86_64`.
    pub target: String,
    /// Machine type as QEMU resolved it, `pc-q35-10.0`.
    pub machine_type: Option<String>,
    /// QEMU's command line, argument by argument, where its process could be seen.
    pub command_line: Vec<String>,
    /// Files other than disks that the command line names and the machine cannot start without
    /// (`-kernel`, `-initrd`, `-bios`).
    pub boot_files: Vec<String>,
}
