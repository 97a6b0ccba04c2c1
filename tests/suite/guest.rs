//! The test guest, its writer and its checker: the proof that other tests lean on has to be able to fail.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::guest::*;
use crate::common::*;
use serde_json::json;

/// Two raw images, the second with a last partial block.
fn images(dir: &Path) -> [PathBuf; 2] {
    [("a.raw", 24 << 20), ("b.raw", (10 << 20) + 512)].map(|(name, size)| {
        let path = dir.join(name);
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        path
    })
}

fn copy(images: &[PathBuf; 2], ending: &str) -> [PathBuf; 2] {
    images.each_ref().map(|image| {
        let copy = image.with_extension(ending);
        std::fs::copy(image, &copy).unwrap();
        copy
    })
}

#[test]
fn the_checker_names_the_instant() {
    let dir = tempfile::tempdir().unwrap();
    let images = images(dir.path());
    let mut log = WriteLog::seeded(1);
    assert_eq!(log.instant(&images), Ok(0));
    for (count, n) in [(1, 1), (4999, 5000), (1, 5001)] {
        log.write(count, &images);
        assert_eq!(log.instant(&images), Ok(n));
    }
    log.flight = 8;
    log.write(1000, &images);
    assert_eq!(log.instant(&images), Ok(6001));
}

#[test]
fn the_checker_fails_on_a_flipped_byte() {
    let dir = tempfile::tempdir().unwrap();
    let images = images(dir.path());
    let mut log = WriteLog::seeded(2);
    log.write(3000, &images);
    let size = std::fs::metadata(&images[1]).unwrap().len();
    // In blocks of the log, in never written ones, in the last whole block, in the partial one behind it.
    for at in [4096 * 5 + 17, 4096 * 7, size / 2, size - 513, size - 1] {
        let twin = copy(&images, "twin");
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&twin[1]).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        let said = log.instant(&twin).unwrap_err();
        assert!(said.contains(&format!("disk 1 ({}), offset {}:", twin[1].display(), at / 4096 * 4096)), "{said}");
        assert!(said.contains("1 blocks differ"), "{said}");
    }
}

#[test]
fn the_checker_fails_on_disks_of_two_instants() {
    let dir = tempfile::tempdir().unwrap();
    let images = images(dir.path());
    let mut log = WriteLog::seeded(3);
    log.write(2000, &images);
    let early = copy(&images, "early");
    log.write(40, &images);
    assert_eq!(log.instant(&early), Ok(2000));
    assert_eq!(log.instant(&images), Ok(2040));
    for mixed in [[&early[0], &images[1]], [&images[0], &early[1]]] {
        let said = log.instant(&mixed).unwrap_err();
        assert!(said.contains("no one instant"), "{said}");
        assert_eq!(said.matches("as it was after that write").count(), 2, "each disk alone is whole: {said}");
    }
    assert!(log.instant(&[&images[1], &images[0]]).is_err(), "disks in the wrong order");
    assert!(WriteLog { seed: 4, ..log }.instant(&images).is_err(), "another log");
}

/// One stale block, as an incremental that missed a granule leaves it.
#[test]
fn the_checker_fails_on_one_lost_write() {
    let dir = tempfile::tempdir().unwrap();
    let images = images(dir.path());
    let mut log = WriteLog::seeded(5);
    log.write(2000, &images);
    let early = copy(&images, "early");
    log.write(500, &images);
    let (old, new) = (std::fs::read(&early[0]).unwrap(), std::fs::read(&images[0]).unwrap());
    let at = (0..old.len()).step_by(4096).find(|at| old[*at..at + 4096] != new[*at..at + 4096]).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&images[0]).unwrap();
    file.write_all_at(&old[at..at + 4096], at as u64).unwrap();
    let said = log.instant(&images).unwrap_err();
    assert!(said.contains(&format!("offset {at}:")) && said.contains("1 blocks differ"), "{said}");
}

