//! The block graph of real machines: what is found, how it is called, what is refused, and that our filter can be put
//! where the graph says.

#![allow(clippy::unwrap_used)]

use crate::common::*;

use std::path::Path;
use std::process::Command;

use livebackup::machine::{DiskKind, FoundDisk, Verdict};
use livebackup::monitor::{Address, Monitor};
use livebackup::vm::graph::{self, Answers, Board, Graph, GraphError, Object};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const OURS: &str = "livebackup-0123abcd-";
const FILTER: &str = "livebackup-0123abcd-cbw";

fn on_monitor<T>(qemu: &Qemu, work: impl AsyncFnOnce(Monitor) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let address = Address::Unix(qemu.socket());
        work(Monitor::connect(&address).await.unwrap()).await
    })
}

/// What is found by one who sees the machine for the first time, and likewise by one who has seen it before.
fn discover(qemu: &Qemu) -> Graph {
    on_monitor(qemu, async |monitor| {
        let mut board = Board::default();
        let first = graph::discover(&monitor, OURS, &mut board).await.unwrap();
        assert_eq!(graph::discover(&monitor, OURS, &mut board).await.unwrap(), first);
        first
    })
}

fn answers(qemu: &Qemu) -> Answers {
    on_monitor(qemu, async |monitor| graph::ask(&monitor, &mut Board::default()).await.unwrap())
}

fn raw(dir: &Path, name: &str, size_bytes: u64) {
    std::fs::File::create(dir.join(name)).unwrap().set_len(size_bytes).unwrap();
}

fn qcow2(version: Version, dir: &Path, name: &str, backing: Option<&str>, size_bytes: u64) {
    let mut command = Command::new(version.program("qemu-img"));
    command.current_dir(dir).args(["create", "-q", "-f", "qcow2"]);
    if let Some(backing) = backing {
        command.args(["-F", "qcow2", "-b", backing]);
    }
    run(command.arg(name).arg(size_bytes.to_string()));
}

fn split(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

#[track_caller]
fn disk<'a>(graph: &'a Graph, name: &str) -> &'a FoundDisk {
    let names: Vec<_> = graph.disks.iter().map(|d| &d.disk.name).collect();
    graph.disk(name).unwrap_or_else(|| panic!("no disk {name} among {names:?}"))
}

/// Puts a filter on a disk as the fleece does, sees the graph, writes as the guest, and takes it away again.
#[track_caller]
fn filter_in_and_out(qemu: &mut Qemu, found: &FoundDisk) {
    let d = &found.disk;
    let scratch = qemu.path("scratch.raw");
    std::fs::File::create(&scratch).unwrap().set_len(d.size_bytes).unwrap();
    qemu.qemu_io(&d.qom_path, "write -P 0x11 0 128k");
    qemu.qmp("blockdev-add", json!({"driver": "file", "filename": scratch, "node-name": "scratch"}));
    let filter = json!({"driver": "copy-before-write", "node-name": FILTER, "file": d.node, "target": "scratch",
        "on-cbw-error": "break-snapshot", "cbw-timeout": 4, "discard": "unmap"});
    qemu.qmp("blockdev-add", filter);
    let set = |qemu: &mut Qemu, node: &str| {
        qemu.qmp("qom-set", json!({"path": d.qom_path, "property": "drive", "value": node}))
    };
    set(qemu, FILTER);
    qemu.qemu_io(&d.qom_path, "write -P 0x22 0 64k");

    let during = discover(qemu);
    assert_eq!(&disk(&during, &d.name).disk, d, "the disk is the same with our filter in");
    assert_eq!(during.top_node_of(&d.qom_path), Some(FILTER));
    assert_eq!(during.child(FILTER, "file"), Some(d.node.as_str()));
    assert_eq!(during.child(FILTER, "target"), Some("scratch"));
    assert_eq!(during.foreign, vec![]);

    set(qemu, &d.node);
    qemu.qmp("blockdev-del", json!({"node-name": FILTER}));
    qemu.qmp("blockdev-del", json!({"node-name": "scratch"}));
    qemu.qemu_io(&d.qom_path, "read -P 0x22 0 64k");
    qemu.qemu_io(&d.qom_path, "read -P 0x11 64k 64k");
    qemu.qemu_io(&d.qom_path, "write -P 0x33 64k 64k");
    assert!(!qemu.log().contains("verification failed"), "{}: the guest reads what it wrote", d.name);
    let copied = std::fs::read(&scratch).unwrap();
    assert!(copied[..65536].iter().all(|b| *b == 0x11), "{}: old data went to the scratch", d.name);
    assert!(copied[65536..].iter().all(|b| *b == 0), "{}: nothing else went there", d.name);
    if let [file] = &d.chain[..]
        && file.format == "raw"
        && d.size_bytes < 64 * MIB
    {
        let image = std::fs::read(&file.filename).unwrap();
        assert!(image[..65536].iter().all(|b| *b == 0x22) && image[65536..131072].iter().all(|b| *b == 0x33));
    }
}

