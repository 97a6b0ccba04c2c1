//! Index format, version 1: sorted entries, read through a memory map.
//!
//! ```text
//! index  = header ‖ pack × packs ‖ entry × entries                                  little-endian
//! header = magic 8 ‖ version u16 ‖ 0 u16 ‖ packs u32 ‖ entries u64 ‖ created u64 (µs since 1970)
//!          ‖ crc32 u32 of packs and entries ‖ 0 × 20 ‖ crc32 u32 of the 60 bytes before      64 bytes
//! pack   = id 16 ‖ length u64 ‖ kind u8 ‖ 0 × 7                                             32 bytes
//! entry  = digest 32 ‖ pack u32 ‖ offset u32 ‖ stored_len u32 ‖ raw_len u24 ‖ codec u8       48 bytes
//! ```
//!
//! * Entries ascend by digest; one digest may occur more than once (a second copy in another pack). Digests are
//!   uniformly random, so an interpolated guess lands within a page or two: three guesses and a short gallop.
//! * Packs are named by number, so that an entry has 48 bytes and not 60.
//! * The checksum of the body is checked by `verify` and before a merge, not at each opening: that would read it all.
//!   Every access is bounds-checked instead, and a wrong place is found by the digest of what lies there.

use crate::repo::blob::Placed;
use crate::repo::digest::Digest;
use crate::repo::error::FormatError;
use crate::repo::fields::{u16_at, u32_at, u64_at};
use crate::repo::pack::{HEADER_BYTES as PACK_HEADER_BYTES, MAX_PACK_BYTES, PackKind};
use crate::units::PackId;

/// Length of the header.
pub const HEADER_BYTES: usize = 64;
/// Length of an entry of the pack table.
pub const PACK_BYTES: usize = 32;
/// Length of an entry.
pub const ENTRY_BYTES: usize = 48;

const VERSION: u16 = 1;
const MAGIC: &[u8; 8] = b"\x89LBindx\n";

/// An entry as it is stored. Sorts by digest.
pub type RawEntry = [u8; ENTRY_BYTES];

/// A pack of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackRef {
    /// Its id.
    pub id: PackId,
    /// Its length as a file.
    pub len_bytes: u64,
    /// What it holds.
    pub kind: PackKind,
}

impl PackRef {
    /// As it is stored.
    pub fn encode(&self) -> [u8; PACK_BYTES] {
        let mut out = [0; PACK_BYTES];
        out[..16].copy_from_slice(self.id.as_bytes());
        out[16..24].copy_from_slice(&self.len_bytes.to_le_bytes());
        out[24] = self.kind as u8;
        out
    }

    /// The inverse of [`PackRef::encode`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let short = || FormatError::bad("its pack table is cut short");
        let id = PackId::from_bytes(*bytes.first_chunk().ok_or_else(short)?);
        let len_bytes = u64_at(bytes, 16).ok_or_else(short)?;
        if !(PACK_HEADER_BYTES..=MAX_PACK_BYTES).contains(&len_bytes) {
            return Err(FormatError::bad(format!("its pack table gives pack {id} a length of {len_bytes}")));
        }
        Ok(Self { id, len_bytes, kind: PackKind::from_byte(*bytes.get(24).ok_or_else(short)?)? })
    }
}

/// The entry of a blob in pack number `pack` of the table.
pub fn encode_entry(digest: &Digest, pack: u32, placed: &Placed) -> RawEntry {
    let mut out = [0; ENTRY_BYTES];
    out[..32].copy_from_slice(digest.as_bytes());
    out[32..36].copy_from_slice(&pack.to_le_bytes());
    out[36..].copy_from_slice(&placed.encode());
    out
}

/// The header of an index file.
pub(crate) fn encode_header(packs: u32, entries: u64, created_us: u64, body_crc: u32) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    out[..8].copy_from_slice(MAGIC);
    out[8..10].copy_from_slice(&VERSION.to_le_bytes());
    out[12..16].copy_from_slice(&packs.to_le_bytes());
    out[16..24].copy_from_slice(&entries.to_le_bytes());
    out[24..32].copy_from_slice(&created_us.to_le_bytes());
    out[32..36].copy_from_slice(&body_crc.to_le_bytes());
    let crc = crc32fast::hash(&out[..60]);
    out[60..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// What the header of an index file says, checked against the file's length.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Packs in the table.
    pub packs: u32,
    /// Entries.
    pub entries: u64,
    /// When it was made, in microseconds since 1970.
    pub created_us: u64,
    body_crc: u32,
}

impl Header {
    /// Decodes the header of an index file whose bytes these are.
    pub fn decode(file: &[u8]) -> Result<Self, FormatError> {
        let header = file.get(..HEADER_BYTES).ok_or_else(|| FormatError::bad("it is shorter than a header"))?;
        let short = || FormatError::bad("it is shorter than a header");
        if header[..8] != *MAGIC {
            return Err(FormatError::bad("it does not begin as an index does"));
        }
        if u32_at(header, 60) != Some(crc32fast::hash(&header[..60])) {
            return Err(FormatError::bad("the checksum of its header is wrong"));
        }
        match u16_at(header, 8).ok_or_else(short)? {
            VERSION => {}
            0 => return Err(FormatError::bad("format version 0")),
            newer => return Err(FormatError::Newer { version: newer.into(), supported: VERSION.into() }),
        }
        let this = Self {
            packs: u32_at(header, 12).ok_or_else(short)?,
            entries: u64_at(header, 16).ok_or_else(short)?,
            created_us: u64_at(header, 24).ok_or_else(short)?,
            body_crc: u32_at(header, 32).ok_or_else(short)?,
        };
        let expected = this.entries.checked_mul(ENTRY_BYTES as u64).and_then(|e| e.checked_add(this.entries_at()));
        if expected != Some(file.len() as u64) {
            return Err(FormatError::bad(format!("its length of {} bytes is not what its header says", file.len())));
        }
        Ok(this)
    }

