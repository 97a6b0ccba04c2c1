//! In one process, what has arrived at the client costs the guest's writes nothing any more, although nothing of it is durable
//! yet; and the restore point is that of the instant.

#![allow(clippy::unwrap_used)]

use crate::common::side::*;
use crate::common::*;
use serde_json::{Value, json};

const CLUSTER: u64 = 64 << 10;
/// What is read at once.
const PIECE: u64 = 1 << 20;

fn node<'a>(nodes: &'a Value, name: &str) -> &'a Value {
    let is_it = |node: &&Value| node["node-name"].as_str().is_some_and(|found| found.ends_with(name));
    nodes.as_array().unwrap().iter().find(is_it).unwrap_or_else(|| panic!("{nodes}"))
}

/// Where copy-before-write has put something, at the farthest.
fn copied_up_to(qemu: &mut Qemu, disk: usize) -> u64 {
    let stats = qemu.qmp("query-blockstats", json!({"query-nodes": true}));
    node(&stats, &format!("scr{disk}"))["stats"]["wr_highest_offset"].as_u64().unwrap()
}

/// What of a disk its filter would copy, by the larger of its own bitmaps.
fn kept_bytes(qemu: &mut Qemu, disk: usize) -> u64 {
    let nodes = qemu.qmp("query-named-block-nodes", json!({"flat": true}));
    let bitmaps = node(&nodes, &format!("cbw{disk}"))["dirty-bitmaps"].as_array().unwrap().clone();
    bitmaps.iter().map(|bitmap| bitmap["count"].as_u64().unwrap()).max().unwrap()
}

fn is_forgotten_when_it_has_arrived(version: Version) {
    let mut side = Side::new(version);
    side.start();
    side.cont();
    for disk in 0..2 {
        side.write_at(disk, 0, SIZE, 7 + disk as u8);
    }
    // One piece is there, and the client stands still. Its only pack, of less than 64 MiB, comes much later.
    let held = side.hold_a_backup_at("backup.arrived", |qemu| !qemu.exports().is_empty());
    let qemu = side.qemu();
    wait_until("what has arrived to be forgotten", || kept_bytes(qemu, 0) <= SIZE.next_multiple_of(CLUSTER) - PIECE);
    let mut write = |disk: usize, at: u64| {
        let path = format!("/machine/peripheral/{}/virtio-backend", DISKS[disk].0);
        qemu.qemu_io(&path, &format!("write -P 0xee {at} 4k"));
        copied_up_to(qemu, disk)
    };
    for cluster in 0..PIECE / CLUSTER {
        assert_eq!(write(0, cluster * CLUSTER), 0, "cluster {cluster} was copied");
    }
    assert!(write(1, 4 * PIECE) > 4 * PIECE, "what has not arrived is copied");
    let output = held.let_go();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    side.prove("latest");
}

#[test]
fn is_forgotten_when_it_has_arrived_10() {
    is_forgotten_when_it_has_arrived(Version::V10);
}

#[test]
fn is_forgotten_when_it_has_arrived_7() {
    is_forgotten_when_it_has_arrived(Version::V7);
}
