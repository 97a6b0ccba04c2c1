//! Doctor: what stands in the way of a good backup, and what to do about it.

use serde::{Deserialize, Serialize};

use super::scratch::ScratchDir;
use super::{Vm, graph};
use crate::machine::Verdict;
use crate::monitor;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckVerdict {
    /// As it should be.
    Good,
    /// It works, with a drawback.
    Warn,
    /// Backups fail.
    Bad,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it came out.
    pub verdict: CheckVerdict,
    /// What was seen, and what to do.
    pub words: String,
}

impl Check {
    fn new(name: &str, verdict: CheckVerdict, words: impl Into<String>) -> Self {
        Self { name: name.to_owned(), verdict, words: words.into() }
    }
}

impl Vm {
    /// Looks at QEMU, its disks, what others do to them, and the space for scratch. Changes nothing.
    pub async fn doctor(&self) -> Vec<Check> {
        use CheckVerdict::{Bad, Good, Warn};
        let mut checks = vec![];
        let capabilities = &self.inner.bench_parts.2;
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
            Ok(state) => checks.push(Check::new("state", Good, state)),
            Err(e) => checks.push(Check::new("state", Bad, e.to_string())),
        }
        match self.graph().await {
            Err(e) => checks.push(Check::new("disks", Bad, e.to_string())),
            Ok(graph) => self.check_disks(&graph, &mut checks),
        }
        let dir = self.inner.options.scratch.clone().unwrap_or_else(|| self.inner.options.state.join("scratch"));
        checks.push(match ScratchDir::open(&dir, self.inner.options.scratch_budget_bytes) {
            Ok(_) => Check::new("scratch", Good, dir.display().to_string()),
            Err(e) => Check::new("scratch", Bad, e.message),
        });
        if !self.monitor().can_pass_fds() {
            checks.push(Check::new("monitor", Warn, "a TCP monitor takes no descriptors: QEMU must be able to open our scratch by its path; a unix socket is better"));
        }
        checks
    }

    fn check_disks(&self, graph: &graph::Graph, checks: &mut Vec<Check>) {
        use CheckVerdict::{Bad, Good, Warn};
        for found in &graph.disks {
            let name = format!("disk {}", found.disk.name);
            checks.push(match (&found.verdict, &found.disk.shared) {
                (Verdict::NotProtectable(reason), _) => Check::new(&name, Bad, reason),
                (Verdict::LeftOut(reason), _) => Check::new(&name, Good, format!("left out: {reason}")),
                (Verdict::Protectable, Some(shared)) => {
                    Check::new(&name, Warn, format!("always read whole, since its medium is shared: {shared}"))
                }
                (Verdict::Protectable, None) => Check::new(&name, Good, "can be backed up"),
            });
        }
        if graph.disks.is_empty() {
            checks.push(Check::new("disks", Bad, "the virtual machine has none"));
        }
        for foreign in &graph.foreign {
            checks.push(Check::new("others at work", Bad, foreign));
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
