//! MBR: four primary partitions in sector 0, one of which may hold a chain of logical ones.

use super::{Look, MAX_PARTITIONS, Partition, SECTOR_BYTES, Stop, doubt, le_u32, sectors};
use crate::extent::Extent;

/// Types of a partition that holds logical ones.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// Type of the partition that stands for a GPT.
const PROTECTIVE: u8 = 0xee;
/// Linux swap.
const SWAP: u8 = 0x82;
/// The number of the first logical partition.
const FIRST_LOGICAL: u32 = 5;

/// An entry, with numbers of sectors.
#[derive(Clone, Copy, Debug)]
struct Entry {
    kind: u8,
    first: u64,
    count: u64,
}

/// A sector with a table.
pub struct Table {
    /// The disk's signature.
    signature: u32,
    entries: [Entry; 4],
}

impl Table {
    /// The table in a sector; `None` where it has none.
    ///
    /// # Errors
    /// A doubt: the sector is marked as one with a table, and has something else there (a boot sector of a file system).
    pub fn of(sector: &[u8]) -> Result<Option<Self>, Stop> {
        if sector.get(510..512) != Some(&[0x55, 0xaa]) {
            return Ok(None);
        }
        let mut entries = [Entry { kind: 0, first: 0, count: 0 }; 4];
        for (entry, bytes) in entries.iter_mut().zip(sector[446..510].chunks(16)) {
            if bytes[0] & 0x7f != 0 {
                return doubt("the first sector is a boot sector and has no table of partitions");
            }
            let number = |at| u64::from(le_u32(bytes, at).unwrap_or_default());
            *entry = Entry { kind: bytes[4], first: number(8), count: number(12) };
        }
        Ok(Some(Self { signature: le_u32(sector, 440).unwrap_or_default(), entries }))
    }

    /// Whether a GPT is what counts.
    pub fn is_protective(&self) -> bool {
        self.entries.iter().any(|entry| entry.kind == PROTECTIVE)
    }

    /// All partitions.
    pub fn read(&self, size_bytes: u64, look: &mut Look<'_>) -> Result<Vec<Partition>, Stop> {
        let mut found = vec![];
        let mut extended = None;
        for (number, entry) in (1..).zip(self.entries).filter(|(_, entry)| entry.is_used()) {
            if !EXTENDED.contains(&entry.kind) {
                found.push(self.partition(number, entry, 0, size_bytes)?);
            } else if extended.replace(entry).is_some() {
                return doubt("there are two extended partitions");
            }
        }
        if let Some(extended) = extended {
            self.logical(extended, size_bytes, look, &mut found)?;
        }
        Ok(found)
    }

    /// Follows the chain: each link has a partition, and the place of the next link.
    fn logical(
        &self,
        extended: Entry,
        size_bytes: u64,
        look: &mut Look<'_>,
        found: &mut Vec<Partition>,
    ) -> Result<(), Stop> {
        let Some(whole) = sectors(extended.first, extended.count, SECTOR_BYTES, size_bytes) else {
            return doubt("the extended partition lies outside the disk");
        };
        let mut links = vec![];
        let mut at = extended.first;
        let mut number = FIRST_LOGICAL;
        loop {
            if links.contains(&at) || links.len() >= MAX_PARTITIONS / 2 {
                return doubt("the chain of logical partitions is endless");
            }
            links.push(at);
            let link = Extent::new(at * SECTOR_BYTES, SECTOR_BYTES);
            let Some(table) = Self::of(&look(link)?)? else {
                return doubt("the chain of logical partitions is broken");
            };
            let mut next = None;
            for entry in table.entries.into_iter().filter(|entry| entry.is_used()) {
                if EXTENDED.contains(&entry.kind) {
                    next = next.or(Some(extended.first.saturating_add(entry.first)));
                    continue;
                }
                let partition = self.partition(number, entry, at, size_bytes)?;
                if partition.extent.offset_bytes < link.end() || partition.extent.end() > whole.end() {
                    return doubt(format!("partition {number} lies outside the extended one"));
                }
                found.push(partition);
                number += 1;
            }
            let Some(next) = next else { return Ok(()) };
            let inside = sectors(next, 1, SECTOR_BYTES, whole.end());
            if inside.is_none_or(|link| link.offset_bytes < whole.offset_bytes) {
                return doubt("the chain of logical partitions leaves the extended one");
            }
            at = next;
        }
    }

    fn partition(&self, number: u32, entry: Entry, from: u64, size_bytes: u64) -> Result<Partition, Stop> {
        let first = from.saturating_add(entry.first);
        match sectors(first, entry.count, SECTOR_BYTES, size_bytes) {
            Some(extent) if first > 0 => Ok(Partition {
                number,
                extent,
                for_swap: entry.kind == SWAP,
                label: String::new(),
                uuid: format!("{:08x}-{number:02x}", self.signature),
            }),
            _ => doubt(format!("partition {number} lies outside the disk")),
        }
    }
}

impl Entry {
    fn is_used(&self) -> bool {
        self.kind != 0 && self.count != 0
    }
}
