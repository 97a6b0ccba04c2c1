//! The tree thread: turns digests into trees, and writes their new nodes into tree packs.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};

use crate::repo::blob::Codec;
use crate::repo::digest::Digest;
use crate::repo::error::RepoError;
use crate::repo::pack::PackKind;
use crate::repo::packfile::OpenPack;
use crate::repo::reader::Reader;
use crate::repo::tree::build::{Broken, NodeStore, TreeBuilder};
use crate::repo::tree::{Image, NODE_BYTES, Node, NodeSource};
use crate::repo::writer::append::entry;
use crate::repo::writer::flush::ToFlush;
use crate::repo::writer::shared::Shared;
use crate::units::PackId;

/// Nodes are compressed whatever is done with chunks: those of sparse disks are mostly zeroes, and they are few.
const NODE_LEVEL: i32 = 1;
/// So many digests of stored nodes are remembered; beyond that a double may be stored.
const MAX_REMEMBERED: usize = 1 << 18;

pub(super) enum Message {
    /// A new disk, from this base; what of the base is known to be unreadable is made anew.
    Disk(Image, Arc<Broken>),
    Chunks {
        disk: usize,
        first_chunk: u64,
        digests: Vec<Digest>,
    },
    Zero {
        disk: usize,
        first_chunk: u64,
        to_chunk: u64,
    },
}

pub(super) fn run(
    shared: &Shared,
    messages: &Receiver<Vec<Message>>,
    flusher: &SyncSender<ToFlush>,
) -> Result<(), RepoError> {
    let zstd = zstd::bulk::Compressor::new(NODE_LEVEL)
        .map_err(|e| RepoError::Refused(format!("zstd cannot be set up: {e}")))?;
    let base = Reader::with_index(shared.layout.clone(), (*shared.index()).clone());
    let stored = HashSet::new();
    let broken = Vec::new();
    let mut store = Store { shared, base, disk: 0, flusher, zstd, stored, broken, open: None, tree_bytes: 0 };
    let mut builders: Vec<TreeBuilder> = Vec::new();
    let result = build(shared, messages, &mut store, &mut builders);
    if let Some(open) = store.open.take() {
        open.discard();
    }
    result
}

fn build(
    shared: &Shared,
    messages: &Receiver<Vec<Message>>,
    store: &mut Store<'_>,
    builders: &mut Vec<TreeBuilder>,
) -> Result<(), RepoError> {
    for message in messages.iter().flatten() {
        if shared.is_stopped() {
            continue;
        }
        match message {
            Message::Disk(base, broken) => {
                store.broken.push(broken.clone());
                builders.push(TreeBuilder::healing(base, broken));
            }
            Message::Chunks { disk, first_chunk, digests } => {
                store.disk = disk;
                builders[disk].set(store, first_chunk, &digests)?;
            }
            Message::Zero { disk, first_chunk, to_chunk } => {
                store.disk = disk;
                builders[disk].zero(store, first_chunk, to_chunk)?;
            }
        }
    }
    if !shared.is_finishing() {
        return Ok(());
    }
    for (disk, builder) in builders.drain(..).enumerate() {
        store.disk = disk;
        let image = builder.finish(store)?;
        shared.finished(|finished| entry(&mut finished.disks, disk).image = image);
    }
    store.seal()?;
    shared.finished(|finished| finished.tree_bytes = store.tree_bytes);
    Ok(())
}

struct Store<'a> {
    shared: &'a Shared,
    base: Reader,
    /// Whose tree is being built.
    disk: usize,
    flusher: &'a SyncSender<ToFlush>,
    zstd: zstd::bulk::Compressor<'static>,
    stored: HashSet<Digest>,
    broken: Vec<Arc<Broken>>,
    open: Option<OpenPack>,
    tree_bytes: u64,
}

impl Store<'_> {
    fn seal(&mut self) -> Result<(), RepoError> {
        if let Some(open) = self.open.take() {
            // A flusher that has ended has said why.
            let _ = self.flusher.send(ToFlush { pack: open.seal()?, number: None });
        }
        Ok(())
    }
}

impl NodeSource for Store<'_> {
    fn node(&self, digest: &Digest) -> Result<Node, RepoError> {
        self.base.node(digest).map_err(|source| RepoError::BaseLost { disk: self.disk, source: Box::new(source) })
    }
}

impl NodeStore for Store<'_> {
    fn store(&mut self, digest: Digest, node: Vec<u8>) -> Result<(), RepoError> {
        let broken = self.broken.iter().any(|broken| broken.has(&digest));
        if self.stored.contains(&digest) || (!broken && self.shared.index().find(&digest)?.is_some()) {
            return Ok(());
        }
        if self.stored.len() >= MAX_REMEMBERED {
            self.stored.clear();
        }
        self.stored.insert(digest);
        let mut packed = [0; NODE_BYTES * 15 / 16];
        let (piece, codec) = match self.zstd.compress_to_buffer(&node, &mut packed[..]) {
            Ok(len) => (&packed[..len], Codec::Zstd),
            Err(_) => (&node[..], Codec::Raw),
        };
        let open = match &mut self.open {
            Some(open) => open,
            None => {
                let id = PackId::random();
                let path = self.shared.unfinished.join(id.to_string());
                self.open.insert(OpenPack::create(id, PackKind::Tree, path)?)
            }
        };
        open.append(&[piece], [(digest, piece.len() as u32, NODE_BYTES as u32, codec)].into_iter())?;
        self.tree_bytes += piece.len() as u64;
        if open.is_full() { self.seal() } else { Ok(()) }
    }
}
