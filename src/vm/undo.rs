//! Undo: taking what is ours out of QEMU again. One way for the end of every session and for the start after a crash.
//!
//! | what we add | how it is found again | its inverse |
//! |---|---|---|
//! | `stop` | debt file `owed-cont`, and the guardian | `cont` |
//! | `set-action shutdown=pause` | debt file `owed-quit`, and a guardian | [`let_power_off`] |
//! | frozen file systems | debt file `owed-thaw`, with the agent's address, and a guardian | thaw, see [`quiet`](super::quiet) |
//! | NBD server | debt file `owed-nbd` | `nbd-server-stop` |
//! | named scratch file | debt file `owed-scratch-N`, with its path | remove it |
//! | export | its id | `block-export-del` |
//! | snapshot, pin, helper, scratch node | its name | `blockdev-del` |
//! | filter | its name; the edge to its file child says what was below | `qom-set drive`, `blockdev-del` |
//! | descriptor set | its label | `remove-fd` |
//! | latency histogram | its last boundary, which carries our owner's id; debt file `owed-histogram` with the last reading | set without boundaries, by [`detach`](super::Vm::detach); the next start goes on with it |
//! | bitmap | its name | removed by [tracking](super::tracking) when the log does not need it |
//!
//! A debt file is written before the step and removed after its inverse. It needs no fsync: it outlives our death in the
//! page cache, and QEMU does not outlive the host's.
//!
//! Order: exports, NBD server, snapshots and pins, filters (first all of them out from above their disks, then each deleted),
//! scratch, helpers, descriptors. A filter cannot be taken out while anything stands on it: it then denies others to
//! write to the disk. Every step may find its work done, and one that is refused keeps none from its turn that does not
//! need it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::names::Names;
use crate::monitor::{Monitor, MonitorError};
use crate::vhost::{self, VhostError};
use crate::wire::message::{Failure, FailureCode};

/// Most filters of ours that are looked for above one disk.
const MAX_FILTERS: usize = 8;

/// Name of the socket of QEMU's NBD server, where we started it.
pub const NBD_SOCKET: &str = "nbd";

/// How long a hard-deleted export may take to go.
const EXPORT_GOES_WITHIN: Duration = Duration::from_secs(30);

/// How long the event that tells of it is waited for before QEMU is asked.
const EXPORT_IS_TOLD_WITHIN: Duration = Duration::from_millis(50);

/// A flush that takes less needs no other after it.
const SHORT_SYNC: Duration = Duration::from_millis(10);

/// Flushes one after the other, at most.
const MAX_SYNCS: u32 = 6;

/// How long flushing images from outside may take. What is left of it QEMU does.
const SYNCS_WITHIN: Duration = Duration::from_secs(10);

/// How long a reader that left may take to be let go.
const READER_GOES_WITHIN: Duration = Duration::from_secs(5);

/// What can be owed besides what carries our name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Debt {
    /// The guest is stopped by us.
    Cont,
    /// We started QEMU's NBD server.
    Nbd,
    /// The guest's file systems are frozen by us.
    Thaw,
    /// QEMU stays when the guest powers off, because we told it to.
    Quit,
    /// The guest is stopped by us because the virtual machine is to end: `quit` follows.
    End,
    /// Histograms are switched on by us.
    Histogram,
}

impl Debt {
    /// Its name, in the debt file's name and for the guardian.
    pub fn name(self) -> &'static str {
        match self {
            Debt::Cont => "cont",
            Debt::Nbd => "nbd",
            Debt::Thaw => "thaw",
            Debt::Quit => "quit",
            Debt::End => "end",
            Debt::Histogram => "histogram",
        }
    }

    /// The name of the file that stands for it.
    pub fn file_name(self) -> String {
        format!("owed-{}", self.name())
    }
}

/// The debts of one VM.
#[derive(Clone, Debug)]
pub struct Debts {
    dir: PathBuf,
}

impl Debts {
    /// Debts are files in this directory.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// The file that stands for a debt.
    pub fn path(&self, debt: Debt) -> PathBuf {
        self.dir.join(debt.file_name())
    }

    /// Writes a debt down. Call it before the step.
    pub fn owe(&self, debt: Debt) -> std::io::Result<()> {
        std::fs::write(self.path(debt), b"")
    }

    /// As [`Debts::owe`], with content for whoever finds it.
    pub fn owe_with(&self, debt: Debt, content: &str) -> std::io::Result<()> {
        std::fs::write(self.path(debt), content)
    }

