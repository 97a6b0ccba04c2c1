//! `livebackup run`: a QEMU of our own, tracked from its start to its end.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::common::device::Loop;
use crate::common::side::*;
use crate::common::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// A machine under `livebackup run`.
struct Run {
    child: Child,
    qmp: Qmp,
}

impl Run {
    /// Starts the machine of `side`, whose QEMU does not run, and waits for the test's own monitor.
    fn start(side: &Side, version: Version, more: &[&str]) -> Run {
        Self::start_with(side, version, &[], more)
    }

    /// As [`Run::start`], with options of `livebackup run`.
    fn start_with(side: &Side, version: Version, options: &[&str], more: &[&str]) -> Run {
        Self::start_in(side, version, options, more, &[])
    }

    /// As [`Run::start_with`], with these variables.
    fn start_in(side: &Side, version: Version, options: &[&str], more: &[&str], env: &[(&str, &str)]) -> Run {
        let at = side.path("");
        let at = at.to_str().unwrap().trim_end_matches('/');
        let _ = std::fs::remove_file(side.path("qmp-test"));
        let log = std::fs::File::create(side.path("qemu.log")).unwrap();
        let mut command = livebackup();
        command
            .arg("--state")
            .arg(side.state())
            .arg("run")
            .args(options)
            .arg("--")
            .arg(version.program("qemu-system-x86_64"));
        command.args("-nodefaults -display none -accel tcg -m 64 -machine q35".split(' '));
        command.args(side.args.iter().map(|a| a.replace("DIR", at))).args(more);
        command.args(["-qmp", &format!("unix:{at}/qmp-test,server=on,wait=off")]);
        command.envs(env.iter().copied()).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let mut child = command.spawn().unwrap();
        let socket = side.path("qmp-test");
        wait_until("the machine to run", || {
            assert!(child.try_wait().unwrap().is_none(), "{}", log_of(side));
            UnixStream::connect(&socket).is_ok_and(|s| {
                s.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                s.take(1).read(&mut [0]).is_ok_and(|n| n == 1)
            })
        });
        let mut qmp = Qmp::connect(&socket);
        if !more.contains(&"-S") {
            wait_until("the guest to run", || {
                assert!(child.try_wait().unwrap().is_none(), "{}", log_of(side));
                qmp.call("query-status", json!({}))["status"] == "running"
            });
        }
        Run { child, qmp }
    }

    fn qemu_io(&mut self, line: &str) {
        let said = self.qmp.call("human-monitor-command", json!({"command-line": line}));
        assert!(said.as_str().unwrap().is_empty(), "{line}: {said}");
    }

    /// A write that the side's model follows.
    fn write(&mut self, side: &mut Side, rng: &mut Rng) {
        for (disk, (name, _, _)) in DISKS.iter().enumerate() {
            let offset = rng.below(SIZE / 512 - 64) * 512;
            let (len, pattern) = ((1 + rng.below(64)) * 512, rng.below(256) as u8);
            side.models[disk][offset as usize..(offset + len) as usize].fill(pattern);
            let path = format!("/machine/peripheral/{name}/virtio-backend");
            self.qemu_io(&format!("qemu-io -d {path} \"write -P {pattern:#04x} {offset} {len}\""));
        }
    }

    fn wait(mut self) -> ExitStatus {
        wait_until("livebackup run to end", || self.child.try_wait().unwrap().is_some());
        self.child.wait().unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }
}

fn log_of(side: &Side) -> String {
    std::fs::read_to_string(side.path("qemu.log")).unwrap_or_default()
}

/// A backup through the monitor of the test: livebackup finds who has the VM.
fn backup(side: &mut Side, run: Run, level: &str) -> Run {
    backup_and_report(side, run, level).0
}

fn backup_and_report(side: &mut Side, run: Run, level: &str) -> (Run, Value) {
    let Run { child, qmp } = run;
    drop(qmp);
    let source = format!("qmp:{}", side.path("qmp-test").display());
    let repo = side.repo();
    let report = side.ok(&["backup", &source, repo.to_str().unwrap(), "--level", level]);
    side.prove("latest");
    (Run { child, qmp: Qmp::connect(&side.path("qmp-test")) }, report)
}

