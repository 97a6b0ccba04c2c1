//! Ways to be fooled while no bitmap records: between two QEMUs, or under one. After each of them the next backup holds what
//! the disk really holds, which the test knows because it wrote it there itself; and where the medium was changed, it was
//! read whole, with the reason.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::common::device::Loop;
use crate::common::side::{self, *};
use crate::common::*;
use serde_json::json;

const HARVEST: &str = "shutdown = \"harvest\"";

/// A machine with a point that has powered off with its bitmaps taken, and the service that waits for it.
fn off(version: Version, rng: &mut Rng) -> (Side, Serve) {
    let mut side = Side::new(version);
    side.start();
    let mut serve = Serve::start(&side, HARVEST);
    serve.wait_until_attached(&side);
    side.cont();
    side.scatter(rng);
    side.backup("auto");
    side.scatter(rng);
    let before = serve.log().matches("QEMU ended").count();
    side.tiny().power_off();
    side.wait_for_exit();
    wait_until("the stamp", || serve.log().matches("QEMU ended").count() > before);
    (side, serve)
}

/// Starts the machine again, and lets the guest write.
fn on(side: &mut Side, serve: &mut Serve, rng: &mut Rng) {
    side.start();
    serve.wait_until_attached(side);
    side.cont();
    side.scatter(rng);
}

/// As [`side::whole`], by number.
fn whole(report: &serde_json::Value, disk: usize) -> Option<String> {
    side::whole(report, DISKS[disk].0)
}

/// Writes one block into the raw disk's file as another program would.
fn write_behind(side: &mut Side, at: u64, pattern: u8) {
    let file = std::fs::OpenOptions::new().write(true).open(side.path("vd0.raw")).unwrap();
    file.write_all_at(&[pattern; 512], at).unwrap();
    side.models[0][at as usize..at as usize + 512].fill(pattern);
}

/// Changes the raw disk while the machine is off; the next backup must read it whole, with these words, and the other
/// disk not.
fn changed_while_off(says: &str, change: impl Fn(&mut Side)) {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let (mut side, mut serve) = off(version, &mut rng);
        change(&mut side);
        on(&mut side, &mut serve, &mut rng);
        let tracking = side.tracking();
        assert!(tracking[0].to_string().contains(says), "{says}: {tracking:?}");
        let report = side.backup("auto");
        let reason = whole(&report, 0).unwrap_or_else(|| panic!("not read whole: {report}"));
        assert!(reason.contains(says), "{says}: {reason}");
        assert_eq!(whole(&report, 1), None, "nobody touched the other disk: {report}");
        side.scatter(&mut rng);
        side.backup("incremental");
    }
}

#[test]
fn a_disk_that_was_written_to_while_off() {
    changed_while_off("was written to", |side| write_behind(side, 5 << 20, 0x77));
}

/// The write comes the moment QEMU is gone: before the stamp, or in the midst of it.
#[test]
fn a_disk_that_was_written_to_at_the_very_end() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let mut side = Side::new(version);
        side.start();
        let mut serve = Serve::start(&side, HARVEST);
        serve.wait_until_attached(&side);
        side.cont();
        side.scatter(&mut rng);
        side.backup("auto");
        for round in 0..6_u8 {
            side.scatter(&mut rng);
            side.tiny().power_off();
            side.wait_for_exit();
            std::thread::sleep(std::time::Duration::from_millis(rng.below(25)));
            write_behind(&mut side, 5 << 20, 0x80 + round);
            on(&mut side, &mut serve, &mut rng);
            let report = side.backup("auto");
            assert!(whole(&report, 0).is_some(), "round {round}: {report}");
        }
    }
}

#[test]
fn a_disk_that_was_written_to_with_the_time_set_back() {
    changed_while_off("time set back", |side| {
        let path = side.path("vd0.raw");
        let mtime = std::fs::metadata(&path).unwrap().modified().unwrap();
        write_behind(side, 5 << 20, 0x78);
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_modified(mtime).unwrap();
    });
}

