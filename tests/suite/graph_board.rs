//! Remembering a machine's devices: what is remembered must never hide a change.

#![allow(clippy::unwrap_used)]

use crate::common::*;
use livebackup::monitor::{Address, Monitor};
use livebackup::vm::graph::{self, Board, Graph};
use serde_json::json;

const OURS: &str = "livebackup-00c0ffee-";

fn discover(qemu: &Qemu, board: &mut Board) -> Graph {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let monitor = Monitor::connect(&Address::Unix(qemu.socket())).await.unwrap();
        graph::discover(&monitor, OURS, board).await.unwrap()
    })
}

fn discover_anew(qemu: &Qemu) -> Graph {
    discover(qemu, &mut Board::default())
}

#[test]
fn what_is_plugged_is_seen_by_one_who_knows_the_machine() {
    for version in VERSIONS {
        let mut qemu = Qemu::start_with(version, &["-device", "virtio-scsi-pci,id=bus9"], |_| {});
        let mut board = Board::default();
        let mut look = |qemu: &Qemu| {
            let found = discover(qemu, &mut board);
            assert_eq!(discover_anew(qemu), found);
            found.disks.iter().map(|d| d.disk.name.clone()).collect::<Vec<_>>()
        };
        let before = look(&qemu);
        qemu.qmp(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "new", "size": 1 << 20, "read-zeroes": true}),
        );
        let unplugged = discover_anew(&qemu);
        qemu.qmp("device_add", json!({"driver": "scsi-hd", "id": "plugged", "bus": "bus9.0", "drive": "new"}));
        let after = look(&qemu);
        assert!(after.iter().any(|name| name == "plugged") && !before.iter().any(|name| name == "plugged"));
        qemu.qmp("device_del", json!({"id": "plugged"}));
        // It goes in steps, and two looks may see two of them.
        wait_until("the disk to go", || discover_anew(&qemu) == unplugged);
        assert_eq!(look(&qemu), before);
    }
}

/// A device that was pulled out and plugged again under its name looks alike in all that is compared; what is not
/// compared is asked for again.
#[test]
fn a_like_machine_with_other_iothreads_is_not_taken_for_the_remembered_one() {
    for version in VERSIONS {
        let start = |device: &str| {
            let args = format!(
                "-object iothread,id=io0 -blockdev null-co,node-name=n0,size=1048576,read-zeroes=on
                 -device virtio-blk-pci,id=vd0,drive=n0{device} -device virtio-scsi-pci,id=bus9
                 -blockdev null-co,node-name=n1,size=1048576,read-zeroes=on -device scsi-hd,id=sd0,bus=bus9.0,drive=n1"
            );
            Qemu::start_with(version, &args.split_whitespace().collect::<Vec<_>>(), |_| {})
        };
        let (with, without) = (start(",iothread=io0"), start(""));
        let iothread = |graph: &Graph| graph.disk("vd0").unwrap().disk.iothread;
        let mut board = Board::default();
        assert!(iothread(&discover(&with, &mut board)));
        let remembered = board.clone();
        let found = discover(&without, &mut board);
        assert!(!iothread(&found));
        assert_eq!(found, discover_anew(&without));
        let print = |board: &Board| serde_json::to_value(board).unwrap()["print"].as_str().unwrap().to_owned();
        assert_eq!(print(&board), print(&remembered), "they look alike, so nothing was walked through");
        assert!(!print(&board).is_empty());
    }
}
