//! Tree: a disk as a radix tree of digests.
//!
//! ```text
//! level 2              root
//!                    /   |   \            a node: 256 digests of 32 bytes, 8 KiB, at every level
//! level 1        node  ZERO   node        ZERO: all that lies below is zero; costs nothing
//!               /  | \          | \
//! level 0   leaf  …             …  leaf   a leaf's digests are those of chunks, in the order of the disk
//! ```
//!
//! The depth follows from the disk's size and chunk size ([`Image::depth`]), so no node says where it belongs; slots past
//! the disk's end are zero. Equal content gives equal nodes: comparing two trees costs as much as they differ.
//!
//! **Why 256, and the same at all levels:** scattered small writes are what an incremental mostly sees. Each rewrites one
//! leaf: 8 KiB here, where the usual 1024 to a leaf would be 32 KiB, half a compressed chunk. Inner nodes are shared by
//! many leaves and hardly count at any width; 256 makes the slot of a chunk on each level one byte of its number.
//! 1 TiB in 128 KiB chunks is 8 Mi chunks, 32 Ki leaves, three levels.

use crate::extent::Extent;
use crate::limits::MAX_DISK_BYTES;
use crate::repo::config::is_chunk_size;
use crate::repo::digest::{DIGEST_BYTES, Digest};
use crate::repo::error::{FormatError, RepoError};
use serde::{Deserialize, Serialize};

pub mod build;
pub mod diff;
pub mod walk;

/// Digests of a node.
pub const FANOUT: usize = 256;
/// Length of a node.
pub const NODE_BYTES: usize = FANOUT * DIGEST_BYTES;
const FANOUT_BITS: u32 = FANOUT.ilog2();

/// A node: 256 digests.
#[derive(Clone, PartialEq, Eq)]
pub struct Node(Box<[Digest; FANOUT]>);

impl Node {
    /// A node with nothing below.
    pub fn zero() -> Self {
        Self(Box::new([Digest::ZERO; FANOUT]))
    }

    /// Decodes a stored node. Any 8192 bytes are a node: that they are the right ones is what its digest says.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let (digests, []) = bytes.as_chunks::<DIGEST_BYTES>() else {
            return Err(FormatError::bad("a tree node has a wrong length"));
        };
        if digests.len() != FANOUT {
            return Err(FormatError::bad(format!("a tree node has {} bytes, not {NODE_BYTES}", bytes.len())));
        }
        let mut node = Self::zero();
        for (slot, digest) in node.0.iter_mut().zip(digests) {
            *slot = Digest::from_bytes(*digest);
        }
        Ok(node)
    }

    /// The bytes to store.
    pub fn encode(&self) -> Vec<u8> {
        self.0.iter().flat_map(|digest| *digest.as_bytes()).collect()
    }

    /// The digests.
    pub fn slots(&self) -> &[Digest; FANOUT] {
        &self.0
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Node({} of {FANOUT} used)", self.0.iter().filter(|d| !d.is_zero()).count())
    }
}

/// Where nodes come from: a repository, or a test's memory.
pub trait NodeSource {
    /// The node with this digest (never [`Digest::ZERO`]).
    fn node(&self, digest: &Digest) -> Result<Node, RepoError>;
}

impl<T: NodeSource + ?Sized> NodeSource for &T {
    fn node(&self, digest: &Digest) -> Result<Node, RepoError> {
        (**self).node(digest)
    }
}

/// A disk's content at an instant: the root of its tree, and what is needed to read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Digest of the root node; [`Digest::ZERO`] for a disk of zeroes.
    pub root: Digest,
    /// Size of the disk, to the byte: the last chunk may be short.
    pub size_bytes: u64,
    /// Chunk size.
    pub chunk_bytes: u32,
}

impl Image {
    /// A disk of zeroes.
    pub fn zero(size_bytes: u64, chunk_bytes: u32) -> Result<Self, FormatError> {
        let image = Self { root: Digest::ZERO, size_bytes, chunk_bytes };
        image.check().map(|()| image)
    }

    /// Whether size and chunk size are within bounds: to be called on an image that was stored or sent.
    pub fn check(&self) -> Result<(), FormatError> {
        if self.size_bytes > MAX_DISK_BYTES {
            return Err(FormatError::bad(format!("a disk of {} bytes is too large", self.size_bytes)));
        }
        if !is_chunk_size(self.chunk_bytes) {
            return Err(FormatError::bad(format!("a chunk size of {} bytes is not possible", self.chunk_bytes)));
        }
        Ok(())
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u64 {
        self.size_bytes.div_ceil(u64::from(self.chunk_bytes))
    }

    /// Levels of nodes, at least one.
    pub fn depth(&self) -> u32 {
        let mut depth = 1;
        while span(depth) < self.chunks() {
            depth += 1;
        }
        depth
    }

    /// The bytes of a chunk. The last one of the disk may be short.
    pub fn chunk_extent(&self, chunk: u64) -> Extent {
        self.chunks_extent(chunk, chunk + 1)
    }

    /// The bytes of the chunks `from..to`, cut at the disk's end.
    pub fn chunks_extent(&self, from: u64, to: u64) -> Extent {
        let at = |chunk: u64| chunk.saturating_mul(self.chunk_bytes.into()).min(self.size_bytes);
        Extent::between(at(from), at(to))
    }
}

/// Chunks below one slot of a node at `level` (leaves are level 0); also all chunks of a tree of that depth.
/// Levels are bounded by [`MAX_DISK_BYTES`], so this does not overflow.
const fn span(level: u32) -> u64 {
    1 << (level * FANOUT_BITS)
}

const _: () = assert!(NODE_BYTES == 8192 && FANOUT.is_power_of_two());
const _: () = assert!(
    span(5) >= MAX_DISK_BYTES / crate::limits::MIN_CHUNK_BYTES as u64,
    "five levels are the most, and their span fits a u64"
);

#[cfg(test)]
mod tests;