#[test]
fn every_kind_of_disk_is_found_and_takes_our_filter() {
    for version in VERSIONS {
        let args = "
            -object iothread,id=io0 -object throttle-group,id=tg
            -blockdev raw,node-name=n0,discard=unmap,file.driver=file,file.filename=DIR/0.raw
            -device virtio-blk-pci,drive=n0,id=vd0
            -blockdev raw,node-name=n1,file.driver=file,file.filename=DIR/1.raw
            -device virtio-blk-pci,drive=n1,iothread=io0
            -drive if=virtio,file=DIR/2.raw,format=raw
            -device virtio-scsi-pci,id=scsi0,iothread=io0 -device virtio-scsi-pci,id=scsi1
            -drive if=none,id=d3,file=DIR/top.qcow2,format=qcow2,discard=unmap
            -device scsi-hd,drive=d3,id=sd0,bus=scsi0.0
            -blockdev throttle,node-name=n4,throttle-group=tg,file.driver=raw,file.file.driver=file,file.file.filename=DIR/4.raw
            -device scsi-hd,drive=n4,bus=scsi1.0
            -blockdev file,node-name=n5,filename=DIR/5.raw -device ide-hd,drive=n5,id=sata0
            -drive if=ide,index=1,file=DIR/6.raw,format=raw
            -drive if=none,id=d7,file=DIR/7.raw,format=raw -device nvme,serial=a,drive=d7,id=nv0
            -device nvme,serial=b,id=nvc
            -blockdev raw,node-name=n8,file.driver=file,file.filename=DIR/8.raw -device nvme-ns,drive=n8,bus=nvc,id=ns0
            -device qemu-xhci
            -drive if=none,id=d9,file=DIR/9.raw,format=raw -device usb-storage,drive=d9,id=us0
            -blockdev raw,node-name=n10,read-only=on,file.driver=file,file.read-only=on,file.filename=DIR/10.raw
            -device usb-storage,drive=n10";
        let mut qemu = Qemu::start_with(version, &split(args), |dir| {
            for i in 0..=10 {
                raw(dir, &format!("{i}.raw"), (i + 1) * MIB);
            }
            qcow2(version, dir, "base.qcow2", None, 4 * MIB);
            qcow2(version, dir, "top.qcow2", Some("base.qcow2"), 5 * MIB);
        });
        let graph = discover(&qemu);
        // Name, type, iothread, discard, size, drivers of the chain. Device numbers depend on the order of creation.
        let expected = [
            ("vd0", "virtio-blk-device", false, true, 1, "raw:file"),
            ("n1", "virtio-blk-device", true, false, 2, "raw:file"),
            ("virtio0", "virtio-blk-device", false, false, 3, "raw:file"),
            ("sd0", "scsi-hd", true, true, 5, "qcow2:file qcow2:file"),
            ("n4", "scsi-hd", false, false, 5, "raw:file"),
            ("sata0", "ide-hd", false, false, 6, "raw:file"),
            ("ide1-hd0", "ide-hd", false, false, 7, "raw:file"),
            ("nv0", "nvme", false, false, 8, "raw:file"),
            ("ns0", "nvme-ns", false, false, 9, "raw:file"),
            ("us0", "usb-storage", false, false, 10, "raw:file"),
            ("n10", "usb-storage", false, false, 11, "raw:file"),
        ];
        assert_eq!(graph.disks.len(), expected.len(), "{:#?}", graph.disks);
        for (name, device, iothread, discard, size_mib, chain) in expected {
            let FoundDisk { disk: d, verdict } = disk(&graph, name);
            assert_eq!(*verdict, Verdict::Protectable, "{name}");
            let seen: Vec<_> = d.chain.iter().map(|f| format!("{}:{}", f.format, f.protocol)).collect();
            let seen = (d.device.as_str(), d.iothread, d.discard_unmap, d.size_bytes, seen.join(" "));
            assert_eq!(seen, (device, iothread, discard, size_mib * MIB, chain.to_owned()), "{name} {version:?}");
            assert_eq!((d.kind, d.read_only, &d.shared), (DiskKind::Disk, name == "n10", &None), "{name}");
            assert_eq!(graph.top_node_of(&d.qom_path), Some(d.node.as_str()));
            assert!(graph.parents(&d.node).any(|e| e.role == "root"));
        }
        let top = |name| disk(&graph, name).disk.chain[0].filename.clone();
        assert_eq!(top("sd0"), qemu.path("top.qcow2").to_str().unwrap());
        assert_eq!(top("n4"), qemu.path("4.raw").to_str().unwrap());
        assert_eq!(disk(&graph, "vd0").disk.qom_path, "/machine/peripheral/vd0/virtio-backend");
        assert_eq!(disk(&graph, "us0").disk.qom_path, "/machine/peripheral/us0/us0.0/legacy[0]");
        assert_eq!(disk(&graph, "nv0").disk.qom_path, "/machine/peripheral/nv0");
        assert!(disk(&graph, "sd0").disk.chain[1].read_only && !disk(&graph, "sd0").disk.chain[0].read_only);
        assert_eq!(graph.node_names().map(str::to_owned).collect::<Vec<_>>(), qemu.nodes());

        let before = (qemu.nodes(), qemu.bitmaps());
        for found in graph.disks.iter().filter(|d| !d.disk.read_only) {
            filter_in_and_out(&mut qemu, found);
        }
        assert_eq!((qemu.nodes(), qemu.bitmaps()), before);
        assert_eq!(discover(&qemu).disks, graph.disks, "names and order stay");
    }
}

