//! Carrying over: tracking in a QEMU without a backup. Epochs that its predecessor left are taken over where there is proof,
//! and a QEMU that we started ourselves is tracked from its first instruction.
//!
//! ```text
//!  the log says: closed, with a stamp        the image keeps our bitmap
//!     │ add since-LAST                          │ it is there and consistent
//!     │ look at the medium, compare             │
//!     ▼                                         ▼
//!   equal ─► sentinel ─► the log names this QEMU: the epoch goes on
//!   not equal ─► take the bitmap out again, remember why
//! ```
//!
//! An epoch that cannot be carried over is not ended here: to look at a VM, or to start a clone of it, must not cost the
//! next backup anything. The next backup ends it, and says why.
//!
//! **A crash** after the bitmap leaves a bitmap in a QEMU that the log does not know of: the next start compares again, with
//! the bitmap there already.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;

use super::evidence::{Doubt, Proof};
use super::graph::Graph;
use super::harvest::{self, Harvester};
use super::medium::{self, OpenFiles, Subject};
use super::place::not_kept;
use super::tracking::{self, Bench};
use super::{Vm, device, persist, qemu_failed};
use crate::checkpoint::{Bitmap, EpochStart, Log, Medium};
use crate::extent::Extent;
use crate::machine::{Disk, Verdict};
use crate::monitor;
use crate::units::{CheckpointId, EpochId, GRANULE_BYTES};
use crate::wire::message::Failure;

/// How long the files of a machine's disks may take to be looked at (a dead network file system never answers).
const FILES_WITHIN: Duration = Duration::from_secs(3);

/// How long a device may take to be read for its fingerprint.
const DEVICE_WITHIN: Duration = Duration::from_secs(30);

/// Does work that blocks on files, for a bounded time.
pub(super) async fn on_files<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    on_files_within(FILES_WITHIN, work).await
}

async fn on_files_within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    match tokio::time::timeout(limit, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(e)) => Err(format!("could not be looked at: {e}")),
        Err(_) => Err("could not be looked at: its file system does not answer".to_owned()),
    }
}

/// The disks that can be tracked.
pub(super) fn trackable(graph: &Graph) -> impl Iterator<Item = &Disk> {
    let all = graph.disks.iter().filter(|d| d.verdict == Verdict::Protectable).map(|d| &d.disk);
    all.filter(|d| !d.read_only && d.shared.is_none())
}

impl Vm {
    /// What each disk of the machine is made of now, by its name.
    pub(super) async fn media(&self, graph: &Graph) -> BTreeMap<String, Medium> {
        let pid = self.inner.qemu.pid;
        let subjects: Vec<_> = graph.disks.iter().map(|d| (d.disk.name.clone(), Subject::of(graph, &d.disk))).collect();
        let names: Vec<_> = subjects.clone();
        let looked = on_files(move || {
            let open = OpenFiles::of(pid);
            subjects.into_iter().map(|(name, s)| (name, medium::look(pid, &open, &s))).collect::<BTreeMap<_, _>>()
        });
        let mut media: BTreeMap<String, Medium> = looked.await.unwrap_or_else(|_| {
            // Names without numbers: they still tell a node that has something else open.
            names.into_iter().map(|(name, s)| (name, medium::look(-1, &OpenFiles::default(), &s))).collect()
        });
        let migration = monitor::migration(self.monitor()).await;
        media.values_mut().for_each(|medium| medium.migration.clone_from(&migration));
        media
    }

