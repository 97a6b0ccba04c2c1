//! Doctor: what stands in the way of a good backup, and what to do about it.

mod guest;

use super::scratch::ScratchDir;
use super::{Transport, Vm, graph, persist};
use crate::machine::Verdict;
use crate::monitor::{self, Capabilities};
use crate::units::human_bytes;
pub use crate::wire::message::{Check, CheckVerdict};

impl Vm {
    /// Looks at QEMU, its disks, what others do to them, the space for scratch, the guest's agent and the holds. Changes nothing.
    pub async fn doctor(&self) -> Vec<Check> {
        use CheckVerdict::{Bad, Good, Warn};
        let mut checks = vec![];
        let capabilities = &self.capabilities_now().await;
        let verdict = if !capabilities.can_back_up() {
            Bad
        } else if !capabilities.refusals.is_empty() || !capabilities.trust_block_status {
            Warn
        } else {
            Good
        };
        let words = if verdict == Bad { "this QEMU cannot do live backups" } else { "this QEMU can do live backups" };
        checks.push(Check::new("QEMU", verdict, format!("{} ({words})", capabilities.version)));
        for (name, value, meaning) in capabilities.rows().into_iter().skip(1) {
            checks.push(Check::new(name, Good, format!("{value}: {meaning}")));
        }
        match monitor::run_state(self.monitor()).await {
            Ok(state) => checks.push(Check::new("run state", Good, state)),
            Err(e) => checks.push(Check::new("run state", Bad, e.to_string())),
        }
        match self.graph().await {
            Err(e) => checks.push(Check::new("disks", Bad, e.to_string())),
            Ok(graph) => self.check_disks(&graph, &mut checks),
        }
        let dir = self.inner.options.scratch.clone().unwrap_or_else(|| self.inner.options.state.join("scratch"));
        checks.push(match ScratchDir::open(&dir, self.inner.options.scratch_budget_bytes) {
            Ok(scratch) => {
                Check::new("scratch", Good, format!("{}, {} free", dir.display(), human_bytes(scratch.free_bytes())))
            }
            Err(e) => Check::new("scratch", Bad, e.message),
        });
        self.check_guest(&mut checks).await;
        if !self.monitor().can_pass_fds() {
            checks.push(Check::new("monitor", Warn, "a TCP monitor takes no descriptors: QEMU must be able to open our scratch by its path; a unix socket is better"));
        }
        checks
    }

    /// What QEMU can do, tried anew unless a session is using it.
    async fn capabilities_now(&self) -> Capabilities {
        let (monitor, names, known) = &self.inner.bench_parts;
        match self.inner.session.try_lock() {
            Ok(_guard) => monitor::probe(monitor, names.prefix()).await.unwrap_or_else(|_| known.clone()),
            Err(_) => known.clone(),
        }
    }

    fn check_disks(&self, graph: &graph::Graph, checks: &mut Vec<Check>) {
        use CheckVerdict::{Bad, Good, Warn};
        let version = &self.inner.bench_parts.2.version;
        for found in &graph.disks {
            let name = format!("disk {}", found.disk.name);
            if found.disk.iothread && found.verdict == Verdict::Protectable && !version.at_least(10, 0) {
                let words = format!(
                    "runs in an iothread, and this QEMU ({version}) hangs when it is told to quit while a backup reads such a \
                     disk: let the backup end first, or use QEMU 10"
                );
                checks.push(Check::new(&name, Warn, words));
            }
            if found.disk.iothread
                && found.verdict == Verdict::Protectable
                && version.at_least(10, 0)
                && self.inner.options.transport == Transport::Vhost
            {
                let words = "runs in an iothread and is read over vhost-user-blk, as asked for: QEMU may crash when the guest is \
                             stopped (`stop`, virsh suspend) or the device reset meanwhile; without --transport it is read over NBD";
                checks.push(Check::new(&name, Warn, words));
            }
            checks.push(match (&found.verdict, &found.disk.shared) {
                (Verdict::NotProtectable(reason), _) => Check::new(&name, Bad, reason),
                (Verdict::LeftOut(reason), _) => Check::new(&name, Good, format!("left out: {reason}")),
                (Verdict::Protectable, Some(shared)) => {
                    Check::new(&name, Warn, format!("always read whole, since its medium is shared: {shared}"))
                }
                (Verdict::Protectable, None) => Check::new(&name, Good, "can be backed up"),
            });
            if self.inner.options.persistent_bitmaps && found.verdict == Verdict::Protectable && !found.disk.read_only {
                checks.push(match persist::can_keep(graph, &found.disk) {
                    Ok(()) => Check::new(&name, Good, "its image keeps our bitmaps when QEMU ends"),
                    Err(why) => Check::new(&name, Warn, format!("does not keep our bitmaps: the image {why}")),
                });
            }
        }
        if graph.disks.is_empty() {
            checks.push(Check::new("disks", Bad, "the virtual machine has none"));
        }
        for foreign in &graph.foreign {
            checks.push(Check::new("others at work", Bad, foreign.to_string()));
        }
        let known: Vec<_> = graph.disks.iter().map(|d| d.disk.node.as_str()).collect();
        for node in graph.node_names() {
            for bitmap in graph.bitmaps(node) {
                let Some(bitmap_name) = bitmap.name.as_deref() else { continue };
                if self.names().is_ours(bitmap_name) && !known.contains(&node) {
                    checks.push(Check::new("left-over", Warn, format!("our bitmap {bitmap_name} is on {node}, which is no disk's top node any more; the next `detach` removes it")));
                } else if bitmap_name.starts_with("livebackup-") && !self.names().is_ours(bitmap_name) {
                    checks.push(Check::new("another owner", Warn, format!("bitmap {bitmap_name} on {node} belongs to another state directory; it costs memory and nothing else")));
                }
            }
        }
    }
}
