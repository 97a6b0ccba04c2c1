//! Nodes of the disks' trees, the last used ones: a disk is never looked up whole.
//!
//! A node stands for 256 chunks (32 MiB of a disk in chunks of 128 KiB), so 8 MiB of them know 32 GiB.

use std::cell::RefCell;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::lru::Lru;
use crate::repo::reader::Scratch;
use crate::repo::tree::{NODE_BYTES, Node, NodeSource};
use crate::repo::{Digest, Reader, RepoError};
use crate::units::MIB;

/// Bytes of nodes that are kept.
const KEPT_BYTES: usize = 8 * MIB as usize;

/// The nodes that were used last.
pub(super) struct Nodes(Mutex<Lru<Digest, Node>>);

impl Nodes {
    pub fn new() -> Self {
        Self(Mutex::new(Lru::new(KEPT_BYTES)))
    }

    fn lock(&self) -> MutexGuard<'_, Lru<Digest, Node>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Only what is in memory: never waits.
pub(super) struct InMemory<'a>(pub &'a Nodes);

impl NodeSource for InMemory<'_> {
    fn node(&self, digest: &Digest) -> Result<Node, RepoError> {
        self.0.lock().get(digest).ok_or(RepoError::Missing { digest: *digest })
    }
}

/// Also what has to be read, with a thread's own buffers.
pub(super) struct Stored<'a> {
    pub nodes: &'a Nodes,
    pub reader: &'a Reader,
    pub scratch: RefCell<&'a mut Scratch>,
}

impl NodeSource for Stored<'_> {
    fn node(&self, digest: &Digest) -> Result<Node, RepoError> {
        if let Some(node) = self.nodes.lock().get(digest) {
            return Ok(node);
        }
        let node = self.reader.read_node(&mut self.scratch.borrow_mut(), digest)?;
        let gone = self.nodes.lock().insert(*digest, node.clone(), NODE_BYTES);
        drop(gone);
        Ok(node)
    }
}