    /// Carries epochs over to this QEMU, where there is proof. Gives the machine as it is then, if it had to be looked at.
    pub(super) async fn carry_over(&self) -> Result<Option<Graph>, Failure> {
        // Nothing is tracked yet: nothing to ask QEMU for.
        if std::fs::read_dir(&self.inner.place.disks).is_ok_and(|mut d| d.next().is_none()) {
            return Ok(None);
        }
        let graph = self.graph_with_sharers().await?;
        let run_state = monitor::run_state(self.monitor()).await.map_err(qemu_failed)?;
        let mut doubts = BTreeMap::new();
        let (mut harvester, mut changed) = (None, false);
        for (i, disk) in trackable(&graph).enumerate() {
            let mut log = tracking::open_log(&self.inner.place.disks, &disk.name)?;
            if log.epoch().is_none_or(|e| e.qemu == self.inner.qemu) {
                continue;
            }
            changed = true;
            let carried = self.carry_disk(i, disk, &mut log, &graph, &run_state, &mut harvester).await;
            match carried {
                Ok(proof) => tracing::info!(vm = self.inner.name, disk = disk.name, ?proof, "the epoch goes on"),
                Err(doubt) => {
                    tracing::info!(vm = self.inner.name, disk = disk.name, "the epoch does not go on: {doubt}");
                    // The first look explains; by the next one the guest has written itself.
                    doubts.insert(disk.name.clone(), self.doubt(&disk.name).unwrap_or(doubt));
                }
            }
        }
        if harvester.is_some() {
            self.clean_up_now().await?;
        }
        self.set_doubts(doubts);
        match changed {
            true => self.graph_with_sharers().await.map(Some),
            false => Ok(Some(graph)),
        }
    }

    /// [`Self::carry_over`], then the machine.
    pub(super) async fn carried_over(&self) -> Result<Graph, Failure> {
        match self.carry_over().await? {
            Some(graph) => Ok(graph),
            None => self.graph_with_sharers().await,
        }
    }

    async fn carry_disk(
        &self,
        i: usize,
        disk: &Disk,
        log: &mut Log,
        graph: &Graph,
        run_state: &str,
        harvester: &mut Option<Harvester>,
    ) -> Result<Proof, String> {
        let (monitor, names, pid) = (self.monitor(), self.names(), self.inner.qemu.pid);
        let words = |e: &dyn std::fmt::Display| e.to_string();
        let Some(epoch) = log.epoch().cloned() else { return Err("no epoch runs".to_owned()) };
        let bench = Bench { names, graph, qemu: &self.inner.qemu, run_state };
        let subject = Subject::of(graph, disk);
        let here = epoch.qemu.boot_id == self.inner.qemu.boot_id && epoch.size_bytes == disk.size_bytes;
        let exclusive = self.inner.options.exclusive_device.has(&disk.name);
        let closed = epoch.closed.filter(|_| here);
        if !exclusive && closed.as_ref().is_some_and(|c| c.device.is_some()) {
            let why = "is a block device, and the configuration does not say exclusive_device any more";
            return Err(Doubt::NoStamp(why.to_owned()).to_string());
        }
        let closed = closed.filter(|c| c.stamp.is_some() || c.device.is_some());
        let name = names.since(epoch.last);
        let found = graph.bitmap(&disk.node, &name);
        let (Some(closed), true) = (closed, found.is_none_or(|b| !b.persistent && b.recording)) else {
            let medium = self.media(graph).await.remove(&disk.name);
            let proof = tracking::judge(log, bench, disk, medium.as_ref().unwrap_or(&Medium::default()), None)?;
            log.carry_epoch(self.inner.qemu.clone(), &disk.node, medium).map_err(|e| words(&e))?;
            log.note_kept(proof == Proof::Stored).map_err(|e| words(&e))?;
            return Ok(proof);
        };
        let added = found.is_none();
        if added {
            tracking::add_bitmap(monitor, &disk.node, &name, GRANULE_BYTES, false).await.map_err(|e| words(&e))?;
            crate::fault::point("carry.bitmap");
        }
        let within = if closed.device.is_some() { DEVICE_WITHIN } else { FILES_WITHIN };
        let looked = on_files_within(within, {
            let subject = subject.clone();
            move || {
                match (&closed.stamp, &closed.device) {
                    (Some(stamp), _) => medium::hold(pid, &subject)?.compare_with(stamp)?,
                    (None, Some(before)) => device::compare(pid, &subject, before)?,
                    (None, None) => return Err("no stamp".to_owned()),
                }
                Ok(medium::look(pid, &OpenFiles::of(pid), &subject))
            }
        });
        let looked = looked.await.and_then(|found| found);
        let migration = monitor::migration(monitor).await;
        let looked = looked.map(|medium| Medium { migration, ..medium });
        let compared = looked.as_ref().map(drop).map_err(Clone::clone);
        let with_bitmap = self.graph().await.map_err(|e| words(&e))?;
        let bench = Bench { graph: &with_bitmap, ..bench };
        let judged = tracking::judge(log, bench, disk, &Medium::default(), Some(&compared));
        let carried = match (judged, looked) {
            (Ok(proof), Ok(medium)) => {
                let done = self.sentinel(i, disk, &with_bitmap, harvester).await.map_err(|e| e.message);
                crate::fault::point("carry.sentinel");
                let carry = |()| {
                    log.carry_epoch(self.inner.qemu.clone(), &disk.node, Some(medium))?;
                    log.note_kept(false)
                };
                done.and_then(|()| carry(()).map_err(|e| words(&e))).map(|()| proof)
            }
            (Err(doubt), _) | (_, Err(doubt)) => Err(doubt),
        };
        if carried.is_err() && added {
            tracking::remove_bitmap(monitor, &disk.node, &name).await.map_err(|e| words(&e))?;
        }
        carried
    }

