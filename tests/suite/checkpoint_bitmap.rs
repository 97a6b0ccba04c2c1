//! The bitmap against a model that is a plain list of booleans.

#![allow(clippy::unwrap_used)]

use livebackup::checkpoint::Bitmap;
use livebackup::extent::Extent;
use livebackup::units::GRANULE_BYTES;
use proptest::prelude::*;

const SMALL: u64 = 512;

#[derive(Clone, Debug)]
enum Step {
    Set(u64, u64),
    Clear(u64, u64),
    RoundOut(u32),
    Union(Vec<(u64, u64)>),
}

/// One boolean a byte would be too many; one a sector of the granule tells partial granules apart.
struct Model {
    size: u64,
    granules: Vec<bool>,
}

impl Model {
    fn new(size: u64) -> Self {
        Self { size, granules: vec![false; size.div_ceil(SMALL) as usize] }
    }

    fn span(&self, index: usize) -> (u64, u64) {
        (index as u64 * SMALL, ((index as u64 + 1) * SMALL).min(self.size))
    }

    fn set(&mut self, offset: u64, len: u64) {
        for i in 0..self.granules.len() {
            let (start, end) = self.span(i);
            if len > 0 && start < offset + len && offset < end {
                self.granules[i] = true;
            }
        }
    }

    fn clear(&mut self, offset: u64, len: u64) {
        for i in 0..self.granules.len() {
            let (start, end) = self.span(i);
            if offset <= start && end <= offset + len {
                self.granules[i] = false;
            }
        }
    }

    fn round_out(&mut self, per_chunk: usize) {
        for chunk in self.granules.chunks_mut(per_chunk) {
            if chunk.contains(&true) {
                chunk.fill(true);
            }
        }
    }

    fn extents(&self) -> Vec<Extent> {
        let mut out: Vec<Extent> = Vec::new();
        for (i, _) in self.granules.iter().enumerate().filter(|(_, set)| **set) {
            let (start, end) = self.span(i);
            match out.last_mut() {
                Some(last) if last.end() == start => last.len_bytes = end - last.offset_bytes,
                _ => out.push(Extent::between(start, end)),
            }
        }
        out
    }
}

fn a_step(size: u64) -> impl Strategy<Value = Step> {
    let range = (0..size + 3 * SMALL, prop_oneof![0..3 * SMALL, 0..size + SMALL]);
    prop_oneof![
        4 => range.clone().prop_map(|(o, l)| Step::Set(o, l)),
        3 => range.clone().prop_map(|(o, l)| Step::Clear(o, l)),
        1 => (0u32..10).prop_map(Step::RoundOut),
        1 => prop::collection::vec(range, 0..4).prop_map(Step::Union),
    ]
}

fn a_history() -> impl Strategy<Value = (u64, Vec<Step>)> {
    let size = prop_oneof![
        Just(0),
        1..5 * SMALL,
        (0..400u64).prop_map(|granules| granules * SMALL),
        (0..400u64, 1..SMALL).prop_map(|(granules, odd)| granules * SMALL + odd),
    ];
    size.prop_flat_map(|size| (Just(size), prop::collection::vec(a_step(size), 0..12)))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(600) })]

    #[test]
    fn behaves_like_a_list_of_booleans((size, steps) in a_history()) {
        let mut bitmap = Bitmap::with_granule(size, SMALL);
        let mut model = Model::new(size);
        for step in steps {
            match step {
                Step::Set(offset, len) => {
                    bitmap.set(Extent::new(offset, len));
                    model.set(offset, len);
                }
                Step::Clear(offset, len) => {
                    bitmap.clear(Extent::new(offset, len));
                    model.clear(offset, len);
                }
                Step::RoundOut(power) => {
                    bitmap.round_out(SMALL << power);
                    model.round_out(1 << power);
                }
                Step::Union(ranges) => {
                    let mut other = Bitmap::with_granule(size, SMALL);
                    for (offset, len) in ranges {
                        other.set(Extent::new(offset, len));
                        model.set(offset, len);
                    }
                    bitmap.union_with(&other).unwrap();
                }
            }
            let expected = model.extents();
            prop_assert_eq!(bitmap.extents().collect::<Vec<_>>(), expected.clone());
            prop_assert_eq!(bitmap.count_bytes(), expected.iter().map(|e| e.len_bytes).sum::<u64>());
            prop_assert_eq!(bitmap.count_granules(), model.granules.iter().filter(|g| **g).count() as u64);
            prop_assert_eq!(bitmap.is_empty(), expected.is_empty());
            for (i, set) in model.granules.iter().enumerate() {
                let (start, end) = model.span(i);
                prop_assert_eq!(bitmap.is_set(start), *set);
                prop_assert_eq!(bitmap.is_set(end - 1), *set);
                prop_assert_eq!(bitmap.intersects(Extent::between(start, end)), *set);
                prop_assert!(!bitmap.intersects(Extent::new(start, 0)));
            }
            prop_assert!(!bitmap.is_set(size));
            prop_assert_eq!(bitmap.intersects(Extent::new(0, u64::MAX)), !expected.is_empty());
        }
    }
}

#[test]
fn a_full_bitmap_ends_with_the_disk() {
    let size = 3 * GRANULE_BYTES + 1;
    let full = Bitmap::full(size);
    assert_eq!(full.extents().collect::<Vec<_>>(), [Extent::new(0, size)]);
    assert_eq!((full.count_bytes(), full.count_granules()), (size, 4));
    assert_eq!(Bitmap::full(0).extents().count(), 0);
}

#[test]
fn ranges_from_outside_cannot_harm() {
    let mut bitmap = Bitmap::new(10 * GRANULE_BYTES);
    bitmap.set(Extent { offset_bytes: 9 * GRANULE_BYTES, len_bytes: u64::MAX });
    bitmap.set(Extent { offset_bytes: u64::MAX, len_bytes: u64::MAX });
    assert_eq!(bitmap.count_granules(), 1);
    bitmap.clear(Extent { offset_bytes: 1, len_bytes: u64::MAX });
    assert!(bitmap.is_empty());
    bitmap.clear(Extent { offset_bytes: u64::MAX, len_bytes: u64::MAX });
}

#[test]
fn bitmaps_of_two_sizes_are_not_joined() {
    let mut one = Bitmap::new(GRANULE_BYTES);
    assert!(one.union_with(&Bitmap::full(GRANULE_BYTES + 1)).is_err());
    assert!(one.union_with(&Bitmap::with_granule(GRANULE_BYTES, 512)).is_err());
    assert!(one.is_empty());
}
