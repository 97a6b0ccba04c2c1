//! Audits on real QEMUs: what nobody is said to have written is confirmed by and by, and a write behind QEMU's back is found.
//! The oracle is the image, which the test writes to itself.

#![allow(clippy::unwrap_used)]

use crate::common::*;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Stdio;

use serde_json::Value;

const CHUNK: u64 = 128 << 10;

struct Setting {
    qemu: Qemu,
    source: String,
    repo: String,
    state: PathBuf,
}

impl Setting {
    /// A VM with a disk of so many chunks, none of them zero.
    fn new(version: Version, chunks: u64) -> Setting {
        let disk = "driver=raw,node-name=disk0,file.driver=file,file.filename=DIR/disk0.raw,file.cache.direct=off";
        let args = ["-name", "vm1", "-blockdev", disk, "-device", "virtio-blk-pci,drive=disk0,id=vd0"];
        let qemu = Qemu::start_with(version, &args, |dir| {
            std::fs::write(dir.join("disk0.raw"), vec![0x11; (chunks * CHUNK) as usize]).unwrap();
        });
        let (state, repo) = (qemu.path("state"), qemu.path("repo").to_str().unwrap().to_owned());
        let source = format!("qmp:{}", qemu.socket().display());
        run(livebackup().args(["init", &repo, "--chunk-size", "128K"]));
        Setting { qemu, source, repo, state }
    }

