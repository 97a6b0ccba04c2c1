//! Disks that another QEMU or another node has had in between, or that come and go: migration, mirrors, commits, hot-plug,
//! a second QEMU on the same image. The next backup holds what the disks hold, which the test knows, and reads them whole
//! where tracking cannot know.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::FileExt;

use crate::common::side::*;
use crate::common::*;
use serde_json::{Value, json};

/// A machine whose disks lie where every QEMU finds them, with a point; tracked.
fn tracked(version: Version, rng: &mut Rng) -> Side {
    let mut side = Side::new(version);
    let home = side.home.path().to_str().unwrap().to_owned();
    for (name, _, format) in DISKS {
        let file = format!("{name}.{format}");
        std::fs::rename(side.path(&file), side.home.path().join(&file)).unwrap();
    }
    for argument in &mut side.args {
        *argument = argument.replace("filename=DIR", &format!("filename={home}"));
    }
    side.start();
    side.cont();
    side.scatter(rng);
    side.backup("auto");
    side.scatter(rng);
    let report = side.backup("incremental");
    assert_eq!(DISKS.map(|(name, _, _)| whole(&report, name)), [None, None], "{report}");
    side
}

/// Another QEMU on the same disks, with further arguments.
fn another(side: &Side, more: &[&str]) -> Qemu {
    let dir = tempfile::Builder::new().prefix("livebackup-other-").tempdir().unwrap();
    tiny::write(dir.path());
    let args: Vec<_> = side.args.iter().map(String::as_str).chain(more.iter().copied()).collect();
    Qemu::start_in(side.version, dir, &args)
}

/// Moves the machine to a new QEMU, where it goes on; gives the old one, which is there still.
fn migrate(side: &mut Side) -> Qemu {
    let target = another(side, &["-incoming", "unix:DIR/migration"]);
    let uri = format!("unix:{}", target.path("migration").display());
    side.qemu().qmp("migrate", json!({"uri": uri}));
    wait_until("the migration", || side.qemu().status() == "postmigrate");
    let old = side.take_over(target);
    wait_until("the machine to have arrived", || side.qemu().status() == "paused");
    side.qemu().qmp("cont", json!({}));
    old
}

/// Both disks were read whole, with these words.
fn all_whole(report: &Value, says: &str) {
    for (name, _, _) in DISKS {
        assert!(whole(report, name).is_some_and(|why| why.contains(says)), "{says}: {report}");
    }
}

#[test]
fn a_machine_that_was_migrated_away_and_back() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let mut side = tracked(version, &mut rng);
        side.scatter(&mut rng);
        let mut old = migrate(&mut side);
        // Where it was, nothing is backed up any more.
        let from = format!("qmp:{}", old.socket().display());
        let refused = side.livebackup(&["backup", &from, side.repo().to_str().unwrap()]);
        let said = [&refused.stdout[..], &refused.stderr].map(String::from_utf8_lossy).concat();
        assert_eq!(refused.status.code(), Some(4), "{said}");
        assert!(said.contains("being migrated"), "{said}");
        side.scatter(&mut rng);
        let report = side.backup("auto");
        all_whole(&report, "open for writing");
        old.quit();
        side.scatter(&mut rng);
        side.backup("auto");
        side.scatter(&mut rng);
        side.backup("incremental");
        // And back, with a backup on its way only after it has arrived.
        side.scatter(&mut rng);
        let mut away = migrate(&mut side);
        away.quit();
        side.scatter(&mut rng);
        let report = side.backup("auto");
        all_whole(&report, "another QEMU process");
        side.scatter(&mut rng);
        side.backup("incremental");
    }
}

/// The machine went on elsewhere, and somebody lets it go on here after all: the bitmaps here do not know what was written
/// there.
#[test]
fn a_machine_that_goes_on_where_it_had_left() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let mut side = tracked(version, &mut rng);
        let old = migrate(&mut side);
        side.scatter(&mut rng);
        side.flush();
        side.take_over(old).kill();
        side.qemu().qmp("cont", json!({}));
        side.scatter(&mut rng);
        let report = side.backup("auto");
        all_whole(&report, "migrated");
        side.scatter(&mut rng);
        side.backup("incremental");
        // One that fails at once costs a scan, and nothing more.
        let _ = side.qemu().try_qmp("migrate", json!({"uri": "unix:/nonexistent/socket"}));
        wait_until("the migration to fail", || {
            let info = side.qemu().qmp("query-migrate", json!({}));
            ["failed", "completed"].contains(&info["status"].as_str().unwrap_or_default())
        });
        side.scatter(&mut rng);
        side.backup("auto");
        side.scatter(&mut rng);
        side.backup("incremental");
    }
}

fn wait_for_jobs(side: &mut Side) {
    wait_until("the job", || side.qemu().qmp("query-block-jobs", json!({})).as_array().unwrap().is_empty());
}

