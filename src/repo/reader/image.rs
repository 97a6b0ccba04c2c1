//! Reading whole images fast.
//!
//! The caller's thread walks the tree and looks places up; it groups chunks that follow each other on the disk into
//! batches of up to 1 MiB. Workers take batches, read neighbours in a pack with one read (raw chunks straight into the
//! output), decompress, compare digests and hand the bytes out.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::direct::AlignedBytes;
use crate::extent::Extent;
use crate::repo::blob::Codec;
use crate::repo::error::RepoError;
use crate::repo::index::set::Location;
use crate::repo::packfile::{check_blob, decode_blob};
use crate::repo::reader::{Reader, Scratch};
use crate::repo::tree::Image;
use crate::repo::tree::walk::Chunk;
use crate::units::MIB;

/// Bytes of a disk in one batch, at most.
const BATCH_BYTES: u64 = MIB;
/// Batches that wait for a worker, at most.
const QUEUED_BATCHES: usize = 32;
/// Batches that are done and wait for an earlier one, at most, when order is kept.
const ORDERED_BATCHES: usize = 16;

/// How an image is read.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReadOptions {
    /// Worker threads; 0 means one a processor.
    pub threads: usize,
    /// Which bytes, rounded out to chunks; all when `None`.
    pub range: Option<Extent>,
}

/// A part of an image that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{extent} cannot be read: {source}")]
pub struct Unreadable {
    /// Its bytes on the disk.
    pub extent: Extent,
    /// Why.
    pub source: Box<RepoError>,
}

impl Unreadable {
    fn at(extent: Extent) -> impl FnOnce(RepoError) -> Self {
        move |source| Self { extent, source: Box::new(source) }
    }
}

impl From<Unreadable> for RepoError {
    /// For callers who need not know where.
    fn from(unreadable: Unreadable) -> Self {
        *unreadable.source
    }
}

/// The processors that this process may use.
pub(crate) fn processors() -> usize {
    thread::available_parallelism().map_or(2, usize::from)
}

struct Batch {
    number: u64,
    extent: Extent,
    chunks: Vec<(Chunk, Location)>,
}

impl Reader {
    /// Reads all of an image that is not zero: `sink(offset_bytes, bytes)` is called for pieces of up to 1 MiB, each in
    /// whole chunks (but for the disk's end), in any order, from several threads at once. What is not handed out is zero.
    /// Ends with the first error, of a read or of the sink. Holds about 2 MiB a thread.
    pub fn read_image<E: Send + From<Unreadable>>(
        &self,
        image: Image,
        options: &ReadOptions,
        sink: impl Fn(u64, &[u8]) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        self.run(image, options, |batch, bytes| sink(batch.extent.offset_bytes, bytes))
    }

    /// As [`Reader::read_image`], but in the order of the disk and on the caller's thread. Holds about 20 MiB.
    pub fn read_image_in_order<E: Send + From<Unreadable>>(
        &self,
        image: Image,
        options: &ReadOptions,
        mut sink: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        // Workers wait while they are too far ahead, so the number that is waited for is always being worked on.
        let window = Window::new();
        let whole = Extent::new(0, image.size_bytes);
        thread::scope(|scope| {
            let (sender, receiver) = sync_channel::<(u64, u64, Vec<u8>)>(1);
            let window = &window;
            let reading = scope.spawn(move || {
                self.run::<Stop<E>>(image, options, |batch, bytes| {
                    window.wait_for(batch.number).then_some(()).ok_or(Stop::Closed)?;
                    sender.send((batch.number, batch.extent.offset_bytes, bytes.to_vec())).map_err(|_| Stop::Closed)
                })
            });
            let given = hand_out(receiver, window, &mut sink);
            window.close();
            match (given, reading.join()) {
                (Err(error), _) => Err(error),
                (Ok(()), Ok(Err(Stop::Failed(error)))) => Err(error),
                (Ok(()), Ok(_)) => Ok(()),
                (Ok(()), Err(_)) => {
                    Err(Unreadable::at(whole)(RepoError::Refused("a reading thread panicked".to_owned())).into())
                }
            }
        })
    }

