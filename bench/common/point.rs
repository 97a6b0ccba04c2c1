//! A restore point for benchmarks: one disk in a repository of its own.

use std::path::Path;

use bytes::Bytes;
use livebackup::repo::{Compression, Image, Manifest, Repository, WriterOptions};
use livebackup::units::{KIB, MIB};

use crate::common::fill;

/// Makes a repository at `dir` with one point, of a disk of which the first `mib` MiB are data.
pub fn backup(dir: &Path, compression: Compression, mib: u64, size_bytes: u64) -> (Repository, Manifest) {
    let repo = Repository::init(dir, 128 * KIB as u32).expect("init");
    let options = WriterOptions { compression, ..WriterOptions::default() };
    let writer = repo.writer(options).expect("writer");
    let disk = writer.disk(size_bytes, 128 * KIB as u32, None).expect("disk");
    for i in 0..mib {
        let mut piece = vec![0; MIB as usize];
        fill(i + 1, &mut piece);
        writer.put_blocking(disk, i * MIB, Bytes::from(piece)).expect("put");
    }
    let image: Image = writer.finish().expect("finish").disks[0].image;
    let point = serde_json::json!({
        "id": "00000000000000000000000000000001", "vm": "vm", "started": "2026-01-01T00:00:00Z",
        "instant": "2026-01-01T00:00:00Z", "finished": "2026-01-01T00:00:00Z", "level": "full", "parent": null,
        "grade": "crash", "left_out": [], "livebackup": "bench",
        "machine": {"name": null, "uuid": null, "qemu_version": "10", "target": "x86_64", "machine_type": null,
            "command_line": [], "boot_files": []},
        "totals": {"size_bytes": 0, "read_bytes": 0, "stored_bytes": 0},
        "disks": [{
            "disk": {"name": "disk", "kind": "disk", "device": "virtio-blk-device", "qom_path": "/", "node": "n",
                "size_bytes": image.size_bytes, "read_only": false, "iothread": false, "discard_unmap": true,
                "chain": [], "shared": null},
            "root": image.root, "size_bytes": image.size_bytes, "chunk_bytes": image.chunk_bytes,
            "checkpoint": null, "epoch": null, "taken": "full", "reason": "bench", "read_bytes": 0, "stored_bytes": 0,
        }],
    });
    let point = serde_json::from_value(point).expect("a manifest");
    repo.commit(&point).expect("commit");
    (repo, point)
}
