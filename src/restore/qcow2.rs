//! qcow2 images, version 3, laid out before the first byte is written.
//!
//! ```text
//! header | L1 table | refcount table | refcount blocks | L2 tables | data, in the order of the disk
//! ```
//!
//! It is known beforehand which chunks have data, so every chunk's place follows from its number among them: threads
//! write anywhere without an allocator between them, the data ends up in the order of the disk, and the file's size is
//! known for the check of free space. Clusters are 64 KiB, so a chunk is one cluster or more. Section names are those of
//! QEMU's `docs/interop/qcow2.rst`; all numbers are big-endian.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::limits::MIN_CHUNK_BYTES;
use crate::restore::chunks::ChunkMap;

const CLUSTER_BITS: u32 = 16;
const CLUSTER_BYTES: u64 = 1 << CLUSTER_BITS;
/// Entries of an L2 table ("Cluster mapping"): 8 bytes each in one cluster; a table maps 512 MiB.
const L2_ENTRIES: u64 = CLUSTER_BYTES / 8;
/// Entries of a refcount block ("Host cluster management"): 16 bits each in one cluster; a block counts 2 GiB of the file.
const REFCOUNT_ENTRIES: u64 = CLUSTER_BYTES / 2;
/// L1 and L2 entries, bit 63: the refcount is exactly one.
const COPIED: u64 = 1 << 63;
/// QEMU opens no image with a longer L1 table (`QCOW_MAX_L1_SIZE`) or refcount table (`QCOW_MAX_REFTABLE_SIZE`).
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// "Header" with the fields of version 3.
const HEADER_BYTES: u32 = 104;

const _: () = assert!(CLUSTER_BYTES == MIN_CHUNK_BYTES as u64, "a chunk is a whole number of clusters");

/// Where everything is in the file; offsets and counts in clusters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    size_bytes: u64,
    chunk_bytes: u64,
    l1_entries: u64,
    l1_at: u64,
    refcount_table_at: u64,
    refcount_table_clusters: u64,
    refcount_blocks_at: u64,
    refcount_blocks: u64,
    l2_at: u64,
    data_at: u64,
    clusters: u64,
}

