//! Sessions of the sidecar in this process: full, incremental, differential reading of one disk, over both transports and
//! QEMU versions, with and without iothread, while the guest writes. The oracle is a copy of the image taken by the test.

#![allow(clippy::unwrap_used)]

use crate::common::*;
use crate::session_fixture::*;

use std::os::unix::fs::FileExt;

use livebackup::machine::{Taken, Verdict};
use livebackup::vm::{AttachError, Transport, Vm};
use livebackup::wire::message::{Begin, Event, FailureCode};
use serde_json::json;

async fn rounds(case: Case) {
    let mut qemu = start(&case);
    rounds_on(&mut qemu, &case).await;
}

async fn rounds_on(qemu: &mut Qemu, case: &Case) {
    let mut rng = Rng::new();
    let vm = attach(qemu, case.transport).await;
    let mut image = vec![0; case.size as usize];
    let (mut first, mut since) = (None, None);
    for round in 0..4 {
        if round == 3 {
            // What was sealed meanwhile is needed again.
            since = first;
        }
        let write = |qemu: &mut Qemu, rng: &mut Rng| {
            let at = rng.below(case.size / 512) * 512;
            let len = ((1 + rng.below(256)) * 512).min(case.size - at);
            qemu.qemu_io(case.path, &format!("write -P {} {at} {len}", rng.below(256)));
        };
        for _ in 0..12 {
            write(qemu, &mut rng);
        }
        // Nothing writes between this copy and the instant.
        let expected = std::fs::read(qemu.path("disk0.raw")).unwrap();
        let session = vm.begin(begin(since)).await.unwrap();
        let taken = &session.begun.disks[0].taken;
        assert_eq!(matches!(taken, Taken::Incremental { .. }), round > 0, "{taken:?}");
        if round > 0 {
            assert!(session.begun.disks[0].needed_bytes < case.size, "an incremental reads less than the disk");
        }
        let (checkpoint, totals) = apply(session, &mut image, || write(qemu, &mut rng)).await;
        assert!(totals.warnings.is_empty(), "{totals:?}");
        assert!(image == expected, "round {round}: the image is not that of the instant");
        vm.idle().await;
        assert_clean(qemu);
        since = Some(checkpoint);
        first = first.or(since);
    }
    assert!(qemu.alive());
}

macro_rules! rounds {
    ($($name:ident: $version:ident $transport:ident $device:ident $size:expr;)+) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            let (device, path) = $device;
            rounds(Case { version: Version::$version, transport: Transport::$transport, device, path, size: $size }).await;
        }
    )+};
}

rounds! {
    vhost_10: V10 Vhost VIRTIO 8 * MIB + 65536 + 512;
    vhost_10_iothread: V10 Vhost SCSI_IOTHREAD 8 * MIB;
    vhost_7: V7 Vhost VIRTIO 8 * MIB + 65536 + 512;
    vhost_7_iothread: V7 Vhost SCSI_IOTHREAD 8 * MIB;
    nbd_10: V10 Nbd VIRTIO 8 * MIB + 65536 + 512;
    nbd_10_iothread: V10 Nbd SCSI_IOTHREAD 8 * MIB;
    nbd_7: V7 Nbd VIRTIO 8 * MIB + 65536 + 512;
}

/// A client of another program's NBD server, connected from now on.
struct Reader {
    child: std::process::Child,
    said: std::sync::mpsc::Receiver<String>,
}