    /// Strikes a debt out. Call it after the inverse.
    pub fn paid(&self, debt: Debt) {
        let _ = std::fs::remove_file(self.path(debt));
    }

    /// Whether it is owed.
    pub fn owed(&self, debt: Debt) -> bool {
        self.path(debt).exists()
    }

    /// Writes down that this file must go.
    pub fn owe_file(&self, disk: usize, path: &Path) -> std::io::Result<()> {
        std::fs::write(self.dir.join(format!("owed-scratch-{disk}")), path.as_os_str().as_encoded_bytes())
    }

    /// Removes the files that must go.
    pub fn pay_files(&self) {
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            if entry.file_name().as_encoded_bytes().starts_with(b"owed-scratch-") {
                use std::os::unix::ffi::OsStrExt;
                if let Ok(path) = std::fs::read(entry.path()) {
                    let _ = std::fs::remove_file(std::ffi::OsStr::from_bytes(&path));
                }
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

/// Lets a guest go that we stopped, if it is stopped still.
pub async fn resume(monitor: &Monitor, debts: &Debts) -> Result<bool, MonitorError> {
    if !debts.owed(Debt::Cont) {
        return Ok(false);
    }
    let paused = monitor.raw("query-status", json!({})).await?["status"] == "paused";
    if paused {
        monitor.raw("cont", json!({})).await?;
    }
    debts.paid(Debt::Cont);
    Ok(paused)
}

/// Lets QEMU end by itself again when the guest powers off; if the guest has done so already, ends it; likewise a stopped one
/// whose virtual machine was `ending`. Says whether it did.
pub async fn let_power_off(monitor: &Monitor, ending: bool) -> Result<bool, MonitorError> {
    monitor.raw("set-action", json!({"shutdown": "poweroff"})).await?;
    match monitor.raw("query-status", json!({})).await?["status"].as_str() {
        Some("shutdown") => {}
        Some("paused") if ending => {}
        _ => return Ok(false),
    }
    match monitor.raw("quit", json!({})).await {
        // It may be gone before its answer is.
        Ok(_) | Err(MonitorError::Closed { .. }) => Ok(true),
        Err(e) => Err(e),
    }
}

/// [`resume`] until it is done or the monitor is gone: a `stop` that flushes for long makes commands run out of time, and
/// while we hold the monitor nobody else can let the guest go.
pub async fn resume_whatever_it_takes(monitor: &Monitor, debts: &Debts) -> Result<bool, MonitorError> {
    loop {
        match resume(monitor, debts).await {
            Err(e) if !monitor.is_closed() => {
                tracing::error!("the guest is stopped and does not go on yet, trying again: {e}");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            other => return other,
        }
    }
}

/// What could not be taken out, step by step. The rest is out; the next call goes on.
#[derive(Debug, thiserror::Error)]
#[error("{}", steps.iter().map(|(what, why)| format!("{what}: {why}")).collect::<Vec<_>>().join("; "))]
pub struct Stuck {
    /// Each step that failed, and why.
    pub steps: Vec<(String, MonitorError)>,
}

impl From<Stuck> for Failure {
    fn from(stuck: Stuck) -> Self {
        Failure::new(
            FailureCode::Qemu,
            format!("not all of ours could be taken out of QEMU, the next start tries again: {stuck}"),
        )
    }
}

/// Takes out everything of ours but bitmaps. Says in words what it removed.
///
/// # Errors
/// Every step that QEMU refused; those that do not need it were taken all the same. A monitor that does not answer any
/// more ends it.
pub async fn remove_all(monitor: &Monitor, names: &Names, sockets: &Path) -> Result<Vec<String>, Stuck> {
    let mut undo = Undo { monitor, names, sockets, debts: Debts::new(sockets), removed: vec![], stuck: vec![] };
    if let Err(lost) = undo.everything().await {
        undo.stuck.push(("the rest".to_owned(), lost));
    }
    if undo.stuck.is_empty() { Ok(undo.removed) } else { Err(Stuck { steps: undo.stuck }) }
}

struct Undo<'a> {
    monitor: &'a Monitor,
    names: &'a Names,
    sockets: &'a Path,
    debts: Debts,
    removed: Vec<String>,
    stuck: Vec<(String, MonitorError)>,
}

impl Undo<'_> {
    /// All steps. An error is one after which QEMU cannot be asked for anything more.
    async fn everything(&mut self) -> Result<(), MonitorError> {
        let (monitor, names) = (self.monitor, self.names);
        let resumed = resume(monitor, &self.debts).await;
        if let Some(true) = self.note("the guest, which is stopped".to_owned(), resumed)? {
            self.removed.push("let the guest go on, which had been stopped".to_owned());
        }
        for export in ours(&monitor.raw("query-block-exports", json!({})).await?, "id", names) {
            match remove_export(monitor, &export, self.sockets).await {
                Ok(()) => self.removed.push(format!("export {export}")),
                // Of the export's reader, not of the monitor: what else there is need not wait for it.
                Err(e @ MonitorError::Deadline { .. }) => self.stuck.push((format!("export {export}"), e)),
                failed => drop(self.note(format!("export {export}"), failed)?),
            }
        }
        self.stop_server().await?;
        let all = monitor.raw("query-named-block-nodes", json!({"flat": true})).await?;
        let nodes = ours(&all, "node-name", names);
        if nodes.is_empty() && self.stuck.is_empty() {
            return self.rest().await;
        }
        for node in nodes.iter().filter(|n| names.is_on_filter(n)) {
            self.delete(node).await?;
        }
        // Every guest device first: what follows may hold QEMU's main loop up for a while.
        let mut out = vec![];
        let filters: Vec<_> = nodes.iter().filter(|n| names.is_filter(n)).collect();
        if !filters.is_empty() {
            let graph = monitor.raw("x-debug-query-block-graph", json!({})).await?;
            let blocks = monitor.raw("query-block", json!({})).await?;
            for filter in filters {
                let below = take_out(monitor, names, filter, (&graph, &blocks)).await;
                out.extend(self.note(format!("filter {filter}"), below)?.map(|below| (filter, below)));
            }
        }
        // The guest is free of the filters; only deleting them flushes.
        sync_files(out.iter().filter_map(|(_, below)| image_of(&all, below.as_deref()?)).collect()).await;
        for (filter, _) in out {
            let deleted = monitor.raw("blockdev-del", json!({"node-name": filter})).await;
            if self.note(format!("filter {filter}"), deleted)?.is_some() {
                self.removed.push(format!("filter {filter}"));
                crate::fault::point("undo.filter");
            }
        }
        if !self.stuck.is_empty() {
            // What is left is in use by what is stuck.
            return Ok(());
        }
        for node in named_nodes(monitor, names).await? {
            self.delete(&node).await?;
        }
        self.rest().await
    }

    /// What is left when no node is.
    async fn rest(&mut self) -> Result<(), MonitorError> {
        remove_descriptors(self.monitor, self.names).await?;
        self.debts.pay_files();
        remove_sockets(self.sockets, self.debts.owed(Debt::Nbd));
        Ok(())
    }

    /// Stops QEMU's NBD server, if we started it and nobody else uses it.
    async fn stop_server(&mut self) -> Result<(), MonitorError> {
        if !self.debts.owed(Debt::Nbd) {
            return Ok(());
        }
        let exports = self.monitor.raw("query-block-exports", json!({})).await?;
        if !ours(&exports, "id", self.names).is_empty() {
            return Ok(());
        }
        if exports.as_array().is_some_and(|all| all.iter().any(|e| e["type"] == "nbd")) {
            // Another program has come to rely on it: it stays ours, to be used again, and stopped another time.
            return Ok(());
        }
        // It may never have started; or others stopped it, and what runs now is theirs.
        if is_listening(self.monitor, self.sockets) {
            refusal_is_fine(self.monitor.raw("nbd-server-stop", json!({})).await)?;
        }
        self.debts.paid(Debt::Nbd);
        Ok(())
    }

    async fn delete(&mut self, node: &str) -> Result<(), MonitorError> {
        let deleted = self.monitor.raw("blockdev-del", json!({"node-name": node})).await;
        if self.note(format!("node {node}"), deleted)?.is_some() {
            self.removed.push(format!("node {node}"));
        }
        Ok(())
    }

    /// Writes a refusal down and goes on; any other error is the end.
    fn note<T>(&mut self, what: String, outcome: Result<T, MonitorError>) -> Result<Option<T>, MonitorError> {
        match outcome {
            Ok(done) => Ok(Some(done)),
            Err(e) if e.refusal().is_some() => {
                self.stuck.push((what, e));
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }
}

/// Whether QEMU listens at our socket for its NBD server.
pub(super) fn is_listening(monitor: &Monitor, sockets: &Path) -> bool {
    let socket = sockets.join(NBD_SOCKET);
    if !monitor.can_pass_fds() {
        // QEMU made it, and removes it when the server ends.
        return socket.exists();
    }
    // To connect would be to talk to a server that may be about to end. "Num RefCount Protocol Flags Type St Inode Path",
    // where __SO_ACCEPTCON (0x10000) in the flags says that it listens.
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    sockets.lines().any(|line| {
        let mut words = line.split_whitespace().skip(3);
        words.next() == Some("00010000") && words.nth(3).is_some_and(|path| Path::new(path) == socket)
    })
}

async fn remove_export(monitor: &Monitor, id: &str, sockets: &Path) -> Result<(), MonitorError> {
    let socket = sockets.join(format!("{id}.vhost"));
    if socket.exists() {
        // Versions before 10 hang for good when a vhost-user-blk export goes before its reader has, if the disk is in an
        // iothread: ours is gone or about to be.
        let waited = tokio::task::spawn_blocking(move || vhost::wait_until_free(&socket, READER_GOES_WITHIN)).await;
        match waited {
            Ok(Err(VhostError::NoAnswer { .. })) if !monitor.greeting_version().at_least(10, 0) => {
                let command = "block-export-del: its reader has not gone".to_owned();
                return Err(MonitorError::Deadline { command, limit: READER_GOES_WITHIN });
            }
            Ok(Err(error)) => tracing::debug!(id, "the export's socket does not answer: {error}"),
            _ => {}
        }
    }
    delete_export(monitor, id).await
}

/// Deletes an export and waits until it is gone; one that is gone already is no error.
pub(super) async fn delete_export(monitor: &Monitor, id: &str) -> Result<(), MonitorError> {
    let mut events = monitor.subscribe();
    let deleted = monitor.raw("block-export-del", json!({"id": id, "mode": "hard"})).await;
    let said = deleted.is_ok();
    refusal_is_fine(deleted)?;
    let gone = async {
        // QEMU says so when it is gone; whoever was there too late for that asks.
        while said && let Ok(Ok(event)) = tokio::time::timeout(EXPORT_IS_TOLD_WITHIN, events.recv()).await {
            if event.name == "BLOCK_EXPORT_DELETED" && event.data["id"] == id {
                return Ok(());
            }
        }
        loop {
            let exports = monitor.raw("query-block-exports", json!({})).await?;
            if !exports.as_array().is_some_and(|all| all.iter().any(|e| e["id"] == id)) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let late = MonitorError::Deadline { command: "block-export-del".into(), limit: EXPORT_GOES_WITHIN };
    tokio::time::timeout(EXPORT_GOES_WITHIN, gone).await.unwrap_or(Err(late))
}

/// Takes a filter from above its disk: the device gets back what the graph says is below all filters of ours. Gives
/// that. The pair: the answers of `x-debug-query-block-graph` and `query-block`.
async fn take_out(
    monitor: &Monitor,
    names: &Names,
    filter: &str,
    (graph, blocks): (&Value, &Value),
) -> Result<Option<String>, MonitorError> {
    let mut below = child_of(graph, filter, "file");
    for _ in 0..MAX_FILTERS {
        match &below {
            Some(name) if names.is_filter(name) => below = child_of(graph, name, "file"),
            _ => break,
        }
    }
    for device in blocks.as_array().into_iter().flatten() {
        if device["inserted"]["node-name"] == filter
            && let (Some(qdev), Some(below)) = (device["qdev"].as_str(), &below)
        {
            let path = qom_path(qdev);
            let set = monitor.raw("qom-set", json!({"path": path, "property": "drive", "value": below})).await;
            match set {
                // Pulled out meanwhile: nobody is left to get the disk back.
                Err(e) if e.refusal().is_some() && is_gone(monitor, &path).await? => {}
                other => drop(other?),
            }
            crate::fault::point("undo.out");
        }
    }
    Ok(below)
}

/// Whether there is no such object (any more).
async fn is_gone(monitor: &Monitor, path: &str) -> Result<bool, MonitorError> {
    match monitor.raw("qom-list", json!({"path": path})).await {
        Err(e) if e.refusal().is_some() => Ok(true),
        other => other.map(|_| false),
    }
}

/// The full path of the object that owns a drive, from what `query-block` calls it.
pub fn qom_path(qdev: &str) -> String {
    if qdev.starts_with('/') { qdev.to_owned() } else { format!("/machine/peripheral/{qdev}") }
}

/// The node that a device has, in the answer of `query-block`.
pub fn node_of<'a>(blocks: &'a Value, path: &str) -> Option<&'a str> {
    inserted(blocks, path)?["node-name"].as_str()
}

/// The size of the node that a device has, in bytes, in the answer of `query-block`.
pub fn size_of(blocks: &Value, path: &str) -> Option<u64> {
    inserted(blocks, path)?["image"]["virtual-size"].as_u64()
}

fn inserted<'a>(blocks: &'a Value, path: &str) -> Option<&'a Value> {
    let mut devices = blocks.as_array()?.iter();
    let device = devices.find(|device| device["qdev"].as_str().is_some_and(|qdev| qom_path(qdev) == path))?;
    Some(&device["inserted"])
}

/// A node's child in the answer of `x-debug-query-block-graph`.
fn child_of(graph: &Value, node: &str, role: &str) -> Option<String> {
    let nodes = graph["nodes"].as_array()?;
    let id = |name: &str| nodes.iter().find(|n| n["name"] == name && n["type"] == "block-driver").map(|n| &n["id"]);
    let parent = id(node)?;
    let edge = graph["edges"].as_array()?.iter().find(|e| &e["parent"] == parent && e["name"] == role)?;
    nodes.iter().find(|n| n["id"] == edge["child"])?["name"].as_str().map(str::to_owned)
}

/// Makes the image file durable from outside: removing a filter flushes it with QEMU's main loop held, and then there
/// is little left to flush.
pub(super) async fn sync_image(monitor: &Monitor, node: &str) {
    let Ok(nodes) = monitor.raw("query-named-block-nodes", json!({"flat": true})).await else { return };
    if let Some(path) = image_of(&nodes, node) {
        sync_files(vec![path]).await;
    }
}

/// The file of a node in the answer of `query-named-block-nodes`.
fn image_of(nodes: &Value, node: &str) -> Option<PathBuf> {
    let found = nodes.as_array()?.iter().find(|n| n["node-name"] == node)?;
    found["file"].as_str().map(PathBuf::from)
}

/// `fdatasync` of files that QEMU has open, as far as they are files of this host. On storage that hangs it goes on without.
///
/// What the guest writes meanwhile is left for the flush that follows, in which it may have to wait. So it is done again as
/// long as it took long and takes less each time.
pub async fn sync_files(paths: Vec<PathBuf>) {
    let sync = move || {
        let files: Vec<_> = paths.iter().filter_map(|path| std::fs::File::open(path).ok()).collect();
        let mut last = Duration::MAX;
        for _ in 0..MAX_SYNCS {
            let began = Instant::now();
            files.iter().for_each(|file| drop(file.sync_data()));
            let took = began.elapsed();
            if took < SHORT_SYNC || took > last / 2 {
                break;
            }
            last = took;
        }
    };
    if tokio::time::timeout(SYNCS_WITHIN, tokio::task::spawn_blocking(sync)).await.is_err() {
        tracing::warn!("the images were not flushed from outside within {} s", SYNCS_WITHIN.as_secs());
    }
}

async fn named_nodes(monitor: &Monitor, names: &Names) -> Result<Vec<String>, MonitorError> {
    let nodes = monitor.raw("query-named-block-nodes", json!({"flat": true})).await?;
    Ok(ours(&nodes, "node-name", names))
}

fn ours(list: &Value, member: &str, names: &Names) -> Vec<String> {
    let named = list.as_array().into_iter().flatten().filter_map(|n| n[member].as_str());
    named.filter(|n| names.is_ours(n)).map(str::to_owned).collect()
}

async fn remove_descriptors(monitor: &Monitor, names: &Names) -> Result<(), MonitorError> {
    let sets = monitor.raw("query-fdsets", json!({})).await?;
    for set in sets.as_array().into_iter().flatten() {
        let ours = set["fds"].as_array().into_iter().flatten();
        if ours.filter_map(|fd| fd["opaque"].as_str()).any(|label| names.is_ours(label)) {
            refusal_is_fine(monitor.raw("remove-fd", json!({"fdset-id": set["fdset-id"]})).await)?;
        }
    }
    Ok(())
}

fn remove_sockets(dir: &Path, serves: bool) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let is_server = entry.file_name() == NBD_SOCKET;
        if !(entry.file_name().as_encoded_bytes().starts_with(b"owed-") || serves && is_server) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Takes QEMU's refusal for an answer: what was to go is gone already.
fn refusal_is_fine(result: Result<Value, MonitorError>) -> Result<(), MonitorError> {
    match result {
        Err(e) if e.refusal().is_some() => Ok(()),
        other => other.map(drop),
    }
}