/// With several in flight, the newest may be missing, older ones must not.
#[test]
fn the_checker_allows_what_was_in_flight() {
    let dir = tempfile::tempdir().unwrap();
    let images = images(dir.path());
    let mut log = WriteLog::seeded(6);
    let mut states = vec![];
    for count in [2000, 1, 1, 1, 1] {
        log.write(count, &images);
        states.push(images.each_ref().map(|image| std::fs::read(image).unwrap()));
    }
    // Takes write 2001 back, the first of the last four.
    for (disk, image) in images.iter().enumerate() {
        let (before, after) = (&states[0][disk], &states[1][disk]);
        let file = std::fs::OpenOptions::new().write(true).open(image).unwrap();
        for at in (0..before.len()).step_by(4096) {
            let block = at..before.len().min(at + 4096);
            if before[block.clone()] != after[block.clone()] {
                file.write_all_at(&before[block], at as u64).unwrap();
            }
        }
    }
    assert_eq!(WriteLog { flight: 4, ..log }.instant(&images), Ok(2004));
    for flight in [1, 3] {
        assert!(WriteLog { flight, ..log }.instant(&images).is_err(), "{flight} in flight");
    }
}

/// Boots with a raw and a qcow2 disk, stops in the midst of writes, and proves copies of the images.
fn stopped_in_midst(version: Version, mut log: WriteLog) {
    let disks = [GuestDisk::qcow2("vd0", 64 << 20), GuestDisk::raw("vd1", 32 << 20)];
    let mut guest = Guest::boot(version, &disks);
    guest.start_writer(&log, &["vd0", "vd1"]);
    let mut found = 0;
    for round in 0..2 {
        let before = guest.wait_for_writes(300);
        guest.qmp("stop", json!({}));
        let copies = disks.map(|disk| {
            let copy = guest.path(&format!("{}-{round}.copy", disk.name));
            run(Command::new(version.program("qemu-img"))
                .args(["convert", "-U", "-f", disk.format, "-O", "raw"])
                .args([&guest.image(disk.name), &copy]));
            copy
        });
        guest.qmp("cont", json!({}));
        let after = guest.written();
        let n = log.prove(&copies, before, after);
        assert!(n > found, "{n}");
        found = n;
    }
    // The writer goes on where it stopped, and the guest can check its own disks.
    log.from = guest.stop_writer();
    guest.start_writer(&log, &["vd0", "vd1"]);
    guest.wait_for_writes(50);
    let last = guest.stop_writer();
    let check = format!("writer check --seed {} --flight {} /dev/disk/vd0 /dev/disk/vd1", log.seed, log.flight);
    assert!(guest.sh(&check).contains(&format!("proved: N={last} ")));
}

#[test]
fn a_stopped_guest_is_of_one_instant_on_10() {
    stopped_in_midst(Version::V10, WriteLog::seeded(Rng::new().next()));
}

#[test]
fn a_stopped_guest_is_of_one_instant_on_7() {
    stopped_in_midst(Version::V7, WriteLog { flight: 8, ..WriteLog::seeded(Rng::new().next()) });
}

/// The agent answers, file systems freeze, and the shell works meanwhile.
#[test]
fn the_agent_freezes_file_systems() {
    let disks = [GuestDisk::raw("vd0", 32 << 20).with_ext4(), GuestDisk::qcow2("vd1", 32 << 20).with_ext4()];
    let mut guest = Guest::boot(Version::V10, &disks);
    guest.sh("for d in vd0 vd1; do dd if=/dev/zero of=/mnt/$d/log bs=1M count=8 2>/dev/null; done; sync");
    let log = WriteLog { pause_us: 1000, ..WriteLog::seeded(7) };
    // Files that were zeros before: the log starts from there.
    guest.start_writer_on(&log, &["/mnt/vd0/log", "/mnt/vd1/log"]);
    let mut agent = Agent::connect(&guest.agent());
    assert_eq!(agent.call("guest-fsfreeze-freeze"), 2);
    let at = guest.written();
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(guest.written() <= at + 1, "frozen");
    assert_eq!(agent.call("guest-fsfreeze-thaw"), 2);
    guest.wait_for_writes(10);
    let last = guest.stop_writer();
    let said = guest.sh("writer check --seed 7 /mnt/vd0/log /mnt/vd1/log");
    assert!(said.contains(&format!("proved: N={last} ")), "{said}");
    let (status, said) = guest.try_sh("echo it\\'s \"odd\"; exit 3");
    assert_eq!((status, said.as_str()), (3, "it's odd\n"));
}
