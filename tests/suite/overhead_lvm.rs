//! `livebackup bench write-overhead --method lvm`, where there is a device-mapper: in a guest with this host's QEMU and LVM,
//! since the host of a test may have none. In it a second QEMU runs, whose processor stands still.

#![allow(clippy::unwrap_used)]

use crate::common::guest::*;
use crate::common::*;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// A disk with programs, and room for a measurement.
const TOOLS: GuestDisk = GuestDisk::raw("tools", 1 << 30).with_ext4();

/// Copies a program with the libraries that it loads, each to its own path below `root`.
fn install(root: &Path, program: &Path, at: &str) {
    let to = root.join(at.trim_start_matches('/'));
    std::fs::create_dir_all(to.parent().unwrap()).unwrap();
    std::fs::copy(program, &to).unwrap();
    let said = run(Command::new("ldd").arg(program));
    let libraries: BTreeSet<_> = said.split_whitespace().filter(|word| word.starts_with('/')).collect();
    for library in libraries {
        let to = root.join(library.trim_start_matches('/'));
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(library, &to).unwrap();
    }
}

#[test]
fn an_lvm_snapshot_is_measured_and_leaves_nothing() {
    let dir = tempfile::Builder::new().prefix("livebackup-guest-").tempdir().unwrap();
    let root = dir.path().join("root");
    for mount in ["dev", "etc", "proc", "sys", "run", "tmp", "work", "lib64"] {
        std::fs::create_dir_all(root.join(mount)).unwrap();
    }
    install(&root, &Version::V10.program("qemu-system-x86_64"), "/usr/bin/qemu-system-x86_64");
    install(&root, Path::new("/usr/sbin/lvm"), "/usr/sbin/lvm");
    install(&root, Path::new("/usr/sbin/losetup"), "/usr/sbin/losetup");
    install(&root, Path::new(env!("CARGO_BIN_EXE_livebackup")), "/usr/bin/livebackup");
    let image = dir.path().join(TOOLS.file_name());
    std::fs::File::create(&image).unwrap().set_len(TOOLS.size_bytes).unwrap();
    run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-m", "0", "-d"]).args([&root, &image]));
    std::fs::remove_dir_all(&root).unwrap();

    let mut guest = Guest::boot_in(Version::V10, dir, &[TOOLS], &["-m", "768"]);
    for (kind, what) in [("proc", "proc"), ("sysfs", "sys"), ("devtmpfs", "dev"), ("tmpfs", "run"), ("tmpfs", "tmp")] {
        guest.sh(&format!("mount -t {kind} {what} /mnt/tools/{what}"));
    }
    let inside = |guest: &mut Guest, command: &str| guest.sh(&format!("chroot /mnt/tools {command}"));
    let state = |guest: &mut Guest| {
        [
            inside(guest, "/usr/sbin/lvm vgs --noheadings"),
            guest.sh("ls /dev/mapper; find /mnt/tools/etc /mnt/tools/work"),
        ]
    };
    let before = state(&mut guest);
    let command = "/usr/bin/livebackup --json --quiet bench write-overhead --dir /work --size 16448K --seconds 40 --rounds 1 \
                   --qemu /usr/bin/qemu-system-x86_64 --method lvm";
    let said: Value = serde_json::from_str(&inside(&mut guest, command)).unwrap();
    let found = &said["summaries"][0];
    assert!(found["method"] == "lvm" && found["not_measured"].is_null() && found["rounds"] == 1, "{found}");
    assert_eq!(found["failed_requests"], 0, "{found}");
    let lvm = &said["runs"][0];
    for phase in ["before", "during", "after"] {
        assert!(lvm[phase]["operations"].as_u64().unwrap() > 0, "{phase} of {lvm}");
    }
    assert!(lvm["backup"]["finished"] == true && lvm["backup"]["read_bytes"] == 16448 << 10, "{lvm}");
    // That the disk holds what was written, after it came back from its volume, is checked by the program itself.
    let nothing_is_left = |guest: &mut Guest| {
        assert_eq!(before, state(guest));
        assert_eq!(guest.sh("cat /sys/block/loop*/loop/backing_file 2>/dev/null || true"), "");
    };
    nothing_is_left(&mut guest);

    // Interrupted while the snapshot is there.
    let long = format!("chroot /mnt/tools {command} --reader-rate 2M");
    guest.sh(&format!("{long} >/tmp/said 2>&1 & echo $! >/tmp/pid"));
    // Two fifths of the seconds are measured before.
    guest.sh("i=0; until ls /dev/mapper/*-instant; do i=$((i + 1)); [ $i -lt 300 ] || exit 1; sleep 1; done");
    guest.sh("kill -INT $(cat /tmp/pid); while kill -0 $(cat /tmp/pid); do sleep 1; done");
    assert!(guest.sh("cat /tmp/said").contains("interrupted"));
    nothing_is_left(&mut guest);
}
