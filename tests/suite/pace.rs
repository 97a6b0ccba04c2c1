//! The budget: a backup reads no faster than allowed, slows down when the guest's writes wait for it, and gives way when that
//! does not help. The disk, or the scratch, is behind one of QEMU's throttles, which makes it as slow as the test wants.

#![allow(clippy::unwrap_used)]

use crate::common::slow::SlowFiles;
use crate::common::*;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use livebackup::vm::{Vm, VmOptions};
use livebackup::wire::message::{Begin, Event, Failure, FailureCode, Session};

const MIB: u64 = 1 << 20;
/// Writes in a second of a slow disk.
const SLOW: u32 = 5;
/// What the guest writes again and again: it is there already.
const PATTERN: u8 = 0x11;
const PATH: &str = "/machine/peripheral/vd0/virtio-backend";

/// A disk of so many MiB full of data, behind a throttle that does nothing yet.
fn start(version: Version, mib: u64) -> Qemu {
    let node = "driver=throttle,node-name=disk0,throttle-group=slow,file.driver=raw,file.file.driver=file,file.file.filename=DIR/disk0.raw";
    let mut args = vec!["-name", "vm1", "-object", "throttle-group,id=slow", "-blockdev", node];
    args.extend(["-device", "virtio-blk-pci,id=vd0,drive=disk0"]);
    Qemu::start_with(version, &args, |dir| {
        let mut data = vec![0; (mib * MIB) as usize];
        Rng::seeded(mib).fill(&mut data);
        data[..4096].fill(PATTERN);
        std::fs::write(dir.join("disk0.raw"), data).unwrap();
    })
}

/// Lets the disk do so many writes in a second; 0: as many as it can.
fn throttle(qemu: &mut Qemu, writes: u32) {
    let limits = json!({"iops-write": writes});
    qemu.qmp("qom-set", json!({"path": "/objects/slow", "property": "limits", "value": limits}));
}

/// Writes of the guest, which QEMU accounts for, until it is told to stop: while it is slow, more than the disk can do.
fn keep_writing(qemu: &mut Qemu, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        qemu.qemu_io(PATH, &format!("aio_write -q -P {PATTERN} 0 4k"));
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// How many writes of the guest have ended.
fn ended_writes(qemu: &mut Qemu) -> u64 {
    let all = qemu.qmp("query-blockstats", json!({}));
    let device = all.as_array().unwrap().iter().find(|device| device["qdev"] == PATH).expect("vd0's figures");
    device["stats"]["wr_operations"].as_u64().unwrap()
}

fn backup(qemu: &Qemu, options: &[&str]) -> std::process::Output {
    let (state, repo) = (qemu.path("state"), qemu.path("repo"));
    if !repo.exists() {
        run(livebackup().arg("init").arg(&repo));
    }
    let source = format!("qmp:{}", qemu.socket().display());
    livebackup()
        .arg("--json")
        .arg("--state")
        .arg(state)
        .args(["backup", &source])
        .arg(repo)
        .args(options)
        .output()
        .unwrap()
}

fn restored_equals_the_disk(qemu: &Qemu) {
    run(livebackup().arg("restore").arg(qemu.path("repo")).arg("vm1").arg(qemu.path("restored")));
    let same = std::fs::read(qemu.path("restored/vd0.raw")).unwrap() == std::fs::read(qemu.path("disk0.raw")).unwrap();
    assert!(same, "what was restored is not the disk");
}

#[test]
fn no_more_is_read_in_a_second_than_allowed() {
    let qemu = start(Version::V10, 4);
    let start = Instant::now();
    let done = backup(&qemu, &["--max-read-rate", "1M"]);
    assert!(done.status.success(), "{done:?}");
    // Four pieces of 1 MiB; the first waits for nothing, and a quarter of a second may be caught up.
    assert!(start.elapsed().as_millis() >= 2000, "{:?}", start.elapsed());
    restored_equals_the_disk(&qemu);
    let refused = backup(&qemu, &["--max-read-rate", "1K"]);
    assert!(String::from_utf8_lossy(&refused.stdout).contains("1M is the slowest"), "{refused:?}");
}

#[test]
fn reading_slows_down_for_the_guest() {
    for version in VERSIONS {
        let mut qemu = start(version, 24);
        let (state, repo) = (qemu.path("state"), qemu.path("repo"));
        run(livebackup().arg("init").arg(&repo));
        let source = format!("qmp:{}", qemu.socket().display());
        let mut command = livebackup();
        command.arg("--json").arg("--state").arg(&state).args(["backup", &source]).arg(&repo);
        command.args(["--max-added-write-latency", "150", "--max-read-rate", "3M"]);
        let backup = std::thread::spawn(move || run(&mut command));
        wait_until("the fleece", || qemu.nodes().iter().any(|node| node.ends_with("-snap0")) || backup.is_finished());
        // The guest's writes wait for some looks, and no longer.
        throttle(&mut qemu, SLOW);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| keep_writing(&mut qemu, &stop));
            std::thread::sleep(Duration::from_secs(3));
            stop.store(true, Ordering::Relaxed);
        });
        throttle(&mut qemu, 0);
        let report = backup.join().unwrap();
        assert!(report.contains("held down to"), "{report}");
        restored_equals_the_disk(&qemu);
    }
}

