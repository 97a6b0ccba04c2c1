//! Fleece: the state in which a disk can be read as it was at the instant, while the guest writes on.
//!
//! ```text
//!   guest device                       guest device
//!        │                                  │ qom-set drive = the instant
//!     disk node                      copy-before-write ──target──► scratch
//!   (bitmaps live here)                 │ file       ▲
//!                                    disk node    snapshot-access ── export ──► reader
//! ```
//!
//! Order, and what a crash leaves after each step (all of it found by name or debt, see [`undo`](super::undo)):
//!
//! 1. **Prepare**, guest running: scratch node, helper node with the bitmap `need`, the next bitmap on the disk.
//! 2. **Instant**: the guest is made [`quiet`](super::quiet). The bitmap so far is merged into `need`, and the filter is made
//!    (limited to `need`). With more than one disk the guest is stopped now, for no longer than a lease (the guardian owes it
//!    `cont`), and disks that were written to since are done anew. The filters are put above the disks, old bitmaps
//!    are disabled.
//! 3. **Proof**: nobody resizes a disk from now on, or has done so ([`pin`](super::pin)), and `need` joined with the old bitmap must have no more bits than `need`. Else a write fell between merge and
//!    instant, could not be read back, and the instant is taken again, with the guest stopped for it whatever the number of
//!    disks: one that writes without a pause would make each try fail, and then all of the disk be copied. Should that fail too,
//!    the third try has no limit.
//! 4. **Harvest**: the old bitmap is merged into one on the helper node, read ([`harvest`](super::harvest)), and given to the log.
//! 5. **Show**: a snapshot node and an export for each disk.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::{Value, json};

use super::descriptors::{FileSet, pass_listener};
use super::guardian::Guardian;
use super::harvest::{self, Harvester};
use super::names::Names;
use super::quiet::Quiet;
use super::scratch::Scratch;
use super::tracking::{self, Plan, add_bitmap, merge};
use super::undo::{self, Debt, Debts};
use super::{internal, persist, pin, qemu_failed};
use crate::checkpoint::Bitmap;
use crate::extent::Extent;
use crate::fault;
use crate::monitor::{Capabilities, Monitor, MonitorError, run_state};
use crate::units::{GRANULE_BYTES, MIB};
use crate::wire::message::{Failure, FailureCode};

/// A guest write waits no longer than this for a scratch that is slow. Some versions wrap above 4 s.
const CBW_TIMEOUT_S: u64 = 4;
/// The longest that the guest stands still for an instant: then it is let go, and the backup ends.
const STOP_LEASE: Duration = Duration::from_secs(10);
/// How long QEMU may take to say what its nodes are, when something has failed.
const LOOK_WITHIN: Duration = Duration::from_secs(3);
/// How often the instant is tried with a limit, before it is taken without.
const LIMITED_TRIES: usize = 2;
/// The shortest run of a needed set whose block status is asked for, and how much there has to be of them.
const ASKED_RUN_BYTES: u64 = 4 * MIB;
const ASKED_BYTES: u64 = 64 * MIB;

/// What the steps work with.
#[derive(Clone, Debug)]
pub struct Bench {
    /// The monitor.
    pub monitor: Monitor,
    /// Our names.
    pub names: Names,
    /// What this QEMU can do.
    pub capabilities: Capabilities,
    /// Directory for sockets and debts.
    pub sockets: PathBuf,
    /// Where scratch goes.
    pub scratch: Scratch,
}

/// A disk under the fleece.
#[derive(Debug)]
pub struct FleeceDisk {
    /// What happens to it.
    pub plan: Plan,
    pub(super) index: usize,
    limited: bool,
    /// Set while a limited filter stands: what the bitmap that it was limited to counted.
    limited_at: Option<Option<u64>>,
}

