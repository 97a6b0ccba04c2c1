//! What fuzzing runs: each function takes any bytes and must neither panic nor hang, whatever they are.
//!
//! A cargo-fuzz target is one line: `fuzz_target!(|data: &[u8]| livebackup::repo::fuzz::pack(data));`. A short run with
//! mutated valid input is part of the normal tests.

use crate::repo::config::Config;
use crate::repo::digest::Digest;
use crate::repo::index::format::{Cache, Header, View};
use crate::repo::point::Manifest;
use crate::repo::tree::Node;
use crate::repo::{damage, journal, pack, session_log, suspect};

/// The config decoder.
pub fn config(bytes: &[u8]) {
    let _ = Config::decode(bytes);
}

/// The manifest decoder.
pub fn manifest(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::decode(bytes) {
        assert!(manifest.images().all(|(_, image)| image.depth() <= 5));
    }
}

/// The decoder of marks of damage.
pub fn marks(bytes: &[u8]) {
    let _ = damage::decode(bytes);
}

/// The log of a session.
pub fn session_log(bytes: &[u8]) {
    if let Some((begun, runs, whole_bytes)) = session_log::decode(bytes) {
        assert!(begun.len() as u64 <= whole_bytes && whole_bytes <= bytes.len() as u64);
        assert!(runs.windows(2).all(|w| w[0].disk < w[1].disk || w[0].end_chunk() <= w[1].first_chunk));
    }
}

/// The decoder of marks of suspect points.
pub fn suspect(bytes: &[u8]) {
    let _ = suspect::decode(bytes);
}

/// The decoder of a pack's header, footer and directory.
pub fn pack(bytes: &[u8]) {
    if let Ok((_, blobs)) = pack::decode(bytes) {
        for blob in blobs {
            assert!(blob.placed.end() <= bytes.len() as u64);
        }
    }
}

/// The index: its header, each entry, and look-ups of what it says it has.
pub fn index(bytes: &[u8]) {
    let Ok(header) = Header::decode(bytes, bytes.len() as u64) else { return };
    let cache = Cache::new(&header);
    let view = View::new(&bytes, header, &cache);
    let _ = view.check_body();
    for n in 0..view.header().entries.min(1000) {
        if let Ok(entry) = view.entry(n) {
            let _ = view.find(&entry.digest).take(10).count();
        }
    }
    for digest in [Digest::ZERO, Digest::of(bytes), Digest::from_bytes([0xff; 32])] {
        assert!(view.lower_bound(&digest).is_ok_and(|n| n <= view.header().entries));
    }
}

/// The tree node decoder.
pub fn node(bytes: &[u8]) {
    if let Ok(node) = Node::decode(bytes) {
        assert_eq!(node.encode(), bytes);
    }
}

