//! Direct: writing and reading large data past the page cache.
//!
//! What a backup or a restore writes is read by nobody soon, and what a restore reads was written long ago. Through the
//! page cache it would cost a copy, the first touch of a page for every 4 KiB (on virtual hosts the dearest part), and the
//! pages of a host whose guests need them.
//!
//! ```text
//! bytes ── aligned in memory and file? ──yes──► descriptor with O_DIRECT
//!                  │ no, or the file system has none
//!                  └──────────────────────────► the usual descriptor
//! ```
//!
//! The two never write the same page: direct writes cover whole pages only. Neither way is durable before a flush. A
//! direct read sees what was written either way.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::libc;
use nix::sys::uio::pwritev;

/// Direct writes are aligned to this in memory and in the file: a page, and a multiple of any usual device's block.
pub const ALIGN_BYTES: usize = 4096;

/// Shorter reads gain nothing, and may find neighbours that were read ahead.
const DIRECT_READ_BYTES: usize = 64 << 10;

/// Whether a position in memory or in a file is aligned.
fn is_aligned(position: u64) -> bool {
    position.is_multiple_of(ALIGN_BYTES as u64)
}

/// Opens the same file once more, whatever became of its name.
fn open_direct(file: &File, options: &mut OpenOptions) -> Option<File> {
    options.custom_flags(libc::O_DIRECT).open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()
}

/// A file that is read directly where that is possible and worth it.
#[derive(Debug)]
pub struct DirectReader {
    file: File,
    /// Opened by the first large read.
    direct: OnceLock<Option<File>>,
    refused: AtomicBool,
}

impl DirectReader {
    /// Takes a file that is open for reading.
    pub fn new(file: File) -> Self {
        Self { file, direct: OnceLock::new(), refused: AtomicBool::new(false) }
    }

    /// Reads exactly `out`, directly if it is large and aligned in memory, in length and in the file.
    pub fn read_exact_at(&self, out: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let aligned = [out.as_ptr() as u64, out.len() as u64, offset_bytes].into_iter().all(is_aligned);
        let done = if aligned { self.read_direct(out, offset_bytes)? } else { 0 };
        self.file.read_exact_at(&mut out[done..], offset_bytes + done as u64)
    }

    /// Reads `len` bytes into a buffer, with what is around them up to the next page, so that a large read can be a
    /// direct one. Gives the bytes.
    pub fn read_around<'a>(&self, out: &'a mut AlignedBytes, offset_bytes: u64, len: usize) -> io::Result<&'a [u8]> {
        let skip = (offset_bytes % ALIGN_BYTES as u64) as usize;
        out.reserve((skip + len).next_multiple_of(ALIGN_BYTES));
        out.set_len((skip + len).next_multiple_of(ALIGN_BYTES));
        // A file may end before the page does.
        let done = self.read_direct(out, offset_bytes - skip as u64)?.clamp(skip, skip + len);
        self.file.read_exact_at(&mut out[done..skip + len], offset_bytes - skip as u64 + done as u64)?;
        Ok(&out[skip..skip + len])
    }

    /// Reads whole pages directly, as far as the file goes and its file system does so; how far.
    fn read_direct(&self, out: &mut [u8], offset_bytes: u64) -> io::Result<usize> {
        if out.len() < DIRECT_READ_BYTES || self.refused.load(Ordering::Relaxed) {
            return Ok(0);
        }
        let direct = self.direct.get_or_init(|| open_direct(&self.file, OpenOptions::new().read(true)));
        let Some(direct) = direct else { return Ok(0) };
        let mut done = 0;
        while done < out.len() && is_aligned(done as u64) {
            match direct.read_at(&mut out[done..], offset_bytes + done as u64) {
                Ok(0) => break,
                Ok(some) => done += some,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
                    self.refused.store(true, Ordering::Relaxed);
                    break;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }
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
        let direct = open_direct(&file, OpenOptions::new().write(true));
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

/// Bytes that begin aligned in memory. Never longer than the capacity that was asked for.
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

    /// Makes room for so many bytes in all; what it held is lost if it has to move.
    pub fn reserve(&mut self, capacity_bytes: usize) {
        if self.bytes.len() < capacity_bytes + ALIGN_BYTES {
            *self = Self::new(capacity_bytes);
        }
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
    fn every_part_is_read_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..300_001u32).map(|i| (i / 3) as u8).collect();
        std::fs::write(dir.path().join("file"), &bytes).unwrap();
        let reader = || DirectReader::new(File::open(dir.path().join("file")).unwrap());
        for refuses in [false, true] {
            let reader = reader();
            reader.refused.store(refuses, Ordering::Relaxed);
            let mut out = AlignedBytes::new(0);
            for (at, len) in
                [(0, 300_001), (0, 65536), (4096, 200_000), (5, 299_996), (250_000, 50_001), (299_999, 2), (7, 0)]
            {
                assert_eq!(reader.read_around(&mut out, at as u64, len).unwrap(), &bytes[at..at + len], "{at}+{len}");
            }
            for (at, len) in [(4096, 131_072), (4096, 131_073), (1, 131_072), (0, 300_001)] {
                out.reserve(len);
                out.set_len(len);
                reader.read_exact_at(&mut out, at as u64).unwrap();
                assert!(out[..] == bytes[at..at + len], "{at}+{len}");
            }
            let past = reader.read_around(&mut out, 200_000, 100_002).unwrap_err();
            assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
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
