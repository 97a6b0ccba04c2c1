//! Codec: how chunks are made smaller, in the repository and on the wire. One rule for both, so that what was compressed at
//! one end is stored at the other as it came.
//!
//! ```text
//! put = chunk ‖ chunk ‖ …        each compressed by itself, or left as it is: `Packed` = pieces, and their bytes one after the other
//! ```
//!
//! * **zstd**, one frame a chunk with its length in its header. The compressor gets no more room than 31/32 of the chunk, so it
//!   gives up by itself on what does not compress. That takes 30 to 40 us a chunk of 128 KiB; a sample of it tells for 3 us
//!   that all of it looks random, and then zstd is not asked at all (up to level 3: who wants more pays for more; nor lz4).
//!   What a sample may not see is random bytes that come again after more than 4 KiB, at another place of their block.
//! * **lz4**, one block a chunk, is for the wire alone: half the work of zstd, for a hypervisor without processors to spare. A
//!   repository does not hold it. That would be a new version of its packs and of its indices, which older programs cannot
//!   read; zstd reads fast enough.
//! * **Who unpacks believes nothing**: the output is bounded by the length that is known from elsewhere, and a piece is one
//!   frame of the present format with exactly that length, nothing before, between or behind.

use std::fmt;
use std::io;

use bytes::Bytes;
use zstd::zstd_safe;

use crate::limits::{MAX_READ_BYTES, MIN_CHUNK_BYTES};

/// Most chunks of one put.
pub const MAX_PIECES: usize = (MAX_READ_BYTES / MIN_CHUNK_BYTES as u64) as usize;
/// First bytes of a zstd frame.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// How the bytes of a chunk are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Codec {
    /// As they are.
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
    /// One lz4 block.
    Lz4 = 2,
}

impl Codec {
    /// The inverse of `as u8`.
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::Raw, Self::Zstd, Self::Lz4].into_iter().find(|codec| *codec as u8 == byte)
    }
}

/// A chunk in [`Packed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Bytes that it takes.
    pub len: u32,
    /// How they are written.
    pub codec: Codec,
}

/// Chunks that follow each other on a disk, each compressed by itself or left as it is.
#[derive(Clone, PartialEq, Eq)]
pub struct Packed {
    raw_len: u32,
    pieces: Vec<Piece>,
    bytes: Bytes,
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packed({} bytes in {:?})", self.raw_len, self.pieces)
    }
}

impl Packed {
    /// Pieces and their bytes; `None` where the two do not agree, or are more than a put may be.
    pub fn new(raw_len: u32, pieces: Vec<Piece>, bytes: Bytes) -> Option<Self> {
        let sum: u64 = pieces.iter().map(|piece| u64::from(piece.len)).sum();
        let fits = (1..=MAX_PIECES).contains(&pieces.len())
            && (1..=MAX_READ_BYTES).contains(&raw_len.into())
            && sum == bytes.len() as u64
            && sum <= raw_len.into();
        fits.then_some(Self { raw_len, pieces, bytes })
    }

    /// Bytes of the disk that they hold.
    pub fn raw_len(&self) -> u32 {
        self.raw_len
    }

    /// The chunks.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Their bytes, one after the other.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Whether these are the pieces of whole chunks of this size, the last of which may be short: one piece a chunk, and none
    /// longer than its chunk.
    pub fn is_in_chunks_of(&self, chunk_bytes: u32) -> bool {
        let raw = |i: usize| (self.raw_len - i as u32 * chunk_bytes).min(chunk_bytes);
        self.pieces.len() == self.raw_len.div_ceil(chunk_bytes) as usize
            && self.pieces.iter().enumerate().all(|(i, piece)| match piece.codec {
                Codec::Raw => piece.len == raw(i),
                Codec::Zstd | Codec::Lz4 => (1..raw(i)).contains(&piece.len),
            })
    }
}

/// The highest level of zstd at which a chunk is left as it is because a sample looks random.
const SAMPLED_LEVEL: i32 = 3;
/// The sample: so many pieces of so many bytes, evenly spread.
const SAMPLES: usize = 16;
const SAMPLE_BYTES: usize = 256;
/// Random bytes have 255 here, with a standard deviation of 23. Less than that has a pattern, too.
const RANDOM_CHI_SQUARE: std::ops::RangeInclusive<u64> = 150..=360;

