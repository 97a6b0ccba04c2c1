//! A block device that the operator calls exclusive: its epoch goes on across a power-off, as long as its fingerprint and its
//! counters are what they were. The device is a loop device, whose backing file can be rolled back behind it, without a trace.

#![allow(clippy::unwrap_used)]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::common::device::Loop;
use crate::common::side::*;
use crate::common::*;
use serde_json::Value;

const EXCLUSIVE: &str = "shutdown = \"harvest\"\nexclusive_device = true";

/// A machine whose raw disk is on a loop device, with a point; the service keeps it attached.
fn started(version: Version, options: &str) -> (Side, Serve, Loop) {
    let mut side = Side::new(version);
    let volume = Loop::under(&mut side);
    side.start();
    let mut serve = Serve::start(&side, options);
    serve.wait_until_attached(&side);
    side.cont();
    side.write_at(0, 0, 65536, 1);
    side.backup("auto");
    side.write_at(0, 1 << 20, 65536, 2);
    (side, serve, volume)
}

fn off(side: &mut Side, serve: &Serve) {
    let before = serve.log().matches("QEMU ended").count();
    side.tiny().power_off();
    side.wait_for_exit();
    wait_until("the fingerprint", || serve.log().matches("QEMU ended").count() > before);
}

fn on(side: &mut Side, serve: &mut Serve) {
    side.start();
    serve.wait_until_attached(side);
    side.cont();
    side.write_at(0, 2 << 20, 65536, 3);
}

fn taken(report: &Value) -> (&str, &str) {
    let disk = report["disks"].as_array().unwrap().iter().find(|d| d["disk"] == "vd0").unwrap();
    (disk["taken"].as_str().unwrap(), disk["reason"].as_str().unwrap_or_default())
}

/// The next backup reads the device whole, with these words, and the other disk not; the one after it is an incremental.
fn begins_anew(side: &mut Side, says: &str) {
    let report = side.backup("auto");
    let (how, why) = taken(&report);
    assert!(how == "scan" && why.contains(says), "{says}: {report}");
    side.write_at(0, 3 << 20, 4096, 9);
    side.backup("incremental");
}

fn untouched(version: Version) {
    let (mut side, mut serve, _volume) = started(version, EXCLUSIVE);
    for round in 0..3_u8 {
        off(&mut side, &serve);
        on(&mut side, &mut serve);
        side.write_at(0, 4 << 20, 4096, 10 + round);
        if round != 1 {
            side.backup("incremental");
        }
        side.write_at(0, 5 << 20, 4096, 20 + round);
    }
}

#[test]
fn an_untouched_device_is_tracked_on_10() {
    untouched(Version::V10);
}

#[test]
fn an_untouched_device_is_tracked_on_7() {
    untouched(Version::V7);
}

#[test]
fn a_device_that_was_rolled_back_is_found_by_its_fingerprint() {
    for version in VERSIONS {
        let (mut side, mut serve, volume) = started(version, "shutdown = \"harvest\"\nexclusive_device = [\"vd0\"]");
        // A snapshot of the volume; then the guest writes, and the volume is rolled back.
        side.flush();
        let snapshot = side.models[0].clone();
        side.write_at(0, 5 << 20, 512, 4);
        off(&mut side, &serve);
        OpenOptions::new().write(true).open(&volume.image).unwrap().write_all_at(&snapshot, 0).unwrap();
        side.models[0] = snapshot;
        on(&mut side, &mut serve);
        begins_anew(&mut side, "by its fingerprint");
    }
}

#[test]
fn a_device_that_others_wrote_to_is_found_by_its_counters() {
    let (mut side, mut serve, volume) = started(Version::V10, EXCLUSIVE);
    off(&mut side, &serve);
    // Where no granule of the fingerprint is.
    let device = OpenOptions::new().write(true).open(&volume.device).unwrap();
    device.write_all_at(&[7; 4096], 7 << 19).unwrap();
    drop(device);
    side.models[0][7 << 19..(7 << 19) + 4096].fill(7);
    on(&mut side, &mut serve);
    begins_anew(&mut side, "by its counters");

    // A whole run of the machine that we did not see.
    off(&mut side, &serve);
    serve.stop();
    side.start();
    side.write_at(0, 7 << 19, 4096, 8);
    side.qemu().quit();
    side.ended();
    side.start();
    let mut serve = Serve::start(&side, EXCLUSIVE);
    serve.wait_until_attached(&side);
    side.cont();
    begins_anew(&mut side, "by its counters");

    // The same number, and another device.
    off(&mut side, &serve);
    run(Command::new("losetup").args(["--detach", &volume.device]));
    run(Command::new("losetup").arg(&volume.device).arg(&volume.image));
    on(&mut side, &mut serve);
    begins_anew(&mut side, "taken down and set up again");

    // The operator does not say it any more.
    off(&mut side, &serve);
    serve.stop();
    let mut serve = Serve::start(&side, "shutdown = \"harvest\"");
    on(&mut side, &mut serve);
    begins_anew(&mut side, "exclusive_device");
}