fn power_off(side: &Side) {
    let mut tiny = UnixStream::connect(side.path("tiny")).unwrap();
    tiny.write_all(b"p").unwrap();
}

/// Each end of a machine that can be harvested: the next backup is an incremental.
fn ends(version: Version) {
    let mut rng = Rng::new();
    let mut side = Side::new(version);
    let mut run = Run::start(&side, version, &[]);
    run.write(&mut side, &mut rng);
    run = backup(&mut side, run, "auto");
    for end in [None, Some(Signal::SIGTERM), Some(Signal::SIGINT), Some(Signal::SIGHUP), None] {
        run.write(&mut side, &mut rng);
        match end {
            None => power_off(&side),
            Some(signal) => run.signal(signal),
        }
        let status = run.wait();
        assert_eq!(status.code(), Some(0), "{end:?}: {status} {}", log_of(&side));
        run = Run::start(&side, version, &[]);
        run.write(&mut side, &mut rng);
        run = backup(&mut side, run, "incremental");
    }
    run.qmp.call("quit", json!({}));
    assert_eq!(run.wait().code(), Some(0));
}

#[test]
fn every_end_that_can_be_held_is_on_10() {
    ends(Version::V10);
}

#[test]
fn every_end_that_can_be_held_is_on_7() {
    ends(Version::V7);
}

/// Exit codes, and QEMU's own words.
#[test]
fn what_qemu_says_is_passed_on() {
    let side = Side::new(Version::V10);
    let qemu = Version::V10.program("qemu-system-x86_64");
    let state = side.state();
    let start = |args: &[&str]| {
        let mut command = livebackup();
        command.arg("--state").arg(&state).args(["run", "--vm", "x", "--"]).arg(&qemu).args(args);
        command.stdin(Stdio::null()).output().unwrap()
    };
    let bad = start(&["-machine", "nonsense"]);
    let own = Command::new(&qemu).args(["-machine", "nonsense"]).stdin(Stdio::null()).output().unwrap();
    assert_eq!(bad.status.code(), own.status.code());
    assert!(String::from_utf8_lossy(&bad.stderr).contains("nonsense"), "{bad:?}");
    assert!(bad.stdout.is_empty());
    let daemon = start(&["-daemonize"]);
    assert!(String::from_utf8_lossy(&daemon.stderr).contains("-daemonize"), "{daemon:?}");
    let mut missing = livebackup();
    let missing = missing.args(["run", "--", "/nonexistent/qemu"]).stdin(Stdio::null()).output().unwrap();
    assert!(!missing.status.success() && String::from_utf8_lossy(&missing.stderr).contains("/nonexistent/qemu"));

    // Killed: 128 + 9. Its bitmap is lost, and the next run says so.
    let run = Run::start(&side, Version::V10, &[]);
    let qemu_pid = child_of(run.child.id());
    kill(Pid::from_raw(qemu_pid), Signal::SIGKILL).unwrap();
    assert_eq!(run.wait().code(), Some(137));
}

/// The process that this one started as QEMU.
fn child_of(pid: u32) -> i32 {
    let all = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let children = tasks.filter_map(|t| std::fs::read_to_string(t.path().join("children")).ok());
    let all: Vec<i32> = children
        .chain([all])
        .flat_map(|c| c.split(' ').filter_map(|p| p.trim().parse().ok()).collect::<Vec<_>>())
        .collect();
    let is_qemu = |pid: &i32| {
        let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        exe.file_name().is_some_and(|n| n.to_string_lossy().starts_with("qemu"))
    };
    all.into_iter().find(is_qemu).expect("QEMU is a child")
}

/// -S is the user's: the guest is not let go.
#[test]
fn a_machine_that_was_to_be_stopped_is() {
    let side = Side::new(Version::V10);
    let mut run = Run::start(&side, Version::V10, &["-S"]);
    wait_until("tracking", || {
        let bitmaps = run.qmp.call("query-named-block-nodes", json!({"flat": true})).to_string();
        bitmaps.matches("livebackup").count() >= 4
    });
    assert_eq!(run.qmp.call("query-status", json!({}))["status"], "prelaunch");
    run.signal(Signal::SIGTERM);
    assert_eq!(run.wait().code(), Some(0));
}

