//! Offer: what is known of a disk's chunks, for somebody who compares it with the disk.
//!
//! Goes over the tree of an image in the order of the disk. A chunk is offered when it can be read as far as anybody knows: an
//! index has it in a pack that is there, and no verification marked it. What is not offered will be sent, stored again and so
//! healed; where it is, is remembered, so that nobody can say afterwards that it is the same. Nodes that cannot be read make
//! all that lies below them unknown, and become known to who builds the new tree before that is said.

use std::sync::{Arc, Mutex, PoisonError};

use crate::extent::Extent;
use crate::repo::digest::Digest;
use crate::repo::error::RepoError;
use crate::repo::reader::Reader;
use crate::repo::tree::Image;
use crate::repo::tree::build::Broken;

/// Zero chunks between two that are not, up to which both are in one batch.
const GAP_CHUNKS: u64 = 64;

/// What is known of consecutive chunks: a digest ([`Digest::ZERO`] for zeroes), or nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The first chunk.
    pub first_chunk: u64,
    /// What is known of it and those after it.
    pub known: Vec<Option<Digest>>,
}

/// What was not offered, shared with who must hold others to it.
#[derive(Clone, Debug, Default)]
pub struct Offer {
    unknown: Arc<Mutex<Vec<Extent>>>,
    broken: Arc<Broken>,
}

impl Offer {
    /// Unreadable nodes of the image's tree, as they are found.
    pub fn broken(&self) -> Arc<Broken> {
        self.broken.clone()
    }

    /// Whether all of these bytes were offered, as far as the offer has come.
    pub fn covers(&self, extent: Extent) -> bool {
        let unknown = self.unknown.lock().unwrap_or_else(PoisonError::into_inner);
        let next = unknown.partition_point(|one| one.end() <= extent.offset_bytes);
        unknown.get(next).is_none_or(|one| one.offset_bytes >= extent.end())
    }

    /// Bytes that were not offered.
    pub fn unknown_bytes(&self) -> u64 {
        self.unknown.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|one| one.len_bytes).sum()
    }

    fn withhold(&self, extent: Extent) {
        let mut unknown = self.unknown.lock().unwrap_or_else(PoisonError::into_inner);
        match unknown.last_mut() {
            Some(last) if last.end() == extent.offset_bytes => last.len_bytes += extent.len_bytes,
            Some(last) if last.end() > extent.offset_bytes => {
                // Given once more: most is known to be unknown.
                let next = unknown.partition_point(|one| one.end() <= extent.offset_bytes);
                if unknown.get(next).is_none_or(|one| one.offset_bytes >= extent.end()) {
                    unknown.insert(next, extent);
                }
            }
            _ => unknown.push(extent),
        }
    }

    /// Gives all that is known, in batches of up to `most` chunks, in order; what lies between batches is zero. Ends early
    /// when `give` says no. May be called again. `reader` is one with a writer's index. Blocks.
    ///
    /// # Errors
    /// When an index file is damaged.
    pub fn give(
        &self,
        reader: &Reader,
        image: Image,
        most: usize,
        mut give: impl FnMut(Batch) -> bool,
    ) -> Result<(), RepoError> {
        let mut batch = Batch::default();
        let chunk_bytes = u64::from(image.chunk_bytes);
        for item in reader.walk(image, Extent::new(0, image.size_bytes)) {
            let (extent, known) = match item {
                Ok(chunk) => (chunk.extent, reader.index().find(&chunk.digest)?.map(|_| chunk.digest)),
                Err(broken) => {
                    tracing::warn!("what an earlier point has of a part of the disk is lost, so it is sent: {broken}");
                    self.broken.add(broken.node);
                    (broken.extent, None)
                }
            };
            if known.is_none() {
                self.withhold(extent);
            }
            for chunk in extent.offset_bytes / chunk_bytes..extent.end().div_ceil(chunk_bytes) {
                let end = batch.first_chunk + batch.known.len() as u64;
                let gap = chunk - end;
                if !batch.known.is_empty() && (gap > GAP_CHUNKS || batch.known.len() as u64 + gap >= most as u64) {
                    if !give(std::mem::take(&mut batch)) {
                        return Ok(());
                    }
                } else if !batch.known.is_empty() {
                    batch.known.extend((0..gap).map(|_| Some(Digest::ZERO)));
                }
                if batch.known.is_empty() {
                    batch.first_chunk = chunk;
                }
                batch.known.push(known);
            }
        }
        if !batch.known.is_empty() {
            give(batch);
        }
        Ok(())
    }
}
