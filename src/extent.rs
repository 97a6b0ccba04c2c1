//! Byte ranges of a disk.

use serde::{Deserialize, Serialize};

/// A non-empty or empty byte range `[offset_bytes, offset_bytes + len_bytes)`; its end never overflows a `u64`
/// when built by [`Extent::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// Where it starts.
    pub offset_bytes: u64,
    /// How long it is.
    pub len_bytes: u64,
}

impl Extent {
    /// The range, or `None` when its end would overflow.
    pub fn checked(offset_bytes: u64, len_bytes: u64) -> Option<Self> {
        offset_bytes.checked_add(len_bytes)?;
        Some(Self { offset_bytes, len_bytes })
    }

    /// The range; for numbers that are known not to overflow.
    pub fn new(offset_bytes: u64, len_bytes: u64) -> Self {
        debug_assert!(offset_bytes.checked_add(len_bytes).is_some());
        Self { offset_bytes, len_bytes }
    }

    /// The range between two offsets (`start <= end`).
    pub fn between(start: u64, end: u64) -> Self {
        debug_assert!(start <= end);
        Self { offset_bytes: start, len_bytes: end - start }
    }

    /// The first offset past the range. Saturates for ranges from a peer that were not checked.
    pub fn end(&self) -> u64 {
        self.offset_bytes.saturating_add(self.len_bytes)
    }

    /// Whether the range lies within `[0, size_bytes)`.
    pub fn fits(&self, size_bytes: u64) -> bool {
        self.offset_bytes.checked_add(self.len_bytes).is_some_and(|end| end <= size_bytes)
    }

    /// What two ranges have in common, if anything.
    pub fn shared(self, other: Self) -> Option<Self> {
        let (start, end) = (self.offset_bytes.max(other.offset_bytes), self.end().min(other.end()));
        (start < end).then(|| Self::between(start, end))
    }

    /// The whole chunks of a disk that lie inside this range; the last chunk of the disk may be a short one. `None` where
    /// there is none.
    pub fn whole_chunks(self, chunk_bytes: u64, size_bytes: u64) -> Option<Self> {
        let start = self.offset_bytes.checked_next_multiple_of(chunk_bytes)?;
        let end = self.end().min(size_bytes);
        let end = if end == size_bytes { end } else { end / chunk_bytes * chunk_bytes };
        (start < end).then(|| Self::between(start, end))
    }

    /// The pieces of this range that do not cross a multiple of `boundary_bytes` (> 0), in order.
    pub fn split_at_multiples(self, boundary_bytes: u64) -> impl Iterator<Item = Extent> {
        let end = self.end();
        let mut at = self.offset_bytes;
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let next = (at / boundary_bytes).saturating_add(1).saturating_mul(boundary_bytes).min(end);
                let piece = Extent::between(at, next);
                at = next;
                piece
            })
        })
    }
}

impl std::fmt::Display for Extent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "bytes {}..{}", self.offset_bytes, self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_and_never_cross() {
        for (offset, len, boundary) in [(0, 0, 4), (1, 10, 4), (4, 4, 4), (3, 1, 4), (7, 100, 64), (u64::MAX - 9, 9, 4)]
        {
            let whole = Extent::new(offset, len);
            let mut at = offset;
            for piece in whole.split_at_multiples(boundary) {
                assert_eq!(piece.offset_bytes, at);
                assert!(piece.len_bytes > 0);
                assert_eq!(piece.offset_bytes / boundary, (piece.end() - 1) / boundary);
                at = piece.end();
            }
            assert_eq!(at, whole.end());
        }
    }

    #[test]
    fn what_is_inside_and_what_is_shared() {
        let between = Extent::between;
        assert_eq!(between(0, 8).shared(between(4, 12)), Some(between(4, 8)));
        assert_eq!(between(0, 8).shared(between(8, 12)), None);
        for (from, to, size, chunks) in [
            (0, 8, 100, Some((0, 8))),
            (1, 16, 100, Some((4, 16))),
            (3, 7, 100, None),
            (5, 99, 99, Some((8, 99))),
            (5, 98, 99, Some((8, 96))),
            (98, u64::MAX, 99, None),
            (96, u64::MAX, 99, Some((96, 99))),
        ] {
            assert_eq!(between(from, to).whole_chunks(4, size), chunks.map(|(a, b)| between(a, b)), "{from}..{to}");
        }
    }

    #[test]
    fn bounds_are_checked() {
        assert!(Extent::checked(u64::MAX, 1).is_none());
        assert!(!Extent { offset_bytes: u64::MAX, len_bytes: 2 }.fits(u64::MAX));
        assert!(Extent::new(8, 8).fits(16));
        assert!(!Extent::new(8, 9).fits(16));
    }
}
