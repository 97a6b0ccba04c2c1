//! Frames, version 1: what goes over the connection after the hello, byte for byte. Pure: bytes in, values out.
//!
//! All numbers are little-endian.
//!
//! ```text
//! frame   = header ‖ payload
//! header  = len u32 ‖ kind u8 ‖ flags u8 = 0 ‖ reserved u16 = 0 ‖ crc u32
//!           len: of the payload. crc: CRC-32 (the one of zlib) of the header's first 8 bytes ‖ payload
//!
//! kind 1, control   payload = one JSON value: `Request` from a client, `Reply` from a server
//! kind 2, data      payload = disk u16 ‖ codec u8 = 0 ‖ reserved u8 = 0 ‖ offset u64 ‖ raw_len u32 ‖ bytes
//!                   codec 0: the bytes as they are, raw_len of them
//! kind 3, zero      payload = disk u16 ‖ reserved [6] = 0 ‖ offset u64 ‖ len u64
//! kind 4, alive     payload = nothing
//! kind 5, digests   from a client; payload: see `digests`
//! kind 6, same      payload as that of zero
//! kind 7, packed    payload = disk u16 ‖ count u16 ‖ raw_len u32 ‖ offset u64 ‖ piece u32 × 16 ‖ bytes
//!                   piece = len u24 ‖ codec u8     a chunk each, in order; those past count are 0
//!                   codec 0: as it is. 1: a zstd frame. 2: an lz4 block. bytes: the pieces', one after the other
//! kind 8, part      from a server; payload = number u64 ‖ bytes       a piece of a session's frames, see `trunk`
//! ```
//!
//! Bounds: control at most 1 MiB from a client and 4 MiB from a server; data 1 to 2^20 bytes, packed the same before and after;
//! a part up to 2^16; an extent is not empty and ends at 2^56 at most. Kinds 5 and 6 come only where `Begin` and `Begun` agreed
//! on a scan or an audit, kind 7 only where `Begin` says that the client takes it, kind 8 only after `Reply::Joinable`. Anything
//! else, a reserved field that is not zero included, ends the connection.
//!
//! Reasons. A checksum in every frame finds what TCP's 16 bits let through, at 10 GiB/s and more. The length is covered by
//! the checksum but has to be used before that can be checked, so it has tight bounds by kind. A client's control
//! frames are small (an Ack of [`MAX_ACK_EXTENTS`] extents is 250 KiB) and come from whoever can connect; a server's hold
//! lists of machines with their chains of files. A packed frame has one piece a chunk, so that the repository can store what
//! came as it came; its pieces have room for the most chunks that there can be, so that the length of what is read first does
//! not depend on a peer.

use bytes::Bytes;
use crc32fast::Hasher;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::digests::{DIGEST_BYTES, DIGESTS_HEAD_BYTES, Digests, MAX_DIGESTS};
use crate::codec::{Codec, MAX_PIECES, Packed, Piece};
use crate::extent::Extent;
use crate::limits::{MAX_DISK_BYTES, MAX_READ_BYTES};
use crate::units::{KIB, MIB};

/// Length of a frame's header.
pub const HEAD_BYTES: usize = 12;
/// Length of what comes before the bytes in a data frame's payload.
pub const DATA_HEAD_BYTES: usize = 16;
/// Length of a zero frame's payload.
pub const ZERO_BYTES: usize = 24;
/// Length of what comes before the bytes in a packed frame's payload.
pub const PACKED_HEAD_BYTES: usize = 16 + 4 * MAX_PIECES;
/// Length of what comes before the bytes in a part's payload.
pub const PART_HEAD_BYTES: usize = 8;
/// Most bytes in a part.
pub const MAX_PART_BYTES: usize = 64 * KIB as usize;
/// Longest of the fixed parts.
pub const MAX_FIXED_BYTES: usize = PACKED_HEAD_BYTES;
/// Longest control payload that a server takes.
pub const MAX_REQUEST_BYTES: u32 = MIB as u32;
/// Longest control payload that a client takes.
pub const MAX_REPLY_BYTES: u32 = 4 * MIB as u32;
/// Most extents in one Ack; a client splits longer ones.
pub const MAX_ACK_EXTENTS: usize = 4096;

