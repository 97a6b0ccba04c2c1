//! `livebackup bench write-overhead`: on real QEMUs of both versions it measures, its guest's disk holds what was written, and
//! nothing is left. What the figures are is nobody's business here.

#![allow(clippy::unwrap_used)]

use crate::common::*;

use std::io::BufRead;
use std::os::unix::fs::FileExt;
use std::process::Stdio;

use serde_json::Value;

use livebackup::overhead::load::{Load, LoadOptions, Workload};
use livebackup::overhead::model::{BLOCK_BYTES, Model};
use livebackup::overhead::rig::{Cache, Rig, RigOptions, WorkDir};

const MIB: u64 = 1 << 20;

/// Whether any process was started with this text among its arguments.
fn runs(text: &str) -> bool {
    let all = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let own = std::process::id().to_string();
    all.filter(|entry| entry.file_name() != own.as_str()).any(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(text)
    })
}

/// Nothing is in the directory, and no QEMU works there.
fn nothing_is_left(dir: &std::path::Path) {
    let left: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
    wait_until("the QEMUs to be gone", || !runs(dir.to_str().unwrap()));
}

fn measure(version: Version) {
    let dir = tempfile::Builder::new().prefix("livebackup-overhead-test-").tempdir().unwrap();
    let [work, out, page, tables] = ["work", "out.json", "page.html", "tables.md"].map(|name| dir.path().join(name));
    std::fs::create_dir(&work).unwrap();
    // `lvm` is in overhead_lvm.rs: this host may have a device-mapper or none.
    let methods = ["none", "bitmap", "fleece", "fleece-other", "qemu-fleece", "overlay", "acknowledged"];
    let mut command = livebackup();
    command.args(["--json", "bench", "write-overhead", "--size", "16M", "--seconds", "1", "--rounds", "2"]);
    command.arg("--qemu").arg(version.program("qemu-system-x86_64")).arg("--dir").arg(&work);
    command.arg("--json-file").arg(&out).arg("--html").arg(&page).arg("--markdown").arg(&tables);
    command.args(methods.iter().flat_map(|method| ["--method", method]));
    command.args(["--workload", "random", "--workload", "database"]);
    let said: Value = serde_json::from_str(&run(&mut command)).unwrap();
    nothing_is_left(&work);

    let written: Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
    assert_eq!(said, written);
    let summaries = said["summaries"].as_array().unwrap();
    assert_eq!(summaries.len(), 2 * methods.len());
    for workload in ["random", "database"] {
        for method in methods {
            let found = summaries.iter().find(|s| s["workload"] == workload && s["method"] == method);
            let found = found.unwrap_or_else(|| panic!("no row of {method}: {said}"));
            // Not where there is no other file system, or half of a disk.
            if ["fleece-other", "acknowledged"].contains(&method) {
                assert!(found["not_measured"].is_string() && found["rounds"] == 0, "{found}");
                continue;
            }
            assert!(found["not_measured"].is_null() && found["rounds"] == 2, "{found}");
            assert_eq!(found["failed_requests"], 0, "{found}");
            for phase in ["before", "during", "after"] {
                assert!(found[phase]["per_second"]["median"].as_f64().unwrap() >= 0.0, "{found}");
            }
        }
    }
    let runs = said["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 2 * 2 * 5);
    for run in runs {
        // In one phase, as short as they are here, a machine with other work may not get to it.
        let operations = |phase: &str| run[phase]["operations"].as_u64().unwrap();
        assert!(operations("before") + operations("during") + operations("after") > 0, "{run}");
        assert!(!run["course"].as_array().unwrap().is_empty(), "{run}");
        if run["method"] == "fleece" {
            assert!(run["backup"]["read_bytes"].as_u64().unwrap() <= 16 * MIB, "{run}");
        }
    }
    let (page, tables) = (std::fs::read_to_string(page).unwrap(), std::fs::read_to_string(tables).unwrap());
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"));
    for method in methods {
        assert!(page.contains(method) && tables.contains(method), "{method}");
    }
    assert_eq!(said["targets"].as_array().unwrap().len(), 5);
}

#[test]
fn methods_are_measured_on_qemu_10() {
    measure(Version::V10);
}

#[test]
fn methods_are_measured_on_qemu_7() {
    measure(Version::V7);
}

/// The guest's part alone: what it says that it wrote is what the disk holds, found with other means than its own.
async fn writes_what_it_says(version: Version, workload: Workload) {
    let dir = tempfile::tempdir().unwrap();
    let work = WorkDir::create(dir.path()).unwrap();
    let blocks = 16 * MIB / BLOCK_BYTES as u64;
    let model = Model::new(1, blocks);
    let image = work.path("disk.raw");
    model.lay_out(&std::fs::File::create(&image).unwrap(), |_| true).unwrap();
    let first = std::fs::read(&image).unwrap();
    let options = RigOptions { qemu: version.program("qemu-system-x86_64"), cache: Cache::Writeback };
    let rig = Rig::start(&work, &options, &image).await.unwrap();
    let guest = LoadOptions {
        socket: work.path("qtest"),
        memory: rig.memory.try_clone().unwrap(),
        depth: 8,
        workload,
        seed: 5,
    };
    let load = Load::start(guest, model).unwrap();
    // A machine that is stopped and goes on, under load.
    rig.monitor.raw("stop", serde_json::json!({})).await.unwrap();
    rig.monitor.raw("cont", serde_json::json!({})).await.unwrap();
    load.hold(true).await.unwrap();
    let held = std::fs::read(&image).unwrap();
    assert!(held == std::fs::read(&image).unwrap(), "it writes while it is held");
    load.stay_below(blocks / 4);
    load.hold(false).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let loaded = load.stop().await.unwrap();
    rig.end().await.unwrap();

    let last = std::fs::read(&image).unwrap();
    assert_eq!((loaded.failed, loaded.model.blocks()), (0, blocks));
    assert!(held[held.len() / 4..] == last[last.len() / 4..], "it wrote past where it was to stay below");
    // Each block says which it is, and how often it was written: as often in all as there were writes.
    let (mut writes, mut changed) = (0, 0);
    for (block, bytes) in (0u64..).zip(last.chunks_exact(BLOCK_BYTES)) {
        assert_eq!(bytes[..8], block.to_le_bytes(), "block {block}");
        writes += u64::from_le_bytes(bytes[8..16].try_into().unwrap());
        changed += u64::from(bytes != &first[block as usize * BLOCK_BYTES..][..BLOCK_BYTES]);
    }
    let bytes: u64 = loaded.samples.iter().filter(|s| !s.read).map(|s| u64::from(s.bytes)).sum();
    assert_eq!(writes, bytes / BLOCK_BYTES as u64);
    assert!(changed > 0 && changed <= writes);
    assert_eq!(loaded.samples.iter().any(|s| s.read), workload == Workload::Mixed);

    let file = std::fs::File::options().read(true).write(true).open(&image).unwrap();
    assert_eq!(loaded.model.first_wrong(&file).unwrap(), None);
    let at = 9 * BLOCK_BYTES + 4095;
    file.write_all_at(&[!last[at]], at as u64).unwrap();
    assert_eq!(loaded.model.first_wrong(&file).unwrap(), Some(9));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_load_writes_what_it_says() {
    for version in VERSIONS {
        for workload in Workload::ALL {
            writes_what_it_says(version, workload).await;
        }
    }
}

#[test]
fn an_interrupt_leaves_nothing() {
    let dir = tempfile::Builder::new().prefix("livebackup-overhead-test-").tempdir().unwrap();
    let mut command = livebackup();
    command.args(["bench", "write-overhead", "--size", "16M", "--seconds", "600", "--method", "none"]);
    command.arg("--dir").arg(dir.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    wait_until("QEMU to run", || runs(&format!("{}/livebackup-overhead-", dir.path().display())));
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let said: Vec<_> = std::io::BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{said:?}");
    assert!(said.iter().any(|line| line.contains("interrupted")), "{said:?}");
    nothing_is_left(dir.path());
}

#[test]
fn what_is_wrong_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("qemu-of-nobody");
    for (args, code, words) in [
        (vec!["--workload", "nonsense"], 2, "a workload is one of random"),
        (vec!["--method", "nonsense"], 2, "a method is one of none, bitmap"),
        (vec!["--size", "5M"], 2, "16M to 64G"),
        (vec!["--qemu", missing.to_str().unwrap()], 1, "--qemu PATH"),
        (vec!["--dir", missing.to_str().unwrap()], 1, "cannot use the directory"),
        (vec!["--json-file", "/nowhere/x"], 1, "cannot write /nowhere/x"),
    ] {
        let mut command = livebackup();
        command.args(["bench", "write-overhead", "--rounds", "1"]).args(&args).stdin(Stdio::null());
        let out = command.output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.contains(words), "{args:?}: {said}");
    }
    nothing_is_left(dir.path());
}
