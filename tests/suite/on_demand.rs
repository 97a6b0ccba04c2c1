//! Attached on demand: the monitor, which serves one client at a time, is free between backups; tracking goes on from one
//! attachment to the next.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use crate::common::side::*;
use crate::common::*;
use serde_json::{Value, json};

const ON_DEMAND: &str = "attach = \"on-demand\"";

/// A machine, and the service that attaches to it on demand.
fn started(version: Version) -> (Side, Serve) {
    let mut side = Side::new(version);
    side.start();
    let mut serve = Serve::start(&side, ON_DEMAND);
    serve.wait_until_attached(&side);
    side.cont();
    (side, serve)
}

/// The VM at the service, whoever has its monitor.
fn served(side: &Side) -> String {
    format!("unix:{}/vm1", side.home.path().join("serve.sock").display())
}

/// Another program comes to the same monitor, and is served at once.
fn other(side: &Side) -> Qmp {
    let mut other = Qmp::connect(&side.path("qmp"));
    assert!(other.call("query-status", json!({}))["status"].is_string());
    other
}

fn incremental(report: &Value) -> bool {
    report["disks"].as_array().unwrap().iter().all(|disk| disk["taken"] == "incremental")
}

fn between_backups(version: Version) {
    let mut rng = Rng::new();
    let (mut side, _serve) = started(version);
    side.scatter(&mut rng);
    let (at, repo) = (served(&side), side.repo().display().to_string());
    side.ok(&["backup", &at, &repo]);
    side.prove("latest");
    for _ in 0..3 {
        drop(other(&side));
        side.scatter(&mut rng);
        let estimate = side.ok(&["estimate", &at, &repo]);
        let needed = estimate["needed_bytes"].as_u64().unwrap();
        assert!(needed > 0 && needed < 2 * SIZE, "{estimate}");
        drop(other(&side));
        let report = side.ok(&["backup", &at, &repo, "--level", "incremental"]);
        assert!(incremental(&report), "{report}");
        side.prove("latest");
        // What records is there, and nothing else.
        let (mut others, bitmaps) = (other(&side), side.qemu().bitmaps());
        assert!(bitmaps.len() == 4 && bitmaps.iter().all(|(_, name)| !name.is_empty()), "{bitmaps:?}");
        assert!(!side.qemu().nodes().iter().any(|node| node.starts_with("livebackup-")));
        // A look at all VMs needs no monitor, and knows how the last session ended.
        let list = side.ok(&["status", at.trim_end_matches("/vm1")]);
        let text = list.to_string();
        assert!(text.contains("on demand") && text.contains("sent_bytes"), "{list}");
        others.call("query-status", json!({}));
    }
    // A process of the same host that finds the monitor free attaches by itself, with the same log.
    side.scatter(&mut rng);
    let report = side.backup("incremental");
    assert!(incremental(&report), "{report}");
    side.scatter(&mut rng);
    let report = side.ok(&["backup", &at, &repo, "--level", "incremental"]);
    assert!(incremental(&report), "{report}");
    side.prove("latest");
}

#[test]
fn another_program_has_the_monitor_between_backups_on_10() {
    between_backups(Version::V10);
}

#[test]
fn another_program_has_the_monitor_between_backups_on_7() {
    between_backups(Version::V7);
}

/// Who holds the monitor is waited for, and not for ever.
#[test]
fn a_monitor_that_another_program_keeps() {
    let mut rng = Rng::new();
    let (mut side, _serve) = started(Version::V10);
    side.scatter(&mut rng);
    let (at, repo) = (served(&side), side.repo().display().to_string());
    let others = other(&side);
    let start = Instant::now();
    let out = side.livebackup(&["backup", &at, &repo]);
    let said = String::from_utf8_lossy(&out.stderr) + String::from_utf8_lossy(&out.stdout);
    assert!(out.status.code() == Some(4) && said.contains("another client has it"), "{out:?}");
    assert!(start.elapsed() > Duration::from_secs(10), "it was waited for");
    // It lets go while somebody waits.
    let letting_go = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(2));
        drop(others);
    });
    side.ok(&["backup", &at, &repo]);
    side.prove("latest");
    letting_go.join().unwrap();
}

/// Requests at the same time share one attachment; the machine is another one later, and that is noticed.
#[test]
fn many_at_once_and_a_new_qemu() {
    let mut rng = Rng::new();
    let (mut side, serve) = started(Version::V10);
    side.scatter(&mut rng);
    let (at, repo) = (served(&side), side.repo().display().to_string());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| side.ok(&["status", &at]));
            scope.spawn(|| side.ok(&["disks", &at]));
        }
        side.ok(&["backup", &at, &repo]);
    });
    side.prove("latest");
    drop(other(&side));
    side.qemu().quit();
    side.ended();
    let away = side.livebackup(&["backup", &at, &repo]);
    let said = String::from_utf8_lossy(&away.stderr) + String::from_utf8_lossy(&away.stdout);
    assert!(!away.status.success() && said.contains("Is QEMU running"), "{away:?}");
    side.start();
    side.cont();
    side.scatter(&mut rng);
    let report = side.ok(&["backup", &at, &repo]);
    assert!(report.to_string().contains("nobody took the last bitmap"), "{report}");
    side.prove("latest");
    // A killed service leaves nothing that its next start does not take out.
    drop(other(&side));
    serve.kill();
    side.scatter(&mut rng);
    let dying = Serve::start_with(&side, ON_DEMAND, &[("LIVEBACKUP_KILL_AT", "vm.begun")]);
    wait_until("the service", || side.livebackup(&["status", &at]).status.success());
    assert!(!side.livebackup(&["backup", &at, &repo]).status.success());
    dying.wait_until_killed();
    assert!(side.qemu().nodes().iter().any(|node| node.starts_with("livebackup-")));
    let _serve = Serve::start(&side, ON_DEMAND);
    wait_until("the left-overs to go", || !side.qemu().nodes().iter().any(|node| node.starts_with("livebackup-")));
    side.scatter(&mut rng);
    let report = side.ok(&["backup", &at, &repo, "--level", "incremental"]);
    assert!(incremental(&report), "{report}");
    side.prove("latest");
}