#[test]
fn old_ways_to_give_a_disk() {
    for version in VERSIONS {
        let args = "-machine pc -hda DIR/0.raw -drive if=ide,index=1,file=DIR/1.raw,format=raw,id=mine
            -drive if=ide,index=2,media=cdrom -drive if=virtio,file=DIR/2.raw,format=raw,snapshot=on
            -drive if=none,id=lone,file=DIR/3.raw,format=raw -fda DIR/4.raw -device lsi,id=lsi
            -drive if=none,id=d5,file=DIR/5.raw,format=raw -device scsi-hd,drive=d5";
        let mut qemu = Qemu::start_with(version, &split(args), |dir| {
            (0..=3).chain([5]).for_each(|i| raw(dir, &format!("{i}.raw"), MIB));
            raw(dir, "4.raw", 1440 << 10);
        });
        let graph = discover(&qemu);
        for name in ["ide0-hd0", "mine", "d5"] {
            let found = disk(&graph, name);
            assert_eq!(found.verdict, Verdict::Protectable, "{name}");
            assert!(!found.disk.discard_unmap, "{name}");
            filter_in_and_out(&mut qemu, found);
        }
        let reason = |name: &str| format!("{:?}", disk(&graph, name).verdict);
        assert!(reason("ide1-cd0").starts_with("LeftOut(\"a CD drive"), "{}", reason("ide1-cd0"));
        assert!(reason("lone").starts_with("LeftOut(\"no guest device"), "{}", reason("lone"));
        assert!(reason("floppy0").starts_with("LeftOut(\"a floppy"), "{}", reason("floppy0"));
        let snapshot = reason("virtio0");
        assert!(snapshot.contains("NotProtectable(\"it runs with snapshot=on"), "{snapshot}");
        assert!(snapshot.contains("--exclude virtio0"), "{snapshot}");
        assert_eq!(graph.disks.len(), 7);
    }
}

