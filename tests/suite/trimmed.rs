//! Zeroes of which QEMU knows are not read, of a full nor of an incremental: where the guest has trimmed its disk, the image gives an
//! error to whoever reads there.

#![allow(clippy::unwrap_used)]

use crate::common::*;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 256 * MIB;
/// What the guest trims, after it has written to all of it.
const TRIMMED: (u64, u64) = (64 * MIB, 160 * MIB);

/// With a sector that cannot be read, if `fails`.
fn what_is_trimmed_is_not_read(version: Version, fails: bool) {
    let mut disk = "driver=raw,node-name=disk0,discard=unmap,file.driver=blkdebug,file.discard=unmap,\
                    file.image.driver=file,file.image.filename=DIR/disk0.raw,file.image.discard=unmap"
        .to_owned();
    if fails {
        let sector = (TRIMMED.0 + 50 * MIB) / 512;
        disk += &format!(
            ",file.inject-error.0.event=none,file.inject-error.0.iotype=read,file.inject-error.0.sector={sector},\
             file.inject-error.0.once=off"
        );
    }
    let args = ["-name", "vm1", "-blockdev", &disk, "-device", "virtio-blk-pci,drive=disk0,id=vd0"];
    let mut qemu = Qemu::start_with(version, &args, |dir| {
        std::fs::File::create(dir.join("disk0.raw")).unwrap().set_len(SIZE).unwrap();
    });
    let (state, repo) = (qemu.path("state"), qemu.path("repo"));
    let (repo, source) = (repo.to_str().unwrap(), format!("qmp:{}", qemu.socket().display()));
    let command = |args: &[&str]| -> Value {
        let said = run(livebackup().arg("--json").arg("--state").arg(&state).args(args));
        serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"))
    };
    command(&["init", repo]);
    qemu.write(0, 8 * MIB, 1);
    let full = command(&["backup", &source, repo]);
    assert_eq!(full["disks"][0]["taken"], "full", "{full}");

    for at in (TRIMMED.0..TRIMMED.0 + TRIMMED.1).step_by(32 << 20) {
        qemu.write(at, 32 * MIB, 2);
    }
    let path = "/machine/peripheral/vd0/virtio-backend";
    for at in (TRIMMED.0..TRIMMED.0 + TRIMMED.1).step_by(32 << 20) {
        qemu.qemu_io(path, &format!("discard {at} {}", 32 * MIB));
    }
    qemu.write(4 * MIB, 4096, 3);
    qemu.write(TRIMMED.0 + TRIMMED.1 - 5 * MIB, 4096, 4);
    let report = command(&["backup", &source, repo, "--level", "incremental"]);
    assert_eq!(report["disks"][0]["taken"], "incremental", "{report}");
    assert!(
        report["disks"][0]["read_bytes"].as_u64().unwrap() >= TRIMMED.1,
        "all that was written to is in it: {report}"
    );

    let read = format!("qemu-io -d {path} \"read {} 512\"", TRIMMED.0 + 50 * MIB);
    qemu.qmp("human-monitor-command", json!({"command-line": read}));
    wait_until("QEMU to say what the read came to", || qemu.log().contains("read "));
    assert_eq!(qemu.log().contains("read failed"), fails, "the image fails who reads there");
    let restored = qemu.path("restored");
    command(&["restore", repo, "vm1", restored.to_str().unwrap()]);
    assert!(std::fs::read(restored.join("vd0.raw")).unwrap() == std::fs::read(qemu.path("disk0.raw")).unwrap());
}

#[test]
fn what_is_trimmed_is_not_read_10() {
    what_is_trimmed_is_not_read(Version::V10, true);
}

/// Its word on what is empty is not always right: all is read.
#[test]
fn what_is_trimmed_is_right_on_7() {
    what_is_trimmed_is_not_read(Version::V7, false);
}
