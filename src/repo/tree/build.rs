//! Building a tree from changes that come in the order of the disk, from a base or from nothing.
//!
//! One node a level is open: the path to where we are. A node is stored when we have moved past it, and only if it differs
//! from the base's. So memory is a few nodes, whatever the disk's size, and the cost follows the leaves touched.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use crate::repo::digest::Digest;
use crate::repo::error::RepoError;
use crate::repo::tree::{FANOUT, FANOUT_BITS, Image, Node, NodeSource, span};

struct OpenNode {
    /// Number of the node among those of its level.
    number: u64,
    /// What the base has in its place.
    base: Digest,
    node: Node,
}

/// A tree that is being built.
pub struct TreeBuilder {
    image: Image,
    depth: u32,
    /// By level. If one is open, all above are, on the path to it.
    open: Vec<Option<OpenNode>>,
    next_chunk: u64,
    /// Nodes of the base that cannot be read and count as empty: everything below them is set anew.
    broken: Arc<Broken>,
}

/// Nodes of a base that are known to be unreadable.
#[derive(Debug, Default)]
pub struct Broken(Mutex<HashSet<Digest>>);

impl Broken {
    /// Adds a node.
    pub fn add(&self, node: Digest) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(node);
    }

    /// Whether a node is known to be unreadable.
    pub fn has(&self, node: &Digest) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(node)
    }
}

/// What a builder needs from outside: nodes of the base, and a place for new ones.
pub trait NodeStore: NodeSource {
    /// Stores a node (never an all-zero one).
    fn store(&mut self, digest: Digest, node: Vec<u8>) -> Result<(), RepoError>;
}

impl TreeBuilder {
    /// Begins from `base`: what is not touched stays as it is there.
    pub fn new(base: Image) -> Self {
        let depth = base.depth();
        Self { image: base, depth, open: (0..depth).map(|_| None).collect(), next_chunk: 0, broken: Arc::default() }
    }

    /// Begins from a base of which some nodes are known to be unreadable, or get known before anything below them is set.
    /// They count as empty, so all that lies below them must be set.
    pub fn healing(base: Image, broken: Arc<Broken>) -> Self {
        Self { broken, ..Self::new(base) }
    }

    /// Sets the digests of the chunks from `first` on. Calls come in ascending order and do not overlap.
    pub fn set(&mut self, store: &mut impl NodeStore, first: u64, digests: &[Digest]) -> Result<(), RepoError> {
        self.advance(first, first + digests.len() as u64)?;
        for (i, digest) in digests.iter().enumerate() {
            let chunk = first + i as u64;
            self.set_slot(store, 0, chunk, *digest)?;
        }
        Ok(())
    }

    /// Makes the chunks `from..to` zero. Same order as for [`TreeBuilder::set`]. Whole subtrees are not even read.
    pub fn zero(&mut self, store: &mut impl NodeStore, from: u64, to: u64) -> Result<(), RepoError> {
        self.advance(from, to)?;
        // What lies past the disk's end is zero already: subtrees that reach over it count as whole.
        let to = if to == self.image.chunks() { span(self.depth) } else { to };
        let mut at = from;
        while at < to {
            let level =
                (0..=self.depth).rev().find(|l| at.is_multiple_of(span(*l)) && to - at >= span(*l)).unwrap_or(0);
            if level == self.depth {
                self.open.iter_mut().for_each(|open| *open = None);
                self.image.root = Digest::ZERO;
            } else {
                self.set_slot(store, level, at / span(level), Digest::ZERO)?;
            }
            at += span(level);
        }
        Ok(())
    }

    /// Stores what is open and gives the image.
    pub fn finish(mut self, store: &mut impl NodeStore) -> Result<Image, RepoError> {
        self.close(store, self.depth - 1)?;
        Ok(self.image)
    }

    fn advance(&mut self, from: u64, to: u64) -> Result<(), RepoError> {
        if from < self.next_chunk || to > self.image.chunks() {
            let (next, all) = (self.next_chunk, self.image.chunks());
            return Err(RepoError::Refused(format!("chunks {from}..{to} came out of order: {next}..{all} are left")));
        }
        self.next_chunk = to;
        Ok(())
    }

    fn set_slot(&mut self, store: &mut impl NodeStore, level: u32, slot: u64, digest: Digest) -> Result<(), RepoError> {
        self.open_node(store, level, slot >> FANOUT_BITS)?;
        if let Some(open) = &mut self.open[level as usize] {
            open.node.0[slot as usize % FANOUT] = digest;
        }
        Ok(())
    }

    fn open_node(&mut self, store: &mut impl NodeStore, level: u32, number: u64) -> Result<(), RepoError> {
        if self.open[level as usize].as_ref().is_some_and(|open| open.number == number) {
            return Ok(());
        }
        self.close(store, level)?;
        let base = if level + 1 == self.depth {
            self.image.root
        } else {
            self.open_node(store, level + 1, number >> FANOUT_BITS)?;
            let parent = self.open[level as usize + 1].as_ref();
            parent.map_or(Digest::ZERO, |parent| parent.node.0[number as usize % FANOUT])
        };
        let base = if self.broken.has(&base) { Digest::ZERO } else { base };
        let node = if base.is_zero() { Node::zero() } else { store.node(&base)? };
        self.open[level as usize] = Some(OpenNode { number, base, node });
        Ok(())
    }

    /// Closes the open node of a level, and those below it before.
    fn close(&mut self, store: &mut impl NodeStore, level: u32) -> Result<(), RepoError> {
        if level > 0 {
            self.close(store, level - 1)?;
        }
        let Some(open) = self.open[level as usize].take() else { return Ok(()) };
        let bytes = open.node.encode();
        let digest = Digest::of(&bytes);
        if digest != open.base && !digest.is_zero() {
            store.store(digest, bytes)?;
        }
        if level + 1 == self.depth {
            self.image.root = digest;
        } else if let Some(parent) = &mut self.open[level as usize + 1] {
            debug_assert_eq!(parent.number, open.number >> FANOUT_BITS);
            parent.node.0[open.number as usize % FANOUT] = digest;
        }
        Ok(())
    }
}
