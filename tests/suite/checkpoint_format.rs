//! The checkpoint file: a stored example that must keep opening, its corrupted twins, and noise.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use livebackup::checkpoint::format::{self, Content, FormatError, Header, Payload};
use livebackup::checkpoint::{Bitmap, fuzz};
use livebackup::extent::Extent;
use livebackup::units::{CheckpointId, EpochId, GRANULE_BYTES};
use proptest::prelude::*;

fn stored_example() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoint-v1/example.ckpt")
}

/// The same checkpoint in version 2.
fn stored_runs() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoint-v2/example.ckpt")
}

/// What the stored example holds, known here and nowhere else.
fn example_bitmap() -> Bitmap {
    let mut bitmap = Bitmap::new(1000 * GRANULE_BYTES + 4096);
    for granule in [0, 1, 2, 63, 64, 65, 500, 999, 1000] {
        bitmap.set(Extent::new(granule * GRANULE_BYTES, 1));
    }
    bitmap
}

fn example_header(stored_bytes: u64) -> Header {
    Header {
        id: CheckpointId::from_bytes([0x11; 16]),
        prev: Some(CheckpointId::from_bytes([0x22; 16])),
        epoch: EpochId::from_bytes([0x33; 16]),
        number: 42,
        time: "2025-06-07T08:09:10.111213Z".parse().unwrap(),
        size_bytes: 1000 * GRANULE_BYTES + 4096,
        granule_bytes: GRANULE_BYTES as u32,
        covers: vec![CheckpointId::from_bytes([0x44; 16]), CheckpointId::from_bytes([0x55; 16])],
        payload: Payload::Words,
        stored_bytes,
    }
}

fn encode(header: &Header, bitmap: &Bitmap) -> Vec<u8> {
    let Header { id, prev, epoch, number, time, ref covers, .. } = *header;
    Content { id, prev, epoch, number, time, covers, bitmap }.encode().unwrap().1
}

/// The stored example was written by this once; a new version of the format adds a file, and never touches an old one.
#[test]
fn the_stored_example_can_be_made_again() {
    let (header, bitmap) = format::decode(&encode(&example_header(0), &example_bitmap())).unwrap();
    assert_eq!((header.id, header.covers), (example_header(0).id, example_header(0).covers));
    assert_eq!(bitmap, example_bitmap());
}

#[test]
fn the_stored_example_opens() {
    let file = std::fs::read(stored_example()).unwrap();
    let (header, bitmap) = format::decode(&file).unwrap();
    assert_eq!(header, example_header(header.stored_bytes));
    assert_eq!(bitmap, example_bitmap());
    assert_eq!(Header::read_file(&stored_example()).unwrap(), header);
    assert_eq!(&file[..16], b"LBCKPT\x00\x01\x01\x00\x00\x00\x80\x00\x00\x00", "the start is frozen");
}

#[test]
fn a_turned_bit_or_byte_is_noticed_wherever_it_is() {
    for example in [stored_example(), stored_runs()] {
        let file = std::fs::read(example).unwrap();
        for at in 0..file.len() {
            for change in (0..8).map(|bit| 1 << bit).chain([0xff, 0x55]) {
                let mut twin = file.clone();
                twin[at] ^= change;
                assert!(format::decode(&twin).is_err(), "byte {at} ^ {change:#x} was not noticed");
            }
        }
    }
}

#[test]
fn the_stored_example_of_version_2_opens() {
    let file = std::fs::read(stored_runs()).unwrap();
    let (header, bitmap) = format::decode(&file).unwrap();
    let Payload::Runs { raw_bytes } = header.payload else { panic!("{header:?}") };
    assert!(raw_bytes < 1001 / 8, "shorter than the words");
    assert_eq!(header, Header { payload: header.payload, ..example_header(header.stored_bytes) });
    assert_eq!(bitmap, example_bitmap());
    assert_eq!(Header::read_file(&stored_runs()).unwrap(), header);
    assert_eq!(&file[..16], b"LBCKPT\x00\x01\x02\x00\x00\x00\x80\x00\x00\x00", "the start is frozen");
    let again = encode(&example_header(0), &example_bitmap());
    assert_eq!(again[..16], file[..16], "what is sparse is written in version 2");
}