#[test]
fn firmware_flash_is_a_disk_like_any_other() {
    const CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
    const VARS: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
    assert!(Path::new(CODE).exists(), "{CODE} is missing: install the package ovmf");
    let code = format!("if=pflash,unit=0,file={CODE},format=raw,readonly=on");
    let ways: [&[&str]; 2] = [
        &["-drive", &code, "-drive", "if=pflash,unit=1,file=DIR/vars.fd,format=raw"],
        &[
            "-machine",
            "q35,pflash1=vars",
            "-drive",
            &code,
            "-blockdev",
            "raw,node-name=vars,file.driver=file,file.filename=DIR/vars.fd",
        ],
    ];
    for version in VERSIONS {
        for args in ways {
            let mut qemu = Qemu::start_with(version, args, |dir| {
                std::fs::copy(VARS, dir.join("vars.fd")).unwrap();
            });
            let graph = discover(&qemu);
            let chips: Vec<_> =
                graph.disks.iter().map(|d| (d.disk.name.as_str(), d.disk.kind, d.disk.read_only)).collect();
            let mut sorted = chips.clone();
            sorted.sort_by_key(|c| c.0);
            assert_eq!(sorted, [("pflash0", DiskKind::Pflash, true), ("pflash1", DiskKind::Pflash, false)]);
            assert!(graph.disks.iter().all(|d| d.verdict == Verdict::Protectable && d.disk.shared.is_none()));
            let vars = disk(&graph, "pflash1").clone();
            assert_eq!(vars.disk.qom_path, "/machine/system.flash1");
            assert_eq!(vars.disk.size_bytes, std::fs::metadata(VARS).unwrap().len());
            let bitmap = json!({"node": vars.disk.node, "name": "b", "granularity": 65536});
            qemu.qmp("block-dirty-bitmap-add", bitmap);
            filter_in_and_out(&mut qemu, &vars);
            let bitmap = discover(&qemu).bitmap(&vars.disk.node, "b").unwrap().clone();
            assert_eq!((bitmap.count_bytes, bitmap.recording), (131072, true));
        }
    }
}

#[test]
fn a_host_block_device() {
    let probe = tempfile::tempdir().unwrap();
    raw(probe.path(), "loop.raw", 8 * MIB);
    let made = Command::new("losetup").args(["--find", "--show"]).arg(probe.path().join("loop.raw")).output();
    let device = match made {
        Ok(out) if out.status.success() => String::from_utf8(out.stdout).unwrap().trim().to_owned(),
        other => {
            println!("no loop device can be made here, so a host block device is not tested: {other:?}");
            return;
        }
    };
    struct Detach(String);
    impl Drop for Detach {
        fn drop(&mut self) {
            let _ = Command::new("losetup").args(["--detach", &self.0]).status();
        }
    }
    let device = Detach(device);
    for version in VERSIONS {
        let node = format!("raw,node-name=n0,file.driver=host_device,file.filename={}", device.0);
        let mut qemu =
            Qemu::start_with(version, &["-blockdev", &node, "-device", "virtio-blk-pci,drive=n0,id=vd0"], |_| {});
        let graph = discover(&qemu);
        let found = disk(&graph, "vd0");
        assert_eq!(found.disk.chain.len(), 1);
        assert_eq!((found.disk.chain[0].protocol.as_str(), &found.disk.chain[0].filename), ("host_device", &device.0));
        assert_eq!(found.disk.size_bytes, 8 * MIB);
        filter_in_and_out(&mut qemu, found);
    }
}

