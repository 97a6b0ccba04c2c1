//! The vhost-user-blk source against real QEMUs of both versions, with and without I/O threads.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::common::*;
use crate::vhost_fixture::*;
use futures_util::StreamExt;
use futures_util::future::join_all;
use livebackup::block::{BlockSource, SourceError, SourceRules};
use livebackup::extent::Extent;
use livebackup::vhost::{StillHeld, VhostError, VhostSource};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

/// A multiple of 512 but not of a granule.
const ODD_SIZE: u64 = 24 * MIB + 37 * 512;

fn each(test: impl Fn(Version, Device)) {
    for version in VERSIONS {
        for device in DEVICES {
            println!("{version:?} {device:?}");
            test(version, device);
        }
    }
}

fn signal(qemu: &Qemu, signal: Signal) {
    kill(Pid::from_raw(qemu.pid() as i32), signal).unwrap();
}

#[test]
fn the_whole_snapshot_is_exact_while_the_guest_writes() {
    each(|version, device| {
        let mut rng = Rng::new();
        let mut fleece = Fleece::open(version, device, ODD_SIZE);
        let source = fleece.connect();
        assert_eq!(source.size_bytes(), ODD_SIZE);
        let bytes = fleece.bytes.clone();
        let done = AtomicBool::new(false);
        let writes = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut rng = Rng::seeded(7);
                while !done.load(Ordering::Relaxed) {
                    fleece.write_somewhere(&mut rng);
                    writes.fetch_add(1, Ordering::Relaxed);
                }
            });
            block_on(async {
                for len in [MIB, 256 * KIB, 64 * KIB, MIB] {
                    expect_whole(&source, &bytes, len).await;
                }
                // Any length at any offset, the last byte of the disk included.
                let odd = (0..400).map(|i| {
                    let len = 1 + rng.below(if i % 4 == 0 { MIB } else { 70_000 });
                    let offset = if i % 10 == 0 { ODD_SIZE - len } else { rng.below(ODD_SIZE - len + 1) };
                    Extent::new(offset, len)
                });
                let source = &source;
                let reads = odd.map(|e| async move { (e, source.read(e).await.unwrap()) });
                futures_util::stream::iter(reads)
                    .buffer_unordered(32)
                    .for_each(|(e, got)| {
                        expect(&got, &bytes, e);
                        async {}
                    })
                    .await;
                // However slow the guest is.
                while writes.load(Ordering::Relaxed) <= 20 && !writer.is_finished() {
                    expect_whole(source, &bytes, MIB).await;
                }
            });
            done.store(true, Ordering::Relaxed);
            writer.join().unwrap();
        });
        block_on(source.close()).unwrap();
        fleece.take_down();
    });
}

#[test]
fn reads_outside_the_disk_or_too_long_are_refused_by_us() {
    let fleece = Fleece::open(Version::V10, Device::Blk, ODD_SIZE);
    let source = fleece.connect();
    block_on(async {
        for (offset, len) in [(ODD_SIZE, 1), (ODD_SIZE - 1, 2), (0, MIB + 1), (u64::MAX, 0), (u64::MAX - 3, 3)] {
            let extent = Extent { offset_bytes: offset, len_bytes: len };
            let error = source.read(extent).await.unwrap_err();
            assert!(matches!(error, SourceError::OutOfBounds { .. }), "{extent}: {error}");
        }
        assert!(source.read(Extent::new(ODD_SIZE, 0)).await.unwrap().is_empty());
        assert_eq!(source.read(Extent::new(0, MIB)).await.unwrap().len() as u64, MIB);
    });
}

#[test]
fn many_reads_at_once_and_buffers_that_outlive_the_source() {
    each(|version, device| {
        let fleece = Fleece::open(version, device, ODD_SIZE);
        let source = fleece.connect();
        let (offsets, kept): (Vec<_>, Vec<_>) = block_on(async {
            // Far more than fit into memory or ring at once.
            let all = (0..3000u64).map(|i| {
                let extent = Extent::new(i * 7919 * 512 % (ODD_SIZE - 20 * KIB), 1 + i * 13 % (20 * KIB));
                let (source, bytes) = (&source, &fleece.bytes);
                async move { expect(&source.read(extent).await.unwrap(), bytes, extent) }
            });
            join_all(all).await;
            let held = join_all((0..8).map(|i| source.read(Extent::new(i * MIB, MIB)))).await;
            // All memory is lent out: the next one waits until one comes back.
            let mut next = source.read(Extent::new(9 * MIB, MIB));
            assert!(tokio::time::timeout(Duration::from_millis(50), &mut next).await.is_err());
            let mut held: Vec<_> = held.into_iter().map(Result::unwrap).enumerate().collect();
            drop(held.remove(3));
            expect(&next.await.unwrap(), &fleece.bytes, Extent::new(9 * MIB, MIB));
            held.into_iter().unzip()
        });
        block_on(source.close()).unwrap();
        let bytes = fleece.bytes.clone();
        fleece.qemu.kill();
        for (i, got) in offsets.iter().zip(kept) {
            expect(&got, &bytes, Extent::new(*i as u64 * MIB, MIB));
        }
    });
}