/// A fleece that is being opened, or open.
#[derive(Debug)]
pub struct Fleece {
    bench: Bench,
    /// The disks, in the session's order.
    pub disks: Vec<FleeceDisk>,
    chunk_bytes: u64,
    harvester: Harvester,
    /// The instant.
    pub instant: Timestamp,
    /// How long the guest was stopped for it.
    pub stopped: Duration,
}

impl FleeceDisk {
    /// Whether the guest can write to it, so that it needs one.
    pub(super) fn has_filter(&self) -> bool {
        !self.plan.disk.read_only
    }
}

impl Fleece {
    /// Steps 1 to 3. On an error, what was added is still there: [`undo::remove_all`] takes it out.
    pub async fn open(bench: Bench, plans: Vec<Plan>, chunk_bytes: u64, quiet: &mut Quiet) -> Result<Self, Failure> {
        let disks = plans.into_iter().enumerate().map(|(index, plan)| {
            let limited = plan.sealed.is_some();
            FleeceDisk { plan, index, limited, limited_at: None }
        });
        let disks = disks.collect();
        let (instant, stopped) = (Timestamp::UNIX_EPOCH, Duration::ZERO);
        let harvester = Harvester::new(bench.monitor.clone(), &bench.sockets);
        let mut this = Self { bench, disks, chunk_bytes, harvester, instant, stopped };
        match this.reach_instant(quiet).await {
            Ok(()) => Ok(this),
            Err(failure) => Err(this.resized(failure).await),
        }
    }

    /// Of a disk that was resized QEMU says that bitmaps do not fit, or a node: tells what has happened.
    async fn resized(&self, failure: Failure) -> Failure {
        let Bench { monitor, names, .. } = &self.bench;
        if failure.code != FailureCode::Qemu || monitor.is_closed() {
            return failure;
        }
        let nodes = monitor.raw_within(LOOK_WITHIN, "query-named-block-nodes", json!({"flat": true})).await;
        match nodes.map(|nodes| pin::check(&nodes, names, &self.disks)) {
            Ok(Err(resized)) => {
                tracing::info!("{failure}");
                resized
            }
            _ => failure,
        }
    }

    async fn reach_instant(&mut self, quiet: &mut Quiet) -> Result<(), Failure> {
        self.prepare().await?;
        for attempt in 0.. {
            self.take_instant(quiet, attempt > 0).await?;
            fault::point("fleece.instant");
            if let Some(why) = self.bench.scratch.exhausted() {
                return Err(Failure::new(FailureCode::NoSpace, why));
            }
            pin::add(&self.bench.monitor, &self.bench.names, &self.disks).await.map_err(qemu_failed)?;
            if self.is_proven().await? {
                break;
            }
            tracing::info!(attempt, "a write fell between merge and instant; the instant is taken again");
            self.take_back(attempt + 1 < LIMITED_TRIES).await?;
        }
        quiet.check()
    }

    async fn prepare(&mut self) -> Result<(), Failure> {
        for i in 0..self.disks.len() {
            if self.disks[i].has_filter() {
                self.add_scratch(i).await?;
                fault::point("fleece.scratch");
                self.add_helper(i).await?;
                fault::point("fleece.helper");
            }
        }
        for i in 0..self.disks.len() {
            let plan = &mut self.disks[i].plan;
            let (monitor, names, node) = (&self.bench.monitor, &self.bench.names, &plan.disk.node);
            if let Some(next) = plan.track.next() {
                let added = persist::add_recording(monitor, node, &names.since(next), plan.keep).await;
                plan.keep = added.map_err(qemu_failed)?;
                fault::point("fleece.bitmap");
            }
        }
        Ok(())
    }

