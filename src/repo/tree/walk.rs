//! Walking a tree in the order of the disk, past all that is zero.

use crate::extent::Extent;
use crate::repo::digest::Digest;
use crate::repo::error::RepoError;
use crate::repo::tree::{FANOUT, Image, Node, NodeSource, span};

/// A chunk that is not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Its bytes on the disk.
    pub extent: Extent,
    /// Digest of its content.
    pub digest: Digest,
}

/// A part of a tree that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{extent} cannot be read: {source}")]
pub struct BrokenPart {
    /// The bytes on the disk whose digests are lost.
    pub extent: Extent,
    /// Digest of the node.
    pub node: Digest,
    /// Why.
    pub source: Box<RepoError>,
}

struct Frame {
    node: Node,
    level: u32,
    first_chunk: u64,
    next_slot: usize,
}

/// Iterates over the chunks of an image that are not zero, in order. After a broken part it goes on behind it.
pub struct Walk<S, E> {
    source: S,
    image: Image,
    /// Chunks of interest.
    from: u64,
    to: u64,
    enter: E,
    started: bool,
    stack: Vec<Frame>,
}

/// Walks all of an image.
pub fn walk<S: NodeSource>(source: S, image: Image) -> Walk<S, impl FnMut(&Digest) -> bool> {
    walk_if(source, image, |_| true)
}

/// Walks the chunks of an image that touch `extent`.
pub fn walk_range<S: NodeSource>(source: S, image: Image, extent: Extent) -> Walk<S, impl FnMut(&Digest) -> bool> {
    let chunk_bytes = u64::from(image.chunk_bytes);
    let to = extent.end().div_ceil(chunk_bytes).min(image.chunks());
    Walk { from: extent.offset_bytes / chunk_bytes, to, ..walk_if(source, image, |_: &Digest| true) }
}

/// Walks an image, but only into the nodes for which `enter` says yes.
pub fn walk_if<S: NodeSource, E: FnMut(&Digest) -> bool>(source: S, image: Image, enter: E) -> Walk<S, E> {
    Walk { source, image, from: 0, to: image.chunks(), enter, started: false, stack: Vec::new() }
}

impl<S: NodeSource, E: FnMut(&Digest) -> bool> Walk<S, E> {
    fn push(&mut self, digest: Digest, level: u32, first_chunk: u64) -> Result<(), BrokenPart> {
        if digest.is_zero() || !(self.enter)(&digest) {
            return Ok(());
        }
        match self.source.node(&digest) {
            Ok(node) => {
                let behind = self.from.saturating_sub(first_chunk);
                let next_slot = (behind / span(level)).min(FANOUT as u64) as usize;
                self.stack.push(Frame { node, level, first_chunk, next_slot });
                Ok(())
            }
            Err(source) => {
                let to = (first_chunk + span(level + 1)).min(self.image.chunks());
                Err(BrokenPart {
                    extent: self.image.chunks_extent(first_chunk, to),
                    node: digest,
                    source: Box::new(source),
                })
            }
        }
    }
}

impl<S: NodeSource, E: FnMut(&Digest) -> bool> Iterator for Walk<S, E> {
    type Item = Result<Chunk, BrokenPart>;

    fn next(&mut self) -> Option<Self::Item> {
        if !std::mem::replace(&mut self.started, true)
            && self.from < self.to
            && let Err(broken) = self.push(self.image.root, self.image.depth() - 1, 0)
        {
            return Some(Err(broken));
        }
        loop {
            let frame = self.stack.last_mut()?;
            let slots = &frame.node.slots()[frame.next_slot..];
            let Some(skip) = slots.iter().position(|digest| !digest.is_zero()) else {
                self.stack.pop();
                continue;
            };
            let (slot, digest, level) = (frame.next_slot + skip, slots[skip], frame.level);
            frame.next_slot = slot + 1;
            let first_chunk = frame.first_chunk + slot as u64 * span(level);
            if first_chunk >= self.to {
                self.stack.clear();
                return None;
            }
            if level == 0 {
                return Some(Ok(Chunk { extent: self.image.chunk_extent(first_chunk), digest }));
            }
            if let Err(broken) = self.push(digest, level - 1, first_chunk) {
                return Some(Err(broken));
            }
        }
    }
}
