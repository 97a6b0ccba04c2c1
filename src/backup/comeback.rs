//! Coming back to the session of a backup that was killed.
//!
//! ```text
//! a backup over a connection:  begun ─► remembered in the repository ─► chunks, as they are durable ─► commit: forgotten
//!                                               ╳ killed
//! the next of the same VM:     found ─► the same was asked for? ─► all of it readable? ─► Resume ─► goes on
//!                                                   └─ no ────────────┴─ no ────► Leave ─┴─ gone ─► begins anew, and says so
//! ```
//!
//! What was acknowledged before the kill comes from the session's log, the rest from the sidecar once more; both are put
//! together in the order of the disks. Together they must be all that was needed, else there is no point. Of a session in which
//! a disk is scanned nothing is remembered: a killed one begins anew, and finds its chunks stored.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backup::audit::Picked;
use crate::backup::plan::Plan;
use crate::backup::{BackupError, BackupOptions, blocking};
use crate::extent::Extent;
use crate::machine::Taken;
use crate::repo::session_log::{self, Known, Left, Run, SessionLog};
use crate::repo::writer::DiskHandle;
use crate::repo::{Reader, RepoError, Repository, Writer};
use crate::wire::message::{Begin, Begun};

/// Version of what is remembered.
const FORMAT: u32 = 1;

/// What a session was begun with.
#[derive(Debug, Serialize, Deserialize)]
pub struct Memory {
    format: u32,
    level: String,
    /// What was asked for, with the token.
    pub begin: Begin,
    /// What was answered.
    pub begun: Begun,
    /// What disks go on from.
    pub plan: Plan,
    /// What is to be confirmed.
    pub picked: BTreeMap<String, Picked>,
}

/// Remembers a session from now on.
pub async fn remember(
    repo: &Repository,
    options: &BackupOptions,
    begin: Begin,
    begun: Begun,
    plan: Plan,
    picked: BTreeMap<String, Picked>,
) -> Result<Option<SessionLog>, BackupError> {
    if begun.disks.iter().any(|disk| matches!(disk.taken, Taken::Scan { .. })) {
        return Ok(None);
    }
    let path = repo.layout().session(&begin.vm)?;
    let memory = Memory { format: FORMAT, level: options.level.to_string(), begin, begun, plan, picked };
    let Ok(json) = serde_json::to_vec(&memory) else { return Ok(None) };
    Ok(Some(blocking(move || SessionLog::create(&path, &json)).await??))
}

/// Forgets what was remembered of a VM's session.
pub async fn forget(repo: &Repository, vm: &str) {
    let Ok(path) = repo.layout().session(vm) else { return };
    match blocking(move || session_log::remove(&path)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the log of a session cannot be removed"),
        Err(error) => tracing::warn!(%error, "the log of a session cannot be removed"),
    }
}

/// What a killed backup of a VM has left.
pub async fn find(repo: &Repository, vm: &str) -> Option<(Memory, Left)> {
    let path = repo.layout().session(vm).ok()?;
    let left = match blocking(move || Left::find(&path)).await {
        Ok(Ok(left)) => left?,
        Ok(Err(error)) => {
            tracing::warn!(%error, "what a killed backup has left cannot be read");
            return None;
        }
        Err(_) => return None,
    };
    let memory: Memory = serde_json::from_slice(&left.begun).ok()?;
    (memory.format == FORMAT && memory.begin.vm == vm).then_some((memory, left))
}

impl Memory {
    /// Whether a backup with these options would ask for the same.
    pub fn is_of(&self, options: &BackupOptions, chunk_bytes: u32) -> bool {
        let Self { level, begin, .. } = self;
        *level == options.level.to_string()
            && begin.chunk_bytes == chunk_bytes
            && begin.include == options.include
            && begin.exclude == options.exclude
            && begin.freeze == options.freeze
    }
}

/// Whether all that was left can be had: every chunk lies within its disk, and the repository has it.
pub async fn is_whole(left: Arc<Left>, begun: &Begun, chunk_bytes: u32, reader: Reader) -> Result<bool, BackupError> {
    let chunks = |size_bytes: u64| size_bytes.div_ceil(chunk_bytes.into());
    let disks: Vec<_> = begun.disks.iter().map(|disk| chunks(disk.disk.size_bytes)).collect();
    let look = move || {
        for run in &left.runs {
            if disks.get(usize::from(run.disk)).is_none_or(|chunks| run.end_chunk() > *chunks) {
                return Ok(false);
            }
            for digest in left.digests(run)?.iter().filter(|digest| !digest.is_zero()) {
                if reader.index().find(digest)?.is_none() {
                    return Ok(false);
                }
            }
        }
        Ok::<_, RepoError>(true)
    };
    Ok(blocking(look).await??)
}

/// What was left, fed to a writer between what arrives.
pub struct Replay {
    left: Option<Arc<Left>>,
    runs: VecDeque<Run>,
    chunk_bytes: u64,
    sizes: Vec<u64>,
}

