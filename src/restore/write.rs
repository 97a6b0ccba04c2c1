//! Writing: the reader's threads decode, verify and write pieces where they belong, in any order.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::libc;

use crate::direct::DirectFile;
use crate::extent::Extent;
use crate::fault;
use crate::repo::ReadOptions;
use crate::repo::digest::is_zero;
use crate::repo::reader::Unreadable;
use crate::restore::device::Device;
use crate::restore::place::Place;
use crate::restore::plan::Item;
use crate::restore::{Job, RestoreError};

/// Unit in which zeroes inside chunks are looked for: a block of the usual file systems.
const BLOCK_BYTES: usize = 4096;
/// Shortest run of zeroes that becomes a hole: shorter ones would cost the file more extents than they save.
const MIN_HOLE_BYTES: usize = 64 << 10;
/// Write-back is begun in steps of this, so that the flush at the end is short.
const WRITE_BACK_BYTES: u64 = 16 << 20;

/// Writes an item, durably, but for its name.
pub(super) fn write(job: &Job, item: &Item) -> Result<(), RestoreError> {
    job.check_interrupted()?;
    match &item.place {
        Place::New { pending: Some(pending), layout, .. } => {
            let file = pending.file();
            let writer = PieceWriter::new(file).map_err(RestoreError::io("open again", pending.temporary()))?;
            copy(job, item, |offset_bytes, bytes| {
                let at = match layout {
                    Some(layout) => layout.place(&item.chunks, offset_bytes)?,
                    None => offset_bytes,
                };
                data_runs(bytes, |run| writer.write(&bytes[run.clone()], at + run.start as u64))
            })?;
            if let Some(layout) = layout {
                layout.write_tables(file, &item.chunks).map_err(RestoreError::io("write", pending.temporary()))?;
            }
            job.check_interrupted()?;
            file.sync_all().map_err(RestoreError::io("flush", pending.temporary()))
        }
        Place::Device(device) => write_device(job, item, device).map_err(|source| RestoreError::DeviceUndefined {
            disk: item.name.clone(),
            path: device.path().to_owned(),
            source: Box::new(source),
        }),
        Place::New { .. } | Place::Kept(_) => Ok(()),
    }
}

fn write_device(job: &Job, item: &Item, device: &Device) -> Result<(), RestoreError> {
    for gap in item.chunks.gaps() {
        device.zero(gap, || job.check_interrupted())?;
    }
    let writer = PieceWriter::new(device.file()).map_err(RestoreError::io("open again", device.path()))?;
    // Zeroes too: something else was there.
    copy(job, item, |offset_bytes, bytes| writer.write(bytes, offset_bytes))?;
    job.check_interrupted()?;
    device.file().sync_all().map_err(RestoreError::io("flush", device.path()))
}

enum Stop {
    Unreadable(Unreadable),
    Failed(RestoreError),
}

impl From<Unreadable> for Stop {
    fn from(unreadable: Unreadable) -> Self {
        Self::Unreadable(unreadable)
    }
}

/// Hands all data of an item to `put`, in pieces, from several threads.
fn copy(job: &Job, item: &Item, put: impl Fn(u64, &[u8]) -> io::Result<()> + Sync) -> Result<(), RestoreError> {
    let options = ReadOptions { threads: job.threads, range: None };
    let copied = job.reader.read_image(item.image, &options, |offset_bytes, bytes| {
        job.check_interrupted().map_err(Stop::Failed)?;
        put(offset_bytes, bytes).map_err(|source| {
            let extent = Extent::new(offset_bytes, bytes.len() as u64);
            let path = item.place.path().to_owned();
            Stop::Failed(RestoreError::Write { disk: item.name.clone(), path, extent, source })
        })?;
        job.add_done(bytes.len() as u64);
        fault::point("restore.piece");
        Ok(())
    });
    copied.map_err(|stop| match stop {
        Stop::Failed(error) => error,
        Stop::Unreadable(Unreadable { extent, source }) => {
            RestoreError::Unreadable { vm: job.vm.to_owned(), disk: item.name.clone(), extent, source }
        }
    })
}

/// Calls `put` for all but long runs of zeroes.
fn data_runs(bytes: &[u8], mut put: impl FnMut(Range<usize>) -> io::Result<()>) -> io::Result<()> {
    // The run that is open, and how many zeroes are at its end.
    let (mut start, mut zeroes) = (None, 0);
    for (i, block) in bytes.chunks(BLOCK_BYTES).enumerate() {
        let at = i * BLOCK_BYTES;
        if is_zero(block) {
            zeroes += block.len();
            continue;
        }
        start = match start {
            // Zeroes at the beginning are as good as those of a gap before.
            None => Some(at),
            Some(start) if zeroes >= MIN_HOLE_BYTES => {
                put(start..at - zeroes)?;
                Some(at)
            }
            open => open,
        };
        zeroes = 0;
    }
    start.map_or(Ok(()), |start| put(start..bytes.len() - zeroes))
}

/// Writes pieces past the page cache where that is possible; else begins write-back of what was written a while ago.
/// Pieces come nearly in order.
struct PieceWriter {
    file: DirectFile,
    window: AtomicU64,
}

impl PieceWriter {
    fn new(file: &File) -> io::Result<Self> {
        Ok(Self { file: DirectFile::new(file.try_clone()?), window: AtomicU64::new(0) })
    }

    fn write(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()> {
        if !self.file.write_all_at(bytes, offset_bytes)? {
            self.write_back(offset_bytes);
        }
        Ok(())
    }

    fn write_back(&self, offset_bytes: u64) {
        let window = offset_bytes / WRITE_BACK_BYTES;
        let before = self.window.fetch_max(window, Ordering::Relaxed);
        if window > before {
            let (from, len) = (before * WRITE_BACK_BYTES, (window - before) * WRITE_BACK_BYTES);
            // SAFETY: the descriptor is open; the call touches no memory of ours. A hint: its failure changes nothing,
            // the flush at the end tells, and takes what came late.
            unsafe {
                libc::sync_file_range(
                    self.file.file().as_raw_fd(),
                    from as libc::off64_t,
                    len as libc::off64_t,
                    libc::SYNC_FILE_RANGE_WRITE,
                )
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_hold_all_data_and_no_long_zeroes(
            pieces in proptest::collection::vec((any::<bool>(), 1usize..120_000), 0..20),
        ) {
            let bytes: Vec<u8> = pieces.iter().flat_map(|(data, len)| vec![u8::from(*data); *len]).collect();
            let mut copy = vec![0; bytes.len()];
            let mut next = 0;
            data_runs(&bytes, |run| {
                assert!(run.start >= next && run.start < run.end && run.start % BLOCK_BYTES == 0);
                next = run.end;
                copy[run.clone()].copy_from_slice(&bytes[run.clone()]);
                let longest = bytes[run].split(|byte| *byte != 0).map(<[u8]>::len).max();
                assert!(longest.unwrap_or(0) < MIN_HOLE_BYTES + 2 * BLOCK_BYTES);
                Ok(())
            }).unwrap();
            prop_assert!(copy == bytes);
        }
    }
}
