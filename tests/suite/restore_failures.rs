//! A restore that fails, is interrupted or killed leaves nothing half-made under a name, and says what happened to what.
//! Block devices are written in place: what that means is tested here too. The killed restore is this program itself,
//! started again.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::repo_common::pattern;
use crate::restore_common::*;
use livebackup::repo::Repository;
use livebackup::restore::{Format, RestoreError, RestoreOptions, restore};
use livebackup::units::MIB;

/// The pack with the chunks of the largest disk.
fn largest_pack(stored: &Stored) -> PathBuf {
    let packs = fs::read_dir(stored.dir.path().join("repo/packs")).unwrap();
    let packs = packs.flat_map(|d| fs::read_dir(d.unwrap().path()).unwrap()).map(|p| p.unwrap().path());
    packs.max_by_key(|pack| fs::metadata(pack).unwrap().len()).unwrap()
}

#[test]
fn damage_in_the_repository_is_named_and_leaves_nothing() {
    let mut stored = stored(vec![("whole", mixed(1, 700_000)), ("hurt", pattern(2, 3 * MIB as usize + 512))]);
    let pack = largest_pack(&stored);
    let mut bytes = fs::read(&pack).unwrap();
    let whole = bytes.clone();
    bytes[4096 + 300_000] ^= 1;
    fs::write(&pack, &bytes).unwrap();
    for format in [Format::Raw, Format::Qcow2] {
        stored.point.disks[0].image.size_bytes = 700_000;
        let disks = vec![target("hurt", None)];
        let error = stored.refused(&RestoreOptions { format, disks, ..stored.options() });
        let RestoreError::Unreadable { disk, extent, .. } = &error else { panic!("{error}") };
        assert_eq!((disk.as_str(), extent.len_bytes), ("hurt", u64::from(CHUNK)), "{error}");
        assert!(extent.offset_bytes.is_multiple_of(u64::from(CHUNK)));
        let message = error.to_string();
        assert!(message.contains("livebackup verify") && message.contains(pack.to_str().unwrap()), "{message}");
    }
    // Cut short.
    fs::write(&pack, &whole[..whole.len() / 2]).unwrap();
    assert!(matches!(stored.refused(&stored.options()), RestoreError::Unreadable { disk, .. } if disk == "hurt"));
    fs::write(&pack, whole).unwrap();
    stored.restore(&stored.options()).unwrap();
}

#[test]
fn an_interrupted_restore_leaves_nothing() {
    let stored = stored(vec![("a", mixed(1, 3 * MIB as usize)), ("b", mixed(2, 300_032))]);
    for format in [Format::Raw, Format::Qcow2] {
        let options = RestoreOptions { format, ..stored.options() };
        let before = tree(stored.dir.path());
        let error = restore(&stored.repo, &stored.point, &options, &AtomicBool::new(true), &mut |_| {}).unwrap_err();
        assert!(error.is_interrupted(), "{error}");
        // In between: when the first disk is done.
        let flag = AtomicBool::new(false);
        let mut progress = |_| flag.store(true, Ordering::Relaxed);
        let error = restore(&stored.repo, &stored.point, &options, &flag, &mut progress).unwrap_err();
        assert!(error.is_interrupted(), "{error}");
        assert_eq!(tree(stored.dir.path()), before);
    }
}

/// What the started copy of this program does; without the variable, nothing.
#[test]
fn child() {
    let Some(dir) = std::env::var_os("RESTORE_DIR") else { return };
    let repo = Repository::open(&Path::new(&dir).join("repo")).unwrap();
    let point = repo.find_point("vm", "latest").unwrap();
    let options = RestoreOptions { force: true, ..RestoreOptions::new(Path::new(&dir).join("a/out")) };
    restore(&repo, &point, &options, &AtomicBool::new(false), &mut |_| {}).unwrap();
}

