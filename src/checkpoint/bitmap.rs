//! A dirty bitmap: one bit a granule of a disk.
//!
//! A set bit says "written, or may have been": supersets are always allowed, so that [`Bitmap::set`] touches every
//! granule that a range meets and [`Bitmap::clear`] only those that lie wholly inside it. Everything goes by words of
//! 64 granules: a disk of 1 TiB is 2 MiB of words, and each operation over all of them takes a millisecond or so.
//!
//! Invariant: bits past the disk's last granule are zero. Operations by words rely on it.

use bitvec::order::Lsb0;
use bitvec::vec::BitVec;

use crate::extent::Extent;
use crate::limits::MAX_DISK_BYTES;
use crate::units::GRANULE_BYTES;

const WORD_BITS: u64 = u64::BITS as u64;

/// Granules of a disk that were written.
#[derive(Clone, PartialEq, Eq)]
pub struct Bitmap {
    size_bytes: u64,
    granule_bytes: u64,
    bits: BitVec<u64, Lsb0>,
}

/// Two bitmaps that do not describe the same disk, or the same disk at two sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a bitmap of {theirs_bytes} bytes in granules of {their_granule_bytes} cannot be joined with one of {ours_bytes} \
     bytes in granules of {our_granule_bytes}: the disk was resized, or they are of different disks"
)]
pub struct SizeMismatch {
    /// Size of the bitmap that was to change.
    pub ours_bytes: u64,
    /// Its granule.
    pub our_granule_bytes: u64,
    /// Size of the other one.
    pub theirs_bytes: u64,
    /// Its granule.
    pub their_granule_bytes: u64,
}

impl Bitmap {
    /// An empty bitmap for a disk of `size_bytes` (at most [`MAX_DISK_BYTES`]) in granules of [`GRANULE_BYTES`].
    pub fn new(size_bytes: u64) -> Self {
        Self::with_granule(size_bytes, GRANULE_BYTES)
    }

    /// An empty bitmap with granules of `granule_bytes`, a power of two.
    ///
    /// # Panics
    /// When the granule is no power of two or the disk is larger than [`MAX_DISK_BYTES`]: sizes from outside are
    /// checked where they come in.
    pub fn with_granule(size_bytes: u64, granule_bytes: u64) -> Self {
        assert!(granule_bytes.is_power_of_two() && size_bytes <= MAX_DISK_BYTES);
        let count = size_bytes.div_ceil(granule_bytes) as usize;
        Self { size_bytes, granule_bytes, bits: BitVec::repeat(false, count) }
    }

    /// A bitmap in which every granule is set.
    pub fn full(size_bytes: u64) -> Self {
        let mut all = Self::new(size_bytes);
        all.set(Extent::new(0, size_bytes));
        all
    }

    /// The words, least significant bit first.
    pub(crate) fn words(&self) -> &[u64] {
        self.bits.as_raw_slice()
    }

    /// How many granules the disk has.
    pub(super) fn granules(&self) -> u64 {
        self.bits.len() as u64
    }

    /// Sets the granules `first..past`, which the disk has.
    #[inline]
    pub(super) fn set_granules(&mut self, first: u64, past: u64) {
        debug_assert!(past <= self.granules());
        let words = self.words_mut();
        if past - first == 1 {
            words[(first / WORD_BITS) as usize] |= 1 << (first % WORD_BITS);
        } else {
            for_words(first, past, |index, mask| words[index] |= mask);
        }
    }

    /// Sets what is set in these words of a bitmap of the same size; `None` when their number is not what the size asks
    /// for or a bit past the last granule is set, and then some bits may be set.
    pub(crate) fn union_words(&mut self, theirs: &[u8]) -> Option<()> {
        let (theirs, rest) = theirs.as_chunks::<8>();
        let tail = tail_mask(self.granules());
        let words = self.words_mut();
        if theirs.len() != words.len() || !rest.is_empty() {
            return None;
        }
        if theirs.last().is_some_and(|last| u64::from_le_bytes(*last) & !tail != 0) {
            return None;
        }
        words.iter_mut().zip(theirs).for_each(|(ours, theirs)| *ours |= u64::from_le_bytes(*theirs));
        Some(())
    }

    #[inline]
    fn words_mut(&mut self) -> &mut [u64] {
        self.bits.as_raw_mut_slice()
    }

    /// Size of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes that a bit stands for.
    pub fn granule_bytes(&self) -> u64 {
        self.granule_bytes
    }

    /// Sets every granule that the range touches. What lies past the disk's end is ignored.
    pub fn set(&mut self, extent: Extent) {
        let end = extent.end().min(self.size_bytes);
        if extent.offset_bytes >= end {
            return;
        }
        let (first, past) = (extent.offset_bytes / self.granule_bytes, end.div_ceil(self.granule_bytes));
        for_words(first, past, |index, mask| self.bits.as_raw_mut_slice()[index] |= mask);
    }

    /// Clears the granules that lie wholly inside the range. A last partial granule counts as inside when the range
    /// reaches the disk's end.
    pub fn clear(&mut self, extent: Extent) {
        let first = extent.offset_bytes.div_ceil(self.granule_bytes);
        let past = if extent.end() >= self.size_bytes {
            self.size_bytes.div_ceil(self.granule_bytes)
        } else {
            extent.end() / self.granule_bytes
        };
        for_words(first, past, |index, mask| self.bits.as_raw_mut_slice()[index] &= !mask);
    }

    /// Whether the granule of this byte is set; never past the disk's end.
    pub fn is_set(&self, offset_bytes: u64) -> bool {
        offset_bytes < self.size_bytes && self.bits[(offset_bytes / self.granule_bytes) as usize]
    }

