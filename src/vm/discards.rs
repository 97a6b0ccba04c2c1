//! Discards: what of a fleece is given up, from what a client acknowledges. Pure.
//!
//! ```text
//!  acknowledged:   ▓▓░░▓▓▓▓░▓▓      ░ not needed: never copied, never read
//!  open:           ▓▓▓▓▓▓▓▓▓▓▓ ──at 16 MiB──► ready ──► discarded, one at a time
//! ```
//!
//! Each discard is a request to QEMU and a hole in the scratch, and what an incremental needs is scattered. So extents
//! are joined where nothing that is needed lies between them, as far as one discard reaches, and given up when they come to its
//! end: there are never more discards than without joining, however far apart the extents are. What stays open for lack of
//! neighbours is closed by whoever sees that nothing more comes.

use std::collections::VecDeque;

use crate::checkpoint::Bitmap;
use crate::extent::Extent;
use crate::limits::MAX_DISCARD_BYTES;

/// What may be discarded, of all disks of a session.
pub struct Discards<'a> {
    /// What the session reads, of each disk.
    needed: Vec<&'a Bitmap>,
    acknowledged: Vec<Bitmap>,
    /// Still growing: its disk, and what it has come to.
    open: Option<(usize, Extent)>,
    ready: VecDeque<(usize, Extent)>,
}

impl<'a> Discards<'a> {
    /// Nothing yet.
    pub fn new(needed: Vec<&'a Bitmap>) -> Self {
        let acknowledged = needed.iter().map(|disk| Bitmap::new(disk.size_bytes())).collect();
        Self { needed, acknowledged, open: None, ready: VecDeque::new() }
    }

    /// What was acknowledged so far, of each disk.
    pub fn acknowledged(&self) -> &[Bitmap] {
        &self.acknowledged
    }

    /// Takes an acknowledgement. What is none of the disk, or was acknowledged before, is nothing.
    pub fn acknowledge(&mut self, disk: usize, extents: &[Extent]) {
        for extent in extents {
            let Some(done) = self.acknowledged.get_mut(disk) else { return };
            if extent.len_bytes > 0 && extent.fits(done.size_bytes()) && !done.intersects(*extent) {
                done.set(*extent);
                self.join(disk, *extent);
            }
        }
    }

    fn join(&mut self, disk: usize, extent: Extent) {
        let window = |extent: &Extent| extent.offset_bytes / MAX_DISCARD_BYTES;
        let joined = self.open.filter(|(of, open)| {
            *of == disk && open.end() <= extent.offset_bytes && window(open) == window(&extent) && {
                let gap = Extent::between(open.end(), extent.offset_bytes);
                gap.len_bytes == 0 || !self.needed[disk].intersects(gap)
            }
        });
        let start = match joined {
            Some((_, open)) => open.offset_bytes,
            None => {
                self.close();
                extent.offset_bytes
            }
        };
        let whole = extent.end() / MAX_DISCARD_BYTES * MAX_DISCARD_BYTES;
        if start < whole {
            self.ready.push_back((disk, Extent::between(start, whole)));
        }
        let rest = Extent::between(start.max(whole), extent.end());
        self.open = (rest.len_bytes > 0).then_some((disk, rest));
    }

    /// Whether something waits for neighbours.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Waits for no neighbours any more.
    pub fn close(&mut self) {
        self.ready.extend(self.open.take());
    }

