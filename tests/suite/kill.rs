//! `kill -9` of a backup at every named point: the guest runs on and has not noticed, what others own is untouched, and the
//! next backup takes out what was left, misses nothing, and leaves every earlier point as it was. Over both transports, on
//! disks with and without an I/O thread.

#![allow(clippy::unwrap_used)]

use crate::common::*;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// Every point from the first change in QEMU to the manifest, in the order of a backup.
const POINTS: [&str; 34] = [
    "fleece.scratch",
    "fleece.scratch:2",
    "fleece.helper",
    "fleece.bitmap",
    "fleece.bitmap:2",
    "fleece.stopped",
    "fleece.filter",
    "fleece.inserted",
    "fleece.inserted:2",
    "fleece.instant",
    "fleece.pinned",
    "fleece.pinned:2",
    "fleece.harvested",
    "seal.written",
    "seal.done",
    "fleece.forgotten",
    "fleece.forgotten:2",
    "fleece.snapshot",
    "fleece.snapshot:2",
    "fleece.export",
    "fleece.export:2",
    "vm.begun",
    "transfer.sent",
    "transfer.sent:5",
    "vm.sent",
    "vm.closing",
    "undo.out",
    "undo.filter",
    "undo.filter:2",
    "repo.pack-written",
    "repo.pack-renamed",
    "repo.index-written",
    "repo.before-manifest",
    "repo.after-manifest",
];

const DISKS: [(&str, &str); 2] =
    [("vd0", "/machine/peripheral/vd0/virtio-backend"), ("sd1", "/machine/peripheral/sd1")];

/// The first point at which the transport is in use; those before are the same over any.
const FIRST_OF_TRANSPORT: &str = "fleece.export";

fn start(version: Version, transport: &str) -> Qemu {
    // A disk of an I/O thread is not read over NBD from QEMU 7.2, which would not survive it.
    let is_safe = (version, transport) != (Version::V7, "nbd");
    let args = [
        "-name",
        "vm1",
        "-object",
        "iothread,id=io0",
        "-blockdev",
        "driver=raw,node-name=disk0,file.driver=file,file.filename=DIR/vd0.raw",
        "-device",
        "virtio-blk-pci,drive=disk0,id=vd0",
        "-blockdev",
        "driver=qcow2,node-name=disk1,file.driver=file,file.filename=DIR/sd1.qcow2",
        "-device",
        if is_safe { "virtio-scsi-pci,id=s0,iothread=io0" } else { "virtio-scsi-pci,id=s0" },
        "-device",
        "scsi-hd,drive=disk1,id=sd1,bus=s0.0",
    ];
    let mut qemu = Qemu::start_with(version, &args, |dir| {
        std::fs::File::create(dir.join("vd0.raw")).unwrap().set_len(6 * MIB + 512).unwrap();
        let image = dir.join("sd1.qcow2");
        run(std::process::Command::new(version.program("qemu-img"))
            .args(["create", "-q", "-f", "qcow2"])
            .arg(image)
            .arg("5M"));
    });
    qemu.qmp("cont", json!({}));
    for node in ["disk0", "disk1"] {
        qemu.qmp("block-dirty-bitmap-add", json!({"node": node, "name": "livebackup-00000000-since-of-another"}));
        qemu.qmp("block-dirty-bitmap-add", json!({"node": node, "name": "others"}));
    }
    qemu.qmp("blockdev-add", json!({"driver": "null-co", "node-name": "livebackup-00000000-map0"}));
    qemu
}

struct Side<'a> {
    qemu: &'a Qemu,
    transport: &'a str,
    kill_at: Option<&'a str>,
}

impl Side<'_> {
    fn command(&self, args: &[&str]) -> std::process::Output {
        let mut command = livebackup();
        command
            .arg("--state")
            .arg(self.qemu.path("state"))
            .args(["--transport", self.transport])
            .args(args)
            .stdin(std::process::Stdio::null());
        if let Some(point) = self.kill_at {
            command.env("LIVEBACKUP_KILL_AT", point);
        }
        command.output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(args);
        let out = self.command(&all);
        let (text, err) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{args:?}: {}\n{text}\n{err}", out.status);
        if text.trim().is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
        }
    }
}

/// What the guest sees on both disks, read through QEMU's own tools.
fn contents(qemu: &mut Qemu) -> [Vec<u8>; 2] {
    let raw = std::fs::read(qemu.path("vd0.raw")).unwrap();
    let out = qemu.path("sd1.copy");
    let source =
        format!("driver=qcow2,file.driver=file,file.filename={},force-share=on", qemu.path("sd1.qcow2").display());
    // QEMU keeps parts of a qcow2's tables in memory; a flush brings the file up to date.
    qemu.qemu_io(DISKS[1].1, "flush");
    let img = qemu.version.program("qemu-img");
    run(std::process::Command::new(img).args(["convert", "-O", "raw", "--image-opts", &source]).arg(&out));
    [raw, std::fs::read(out).unwrap()]
}

fn scatter(qemu: &mut Qemu, rng: &mut Rng) {
    for (_, path) in DISKS {
        for _ in 0..6 {
            let at = rng.below(5 * MIB / 4096) * 4096;
            qemu.qemu_io(path, &format!("write -P {} {at} {}", 1 + rng.below(255), 4096.min(5 * MIB - at)));
        }
    }
}

