//! Commands, replies and events, on both QEMU versions.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use crate::common::*;
use livebackup::monitor::{Address, Monitor, MonitorError, Version as QemuVersion};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use qapi::qmp;
use serde_json::{Value, json};

async fn connect(qemu: &Qemu) -> Monitor {
    Monitor::connect(&Address::Unix(qemu.socket())).await.unwrap()
}

#[tokio::test]
async fn the_greeting_gives_version_and_process() {
    for version in VERSIONS {
        let qemu = Qemu::with_raw_disk(version, 1 << 20);
        let monitor = connect(&qemu).await;
        let said = monitor.greeting_version();
        match version {
            Version::V10 => assert!(said >= QemuVersion::new(10, 0, 0)),
            Version::V7 => assert_eq!((said.major, said.minor), (7, 2)),
        }
        assert!(said.package.contains("Debian"), "{said:?}");
        assert_eq!(said.to_string().split('.').count(), 3);
        let process = monitor.peer_process().expect("the process is seen");
        assert_eq!(process.pid as u32, qemu.pid());
        assert!(process.is_alive());
        assert!(monitor.can_pass_fds());
        qemu.kill();
        monitor.closed().await;
        assert!(!process.is_alive());
    }
}

#[tokio::test]
async fn a_machine_without_processors_is_found_too() {
    for version in VERSIONS {
        for args in [&["-machine", "none"][..], &["-preconfig"]] {
            let qemu = Qemu::start_with(version, args, |_| ());
            assert_eq!(connect(&qemu).await.peer_process().unwrap().pid as u32, qemu.pid());
        }
    }
}

#[tokio::test]
async fn commands_are_answered_and_refused() {
    for version in VERSIONS {
        let qemu = Qemu::with_raw_disk(version, 1 << 20);
        let monitor = connect(&qemu).await;
        assert_eq!(monitor.raw("query-status", json!({})).await.unwrap()["status"], "prelaunch");
        assert_eq!(monitor.raw("query-status", Value::Null).await.unwrap()["running"], false);
        assert_eq!(monitor.execute(qmp::query_status {}).await.unwrap().status, qmp::RunState::prelaunch);
        let blocks = monitor.execute(qmp::query_block {}).await.unwrap();
        assert_eq!(blocks.len(), 1);

        let error = monitor.raw("no-such-command", json!({})).await.unwrap_err();
        assert!(error.is_unknown_command() && error.to_string().contains("no-such-command"), "{error}");
        let error = monitor.raw("blockdev-del", json!({"node-name": "nix"})).await.unwrap_err();
        assert!(error.refusal().unwrap().contains("nix"), "{error}");
        assert!(error.to_string().starts_with("QEMU refused blockdev-del: "), "{error}");
        // Arguments that are no object are refused by QEMU, not lost.
        let error = monitor.raw("query-status", json!([1])).await.unwrap_err();
        assert!(matches!(error, MonitorError::Command { .. }), "{error}");
        assert!(!monitor.is_closed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_commands_at_once_get_their_own_replies() {
    for version in VERSIONS {
        let qemu = Qemu::with_raw_disk(version, 1 << 20);
        let monitor = connect(&qemu).await;
        let mut calls = tokio::task::JoinSet::new();
        for i in 0..500 {
            let monitor = monitor.clone();
            calls.spawn(async move {
                // Its refusal repeats the name.
                let node = format!("node-{i}-{}", "x".repeat(i % 300));
                let error = monitor.raw("blockdev-del", json!({"node-name": node})).await.unwrap_err();
                assert!(error.refusal().unwrap().contains(&format!("'{node}'")), "{node}: {error}");
            });
        }
        while let Some(done) = calls.join_next().await {
            done.unwrap();
        }
    }
}

/// Whether every thread of a process is stopped: a signal takes a moment.
fn stands_still(pid: Pid) -> bool {
    let mut threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.all(|thread| {
        let stat = std::fs::read_to_string(thread.unwrap().path().join("stat")).unwrap();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
    })
}

#[tokio::test]
async fn a_call_that_ran_out_of_time_confuses_nobody() {
    for version in VERSIONS {
        let qemu = Qemu::with_raw_disk(version, 1 << 20);
        let monitor = connect(&qemu).await;
        let pid = Pid::from_raw(qemu.pid() as i32);
        for i in 0..20 {
            kill(pid, Signal::SIGSTOP).unwrap();
            crate::common::wait_until("QEMU to stand still", || stands_still(pid));
            let limit = Duration::from_millis(5);
            let error = monitor.raw_within(limit, "query-block", json!({})).await.unwrap_err();
            kill(pid, Signal::SIGCONT).unwrap();
            assert!(matches!(error, MonitorError::Deadline { .. }), "{error}");
            assert!(error.to_string().contains("did not answer query-block within 0.005 s"), "{error}");
            // The late reply comes before this one's.
            let path = json!({"path": "/machine", "property": "type"});
            assert!(monitor.raw("qom-get", path).await.unwrap().as_str().unwrap().contains("q35"), "round {i}");
            // Nothing or an answer in time: both are right, and the next call is not confused.
            let _ = monitor.raw_within(Duration::from_nanos(1), "query-block", json!({})).await;
        }
    }
}

#[tokio::test]
async fn a_cancelled_call_is_executed_whole_or_not_at_all() {
    for version in VERSIONS {
        let qemu = Qemu::with_raw_disk(version, 1 << 20);
        let monitor = connect(&qemu).await;
        for i in 0..50 {
            let add = json!({"driver": "null-co", "node-name": format!("n{i}"), "size": 65536});
            let call = monitor.raw("blockdev-add", add);
            // Polled at least once, then dropped.
            let _ = tokio::time::timeout(Duration::from_micros(i * 10), call).await;
        }
        let nodes = monitor.raw("query-named-block-nodes", json!({"flat": true})).await.unwrap();
        let ours = nodes.as_array().unwrap().iter().filter(|n| n["drv"] == "null-co").count();
        assert_eq!(ours, 50, "a command that was handed over is executed");
        assert!(!monitor.is_closed());
    }
}

#[tokio::test]
async fn events_arrive_in_order() {
    for version in VERSIONS {
        let qemu = Qemu::with_raw_disk(version, 1 << 20);
        let monitor = connect(&qemu).await;
        let mut events = monitor.subscribe();
        let mut others = monitor.clone().subscribe();
        let before = std::time::SystemTime::now();
        monitor.raw("cont", json!({})).await.unwrap();
        monitor.raw("stop", json!({})).await.unwrap();
        for name in ["RESUME", "STOP"] {
            let event = events.recv().await.unwrap();
            assert_eq!((event.name.as_str(), &event.data), (name, &json!({})));
            let apart = event.timestamp.duration_since(before).unwrap_or_default();
            assert!(apart < Duration::from_secs(60), "{apart:?}");
            assert_eq!(others.recv().await.unwrap(), event);
        }
        qemu.kill();
        let end = events.recv().await.unwrap_err();
        assert!(matches!(end, tokio::sync::broadcast::error::RecvError::Closed), "{end}");
        let error = monitor.raw("query-status", json!({})).await.unwrap_err();
        assert!(error.is_closed(), "{error}");
        assert!(matches!(
            monitor.subscribe().recv().await.unwrap_err(),
            tokio::sync::broadcast::error::RecvError::Closed
        ));
    }
}