/// Copies a node into another while the guest writes, and lets the guest have that one.
fn mirror(side: &mut Side, rng: &mut Rng, from: &str, to: &str) {
    side.qemu().qmp("blockdev-mirror", json!({"job-id": "m", "device": from, "target": to, "sync": "full"}));
    wait_until("the mirror to be ready", || side.qemu().qmp("query-block-jobs", json!({}))[0]["ready"] == true);
    side.scatter(rng);
    side.qemu().qmp("job-complete", json!({"id": "m"}));
    wait_for_jobs(side);
}

#[test]
fn a_disk_that_was_mirrored_to_another_node() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let mut side = tracked(version, &mut rng);
        let file = side.home.path().join("mirror.raw");
        std::fs::File::create(&file).unwrap().set_len(SIZE).unwrap();
        let options = json!({"driver": "raw", "node-name": "mirror", "file": {"driver": "file", "filename": file}});
        side.qemu().qmp("blockdev-add", options);
        mirror(&mut side, &mut rng, "disk0", "mirror");
        side.scatter(&mut rng);
        let report = side.backup("auto");
        assert!(whole(&report, "vd0").is_some_and(|why| why.contains("top node")), "{report}");
        assert_eq!(whole(&report, "vd1"), None, "{report}");
        side.scatter(&mut rng);
        side.backup("incremental");
        // There and back again, and nobody looked.
        side.qemu().qmp("blockdev-del", json!({"node-name": "disk0"}));
        let back = json!({"driver": "raw", "node-name": "back", "file": {
            "driver": "file", "filename": side.home.path().join("vd0.raw")}});
        side.qemu().qmp("blockdev-add", back);
        mirror(&mut side, &mut rng, "mirror", "back");
        side.scatter(&mut rng);
        mirror(&mut side, &mut rng, "back", "mirror");
        side.scatter(&mut rng);
        side.backup("auto");
        side.scatter(&mut rng);
        side.backup("incremental");
    }
}

/// As in `fooled`, but nobody looks between the snapshot and its commit: the bitmap is where it was.
#[test]
fn a_snapshot_that_was_committed_before_anybody_looked() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let mut side = tracked(version, &mut rng);
        let overlay = side.home.path().join("overlay.qcow2");
        let snapshot =
            json!({"node-name": "disk0", "snapshot-file": overlay, "snapshot-node-name": "overlay", "format": "qcow2"});
        side.qemu().qmp("blockdev-snapshot-sync", snapshot);
        side.scatter(&mut rng);
        let commit = json!({"job-id": "c", "device": "overlay", "top-node": "overlay", "base-node": "disk0"});
        side.qemu().qmp("block-commit", commit);
        wait_until("the commit to be ready", || side.qemu().qmp("query-block-jobs", json!({}))[0]["ready"] == true);
        side.scatter(&mut rng);
        side.qemu().qmp("job-complete", json!({"id": "c"}));
        wait_for_jobs(&mut side);
        side.scatter(&mut rng);
        side.backup("auto");
        side.scatter(&mut rng);
        side.backup("incremental");
    }
}

/// A snapshot between the look at the disks and the instant: the backup gives way, and the guest keeps its overlay.
#[test]
fn a_snapshot_while_a_backup_begins() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let mut side = tracked(version, &mut rng);
        let is_prepared = |qemu: &mut Qemu| qemu.nodes().iter().any(|node| node.ends_with("-map1"));
        let held = side.hold_a_backup_at("fleece.bitmap", is_prepared);
        let overlay = side.home.path().join("overlay.qcow2");
        let snapshot =
            json!({"node-name": "disk0", "snapshot-file": overlay, "snapshot-node-name": "overlay", "format": "qcow2"});
        side.qemu().qmp("blockdev-snapshot-sync", snapshot);
        side.scatter(&mut rng);
        let out = held.let_go();
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.code() == Some(4) && said.contains("changed by another program"), "{}: {said}", out.status);
        assert_eq!(side.qemu().status(), "running");
        side.scatter(&mut rng);
        let report = side.backup("auto");
        assert!(whole(&report, "vd0").is_some(), "{report}");
        side.scatter(&mut rng);
        side.backup("incremental");
    }
}

/// A second QEMU that was told not to lock: while it is there, nothing is believed, and not what was before.
#[test]
fn a_second_qemu_on_the_same_image() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let mut side = tracked(version, &mut rng);
        let dir = tempfile::Builder::new().prefix("livebackup-other-").tempdir().unwrap();
        let image = side.home.path().join("vd0.raw");
        let disk =
            format!("driver=raw,node-name=same,file.driver=file,file.locking=off,file.filename={}", image.display());
        let mut other =
            Qemu::start_in(version, dir, &["-blockdev", &disk, "-device", "virtio-blk-pci,drive=same,id=vd0"]);
        other.write(5 << 20, 4096, 0x21);
        side.models[0][5 << 20..(5 << 20) + 4096].fill(0x21);
        for _ in 0..2 {
            let report = side.backup("auto");
            let why = whole(&report, "vd0").unwrap_or_else(|| panic!("{report}"));
            assert!(why.contains("open for writing") && why.contains(&other.pid().to_string()), "{why}");
            assert_eq!(whole(&report, "vd1"), None, "{report}");
        }
        other.quit();
        side.scatter(&mut rng);
        let report = side.backup("auto");
        assert!(whole(&report, "vd0").is_some(), "{report}");
        side.scatter(&mut rng);
        side.backup("incremental");
    }
}

