//! The guest powers off, is reset, its QEMU is ended or killed: the next backup is an incremental where the last bitmaps
//! could be taken, and says why where not; either way it holds what the guest wrote, which the test knows.

#![allow(clippy::unwrap_used)]

use crate::common::side::*;
use crate::common::*;

use nix::sys::signal::Signal;
use serde_json::json;

const HARVEST: &str = "shutdown = \"harvest\"";

/// A machine with two points, attached to a service.
fn started(version: Version, rng: &mut Rng, options: &str) -> (Side, Serve) {
    let mut side = Side::new(version);
    side.start();
    let mut serve = Serve::start(&side, options);
    serve.wait_until_attached(&side);
    side.cont();
    side.scatter(rng);
    side.backup("auto");
    side.scatter(rng);
    let report = side.backup("incremental");
    let tracked = report["disks"].as_array().unwrap().iter().all(|disk| disk["taken"] == "incremental");
    assert!(tracked, "{report}");
    (side, serve)
}

/// Starts the machine again, stopped, and waits until the service has it.
fn again(side: &mut Side, serve: &mut Serve) {
    side.start();
    serve.wait_until_attached(side);
}

fn powered_off(version: Version) {
    let mut rng = Rng::new();
    let (mut side, mut serve) = started(version, &mut rng, HARVEST);
    for round in 0..3 {
        side.scatter(&mut rng);
        side.tiny().power_off();
        side.wait_for_exit();
        again(&mut side, &mut serve);
        let tracking = side.tracking();
        assert!(tracking.iter().all(|d| !d["epoch"].is_null()), "round {round}: {tracking:?}\n{}", serve.log());
        side.scatter(&mut rng);
        side.cont();
        side.scatter(&mut rng);
        if round != 1 {
            // After the second round a point of before two power-offs is built upon.
            let report = side.backup("incremental");
            let read = report["read_bytes"].as_u64().unwrap_or_else(|| panic!("{report}"));
            assert!(read < 2 * SIZE, "{report}");
        }
    }
}

#[test]
fn after_a_power_off_the_next_backup_is_incremental_on_10() {
    powered_off(Version::V10);
}

#[test]
fn after_a_power_off_the_next_backup_is_incremental_on_7() {
    powered_off(Version::V7);
}

/// Reset, stop and cont: QEMU lives on, and so does the epoch.
#[test]
fn a_reset_is_no_end() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let (mut side, serve) = started(version, &mut rng, HARVEST);
        side.scatter(&mut rng);
        side.tiny().reset();
        side.tiny().wait();
        side.scatter(&mut rng);
        side.qemu().qmp("stop", json!({}));
        side.scatter(&mut rng);
        side.qemu().qmp("cont", json!({}));
        side.backup("incremental");
        drop(serve);
    }
}

/// Each way to end QEMU at once: nothing can be read any more, the epoch ends with that reason, and nothing is missed.
#[test]
fn an_end_without_warning_is_a_new_epoch_with_its_reason() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let (mut side, mut serve) = started(version, &mut rng, HARVEST);
        for (signal, says) in [
            (None, "ended by `quit` from another monitor"),
            (Some(Signal::SIGTERM), "ended by a signal"),
            (Some(Signal::SIGKILL), "killed or crashed"),
        ] {
            side.scatter(&mut rng);
            side.flush();
            match signal {
                None => side.qemu().quit(),
                Some(signal) => {
                    side.qemu().signal(signal);
                    side.qemu().wait_for_exit();
                }
            }
            side.ended();
            again(&mut side, &mut serve);
            for disk in side.tracking() {
                let end = disk["last_end"].as_str().unwrap_or_default();
                assert!(disk["epoch"].is_null() && end.contains(says), "{says}: {disk}");
            }
            side.cont();
            side.scatter(&mut rng);
            let report = side.backup("auto");
            assert!(report.to_string().contains(says), "{says}: {report}");
            side.scatter(&mut rng);
            side.backup("incremental");
        }
    }
}

/// A QEMU that was started to stay is left to stay; its bitmaps are taken, and count when somebody ends it.
#[test]
fn a_qemu_that_was_to_stay_stays() {
    let mut rng = Rng::new();
    let mut side = Side::new(Version::V10);
    side.args.push("-no-shutdown".into());
    side.start();
    let mut serve = Serve::start(&side, HARVEST);
    serve.wait_until_attached(&side);
    side.cont();
    side.scatter(&mut rng);
    side.backup("auto");
    side.scatter(&mut rng);
    side.tiny().power_off();
    wait_until("the machine to be off", || side.qemu().status() == "shutdown");
    wait_until("the bitmaps to be taken", || side.tracking().iter().all(|d| d["checkpoint_number"] == 2));
    assert!(side.qemu().alive());
    // A backup of a machine that is off, and its end.
    side.backup("incremental");
    wait_until("the bitmaps to be taken again", || side.tracking().iter().all(|d| d["checkpoint_number"] == 4));
    side.qemu().quit();
    side.ended();
    again(&mut side, &mut serve);
    side.cont();
    side.scatter(&mut rng);
    side.backup("incremental");
    // Off, and on again without an end: what was taken is void, and nothing is missed.
    side.tiny().power_off();
    wait_until("the machine to be off", || side.qemu().status() == "shutdown");
    side.qemu().qmp("system_reset", json!({}));
    side.qemu().qmp("cont", json!({}));
    side.tiny().wait();
    side.scatter(&mut rng);
    side.backup("incremental");
}

/// The service is killed: the guardian owes the end. QEMU does not hang at the guest's power-off.
#[test]
fn a_guest_that_powers_off_behind_a_dead_service_ends() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let (mut side, serve) = started(version, &mut rng, HARVEST);
        serve.kill();
        // Off before the guardian could do anything, or after: QEMU ends.
        side.tiny().power_off();
        side.wait_for_exit();
        // What was not taken is not believed.
        side.start();
        side.scatter(&mut rng);
        let report = side.backup("auto");
        assert!(report.to_string().contains("nobody took the last bitmap"), "{report}");
    }
}

/// The service dies at each step of taking the last bitmaps.
#[test]
fn killed_while_it_takes_the_last_bitmaps() {
    let mut rng = Rng::new();
    for point in
        ["power.held", "power.next", "power.sealed", "power.sealed:2", "power.taken", "power.quit", "power.ended"]
    {
        let mut side = Side::new(Version::V10);
        side.start();
        side.cont();
        side.scatter(&mut rng);
        side.backup("auto");
        side.scatter(&mut rng);
        let mut serve = Serve::start_with(&side, HARVEST, &[("LIVEBACKUP_KILL_AT", point)]);
        if point != "power.held" {
            serve.wait_until_attached(&side);
        }
        if point != "power.held" {
            side.tiny().power_off();
        }
        serve.wait_until_killed();
        if point == "power.held" {
            side.tiny().power_off();
        }
        side.wait_for_exit();
        side.start();
        side.scatter(&mut rng);
        let report = side.backup("auto");
        let scanned = report["disks"].as_array().unwrap().iter().all(|disk| disk["taken"] == "scan");
        assert!(scanned, "{point}: {report}");
        side.scatter(&mut rng);
        side.backup("incremental");
    }
}

/// A service that is stopped in good order lets QEMU end by itself.
#[test]
fn a_service_that_ends_holds_nothing() {
    let mut rng = Rng::new();
    let (mut side, serve) = started(Version::V10, &mut rng, HARVEST);
    serve.stop();
    side.scatter(&mut rng);
    side.backup("incremental");
    side.tiny().power_off();
    side.wait_for_exit();
}