#[test]
fn what_cannot_be_protected_is_refused_by_name() {
    for version in VERSIONS {
        let mut server = Qemu::with_raw_disk(version, MIB);
        let socket = server.path("vhost.sock");
        let path = socket.to_str().unwrap();
        let export = json!({"id": "e", "type": "vhost-user-blk", "node-name": "disk0", "writable": false,
            "addr": {"type": "unix", "path": path}});
        server.qmp("block-export-add", export);
        let chardev = format!("socket,id=c0,path={path}");
        let mut args = vec!["-chardev", &chardev];
        args.extend(split(
            "-m 64,slots=2,maxmem=1G -object memory-backend-memfd,id=ram,size=64M,share=on
            -machine q35,memory-backend=ram -device vhost-user-blk-pci,chardev=c0,id=vu0
            -object memory-backend-file,id=pmem,mem-path=DIR/pmem,size=4M,share=on
            -device virtio-pmem-pci,memdev=pmem
            -device sdhci-pci -blockdev raw,node-name=card,file.driver=file,file.filename=DIR/card.raw
            -device sd-card,drive=card
            -device ide-cd,id=cd0 -device virtio-scsi-pci
            -blockdev raw,node-name=iso,read-only=on,file.driver=file,file.read-only=on,file.filename=DIR/iso
            -device scsi-cd,drive=iso,id=cd1",
        ));
        let qemu = Qemu::start_with(version, &args, |dir| {
            raw(dir, "pmem", 4 * MIB);
            raw(dir, "card.raw", 4 * MIB);
            raw(dir, "iso", MIB);
        });
        let graph = discover(&qemu);
        let refused = |name: &str, why: &str| {
            let found = disk(&graph, name);
            let Verdict::NotProtectable(reason) = &found.verdict else { panic!("{name}: {:?}", found.verdict) };
            assert!(reason.contains(why) && reason.contains(&format!("--exclude {name}")), "{name}: {reason}");
            found.disk.device.clone()
        };
        assert_eq!(refused("vu0", "another process serves it"), "vhost-user-blk");
        let pmem = graph.disks.iter().find(|d| d.disk.device == "virtio-pmem").unwrap().disk.name.clone();
        assert!(pmem.starts_with("anon"), "{pmem}");
        refused(&pmem, "persistent memory");
        assert_eq!(refused("card", "not known"), "sd-card");
        for name in ["cd0", "cd1"] {
            assert_eq!(disk(&graph, name).verdict, Verdict::LeftOut("a CD drive".into()));
        }
        assert_eq!(graph.disks.len(), 5, "{:#?}", graph.disks);

        // Hardware that is not here: the same answers with other devices in the tree.
        let mut answers = answers(&qemu);
        for kind in ["vhost-scsi", "vhost-user-scsi", "vhost-vdpa-device", "vfio-pci"] {
            answers.objects.push(object(&format!("/machine/peripheral/x-{kind}"), kind));
        }
        for (name, class) in [("gpu", 0x03_0000), ("hba", 0x01_0700)] {
            let path = format!("/machine/peripheral/{name}");
            answers.objects.push(object(&path, "vfio-pci"));
            answers.pci_classes.insert(path, class);
        }
        for (name, kind) in [("vdpa-net", "virtio-net"), ("vdpa-blk", "virtio-blk")] {
            let path = format!("/machine/peripheral/{name}");
            answers.objects.push(object(&path, "vhost-vdpa-device"));
            answers.virtio.insert(path, kind.into());
        }
        for object in &mut answers.objects {
            if object.kind == "sd-card" {
                object.kind = "scsi-block".into();
            }
        }
        let graph = Graph::read(&answers, OURS).unwrap();
        for name in
            ["x-vhost-scsi", "x-vhost-user-scsi", "x-vhost-vdpa-device", "x-vfio-pci", "hba", "vdpa-blk", "card"]
        {
            assert!(matches!(disk(&graph, name).verdict, Verdict::NotProtectable(_)), "{name}");
        }
        assert!(graph.disk("gpu").is_none() && graph.disk("vdpa-net").is_none());
    }
}

fn object(path: &str, kind: &str) -> Object {
    Object { path: path.into(), kind: kind.into(), ..Object::default() }
}

