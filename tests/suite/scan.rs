//! Scans on real QEMUs, in one process and over TCP: after an epoch was broken behind our back, what differs is sent and nothing
//! else; what is damaged in the repository is sent again. The oracle is the image that the test copies, and for the traffic a
//! relay that counts bytes.

#![allow(clippy::unwrap_used)]

use crate::common::*;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

const CHUNK: usize = 128 << 10;
const MIB: u64 = 1 << 20;
const SIZE: u64 = 24 * MIB + 65536 + 512;

/// How the backup reaches the VM.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Here,
    Tcp,
}

/// Forwards TCP connections to a server's unix socket and counts what it sends. Its port is nobody else's from the start.
struct Relay {
    port: u16,
    from_server: Arc<AtomicU64>,
}

impl Relay {
    fn to(server: PathBuf) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let from_server = Arc::new(AtomicU64::new(0));
        let count = from_server.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = UnixStream::connect(&server) else { return };
                let (up, down) = ((client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client));
                let count = count.clone();
                std::thread::spawn(move || forward(up.0, up.1, |to| to.shutdown(Shutdown::Write), |_| ()));
                std::thread::spawn(move || {
                    let count = |n| {
                        count.fetch_add(n, Ordering::SeqCst);
                    };
                    forward(down.0, down.1, |to| to.shutdown(Shutdown::Write), count)
                });
            }
        });
        Relay { port, from_server }
    }
}

/// Carries bytes from one to the other; `end` tells the other that there are no more.
fn forward<T: Write>(mut from: impl Read, mut to: T, end: impl Fn(&T) -> std::io::Result<()>, count: impl Fn(u64)) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        count(n as u64);
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = end(&to);
}

/// A VM with one disk, a repository, and how to reach them.
struct Setting {
    qemu: Qemu,
    server: Option<Child>,
    relay: Option<Relay>,
    source: String,
    repo: String,
    state: PathBuf,
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

impl Setting {
    fn new(version: Version, way: Way, size: u64) -> Setting {
        let disk =
            "driver=raw,node-name=disk0,discard=unmap,file.driver=file,file.filename=DIR/disk0.raw,file.discard=unmap";
        let args = ["-name", "vm1", "-blockdev", disk, "-device", "virtio-blk-pci,drive=disk0,id=vd0"];
        let qemu = Qemu::start_with(version, &args, |dir| {
            std::fs::File::create(dir.join("disk0.raw")).unwrap().set_len(size).unwrap();
        });
        let (state, repo) = (qemu.path("state"), qemu.path("repo").to_str().unwrap().to_owned());
        let monitor = format!("qmp:{}", qemu.socket().display());
        run(livebackup().args(["init", &repo, "--chunk-size", "128K"]));
        let mut this = Setting { qemu, server: None, relay: None, source: monitor.clone(), repo, state };
        if way == Way::Tcp {
            let socket = this.qemu.path("serve.sock");
            let config = this.qemu.path("serve.toml");
            let (listen, state) = (socket.display(), this.state.display());
            let text = format!(
                "listen = \"unix:{listen}\"\nstate = \"{state}\"\n[[vm]]\nmonitor = \"{monitor}\"\nname = \"vm1\"\n"
            );
            std::fs::write(&config, text).unwrap();
            let server = livebackup().arg("serve").arg("--config").arg(config).stdin(Stdio::null()).spawn().unwrap();
            this.server = Some(server);
            wait_until("the server to listen", || UnixStream::connect(&socket).is_ok());
            let relay = Relay::to(socket);
            this.source = format!("livebackup://127.0.0.1:{}/vm1", relay.port);
            this.relay = Some(relay);
        }
        this
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = livebackup();
        command.arg("--json").arg("--state").arg(&self.state).args(args);
        command
    }

