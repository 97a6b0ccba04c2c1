//! What differs between two images: costs as much as they differ.

use crate::extent::Extent;
use crate::repo::digest::Digest;
use crate::repo::error::RepoError;
use crate::repo::tree::{Image, Node, NodeSource, span};

/// The ranges in which `new` differs from `old`, in order, neighbours joined, in whole chunks. Images of another size or
/// chunk size are refused: they have no tree in common.
pub fn diff<S: NodeSource>(source: S, old: Image, new: Image) -> Result<Vec<Extent>, RepoError> {
    if (old.size_bytes, old.chunk_bytes) != (new.size_bytes, new.chunk_bytes) {
        return Err(RepoError::Refused("images of different size or chunk size cannot be compared".to_owned()));
    }
    let mut found: Vec<Extent> = Vec::new();
    let mut stack = vec![(old.root, new.root, new.depth(), 0)];
    let node = |digest: &Digest| if digest.is_zero() { Ok(Node::zero()) } else { source.node(digest) };
    while let Some((old_digest, new_digest, height, first_chunk)) = stack.pop() {
        if old_digest == new_digest || first_chunk >= new.chunks() {
            continue;
        }
        if height == 0 {
            let extent = new.chunk_extent(first_chunk);
            match found.last_mut() {
                Some(last) if last.end() == extent.offset_bytes => last.len_bytes += extent.len_bytes,
                _ => found.push(extent),
            }
            continue;
        }
        let (old_node, new_node) = (node(&old_digest)?, node(&new_digest)?);
        let slots = old_node.slots().iter().zip(new_node.slots()).enumerate().rev();
        let below = slots.filter(|(_, (old, new))| old != new);
        stack.extend(below.map(|(i, (o, n))| (*o, *n, height - 1, first_chunk + i as u64 * span(height - 1))));
    }
    Ok(found)
}