#[test]
fn queues_spread_over_iothreads() {
    // Since QEMU 9.0 for virtio-blk, 10.0 for virtio-scsi.
    let device = r#"{"driver":"virtio-blk-pci","id":"vd0","drive":"n0","iothread-vq-mapping":[{"iothread":"io0"}]}"#;
    let scsi = r#"{"driver":"virtio-scsi-pci","id":"s","iothread-vq-mapping":[{"iothread":"io0"}]}"#;
    let mut args = split(
        "-object iothread,id=io0 -blockdev raw,node-name=n0,file.driver=file,file.filename=DIR/0.raw
        -blockdev raw,node-name=n1,file.driver=file,file.filename=DIR/1.raw",
    );
    // All as JSON: QEMU makes these devices after those in the other syntax.
    let disk_on_scsi = r#"{"driver":"scsi-hd","drive":"n1","id":"sd0","bus":"s.0"}"#;
    args.extend(["-device", device, "-device", scsi, "-device", disk_on_scsi]);
    let mut qemu = Qemu::start_with(Version::V10, &args, |dir| {
        raw(dir, "0.raw", MIB);
        raw(dir, "1.raw", MIB);
    });
    let graph = discover(&qemu);
    for name in ["vd0", "sd0"] {
        assert!(disk(&graph, name).disk.iothread, "{name}");
        filter_in_and_out(&mut qemu, disk(&graph, name));
    }
}

/// QEMU refuses our filter between a node and one of two devices that write to it, so that a backup would fail.
#[test]
fn two_devices_on_one_node_are_not_protectable() {
    for version in VERSIONS {
        let args = "-blockdev raw,node-name=n0,file.driver=file,file.filename=DIR/0.raw
            -device virtio-blk-pci,drive=n0,id=vd0,share-rw=on
            -device virtio-blk-pci,drive=n0,id=vd1,share-rw=on
            -blockdev raw,node-name=n1,read-only=on,file.driver=file,file.filename=DIR/1.raw
            -device virtio-blk-pci,drive=n1,id=vd2
            -device virtio-blk-pci,drive=n1,id=vd3";
        let qemu = Qemu::start_with(version, &split(args), |dir| {
            [0, 1].iter().for_each(|i| raw(dir, &format!("{i}.raw"), MIB));
        });
        let graph = discover(&qemu);
        for (name, other) in [("vd0", "vd1"), ("vd1", "vd0")] {
            let Verdict::NotProtectable(why) = &disk(&graph, name).verdict else { panic!("{name}") };
            assert!(why.contains(&format!("disk {other} is on the same block node")), "{why}");
            assert!(why.contains(&format!("--exclude {name}")), "{why}");
        }
        for name in ["vd2", "vd3"] {
            assert_eq!(disk(&graph, name).verdict, Verdict::Protectable, "{name}: nobody can write to it");
        }
    }
}

#[test]
fn shared_media_are_seen() {
    for version in VERSIONS {
        let args = "-blockdev raw,node-name=n0,file.driver=file,file.filename=DIR/0.raw
            -device virtio-blk-pci,drive=n0,id=vd0,share-rw=on
            -blockdev raw,node-name=n1,file.driver=file,file.locking=off,file.filename=DIR/1.raw
            -device virtio-blk-pci,drive=n1,id=vd1
            -blockdev raw,node-name=n2,file.driver=file,file.locking=off,file.filename=DIR/hard-link.raw
            -device virtio-blk-pci,drive=n2,id=vd2
            -blockdev raw,node-name=n3,file.driver=file,file.filename=DIR/3.raw
            -device virtio-blk-pci,drive=n3,id=vd3
            -blockdev raw,node-name=n4,read-only=on,file.driver=file,file.read-only=on,file.filename=DIR/4.raw
            -blockdev raw,node-name=n5,read-only=on,file.driver=file,file.read-only=on,file.filename=DIR/4.raw
            -device virtio-blk-pci,drive=n4,id=vd4 -device virtio-blk-pci,drive=n5,id=vd5";
        let qemu = Qemu::start_with(version, &split(args), |dir| {
            [0, 1, 3, 4].iter().for_each(|i| raw(dir, &format!("{i}.raw"), MIB));
            std::fs::hard_link(dir.join("1.raw"), dir.join("hard-link.raw")).unwrap();
        });
        let graph = discover(&qemu);
        let shared = |name: &str| disk(&graph, name).disk.shared.clone();
        assert_eq!(shared("vd0").unwrap(), "share-rw=on: others may write to it");
        assert_eq!(shared("vd1").unwrap(), "disk vd2 has the same medium");
        assert_eq!(shared("vd2").unwrap(), "disk vd1 has the same medium");
        assert_eq!(shared("vd3"), None);
        assert_eq!(shared("vd4"), None, "nobody can write to it");
        assert!(graph.disks.iter().all(|d| d.verdict == Verdict::Protectable));
    }
}

