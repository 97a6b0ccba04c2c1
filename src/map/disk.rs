//! A disk of a restore point, as the NBD server reads it.

use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::sync::oneshot;

use super::ahead::{Ahead, MAX_AHEAD_BYTES};
use super::chunks::{Chunks, Decoded};
use super::nodes::{InMemory, Nodes, Stored};
use super::workers::Workers;
use crate::block::BoxFuture;
use crate::extent::Extent;
use crate::nbd::server::{Content, Disk, Piece, Run, Unreadable};
use crate::repo::tree::walk::{BrokenPart, Chunk, walk_range};
use crate::repo::tree::{Image, NodeSource};
use crate::repo::{Digest, Reader};

/// Most places of a disk of which it is remembered that they were told to be damaged.
const MAX_TOLD: usize = 1024;

/// What all disks of a point share.
pub(super) struct Shared {
    pub reader: Arc<Reader>,
    pub workers: Arc<Workers>,
    pub nodes: Nodes,
    pub chunks: Chunks,
}

/// A disk of a restore point. Cheap to clone.
#[derive(Clone)]
pub(super) struct MappedDisk(Arc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    vm: String,
    name: String,
    image: Image,
    ahead: Mutex<Ahead>,
    /// Where damage begins that is in the log.
    told: Mutex<HashSet<u64>>,
}

/// A part of a disk that is not zero.
type Found = Result<Chunk, BrokenPart>;

impl MappedDisk {
    /// `image` is one that was checked.
    pub fn new(shared: Arc<Shared>, vm: &str, name: &str, image: Image) -> Self {
        let (ahead, told) = Default::default();
        Self(Arc::new(Inner { shared, vm: vm.to_owned(), name: name.to_owned(), image, ahead, told }))
    }

