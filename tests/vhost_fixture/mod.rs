//! A fleece with a vhost-user-blk export, opened by raw QMP commands, and the bytes that it must show.

#![allow(dead_code, clippy::unwrap_used)]

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use livebackup::block::{BlockSource, SourceRules};
use livebackup::extent::Extent;
use livebackup::vhost::VhostSource;
use serde_json::json;

use crate::common::{Qemu, Rng, Version};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

/// The guest device that the disk belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// virtio-blk in QEMU's main loop.
    Blk,
    /// virtio-blk with an I/O thread.
    BlkIothread,
    /// SCSI disk whose controller has an I/O thread: its block nodes are there from the start, without a guest driver.
    ScsiIothread,
}

pub const DEVICES: [Device; 3] = [Device::Blk, Device::BlkIothread, Device::ScsiIothread];

impl Device {
    fn args(self) -> Vec<&'static str> {
        match self {
            Device::Blk => vec!["-device", "virtio-blk-pci,drive=disk0,id=vd0"],
            Device::BlkIothread => {
                vec!["-object", "iothread,id=io0", "-device", "virtio-blk-pci,drive=disk0,id=vd0,iothread=io0"]
            }
            Device::ScsiIothread => vec![
                "-object",
                "iothread,id=io0",
                "-device",
                "virtio-scsi-pci,id=sc0,iothread=io0",
                "-device",
                "scsi-hd,drive=disk0,id=vd0,bus=sc0.0",
            ],
        }
    }

    /// Full QOM path of the disk.
    pub fn path(self) -> &'static str {
        match self {
            Device::ScsiIothread => "/machine/peripheral/vd0",
            _ => "/machine/peripheral/vd0/virtio-backend",
        }
    }
}

/// A QEMU with one disk, whose bytes at the instant are in `bytes`.
pub struct Fleece {
    pub qemu: Qemu,
    pub device: Device,
    pub bytes: Vec<u8>,
}

impl Fleece {
    /// Random bytes on the disk, filter in, export listening at [`Fleece::socket`].
    pub fn open(version: Version, device: Device, size_bytes: u64) -> Fleece {
        let mut fleece = Fleece::without_export(version, device, size_bytes);
        let socket = fleece.socket();
        fleece.export(json!({"type": "unix", "path": socket}));
        fleece
    }

    /// As [`Fleece::open`], but without the export.
    pub fn without_export(version: Version, device: Device, size_bytes: u64) -> Fleece {
        let mut bytes = vec![0; size_bytes as usize];
        Rng::seeded(size_bytes).fill(&mut bytes);
        let mut args = vec![
            "-blockdev",
            "driver=raw,node-name=disk0,discard=unmap,file.driver=file,file.filename=DIR/disk0.raw,file.discard=unmap",
        ];
        args.extend(device.args());
        let mut qemu = Qemu::start_with(version, &args, |dir| {
            std::fs::write(dir.join("disk0.raw"), &bytes).unwrap();
            std::fs::File::create(dir.join("scratch")).unwrap().set_len(size_bytes).unwrap();
        });
        // A write before the instant is part of the snapshot.
        qemu.qemu_io(device.path(), "write -P 0x5a 1024 8192");
        bytes[1024..1024 + 8192].fill(0x5a);
        let scratch = qemu.path("scratch");
        qemu.qmp(
            "blockdev-add",
            json!({"driver": "file", "filename": scratch, "node-name": "scr", "discard": "unmap"}),
        );
        qemu.qmp(
            "blockdev-add",
            json!({"driver": "copy-before-write", "node-name": "cbw", "file": "disk0", "target": "scr",
                "on-cbw-error": "break-snapshot", "cbw-timeout": 4, "discard": "unmap"}),
        );
        qemu.qmp("qom-set", json!({"path": device.path(), "property": "drive", "value": "cbw"}));
        qemu.qmp(
            "blockdev-add",
            json!({"driver": "snapshot-access", "node-name": "snap", "file": "cbw", "discard": "unmap"}),
        );
        Fleece { qemu, device, bytes }
    }

    /// Adds the export `e0`, listening at this address.
    pub fn export(&mut self, address: serde_json::Value) {
        self.qemu.qmp(
            "block-export-add",
            json!({"id": "e0", "type": "vhost-user-blk", "node-name": "snap", "writable": true, "addr": address}),
        );
    }

    pub fn socket(&self) -> PathBuf {
        self.qemu.path("vu.sock")
    }

    pub fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub fn rules(&self) -> SourceRules {
        rules(self.qemu.version)
    }

    pub fn connect(&self) -> VhostSource {
        VhostSource::connect(&self.socket(), self.size_bytes(), self.rules()).unwrap()
    }

    /// A guest write.
    pub fn write(&mut self, offset: u64, len: u64, pattern: u8) {
        self.qemu.qemu_io(self.device.path(), &format!("write -P {pattern:#04x} {offset} {len}"));
    }

    /// A random guest write of 4 to 128 KiB.
    pub fn write_somewhere(&mut self, rng: &mut Rng) {
        let len = (4 + rng.below(125)) * KIB;
        let offset = rng.below((self.size_bytes() - len) / 512) * 512;
        self.write(offset, len, rng.next() as u8);
    }

    /// Bytes that the scratch file takes on its file system.
    pub fn scratch_bytes(&self) -> u64 {
        std::fs::metadata(self.qemu.path("scratch")).unwrap().blocks() * 512
    }

    /// Takes everything down again; fails when something is left.
    pub fn take_down(mut self) {
        if self.qemu.exports() == ["e0"] {
            self.qemu.qmp("block-export-del", json!({"id": "e0", "mode": "hard"}));
        }
        let qemu = &mut self.qemu;
        crate::common::wait_until("the export to go", || qemu.exports().is_empty());
        qemu.qmp("blockdev-del", json!({"node-name": "snap"}));
        qemu.qmp("qom-set", json!({"path": self.device.path(), "property": "drive", "value": "disk0"}));
        qemu.qmp("blockdev-del", json!({"node-name": "cbw"}));
        qemu.qmp("blockdev-del", json!({"node-name": "scr"}));
        assert!(!qemu.nodes().iter().any(|n| ["snap", "cbw", "scr"].contains(&n.as_str())));
    }
}

/// What this version can be trusted with.
pub fn rules(version: Version) -> SourceRules {
    let boundary_bytes = if version == Version::V7 { 64 * KIB } else { MIB };
    SourceRules { boundary_bytes, in_flight_bytes: 8 * MIB }
}

/// Runs it on a runtime, but not for ever.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(60), future).await.expect("it ends within a minute")
    })
}

/// Reads everything in pieces of `len_bytes`, 16 at once, and compares.
pub async fn expect_whole(source: &dyn BlockSource, bytes: &[u8], len_bytes: u64) {
    use futures_util::StreamExt;
    let whole = Extent::new(0, bytes.len() as u64);
    let reads = whole.split_at_multiples(len_bytes).map(|e| async move { (e, source.read(e).await) });
    let mut reads = futures_util::stream::iter(reads).buffered(16);
    while let Some((extent, got)) = reads.next().await {
        expect(&got.unwrap(), bytes, extent);
    }
}

/// Fails unless these are the bytes of that extent.
pub fn expect(got: &[u8], bytes: &[u8], extent: Extent) {
    let want = &bytes[extent.offset_bytes as usize..extent.end() as usize];
    if got != want {
        let at = got.iter().zip(want).position(|(a, b)| a != b);
        panic!("{extent}: {} bytes, the first wrong one at {at:?}", got.len());
    }
}