#[test]
fn cancelled_reads_give_their_memory_back_only_when_qemu_is_done() {
    each(|version, device| {
        let fleece = Fleece::open(version, device, ODD_SIZE);
        let rules = SourceRules { in_flight_bytes: 3 * MIB, ..fleece.rules() };
        let source = VhostSource::connect(&fleece.socket(), ODD_SIZE, rules).unwrap();
        let mut rng = Rng::new();
        block_on(async {
            for _ in 0..300 {
                let lost: Vec<_> = (0..4)
                    .map(|_| {
                        source.read(Extent::new(rng.below((ODD_SIZE - MIB) / 512) * 512, 512 + rng.below(MIB - 512)))
                    })
                    .collect();
                // Some are never polled, some are in the ring, some are done.
                let wait = Duration::from_micros(rng.below(300));
                let _ = tokio::time::timeout(wait, join_all(lost)).await;
                // A read now must not be written over by one that was given up.
                let extent = Extent::new(rng.below((ODD_SIZE - MIB) / 512) * 512, MIB);
                let got = source.read(extent).await.unwrap();
                tokio::time::sleep(Duration::from_micros(rng.below(200))).await;
                expect(&got, &fleece.bytes, extent);
            }
            expect_whole(&source, &fleece.bytes, MIB).await;
        });
    });
}

#[test]
fn a_discarded_part_is_not_copied_any_more_and_cannot_be_read() {
    each(|version, device| {
        let mut fleece = Fleece::open(version, device, ODD_SIZE);
        let source = fleece.connect();
        let granule = 64 * KIB;
        block_on(async {
            let last_granule = ODD_SIZE / granule * granule;
            for (offset, len) in [
                (512, granule),
                (0, granule + 512),
                (0, 17 * MIB),
                (last_granule, granule),
                (last_granule, ODD_SIZE - last_granule),
                (u64::MAX - 65535, granule),
            ] {
                let extent = Extent { offset_bytes: offset, len_bytes: len };
                let error = source.discard(extent).await.unwrap_err();
                assert!(matches!(error, SourceError::OutOfBounds { .. }), "{extent}: {error}");
            }
            source.discard(Extent::new(4 * MIB, 16 * MIB)).await.unwrap();
            source.discard(Extent::new(last_granule - granule, granule)).await.unwrap();
        });
        let before = fleece.scratch_bytes();
        fleece.write(4 * MIB, 16 * MIB, 0x11);
        assert_eq!(fleece.scratch_bytes(), before, "a discarded part was copied");
        fleece.write(0, MIB, 0x22);
        assert!(fleece.scratch_bytes() >= before + MIB, "what was not discarded is copied");
        block_on(async {
            for (offset, len) in [(4 * MIB, 4096), (20 * MIB - 512, 512), (4 * MIB - 64 * KIB, 128 * KIB)] {
                let error = source.read(Extent::new(offset, len)).await.unwrap_err();
                let SourceError::Refused { what: "read", extent, .. } = error else { panic!("{error}") };
                assert_eq!(extent, Extent::new(offset, len));
            }
            // And the source lives on.
            for extent in [Extent::new(0, MIB), Extent::new(20 * MIB, MIB), Extent::new(ODD_SIZE - 512, 512)] {
                expect(&source.read(extent).await.unwrap(), &fleece.bytes, extent);
            }
        });
        block_on(source.close()).unwrap();
        fleece.take_down();
    });
}

/// Starts reading without an end, does `event` in the middle, and returns the error and how long it took to come.
fn interrupted(fleece: &mut Fleece, event: impl FnOnce(&mut Qemu) + Send) -> (SourceError, Duration) {
    let source = fleece.connect();
    let bytes = fleece.bytes.clone();
    let happened = std::sync::Mutex::new(None);
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(60));
            *happened.lock().unwrap() = Some(Instant::now());
            event(&mut fleece.qemu);
        });
        block_on(async {
            let mut reads = futures_util::stream::iter((0..).map(|i: u64| {
                let extent = Extent::new(i * MIB % (24 * MIB), MIB);
                let source = &source;
                async move { (extent, source.read(extent).await) }
            }))
            .buffered(16);
            loop {
                match reads.next().await.unwrap() {
                    (extent, Ok(got)) => expect(&got, &bytes, extent),
                    (_, Err(error)) => break error,
                }
            }
        })
    });
    let waited = happened.into_inner().unwrap().unwrap().elapsed();
    // All later ones fail the same way, at once.
    let again = block_on(source.read(Extent::new(0, 512))).unwrap_err();
    assert!(matches!(again, SourceError::Gone { .. }), "{again}");
    block_on(source.close()).unwrap();
    (error, waited)
}

