//! Status and detach.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::names::Names;
use super::place::not_kept;
use super::tracking::Bench;
use super::{Vm, qemu_failed, tracking, undo};
use crate::checkpoint::Medium;
use crate::machine::Verdict;
use crate::monitor;
use crate::units::human_bytes;
use crate::wire::message::{Failure, SessionStatus, TrackingStatus, VmStatus};

impl Vm {
    /// State for people and programs.
    pub async fn status(&self) -> VmStatus {
        let (state, graph) = match (monitor::run_state(self.monitor()).await, self.graph_with_sharers().await) {
            (Ok(state), Ok(graph)) => (state, Some(graph)),
            (Ok(state), Err(_)) => (state, None),
            (Err(e), _) => (format!("unreachable: {e}"), None),
        };
        // Opening a log mends it, which must not meet a session that seals: during one, the last look is shown.
        let Ok(_guard) = self.claim() else {
            let disks = self.inner.tracking.lock().unwrap_or_else(PoisonError::into_inner).clone();
            return self.vm_status(state, disks, false);
        };
        let mut disks = vec![];
        let Some(graph) = graph else { return self.vm_status(state, disks, true) };
        let media = self.media(&graph).await;
        let (names, nothing) = (self.names(), Medium::default());
        let bench = Bench { names, graph: &graph, qemu: &self.inner.qemu, run_state: &state };
        for found in graph.disks.iter().filter(|d| d.verdict == Verdict::Protectable) {
            let Ok(log) = tracking::open_log(&self.inner.place.disks, &found.disk.name) else { continue };
            let medium = media.get(&found.disk.name).unwrap_or(&nothing);
            let broken = log.epoch().and_then(|_| self.verdict(&log, bench, &found.disk, medium).err());
            let epoch = log.epoch().filter(|_| broken.is_none());
            let live = epoch.and_then(|e| graph.bitmap(&found.disk.node, &names.since(e.last)));
            disks.push(TrackingStatus {
                disk: found.disk.name.clone(),
                epoch: epoch.map(|e| e.id),
                checkpoint_number: log.epoch().map(|e| e.number),
                checkpoint_time: log.checkpoints().last().map(|h| h.time),
                dirty_bytes: live.map(|b| b.count_bytes),
                // An end that the next backup will write down is known already.
                last_end: match broken {
                    Some(reason) => Some(format!("{:.0}: {reason}", Timestamp::now())),
                    None => log.last_end().map(|e| format!("{:.0}: {}", e.time, e.reason)),
                },
            });
        }
        self.inner.tracking.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&disks);
        self.vm_status(state, disks, true)
    }

    fn vm_status(&self, state: String, disks: Vec<TrackingStatus>, idle: bool) -> VmStatus {
        let qemu_version = Some(self.inner.machine.qemu_version.clone());
        let session = self.progress().map(|session| SessionStatus {
            running_ms: Timestamp::now().duration_since(session.instant).as_millis().max(0) as u64,
            ..session
        });
        let owed = undo::Debts::new(&self.inner.place.sockets).owed(undo::Debt::Thaw);
        // While a fleece opens the debt is normal: it is there for a fraction of the lease.
        let alarm = "the guest may be FROZEN by a backup whose thaw its agent has not confirmed; the thaw is being \
                     tried; if the guest hangs, start its agent again (it knows that it has to thaw), or reset the guest";
        let alarms = if owed && (session.is_some() || idle) { vec![alarm.to_owned()] } else { vec![] };
        VmStatus {
            vm: self.inner.name.clone(),
            state,
            qemu_version,
            session,
            disks,
            alarms,
            queue: vec![],
            last: self.last(),
        }
    }

    /// Takes everything of ours out of QEMU, bitmaps too, and ends the epochs. With `all`, also what livebackups with other
    /// state directories have left there: none of them is alive, since we have the QEMU. Says what it removed, and what of theirs
    /// is still there.
    pub async fn detach(&self, all: bool) -> Result<(Vec<String>, Vec<String>), Failure> {
        let _guard = self.claim()?;
        let mut of_others = vec![];
        if all {
            of_others = self.remove_others().await?;
        }
        let mut removed = self.detach_ours().await?;
        removed.extend(of_others);
        let left = self.others().await?;
        let left = left.iter().map(|(owner, names)| format!("{} of livebackup {owner}", names.join(", ")));
        Ok((removed, left.collect()))
    }

    /// By other owner's short id the names of what is in QEMU of theirs.
    async fn others(&self) -> Result<BTreeMap<String, Vec<String>>, Failure> {
        let monitor = self.monitor();
        let exports = monitor.raw("query-block-exports", json!({})).await.map_err(qemu_failed)?;
        let nodes = monitor.raw("query-named-block-nodes", json!({"flat": true})).await.map_err(qemu_failed)?;
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let of_nodes = list(&nodes).into_iter().flat_map(|node| {
            let bitmaps = list(&node["dirty-bitmaps"]).into_iter().map(|bitmap| bitmap["name"].clone());
            bitmaps.chain([node["node-name"].clone()]).collect::<Vec<_>>()
        });
        let mut found = BTreeMap::<String, Vec<String>>::new();
        for name in list(&exports).into_iter().map(|export| export["id"].clone()).chain(of_nodes) {
            let Some(name) = name.as_str().filter(|name| !self.names().is_ours(name)) else { continue };
            if let Some(names) = Names::of(name) {
                found.entry(names.owner().to_owned()).or_default().push(name.to_owned());
            }
        }
        Ok(found)
    }

    async fn remove_others(&self) -> Result<Vec<String>, Failure> {
        let (monitor, sockets) = (self.monitor(), &self.inner.place.sockets);
        let mut removed = vec![];
        for (owner, found) in self.others().await? {
            let Some(names) = found.first().and_then(|name| Names::of(name)) else { continue };
            let key = sockets.file_name().and_then(|name| name.to_str()?.split_once('-')).map_or("", |(_, key)| key);
            let theirs = sockets.with_file_name(format!("{owner}-{key}"));
            removed.extend(undo::remove_all(monitor, &names, &theirs).await.map_err(Failure::from)?);
            removed.extend(self.remove_bitmaps(&names).await?);
        }
        Ok(removed)
    }

    async fn detach_ours(&self) -> Result<Vec<String>, Failure> {
        let (monitor, names) = (self.monitor(), self.names());
        let mut removed = undo::remove_all(monitor, names, &self.inner.place.sockets).await.map_err(Failure::from)?;
        removed.extend(self.inner.gauge.switch_off().await.map_err(qemu_failed)?);
        let graph = self.graph().await?;
        for found in &graph.disks {
            let mut log = tracking::open_log(&self.inner.place.disks, &found.disk.name)?;
            log.end_epoch("livebackup was detached from the virtual machine").map_err(not_kept)?;
        }
        removed.extend(self.remove_bitmaps(names).await?);
        Ok(removed)
    }

    /// Removes an owner's bitmaps.
    async fn remove_bitmaps(&self, names: &Names) -> Result<Vec<String>, Failure> {
        let (monitor, graph) = (self.monitor(), self.graph().await?);
        let mut removed = vec![];
        for node in graph.node_names() {
            if graph.bitmaps(node).iter().any(|b| b.persistent) {
                // Taking one out of the image flushes it with QEMU's main loop held.
                undo::sync_image(monitor, node).await;
            }
            for bitmap in graph.bitmaps(node) {
                if let Some(name) = bitmap.name.as_deref().filter(|n| names.is_ours(n)) {
                    tracking::remove_bitmap(monitor, node, name).await.map_err(qemu_failed)?;
                    removed.push(format!("bitmap {name} of {node} ({} dirty)", human_bytes(bitmap.count_bytes)));
                }
            }
        }
        Ok(removed)
    }
}
