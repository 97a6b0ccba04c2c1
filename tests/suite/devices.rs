//! Every kind of guest device, firmware variables, and media that the guest cannot write to, through whole sessions: full,
//! incremental, restored. The oracle is a copy of each image taken by the test.

#![allow(clippy::unwrap_used)]

use crate::common::*;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

const KIB: u64 = 1 << 10;

/// A raw image of the machine, and what QEMU calls the guest device that has it.
struct Medium {
    file: &'static str,
    size: u64,
    read_only: bool,
}

const fn writable(file: &'static str, size_kib: u64) -> Medium {
    Medium { file, size: size_kib * KIB, read_only: false }
}

const fn read_only(file: &'static str, size_kib: u64) -> Medium {
    Medium { file, size: size_kib * KIB, read_only: true }
}

struct Machine {
    args: Vec<String>,
    media: &'static [Medium],
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn blockdev(file: &str, read_only: bool) -> String {
    let ro = if read_only { ",read-only=on" } else { "" };
    format!("-blockdev driver=raw,node-name={file},file.driver=file,file.filename=DIR/{file}{ro} ")
}

/// Flash chips by properties of the machine, and disks with ids.
fn modern() -> Machine {
    const MEDIA: &[Medium] = &[
        read_only("code", 256),
        writable("vars", 528),
        writable("sata", 1000),
        writable("nvme", 1088),
        writable("usb", 960),
        writable("scsi", 2049),
        read_only("fixed", 777),
        read_only("fixedio", 512),
    ];
    let mut args = "-name vm1 -object iothread,id=io0 ".to_owned();
    MEDIA.iter().for_each(|m| args += &blockdev(m.file, m.read_only));
    args += "-machine q35,pflash0=code,pflash1=vars \
             -device ide-hd,drive=sata,id=sata,bus=ide.2 \
             -device nvme,drive=nvme,id=nvme,serial=1 \
             -device qemu-xhci -device usb-storage,drive=usb,id=usb \
             -device virtio-scsi-pci,id=s0,iothread=io0 -device scsi-hd,drive=scsi,id=scsi,bus=s0.0 \
             -device virtio-blk-pci,drive=fixed,id=fixed \
             -device virtio-scsi-pci,id=s1,iothread=io0 -device scsi-hd,drive=fixedio,id=fixedio,bus=s1.0";
    Machine { args: words(&args), media: MEDIA }
}

/// What older scripts write: `-drive`, also for flash chips, and no ids.
fn legacy() -> Machine {
    const MEDIA: &[Medium] = &[
        read_only("code", 256),
        writable("vars", 128),
        writable("ide", 1000),
        writable("virtio", 640),
        writable("anonymous", 704),
    ];
    let args = "-name vm1 -machine pc \
                -drive if=pflash,unit=0,format=raw,readonly=on,file=DIR/code \
                -drive if=pflash,unit=1,format=raw,file=DIR/vars \
                -drive if=ide,format=raw,file=DIR/ide -drive if=virtio,format=raw,file=DIR/virtio \
                -drive if=none,id=d0,format=raw,file=DIR/anonymous \
                -device virtio-scsi-pci -device scsi-hd,drive=d0";
    Machine { args: words(args), media: MEDIA }
}

struct Sidecar {
    state: std::path::PathBuf,
}

impl Sidecar {
    fn json(&self, args: &[&str]) -> Value {
        let text = run(livebackup().arg("--json").arg("--state").arg(&self.state).args(args));
        if text.trim().is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() }
    }
}

/// What QEMU calls the guest device of each image: found by the image's path.
fn devices(qemu: &mut Qemu, media: &[Medium]) -> BTreeMap<&'static str, String> {
    let all = qemu.qmp("query-block", json!({}));
    let mut found = BTreeMap::new();
    for medium in media {
        let path = qemu.path(medium.file);
        let of = all.as_array().unwrap().iter().find(|b| b["inserted"]["file"] == json!(path)).unwrap();
        found.insert(medium.file, of["qdev"].as_str().unwrap().to_owned());
    }
    found
}

fn images(qemu: &Qemu, media: &[Medium]) -> BTreeMap<&'static str, Vec<u8>> {
    media.iter().map(|m| (m.file, std::fs::read(qemu.path(m.file)).unwrap())).collect()
}

