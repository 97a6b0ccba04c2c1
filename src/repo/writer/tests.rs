//! Index files that are written on the way (in unit tests after 300 entries), and their merging under a running writer.

use bytes::Bytes;

use super::{Compression, WriterOptions};
use crate::repo::Repository;
use crate::repo::verify::{Scope, verify};
use crate::units::{KIB, MIB};

/// A chunk that no other number gives.
fn chunk(number: u64) -> Vec<u8> {
    let mut bytes = vec![0; 64 * KIB as usize];
    bytes[..8].copy_from_slice(&(number + 1).to_le_bytes());
    bytes
}

#[test]
fn a_writer_forgets_what_index_files_have_and_still_stores_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    let repo = Repository::init(dir.path(), 64 * KIB as u32).unwrap();
    let options = WriterOptions { compression: Compression::Zstd(1), ..WriterOptions::default() };
    let writer = repo.writer(options).unwrap();
    let (rounds, each) = (20u64, 320u64);
    let size = rounds * each * 64 * KIB;
    let disk = writer.disk(2 * size, 64 * KIB as u32, None).unwrap();
    let mut at = 0;
    for round in 0..rounds * 2 {
        for n in (0..each).step_by(16) {
            // The second half of the disk repeats the first one.
            let first = round % rounds * each + n;
            let bytes: Vec<u8> = (first..first + 16).flat_map(chunk).collect();
            writer.put_blocking(disk, at, Bytes::from(bytes)).unwrap();
            at += MIB;
        }
        super::shared::block_on(writer.flush()).unwrap();
    }
    let finished = writer.finish().unwrap();
    assert_eq!(finished.disks[0].stats.new_bytes, size);
    assert!(finished.packs > rounds, "{}", finished.packs);
    let files = std::fs::read_dir(dir.path().join("index")).unwrap().count();
    assert!((2..=16).contains(&files), "{files} index files are left");
    let report = verify(&repo, Scope::Everything, |_| {}).unwrap();
    assert!(report.is_intact());
    let reader = repo.reader().unwrap();
    let mut chunks = 0u64;
    for found in reader.walk(finished.disks[0].image, crate::extent::Extent::new(0, 2 * size)) {
        let found = found.unwrap();
        assert_eq!(found.extent.offset_bytes, chunks * 64 * KIB);
        assert!(reader.chunk(&found.digest, 64 * KIB as usize).unwrap() == chunk(chunks % (rounds * each)));
        chunks += 1;
    }
    assert_eq!(chunks, 2 * rounds * each);
}

#[test]
fn an_empty_writer_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let repo = Repository::init(dir.path(), 64 * KIB as u32).unwrap();
    assert!(repo.writer(WriterOptions::default()).unwrap().finish().unwrap().disks.is_empty());
    drop(repo.writer(WriterOptions::default()).unwrap());
    for part in ["index", "packs", "journal"] {
        assert_eq!(std::fs::read_dir(dir.path().join(part)).unwrap().count(), 0, "{part}");
    }
}
