//! Somebody stops the guest and lets it go on, all the time that a backup reads it over NBD (`virsh suspend` and `resume`, as
//! every migration does): the backups succeed, each has the bytes of its instant, no `stop` takes long, and the guest runs.
//!
//! QEMU 7.2 with an I/O thread is missing: nothing reads such a disk over NBD.

#![allow(clippy::unwrap_used)]

use crate::common::*;
use crate::session_fixture::*;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use livebackup::vm::Transport;
use serde_json::json;

/// For how long backups are made.
const LASTS: Duration = Duration::from_secs(8);
/// A `stop` that takes longer has met what no `stop` may meet. A backup gives way after a fraction of it.
const MAY_TAKE: Duration = Duration::from_secs(5);

/// Stops the guest while there is an export of a backup.
struct Stopper {
    over: Arc<AtomicBool>,
    at_work: JoinHandle<(u64, Duration)>,
}

impl Stopper {
    fn start(socket: &Path) -> Stopper {
        let mut qmp = Qmp::connect(socket);
        let over = Arc::new(AtomicBool::new(false));
        let is_over = over.clone();
        let at_work = std::thread::spawn(move || {
            let (mut stops, mut longest) = (0, Duration::ZERO);
            while !is_over.load(Ordering::Relaxed) {
                let exports = qmp.call("query-block-exports", json!({}));
                if exports.as_array().unwrap().is_empty() {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                let start = Instant::now();
                qmp.call("stop", json!({}));
                longest = longest.max(start.elapsed());
                qmp.call("cont", json!({}));
                stops += 1;
            }
            (stops, longest)
        });
        Stopper { over, at_work }
    }

    /// How often the guest was stopped, and how long the longest `stop` took.
    fn end(self) -> (u64, Duration) {
        self.over.store(true, Ordering::Relaxed);
        self.at_work.join().unwrap()
    }
}

async fn stopped_all_the_time(version: Version, (device, path): (&'static str, &'static str)) {
    let case = Case { version, transport: Transport::Nbd, device, path, size: 2 * MIB + 65536 + 512 };
    let mut rng = Rng::new();
    let mut qemu = start_with(&case, &["-qmp", "unix:DIR/stopper,server=on,wait=off"]);
    qemu.qmp("cont", json!({}));
    let vm = attach(&qemu, case.transport).await;
    let stopper = Stopper::start(&qemu.path("stopper"));
    let (start, mut backups) = (Instant::now(), 0);
    let mut image = vec![0; case.size as usize];
    while start.elapsed() < LASTS {
        let write = |qemu: &mut Qemu, rng: &mut Rng| {
            let at = rng.below(case.size / 512 - 256) * 512;
            qemu.qemu_io(path, &format!("write -P {} {at} {}", rng.below(256), (1 + rng.below(256)) * 512));
        };
        write(&mut qemu, &mut rng);
        // Nothing writes between this copy and the instant.
        let expected = std::fs::read(qemu.path("disk0.raw")).unwrap();
        let session = vm.begin(begin(None)).await.unwrap();
        let (_, totals) = apply(session, &mut image, || write(&mut qemu, &mut rng)).await;
        assert!(totals.warnings.is_empty(), "{totals:?}");
        assert!(image == expected, "backup {backups} has not the bytes of its instant");
        vm.idle().await;
        backups += 1;
    }
    let (stops, longest) = stopper.end();
    println!("{version:?} {device}: {backups} backups, {stops} stops, the longest took {longest:?}");
    assert!(stops > 0 && longest < MAY_TAKE, "{stops} stops, the longest took {longest:?}");
    assert_eq!(qemu.status(), "running");
    assert_clean(&mut qemu);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_the_main_loop_of_qemu_10() {
    stopped_all_the_time(Version::V10, VIRTIO).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_an_io_thread_of_qemu_10() {
    stopped_all_the_time(Version::V10, SCSI_IOTHREAD).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_the_main_loop_of_qemu_7() {
    stopped_all_the_time(Version::V7, VIRTIO).await;
}