    /// Whether [`Discards::next`] gives something.
    pub fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// What is to be discarded next: its disk, and no more than one discard takes.
    pub fn next(&mut self) -> Option<(usize, Extent)> {
        let (disk, extent) = self.ready.front_mut()?;
        let (disk, first) = (*disk, extent.split_at_multiples(MAX_DISCARD_BYTES).next()?);
        match extent.end() {
            end if first.end() < end => *extent = Extent::between(first.end(), end),
            _ => drop(self.ready.pop_front()),
        }
        Some((disk, first))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::{GRANULE_BYTES, MIB};

    fn all(discards: &mut Discards<'_>) -> Vec<(usize, Extent)> {
        std::iter::from_fn(|| discards.next()).collect()
    }

    #[test]
    fn scattered_extents_become_few_discards() {
        let mut needed = Bitmap::new(64 * MIB);
        let scattered: Vec<_> = (0..140).map(|i| Extent::new(i * 7 * GRANULE_BYTES, 3 * GRANULE_BYTES)).collect();
        scattered.iter().for_each(|extent| needed.set(*extent));
        let mut discards = Discards::new(vec![&needed]);
        scattered.iter().for_each(|extent| discards.acknowledge(0, &[*extent]));
        discards.close();
        // One for each 16 MiB, from the first to the last extent there.
        let windows = all(&mut discards);
        assert_eq!(windows.len(), 4);
        for (n, (disk, piece)) in windows.into_iter().enumerate() {
            let whole = Extent::new(n as u64 * MAX_DISCARD_BYTES, MAX_DISCARD_BYTES);
            assert!(disk == 0 && piece.shared(whole) == Some(piece) && piece.len_bytes > 12 * MIB, "{n}: {piece}");
        }
    }

    #[test]
    fn nothing_is_discarded_between_what_lies_far_apart() {
        let far = [Extent::new(0, GRANULE_BYTES), Extent::new(1 << 40, 2 * GRANULE_BYTES)];
        let mut needed = Bitmap::new((1 << 40) + MIB);
        far.iter().for_each(|extent| needed.set(*extent));
        let mut discards = Discards::new(vec![&needed]);
        discards.acknowledge(0, &far);
        discards.close();
        assert_eq!(all(&mut discards), far.map(|extent| (0, extent)));
    }

    proptest! {
        #[test]
        fn all_that_was_acknowledged_and_nothing_that_is_still_needed(
            needed in prop::collection::vec((0usize..2, 0u64..2048, 1u64..40), 1..40),
            acked in prop::collection::vec((0usize..3, 0u64..2100, 1u64..60, any::<bool>()), 1..60),
            in_order in any::<bool>(),
        ) {
            // The last granule is a cut one.
            let size = 2048 * GRANULE_BYTES - 512;
            let extent = |at: u64, len: u64| Extent::new(at * GRANULE_BYTES, len * GRANULE_BYTES);
            let cut = |extent: Extent| extent.shared(Extent::new(0, size));
            let mut maps = [Bitmap::new(size), Bitmap::new(size)];
            needed.iter().for_each(|(disk, at, len)| cut(extent(*at, *len)).into_iter().for_each(|e| maps[*disk].set(e)));
            let mut discards = Discards::new(maps.iter().collect());
            let mut acked = acked;
            if in_order {
                acked.sort();
            }
            let mut given = [Bitmap::new(size), Bitmap::new(size)];
            for (disk, at, len, closes) in acked {
                discards.acknowledge(disk, &[extent(at, len)]);
                if closes {
                    discards.close();
                }
                for (disk, piece) in all(&mut discards) {
                    prop_assert!(piece.len_bytes > 0 && piece.split_at_multiples(MAX_DISCARD_BYTES).count() == 1);
                    given[disk].set(piece);
                }
            }
            discards.close();
            all(&mut discards).into_iter().for_each(|(disk, piece)| given[disk].set(piece));
            for (disk, needed) in maps.iter().enumerate() {
                let acknowledged = &discards.acknowledged()[disk];
                for granule in Extent::new(0, size).split_at_multiples(GRANULE_BYTES) {
                    let at = granule.offset_bytes;
                    let may = acknowledged.is_set(at) || !needed.is_set(at);
                    prop_assert!(!given[disk].is_set(at) || may, "{at} is needed and was given up");
                    prop_assert!(given[disk].is_set(at) || !acknowledged.is_set(at), "{at} was acknowledged and is kept");
                }
            }
        }
    }
}
