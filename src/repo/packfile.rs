//! Pack files: writing one, making it durable, reading its directory and blobs.
//!
//! ```text
//! OpenPack --append…--> OpenPack --seal--> SealedPack --make_durable--> PackRef
//! in journal/<id>/      past the page cache whole, not flushed            under packs/, survives power loss
//! ```

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::direct::{AlignedBytes, DirectFile};
use crate::durable;
use crate::fault;
use crate::repo::blob::{Blob, Codec, Placed};
use crate::repo::digest::Digest;
use crate::repo::error::{FormatError, RepoError};
use crate::repo::index::format::PackRef;
use crate::repo::layout::Layout;
use crate::repo::pack::{self, FOOTER_BYTES, Footer, HEADER_BYTES, MAX_PACK_BLOBS, PackKind, TARGET_PACK_BYTES};
use crate::units::PackId;

/// Small pieces are gathered into writes of this length.
const GATHER_BYTES: usize = 1 << 20;
/// Pieces of this length in all are written from where they are, if they are aligned.
const DIRECT_BYTES: usize = 512 << 10;

/// A pack that is being written.
#[derive(Debug)]
pub struct OpenPack {
    id: PackId,
    kind: PackKind,
    path: PathBuf,
    file: DirectFile,
    /// In the file; aligned.
    written_bytes: u64,
    /// What follows.
    gathered: AlignedBytes,
    blobs: Vec<Blob>,
}

