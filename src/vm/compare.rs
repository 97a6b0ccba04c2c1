//! Comparing what is read with what the client knows: all of a disk in a scan, a few chunks of it in an audit.
//!
//! ```text
//!  reads, in order, hashed on all processors ──┐
//!                                              ├─► same (not sent) │ zero │ data
//!  digests from the client, in order ──────────┘
//! ```
//!
//! Both come in the order of the disk and are held in a bounded window: whoever is ahead waits. Where the client's digests
//! end early, or say "unknown", bytes are sent whatever they hold. The client's word is not trusted with anything but its own
//! point: a wrong digest costs it data, or its own point's truth.
//!
//! In an **audit** a chunk that no bitmap has must be what the client has. If it is not, tracking missed a write, and nothing
//! that rests on it can be believed: the session ends, and with it the epoch.

use std::collections::BTreeMap;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::transfer::{Sent, left};
use crate::extent::Extent;
use crate::repo::Digest;
use crate::units::MIB;
use crate::wire::digests::{ChunkDigest, Digests};
use crate::wire::message::{Event, Failure, FailureCode};

/// Equal bytes are told of at least so often, for the sake of who looks at the progress.
const SAME_AT_ONCE_BYTES: u64 = 64 * MIB;

/// What of a disk is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compared {
    /// Nothing.
    Nothing,
    /// Everything, with the digests that the client gives.
    All,
    /// These chunks.
    Some(BTreeMap<u64, ChunkDigest>),
}

impl Compared {
    /// Compares these chunks no more: they are sent, if they are needed at all.
    pub fn forget(&mut self, chunks: std::ops::Range<u64>) {
        if let Self::Some(audited) = self {
            audited.retain(|chunk, _| !chunks.contains(chunk));
        }
    }

    /// Whether the digests of these chunks are wanted.
    pub fn wants(&self, chunks: std::ops::Range<u64>) -> bool {
        match self {
            Self::Nothing => false,
            Self::All => true,
            Self::Some(audited) => audited.range(chunks).next().is_some(),
        }
    }
}

/// The digests of the chunks of these bytes, computed where it holds nobody up. Gives the bytes back.
pub async fn hash(bytes: Bytes, chunk_bytes: u64) -> Result<(Bytes, Vec<ChunkDigest>), Failure> {
    let work = move || {
        let digests =
            bytes.chunks(chunk_bytes as usize).map(|chunk| ChunkDigest::from_bytes(*Digest::of(chunk).as_bytes()));
        let digests = digests.collect();
        (bytes, digests)
    };
    tokio::task::spawn_blocking(work).await.map_err(super::internal)
}

/// What the client knows of some chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// So many are zero.
    Zero(u64),
    /// One has this digest.
    Is(ChunkDigest),
    /// So many are to be sent whatever they hold.
    Unknown(u64),
}

/// What the client knows, as it arrives.
#[derive(Debug)]
pub struct Expected {
    queue: Option<mpsc::Receiver<Digests>>,
    batch: Option<Digests>,
}

impl Expected {
    /// From a session's queue, if there is one.
    pub fn new(queue: Option<mpsc::Receiver<Digests>>) -> Self {
        Self { queue, batch: None }
    }

    /// What is known of `chunk` of a disk and those after it. Asked in ascending order; waits for the client.
    pub async fn at(&mut self, disk: u16, chunk: u64) -> Known {
        loop {
            let Some(batch) = &self.batch else {
                let Some(queue) = &mut self.queue else { return Known::Unknown(u64::MAX) };
                self.batch = queue.recv().await;
                if self.batch.is_none() {
                    self.queue = None;
                }
                continue;
            };
            if batch.disk > disk {
                return Known::Unknown(u64::MAX);
            }
            if batch.disk == disk {
                if chunk < batch.first_chunk {
                    return Known::Zero(batch.first_chunk - chunk);
                }
                let digest = batch.digests.get((chunk - batch.first_chunk) as usize);
                match digest {
                    Some(digest) if *digest == ChunkDigest::ZERO => return Known::Zero(1),
                    Some(digest) if *digest == ChunkDigest::UNKNOWN => return Known::Unknown(1),
                    Some(digest) => return Known::Is(*digest),
                    None => {}
                }
            }
            self.batch = None;
        }
    }
}

/// Something that was read.
#[derive(Debug)]
pub struct Read {
    /// Where.
    pub extent: Extent,
    /// The bytes; none where all is known to be zero.
    pub bytes: Option<Bytes>,
    /// The digests of its chunks, where they are wanted.
    pub digests: Vec<ChunkDigest>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Same,
    Zero,
    Data,
}

