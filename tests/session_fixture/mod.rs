//! A sidecar in the test's own process: sessions of one disk, and an image that gets their events.

#![allow(dead_code, clippy::unwrap_used)]

use livebackup::units::CheckpointId;
use livebackup::vm::{Transport, Vm, VmOptions};
use livebackup::wire::message::{Ack, Begin, Event, Session, Totals};

use crate::common::{Qemu, Version};

pub const MIB: u64 = 1 << 20;
pub const CHUNK: u32 = 128 << 10;

pub struct Case {
    pub version: Version,
    pub transport: Transport,
    pub device: &'static str,
    pub path: &'static str,
    pub size: u64,
}

pub const VIRTIO: (&str, &str) = ("virtio-blk-pci,drive=disk0,id=vd0", "/machine/peripheral/vd0/virtio-backend");
pub const SCSI_IOTHREAD: (&str, &str) = ("scsi-hd,drive=disk0,id=vd0,bus=s0.0", "/machine/peripheral/vd0");

/// A QEMU with the one disk `vd0` on node `disk0`.
pub fn start(case: &Case) -> Qemu {
    start_with(case, &[])
}

/// With further arguments, that are about something else.
pub fn start_with(case: &Case, more: &[&str]) -> Qemu {
    let disk =
        "driver=raw,node-name=disk0,discard=unmap,file.driver=file,file.filename=DIR/disk0.raw,file.discard=unmap";
    let scsi = case.device.starts_with("scsi");
    let mut args = vec!["-name", "vm1", "-blockdev", disk];
    if scsi {
        args.extend(["-object", "iothread,id=io0", "-device", "virtio-scsi-pci,id=s0,iothread=io0"]);
    }
    args.extend(["-device", case.device]);
    args.extend(more);
    Qemu::start_with(case.version, &args, |dir| {
        std::fs::File::create(dir.join("disk0.raw")).unwrap().set_len(case.size).unwrap();
    })
}

pub fn options(qemu: &Qemu, transport: Transport) -> VmOptions {
    VmOptions { state: qemu.path("state"), transport, ..VmOptions::default() }
}

pub async fn attach(qemu: &Qemu, transport: Transport) -> Vm {
    let address = qemu.socket().to_str().unwrap().parse().unwrap();
    Vm::attach(&address, options(qemu, transport)).await.unwrap()
}

pub fn begin(since: Option<CheckpointId>) -> Begin {
    Begin {
        vm: "vm1".into(),
        since: since.into_iter().map(|id| ("vd0".to_owned(), id)).collect(),
        chunk_bytes: CHUNK,
        checkpoint: true,
        ..Begin::default()
    }
}

/// Applies a session's events to an image, acknowledging all of it; `meanwhile` runs after every event.
pub async fn apply(mut session: Session, image: &mut [u8], mut meanwhile: impl FnMut()) -> (CheckpointId, Totals) {
    let mut at = 0;
    loop {
        let event = session.events.recv().await.expect("an event").unwrap();
        let (offset, len) = match &event {
            Event::Data { offset_bytes, bytes, .. } => {
                image[*offset_bytes as usize..][..bytes.len()].copy_from_slice(bytes);
                (*offset_bytes, bytes.len() as u64)
            }
            Event::Zero { extent, .. } => {
                image[extent.offset_bytes as usize..extent.end() as usize].fill(0);
                (extent.offset_bytes, extent.len_bytes)
            }
            Event::Packed { .. } => panic!("nobody asked for compression"),
            Event::Same { .. } => panic!("no digests were given"),
            Event::Sent => continue,
            Event::End(totals) => return (session.begun.disks[0].checkpoint.unwrap(), totals.clone()),
        };
        assert!(offset >= at && offset.is_multiple_of(u64::from(CHUNK)), "events ascend in whole chunks");
        at = offset + len;
        let extents = vec![livebackup::extent::Extent::new(offset, len)];
        let _ = session.acks.send(Ack { disk: 0, extents });
        drop(event);
        meanwhile();
    }
}

/// No node and no export of ours is in QEMU.
pub fn assert_no_fleece(qemu: &mut Qemu) {
    let left: Vec<_> = qemu.nodes().into_iter().filter(|n| n.contains("livebackup")).collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(!qemu.exports().iter().any(|id| id.contains("livebackup")));
}

/// Nothing of a session is left in QEMU: no node, no export; of bitmaps just the one that records, and the sentinel.
pub fn assert_clean(qemu: &mut Qemu) {
    assert_no_fleece(qemu);
    let bitmaps = qemu.bitmaps();
    assert_eq!(bitmaps.iter().filter(|(_, name)| name.contains("-since-")).count(), 1, "{bitmaps:?}");
    assert_eq!(bitmaps.iter().filter(|(_, name)| name.contains("sentinel")).count(), 1, "{bitmaps:?}");
    assert_eq!(bitmaps.len(), 2, "{bitmaps:?}");
    let sets = qemu.qmp("query-fdsets", serde_json::json!({}));
    // QEMU 7.2 keeps the descriptors of a guest that does not run.
    assert!(qemu.version == Version::V7 || sets.as_array().unwrap().is_empty(), "{sets}");
}