/// Words where they are shorter: version 1 is still written.
#[test]
fn a_dense_bitmap_is_written_as_words() {
    let mut bitmap = Bitmap::new(1000 * GRANULE_BYTES);
    (0..1000).filter(|n| n % 3 != 0).for_each(|n| bitmap.set(Extent::new(n * GRANULE_BYTES, 1)));
    let mut file = encode(&example_header(0), &bitmap);
    let (header, again) = format::decode(&file).unwrap();
    assert_eq!((header.payload, again), (Payload::Words, bitmap));
    // The same payload for a disk that is shorter by 16 granules: the last bits are past its end.
    file[16 + 64..16 + 72].copy_from_slice(&(984 * GRANULE_BYTES).to_le_bytes());
    let crc = crc32fast::hash(&file[..144]).to_le_bytes();
    file[144..148].copy_from_slice(&crc);
    let end = file.len() - 4;
    let crc = crc32fast::hash(&file[..end]).to_le_bytes();
    file[end..].copy_from_slice(&crc);
    assert!(matches!(format::decode(&file), Err(FormatError::Field("payload"))));
}

#[test]
fn a_cut_or_longer_file_is_noticed() {
    let file = std::fs::read(stored_example()).unwrap();
    for len in 0..file.len() {
        assert!(format::decode(&file[..len]).is_err(), "cut to {len} bytes");
        assert!(Header::read(&file[..len], len as u64).is_err(), "header of a file cut to {len} bytes");
    }
    let longer = [&file[..], &[0]].concat();
    assert!(matches!(format::decode(&longer), Err(FormatError::Length { .. })));
}

/// Damage under good checksums: somebody made it, or we did.
#[test]
fn fields_are_checked_even_under_good_checksums() {
    let file = std::fs::read(stored_example()).unwrap();
    let header_end = 16 + 128;
    let reseal = |mut twin: Vec<u8>| {
        let crc = crc32fast::hash(&twin[..header_end]).to_le_bytes();
        twin[header_end..header_end + 4].copy_from_slice(&crc);
        let end = twin.len() - 4;
        let crc = crc32fast::hash(&twin[..end]).to_le_bytes();
        twin[end..].copy_from_slice(&crc);
        twin
    };
    assert!(format::decode(&reseal(file.clone())).is_ok());
    let field = |offset: usize, bytes: &[u8]| {
        let mut twin = file.clone();
        twin[16 + offset..16 + offset + bytes.len()].copy_from_slice(bytes);
        format::decode(&reseal(twin)).expect_err(&format!("field at {offset} := {bytes:x?}")).to_string()
    };
    assert!(field(0, &[0; 16]).contains("id"));
    assert!(field(56, &i64::MAX.to_le_bytes()).contains("time"));
    assert!(field(64, &u64::MAX.to_le_bytes()).contains("disk size"));
    assert!(field(64, &(1u64 << 40).to_le_bytes()).contains("payload length"));
    assert!(field(72, &0u32.to_le_bytes()).contains("granule"));
    assert!(field(72, &3u32.to_le_bytes()).contains("granule"));
    assert!(field(76, &u32::MAX.to_le_bytes()).contains("merged"));
    assert!(field(80, &u64::MAX.to_le_bytes()).contains("payload length"));
    assert!(field(88, &u64::MAX.to_le_bytes()).contains("payload length"));
}

