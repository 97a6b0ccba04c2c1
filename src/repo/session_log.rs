//! Session log: what of a session's disks a running writer has made durable, so that who was killed can go on with it.
//!
//! ```text
//! journal/<VM>.session         one a VM, at most; the lock of the VM is the lock of the file
//! file   = "LBSESS\x01\n" ‖ record × n                                              all numbers are little-endian
//! record = len u32 ‖ kind u8 ‖ 0 × 3 ‖ crc32 u32 of the 8 bytes before ‖ payload    len: of the payload
//!
//! kind 1   payload = what the session was begun with: JSON of its owner's. The first record, and no other
//! kind 2   payload = disk u16 ‖ 0 × 6 ‖ first chunk u64 ‖ digest 32 × n      1 <= n <= 16; all zeroes: a chunk of zeroes
//! kind 3   payload = disk u16 ‖ 0 × 6 ‖ first chunk u64 ‖ chunks u64         zeroes
//! kind 4   payload as that of kind 3                                         as in what the disk goes on from
//! ```
//!
//! A record is written before its bytes are acknowledged, and flushed with the pack that has them, after that is durable. What
//! needs no pack (zeroes, chunks that were there, bytes that are the same) is written and flushed with the next: a killed
//! process loses nothing, and after a power failure the bytes that are missing here are missed in the count, and all
//! begins anew. Reading ends at the first record that is not whole: the writer was killed there.
//!
//! The file lies beside the writers' own journals, which the next writer adopts whatever it stores; only a backup of the same
//! VM looks at it. It is removed with the commit.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::durable::{self, Replace};
use crate::repo::digest::Digest;
use crate::repo::error::RepoError;
use crate::units::MIB;

const MAGIC: [u8; 8] = *b"LBSESS\x01\n";
const HEAD_BYTES: usize = 12;
const FIXED_BYTES: usize = 16;
const DIGEST_BYTES: usize = 32;
/// Most digests of one record: those of one put.
pub const MAX_DIGESTS: usize = 16;
/// Longest description of a session.
const MAX_BEGUN_BYTES: usize = 16 * MIB as usize;
/// Most records that are read: a TiB that came in pieces of one chunk.
const MAX_RECORDS: usize = 1 << 24;

/// What is known of some chunks of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// Their digests are at this offset of the file.
    Digests(u64),
    /// They are zero.
    Zero,
    /// They are as in what the disk goes on from.
    Same,
}

/// Consecutive chunks of a disk that are durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Index of the disk.
    pub disk: u16,
    /// The first of them.
    pub first_chunk: u64,
    /// How many.
    pub chunks: u64,
    /// What they are.
    pub known: Known,
}

impl Run {
    /// The chunk after the last.
    pub fn end_chunk(&self) -> u64 {
        self.first_chunk.saturating_add(self.chunks)
    }

    /// What lies in a range of chunks, if anything does.
    pub fn within(&self, from: u64, past: u64) -> Option<Run> {
        let (first, end) = (self.first_chunk.max(from), self.end_chunk().min(past));
        let skipped = first.checked_sub(self.first_chunk)?;
        let known = match self.known {
            Known::Digests(at) => Known::Digests(at + skipped * DIGEST_BYTES as u64),
            other => other,
        };
        (first < end).then(|| Run { first_chunk: first, chunks: end - first, known, ..*self })
    }
}

/// A record of chunks, encoded.
pub fn encode_digests(disk: u16, first_chunk: u64, digests: &[Digest]) -> Vec<u8> {
    let parts: Vec<&[u8]> = digests.iter().map(|digest| &digest.as_bytes()[..]).collect();
    encode(2, disk, first_chunk, &parts.concat())
}

/// A record of zeroes, encoded.
pub fn encode_zero(disk: u16, first_chunk: u64, chunks: u64) -> Vec<u8> {
    encode(3, disk, first_chunk, &chunks.to_le_bytes())
}

/// A record of what is the same, encoded.
pub fn encode_same(disk: u16, first_chunk: u64, chunks: u64) -> Vec<u8> {
    encode(4, disk, first_chunk, &chunks.to_le_bytes())
}

fn encode(kind: u8, disk: u16, first_chunk: u64, rest: &[u8]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(FIXED_BYTES + rest.len());
    payload.extend(disk.to_le_bytes());
    payload.extend([0; 6]);
    payload.extend(first_chunk.to_le_bytes());
    payload.extend(rest);
    record(kind, &payload)
}

fn record(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEAD_BYTES + payload.len());
    out.extend((payload.len() as u32).to_le_bytes());
    out.extend([kind, 0, 0, 0]);
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&out);
    hasher.update(payload);
    out.extend(hasher.finalize().to_le_bytes());
    out.extend(payload);
    out
}

/// The log of a running session.
#[derive(Debug)]
pub struct SessionLog {
    path: PathBuf,
    file: File,
}