    /// Walks the parts of `extent` that are not zero, and makes something of them: at once, where all nodes are in memory,
    /// else on a worker. `None` when the worker came to grief.
    async fn walk<T: Send + 'static>(
        &self,
        extent: Extent,
        fold: impl Fn(&mut dyn Iterator<Item = Found>) -> T + Send + 'static,
    ) -> Option<T> {
        let (inner, image) = (&self.0, self.0.image);
        let mut absent = false;
        let known = {
            let found = walk_range(InMemory(&inner.shared.nodes), image, extent);
            fold(&mut found.take_while(|part| {
                absent |= part.is_err();
                !absent
            }))
        };
        if !absent {
            return Some(known);
        }
        let (sender, receiver) = oneshot::channel();
        let this = self.clone();
        inner.shared.workers.run(move |scratch| {
            let Shared { nodes, reader, .. } = &*this.0.shared;
            let source = Stored { nodes, reader, scratch: RefCell::new(scratch) };
            let _ = sender.send(fold(&mut walk(source, image, extent)));
        });
        receiver.await.ok()
    }

    async fn read_pieces(&self, extent: Extent) -> Vec<Piece> {
        let ahead = lock(&self.0.ahead).read(extent, self.0.image.size_bytes);
        let found = self.walk(extent, |parts| parts.collect::<Vec<_>>()).await;
        let Some(found) = found else {
            self.tell(extent, &"the look-up of its chunks ended half-way");
            return vec![Piece { extent, content: lost() }];
        };
        let wanted: Vec<_> =
            found.iter().flatten().map(|chunk| (chunk.digest, chunk.extent.len_bytes as usize)).collect();
        let mut coming = self.0.shared.chunks.get(&wanted).into_iter();
        // After what was asked for.
        ahead.into_iter().for_each(|ahead| self.expect(ahead));
        let mut pieces = Pieces { extent, at: extent.offset_bytes, pieces: vec![] };
        for part in found {
            let (whole, content) = match part {
                Ok(chunk) => {
                    let Some(bytes) = coming.next() else { break };
                    let this = self.clone();
                    let Some(part) = chunk.extent.shared(extent) else { continue };
                    (chunk.extent, Content::Data(Box::pin(async move { this.cut(bytes.await, chunk.extent, part) })))
                }
                Err(broken) => {
                    self.tell(broken.extent, &broken.source);
                    (broken.extent, lost())
                }
            };
            if let Some(part) = whole.shared(extent) {
                pieces.push(part, content);
            }
        }
        pieces.finish()
    }

    /// `part` of a chunk at `whole`.
    fn cut(&self, chunk: Decoded, whole: Extent, part: Extent) -> Result<Bytes, Unreadable> {
        let bytes = match chunk {
            Ok(bytes) if bytes.len() as u64 == whole.len_bytes => bytes,
            Ok(_) => {
                self.tell(whole, &"the tree names a chunk of another length");
                return Err(Unreadable);
            }
            Err(error) => {
                self.tell(whole, &error);
                return Err(Unreadable);
            }
        };
        let from = (part.offset_bytes - whole.offset_bytes) as usize;
        let part = from..from + part.len_bytes as usize;
        // What a small piece points to must not keep a whole chunk in memory.
        Ok(if part.len() < bytes.len() / 2 { Bytes::copy_from_slice(&bytes[part]) } else { bytes.slice(part) })
    }

    /// Says once for each place what is wrong there.
    fn tell(&self, extent: Extent, why: &dyn std::fmt::Display) {
        let Inner { vm, name, .. } = &*self.0;
        let mut told = lock(&self.0.told);
        let new = told.len() < MAX_TOLD && told.insert(extent.offset_bytes);
        drop(told);
        if new {
            tracing::error!(
                "{extent} of disk {name:?} of {vm:?} cannot be read, and reads of them fail: {why}; `livebackup verify` \
                 shows what else is damaged, and another restore point may have them"
            );
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lost() -> Content {
    Content::Data(std::future::ready(Err(Unreadable)).boxed())
}

fn walk<S: NodeSource>(source: S, image: Image, extent: Extent) -> impl Iterator<Item = Found> {
    walk_range(source, image, extent)
}

/// Pieces of a read, with zeroes where nothing is.
struct Pieces {
    extent: Extent,
    at: u64,
    pieces: Vec<Piece>,
}

impl Pieces {
    fn zeroes_to(&mut self, to: u64) {
        if self.at < to {
            self.pieces.push(Piece { extent: Extent::between(self.at, to), content: Content::Zeroes });
            self.at = to;
        }
    }

    fn push(&mut self, extent: Extent, content: Content) {
        self.zeroes_to(extent.offset_bytes);
        self.at = extent.end();
        self.pieces.push(Piece { extent, content });
    }

    fn finish(mut self) -> Vec<Piece> {
        self.zeroes_to(self.extent.end());
        self.pieces
    }
}

/// What is known of `extent` by the parts that are not zero: `most` runs at most.
fn runs(parts: &mut dyn Iterator<Item = Found>, extent: Extent, most: usize) -> Vec<Run> {
    let mut runs: Vec<Run> = vec![];
    let mut at = extent.offset_bytes;
    // Whether there is room for it; neighbours that are alike are one.
    let mut add = |runs: &mut Vec<Run>, to: u64, hole: bool| {
        let (len_bytes, full) = (to - at, runs.len() >= most);
        match runs.last_mut() {
            _ if len_bytes == 0 => {}
            Some(last) if last.hole == hole => last.len_bytes += len_bytes,
            _ if full => return false,
            _ => runs.push(Run { len_bytes, hole }),
        }
        at = to;
        true
    };
    for part in parts {
        // What cannot be looked up is no hole: a read of it fails.
        let part = part.map_or_else(|broken| broken.extent, |chunk| chunk.extent);
        let Some(part) = part.shared(extent) else { continue };
        if !add(&mut runs, part.offset_bytes, true) || !add(&mut runs, part.end(), false) {
            return runs;
        }
    }
    add(&mut runs, extent.end(), true);
    runs
}

impl Disk for MappedDisk {
    fn size_bytes(&self) -> u64 {
        self.0.image.size_bytes
    }

    fn preferred_bytes(&self) -> u32 {
        self.0.image.chunk_bytes
    }

    fn read(&self, extent: Extent) -> BoxFuture<'_, Vec<Piece>> {
        Box::pin(self.read_pieces(extent))
    }

    fn runs(&self, extent: Extent, most: usize) -> BoxFuture<'_, Vec<Run>> {
        Box::pin(async move {
            let found = self.walk(extent, move |parts| runs(parts, extent, most)).await;
            found.unwrap_or_else(|| vec![Run { len_bytes: extent.len_bytes, hole: false }])
        })
    }

    fn expect(&self, extent: Extent) {
        let extent = Extent { len_bytes: extent.len_bytes.min(MAX_AHEAD_BYTES), ..extent };
        if extent.len_bytes == 0 || self.0.shared.workers.are_busy() {
            return;
        }
        let this = self.clone();
        self.0.shared.workers.run(move |scratch| {
            let Shared { nodes, reader, chunks, .. } = &*this.0.shared;
            let source = Stored { nodes, reader, scratch: RefCell::new(scratch) };
            let chunk = |chunk: Chunk| (chunk.digest, chunk.extent.len_bytes as usize);
            let wanted: Vec<(Digest, usize)> = walk(source, this.0.image, extent).flatten().map(chunk).collect();
            chunks.expect(&wanted);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::RepoError;

    fn chunk(from: u64, to: u64) -> Found {
        Ok(Chunk { extent: Extent::between(from, to), digest: Digest::of(b"x") })
    }

    fn broken(from: u64, to: u64) -> Found {
        let source = Box::new(RepoError::Refused("a test".to_owned()));
        Err(BrokenPart { extent: Extent::between(from, to), node: Digest::of(b"n"), source })
    }

    #[test]
    fn runs_are_merged_cut_and_no_more_than_asked_for() {
        let parts = || [chunk(10, 20), chunk(20, 30), broken(30, 50), chunk(60, 70)].into_iter();
        let found = |extent: Extent, most| {
            let runs = runs(&mut parts(), extent, most);
            runs.into_iter().map(|run| (run.len_bytes, run.hole)).collect::<Vec<_>>()
        };
        let all = Extent::between(0, 80);
        assert_eq!(found(all, 9), [(10, true), (40, false), (10, true), (10, false), (10, true)]);
        assert_eq!(found(all, 2), [(10, true), (40, false)]);
        assert_eq!(found(all, 1), [(10, true)]);
        assert_eq!(found(Extent::between(15, 35), 1), [(20, false)]);
        assert_eq!(found(Extent::between(50, 61), 5), [(10, true), (1, false)]);
        assert_eq!(found(Extent::between(70, 75), 5), [(5, true)]);
    }
}
