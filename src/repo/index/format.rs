//! Index format, version 1: sorted entries, read where they lie.
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
//!   uniformly random, so an interpolated guess lands near: two or three parts of 256 entries tell where one of many millions
//!   is. Where they are not random, the search is by halves from the fourth on.
//! * Nothing is mapped: of a file that somebody cuts short, or of a medium that fails, a map is a signal that ends the
//!   process, and a read is an error. What was read is kept within bounds ([`kept`](super::kept)).
//! * Packs are named by number, so that an entry has 48 bytes and not 60.
//! * The checksum of the body is checked by `verify` and before a merge, not at each opening: that would read it all.
//!   Every access is bounds-checked instead, and a wrong place is found by the digest of what lies there.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::repo::blob::Placed;
use crate::repo::digest::Digest;
use crate::repo::error::FormatError;
use crate::repo::fields::{u16_at, u32_at, u64_at};
use crate::repo::index::kept::Kept;
use crate::repo::pack::{HEADER_BYTES as PACK_HEADER_BYTES, MAX_PACK_BYTES, PackKind};
use crate::units::PackId;

/// Length of the header.
pub const HEADER_BYTES: usize = 64;
/// Length of an entry of the pack table.
pub const PACK_BYTES: usize = 32;
/// Length of an entry.
pub const ENTRY_BYTES: usize = 48;

/// Entries that are read at once: 12 KiB. A guess among a hundred thousand is hardly ever further off.
const PART_ENTRIES: u64 = 256;
/// The same of packs.
const PART_PACKS: u64 = 128;

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
    /// Decodes the header of an index file that has this length and begins with these bytes.
    pub fn decode(begin: &[u8], file_bytes: u64) -> Result<Self, FormatError> {
        let header = begin.get(..HEADER_BYTES).ok_or_else(|| FormatError::bad("it is shorter than a header"))?;
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
        if expected != Some(file_bytes) {
            return Err(FormatError::bad(format!("its length of {file_bytes} bytes is not what its header says")));
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
    /// The pack's id there.
    pub pack_id: PackId,
    /// Where in the pack.
    pub placed: Placed,
}

impl Entry {
    /// Decodes an entry and checks it against the pack that it names, which `pack_of` has.
    pub fn decode(
        raw: &RawEntry,
        pack_of: impl FnOnce(u32) -> Result<PackRef, FormatError>,
    ) -> Result<Self, FormatError> {
        let digest = digest_of(raw);
        let pack = u32_at(raw, 32).unwrap_or(u32::MAX);
        let placed = Placed::decode(&raw[36..])?;
        let PackRef { id: pack_id, len_bytes, .. } = pack_of(pack)?;
        if placed.end() > len_bytes || u64::from(placed.offset_bytes) < PACK_HEADER_BYTES {
            return Err(FormatError::bad(format!("its entry for {digest} points outside of the pack")));
        }
        Ok(Self { digest, pack, pack_id, placed })
    }
}

/// Where the bytes of an index file are.
pub trait Source {
    /// Reads exactly these.
    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()>;
}

impl Source for File {
    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.read_exact_at(buffer, offset_bytes)
    }
}

impl Source for &[u8] {
    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let from = usize::try_from(offset_bytes).ok().and_then(|at| self.get(at..)?.get(..buffer.len()));
        buffer.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// What was read of an index file.
#[derive(Debug)]
pub struct Cache {
    packs: Kept<[u8; PACK_BYTES]>,
    entries: Kept<RawEntry>,
}

impl Cache {
    /// Nothing yet, of a file with this header.
    pub fn new(header: &Header) -> Self {
        let packs = u64::from(header.packs).div_ceil(PART_PACKS);
        Self { packs: Kept::new(packs), entries: Kept::new(header.entries.div_ceil(PART_ENTRIES)) }
    }
}

/// An index file, ready for look-ups.
#[derive(Clone, Copy)]
pub struct View<'a> {
    source: &'a dyn Source,
    header: Header,
    cache: &'a Cache,
}

