//! Comparing: reads what was written back, from the storage where the kernel lets us, and compares it with the digests of
//! the repository. A qcow2 image is read through imago, which knows nothing of how it was written.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;

use crate::extent::Extent;
use crate::repo::digest::is_zero;
use crate::repo::{Digest, Image};
use crate::restore::place::Place;
use crate::restore::plan::Item;
use crate::restore::{Job, RestoreError};
use crate::units::MIB;

/// Compared at once.
const PIECE_BYTES: u64 = MIB;
/// Pieces that wait for a thread.
const QUEUED_PIECES: usize = 32;

/// Bytes that must have these digests, chunk by chunk; without digests, be zero.
struct Piece {
    extent: Extent,
    digests: Vec<Digest>,
}

/// A restored disk, to be read.
trait Disk: Sync {
    fn read(&self, offset_bytes: u64, out: &mut [u8]) -> io::Result<()>;

    /// The first part of a range that is not known to be zero without reading it.
    fn next_data(&self, extent: Extent) -> io::Result<Option<Extent>>;
}

/// Compares an item that was written.
pub(super) fn compare(job: &Job, item: &Item) -> Result<(), RestoreError> {
    let path = item.place.path();
    match &item.place {
        Place::New { pending: Some(pending), layout, .. } => {
            let file = open_cold(pending.temporary())?;
            match layout {
                Some(_) => {
                    let image =
                        Qcow2Image::open(file).map_err(RestoreError::io("open the image", pending.temporary()))?;
                    if image.access.size() != item.image.size_bytes {
                        let extent = Extent::between(0, item.image.size_bytes);
                        return Err(RestoreError::Differs { disk: item.name.clone(), path: path.to_owned(), extent });
                    }
                    matches(job, &item.name, &item.image, path, &image)
                }
                None => matches(job, &item.name, &item.image, path, &file),
            }
        }
        Place::Device(device) => {
            drop_cache(device.file());
            matches(job, &item.name, &item.image, path, &Whole(device.file()))
        }
        Place::New { .. } | Place::Kept(_) => Ok(()),
    }
}

/// Whether there is a file with just this content.
pub(super) fn file_holds(job: &Job, image: &Image, path: &Path) -> Result<bool, RestoreError> {
    let file = File::open(path).map_err(RestoreError::io("open", path))?;
    let found = file.metadata().map_err(RestoreError::io("look at", path))?;
    if !found.is_file() || found.len() != image.size_bytes {
        return Ok(false);
    }
    // Not a part of the work that was asked for, so it does not count as progress.
    let done = job.done_bytes.load(std::sync::atomic::Ordering::Relaxed);
    let result = matches(job, "file", image, path, &file);
    job.done_bytes.store(done, std::sync::atomic::Ordering::Relaxed);
    match result {
        Err(RestoreError::Differs { .. }) => Ok(false),
        other => other.map(|()| true),
    }
}

fn matches(job: &Job, name: &str, image: &Image, path: &Path, disk: &dyn Disk) -> Result<(), RestoreError> {
    let (sender, receiver) = sync_channel::<Piece>(QUEUED_PIECES);
    let receiver = Mutex::new(receiver);
    let differs = |extent| RestoreError::Differs { disk: name.to_owned(), path: path.to_owned(), extent };
    let check = |piece: &Piece, buffer: &mut Vec<u8>| {
        job.check_interrupted()?;
        buffer.resize(piece.extent.len_bytes as usize, 0);
        disk.read(piece.extent.offset_bytes, buffer).map_err(RestoreError::io("read back", path))?;
        if piece.digests.is_empty() {
            return if is_zero(buffer) { Ok(()) } else { Err(differs(piece.extent)) };
        }
        let chunks = buffer.chunks(image.chunk_bytes as usize);
        for ((chunk, digest), at) in chunks.zip(&piece.digests).zip((0..).step_by(image.chunk_bytes as usize)) {
            if Digest::of(chunk) != *digest {
                return Err(differs(Extent::new(piece.extent.offset_bytes + at, chunk.len() as u64)));
            }
        }
        job.add_done(piece.extent.len_bytes);
        Ok(())
    };
    thread::scope(|scope| {
        let (receiver, check) = (&receiver, &check);
        let work = move || -> Result<(), RestoreError> {
            let mut buffer = Vec::new();
            let result = std::iter::from_fn(|| next(receiver)).try_for_each(|piece| check(&piece, &mut buffer));
            if result.is_err() {
                // Takes the rest, so that the planner is not held up.
                while next(receiver).is_some() {}
            }
            result
        };
        let workers: Vec<_> = (0..job.threads).map(|_| scope.spawn(work)).collect();
        let planned = pieces(job, name, image, path, disk, |piece| sender.send(piece).is_ok());
        drop(sender);
        let mut result = planned;
        for worker in workers {
            let ended = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(ended);
        }
        result
    })
}

