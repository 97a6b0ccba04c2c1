//! The impact of backups, from QEMU's latency histograms: counted exactly, kept with the point, another program's never
//! touched, and ours gone after `detach`, also when a backup was killed.

#![allow(clippy::unwrap_used)]

use crate::common::*;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use serde_json::{Value, json};

use livebackup::vm::{Vm, VmOptions};
use livebackup::wire::message::{Begin, Event, Session, Totals};

const MIB: u64 = 1 << 20;
/// (disk, what `query-blockstats` calls its device, the device's path).
const DISKS: [(&str, &str, &str); 3] = [
    ("vd0", "/machine/peripheral/vd0/virtio-backend", "/machine/peripheral/vd0/virtio-backend"),
    ("sd1", "sd1", "/machine/peripheral/sd1"),
    ("sd2", "sd2", "/machine/peripheral/sd2"),
];
const OTHERS: [u64; 3] = [1000, 1_000_000, 1_000_000_000];

/// Three disks: nobody's, one whose writes another program counts, and one of which it counts the reads.
fn start(version: Version) -> Qemu {
    let mut args: Vec<String> = ["-name", "vm1", "-device", "virtio-scsi-pci,id=s0"].map(str::to_owned).into();
    for (i, device) in
        ["virtio-blk-pci,id=vd0", "scsi-hd,id=sd1,bus=s0.0", "scsi-hd,id=sd2,bus=s0.0"].into_iter().enumerate()
    {
        let node = format!("driver=raw,node-name=disk{i},file.driver=file,file.filename=DIR/disk{i}.raw");
        args.extend(["-blockdev".to_owned(), node, "-device".to_owned(), format!("{device},drive=disk{i}")]);
    }
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let mut qemu = Qemu::start_with(version, &args, |dir| {
        for i in 0..3 {
            std::fs::File::create(dir.join(format!("disk{i}.raw"))).unwrap().set_len(4 * MIB).unwrap();
        }
    });
    qemu.qmp("block-latency-histogram-set", json!({"id": "sd1", "boundaries": OTHERS}));
    qemu.qmp("block-latency-histogram-set", json!({"id": "sd2", "boundaries-read": OTHERS}));
    qemu
}

/// So many writes of the guest to every disk, which QEMU accounts for.
fn write(qemu: &mut Qemu, count: u64) {
    for (_, _, path) in DISKS {
        for i in 0..count {
            qemu.qemu_io(path, &format!("aio_write -q -P {} {} 4k", 1 + i % 255, i % 512 * 8192));
        }
        qemu.qemu_io(path, "aio_flush");
    }
}

/// The histogram of a disk.
fn histogram(qemu: &mut Qemu, disk: usize, kind: &str) -> Value {
    let stats = qemu.qmp("query-blockstats", json!({}));
    let found = stats.as_array().unwrap().iter().find(|d| d["qdev"] == DISKS[disk].1);
    found.unwrap_or_else(|| panic!("{stats}"))["stats"][format!("{kind}_latency_histogram")].clone()
}

fn counted(histogram: &Value) -> u64 {
    histogram["bins"].as_array().unwrap().iter().map(|bin| bin.as_u64().unwrap()).sum()
}

/// Only another program's are left, as it set them; of the writes it counted none is forgotten.
fn assert_others_only(qemu: &mut Qemu, writes: u64) {
    assert_eq!(histogram(qemu, 0, "wr"), Value::Null);
    assert_eq!(histogram(qemu, 2, "wr"), Value::Null);
    for (disk, kind) in [(1, "wr"), (1, "rd"), (1, "flush"), (2, "rd")] {
        assert_eq!(histogram(qemu, disk, kind)["boundaries"], json!(OTHERS));
    }
    assert_eq!(counted(&histogram(qemu, 1, "wr")), writes);
}

async fn drain(mut session: Session) -> Totals {
    loop {
        if let Event::End(totals) = session.events.recv().await.expect("an event").unwrap() {
            return totals;
        }
    }
}

