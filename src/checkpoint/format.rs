//! The checkpoint file, versions 1 and 2: one checkpoint of one disk, or several that were merged.
//!
//! All numbers are little-endian.
//!
//! ```text
//! file    = start ‖ header ‖ header_crc u32 ‖ payload ‖ file_crc u32
//! start   = magic [8] "LBCKPT\x00\x01" ‖ version u16 ‖ reserved u16 = 0 ‖ header_len u32
//! header  = id [16] ‖ prev [16] ‖ epoch [16]                 prev all zero: the first checkpoint of its epoch
//!         ‖ number u64 ‖ time i64 ‖ size u64                 time: microseconds since 1970 UTC; size: of the disk, bytes
//!         ‖ granule u32 ‖ covers_count u32                   granule: bytes a bit stands for, a power of two
//!         ‖ raw_len u64 ‖ stored_len u64                     of the payload, before and after compression
//!         ‖ covers [16] × covers_count
//! payload = one zstd frame, stored_len bytes, of
//!           version 1: the bitmap's words, u64 each, bit 0 is the lowest granule
//!           version 2: its runs, see `runs`
//! header_crc = CRC-32 (the one of zlib) of start ‖ header
//! file_crc   = CRC-32 of everything before it
//! ```
//!
//! Bounds: `id` is not zero; `size <= 2^56`; `512 <= granule <= 2^30`; `covers_count <= 4096`;
//! `header_len = 96 + 16 × covers_count`; `raw_len = 8 × ceil(ceil(size / granule) / 64)` in version 1, and not more in
//! version 2; bits past the last granule are zero; the file ends with `file_crc`.
//!
//! Reasons. The header has its own checksum so that a log of a thousand checkpoints opens without reading a payload. The
//! second checksum spans the whole file, so that a payload cannot be taken for another file's. `covers` names older
//! checkpoints whose bitmaps were merged into this one, the oldest first: it answers for them with a superset, and `prev` is
//! that of the oldest. Both versions are written, each where it is shorter: words for dense bitmaps. The magic's zero byte
//! keeps text tools away, and its last byte would change only if even `start` did.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use jiff::Timestamp;

use super::bitmap::Bitmap;
use super::runs;
use crate::limits::MAX_DISK_BYTES;
use crate::units::{CheckpointId, EpochId};

/// First bytes of every checkpoint file.
pub const MAGIC: [u8; 8] = *b"LBCKPT\x00\x01";
/// The version whose payload is the bitmap's words.
pub const VERSION_WORDS: u16 = 1;
/// The version whose payload is the bitmap's runs.
pub const VERSION_RUNS: u16 = 2;
/// Most ids in [`Header::covers`]: bounds the header to 64 KiB and a bit.
pub const MAX_COVERS: usize = 4096;
/// Compression level: sparse bitmaps shrink a hundredfold at any level, and a seal should be quick.
const ZSTD_LEVEL: i32 = 1;

const START_BYTES: usize = 16;
const FIXED_BYTES: usize = 96;
const CRC_BYTES: usize = 4;
const MAX_HEADER_BYTES: usize = FIXED_BYTES + 16 * MAX_COVERS;
const MIN_GRANULE_BYTES: u32 = 512;
const MAX_GRANULE_BYTES: u32 = 1 << 30;

const _: () = assert!(START_BYTES == MAGIC.len() + 2 + 2 + 4);
const _: () = assert!(FIXED_BYTES == 3 * 16 + 3 * 8 + 2 * 4 + 2 * 8);

/// What a checkpoint file says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The checkpoint.
    pub id: CheckpointId,
    /// The one before; `None` for the first of an epoch.
    pub prev: Option<CheckpointId>,
    /// The epoch.
    pub epoch: EpochId,
    /// For people: counts up.
    pub number: u64,
    /// The instant, to the microsecond.
    pub time: Timestamp,
    /// Size of the disk.
    pub size_bytes: u64,
    /// Bytes that a bit stands for.
    pub granule_bytes: u32,
    /// Older checkpoints that were merged into this one, the oldest first.
    pub covers: Vec<CheckpointId>,
    /// How the bitmap is written down.
    pub payload: Payload,
    /// Length of the compressed bitmap in the file.
    pub stored_bytes: u64,
}

