//! Reader: from digests to verified bytes, and from images to disks.
//!
//! [`Reader::chunk`] reads one; [`Reader::read_image`] reads a disk as fast as the machine can, on all cores, handing the
//! pieces out on its worker threads, in any order; [`Reader::read_image_in_order`] does so on the caller's thread, in the
//! order of the disk.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::extent::Extent;
use crate::repo::digest::Digest;
use crate::repo::error::{FormatError, RepoError};
use crate::repo::index::set::{IndexSet, Location};
use crate::repo::layout::Layout;
use crate::repo::lock::{self, Lock};
use crate::repo::packfile::decode_blob;
use crate::repo::tree::diff::diff;
use crate::repo::tree::walk::{BrokenPart, Chunk, walk_range};
use crate::repo::tree::{Image, NODE_BYTES, Node, NodeSource};
use crate::units::PackId;

pub(crate) mod image;

pub use image::{ReadOptions, Unreadable};

/// Most pack files that are open at once.
const MAX_OPEN_PACKS: usize = 128;

/// Reads a repository as it was when the reader was made.
#[derive(Debug)]
pub struct Reader {
    layout: Arc<Layout>,
    index: IndexSet,
    open: Mutex<HashMap<PackId, Arc<File>>>,
    _shared: Option<Lock>,
}

impl Reader {
    pub(crate) fn open(layout: Arc<Layout>) -> Result<Self, RepoError> {
        let shared = lock::shared(&layout)?;
        let index = IndexSet::open(&layout)?;
        Ok(Self { layout, index, open: Mutex::default(), _shared: Some(shared) })
    }

    /// A reader with these index files, for one who holds the shared lock already.
    pub(crate) fn with_index(layout: Arc<Layout>, index: IndexSet) -> Self {
        Self { layout, index, open: Mutex::default(), _shared: None }
    }

    /// The index files that it uses.
    pub fn index(&self) -> &IndexSet {
        &self.index
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Reads a chunk of `raw_len` bytes ([`Digest::ZERO`] gives zeroes), from another copy if the first one is damaged.
    pub fn chunk(&self, digest: &Digest, raw_len: usize) -> Result<Vec<u8>, RepoError> {
        let mut out = vec![0; raw_len];
        if !digest.is_zero() {
            self.read_into(&mut Scratch::new()?, digest, &mut out)?;
        }
        Ok(out)
    }

    /// The chunks of an image that are not zero and touch `extent`, in order.
    pub fn walk(&self, image: Image, extent: Extent) -> impl Iterator<Item = Result<Chunk, BrokenPart>> {
        walk_range(self, image, extent)
    }

    /// The ranges in which two images of one size differ.
    pub fn diff(&self, old: Image, new: Image) -> Result<Vec<Extent>, RepoError> {
        diff(self, old, new)
    }

    /// Reads a blob into `out`, whose length is the expected raw length.
    pub(crate) fn read_into(&self, scratch: &mut Scratch, digest: &Digest, out: &mut [u8]) -> Result<(), RepoError> {
        let mut first_error = None;
        for location in self.index.find_all(digest) {
            match location.and_then(|location| self.read_at(scratch, digest, &location, out)) {
                Ok(()) => return Ok(()),
                Err(error) => first_error.get_or_insert(error),
            };
        }
        Err(first_error.unwrap_or(RepoError::Missing { digest: *digest }))
    }

    /// Reads one copy of a blob.
    pub(crate) fn read_at(
        &self,
        scratch: &mut Scratch,
        digest: &Digest,
        location: &Location,
        out: &mut [u8],
    ) -> Result<(), RepoError> {
        let placed = location.placed;
        let stored = scratch.stored(placed.stored_len as usize);
        self.pread(location.pack, placed.offset_bytes.into(), stored)?;
        let result = match placed.raw_len as usize == out.len() {
            true => {
                decode_blob(&mut scratch.zstd, &scratch.stored[..placed.stored_len as usize], placed.codec, digest, out)
            }
            false => Err(FormatError::bad(format!("it is recorded with {} bytes, not {}", placed.raw_len, out.len()))),
        };
        result.map_err(|e| self.damaged(digest, location, e))
    }

    pub(crate) fn damaged(&self, digest: &Digest, location: &Location, error: FormatError) -> RepoError {
        RepoError::DamagedBlob {
            path: self.layout.pack(location.pack),
            offset_bytes: location.placed.offset_bytes.into(),
            stored_len: location.placed.stored_len,
            digest: *digest,
            reason: error.to_string(),
        }
    }

    /// Reads bytes of a pack.
    pub(crate) fn pread(&self, pack: PackId, offset_bytes: u64, out: &mut [u8]) -> Result<(), RepoError> {
        let file = self.pack_file(pack)?;
        file.read_exact_at(out, offset_bytes).map_err(|e| {
            let path = self.layout.pack(pack);
            match e.kind() {
                std::io::ErrorKind::UnexpectedEof => {
                    FormatError::bad(format!("it ends before byte {}", offset_bytes + out.len() as u64))
                        .at("pack", &path)
                }
                _ => RepoError::io("read the pack", &path)(e),
            }
        })
    }

    fn pack_file(&self, pack: PackId) -> Result<Arc<File>, RepoError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = open.get(&pack) {
            return Ok(file.clone());
        }
        let path = self.layout.pack(pack);
        let file = Arc::new(File::open(&path).map_err(RepoError::io("open the pack", &path))?);
        if open.len() >= MAX_OPEN_PACKS {
            // Any will do: packs are read mostly once, in order.
            let victim = open.keys().next().copied();
            victim.map(|id| open.remove(&id));
        }
        open.insert(pack, file.clone());
        Ok(file)
    }
}

impl NodeSource for Reader {
    fn node(&self, digest: &Digest) -> Result<Node, RepoError> {
        let mut bytes = [0; NODE_BYTES];
        self.read_into(&mut Scratch::new()?, digest, &mut bytes)?;
        Node::decode(&bytes).map_err(|e| RepoError::Refused(e.to_string()))
    }
}

/// A thread's own buffers for reading.
pub(crate) struct Scratch {
    pub(crate) zstd: zstd::bulk::Decompressor<'static>,
    stored: Vec<u8>,
}

impl Scratch {
    pub(crate) fn new() -> Result<Self, RepoError> {
        let zstd = zstd::bulk::Decompressor::new()
            .map_err(|e| RepoError::Refused(format!("zstd cannot be set up to decompress: {e}")))?;
        Ok(Self { zstd, stored: Vec::new() })
    }

    /// A buffer for `len` stored bytes.
    pub(crate) fn stored(&mut self, len: usize) -> &mut [u8] {
        if self.stored.len() < len {
            self.stored.resize(len, 0);
        }
        &mut self.stored[..len]
    }

    /// The buffer as it is, with the decompressor.
    pub(crate) fn split(&mut self) -> (&mut zstd::bulk::Decompressor<'static>, &[u8]) {
        (&mut self.zstd, &self.stored)
    }
}
