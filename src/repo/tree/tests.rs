use std::cell::Cell;
use std::collections::HashMap;

use proptest::prelude::*;

use super::build::{NodeStore, TreeBuilder};
use super::diff::diff;
use super::walk::{walk, walk_range};
use super::*;
use crate::units::{GIB, KIB, MIB};

#[derive(Default)]
struct Memory {
    nodes: HashMap<Digest, Vec<u8>>,
    reads: Cell<usize>,
}

impl NodeSource for Memory {
    fn node(&self, digest: &Digest) -> Result<Node, RepoError> {
        self.reads.set(self.reads.get() + 1);
        let bytes = self.nodes.get(digest).ok_or(RepoError::Missing { digest: *digest })?;
        Ok(Node::decode(bytes).unwrap())
    }
}

impl NodeStore for Memory {
    fn store(&mut self, digest: Digest, node: Vec<u8>) -> Result<(), RepoError> {
        assert!(!digest.is_zero());
        assert_eq!(Digest::of(&node), digest);
        self.nodes.insert(digest, node);
        Ok(())
    }
}

fn chunk(value: u64) -> Digest {
    if value == 0 { Digest::ZERO } else { Digest::of(&value.to_le_bytes()) }
}

/// The model: one number a chunk.
fn check(memory: &Memory, image: Image, model: &[u64]) {
    let expected: Vec<_> =
        (0u64..).zip(model).filter(|(_, v)| **v != 0).map(|(i, v)| (image.chunk_extent(i), chunk(*v))).collect();
    let found: Vec<_> = walk(memory, image).map(|c| c.unwrap()).map(|c| (c.extent, c.digest)).collect();
    assert_eq!(found, expected);
    assert_eq!(image.root.is_zero(), expected.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn versions_read_as_a_plain_array_does(
        size in prop_oneof![0u64..2 * MIB, 15 * MIB..80 * MIB, Just(16 * MIB), Just(16 * MIB + 1), Just(16 * MIB - 1)],
        versions in prop::collection::vec(prop::collection::vec((0u64..1300, 1u64..400, 0u64..4), 0..12), 1..5),
        range in (0u64..90 * MIB, 0u64..40 * MIB),
    ) {
        let mut memory = Memory::default();
        let mut image = Image::zero(size, 64 * KIB as u32).unwrap();
        let chunks = image.chunks();
        let mut model = vec![0; chunks as usize];
        for mut writes in versions {
            let (old_image, old_model) = (image, model.clone());
            writes.sort();
            let mut builder = TreeBuilder::new(image);
            let mut at = 0;
            for (from, len, value) in writes {
                let (from, to) = (from.max(at).min(chunks), (from.max(at) + len).min(chunks));
                at = to;
                if value == 0 {
                    builder.zero(&mut memory, from, to).unwrap();
                } else {
                    let digests: Vec<_> = (from..to).map(|i| chunk(value + i % 2)).collect();
                    builder.set(&mut memory, from, &digests).unwrap();
                }
                (from..to).for_each(|i| model[i as usize] = if value == 0 { 0 } else { value + i % 2 });
            }
            image = builder.finish(&mut memory).unwrap();
            check(&memory, image, &model);
            check(&memory, old_image, &old_model);
            let mut changed = vec![false; model.len()];
            for extent in diff(&memory, old_image, image).unwrap() {
                prop_assert!(extent.len_bytes > 0 && extent.fits(size));
                for i in extent.offset_bytes / (64 * KIB)..extent.end().div_ceil(64 * KIB) {
                    changed[i as usize] = true;
                }
            }
            let differs: Vec<_> = model.iter().zip(&old_model).map(|(new, old)| new != old).collect();
            prop_assert_eq!(changed, differs);
        }
        let extent = Extent::new(range.0, range.1);
        let touched = walk_range(&memory, image, extent).map(|c| c.unwrap());
        let all = walk(&memory, image).map(|c| c.unwrap());
        let expected: Vec<_> = all
            .filter(|c| c.extent.offset_bytes < extent.end().next_multiple_of(64 * KIB)
                && c.extent.offset_bytes >= extent.offset_bytes / (64 * KIB) * (64 * KIB))
            .collect();
        prop_assert_eq!(touched.collect::<Vec<_>>(), expected);
    }
}

#[test]
fn a_huge_empty_disk_costs_nothing() {
    let mut memory = Memory::default();
    let image = Image::zero(1 << 56, 64 * KIB as u32).unwrap();
    assert_eq!(image.depth(), 5);
    let mut builder = TreeBuilder::new(image);
    builder.set(&mut memory, image.chunks() - 1, &[chunk(7)]).unwrap();
    let image = builder.finish(&mut memory).unwrap();
    assert_eq!(memory.nodes.len(), 5);
    assert_eq!(walk(&memory, image).count(), 1);
    let mut builder = TreeBuilder::new(image);
    builder.zero(&mut memory, 0, image.chunks()).unwrap();
    memory.reads.set(0);
    assert_eq!(builder.finish(&mut memory).unwrap().root, Digest::ZERO);
    assert_eq!(memory.reads.get(), 0);
}

#[test]
fn an_incremental_touches_only_its_paths() {
    let mut memory = Memory::default();
    let empty = Image::zero(64 * GIB, 64 * KIB as u32).unwrap();
    let mut builder = TreeBuilder::new(empty);
    let all: Vec<_> = (0..empty.chunks()).map(|i| chunk(i + 1)).collect();
    builder.set(&mut memory, 0, &all).unwrap();
    let full = builder.finish(&mut memory).unwrap();
    let before = memory.nodes.len();
    memory.reads.set(0);
    let mut builder = TreeBuilder::new(full);
    builder.set(&mut memory, 5, &[chunk(5000001)]).unwrap();
    builder.set(&mut memory, 500_000, &[chunk(5000002)]).unwrap();
    let new = builder.finish(&mut memory).unwrap();
    assert_eq!((memory.nodes.len() - before, memory.reads.get()), (5, 5));
    memory.reads.set(0);
    let changed = diff(&memory, full, new).unwrap();
    assert_eq!(changed, [new.chunk_extent(5), new.chunk_extent(500_000)]);
    assert_eq!(memory.reads.get(), 10);
}

#[test]
fn a_broken_part_is_named_and_stepped_over() {
    let mut memory = Memory::default();
    let empty = Image::zero(64 * MIB + 5, 64 * KIB as u32).unwrap();
    let mut builder = TreeBuilder::new(empty);
    let all: Vec<_> = (0..empty.chunks()).map(|i| chunk(i + 1)).collect();
    builder.set(&mut memory, 0, &all).unwrap();
    let image = builder.finish(&mut memory).unwrap();
    let root = memory.node(&image.root).unwrap();
    memory.nodes.remove(&root.slots()[2]);
    let (good, bad): (Vec<_>, Vec<_>) = walk(&memory, image).partition(Result::is_ok);
    assert_eq!(good.len() as u64, image.chunks() - 256);
    let broken = bad.into_iter().next().unwrap().unwrap_err();
    assert_eq!(broken.extent, Extent::new(32 * MIB, 16 * MIB));
}

#[test]
fn what_comes_out_of_order_is_refused() {
    let mut memory = Memory::default();
    let mut builder = TreeBuilder::new(Image::zero(MIB, 64 * KIB as u32).unwrap());
    builder.set(&mut memory, 3, &[chunk(1)]).unwrap();
    assert!(builder.set(&mut memory, 3, &[chunk(1)]).is_err());
    assert!(builder.zero(&mut memory, 4, 17).is_err());
    assert!(Node::decode(&[0; NODE_BYTES - 1]).is_err());
    assert!(Node::decode(&[0; NODE_BYTES + 32]).is_err());
}
