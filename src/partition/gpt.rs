//! GPT: a header in sector 1 and a table of entries, each with a crc.

use super::{Look, MAX_PARTITIONS, Partition, Stop, doubt, le_u32, le_u64};
use crate::extent::Extent;

/// Sizes of a sector that disks have.
const SECTORS_BYTES: [u64; 2] = [512, 4096];
const SIGNATURE: &[u8; 8] = b"EFI PART";
const REVISION: u32 = 0x0001_0000;
/// Bytes of the header that the specification knows.
const HEADER_BYTES: u32 = 92;
/// Linux swap: 0657FD6D-A4AB-43C4-84E5-0933C84B4F4F, as it lies on the disk.
const SWAP: [u8; 16] = [0x6d, 0xfd, 0x57, 0x06, 0xab, 0xa4, 0xc4, 0x43, 0x84, 0xe5, 0x09, 0x33, 0xc8, 0x4b, 0x4f, 0x4f];
/// Smallest and largest entry.
const ENTRY_BYTES: std::ops::RangeInclusive<u32> = 128..=1024;
/// Most entries of a table, used or not.
const MAX_ENTRIES: u32 = 1024;

/// All partitions.
pub fn read(size_bytes: u64, look: &mut Look<'_>) -> Result<Vec<Partition>, Stop> {
    for sector_bytes in SECTORS_BYTES {
        let at = Extent::new(sector_bytes, 512);
        if !at.fits(size_bytes) {
            break;
        }
        let head = look(at)?;
        if head.starts_with(SIGNATURE) {
            return table(&head, sector_bytes, size_bytes, look);
        }
    }
    doubt("the first sector stands for a GPT, whose header is not there")
}

fn table(head: &[u8], sector_bytes: u64, size_bytes: u64, look: &mut Look<'_>) -> Result<Vec<Partition>, Stop> {
    let wrong = |what: &str| Stop::Doubt(format!("the GPT's header {what}"));
    let cut = || wrong("is cut");
    let u32_at = |at| le_u32(head, at).ok_or_else(cut);
    let u64_at = |at| le_u64(head, at).ok_or_else(cut);
    let len = u32_at(12)?;
    if u32_at(8)? != REVISION || !(HEADER_BYTES..=512).contains(&len) {
        return Err(wrong("is of another version"));
    }
    let mut header = head.get(..len as usize).ok_or_else(cut)?.to_vec();
    header.get_mut(16..20).ok_or_else(cut)?.fill(0);
    if crc32fast::hash(&header) != u32_at(16)? {
        return Err(wrong("does not match its crc"));
    }
    let (first, last) = (u64_at(40)?, u64_at(48)?);
    let end = last.checked_add(1).and_then(|past| past.checked_mul(sector_bytes));
    if u64_at(24)? != 1 || first > last || end.is_none_or(|end| end > size_bytes) {
        return Err(wrong("is of a disk of another size"));
    }
    let (entries, entry_bytes) = (u32_at(80)?, u32_at(84)?);
    let fits = entries <= MAX_ENTRIES && ENTRY_BYTES.contains(&entry_bytes) && entry_bytes.is_power_of_two();
    let at = u64_at(72)?.checked_mul(sector_bytes).filter(|at| *at >= 2 * sector_bytes);
    let place = at.and_then(|at| Extent::checked(at, u64::from(entries) * u64::from(entry_bytes)));
    let place = place.filter(|place| fits && place.fits(size_bytes)).ok_or_else(|| wrong("has an impossible table"))?;
    let bytes = look(place)?;
    if crc32fast::hash(&bytes) != u32_at(88)? {
        return doubt("the GPT's table does not match its crc");
    }
    let mut found = vec![];
    for (number, entry) in (1..).zip(bytes.chunks(entry_bytes as usize)) {
        let Some(kind) = entry.first_chunk::<16>().filter(|kind| **kind != [0; 16]) else { continue };
        let place =
            le_u64(entry, 32).zip(le_u64(entry, 40)).filter(|(from, to)| first <= *from && from <= to && *to <= last);
        let Some((from, to)) = place else {
            return doubt(format!("partition {number} lies outside the disk"));
        };
        if found.len() >= MAX_PARTITIONS {
            return doubt(format!("the GPT has more than {MAX_PARTITIONS} partitions"));
        }
        found.push(Partition {
            number,
            // Both are within the disk, as `last` is.
            extent: Extent::between(from * sector_bytes, (to + 1) * sector_bytes),
            for_swap: *kind == SWAP,
            label: label(entry.get(56..128).unwrap_or_default()),
            uuid: uuid(entry.get(16..32).unwrap_or_default()),
        });
    }
    Ok(found)
}

/// A name in UTF-16, up to its end; without control characters, since people see it.
fn label(bytes: &[u8]) -> String {
    let units = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).take_while(|unit| *unit != 0);
    char::decode_utf16(units).map(|c| c.unwrap_or('\u{fffd}')).filter(|c| !c.is_control()).collect()
}

/// A GUID in its text form: the first three groups are little-endian.
fn uuid(bytes: &[u8]) -> String {
    let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut text = String::with_capacity(36);
    for (n, at) in order.into_iter().enumerate() {
        if matches!(n, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text += &format!("{:02x}", bytes.get(at).copied().unwrap_or_default());
    }
    text
}