/// Whether the bytes of a sample are as frequent as each other, by the chi-square test. No for what is short.
fn looks_random(raw: &[u8]) -> bool {
    let step = raw.len() / SAMPLES;
    if step < 4 * SAMPLE_BYTES {
        return false;
    }
    // Several tables: an addition need not wait for the one before it.
    let mut counts = [[0u16; 256]; 4];
    for (i, piece) in raw.chunks_exact(step).take(SAMPLES).enumerate() {
        // Every second one anywhere within its block: files begin at blocks, and what is compressed ends in zeroes there. The
        // others at its beginning: that shows blocks that come again.
        let shift = if i % 2 == 1 { i * (step / SAMPLES + SAMPLE_BYTES) % (step - SAMPLE_BYTES) } else { 0 };
        for four in piece[shift..][..SAMPLE_BYTES].chunks_exact(4) {
            counts.iter_mut().zip(four).for_each(|(table, byte)| table[usize::from(*byte)] += 1);
        }
    }
    let [a, b, c, d] = &counts;
    let squares: u64 = (0..256).map(|i| u64::from(a[i] + b[i] + c[i] + d[i]).pow(2)).sum();
    // Sum of (count - mean)^2 / mean, with a mean of 16.
    let (bytes, mean) = ((SAMPLES * SAMPLE_BYTES) as u64, (SAMPLES * SAMPLE_BYTES / 256) as u64);
    RANDOM_CHI_SQUARE.contains(&(squares / mean - bytes))
}

/// The room that a compressed chunk may take at most: 31/32 of its length, and less than it.
pub fn packed_room(raw_len: usize) -> usize {
    (raw_len - raw_len / 32).saturating_sub(1)
}

/// A thread's own compressor.
pub struct Packer {
    level: i32,
    zstd: zstd::bulk::Compressor<'static>,
    /// lz4 wants room for the worst case.
    room: Vec<u8>,
}

impl Packer {
    /// Compresses with zstd at this level.
    ///
    /// # Errors
    /// zstd's, when it cannot be set up so.
    pub fn new(level: i32) -> io::Result<Self> {
        Ok(Self { level, zstd: zstd::bulk::Compressor::new(level)?, room: Vec::new() })
    }

    /// Compresses with zstd at another level from now on.
    ///
    /// # Errors
    /// As [`Packer::new`].
    pub fn set_level(&mut self, level: i32) -> io::Result<()> {
        if level != self.level {
            // A context that has given up on a chunk takes no other level.
            *self = Self::new(level)?;
        }
        Ok(())
    }

    /// Compresses a chunk into the beginning of `into`, which has [`packed_room`] for it. Gives the length; `None` when the
    /// chunk is to be left as it is.
    pub fn pack(&mut self, codec: Codec, raw: &[u8], into: &mut [u8]) -> Option<usize> {
        let into = into.get_mut(..packed_room(raw.len()))?;
        match codec {
            Codec::Raw => None,
            _ if (codec == Codec::Lz4 || self.level <= SAMPLED_LEVEL) && looks_random(raw) => None,
            Codec::Zstd => self.zstd.compress_to_buffer(raw, into).ok(),
            Codec::Lz4 => {
                self.room.resize(lz4_flex::block::get_maximum_output_size(raw.len()).max(self.room.len()), 0);
                let len = lz4_flex::block::compress_into(raw, &mut self.room).ok()?;
                into.get_mut(..len)?.copy_from_slice(self.room.get(..len)?);
                Some(len)
            }
        }
    }

    /// Packs a put, chunk by chunk, into `into`, which is as long as the put. Gives the pieces and the bytes that they take;
    /// `None` when no chunk got smaller.
    pub fn pack_all(
        &mut self,
        codec: Codec,
        raw: &[u8],
        chunk_bytes: usize,
        into: &mut [u8],
    ) -> Option<(Vec<Piece>, usize)> {
        let mut used = 0;
        let mut pieces = Vec::with_capacity(raw.len().div_ceil(chunk_bytes));
        for chunk in raw.chunks(chunk_bytes) {
            let room = into.get_mut(used..)?;
            let (len, codec) = match self.pack(codec, chunk, room) {
                Some(len) => (len, codec),
                None => {
                    room.get_mut(..chunk.len())?.copy_from_slice(chunk);
                    (chunk.len(), Codec::Raw)
                }
            };
            used += len;
            pieces.push(Piece { len: len as u32, codec });
        }
        pieces.iter().any(|piece| piece.codec != Codec::Raw).then_some((pieces, used))
    }
}

/// A thread's own decompressor.
pub struct Unpacker {
    zstd: zstd::bulk::Decompressor<'static>,
}

impl Unpacker {
    /// A new one.
    ///
    /// # Errors
    /// zstd's, when it cannot be set up.
    pub fn new() -> io::Result<Self> {
        Ok(Self { zstd: zstd::bulk::Decompressor::new()? })
    }