#[test]
fn a_bit_past_the_disk_is_refused() {
    // The same payload under a header that says 66 granules is fine, under 65 it is not.
    let mut bitmap = Bitmap::new(66 * GRANULE_BYTES);
    bitmap.set(Extent::new(65 * GRANULE_BYTES, 1));
    let mut header = example_header(0);
    header.covers.clear();
    let mut file = encode(&header, &bitmap);
    assert!(format::decode(&file).is_ok());
    file[16 + 64..16 + 72].copy_from_slice(&(65 * GRANULE_BYTES).to_le_bytes());
    let crc = crc32fast::hash(&file[..112]).to_le_bytes();
    file[112..116].copy_from_slice(&crc);
    let end = file.len() - 4;
    let crc = crc32fast::hash(&file[..end]).to_le_bytes();
    file[end..].copy_from_slice(&crc);
    assert!(matches!(format::decode(&file), Err(FormatError::Field("payload"))));
}

#[test]
fn a_later_version_is_named() {
    let mut file = std::fs::read(stored_example()).unwrap();
    file[8] = 3;
    assert!(format::decode(&file).unwrap_err().to_string().contains("use the newer one"));
}

#[test]
fn what_cannot_be_read_back_is_not_written() {
    let covers = vec![CheckpointId::random(); format::MAX_COVERS + 1];
    let bitmap = Bitmap::new(1);
    let time = jiff::Timestamp::now();
    let content = Content {
        id: CheckpointId::random(),
        prev: None,
        epoch: EpochId::random(),
        number: 1,
        time,
        covers: &covers,
        bitmap: &bitmap,
    };
    assert!(content.encode().is_err());
    assert!(Content { covers: &[], id: CheckpointId::from_bytes([0; 16]), ..content }.encode().is_err());
}

/// A generator that gives the same numbers every time.
fn noise(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state ^ (state >> 29)
    }
}

#[test]
fn noise_never_panics_and_is_never_taken() {
    for example in [stored_example(), stored_runs()] {
        let example = std::fs::read(example).unwrap();
        let header_end = 16 + u32::from_le_bytes(example[12..16].try_into().unwrap()) as usize;
        let mut next = noise(1);
        for _ in 0..20_000 {
            let mut file = if next().is_multiple_of(4) {
                (0..next() % 300).map(|_| next() as u8).collect::<Vec<_>>()
            } else {
                let mut file = example.clone();
                for _ in 0..1 + next() % 6 {
                    let at = (next() % file.len() as u64) as usize;
                    file[at] = next() as u8;
                }
                file.truncate((next() % (2 * file.len() as u64)) as usize);
                file
            };
            if next().is_multiple_of(2) && file.len() >= 16 {
                file[..16].copy_from_slice(&example[..16]);
            }
            // A file whose checksums are made good again: the checks behind them are reached.
            if file.len() > header_end + 8 && next().is_multiple_of(2) {
                let crc = crc32fast::hash(&file[..header_end]).to_le_bytes();
                file[header_end..header_end + 4].copy_from_slice(&crc);
                let end = file.len() - 4;
                let crc = crc32fast::hash(&file[..end]).to_le_bytes();
                file[end..].copy_from_slice(&crc);
            } else if file != example {
                assert!(format::decode(&file).is_err());
            }
            let _ = fuzz::file(&file);
        }
        assert!(fuzz::file(&example).is_some());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn any_bitmap_comes_back(
        size in 0u64..3000 * GRANULE_BYTES,
        ranges in prop::collection::vec((0u64..3000 * GRANULE_BYTES, 0u64..100 * GRANULE_BYTES), 0..20),
        covers in 0usize..5,
    ) {
        let mut bitmap = Bitmap::new(size);
        ranges.iter().for_each(|(offset, len)| bitmap.set(Extent::new(*offset, *len)));
        let mut header = example_header(0);
        header.covers = (0..covers).map(|_| CheckpointId::random()).collect();
        let (read, again) = format::decode(&encode(&header, &bitmap)).unwrap();
        prop_assert_eq!(again, bitmap);
        prop_assert_eq!(read.covers, header.covers);
        prop_assert_eq!(read.time, header.time);
    }
}