fn restored(side: &Side<'_>, repo: &str, point: &str, dir: &Path) -> [Vec<u8>; 2] {
    side.ok(&["restore", repo, &format!("vm1@{point}"), dir.to_str().unwrap(), "--force"]);
    DISKS.map(|(name, _)| std::fs::read(dir.join(format!("{name}.raw"))).unwrap())
}

fn killed_at(version: Version, transport: &str, point: &str, others_server: bool, rng: &mut Rng) {
    let mut qemu = start(version, transport);
    let server = json!({"addr": {"type": "unix", "data": {"path": qemu.path("theirs.sock")}}});
    if others_server {
        qemu.qmp("nbd-server-start", server.clone());
    }
    let source = format!("qmp:{}", qemu.socket().display());
    let repo = qemu.path("repo").to_str().unwrap().to_owned();
    scatter(&mut qemu, rng);
    let first = contents(&mut qemu);
    let side = Side { qemu: &qemu, transport, kill_at: None };
    side.ok(&["init", &repo]);
    let oldest = side.ok(&["backup", &source, &repo])["point"].as_str().expect("a point").to_owned();
    scatter(&mut qemu, rng);

    let out = Side { qemu: &qemu, transport, kill_at: Some(point) }.command(&["backup", &source, &repo]);
    assert_eq!(out.status.signal(), Some(9), "{point} was not reached: {}", String::from_utf8_lossy(&out.stderr));
    assert!(qemu.alive(), "{point}: QEMU died");
    wait_until("the guest to run", || qemu.status() == "running");
    if ["vm.begun", "transfer.sent", "transfer.sent:5"].contains(&point) {
        // Killed in mid-read, and over this transport: the exports are there still.
        let exports = qemu.qmp("query-block-exports", json!({}));
        let kind = if transport == "nbd" { "nbd" } else { "vhost-user-blk" };
        let of_kind = exports.as_array().unwrap().iter().filter(|export| export["type"] == kind).count();
        assert_eq!(of_kind, 2, "{point}: {exports}");
    }
    scatter(&mut qemu, rng);

    let second = contents(&mut qemu);
    let side = Side { qemu: &qemu, transport, kill_at: None };
    let report = side.ok(&["backup", &source, &repo]);
    let tracked = report["disks"].as_array().unwrap().iter().all(|disk| disk["taken"] == "incremental");
    assert!(tracked, "{point}: {report}");
    let dir = qemu.path("restored");
    let latest = restored(&side, &repo, "latest", &dir);
    assert!(latest == second, "{point}: the backup after the kill is not what the guest had");
    assert!(restored(&side, &repo, &oldest, &dir) == first, "{point}: the first point changed");
    side.ok(&["verify", &repo]);

    let ours = |name: &String| name.contains("livebackup-") && !name.contains("livebackup-00000000");
    let nodes: Vec<_> = qemu.nodes().into_iter().filter(ours).collect();
    assert!(nodes.is_empty(), "{point}: {nodes:?} are left");
    assert!(qemu.exports().is_empty(), "{point}");
    assert!(qemu.nodes().iter().any(|n| n == "livebackup-00000000-map0"), "{point}: another's node is gone");
    let bitmaps = qemu.bitmaps();
    assert_eq!(
        bitmaps.iter().filter(|(_, n)| n == "others" || n.contains("of-another")).count(),
        4,
        "{point}: {bitmaps:?}"
    );
    assert_eq!(bitmaps.iter().filter(|(_, n)| ours(n)).count(), 4, "{point}: {bitmaps:?}");
    Side { qemu: &qemu, transport, kill_at: None }.ok(&["detach", &source]);
    assert_eq!(qemu.bitmaps().iter().filter(|(_, n)| ours(n)).count(), 0, "{point}: detach leaves bitmaps");
    assert_eq!(qemu.status(), "running");
    // Theirs is there still, and ours is not.
    assert_eq!(qemu.try_qmp("nbd-server-start", server).is_err(), others_server, "{point}");
}

fn all_points(version: Version) {
    let mut rng = Rng::new();
    for point in POINTS {
        killed_at(version, "vhost", point, false, &mut rng);
    }
}

/// But those of the repository, which knows nothing of transports.
fn all_points_over_nbd(version: Version) {
    let mut rng = Rng::new();
    let first = POINTS.iter().position(|point| *point == FIRST_OF_TRANSPORT).expect("a point of this name");
    for point in POINTS[first..].iter().filter(|point| !point.starts_with("repo.")) {
        killed_at(version, "nbd", point, false, &mut rng);
    }
}

/// Where bitmaps leave QEMU by files.
#[test]
fn killed_beside_another_programs_nbd_server() {
    let mut rng = Rng::new();
    for version in VERSIONS {
        for point in ["harvest.file", "harvest.file:2", "fleece.harvested", "vm.begun"] {
            killed_at(version, "auto", point, true, &mut rng);
        }
    }
}

#[test]
fn killed_anywhere_qemu_10() {
    all_points(Version::V10);
}

#[test]
fn killed_anywhere_qemu_7() {
    all_points(Version::V7);
}

#[test]
fn killed_anywhere_over_nbd_qemu_10() {
    all_points_over_nbd(Version::V10);
}

#[test]
fn killed_anywhere_over_nbd_qemu_7() {
    all_points_over_nbd(Version::V7);
}
