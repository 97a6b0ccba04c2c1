//! Digests: what a client knows of the chunks of a disk. A scan compares the disk with them, an audit some of them.
//!
//! In a scan they go from the client to the sidecar, in batches, in the order of the disk:
//!
//! ```text
//! payload = disk u16 ‖ reserved u16 = 0 ‖ count u32 ‖ first chunk u64 ‖ digest [32] × count         little-endian
//! ```
//!
//! * A digest is the BLAKE3 of a chunk's bytes; chunks are those of `Begin::chunk_bytes`, the last of a disk may be short.
//!   [`ChunkDigest::ZERO`] says that the chunk is zero, [`ChunkDigest::UNKNOWN`] that the client cannot offer it: it is
//!   sent then, whatever it holds.
//! * Only disks that were begun as scans are spoken of, one after the other in the order of their indices. Batches of one
//!   disk ascend. Chunks between two batches are zero: a large thin disk costs nothing.
//! * A batch of no digests ends a disk; its first chunk is the disk's number of chunks. So the chunks between the last
//!   batch and the end are zero, too.
//!
//! Bounds: `count <= 4096`. The sidecar holds a few batches at a time; it stops reading when it has them.
//!
//! A client that sends rubbish gets more data than it needs. A sidecar that says "same" where it is not so spoils the point
//! that is being made and no other.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::frame::FrameError;
use crate::limits::{MAX_DISK_BYTES, MIN_CHUNK_BYTES};

/// Length of a digest.
pub const DIGEST_BYTES: usize = 32;
/// Most digests in one batch: 512 MiB of a disk in chunks of 128 KiB.
pub const MAX_DIGESTS: usize = 4096;
/// Length of a batch's fixed part.
pub const DIGESTS_HEAD_BYTES: usize = 16;

const MAX_CHUNKS: u64 = MAX_DISK_BYTES / MIN_CHUNK_BYTES as u64;

/// What a client knows of a chunk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct ChunkDigest([u8; DIGEST_BYTES]);

impl ChunkDigest {
    /// The chunk is zero.
    pub const ZERO: Self = Self([0; DIGEST_BYTES]);
    /// The client does not have the chunk, or has it damaged. No input is known that has this digest.
    pub const UNKNOWN: Self = Self([0xff; DIGEST_BYTES]);

    /// The digest made of these bytes.
    pub const fn from_bytes(bytes: [u8; DIGEST_BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; DIGEST_BYTES] {
        &self.0
    }
}

impl fmt::Debug for ChunkDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Serialize for ChunkDigest {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&format_args!("{self:?}"))
    }
}

impl<'de> Deserialize<'de> for ChunkDigest {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        let nibble = |digit: u8| char::from(digit).to_digit(16).map(|n| n as u8);
        let parse = || {
            let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
            let bytes: Option<Vec<u8>> = pairs.iter().map(|[a, b]| Some(nibble(*a)? << 4 | nibble(*b)?)).collect();
            Some(Self(bytes?.try_into().ok()?))
        };
        parse().ok_or_else(|| serde::de::Error::custom("a digest is 64 hexadecimal digits"))
    }
}

/// A batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digests {
    /// Index of the disk.
    pub disk: u16,
    /// The chunk that the first digest is of.
    pub first_chunk: u64,
    /// The digests; none ends the disk.
    pub digests: Vec<ChunkDigest>,
}

impl Digests {
    /// The chunk after the last one.
    pub fn end_chunk(&self) -> u64 {
        self.first_chunk.saturating_add(self.digests.len() as u64)
    }

    /// The payload's fixed part, and the rest.
    pub(super) fn encode(&self) -> ([u8; DIGESTS_HEAD_BYTES], Bytes) {
        let mut head = [0; DIGESTS_HEAD_BYTES];
        head[..2].copy_from_slice(&self.disk.to_le_bytes());
        head[4..8].copy_from_slice(&(self.digests.len() as u32).to_le_bytes());
        head[8..].copy_from_slice(&self.first_chunk.to_le_bytes());
        let digests: Vec<u8> = self.digests.iter().flat_map(|digest| digest.0).collect();
        (head, digests.into())
    }

    /// Reads the fixed part: a batch without its digests, and the bytes that these have.
    pub(super) fn decode_head(head: &[u8; DIGESTS_HEAD_BYTES]) -> Result<(Self, usize), FrameError> {
        let [d0, d1, r0, r1, c0, c1, c2, c3, first @ ..] = *head;
        let (count, first_chunk) = (u32::from_le_bytes([c0, c1, c2, c3]), u64::from_le_bytes(first));
        if (r0, r1) != (0, 0) {
            return Err(FrameError::Reserved);
        }
        if count as usize > MAX_DIGESTS || first_chunk > MAX_CHUNKS {
            return Err(FrameError::Digests { first_chunk, count });
        }
        let batch = Self { disk: u16::from_le_bytes([d0, d1]), first_chunk, digests: Vec::new() };
        Ok((batch, count as usize * DIGEST_BYTES))
    }

    /// Adds the digests to what [`Digests::decode_head`] gave.
    pub(super) fn with(mut self, bytes: &[u8]) -> Self {
        self.digests = bytes.as_chunks::<DIGEST_BYTES>().0.iter().map(|digest| ChunkDigest(*digest)).collect();
        self
    }
}
