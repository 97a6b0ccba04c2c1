//! Asks a running QEMU. Nothing here changes it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use futures_util::future::try_join_all;
use nix::libc;
use serde_json::{Value, json};

use super::item::Item;
use super::{Answers, FileId, Graph, GraphError, Object, names, nodes};
use crate::monitor::{Monitor, MonitorError};

/// Most objects of the QOM tree that are looked at, and how deep.
const MAX_OBJECTS: usize = 16 << 10;
const MAX_DEPTH: usize = 16;
/// How often answers that do not fit together are asked for again.
const TRIES: usize = 4;
/// How long the files of the disks may take to tell who they are (a dead network file system never does).
const FILES_TIME_LIMIT: Duration = Duration::from_secs(3);

/// The parts of a machine that were there from its start, as they were found. Nothing can be plugged into them that does
/// not show in the list of their own children, so that later walks need not go down again: a walk is most of what
/// finding the disks costs QEMU.
#[derive(Debug, Default)]
pub struct Board {
    parts: BTreeMap<String, Part>,
}

/// A child of `/machine`.
#[derive(Debug)]
struct Part {
    children: Vec<(String, String)>,
    below: Vec<Object>,
}

/// Whether devices are plugged here while the machine runs.
fn is_pluggable(path: &str) -> bool {
    path.starts_with("/machine/peripheral")
}

impl Board {
    /// What is below a part, if its children are the known ones.
    fn known(&self, path: &str, children: &[(String, String)]) -> Option<&[Object]> {
        self.parts.get(path).filter(|part| part.children == children).map(|part| &part.below[..])
    }

    fn learn(&mut self, path: String, children: Vec<(String, String)>, all: &[Object]) {
        let prefix = format!("{path}/");
        let below = all.iter().filter(|o| o.path.starts_with(&prefix)).cloned().collect();
        self.parts.insert(path, Part { children, below });
    }
}

/// Finds a machine's disks and block graph. `owner_prefix` is `livebackup-<owner8>-`; `board` remembers what cannot change
/// from one call to the next of the same QEMU.
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
    let mut answers = Answers { objects: walk(monitor, board).await?, ..Answers::default() };
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

/// A command on an object that may have gone away meanwhile.
async fn unless_gone(monitor: &Monitor, command: &str, arguments: Value) -> Result<Option<Value>, MonitorError> {
    match monitor.raw(command, arguments).await {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.refusal().is_some() => Ok(None),
        Err(error) => Err(error),
    }
}

/// All devices and buses of the QOM tree, sorted by path. A whole level is asked for at once: answering takes QEMU a few
/// microseconds an object, and a walk one by one would cost a turn of its main loop each.
async fn walk(monitor: &Monitor, board: &mut Board) -> Result<Vec<Object>, GraphError> {
    let (mut found, mut new) = (vec![], vec![]);
    let mut level = vec![("/machine".to_owned(), String::new())];
    for depth in 0.. {
        if level.is_empty() {
            break;
        }
        if depth > MAX_DEPTH {
            return Err(GraphError::TooLarge { at: "depth of QOM tree".into(), limit: MAX_DEPTH as u64 });
        }
        let asked = try_join_all(level.into_iter().map(|(path, kind)| object(monitor, path, kind))).await?;
        level = vec![];
        for (object, children) in asked.into_iter().flatten() {
            if depth == 1 && !is_pluggable(&object.path) {
                if let Some(below) = board.known(&object.path, &children) {
                    found.extend(below.iter().cloned());
                    found.push(object);
                    continue;
                }
                new.push((object.path.clone(), children.clone()));
            }
            level.extend(children);
            if depth > 0 {
                found.push(object);
            }
            if found.len() + level.len() > MAX_OBJECTS {
                return Err(GraphError::TooLarge { at: "QOM tree".into(), limit: MAX_OBJECTS as u64 });
            }
        }
    }
    for (path, children) in new {
        board.learn(path, children, &found);
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// An object with the properties that matter, and its children (path, type); none when it has gone away.
async fn object(
    monitor: &Monitor,
    path: String,
    kind: String,
) -> Result<Option<(Object, Vec<(String, String)>)>, GraphError> {
    let Some(list) = unless_gone(monitor, "qom-list", json!({"path": path})).await? else { return Ok(None) };
    let mut children = vec![];
    let mut members = BTreeSet::new();
    for item in Item::root("qom-list", &list).list(MAX_OBJECTS)? {
        let (name, kind) = (item.member("name")?.text()?, item.member("type")?.text()?);
        match kind.strip_prefix("child<").and_then(|k| k.strip_suffix('>')) {
            Some(kind) if !is_boring(kind) => children.push((format!("{path}/{name}"), kind.to_owned())),
            Some(_) => {}
            None => {
                members.insert(name);
            }
        }
    }
    let wanted = wanted_properties(&kind, &members);
    let mut object = Object { path, kind, ..Object::default() };
    for name in wanted {
        let arguments = json!({"path": object.path, "property": name});
        if let Some(value) = unless_gone(monitor, "qom-get", arguments).await? {
            object.properties.insert((*name).to_owned(), value);
        }
    }
    Ok(Some((object, children)))
}

/// Types that are no device and have none below them.
fn is_boring(kind: &str) -> bool {
    kind.contains("memory-region") || matches!(kind, "irq" | "clock" | "or-irq") || kind.ends_with("-cpu")
}

fn wanted_properties(kind: &str, members: &BTreeSet<&str>) -> Vec<&'static str> {
    let wanted: &[&str] = if kind.starts_with("vfio-") {
        &["host", "sysfsdev"]
    } else if members.contains("drive") {
        &["iothread", "iothread-vq-mapping", "share-rw", "parent_bus"]
    } else {
        &["iothread", "iothread-vq-mapping"]
    };
    wanted.iter().copied().filter(|name| members.contains(name)).collect()
}

/// Names of virtio devices by path.
async fn virtio_names(monitor: &Monitor) -> Result<BTreeMap<String, String>, GraphError> {
    let mut found = BTreeMap::new();
    if let Some(list) = unless_gone(monitor, "x-query-virtio", json!({})).await? {
        for item in Item::root("x-query-virtio", &list).list(MAX_OBJECTS)? {
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
        if let Some(bridge) = device.get("pci_bridge").filter(|_| depth < MAX_DEPTH) {
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
