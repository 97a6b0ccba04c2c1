//! Blob: one stored piece, a chunk or a tree node, raw or compressed.

use crate::limits::MAX_CHUNK_BYTES;
use crate::repo::digest::Digest;
use crate::repo::error::FormatError;
use crate::repo::fields::u32_at;

/// How a blob's bytes are stored: raw or zstd. Lz4 is for the wire alone.
pub use crate::codec::Codec;

/// Where a blob lies in its pack, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// First byte in the pack.
    pub offset_bytes: u32,
    /// Bytes in the pack.
    pub stored_len: u32,
    /// Bytes when decoded.
    pub raw_len: u32,
    /// How they are stored.
    pub codec: Codec,
}

impl Placed {
    /// First byte after the blob.
    pub fn end(&self) -> u64 {
        u64::from(self.offset_bytes) + u64::from(self.stored_len)
    }

    /// `offset u32 ‖ stored_len u32 ‖ raw_len u24 ‖ codec u8`, little-endian: 12 bytes.
    pub(crate) fn encode(&self) -> [u8; 12] {
        let mut out = [0; 12];
        out[..4].copy_from_slice(&self.offset_bytes.to_le_bytes());
        out[4..8].copy_from_slice(&self.stored_len.to_le_bytes());
        out[8..].copy_from_slice(&(self.raw_len | (self.codec as u32) << 24).to_le_bytes());
        out
    }

    /// The inverse of [`Placed::encode`]; lengths are checked against what a blob may be.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let short = || FormatError::bad("an entry is cut short");
        let offset_bytes = u32_at(bytes, 0).ok_or_else(short)?;
        let stored_len = u32_at(bytes, 4).ok_or_else(short)?;
        let last = u32_at(bytes, 8).ok_or_else(short)?;
        let raw_len = last & 0x00ff_ffff;
        if raw_len == 0 || raw_len > MAX_CHUNK_BYTES {
            return Err(FormatError::bad(format!("an entry has a raw length of {raw_len}")));
        }
        let (codec, fits) = match last >> 24 {
            0 => (Codec::Raw, stored_len == raw_len),
            1 => (Codec::Zstd, stored_len > 0 && stored_len < raw_len),
            other => return Err(FormatError::bad(format!("an entry has the unknown codec {other}"))),
        };
        if !fits {
            return Err(FormatError::bad(format!("an entry stores {raw_len} bytes in {stored_len}")));
        }
        Ok(Self { offset_bytes, stored_len, raw_len, codec })
    }
}

/// A blob of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blob {
    /// What it holds.
    pub digest: Digest,
    /// Where.
    pub placed: Placed,
}

const _: () = assert!(MAX_CHUNK_BYTES < 1 << 24, "a raw length has 24 bits");