#[test]
fn a_disk_that_was_restored_from_a_copy() {
    changed_while_off("another file", |side| {
        let path = side.path("vd0.raw");
        let copy = side.path("copy");
        std::fs::copy(&path, &copy).unwrap();
        let mtime = std::fs::metadata(&path).unwrap().modified().unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&copy).unwrap();
        file.write_all_at(&[0x79; 512], 1 << 20).unwrap();
        file.set_modified(mtime).unwrap();
        drop(file);
        side.models[0][1 << 20..(1 << 20) + 512].fill(0x79);
        std::fs::rename(copy, path).unwrap();
    });
}

#[test]
fn a_disk_that_was_made_smaller_and_larger_again() {
    changed_while_off("was written to", |side| {
        let file = std::fs::OpenOptions::new().write(true).open(side.path("vd0.raw")).unwrap();
        file.set_len(1 << 20).unwrap();
        file.set_len(SIZE).unwrap();
        side.models[0][1 << 20..].fill(0);
    });
}

/// The files of two disks change places.
#[test]
fn disks_that_were_swapped() {
    let mut rng = Rng::new();
    let mut side = Side::new(Version::V10);
    for argument in &mut side.args {
        *argument = argument.replace("driver=qcow2,node", "driver=raw,node").replace("vd1.qcow2", "vd1.raw");
    }
    std::fs::File::create(side.path("vd1.raw")).unwrap().set_len(SIZE).unwrap();
    side.start();
    let mut serve = Serve::start(&side, HARVEST);
    serve.wait_until_attached(&side);
    side.cont();
    side.scatter(&mut rng);
    side.backup("auto");
    side.tiny().power_off();
    side.wait_for_exit();
    std::fs::rename(side.path("vd0.raw"), side.path("x")).unwrap();
    std::fs::rename(side.path("vd1.raw"), side.path("vd0.raw")).unwrap();
    std::fs::rename(side.path("x"), side.path("vd1.raw")).unwrap();
    side.models.swap(0, 1);
    on(&mut side, &mut serve, &mut rng);
    let report = side.backup("auto");
    for disk in 0..2 {
        assert!(whole(&report, disk).is_some_and(|w| w.contains("another file")), "{report}");
    }
}

/// The file was replaced under the running QEMU: it writes on to the old one, and the next start opens the new one.
#[test]
fn a_file_that_was_replaced_under_a_running_qemu() {
    let mut rng = Rng::new();
    let mut side = Side::new(Version::V10);
    side.start();
    let mut serve = Serve::start(&side, HARVEST);
    serve.wait_until_attached(&side);
    side.cont();
    side.scatter(&mut rng);
    side.backup("auto");
    std::fs::copy(side.path("vd0.raw"), side.path("copy")).unwrap();
    let replaced = side.models[0].clone();
    std::fs::rename(side.path("copy"), side.path("vd0.raw")).unwrap();
    side.write_at(0, 3 << 20, 512, 0x66);
    // In this QEMU all is as before.
    let report = side.backup("incremental");
    assert_eq!(whole(&report, 0), None, "{report}");
    side.tiny().power_off();
    side.wait_for_exit();
    side.models[0] = replaced;
    on(&mut side, &mut serve, &mut rng);
    let report = side.backup("auto");
    assert!(whole(&report, 0).is_some_and(|w| w.contains("moved or replaced")), "{report}");
}

/// The guest wrote before tracking was back.
#[test]
fn a_guest_that_wrote_before_we_looked() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let (mut side, serve) = off(version, &mut rng);
        serve.stop();
        side.start();
        side.cont();
        side.write_at(0, 4 << 20, 65536, 0x55);
        let report = side.backup("auto");
        assert!(whole(&report, 0).is_some_and(|w| w.contains("was written to")), "{report}");
        // A disk that it had not written to yet is tracked on: nothing was missed there.
        assert_eq!(whole(&report, 1), None, "{report}");
        side.scatter(&mut rng);
        side.backup("incremental");
    }
}