/// The decoder of a journal's list.
pub fn journal(bytes: &[u8]) {
    assert!(journal::decode(bytes).len() <= bytes.len() / 32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::blob::{Blob, Codec, Placed};
    use crate::repo::index::format::{PackRef, encode_entry, encode_header};
    use crate::repo::pack::PackKind;
    use crate::repo::point::tests::{manifest as a_manifest, point_disk};
    use crate::repo::tree::{Image, NODE_BYTES};
    use crate::units::{PackId, RepositoryId};

    struct Random(u64);

    impl Random {
        fn next(&mut self, below: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 11) as usize % below.max(1)
        }
    }

    /// Valid input with flipped bits, overwritten numbers, cuts, and pieces doubled; and bytes of any kind.
    fn run(valid: &[u8], target: fn(&[u8]), repair: fn(&mut [u8])) {
        let mut random = Random(0x5eed);
        target(valid);
        target(&[]);
        for round in 0..3000 {
            let mut bytes = match round % 10 {
                0 => (0..random.next(400)).map(|_| random.next(256) as u8).collect(),
                _ => valid.to_vec(),
            };
            for _ in 0..1 + random.next(4) {
                let len = bytes.len();
                let at = random.next(len);
                match random.next(5) {
                    0 if len > 0 => bytes[at] ^= 1 << random.next(8),
                    1 if len >= at + 8 => bytes[at..at + 8].fill([0, 0xff, 0x7f, 0x80][random.next(4)]),
                    2 => bytes.truncate(at),
                    3 => bytes.extend_from_within(at..(at + 64).min(len)),
                    _ if len > 0 => bytes[at] = random.next(256) as u8,
                    _ => {}
                }
            }
            target(&bytes);
            // Past the checksums, too.
            repair(&mut bytes);
            target(&bytes);
        }
    }

    fn a_blob(n: u32) -> Blob {
        let placed = Placed { offset_bytes: 4096 + n * 100, stored_len: 100, raw_len: 65536, codec: Codec::Zstd };
        Blob { digest: Digest::of(&n.to_le_bytes()), placed }
    }

    #[test]
    fn configs() {
        let now = jiff::Timestamp::UNIX_EPOCH;
        let valid = Config { id: RepositoryId::random(), chunk_bytes: 65536, created: now }.encode().unwrap();
        run(&valid, config, |_| {});
    }

    #[test]
    fn manifests() {
        let image = Image { root: Digest::of(b"r"), size_bytes: 5, chunk_bytes: 65536 };
        run(&a_manifest("v", vec![point_disk("d", image)]).encode().unwrap(), manifest, |_| {});
    }

    #[test]
    fn packs() {
        let blobs: Vec<_> = (0..20).map(a_blob).collect();
        let mut valid = pack::encode_header(PackKind::Data);
        valid.resize(4096 + 2000, 7);
        valid.extend(pack::encode_tail(PackKind::Data, &blobs));
        assert_eq!(pack::decode(&valid).unwrap(), (PackKind::Data, blobs));
        run(&valid, pack, |bytes| {
            let Some(footer) = bytes.len().checked_sub(32) else { return };
            let len = u32::from_le_bytes(*bytes[footer..].first_chunk().unwrap()) as usize;
            if let Some(directory) = footer.checked_sub(len) {
                let crc = crc32fast::hash(&bytes[directory..footer]);
                bytes[footer + 8..footer + 12].copy_from_slice(&crc.to_le_bytes());
            }
            let crc = crc32fast::hash(&bytes[footer..footer + 20]);
            bytes[footer + 20..footer + 24].copy_from_slice(&crc.to_le_bytes());
        });
    }

    #[test]
    fn indexes() {
        let mut blobs: Vec<_> = (0..200).map(a_blob).collect();
        blobs.sort_by_key(|b| b.digest);
        let mut body = PackRef { id: PackId::random(), len_bytes: 70_000, kind: PackKind::Data }.encode().to_vec();
        blobs.iter().for_each(|b| body.extend(encode_entry(&b.digest, 0, &b.placed)));
        let mut valid = encode_header(1, 200, 5, crc32fast::hash(&body)).to_vec();
        valid.extend(body);
        let header = Header::decode(&valid, valid.len() as u64).unwrap();
        View::new(&&valid[..], header, &Cache::new(&header)).check_body().unwrap();
        run(&valid, index, |bytes| {
            if bytes.len() >= 64 {
                let crc = crc32fast::hash(&bytes[..60]);
                bytes[60..64].copy_from_slice(&crc.to_le_bytes());
            }
        });
    }

    #[test]
    fn marks_of_damage_and_suspicion() {
        let dir = tempfile::tempdir().unwrap();
        let layout = crate::repo::layout::Layout::new(dir.path());
        let (pack, digest) = (PackId::random(), Digest::of(b"x"));
        damage::record(&layout, &[(pack, damage::Mark { offset_bytes: 4096, digest })], false).unwrap();
        run(&std::fs::read(layout.damaged().join(pack.to_string())).unwrap(), marks, |_| {});
        let repo = crate::repo::Repository::init(&dir.path().join("repo"), 65536).unwrap();
        let point = a_manifest("v", vec![]);
        repo.commit(&point).unwrap();
        let reason = "found wrong".to_owned();
        let disk = suspect::SuspectDisk { disk: "d".to_owned(), found: jiff::Timestamp::UNIX_EPOCH, reason };
        repo.mark_suspect("v", point.id, disk).unwrap();
        run(&std::fs::read(repo.layout().suspect("v", point.id).unwrap()).unwrap(), super::suspect, |_| {});
    }

    #[test]
    fn nodes_and_journals() {
        run(&vec![3; NODE_BYTES], node, |_| {});
        let mut list = PackRef { id: PackId::random(), len_bytes: 70_000, kind: PackKind::Tree }.encode();
        let crc = crc32fast::hash(&list[..28]);
        list[28..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(journal::decode(&list.repeat(5)).len(), 5);
        run(&list.repeat(5), journal, |_| {});
    }
}