    /// Gives a disk its sentinel, if it has none.
    async fn sentinel(
        &self,
        i: usize,
        disk: &Disk,
        graph: &Graph,
        harvester: &mut Option<Harvester>,
    ) -> Result<(), Failure> {
        let (monitor, names) = (self.monitor(), self.names());
        if tracking::has_sentinel(names, graph, &disk.node) {
            return Ok(());
        }
        let old = graph.bitmaps(&disk.node).iter().filter_map(|b| b.name.as_deref());
        for name in old.filter(|name| names.is_sentinel(name)) {
            tracking::remove_bitmap(monitor, &disk.node, name).await.map_err(qemu_failed)?;
        }
        let harvester = harvester.get_or_insert_with(|| Harvester::new(monitor.clone(), &self.inner.place.sockets));
        let node = names.helper(i);
        harvest::add_helper_node(monitor, &node, disk.size_bytes).await.map_err(qemu_failed)?;
        tracking::add_bitmap(monitor, &node, "last", GRANULE_BYTES, false).await.map_err(qemu_failed)?;
        let last = disk.size_bytes.saturating_sub(1) / GRANULE_BYTES * GRANULE_BYTES;
        let mut bit = Bitmap::new(disk.size_bytes);
        bit.set(Extent::between(last, disk.size_bytes));
        harvester.set_bits(&node, "last", &bit).await?;
        let keep = self.keeps(graph, disk);
        tracking::set_sentinel(monitor, names, &disk.node, (&node, "last"), keep).await
    }

    /// Begins an epoch for every disk that can be tracked and is not. For a QEMU whose guest has not run yet.
    pub async fn track_all(&self) -> Result<(), Failure> {
        let _guard = self.claim()?;
        let (monitor, names) = (self.monitor(), self.names());
        // A try before may have left something.
        self.clean_up_now().await?;
        let graph = self.graph_with_sharers().await?;
        let run_state = monitor::run_state(monitor).await.map_err(qemu_failed)?;
        let media = self.media(&graph).await;
        let nothing = Medium::default();
        let mut harvester = None;
        let bench = Bench { names, graph: &graph, qemu: &self.inner.qemu, run_state: &run_state };
        for (i, disk) in trackable(&graph).enumerate() {
            let mut log = tracking::open_log(&self.inner.place.disks, &disk.name)?;
            let medium = media.get(&disk.name).unwrap_or(&nothing);
            let Err(reason) = tracking::judge(&log, bench, disk, medium, None) else { continue };
            let reason = self.doubt(&disk.name).unwrap_or(reason);
            log.end_epoch(&reason).map_err(not_kept)?;
            tracking::recover(monitor, names, &graph, &disk.node, &log).await.map_err(qemu_failed)?;
            let first = CheckpointId::random();
            let keep = self.keeps(&graph, disk);
            let kept = persist::add_recording(monitor, &disk.node, &names.since(first), keep).await;
            let kept = kept.map_err(qemu_failed)?;
            let fresh = self.graph().await?;
            self.sentinel(i, disk, &fresh, &mut harvester).await?;
            let start = EpochStart {
                id: EpochId::random(),
                first,
                time: Timestamp::now(),
                size_bytes: disk.size_bytes,
                qemu: self.inner.qemu.clone(),
                node: disk.node.clone(),
                medium: media.get(&disk.name).cloned(),
            };
            log.begin_epoch(start, &reason).map_err(not_kept)?;
            log.note_kept(kept).map_err(not_kept)?;
        }
        self.clean_up_now().await
    }
}
