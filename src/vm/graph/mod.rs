//! The block graph: which disks a running QEMU has, what each is made of, and what a backup does with it.
//!
//! ```text
//!  QOM tree                       block graph
//!  /machine/peripheral/vd0        vd0's backend ──root──► livebackup-…-cbw   (ours, only while a fleece is open)
//!    └ virtio-backend                                        │ file
//!      drive = …  ◄── qom_path                               ▼
//!                                 node  ◄── Disk::node     throttle, qcow2, raw, …  what the guest sees
//!                                                            │ file      │ backing
//!                                                            ▼           ▼
//!                                 chain                    file        qcow2 ─file─► file
//! ```
//!
//! Two steps. [`discover`] asks (nothing in it changes QEMU) and notes the answers in [`Answers`]; [`Graph::read`] is a pure
//! function of them, so a machine that was read wrongly can be replayed from its recorded answers. Every text, count
//! and size is bounded and type-checked on the way; what is missing is named.
//!
//! What is found, and where:
//! * `query-block` lists every guest device that has a block backend, with `qdev` (an id or a QOM path) and the root node.
//! * `query-named-block-nodes` has the nodes and their bitmaps, `x-debug-query-block-graph` the edges. **The node below our
//!   filter is read from the edge, never remembered**: the machine may have changed since.
//! * The QOM tree has the device types, the iothreads, and the storage that has no block backend at all (vhost, vDPA,
//!   VFIO, persistent memory), which `query-block` does not know.
//!
//! A machine may change between two questions (a hot-plug). Answers that do not fit together are asked for again, a few
//! times. Cancelling is safe anywhere.

mod ask;
mod board;
mod devices;
mod item;
mod names;
mod nodes;
mod options;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use ask::{ask, discover};
pub use board::Board;
pub use nodes::{Bitmap, Edge, Node, Vertex};

use crate::machine::FoundDisk;

/// What went wrong in reading a machine's block graph.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    /// A member that QEMU always sends is not there.
    #[error("QEMU's answer has no {at}: this QEMU is not understood, please report its version")]
    Missing {
        /// Which one: `query-block[3].inserted.node-name`.
        at: String,
    },
    /// A member has another JSON type than documented.
    #[error("QEMU's answer: {at} should be {wanted}")]
    WrongType {
        /// Which one.
        at: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// A list, text or size is beyond its bound.
    #[error("QEMU's answer: {at} is larger than {limit}, the most that livebackup takes")]
    TooLarge {
        /// Which one.
        at: String,
        /// The bound.
        limit: u64,
    },
    /// Answers do not fit together, as when a disk is plugged between two questions.
    #[error("the machine's disks changed while they were read ({0}); try again")]
    Changed(String),
    /// Our own filter is on a disk without the edge that leads below it, or edges go round.
    #[error("the block graph makes no sense: {0}")]
    Broken(String),
    /// The monitor failed.
    #[error("cannot read the machine's disks: {0}")]
    Monitor(#[from] crate::monitor::MonitorError),
}

/// A QOM object that matters for disks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Object {
    /// Full path.
    pub path: String,
    /// QOM type.
    pub kind: String,
    /// Values of the properties that were asked for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<String, Value>,
}

/// What tells whether two paths are one file: numbers, not names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileId {
    /// Device of the file system; 0 for a block device.
    pub dev: u64,
    /// Inode; for a block device its device number.
    pub inode: u64,
}