impl<'a> View<'a> {
    /// A source whose header was decoded before, with what was read of it.
    pub(crate) fn new(source: &'a dyn Source, header: Header, cache: &'a Cache) -> Self {
        Self { source, header, cache }
    }

    /// The header.
    pub fn header(&self) -> Header {
        self.header
    }

    fn read(&self, buffer: &mut [u8], offset_bytes: u64) -> Result<(), FormatError> {
        self.source.read_at(buffer, offset_bytes).map_err(|error| {
            FormatError::bad(match error.kind() {
                io::ErrorKind::UnexpectedEof => "it was cut short while it was in use".to_owned(),
                _ => format!("it cannot be read at {offset_bytes}: {error}"),
            })
        })
    }

    /// Reads everything and compares it with the checksum; also checks that entries ascend and can be decoded.
    pub fn check_body(&self) -> Result<(), FormatError> {
        let mut crc = crc32fast::Hasher::new();
        let packs = self.packs()?;
        packs.iter().for_each(|bytes| crc.update(bytes));
        let packs = packs.iter().map(|bytes| PackRef::decode(bytes)).collect::<Result<Vec<_>, _>>();
        let mut order = Ok(());
        let mut last = Digest::ZERO;
        for raw in self.entries() {
            let raw = raw?;
            crc.update(&raw);
            if order.is_ok() {
                let pack = |n: u32| packs.as_ref().ok().and_then(|packs| packs.get(n as usize)).copied();
                order = Entry::decode(&raw, |n| pack(n).ok_or_else(|| self.no_pack(n))).and_then(|entry| {
                    let before = std::mem::replace(&mut last, entry.digest);
                    if entry.digest < before { Err(FormatError::bad("its entries are not in order")) } else { Ok(()) }
                });
            }
        }
        if crc.finalize() != self.header.body_crc {
            return Err(FormatError::bad("the checksum of its body is wrong"));
        }
        packs?;
        order
    }

    fn no_pack(&self, n: u32) -> FormatError {
        FormatError::bad(format!("an entry names pack number {n} of {}", self.header.packs))
    }

    /// The pack table as it is stored.
    fn packs(&self) -> Result<Vec<[u8; PACK_BYTES]>, FormatError> {
        let parts = u64::from(self.header.packs).div_ceil(PART_PACKS);
        let mut packs = Vec::new();
        for part in 0..parts {
            packs.extend_from_slice(&self.part_of_packs(part)?);
        }
        Ok(packs)
    }