fn next(receiver: &Mutex<Receiver<Piece>>) -> Option<Piece> {
    receiver.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

/// All of the image in pieces, but for what is known to be zero.
fn pieces(
    job: &Job,
    name: &str,
    image: &Image,
    path: &Path,
    disk: &dyn Disk,
    mut send: impl FnMut(Piece) -> bool,
) -> Result<(), RestoreError> {
    let mut open = Piece { extent: Extent::new(0, 0), digests: Vec::new() };
    let gap = |from: u64, to: u64, send: &mut dyn FnMut(Piece) -> bool| {
        let mut from = from;
        while from < to {
            let found = disk.next_data(Extent::between(from, to)).map_err(RestoreError::io("read back", path))?;
            let Some(found) = found else { break };
            for extent in found.split_at_multiples(PIECE_BYTES) {
                job.check_interrupted()?;
                send(Piece { extent, digests: Vec::new() });
            }
            from = found.end();
        }
        Ok::<(), RestoreError>(())
    };
    for chunk in job.reader.walk(*image, Extent::new(0, image.size_bytes)) {
        let chunk = chunk.map_err(|broken| {
            let (vm, disk) = (job.vm.to_owned(), name.to_owned());
            RestoreError::Unreadable { vm, disk, extent: broken.extent, source: broken.source }
        })?;
        job.check_interrupted()?;
        let end = open.extent.end();
        if chunk.extent.offset_bytes > end || open.extent.len_bytes + chunk.extent.len_bytes > PIECE_BYTES {
            let full = std::mem::replace(&mut open, Piece { extent: Extent::new(end, 0), digests: Vec::new() });
            if !full.digests.is_empty() && !send(full) {
                return Ok(());
            }
            gap(end, chunk.extent.offset_bytes, &mut send)?;
            open.extent = Extent::new(chunk.extent.offset_bytes, 0);
        }
        open.extent.len_bytes += chunk.extent.len_bytes;
        open.digests.push(chunk.digest);
    }
    let end = open.extent.end();
    if !open.digests.is_empty() {
        send(open);
    }
    gap(end, image.size_bytes, &mut send)
}

fn open_cold(path: &Path) -> Result<File, RestoreError> {
    let file = File::open(path).map_err(RestoreError::io("open", path))?;
    drop_cache(&file);
    Ok(file)
}

/// It was flushed, so its pages are clean and can be dropped. A hint: with the pages still there the comparison is of
/// less worth, but right.
fn drop_cache(file: &File) {
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

/// Raw, with holes.
impl Disk for File {
    fn read(&self, offset_bytes: u64, out: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(out, offset_bytes)
    }

    fn next_data(&self, extent: Extent) -> io::Result<Option<Extent>> {
        let seek = |whence, from: u64| {
            // SAFETY: the descriptor is open; its position is used by nobody.
            match unsafe { libc::lseek(self.as_raw_fd(), from as libc::off_t, whence) } {
                -1 => Err(io::Error::last_os_error()),
                at => Ok(at as u64),
            }
        };
        let data = match seek(libc::SEEK_DATA, extent.offset_bytes) {
            // No data from here on.
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return Ok(Some(extent)),
            found => found?,
        };
        if data >= extent.end() {
            return Ok(None);
        }
        let hole = seek(libc::SEEK_HOLE, data)?.min(extent.end());
        Ok(Some(Extent::between(data, hole)))
    }
}

/// Raw, all to be read.
struct Whole<'a>(&'a File);

impl Disk for Whole<'_> {
    fn read(&self, offset_bytes: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset_bytes)
    }

    fn next_data(&self, extent: Extent) -> io::Result<Option<Extent>> {
        Ok(Some(extent))
    }
}

/// A qcow2 image. Imago's futures never wait for anything but one another's locks: its reads are plain system calls.
struct Qcow2Image {
    access: FormatAccess<imago::file::File>,
    runtime: tokio::runtime::Runtime,
}

impl Qcow2Image {
    fn open(file: File) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let file = imago::file::File::try_from(file)?;
        let qcow2 =
            runtime.block_on(Qcow2::<imago::file::File>::builder(file).open(DenyImplicitOpenGate::default()))?;
        Ok(Self { access: FormatAccess::new(qcow2), runtime })
    }
}

impl Disk for Qcow2Image {
    fn read(&self, offset_bytes: u64, out: &mut [u8]) -> io::Result<()> {
        self.runtime.block_on(self.access.read(out, offset_bytes))
    }

    fn next_data(&self, extent: Extent) -> io::Result<Option<Extent>> {
        let mut at = extent.offset_bytes;
        while at < extent.end() {
            let (mapping, len) = self.runtime.block_on(self.access.get_mapping(at, extent.end() - at))?;
            match mapping {
                Mapping::Zero { .. } if len > 0 => at += len,
                _ => return Ok(Some(Extent::new(at, len.max(1).min(extent.end() - at)))),
            }
        }
        Ok(None)
    }
}
