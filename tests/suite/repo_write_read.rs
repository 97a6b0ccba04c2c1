//! What was written is what is read: over versions, with both ways of storing, with odd sizes, and each chunk once.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use crate::repo_common::{pattern, read_back};
use bytes::Bytes;
use livebackup::extent::Extent;
use livebackup::repo::{Compression, Image, Repository, WriterOptions};
use livebackup::units::{KIB, MIB};

const CHUNK: u32 = 64 * KIB as u32;

fn options(compression: Compression) -> WriterOptions {
    WriterOptions { compression, ..WriterOptions::default() }
}

fn store(repo: &Repository, compression: Compression, disk: &[u8]) -> Image {
    let writer = repo.writer(options(compression)).unwrap();
    let handle = writer.disk(disk.len() as u64, CHUNK, None).unwrap();
    for (i, piece) in disk.chunks(MIB as usize).enumerate() {
        writer.put_blocking(handle, i as u64 * MIB, Bytes::copy_from_slice(piece)).unwrap();
    }
    writer.finish().unwrap().disks[0].image
}

fn pack_bytes(dir: &Path) -> u64 {
    let packs =
        std::fs::read_dir(dir.join("packs")).unwrap().flat_map(|d| std::fs::read_dir(d.unwrap().path()).unwrap());
    packs.map(|p| p.unwrap().metadata().unwrap().len()).sum()
}

#[test]
fn versions_read_back_whatever_was_written_after_them() {
    for compression in [Compression::None, Compression::Zstd(1)] {
        for size in [0, 1, 4096, 65536, 65537, 3 * MIB + 512, 40 * MIB + 77] {
            let dir = tempfile::tempdir().unwrap();
            let repo = Repository::init(dir.path(), CHUNK).unwrap();
            let mut model = pattern(size, size as usize);
            let mut versions = vec![(store(&repo, compression, &model), model.clone())];
            for round in 1..4u64 {
                let writer = repo.writer(options(compression)).unwrap();
                let disk = writer.disk(size, CHUNK, Some(versions[versions.len() - 1].0)).unwrap();
                let mut at = round * 131_072;
                while at < size {
                    let len = (u64::from(CHUNK) * (1 + at / 65536 % 3)).min(size - at);
                    let range = at as usize..(at + len) as usize;
                    if at / 65536 % 5 == round {
                        writer.zero_blocking(disk, Extent::new(at, len)).unwrap();
                        model[range].fill(0);
                    } else {
                        model[range.clone()].copy_from_slice(&pattern(round * 1000 + at, len as usize));
                        writer.put_blocking(disk, at, Bytes::copy_from_slice(&model[range])).unwrap();
                    }
                    at += len + round * 7 * 65536;
                }
                let finished = writer.finish().unwrap();
                versions.push((finished.disks[0].image, model.clone()));
            }
            for (image, expected) in &versions {
                assert!(read_back(&repo, *image) == *expected, "{compression:?} {size}");
            }
        }
    }
}

#[test]
fn equal_chunks_are_stored_once() {
    let dir = tempfile::tempdir().unwrap();
    let repo = Repository::init(dir.path(), CHUNK).unwrap();
    let piece = pattern(1, 256 * 1024);
    let disk = piece.repeat(200);
    let image = store(&repo, Compression::None, &disk);
    let before = pack_bytes(dir.path());
    assert!(before < 300 * KIB, "{before}");
    let again = store(&repo, Compression::Zstd(1), &disk);
    assert_eq!(image, again);
    assert_eq!(pack_bytes(dir.path()), before, "nothing was new");
    assert!(read_back(&repo, image) == disk);
}

#[test]
fn zeroes_cost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let repo = Repository::init(dir.path(), CHUNK).unwrap();
    let writer = repo.writer(WriterOptions::default()).unwrap();
    let size = 1u64 << 40;
    let disk = writer.disk(size, CHUNK, None).unwrap();
    writer.put_blocking(disk, 0, Bytes::from(vec![0; MIB as usize])).unwrap();
    writer.zero_blocking(disk, Extent::between(MIB, size)).unwrap();
    let finished = writer.finish().unwrap();
    assert!(finished.disks[0].image.root.is_zero());
    assert_eq!(finished.disks[0].stats.zero_bytes, size);
    assert_eq!(pack_bytes(dir.path()), 0);
}