impl SessionLog {
    /// Begins one, in place of what a dead backup of the VM has left.
    pub fn create(path: &Path, begun: &[u8]) -> Result<Self, RepoError> {
        let bytes = [&MAGIC[..], &record(1, begun)].concat();
        durable::write_file(path, &bytes, Replace::Yes).map_err(|error| RepoError::Durable { error })?;
        Self::open(path)
    }

    fn open(path: &Path) -> Result<Self, RepoError> {
        let file = OpenOptions::new().read(true).append(true).mode(0o600).open(path);
        Ok(Self { path: path.to_owned(), file: file.map_err(RepoError::io("open", path))? })
    }

    /// Appends encoded records.
    pub fn append(&mut self, records: &[u8]) -> Result<(), RepoError> {
        self.file.write_all(records).map_err(RepoError::io("write", &self.path))
    }

    /// Makes all that was appended durable.
    pub fn sync(&self) -> Result<(), RepoError> {
        self.file.sync_data().map_err(RepoError::io("flush", &self.path))
    }
}

/// What a dead backup has left.
#[derive(Debug)]
pub struct Left {
    /// What the session was begun with.
    pub begun: Vec<u8>,
    /// What was durable, by disk and chunk; what was written twice is there once, as it was last.
    pub runs: Vec<Run>,
    file: File,
    path: PathBuf,
    whole_bytes: u64,
}

impl Left {
    /// Reads it, if there is one that can be read.
    pub fn find(path: &Path) -> Result<Option<Self>, RepoError> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(RepoError::io("open", path)(e)),
        };
        let reader = file.try_clone().map_err(RepoError::io("open", path))?;
        let Some((begun, runs, whole_bytes)) = decode(BufReader::new(reader)) else { return Ok(None) };
        Ok(Some(Self { begun, runs, file, path: path.to_owned(), whole_bytes }))
    }

    /// The digests of a run; none for what has none.
    pub fn digests(&self, run: &Run) -> Result<Vec<Digest>, RepoError> {
        let Known::Digests(at) = run.known else { return Ok(Vec::new()) };
        let mut bytes = vec![0; (run.chunks as usize).min(MAX_DIGESTS) * DIGEST_BYTES];
        let read = (&self.file).seek(SeekFrom::Start(at)).and_then(|_| (&self.file).read_exact(&mut bytes));
        read.map_err(RepoError::io("read", &self.path))?;
        Ok(bytes.chunks(DIGEST_BYTES).filter_map(Digest::from_slice).collect())
    }

    /// Goes on with the log: what was not whole is cut off.
    pub fn go_on(&self) -> Result<SessionLog, RepoError> {
        let log = SessionLog::open(&self.path)?;
        log.file.set_len(self.whole_bytes).map_err(RepoError::io("cut", &self.path))?;
        Ok(log)
    }
}

/// Removes what a backup of the VM has left, if anything.
pub fn remove(path: &Path) -> Result<(), RepoError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(RepoError::io("remove", path)(e)),
        _ => Ok(()),
    }
}

/// What was begun with, the runs in order, and how many bytes of the file are whole.
pub fn decode(mut from: impl Read) -> Option<(Vec<u8>, Vec<Run>, u64)> {
    let mut magic = [0; MAGIC.len()];
    from.read_exact(&mut magic).ok().filter(|()| magic == MAGIC)?;
    let mut at = MAGIC.len() as u64;
    let (1, begun) = next(&mut from)? else { return None };
    at += (HEAD_BYTES + begun.len()) as u64;
    let mut runs = Vec::new();
    while runs.len() < MAX_RECORDS
        && let Some((kind, payload)) = next(&mut from)
        && let Some(run) = run(kind, &payload, at + HEAD_BYTES as u64)
    {
        at += (HEAD_BYTES + payload.len()) as u64;
        runs.push(run);
    }
    Some((begun, in_order(runs), at))
}

fn next(from: &mut impl Read) -> Option<(u8, Vec<u8>)> {
    let mut head = [0; HEAD_BYTES];
    from.read_exact(&mut head).ok()?;
    let [l0, l1, l2, l3, kind, 0, 0, 0, c0, c1, c2, c3] = head else { return None };
    let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    let most = if kind == 1 { MAX_BEGUN_BYTES } else { FIXED_BYTES + MAX_DIGESTS * DIGEST_BYTES };
    if len > most {
        return None;
    }
    let mut payload = Vec::new();
    from.take(len as u64).read_to_end(&mut payload).ok().filter(|got| *got == len)?;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&head[..8]);
    hasher.update(&payload);
    (hasher.finalize() == u32::from_le_bytes([c0, c1, c2, c3])).then_some((kind, payload))
}

