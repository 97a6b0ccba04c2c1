//! Which chunks of a disk hold data, in little memory: known before the first byte is written, it gives the space that is
//! needed, the gaps that have to be zeroed, and the place of every chunk in a packed file.

use crate::extent::Extent;
use crate::repo::Image;
use crate::repo::tree::FANOUT;

const WORDS: usize = FANOUT / 64;

/// The chunks below one leaf of the tree.
#[derive(Clone, Debug)]
struct Leaf {
    /// Number of the leaf.
    number: u64,
    /// Chunks with data before it.
    before: u64,
    bits: [u64; WORDS],
}

/// The chunks of an image that are not zero. 48 bytes for each leaf of the tree that has any: 1.5 MiB for a full disk of
/// 1 TiB in chunks of 128 KiB.
#[derive(Clone, Debug)]
pub(super) struct ChunkMap {
    image: Image,
    leaves: Vec<Leaf>,
    chunks: u64,
    data_bytes: u64,
}

impl ChunkMap {
    pub fn new(image: Image) -> Self {
        Self { image, leaves: Vec::new(), chunks: 0, data_bytes: 0 }
    }

    /// Adds a chunk. They come in the order of the disk.
    pub fn push(&mut self, chunk: Extent) {
        let number = chunk.offset_bytes / u64::from(self.image.chunk_bytes);
        let (leaf, bit) = (number / FANOUT as u64, number as usize % FANOUT);
        if self.leaves.last().is_none_or(|last| last.number != leaf) {
            self.leaves.push(Leaf { number: leaf, before: self.chunks, bits: [0; WORDS] });
        }
        if let Some(last) = self.leaves.last_mut() {
            last.bits[bit / 64] |= 1 << (bit % 64);
        }
        self.chunks += 1;
        self.data_bytes += chunk.len_bytes;
    }

    /// Number of chunks with data.
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// Bytes of the chunks with data.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// How many chunks with data come before the one at this offset, which has data itself.
    pub fn rank(&self, offset_bytes: u64) -> Option<u64> {
        let number = offset_bytes / u64::from(self.image.chunk_bytes);
        let at = self.leaves.binary_search_by_key(&(number / FANOUT as u64), |leaf| leaf.number).ok()?;
        let (leaf, bit) = (&self.leaves[at], number as usize % FANOUT);
        let below = (1u64 << (bit % 64)) - 1;
        let word = leaf.bits[bit / 64];
        if word & (below + 1) == 0 {
            return None;
        }
        let whole: u32 = leaf.bits[..bit / 64].iter().map(|word| word.count_ones()).sum();
        Some(leaf.before + u64::from(whole + (word & below).count_ones()))
    }

    /// The chunks with data, in order.
    pub fn iter(&self) -> impl Iterator<Item = Extent> {
        self.iter_from(0)
    }

    /// The chunks with data, in order, from the leaf on that has this offset (a leaf maps 16 MiB at least; offsets are
    /// those of a leaf's beginning).
    pub fn iter_from(&self, offset_bytes: u64) -> impl Iterator<Item = Extent> {
        let leaf = offset_bytes / u64::from(self.image.chunk_bytes) / FANOUT as u64;
        let first = self.leaves.partition_point(|found| found.number < leaf);
        self.leaves[first..].iter().flat_map(move |leaf| {
            (0..FANOUT)
                .filter(|bit| leaf.bits[bit / 64] >> (bit % 64) & 1 == 1)
                .map(move |bit| self.image.chunk_extent(leaf.number * FANOUT as u64 + bit as u64))
        })
    }

    /// The ranges without data, in order, up to the disk's end.
    pub fn gaps(&self) -> impl Iterator<Item = Extent> {
        let end = Extent::new(self.image.size_bytes, 0);
        let mut from = 0;
        self.iter().chain([end]).filter_map(move |chunk| {
            let gap = Extent::between(from, chunk.offset_bytes);
            from = chunk.end();
            (gap.len_bytes > 0).then_some(gap)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn as_a_plain_list(numbers in proptest::collection::btree_set(0u64..2000, 0..300), tail in 1u64..65536) {
            let image = Image { root: Default::default(), size_bytes: 1999 * 65536 + tail, chunk_bytes: 65536 };
            let mut map = ChunkMap::new(image);
            let list: Vec<_> = numbers.iter().map(|n| image.chunk_extent(*n)).collect();
            list.iter().for_each(|chunk| map.push(*chunk));
            prop_assert_eq!(map.iter().collect::<Vec<_>>(), list.clone());
            prop_assert_eq!(map.data_bytes(), list.iter().map(|c| c.len_bytes).sum::<u64>());
            for number in 0..2000 {
                let expected = numbers.contains(&number).then(|| numbers.range(..number).count() as u64);
                prop_assert_eq!(map.rank(number * 65536 + tail % 65536), expected);
            }
            let mut all: Vec<_> = map.gaps().chain(list).collect();
            all.sort();
            prop_assert_eq!(all[0].offset_bytes, 0);
            prop_assert!(all.windows(2).all(|pair| pair[0].end() == pair[1].offset_bytes));
            prop_assert_eq!(all[all.len() - 1].end(), image.size_bytes);
        }
    }
}