/// Where the events of one disk go; equal neighbours are told of as one.
pub struct Out<'a, F> {
    /// Index of the disk.
    pub disk: u16,
    /// Its name.
    pub name: &'a str,
    /// Chunk size of the client.
    pub chunk_bytes: u64,
    events: &'a mpsc::Sender<Result<Event, Failure>>,
    sent: F,
    same: Option<Extent>,
}

impl<'a, F: FnMut(Sent)> Out<'a, F> {
    /// Sends to `events`; `sent` is told of every event.
    pub fn new(
        disk: u16,
        name: &'a str,
        chunk_bytes: u64,
        events: &'a mpsc::Sender<Result<Event, Failure>>,
        sent: F,
    ) -> Self {
        Self { disk, name, chunk_bytes, events, sent, same: None }
    }

    /// Sends all of what was read, as data or zeroes.
    pub async fn whole(&mut self, read: Read) -> Result<(), Failure> {
        let class = if read.bytes.is_some() { Class::Data } else { Class::Zero };
        self.part(class, read.extent, &read).await
    }

    /// Sends what differs from what the client knows.
    pub async fn scanned(&mut self, read: Read, expected: &mut Expected) -> Result<(), Failure> {
        let (first, past) = self.chunks(read.extent);
        let mut runs = Runs::from(first);
        while runs.at < past {
            // Only where all is known to be zero is more than one chunk looked at at once.
            let most = if read.bytes.is_some() { 1 } else { past - runs.at };
            let found = read.digest(runs.at - first);
            let (class, count) = match expected.at(self.disk, runs.at).await {
                Known::Zero(count) if found == ChunkDigest::ZERO => (Class::Same, count.min(most)),
                Known::Is(digest) if found == digest => (Class::Same, 1),
                Known::Unknown(count) if read.bytes.is_none() => (Class::Zero, count.min(most)),
                _ if found == ChunkDigest::ZERO => (Class::Zero, 1),
                _ => (Class::Data, 1),
            };
            runs.push(class, count);
        }
        self.parts(runs, &read).await
    }

    /// Sends what was read, but for audited chunks, which must be what the client knows.
    pub async fn audited(&mut self, read: Read, audit: &BTreeMap<u64, ChunkDigest>) -> Result<(), Failure> {
        let (first, past) = self.chunks(read.extent);
        if audit.range(first..past).next().is_none() {
            return self.whole(read).await;
        }
        let mut runs = Runs::from(first);
        while runs.at < past {
            let found = read.digest(runs.at - first);
            let class = match audit.get(&runs.at) {
                Some(digest) if *digest == found => Class::Same,
                Some(_) => return Err(mismatch(self.name, self.extent(runs.at, runs.at + 1, read.extent))),
                None if found == ChunkDigest::ZERO => Class::Zero,
                None => Class::Data,
            };
            runs.push(class, 1);
        }
        self.parts(runs, &read).await
    }

    /// Tells of what is left to be told.
    pub async fn finish(mut self) -> Result<(), Failure> {
        self.tell_same().await
    }

    fn chunks(&self, extent: Extent) -> (u64, u64) {
        (extent.offset_bytes / self.chunk_bytes, extent.end().div_ceil(self.chunk_bytes))
    }

    /// The bytes of chunks of what was read: the last one of a disk may be short.
    fn extent(&self, from: u64, past: u64, read: Extent) -> Extent {
        Extent::between(from * self.chunk_bytes, (past * self.chunk_bytes).min(read.end()))
    }

    async fn parts(&mut self, runs: Runs, read: &Read) -> Result<(), Failure> {
        for (class, from, past) in runs.runs {
            self.part(class, self.extent(from, past, read.extent), read).await?;
        }
        Ok(())
    }

    async fn part(&mut self, class: Class, extent: Extent, read: &Read) -> Result<(), Failure> {
        if class == Class::Same {
            match &mut self.same {
                Some(same) if same.end() == extent.offset_bytes => same.len_bytes += extent.len_bytes,
                _ => {
                    self.tell_same().await?;
                    self.same = Some(extent);
                }
            }
            let enough = self.same.is_some_and(|same| same.len_bytes >= SAME_AT_ONCE_BYTES);
            return if enough { self.tell_same().await } else { Ok(()) };
        }
        self.tell_same().await?;
        let (disk, len_bytes) = (self.disk, extent.len_bytes);
        let (event, sent) = match (&read.bytes, class) {
            (Some(bytes), Class::Data) => {
                let from = (extent.offset_bytes - read.extent.offset_bytes) as usize;
                let bytes = bytes.slice(from..from + len_bytes as usize);
                let event = Event::Data { disk, offset_bytes: extent.offset_bytes, bytes };
                (event, Sent { data_bytes: len_bytes, ..Sent::default() })
            }
            _ => (Event::Zero { disk, extent }, Sent { zero_bytes: len_bytes, ..Sent::default() }),
        };
        self.tell(event, sent).await
    }