/// A run, if the record is one. `at` is where its payload lies.
fn run(kind: u8, payload: &[u8], at: u64) -> Option<Run> {
    let (fixed, rest) = payload.split_first_chunk::<FIXED_BYTES>()?;
    let [d0, d1, 0, 0, 0, 0, 0, 0, chunk @ ..] = *fixed else { return None };
    let (disk, first_chunk) = (u16::from_le_bytes([d0, d1]), u64::from_le_bytes(chunk));
    let (chunks, known) = match kind {
        2 if rest.len().is_multiple_of(DIGEST_BYTES) => {
            ((rest.len() / DIGEST_BYTES) as u64, Known::Digests(at + FIXED_BYTES as u64))
        }
        3 => (u64::from_le_bytes(*rest.first_chunk::<8>().filter(|_| rest.len() == 8)?), Known::Zero),
        4 => (u64::from_le_bytes(*rest.first_chunk::<8>().filter(|_| rest.len() == 8)?), Known::Same),
        _ => return None,
    };
    first_chunk.checked_add(chunks).filter(|_| chunks > 0)?;
    Some(Run { disk, first_chunk, chunks, known })
}

/// By disk and chunk. Where two overlap, which a writer that went on may leave, both say the same: the earlier yields.
fn in_order(mut runs: Vec<Run>) -> Vec<Run> {
    runs.sort_by_key(|run| (run.disk, run.first_chunk));
    let mut out: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs {
        let from = out.last().filter(|last| last.disk == run.disk).map_or(0, Run::end_chunk);
        out.extend(run.within(from, u64::MAX));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn digests(n: u8) -> Vec<Digest> {
        (0..n).map(|i| Digest::of(&[i])).collect()
    }

    #[test]
    fn what_was_written_is_read_up_to_what_is_not_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.session");
        assert!(Left::find(&path).unwrap().is_none());
        let mut log = SessionLog::create(&path, b"{}").unwrap();
        log.append(&encode_digests(1, 4, &digests(3))).unwrap();
        log.append(&encode_zero(0, 7, 9)).unwrap();
        log.append(&encode_same(1, 0, 2)).unwrap();
        log.sync().unwrap();
        let last = encode_digests(1, 5, &digests(4));
        log.append(&last[..last.len() - 1]).unwrap();
        let left = Left::find(&path).unwrap().unwrap();
        let runs: Vec<_> = left.runs.iter().map(|run| (run.disk, run.first_chunk, run.chunks)).collect();
        assert_eq!((&left.begun[..], runs), (&b"{}"[..], vec![(0, 7, 9), (1, 0, 2), (1, 4, 3)]));
        assert_eq!(left.digests(&left.runs[2]).unwrap(), digests(3));
        assert_eq!(left.digests(&left.runs[2].within(5, 6).unwrap()).unwrap(), digests(3)[1..2]);
        let mut log = left.go_on().unwrap();
        log.append(&encode_digests(1, 6, &digests(2))).unwrap();
        let left = Left::find(&path).unwrap().unwrap();
        let runs: Vec<_> = left.runs.iter().map(|run| (run.disk, run.first_chunk, run.chunks)).collect();
        assert_eq!(runs, [(0, 7, 9), (1, 0, 2), (1, 4, 3), (1, 7, 1)]);
        assert_eq!(left.digests(&left.runs[3]).unwrap(), digests(2)[1..]);
        remove(&path).unwrap();
        remove(&path).unwrap();
    }

    #[test]
    fn the_first_version_stays_readable() {
        let stored = include_bytes!("../../tests/fixtures/session-log-v1/vm.session");
        let (begun, runs, whole) = decode(&stored[..]).unwrap();
        assert_eq!((&begun[..], whole), (&br#"{"format":1}"#[..], stored.len() as u64));
        let run = |disk, first_chunk, chunks, known| Run { disk, first_chunk, chunks, known };
        let digests = Known::Digests(8 + 12 + 12 + 12 + 16);
        assert_eq!(runs, [run(0, 5, 2, digests), run(0, 9, 2, Known::Same), run(1, 0, 1000, Known::Zero)]);
        assert_eq!(stored[60..92], [7; 32]);
        let again = [encode_digests(0, 5, &[Digest::from_bytes([7; 32]), Digest::ZERO]), encode_zero(1, 0, 1000)];
        assert_eq!(stored[32..], [&again[0][..], &again[1], &encode_same(0, 9, 2)].concat());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..5),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let mut bytes = [&MAGIC[..], &record(1, b"{}"), &encode_digests(0, 1, &digests(2)), &encode_zero(9, 3, 8)].concat();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            bytes.truncate(cut.map_or(bytes.len(), |cut| cut.index(bytes.len() + 1)));
            if let Some((_, runs, whole)) = decode(&bytes[..]) {
                prop_assert!(whole <= bytes.len() as u64);
                prop_assert!(runs.windows(2).all(|w| w[0].disk < w[1].disk || w[0].end_chunk() <= w[1].first_chunk));
            }
        }
    }
}