/// We are killed: QEMU goes on, and ends at its guest's power-off all the same.
#[test]
fn qemu_outlives_a_killed_sidecar() {
    let mut rng = Rng::new();
    let mut side = Side::new(Version::V10);
    let mut run = Run::start(&side, Version::V10, &[]);
    run.write(&mut side, &mut rng);
    let pid = child_of(run.child.id());
    run.signal(Signal::SIGKILL);
    let Run { child, mut qmp } = run;
    assert_eq!(Run::ended(child).signal(), Some(9));
    assert_eq!(qmp.call("query-status", json!({}))["status"], "running");
    power_off(&side);
    wait_until("QEMU to end", || !Path::new(&format!("/proc/{pid}")).exists());
}

/// We are told to end the machine, stop its guest, and are killed: it ends, and is not left standing still.
#[test]
fn a_machine_that_was_being_ended_ends() {
    let mut rng = Rng::new();
    for more in [&[][..], &["-no-shutdown"]] {
        let mut side = Side::new(Version::V10);
        let killed = [("LIVEBACKUP_KILL_AT", "power.stopped")];
        let mut run = Run::start_in(&side, Version::V10, &[], more, &killed);
        run.write(&mut side, &mut rng);
        let pid = child_of(run.child.id());
        run.signal(Signal::SIGTERM);
        let Run { child, qmp } = run;
        assert_eq!(Run::ended(child).signal(), Some(9));
        drop(qmp);
        if !more.is_empty() {
            // Nobody but the next start owes it there.
            let source = format!("qmp:{}", side.path("qmp-test").display());
            let said = side.livebackup(&["disks", &source]);
            assert!(String::from_utf8_lossy(&said.stdout).contains("was being ended"), "{said:?}");
        }
        wait_until("QEMU to end", || !Path::new(&format!("/proc/{pid}")).exists());
    }
}

/// What an image keeps is there also when we were not: killed, or QEMU ended from elsewhere.
#[test]
fn an_image_keeps_what_nobody_could_take() {
    let mut rng = Rng::new();
    let mut side = Side::new(Version::V10);
    let options = ["--persistent-bitmaps"];
    let mut run = Run::start_with(&side, Version::V10, &options, &[]);
    run.write(&mut side, &mut rng);
    run = backup(&mut side, run, "auto");
    run.write(&mut side, &mut rng);
    let pid = child_of(run.child.id());
    run.signal(Signal::SIGKILL);
    let Run { child, qmp } = run;
    Run::ended(child);
    drop(qmp);
    power_off(&side);
    wait_until("QEMU to end", || !Path::new(&format!("/proc/{pid}")).exists());
    for _ in 0..2 {
        run = Run::start_with(&side, Version::V10, &options, &[]);
        run.write(&mut side, &mut rng);
        let (mut after, report) = backup_and_report(&mut side, run, "auto");
        let taken: Vec<_> = report["disks"].as_array().unwrap().iter().map(|d| d["taken"].as_str().unwrap()).collect();
        assert_eq!(taken, ["scan", "incremental"], "{report}");
        after.write(&mut side, &mut rng);
        after.qmp.call("quit", json!({}));
        assert_eq!(after.wait().code(), Some(0));
    }
}

/// A device that the user calls exclusive is tracked across a power-off.
#[test]
fn an_exclusive_device_goes_on() {
    let mut rng = Rng::new();
    let mut side = Side::new(Version::V10);
    let _volume = Loop::under(&mut side);
    let options = ["--exclusive-device", "vd0"];
    let mut run = Run::start_with(&side, Version::V10, &options, &[]);
    run.write(&mut side, &mut rng);
    run = backup(&mut side, run, "auto");
    run.write(&mut side, &mut rng);
    power_off(&side);
    assert_eq!(run.wait().code(), Some(0));
    run = Run::start_with(&side, Version::V10, &options, &[]);
    run.write(&mut side, &mut rng);
    run = backup(&mut side, run, "incremental");
    run.signal(Signal::SIGTERM);
    assert_eq!(run.wait().code(), Some(0));
}

impl Run {
    fn ended(mut child: Child) -> ExitStatus {
        wait_until("livebackup run to end", || child.try_wait().unwrap().is_some());
        child.wait().unwrap()
    }
}