    async fn add_scratch(&mut self, i: usize) -> Result<(), Failure> {
        let Bench { monitor, names, capabilities, scratch, sockets, .. } = &self.bench;
        let by_descriptor = monitor.can_pass_fds() && capabilities.files_by_descriptor;
        let size_bytes = self.disks[i].plan.disk.size_bytes;
        let (file, path) = scratch.add(i, size_bytes, !by_descriptor)?;
        if let Some(path) = &path {
            Debts::new(sockets).owe_file(i, path).map_err(internal)?;
        }
        let node = names.scratch(i);
        let filename = if by_descriptor {
            FileSet::pass(monitor, &file, &node).await?.filename()
        } else {
            path.as_deref().map(|p| p.display().to_string()).unwrap_or_default()
        };
        let arguments = json!({"driver": "file", "node-name": node, "filename": filename, "discard": "unmap"});
        let added = monitor.raw("blockdev-add", arguments).await;
        if let Some(path) = path {
            // QEMU has it open.
            let _ = std::fs::remove_file(path);
        }
        added.map(drop).map_err(qemu_failed)
    }

    /// The helper node with its bitmaps: `need` in chunks, `check` likewise, `old` in granules.
    async fn add_helper(&mut self, i: usize) -> Result<(), Failure> {
        let Bench { monitor, names, .. } = &self.bench;
        let disk = &self.disks[i];
        let node = names.helper(i);
        harvest::add_helper_node(monitor, &node, disk.plan.disk.size_bytes).await.map_err(qemu_failed)?;
        let (sentinel, keep) = (disk.plan.needs_sentinel && disk.plan.track.next().is_some(), disk.plan.keep);
        let mut sealed = disk.plan.sealed.clone();
        if let Some(sealed) = &mut sealed {
            disk.plan.also_read(self.chunk_bytes).for_each(|extent| sealed.set(extent));
        }
        let sealed = sealed.filter(|b| !b.is_empty());
        let chunk_bytes = self.chunk_bytes;
        for (name, granularity, disabled) in
            [("need", chunk_bytes, false), ("check", chunk_bytes, true), ("old", GRANULE_BYTES, true)]
        {
            add_bitmap(monitor, &node, name, granularity, disabled).await.map_err(qemu_failed)?;
        }
        if let Some(sealed) = sealed {
            self.harvester.set_bits(&node, "need", &sealed).await?;
        }
        if sentinel {
            let disk = self.disks[i].plan.disk.clone();
            add_bitmap(&self.bench.monitor, &node, "last", GRANULE_BYTES, false).await.map_err(qemu_failed)?;
            let last = disk.size_bytes.saturating_sub(1) / GRANULE_BYTES * GRANULE_BYTES;
            let mut bit = Bitmap::new(disk.size_bytes);
            bit.set(Extent::between(last, disk.size_bytes));
            self.harvester.set_bits(&node, "last", &bit).await?;
            tracking::set_sentinel(&self.bench.monitor, &self.bench.names, &disk.node, (&node, "last"), keep).await?;
            // `need` may have the bit too now, which costs one chunk that is copied and not read.
        }
        Ok(())
    }

    /// Step 2. Whatever fails, the guest is let go. `again`: a write fell between, and must not fall there once more.
    async fn take_instant(&mut self, quiet: &mut Quiet, again: bool) -> Result<(), Failure> {
        for i in 0..self.disks.len() {
            if self.disks[i].has_filter() && !self.disks[i].limited {
                self.add_filter(i).await.map_err(qemu_failed)?;
            }
        }
        let monitor = self.bench.monitor.clone();
        let filters = self.disks.iter().filter(|d| d.has_filter()).count();
        let stands = filters > 1 || again && filters > 0;
        let stop = stands && run_state(&monitor).await.map_err(qemu_failed)? == "running";
        let guardian = match stop {
            true => Some(
                Guardian::spawn(monitor.address()).map_err(|e| internal(format!("cannot start the guardian: {e}")))?,
            ),
            false => None,
        };
        // `stop` flushes the images with the guest standing still: flush them before.
        if stop {
            let images = self.disks.iter().filter_map(|d| Some(PathBuf::from(&d.plan.disk.chain.first()?.filename)));
            undo::sync_files(images.collect()).await;
        }
        let inserted = match quiet.enter().await {
            Err(failure) => Err(failure),
            Ok(()) => self.insert_quietly(&monitor, stands, guardian).await,
        };
        quiet.leave(inserted.as_ref().map(drop).map_err(|failure| failure.message.clone())).await;
        inserted
    }