const CHECKED_BYTES: usize = 8;
const MAX_DATA_PAYLOAD: u32 = MAX_READ_BYTES as u32 + DATA_HEAD_BYTES as u32;
const MAX_PACKED_PAYLOAD: u32 = MAX_READ_BYTES as u32 + PACKED_HEAD_BYTES as u32;
const MAX_PART_PAYLOAD: u32 = (PART_HEAD_BYTES + MAX_PART_BYTES) as u32;
/// Longest JSON of an extent: two numbers of 20 digits and their names.
const MAX_EXTENT_JSON: usize = 2 * 20 + r#"{"offset_bytes":,"len_bytes":},"#.len();

const _: () = assert!(MAX_ACK_EXTENTS * MAX_EXTENT_JSON + 256 <= MAX_REQUEST_BYTES as usize);
const MAX_DIGESTS_PAYLOAD: u32 = (DIGESTS_HEAD_BYTES + MAX_DIGESTS * DIGEST_BYTES) as u32;

const _: () = assert!(CHECKED_BYTES + 4 == HEAD_BYTES);
const _: () = assert!(MAX_READ_BYTES < 1 << 24, "a piece's length has 24 bits");
const _: () = assert!(ZERO_BYTES <= MAX_FIXED_BYTES && DATA_HEAD_BYTES <= MAX_FIXED_BYTES);
const _: () = assert!(PART_HEAD_BYTES <= MAX_FIXED_BYTES && MAX_PART_BYTES as u64 <= MAX_READ_BYTES);
const _: () = assert!(DIGESTS_HEAD_BYTES <= ZERO_BYTES && MAX_DIGESTS * DIGEST_BYTES <= MAX_READ_BYTES as usize);

/// Kinds of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// JSON.
    Control = 1,
    /// Bytes of a disk.
    Data = 2,
    /// Zeroes of a disk.
    Zero = 3,
    /// Nothing but a sign of life.
    Alive = 4,
    /// What a client knows of a disk's chunks.
    Digests = 5,
    /// Bytes of a disk that are as the client knows them.
    Same = 6,
    /// Bytes of a disk, compressed chunk by chunk.
    Packed = 7,
    /// A piece of a session's frames, on one of its connections.
    Part = 8,
}

/// A frame that was not taken, or cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not one of [`Kind`].
    #[error("a frame of unknown kind {0}")]
    Kind(u8),
    /// Flags or reserved fields that version 1 does not have.
    #[error("a frame with flags or reserved fields that this version does not know")]
    Reserved,
    /// Longer or shorter than a frame of its kind may be.
    #[error("a {kind:?} frame of {len_bytes} bytes, outside of what is allowed")]
    Length {
        /// The kind.
        kind: Kind,
        /// Length of its payload.
        len_bytes: u64,
    },
    /// The checksum does not match: damaged on the way.
    #[error("a frame with a wrong checksum: it was damaged on the way")]
    Checksum,
    /// A way to encode bytes that version 1 does not have.
    #[error("a data frame with unknown codec {0}")]
    Codec(u8),
    /// An extent that no disk has.
    #[error("an extent that is empty or outside of any disk (offset {offset_bytes}, {len_bytes} bytes)")]
    Extent {
        /// Where.
        offset_bytes: u64,
        /// How long.
        len_bytes: u64,
    },
    /// Digests of chunks that no disk has, or too many.
    #[error("{count} digests from chunk {first_chunk} on, outside of what is allowed")]
    Digests {
        /// The chunk of the first.
        first_chunk: u64,
        /// How many.
        count: u32,
    },
    /// Pieces that contradict themselves.
    #[error("packed bytes whose pieces contradict their frame")]
    Pieces,
    /// Parts that cannot be put together.
    #[error("parts of a session that do not follow each other")]
    Disorder,
    /// A control payload that is no message.
    #[error("a control message that cannot be read: {0}")]
    Json(String),
}

/// A header whose fields are within bounds; its checksum is still to be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The kind.
    pub kind: Kind,
    /// Length of the payload.
    pub payload_bytes: u32,
    /// What [`Hasher`] must come to after the payload.
    pub crc32: u32,
}