impl Layout {
    /// The layout of a disk; or why there can be none.
    pub fn new(size_bytes: u64, chunk_bytes: u64, chunks: &ChunkMap) -> Result<Self, &'static str> {
        if !size_bytes.is_multiple_of(512) {
            return Err("its size is no multiple of 512 bytes");
        }
        let l1_entries = size_bytes.div_ceil(L2_ENTRIES * CLUSTER_BYTES);
        if l1_entries * 8 > MAX_L1_BYTES {
            return Err("it is larger than a qcow2 image with clusters of 64 KiB can be");
        }
        let tables = tables(chunks).count() as u64;
        let l1_at = 1;
        let refcount_table_at = l1_at + (l1_entries * 8).div_ceil(CLUSTER_BYTES);
        let data = chunks.data_bytes().div_ceil(CLUSTER_BYTES);
        // The refcounts count themselves, so more of them may be needed for them.
        let (mut refcount_table_clusters, mut refcount_blocks) = (1, 1);
        loop {
            let clusters = refcount_table_at + refcount_table_clusters + refcount_blocks + tables + data;
            let blocks = clusters.div_ceil(REFCOUNT_ENTRIES);
            let table = (blocks * 8).div_ceil(CLUSTER_BYTES);
            if (table, blocks) == (refcount_table_clusters, refcount_blocks) {
                break;
            }
            (refcount_table_clusters, refcount_blocks) = (table, blocks);
        }
        if refcount_table_clusters * CLUSTER_BYTES > MAX_REFCOUNT_TABLE_BYTES {
            return Err("it has more data than a qcow2 image with clusters of 64 KiB can hold");
        }
        let refcount_blocks_at = refcount_table_at + refcount_table_clusters;
        let l2_at = refcount_blocks_at + refcount_blocks;
        let data_at = l2_at + tables;
        Ok(Self {
            size_bytes,
            chunk_bytes,
            l1_entries,
            l1_at,
            refcount_table_at,
            refcount_table_clusters,
            refcount_blocks_at,
            refcount_blocks,
            l2_at,
            data_at,
            clusters: data_at + data,
        })
    }

    /// Length of the file.
    pub fn file_bytes(&self) -> u64 {
        self.clusters * CLUSTER_BYTES
    }

    /// Where in the file the bytes at an offset of the disk are; chunks with data that follow each other on the disk do so
    /// in the file.
    pub fn place(&self, chunks: &ChunkMap, offset_bytes: u64) -> io::Result<u64> {
        // The map was made of the same tree that is read now.
        let rank = chunks.rank(offset_bytes).ok_or_else(|| io::Error::other("the tree changed while it was read"))?;
        Ok(self.data_at * CLUSTER_BYTES + rank * self.chunk_bytes + offset_bytes % self.chunk_bytes)
    }

    /// Writes all but the data. The file must be empty but for data, and as long as it will be.
    pub fn write_tables(&self, file: &File, chunks: &ChunkMap) -> io::Result<()> {
        let at = |cluster: u64| cluster * CLUSTER_BYTES;
        let mut l1 = vec![0u8; self.l1_entries as usize * 8];
        let mut table = vec![0u8; CLUSTER_BYTES as usize];
        for (i, (number, rank)) in tables(chunks).enumerate() {
            let l2_at = at(self.l2_at + i as u64);
            put_u64(&mut l1, number as usize, l2_at | COPIED);
            self.fill_l2(&mut table, number, rank, chunks);
            file.write_all_at(&table, l2_at)?;
        }
        file.write_all_at(&l1, at(self.l1_at))?;

        // "Host cluster management": each cluster of the file is used once.
        let mut refcount_table = vec![0u8; self.refcount_blocks as usize * 8];
        for block in 0..self.refcount_blocks {
            let used = (self.clusters - block * REFCOUNT_ENTRIES).min(REFCOUNT_ENTRIES) as usize;
            put_u64(&mut refcount_table, block as usize, at(self.refcount_blocks_at + block));
            file.write_all_at(&[0u8, 1].repeat(used), at(self.refcount_blocks_at + block))?;
        }
        file.write_all_at(&refcount_table, at(self.refcount_table_at))?;
        file.write_all_at(&self.header(), 0)
    }

    /// The L2 table `number`, whose first chunk with data has this rank.
    fn fill_l2(&self, table: &mut [u8], number: u64, rank: u64, chunks: &ChunkMap) {
        table.fill(0);
        let per_chunk = self.chunk_bytes / CLUSTER_BYTES;
        let first_cluster = number * L2_ENTRIES;
        for (i, chunk) in chunks.iter_from(first_cluster * CLUSTER_BYTES).enumerate() {
            let guest = chunk.offset_bytes / CLUSTER_BYTES;
            if guest >= first_cluster + L2_ENTRIES {
                break;
            }
            for cluster in 0..chunk.len_bytes.div_ceil(CLUSTER_BYTES) {
                let host = self.data_at + (rank + i as u64) * per_chunk + cluster;
                put_u64(table, (guest + cluster - first_cluster) as usize, (host * CLUSTER_BYTES) | COPIED);
            }
        }
    }

    /// "Header", version 3, without optional features and without extensions (their end is marked by the zeroes that
    /// follow).
    fn header(&self) -> Vec<u8> {
        let u32 = |n: u64| (n as u32).to_be_bytes().to_vec();
        let u64 = |n: u64| n.to_be_bytes().to_vec();
        [
            u32(0x5146_49fb), // magic: "QFI\xfb"
            u32(3),           // version
            u64(0),           // backing_file_offset
            u32(0),           // backing_file_size
            u32(CLUSTER_BITS.into()),
            u64(self.size_bytes),
            u32(0), // crypt_method
            u32(self.l1_entries),
            u64(self.l1_at * CLUSTER_BYTES),
            u64(self.refcount_table_at * CLUSTER_BYTES),
            u32(self.refcount_table_clusters),
            u32(0), // nb_snapshots
            u64(0), // snapshots_offset
            u64(0), // incompatible_features
            u64(0), // compatible_features
            u64(0), // autoclear_features
            u32(4), // refcount_order: 16 bits
            u32(HEADER_BYTES.into()),
            u64(0), // end of the header extensions
        ]
        .concat()
    }
}

fn put_u64(table: &mut [u8], entry: usize, value: u64) {
    table[entry * 8..entry * 8 + 8].copy_from_slice(&value.to_be_bytes());
}

/// The L2 tables that are needed, with the rank of the first chunk of each. An L2 table maps a multiple of any chunk.
fn tables(chunks: &ChunkMap) -> impl Iterator<Item = (u64, u64)> {
    let mut last = None;
    chunks.iter().enumerate().filter_map(move |(rank, chunk)| {
        let number = chunk.offset_bytes / (L2_ENTRIES * CLUSTER_BYTES);
        (last.replace(number) != Some(number)).then_some((number, rank as u64))
    })
}

const _: () = assert!(
    (L2_ENTRIES * CLUSTER_BYTES).is_multiple_of(crate::limits::MAX_CHUNK_BYTES as u64),
    "no chunk is in two L2 tables"
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::Image;

    #[test]
    fn refcounts_count_themselves() {
        let image = Image { root: Default::default(), size_bytes: 1 << 50, chunk_bytes: 1 << 20 };
        for chunks in [0, 1, 2040, 2047, 2048, 2049, 100_000] {
            let mut map = ChunkMap::new(image);
            (0..chunks).for_each(|n| map.push(image.chunk_extent(n * 3)));
            let layout = Layout::new(image.size_bytes, 1 << 20, &map).unwrap();
            assert!(layout.refcount_blocks * REFCOUNT_ENTRIES >= layout.clusters, "{layout:?}");
            assert!(layout.refcount_table_clusters * CLUSTER_BYTES >= layout.refcount_blocks * 8, "{layout:?}");
        }
        let empty = ChunkMap::new(image);
        assert!(Layout::new(513, 1 << 20, &empty).is_err());
        assert!(Layout::new(1 << 56, 1 << 20, &empty).is_err());
        assert_eq!(Layout::new(0, 1 << 20, &empty).unwrap().header().len(), HEADER_BYTES as usize + 8);
    }
}
