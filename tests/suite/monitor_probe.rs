//! What is found out about a QEMU, and that finding out leaves nothing behind.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use crate::common::*;
use livebackup::limits::MAX_READ_BYTES;
use livebackup::monitor::{Address, Capabilities, Monitor, machine, probe, run_state};
use livebackup::units::GRANULE_BYTES;
use serde_json::json;

const PREFIX: &str = "livebackup-0123abcd-";

async fn connect(qemu: &Qemu) -> Monitor {
    Monitor::connect(&Address::Unix(qemu.socket())).await.unwrap()
}

/// Everything that a probe could leave.
fn traces(qemu: &mut Qemu) -> String {
    let nodes = qemu.nodes();
    let graph = qemu.qmp("x-debug-query-block-graph", json!({}));
    let graph = graph["nodes"].as_array().unwrap().len();
    let fdsets = qemu.qmp("query-fdsets", json!({}));
    format!("{nodes:?} {graph} {:?} {:?} {fdsets}", qemu.bitmaps(), qemu.exports())
}

fn assert_no_nbd_server(qemu: &mut Qemu) {
    let error = qemu.try_qmp("nbd-server-stop", json!({})).unwrap_err();
    assert!(error["desc"].as_str().unwrap().contains("not running"), "{error}");
}

#[tokio::test]
async fn both_versions_do_what_they_should() {
    for (version, running) in VERSIONS.into_iter().flat_map(|v| [(v, false), (v, true)]) {
        let mut qemu = Qemu::with_raw_disk(version, 1 << 20);
        if running {
            qemu.qmp("cont", json!({}));
        }
        let before = traces(&mut qemu);
        let monitor = connect(&qemu).await;
        let start = Instant::now();
        let found = probe(&monitor, PREFIX).await.unwrap();
        println!("{version:?}: {:?}\n{found}", start.elapsed());
        let ten = version == Version::V10;
        let refusals = if ten { vec![] } else { found.refusals.clone() };
        assert_eq!(
            found,
            Capabilities {
                version: monitor.greeting_version(),
                copy_before_write: true,
                min_cluster_size: ten,
                snapshot_access: true,
                bitmap_merge: true,
                vhost_user_blk: true,
                nbd_export: true,
                nbd_server_running: false,
                sockets_by_descriptor: true,
                files_by_descriptor: true,
                latency_histogram: true,
                snapshot_boundary_bytes: if ten { MAX_READ_BYTES } else { GRANULE_BYTES },
                trust_block_status: ten,
                nbd_safe_in_iothread: ten,
                discard_unaligned_aborts: !ten,
                refusals,
            }
        );
        assert!(found.can_back_up());
        assert_eq!(
            found.refusals.iter().map(|(what, _)| *what).collect::<Vec<_>>(),
            if ten { vec![] } else { vec!["min-cluster-size"] }
        );
        assert_eq!(traces(&mut qemu), before);
        assert_no_nbd_server(&mut qemu);
        assert!(!(ten || running) || !qemu.log().contains("warning"), "it made QEMU print a warning: {}", qemu.log());
    }
}

#[tokio::test]
async fn over_tcp_only_descriptors_are_missing() {
    for version in VERSIONS {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let args = format!("tcp:127.0.0.1:{port},server=on,wait=off");
        let mut qemu = Qemu::start_with(version, &["-qmp", &args], |_| ());
        let before = traces(&mut qemu);
        let monitor = Monitor::connect(&Address::Tcp("127.0.0.1".into(), port)).await.unwrap();
        let found = probe(&monitor, PREFIX).await.unwrap();
        assert!(!found.sockets_by_descriptor && !found.files_by_descriptor);
        assert!(found.can_back_up() && found.vhost_user_blk && found.nbd_export && found.bitmap_merge, "{found}");
        assert_eq!(traces(&mut qemu), before);
        assert_no_nbd_server(&mut qemu);
    }
}

#[tokio::test]
async fn anothers_nbd_server_is_noted_and_left_alone() {
    for version in VERSIONS {
        let mut qemu = Qemu::with_raw_disk(version, 1 << 20);
        let path = qemu.path("theirs");
        qemu.qmp("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": path}}}));
        qemu.qmp("block-export-add", json!({"id": "theirs", "type": "nbd", "node-name": "disk0"}));
        let before = traces(&mut qemu);
        let found = probe(&connect(&qemu).await, PREFIX).await.unwrap();
        assert!(found.nbd_server_running && found.nbd_export);
        assert!(found.to_string().contains("NBD server already running"), "{found}");
        assert_eq!(traces(&mut qemu), before);
        qemu.qmp("nbd-server-stop", json!({}));
    }
}

