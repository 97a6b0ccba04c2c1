//! Pack format, version 1: many blobs in one file of about 64 MiB.
//!
//! ```text
//! pack      = header ‖ blobs ‖ directory ‖ footer                                   little-endian
//! header    = magic 8 ‖ version u16 ‖ kind u8 ‖ 0 u8 ‖ crc32 u32 of the 12 bytes before ‖ zeroes up to 4096
//! directory = entry × count
//! entry     = digest 32 ‖ offset u32 ‖ stored_len u32 ‖ raw_len u24 ‖ codec u8 ‖ 0 u32     48 bytes
//! footer    = directory_len u32 ‖ count u32 ‖ crc32 u32 of the directory ‖ version u16 ‖ kind u8 ‖ 0 u8 ‖ 0 u32
//!             ‖ crc32 u32 of the 20 bytes before ‖ magic 8                                  32 bytes
//! ```
//!
//! * The header fills a page, so that raw chunks of a disk lie on page boundaries: cheaper to copy, and open to direct
//!   reads.
//! * The directory is last, so that a pack is written in one pass; it repeats what the index says, so that an index can
//!   be made again from packs alone, and packs of a killed run can be adopted.
//! * A blob carries no checksum of its own: its digest is one.
//! * A pack has an id that is random and not the digest of its content: nothing has to be hashed twice.

use crate::limits::MAX_CHUNK_BYTES;
use crate::repo::blob::{Blob, Placed};
use crate::repo::digest::Digest;
use crate::repo::error::FormatError;
use crate::repo::fields::{u16_at, u32_at};

/// Length of the header.
pub const HEADER_BYTES: u64 = 4096;
/// Length of the footer.
pub const FOOTER_BYTES: u64 = 32;
/// Length of a directory entry.
pub const ENTRY_BYTES: u64 = 48;
/// A pack is sealed once it holds this much.
pub const TARGET_PACK_BYTES: u64 = 64 << 20;
/// A pack is sealed once it holds this many blobs.
pub const MAX_PACK_BLOBS: u64 = 1 << 16;
/// Longest pack that is read.
pub const MAX_PACK_BYTES: u64 = 1 << 30;

const VERSION: u16 = 1;
const MAGIC: &[u8; 8] = b"\x89LBpack\n";

const _: () = assert!(
    TARGET_PACK_BYTES + MAX_CHUNK_BYTES as u64 * 16 + MAX_PACK_BLOBS * ENTRY_BYTES + FOOTER_BYTES < MAX_PACK_BYTES
);
const _: () = assert!(MAX_PACK_BYTES <= u32::MAX as u64);

/// What a pack holds. Tree nodes are apart from data so that walking a tree reads little else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PackKind {
    /// Chunks of disks.
    Data = 0,
    /// Nodes of trees.
    Tree = 1,
}

impl PackKind {
    pub(crate) fn from_byte(byte: u8) -> Result<Self, FormatError> {
        match byte {
            0 => Ok(Self::Data),
            1 => Ok(Self::Tree),
            other => Err(FormatError::bad(format!("unknown kind of pack {other}"))),
        }
    }
}

/// The header of a new pack.
pub(crate) fn encode_header(kind: PackKind) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES as usize);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&[kind as u8, 0]);
    let crc = crc32fast::hash(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out.resize(HEADER_BYTES as usize, 0);
    out
}

/// The directory and footer of a pack.
pub(crate) fn encode_tail(kind: PackKind, blobs: &[Blob]) -> Vec<u8> {
    let mut out = Vec::with_capacity(blobs.len() * ENTRY_BYTES as usize + FOOTER_BYTES as usize);
    for blob in blobs {
        out.extend_from_slice(blob.digest.as_bytes());
        out.extend_from_slice(&blob.placed.encode());
        out.extend_from_slice(&[0; 4]);
    }
    let directory_len = out.len();
    let crc = crc32fast::hash(&out);
    out.extend_from_slice(&(directory_len as u32).to_le_bytes());
    out.extend_from_slice(&(blobs.len() as u32).to_le_bytes());
    out.extend_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&[kind as u8, 0]);
    out.extend_from_slice(&[0; 4]);
    let crc = crc32fast::hash(&out[directory_len..]);
    out.extend_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(MAGIC);
    out
}