impl Head {
    /// Checks everything that can be checked before the payload, which may be `max_control_bytes` long if it is control.
    /// The hasher has seen the header; the payload is to be added.
    pub fn decode(bytes: &[u8; HEAD_BYTES], max_control_bytes: u32) -> Result<(Self, Hasher), FrameError> {
        let [l0, l1, l2, l3, kind, flags, r0, r1, c0, c1, c2, c3] = *bytes;
        let payload_bytes = u32::from_le_bytes([l0, l1, l2, l3]);
        let kind = match kind {
            1 => Kind::Control,
            2 => Kind::Data,
            3 => Kind::Zero,
            4 => Kind::Alive,
            5 => Kind::Digests,
            6 => Kind::Same,
            7 => Kind::Packed,
            8 => Kind::Part,
            other => return Err(FrameError::Kind(other)),
        };
        if (flags, r0, r1) != (0, 0, 0) {
            return Err(FrameError::Reserved);
        }
        let allowed = match kind {
            Kind::Control => 1..=max_control_bytes,
            Kind::Data => DATA_HEAD_BYTES as u32 + 1..=MAX_DATA_PAYLOAD,
            Kind::Zero | Kind::Same => ZERO_BYTES as u32..=ZERO_BYTES as u32,
            Kind::Alive => 0..=0,
            Kind::Digests => DIGESTS_HEAD_BYTES as u32..=MAX_DIGESTS_PAYLOAD,
            Kind::Packed => PACKED_HEAD_BYTES as u32 + 1..=MAX_PACKED_PAYLOAD,
            Kind::Part => PART_HEAD_BYTES as u32..=MAX_PART_PAYLOAD,
        };
        if !allowed.contains(&payload_bytes) {
            return Err(FrameError::Length { kind, len_bytes: payload_bytes.into() });
        }
        let mut hasher = Hasher::new();
        hasher.update(&bytes[..CHECKED_BYTES]);
        Ok((Self { kind, payload_bytes, crc32: u32::from_le_bytes([c0, c1, c2, c3]) }, hasher))
    }

    /// Length of the payload's fixed part, which says where the rest belongs.
    pub fn fixed_bytes(&self) -> usize {
        match self.kind {
            Kind::Data => DATA_HEAD_BYTES,
            Kind::Zero | Kind::Same => ZERO_BYTES,
            Kind::Digests => DIGESTS_HEAD_BYTES,
            Kind::Packed => PACKED_HEAD_BYTES,
            Kind::Part => PART_HEAD_BYTES,
            Kind::Control | Kind::Alive => 0,
        }
    }

    /// Compares the checksum after the payload was added to the hasher.
    pub fn check(&self, hasher: Hasher) -> Result<(), FrameError> {
        if hasher.finalize() == self.crc32 { Ok(()) } else { Err(FrameError::Checksum) }
    }
}

/// Which bytes of which disk a data or zero frame speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the disk.
    pub disk: u16,
    /// The bytes; not empty, ends at `MAX_DISK_BYTES` at most.
    pub extent: Extent,
}

impl Place {
    fn checked(disk: u16, offset_bytes: u64, len_bytes: u64) -> Result<Self, FrameError> {
        let extent = Extent { offset_bytes, len_bytes };
        if len_bytes == 0 || !extent.fits(MAX_DISK_BYTES) {
            return Err(FrameError::Extent { offset_bytes, len_bytes });
        }
        Ok(Self { disk, extent })
    }

    /// Reads the fixed part of a data frame's payload of `payload_bytes`.
    pub fn decode_data(fixed: &[u8; DATA_HEAD_BYTES], payload_bytes: u32) -> Result<Self, FrameError> {
        let [d0, d1, codec, reserved, rest @ ..] = *fixed;
        let [o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, l2, l3] = rest;
        if codec != 0 {
            return Err(FrameError::Codec(codec));
        }
        if reserved != 0 {
            return Err(FrameError::Reserved);
        }
        let raw_len = u32::from_le_bytes([l0, l1, l2, l3]);
        if u64::from(raw_len) + DATA_HEAD_BYTES as u64 != u64::from(payload_bytes) {
            return Err(FrameError::Length { kind: Kind::Data, len_bytes: payload_bytes.into() });
        }
        let offset = u64::from_le_bytes([o0, o1, o2, o3, o4, o5, o6, o7]);
        Self::checked(u16::from_le_bytes([d0, d1]), offset, raw_len.into())
    }