impl OpenPack {
    /// Begins a pack at `path`.
    pub fn create(id: PackId, kind: PackKind, path: PathBuf) -> Result<Self, RepoError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(RepoError::io("create the pack", &path))?;
        let (file, gathered) = (DirectFile::new(file), AlignedBytes::new(GATHER_BYTES));
        let mut this = Self { id, kind, path, file, written_bytes: 0, gathered, blobs: Vec::new() };
        this.gather(&pack::encode_header(kind))?;
        Ok(this)
    }

    fn len_bytes(&self) -> u64 {
        self.written_bytes + self.gathered.len() as u64
    }

    fn io_error(&self) -> impl FnOnce(std::io::Error) -> RepoError {
        RepoError::io("write the pack", &self.path)
    }

    fn gather(&mut self, mut bytes: &[u8]) -> Result<(), RepoError> {
        while !bytes.is_empty() {
            bytes = &bytes[self.gathered.append(bytes)..];
            if self.gathered.room_bytes() == 0 {
                self.write_gathered()?;
            }
        }
        Ok(())
    }

    /// Call it only when what is gathered ends aligned, or is the file's end.
    fn write_gathered(&mut self) -> Result<(), RepoError> {
        self.file.write_all_at(&self.gathered, self.written_bytes).map_err(self.io_error())?;
        self.written_bytes += self.gathered.len() as u64;
        self.gathered.set_len(0);
        Ok(())
    }

    /// Appends blobs: `pieces` are their stored bytes one after the other, cut in any way; `blobs` say for each what it
    /// holds, its stored and raw length, and its codec.
    pub fn append(
        &mut self,
        pieces: &[&[u8]],
        blobs: impl Iterator<Item = (Digest, u32, u32, Codec)>,
    ) -> Result<(), RepoError> {
        let mut offset = self.len_bytes();
        let whole: usize = pieces.iter().map(|piece| piece.len()).sum();
        if whole >= DIRECT_BYTES && self.file.takes(pieces, offset) {
            self.write_gathered()?;
            self.file.write_pieces_at(pieces, offset).map_err(self.io_error())?;
            self.written_bytes += whole as u64;
        } else {
            pieces.iter().try_for_each(|piece| self.gather(piece))?;
        }
        for (digest, stored_len, raw_len, codec) in blobs {
            let placed = Placed { offset_bytes: offset as u32, stored_len, raw_len, codec };
            self.blobs.push(Blob { digest, placed });
            offset += u64::from(stored_len);
        }
        debug_assert_eq!(offset, self.len_bytes());
        Ok(())
    }

    /// Whether it holds as much as a pack should.
    pub fn is_full(&self) -> bool {
        // A batch adds at most 16 chunks.
        self.len_bytes() >= TARGET_PACK_BYTES || self.blobs.len() as u64 + 16 > MAX_PACK_BLOBS
    }

    /// Writes the directory.
    pub fn seal(mut self) -> Result<SealedPack, RepoError> {
        let tail = pack::encode_tail(self.kind, &self.blobs);
        self.gather(&tail)?;
        self.write_gathered()?;
        let pack = PackRef { id: self.id, len_bytes: self.written_bytes, kind: self.kind };
        fault::point("repo.pack-written");
        Ok(SealedPack { pack, path: self.path, file: self.file, blobs: self.blobs })
    }

    /// Drops the pack and its file.
    pub fn discard(self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// A whole pack that is not durable yet.
#[derive(Debug)]
pub struct SealedPack {
    /// What it is.
    pub pack: PackRef,
    /// What it holds.
    pub blobs: Vec<Blob>,
    path: PathBuf,
    file: DirectFile,
}

impl SealedPack {
    /// Flushes the pack, moves it to its place and flushes the directory.
    pub fn make_durable(&self, layout: &Layout) -> Result<(), RepoError> {
        self.file.file().sync_all().map_err(RepoError::io("flush the pack", &self.path))?;
        let target = layout.pack(self.pack.id);
        if let Some(dir) = target.parent() {
            durable::create_dir(dir)?;
            fs::rename(&self.path, &target).map_err(RepoError::io("rename the pack to", &target))?;
            fault::point("repo.pack-renamed");
            durable::sync_dir(dir)?;
        }
        if self.pack.kind == PackKind::Data {
            // Nobody reads it soon. Its memory is better given to the next pack than taken from the page cache of a host
            // whose guests need it. A hint: its failure changes nothing.
            let _ = posix_fadvise(self.file.file(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
        Ok(())
    }

    /// Drops the pack and its file.
    pub fn discard(self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Reads a pack's footer and directory.
pub fn read_directory(path: &Path) -> Result<(PackRef, Vec<Blob>), RepoError> {
    let file = File::open(path).map_err(RepoError::io("open the pack", path))?;
    let len_bytes = file.metadata().map_err(RepoError::io("look at the pack", path))?.len();
    let read = |at: u64, len: usize| {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, at).map(|()| bytes).map_err(RepoError::io("read the pack", path))
    };
    let parse = || -> Result<_, RepoError> {
        let format = |e: FormatError| e.at("pack", path);
        let footer_at = len_bytes
            .checked_sub(FOOTER_BYTES)
            .filter(|at| *at >= HEADER_BYTES)
            .ok_or_else(|| format(FormatError::bad(format!("it has only {len_bytes} bytes"))))?;
        let kind = pack::decode_header(&read(0, 16)?).map_err(format)?;
        let footer = Footer::decode(&read(footer_at, FOOTER_BYTES as usize)?, len_bytes).map_err(format)?;
        if kind != footer.kind {
            return Err(format(FormatError::bad("its header and footer disagree")));
        }
        let directory = read(footer.directory_offset_bytes, footer.directory_len_bytes as usize)?;
        Ok((kind, footer.decode_directory(&directory).map_err(format)?))
    };
    let (kind, blobs) = parse()?;
    let id = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse::<PackId>().ok());
    let id = id.ok_or_else(|| FormatError::bad("its name is not an id").at("pack", path))?;
    Ok((PackRef { id, len_bytes, kind }, blobs))
}

/// Decodes stored bytes into `out` (whose length is the raw length) and compares them with the digest.
pub fn decode_blob(
    zstd: &mut zstd::bulk::Decompressor<'_>,
    stored: &[u8],
    codec: Codec,
    digest: &Digest,
    out: &mut [u8],
) -> Result<(), FormatError> {
    match codec {
        Codec::Raw if stored.len() == out.len() => out.copy_from_slice(stored),
        Codec::Raw => return Err(FormatError::bad("its length is not the recorded one")),
        Codec::Zstd => match zstd.decompress_to_buffer(stored, out) {
            Ok(len) if len == out.len() => {}
            Ok(len) => return Err(FormatError::bad(format!("it decompresses to {len} bytes, not {}", out.len()))),
            Err(error) => return Err(FormatError::bad(format!("it does not decompress: {error}"))),
        },
        Codec::Lz4 => return Err(FormatError::bad("a repository holds no lz4")),
    }
    check_blob(digest, out)
}

/// Compares raw bytes with their digest.
pub fn check_blob(digest: &Digest, raw: &[u8]) -> Result<(), FormatError> {
    match Digest::from_bytes(*blake3::hash(raw).as_bytes()) {
        found if found == *digest => Ok(()),
        found => Err(FormatError::bad(format!("its bytes have the digest {found}"))),
    }
}