/// How a bitmap is written down, before compression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// As words: version 1.
    Words,
    /// As runs: version 2.
    Runs {
        /// Their length.
        raw_bytes: u64,
    },
}

/// Why a checkpoint file was not taken.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The system refused.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// Not one of ours.
    #[error("is no checkpoint file (its first bytes are not LBCKPT)")]
    Magic,
    /// One of a later livebackup.
    #[error("has format version {0}; this livebackup knows versions 1 and 2: use the newer one")]
    Version(u16),
    /// It ends too early or too late.
    #[error("is {found} bytes long where its header says {expected}: it was cut or something was added")]
    Length {
        /// What the header says.
        expected: u64,
        /// What there is.
        found: u64,
    },
    /// A checksum does not match.
    #[error("has a wrong checksum of its {0}: it is damaged")]
    Checksum(&'static str),
    /// A field has a value that it must not have.
    #[error("has an impossible {0}")]
    Field(&'static str),
}

impl Header {
    fn header_bytes(&self) -> usize {
        FIXED_BYTES + 16 * self.covers.len()
    }

    /// Length of the uncompressed payload.
    fn raw_bytes(&self) -> u64 {
        match self.payload {
            Payload::Words => words_bytes(self.size_bytes, self.granule_bytes.into()),
            Payload::Runs { raw_bytes } => raw_bytes,
        }
    }

    fn version(&self) -> u16 {
        match self.payload {
            Payload::Words => VERSION_WORDS,
            Payload::Runs { .. } => VERSION_RUNS,
        }
    }

    /// Length of the whole file.
    pub fn file_bytes(&self) -> u64 {
        (START_BYTES + self.header_bytes() + 2 * CRC_BYTES) as u64 + self.stored_bytes
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(START_BYTES + self.header_bytes() + CRC_BYTES);
        out.extend(MAGIC);
        out.extend(self.version().to_le_bytes());
        out.extend([0; 2]);
        out.extend((self.header_bytes() as u32).to_le_bytes());
        out.extend(self.id.as_bytes());
        out.extend(self.prev.map_or([0; 16], |p| *p.as_bytes()));
        out.extend(self.epoch.as_bytes());
        out.extend(self.number.to_le_bytes());
        out.extend(self.time.as_microsecond().to_le_bytes());
        out.extend(self.size_bytes.to_le_bytes());
        out.extend(self.granule_bytes.to_le_bytes());
        out.extend((self.covers.len() as u32).to_le_bytes());
        out.extend(self.raw_bytes().to_le_bytes());
        out.extend(self.stored_bytes.to_le_bytes());
        self.covers.iter().for_each(|id| out.extend(id.as_bytes()));
        out.extend(crc32fast::hash(&out).to_le_bytes());
        out
    }

    /// Reads a header from the start of a checkpoint file of `file_bytes` bytes; nothing of the payload is read.
    pub fn read(mut from: impl Read, file_bytes: u64) -> Result<Self, FormatError> {
        let short = |_| FormatError::Length { expected: (START_BYTES + FIXED_BYTES) as u64, found: file_bytes };
        let mut bytes = vec![0; START_BYTES];
        read_exact(&mut from, &mut bytes)?.map_err(short)?;
        let mut start = Fields(&bytes);
        if start.take::<8>() != MAGIC {
            return Err(FormatError::Magic);
        }
        let (version, reserved, header_len) = (start.u16(), start.u16(), start.u32() as usize);
        if ![VERSION_WORDS, VERSION_RUNS].contains(&version) {
            return Err(FormatError::Version(version));
        }
        if reserved != 0 || !(FIXED_BYTES..=MAX_HEADER_BYTES).contains(&header_len) {
            return Err(FormatError::Field("header length"));
        }
        bytes.resize(START_BYTES + header_len, 0);
        read_exact(&mut from, &mut bytes[START_BYTES..])?.map_err(short)?;
        let mut crc = [0; CRC_BYTES];
        read_exact(&mut from, &mut crc)?.map_err(short)?;
        if crc32fast::hash(&bytes) != u32::from_le_bytes(crc) {
            return Err(FormatError::Checksum("header"));
        }
        let header = Self::decode(version, &bytes[START_BYTES..])?;
        if header.file_bytes() != file_bytes {
            return Err(FormatError::Length { expected: header.file_bytes(), found: file_bytes });
        }
        Ok(header)
    }

    /// Reads the header of the file at `path`.
    pub fn read_file(path: &Path) -> Result<Self, FormatError> {
        let file = File::open(path)?;
        let file_bytes = file.metadata()?.len();
        Self::read(file, file_bytes)
    }

    fn decode(version: u16, bytes: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Fields(bytes);
        let (id, prev, epoch) = (fields.take(), fields.take::<16>(), fields.take());
        let (number, time, size_bytes) = (fields.u64(), fields.u64() as i64, fields.u64());
        let (granule_bytes, covers_count) = (fields.u32(), fields.u32() as usize);
        let (raw_len, stored_bytes) = (fields.u64(), fields.u64());
        if id == [0; 16] {
            return Err(FormatError::Field("id"));
        }
        if size_bytes > MAX_DISK_BYTES {
            return Err(FormatError::Field("disk size"));
        }
        if !granule_bytes.is_power_of_two() || !(MIN_GRANULE_BYTES..=MAX_GRANULE_BYTES).contains(&granule_bytes) {
            return Err(FormatError::Field("granule"));
        }
        if covers_count > MAX_COVERS || bytes.len() != FIXED_BYTES + 16 * covers_count {
            return Err(FormatError::Field("number of merged checkpoints"));
        }
        let words_len = words_bytes(size_bytes, granule_bytes.into());
        let payload = match version {
            VERSION_RUNS => Payload::Runs { raw_bytes: raw_len },
            _ => Payload::Words,
        };
        let possible = if payload == Payload::Words { raw_len == words_len } else { raw_len <= words_len };
        if !possible || stored_bytes > max_stored_bytes(raw_len) {
            return Err(FormatError::Field("payload length"));
        }
        Ok(Self {
            id: CheckpointId::from_bytes(id),
            prev: (prev != [0; 16]).then(|| CheckpointId::from_bytes(prev)),
            epoch: EpochId::from_bytes(epoch),
            number,
            time: Timestamp::from_microsecond(time).map_err(|_| FormatError::Field("time"))?,
            size_bytes,
            granule_bytes,
            covers: (0..covers_count).map(|_| CheckpointId::from_bytes(fields.take())).collect(),
            payload,
            stored_bytes,
        })
    }
}

/// What goes into a checkpoint file; the rest of the header follows from the bitmap.
#[derive(Clone, Debug)]
pub struct Content<'a> {
    /// The checkpoint; not all zero.
    pub id: CheckpointId,
    /// The one before; `None` for the first of an epoch.
    pub prev: Option<CheckpointId>,
    /// The epoch.
    pub epoch: EpochId,
    /// For people: counts up.
    pub number: u64,
    /// The instant; stored to the microsecond.
    pub time: Timestamp,
    /// Older checkpoints that were merged into this one; at most [`MAX_COVERS`].
    pub covers: &'a [CheckpointId],
    /// What was written between the two instants.
    pub bitmap: &'a Bitmap,
}