    /// Reads the fixed part of a packed frame's payload of `payload_bytes`: where its bytes belong, and the pieces, whose
    /// bytes are the rest.
    pub fn decode_packed(
        fixed: &[u8; PACKED_HEAD_BYTES],
        payload_bytes: u32,
    ) -> Result<(Self, Vec<Piece>), FrameError> {
        let [d0, d1, c0, c1, l0, l1, l2, l3, o0, o1, o2, o3, o4, o5, o6, o7, table @ ..] = *fixed;
        let (count, raw_len) = (u16::from_le_bytes([c0, c1]), u32::from_le_bytes([l0, l1, l2, l3]));
        let (table, _) = table.as_chunks::<4>();
        let (used, unused) = table.split_at_checked(count.into()).ok_or(FrameError::Pieces)?;
        if unused.iter().any(|piece| *piece != [0; 4]) {
            return Err(FrameError::Reserved);
        }
        let mut pieces = Vec::with_capacity(used.len());
        for [p0, p1, p2, codec] in used {
            let codec = Codec::from_byte(*codec).ok_or(FrameError::Codec(*codec))?;
            pieces.push(Piece { len: u32::from_le_bytes([*p0, *p1, *p2, 0]), codec });
        }
        let sum: u64 = pieces.iter().map(|piece| u64::from(piece.len)).sum();
        if pieces.is_empty() || pieces.iter().any(|piece| piece.len == 0) || sum > raw_len.into() {
            return Err(FrameError::Pieces);
        }
        if u64::from(raw_len) > MAX_READ_BYTES || sum + PACKED_HEAD_BYTES as u64 != u64::from(payload_bytes) {
            return Err(FrameError::Length { kind: Kind::Packed, len_bytes: payload_bytes.into() });
        }
        let offset = u64::from_le_bytes([o0, o1, o2, o3, o4, o5, o6, o7]);
        Ok((Self::checked(u16::from_le_bytes([d0, d1]), offset, raw_len.into())?, pieces))
    }

    /// Reads the payload of a zero or same frame.
    pub fn decode_zero(fixed: &[u8; ZERO_BYTES]) -> Result<Self, FrameError> {
        let [d0, d1, r0, r1, r2, r3, r4, r5, rest @ ..] = *fixed;
        let [o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, l2, l3, l4, l5, l6, l7] = rest;
        if [r0, r1, r2, r3, r4, r5] != [0; 6] {
            return Err(FrameError::Reserved);
        }
        let offset = u64::from_le_bytes([o0, o1, o2, o3, o4, o5, o6, o7]);
        let len = u64::from_le_bytes([l0, l1, l2, l3, l4, l5, l6, l7]);
        Self::checked(u16::from_le_bytes([d0, d1]), offset, len)
    }
}

/// Reads a control payload.
pub fn decode_control<T: DeserializeOwned>(payload: &[u8]) -> Result<T, FrameError> {
    // The parser's words may quote the whole payload.
    serde_json::from_slice(payload).map_err(|e| FrameError::Json(e.to_string().chars().take(200).collect()))
}

/// A frame to be sent: its first bytes, and the rest as it came, never copied.
#[derive(Clone, Debug)]
pub struct Encoded {
    head: [u8; HEAD_BYTES + MAX_FIXED_BYTES],
    head_len: usize,
    body: Bytes,
}

impl Encoded {
    fn new(kind: Kind, fixed: &[u8], body: Bytes) -> Self {
        let payload_bytes = (fixed.len() + body.len()) as u32;
        let mut head = [0; HEAD_BYTES + MAX_FIXED_BYTES];
        head[..4].copy_from_slice(&payload_bytes.to_le_bytes());
        head[4] = kind as u8;
        head[HEAD_BYTES..HEAD_BYTES + fixed.len()].copy_from_slice(fixed);
        let mut hasher = Hasher::new();
        hasher.update(&head[..CHECKED_BYTES]);
        hasher.update(fixed);
        hasher.update(&body);
        head[CHECKED_BYTES..HEAD_BYTES].copy_from_slice(&hasher.finalize().to_le_bytes());
        Self { head, head_len: HEAD_BYTES + fixed.len(), body }
    }

