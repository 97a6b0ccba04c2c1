//! Asks a running QEMU. Nothing here changes it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use nix::libc;
use serde_json::{Value, json};

use super::board::{self, Board, unless_gone};
use super::item::Item;
use super::{Answers, FileId, Graph, GraphError, Object, names, nodes};
use crate::monitor::Monitor;

/// Most virtio devices, and how deep PCI bridges go.
const MAX_DEVICES: usize = 16 << 10;
const MAX_BRIDGES: usize = 16;
/// How often answers that do not fit together are asked for again.
const TRIES: usize = 4;
/// How long the files of the disks may take to tell who they are (a dead network file system never does).
const FILES_TIME_LIMIT: Duration = Duration::from_secs(3);

/// Finds a machine's disks and block graph. `owner_prefix` is `livebackup-<owner8>-`; `board` remembers the
/// devices from one call to the next of the same QEMU.
pub async fn discover(monitor: &Monitor, owner_prefix: &str, board: &mut Board) -> Result<Graph, GraphError> {
    let mut tried = 1;
    loop {
        match Graph::read(&ask(monitor, board).await?, owner_prefix) {
            Err(GraphError::Changed(_)) if tried < TRIES => {
                tried += 1;
                *board = Board::default();
            }
            done => return done,
        }
    }
}

/// Asks everything that [`Graph::read`] needs, once.
pub async fn ask(monitor: &Monitor, board: &mut Board) -> Result<Answers, GraphError> {
    let mut answers = Answers { objects: board::objects(monitor, board).await?, ..Answers::default() };
    answers.graph = monitor.raw("x-debug-query-block-graph", json!({})).await?;
    answers.nodes = monitor.raw("query-named-block-nodes", json!({"flat": true})).await?;
    answers.block = monitor.raw("query-block", json!({})).await?;
    answers.jobs = monitor.raw("query-block-jobs", json!({})).await?;

    let kinds: BTreeSet<&str> = answers.objects.iter().map(|o| o.kind.as_str()).collect();
    if kinds.contains("vhost-vdpa-device") {
        answers.virtio = virtio_names(monitor).await?;
    }
    let pid = monitor.peer_process().map(|p| p.pid);
    answers.pci_classes = pci_classes(monitor, &answers.objects, pid.is_some()).await?;
    if let Some(pid) = pid {
        let paths = files_of(&answers.nodes)?;
        let seen = tokio::task::spawn_blocking(move || look_at_process(pid, paths));
        if let Ok(Ok((command_line, files))) = tokio::time::timeout(FILES_TIME_LIMIT, seen).await {
            answers.command_line = command_line;
            answers.files = files;
        }
    }
    Ok(answers)
}

/// Names of virtio devices by path.
async fn virtio_names(monitor: &Monitor) -> Result<BTreeMap<String, String>, GraphError> {
    let mut found = BTreeMap::new();
    if let Some(list) = unless_gone(monitor, "x-query-virtio", json!({})).await? {
        for item in Item::root("x-query-virtio", &list).list(MAX_DEVICES)? {
            found.insert(item.member("path")?.text()?.to_owned(), item.member("name")?.text()?.to_owned());
        }
    }
    Ok(found)
}

/// PCI classes of devices given to the guest: from this host's sysfs where QEMU runs here, else from the guest's view.
async fn pci_classes(monitor: &Monitor, objects: &[Object], here: bool) -> Result<BTreeMap<String, u32>, GraphError> {
    let passed: Vec<_> = objects.iter().filter(|o| o.kind.starts_with("vfio-")).collect();
    let mut found = BTreeMap::new();
    if passed.is_empty() {
        return Ok(found);
    }
    let guest_view = unless_gone(monitor, "query-pci", json!({})).await?.unwrap_or(Value::Null);
    let mut by_id = BTreeMap::new();
    for bus in guest_view.as_array().into_iter().flatten() {
        classes_by_id(bus, 0, &mut by_id);
    }
    for object in passed {
        let host = if here { host_class(object) } else { None };
        let class = host.or_else(|| by_id.get(names::device_id(&object.path)?).copied());
        found.extend(class.map(|class| (object.path.clone(), class)));
    }
    Ok(found)
}

/// Class of a PCI device of this host: `0x010802` in its `class` file.
fn host_class(object: &Object) -> Option<u32> {
    let text = |name: &str| object.properties.get(name).and_then(Value::as_str).filter(|t| t.len() < 4096);
    let directory = match (text("sysfsdev"), text("host")) {
        (Some(dir), _) if dir.starts_with("/sys/") => PathBuf::from(dir),
        (_, Some(host)) if host.bytes().all(|b| b.is_ascii_hexdigit() || b == b':' || b == b'.') => {
            PathBuf::from("/sys/bus/pci/devices").join(host)
        }
        _ => return None,
    };
    let class = std::fs::read_to_string(directory.join("class")).ok()?;
    u32::from_str_radix(class.trim().strip_prefix("0x")?, 16).ok().filter(|c| *c < 1 << 24)
}

/// Classes in `query-pci` by device id, bridges followed.
fn classes_by_id(bus: &Value, depth: usize, found: &mut BTreeMap<String, u32>) {
    for device in bus.get("devices").and_then(Value::as_array).into_iter().flatten() {
        let class = device.get("class_info").and_then(|c| c.get("class")).and_then(Value::as_u64);
        if let (Some(id), Some(class)) = (device.get("qdev_id").and_then(Value::as_str), class)
            && let Ok(class) = u16::try_from(class)
            && !id.is_empty()
        {
            found.insert(id.to_owned(), u32::from(class) << 8);
        }
        if let Some(bridge) = device.get("pci_bridge").filter(|_| depth < MAX_BRIDGES) {
            classes_by_id(bridge, depth + 1, found);
        }
    }
}

/// Names of the nodes that are files or devices of the host.
fn files_of(answer: &Value) -> Result<BTreeSet<String>, GraphError> {
    let mut found = BTreeSet::new();
    for item in Item::root("query-named-block-nodes", answer).list(nodes::MAX_NODES)? {
        if matches!(item.member("drv")?.text()?, "file" | "host_device" | "host_cdrom") {
            found.insert(item.member("image")?.member("filename")?.text()?.to_owned());
        }
    }
    Ok(found)
}

/// QEMU's command line, and the identity of files as its process sees them.
fn look_at_process(pid: i32, paths: BTreeSet<String>) -> (Vec<String>, BTreeMap<String, FileId>) {
    let command_line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let command_line = command_line.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect();
    let mut files = BTreeMap::new();
    for path in paths {
        // A set of descriptors is numbered in QEMU, not in the file system.
        if path.starts_with("/dev/fdset/") {
            continue;
        }
        let inside = match path.strip_prefix('/') {
            Some(rest) => PathBuf::from(format!("/proc/{pid}/root")).join(rest),
            None => PathBuf::from(format!("/proc/{pid}/cwd")).join(&path),
        };
        let seen = nix::sys::stat::stat(&inside).or_else(|error| match path.starts_with('/') {
            true => nix::sys::stat::stat(path.as_str()),
            false => Err(error),
        });
        if let Ok(stat) = seen {
            let block_device = stat.st_mode & libc::S_IFMT == libc::S_IFBLK;
            let id = match block_device {
                true => FileId { dev: 0, inode: stat.st_rdev },
                false => FileId { dev: stat.st_dev, inode: stat.st_ino },
            };
            files.insert(path, id);
        }
    }
    (command_line, files)
}