impl Content<'_> {
    /// The header and the whole file.
    pub fn encode(&self) -> Result<(Header, Vec<u8>), FormatError> {
        let words_len = self.bitmap.words().len() * 8;
        let (form, raw) = match runs::encode(self.bitmap, words_len) {
            Some(raw) => (Payload::Runs { raw_bytes: raw.len() as u64 }, raw),
            None => (Payload::Words, self.bitmap.words().iter().flat_map(|w| w.to_le_bytes()).collect()),
        };
        let payload = zstd::bulk::compress(&raw, ZSTD_LEVEL)?;
        let micros = Timestamp::from_microsecond(self.time.as_microsecond());
        let header = Header {
            id: self.id,
            prev: self.prev,
            epoch: self.epoch,
            number: self.number,
            time: micros.map_err(|_| FormatError::Field("time"))?,
            size_bytes: self.bitmap.size_bytes(),
            granule_bytes: u32::try_from(self.bitmap.granule_bytes()).map_err(|_| FormatError::Field("granule"))?,
            covers: self.covers.to_vec(),
            payload: form,
            stored_bytes: payload.len() as u64,
        };
        let mut file = header.encode();
        // What is written must be readable: the same checks, before anything reaches a disk.
        Header::decode(header.version(), &file[START_BYTES..file.len() - CRC_BYTES])?;
        file.extend(payload);
        file.extend(crc32fast::hash(&file).to_le_bytes());
        Ok((header, file))
    }
}

