//! Workers: zero check, hash, look-up, compression. What comes compressed is unpacked into a buffer of the thread, to be
//! hashed, and stored as it came.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;

use crate::codec::{self, Codec, Packed, Unpacker, packed_room};
use crate::extent::Extent;
use crate::limits::MAX_READ_BYTES;
use crate::repo::digest::Digest;
use crate::repo::error::RepoError;
use crate::repo::writer::append::Append;
use crate::repo::writer::shared::{Shared, lock};
use crate::repo::writer::{Compression, DiskHandle};

pub(super) enum What {
    Data(Bytes),
    /// Compressed chunks, one piece each.
    Packed(Packed),
    Zero,
    /// Chunks that are durable, by their digests; without digests, zeroes.
    Known(Option<Vec<Digest>>),
    /// Seal the open pack.
    Flush,
}

pub(super) struct Job {
    pub number: u64,
    pub disk: DiskHandle,
    pub extent: Extent,
    pub chunk_bytes: u32,
    pub what: What,
    pub permit: OwnedSemaphorePermit,
}

/// What is to be done with a chunk.
#[derive(Clone, Copy)]
pub(super) enum Place {
    Zero,
    /// An index file has it.
    Indexed,
    /// An earlier chunk of this writer has it.
    Claimed,
    /// To be stored: where these bytes are, and how they are written.
    New {
        from: From,
        at: usize,
        len: usize,
        codec: Codec,
    },
}

/// Whose bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum From {
    /// The job's.
    Given,
    /// Those that a worker has made of them.
    Made,
}

pub(super) struct Chunk {
    pub digest: Digest,
    pub raw_len: usize,
    pub place: Place,
}

pub(super) enum Outcome {
    Data {
        chunks: Vec<Chunk>,
        /// The job's bytes, if some chunk is stored as it came.
        given: Bytes,
        made: Vec<u8>,
    },
    Zero,
    Known(Option<Vec<Digest>>),
    Flush,
}

pub(super) struct Done {
    pub number: u64,
    pub disk: DiskHandle,
    pub extent: Extent,
    pub chunk_bytes: u32,
    pub outcome: Outcome,
    pub permit: OwnedSemaphorePermit,
}

/// Where jobs wait. Each wakes one worker, and none where all are at work.
#[derive(Default)]
pub(super) struct Jobs {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    waiting: usize,
    closed: bool,
}

impl Jobs {
    pub fn push(&self, job: Job) {
        let mut queue = lock(&self.queue);
        queue.jobs.push_back(job);
        let wake = queue.waiting > 0;
        drop(queue);
        if wake {
            self.changed.notify_one();
        }
    }

    /// No more jobs will come.
    pub fn close(&self) {
        lock(&self.queue).closed = true;
        self.changed.notify_all();
    }

    /// The next job; nothing when there will be none.
    fn next(&self) -> Option<Job> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue.waiting += 1;
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.waiting -= 1;
        }
    }
}

pub(super) fn run(shared: &Shared, jobs: &Jobs, append: &Append) -> Result<(), RepoError> {
    let mut packer = Packer::new(shared.options.compression)?;
    let mut unpacker = None;
    while let Some(Job { number, disk, extent, chunk_bytes, what, permit }) = jobs.next() {
        if shared.is_stopped() {
            continue;
        }
        let outcome = match what {
            What::Data(bytes) => data(shared, &mut packer, number, chunk_bytes as usize, bytes)?,
            What::Packed(chunks) => {
                let unpacker = match &mut unpacker {
                    Some(unpacker) => unpacker,
                    None => unpacker.insert(Unpacking::new()?),
                };
                let bad = |(at, reason)| {
                    let offset_bytes = extent.offset_bytes + at as u64;
                    RepoError::BadPiece { disk: disk.0.into(), offset_bytes, reason }
                };
                let plain = unpacker.unpack(&chunks, chunk_bytes as usize).map_err(bad)?;
                packed(shared, &mut packer, number, chunk_bytes as usize, chunks, plain)?
            }
            What::Zero => Outcome::Zero,
            What::Known(digests) => Outcome::Known(digests),
            What::Flush => Outcome::Flush,
        };
        append.take(shared, Done { number, disk, extent, chunk_bytes, outcome, permit });
    }
    Ok(())
}

fn data(
    shared: &Shared,
    packer: &mut Packer,
    number: u64,
    chunk_bytes: usize,
    bytes: Bytes,
) -> Result<Outcome, RepoError> {
    let mut chunks = Vec::with_capacity(bytes.len().div_ceil(chunk_bytes));
    packer.begin(shared, bytes.len());
    for (i, raw) in bytes.chunks(chunk_bytes).enumerate() {
        let as_it_is = Place::New { from: From::Given, at: i * chunk_bytes, len: raw.len(), codec: Codec::Raw };
        chunks.push(chunk(shared, number, i, raw, || packer.pack(raw).unwrap_or(as_it_is))?);
    }
    Ok(outcome(chunks, bytes, packer))
}