    /// Unpacks a piece into `out`, which it must fill exactly.
    ///
    /// # Errors
    /// What is wrong with it, in words to be read after "the piece".
    pub fn unpack(&mut self, codec: Codec, packed: &[u8], out: &mut [u8]) -> Result<(), String> {
        let len = match codec {
            Codec::Raw if packed.len() == out.len() => {
                out.copy_from_slice(packed);
                out.len()
            }
            Codec::Raw => packed.len(),
            Codec::Zstd => {
                check_zstd(packed, out.len())?;
                self.zstd.decompress_to_buffer(packed, out).map_err(|e| format!("does not decompress: {e}"))?
            }
            Codec::Lz4 => {
                lz4_flex::block::decompress_into(packed, out).map_err(|e| format!("does not decompress: {e}"))?
            }
        };
        match len == out.len() {
            true => Ok(()),
            false => Err(format!("holds {len} bytes, not {}", out.len())),
        }
    }
}

/// Whether this is one frame of so many bytes and nothing else, as far as its headers tell.
fn check_zstd(packed: &[u8], raw_len: usize) -> Result<(), String> {
    if !packed.starts_with(&ZSTD_MAGIC) {
        return Err("is no zstd frame".to_owned());
    }
    if !matches!(zstd_safe::get_frame_content_size(packed), Ok(Some(len)) if len == raw_len as u64) {
        return Err(format!("does not say that it holds {raw_len} bytes"));
    }
    match zstd_safe::find_frame_compressed_size(packed) {
        Ok(len) if len == packed.len() => Ok(()),
        _ => Err("is not one whole zstd frame".to_owned()),
    }
}