/// All that was asked, as it was answered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    /// `query-block`.
    pub block: Value,
    /// `query-named-block-nodes`, flat.
    pub nodes: Value,
    /// `x-debug-query-block-graph`.
    pub graph: Value,
    /// `query-block-jobs`.
    pub jobs: Value,
    /// Objects from a walk of the QOM tree, in its order.
    pub objects: Vec<Object>,
    /// QEMU's command line, if its process could be seen.
    #[serde(default)]
    pub command_line: Vec<String>,
    /// Identity of files, by the name that QEMU prints, where they could be seen.
    #[serde(default)]
    pub files: BTreeMap<String, FileId>,
    /// PCI class (24 bits) of a device given to the guest by VFIO, by the object's path, where it could be seen.
    #[serde(default)]
    pub pci_classes: BTreeMap<String, u32>,
    /// Names of virtio devices by the object's path (`x-query-virtio`): tells what a vDPA device is.
    #[serde(default)]
    pub virtio: BTreeMap<String, String>,
}

/// Somebody else's work on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// The disk.
    pub disk: String,
    /// What is there, for people.
    pub words: String,
}

impl std::fmt::Display for Foreign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "disk {}: {}", self.disk, self.words)
    }
}

/// A machine's disks and its block graph at one time.
#[derive(Clone, Debug, PartialEq)]
pub struct Graph {
    /// Everything found that is or could be taken for a disk, in a stable order.
    pub disks: Vec<FoundDisk>,
    /// What somebody else has put on a disk that a backup would collide with; empty is good.
    pub foreign: Vec<Foreign>,
    nodes: BTreeMap<String, Node>,
    edges: Vec<Edge>,
    /// Indices of the edges down from a node, and up from it.
    down: BTreeMap<String, Vec<usize>>,
    up: BTreeMap<String, Vec<usize>>,
    /// Root node by QOM path: what the guest sees, our filter included.
    tops: BTreeMap<String, String>,
}

/// The disks in recorded answers. `owner_prefix` is `livebackup-<owner8>-`.
pub fn read(answers: &Answers, owner_prefix: &str) -> Result<Vec<FoundDisk>, GraphError> {
    Graph::read(answers, owner_prefix).map(|graph| graph.disks)
}

impl Graph {
    /// The graph in recorded answers. `owner_prefix` is `livebackup-<owner8>-`: nodes named so are ours.
    pub fn read(answers: &Answers, owner_prefix: &str) -> Result<Graph, GraphError> {
        let (nodes, edges) = nodes::read(&answers.nodes, &answers.graph)?;
        let (mut down, mut up): (BTreeMap<_, Vec<_>>, BTreeMap<_, Vec<_>>) = Default::default();
        for (i, edge) in edges.iter().enumerate() {
            if let Vertex::Node(parent) = &edge.parent {
                down.entry(parent.clone()).or_default().push(i);
            }
            up.entry(edge.child.clone()).or_default().push(i);
        }
        let mut graph = Graph { disks: vec![], foreign: vec![], nodes, edges, down, up, tops: BTreeMap::new() };
        graph.disks = devices::read(answers, &mut graph, owner_prefix)?;
        graph.foreign = graph.find_foreign(&answers.jobs, owner_prefix)?;
        Ok(graph)
    }

    /// All edges, in QEMU's order.
    pub fn edges(&self) -> &[Edge] {
        &self.edges
    }

    /// A node by its name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// All nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// Names of all nodes, sorted.
    pub fn node_names(&self) -> impl Iterator<Item = &str> {
        self.nodes.keys().map(String::as_str)
    }

    /// Bitmaps of a node; none if there is no such node.
    pub fn bitmaps(&self, node: &str) -> &[Bitmap] {
        self.nodes.get(node).map_or(&[], |n| &n.bitmaps)
    }

    /// The bitmap of this name on this node.
    pub fn bitmap(&self, node: &str, name: &str) -> Option<&Bitmap> {
        self.bitmaps(node).iter().find(|b| b.name.as_deref() == Some(name))
    }

