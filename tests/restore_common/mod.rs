//! What the tests of restores share.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use livebackup::repo::{Manifest, Repository};
use livebackup::restore::{DiskTarget, RestoreError, RestoreOptions, RestoreReport, restore};
use livebackup::units::KIB;

use super::repo_common::{manifest, pattern, store};

pub const CHUNK: u32 = 128 * KIB as u32;

/// A repository with one point of these disks.
pub struct Stored {
    pub dir: tempfile::TempDir,
    pub repo: Repository,
    pub point: Manifest,
    pub disks: Vec<(String, Vec<u8>)>,
}

pub fn stored(disks: Vec<(&str, Vec<u8>)>) -> Stored {
    let dir = tempfile::tempdir().unwrap();
    let repo = Repository::init(&dir.path().join("repo"), CHUNK).unwrap();
    let images: Vec<_> = disks.iter().map(|(name, bytes)| (*name, store(&repo, bytes, CHUNK, None))).collect();
    let point = manifest("vm", &images);
    repo.commit(&point).unwrap();
    let disks = disks.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect();
    Stored { dir, repo, point, disks }
}

impl Stored {
    pub fn out(&self) -> PathBuf {
        self.dir.path().join("a/out")
    }

    pub fn options(&self) -> RestoreOptions {
        RestoreOptions::new(self.out())
    }

    pub fn restore(&self, options: &RestoreOptions) -> Result<RestoreReport, RestoreError> {
        restore(&self.repo, &self.point, options, &AtomicBool::new(false), &mut |_| {})
    }

    pub fn refused(&self, options: &RestoreOptions) -> RestoreError {
        let before = tree(self.dir.path());
        let error = self.restore(options).unwrap_err();
        assert_eq!(tree(self.dir.path()), before, "something was left or changed: {error}");
        error
    }

    pub fn bytes(&self, disk: &str) -> &[u8] {
        &self.disks.iter().find(|(name, _)| name == disk).unwrap().1
    }
}

/// All below a directory but the repository, with contents.
pub fn tree(dir: &Path) -> Vec<(PathBuf, Option<Vec<u8>>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.ends_with("repo") {
        } else if path.is_dir() {
            found.push((path.clone(), None));
            found.extend(tree(&path));
        } else {
            found.push((path.clone(), fs::read(&path).ok()));
        }
    }
    found.sort();
    found
}

pub fn target(disk: &str, target: Option<PathBuf>) -> DiskTarget {
    DiskTarget { disk: disk.to_owned(), target }
}

pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}; install qemu-utils, util-linux or mount"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    said
}

/// Data, zeroes within chunks, whole zero chunks, data at the end.
pub fn mixed(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = pattern(seed, len);
    let chunk = CHUNK as usize;
    for (i, piece) in bytes.chunks_mut(chunk).enumerate() {
        let len = piece.len();
        match i % 7 {
            2 | 3 => piece.fill(0),
            4 => piece[..len / 2].fill(0),
            5 => piece[len / 3..].fill(0),
            _ => {}
        }
    }
    if let Some(last) = bytes.last_mut() {
        *last = 7;
    }
    bytes
}
