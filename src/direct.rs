//! Direct: writing large data past the page cache.
//!
//! What a backup or a restore writes is read by nobody soon. Through the page cache it would cost a copy, the first touch
//! of a page for every 4 KiB (on virtual hosts the dearest part), and the pages of a host whose guests need them.
//!
//! ```text
//! bytes ── aligned in memory and file? ──yes──► descriptor with O_DIRECT
//!                  │ no, or the file system takes none
//!                  └──────────────────────────► the usual descriptor
//! ```
//!
//! The two never touch the same page: direct writes cover whole pages only. Neither way is durable before a flush.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::libc;
use nix::sys::uio::pwritev;

/// Direct writes are aligned to this in memory and in the file: a page, and a multiple of any usual device's block.
pub const ALIGN_BYTES: usize = 4096;

/// Whether a position in memory or in a file is aligned.
fn is_aligned(position: u64) -> bool {
    position.is_multiple_of(ALIGN_BYTES as u64)
}

/// A file that is written directly where that is possible.
#[derive(Debug)]
pub struct DirectFile {
    file: File,
    direct: Option<File>,
    refused: AtomicBool,
}

impl DirectFile {
    /// Takes an open regular file or block device. Where the kernel opens it no second time for direct writes, everything
    /// goes the usual way.
    pub fn new(file: File) -> Self {
        // The same file, whatever became of its name.
        let again = format!("/proc/self/fd/{}", file.as_raw_fd());
        let direct = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(again).ok();
        Self { file, direct, refused: AtomicBool::new(false) }
    }

    /// The usual descriptor: for reading, for small writes, and to flush.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The descriptor for a direct write, unless the file system has refused one.
    fn direct(&self) -> Option<&File> {
        self.direct.as_ref().filter(|_| !self.refused.load(Ordering::Relaxed))
    }

    /// Writes all of `bytes`: the whole pages directly, if they begin aligned in memory and in the file. `true` when
    /// nothing of it went into the page cache.
    pub fn write_all_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<bool> {
        let mut written = 0;
        if is_aligned(offset_bytes) && is_aligned(bytes.as_ptr() as u64) {
            written = self.write_direct(&[&bytes[..bytes.len() / ALIGN_BYTES * ALIGN_BYTES]], offset_bytes)?;
        }
        self.file.write_all_at(&bytes[written..], offset_bytes + written as u64)?;
        Ok(written == bytes.len())
    }

    /// Whether [`DirectFile::write_pieces_at`] would write all of these directly.
    pub fn takes(&self, pieces: &[&[u8]], offset_bytes: u64) -> bool {
        let fits = |piece: &&[u8]| is_aligned(piece.as_ptr() as u64) && is_aligned(piece.len() as u64);
        self.direct().is_some() && is_aligned(offset_bytes) && pieces.iter().all(fits)
    }

