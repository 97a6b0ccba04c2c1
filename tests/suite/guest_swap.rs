//! A machine whose swap was left out of its backups starts again from a restored disk: its swap is found by its UUID and can be
//! used at once, and its files are there. A real guest partitions the disk, swaps and writes.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::common::guest::*;
use crate::common::partitioned::*;
use crate::common::*;
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// The disk, and its first partition, which begins at 1 MiB. Files have the rest.
const SIZE: u64 = 160 * MIB;
const SWAP: u64 = 100 * MIB;
/// A machine that has to swap.
const SMALL: [&str; 2] = ["-m", "128"];
const UUID: &str = "0c6d1f7e-4b1a-4c7e-9d53-8a1f00c0ffee";

fn text(guest: &Guest, name: &str) -> String {
    guest.path(name).to_str().unwrap().to_owned()
}

fn lb(guest: &Guest, args: &[&str]) -> Value {
    let out = run(livebackup().args(["--json", "--state", &text(guest, "state")]).args(args));
    serde_json::from_str(out.lines().last().unwrap_or_default()).unwrap_or(Value::Null)
}

/// Fills the guest's memory until it swaps.
fn swap_something(guest: &mut Guest) {
    guest.sh("mount -t tmpfs -o size=100000k none /mnt; i=0
         while [ $(awk '/^SwapTotal/{t=$2} /^SwapFree/{f=$2} END{print t-f}' /proc/meminfo) -lt 2000 ]
         do i=$((i+1)); yes $i | head -c 1000000 >/mnt/$i || break; done; umount /mnt");
}

/// In a guest that has just started: swaps, and mounts the file system of its second partition.
fn use_disk(guest: &mut Guest) {
    guest.sh(
        "swapon $(readlink -f /dev/disk/vd0)1 && mkdir /files && mount -t ext4 $(readlink -f /dev/disk/vd0)2 /files",
    );
    swap_something(guest);
    let used = guest.sh("awk '/^SwapTotal/{t=$2} /^SwapFree/{f=$2} END{print t-f}' /proc/meminfo");
    assert!(used.trim().parse::<u64>().unwrap() > 0, "it swapped");
}

#[test]
fn a_restored_machine_has_its_swap() {
    let disks = [GuestDisk::raw("vd0", SIZE)];
    let dir = tempfile::Builder::new().prefix("livebackup-guest-").tempdir().unwrap();
    let image = dir.path().join("vd0.raw");
    std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
    partition(&image, &format!("label: gpt\nstart=2048, size={}, type=S\ntype=L\n", SWAP / 512), &[]);
    put(&image, MIB, &swap_header(SWAP, 4096, "", UUID));
    let files = format!("offset={}", MIB + SWAP);
    run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-m", "0", "-E", &files]).arg(&image).arg("48M"));
    let mut guest = Guest::boot_in(Version::V10, dir, &disks, &SMALL);
    lb(&guest, &["init", &text(&guest, "repo")]);
    use_disk(&mut guest);
    guest.sh("echo first >/files/word; sync");

    let source = format!("qmp:{}", text(&guest, "qmp"));
    let repo = text(&guest, "repo");
    let full = lb(&guest, &["backup", &source, &repo, "--skip-swap"]);
    let areas = full["disks"][0]["areas"]["areas"].as_array().unwrap();
    assert_eq!((areas.len(), areas[0]["what"].as_str()), (1, Some("swap")), "{full}");
    assert!(full["disks"][0]["read_bytes"].as_u64().unwrap() < 61 * MIB, "{full}");
    guest.sh("echo later >/files/word; sync");
    swap_something(&mut guest);
    let some = lb(&guest, &["backup", &source, &repo, "--skip-swap"]);
    assert_eq!(some["disks"][0]["taken"], "incremental", "{some}");

    let restored = tempfile::Builder::new().prefix("livebackup-guest-").tempdir().unwrap();
    lb(&guest, &["restore", &repo, "guest", restored.path().to_str().unwrap(), "--force"]);
    drop(guest);
    let image = restored.path().join("vd0.raw");
    let found = run(Command::new("blkid").args(["-p", "-O", &MIB.to_string()]).arg(&image));
    assert!(found.contains(UUID), "what names it by its UUID finds it: {found}");
    let mut bytes = vec![0; (SWAP - MIB) as usize];
    std::fs::File::open(&image).unwrap().read_exact_at(&mut bytes, 2 * MIB).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0), "of swap only the header was stored");
    let mut guest = Guest::boot_in(Version::V10, restored, &disks, &SMALL);
    use_disk(&mut guest);
    assert_eq!(guest.sh("cat /files/word"), "later\n");
}