#[test]
fn what_others_put_on_a_disk_is_reported() {
    for version in VERSIONS {
        let mut qemu = Qemu::with_raw_disk(version, MIB);
        for name in ["scratch", "scratch2"] {
            qemu.qmp("blockdev-add", json!({"driver": "null-co", "size": MIB, "node-name": name, "read-zeroes": true}));
        }
        assert_eq!(discover(&qemu).foreign, vec![]);
        for (name, said) in [
            ("livebackup-ffffffff-cbw", "belongs to another livebackup"),
            ("theirs", "another tool's copy-before-write node \"theirs\""),
        ] {
            let filter =
                json!({"driver": "copy-before-write", "node-name": name, "file": "disk0", "target": "scratch"});
            qemu.qmp("blockdev-add", filter);
            let path = "/machine/peripheral/vd0/virtio-backend";
            let set = json!({"path": path, "property": "drive", "value": name});
            qemu.qmp("qom-set", set);
            let graph = discover(&qemu);
            assert_eq!(disk(&graph, "vd0").disk.node, name, "what is not ours is the guest's view");
            assert!(graph.foreign.iter().any(|f| f.disk == "vd0" && f.words.contains(said)), "{:?}", graph.foreign);
            qemu.qmp("qom-set", json!({"path": path, "property": "drive", "value": "disk0"}));
            qemu.qmp("blockdev-del", json!({"node-name": name}));
        }
        qemu.qmp("blockdev-backup", json!({"job-id": "j0", "device": "disk0", "target": "scratch2", "sync": "none"}));
        let foreign = discover(&qemu).foreign;
        assert!(foreign.iter().any(|f| f.words.contains("a backup job \"j0\" is running")), "{foreign:?}");
        qemu.qmp("block-job-cancel", json!({"device": "j0", "force": true}));
        wait_until("the job to end", || discover(&qemu).foreign.is_empty());
    }
}

#[test]
fn bitmaps_with_and_without_a_name() {
    for version in VERSIONS {
        let mut qemu = Qemu::with_raw_disk(version, MIB);
        let add =
            |name: &str, disabled| json!({"node": "disk0", "name": name, "granularity": 65536, "disabled": disabled});
        qemu.qmp("block-dirty-bitmap-add", add("on", false));
        qemu.qmp("block-dirty-bitmap-add", add("off", true));
        qemu.qmp("blockdev-add", json!({"driver": "null-co", "size": MIB, "node-name": "scratch"}));
        qemu.qmp(
            "blockdev-add",
            json!({"driver": "copy-before-write", "node-name": FILTER, "file": "disk0", "target": "scratch"}),
        );
        qemu.write(0, 4096, 1);
        let graph = discover(&qemu);
        let on = graph.bitmap("disk0", "on").unwrap();
        assert_eq!((on.count_bytes, on.granularity_bytes, on.recording, on.busy), (65536, 65536, true, false));
        let off = graph.bitmap("disk0", "off").unwrap();
        assert_eq!((off.count_bytes, off.recording, off.persistent, off.inconsistent), (0, false, false, false));
        assert!(graph.nodes().flat_map(|n| &n.bitmaps).any(|b| b.name.is_none()), "the filter's own");
        assert!(graph.bitmaps("no such node").is_empty() && graph.bitmap("disk0", "none").is_none());
    }
}