#[test]
fn killed_at_any_point_no_half_made_disk_has_its_name() {
    let stored = stored(vec![("a", mixed(1, 5 * MIB as usize)), ("b", mixed(2, 300_000))]);
    for (point, named) in [
        ("restore.piece", 0),
        ("restore.piece:3", 0),
        ("restore.written", 0),
        ("durable.written", 0),
        ("durable.flushed", 0),
        ("durable.renamed", 1),
        ("durable.flushed:2", 1),
        ("restore.named:2", 2),
        ("durable.flushed:3", 2),
    ] {
        for old in [None, Some(b"old".as_slice())] {
            let _ = fs::remove_dir_all(stored.out());
            fs::create_dir_all(stored.out()).unwrap();
            for name in ["a.raw", "b.raw"] {
                old.inspect(|old| fs::write(stored.out().join(name), old).unwrap());
            }
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["restore_failures::child", "--exact"])
                .env("RESTORE_DIR", stored.dir.path())
                .env("LIVEBACKUP_KILL_AT", point)
                .output()
                .unwrap()
                .status;
            assert_eq!(status.signal(), Some(9), "{point}");
            let found = |name: &str| fs::read(stored.out().join(name)).ok();
            for (i, name) in ["a", "b"].into_iter().enumerate() {
                let expected = if i < named { Some(stored.bytes(name)) } else { old };
                assert!(found(&format!("{name}.raw")).as_deref() == expected, "{point}: {name}");
            }
            assert_eq!(found("machine.json"), None, "{point}");
            let left_overs = fs::read_dir(stored.out()).unwrap().count();
            stored.restore(&RestoreOptions { force: true, ..stored.options() }).unwrap();
            let kept: Vec<_> = fs::read_dir(stored.out()).unwrap().map(|e| e.unwrap().file_name()).collect();
            let disks = kept.iter().filter(|n| !n.to_str().unwrap().starts_with("machine.json")).count();
            assert_eq!(disks, 2, "{point}: {left_overs} before, {kept:?}");
        }
    }
}

/// A small file system in memory, unmounted when dropped. Needs root.
struct Small(tempfile::TempDir);

impl Small {
    fn mount(mib: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={mib}m");
        run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", dir.path().to_str().unwrap()]);
        Self(dir)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("NOT TESTED: mounts and block devices need root");
    }
    root
}

#[test]
fn a_full_disk_is_said_to_be_full() {
    if !is_root() {
        return;
    }
    let stored = stored(vec![("a", pattern(1, 9 * MIB as usize))]);
    let small = Small::mount(8);
    let options = RestoreOptions { dir: small.0.path().join("out"), ..stored.options() };
    let error = stored.restore(&options).unwrap_err();
    let RestoreError::NoSpace { needed_bytes, available_bytes, .. } = error else { panic!("{error}") };
    assert!(error.is_no_space() && needed_bytes >= 9 * MIB && available_bytes == 8 * MIB, "{error}");
    assert_eq!(tree(small.0.path()), []);

    // It gets full while the restore goes on: at its first piece there is room no more.
    let stored = crate::restore_common::stored(vec![("a", pattern(1, 7 * MIB as usize))]);
    let filler = small.0.path().join("filler");
    let options = RestoreOptions { dir: small.0.path().join("out"), ..stored.options() };
    let repo = &stored.repo;
    let error = std::thread::scope(|scope| {
        let fill = scope.spawn(|| {
            let out = small.0.path().join("out");
            while fs::read_dir(&out).map_or(0, Iterator::count) == 0 {
                std::hint::spin_loop();
            }
            fs::write(&filler, vec![1; 7 * MIB as usize])
        });
        let result = restore(repo, &stored.point, &options, &AtomicBool::new(false), &mut |_| {});
        let filled = fill.join().unwrap();
        // Whoever was late got no room.
        assert!(result.is_err() || filled.is_err());
        result.err()
    });
    if let Some(error) = error {
        assert!(error.is_no_space() && error.to_string().contains("make space"), "{error}");
        let _ = fs::remove_file(&filler);
        assert_eq!(tree(small.0.path()), []);
    }
}