async fn counts(version: Version) {
    let mut qemu = start(version);
    let address = qemu.socket().to_str().unwrap().parse().unwrap();
    let options = VmOptions { state: qemu.path("state"), ..VmOptions::default() };
    let vm = Vm::attach(&address, options).await.unwrap();
    vm.disks().await.unwrap();
    assert_others_only(&mut qemu, 0);
    vm.watch_latency().await;
    let mut all = 0;
    for round in 0..3 {
        let (before, during) = (20 + round, 7 + round);
        write(&mut qemu, before);
        let begin = Begin { vm: "vm1".into(), chunk_bytes: 64 << 10, checkpoint: true, ..Begin::default() };
        let session = vm.begin(begin).await.unwrap();
        write(&mut qemu, during);
        let totals = drain(session).await;
        vm.idle().await;
        all += before + during;
        for (impact, (name, ..)) in totals.impact.iter().zip(DISKS) {
            assert_eq!(impact.disk, name);
            let impact = impact.impact;
            if name == "sd2" {
                assert_eq!((impact.before, impact.during), (None, None));
            } else {
                let reached = impact.before.map(|writes| writes.count);
                // Where another program's was there before us, we count from our first reading.
                let first = name == "sd1" && round == 0;
                assert_eq!(reached, (!first).then_some(before), "{name}, round {round}");
                let writes = impact.during.unwrap();
                assert_eq!(writes.count, during, "{name}, round {round}");
                let (p50, p99, highest) = (writes.p50.unwrap(), writes.p99.unwrap(), writes.highest.unwrap());
                assert!(p50.from_ns <= p99.from_ns && p99 == highest, "{writes:?}");
            }
            assert!(impact.scratch_peak_bytes >= 65536 && impact.copied_bytes >= 65536, "{impact:?}");
        }
        assert_eq!(totals.impact.len(), 3);
        assert_eq!(counted(&histogram(&mut qemu, 0, "wr")), all, "ours is never set again");
    }
    let (removed, _) = vm.detach(false).await.unwrap();
    assert!(removed.iter().any(|what| what.contains("histogram")), "{removed:?}");
    assert_others_only(&mut qemu, all);
    assert!(qemu.alive());
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_before_and_during_are_counted_qemu_10() {
    counts(Version::V10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_before_and_during_are_counted_qemu_7() {
    counts(Version::V7).await;
}

fn command(state: &Path, kill_at: Option<&str>, args: &[&str]) -> std::process::Output {
    let mut command = livebackup();
    command.arg("--state").arg(state).arg("--json").args(args).stdin(std::process::Stdio::null());
    if let Some(point) = kill_at {
        command.env("LIVEBACKUP_KILL_AT", point);
    }
    command.output().unwrap()
}

#[test]
fn processes_go_on_from_one_another_and_a_killed_one_leaves_nothing_unknown() {
    for version in VERSIONS {
        let mut qemu = start(version);
        let (source, repo) = (format!("qmp:{}", qemu.socket().display()), qemu.path("repo"));
        let (state, repo) = (qemu.path("state"), repo.to_str().unwrap());
        let ok = |args: &[&str]| {
            let out = command(&state, None, args);
            assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
            serde_json::from_slice::<Value>(&out.stdout).unwrap_or_default()
        };
        ok(&["init", repo]);
        let killed = command(&state, Some("gauge.on"), &["backup", &source, repo]);
        assert_eq!(killed.status.signal(), Some(9), "{}", String::from_utf8_lossy(&killed.stderr));
        write(&mut qemu, 5);
        assert_eq!(ok(&["backup", &source, repo])["disks"][0]["impact"]["before"]["count"], 5);
        write(&mut qemu, 9);
        let report = ok(&["backup", &source, repo]);
        assert_eq!(report["disks"][0]["impact"]["before"]["count"], 9, "{report}");
        assert_eq!(report["disks"][0]["impact"]["during"]["count"], 0, "{report}");
        assert_eq!(report["disks"][2]["impact"]["before"], Value::Null, "{report}");
        let kept = ok(&["show", repo, "vm1"]);
        assert_eq!(kept["disks"][0]["impact"], report["disks"][0]["impact"], "{kept}");
        // A process that knows nothing of the earlier ones but the mark.
        ok(&["detach", &source]);
        assert_others_only(&mut qemu, 14);
        assert!(qemu.alive());
    }
}