    /// Whether any granule that the range touches is set.
    pub fn intersects(&self, extent: Extent) -> bool {
        let end = extent.end().min(self.size_bytes);
        if extent.offset_bytes >= end {
            return false;
        }
        let mut any = false;
        let (first, past) = (extent.offset_bytes / self.granule_bytes, end.div_ceil(self.granule_bytes));
        for_words(first, past, |index, mask| any |= self.words()[index] & mask != 0);
        any
    }

    /// Whether no granule is set.
    pub fn is_empty(&self) -> bool {
        self.words().iter().all(|w| *w == 0)
    }

    /// Sets every granule that is set in `other`.
    ///
    /// # Errors
    /// When the two are not of one size and granule; nothing is changed then.
    pub fn union_with(&mut self, other: &Bitmap) -> Result<(), SizeMismatch> {
        if (self.size_bytes, self.granule_bytes) != (other.size_bytes, other.granule_bytes) {
            return Err(SizeMismatch {
                ours_bytes: self.size_bytes,
                our_granule_bytes: self.granule_bytes,
                theirs_bytes: other.size_bytes,
                their_granule_bytes: other.granule_bytes,
            });
        }
        for (ours, theirs) in self.words_mut().iter_mut().zip(other.words()) {
            *ours |= theirs;
        }
        Ok(())
    }

    /// Sets the whole chunk around every set granule; chunks start at multiples of `chunk_bytes`.
    ///
    /// # Panics
    /// When `chunk_bytes` is no power-of-two multiple of the granule.
    pub fn round_out(&mut self, chunk_bytes: u64) {
        assert!(chunk_bytes.is_power_of_two() && chunk_bytes >= self.granule_bytes);
        let per_chunk = chunk_bytes / self.granule_bytes;
        let count = self.bits.len() as u64;
        let words = self.words_mut();
        if per_chunk < WORD_BITS {
            // Fold each group into its lowest bit, then spread that over the group.
            let group = (1u64 << per_chunk) - 1;
            let lowest = u64::MAX / group;
            for word in words.iter_mut().filter(|w| **w != 0) {
                let mut folded = *word;
                let mut shift = per_chunk / 2;
                while shift > 0 {
                    folded |= folded >> shift;
                    shift /= 2;
                }
                *word = (folded & lowest) * group;
            }
        } else {
            let words_per_chunk = usize::try_from(per_chunk / WORD_BITS).unwrap_or(usize::MAX);
            for chunk in words.chunks_mut(words_per_chunk) {
                if chunk.iter().any(|w| *w != 0) {
                    chunk.fill(u64::MAX);
                }
            }
        }
        if let Some(last) = words.last_mut() {
            *last &= tail_mask(count);
        }
    }

    /// The maximal runs of set granules in bytes, ascending; the last one ends at the disk's size at most.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        let at = |granule: u64| (granule * self.granule_bytes).min(self.size_bytes);
        self.runs().map(move |(first, past)| Extent::between(at(first), at(past)))
    }

    /// The maximal runs of set granules, ascending: each the first and the one past the last.
    pub(super) fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let words = self.words();
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = next_bit(words, at, 0)?;
            // Where no clear bit follows, the run goes to the end; the tail's zeroes may not even exist.
            let past = next_bit(words, first, u64::MAX).unwrap_or(self.granules());
            at = past;
            Some((first, past))
        })
    }

    /// How many granules are set.
    pub fn count_granules(&self) -> u64 {
        self.words().iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// How many bytes of the disk are set: a last partial granule counts with what the disk has of it.
    pub fn count_bytes(&self) -> u64 {
        let whole = self.count_granules() * self.granule_bytes;
        let partial = self.size_bytes % self.granule_bytes;
        if partial != 0 && self.bits.last().is_some_and(|b| *b) { whole - self.granule_bytes + partial } else { whole }
    }
}

impl std::fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bitmap({} of {} granules of a disk of {} bytes:", self.count_granules(), self.bits.len(), {
            self.size_bytes
        })?;
        for extent in self.extents().take(8) {
            write!(f, " {}..{}", extent.offset_bytes, extent.end())?;
        }
        write!(f, "{})", if self.extents().nth(8).is_some() { " …" } else { "" })
    }
}

/// The bits of the last word that stand for one of `count` granules.
fn tail_mask(count: u64) -> u64 {
    match count % WORD_BITS {
        0 => u64::MAX,
        used => (1 << used) - 1,
    }
}

/// Calls `apply(word index, mask)` for every word that holds bits of `first..past`.
fn for_words(first: u64, past: u64, mut apply: impl FnMut(usize, u64)) {
    if first >= past {
        return;
    }
    let (first_word, last_word) = (first / WORD_BITS, (past - 1) / WORD_BITS);
    for index in first_word..=last_word {
        let low = if index == first_word { u64::MAX << (first % WORD_BITS) } else { u64::MAX };
        let high = if index == last_word { tail_mask(past) } else { u64::MAX };
        apply(index as usize, low & high);
    }
}

/// The first bit at or after `from` that is set in `word ^ flip`: `flip` 0 looks for ones, all ones for zeroes.
fn next_bit(words: &[u64], from: u64, flip: u64) -> Option<u64> {
    let start = (from / WORD_BITS) as usize;
    let first = (words.get(start)? ^ flip) & (u64::MAX << (from % WORD_BITS));
    if first != 0 {
        return Some(start as u64 * WORD_BITS + u64::from(first.trailing_zeros()));
    }
    let rest = &words[start + 1..];
    let skipped = rest.iter().position(|w| w ^ flip != 0)?;
    let index = start + 1 + skipped;
    Some(index as u64 * WORD_BITS + u64::from((words[index] ^ flip).trailing_zeros()))
}