/// It is there still when the first one's guest powers off, and writes after that.
#[test]
fn a_second_qemu_at_power_off() {
    let mut rng = Rng::new();
    let mut side = tracked(Version::V10, &mut rng);
    let mut serve = Serve::start(&side, "shutdown = \"harvest\"");
    serve.wait_until_attached(&side);
    let dir = tempfile::Builder::new().prefix("livebackup-other-").tempdir().unwrap();
    let image = side.home.path().join("vd0.raw");
    let disk = format!("driver=raw,node-name=same,file.driver=file,file.locking=off,file.filename={}", image.display());
    let mut other =
        Qemu::start_in(Version::V10, dir, &["-blockdev", &disk, "-device", "virtio-blk-pci,drive=same,id=vd0"]);
    side.tiny().power_off();
    side.wait_for_exit();
    other.write(5 << 20, 4096, 0x21);
    side.models[0][5 << 20..(5 << 20) + 4096].fill(0x21);
    other.quit();
    side.start();
    serve.wait_until_attached(&side);
    side.cont();
    side.scatter(&mut rng);
    let report = side.backup("auto");
    assert!(whole(&report, "vd0").is_some_and(|why| why.contains("open for writing")), "{report}");
    assert_eq!(whole(&report, "vd1"), None, "{report}");
}

/// A disk that is plugged in during a backup is in the next one; one that is pulled out ends its backup or does not, and what
/// was done to it while it was out is seen when it comes back under its old names.
#[test]
fn a_disk_that_comes_and_goes_during_backups() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let mut side = Side::new(version);
        side.args.extend(["-device".to_owned(), "virtio-scsi-pci,id=scsi0".to_owned()]);
        let image = side.home.path().join("third.raw");
        let bytes: Vec<u8> = (0..2 << 20).map(|at| (at >> 12) as u8).collect();
        std::fs::write(&image, &bytes).unwrap();
        // Not let go: QEMU forgets a device only after its processors have paused, and the tiny guest's never does.
        side.start();
        for disk in 0..2 {
            side.write_at(disk, 0, SIZE, 0x42);
        }
        side.backup("auto");

        let held = side.hold_a_backup();
        plug(&mut side, &image);
        let out = held.let_go();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        side.prove("latest");
        let report = side.backup("auto");
        assert!(whole(&report, "third").is_some(), "{report}");
        assert!(third(&side) == bytes);
        side.qemu().qemu_io("/machine/peripheral/third", "write -P 0x33 0 4096");
        let report = side.backup("incremental");
        assert_eq!(whole(&report, "third"), None, "{report}");

        let held = side.hold_a_backup();
        side.qemu().qmp("device_del", json!({"id": "third"}));
        let out = held.let_go();
        let said = [&out.stdout[..], &out.stderr].map(String::from_utf8_lossy).concat();
        assert!(out.status.success() || !said.is_empty() && !said.contains("panicked"), "{said}");
        assert!(side.qemu().alive());
        // Its node can go once the backup has let it go.
        let mut refused = Value::Null;
        for _ in 0..400 {
            let gone = side.qemu().try_qmp("blockdev-del", json!({"node-name": "third-node"}));
            refused = gone.err().unwrap_or_default();
            if refused.is_null() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(refused.is_null(), "{refused}: {said}\n{:?}", side.qemu().nodes());
        side.scatter(&mut rng);
        let report = side.backup("auto");
        assert_eq!(report["disks"].as_array().unwrap().len(), 2, "{report}");
        std::fs::OpenOptions::new().write(true).open(&image).unwrap().write_all_at(&[0x34; 512], 1 << 20).unwrap();
        plug(&mut side, &image);
        let report = side.backup("auto");
        assert!(whole(&report, "third").is_some(), "{report}");
        assert!(third(&side) == std::fs::read(&image).unwrap());
        side.qemu().qemu_io("/machine/peripheral/third", "write -P 0x35 8192 4096");
        let report = side.backup("incremental");
        assert_eq!(whole(&report, "third"), None, "{report}");
        assert!(third(&side) == std::fs::read(&image).unwrap());
        assert!(side.qemu().nodes().iter().all(|node| !node.contains("livebackup")));
    }
}

fn plug(side: &mut Side, image: &std::path::Path) {
    let file = json!({"driver": "file", "filename": image});
    side.qemu().qmp("blockdev-add", json!({"driver": "raw", "node-name": "third-node", "file": file}));
    let device = json!({"driver": "scsi-hd", "bus": "scsi0.0", "drive": "third-node", "id": "third"});
    side.qemu().qmp("device_add", device);
}

/// What the newest point has of the third disk; restored by the last backup's proof.
fn third(side: &Side) -> Vec<u8> {
    std::fs::read(side.home.path().join("restored/third.raw")).unwrap()
}
