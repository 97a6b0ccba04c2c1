//! What the tests of the repository share.
#![allow(dead_code, clippy::unwrap_used)]

use std::sync::Mutex;

use bytes::Bytes;
use livebackup::machine::{Disk, DiskKind, Machine, Taken};
use livebackup::repo::point::{Grade, Level, PointDisk, PointTotals};
use livebackup::repo::{Image, Manifest, ReadOptions, RepoError, Repository, WriterOptions};
use livebackup::units::{MIB, PointId};

/// Size of the disk of the stored example: its last chunk is short.
pub const EXAMPLE_BYTES: usize = 5 * 65536 + 512;

/// Bytes made of words, each of a number that comes again only with the seed, and of where the word begins.
fn words(seed: u64, len: usize, word: impl Fn(u64, usize) -> u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let word = word(state, out.len());
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// Bytes that repeat only with their seed; every other KiB is text, so that they compress by about half.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let text = |number| 0x2020_6f6c_6c65_6820 + (number & 1);
    words(seed, len, |number, at| if at / 1024 % 2 == 0 { number } else { text(number) })
}

/// Bytes that do not compress.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    words(seed, len, |number, _| number.wrapping_mul(0x2545_f491_4f6c_dd1d))
}

/// Stores a whole disk; with a base, only the chunks that differ from `base` are not put (none are known to here).
pub fn store(repo: &Repository, disk: &[u8], chunk_bytes: u32, base: Option<Image>) -> Image {
    let writer = repo.writer(WriterOptions::default()).unwrap();
    let handle = writer.disk(disk.len() as u64, chunk_bytes, base).unwrap();
    for (i, piece) in disk.chunks(MIB as usize).enumerate() {
        writer.put_blocking(handle, i as u64 * MIB, Bytes::copy_from_slice(piece)).unwrap();
    }
    writer.finish().unwrap().disks[0].image
}

/// A manifest of disks with these names and contents.
pub fn manifest(vm: &str, disks: &[(&str, Image)]) -> Manifest {
    let now = jiff::Timestamp::now();
    let disk = |(name, image): &(&str, Image)| PointDisk {
        disk: Disk {
            name: (*name).to_owned(),
            kind: DiskKind::Disk,
            device: "virtio-blk-device".to_owned(),
            qom_path: format!("/machine/peripheral/{name}"),
            node: "node0".to_owned(),
            size_bytes: image.size_bytes,
            read_only: false,
            iothread: false,
            discard_unmap: true,
            chain: Vec::new(),
            shared: None,
        },
        image: *image,
        checkpoint: None,
        epoch: None,
        taken: Taken::Full { reason: "a test".to_owned() },
        read_bytes: image.size_bytes,
        same_bytes: 0,
        stored_bytes: 0,
        audit: None,
        impact: None,
        areas: Default::default(),
    };
    Manifest {
        id: PointId::random(),
        vm: vm.to_owned(),
        started: now,
        instant: now,
        finished: now,
        level: Level::Full,
        parent: None,
        grade: Grade::Crash,
        evidence: Default::default(),
        machine: Machine::default(),
        disks: disks.iter().map(disk).collect(),
        files: Vec::new(),
        left_out: Vec::new(),
        totals: PointTotals::default(),
        livebackup: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// All bytes of an image, zeroes included, read both ways.
pub fn read_back(repo: &Repository, image: Image) -> Vec<u8> {
    let reader = repo.reader().unwrap();
    let out = Mutex::new(vec![0u8; image.size_bytes as usize]);
    let place = |offset: u64, bytes: &[u8]| {
        let at = offset as usize;
        out.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok::<(), RepoError>(())
    };
    reader.read_image(image, &ReadOptions::default(), place).unwrap();
    let out = out.into_inner().unwrap();
    let mut next = 0;
    reader
        .read_image_in_order::<RepoError>(image, &ReadOptions::default(), |offset, bytes| {
            assert!(offset >= next, "{offset} came after {next}");
            assert_eq!(out[offset as usize..offset as usize + bytes.len()], *bytes);
            next = offset + bytes.len() as u64;
            Ok(())
        })
        .unwrap();
    out
}