/// The host was started anew: times prove nothing after a crash.
#[test]
fn another_start_of_the_host() {
    let mut rng = Rng::new();
    let (mut side, serve) = off(Version::V10, &mut rng);
    serve.stop();
    for disk in ["vd0", "vd1"] {
        rewrite_log(&side, disk, |json| {
            let at = json.find("\"boot_id\":\"").unwrap() + "\"boot_id\":\"".len();
            let mut text = json.to_owned();
            let other = if &json[at..=at] == "0" { "1" } else { "0" };
            text.replace_range(at..=at, other);
            text
        });
    }
    side.start();
    side.scatter(&mut rng);
    let report = side.backup("auto");
    assert!(whole(&report, 0).is_some_and(|w| w.contains("host was started anew")), "{report}");
}

/// Changes the JSON of a disk's `epoch.json`, with its checksum.
fn rewrite_log(side: &Side, disk: &str, change: impl Fn(&str) -> String) {
    let logs = side.state().join("vms/vm1/disks");
    let path = logs.join(disk).join("epoch.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let json = change(text.lines().next().unwrap());
    std::fs::write(path, format!("{json}\n{:08x}\n", crc32fast::hash(json.as_bytes()))).unwrap();
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_tree(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target)),
        }
    }
}

/// The state directory is an older copy: its stamp is of an earlier power-off.
#[test]
fn a_state_directory_from_a_copy() {
    let mut rng = Rng::new();
    let (mut side, mut serve) = off(Version::V10, &mut rng);
    copy_tree(&side.state(), &side.home.path().join("old-state"));
    on(&mut side, &mut serve, &mut rng);
    side.backup("incremental");
    side.scatter(&mut rng);
    side.tiny().power_off();
    side.wait_for_exit();
    serve.stop();
    std::fs::remove_dir_all(side.state()).unwrap();
    std::fs::rename(side.home.path().join("old-state"), side.state()).unwrap();
    side.start();
    side.scatter(&mut rng);
    let report = side.backup("auto");
    for disk in 0..2 {
        assert!(whole(&report, disk).is_some(), "{report}");
    }
    side.scatter(&mut rng);
    side.backup("incremental");
}

/// A clone of the machine: same name, same state, copied disks.
#[test]
fn a_cloned_machine() {
    let mut rng = Rng::new();
    let (mut side, serve) = off(Version::V10, &mut rng);
    serve.stop();
    for (name, _, format) in DISKS {
        let image = side.path(&format!("{name}.{format}"));
        std::fs::copy(&image, side.path("copy")).unwrap();
        std::fs::rename(side.path("copy"), image).unwrap();
    }
    side.start();
    side.scatter(&mut rng);
    let report = side.backup("auto");
    for disk in 0..2 {
        assert!(whole(&report, disk).is_some_and(|w| w.contains("another file")), "{report}");
    }
}

/// A block device keeps its name, number and size through a rollback: it never carries an epoch.
#[test]
fn a_device_that_was_rolled_back() {
    let mut rng = Rng::new();
    let mut side = Side::new(Version::V10);
    let volume = Loop::under(&mut side);
    side.start();
    let mut serve = Serve::start(&side, HARVEST);
    serve.wait_until_attached(&side);
    side.cont();
    side.write_at(0, 0, 65536, 1);
    let before = side.models[0].clone();
    side.backup("auto");
    side.write_at(0, 1 << 20, 65536, 2);
    side.tiny().power_off();
    side.wait_for_exit();
    // Rolled back, without a trace.
    std::fs::OpenOptions::new().write(true).open(&volume.device).unwrap().write_all_at(&before, 0).unwrap();
    side.models[0] = before;
    side.start();
    serve.wait_until_attached(&side);
    side.cont();
    side.write_at(0, 2 << 20, 65536, 3);
    let report = side.backup("auto");
    assert!(whole(&report, 0).is_some_and(|w| w.contains("block device")), "{report}");
    side.write_at(0, 3 << 20, 65536, 4);
    side.backup("incremental");
    let _ = rng.next();
}

