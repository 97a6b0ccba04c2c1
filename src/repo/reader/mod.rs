//! Reader: from digests to verified bytes, and from images to disks.
//!
//! [`Reader::chunk`] reads one; [`Reader::read_image`] reads a disk as fast as the machine can, on all cores, handing the
//! pieces out on its worker threads, in any order; [`Reader::read_image_in_order`] does so on the caller's thread, in the
//! order of the disk.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};

use crate::direct::{AlignedBytes, DirectReader};
use crate::extent::Extent;
use crate::repo::digest::Digest;
use crate::repo::error::{FormatError, RepoError};
use crate::repo::index::set::{IndexSet, Location};
use crate::repo::layout::Layout;
use crate::repo::lock::{self, Lock};
use crate::repo::packfile::decode_blob;
use crate::repo::tree::diff::diff;
use crate::repo::tree::walk::{BrokenPart, Chunk, walk_range};
use crate::repo::tree::{Image, Node, NodeSource};
use crate::units::PackId;

mod each;
pub(crate) mod image;

pub use image::{ReadOptions, Unreadable};

/// Most pack files that are open at once.
const MAX_OPEN_PACKS: usize = 128;

/// Reads a repository as it was when the reader was made.
#[derive(Debug)]
pub struct Reader {
    layout: Arc<Layout>,
    index: IndexSet,
    open: Mutex<HashMap<PackId, Arc<DirectReader>>>,
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
        let (zstd, stored) =
            self.load(scratch, location.pack, placed.offset_bytes.into(), placed.stored_len as usize)?;
        let result = match placed.raw_len as usize == out.len() {
            true => decode_blob(zstd, stored, placed.codec, digest, out),
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
        let end = offset_bytes + out.len() as u64;
        self.pack_file(pack)?.read_exact_at(out, offset_bytes).map_err(|e| self.unread(pack, end, e))
    }

    /// Reads bytes of a pack into a thread's own buffer; gives them, with the thread's decompressor.
    pub(crate) fn load<'a>(
        &self,
        scratch: &'a mut Scratch,
        pack: PackId,
        offset_bytes: u64,
        len: usize,
    ) -> Result<(&'a mut zstd::bulk::Decompressor<'static>, &'a [u8]), RepoError> {
        let Scratch { zstd, stored } = scratch;
        let stored = self.pack_file(pack)?.read_around(stored, offset_bytes, len);
        Ok((zstd, stored.map_err(|e| self.unread(pack, offset_bytes + len as u64, e))?))
    }

    fn unread(&self, pack: PackId, end_bytes: u64, error: std::io::Error) -> RepoError {
        let path = self.layout.pack(pack);
        match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                FormatError::bad(format!("it ends before byte {end_bytes}")).at("pack", &path)
            }
            _ => RepoError::io("read the pack", &path)(error),
        }
    }

    fn pack_file(&self, pack: PackId) -> Result<Arc<DirectReader>, RepoError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = open.get(&pack) {
            return Ok(file.clone());
        }
        let path = self.layout.pack(pack);
        let file = File::open(&path).map_err(RepoError::io("open the pack", &path))?;
        let file = Arc::new(DirectReader::new(file));
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
        self.read_node(&mut Scratch::new()?, digest)
    }
}

/// A thread's own buffers for reading.
pub(crate) struct Scratch {
    pub(crate) zstd: zstd::bulk::Decompressor<'static>,
    stored: AlignedBytes,
}

impl Scratch {
    pub(crate) fn new() -> Result<Self, RepoError> {
        let zstd = zstd::bulk::Decompressor::new()
            .map_err(|e| RepoError::Refused(format!("zstd cannot be set up to decompress: {e}")))?;
        Ok(Self { zstd, stored: AlignedBytes::new(0) })
    }
}