/// Reads a checkpoint file whole. The caller compares the header with what it expects (the disk's size above all)
/// before it reads: a bitmap is `size / granule / 8` bytes of memory.
pub fn decode(file: &[u8]) -> Result<(Header, Bitmap), FormatError> {
    let header = Header::read(file, file.len() as u64)?;
    let mut bitmap = Bitmap::with_granule(header.size_bytes, header.granule_bytes.into());
    let header = Decoder::new()?.union(file, &mut bitmap)?;
    Ok((header, bitmap))
}

/// Reads checkpoint files into one bitmap; keeps its buffers from file to file.
pub struct Decoder {
    zstd: zstd::bulk::Decompressor<'static>,
    raw: Vec<u8>,
}

impl Decoder {
    /// A decoder with empty buffers.
    pub fn new() -> Result<Self, FormatError> {
        Ok(Self { zstd: zstd::bulk::Decompressor::new()?, raw: Vec::new() })
    }

    /// Sets in `bitmap` what is set in the file's, which must be of the same size and granule.
    ///
    /// # Errors
    /// When the file is not as it should be; some bits may be set then.
    pub fn union(&mut self, file: &[u8], bitmap: &mut Bitmap) -> Result<Header, FormatError> {
        let header = Header::read(file, file.len() as u64)?;
        let (rest, crc) = file.split_at(file.len() - CRC_BYTES);
        if crc32fast::hash(rest).to_le_bytes() != crc {
            return Err(FormatError::Checksum("payload"));
        }
        if (header.size_bytes, u64::from(header.granule_bytes)) != (bitmap.size_bytes(), bitmap.granule_bytes()) {
            return Err(FormatError::Field("disk size"));
        }
        let payload = &rest[START_BYTES + header.header_bytes() + CRC_BYTES..];
        let raw_len = usize::try_from(header.raw_bytes()).map_err(|_| FormatError::Field("payload length"))?;
        self.raw.clear();
        self.raw.reserve(raw_len);
        let found =
            self.zstd.decompress_to_buffer(payload, &mut self.raw).map_err(|_| FormatError::Field("payload"))?;
        if found != raw_len {
            return Err(FormatError::Field("payload length"));
        }
        let joined = match header.payload {
            Payload::Words => bitmap.union_words(&self.raw),
            Payload::Runs { .. } => runs::union(&self.raw, bitmap),
        };
        joined.map(|()| header).ok_or(FormatError::Field("payload"))
    }
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").finish_non_exhaustive()
    }
}

fn words_bytes(size_bytes: u64, granule_bytes: u64) -> u64 {
    size_bytes.div_ceil(granule_bytes).div_ceil(64) * 8
}

/// What zstd may need for data that does not compress, generously.
fn max_stored_bytes(raw_len: u64) -> u64 {
    raw_len + raw_len / 128 + 1024
}

/// Fills `into`; the inner error is the end of the file.
fn read_exact(from: &mut impl Read, into: &mut [u8]) -> Result<Result<(), io::Error>, io::Error> {
    match from.read_exact(into) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(Err(e)),
        Err(e) => Err(e),
        Ok(()) => Ok(Ok(())),
    }
}

/// Takes fields off the front of bytes whose length was checked.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (front, rest) = self.0.split_first_chunk::<N>().expect("the length was checked");
        self.0 = rest;
        *front
    }
    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}
