//! Stored examples of `epoch.json`: what was written before there were stamps, a closed epoch, and one whose bitmap the image
//! keeps.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use livebackup::checkpoint::{Closed, FileNumbers, FileStamp, Layer, Log, Medium, Stamp};

/// The log of a directory whose `epoch.json` is this stored example, changed by `change`.
fn opened(example: &str, change: impl FnOnce(&mut String)) -> (Log, tempfile::TempDir) {
    let stored = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoint-v1").join(example);
    let mut text = std::fs::read_to_string(stored).unwrap();
    change(&mut text);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("epoch.json"), text).unwrap();
    (Log::open(dir.path()).unwrap(), dir)
}

#[test]
fn an_epoch_from_before_stamps_opens() {
    let (log, _dir) = opened("epoch-before-stamps.json", |_| ());
    let epoch = log.epoch().unwrap();
    assert_eq!((epoch.qemu.pid, epoch.node.as_str(), epoch.number), (4711, "disk0", 7));
    assert_eq!((&epoch.medium, &epoch.closed), (&None, &None));
    assert!(log.last_end().unwrap().reason.contains("somebody removed it"));
}

#[test]
fn a_closed_epoch_opens_and_is_written_as_it_was() {
    let (mut log, _dir) = opened("epoch-closed.json", |_| ());
    let file = FileNumbers { dev: 65024, inode: 131 };
    let layer =
        Layer { format: "raw".into(), protocol: "file".into(), filename: "/vm/vd0.raw".into(), file: Some(file) };
    let stamp = FileStamp {
        format: "raw".into(),
        filename: "/vm/vd0.raw".into(),
        file,
        size_bytes: 64 << 20,
        mtime_ns: 1_795_237_199_123_456_789,
        ctime_ns: 1_795_237_199_123_456_789,
    };
    let closed = Closed {
        time: "2026-11-21T05:00:00Z".parse().unwrap(),
        stamp: Some(Stamp { options: None, files: vec![stamp] }),
        device: None,
        no_stamp: None,
    };
    let epoch = log.epoch().unwrap().clone();
    assert_eq!(epoch.medium, Some(Medium { layers: vec![layer], ..Medium::default() }));
    assert_eq!(epoch.closed, Some(closed.clone()));

    let (mut old, dir) = opened("epoch-before-stamps.json", |_| ());
    old.close_epoch(closed.clone()).unwrap();
    assert_eq!(Log::open(dir.path()).unwrap().epoch().unwrap().closed, Some(closed));
    // Another QEMU: what closed the one before says nothing of it.
    log.carry_epoch(epoch.qemu, "disk7", None).unwrap();
    assert_eq!(log.epoch().map(|e| (e.node.as_str(), &e.closed)), Some(("disk7", &None)));
}

#[test]
fn an_epoch_whose_bitmap_is_kept_opens() {
    let (mut log, dir) = opened("epoch-kept.json", |_| ());
    assert!(log.epoch().unwrap().kept);
    log.note_kept(false).unwrap();
    assert!(!Log::open(dir.path()).unwrap().epoch().unwrap().kept);
    let (mut old, dir) = opened("epoch-before-stamps.json", |_| ());
    assert!(!old.epoch().unwrap().kept);
    old.note_kept(true).unwrap();
    assert!(Log::open(dir.path()).unwrap().epoch().unwrap().kept);
}

#[test]
fn an_epoch_that_was_closed_on_a_device_opens() {
    let (mut log, dir) = opened("epoch-closed-device.json", |_| ());
    let closed = log.epoch().unwrap().closed.clone().unwrap();
    let device = closed.device.clone().unwrap();
    assert_eq!((device.number, device.counters.sequence, device.counters.writes[0]), (64773, Some(17), 96000));
    assert_eq!((device.granules.len(), device.digest.len(), &closed.stamp), (4, 64, &None));
    log.close_epoch(closed.clone()).unwrap();
    assert_eq!(Log::open(dir.path()).unwrap().epoch().unwrap().closed, Some(closed));
}

#[test]
fn a_turned_digit_is_not_believed() {
    let (log, _dir) = opened("epoch-closed.json", |text| *text = text.replace("123456789", "123456788"));
    assert!(log.epoch().is_none());
    assert!(log.damaged()[0].reason.contains("checksum"), "{:?}", log.damaged());
}
