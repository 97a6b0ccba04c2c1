//! Holds and hooks, with programs of the test: each way in which one can fail ends in time, with clear words, and with
//! nothing left held. No guest is needed: what holds is a program of this host. Real databases: `databases.rs`.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use crate::common::*;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

struct Side {
    qemu: Qemu,
}

impl Side {
    fn start() -> Side {
        let disk = "driver=raw,node-name=disk0,file.driver=file,file.filename=DIR/vd0.raw";
        let args = ["-name", "vm1", "-blockdev", disk, "-device", "virtio-blk-pci,drive=disk0,id=vd0"];
        let mut qemu = Qemu::start_with(Version::V10, &args, |dir| {
            std::fs::File::create(dir.join("vd0.raw")).unwrap().set_len(MIB).unwrap();
        });
        qemu.qmp("cont", json!({}));
        let side = Side { qemu };
        assert!(side.run(&["init", &side.text("repo")], &[]).status.success());
        side
    }

    fn path(&self, name: &str) -> PathBuf {
        self.qemu.path(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// A program of the operator.
    fn program(&self, name: &str, script: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, format!("#!/bin/sh\ncd {}\n{script}\n", self.text(""))).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn run(&self, args: &[&str], env: &[(&str, &str)]) -> Output {
        let mut command = livebackup();
        command.args(["--json", "--state", &self.text("state")]).args(args).envs(env.iter().copied());
        command.stdin(Stdio::null()).output().unwrap()
    }

    fn backup(&self, config: &str, env: &[(&str, &str)]) -> Result<Value, String> {
        std::fs::write(self.path("holds.toml"), config).unwrap();
        let source = format!("qmp:{}", self.text("qmp"));
        let out = self.run(&["backup", &source, &self.text("repo"), "--holds", &self.text("holds.toml")], env);
        let err = String::from_utf8_lossy(&out.stderr).into_owned();
        match out.status.success() {
            true => Ok(serde_json::from_slice(&out.stdout).unwrap()),
            false => Err(err + &String::from_utf8_lossy(&out.stdout)),
        }
    }

    fn points(&self) -> usize {
        let out = self.run(&["points", &self.text("repo")], &[]);
        serde_json::from_slice::<Value>(&out.stdout).unwrap()["points"].as_array().unwrap().len()
    }
}

/// Whether the program whose id is in this file lives.
fn lives(pid_file: &Path) -> bool {
    let pid = std::fs::read_to_string(pid_file).unwrap();
    Path::new("/proc").join(pid.trim()).exists()
}

const GOOD: &str = "echo $$ >pid; echo lsn=7; echo READY; cat >/dev/null; echo after=8; echo released >>log";

#[test]
fn a_hold_holds_over_the_instant_and_tells_its_positions() {
    let side = Side::start();
    let program = side.program("hold", GOOD);
    let report = side.backup(&format!("[[hold]]\nrun = [\"{program}\"]\nname = \"orders\"\n"), &[]).unwrap();
    let hold = &report["evidence"]["holds"][0];
    assert_eq!((&hold["name"], hold.get("failed")), (&json!("orders"), None), "{report}");
    assert_eq!(hold["positions"], json!({"lsn": "7", "after": "8"}));
    assert!(hold["held_us"].as_u64().unwrap() > 0);
    // Held databases in file systems that were not frozen are no better than a crash.
    assert_eq!(report["grade"], "crash");
    assert_eq!(std::fs::read_to_string(side.path("log")).unwrap(), "released\n");
    // Its words are in the manifest.
    let out = side.run(&["show", &side.text("repo"), "vm1"], &[]);
    assert_eq!(serde_json::from_slice::<Value>(&out.stdout).unwrap()["evidence"]["holds"][0], *hold);
}

#[test]
fn a_hold_that_fails_is_said_so_and_leaves_nothing() {
    let side = Side::start();
    let pid = side.path("pid");
    for (script, settings, says) in [
        ("echo $$ >pid; echo no such database >&2; exit 3", "", "no such database"),
        ("echo $$ >pid; exec sleep 1000", "ready_within_s = 1\n", "not ready within 1 s"),
        ("echo $$ >pid; sleep 1000 & echo $! >pid; wait", "ready_within_s = 1\n", "not ready within 1 s"),
        ("echo $$ >pid; echo READY; sleep 0.1", "", "ended before it was released"),
        ("echo $$ >pid; echo READY; exec sleep 1000", "limit_s = 1\n", "limit of 1 s ran out"),
        ("echo $$ >pid; echo READY; cat >/dev/null; echo lost connection >&2; exit 1", "", "lost connection"),
        ("echo $$ >pid; yes x", "ready_within_s = 1\n", "not ready within 1 s"),
    ] {
        let program = side.program("hold", script);
        let config = format!("[[hold]]\nrun = [\"{program}\"]\nname = \"orders\"\n{settings}");
        let slow = [("LIVEBACKUP_PAUSE_AT", "quiet.held=2000")];
        let report = side.backup(&config, &slow).unwrap();
        let failed = report["evidence"]["holds"][0]["failed"].as_str().unwrap_or_else(|| panic!("{script}: {report}"));
        assert!(failed.contains(says), "{script}: {failed}");
        assert!(report["evidence"]["reasons"].to_string().contains("orders"), "{report}");
        wait_until("the hold to be gone", || !lives(&pid));
        let before = side.points();
        let refused = side.backup(&format!("{config}policy = \"require\"\n"), &slow).unwrap_err();
        assert!(refused.contains(says) && refused.contains("required"), "{script}: {refused}");
        assert_eq!(side.points(), before, "{script}: no point without the hold");
        wait_until("the hold to be gone", || !lives(&pid));
    }
    let report = side.backup("[[hold]]\nrun = [\"/no/such/program\"]\n", &[]).unwrap();
    assert!(report["evidence"]["holds"][0]["failed"].as_str().unwrap().contains("cannot start"), "{report}");
    // A profile's client that is not there, or finds nobody.
    let config = "[[hold]]\nprofile = \"postgresql\"\nhost = \"127.0.0.1\"\nport = 1\n";
    let report = side.backup(config, &[]).unwrap();
    assert!(report["evidence"]["holds"][0]["failed"].as_str().unwrap().contains("refused"), "{report}");
}

#[test]
fn a_dead_sidecar_releases_its_holds() {
    let side = Side::start();
    let programs = [side.program("one", GOOD), side.program("two", "echo $$ >pid2; echo READY; cat >/dev/null")];
    let holds = programs.map(|p| format!("[[hold]]\nrun = [\"{p}\"]\n")).concat();
    for point in ["quiet.held", "fleece.inserted"] {
        let died = side.backup(&holds, &[("LIVEBACKUP_KILL_AT", point)]).unwrap_err();
        assert!(!died.contains("failed"), "{died}");
        wait_until("the holds to be gone", || !lives(&side.path("pid")) && !lives(&side.path("pid2")));
    }
    assert_eq!(side.backup(&holds, &[]).unwrap()["evidence"]["holds"].as_array().unwrap().len(), 2);
}

#[test]
fn hooks_run_around_each_phase_and_may_refuse() {
    let side = Side::start();
    let told = "echo $LIVEBACKUP_WHEN $LIVEBACKUP_PHASE $LIVEBACKUP_VM $LIVEBACKUP_LEVEL $LIVEBACKUP_RESULT >>log";
    let program = side.program("hook", told);
    let hooks = ["backup", "session", "instant"]
        .map(|phase| format!("[[hook]]\nphase = \"{phase}\"\npre = [\"{program}\"]\npost = [\"{program}\"]\n"))
        .concat();
    let log = || std::fs::read_to_string(side.path("log")).unwrap_or_default();
    let report = side.backup(&hooks, &[]).unwrap();
    assert_eq!(
        log().lines().collect::<Vec<_>>(),
        [
            "pre backup vm1 auto",
            "pre session vm1 full",
            "pre instant vm1 full",
            "post instant vm1 full ok",
            "post session vm1 full ok",
            "post backup vm1 full ok",
        ]
    );
    assert_eq!(report["warnings"], json!([]));
    let point = side.program("point", "echo $LIVEBACKUP_POINT >point.log");
    let report = side.backup(&format!("[[hook]]\nphase = \"backup\"\npost = [\"{point}\"]\n"), &[]).unwrap();
    assert_eq!(std::fs::read_to_string(side.path("point.log")).unwrap().trim(), report["point"].as_str().unwrap());

    // One before that fails or hangs refuses; those after run all the same, and are told.
    let count = side.points();
    let no = side.program("no", "echo not today >&2; exit 1");
    let hangs = side.program("hangs", "echo $$ >pid; sleep 1000");
    for phase in ["backup", "session", "instant"] {
        for (bad, says) in [(&no, "not today"), (&hangs, "not done within 1 s")] {
            std::fs::remove_file(side.path("log")).unwrap_or_default();
            let config =
                format!("[[hook]]\nphase = \"{phase}\"\npre = [\"{bad}\"]\npost = [\"{program}\"]\nlimit_s = 1\n");
            let refused = side.backup(&config, &[]).unwrap_err();
            assert!(refused.contains(says), "{phase}: {refused}");
            assert!(log().contains(&format!("post {phase} vm1")) && log().contains("failed"), "{phase}: {}", log());
        }
    }
    assert!(!lives(&side.path("pid")));
    assert_eq!(side.points(), count, "a refused backup makes no point");

    // One after that fails is a warning.
    let config = format!("[[hook]]\nphase = \"session\"\npost = [\"{no}\"]\n");
    let report = side.backup(&config, &[]).unwrap();
    assert!(report["warnings"].to_string().contains("not today"), "{report}");
}
