//! Workers: zero check, hash, look-up, compression.

use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;

use crate::extent::Extent;
use crate::limits::MAX_READ_BYTES;
use crate::repo::digest::Digest;
use crate::repo::error::RepoError;
use crate::repo::writer::shared::Shared;
use crate::repo::writer::{Compression, DiskHandle};

pub(super) enum What {
    Data(Bytes),
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
    /// To be stored as it is: where in the job's bytes.
    Raw {
        at: usize,
    },
    /// To be stored compressed: where in the result's packed bytes.
    Zstd {
        at: usize,
        len: usize,
    },
}

pub(super) struct Chunk {
    pub digest: Digest,
    pub raw_len: usize,
    pub place: Place,
}

pub(super) enum Outcome {
    Data {
        chunks: Vec<Chunk>,
        /// The job's bytes, if some chunk is stored as it is.
        bytes: Bytes,
        packed: Vec<u8>,
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

pub(super) fn run(shared: &Shared, jobs: &Mutex<Receiver<Job>>, results: &Sender<Done>) -> Result<(), RepoError> {
    let mut packer = Packer::new(shared.options.compression)?;
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { number, disk, extent, chunk_bytes, what, permit }) = job else { return Ok(()) };
        if shared.is_stopped() {
            continue;
        }
        let outcome = match what {
            What::Data(bytes) => data(shared, &mut packer, number, chunk_bytes as usize, bytes)?,
            What::Zero => Outcome::Zero,
            What::Known(digests) => Outcome::Known(digests),
            What::Flush => Outcome::Flush,
        };
        if results.send(Done { number, disk, extent, chunk_bytes, outcome, permit }).is_err() {
            return Ok(());
        }
    }
}

fn data(
    shared: &Shared,
    packer: &mut Packer,
    number: u64,
    chunk_bytes: usize,
    bytes: Bytes,
) -> Result<Outcome, RepoError> {
    let mut chunks = Vec::with_capacity(bytes.len().div_ceil(chunk_bytes));
    let mut keep = false;
    packer.used = 0;
    for (i, raw) in bytes.chunks(chunk_bytes).enumerate() {
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
            packer.pack(raw).unwrap_or_else(|| {
                keep = true;
                Place::Raw { at: i * chunk_bytes }
            })
        };
        chunks.push(Chunk { digest, raw_len: raw.len(), place });
    }
    let bytes = if keep { bytes } else { Bytes::new() };
    Ok(Outcome::Data { chunks, bytes, packed: packer.buffer[..packer.used].to_vec() })
}

/// A thread's own compressor.
struct Packer {
    zstd: Option<zstd::bulk::Compressor<'static>>,
    buffer: Vec<u8>,
    used: usize,
}

impl Packer {
    fn new(compression: Compression) -> Result<Self, RepoError> {
        let Compression::Zstd(level) = compression else {
            return Ok(Self { zstd: None, buffer: Vec::new(), used: 0 });
        };
        let zstd = zstd::bulk::Compressor::new(level)
            .map_err(|e| RepoError::Refused(format!("zstd cannot be set up with level {level}: {e}")))?;
        // What is kept is smaller than what was put, so this is enough for a put.
        Ok(Self { zstd: Some(zstd), buffer: vec![0; MAX_READ_BYTES as usize], used: 0 })
    }

    /// Compresses a chunk; `None` when it is to be stored as it is. zstd gets no more room than 31/32 of the chunk, so it
    /// gives up by itself on what does not compress. Its own speed on such data (4 GB/s at level 1) makes a test of a
    /// sample beforehand superfluous.
    fn pack(&mut self, raw: &[u8]) -> Option<Place> {
        let zstd = self.zstd.as_mut()?;
        let at = self.used;
        let room = &mut self.buffer[at..at + (raw.len() - raw.len() / 32 - 1)];
        let len = zstd.compress_to_buffer(raw, room).ok()?;
        self.used += len;
        Some(Place::Zstd { at, len })
    }
}