    fn part_of_packs(&self, part: u64) -> Result<Cow<'a, [[u8; PACK_BYTES]]>, FormatError> {
        let first = part * PART_PACKS;
        self.cache.packs.get(part, || {
            let mut packs =
                vec![[0; PACK_BYTES]; u64::from(self.header.packs).saturating_sub(first).min(PART_PACKS) as usize];
            self.read(packs.as_flattened_mut(), HEADER_BYTES as u64 + first * PACK_BYTES as u64)?;
            Ok(packs)
        })
    }

    /// All packs of the table.
    pub fn all_packs(&self) -> Result<Vec<PackRef>, FormatError> {
        self.packs()?.iter().map(|bytes| PackRef::decode(bytes)).collect()
    }

    /// Pack number `n` of the table.
    pub fn pack(&self, n: u32) -> Result<PackRef, FormatError> {
        if n >= self.header.packs {
            return Err(self.no_pack(n));
        }
        let part = self.part_of_packs(u64::from(n) / PART_PACKS)?;
        PackRef::decode(part.get((u64::from(n) % PART_PACKS) as usize).ok_or_else(|| self.no_pack(n))?)
    }

    /// Entry number `n`, checked against the pack that it names.
    pub fn entry(&self, n: u64) -> Result<Entry, FormatError> {
        let part = self.part(n / PART_ENTRIES)?;
        let raw = part.get((n % PART_ENTRIES) as usize).ok_or_else(|| FormatError::bad("an entry is missing"))?;
        Entry::decode(raw, |pack| self.pack(pack))
    }

    /// Part number `n` of the entries, which is empty behind their end.
    fn part(&self, n: u64) -> Result<Cow<'a, [RawEntry]>, FormatError> {
        self.cache.entries.get(n, || self.read_part(n))
    }

    fn read_part(&self, n: u64) -> Result<Vec<RawEntry>, FormatError> {
        let first = n.saturating_mul(PART_ENTRIES);
        let mut entries = vec![[0; ENTRY_BYTES]; self.header.entries.saturating_sub(first).min(PART_ENTRIES) as usize];
        // The header was checked: nothing that is there overflows.
        let at = self.header.entries_at().saturating_add(first.saturating_mul(ENTRY_BYTES as u64));
        if !entries.is_empty() {
            self.read(entries.as_flattened_mut(), at)?;
        }
        Ok(entries)
    }

    /// All entries in their order, as they are stored; nothing is kept. An error is the last.
    pub fn entries(&self) -> impl Iterator<Item = Result<RawEntry, FormatError>> + use<'a> {
        let this = *self;
        let (mut part, mut at, mut next) = (vec![], 0, 0);
        std::iter::from_fn(move || {
            if at == part.len() {
                at = 0;
                part = match this.read_part(next) {
                    Ok(part) => part,
                    Err(error) => {
                        (part, next) = (vec![], u64::MAX);
                        return Some(Err(error));
                    }
                };
                next = next.saturating_add(1);
            }
            let raw = *part.get(at)?;
            at += 1;
            Some(Ok(raw))
        })
    }

    /// Number of the first entry that is not below `digest`; the count of entries if there is none.
    pub fn lower_bound(&self, digest: &Digest) -> Result<u64, FormatError> {
        let (mut low, mut high) = (0, self.header.entries.div_ceil(PART_ENTRIES));
        let (mut low_key, mut high_key) = (0, u64::MAX);
        let wanted = digest.prefix();
        let mut guesses = 0;
        while low < high {
            let mut middle = low + (high - low) / 2;
            if guesses < 3 && (low_key..=high_key).contains(&wanted) {
                let part = u128::from(wanted - low_key) * u128::from(high - low) / (u128::from(high_key - low_key) + 1);
                middle = low + part as u64;
            }
            guesses += 1;
            let part = self.part(middle)?;
            let of = |raw: Option<&RawEntry>| raw.map(digest_of).unwrap_or_default();
            let (begin, end) = (of(part.first()), of(part.last()));
            if end < *digest {
                (low, low_key) = (middle + 1, end.prefix());
            } else if middle > low && begin >= *digest {
                (high, high_key) = (middle, begin.prefix());
            } else {
                return Ok(middle * PART_ENTRIES + part.partition_point(|raw| digest_of(raw) < *digest) as u64);
            }
        }
        Ok(self.header.entries.min(low.saturating_mul(PART_ENTRIES)))
    }

    /// The entries of a digest, with their numbers. An error is the last.
    pub fn find(&self, digest: &Digest) -> impl Iterator<Item = Result<(u64, Entry), FormatError>> + use<'a> {
        let (this, digest) = (*self, *digest);
        let mut next = Some(this.lower_bound(&digest));
        std::iter::from_fn(move || {
            let number = match next.take()? {
                Ok(number) if number < this.header.entries => number,
                Ok(_) => return None,
                Err(error) => return Some(Err(error)),
            };
            let part = match this.part(number / PART_ENTRIES) {
                Ok(part) => part,
                Err(error) => return Some(Err(error)),
            };
            let raw = part.get((number % PART_ENTRIES) as usize).filter(|raw| digest_of(raw) == digest)?;
            next = Some(Ok(number + 1));
            Some(Entry::decode(raw, |pack| this.pack(pack)).map(|entry| (number, entry)))
        })
    }
}

fn digest_of(raw: &RawEntry) -> Digest {
    Digest::from_slice(raw).unwrap_or_default()
}