    /// Edges down from a node.
    pub fn children(&self, node: &str) -> impl Iterator<Item = &Edge> + use<'_> {
        self.down.get(node).into_iter().flatten().filter_map(|i| self.edges.get(*i))
    }

    /// Edges from whatever sits on a node: other nodes, guest devices and exports (backends), jobs.
    pub fn parents(&self, node: &str) -> impl Iterator<Item = &Edge> + use<'_> {
        self.up.get(node).into_iter().flatten().filter_map(|i| self.edges.get(*i))
    }

    /// The child of a node in one role, such as `file` or `backing`.
    pub fn child(&self, node: &str, role: &str) -> Option<&str> {
        self.children(node).find(|e| e.role == role).map(|e| e.child.as_str())
    }

    /// The node that the guest device sees now, our filter included.
    pub fn top_node_of(&self, qom_path: &str) -> Option<&str> {
        self.tops.get(qom_path).map(String::as_str)
    }

    /// The disk of this name.
    pub fn disk(&self, name: &str) -> Option<&FoundDisk> {
        self.disks.iter().find(|d| d.disk.name == name)
    }

    /// All nodes reachable downwards from a node, itself included, in depth-first order; `backing` says whether to follow
    /// backing files.
    fn below<'a>(&'a self, node: &'a str, backing: bool) -> Vec<&'a str> {
        let mut seen = BTreeSet::new();
        let mut found = vec![];
        let mut open = vec![node];
        while let Some(name) = open.pop() {
            if !seen.insert(name) {
                continue;
            }
            found.push(name);
            let filter = self.nodes.get(name).is_some_and(Node::is_filter);
            let next = self.children(name).filter(|e| backing || filter || e.role != "backing");
            let mut next: Vec<_> = next.map(|e| (nodes::role_order(&e.role), e.child.as_str())).collect();
            next.sort();
            open.extend(next.into_iter().rev().map(|(_, child)| child));
        }
        found
    }

    /// All nodes from which a node can be reached, itself left out.
    fn above<'a>(&'a self, node: &'a str) -> BTreeSet<&'a str> {
        let mut found = BTreeSet::new();
        let mut open = vec![node];
        while let Some(name) = open.pop() {
            for edge in self.parents(name) {
                if let Vertex::Node(parent) = &edge.parent
                    && found.insert(parent.as_str())
                {
                    open.push(parent);
                }
            }
        }
        found.remove(node);
        found
    }

    /// Filters of another owner, and jobs, on any disk that could be protected.
    fn find_foreign(&self, jobs: &Value, owner_prefix: &str) -> Result<Vec<Foreign>, GraphError> {
        let mut kinds = BTreeMap::new();
        for job in item::Item::root("query-block-jobs", jobs).list(nodes::MAX_NODES)? {
            kinds.insert(job.member("device")?.text()?.to_owned(), job.member("type")?.text()?.to_owned());
        }
        let mut found = vec![];
        for FoundDisk { disk, verdict } in &self.disks {
            if disk.node.is_empty() || matches!(verdict, crate::machine::Verdict::LeftOut(_)) {
                continue;
            }
            let foreign = |words: String| Foreign { disk: disk.name.clone(), words };
            let data = self.below(&disk.node, false);
            for name in self.above(&disk.node).into_iter().chain(data) {
                if name.starts_with(owner_prefix) {
                    continue;
                }
                let driver = self.nodes.get(name).map_or("", |n| n.driver.as_str());
                if name.starts_with("livebackup-") {
                    found.push(foreign(format!(
                        "node {name:?} belongs to another livebackup (if its state directory is lost, `livebackup detach --all` removes it)"
                    )));
                } else if matches!(driver, "copy-before-write" | "snapshot-access" | "backup-top") {
                    found.push(foreign(format!("another tool's {driver} node {name:?}")));
                }
            }
            let chain = self.below(&disk.node, true).into_iter().chain(self.above(&disk.node));
            let ids: BTreeSet<_> = chain.flat_map(|n| self.parents(n)).filter_map(|e| e.parent.job()).collect();
            for id in ids {
                let kind = kinds.get(id).map_or("block", String::as_str);
                found.push(foreign(format!("a {kind} job {id:?} is running")));
            }
        }
        Ok(found)
    }
}
