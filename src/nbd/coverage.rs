//! Which bytes of one read have arrived (pure).

use super::layout::Malformed;

/// Most separate pieces while a read is under way: servers send them in order or nearly so.
const MAX_PIECES: usize = 1024;

/// Set of byte ranges within `[0, len)`. Grows only by ranges that it does not have yet.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    /// Sorted, apart, merged: `(start, end)`.
    pieces: Vec<(u32, u32)>,
}

impl Coverage {
    /// Adds `[start, end)`, `start < end`; refuses what is there already, in part or whole (proto.md,
    /// "Structured reply types": the chunks of a read must not overlap).
    pub(super) fn add(&mut self, start: u32, end: u32) -> Result<(), Malformed> {
        let at = self.pieces.partition_point(|(_, e)| *e < start);
        // From here on pieces end at or after `start`.
        if self.pieces[at..].iter().take(2).any(|(s, e)| *s < end && start < *e) {
            return Err(Malformed("two chunks of a read overlap"));
        }
        let touches_left = self.pieces.get(at).is_some_and(|(_, e)| *e == start);
        let right = at + usize::from(touches_left);
        let touches_right = self.pieces.get(right).is_some_and(|(s, _)| *s == end);
        match (touches_left, touches_right) {
            (true, true) => {
                self.pieces[at].1 = self.pieces[right].1;
                self.pieces.remove(right);
            }
            (true, false) => self.pieces[at].1 = end,
            (false, true) => self.pieces[right].0 = start,
            (false, false) if self.pieces.len() >= MAX_PIECES => {
                return Err(Malformed("a read in too many pieces"));
            }
            (false, false) => self.pieces.insert(at, (start, end)),
        }
        Ok(())
    }

    /// Whether all of `[0, len)` is there.
    pub(super) fn is_whole(&self, len: u32) -> bool {
        self.pieces == [(0, len)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_a_plain_array(ranges in proptest::collection::vec((0u32..64, 1u32..16), 0..40)) {
            let mut plain = [false; 80];
            let mut coverage = Coverage::default();
            for (start, len) in ranges {
                let range = start as usize..(start + len) as usize;
                let free = plain[range.clone()].iter().all(|b| !b);
                prop_assert_eq!(coverage.add(start, start + len).is_ok(), free);
                if free {
                    plain[range].fill(true);
                }
                for len in 1..=80u32 {
                    let whole = plain[..len as usize].iter().all(|b| *b) && plain[len as usize..].iter().all(|b| !b);
                    prop_assert_eq!(coverage.is_whole(len), whole);
                }
            }
        }
    }

    #[test]
    fn pieces_are_bounded() {
        let mut coverage = Coverage::default();
        let refused = (0..4096).map(|i| coverage.add(2 * i, 2 * i + 1)).filter(Result::is_err).count();
        assert_eq!(refused, 4096 - MAX_PIECES);
    }
}