#[test]
fn an_export_deleted_hard_in_mid_read_fails_the_reads() {
    each(|version, device| {
        if (version, device) == (Version::V7, Device::ScsiIothread) {
            return; // QEMU's main loop would stop for good: see the next test.
        }
        let mut fleece = Fleece::open(version, device, ODD_SIZE);
        let (error, waited) = interrupted(&mut fleece, |qemu| {
            qemu.qmp("block-export-del", json!({"id": "e0", "mode": "hard"}));
        });
        assert!(matches!(error, SourceError::Gone { .. }), "{error}");
        assert!(waited < Duration::from_secs(60), "it took {waited:?}");
        assert!(fleece.qemu.alive());
        fleece.take_down();
    });
}

/// QEMU 7.2 deadlocks when an export in an I/O thread is deleted while a reader is connected. `close` is what makes it safe.
#[test]
fn after_close_the_export_can_be_deleted_from_any_qemu() {
    each(|version, device| {
        let mut fleece = Fleece::open(version, device, ODD_SIZE);
        for round in 0..15 {
            let source = fleece.connect();
            block_on(async {
                // Reads are under way when it closes.
                let mut reads = join_all((0..16).map(|i| source.read(Extent::new(i * MIB, MIB))));
                let _ = tokio::time::timeout(Duration::from_micros(round * 50), &mut reads).await;
                drop(reads);
                source.close().await.unwrap();
            });
            let mode = if round % 2 == 0 { "hard" } else { "safe" };
            fleece.qemu.qmp("block-export-del", json!({"id": "e0", "mode": mode}));
            let qemu = &mut fleece.qemu;
            wait_until("the export to go", || qemu.exports().is_empty());
            let address = json!({"type": "unix", "path": fleece.socket()});
            fleece.export(address);
        }
        fleece.take_down();
    });
}

#[test]
fn a_qemu_killed_in_mid_read_fails_the_reads() {
    each(|version, device| {
        let mut fleece = Fleece::open(version, device, ODD_SIZE);
        let (error, waited) = interrupted(&mut fleece, |qemu| signal(qemu, Signal::SIGKILL));
        assert!(matches!(error, SourceError::Gone { .. }), "{error}");
        assert!(waited < Duration::from_secs(60), "it took {waited:?}");
    });
}

#[test]
fn an_idle_reader_sees_the_end_too() {
    let mut fleece = Fleece::open(Version::V10, Device::Blk, ODD_SIZE);
    let source = fleece.connect();
    fleece.qemu.qmp("block-export-del", json!({"id": "e0", "mode": "hard"}));
    let error = block_on(source.read(Extent::new(0, 512))).unwrap_err();
    assert!(matches!(error, SourceError::Gone { .. }), "{error}");
    fleece.take_down();
}

#[test]
fn a_stopped_qemu_is_waited_for_but_not_connected_to_for_ever() {
    for version in VERSIONS {
        let fleece = Fleece::open(version, Device::Blk, ODD_SIZE);
        let source = fleece.connect();
        signal(&fleece.qemu, Signal::SIGSTOP);
        block_on(async {
            let mut read = source.read(Extent::new(MIB, MIB));
            assert!(tokio::time::timeout(Duration::from_millis(300), &mut read).await.is_err());
            signal(&fleece.qemu, Signal::SIGCONT);
            expect(&read.await.unwrap(), &fleece.bytes, Extent::new(MIB, MIB));
        });
        // Closing ends even while QEMU is stopped and has a read in hand, and says that QEMU has not let go.
        signal(&fleece.qemu, Signal::SIGSTOP);
        block_on(async {
            let mut read = source.read(Extent::new(2 * MIB, MIB));
            assert!(tokio::time::timeout(Duration::from_millis(50), &mut read).await.is_err());
            drop(read);
            assert_eq!(source.close().await, Err(StillHeld));
        });
        for _ in 0..3 {
            let start = Instant::now();
            let short = Duration::from_millis(200);
            let error = VhostSource::connect_within(short, &fleece.socket(), ODD_SIZE, fleece.rules()).err().unwrap();
            assert!(matches!(error, VhostError::NoAnswer { .. }), "{error}");
            assert!(start.elapsed() < Duration::from_secs(60));
        }
        signal(&fleece.qemu, Signal::SIGCONT);
        block_on(expect_whole(&fleece.connect(), &fleece.bytes, MIB));
    }
}