    /// A control frame, refused when it is longer than the other side takes.
    pub fn control<T: Serialize>(message: &T, max_bytes: u32) -> Result<Self, FrameError> {
        let json = serde_json::to_vec(message).map_err(|e| FrameError::Json(e.to_string()))?;
        if json.len() > max_bytes as usize {
            return Err(FrameError::Length { kind: Kind::Control, len_bytes: json.len() as u64 });
        }
        Ok(Self::new(Kind::Control, &[], json.into()))
    }

    /// A data frame of 1 to `MAX_READ_BYTES` bytes.
    pub fn data(disk: u16, offset_bytes: u64, bytes: Bytes) -> Result<Self, FrameError> {
        let len_bytes = bytes.len() as u64;
        if len_bytes > MAX_READ_BYTES {
            return Err(FrameError::Length { kind: Kind::Data, len_bytes });
        }
        Place::checked(disk, offset_bytes, len_bytes)?;
        let mut fixed = [0; DATA_HEAD_BYTES];
        fixed[..2].copy_from_slice(&disk.to_le_bytes());
        fixed[4..12].copy_from_slice(&offset_bytes.to_le_bytes());
        fixed[12..].copy_from_slice(&(len_bytes as u32).to_le_bytes());
        Ok(Self::new(Kind::Data, &fixed, bytes))
    }

    /// A packed frame.
    pub fn packed(disk: u16, offset_bytes: u64, packed: &Packed) -> Result<Self, FrameError> {
        let mut fixed = [0; PACKED_HEAD_BYTES];
        fixed[..2].copy_from_slice(&disk.to_le_bytes());
        fixed[2..4].copy_from_slice(&(packed.pieces().len() as u16).to_le_bytes());
        fixed[4..8].copy_from_slice(&packed.raw_len().to_le_bytes());
        fixed[8..16].copy_from_slice(&offset_bytes.to_le_bytes());
        for (piece, out) in packed.pieces().iter().zip(fixed[16..].as_chunks_mut::<4>().0) {
            *out = (piece.len | (piece.codec as u32) << 24).to_le_bytes();
        }
        let payload_bytes = PACKED_HEAD_BYTES as u32 + packed.bytes().len() as u32;
        Place::decode_packed(&fixed, payload_bytes)?;
        Ok(Self::new(Kind::Packed, &fixed, packed.bytes().clone()))
    }

    /// A zero frame.
    pub fn zero(disk: u16, extent: Extent) -> Result<Self, FrameError> {
        Self::extent(Kind::Zero, disk, extent)
    }

    /// A same frame.
    pub fn same(disk: u16, extent: Extent) -> Result<Self, FrameError> {
        Self::extent(Kind::Same, disk, extent)
    }

    /// A part of 0 to [`MAX_PART_BYTES`] bytes.
    pub fn part(number: u64, bytes: Bytes) -> Result<Self, FrameError> {
        match bytes.len() {
            0..=MAX_PART_BYTES => Ok(Self::new(Kind::Part, &number.to_le_bytes(), bytes)),
            len => Err(FrameError::Length { kind: Kind::Part, len_bytes: len as u64 }),
        }
    }

    /// A digests frame.
    pub fn digests(digests: &Digests) -> Result<Self, FrameError> {
        let (fixed, body) = digests.encode();
        Digests::decode_head(&fixed).map(|_| Self::new(Kind::Digests, &fixed, body))
    }

    fn extent(kind: Kind, disk: u16, extent: Extent) -> Result<Self, FrameError> {
        Place::checked(disk, extent.offset_bytes, extent.len_bytes)?;
        let mut fixed = [0; ZERO_BYTES];
        fixed[..2].copy_from_slice(&disk.to_le_bytes());
        fixed[8..16].copy_from_slice(&extent.offset_bytes.to_le_bytes());
        fixed[16..].copy_from_slice(&extent.len_bytes.to_le_bytes());
        Ok(Self::new(kind, &fixed, Bytes::new()))
    }

    /// A sign of life.
    pub fn alive() -> Self {
        Self::new(Kind::Alive, &[], Bytes::new())
    }

    /// The header and the payload's fixed part.
    pub fn head(&self) -> &[u8] {
        &self.head[..self.head_len]
    }

    /// The rest of the payload.
    pub fn body(&self) -> &Bytes {
        &self.body
    }

    /// Length of the whole frame.
    pub fn len_bytes(&self) -> usize {
        self.head_len + self.body.len()
    }
}