#[test]
fn every_extent_is_told_to_be_durable_once() {
    let dir = tempfile::tempdir().unwrap();
    let repo = Repository::init(dir.path(), CHUNK).unwrap();
    let mut writer = repo.writer(options(Compression::None)).unwrap();
    let mut durable = writer.take_durable().unwrap();
    let size = 200 * MIB;
    let disk = writer.disk(size, CHUNK, None).unwrap();
    let data = Bytes::from(pattern(3, 100 * MIB as usize));
    for i in 0..100 {
        let at = (i * MIB) as usize;
        writer.put_blocking(disk, i * MIB, data.slice(at..at + MIB as usize)).unwrap();
    }
    // The first half again: durable with the first copies.
    for i in 100..150 {
        let at = ((i - 100) * MIB) as usize;
        writer.put_blocking(disk, i * MIB, data.slice(at..at + MIB as usize)).unwrap();
    }
    writer.zero_blocking(disk, Extent::between(150 * MIB, size)).unwrap();
    let mut told = Vec::new();
    let first_half = |told: &Vec<Extent>| told.iter().map(|e: &Extent| e.len_bytes).sum::<u64>() >= 114 * MIB;
    while !first_half(&told) {
        let (handle, extents) = durable.blocking_recv().unwrap();
        assert_eq!(handle, disk);
        told.extend(extents);
    }
    writer.finish().unwrap();
    while let Some((_, extents)) = durable.blocking_recv() {
        told.extend(extents);
    }
    told.sort();
    assert_eq!(told.iter().map(|e| e.len_bytes).sum::<u64>(), size);
    assert!(told.windows(2).all(|pair| pair[0].end() == pair[1].offset_bytes));
}

#[test]
fn misuse_is_refused_and_harms_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let repo = Repository::init(dir.path(), CHUNK).unwrap();
    let writer = repo.writer(WriterOptions::default()).unwrap();
    let size = MIB + 5;
    let disk = writer.disk(size, CHUNK, None).unwrap();
    let chunk = || Bytes::from(pattern(9, CHUNK as usize));
    assert!(writer.disk(size, 4096, None).is_err());
    assert!(writer.disk(size + 1, CHUNK, Some(Image::zero(size, CHUNK).unwrap())).is_err());
    writer.put_blocking(disk, 65536, chunk()).unwrap();
    assert!(writer.put_blocking(disk, 65536, chunk()).is_err(), "twice");
    assert!(writer.put_blocking(disk, 0, chunk()).is_err(), "backwards");
    assert!(writer.put_blocking(disk, 131_073, chunk()).is_err(), "not aligned");
    assert!(writer.put_blocking(disk, 131_072, Bytes::from(vec![1; 100])).is_err(), "short");
    assert!(writer.put_blocking(disk, MIB, chunk()).is_err(), "past the end");
    assert!(writer.put_blocking(disk, 131_072, Bytes::from(vec![1; 1 << 21])).is_err(), "too long");
    assert!(writer.zero_blocking(disk, Extent { offset_bytes: 131_072, len_bytes: u64::MAX }).is_err());
    writer.put_blocking(disk, MIB, Bytes::from_static(b"12345")).unwrap();
    let image = writer.finish().unwrap().disks[0].image;
    let mut expected = vec![0; size as usize];
    expected[65536..131_072].copy_from_slice(&chunk());
    expected[MIB as usize..].copy_from_slice(b"12345");
    assert!(read_back(&repo, image) == expected);
}

#[test]
fn a_dropped_writer_leaves_what_the_next_one_reuses() {
    let dir = tempfile::tempdir().unwrap();
    let repo = Repository::init(dir.path(), CHUNK).unwrap();
    let data = Bytes::from(pattern(5, 160 * MIB as usize));
    let writer = repo.writer(options(Compression::None)).unwrap();
    let disk = writer.disk(160 * MIB, CHUNK, None).unwrap();
    for i in 0..160 {
        writer.put_blocking(disk, i * MIB, data.slice((i * MIB) as usize..((i + 1) * MIB) as usize)).unwrap();
    }
    drop(writer);
    assert!(pack_bytes(dir.path()) >= 64 * MIB);
    let writer = repo.writer(options(Compression::None)).unwrap();
    let disk = writer.disk(160 * MIB, CHUNK, None).unwrap();
    for i in 0..160 {
        writer.put_blocking(disk, i * MIB, data.slice((i * MIB) as usize..((i + 1) * MIB) as usize)).unwrap();
    }
    let finished = writer.finish().unwrap();
    assert!(finished.adopted_packs >= 1);
    assert!(finished.disks[0].stats.new_bytes <= 96 * MIB, "{:?}", finished.disks[0].stats);
    assert!(read_back(&repo, finished.disks[0].image) == data);
    assert_eq!(std::fs::read_dir(dir.path().join("journal")).unwrap().count(), 0);
}

#[test]
fn writers_beside_each_other_do_not_disturb() {
    let dir = tempfile::tempdir().unwrap();
    let repo = Repository::init(dir.path(), CHUNK).unwrap();
    let common = pattern(7, 20 * MIB as usize);
    std::thread::scope(|scope| {
        for vm in 0..4u64 {
            let (repo, common) = (&repo, &common);
            scope.spawn(move || {
                let mut disk = common.clone();
                for round in 0..3 {
                    let at = (vm * 3 + round) as usize * MIB as usize;
                    disk[at..at + 100_000].copy_from_slice(&pattern(vm * 10 + round, 100_000));
                    let image = store(repo, Compression::Zstd(1), &disk);
                    assert!(read_back(repo, image) == disk);
                }
            });
        }
    });
    assert_eq!(std::fs::read_dir(dir.path().join("journal")).unwrap().count(), 0);
}