impl Reader {
    fn connect(qemu: &Qemu) -> Reader {
        let address = format!("nbd:unix:{}:exportname=theirs", qemu.path("theirs.sock").display());
        let mut child = std::process::Command::new(qemu.version.program("qemu-io"))
            .args(["-r", "-f", "raw", &address])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let (tell, said) = std::sync::mpsc::channel();
        let out = std::io::BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || std::io::BufRead::lines(out).map_while(Result::ok).try_for_each(|l| tell.send(l)));
        Reader { child, said }
    }

    /// The first MiB of the export has the bytes that the test put there.
    fn reads(&mut self) {
        use std::io::Write;
        self.child.stdin.as_mut().unwrap().write_all(b"read -P 7 0 1M\n").unwrap();
        loop {
            let line = self.said.recv_timeout(std::time::Duration::from_secs(60)).expect("an answer from the server");
            assert!(!line.contains("failed"), "{line}");
            if line.contains("read 1048576/1048576 bytes") {
                return;
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_programs_nbd_server_is_left_alone_and_not_needed() {
    for version in VERSIONS {
        for (device, path) in [VIRTIO, SCSI_IOTHREAD] {
            let case = Case { version, transport: Transport::Auto, device, path, size: 8 * MIB + 65536 + 512 };
            let mut qemu = start(&case);
            std::fs::write(qemu.path("theirs.raw"), vec![7; 1 << 20]).unwrap();
            let node = json!({"driver": "raw", "node-name": "theirs", "file": {"driver": "file", "filename": qemu.path("theirs.raw")}});
            qemu.qmp("blockdev-add", node);
            let socket = json!({"type": "unix", "data": {"path": qemu.path("theirs.sock")}});
            qemu.qmp("nbd-server-start", json!({"addr": socket}));
            qemu.qmp("block-export-add", json!({"type": "nbd", "id": "theirs", "node-name": "theirs"}));
            let mut reader = Reader::connect(&qemu);
            reader.reads();
            rounds_on(&mut qemu, &case).await;
            reader.reads();
            Reader::connect(&qemu).reads();
            assert_eq!(qemu.exports(), ["theirs"]);
            let refused = qemu.try_qmp("nbd-server-start", json!({"addr": socket})).unwrap_err();
            assert!(refused["desc"].as_str().unwrap().contains("already running"), "{refused}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn our_nbd_server_stays_while_another_program_uses_it_and_serves_us_again() {
    let (device, path) = VIRTIO;
    for version in VERSIONS {
        let case = Case { version, transport: Transport::Nbd, device, path, size: 4 * MIB };
        let mut qemu = start(&case);
        qemu.qmp("blockdev-add", json!({"driver": "null-co", "node-name": "theirs"}));
        let start = json!({"addr": {"type": "unix", "data": {"path": qemu.path("theirs.sock")}}});
        let vm = attach(&qemu, case.transport).await;
        for round in 0..4 {
            // More pieces than wait for a client: the session is not over before this one takes them.
            for at in (0..case.size).step_by(256 << 10) {
                qemu.qemu_io(path, &format!("write -P {} {at} 64k", round + 1));
            }
            let session = vm.begin(begin(None)).await.unwrap();
            match round {
                0 => drop(qemu.qmp("block-export-add", json!({"type": "nbd", "id": "theirs", "node-name": "theirs"}))),
                2 => drop(qemu.qmp("block-export-del", json!({"id": "theirs", "mode": "hard"}))),
                _ => {}
            }
            let mut image = vec![9; case.size as usize];
            apply(session, &mut image, || ()).await;
            assert!(image[..65536].iter().all(|byte| *byte == round + 1), "round {round}");
            vm.idle().await;
            let theirs: &[&str] = if round < 2 { &["theirs"] } else { &[] };
            assert_eq!(qemu.exports(), theirs, "round {round}");
            let started = qemu.try_qmp("nbd-server-start", start.clone());
            assert_eq!(started.is_err(), round < 2, "round {round}: {started:?}");
            if started.is_ok() {
                qemu.qmp("nbd-server-stop", json!({}));
            }
        }
        assert!(qemu.alive());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_only_nbd_can_read_waits_for_another_programs_server() {
    let (device, path) = VIRTIO;
    let case = Case { version: Version::V10, transport: Transport::Nbd, device, path, size: MIB };
    let mut qemu = start(&case);
    let socket = json!({"type": "unix", "data": {"path": qemu.path("theirs.sock")}});
    qemu.qmp("nbd-server-start", json!({"addr": socket}));
    let vm = attach(&qemu, case.transport).await;
    let refused = vm.begin(begin(None)).await.unwrap_err();
    assert_eq!(refused.code, FailureCode::Busy);
    assert!(refused.message.contains("nbd-server-stop"), "{refused}");
    assert_no_fleece(&mut qemu);
    qemu.qmp("nbd-server-stop", json!({}));
    let mut image = vec![1; case.size as usize];
    apply(vm.begin(begin(None)).await.unwrap(), &mut image, || ()).await;
    assert!(image.iter().all(|byte| *byte == 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn nbd_with_an_iothread_is_refused_where_it_would_kill_the_guest() {
    let (device, path) = SCSI_IOTHREAD;
    let case = Case { version: Version::V7, transport: Transport::Nbd, device, path, size: MIB };
    let mut qemu = start(&case);
    let vm = attach(&qemu, case.transport).await;
    let refused = vm.begin(begin(None)).await.unwrap_err();
    assert_eq!(refused.code, FailureCode::Qemu);
    assert!(refused.message.contains("iothread"), "{refused}");
    assert!(qemu.alive());
    assert!(!qemu.nodes().iter().any(|n| n.contains("livebackup")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_takes_the_fleece_with_it_and_loses_nothing() {
    for version in VERSIONS {
        let mut qemu = Qemu::start_with(
            version,
            &[
                "-name",
                "vm1",
                "-blockdev",
                "driver=raw,node-name=disk0,file.driver=file,file.filename=DIR/disk0.raw",
                "-device",
                VIRTIO.0,
            ],
            |dir| std::fs::File::create(dir.join("disk0.raw")).unwrap().set_len(32 * MIB).unwrap(),
        );
        let vm = attach(&qemu, Transport::Auto).await;
        assert!(vm.disks().await.unwrap().1.iter().all(|d| d.verdict == Verdict::Protectable));
        let mut image = vec![0; 32 << 20];
        qemu.write(0, 32 * MIB, 1);
        let (first, _) = apply(vm.begin(begin(None)).await.unwrap(), &mut image, || ()).await;
        vm.idle().await;
        qemu.write(MIB, 16 * MIB, 2);
        // This one takes a checkpoint, reads a little and goes.
        let mut session = vm.begin(begin(Some(first))).await.unwrap();
        session.events.recv().await.unwrap().unwrap();
        assert_eq!(vm.begin(begin(Some(first))).await.unwrap_err().code, FailureCode::Busy);
        drop(session);
        vm.idle().await;
        assert_clean(&mut qemu);
        qemu.write(3 * MIB, 65536, 3);
        // A client with the first checkpoint still gets everything since then.
        let session = vm.begin(begin(Some(first))).await.unwrap();
        assert!(matches!(session.begun.disks[0].taken, Taken::Incremental { .. }));
        apply(session, &mut image, || ()).await;
        assert!(image == std::fs::read(qemu.path("disk0.raw")).unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_sidecar_is_told_who_has_the_vm() {
    let (device, path) = VIRTIO;
    let qemu = start(&Case { version: Version::V10, transport: Transport::Auto, device, path, size: MIB });
    let vm = attach(&qemu, Transport::Auto).await;
    let address = qemu.socket().to_str().unwrap().parse().unwrap();
    let mut other = options(&qemu, Transport::Auto);
    other.state = qemu.path("other-state");
    match Vm::attach(&address, other).await {
        Err(AttachError::Failure(failure)) => {
            assert_eq!(failure.code, FailureCode::Busy);
            assert!(failure.message.contains(&std::process::id().to_string()), "{failure}");
        }
        other => panic!("{other:?}"),
    }
    drop(vm);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_epoch_ends_when_the_proof_is_gone_and_says_why() {
    let (device, path) = VIRTIO;
    let case = Case { version: Version::V10, transport: Transport::Auto, device, path, size: 4 * MIB };
    let mut qemu = start(&case);
    let vm = attach(&qemu, case.transport).await;
    let mut image = vec![0; case.size as usize];
    let (first, _) = apply(vm.begin(begin(None)).await.unwrap(), &mut image, || ()).await;
    vm.idle().await;

    // Somebody removes our bitmap.
    let (node, name) = qemu.bitmaps().into_iter().find(|(_, name)| name.contains("-since-")).unwrap();
    qemu.qmp("block-dirty-bitmap-remove", json!({"node": node, "name": name}));
    let strict = Begin { incremental_only: true, ..begin(Some(first)) };
    let refused = vm.begin(strict).await.unwrap_err();
    assert_eq!(refused.code, FailureCode::NotIncremental);
    assert!(refused.message.contains("somebody removed it"), "{refused}");
    let session = vm.begin(begin(Some(first))).await.unwrap();
    assert!(matches!(&session.begun.disks[0].taken, Taken::Full { reason } if reason.contains("somebody removed it")));
    let (second, _) = apply(session, &mut image, || ()).await;
    vm.idle().await;

    // The disk shrinks and grows again: bits are lost, and nothing tells.
    for size in [2 * MIB, 4 * MIB] {
        qemu.qmp("block_resize", json!({"node-name": "disk0", "size": size}));
    }
    let session = vm.begin(begin(Some(second))).await.unwrap();
    assert!(matches!(&session.begun.disks[0].taken, Taken::Full { reason } if reason.contains("smaller and larger")));
    apply(session, &mut image, || ()).await;
    vm.idle().await;
    let status = vm.status().await;
    assert!(status.disks[0].last_end.as_ref().unwrap().contains("smaller and larger"), "{status:?}");
    assert_clean(&mut qemu);
    assert!(!vm.detach(false).await.unwrap().0.is_empty());
    assert!(qemu.bitmaps().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_while_the_fleece_opens_leaves_nothing() {
    let (device, path) = VIRTIO;
    let mut qemu = start(&Case { version: Version::V10, transport: Transport::Auto, device, path, size: 4 * MIB });
    let vm = attach(&qemu, Transport::Auto).await;
    for wait_ms in [0, 5, 20, 60, 100, 150] {
        let gone = tokio::time::timeout(std::time::Duration::from_millis(wait_ms), vm.begin(begin(None))).await;
        drop(gone);
        vm.idle().await;
        assert_clean(&mut qemu);
    }
}

/// Many disks share the memory that reads have: there is room for few at a time, and whoever is ahead must not take it all.
#[tokio::test(flavor = "multi_thread")]
async fn disks_with_little_room_each_are_read_to_their_end() {
    const DISKS: usize = 16;
    const SIZE: usize = 8 << 20;
    // Half of each disk in long reads, half in short ones.
    let byte = |n: usize, at: usize| {
        if at < SIZE / 2 || (at >> 16).is_multiple_of(2) { ((at >> 9) * 31 + n) as u8 | 1 } else { 0 }
    };
    let images: Vec<Vec<u8>> = (0..DISKS).map(|n| (0..SIZE).map(|at| byte(n, at)).collect()).collect();
    // In an I/O thread QEMU 10 may close a reader's connection when a node or an export comes or goes.
    for (transport, iothread) in [(Transport::Vhost, ""), (Transport::Vhost, ",iothread=io0"), (Transport::Nbd, "")] {
        let mut args: Vec<String> = ["-name", "vm1", "-object", "iothread,id=io0"].map(String::from).into();
        for n in 0..DISKS {
            let node = format!("driver=raw,node-name=disk{n},file.driver=file,file.filename=DIR/disk{n}.raw");
            args.extend(["-blockdev".to_owned(), node, "-device".to_owned()]);
            args.push(format!("virtio-blk-pci,drive=disk{n},id=vd{n}{iothread}"));
        }
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let qemu = Qemu::start_with(Version::V10, &args, |dir| {
            for (n, image) in images.iter().enumerate() {
                let file = std::fs::File::create(dir.join(format!("disk{n}.raw"))).unwrap();
                file.set_len(SIZE as u64).unwrap();
                for (at, granule) in image.chunks(1 << 16).enumerate().filter(|(_, granule)| granule[0] != 0) {
                    file.write_all_at(granule, (at as u64) << 16).unwrap();
                }
            }
        });
        let vm = attach(&qemu, transport).await;
        for _ in 0..3 {
            let mut session = vm.begin(begin(None)).await.unwrap();
            let mut found = vec![vec![0; SIZE]; DISKS];
            loop {
                let next = tokio::time::timeout(std::time::Duration::from_secs(120), session.events.recv());
                match next.await.expect("it goes on").expect("an event").unwrap() {
                    Event::Data { disk, offset_bytes, bytes } => {
                        found[usize::from(disk)][offset_bytes as usize..][..bytes.len()].copy_from_slice(&bytes);
                    }
                    Event::End(_) => break,
                    _ => {}
                }
            }
            for (n, disk) in session.begun.disks.iter().enumerate() {
                let image = disk.disk.name.strip_prefix("vd").and_then(|at| at.parse::<usize>().ok()).unwrap();
                assert!(found[n] == images[image], "{}", disk.disk.name);
            }
            vm.idle().await;
        }
    }
}
