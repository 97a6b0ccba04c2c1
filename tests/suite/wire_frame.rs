//! Frames: byte for byte, there and back, and noise.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use bytes::Bytes;
use livebackup::codec::{Codec, Packed, Piece};
use livebackup::extent::Extent;
use livebackup::limits::{MAX_DISK_BYTES, MAX_READ_BYTES};
use livebackup::wire::digests::{ChunkDigest, Digests, MAX_DIGESTS};
use livebackup::wire::frame::{Encoded, FrameError, MAX_PART_BYTES, MAX_REQUEST_BYTES, Place};
use livebackup::wire::link::LinkError;
use livebackup::wire::reader::{Frame, FrameReader};
use livebackup::wire::writer::FrameWriter;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const LONG: Duration = Duration::from_secs(60);

fn bytes_of(frame: &Encoded) -> Vec<u8> {
    [frame.head(), frame.body()].concat()
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Two pieces of three and four bytes that stand for a chunk each.
fn packed() -> Packed {
    let pieces = vec![Piece { len: 3, codec: Codec::Zstd }, Piece { len: 4, codec: Codec::Raw }];
    Packed::new(65540, pieces, Bytes::from_static(b"abcdefg")).unwrap()
}

/// What a reader makes of these bytes, handed to it in pieces of these lengths (over and over).
async fn read_all(bytes: &[u8], pieces: &[usize]) -> (Vec<Frame>, Option<LinkError>) {
    let (mut near, far) = tokio::io::duplex(64);
    let mut reader = FrameReader::new(Box::new(far), "peer".into(), MAX_REQUEST_BYTES, LONG);
    let writing = async {
        let mut rest = bytes;
        for piece in pieces.iter().cycle() {
            let (now, later) = rest.split_at(rest.len().min(*piece));
            if now.is_empty() || near.write_all(now).await.is_err() {
                break;
            }
            rest = later;
        }
        drop(near);
    };
    let reading = async {
        let mut frames = Vec::new();
        let error = loop {
            match reader.next(LONG).await {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        drop(reader);
        (frames, error)
    };
    tokio::join!(writing, reading).1
}

#[test]
fn frames_are_these_bytes() {
    let data = bytes_of(&Encoded::data(0x0102, 0x0304_0506_0708, Bytes::from_static(b"abc")).unwrap());
    assert_eq!(data[..8], [19, 0, 0, 0, 2, 0, 0, 0]);
    assert_eq!(data[12..], *b"\x02\x01\x00\x00\x08\x07\x06\x05\x04\x03\x00\x00\x03\x00\x00\x00abc");
    let checked = [&data[..8], &data[12..]].concat();
    assert_eq!(data[8..12], crc32fast::hash(&checked).to_le_bytes());

    let zero = bytes_of(&Encoded::zero(7, Extent::new(0x10000, 0x20000)).unwrap());
    assert_eq!(zero[..8], [24, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!(zero[12..], *b"\x07\x00\0\0\0\0\0\0\x00\x00\x01\0\0\0\0\0\x00\x00\x02\0\0\0\0\0");

    let same = bytes_of(&Encoded::same(7, Extent::new(0x10000, 0x20000)).unwrap());
    assert_eq!((&same[..8], &same[12..]), (&[24, 0, 0, 0, 6, 0, 0, 0][..], &zero[12..]));

    let known = vec![ChunkDigest::ZERO, ChunkDigest::UNKNOWN, ChunkDigest::from_bytes([7; 32])];
    let digests =
        bytes_of(&Encoded::digests(&Digests { disk: 0x0102, first_chunk: 0x030405, digests: known }).unwrap());
    assert_eq!(digests[..8], [112, 0, 0, 0, 5, 0, 0, 0]);
    assert_eq!(digests[12..28], *b"\x02\x01\0\0\x03\0\0\0\x05\x04\x03\0\0\0\0\0");
    assert_eq!(digests[28..], [[0; 32], [0xff; 32], [7; 32]].concat());

    let sent = bytes_of(&Encoded::packed(0x0102, 0x0304_0506_0708, &packed()).unwrap());
    assert_eq!(sent[..8], [87, 0, 0, 0, 7, 0, 0, 0]);
    assert_eq!(sent[12..28], *b"\x02\x01\x02\x00\x04\x00\x01\x00\x08\x07\x06\x05\x04\x03\x00\x00");
    assert_eq!(sent[28..], [&b"\x03\0\0\x01\x04\0\0\x00"[..], &[0; 56], b"abcdefg"].concat());

    assert_eq!(bytes_of(&Encoded::alive())[..8], [0, 0, 0, 0, 4, 0, 0, 0]);
    let control = bytes_of(&Encoded::control(&"x", 10).unwrap());
    assert_eq!((&control[..8], &control[12..]), (&[3, 0, 0, 0, 1, 0, 0, 0][..], &b"\"x\""[..]));
}

#[test]
fn what_may_not_be_sent_is_not_encoded() {
    let whole = Bytes::from(vec![0; MAX_READ_BYTES as usize + 1]);
    let digests = |first_chunk, count| Digests { disk: 0, first_chunk, digests: vec![ChunkDigest::ZERO; count] };
    assert!(Encoded::digests(&digests(1 << 40, MAX_DIGESTS)).is_ok());
    assert!(matches!(Encoded::digests(&digests(0, MAX_DIGESTS + 1)), Err(FrameError::Digests { .. })));
    assert!(matches!(Encoded::digests(&digests((1 << 40) + 1, 0)), Err(FrameError::Digests { .. })));
    assert!(Encoded::data(0, 0, whole.slice(1..)).is_ok());
    assert!(matches!(Encoded::data(0, 0, whole), Err(FrameError::Length { .. })));
    assert!(matches!(Encoded::data(0, 0, Bytes::new()), Err(FrameError::Extent { .. })));
    assert!(Encoded::data(0, MAX_DISK_BYTES, Bytes::from_static(b"x")).is_err());
    assert!(Encoded::zero(0, Extent { offset_bytes: u64::MAX, len_bytes: 2 }).is_err());
    assert!(Encoded::zero(0, Extent::new(0, MAX_DISK_BYTES)).is_ok());
    assert!(Encoded::control(&"12345678", 9).is_err());
}

#[test]
fn a_bad_frame_is_an_error_of_its_kind() {
    let data = bytes_of(&Encoded::data(1, 65536, Bytes::from_static(b"abcd")).unwrap());
    let zero = bytes_of(&Encoded::zero(1, Extent::new(0, 65536)).unwrap());
    let reseal = |mut frame: Vec<u8>| {
        let checked = [&frame[..8], &frame[12..]].concat();
        frame[8..12].copy_from_slice(&crc32fast::hash(&checked).to_le_bytes());
        frame
    };
    let with = |frame: &[u8], at: usize, bytes: &[u8]| {
        let mut frame = frame.to_vec();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        match run(read_all(&reseal(frame), &[1000])) {
            (_, Some(LinkError::Frame { source, .. })) => source,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(with(&data, 4, &[9]), FrameError::Kind(9));
    assert_eq!(with(&data, 4, &[0]), FrameError::Kind(0));
    assert_eq!(with(&data, 5, &[1]), FrameError::Reserved);
    assert_eq!(with(&data, 7, &[1]), FrameError::Reserved);
    assert!(matches!(with(&data, 0, &u32::MAX.to_le_bytes()), FrameError::Length { .. }));
    assert!(matches!(with(&data, 0, &16u32.to_le_bytes()), FrameError::Length { .. }));
    assert_eq!(with(&data, 14, &[1]), FrameError::Codec(1));
    assert_eq!(with(&data, 15, &[1]), FrameError::Reserved);
    assert!(matches!(with(&data, 16, &u64::MAX.to_le_bytes()), FrameError::Extent { .. }));
    assert!(matches!(with(&data, 24, &5u32.to_le_bytes()), FrameError::Length { .. }));
    assert!(matches!(with(&zero, 0, &23u32.to_le_bytes()), FrameError::Length { .. }));
    assert_eq!(with(&zero, 19, &[1]), FrameError::Reserved);
    assert!(matches!(with(&zero, 28, &0u64.to_le_bytes()), FrameError::Extent { .. }));
    assert!(matches!(with(&zero, 28, &u64::MAX.to_le_bytes()), FrameError::Extent { .. }));
    let sent = bytes_of(&Encoded::packed(1, 65536, &packed()).unwrap());
    assert_eq!(with(&sent, 14, &17u16.to_le_bytes()), FrameError::Pieces);
    assert_eq!(with(&sent, 14, &1u16.to_le_bytes()), FrameError::Reserved);
    assert_eq!(with(&sent, 14, &3u16.to_le_bytes()), FrameError::Pieces);
    assert_eq!(with(&sent, 31, &[3]), FrameError::Codec(3));
    assert_eq!(with(&sent, 36, &[1]), FrameError::Reserved);
    assert_eq!(with(&sent, 28, &[0]), FrameError::Pieces);
    assert!(matches!(with(&sent, 28, &[4]), FrameError::Length { .. }));
    assert_eq!(with(&sent, 16, &6u32.to_le_bytes()), FrameError::Pieces);
    assert!(matches!(with(&sent, 16, &(MAX_READ_BYTES as u32 + 1).to_le_bytes()), FrameError::Length { .. }));
    assert!(matches!(with(&sent, 20, &u64::MAX.to_le_bytes()), FrameError::Extent { .. }));
    let some = Digests { disk: 1, first_chunk: 5, digests: vec![ChunkDigest::ZERO; 2] };
    let none = Digests { digests: vec![], ..some.clone() };
    let [some, none] = [some, none].map(|digests| bytes_of(&Encoded::digests(&digests).unwrap()));
    assert_eq!(with(&some, 14, &[1]), FrameError::Reserved);
    assert!(matches!(with(&some, 16, &3u32.to_le_bytes()), FrameError::Length { .. }));
    assert!(matches!(with(&none, 16, &1u32.to_le_bytes()), FrameError::Length { .. }));
    assert!(matches!(with(&none, 16, &u32::MAX.to_le_bytes()), FrameError::Digests { .. }));
    assert!(matches!(with(&some, 20, &u64::MAX.to_le_bytes()), FrameError::Digests { .. }));
    let mut control = bytes_of(&Encoded::control(&"x", 10).unwrap());
    control[..4].copy_from_slice(&(MAX_REQUEST_BYTES + 1).to_le_bytes());
    assert!(matches!(run(read_all(&control, &[9])).1, Some(LinkError::Frame { .. })), "refused by its length alone");
}

#[test]
fn a_turned_bit_or_a_cut_is_noticed_wherever_it_is() {
    let frames = [
        Encoded::control(&"message", 100).unwrap(),
        Encoded::data(1, 65536, Bytes::from_static(b"some bytes of a disk")).unwrap(),
        Encoded::packed(1, 65536, &packed()).unwrap(),
        Encoded::zero(2, Extent::new(0, 1 << 30)).unwrap(),
        Encoded::same(2, Extent::new(0, 1 << 30)).unwrap(),
        Encoded::digests(&Digests { disk: 2, first_chunk: 9, digests: vec![ChunkDigest::UNKNOWN; 2] }).unwrap(),
        Encoded::alive(),
    ];
    for good in frames.iter().map(bytes_of) {
        run(async {
            for bit in 0..8 * good.len() {
                let mut twin = good.clone();
                twin[bit / 8] ^= 1 << (bit % 8);
                let (frames, error) = read_all(&twin, &[twin.len()]).await;
                assert!(frames.is_empty() && error.is_some(), "bit {bit} of {good:?}");
            }
            for len in 1..good.len() {
                let (frames, error) = read_all(&good[..len], &[len]).await;
                assert!(frames.is_empty() && matches!(error, Some(LinkError::Cut { .. })), "cut to {len}");
            }
        });
    }
}

fn a_frame() -> impl Strategy<Value = Frame> {
    let control = prop::collection::vec(any::<char>(), 0..2000);
    prop_oneof![
        control.prop_map(|s| Frame::Control(serde_json::to_vec(&String::from_iter(s)).unwrap())),
        (any::<u16>(), 0..MAX_DISK_BYTES - 70_000, prop_oneof![1usize..100, 1usize..70_000], any::<u8>()).prop_map(
            |(disk, offset, len, fill)| {
                let bytes: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(31) ^ fill).collect();
                Frame::Data(Place { disk, extent: Extent::new(offset, len as u64) }, bytes.into())
            }
        ),
        (any::<u16>(), 0..MAX_DISK_BYTES / 2, prop::collection::vec((1u32..9000, 0u8..3), 1..17)).prop_map(
            |(disk, offset, pieces)| {
                let piece = |(len, codec): &(u32, u8)| Piece { len: *len, codec: Codec::from_byte(*codec).unwrap() };
                let pieces: Vec<_> = pieces.iter().map(piece).collect();
                let sum = pieces.iter().map(|piece| piece.len).sum::<u32>();
                let bytes: Vec<u8> = (0..sum).map(|i| (i as u8).wrapping_mul(31)).collect();
                let place = Place { disk, extent: Extent::new(offset, (sum + 5).into()) };
                Frame::Packed(place, Packed::new(sum + 5, pieces, bytes.into()).unwrap())
            }
        ),
        (any::<u16>(), 0..MAX_DISK_BYTES / 2, 1..MAX_DISK_BYTES / 2)
            .prop_map(|(disk, offset, len)| Frame::Zero(Place { disk, extent: Extent::new(offset, len) })),
        (any::<u16>(), 0..MAX_DISK_BYTES / 2, 1..MAX_DISK_BYTES / 2)
            .prop_map(|(disk, offset, len)| Frame::Same(Place { disk, extent: Extent::new(offset, len) })),
        (any::<u16>(), 0u64..1 << 40, 0usize..300, any::<u8>()).prop_map(|(disk, first_chunk, count, fill)| {
            let digests = (0..count).map(|i| ChunkDigest::from_bytes([fill ^ i as u8; 32])).collect();
            Frame::Digests(Digests { disk, first_chunk, digests })
        }),
        (any::<u64>(), prop_oneof![0usize..100, 0..=MAX_PART_BYTES], any::<u8>()).prop_map(|(number, len, fill)| {
            Frame::Part(number, (0..len).map(|i| (i as u8).wrapping_mul(31) ^ fill).collect())
        }),
        Just(Frame::Alive),
    ]
}

fn encode(frame: &Frame) -> Encoded {
    match frame {
        Frame::Control(json) => {
            let text: String = serde_json::from_slice(json).unwrap();
            Encoded::control(&text, MAX_REQUEST_BYTES).unwrap()
        }
        Frame::Data(place, bytes) => Encoded::data(place.disk, place.extent.offset_bytes, bytes.clone()).unwrap(),
        Frame::Packed(place, packed) => Encoded::packed(place.disk, place.extent.offset_bytes, packed).unwrap(),
        Frame::Zero(place) => Encoded::zero(place.disk, place.extent).unwrap(),
        Frame::Same(place) => Encoded::same(place.disk, place.extent).unwrap(),
        Frame::Digests(digests) => Encoded::digests(digests).unwrap(),
        Frame::Part(number, bytes) => Encoded::part(*number, bytes.clone()).unwrap(),
        Frame::Alive => Encoded::alive(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]

    #[test]
    fn frames_come_back_whatever_the_pieces(
        frames in prop::collection::vec(a_frame(), 0..40),
        pieces in prop::collection::vec(prop_oneof![1usize..40, 1usize..200_000], 1..6),
        pipe in prop_oneof![1usize..50, Just(1usize << 20)],
    ) {
        run(async {
            // Through the writer, whose writes are cut as the pipe is narrow.
            let (near, mut far) = tokio::io::duplex(pipe);
            let mut writer = FrameWriter::new(Box::new(near), "peer".into());
            let writing = async {
                for frame in &frames {
                    writer.push(encode(frame));
                    if writer.is_full() {
                        writer.flush().await.unwrap();
                    }
                }
                writer.close().await.unwrap();
            };
            let mut bytes = Vec::new();
            let (_, read) = tokio::join!(writing, far.read_to_end(&mut bytes));
            read.unwrap();
            assert_eq!(bytes, frames.iter().flat_map(|f| bytes_of(&encode(f))).collect::<Vec<_>>());
            let (again, error) = read_all(&bytes, &pieces).await;
            assert!(error.is_none(), "{error:?}");
            assert_eq!(again, frames);
        });
    }
}

/// A cancelled call to the reader or the writer loses nothing.
#[test]
fn reads_and_writes_go_on_after_they_were_cancelled() {
    run(async {
        let (near, far) = tokio::io::duplex(10);
        let mut writer = FrameWriter::new(Box::new(near), "peer".into());
        let mut reader = FrameReader::new(Box::new(far), "peer".into(), MAX_REQUEST_BYTES, LONG);
        let sent = Bytes::from((0..5000u32).map(|i| i as u8).collect::<Vec<_>>());
        for disk in 0..3 {
            writer.push(Encoded::data(disk, 0, sent.clone()).unwrap());
        }
        let mut got = Vec::new();
        let mut turns = 0;
        while got.len() < 3 {
            turns += 1;
            tokio::select! {
                biased;
                () = tokio::task::yield_now() => {}
                written = writer.flush() => written.unwrap(),
            }
            tokio::select! {
                biased;
                frame = reader.next(LONG) => got.push(frame.unwrap().unwrap()),
                () = tokio::task::yield_now() => {}
            }
        }
        assert!(turns > 100, "the calls were cancelled often: {turns}");
        for (disk, frame) in got.into_iter().enumerate() {
            let place = Place { disk: disk as u16, extent: Extent::new(0, 5000) };
            assert_eq!(frame, Frame::Data(place, sent.clone()));
        }
    });
}

#[test]
fn noise_never_panics() {
    let mut state = 7u64;
    let mut next = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state >> 33
    };
    run(async {
        for _ in 0..3000 {
            let mut bytes = Vec::new();
            for _ in 0..next() % 4 {
                bytes.extend(bytes_of(
                    &Encoded::data(next() as u16, next(), vec![1; 1 + next() as usize % 99].into()).unwrap(),
                ));
                bytes.extend(bytes_of(&Encoded::zero(0, Extent::new(next(), 1 + next())).unwrap()));
                bytes.extend(bytes_of(&Encoded::control(&next(), 100).unwrap()));
                let digests = vec![ChunkDigest::from_bytes([next() as u8; 32]); next() as usize % 4];
                let digests = Digests { disk: next() as u16, first_chunk: next(), digests };
                bytes.extend(bytes_of(&Encoded::digests(&digests).unwrap()));
            }
            let whole = bytes.len();
            bytes.extend((0..next() % 60).map(|_| next() as u8));
            if next() % 2 == 0 && !bytes.is_empty() {
                let at = next() as usize % bytes.len();
                bytes[at] = next() as u8;
            }
            let (frames, error) = read_all(&bytes, &[1 + next() as usize % 100]).await;
            assert!(error.is_some() || frames.len() % 4 == 0 || whole == 0);
        }
    });
}
