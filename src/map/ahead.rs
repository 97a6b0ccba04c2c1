//! Read-ahead: who reads on where he was before will read on (pure).
//!
//! A few readers are told apart by where their last read ended. The more one has read without a jump, the more is read
//! ahead of him, up to [`MAX_AHEAD_BYTES`]; and only when half of that has been used up, so that it comes in large pieces.

use crate::extent::Extent;
use crate::units::MIB;

/// Readers that are told apart.
const READERS: usize = 8;
/// Most that is read ahead of one.
pub(super) const MAX_AHEAD_BYTES: u64 = 4 * MIB;

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// Where its last read ended.
    next: u64,
    /// Bytes that it has read in one go.
    run_bytes: u64,
    /// How far has been read for it.
    read_to: u64,
    used: u64,
}

/// The readers of one disk.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    streams: [Stream; READERS],
    clock: u64,
}

impl Ahead {
    /// Somebody reads `extent` (not empty) of a disk of this size: what to read ahead, if anything.
    pub fn read(&mut self, extent: Extent, size_bytes: u64) -> Option<Extent> {
        self.clock += 1;
        let known = self.streams.iter().position(|s| s.used > 0 && s.next == extent.offset_bytes);
        let Some(number) = known else {
            let stream = Stream { next: extent.end(), run_bytes: 0, read_to: extent.end(), used: self.clock };
            if let Some(oldest) = self.streams.iter_mut().min_by_key(|s| s.used) {
                *oldest = stream;
            }
            return None;
        };
        let stream = &mut self.streams[number];
        stream.used = self.clock;
        stream.next = extent.end();
        stream.run_bytes = stream.run_bytes.saturating_add(extent.len_bytes);
        let window = stream.run_bytes.min(MAX_AHEAD_BYTES);
        let from = stream.read_to.max(extent.end());
        let to = extent.end().saturating_add(window).min(size_bytes);
        if from - extent.end() > window / 2 || to <= from {
            return None;
        }
        stream.read_to = to;
        Some(Extent::between(from, to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 1024;

    #[test]
    fn a_sequential_reader_is_read_ahead_of_and_others_are_not() {
        let mut ahead = Ahead::default();
        let size = 1 << 40;
        let mut at = 10 * MIB;
        let mut read_to = at;
        let mut pieces = vec![];
        for _ in 0..200 {
            let read = Extent::new(at, 64 * K);
            // Others jump about.
            assert_eq!(ahead.read(Extent::new((at * 7919) % size, 512), size), None);
            if let Some(piece) = ahead.read(read, size) {
                assert!(piece.offset_bytes >= read_to.max(read.end()) && piece.end() <= read.end() + MAX_AHEAD_BYTES);
                read_to = piece.end();
                pieces.push(piece);
            }
            at = read.end();
        }
        assert!(read_to >= at + MAX_AHEAD_BYTES / 2, "always well ahead in the end");
        assert!((8..20).contains(&pieces.len()), "in large pieces: {}", pieces.len());
        assert!(pieces[1..].windows(2).all(|w| w[0].end() == w[1].offset_bytes), "and each once");
    }

    #[test]
    fn nothing_is_read_past_the_end() {
        let mut ahead = Ahead::default();
        let size = MIB + 512;
        let mut last = 0;
        for at in (0..size).step_by(64 << 10) {
            let read = Extent::between(at, (at + 64 * K).min(size));
            last = ahead.read(read, size).map_or(last, |piece| piece.end());
        }
        assert_eq!(last, size);
        assert_eq!(ahead.read(Extent::new(size - 512, 512), size), None);
    }
}