/// Of each disk, what has come.
pub struct Count<'a> {
    begun: &'a Begun,
    /// Bytes that were needed.
    pub received: Vec<u64>,
    same: Vec<u64>,
    /// Of zeroes, and of what is the same: bytes that were left out, so that nobody has read them.
    left_out: [Vec<u64>; 2],
}

impl<'a> Count<'a> {
    /// Of nothing yet.
    pub fn new(begun: &'a Begun) -> Self {
        let none = vec![0; begun.disks.len()];
        Self { begun, received: none.clone(), same: none.clone(), left_out: [none.clone(), none] }
    }

    fn left_out(&self, disk: u16, extent: Extent) -> u64 {
        let areas = self.begun.disks.get(usize::from(disk)).and_then(|disk| disk.areas.as_ref());
        areas.map_or(0, |areas| areas.share_bytes(extent))
    }

    /// Bytes have come. The disk must be one of the session's, here and below.
    pub fn data(&mut self, disk: u16, extent: Extent) {
        self.received[usize::from(disk)] += extent.len_bytes;
    }

    /// Zeroes have come.
    pub fn zero(&mut self, disk: u16, extent: Extent) {
        self.data(disk, extent);
        self.left_out[0][usize::from(disk)] += self.left_out(disk, extent);
    }

    /// Bytes are the same.
    pub fn same(&mut self, disk: u16, extent: Extent) {
        self.data(disk, extent);
        self.same[usize::from(disk)] += extent.len_bytes;
        self.left_out[1][usize::from(disk)] += self.left_out(disk, extent);
    }

    /// Bytes that were read, and those of them that are the same.
    pub fn read(self) -> (Vec<u64>, Vec<u64>) {
        let less = |all: Vec<u64>, some: &[u64]| all.iter().zip(some).map(|(a, s)| a.saturating_sub(*s)).collect();
        let [zeroes, same] = self.left_out;
        let nothing_read: Vec<_> = zeroes.iter().zip(&same).map(|(a, b)| a + b).collect();
        (less(self.received, &nothing_read), less(self.same, &same))
    }
}

impl Replay {
    /// Whether it goes on from what a killed backup has left.
    pub fn goes_on(&self) -> bool {
        self.left.is_some()
    }

    /// Of what was left, if anything was.
    pub fn new(left: Option<Arc<Left>>, begun: &Begun, chunk_bytes: u32) -> Self {
        let runs = left.iter().flat_map(|left| left.runs.iter().copied()).collect();
        let sizes = begun.disks.iter().map(|disk| disk.disk.size_bytes).collect();
        Self { left, runs, chunk_bytes: chunk_bytes.into(), sizes }
    }

    /// The chunk size.
    pub fn chunk_bytes(&self) -> u32 {
        self.chunk_bytes as u32
    }

    /// Feeds what lies before bytes that have arrived, and drops what they bring again.
    pub async fn before(
        &mut self,
        writer: &Writer,
        disk: u16,
        extent: Extent,
        count: &mut Count<'_>,
    ) -> Result<(), BackupError> {
        if self.runs.is_empty() {
            return Ok(());
        }
        let (first, past) = (extent.offset_bytes / self.chunk_bytes, extent.end().div_ceil(self.chunk_bytes));
        while let Some(run) = self.runs.front().copied().filter(|run| (run.disk, run.first_chunk) < (disk, past)) {
            self.runs.pop_front();
            if run.disk < disk {
                self.feed(writer, run, count).await?;
                continue;
            }
            if let Some(before) = run.within(0, first) {
                self.feed(writer, before, count).await?;
            }
            if let Some(after) = run.within(past, u64::MAX) {
                self.runs.push_front(after);
            }
        }
        Ok(())
    }

    /// Feeds the rest.
    pub async fn rest(&mut self, writer: &Writer, count: &mut Count<'_>) -> Result<(), BackupError> {
        while let Some(run) = self.runs.pop_front() {
            self.feed(writer, run, count).await?;
        }
        Ok(())
    }

    async fn feed(&self, writer: &Writer, run: Run, count: &mut Count<'_>) -> Result<(), BackupError> {
        let index = usize::from(run.disk);
        let (Some(left), Some(size_bytes)) = (&self.left, self.sizes.get(index)) else { return Ok(()) };
        let end = run.end_chunk().saturating_mul(self.chunk_bytes).min(*size_bytes);
        let extent = Extent::between(run.first_chunk * self.chunk_bytes, end);
        match run.known {
            Known::Same => count.same(run.disk, extent),
            Known::Zero => {
                count.zero(run.disk, extent);
                writer.known(DiskHandle(run.disk), extent, None).await?;
            }
            Known::Digests(_) => {
                count.data(run.disk, extent);
                // A few hundred bytes, most likely in memory.
                writer.known(DiskHandle(run.disk), extent, Some(left.digests(&run)?)).await?;
            }
        }
        Ok(())
    }
}