/// The node of the same name has another file open, in the same QEMU.
#[test]
fn a_node_that_was_reopened_on_another_file() {
    let mut rng = Rng::new();
    let mut side = Side::new(Version::V10);
    side.start();
    let mut serve = Serve::start(&side, HARVEST);
    serve.wait_until_attached(&side);
    side.cont();
    side.scatter(&mut rng);
    side.backup("auto");
    let other = side.path("other.raw");
    let mut bytes = side.models[0].clone();
    bytes[5 << 20..(5 << 20) + 4096].fill(0x44);
    std::fs::write(&other, &bytes).unwrap();
    side.models[0] = bytes;
    side.qemu().qmp("blockdev-add", json!({"driver": "file", "node-name": "other", "filename": other}));
    side.qemu().qmp("blockdev-reopen", json!({"options": [{"driver": "raw", "node-name": "disk0", "file": "other"}]}));
    let report = side.backup("auto");
    assert!(whole(&report, 0).is_some_and(|w| w.contains("exchanged")), "{report}");
    side.scatter(&mut rng);
    side.backup("incremental");
}

/// An external snapshot, and its commit: the node that the guest writes to changes, and no bitmap of ours is on it.
#[test]
fn an_external_snapshot_and_its_commit() {
    let mut rng = Rng::new();
    let mut side = Side::new(Version::V10);
    side.start();
    let mut serve = Serve::start(&side, HARVEST);
    serve.wait_until_attached(&side);
    side.cont();
    side.scatter(&mut rng);
    side.backup("auto");
    let overlay = side.path("overlay.qcow2");
    let snapshot =
        json!({"node-name": "disk0", "snapshot-file": overlay, "snapshot-node-name": "overlay", "format": "qcow2"});
    side.qemu().qmp("blockdev-snapshot-sync", snapshot);
    side.scatter(&mut rng);
    let report = side.backup("auto");
    assert!(whole(&report, 0).is_some_and(|w| w.contains("top node")), "{report}");
    side.scatter(&mut rng);
    side.backup("incremental");
    side.qemu()
        .qmp("block-commit", json!({"job-id": "c", "device": "overlay", "top-node": "overlay", "base-node": "disk0"}));
    wait_until("the commit to be ready", || side.qemu().qmp("query-block-jobs", json!({}))[0]["ready"] == true);
    side.qemu().qmp("block-job-complete", json!({"device": "c"}));
    wait_until("the commit", || side.qemu().qmp("query-block-jobs", json!({})).as_array().unwrap().is_empty());
    side.scatter(&mut rng);
    let report = side.backup("auto");
    assert!(whole(&report, 0).is_some_and(|w| w.contains("top node")), "{report}");
    side.scatter(&mut rng);
    side.backup("incremental");
}

/// QEMU stays when the guest has powered off, and something writes to its disks after the last bitmaps were taken.
#[test]
fn a_disk_that_was_written_to_in_a_qemu_that_stays() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let mut side = Side::new(version);
        side.args.push("-no-shutdown".into());
        side.start();
        let mut serve = Serve::start(&side, HARVEST);
        serve.wait_until_attached(&side);
        side.cont();
        side.scatter(&mut rng);
        side.backup("auto");
        side.tiny().power_off();
        wait_until("the bitmaps to be taken", || side.tracking().iter().all(|d| d["checkpoint_number"] == 2));
        side.write_at(0, 4 << 20, 4096, 0x5a);
        side.qemu().quit();
        side.ended();
        on(&mut side, &mut serve, &mut rng);
        let report = side.backup("auto");
        assert!(whole(&report, 0).is_some_and(|w| w.contains("after the guest had powered off")), "{report}");
        assert_eq!(whole(&report, 1), None, "nobody wrote to the other disk: {report}");
        side.scatter(&mut rng);
        side.backup("incremental");
    }
}
