//! What a QEMU can do is tried once, and again for another process, after an unreadable note, and whenever doctor asks.

#![allow(clippy::unwrap_used)]

use crate::common::*;

use std::path::Path;

/// How often a command tried out what QEMU can do: each trial ends with this command.
fn trials(qemu: &Qemu, state: &Path, command: &str) -> usize {
    let mut run = livebackup();
    run.env("LIVEBACKUP_LOG", "livebackup::monitor=trace").arg("--state").arg(state);
    let done = run.args([command, &format!("qmp:{}", qemu.socket().display()), "--vm", "known"]).output().unwrap();
    let log = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.success(), "{command}: {log}");
    log.lines().filter(|line| line.contains("block-latency-histogram-set")).count()
}

#[test]
fn a_qemu_is_tried_out_once() {
    for version in VERSIONS {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        let qemu = Qemu::with_raw_disk(version, 1 << 20);
        assert_eq!(trials(&qemu, state, "disks"), 1, "the first time");
        assert_eq!(trials(&qemu, state, "disks"), 0, "it is known");
        assert_eq!(trials(&qemu, state, "doctor"), 1, "doctor looks for itself");

        let note = state.join("vms/known/qemu.json");
        let text = std::fs::read_to_string(&note).unwrap();
        for bad in ["", "{}", "[1", &text[..text.len() / 2], &text.replace("\"copy_before_write\":true", "\"other\":1")]
        {
            std::fs::write(&note, bad).unwrap();
            assert_eq!(trials(&qemu, state, "disks"), 1, "after {bad:?}");
        }
        drop(qemu);

        let another = Qemu::with_raw_disk(version, 1 << 20);
        assert_eq!(trials(&another, state, "disks"), 1, "another process of the same name");
        assert_eq!(trials(&another, state, "disks"), 0, "it is known, too");
    }
}