    fn json(&self, args: &[&str]) -> Value {
        let text = run(&mut self.command(args));
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    /// A backup; and what the server sent for it.
    fn backup(&self, more: &[&str]) -> (Value, u64) {
        let sent = || self.relay.as_ref().map_or(0, |relay| relay.from_server.load(Ordering::SeqCst));
        let before = sent();
        let report = self.json(&[&["backup", &self.source, &self.repo], more].concat());
        (report, sent() - before)
    }

    fn image(&self) -> Vec<u8> {
        std::fs::read(self.qemu.path("disk0.raw")).unwrap()
    }

    fn restored(&self, point: &str) -> Vec<u8> {
        let dir = self.qemu.path("restored");
        run(&mut self.command(&["restore", &self.repo, &format!("vm1@{point}"), dir.to_str().unwrap(), "--force"]));
        std::fs::read(dir.join("vd0.raw")).unwrap()
    }

    /// Removes our bitmap from QEMU, as somebody else might.
    fn break_tracking(&mut self) {
        let (node, name) = self.qemu.bitmaps().into_iter().find(|(_, name)| name.contains("-since-")).unwrap();
        self.qemu.qmp("block-dirty-bitmap-remove", json!({"node": node, "name": name}));
    }
}

/// Bytes of the chunks in which two images differ.
fn differing(old: &[u8], new: &[u8]) -> u64 {
    old.chunks(CHUNK).zip(new.chunks(CHUNK)).filter(|(a, b)| a != b).map(|(a, _)| a.len() as u64).sum()
}

fn reason(report: &Value) -> &str {
    report["disks"][0]["reason"].as_str().unwrap_or_default()
}

fn sent_bytes(report: &Value) -> u64 {
    report["disks"][0]["read_bytes"].as_u64().unwrap() - report["disks"][0]["same_bytes"].as_u64().unwrap()
}

fn a_broken_epoch(version: Version, way: Way) {
    let mut rng = Rng::new();
    let mut setting = Setting::new(version, way, SIZE);
    for at in 0..SIZE / (64 << 10) {
        // Every fourth is left zero.
        if at % 4 != 3 {
            setting.qemu.write(at << 16, (64 << 10).min(SIZE - (at << 16)), 1 + rng.below(255) as u8);
        }
    }
    let (first, _) = setting.backup(&[]);
    assert_eq!(first["disks"][0]["taken"], "full", "{first}");
    for round in 0..3 {
        let old = setting.image();
        for _ in 0..8 {
            let at = rng.below(SIZE / 512) * 512;
            let len = ((1 + rng.below(200)) * 512).min(SIZE - at);
            // Zeroes too.
            setting.qemu.write(at, len, rng.below(3) as u8 * 77);
        }
        setting.break_tracking();
        let new = setting.image();
        let refused =
            setting.command(&["backup", &setting.source, &setting.repo, "--level", "incremental"]).output().unwrap();
        assert!(!refused.status.success(), "an incremental cannot be had");
        let (report, traffic) = setting.backup(&[]);
        assert_eq!(report["disks"][0]["taken"], "scan", "{report}");
        assert!(reason(&report).contains("somebody removed it"), "{report}");
        assert_eq!(report["disks"][0]["read_bytes"], SIZE);
        let changed = differing(&old, &new);
        assert_eq!(sent_bytes(&report), changed, "round {round}: what differs is sent, and nothing else");
        if way == Way::Tcp {
            // The list, the disks and the report of the session beside the data.
            let most = changed + changed / 50 + 64 * 1024;
            assert!(traffic <= most, "round {round}: {traffic} bytes came for {changed} that differ");
        }
        assert_eq!(report["level"], "incremental");
        assert!(setting.restored("latest") == new, "round {round}");
        let points = setting.json(&["points", &setting.repo]);
        let last = points["points"].as_array().unwrap().last().unwrap();
        assert!(last["scanned"][0].as_str().unwrap().contains("somebody removed it"), "{last}");
        let shown = run(livebackup().args(["show", &setting.repo, "vm1"]));
        assert!(shown.contains("scanned") && shown.contains("somebody removed it"), "{shown}");
    }
    // Tracking goes on from a scan.
    setting.qemu.write(0, 512, 99);
    let (report, _) = setting.backup(&["--level", "incremental", "--audit", "0"]);
    assert_eq!(report["disks"][0]["taken"], "incremental", "{report}");
    assert_eq!(report["disks"][0]["read_bytes"], CHUNK);
    assert!(setting.restored("latest") == setting.image());
    assert!(setting.qemu.alive());
}

#[test]
fn a_broken_epoch_here_10() {
    a_broken_epoch(Version::V10, Way::Here);
}

#[test]
fn a_broken_epoch_here_7() {
    a_broken_epoch(Version::V7, Way::Here);
}

#[test]
fn a_broken_epoch_tcp_10() {
    a_broken_epoch(Version::V10, Way::Tcp);
}

#[test]
fn a_broken_epoch_tcp_7() {
    a_broken_epoch(Version::V7, Way::Tcp);
}

/// Files of packs that hold chunks, or nodes of trees, by the kind in their header.
fn packs(repo: &str, kind: u8) -> Vec<PathBuf> {
    fn all(dir: &Path) -> Vec<PathBuf> {
        let paths = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        paths.flat_map(|path| if path.is_dir() { all(&path) } else { vec![path] }).collect()
    }
    let mut found = all(&Path::new(repo).join("packs"));
    found.retain(|path| std::fs::read(path).unwrap()[10] == kind);
    found
}

/// Turns a bit of the first blob of each of these packs.
fn damage(packs: &[PathBuf]) {
    for path in packs {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[4096 + 20] ^= 4;
        std::fs::write(path, bytes).unwrap();
    }
}

fn verify(setting: &Setting) -> Value {
    let out = setting.command(&["verify", &setting.repo, "vm1"]).output().unwrap();
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {out:?}"))
}

fn heals(kind: u8, way: Way, full: bool) {
    let mut setting = Setting::new(Version::V10, way, SIZE);
    let mut rng = Rng::new();
    for at in 0..SIZE / (64 << 10) {
        setting.qemu.write(at << 16, (64 << 10).min(SIZE - (at << 16)), 1 + rng.below(255) as u8);
    }
    setting.backup(&[]);
    let first = setting.image();
    damage(&packs(&setting.repo, kind));
    let report = verify(&setting);
    assert_eq!(report["intact"], false, "{report}");
    let lost =
        setting.command(&["restore", &setting.repo, "vm1", setting.qemu.path("x").to_str().unwrap()]).output().unwrap();
    assert!(!lost.status.success(), "what is damaged cannot be restored");
    // Of a tree only what is still the same can be made again.
    if kind == 0 {
        setting.qemu.write(5 << 20, 512, 7);
    }
    let report = if full {
        setting.backup(&["--level", "full"]).0
    } else {
        setting.break_tracking();
        let (report, _) = setting.backup(&[]);
        assert_eq!(report["disks"][0]["taken"], "scan");
        // The changed chunk and the damaged one; or all of what the tree's damaged node told of.
        assert_eq!(sent_bytes(&report), if kind == 0 { 2 * CHUNK as u64 } else { SIZE });
        report
    };
    let verified = verify(&setting);
    assert_eq!(verified["intact"], true, "{verified}\n{report}");
    assert!(setting.restored("latest") == setting.image());
    assert!(setting.restored("latest~1") == first, "the damaged point is healed");
    // And what was healed is relied on again.
    let (again, _) = setting.backup(&["--level", "full"]);
    assert_eq!(again["new_bytes"], 0, "{again}");
}

#[test]
fn a_scan_heals_a_damaged_chunk() {
    heals(0, Way::Here, false);
}

#[test]
fn a_scan_heals_a_damaged_chunk_over_tcp() {
    heals(0, Way::Tcp, false);
}

#[test]
fn a_scan_heals_a_damaged_tree() {
    heals(1, Way::Here, false);
}

#[test]
fn a_full_backup_heals_a_damaged_chunk() {
    heals(0, Way::Here, true);
}

#[test]
fn a_full_backup_heals_a_damaged_tree() {
    heals(1, Way::Here, true);
}

/// An incremental finds the tree that it goes on from damaged, and becomes a scan.
fn an_incremental_does_without(way: Way) {
    let mut setting = Setting::new(Version::V10, way, SIZE);
    setting.qemu.write(0, 20 * MIB, 3);
    setting.backup(&[]);
    damage(&packs(&setting.repo, 1));
    setting.qemu.write(5 * MIB, 512, 7);
    // Who asks for nothing else is told.
    let refused = setting.command(&["backup", &setting.source, &setting.repo, "--level", "incremental"]);
    let refused = { refused }.output().unwrap();
    assert_eq!(refused.status.code(), Some(6), "{refused:?}");
    let said = [&refused.stdout[..], &refused.stderr].map(String::from_utf8_lossy).concat();
    assert!(said.contains("vd0") && said.contains("damaged") && said.contains("--level auto"), "{said}");
    setting.qemu.write(6 * MIB, 512, 8);
    let (report, _) = setting.backup(&[]);
    assert_eq!(report["disks"][0]["taken"], "scan", "{report}");
    assert!(report["disks"][0]["reason"].as_str().unwrap().contains("damaged"), "{report}");
    assert!(report["warnings"].to_string().contains("damaged"), "{report}");
    assert!(setting.restored("latest") == setting.image());
    setting.qemu.write(7 * MIB, 512, 9);
    let (report, _) = setting.backup(&["--level", "incremental"]);
    assert_eq!(report["disks"][0]["taken"], "incremental", "{report}");
    assert!(setting.restored("latest") == setting.image());
}

/// A pack that is lost is seen when the backup begins: the incremental becomes a scan, and what was lost is sent again.
fn an_incremental_heals(way: Way, lose: impl FnOnce(&Setting)) {
    let mut setting = Setting::new(Version::V10, way, SIZE);
    let mut rng = Rng::new();
    for at in 0..160 {
        setting.qemu.write(at << 16, 64 << 10, 1 + rng.below(255) as u8);
    }
    setting.backup(&[]);
    lose(&setting);
    setting.qemu.write(5 * MIB, 512, 7);
    let refused =
        setting.command(&["backup", &setting.source, &setting.repo, "--level", "incremental"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(6), "{refused:?}");
    let (report, _) = setting.backup(&[]);
    assert_eq!(report["disks"][0]["taken"], "scan", "{report}");
    assert!(report["disks"][0]["reason"].as_str().unwrap().contains("damaged"), "{report}");
    assert!(report["warnings"].to_string().contains("vd0"), "{report}");
    assert!(setting.restored("latest") == setting.image());
    // What is lost for good with older points keeps nobody from going on.
    setting.qemu.write(6 * MIB, 512, 9);
    let (report, _) = setting.backup(&["--level", "incremental"]);
    assert_eq!(report["disks"][0]["taken"], "incremental", "{report}");
    assert!(setting.restored("latest") == setting.image());
}

#[test]
fn an_incremental_heals_a_missing_pack() {
    an_incremental_heals(Way::Here, |setting| {
        packs(&setting.repo, 0).iter().for_each(|path| std::fs::remove_file(path).unwrap());
    });
}

#[test]
fn an_incremental_heals_a_missing_pack_over_tcp() {
    an_incremental_heals(Way::Tcp, |setting| {
        packs(&setting.repo, 0).iter().for_each(|path| std::fs::remove_file(path).unwrap());
    });
}

#[test]
fn an_incremental_heals_what_a_verification_found() {
    an_incremental_heals(Way::Here, |setting| {
        damage(&packs(&setting.repo, 0));
        verify(setting);
    });
}

#[test]
fn an_incremental_does_without_a_damaged_tree() {
    an_incremental_does_without(Way::Here);
}

#[test]
fn an_incremental_does_without_a_damaged_tree_over_tcp() {
    an_incremental_does_without(Way::Tcp);
}

/// What a damaged node told of is sent, so that the new point is right though the old one is lost.
#[test]
fn a_scan_does_without_a_damaged_tree() {
    let mut setting = Setting::new(Version::V10, Way::Here, SIZE);
    setting.qemu.write(0, 20 * MIB, 3);
    setting.backup(&[]);
    damage(&packs(&setting.repo, 1));
    // Nobody has verified it: the scan finds out by itself.
    setting.qemu.write(5 * MIB, 512, 7);
    setting.break_tracking();
    let (report, _) = setting.backup(&[]);
    assert_eq!(report["disks"][0]["taken"], "scan", "{report}");
    assert!(setting.restored("latest") == setting.image());
}

/// An audit that fails ends the session and its connection; the client comes back by itself.
#[test]
fn a_failed_audit_is_followed_by_a_scan_over_tcp() {
    let mut setting = Setting::new(Version::V10, Way::Tcp, 16 * CHUNK as u64);
    setting.qemu.write(0, 16 * CHUNK as u64, 5);
    setting.backup(&[]);
    let file = std::fs::File::options().write(true).open(setting.qemu.path("disk0.raw")).unwrap();
    file.write_all_at(&[0xee; 512], 9 * CHUNK as u64).unwrap();
    // While it is open for writing, the disk counts as shared.
    drop(file);
    setting.qemu.write(0, 512, 6);
    let (report, _) = setting.backup(&[]);
    assert_eq!(report["disks"][0]["taken"], "scan", "{report}");
    assert!(reason(&report).contains("an audit failed"), "{report}");
    assert_eq!(sent_bytes(&report), 2 * CHUNK as u64);
    assert!(setting.restored("latest") == setting.image());
}

/// A shared medium is never tracked: it is scanned each time.
#[test]
fn a_shared_medium_is_scanned_each_time() {
    let args = [
        "-name",
        "vm1",
        "-blockdev",
        "driver=raw,node-name=disk0,file.driver=file,file.filename=DIR/disk0.raw",
        "-device",
        "virtio-blk-pci,drive=disk0,id=vd0,share-rw=on",
    ];
    let mut qemu = Qemu::start_with(Version::V10, &args, |dir| {
        std::fs::File::create(dir.join("disk0.raw")).unwrap().set_len(4 * MIB).unwrap();
    });
    qemu.write(0, 4 * MIB, 5);
    let (state, repo) = (qemu.path("state"), qemu.path("repo").to_str().unwrap().to_owned());
    let source = format!("qmp:{}", qemu.socket().display());
    run(livebackup().args(["init", &repo, "--chunk-size", "128K"]));
    let setting = Setting { qemu, server: None, relay: None, source, repo, state };
    assert_eq!(setting.backup(&[]).0["disks"][0]["taken"], "full");
    let mut setting = setting;
    setting.qemu.write(MIB, 512, 6);
    let (report, _) = setting.backup(&[]);
    assert_eq!(report["disks"][0]["taken"], "scan", "{report}");
    assert!(reason(&report).contains("shared"), "{report}");
    assert_eq!(sent_bytes(&report), CHUNK as u64);
    assert!(setting.restored("latest") == setting.image());
}

/// A disk is resized between the look at the machine and the instant; a resize while the disk is under the fleece is
/// refused, by whatever name.
fn is_resized_meanwhile(version: Version, way: Way, size: u64, level: &str) {
    let mut setting = Setting::new(version, way, 4 * MIB);
    setting.qemu.write(0, 4 * MIB, 5);
    setting.backup(&[]);
    setting.break_tracking();
    let paths = ["looked", "begun"].map(|name| setting.qemu.path(name));
    // In one process the fleece is opened by what was seen before.
    let looked = if way == Way::Here { "fleece.helper" } else { "backup.looked" };
    let mut backup = setting.command(&["backup", &setting.source, &setting.repo, "--level", level]);
    // The sidecar, too, waits before it reads: its fleece is gone when it has sent all.
    let pauses = format!("{looked}={},vm.begun={}", paths[0].display(), paths[1].display());
    backup.env("LIVEBACKUP_PAUSE_AT", pauses).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let backup = backup.spawn().unwrap();
    wait_until("the client to have looked", || paths[0].with_extension("here").exists());
    setting.qemu.qmp("block_resize", json!({"node-name": "disk0", "size": size}));
    setting.qemu.write(0, 512, 6);
    std::fs::write(&paths[0], "").unwrap();
    if way == Way::Here {
        wait_until("the backup to have begun", || paths[1].with_extension("here").exists());
        let filter = setting.qemu.nodes().into_iter().find(|node| node.ends_with("-cbw0")).unwrap();
        for node in ["disk0", &filter] {
            let refused = setting.qemu.try_qmp("block_resize", json!({"node-name": node, "size": 3 * MIB}));
            let refused = refused.unwrap_err().to_string();
            assert!(refused.contains("livebackup-"), "{refused}");
        }
        std::fs::write(&paths[1], "").unwrap();
    }
    let out = backup.wait_with_output().unwrap();
    let said = [&out.stdout[..], &out.stderr].map(String::from_utf8_lossy).concat();
    assert!(out.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["disks"][0]["taken"], "full", "{report}");
    if way == Way::Here || level == "auto" {
        let warnings = report["warnings"].to_string();
        assert!(warnings.contains("was resized while the backup began"), "{report}");
    }
    assert!(setting.restored("latest") == setting.image());
    setting.qemu.write(512, 512, 7);
    let (report, _) = setting.backup(&[]);
    let taken = if level == "auto" { "incremental" } else { "scan" };
    assert_eq!(report["disks"][0]["taken"], taken, "{report}");
    assert!(setting.restored("latest") == setting.image());
    setting.qemu.qmp("block_resize", json!({"node-name": "disk0", "size": 5 * MIB}));
}

#[test]
fn a_disk_that_is_resized_meanwhile() {
    for version in VERSIONS {
        is_resized_meanwhile(version, Way::Here, 6 * MIB, "auto");
        is_resized_meanwhile(version, Way::Here, 2 * MIB, "copy");
    }
}

#[test]
fn a_disk_that_is_resized_meanwhile_over_tcp() {
    is_resized_meanwhile(Version::V10, Way::Tcp, 2 * MIB, "auto");
    is_resized_meanwhile(Version::V10, Way::Tcp, 6 * MIB, "copy");
}

/// Down and up again: the size is as it was, and what was cut off is zero without anybody having written to it.
#[test]
fn a_disk_that_is_shrunk_and_grown_meanwhile() {
    for version in VERSIONS {
        let mut setting = Setting::new(version, Way::Here, 4 * MIB);
        setting.qemu.write(0, 4 * MIB, 5);
        setting.backup(&[]);
        let here = setting.qemu.path("here-it-is");
        let mut backup = setting.command(&["backup", &setting.source, &setting.repo, "--audit", "0"]);
        backup.env("LIVEBACKUP_PAUSE_AT", format!("fleece.helper={}", here.display()));
        let backup = backup.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        wait_until("the fleece to be prepared", || here.with_extension("here").exists());
        for size in [2 * MIB, 4 * MIB] {
            setting.qemu.qmp("block_resize", json!({"node-name": "disk0", "size": size}));
        }
        std::fs::write(&here, "").unwrap();
        let out = backup.wait_with_output().unwrap();
        let said = [&out.stdout[..], &out.stderr].map(String::from_utf8_lossy).concat();
        assert!(out.status.success() && said.contains("and back again"), "{said}");
        assert!(setting.image()[3 << 20..].iter().all(|byte| *byte == 0));
        assert!(setting.restored("latest") == setting.image());
    }
}

/// A backup was killed, and what livebackup knew is gone: nobody else's is taken out by itself, but by who says so.
#[test]
fn what_a_lost_state_has_left_is_taken_out_on_demand() {
    let mut setting = Setting::new(Version::V10, Way::Here, 4 * MIB);
    setting.qemu.write(0, 4 * MIB, 5);
    setting.backup(&[]);
    let mut killed = setting.command(&["backup", &setting.source, &setting.repo]);
    let out = killed.env("LIVEBACKUP_KILL_AT", "vm.begun").output().unwrap();
    assert!(!out.status.success() && setting.qemu.nodes().iter().any(|node| node.ends_with("-cbw0")));
    std::fs::remove_dir_all(&setting.state).unwrap();
    let out = setting.command(&["backup", &setting.source, &setting.repo]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.code() == Some(4) && said.contains("livebackup detach --all"), "{said}");
    let report = setting.json(&["detach", &setting.source]);
    assert!(report["left"][0].as_str().unwrap().contains("-cbw0"), "{report}");
    let report = setting.json(&["detach", "--all", &setting.source]);
    assert_eq!(report["left"].as_array().unwrap().len(), 0, "{report}");
    assert!(setting.qemu.nodes().iter().all(|node| !node.starts_with("livebackup-")), "{:?}", setting.qemu.nodes());
    assert_eq!((setting.qemu.exports(), setting.qemu.bitmaps()), (vec![], vec![]));
    setting.qemu.write(MIB, 512, 6);
    let (report, _) = setting.backup(&[]);
    assert_eq!(report["disks"][0]["taken"], "scan", "{report}");
    assert!(setting.restored("latest") == setting.image());
}
