//! Descriptors passed over the monitor, on both QEMU versions.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

use crate::common::*;
use livebackup::monitor::{Address, Monitor, MonitorError};
use serde_json::json;

fn nameless_file(size_bytes: u64) -> std::fs::File {
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).write(true).custom_flags(nix::libc::O_TMPFILE).open(std::env::temp_dir()).unwrap();
    file.set_len(size_bytes).unwrap();
    file
}

#[tokio::test]
async fn a_guest_write_reaches_a_nameless_file() {
    for version in VERSIONS {
        let mut qemu = Qemu::start_with(version, &["-device", "virtio-scsi-pci,id=s0"], |_| ());
        let monitor = Monitor::connect(&Address::Unix(qemu.socket())).await.unwrap();
        let mut file = nameless_file(1 << 20);
        let set = json!({"fdset-id": 1001, "opaque": "livebackup-test"});
        let added = monitor.send_fd("add-fd", set, file.as_fd()).await.unwrap();
        assert_eq!(added["fdset-id"], 1001);
        let node = json!({"driver": "file", "filename": "/dev/fdset/1001", "node-name": "disk0"});
        monitor.raw("blockdev-add", node).await.unwrap();
        qemu.qmp("device_add", json!({"driver": "scsi-hd", "id": "sd0", "drive": "disk0"}));
        qemu.qemu_io("/machine/peripheral/sd0", "write -P 0xab 65536 4096");
        let mut bytes = vec![];
        file.seek(SeekFrom::Start(65536)).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        assert!(bytes[..4096].iter().all(|b| *b == 0xab) && bytes[4096..].iter().all(|b| *b == 0));
    }
}

#[tokio::test]
async fn a_listening_socket_becomes_the_nbd_server() {
    for version in VERSIONS {
        let qemu = Qemu::with_raw_disk(version, 1 << 20);
        let monitor = Monitor::connect(&Address::Unix(qemu.socket())).await.unwrap();
        let listener = UnixListener::bind(qemu.path("nbd")).unwrap();
        monitor.send_fd("getfd", json!({"fdname": "lbnbd"}), listener.as_fd()).await.unwrap();
        drop(listener);
        let addr = json!({"addr": {"type": "fd", "data": {"str": "lbnbd"}}});
        monitor.raw("nbd-server-start", addr).await.unwrap();
        let mut magic = [0; 8];
        UnixStream::connect(qemu.path("nbd")).unwrap().read_exact(&mut magic).unwrap();
        assert_eq!(&magic, b"NBDMAGIC");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_descriptors_at_once_go_with_their_commands() {
    for version in VERSIONS {
        let mut qemu = Qemu::with_raw_disk(version, 1 << 20);
        let monitor = Monitor::connect(&Address::Unix(qemu.socket())).await.unwrap();
        let mut calls = tokio::task::JoinSet::new();
        for i in 1..=40u64 {
            let monitor = monitor.clone();
            calls.spawn(async move {
                let file = nameless_file(i * 65536);
                let set = json!({"fdset-id": i, "opaque": "x".repeat(i as usize * 50)});
                let (added, status) =
                    tokio::join!(monitor.send_fd("add-fd", set, file.as_fd()), monitor.raw("query-status", json!({})));
                added.unwrap();
                status.unwrap();
                let node =
                    json!({"driver": "file", "filename": format!("/dev/fdset/{i}"), "node-name": format!("n{i}")});
                monitor.raw("blockdev-add", node).await.unwrap();
            });
        }
        while let Some(done) = calls.join_next().await {
            done.unwrap();
        }
        let nodes = qemu.qmp("query-named-block-nodes", json!({"flat": true}));
        for i in 1..=40 {
            let node = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == format!("n{i}")).unwrap();
            assert_eq!(node["image"]["virtual-size"], i * 65536, "the size tells whose file it is");
        }
    }
}

#[tokio::test]
async fn a_descriptor_set_goes_after_its_node() {
    for version in VERSIONS {
        let mut qemu = Qemu::with_raw_disk(version, 1 << 20);
        for running in [false, true] {
            let monitor = Monitor::connect(&Address::Unix(qemu.socket())).await.unwrap();
            if running {
                monitor.raw("cont", json!({})).await.unwrap();
            }
            let file = nameless_file(1 << 20);
            monitor.send_fd("add-fd", json!({"fdset-id": 7}), file.as_fd()).await.unwrap();
            let node = json!({"driver": "file", "filename": "/dev/fdset/7", "node-name": "scratch"});
            monitor.raw("blockdev-add", node).await.unwrap();
            monitor.raw("blockdev-del", json!({"node-name": "scratch"})).await.unwrap();
            monitor.raw("remove-fd", json!({"fdset-id": 7})).await.unwrap();
            let left = monitor.raw("query-fdsets", json!({})).await.unwrap();
            if running || version == Version::V10 {
                assert_eq!(left, json!([]), "{version:?}, running: {running}");
                continue;
            }
            // 7.2 keeps it until the guest runs and a client goes.
            assert_eq!(left[0]["fdset-id"], 7);
            monitor.raw("cont", json!({})).await.unwrap();
            let mut events = monitor.subscribe();
            drop(monitor);
            while events.recv().await.is_ok() {}
            let monitor = Monitor::connect(&Address::Unix(qemu.socket())).await.unwrap();
            drop(monitor);
            assert_eq!(qemu.qmp("query-fdsets", json!({})), json!([]));
        }
    }
}

#[tokio::test]
async fn a_refused_descriptor_fails_only_its_call() {
    for version in VERSIONS {
        let qemu = Qemu::with_raw_disk(version, 1 << 20);
        let monitor = Monitor::connect(&Address::Unix(qemu.socket())).await.unwrap();
        let file = nameless_file(0);
        // A name may not start with a digit.
        let error = monitor.send_fd("getfd", json!({"fdname": "1x"}), file.as_fd()).await.unwrap_err();
        assert!(matches!(error, MonitorError::Command { .. }), "{error}");
        monitor.send_fd("getfd", json!({"fdname": "x"}), file.as_fd()).await.unwrap();
        monitor.raw("closefd", json!({"fdname": "x"})).await.unwrap();
    }
}