    fn run<E: Send + From<Unreadable>>(
        &self,
        image: Image,
        options: &ReadOptions,
        sink: impl Fn(&Batch, &[u8]) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        let whole = Extent::new(0, image.size_bytes);
        image.check().map_err(|e| Unreadable::at(whole)(RepoError::Refused(e.to_string())))?;
        let threads = if options.threads == 0 { processors() } else { options.threads };
        let failure = Mutex::new(None);
        let failed = AtomicBool::new(false);
        let longest = BATCH_BYTES.max(image.chunk_bytes.into()) as usize;
        let fail = |error: E| {
            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            failed.store(true, Ordering::Relaxed);
        };
        let (sender, receiver) = sync_channel::<Batch>(QUEUED_BATCHES);
        let receiver = Mutex::new(receiver);
        thread::scope(|scope| {
            let (receiver, fail, failed, sink) = (&receiver, &fail, &failed, &sink);
            for _ in 0..threads {
                scope.spawn(move || {
                    let work = || -> Result<(), E> {
                        let mut scratch = Scratch::new().map_err(Unreadable::at(whole))?;
                        // Aligned, so that whoever takes it can write it past the page cache.
                        let mut out = AlignedBytes::new(longest);
                        while let Ok(batch) = next(receiver) {
                            if failed.load(Ordering::Relaxed) {
                                continue;
                            }
                            self.read_batch(&mut scratch, &batch, &mut out)?;
                            sink(&batch, &out)?;
                        }
                        Ok(())
                    };
                    if let Err(error) = work() {
                        fail(error);
                        // Takes the rest, so that the planner is not held up.
                        while next(receiver).is_ok() {}
                    }
                });
            }
            let plan = || -> Result<(), Unreadable> {
                let mut number = 0;
                let mut batch = Batch { number, extent: Extent::new(0, 0), chunks: Vec::new() };
                for chunk in self.walk(image, options.range.unwrap_or(whole)) {
                    let chunk = chunk.map_err(|broken| Unreadable { extent: broken.extent, source: broken.source })?;
                    let location = self.index().find(&chunk.digest);
                    let location = location.and_then(|l| l.ok_or(RepoError::Missing { digest: chunk.digest }));
                    let location = location.map_err(Unreadable::at(chunk.extent))?;
                    let joins = batch.extent.end() == chunk.extent.offset_bytes
                        && batch.extent.len_bytes + chunk.extent.len_bytes <= BATCH_BYTES;
                    if joins && !batch.chunks.is_empty() {
                        batch.extent.len_bytes += chunk.extent.len_bytes;
                        batch.chunks.push((chunk, location));
                        continue;
                    }
                    let new = Batch { number, extent: chunk.extent, chunks: vec![(chunk, location)] };
                    let full = std::mem::replace(&mut batch, new);
                    if !full.chunks.is_empty() {
                        number += 1;
                        batch.number = number;
                        if failed.load(Ordering::Relaxed) || sender.send(full).is_err() {
                            return Ok(());
                        }
                    }
                }
                if !batch.chunks.is_empty() {
                    // The receiver lives as long as this scope.
                    let _ = sender.send(batch);
                }
                Ok(())
            };
            if let Err(error) = plan() {
                fail(error.into());
            }
            drop(sender);
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn read_batch(&self, scratch: &mut Scratch, batch: &Batch, out: &mut AlignedBytes) -> Result<(), Unreadable> {
        out.set_len(batch.extent.len_bytes as usize);
        let at = |chunk: &Chunk| {
            let from = (chunk.extent.offset_bytes - batch.extent.offset_bytes) as usize;
            from..from + chunk.extent.len_bytes as usize
        };
        let fits = |(chunk, location): &(Chunk, Location)| u64::from(location.placed.raw_len) == chunk.extent.len_bytes;
        let neighbours = |a: &(Chunk, Location), b: &(Chunk, Location)| {
            a.1.pack == b.1.pack
                && a.1.placed.end() == u64::from(b.1.placed.offset_bytes)
                && (a.1.placed.codec == Codec::Raw) == (b.1.placed.codec == Codec::Raw)
                && fits(a)
                && fits(b)
        };
        for run in batch.chunks.chunk_by(neighbours) {
            let read = match run {
                run if run.iter().all(|piece| fits(piece) && piece.1.placed.codec == Codec::Raw) => {
                    let all = at(&run[0].0).start..at(&run[run.len() - 1].0).end;
                    self.read_raw_run(run, &mut out[all])
                }
                run => self.read_packed_run(scratch, run, &at, out),
            };
            if read.is_err() {
                // Each by itself, with other copies of what is damaged.
                for (chunk, _) in run {
                    self.read_into(scratch, &chunk.digest, &mut out[at(chunk)])
                        .map_err(Unreadable::at(chunk.extent))?;
                }
            }
        }
        Ok(())
    }

    fn read_raw_run(&self, run: &[(Chunk, Location)], out: &mut [u8]) -> Result<(), RepoError> {
        let first = run[0].1;
        self.pread(first.pack, first.placed.offset_bytes.into(), out)?;
        let mut rest = &*out;
        for (chunk, location) in run {
            let (bytes, behind) = rest.split_at(chunk.extent.len_bytes as usize);
            check_blob(&chunk.digest, bytes).map_err(|e| self.damaged(&chunk.digest, location, e))?;
            rest = behind;
        }
        Ok(())
    }

    fn read_packed_run(
        &self,
        scratch: &mut Scratch,
        run: &[(Chunk, Location)],
        at: &dyn Fn(&Chunk) -> Range<usize>,
        out: &mut [u8],
    ) -> Result<(), RepoError> {
        let first = run[0].1;
        let begin = u64::from(first.placed.offset_bytes);
        let len = run[run.len() - 1].1.placed.end() - begin;
        let (zstd, stored) = self.load(scratch, first.pack, begin, len as usize)?;
        for (chunk, location) in run {
            let from = (u64::from(location.placed.offset_bytes) - begin) as usize;
            let stored = &stored[from..from + location.placed.stored_len as usize];
            decode_blob(zstd, stored, location.placed.codec, &chunk.digest, &mut out[at(chunk)])
                .map_err(|e| self.damaged(&chunk.digest, location, e))?;
        }
        Ok(())
    }
}

fn next(receiver: &Mutex<Receiver<Batch>>) -> Result<Batch, ()> {
    receiver.lock().unwrap_or_else(PoisonError::into_inner).recv().map_err(drop)
}

enum Stop<E> {
    Failed(E),
    Closed,
}

impl<E: From<Unreadable>> From<Unreadable> for Stop<E> {
    fn from(error: Unreadable) -> Self {
        Self::Failed(error.into())
    }
}

/// How far workers may run ahead of what was handed out.
struct Window {
    /// The number that is handed out next; `None` once nothing is wanted any more.
    next: Mutex<Option<u64>>,
    moved: Condvar,
}

impl Window {
    fn new() -> Self {
        Self { next: Mutex::new(Some(0)), moved: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Option<u64>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `number` is near enough; `false` when nothing is wanted any more.
    fn wait_for(&self, number: u64) -> bool {
        let far = |next: &mut Option<u64>| next.is_some_and(|next| number >= next + ORDERED_BATCHES as u64);
        let next = self.moved.wait_while(self.lock(), far).unwrap_or_else(PoisonError::into_inner);
        next.is_some()
    }

    fn advance(&self, to: u64) {
        if let Some(next) = self.lock().as_mut() {
            *next = to;
        }
        self.moved.notify_all();
    }

    fn close(&self) {
        *self.lock() = None;
        self.moved.notify_all();
    }
}

fn hand_out<E>(
    receiver: Receiver<(u64, u64, Vec<u8>)>,
    window: &Window,
    sink: &mut impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut waiting = BTreeMap::new();
    let mut next = 0;
    for (number, offset_bytes, bytes) in receiver {
        waiting.insert(number, (offset_bytes, bytes));
        while let Some((offset_bytes, bytes)) = waiting.remove(&next) {
            sink(offset_bytes, &bytes)?;
            next += 1;
            window.advance(next);
        }
    }
    Ok(())
}
