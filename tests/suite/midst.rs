//! The machine ends in the midst of a backup: its guest powers off, somebody tells QEMU to quit, or kills it. The backup is
//! finished, or ends with its reason; QEMU is gone within bounds; and the next backup holds what the disks hold, which the
//! test knows.

#![allow(clippy::unwrap_used)]

use std::process::Output;
use std::time::{Duration, Instant};

use crate::common::side::*;
use crate::common::*;
use nix::sys::signal::Signal;
use serde_json::Value;

/// Who has the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keeper {
    /// `livebackup serve`, which takes the last bitmaps.
    Serve,
    /// `livebackup run`.
    Run,
    /// The client itself.
    Client,
}

struct Scene {
    side: Side,
    serve: Option<Serve>,
    keeper: Keeper,
    rng: Rng,
}

impl Scene {
    /// A machine that was backed up once, all of it written to.
    fn new(version: Version, keeper: Keeper) -> Scene {
        let side = Side::new(version);
        let serve = (keeper == Keeper::Serve).then(|| Serve::start(&side, "shutdown = \"harvest\""));
        let mut scene = Scene { side, serve, keeper, rng: Rng::new() };
        scene.start();
        for disk in 0..2 {
            let pattern = 1 + scene.rng.below(255) as u8;
            scene.side.write_at(disk, 0, SIZE, pattern);
        }
        scene.side.backup("auto");
        scene.side.scatter(&mut scene.rng);
        scene
    }

    fn start(&mut self) {
        match self.keeper {
            Keeper::Run => {
                let mut run = livebackup();
                run.arg("--state").arg(self.side.state()).args(["run", "--"]);
                self.side.start_by(Some(run));
                self.side.wait_until_tracked();
            }
            _ => self.side.start(),
        }
        if let Some(serve) = &mut self.serve {
            serve.wait_until_attached(&self.side);
        }
        self.side.cont();
    }

    /// Waits for QEMU's end. Longer than a backup is waited for at a power-off.
    fn wait_for_the_end(&mut self) {
        let start = Instant::now();
        while self.side.qemu().runs() {
            assert!(start.elapsed() < Duration::from_secs(150), "QEMU does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        if self.keeper == Keeper::Run {
            self.side.qemu().wait_for_exit();
        }
        self.side.ended();
    }

    /// Starts the machine again: the next backup is right. Says how the disks were taken.
    fn go_on(&mut self) -> Vec<String> {
        self.start();
        self.side.scatter(&mut self.rng);
        let report = self.side.backup("auto");
        self.side.scatter(&mut self.rng);
        self.side.backup("incremental");
        let disks = report["disks"].as_array().unwrap().iter();
        disks.map(|disk| disk["taken"].as_str().unwrap().to_owned()).collect()
    }
}

/// The point of a backup that was let go: it holds what the disks held.
fn point(out: &Output) -> String {
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    report["point"].as_str().unwrap().to_owned()
}

/// The guest powers off, and the backup is finished before QEMU is ended.
fn is_finished(version: Version, keeper: Keeper) {
    let mut scene = Scene::new(version, keeper);
    let held = scene.side.hold_a_backup();
    let then = scene.side.models.clone();
    scene.side.scatter(&mut scene.rng);
    scene.side.tiny().power_off();
    wait_until("the guest to be off", || scene.side.qemu().status() == "shutdown");
    let point = point(&held.let_go());
    scene.wait_for_the_end();
    let now = std::mem::replace(&mut scene.side.models, then);
    scene.side.prove(&point);
    scene.side.models = now;
    assert_eq!(scene.go_on(), ["incremental"; 2]);
}

#[test]
fn a_backup_at_power_off_is_finished_under_serve() {
    VERSIONS.iter().for_each(|version| is_finished(*version, Keeper::Serve));
}

#[test]
fn a_backup_at_power_off_is_finished_under_run() {
    VERSIONS.iter().for_each(|version| is_finished(*version, Keeper::Run));
}

/// What a backup that could not be finished says.
fn why(out: &Output) -> String {
    let said = [&out.stdout[..], &out.stderr].map(String::from_utf8_lossy).concat();
    assert!(!out.status.success() && !said.contains("panicked"), "{said}");
    said
}

/// A client that takes nothing any more keeps QEMU for a while, and not for ever.
#[test]
fn a_backup_at_power_off_that_does_not_end_is_ended() {
    let mut scene = Scene::new(Version::V10, Keeper::Serve);
    let held = scene.side.hold_a_backup();
    scene.side.tiny().power_off();
    scene.wait_for_the_end();
    let said = why(&held.let_go());
    assert!(said.contains("the guest powered off, and the backup was not done"), "{said}");
    assert_eq!(scene.go_on(), ["incremental"; 2]);
}

/// A signal to `livebackup run` ends the machine at once: its backup too, and the last bitmaps are taken.
#[test]
fn a_signal_ends_the_backup_under_run() {
    for version in VERSIONS {
        let mut scene = Scene::new(version, Keeper::Run);
        let held = scene.side.hold_a_backup();
        scene.side.qemu().signal_parent(Signal::SIGTERM);
        // Nobody waits for long for a client that stands still.
        let said = why(&held.let_go());
        scene.wait_for_the_end();
        assert!(said.contains("was told to end during the backup"), "{said}");
        assert_eq!(scene.go_on(), ["incremental"; 2]);
    }
}

/// QEMU goes at once: the backup says so, and the next one reads all.
fn is_cut_off(version: Version, keeper: Keeper, end: fn(&mut Qemu)) {
    let mut scene = Scene::new(version, keeper);
    scene.side.flush();
    let held = scene.side.hold_a_backup();
    end(scene.side.qemu());
    // Nobody waits for long for a client that stands still.
    let said = why(&held.let_go());
    scene.wait_for_the_end();
    assert!(said.contains("QEMU"), "{said}");
    assert_eq!(scene.go_on(), ["scan"; 2]);
}

#[test]
fn a_qemu_that_is_killed_ends_the_backup() {
    for keeper in [Keeper::Serve, Keeper::Run, Keeper::Client] {
        VERSIONS.iter().for_each(|version| is_cut_off(*version, keeper, |qemu| qemu.signal(Signal::SIGKILL)));
    }
}

#[test]
fn a_qemu_that_quits_ends_the_backup() {
    for keeper in [Keeper::Serve, Keeper::Run, Keeper::Client] {
        VERSIONS.iter().for_each(|version| is_cut_off(*version, keeper, Qemu::send_quit));
    }
}

/// Without a service that holds the guest's end, QEMU ends with the guest.
#[test]
fn a_power_off_that_nobody_holds_ends_the_backup() {
    for version in VERSIONS {
        let mut scene = Scene::new(version, Keeper::Client);
        let held = scene.side.hold_a_backup();
        scene.side.tiny().power_off();
        scene.wait_for_the_end();
        let said = why(&held.let_go());
        assert!(said.contains("QEMU"), "{said}");
        assert_eq!(scene.go_on(), ["scan"; 2]);
    }
}