    /// The guest may have been stopped or let go by its owner while it was made quiet.
    async fn insert_quietly(
        &mut self,
        monitor: &Monitor,
        stands: bool,
        guardian: Option<Guardian>,
    ) -> Result<(), Failure> {
        let runs = stands && run_state(monitor).await.map_err(qemu_failed)? == "running";
        match guardian {
            Some(guardian) if runs => self.stop_and_insert(monitor, guardian).await,
            None if runs => {
                let words = "the guest was let go while the instant was prepared; try again";
                Err(Failure::new(FailureCode::Busy, words))
            }
            _ => self.insert(false).await,
        }
    }

    async fn stop_and_insert(&mut self, monitor: &Monitor, mut guardian: Guardian) -> Result<(), Failure> {
        // With the guest running; once it stands still, only disks that were written to meanwhile need it again.
        self.limit(true).await.map_err(qemu_failed)?;
        let debts = Debts::new(&self.bench.sockets);
        debts.owe(Debt::Cont).map_err(internal)?;
        guardian.owe(Debt::Cont, &debts.path(Debt::Cont)).map_err(internal)?;
        let start = Instant::now();
        let work = async {
            monitor.raw("stop", json!({})).await.map_err(qemu_failed)?;
            fault::point("fleece.stopped");
            self.insert(true).await
        };
        let late = || MonitorError::Deadline { command: "stop, and the instant,".into(), limit: STOP_LEASE };
        let inserted = tokio::time::timeout(STOP_LEASE, work).await.unwrap_or_else(|_| Err(qemu_failed(late())));
        let resumed = undo::resume_whatever_it_takes(monitor, &debts).await;
        self.stopped = start.elapsed();
        if resumed.is_ok() {
            guardian.paid();
        }
        inserted?;
        resumed.map(drop).map_err(qemu_failed)
    }

    /// Makes the limited filters; if it is done `twice`, each anew whose disk was written to since. A bitmap that counts as much
    /// as before is the same: bits are only ever set in it.
    async fn limit(&mut self, twice: bool) -> Result<(), MonitorError> {
        let Bench { monitor, names, .. } = self.bench.clone();
        let limited: Vec<_> =
            (0..self.disks.len()).filter(|i| self.disks[*i].has_filter() && self.disks[*i].limited).collect();
        if limited.is_empty() {
            return Ok(());
        }
        // Before the merges: what is written between is counted the next time.
        let nodes = match twice {
            true => monitor.raw("query-named-block-nodes", json!({"flat": true})).await?,
            false => Value::Null,
        };
        for i in limited {
            let (node, head) = (self.disks[i].plan.disk.node.clone(), self.current(i));
            let now = head.and_then(|head| count(&nodes, &node, &names.since(head)));
            if self.disks[i].limited_at == Some(now) {
                continue;
            }
            if self.disks[i].limited_at.take().is_some() {
                // Only with the guest stopped, which flushed the image: deleting a filter does so too.
                monitor.raw("blockdev-del", json!({"node-name": names.filter(i)})).await?;
            }
            if let Some(head) = head {
                merge(&monitor, (&names.helper(i), "need"), &[(&node, &names.since(head))]).await?;
            }
            self.add_filter(i).await?;
            self.disks[i].limited_at = Some(now);
        }
        Ok(())
    }