/// A loop device over a file; needs root.
struct Loop {
    device: PathBuf,
    file: tempfile::NamedTempFile,
}

impl Loop {
    fn new(content: &[u8]) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), content).unwrap();
        let said = run("losetup", &["--find", "--show", file.path().to_str().unwrap()]);
        Self { device: said.trim().into(), file }
    }

    fn content(&self) -> Vec<u8> {
        fs::read(self.file.path()).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

#[test]
fn block_devices_are_overwritten_to_the_last_byte() {
    if !is_root() {
        return;
    }
    let size = 11 * MIB as usize + 512;
    let stored = stored(vec![("a", mixed(1, size)), ("b", mixed(2, 5000))]);
    let device = Loop::new(&vec![0xaa; size + 1024]);
    let here = Some(device.device.clone());
    let options = RestoreOptions { disks: vec![target("a", here.clone())], ..stored.options() };
    assert!(matches!(stored.refused(&options), RestoreError::DeviceNeedsForce { .. }));
    let force = RestoreOptions { force: true, compare: true, ..options.clone() };
    let error = stored.refused(&RestoreOptions { format: Format::Qcow2, ..force.clone() });
    assert!(matches!(error, RestoreError::NotAsQcow2 { .. }), "{error}");

    // Named by two paths.
    let link = stored.dir.path().join("link");
    symlink(&device.device, &link).unwrap();
    let twice = vec![target("a", here.clone()), target("b", Some(link.clone()))];
    let error = stored.refused(&RestoreOptions { disks: twice, ..force.clone() });
    assert!(matches!(error, RestoreError::SameTarget { .. }), "{error}");

    // Held by another, as a mount does.
    let mut exclusive = fs::OpenOptions::new();
    let exclusive = std::os::unix::fs::OpenOptionsExt::custom_flags(exclusive.read(true), nix::libc::O_EXCL);
    let held = exclusive.open(&device.device).unwrap();
    assert!(matches!(stored.refused(&force), RestoreError::InUse { .. }));
    drop(held);

    let report = stored.restore(&RestoreOptions { disks: vec![target("a", Some(link))], ..force.clone() }).unwrap();
    assert!(report.disks[0].compared);
    let found = device.content();
    assert!(found[..size] == *stored.bytes("a"), "zeroes included");
    assert!(found[size..].iter().all(|byte| *byte == 0xaa), "what lies behind the disk is not touched");

    let small = Loop::new(&vec![0; 4096 * 512]);
    let error =
        stored.refused(&RestoreOptions { disks: vec![target("a", Some(small.device.clone()))], ..force.clone() });
    assert!(matches!(error, RestoreError::DeviceTooSmall { device_bytes: 2_097_152, .. }), "{error}");

    // Files are written first: interrupted then, the device is as it was, and no file is left.
    let both = vec![target("a", here), target("b", None)];
    let options = RestoreOptions { disks: both, dir: stored.dir.path().join("new"), ..force };
    let flag = AtomicBool::new(false);
    let mut progress = |_| flag.store(true, Ordering::Relaxed);
    let error = restore(&stored.repo, &stored.point, &options, &flag, &mut progress).unwrap_err();
    assert!(matches!(error, RestoreError::Interrupted), "{error}");
    assert!(!options.dir.exists() && device.content() == found);

    // Ended once the device is begun: said to be undefined.
    let pack = largest_pack(&stored);
    let len = fs::metadata(&pack).unwrap().len();
    fs::OpenOptions::new().write(true).open(&pack).unwrap().set_len(len / 2).unwrap();
    let error = stored.restore(&options).unwrap_err();
    assert!(matches!(error, RestoreError::DeviceUndefined { .. }), "{error}");
    assert!(error.to_string().contains("undefined") && !options.dir.exists(), "{error}");
}
