//! A writer killed at every named point leaves all earlier points intact, and the next one goes on with its packs. A full
//! disk is said to be full and harms nothing either.
//!
//! The killed writer is this test program itself, started again with the name of the point in its environment.
#![allow(clippy::unwrap_used)]

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};

use crate::repo_common::*;
use bytes::Bytes;
use livebackup::repo::verify::{Scope, verify};
use livebackup::repo::{Compression, Image, RepoError, Repository, WriterOptions};
use livebackup::units::{KIB, MIB};

const CHUNK: u32 = 64 * KIB as u32;
/// Two full packs and some.
const DISK_MIB: u64 = 150;

fn second_version() -> Vec<u8> {
    pattern(2, (DISK_MIB * MIB) as usize)
}

fn backup(repo: &Repository, disk: &[u8], base: Option<Image>) -> Result<(Image, u64, u64), RepoError> {
    let _lock = repo.lock_vm("vm")?;
    let writer = repo.writer(WriterOptions { compression: Compression::None, ..WriterOptions::default() })?;
    let handle = writer.disk(disk.len() as u64, CHUNK, base)?;
    for (i, piece) in disk.chunks(MIB as usize).enumerate() {
        writer.put_blocking(handle, i as u64 * MIB, Bytes::copy_from_slice(piece))?;
    }
    let finished = writer.finish()?;
    let image = finished.disks[0].image;
    repo.commit(&manifest("vm", &[("disk0", image)]))?;
    Ok((image, finished.adopted_packs, finished.disks[0].stats.new_bytes))
}

/// What the started copy of this program does; without the variable, nothing.
#[test]
fn child() {
    let Some(dir) = std::env::var_os("REPO_CRASH_DIR") else { return };
    if std::env::var_os("REPO_CRASH_IGNORE_XFSZ").is_some() {
        // SAFETY: ignoring a signal installs no handler.
        unsafe { nix::sys::signal::signal(nix::sys::signal::SIGXFSZ, nix::sys::signal::SigHandler::SigIgn) }.unwrap();
        let limit = 30 * MIB;
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_FSIZE, limit, limit).unwrap();
    }
    let repo = Repository::open(Path::new(&dir)).unwrap();
    match backup(&repo, &second_version(), None) {
        Ok(_) => println!("backup done"),
        Err(error) => println!("backup failed, no space: {}: {error}", error.is_no_space()),
    }
}

fn run_child(dir: &Path, variable: &str, value: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["repo_crash::child", "--exact", "--nocapture"])
        .env("REPO_CRASH_DIR", dir)
        .env(variable, value)
        .output()
        .unwrap()
}

fn check_intact(repo: &Repository, expected: &[(Image, &[u8])]) {
    let report = verify(repo, Scope::Everything, |_| {}).unwrap();
    assert!(report.is_intact(), "{:?}", report.damage);
    let points = repo.points("vm").unwrap();
    assert!(points.damaged.is_empty());
    for (image, bytes) in expected {
        assert!(points.points.iter().any(|p| p.disks[0].image == *image));
        assert!(read_back(repo, *image) == *bytes);
    }
}

#[test]
fn killed_at_every_point_nothing_is_lost() {
    let second = second_version();
    for (point, visible, reused_packs) in [
        ("repo.pack-written", false, 0),
        ("repo.pack-renamed", false, 0),
        ("repo.pack-written:2", false, 0),
        ("repo.pack-renamed:3", false, 2),
        ("repo.index-written", false, 0),
        ("repo.before-manifest", false, 0),
        ("durable.renamed:2", true, 0),
        ("repo.after-manifest", true, 0),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let repo = Repository::init(dir.path(), CHUNK).unwrap();
        let first = pattern(1, 3 * MIB as usize + 5);
        let (image, ..) = backup(&repo, &first, None).unwrap();
        let output = run_child(dir.path(), "LIVEBACKUP_KILL_AT", point);
        assert_eq!(output.status.signal(), Some(9), "{point}: {}", String::from_utf8_lossy(&output.stdout));
        check_intact(&repo, &[(image, &first)]);
        assert_eq!(repo.points("vm").unwrap().points.len(), 1 + usize::from(visible), "{point}");

        let (again, adopted, new_bytes) = backup(&repo, &second, None).unwrap();
        assert!(adopted >= reused_packs, "{point}: {adopted} packs adopted");
        let reused = second.len() as u64 - new_bytes;
        assert!(reused >= reused_packs * 60 * MIB, "{point}: {reused} bytes reused");
        if point.contains("index") || point.contains("manifest") || visible {
            assert_eq!(new_bytes, 0, "{point}: all was indexed already");
        }
        check_intact(&repo, &[(image, &first), (again, &second)]);
        assert_eq!(std::fs::read_dir(dir.path().join("journal")).unwrap().count(), 0, "{point}: nothing is left over");
    }
}

#[test]
fn a_full_disk_is_said_to_be_full_and_harms_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let repo = Repository::init(dir.path(), CHUNK).unwrap();
    let first = pattern(1, 3 * MIB as usize + 5);
    let (image, ..) = backup(&repo, &first, None).unwrap();
    let output = run_child(dir.path(), "REPO_CRASH_IGNORE_XFSZ", "1");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("no space: true") && said.contains("make space"), "{said}");
    check_intact(&repo, &[(image, &first)]);
    assert_eq!(std::fs::read_dir(dir.path().join("journal")).unwrap().count(), 0);
    let second = second_version();
    let (again, ..) = backup(&repo, &second, None).unwrap();
    check_intact(&repo, &[(image, &first), (again, &second)]);
}

#[test]
fn two_processes_do_not_back_up_one_vm_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let repo = Repository::init(dir.path(), CHUNK).unwrap();
    let _lock = repo.lock_vm("vm").unwrap();
    let output = run_child(dir.path(), "REPO_CRASH_OTHER", "1");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("another backup of \"vm\""), "{said}");
    assert!(said.contains(&format!("process {}", std::process::id())), "{said}");
}