    async fn insert(&mut self, was_limited: bool) -> Result<(), Failure> {
        let Bench { monitor, names, .. } = self.bench.clone();
        self.limit(was_limited).await.map_err(qemu_failed)?;
        fault::point("fleece.filter");
        // A snapshot that somebody took since would be lost to the guest, with all that it has written into it.
        let blocks = monitor.raw("query-block", json!({})).await.map_err(qemu_failed)?;
        for disk in self.disks.iter().filter(|disk| disk.has_filter()) {
            let found = &disk.plan.disk;
            if let Some(now) = undo::node_of(&blocks, &found.qom_path).filter(|now| *now != found.node) {
                let (name, node) = (&found.name, &found.node);
                let words = format!(
                    "disk {name} was changed by another program while the backup began: its node was {node:?} and is now \
                     {now:?}; run the backup again when that program is done"
                );
                return Err(Failure::new(FailureCode::Busy, words));
            }
            pin::check_size(&disk.plan, undo::size_of(&blocks, &found.qom_path))?;
        }
        for i in 0..self.disks.len() {
            if self.disks[i].has_filter() {
                let path = &self.disks[i].plan.disk.qom_path;
                let drive = json!({"path": path, "property": "drive", "value": names.filter(i)});
                monitor.raw("qom-set", drive).await.map_err(qemu_failed)?;
                fault::point("fleece.inserted");
            }
        }
        self.instant = Timestamp::now();
        let disable: Vec<_> = self
            .old_bitmaps()
            .map(|(_, node, name)| json!({"type": "block-dirty-bitmap-disable", "data": {"node": node, "name": name}}))
            .collect();
        if !disable.is_empty() {
            monitor.raw("transaction", json!({"actions": disable})).await.map_err(qemu_failed)?;
        }
        Ok(())
    }

    /// The checkpoint whose bitmap says what was written since the log's last one: also for a backup that takes none.
    fn current(&self, i: usize) -> Option<crate::units::CheckpointId> {
        let plan = &self.disks[i].plan;
        plan.track.head().or_else(|| plan.sealed.as_ref().and_then(|_| plan.log.last()))
    }