/// The restored images, by the image that the disk was in the VM.
fn restored(
    sidecar: &Sidecar,
    names: &BTreeMap<&'static str, String>,
    repo: &str,
    point: &str,
    dir: &Path,
) -> BTreeMap<&'static str, Vec<u8>> {
    sidecar.json(&["restore", repo, &format!("vm1@{point}"), dir.to_str().unwrap(), "--force"]);
    names
        .iter()
        .map(|(file, name)| {
            let path = dir.join(format!("{name}.raw"));
            (*file, std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
        })
        .collect()
}

fn whole_way(version: Version, machine: &Machine) {
    let mut rng = Rng::new();
    let args: Vec<_> = machine.args.iter().map(String::as_str).collect();
    let mut qemu = Qemu::start_with(version, &args, |dir| {
        for medium in machine.media {
            let mut bytes = vec![0; medium.size as usize];
            let data = bytes.len() / 2;
            rng.fill(&mut bytes[data..]);
            if medium.file == "code" {
                // Where the processor starts, 16 bytes below 4 GiB: it halts, and the machine runs on.
                let start = bytes.len() - 16;
                bytes[start..start + 4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
            }
            std::fs::write(dir.join(medium.file), bytes).unwrap();
        }
    });
    qemu.qmp("cont", json!({}));
    let devices = devices(&mut qemu, machine.media);
    let sidecar = Sidecar { state: qemu.path("state") };
    let source = format!("qmp:{}", qemu.socket().display());
    let repo = qemu.path("repo").to_str().unwrap().to_owned();
    let listed = sidecar.json(&["disks", &source]);
    let mut names = BTreeMap::new();
    for medium in machine.media {
        let path = json!(qemu.path(medium.file));
        let found = listed["disks"].as_array().unwrap().iter().find(|d| d["chain"][0]["filename"] == path);
        let found = found.unwrap_or_else(|| panic!("{} is not among {listed}", medium.file));
        assert_eq!(found["verdict"], "protectable", "{found}");
        assert_eq!(
            (&found["read_only"], &found["size_bytes"]),
            (&json!(medium.read_only), &json!(medium.size)),
            "{found}"
        );
        names.insert(medium.file, found["name"].as_str().unwrap().to_owned());
    }

    sidecar.json(&["init", &repo]);
    let first = images(&qemu, machine.media);
    let report = sidecar.json(&["backup", &source, &repo]);
    let oldest = report["point"].as_str().unwrap().to_owned();
    assert_eq!(report["level"], "full");
    for medium in machine.media.iter().filter(|m| !m.read_only) {
        for n in 0..3 {
            let at = rng.below(medium.size / 512) * 512;
            let len = (512 * (1 + rng.below(64))).min(medium.size - at);
            qemu.qemu_io(&devices[medium.file], &format!("write -P {} {at} {len}", 1 + n + rng.below(250)));
        }
    }
    let second = images(&qemu, machine.media);
    assert!(
        first
            .iter()
            .all(|(file, bytes)| (second[file] == *bytes)
                == machine.media.iter().any(|m| m.file == *file && m.read_only))
    );
    let report = sidecar.json(&["backup", &source, &repo]);
    for disk in report["disks"].as_array().unwrap() {
        let medium = machine.media.iter().find(|m| names[m.file] == disk["disk"].as_str().unwrap()).unwrap();
        // Nothing is tracked of what the guest cannot write to: it is compared.
        let expected = if medium.read_only { "scan" } else { "incremental" };
        assert_eq!(disk["taken"], expected, "{version:?} {}: {disk}", medium.file);
    }
    let dir = qemu.path("restored");
    for (point, expected) in [(oldest.as_str(), &first), ("latest", &second)] {
        for (file, bytes) in restored(&sidecar, &names, &repo, point, &dir) {
            assert!(bytes == expected[file], "{version:?}: {file} of {point} is not what it was");
        }
    }
    sidecar.json(&["verify", &repo]);
    let left: Vec<_> = qemu.nodes().into_iter().filter(|n| n.contains("livebackup")).collect();
    assert!(left.is_empty() && qemu.exports().is_empty(), "{left:?}");
    assert_eq!(qemu.status(), "running");
    // Each device has its own medium again.
    assert_eq!(self::devices(&mut qemu, machine.media), devices);
}

#[test]
fn every_kind_of_device() {
    VERSIONS.iter().for_each(|version| whole_way(*version, &modern()));
}

#[test]
fn what_older_scripts_start() {
    VERSIONS.iter().for_each(|version| whole_way(*version, &legacy()));
}