    fn json(&self, args: &[&str]) -> Value {
        let text = run(livebackup().arg("--json").arg("--state").arg(&self.state).args(args));
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    fn backup(&self, more: &[&str]) -> Value {
        self.json(&[&["backup", &self.source, &self.repo], more].concat())
    }

    fn image(&self) -> Vec<u8> {
        std::fs::read(self.qemu.path("disk0.raw")).unwrap()
    }

    fn restored(&self, point: &str) -> Vec<u8> {
        let dir = self.qemu.path("restored");
        let restore = ["restore", &self.repo, &format!("vm1@{point}"), dir.to_str().unwrap(), "--force"];
        run(livebackup().arg("--state").arg(&self.state).args(restore));
        std::fs::read(dir.join("vd0.raw")).unwrap()
    }

    /// Writes to the image while QEMU has it open, and QEMU does not know.
    fn corrupt(&self, chunk: u64) {
        let file = std::fs::File::options().write(true).open(self.qemu.path("disk0.raw")).unwrap();
        file.write_all_at(&[0xee; 512], chunk * CHUNK + 4096).unwrap();
    }

    fn suspects(&self) -> Vec<bool> {
        let points = self.json(&["points", &self.repo, "vm1"]);
        points["points"].as_array().unwrap().iter().map(|point| point.get("suspect").is_some()).collect()
    }

    /// What `map` says before it serves.
    fn mapped(&self, point: &str) -> Value {
        let mut command = livebackup();
        command.args(["--json", "map", &self.repo, point, "--socket"]).arg(self.qemu.path("map"));
        let mut map = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(map.stdout.take().unwrap()).read_line(&mut line).unwrap();
        map.kill().unwrap();
        map.wait().unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"))
    }

    fn audit(&self) -> Value {
        self.json(&["show", &self.repo, "vm1"])["disks"][0]["audit"].clone()
    }
}

#[test]
fn every_chunk_has_its_turn() {
    for version in VERSIONS {
        // At a share of nothing to speak of, 16 chunks at a time.
        let mut setting = Setting::new(version, 40);
        let first = setting.backup(&[]);
        assert_eq!(first["disks"][0]["same_bytes"], 0, "{first}");
        let mut confirmed = 0;
        for run_number in 1..=2u64 {
            setting.qemu.write(3 * CHUNK, 512, run_number as u8);
            let report = setting.backup(&["--level", "incremental"]);
            let same = report["disks"][0]["same_bytes"].as_u64().unwrap();
            // All that were looked at, but for the written one if it had its turn.
            assert!([15, 16].contains(&(same / CHUNK)) && same.is_multiple_of(CHUNK), "{report}");
            assert_eq!(report["disks"][0]["read_bytes"].as_u64().unwrap(), same + CHUNK, "{report}");
            confirmed += same / CHUNK;
            let audit = setting.audit();
            assert_eq!((audit["position"].as_u64(), audit["runs"].as_u64()), (Some(16 * run_number), Some(run_number)));
            assert_eq!(audit["confirmed_chunks"], confirmed);
            let shown = run(livebackup().args(["show", &setting.repo, "vm1"]));
            let percent = 1600 * run_number / 40;
            let runs = if run_number == 1 { "1 run;" } else { "2 runs;" };
            assert!(shown.contains(&format!("{percent} % of the chunks confirmed in {runs}")), "{shown}");
        }
        let trusted = setting.audit()["trusted"].clone();
        // The round ends: all was right at its start, and the next begins.
        setting.backup(&["--level", "incremental"]);
        let audit = setting.audit();
        assert_eq!((audit["position"].as_u64(), &audit["trusted"]), (Some(0), &trusted));
        // None is asked for, and none is had.
        let report = setting.backup(&["--level", "incremental", "--audit", "0"]);
        assert_eq!(report["disks"][0]["same_bytes"], 0);
        assert!(setting.restored("latest") == setting.image());
        assert_eq!(setting.suspects(), [false; 5]);
    }
}

/// Differentials go on from one full point, and yet each looks at other chunks than the one before.
#[test]
fn differentials_get_round_too() {
    let mut setting = Setting::new(Version::V10, 40);
    setting.backup(&[]);
    for (run_number, position) in [(1, 16), (2, 32)] {
        setting.qemu.write(3 * CHUNK, 512, run_number);
        setting.backup(&["--level", "differential"]);
        let audit = setting.audit();
        assert_eq!((audit["position"].as_u64(), audit["runs"].as_u64()), (Some(position), Some(run_number.into())));
    }
    // A write behind QEMU's back is found by the end of the next round.
    setting.corrupt(0);
    let found = (0..4).any(|_| setting.backup(&["--level", "differential"])["disks"][0]["taken"] == "scan");
    assert!(found, "all chunks had their turn");
    assert!(setting.restored("latest") == setting.image());
}

#[test]
fn a_write_behind_qemus_back_is_found_scanned_and_told() {
    for version in VERSIONS {
        // So small a disk is looked at as a whole.
        let mut setting = Setting::new(version, 16);
        setting.backup(&[]);
        setting.qemu.write(2 * CHUNK, 512, 9);
        setting.backup(&["--level", "incremental"]);
        assert!(setting.restored("latest") == setting.image());
        setting.corrupt(7);
        // What misses it: no audit. The point is wrong, and nobody knows.
        setting.qemu.write(0, 512, 8);
        setting.backup(&["--level", "incremental", "--audit", "0"]);
        assert!(setting.restored("latest") != setting.image(), "the image was changed behind QEMU's back");
        // An incremental and nothing else is refused, and then tracking has ended.
        setting.qemu.write(5 * CHUNK, 512, 7);
        let before = setting.suspects();
        assert_eq!(before, [false; 3]);
        let report = setting.backup(&[]);
        assert_eq!(report["disks"][0]["taken"], "scan", "{report}");
        let reason = report["disks"][0]["reason"].as_str().unwrap();
        assert!(reason.contains("audit") && reason.contains(&format!("{}..{}", 7 * CHUNK, 8 * CHUNK)), "{reason}");
        let warnings = report["warnings"].to_string();
        assert!(warnings.contains("2 restore points of the VM are marked as suspect"), "{warnings}");
        assert!(setting.restored("latest") == setting.image(), "the scan brought what was missed");
        // The full one and the scan are right; what rests on tracking is not to be believed.
        assert_eq!(setting.suspects(), [false, true, true, false]);
        let points = run(livebackup().args(["points", &setting.repo]));
        assert_eq!(points.matches("SUSPECT").count(), 2, "{points}");
        let shown = run(livebackup().args(["show", &setting.repo, "vm1@latest~1"]));
        assert!(shown.contains("SUSPECT: vd0:"), "{shown}");
        for (point, suspect) in [("vm1@latest~1", true), ("vm1", false)] {
            let dir = setting.qemu.path(&format!("suspect-{suspect}"));
            let restored = setting.json(&["restore", &setting.repo, point, dir.to_str().unwrap()]);
            for said in [restored, setting.mapped(point)] {
                assert_eq!(said["suspect"].as_str().is_some_and(|words| words.starts_with("vd0:")), suspect, "{said}");
            }
        }
        let verified = setting.json(&["verify", &setting.repo]);
        assert_eq!((&verified["intact"], verified["suspect"].as_array().unwrap().len()), (&true.into(), 2));
        let status = setting.json(&["status", &setting.source]);
        assert!(status.to_string().contains("behind QEMU's back"), "{status}");
        // Tracking goes on.
        setting.qemu.write(CHUNK, 512, 3);
        assert_eq!(setting.backup(&["--level", "incremental"])["disks"][0]["taken"], "incremental");
        assert!(setting.restored("latest") == setting.image());
        assert_eq!(setting.suspects().last(), Some(&false));
        assert!(setting.qemu.alive());
        assert!(setting.qemu.nodes().iter().all(|node| !node.contains("livebackup")));
    }
}

#[test]
fn who_asks_for_an_incremental_only_gets_the_failure() {
    let setting = Setting::new(Version::V10, 16);
    setting.backup(&[]);
    setting.backup(&["--level", "incremental"]);
    setting.corrupt(3);
    let mut command = livebackup();
    command.arg("--state").arg(&setting.state).args([
        "backup",
        &setting.source,
        &setting.repo,
        "--level",
        "incremental",
    ]);
    let out = command.output().unwrap();
    assert!(!out.status.success());
    assert!(String::from_utf8_lossy(&out.stderr).contains("behind QEMU's back"), "{out:?}");
    assert_eq!(setting.suspects(), [false, true]);
    let report = setting.backup(&[]);
    assert_eq!(report["disks"][0]["taken"], "scan", "{report}");
    assert!(setting.restored("latest") == setting.image());
}
