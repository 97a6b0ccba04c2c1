//! Bitmaps that a qcow2 image keeps: tracking goes on after every orderly end of QEMU, also one that nobody saw; where the
//! image is not what it was, the disk is read whole, with the reason. The other disk is raw: it shows what happens without.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use crate::common::side::*;
use crate::common::*;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const FLAG: &str = "--persistent-bitmaps";
const OPTION: &str = "persistent_bitmaps = true";

/// A machine with a point, whose qcow2 disk keeps our bitmaps. Nobody stays attached.
fn started(version: Version, rng: &mut Rng) -> Side {
    let mut side = Side::new(version);
    side.start();
    side.cont();
    side.scatter(rng);
    side.backup_with("auto", &[FLAG]);
    side.scatter(rng);
    side
}

/// Ends QEMU in good order, with nobody of ours there.
fn quit(side: &mut Side) {
    side.qemu().quit();
    side.ended();
}

/// Starts it again; the guest writes before anybody has attached.
fn again(side: &mut Side, rng: &mut Rng) {
    side.start();
    side.cont();
    side.scatter(rng);
}

/// How the qcow2 disk was taken, and why so.
fn taken(report: &Value) -> (&str, &str) {
    let disk = report["disks"].as_array().unwrap().iter().find(|d| d["disk"] == "vd1").unwrap();
    (disk["taken"].as_str().unwrap(), disk["reason"].as_str().unwrap_or_default())
}

/// The next backup is an incremental.
fn goes_on(side: &mut Side) {
    let report = side.backup_with("auto", &[FLAG]);
    assert_eq!(taken(&report).0, "incremental", "{report}");
}

/// The next backup reads the disk whole, with these words; the one after it is an incremental.
fn begins_anew(side: &mut Side, rng: &mut Rng, says: &str) {
    let report = side.backup_with("auto", &[FLAG]);
    let (how, why) = taken(&report);
    assert!(how == "scan" && why.contains(says), "{says}: {report}");
    side.scatter(rng);
    goes_on(side);
}

fn image(side: &Side) -> std::path::PathBuf {
    side.path("vd1.qcow2")
}

/// Puts bytes into the image's file as it is, keeping the file.
fn put_back(side: &Side, bytes: &[u8]) {
    let file = std::fs::OpenOptions::new().write(true).open(image(side)).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    file.write_all_at(bytes, 0).unwrap();
}

fn qemu_img(side: &Side, args: &[&str]) -> String {
    run(Command::new(side.version.program("qemu-img")).args(args))
}

/// Names of the bitmaps that the image holds.
fn in_image(side: &Side) -> Vec<String> {
    let info: Value =
        serde_json::from_str(&qemu_img(side, &["info", "--output=json", image(side).to_str().unwrap()])).unwrap();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    bitmaps.iter().map(|b| b["name"].as_str().unwrap().to_owned()).collect()
}

fn orderly_ends(version: Version) {
    let mut rng = Rng::new();
    let mut side = started(version, &mut rng);
    for end in ["quit", "SIGTERM", "power-off", "two ends"] {
        match end {
            "SIGTERM" => {
                side.qemu().signal(Signal::SIGTERM);
                side.qemu().wait_for_exit();
                side.ended();
            }
            "power-off" => {
                side.tiny().power_off();
                side.wait_for_exit();
            }
            _ => quit(&mut side),
        }
        again(&mut side, &mut rng);
        if end == "two ends" {
            quit(&mut side);
            again(&mut side, &mut rng);
        }
        let report = side.backup_with("auto", &[FLAG]);
        assert_eq!(taken(&report).0, "incremental", "{end}: {report}");
        // Nothing keeps the bitmaps of a raw disk.
        assert!(report.to_string().contains("nobody took the last bitmap"), "{report}");
        side.scatter(&mut rng);
    }
}

#[test]
fn an_orderly_end_that_nobody_saw_on_10() {
    orderly_ends(Version::V10);
}

#[test]
fn an_orderly_end_that_nobody_saw_on_7() {
    orderly_ends(Version::V7);
}