#[tokio::test]
async fn a_cancelled_probe_cleans_up_all_the_same() {
    for version in VERSIONS {
        let mut qemu = Qemu::with_raw_disk(version, 1 << 20);
        let before = traces(&mut qemu);
        for round in 0..20 {
            let monitor = connect(&qemu).await;
            let _ = tokio::time::timeout(Duration::from_millis(round), probe(&monitor, PREFIX)).await;
            drop(monitor);
        }
        // The last one may still be at it.
        drop(connect(&qemu).await);
        assert_eq!(traces(&mut qemu), before);
        assert_no_nbd_server(&mut qemu);
    }
}

#[tokio::test]
async fn probes_side_by_side_do_not_meet() {
    for version in VERSIONS {
        let mut qemu = Qemu::with_raw_disk(version, 1 << 20);
        let before = traces(&mut qemu);
        let monitor = connect(&qemu).await;
        let (a, b) = tokio::join!(probe(&monitor, PREFIX), probe(&monitor, PREFIX));
        assert!(a.unwrap().can_back_up() && b.unwrap().can_back_up());
        assert_eq!(traces(&mut qemu), before);
    }
}

#[tokio::test]
async fn a_probe_that_qemu_refuses_is_an_answer() {
    let mut qemu = Qemu::with_raw_disk(Version::V10, 1 << 20);
    let before = traces(&mut qemu);
    // Too long for a node's name.
    let found = probe(&connect(&qemu).await, &"livebackup-".repeat(4)).await.unwrap();
    assert!(!found.can_back_up() && !found.refusals.is_empty(), "{found}");
    assert_eq!(traces(&mut qemu), before);
}

#[tokio::test]
async fn a_dead_qemu_is_an_error() {
    let qemu = Qemu::with_raw_disk(Version::V10, 1 << 20);
    let monitor = connect(&qemu).await;
    qemu.kill();
    assert!(probe(&monitor, PREFIX).await.unwrap_err().is_closed());
}

#[tokio::test]
async fn the_machine_is_described() {
    for version in VERSIONS {
        let args = ["-name", "vm one,process=something", "-uuid", "01234567-89ab-cdef-0123-456789abcdef"];
        let secret = ["-object", "secret,id=s0,data=letmein"];
        let bios = ["-bios", "DIR/firmware"];
        let args: Vec<_> = args.into_iter().chain(secret).chain(bios).collect();
        let qemu =
            Qemu::start_with(version, &args, |dir| std::fs::write(dir.join("firmware"), vec![0xf4; 65536]).unwrap());
        let monitor = connect(&qemu).await;
        let found = machine(&monitor).await.unwrap();
        let numbers = monitor.greeting_version().to_string();
        assert_eq!(found.name.as_deref(), Some("vm one"));
        assert_eq!(found.uuid.as_deref(), Some("01234567-89ab-cdef-0123-456789abcdef"));
        assert_eq!((found.qemu_version.as_str(), found.target.as_str()), (numbers.as_str(), "x86_64"));
        let q35 = if version == Version::V10 { "pc-q35-10.0" } else { "pc-q35-7.2" };
        assert_eq!(found.machine_type.as_deref(), Some(q35));
        assert!(found.command_line[0].ends_with("qemu-system-x86_64"), "{:?}", found.command_line);
        assert!(found.command_line.contains(&"vm one,process=something".to_owned()));
        assert!(found.command_line.contains(&"secret,id=s0,data=REMOVED".to_owned()), "{:?}", found.command_line);
        assert_eq!(found.boot_files, [qemu.path("firmware").to_str().unwrap()]);
        assert_eq!(run_state(&monitor).await.unwrap(), "prelaunch");
        monitor.raw("cont", json!({})).await.unwrap();
        assert_eq!(run_state(&monitor).await.unwrap(), "running");

        let plain = Qemu::start_with(version, &[], |_| ());
        let found = machine(&connect(&plain).await).await.unwrap();
        assert_eq!((found.name, found.uuid), (None, None));
        assert_eq!(found.boot_files, Vec::<String>::new());
    }
}