/// `plain` is what is packed.
fn packed(
    shared: &Shared,
    packer: &mut Packer,
    number: u64,
    chunk_bytes: usize,
    packed: Packed,
    plain: &[u8],
) -> Result<Outcome, RepoError> {
    let mut chunks = Vec::with_capacity(packed.pieces().len());
    packer.begin(shared, plain.len());
    let mut at = 0;
    for (i, (piece, raw)) in packed.pieces().iter().zip(plain.chunks(chunk_bytes)).enumerate() {
        let len = piece.len as usize;
        let as_it_came = Place::New { from: From::Given, at, len, codec: piece.codec };
        at += len;
        let place = || match piece.codec {
            Codec::Raw => as_it_came,
            Codec::Zstd if packer.compresses() => as_it_came,
            // What the repository does not hold, or is not to hold here, is made anew.
            Codec::Zstd | Codec::Lz4 => packer.pack(raw).unwrap_or_else(|| packer.keep(raw)),
        };
        chunks.push(chunk(shared, number, i, raw, place)?);
    }
    Ok(outcome(chunks, packed.bytes().clone(), packer))
}

/// Chunk `i` of a put; `place` is asked where it is new.
fn chunk(
    shared: &Shared,
    number: u64,
    i: usize,
    raw: &[u8],
    place: impl FnOnce() -> Place,
) -> Result<Chunk, RepoError> {
    let digest = Digest::of(raw);
    // A put has at most 16 chunks.
    let order = number << 4 | i as u64;
    let place = if digest.is_zero() {
        Place::Zero
    } else if shared.claims.is_claimed(&digest, order) {
        Place::Claimed
    } else if shared.index().find(&digest)?.is_some() {
        Place::Indexed
    } else if !shared.claims.claim(digest, order) {
        Place::Claimed
    } else {
        place()
    };
    Ok(Chunk { digest, raw_len: raw.len(), place })
}

fn outcome(chunks: Vec<Chunk>, bytes: Bytes, packer: &mut Packer) -> Outcome {
    let keep = chunks.iter().any(|chunk| matches!(chunk.place, Place::New { from: From::Given, .. }));
    let given = if keep { bytes } else { Bytes::new() };
    let made = if packer.used > 0 { std::mem::take(&mut packer.buffer) } else { Vec::new() };
    Outcome::Data { chunks, given, made }
}

/// A thread's own decompressor and its buffer.
struct Unpacking {
    unpacker: Unpacker,
    buffer: Vec<u8>,
}

impl Unpacking {
    fn new() -> Result<Self, RepoError> {
        let unpacker =
            Unpacker::new().map_err(|e| RepoError::Refused(format!("zstd cannot be set up to decompress: {e}")))?;
        Ok(Self { unpacker, buffer: vec![0; MAX_READ_BYTES as usize] })
    }

    /// What is packed, in chunks; else which byte it fails at, and why.
    fn unpack(&mut self, packed: &Packed, chunk_bytes: usize) -> Result<&[u8], (usize, String)> {
        let plain = &mut self.buffer[..packed.raw_len() as usize];
        let mut at = 0;
        for (i, (piece, out)) in packed.pieces().iter().zip(plain.chunks_mut(chunk_bytes)).enumerate() {
            let end = at + piece.len as usize;
            let unpacked = self.unpacker.unpack(piece.codec, &packed.bytes()[at..end], out);
            unpacked.map_err(|reason| (i * chunk_bytes, reason))?;
            at = end;
        }
        Ok(plain)
    }
}

/// A thread's own compressor, and a buffer for what it makes, which goes to the appender and comes back by way of the others.
struct Packer {
    zstd: Option<codec::Packer>,
    buffer: Vec<u8>,
    used: usize,
}

impl Packer {
    fn new(compression: Compression) -> Result<Self, RepoError> {
        let buffer = Vec::new();
        let Compression::Zstd(level) = compression else { return Ok(Self { zstd: None, buffer, used: 0 }) };
        let zstd = codec::Packer::new(level)
            .map_err(|e| RepoError::Refused(format!("zstd cannot be set up with level {level}: {e}")))?;
        Ok(Self { zstd: Some(zstd), buffer, used: 0 })
    }

    /// Makes room for a put: what is made is no longer than what was put.
    fn begin(&mut self, shared: &Shared, put_bytes: usize) {
        self.used = 0;
        if self.buffer.len() < put_bytes {
            self.buffer = shared.buffer(put_bytes);
        }
    }

    fn compresses(&self) -> bool {
        self.zstd.is_some()
    }

    /// Compresses a chunk; `None` when it is to be stored as it is.
    fn pack(&mut self, raw: &[u8]) -> Option<Place> {
        let at = self.used;
        let len = self.zstd.as_mut()?.pack(Codec::Zstd, raw, &mut self.buffer[at..at + packed_room(raw.len())])?;
        self.used += len;
        Some(Place::New { from: From::Made, at, len, codec: Codec::Zstd })
    }

    /// Keeps a chunk as it is.
    fn keep(&mut self, raw: &[u8]) -> Place {
        let at = self.used;
        self.used += raw.len();
        self.buffer[at..self.used].copy_from_slice(raw);
        Place::New { from: From::Made, at, len: raw.len(), codec: Codec::Raw }
    }
}
