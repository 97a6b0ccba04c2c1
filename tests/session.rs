//! Sessions of the sidecar in this process: full, incremental, differential reading of one disk, over both transports and
//! QEMU versions, with and without iothread, while the guest writes. The oracle is a copy of the image taken by the test.

#![allow(clippy::unwrap_used)]

mod common;
use common::*;

use livebackup::machine::Verdict;
use livebackup::units::CheckpointId;
use livebackup::vm::{AttachError, Transport, Vm, VmOptions};
use livebackup::wire::message::{Ack, Begin, Event, FailureCode, Session, Taken, Totals};

const MIB: u64 = 1 << 20;
const CHUNK: u32 = 128 << 10;

struct Case {
    version: Version,
    transport: Transport,
    device: &'static str,
    path: &'static str,
    size: u64,
}

const VIRTIO: (&str, &str) = ("virtio-blk-pci,drive=disk0,id=vd0", "/machine/peripheral/vd0/virtio-backend");
const SCSI_IOTHREAD: (&str, &str) = ("scsi-hd,drive=disk0,id=vd0,bus=s0.0", "/machine/peripheral/vd0");

fn start(case: &Case) -> Qemu {
    let disk =
        "driver=raw,node-name=disk0,discard=unmap,file.driver=file,file.filename=DIR/disk0.raw,file.discard=unmap";
    let scsi = case.device.starts_with("scsi");
    let mut args = vec!["-name", "vm1", "-blockdev", disk];
    if scsi {
        args.extend(["-object", "iothread,id=io0", "-device", "virtio-scsi-pci,id=s0,iothread=io0"]);
    }
    args.extend(["-device", case.device]);
    Qemu::start_with(case.version, &args, |dir| {
        std::fs::File::create(dir.join("disk0.raw")).unwrap().set_len(case.size).unwrap();
    })
}

fn options(qemu: &Qemu, transport: Transport) -> VmOptions {
    VmOptions { state: qemu.path("state"), transport, ..VmOptions::default() }
}

async fn attach(qemu: &Qemu, transport: Transport) -> Vm {
    let address = qemu.socket().to_str().unwrap().parse().unwrap();
    Vm::attach(&address, options(qemu, transport)).await.unwrap()
}

fn begin(since: Option<CheckpointId>) -> Begin {
    Begin {
        vm: "vm1".into(),
        since: since.into_iter().map(|id| ("vd0".to_owned(), id)).collect(),
        chunk_bytes: CHUNK,
        checkpoint: true,
        ..Begin::default()
    }
}

/// Applies a session's events to an image, acknowledging all of it; `meanwhile` runs after every event.
async fn apply(mut session: Session, image: &mut [u8], mut meanwhile: impl FnMut()) -> (CheckpointId, Totals) {
    let mut at = 0;
    loop {
        let event = session.events.recv().await.expect("an event").unwrap();
        let (offset, len) = match &event {
            Event::Data { offset_bytes, bytes, .. } => {
                image[*offset_bytes as usize..][..bytes.len()].copy_from_slice(bytes);
                (*offset_bytes, bytes.len() as u64)
            }
            Event::Zero { extent, .. } => {
                image[extent.offset_bytes as usize..extent.end() as usize].fill(0);
                (extent.offset_bytes, extent.len_bytes)
            }
            Event::Same { .. } => panic!("no digests were given"),
            Event::Sent => continue,
            Event::End(totals) => return (session.begun.disks[0].checkpoint.unwrap(), totals.clone()),
        };
        assert!(offset >= at && offset.is_multiple_of(u64::from(CHUNK)), "events ascend in whole chunks");
        at = offset + len;
        let extents = vec![livebackup::extent::Extent::new(offset, len)];
        let _ = session.acks.send(Ack { disk: 0, extents });
        drop(event);
        meanwhile();
    }
}

/// Nothing of a session is left in QEMU: no node, no export; of bitmaps just the one that records, and the sentinel.
fn assert_clean(qemu: &mut Qemu) {
    let left: Vec<_> = qemu.nodes().into_iter().filter(|n| n.contains("livebackup")).collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(qemu.exports().is_empty());
    let bitmaps = qemu.bitmaps();
    assert_eq!(bitmaps.iter().filter(|(_, name)| name.contains("-since-")).count(), 1, "{bitmaps:?}");
    assert_eq!(bitmaps.iter().filter(|(_, name)| name.contains("sentinel")).count(), 1, "{bitmaps:?}");
    assert_eq!(bitmaps.len(), 2, "{bitmaps:?}");
    let sets = qemu.qmp("query-fdsets", serde_json::json!({}));
    // QEMU 7.2 keeps the descriptors of a guest that does not run.
    assert!(qemu.version == Version::V7 || sets.as_array().unwrap().is_empty(), "{sets}");
}

async fn rounds(case: Case) {
    let mut rng = Rng::new();
    let mut qemu = start(&case);
    let vm = attach(&qemu, case.transport).await;
    let mut image = vec![0; case.size as usize];
    let mut since = None;
    for round in 0..4 {
        let write = |qemu: &mut Qemu, rng: &mut Rng| {
            let at = rng.below(case.size / 512) * 512;
            let len = ((1 + rng.below(256)) * 512).min(case.size - at);
            qemu.qemu_io(case.path, &format!("write -P {} {at} {len}", rng.below(256)));
        };
        for _ in 0..12 {
            write(&mut qemu, &mut rng);
        }
        // Nothing writes between this copy and the instant.
        let expected = std::fs::read(qemu.path("disk0.raw")).unwrap();
        let session = vm.begin(begin(since)).await.unwrap();
        let taken = &session.begun.disks[0].taken;
        assert_eq!(matches!(taken, Taken::Incremental { .. }), round > 0, "{taken:?}");
        if round > 0 {
            assert!(session.begun.disks[0].needed_bytes < case.size, "an incremental reads less than the disk");
        }
        let (checkpoint, totals) = apply(session, &mut image, || write(&mut qemu, &mut rng)).await;
        assert!(totals.warnings.is_empty(), "{totals:?}");
        assert!(image == expected, "round {round}: the image is not that of the instant");
        vm.idle().await;
        assert_clean(&mut qemu);
        since = Some(checkpoint);
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
    qemu.qmp("block-dirty-bitmap-remove", serde_json::json!({"node": node, "name": name}));
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
        qemu.qmp("block_resize", serde_json::json!({"node-name": "disk0", "size": size}));
    }
    let session = vm.begin(begin(Some(second))).await.unwrap();
    assert!(matches!(&session.begun.disks[0].taken, Taken::Full { reason } if reason.contains("smaller and larger")));
    apply(session, &mut image, || ()).await;
    vm.idle().await;
    let status = vm.status().await;
    assert!(status.disks[0].last_end.as_ref().unwrap().contains("smaller and larger"), "{status:?}");
    assert_clean(&mut qemu);
    assert!(!vm.detach().await.unwrap().is_empty());
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
