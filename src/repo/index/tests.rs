use std::collections::BTreeMap;
use std::sync::Arc;

use super::format::{PackRef, RawEntry, encode_entry};
use super::merge::{self, MAX_INDEX_FILES};
use super::set::IndexSet;
use crate::repo::blob::{Codec, Placed};
use crate::repo::digest::Digest;
use crate::repo::error::RepoError;
use crate::repo::layout::Layout;
use crate::repo::pack::PackKind;
use crate::units::PackId;

fn layout() -> (tempfile::TempDir, Layout) {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(dir.path());
    std::fs::create_dir(layout.index()).unwrap();
    std::fs::create_dir(layout.locks()).unwrap();
    (dir, layout)
}

fn pack() -> PackRef {
    PackRef { id: PackId::random(), len_bytes: 1 << 26, kind: PackKind::Data }
}

fn placed(n: u32) -> Placed {
    Placed { offset_bytes: 4096 + n, stored_len: 10, raw_len: 65536, codec: Codec::Zstd }
}

fn sorted(mut entries: Vec<RawEntry>) -> impl Iterator<Item = RawEntry> {
    entries.sort_unstable();
    entries.into_iter()
}

#[test]
fn all_that_is_there_is_found_and_nothing_else() {
    let (_dir, layout) = layout();
    for count in [0u32, 1, 2, 7, 8, 9, 100, 5000] {
        // Random digests as they are in life, and the worst: all in one corner.
        for squeeze in [false, true] {
            let digest = |n: u32| {
                let mut bytes = *Digest::of(&n.to_le_bytes()).as_bytes();
                if squeeze {
                    bytes[..8].fill(if n.is_multiple_of(2) { 0xff } else { 0 });
                }
                Digest::from_bytes(bytes)
            };
            let entries = (0..count).map(|n| encode_entry(&digest(n), 0, &placed(n))).collect();
            let file = merge::write(&layout, &[pack()], sorted(entries)).unwrap();
            file.view().check_body().unwrap();
            for n in 0..count {
                let found: Vec<_> = file.view().find(&digest(n)).map(|e| e.unwrap().1.placed).collect();
                assert_eq!(found, [placed(n)], "{n} of {count}, {squeeze}");
            }
            for n in count..count + 200 {
                assert_eq!(file.view().find(&digest(n)).count(), 0);
            }
        }
    }
}

#[test]
fn many_small_files_are_merged_and_open_ones_stay_right() {
    let (_dir, layout) = layout();
    let mut expected: BTreeMap<Digest, Vec<(PackId, Placed)>> = BTreeMap::new();
    for file in 0..MAX_INDEX_FILES as u32 + 1 {
        let packs = [pack(), pack()];
        let mut entries = Vec::new();
        for n in 0..50 {
            // Neighbouring files share half of their digests.
            let (digest, number) = (Digest::of(&(file * 25 + n).to_le_bytes()), n % 2);
            entries.push(encode_entry(&digest, number, &placed(n)));
            expected.entry(digest).or_default().push((packs[number as usize].id, placed(n)));
        }
        merge::write(&layout, &packs, sorted(entries)).unwrap();
    }
    let before = IndexSet::open(&layout).unwrap();
    let merged = merge::merge_if_many(&layout).unwrap().unwrap();
    assert!(merged.files().len() <= 8, "{}", merged.files().len());
    assert!(merge::merge_if_many(&layout).unwrap().is_none());
    for set in [before, merged] {
        for (digest, places) in &expected {
            let mut found: Vec<_> = set.find_all(digest).map(|l| l.unwrap()).map(|l| (l.pack, l.placed)).collect();
            let mut places = places.clone();
            let key = |(pack, placed): &(PackId, Placed)| (*pack, placed.offset_bytes);
            found.sort_by_key(key);
            places.sort_by_key(key);
            assert_eq!(found, places);
        }
        set.files().iter().for_each(|f| f.view().check_body().unwrap());
    }
}

#[test]
fn doubles_that_a_killed_merge_left_are_dropped_by_the_next() {
    let (_dir, layout) = layout();
    let packs = [pack()];
    let entries = || (0..50u32).map(|n| encode_entry(&Digest::of(&n.to_le_bytes()), 0, &placed(n))).collect();
    for _ in 0..=MAX_INDEX_FILES {
        merge::write(&layout, &packs, sorted(entries())).unwrap();
    }
    let merged = merge::merge_if_many(&layout).unwrap().unwrap();
    let all: Vec<_> = merged.find_all(&Digest::of(&0u32.to_le_bytes())).collect();
    assert_eq!(all.len(), merged.files().len());
    let most = merged.files().iter().map(|f| f.view().header().entries).max();
    assert_eq!(most, Some(50));
}

#[test]
fn a_writer_does_not_trust_packs_that_are_gone() {
    let (_dir, layout) = layout();
    let digest = Digest::of(b"x");
    let entries = vec![encode_entry(&digest, 0, &placed(0))];
    let file = merge::write(&layout, &[pack()], entries.into_iter()).unwrap();
    assert!(IndexSet::open(&layout).unwrap().find(&digest).unwrap().is_some());
    assert!(IndexSet::open_for_writer(&layout).unwrap().find(&digest).unwrap().is_none());
    let mut set = IndexSet::default();
    set.add(Arc::new(file));
    assert!(set.find(&digest).unwrap().is_some());
}

/// A map of the file would end the process by SIGBUS here.
#[test]
fn a_file_that_is_cut_short_while_it_is_open_is_an_error() {
    let (_dir, layout) = layout();
    let digest = |n: u32| Digest::of(&n.to_le_bytes());
    let entries = (0..5000).map(|n| encode_entry(&digest(n), 0, &placed(n))).collect();
    let file = merge::write(&layout, &[pack()], sorted(entries)).unwrap();
    let mut set = IndexSet::default();
    let path = file.path().to_owned();
    set.add(Arc::new(file));
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    for n in 0..100 {
        let error = set.find(&digest(n)).unwrap_err();
        assert!(matches!(&error, RepoError::Corrupt { .. }), "{error}");
        assert!(
            error.to_string().contains(path.to_str().unwrap()) && error.to_string().contains("cut short"),
            "{error}"
        );
        assert_eq!(set.find_all(&digest(n)).count(), 1, "an error is the last");
    }
    assert!(set.files()[0].view().check_body().is_err());
    assert!(set.files()[0].view().entries().any(|entry| entry.is_err()));
}

#[test]
fn a_merge_of_a_file_that_is_cut_short_meanwhile_removes_nothing() {
    let (_dir, layout) = layout();
    for file in 0..3u32 {
        let entries = (0..2000u32).map(|n| encode_entry(&Digest::of(&(file * 5000 + n).to_le_bytes()), 0, &placed(n)));
        merge::write(&layout, &[pack()], sorted(entries.collect())).unwrap();
    }
    let set = IndexSet::open(&layout).unwrap();
    let path = set.files()[1].path();
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(70_000).unwrap();
    let error = merge::merge(&layout, set.files()).unwrap_err();
    assert!(error.to_string().contains("cut short"), "{error}");
    assert_eq!(std::fs::read_dir(layout.index()).unwrap().count(), 3);
}