    fn entries_at(&self) -> u64 {
        HEADER_BYTES as u64 + u64::from(self.packs) * PACK_BYTES as u64
    }
}

/// A digest's place according to an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What lies there.
    pub digest: Digest,
    /// Number of the pack in the table.
    pub pack: u32,
    /// Where in the pack.
    pub placed: Placed,
}

/// The bytes of an index file, ready for look-ups.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    file: &'a [u8],
    header: Header,
}

impl<'a> View<'a> {
    /// Checks the header.
    pub fn open(file: &'a [u8]) -> Result<Self, FormatError> {
        Ok(Self { file, header: Header::decode(file)? })
    }

    /// These bytes, whose header was decoded before.
    pub(crate) fn of_checked(file: &'a [u8], header: Header) -> Self {
        Self { file, header }
    }

    /// The header.
    pub fn header(&self) -> Header {
        self.header
    }

    /// Reads everything and compares it with the checksum; also checks that entries ascend and can be decoded.
    pub fn check_body(&self) -> Result<(), FormatError> {
        if crc32fast::hash(&self.file[HEADER_BYTES.min(self.file.len())..]) != self.header.body_crc {
            return Err(FormatError::bad("the checksum of its body is wrong"));
        }
        (0..self.header.packs).try_for_each(|n| self.pack(n).map(drop))?;
        let mut last = Digest::ZERO;
        for n in 0..self.header.entries {
            let entry = self.entry(n)?;
            if entry.digest < last {
                return Err(FormatError::bad("its entries are not in order"));
            }
            last = entry.digest;
        }
        Ok(())
    }

    /// Pack number `n` of the table.
    pub fn pack(&self, n: u32) -> Result<PackRef, FormatError> {
        let at = HEADER_BYTES + n as usize * PACK_BYTES;
        match self.file.get(at..at + PACK_BYTES) {
            Some(bytes) if n < self.header.packs => PackRef::decode(bytes),
            _ => Err(FormatError::bad(format!("an entry names pack number {n} of {}", self.header.packs))),
        }
    }

    /// The stored bytes of entry number `n`.
    pub fn raw_entry(&self, n: u64) -> Option<&'a RawEntry> {
        let at = usize::try_from(self.header.entries_at().checked_add(n.checked_mul(ENTRY_BYTES as u64)?)?).ok()?;
        self.file.get(at..)?.first_chunk()
    }

    /// Entry number `n`, checked against the pack that it names.
    pub fn entry(&self, n: u64) -> Result<Entry, FormatError> {
        let raw = self.raw_entry(n).ok_or_else(|| FormatError::bad("an entry is missing"))?;
        let digest = Digest::from_slice(raw).unwrap_or_default();
        let pack = u32_at(raw, 32).unwrap_or(u32::MAX);
        let placed = Placed::decode(&raw[36..])?;
        if placed.end() > self.pack(pack)?.len_bytes || u64::from(placed.offset_bytes) < PACK_HEADER_BYTES {
            return Err(FormatError::bad(format!("its entry for {digest} points outside of the pack")));
        }
        Ok(Entry { digest, pack, placed })
    }

    fn digest(&self, n: u64) -> Digest {
        self.raw_entry(n).and_then(|raw| Digest::from_slice(raw)).unwrap_or_default()
    }

    /// Number of the first entry that is not below `digest`; the count of entries if there is none.
    pub fn lower_bound(&self, digest: &Digest) -> u64 {
        let (mut low, mut high) = (0, self.header.entries);
        let (mut low_key, mut high_key) = (0, u64::MAX);
        let mut from_low = true;
        let wanted = digest.prefix();
        for _ in 0..3 {
            if high - low < 8 || wanted < low_key || wanted > high_key {
                break;
            }
            let part = u128::from(wanted - low_key) * u128::from(high - low) / (u128::from(high_key - low_key) + 1);
            let middle = low + part as u64;
            let found = self.digest(middle);
            from_low = found < *digest;
            if from_low {
                (low, low_key) = (middle + 1, found.prefix());
            } else {
                (high, high_key) = (middle, found.prefix());
            }
        }
        let mut step = 4;
        while high - low > step {
            let middle = if from_low { low + step } else { high - step };
            let below = self.digest(middle) < *digest;
            if below {
                low = middle + 1;
            } else {
                high = middle;
            }
            if below != from_low {
                break;
            }
            step *= 2;
        }
        while low < high {
            let middle = low + (high - low) / 2;
            if self.digest(middle) < *digest {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }

    /// The entries of a digest, with their numbers.
    pub fn find(&self, digest: &Digest) -> impl Iterator<Item = (u64, Result<Entry, FormatError>)> + use<'a> {
        let (this, digest) = (*self, *digest);
        (this.lower_bound(&digest)..this.header.entries)
            .take_while(move |n| this.digest(*n) == digest)
            .map(move |n| (n, this.entry(n)))
    }
}