fn check_version(version: u16) -> Result<(), FormatError> {
    match version {
        VERSION => Ok(()),
        0 => Err(FormatError::bad("format version 0")),
        newer => Err(FormatError::Newer { version: newer.into(), supported: VERSION.into() }),
    }
}

/// Checks the first bytes (16 or more) of a pack.
pub fn decode_header(bytes: &[u8]) -> Result<PackKind, FormatError> {
    let bad = |reason: &str| FormatError::bad(reason);
    if bytes.get(..8) != Some(MAGIC) {
        return Err(bad("it does not begin as a pack does"));
    }
    let crc = u32_at(bytes, 12).ok_or_else(|| bad("its header is cut short"))?;
    if crc != crc32fast::hash(&bytes[..12]) {
        return Err(bad("the checksum of its header is wrong"));
    }
    check_version(u16_at(bytes, 8).unwrap_or(0))?;
    PackKind::from_byte(bytes[10])
}

/// What the footer of a pack says.
#[derive(Clone, Copy, Debug)]
pub struct Footer {
    /// What the pack holds.
    pub kind: PackKind,
    /// Where the directory begins in the pack.
    pub directory_offset_bytes: u64,
    /// How long it is.
    pub directory_len_bytes: u64,
    directory_crc: u32,
}

impl Footer {
    /// Decodes the last [`FOOTER_BYTES`] of a pack of this length.
    pub fn decode(bytes: &[u8], pack_len_bytes: u64) -> Result<Self, FormatError> {
        let bad = |reason: &str| FormatError::bad(reason);
        if bytes.len() as u64 != FOOTER_BYTES || bytes[24..] != *MAGIC {
            return Err(bad("it does not end as a pack does (cut short, or not a pack)"));
        }
        let field = |at| u32_at(bytes, at).ok_or_else(|| bad("its footer is cut short"));
        if field(20)? != crc32fast::hash(&bytes[..20]) {
            return Err(bad("the checksum of its footer is wrong"));
        }
        check_version(u16_at(bytes, 12).unwrap_or(0))?;
        let kind = PackKind::from_byte(bytes[14])?;
        let (directory_len, count) = (u64::from(field(0)?), u64::from(field(4)?));
        if count > MAX_PACK_BLOBS || directory_len != count * ENTRY_BYTES {
            return Err(bad("its footer contradicts itself"));
        }
        let directory_offset_bytes = pack_len_bytes
            .checked_sub(FOOTER_BYTES + directory_len)
            .filter(|at| *at >= HEADER_BYTES && pack_len_bytes <= MAX_PACK_BYTES)
            .ok_or_else(|| bad("its length contradicts its footer"))?;
        Ok(Self { kind, directory_offset_bytes, directory_len_bytes: directory_len, directory_crc: field(8)? })
    }

    /// Decodes the directory, whose place the footer tells.
    pub fn decode_directory(&self, bytes: &[u8]) -> Result<Vec<Blob>, FormatError> {
        if bytes.len() as u64 != self.directory_len_bytes {
            return Err(FormatError::bad("its directory is cut short"));
        }
        if crc32fast::hash(bytes) != self.directory_crc {
            return Err(FormatError::bad("the checksum of its directory is wrong"));
        }
        let (entries, _) = bytes.as_chunks::<{ ENTRY_BYTES as usize }>();
        entries
            .iter()
            .map(|entry| {
                let placed = Placed::decode(&entry[32..])?;
                if u64::from(placed.offset_bytes) < HEADER_BYTES || placed.end() > self.directory_offset_bytes {
                    return Err(FormatError::bad("an entry of its directory points outside of it"));
                }
                let digest = Digest::from_slice(entry).unwrap_or_default();
                Ok(Blob { digest, placed })
            })
            .collect()
    }
}

/// Decodes all of a pack but the blobs themselves.
pub fn decode(bytes: &[u8]) -> Result<(PackKind, Vec<Blob>), FormatError> {
    let kind = decode_header(bytes)?;
    let footer_at = bytes.len().checked_sub(FOOTER_BYTES as usize).ok_or(FormatError::bad("it is too short"))?;
    let footer = Footer::decode(&bytes[footer_at..], bytes.len() as u64)?;
    if footer.kind != kind {
        return Err(FormatError::bad("its header and footer disagree"));
    }
    let blobs = footer.decode_directory(&bytes[footer.directory_offset_bytes as usize..footer_at])?;
    Ok((kind, blobs))
}