    /// Writes pieces one after the other; directly, if all of them are aligned in memory and in length, and the place is.
    pub fn write_pieces_at(&self, pieces: &[&[u8]], offset_bytes: u64) -> io::Result<()> {
        let mut written = match self.takes(pieces, offset_bytes) {
            true => self.write_direct(pieces, offset_bytes)?,
            false => 0,
        };
        let mut at = offset_bytes;
        for piece in pieces {
            let skip = written.min(piece.len());
            self.file.write_all_at(&piece[skip..], at + skip as u64)?;
            written -= skip;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Writes aligned pieces directly, as far as the file system does so; how far.
    fn write_direct(&self, pieces: &[&[u8]], offset_bytes: u64) -> io::Result<usize> {
        let Some(direct) = self.direct() else { return Ok(0) };
        let mut slices: Vec<_> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        let mut rest = &mut slices[..];
        IoSlice::advance_slices(&mut rest, 0);
        let mut written = 0;
        while !rest.is_empty() {
            match pwritev(direct, rest, (offset_bytes + written as u64) as libc::off_t) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                // A write that was cut between two pages is ended in the usual way.
                Ok(some) if !is_aligned(some as u64) => return Ok(written + some),
                Ok(some) => {
                    written += some;
                    IoSlice::advance_slices(&mut rest, some);
                }
                Err(Errno::EINTR) => {}
                // It wants another alignment, or has no direct writes.
                Err(Errno::EINVAL | Errno::EOPNOTSUPP) => {
                    self.refused.store(true, Ordering::Relaxed);
                    return Ok(written);
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(written)
    }
}

/// Bytes that begin aligned in memory. Never longer than the capacity that it was made with.
#[derive(Debug)]
pub struct AlignedBytes {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBytes {
    /// Room for so many bytes, none of them in use.
    pub fn new(capacity_bytes: usize) -> Self {
        let bytes = vec![0; capacity_bytes + ALIGN_BYTES];
        let start = bytes.as_ptr().align_offset(ALIGN_BYTES);
        // The memory of a vector stays where it is as long as it is not made longer.
        Self { bytes, start: start.min(ALIGN_BYTES), len: 0 }
    }

    /// How many more bytes fit.
    pub fn room_bytes(&self) -> usize {
        self.bytes.len() - ALIGN_BYTES - self.len
    }

    /// Appends as much of `bytes` as fits; how much.
    pub fn append(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.room_bytes());
        let from = self.start + self.len;
        self.bytes[from..from + taken].copy_from_slice(&bytes[..taken]);
        self.len += taken;
        taken
    }

    /// Uses the first `len` bytes (no more than the capacity), whatever they hold.
    pub fn set_len(&mut self, len: usize) {
        self.len = len.min(self.bytes.len() - ALIGN_BYTES);
    }
}

impl std::ops::Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn opened(dir: &std::path::Path) -> DirectFile {
        let path = dir.join("file");
        DirectFile::new(OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn whatever_is_written_is_there(
            writes in prop::collection::vec((0u64..20, 0usize..3, 0usize..40_000, any::<u8>(), any::<bool>()), 1..12),
            refuses in any::<bool>(),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let file = opened(dir.path());
            file.refused.store(refuses, Ordering::Relaxed);
            let mut model = vec![];
            for (page, skew, len, fill, pieces) in writes {
                let mut bytes = AlignedBytes::new(len + skew);
                bytes.set_len(len + skew);
                bytes.iter_mut().enumerate().for_each(|(i, b)| *b = fill.wrapping_add((i / 7) as u8));
                let bytes = &bytes[skew..];
                let offset = page * ALIGN_BYTES as u64 + (skew as u64 % 2);
                if pieces {
                    let cut = bytes.len() / 2 / ALIGN_BYTES * ALIGN_BYTES;
                    file.write_pieces_at(&[&bytes[..cut], &bytes[cut..]], offset).unwrap();
                } else {
                    file.write_all_at(bytes, offset).unwrap();
                }
                let end = offset as usize + bytes.len();
                if !bytes.is_empty() && model.len() < end {
                    model.resize(end, 0);
                }
                if !bytes.is_empty() {
                    model[offset as usize..end].copy_from_slice(bytes);
                }
            }
            let mut found = vec![0; model.len()];
            file.file().read_exact_at(&mut found, 0).unwrap();
            prop_assert!(found == model);
            prop_assert_eq!(file.file().metadata().unwrap().len(), model.len() as u64);
        }
    }

    #[test]
    fn room_is_bounded() {
        let mut bytes = AlignedBytes::new(10);
        assert_eq!((bytes.append(&[1; 7]), bytes.append(&[2; 7])), (7, 3));
        assert_eq!(*bytes, [1, 1, 1, 1, 1, 1, 1, 2, 2, 2]);
        assert_eq!(bytes.room_bytes(), 0);
        bytes.set_len(99);
        assert_eq!(bytes.len(), 10);
    }
}