/// The service sees QEMU's end: an orderly one is none for the qcow2 disk. After a kill the bitmap is not in the image, or
/// is marked as not stored: it is taken out, and the reason said.
#[test]
fn killed_before_the_bitmap_was_stored() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let mut side = Side::new(version);
        side.start();
        let mut serve = Serve::start(&side, OPTION);
        serve.wait_until_attached(&side);
        side.cont();
        side.scatter(&mut rng);
        side.backup("auto");
        side.scatter(&mut rng);
        // Not stored yet; then stored by a quit, and loaded.
        for says in ["does not have our bitmap", "before it stored our bitmap"] {
            if says.contains("stored") {
                quit(&mut side);
                side.start();
                serve.wait_until_attached(&side);
                let tracking = side.tracking();
                assert!(!tracking[1]["epoch"].is_null(), "{tracking:?}");
                assert!(tracking[0].to_string().contains("ended by `quit`"), "{tracking:?}");
                side.cont();
                side.scatter(&mut rng);
            }
            side.flush();
            side.qemu().signal(Signal::SIGKILL);
            side.qemu().wait_for_exit();
            side.ended();
            side.start();
            serve.wait_until_attached(&side);
            side.cont();
            side.scatter(&mut rng);
            let report = side.backup("auto");
            let (how, why) = taken(&report);
            assert!(how == "scan" && why.contains(says), "{says}: {report}");
            side.scatter(&mut rng);
            assert_eq!(taken(&side.backup("incremental")).0, "incremental");
            let nodes = side.qemu().qmp("query-named-block-nodes", json!({"flat": true}));
            let disk = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "disk1").unwrap();
            let bitmaps = disk["dirty-bitmaps"].as_array().unwrap();
            assert!(bitmaps.len() == 2 && bitmaps.iter().all(|b| b["inconsistent"].is_null()), "{disk}");
        }
    }
}

/// The file is put back to what it was earlier, inode and all.
#[test]
fn an_image_that_was_put_back_to_an_older_copy() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let mut side = started(version, &mut rng);
        quit(&mut side);
        let (old, old_model) = (std::fs::read(image(&side)).unwrap(), side.models[1].clone());
        again(&mut side, &mut rng);
        side.flush();
        let running = std::fs::read(image(&side)).unwrap();
        let running_model = side.models[1].clone();
        quit(&mut side);
        // The copy is younger than the last checkpoint: its bitmap tells the truth of it.
        put_back(&side, &old);
        side.models[1].clone_from(&old_model);
        again(&mut side, &mut rng);
        goes_on(&mut side);
        // Now it is older.
        side.scatter(&mut rng);
        quit(&mut side);
        put_back(&side, &old);
        side.models[1] = old_model;
        again(&mut side, &mut rng);
        begins_anew(&mut side, &mut rng, "put back to an older copy");
        // A copy that was taken while QEMU had it open. (It is of an older checkpoint, too.)
        quit(&mut side);
        put_back(&side, &running);
        side.models[1] = running_model;
        again(&mut side, &mut rng);
        begins_anew(&mut side, &mut rng, "put back to an older copy");
        // And one of the same checkpoint.
        quit(&mut side);
        again(&mut side, &mut rng);
        side.flush();
        let (running, running_model) = (std::fs::read(image(&side)).unwrap(), side.models[1].clone());
        quit(&mut side);
        put_back(&side, &running);
        side.models[1] = running_model;
        again(&mut side, &mut rng);
        begins_anew(&mut side, &mut rng, "before it stored our bitmap");
    }
}