#[test]
fn one_reader_at_a_time_and_the_size_must_be_right() {
    for version in VERSIONS {
        let fleece = Fleece::open(version, Device::Blk, ODD_SIZE);
        for wrong in [ODD_SIZE - 512, ODD_SIZE + 512, 0] {
            let error = VhostSource::connect(&fleece.socket(), wrong, fleece.rules()).err().unwrap();
            assert!(matches!(error, VhostError::Size { found: ODD_SIZE, .. }), "{error}");
        }
        let error = VhostSource::connect(&fleece.socket(), ODD_SIZE + 1, fleece.rules()).err().unwrap();
        assert!(matches!(error, VhostError::BadSize { .. }), "{error}");
        let first = fleece.connect();
        let short = Duration::from_millis(200);
        let error = VhostSource::connect_within(short, &fleece.socket(), ODD_SIZE, fleece.rules()).err().unwrap();
        assert!(matches!(error, VhostError::NoAnswer { .. }), "{error}");
        block_on(first.read(Extent::new(0, MIB))).unwrap();
        drop(first);
        block_on(expect_whole(&fleece.connect(), &fleece.bytes, MIB));
        let error = VhostSource::connect(&fleece.qemu.path("nobody"), ODD_SIZE, fleece.rules()).err().unwrap();
        assert!(matches!(error, VhostError::Connect { .. }), "{error}");
    }
}

#[test]
fn a_read_only_export_is_read_when_asked_for_and_else_refused_with_a_reason() {
    each(|version, device| {
        let mut fleece = Fleece::without_export(version, device, ODD_SIZE);
        let socket = fleece.socket();
        let address = json!({"type": "unix", "path": socket});
        let export = json!({"id": "e0", "type": "vhost-user-blk", "node-name": "snap", "addr": address});
        fleece.qemu.qmp("block-export-add", export);
        let error = VhostSource::connect(&socket, ODD_SIZE, fleece.rules()).err().unwrap();
        assert!(error.to_string().contains("writable"), "{error}");
        let source = VhostSource::connect_read_only(&socket, ODD_SIZE, fleece.rules()).unwrap();
        block_on(expect_whole(&source, &fleece.bytes, MIB));
        block_on(source.close()).unwrap();
        fleece.take_down();
    });
}

#[test]
fn a_listening_socket_passed_as_a_descriptor() {
    each(|version, device| {
        let fleece = Fleece::without_export(version, device, ODD_SIZE);
        let path = fleece.qemu.path("own.sock");
        let listener = UnixListener::bind(&path).unwrap();
        export_on_fd(&fleece.qemu, &listener);
        drop(listener);
        let source = VhostSource::connect(&path, ODD_SIZE, fleece.rules()).unwrap();
        block_on(expect_whole(&source, &fleece.bytes, 256 * KIB));
        drop(source);
        // A connection that somebody made before the path went away.
        let stream = UnixStream::connect(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let source = VhostSource::over(Duration::from_secs(10), stream, ODD_SIZE, fleece.rules()).unwrap();
        block_on(expect_whole(&source, &fleece.bytes, MIB));
        block_on(source.close()).unwrap();
        fleece.take_down();
    });
}

/// Adds the export with a listening socket that goes over as a descriptor. Such a name belongs to one monitor, so the
/// export is added there too: on the one that is not the test's.
fn export_on_fd(qemu: &Qemu, listener: &UnixListener) {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let monitor = UnixStream::connect(qemu.socket()).unwrap();
    let mut answers = BufReader::new(monitor.try_clone().unwrap()).lines().map(Result::unwrap);
    assert!(answers.next().unwrap().contains("QMP"));
    let mut send = |command: serde_json::Value, fds: &[std::os::fd::RawFd]| {
        let line = command.to_string() + "\n";
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        let iov = [std::io::IoSlice::new(line.as_bytes())];
        sendmsg::<()>(monitor.as_raw_fd(), &iov, control, MsgFlags::empty(), None).unwrap();
        let answer = answers.find(|l| !l.contains("\"event\"")).unwrap();
        assert!(answer.contains("return"), "{line}: {answer}");
    };
    send(json!({"execute": "qmp_capabilities"}), &[]);
    send(json!({"execute": "getfd", "arguments": {"fdname": "lbvu"}}), &[listener.as_raw_fd()]);
    let arguments = json!({"id": "e0", "type": "vhost-user-blk", "node-name": "snap", "writable": true,
        "addr": {"type": "fd", "str": "lbvu"}});
    send(json!({"execute": "block-export-add", "arguments": arguments}), &[]);
}
