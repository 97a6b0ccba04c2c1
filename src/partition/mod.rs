//! Partition tables and swap headers, read from a disk's first bytes and wherever those point to. Pure.
//!
//! ```text
//! read ─► sector 0: MBR? ──no──► no partitions
//!           │ yes                       ┌── type 0xee: GPT (sectors of 512 or 4096 bytes), header and table by their crc
//!           ├───────────────────────────┘
//!           └── primary partitions, and the chain of logical ones
//! ```
//!
//! Nothing is read here: a reader asks a [`Look`] for bytes, and who has not got them yet stops it with [`Stop::Wants`],
//! fetches them and starts it again. What contradicts itself (a wrong crc, partitions that overlap or lie outside the disk, a
//! chain that runs in a circle) is a [`Stop::Doubt`]: then nothing is known of the disk's partitions.
//!
//! What follows from it is never more than "these bytes need not be kept", so a table that is read as none does no harm.
//! Formats: UEFI 2.10, chapter 5; the kernel's `block/partitions/msdos.c`; `include/linux/swap.h`, `union swap_header`.

use crate::extent::Extent;

mod gpt;
mod mbr;
mod swap;

pub use swap::{SwapHeader, swap};

/// Bytes of a sector, where a table does not say otherwise.
const SECTOR_BYTES: u64 = 512;
/// Most partitions of a disk that are looked at; more are a doubt.
pub const MAX_PARTITIONS: usize = 256;

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number, as Linux counts: logical ones begin at 5.
    pub number: u32,
    /// Where it is.
    pub extent: Extent,
    /// Whether the table says that it is for swap.
    pub for_swap: bool,
    /// Its name in the table; empty in an MBR.
    pub label: String,
    /// PARTUUID as Linux writes it, in lower case.
    pub uuid: String,
}

/// Why a reader stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It needs these bytes, a few MiB at most, all of them within the disk.
    Wants(Extent),
    /// What is there cannot be believed.
    Doubt(String),
}

/// Gives bytes of the disk, or stops the reader.
pub type Look<'a> = dyn FnMut(Extent) -> Result<Vec<u8>, Stop> + 'a;

/// The partitions of a disk, in the order of the table; none where it has no table. `sector_bytes`: how long the guest takes
/// the disk's sectors to be. An MBR counts in them and does not say so.
///
/// # Errors
/// What the reader needs, or why the table cannot be believed.
pub fn read(size_bytes: u64, sector_bytes: u64, look: &mut Look<'_>) -> Result<Vec<Partition>, Stop> {
    if size_bytes < SECTOR_BYTES {
        return Ok(vec![]);
    }
    let sector = look(Extent::new(0, SECTOR_BYTES))?;
    let partitions = match mbr::Table::of(&sector)? {
        None => return Ok(vec![]),
        Some(table) if table.is_protective() => gpt::read(size_bytes, look)?,
        Some(_) if sector_bytes != SECTOR_BYTES => {
            return doubt(format!("an MBR on a disk whose sectors have {sector_bytes} bytes is not understood"));
        }
        Some(table) => table.read(size_bytes, look)?,
    };
    apart(&partitions)?;
    Ok(partitions)
}

fn doubt<T>(what: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Doubt(what.into()))
}

/// Partitions must not share bytes.
fn apart(partitions: &[Partition]) -> Result<(), Stop> {
    let mut sorted: Vec<_> = partitions.iter().collect();
    sorted.sort_by_key(|partition| partition.extent.offset_bytes);
    match sorted.windows(2).find(|pair| pair[0].extent.end() > pair[1].extent.offset_bytes) {
        Some(pair) => doubt(format!("partitions {} and {} overlap", pair[0].number, pair[1].number)),
        None => Ok(()),
    }
}

/// A range of sectors within the disk; `None` where it is not.
fn sectors(first: u64, count: u64, sector_bytes: u64, size_bytes: u64) -> Option<Extent> {
    let (offset, len) = (first.checked_mul(sector_bytes)?, count.checked_mul(sector_bytes)?);
    Extent::checked(offset, len).filter(|extent| extent.len_bytes > 0 && extent.fits(size_bytes))
}

fn le_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn le_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// What fuzzing runs: any bytes as a disk. Must neither panic nor hang, and what is found lies within the disk.
pub fn fuzz(bytes: &[u8]) {
    for size_bytes in [bytes.len() as u64, 1 << 40] {
        let mut look = |extent: Extent| {
            assert!(extent.fits(size_bytes) && extent.len_bytes <= 4 << 20, "{extent}");
            // Beyond the given bytes all is zero.
            let from = (extent.offset_bytes as usize).min(bytes.len());
            let to = (extent.end() as usize).min(bytes.len());
            let mut found = bytes[from..to].to_vec();
            found.resize(extent.len_bytes as usize, 0);
            Ok(found)
        };
        let partitions = read(size_bytes, SECTOR_BYTES, &mut look).unwrap_or_default();
        assert!(partitions.len() <= MAX_PARTITIONS);
        let whole = Extent::new(0, size_bytes);
        for extent in partitions.iter().map(|partition| partition.extent).chain([whole]) {
            assert!(extent.fits(size_bytes));
            if let Ok(Some(header)) = swap(extent, &mut look) {
                assert!(header.page_bytes < header.len_bytes && header.len_bytes <= extent.len_bytes);
            }
        }
    }
}