    /// (index, node, bitmap) of what the instant closes.
    fn old_bitmaps(&self) -> impl Iterator<Item = (usize, String, String)> + '_ {
        let heads = self.disks.iter().filter_map(|d| Some((d, d.plan.track.head()?)));
        heads.map(|(d, head)| (d.index, d.plan.disk.node.clone(), self.bench.names.since(head)))
    }

    async fn add_filter(&self, i: usize) -> Result<(), MonitorError> {
        let Bench { monitor, names, .. } = &self.bench;
        let disk = &self.disks[i];
        let mut options = json!({
            "driver": "copy-before-write", "node-name": names.filter(i), "file": disk.plan.disk.node,
            "target": names.scratch(i), "on-cbw-error": "break-snapshot", "cbw-timeout": CBW_TIMEOUT_S,
        });
        if disk.plan.disk.discard_unmap {
            options["discard"] = json!("unmap");
        }
        if disk.limited {
            options["bitmap"] = json!({"node": names.helper(i), "name": "need"});
        }
        monitor.raw("blockdev-add", options).await.map(drop)
    }

    /// Step 3.
    async fn is_proven(&self) -> Result<bool, Failure> {
        let Bench { monitor, names, .. } = &self.bench;
        let mut helpers = vec![];
        for disk in self.disks.iter().filter(|d| d.limited) {
            let helper = names.helper(disk.index);
            let mut sources = vec![(helper.clone(), "need".to_owned())];
            if let Some(head) = self.current(disk.index) {
                sources.push((disk.plan.disk.node.clone(), names.since(head)));
            }
            let sources: Vec<_> = sources.iter().map(|(node, name)| (node.as_str(), name.as_str())).collect();
            merge(monitor, (&helper, "check"), &sources).await.map_err(qemu_failed)?;
            helpers.push(helper);
        }
        let nodes = monitor.raw("query-named-block-nodes", json!({"flat": true})).await.map_err(qemu_failed)?;
        pin::check(&nodes, names, &self.disks)?;
        Ok(helpers.iter().all(|helper| match (count(&nodes, helper, "need"), count(&nodes, helper, "check")) {
            (Some(need), Some(check)) => need == check,
            _ => false,
        }))
    }

    /// Undoes step 2, so that the instant can be taken again.
    async fn take_back(&mut self, limit_again: bool) -> Result<(), Failure> {
        let Bench { monitor, names, .. } = self.bench.clone();
        // What was written since the old bitmaps were disabled is in the next ones only, and lies before the instant that
        // is about to be taken: the old ones get it.
        for disk in &self.disks {
            let tracking::Track::Continue { head, next } = disk.plan.track else { continue };
            let (node, old) = (&disk.plan.disk.node, names.since(head));
            let actions = json!({"actions": [
                {"type": "block-dirty-bitmap-enable", "data": {"node": node, "name": old}},
                {"type": "block-dirty-bitmap-merge", "data": {"node": node, "target": old, "bitmaps": [names.since(next)]}},
            ]});
            monitor.raw("transaction", actions).await.map_err(qemu_failed)?;
        }
        for disk in self.disks.iter_mut().filter(|d| d.has_filter()) {
            let Plan { disk: found, .. } = &disk.plan;
            pin::remove(&monitor, &names, disk.index).await.map_err(qemu_failed)?;
            let back = json!({"path": found.qom_path, "property": "drive", "value": found.node});
            monitor.raw("qom-set", back).await.map_err(qemu_failed)?;
            undo::sync_image(&monitor, &found.node).await;
            monitor.raw("blockdev-del", json!({"node-name": names.filter(disk.index)})).await.map_err(qemu_failed)?;
            (disk.limited, disk.limited_at) = (disk.limited && limit_again, None);
        }
        Ok(())
    }

    /// Step 4: what was written between the last checkpoint and this instant, per disk that had one; for a backup that
    /// takes no checkpoint, up to now (a superset). The disk's own bitmap stays in QEMU until
    /// [`Fleece::forget_old`].
    pub async fn harvest(&mut self, i: usize) -> Result<Option<Bitmap>, Failure> {
        let Some(head) = self.current(i) else { return Ok(None) };
        let Bench { monitor, names, .. } = self.bench.clone();
        let disk = self.disks[i].plan.disk.clone();
        let helper = names.helper(i);
        merge(&monitor, (&helper, "old"), &[(&disk.node, &names.since(head))]).await.map_err(qemu_failed)?;
        let bitmap = self.harvester.read(&helper, "old", disk.size_bytes).await?;
        fault::point("fleece.harvested");
        Ok(Some(bitmap))
    }

    /// Removes the old bitmap of a disk from QEMU: the log has it.
    pub async fn forget_old(&self, i: usize) -> Result<(), Failure> {
        if let Some((_, node, name)) = self.old_bitmaps().find(|(index, _, _)| *index == i) {
            if self.disks[i].plan.keep {
                // Taking it out of the image flushes with QEMU's main loop held.
                undo::sync_image(&self.bench.monitor, &node).await;
            }
            tracking::remove_bitmap(&self.bench.monitor, &node, &name).await.map_err(qemu_failed)?;
        }
        fault::point("fleece.forgotten");
        Ok(())
    }

    /// Step 5, for one disk: the node to read, made visible above the filter.
    pub async fn show(&mut self, i: usize) -> Result<String, Failure> {
        let Bench { monitor, names, .. } = &self.bench;
        if !self.disks[i].has_filter() {
            return Ok(self.disks[i].plan.disk.node.clone());
        }
        let node = names.snapshot(i);
        let options =
            json!({"driver": "snapshot-access", "node-name": node, "file": names.filter(i), "discard": "unmap"});
        monitor.raw("blockdev-add", options).await.map_err(qemu_failed)?;
        fault::point("fleece.snapshot");
        Ok(node)
    }

    /// Which granules of a shown disk may hold something else than zeroes, as far as they are `needed`. All of them, where this
    /// QEMU's word on that cannot be trusted or had, or is not worth asking for.
    pub async fn data(&mut self, i: usize, node: &str, needed: &Bitmap) -> Result<Bitmap, Failure> {
        let disk = self.disks[i].plan.disk.clone();
        let capabilities = &self.bench.capabilities;
        let safe = !disk.iothread || capabilities.nbd_safe_in_iothread;
        // What a limited filter does not keep cannot be asked for either.
        let asked = match self.disks[i].limited {
            true => worth_asking(needed),
            false => vec![Extent::new(0, disk.size_bytes)],
        };
        if !capabilities.trust_block_status || !safe || asked.is_empty() {
            return Ok(Bitmap::full(disk.size_bytes));
        }
        let id = format!("{}st{i}", self.bench.names.prefix());
        match self.harvester.data(node, &id, disk.size_bytes, &asked).await? {
            Some(Ok(data)) => Ok(data),
            None => Ok(Bitmap::full(disk.size_bytes)),
            Some(Err(error)) => {
                tracing::warn!(disk = disk.name, "which parts are empty cannot be had, so all is read: {error}");
                Ok(Bitmap::full(disk.size_bytes))
            }
        }
    }

    /// Exports a shown disk over vhost-user-blk; gives the socket.
    pub async fn export_vhost(&self, i: usize, node: &str) -> Result<PathBuf, Failure> {
        let Bench { monitor, names, capabilities, sockets, .. } = &self.bench;
        let id = names.snapshot(i);
        let socket = sockets.join(format!("{id}.vhost"));
        let addr = if monitor.can_pass_fds() && capabilities.sockets_by_descriptor {
            pass_listener(monitor, &socket, &id).await?;
            json!({"type": "fd", "str": id})
        } else {
            json!({"type": "unix", "path": socket})
        };
        let export = json!({"type": "vhost-user-blk", "id": id, "node-name": node, "writable": self.disks[i].has_filter(), "addr": addr});
        monitor.raw("block-export-add", export).await.map_err(qemu_failed)?;
        fault::point("fleece.export");
        Ok(socket)
    }

    /// Exports a shown disk over NBD; gives the socket and the export's name.
    pub async fn export_nbd(&mut self, i: usize, node: &str) -> Result<(PathBuf, String), Failure> {
        let Some(socket) = self.harvester.server().await? else {
            return Err(Failure::new(
                FailureCode::Busy,
                format!(
                    "disk {} can be read over NBD only, and QEMU's only NBD server was started by another program; wait \
                     until that program is done, or stop the server with nbd-server-stop",
                    self.disks[i].plan.disk.name
                ),
            ));
        };
        let Bench { monitor, names, .. } = &self.bench;
        let id = names.snapshot(i);
        let writable = self.disks[i].has_filter();
        let export = json!({"type": "nbd", "id": id, "node-name": node, "name": id, "writable": writable});
        monitor.raw("block-export-add", export).await.map_err(qemu_failed)?;
        fault::point("fleece.export");
        Ok((socket, id))
    }

    /// What the steps work with.
    pub fn bench(&self) -> &Bench {
        &self.bench
    }
}

/// The long runs of a needed set, if there is enough of them: a guest that has trimmed its disk has long runs of zeroes in an
/// incremental. To ask costs an export and a request for each run, about as much as reading [`ASKED_BYTES`] of zeroes.
fn worth_asking(needed: &Bitmap) -> Vec<Extent> {
    let runs: Vec<_> = needed.extents().filter(|run| run.len_bytes >= ASKED_RUN_BYTES).collect();
    match runs.iter().map(|run| run.len_bytes).sum::<u64>() >= ASKED_BYTES {
        true => runs,
        false => vec![],
    }
}

/// The dirty count of a bitmap in `query-named-block-nodes`.
pub(super) fn count(nodes: &Value, node: &str, bitmap: &str) -> Option<u64> {
    let found = nodes.as_array()?.iter().find(|n| n["node-name"] == node)?;
    found["dirty-bitmaps"].as_array()?.iter().find(|b| b["name"] == bitmap)?["count"].as_u64()
}