/// What others do to the image while the machine is off.
#[test]
fn an_image_that_others_changed() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let mut side = started(version, &mut rng);
        let path = image(&side).display().to_string();
        let qemu_io = |side: &mut Side, pattern: u8, at: usize| {
            run(Command::new(version.program("qemu-io"))
                .args(["-f", "qcow2", "-c", &format!("write -P {pattern} {at} 4096")])
                .arg(image(side)));
            side.models[1][at..at + 4096].fill(pattern);
        };

        // A program that knows bitmaps records in ours.
        quit(&mut side);
        qemu_io(&mut side, 0x71, 4 << 20);
        again(&mut side, &mut rng);
        goes_on(&mut side);

        // One that does not, takes the mark from the header (byte 88: autoclear features).
        quit(&mut side);
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[0; 8], 88).unwrap();
        drop(file);
        qemu_io(&mut side, 0x72, 5 << 20);
        again(&mut side, &mut rng);
        begins_anew(&mut side, &mut rng, "a program that knows no bitmaps wrote to it");

        // Smaller, and larger again.
        quit(&mut side);
        qemu_img(&side, &["resize", "-q", "--shrink", &path, "5M"]);
        qemu_img(&side, &["resize", "-q", &path, &SIZE.to_string()]);
        side.models[1][5 << 20..].fill(0);
        again(&mut side, &mut rng);
        begins_anew(&mut side, &mut rng, "made smaller and larger again");

        // A bitmap that came with other content: an internal snapshot of before, copied out with today's bitmaps.
        quit(&mut side);
        qemu_img(&side, &["snapshot", "-c", "before", &path]);
        let before = side.models[1].clone();
        again(&mut side, &mut rng);
        goes_on(&mut side);
        quit(&mut side);
        let copy = side.path("copy").display().to_string();
        qemu_img(&side, &["convert", "-O", "qcow2", "--bitmaps", "-l", "before", &path, &copy]);
        std::fs::rename(&copy, &path).unwrap();
        side.models[1] = before;
        again(&mut side, &mut rng);
        begins_anew(&mut side, &mut rng, "another file than before");
    }
}

/// A backing file has no bitmap: such an image is not believed to tell of it, and the doctor says so.
#[test]
fn an_image_on_a_backing_file_keeps_nothing() {
    let mut rng = Rng::new();
    let mut side = Side::new(Version::V10);
    let (base, path) = (side.path("base.raw"), image(&side));
    std::fs::write(&base, &side.models[1]).unwrap();
    let on_base = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.to_str().unwrap(), path.to_str().unwrap()];
    qemu_img(&side, &on_base);
    side.start();
    let mut serve = Serve::start(&side, OPTION);
    serve.wait_until_attached(&side);
    let doctor = side.ok(&["doctor", &side.source()]).to_string();
    assert!(doctor.contains("backing file") && doctor.contains("image is raw"), "{doctor}");
    side.cont();
    side.scatter(&mut rng);
    side.backup("auto");
    side.scatter(&mut rng);
    quit(&mut side);
    assert_eq!(in_image(&side), [""; 0]);
    side.start();
    serve.wait_until_attached(&side);
    let tracking = side.tracking();
    assert!(tracking[1].to_string().contains("ended by `quit`"), "{tracking:?}");
    side.cont();
    side.scatter(&mut rng);
    side.backup("auto");
}

/// Switched on in a running machine, and detached in the end: what is ours goes from the image, and nothing else.
#[test]
fn what_is_kept_comes_and_goes() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let mut side = Side::new(version);
        side.start();
        side.cont();
        side.scatter(&mut rng);
        side.backup("auto");
        side.scatter(&mut rng);
        goes_on(&mut side);
        side.scatter(&mut rng);
        let theirs = json!({"node": "disk1", "name": "theirs", "persistent": true});
        side.qemu().qmp("block-dirty-bitmap-add", theirs);
        quit(&mut side);
        let kept = in_image(&side);
        assert!(kept.len() == 3 && kept.iter().any(|name| name.ends_with("-kept-sentinel")), "{kept:?}");
        again(&mut side, &mut rng);
        goes_on(&mut side);
        side.ok(&["detach", &side.source()]);
        quit(&mut side);
        assert_eq!(in_image(&side), ["theirs"]);
        again(&mut side, &mut rng);
        begins_anew(&mut side, &mut rng, "detached");
    }
}

/// A sidecar dies in the middle of a backup, and then QEMU ends in good order: the image has both bitmaps.
#[test]
fn killed_between_two_checkpoints() {
    let mut rng = Rng::new();
    let mut side = started(Version::V10, &mut rng);
    for point in ["fleece.bitmap:2", "fleece.instant", "fleece.harvested", "seal.written:2", "seal.done:2", "vm.begun"]
    {
        let mut command = livebackup();
        command.arg("--state").arg(side.state()).args(["backup", &side.source(), FLAG]).arg(side.repo());
        command.env("LIVEBACKUP_KILL_AT", point).stdin(Stdio::null());
        let out = command.output().unwrap();
        assert!(!out.status.success(), "{point}: {out:?}");
        side.scatter(&mut rng);
        quit(&mut side);
        again(&mut side, &mut rng);
        goes_on(&mut side);
        side.scatter(&mut rng);
    }
}
