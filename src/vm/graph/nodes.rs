//! Nodes and edges of QEMU's block graph.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::GraphError;
use super::item::Item;
use crate::limits::MAX_DISK_BYTES;

/// Most nodes (and jobs) of one machine; four times as many edges.
pub(super) const MAX_NODES: usize = 16 << 10;
/// Most bitmaps of one node.
const MAX_BITMAPS: usize = 64 << 10;

/// A dirty bitmap as QEMU shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name; copy-before-write's own bitmaps have none.
    pub name: Option<String>,
    /// Dirty bytes (a multiple of the granularity, but for the last granule).
    pub count_bytes: u64,
    /// Bytes for a bit.
    pub granularity_bytes: u64,
    /// Whether guest writes are recorded.
    pub recording: bool,
    /// Whether a job or export uses it: it cannot be changed then.
    pub busy: bool,
    /// Whether it is stored in the image when QEMU ends.
    pub persistent: bool,
    /// Whether it was not stored when QEMU ended: its contents are lost.
    pub inconsistent: bool,
}

/// A block node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name; QEMU's own begin with `#` and change with every start.
    pub name: String,
    /// Driver: `qcow2`, `file`, `copy-before-write`, …
    pub driver: String,
    /// File name as QEMU prints it; may be `json:{…}` for a node above others.
    pub filename: String,
    /// Virtual size.
    pub size_bytes: u64,
    /// Opened for reading only.
    pub read_only: bool,
    /// Opened with `cache.no-flush`.
    pub no_flush: bool,
    /// `detect-zeroes=unmap`, which QEMU takes only together with `discard=unmap`.
    pub unmaps_zeroes: bool,
    /// Its bitmaps.
    pub bitmaps: Vec<Bitmap>,
}

impl Node {
    /// Whether the name was given by QEMU, not by its user.
    pub fn auto_named(&self) -> bool {
        self.name.starts_with('#')
    }

    /// Whether it shows the same bytes as the one child that it filters.
    pub fn is_filter(&self) -> bool {
        matches!(
            self.driver.as_str(),
            "throttle"
                | "copy-on-read"
                | "copy-before-write"
                | "backup-top"
                | "mirror_top"
                | "commit_top"
                | "blkdebug"
                | "blkverify"
                | "blklogwrites"
                | "blkreplay"
                | "compress"
                | "preallocate"
                | "replication"
        )
    }
}

/// What an edge starts from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Vertex {
    /// A node.
    Node(String),
    /// A backend: a guest device, an export.
    Backend(String),
    /// A block job.
    Job(String),
}

impl Vertex {
    pub(super) fn job(&self) -> Option<&str> {
        match self {
            Vertex::Job(id) => Some(id),
            _ => None,
        }
    }
}

/// An edge of the graph, from what uses to what is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edge {
    /// What uses.
    pub parent: Vertex,
    /// The node that is used.
    pub child: String,
    /// How: `root`, `file`, `backing`, `target`, `data-file`, …
    pub role: String,
}

/// Order in which children are followed: the data before what lies behind it.
pub(super) fn role_order(role: &str) -> u8 {
    match role {
        "file" => 0,
        "backing" => 2,
        _ => 1,
    }
}

/// Reads `query-named-block-nodes` and `x-debug-query-block-graph`.
pub(super) fn read(nodes: &Value, graph: &Value) -> Result<(BTreeMap<String, Node>, Vec<Edge>), GraphError> {
    let mut found = BTreeMap::new();
    for item in Item::root("query-named-block-nodes", nodes).list(MAX_NODES)? {
        let node = read_node(&item)?;
        found.insert(node.name.clone(), node);
    }
    let (edges, listed) = read_edges(&Item::root("x-debug-query-block-graph", graph))?;
    // A node without its edges would be taken for a file.
    if let Some(name) = found.keys().find(|n| !listed.contains(*n)).or(listed.iter().find(|n| !found.contains_key(*n)))
    {
        return Err(GraphError::Changed(format!("node {name:?} came or went")));
    }
    Ok((found, edges))
}

fn read_node(item: &Item) -> Result<Node, GraphError> {
    let image = item.member("image")?;
    let cache = item.member("cache")?;
    let mut bitmaps = vec![];
    if let Some(list) = item.optional("dirty-bitmaps")? {
        for bitmap in list.list(MAX_BITMAPS)? {
            bitmaps.push(read_bitmap(&bitmap)?);
        }
    }
    Ok(Node {
        name: item.member("node-name")?.text()?.to_owned(),
        driver: item.member("drv")?.text()?.to_owned(),
        filename: image.member("filename")?.text()?.to_owned(),
        size_bytes: image.member("virtual-size")?.number(MAX_DISK_BYTES)?,
        read_only: item.member("ro")?.flag()?,
        no_flush: cache.member("no-flush")?.flag()?,
        unmaps_zeroes: item.member("detect_zeroes")?.text()? == "unmap",
        bitmaps,
    })
}

fn read_bitmap(item: &Item) -> Result<Bitmap, GraphError> {
    let granularity = item.member("granularity")?;
    Ok(Bitmap {
        name: item.optional("name")?.map(|n| n.text()).transpose()?.filter(|n| !n.is_empty()).map(str::to_owned),
        count_bytes: item.member("count")?.number(2 * MAX_DISK_BYTES)?,
        granularity_bytes: granularity.number(1 << 31)?,
        recording: item.member("recording")?.flag()?,
        busy: item.member("busy")?.flag()?,
        persistent: item.member("persistent")?.flag()?,
        inconsistent: item.optional("inconsistent")?.map(|f| f.flag()).transpose()?.unwrap_or(false),
    })
}

/// The edges, and the names of all nodes.
fn read_edges(graph: &Item) -> Result<(Vec<Edge>, BTreeSet<String>), GraphError> {
    let mut vertices = BTreeMap::new();
    for item in graph.member("nodes")?.list(4 * MAX_NODES)? {
        let name = item.member("name")?.text()?.to_owned();
        let vertex = match item.member("type")?.text()? {
            "block-driver" => Vertex::Node(name),
            "block-job" => Vertex::Job(name),
            _ => Vertex::Backend(name),
        };
        vertices.insert(item.member("id")?.number(u64::MAX)?, vertex);
    }
    let mut edges = vec![];
    for item in graph.member("edges")?.list(4 * MAX_NODES)? {
        let end = |name| {
            let id = item.member(name)?.number(u64::MAX)?;
            vertices.get(&id).ok_or_else(|| GraphError::Broken(format!("an edge's {name} is vertex {id}, not listed")))
        };
        let parent = end("parent")?.clone();
        let Vertex::Node(child) = end("child")?.clone() else {
            return Err(GraphError::Broken(format!("{parent:?} uses what is not a node")));
        };
        edges.push(Edge { parent, child, role: item.member("name")?.text()?.to_owned() });
    }
    let listed = vertices.into_values().filter_map(|v| if let Vertex::Node(name) = v { Some(name) } else { None });
    Ok((edges, listed.collect()))
}