async fn gives_way(version: Version) {
    let mut qemu = start(version, 64);
    let address = qemu.socket().to_str().unwrap().parse().unwrap();
    let vm = Vm::attach(&address, VmOptions { state: qemu.path("state"), ..VmOptions::default() }).await.unwrap();
    let mut begin = Begin { vm: "vm1".into(), chunk_bytes: 64 << 10, checkpoint: true, ..Begin::default() };
    begin.budget.max_added_write_latency_ms = Some(5);
    let mut session = vm.begin(begin.clone()).await.unwrap();
    // The disk itself is slow now, whoever reads.
    throttle(&mut qemu, SLOW);
    let stop = Arc::new(AtomicBool::new(false));
    let until = stop.clone();
    let writing = tokio::task::spawn_blocking(move || {
        keep_writing(&mut qemu, &until);
        throttle(&mut qemu, 0);
        qemu
    });
    let failure = failure_of(&mut session).await;
    stop.store(true, Ordering::Relaxed);
    let mut qemu = writing.await.unwrap();
    let failure = failure.expect("the backup gives way before it is over");
    assert_eq!(failure.code, FailureCode::GaveWay, "{failure}");
    assert!(failure.message.contains("budget is 5 ms"), "{failure}");
    vm.idle().await;
    assert!(qemu.alive() && !qemu.nodes().iter().any(|node| node.starts_with("livebackup-")), "the fleece is gone");
    // The next backup goes through.
    let mut session = vm.begin(begin).await.unwrap();
    while !matches!(session.events.recv().await.expect("an event").unwrap(), Event::End(_)) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_gives_way_to_the_guest_qemu_10() {
    gives_way(Version::V10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_gives_way_to_the_guest_qemu_7() {
    gives_way(Version::V7).await;
}

/// The same of the command: it ends with the code for that, or begins anew by itself and uses what it has.
#[test]
fn a_backup_that_gave_way_begins_anew() {
    let mut qemu = start(Version::V10, 64);
    let (state, repo, log) = (qemu.path("state"), qemu.path("repo"), qemu.path("backup.log"));
    run(livebackup().arg("init").arg(&repo));
    let source = format!("qmp:{}", qemu.socket().display());
    let backup = |qemu: &mut Qemu, retry: &str| {
        let mut command = livebackup();
        command.arg("--json").arg("--state").arg(&state).args(["backup", &source]).arg(&repo);
        command.args(["--max-added-write-latency", "5", "--max-read-rate", "8M", "--retry-after", retry]);
        command.stdout(std::process::Stdio::piped()).stderr(std::fs::File::create(&log).unwrap());
        let mut backup = command.spawn().unwrap();
        wait_until("the fleece", || qemu.nodes().iter().any(|node| node.ends_with("-snap0")));
        throttle(qemu, SLOW);
        let stop = AtomicBool::new(false);
        let gave_way = std::thread::scope(|scope| {
            scope.spawn(|| keep_writing(qemu, &stop));
            let start = Instant::now();
            let mut gave_way = || {
                let told = std::fs::read_to_string(&log).unwrap().contains("gave way");
                told || backup.try_wait().unwrap().is_some()
            };
            while !gave_way() && start.elapsed() < Duration::from_secs(60) {
                std::thread::sleep(Duration::from_millis(50));
            }
            stop.store(true, Ordering::Relaxed);
            gave_way()
        });
        assert!(gave_way, "the backup gives way before it is over");
        throttle(qemu, 0);
        backup.wait_with_output().unwrap()
    };
    let ended = backup(&mut qemu, "0");
    assert_eq!(ended.status.code(), Some(4), "{ended:?}");
    let done = backup(&mut qemu, "2");
    assert!(done.status.success(), "{done:?}");
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert!(report["warnings"].to_string().contains("begun anew after 2 s"), "{report}");
    let disk = &report["disks"][0];
    assert!(disk["stored_bytes"].as_u64().unwrap() < 60 * MIB, "what was stored before is used: {report}");
    restored_equals_the_disk(&qemu);
}

/// How a session fails under a client that takes its time, so that it is not over before; nothing where all was sent.
async fn failure_of(session: &mut Session) -> Option<Failure> {
    loop {
        match session.events.recv().await.expect("an event") {
            Ok(Event::Sent | Event::End(_)) => return None,
            Ok(_) => tokio::time::sleep(Duration::from_secs(3)).await,
            Err(failure) => return Some(failure),
        }
    }
}

/// The scratch's device gets slow, and each write of the guest to a place that was not copied yet waits for it.
async fn gives_way_for_its_scratch(version: Version) {
    const DISK_MIB: u64 = 64;
    const CLUSTER: u64 = 64 << 10;
    /// Writes in a second of the scratch's device. The guest's next write waits for the one before, so that each is slow
    /// (how slow is up to what else the file system writes), and none so slow that QEMU gives the copy up.
    const SCRATCH: u32 = 8;
    let mut qemu = start(version, DISK_MIB);
    let mut files = SlowFiles::new(600);
    let address = qemu.socket().to_str().unwrap().parse().unwrap();
    let options = VmOptions { state: qemu.path("state"), scratch: Some(files.mount.clone()), ..VmOptions::default() };
    let vm = Vm::attach(&address, options).await.unwrap();
    let mut begin = Begin { vm: "vm1".into(), chunk_bytes: 64 << 10, checkpoint: true, ..Begin::default() };
    begin.budget.max_added_write_latency_ms = Some(5);
    let mut session = vm.begin(begin.clone()).await.unwrap();
    files.throttle(SCRATCH);
    let stop = Arc::new(AtomicBool::new(false));
    let until = stop.clone();
    // From the end on, where nothing is read yet: a cluster each.
    let writing = tokio::task::spawn_blocking(move || {
        let before = ended_writes(&mut qemu);
        let mut written = vec![];
        for cluster in (1..DISK_MIB * MIB / CLUSTER).rev().take_while(|_| !until.load(Ordering::Relaxed)) {
            qemu.qemu_io(PATH, &format!("aio_write -q -P {PATTERN} {} 4k", cluster * CLUSTER));
            written.push(cluster * CLUSTER);
            wait_until("the guest's write", || ended_writes(&mut qemu) == before + written.len() as u64);
        }
        (qemu, written)
    });
    let failure = failure_of(&mut session).await;
    stop.store(true, Ordering::Relaxed);
    let (mut qemu, written) = writing.await.unwrap();
    let failure = failure.expect("the backup gives way before it is over");
    assert_eq!(failure.code, FailureCode::GaveWay, "{failure}");
    assert!(failure.message.contains("--scratch on a faster file system"), "{failure}");
    vm.idle().await;
    assert!(qemu.alive() && !qemu.nodes().iter().any(|node| node.starts_with("livebackup-")), "the fleece is gone");
    let image = std::fs::read(qemu.path("disk0.raw")).unwrap();
    let missing = written.iter().filter(|at| image[**at as usize..][..4096] != [PATTERN; 4096]);
    assert_eq!(missing.count(), 0, "the guest's writes are all there");
    // With the scratch as it should be the next backup goes through.
    files.throttle(0);
    let mut session = vm.begin(begin).await.unwrap();
    let mut read = vec![0; image.len()];
    loop {
        match session.events.recv().await.expect("an event").unwrap() {
            Event::Data { offset_bytes, bytes, .. } => {
                read[offset_bytes as usize..][..bytes.len()].copy_from_slice(&bytes)
            }
            Event::End(_) => break,
            _ => {}
        }
    }
    assert!(read == image, "what was read is not the disk");
    vm.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_with_a_slow_scratch_gives_way_to_the_guest_qemu_10() {
    gives_way_for_its_scratch(Version::V10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_with_a_slow_scratch_gives_way_to_the_guest_qemu_7() {
    gives_way_for_its_scratch(Version::V7).await;
}