    async fn tell_same(&mut self) -> Result<(), Failure> {
        let Some(extent) = self.same.take() else { return Ok(()) };
        let sent = Sent { same_bytes: extent.len_bytes, ..Sent::default() };
        self.tell(Event::Same { disk: self.disk, extent }, sent).await
    }

    async fn tell(&mut self, event: Event, sent: Sent) -> Result<(), Failure> {
        self.events.send(Ok(event)).await.map_err(|_| left())?;
        (self.sent)(sent);
        crate::fault::point("transfer.sent");
        Ok(())
    }
}

impl Read {
    fn digest(&self, index: u64) -> ChunkDigest {
        self.digests.get(index as usize).copied().unwrap_or(ChunkDigest::ZERO)
    }
}

/// Classes of chunks one after the other, equal neighbours as one.
struct Runs {
    at: u64,
    runs: Vec<(Class, u64, u64)>,
}

impl Runs {
    fn from(chunk: u64) -> Self {
        Self { at: chunk, runs: Vec::new() }
    }

    fn push(&mut self, class: Class, count: u64) {
        let (from, past) = (self.at, self.at + count);
        self.at = past;
        match self.runs.last_mut() {
            Some(last) if last.0 == class => last.2 = past,
            _ => self.runs.push((class, from, past)),
        }
    }
}

