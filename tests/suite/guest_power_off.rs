//! A real guest powers off, with file systems mounted and files written just before: the next backup is an incremental, and
//! holds the disks to the byte.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

use crate::common::guest::*;
use crate::common::side::Serve;
use crate::common::*;
use serde_json::Value;

const DISKS: [GuestDisk; 3] = [
    GuestDisk::raw("data0", 48 << 20).with_ext4(),
    GuestDisk::qcow2("data1", 48 << 20).with_ext4(),
    GuestDisk::raw("data2", (4 << 20) + 512),
];

/// What the guest sees on a disk of a QEMU that may run.
fn content(version: Version, dir: &Path, home: &Path, disk: &GuestDisk) -> Vec<u8> {
    let raw = home.join("content.raw");
    let image = format!("driver={},file.filename={}", disk.format, dir.join(disk.file_name()).display());
    run(Command::new(version.program("qemu-img"))
        .args(["convert", "-U", "-O", "raw", "--image-opts"])
        .arg(image)
        .arg(&raw));
    std::fs::read(raw).unwrap()
}

/// `by_run`: under `livebackup run`, else beside `livebackup serve`.
fn powered_off(version: Version, by_run: bool) {
    let home = tempfile::tempdir().unwrap();
    let (state, repo) = (home.path().join("state"), home.path().join("repo"));
    let by = || {
        let mut run = livebackup();
        run.arg("--state").arg(&state).args(["run", "--"]);
        by_run.then_some(run)
    };
    let json = |args: &[&str]| -> Value {
        let text = run(livebackup().arg("--json").arg("--state").arg(&state).args(args));
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    };
    run(livebackup().arg("init").arg(&repo));
    let repo = repo.to_str().unwrap();
    let dir = tempfile::Builder::new().prefix("livebackup-guest-").tempdir().unwrap();
    DISKS.iter().for_each(|disk| disk.create(version, dir.path()));
    let monitor = dir.path().join("qmp");
    let mut guest = Guest::boot_by(by(), version, dir, &DISKS, &[]);
    let mut serve =
        (!by_run).then(|| Serve::start_for("guest", home.path(), &monitor, ("", "shutdown = \"harvest\""), &[]));
    if let Some(serve) = &mut serve {
        serve.wait();
    }
    let source = format!("qmp:{}", monitor.display());
    json(&["backup", &source, repo]);
    guest.sh("dd if=/dev/urandom of=/mnt/data0/early bs=64k count=20; cp /mnt/data0/early /mnt/data1/early; sync");
    // The shell goes with the guest: what happens at the end runs by itself.
    guest.sh(
        "(sleep 1; dd if=/dev/urandom of=/mnt/data0/late bs=64k count=30; cp /mnt/data0/late /mnt/data1/late; \
         dd if=/mnt/data0/late of=/dev/disk/data2 bs=4096 seek=77 count=9 conv=notrunc; poweroff -f) >/dev/null 2>&1 &",
    );
    let dir = guest.powered_off();
    // Started again without a guest: nothing is written.
    let args: Vec<_> = DISKS.iter().flat_map(GuestDisk::arguments).collect();
    let args: Vec<_> = ["-name", "guest"].into_iter().chain(args.iter().map(String::as_str)).collect();
    let mut qemu = Qemu::start_by(by(), version, dir, &args);
    wait_until("the disks to be tracked", || qemu.bitmaps().len() >= 2 * DISKS.len());
    let report = json(&["backup", &source, repo, "--level", "incremental"]);
    for disk in report["disks"].as_array().unwrap() {
        assert_eq!(disk["taken"], "incremental", "{report}");
    }
    let size: u64 = DISKS.iter().map(|disk| disk.size_bytes).sum();
    assert!(report["read_bytes"].as_u64().unwrap() < size / 2, "{report}");
    let restored = home.path().join("restored");
    json(&["restore", repo, "guest", restored.to_str().unwrap()]);
    for disk in &DISKS {
        let (found, now) = (
            std::fs::read(restored.join(format!("{}.raw", disk.name))).unwrap(),
            content(version, qemu.dir.path(), home.path(), disk),
        );
        assert!(found == now, "{} is not what the guest left", disk.name);
    }
    // And it is what the guest wrote: a sound file system with its files.
    let said = run(Command::new("debugfs").args(["-R", "stat early"]).arg(restored.join("data1.raw")));
    assert!(said.contains("Size: 1310720"), "{said}");
}

#[test]
fn under_run_on_10() {
    powered_off(Version::V10, true);
}

#[test]
fn beside_serve_on_7() {
    powered_off(Version::V7, false);
}