/// All places in a value, as paths of steps.
fn places(value: &Value, at: &mut Vec<String>, out: &mut Vec<Vec<String>>) {
    out.push(at.clone());
    let mut go = |key: String, inner: &Value| {
        at.push(key);
        places(inner, at, out);
        at.pop();
    };
    match value {
        Value::Object(map) => map.iter().for_each(|(k, v)| go(k.clone(), v)),
        Value::Array(list) => list.iter().enumerate().for_each(|(i, v)| go(i.to_string(), v)),
        _ => {}
    }
}

fn at<'a>(mut value: &'a mut Value, place: &[String]) -> &'a mut Value {
    for step in place {
        value = match value {
            Value::Object(map) => map.get_mut(step).unwrap(),
            Value::Array(list) => &mut list[step.parse::<usize>().unwrap()],
            _ => unreachable!(),
        };
    }
    value
}

#[test]
fn wrong_answers_give_errors_and_never_a_panic() {
    let qemu = Qemu::start_with(
        Version::V10,
        &split(
            "-blockdev qcow2,node-name=n0,file.driver=file,file.filename=DIR/0.qcow2 -device virtio-blk-pci,drive=n0,id=vd0
            -drive if=virtio,file=DIR/1.raw,format=raw -device ide-cd",
        ),
        |dir| {
            qcow2(Version::V10, dir, "0.qcow2", None, MIB);
            raw(dir, "1.raw", MIB);
        },
    );
    let good = answers(&qemu);
    let text = serde_json::to_string(&good).unwrap();
    assert_eq!(serde_json::from_str::<Answers>(&text).unwrap(), good, "answers can be kept");
    Graph::read(&good, OURS).unwrap();

    let whole = serde_json::to_value(&good).unwrap();
    let read = |value: Value| match serde_json::from_value::<Answers>(value) {
        Ok(answers) => Graph::read(&answers, OURS).map(|_| ()),
        Err(_) => Ok(()),
    };
    let mut deep = json!([]);
    (0..1000).for_each(|_| deep = Value::Array(vec![deep.take()]));
    let others = [
        Value::Null,
        json!(true),
        json!(-1),
        json!(u64::MAX),
        json!(1.5),
        json!(""),
        json!("/machine/peripheral/vd0/virtio-backend"),
        json!("n0"),
        json!("x".repeat(1 << 20)),
        json!([]),
        json!({}),
    ];
    let mut errors = 0;
    for part in ["block", "nodes", "graph", "jobs", "objects"] {
        let mut all = vec![];
        places(&whole[part], &mut vec![part.to_owned()], &mut all);
        for place in all {
            for other in &others {
                let mut bad = whole.clone();
                *at(&mut bad, &place) = other.clone();
                errors += usize::from(read(bad).is_err());
            }
            let mut removed = whole.clone();
            let (last, above) = place.split_last().unwrap();
            if let Value::Object(map) = at(&mut removed, above) {
                map.remove(last);
                if let Err(GraphError::Missing { at }) = read(removed) {
                    assert!(at.ends_with(last.as_str()), "{at} names {last}");
                }
            }
        }
    }
    assert!(errors > 200, "only {errors} of the wrong answers were refused");
    let mut bad = good.clone();
    bad.block = deep;
    assert!(Graph::read(&bad, OURS).is_err());

    let mut missing = good.clone();
    missing.nodes[0]["image"].as_object_mut().unwrap().remove("virtual-size");
    let said = Graph::read(&missing, OURS).unwrap_err().to_string();
    assert!(said.contains("query-named-block-nodes[0].image.virtual-size"), "{said}");

    let mut round = good.clone();
    let edges = round.graph["edges"].as_array_mut().unwrap();
    let back: Vec<_> =
        edges.iter().map(|e| json!({"parent": e["child"], "child": e["parent"], "name": "file"})).collect();
    edges.extend(back);
    let _ = Graph::read(&round, OURS);
}