/// An audited chunk is not what it should be.
fn mismatch(disk: &str, extent: Extent) -> Failure {
    let what = format!(
        "{extent} of disk {disk} have changed, and nothing is recorded to have written there: somebody writes to the image \
         behind QEMU's back, or tracking failed"
    );
    Failure { disk: Some(disk.to_owned()), ..Failure::new(FailureCode::AuditMismatch, what) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CHUNK: u64 = 64 << 10;

    /// A disk of chunks, each of one byte's value; the last chunk is short.
    fn disk(chunks: &[u8]) -> Vec<u8> {
        let mut bytes: Vec<u8> = chunks.iter().flat_map(|value| vec![*value; CHUNK as usize]).collect();
        bytes.truncate(bytes.len() - 512);
        bytes
    }

    fn digest(value: u8, len: usize) -> ChunkDigest {
        ChunkDigest::from_bytes(*Digest::of(&vec![value; len]).as_bytes())
    }

    /// Scans `now` in pieces; the client knows `then`, where 255 stands for unknown. Gives what it has afterwards, and the
    /// bytes that were sent.
    async fn scan(then: &[u8], now: &[u8], pieces: &[u64], batch: usize, zero_status: bool) -> (Vec<u8>, u64) {
        let bytes = disk(now);
        let size = bytes.len() as u64;
        let len = |chunk: usize| if chunk + 1 == then.len() { CHUNK as usize - 512 } else { CHUNK as usize };
        let known = then.iter().enumerate().map(|(i, value)| match value {
            255 => ChunkDigest::UNKNOWN,
            value => digest(*value, len(i)),
        });
        let known: Vec<_> = known.collect();
        let (to, queue) = mpsc::channel(1);
        let giving = tokio::spawn(async move {
            for (n, some) in known.chunks(batch).enumerate() {
                let first = n * batch;
                // A batch of zeroes need not be given.
                if some.iter().any(|d| *d != ChunkDigest::ZERO) {
                    let digests = Digests { disk: 3, first_chunk: first as u64, digests: some.to_vec() };
                    to.send(digests).await.unwrap();
                }
            }
            to.send(Digests { disk: 3, first_chunk: known.len() as u64, digests: vec![] }).await.unwrap();
        });
        let (events, mut received) = mpsc::channel(1000);
        let mut told = Sent::default();
        let mut out = Out::new(3, "d", CHUNK, &events, |sent: Sent| {
            told.data_bytes += sent.data_bytes;
            told.zero_bytes += sent.zero_bytes;
            told.same_bytes += sent.same_bytes;
        });
        let mut expected = Expected::new(Some(queue));
        let (mut at, mut piece) = (0, pieces.iter().cycle());
        while at < size {
            let end = (at + piece.next().unwrap() * CHUNK).min(size);
            let part = Bytes::copy_from_slice(&bytes[at as usize..end as usize]);
            let extent = Extent::between(at, end);
            let read = if zero_status && part.iter().all(|b| *b == 0) {
                Read { extent, bytes: None, digests: vec![] }
            } else {
                let (bytes, digests) = hash(part, CHUNK).await.unwrap();
                Read { extent, bytes: Some(bytes), digests }
            };
            out.scanned(read, &mut expected).await.unwrap();
            at = end;
        }
        out.finish().await.unwrap();
        giving.await.unwrap();
        drop(events);
        let mut image = disk(&then.iter().map(|v| if *v == 255 { 77 } else { *v }).collect::<Vec<_>>());
        let (mut data, mut at) = (0, 0);
        while let Some(event) = received.recv().await {
            let extent = match event.unwrap() {
                Event::Data { offset_bytes, bytes, .. } => {
                    data += bytes.len() as u64;
                    image[offset_bytes as usize..][..bytes.len()].copy_from_slice(&bytes);
                    Extent::new(offset_bytes, bytes.len() as u64)
                }
                Event::Zero { extent, .. } => {
                    image[extent.offset_bytes as usize..extent.end() as usize].fill(0);
                    extent
                }
                Event::Same { extent, .. } => extent,
                other => panic!("{other:?}"),
            };
            assert_eq!(extent.offset_bytes, at, "in order, and all of it");
            at = extent.end();
        }
        assert_eq!(at, size);
        assert_eq!((told.data_bytes, told.data_bytes + told.zero_bytes + told.same_bytes), (data, size));
        (image, data)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]
        #[test]
        fn a_scan_sends_what_differs_and_nothing_else(
            then in prop::collection::vec(prop::sample::select(vec![0u8, 0, 0, 1, 2, 255]), 1..40),
            change in prop::collection::vec(prop::sample::select(vec![9u8, 9, 9, 0, 1, 2]), 40),
            pieces in prop::collection::vec(1u64..6, 1..4), batch in 1usize..9, zero_status in any::<bool>(),
        ) {
            // 9: as it was.
            let keep = |(old, new): (&u8, &u8)| if *new == 9 { if *old == 255 { 5 } else { *old } } else { *new };
            let now: Vec<u8> = then.iter().zip(&change).map(keep).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (image, data) = runtime.block_on(scan(&then, &now, &pieces, batch, zero_status));
            prop_assert!(image == disk(&now));
            let differs = |i: &usize| now[*i] != 0 && (then[*i] == 255 || then[*i] != now[*i]);
            let len = |i: usize| if i + 1 == then.len() { CHUNK - 512 } else { CHUNK };
            prop_assert_eq!(data, (0..then.len()).filter(differs).map(len).sum::<u64>());
        }
    }

    #[tokio::test]
    async fn what_a_client_does_not_give_is_sent() {
        let (to, queue) = mpsc::channel(1);
        to.send(Digests { disk: 0, first_chunk: 0, digests: vec![digest(1, CHUNK as usize)] }).await.unwrap();
        drop(to);
        let mut expected = Expected::new(Some(queue));
        assert_eq!(expected.at(0, 0).await, Known::Is(digest(1, CHUNK as usize)));
        assert_eq!(expected.at(0, 1).await, Known::Unknown(u64::MAX));
        assert_eq!(Expected::new(None).at(0, 0).await, Known::Unknown(u64::MAX));
    }

    #[tokio::test]
    async fn an_audited_chunk_must_be_what_it_was() {
        for (value, agrees) in [(1, true), (2, false)] {
            let (events, mut received) = mpsc::channel(10);
            let mut out = Out::new(0, "d", CHUNK, &events, |_| ());
            let (bytes, digests) = hash(disk(&[0, 1, 7]).into(), CHUNK).await.unwrap();
            let read = Read { extent: Extent::new(0, bytes.len() as u64), bytes: Some(bytes), digests };
            let audit = BTreeMap::from([(1, digest(value, CHUNK as usize))]);
            let done = out.audited(read, &audit).await;
            match done {
                Ok(()) => assert!(agrees),
                Err(failure) => {
                    assert_eq!((failure.code, failure.disk.as_deref()), (FailureCode::AuditMismatch, Some("d")));
                    assert!(!agrees && failure.message.contains("65536..131072"), "{failure}");
                    continue;
                }
            }
            out.finish().await.unwrap();
            drop(events);
            let mut classes = vec![];
            while let Some(event) = received.recv().await {
                classes
                    .push(matches!(event.unwrap(), Event::Same { extent, .. } if extent == Extent::new(CHUNK, CHUNK)));
            }
            assert_eq!(classes, [false, true, false]);
        }
    }
}
