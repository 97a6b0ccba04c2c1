//! What a sidecar says at the beginning of a session that is made up.

#![allow(clippy::unwrap_used)]

use jiff::Timestamp;
use livebackup::machine::{Disk, DiskKind, Machine, Taken};
use livebackup::wire::message::{Begun, BegunDisk};

/// Disks `disk0`, `disk1`, … of these sizes in bytes, all read whole.
pub fn begun(sizes: &[u64]) -> Begun {
    let disk = |(n, size_bytes): (usize, &u64)| BegunDisk {
        disk: Disk {
            name: format!("disk{n}"),
            kind: DiskKind::Disk,
            device: "virtio-blk-device".into(),
            qom_path: format!("/machine/peripheral/disk{n}"),
            node: format!("disk{n}"),
            size_bytes: *size_bytes,
            read_only: false,
            iothread: false,
            discard_unmap: false,
            chain: vec![],
            shared: None,
        },
        checkpoint: None,
        epoch: None,
        taken: Taken::Full { reason: "first".into() },
        needed_bytes: *size_bytes,
        audited_chunks: 0,
        areas: None,
    };
    let (disks, instant) = (sizes.iter().enumerate().map(disk).collect(), Timestamp::from_second(1).unwrap());
    Begun { machine: Machine::default(), instant, disks, left_out: vec![], stopped_us: 0, evidence: Default::default() }
}