/// What fuzzing runs: any bytes as a piece. Must not panic, nor write more than it may.
pub fn fuzz(bytes: &[u8]) {
    let Some(([codec, len0, len1], packed)) = bytes.split_first_chunk::<3>() else { return };
    let (Some(codec), Ok(mut unpacker)) = (Codec::from_byte(*codec), Unpacker::new()) else { return };
    let len = usize::from(u16::from_le_bytes([*len0, *len1]));
    let mut out = vec![0xaa; len + 64];
    let _ = unpacker.unpack(codec, packed, &mut out[..len]);
    assert!(out[len..].iter().all(|byte| *byte == 0xaa), "more than was allowed");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes that compress, and bytes that do not.
    fn chunk(seed: u64, random: bool, len: usize) -> Vec<u8> {
        let mut state = seed | 1;
        let mut next = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as u8
        };
        (0..len).map(|i| if random || i.is_multiple_of(64) { next() } else { (i / 512) as u8 }).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]
        #[test]
        fn what_is_packed_comes_back(
            kinds in prop::collection::vec(any::<bool>(), 1..5), tail in 1usize..65536, lz4 in any::<bool>(), seed: u64,
        ) {
            let last = kinds.len() - 1;
            let chunks: Vec<_> = kinds.iter().enumerate().map(|(i, random)| {
                chunk(seed ^ i as u64, *random, if i == last { tail } else { 65536 })
            }).collect();
            let raw = chunks.concat();
            let codec = if lz4 { Codec::Lz4 } else { Codec::Zstd };
            let mut into = vec![0; raw.len()];
            let packed = Packer::new(1).unwrap().pack_all(codec, &raw, 65536, &mut into);
            let Some((pieces, used)) = packed else {
                // All of it is random, or too little to be worth it.
                prop_assert!(kinds[..last].iter().all(|random| *random));
                return Ok(());
            };
            prop_assert!(used < raw.len());
            let packed = Packed::new(raw.len() as u32, pieces, into[..used].to_vec().into()).unwrap();
            prop_assert!(packed.is_in_chunks_of(65536) && !packed.is_in_chunks_of(131_072) || chunks.len() == 1);
            let (mut at, mut unpacker) = (0, Unpacker::new().unwrap());
            for (piece, chunk) in packed.pieces().iter().zip(&chunks) {
                let bytes = &packed.bytes()[at..at + piece.len as usize];
                at += piece.len as usize;
                let mut out = vec![0; chunk.len()];
                unpacker.unpack(piece.codec, bytes, &mut out).unwrap();
                prop_assert!(out == *chunk);
                // Into more or less room than it holds it does not go.
                prop_assert!(unpacker.unpack(piece.codec, bytes, &mut vec![0; chunk.len() + 1]).is_err());
                prop_assert!(unpacker.unpack(piece.codec, bytes, &mut vec![0; chunk.len() - 1]).is_err());
                let behind = [bytes, b"x"].concat();
                prop_assert!(unpacker.unpack(piece.codec, &behind, &mut out).is_err());
            }
        }

        #[test]
        fn any_bytes_are_only_an_error(
            bytes in prop::collection::vec(any::<u8>(), 0..200), random in any::<bool>(), lz4 in any::<bool>(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..5),
        ) {
            fuzz(&bytes);
            let codec = if lz4 { Codec::Lz4 } else { Codec::Zstd };
            let mut into = vec![0; 4000];
            if let Some(len) = Packer::new(1).unwrap().pack(codec, &chunk(1, random, 4000), &mut into) {
                let mut bytes = [&[codec as u8, (4000 & 255) as u8, (4000 >> 8) as u8], &into[..len]].concat();
                for (at, value) in changes {
                    let at = at.index(bytes.len());
                    bytes[at] = value;
                }
                fuzz(&bytes);
            }
        }
    }

    #[test]
    fn only_one_frame_of_today_is_taken() {
        let raw = chunk(7, false, 65536);
        let mut into = vec![0; 65536];
        let len = Packer::new(1).unwrap().pack(Codec::Zstd, &raw, &mut into).unwrap();
        let frame = &into[..len];
        let mut unpacker = Unpacker::new().unwrap();
        let mut out = vec![0; 65536];
        unpacker.unpack(Codec::Zstd, frame, &mut out).unwrap();
        // A frame that may be skipped, before or behind; two frames that make up the length; one without its length.
        let skip = [&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0][..], b"skip"].concat();
        let halves = raw.chunks(32768).map(|half| zstd::bulk::compress(half, 1).unwrap()).collect::<Vec<_>>().concat();
        let mut unsized_frame = Vec::new();
        zstd::stream::copy_encode(&raw[..], &mut unsized_frame, 1).unwrap();
        for wrong in [[&skip, frame].concat(), [frame, &skip].concat(), halves, unsized_frame, vec![]] {
            assert!(unpacker.unpack(Codec::Zstd, &wrong, &mut out).is_err(), "{} bytes", wrong.len());
        }
    }

    #[test]
    fn a_packer_goes_on_after_what_does_not_compress() {
        let mut packer = Packer::new(1).unwrap();
        let mut into = vec![0; 65536];
        for level in [1, 1, 3, 3, 1] {
            packer.set_level(level).unwrap();
            assert!(packer.pack(Codec::Zstd, &chunk(5, false, 65536), &mut into).is_some());
            assert!(packer.pack(Codec::Zstd, &chunk(5, true, 65536), &mut into).is_none());
        }
    }

    #[test]
    fn only_random_bytes_are_left_without_a_try() {
        let noise = |len, seed: u64| chunk(2 * seed, true, len);
        assert!((1..100).all(|seed| looks_random(&noise(128 << 10, seed))), "random bytes");
        assert!(!looks_random(&noise(8 << 10, 1)), "too short to tell");
        let text: Vec<u8> = b"what a guest writes, again and again; ".iter().copied().cycle().take(128 << 10).collect();
        assert!(!looks_random(&text));
        // Half of it, or random bytes that come again soon, or of which only some occur.
        assert!(!looks_random(&[noise(64 << 10, 2), text[..64 << 10].to_vec()].concat()));
        let again: Vec<u8> = noise(3000, 3).into_iter().cycle().take(128 << 10).collect();
        assert!(!looks_random(&again));
        // Each block begins with them: small compressed files, and blocks that come again.
        for len in [300, 1024, 3500] {
            let file = |seed| [noise(len, seed), vec![0; 4096 - len]].concat();
            let files: Vec<u8> = (0..32).flat_map(file).collect();
            assert!(!looks_random(&files), "{len}");
        }
        let block: Vec<u8> = noise(4096, 6).into_iter().cycle().take(128 << 10).collect();
        assert!(!looks_random(&block));
        let ramp: Vec<u8> = (0..128 << 10).map(|at| at as u8).collect();
        assert!(!looks_random(&ramp));
        let letters: Vec<u8> = noise(128 << 10, 4).into_iter().map(|byte| byte & 0x7f).collect();
        assert!(!looks_random(&letters));
        let mut packer = Packer::new(1).unwrap();
        let mut out = vec![0; 128 << 10];
        assert!(packer.pack(Codec::Zstd, &noise(128 << 10, 5), &mut out).is_none());
        assert!(packer.pack(Codec::Zstd, &text, &mut out).is_some());
    }

    #[test]
    fn pieces_and_bytes_agree() {
        let piece = |len, codec| Piece { len, codec };
        let packed = |raw_len, pieces: &[Piece], len| Packed::new(raw_len, pieces.to_vec(), vec![0; len].into());
        let two = [piece(100, Codec::Zstd), piece(65536, Codec::Raw)];
        assert!(packed(131_072, &two, 65636).unwrap().is_in_chunks_of(65536));
        assert!(packed(131_072, &two, 65635).is_none() && packed(65635, &two, 65636).is_none());
        assert!(packed(131_072, &[], 0).is_none() && packed(2 << 20, &[piece(9, Codec::Lz4); 17], 153).is_none());
        for wrong in [piece(65536, Codec::Zstd), piece(65535, Codec::Raw), piece(0, Codec::Lz4)] {
            let len = 100 + wrong.len as usize;
            assert!(!packed(131_072, &[two[0], wrong], len).unwrap().is_in_chunks_of(65536), "{wrong:?}");
        }
    }
}
