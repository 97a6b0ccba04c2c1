//! The devices of a machine, from a walk of the QOM tree, which is remembered.
//!
//! ```text
//!  print of the machine ── as remembered? ──yes──► the remembered objects, iothreads asked again
//!                               │ no
//!                               ▼
//!                          walk, remember
//! ```
//!
//! A walk is some seventy commands, and QEMU reads a command byte by byte: it was two thirds of all that an incremental
//! asked QEMU for. So the machine is recognised by its **print**, in three commands: what is plugged (`/machine/peripheral`
//! and `/machine/peripheral-anon`, by name and type), and the text of HMP's `info qtree`, which has every device on every
//! bus with its properties. The text is compared, never understood, so its form may change from version to version; where
//! it cannot be had, each look is a walk. It lacks links, hence the iothreads are asked for again: a device that was pulled out
//! and plugged again under the same name may have another.

use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeSet;

use super::item::Item;
use super::{GraphError, Object};
use crate::monitor::{Monitor, MonitorError};

/// Most objects of the QOM tree that are looked at, and how deep.
const MAX_OBJECTS: usize = 16 << 10;
const MAX_DEPTH: usize = 16;
/// Where devices are plugged while the machine runs.
const PLUGGED: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];
/// Lines of `info qtree` that change while the devices stay: where the guest maps them, and the node that a disk has,
/// which is another one while a backup runs.
const CHANGING: [&str; 3] = ["bar ", "MCFG = ", "drive = "];

/// The devices of a machine as a walk found them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Board {
    /// BLAKE3 of the print, in hex; empty: nothing is remembered.
    print: String,
    objects: Vec<Object>,
}

/// A command on an object that may have gone away meanwhile.
pub(super) async fn unless_gone(
    monitor: &Monitor,
    command: &str,
    arguments: Value,
) -> Result<Option<Value>, MonitorError> {
    match monitor.raw(command, arguments).await {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.refusal().is_some() => Ok(None),
        Err(error) => Err(error),
    }
}

/// All devices and buses of the QOM tree, sorted by path.
pub(super) async fn objects(monitor: &Monitor, board: &mut Board) -> Result<Vec<Object>, GraphError> {
    // Before the walk: what is plugged in its middle shows as another print the next time.
    let print = print(monitor).await?.unwrap_or_default();
    if !print.is_empty() && print == board.print {
        ask_again(monitor, &mut board.objects).await?;
        return Ok(board.objects.clone());
    }
    let objects = walk(monitor).await?;
    *board = Board { print, objects: objects.clone() };
    Ok(objects)
}

/// What tells this machine from others and from itself with other devices; none where QEMU refuses to say.
async fn print(monitor: &Monitor) -> Result<Option<String>, MonitorError> {
    let mut hasher = blake3::Hasher::new();
    for path in PLUGGED {
        let Some(list) = unless_gone(monitor, "qom-list", json!({"path": path})).await? else { return Ok(None) };
        hasher.update(list.to_string().as_bytes());
    }
    let tree = unless_gone(monitor, "human-monitor-command", json!({"command-line": "info qtree"})).await?;
    let Some(tree) = tree.as_ref().and_then(Value::as_str).filter(|text| !text.is_empty()) else { return Ok(None) };
    for line in tree.lines().filter(|line| !CHANGING.iter().any(|start| line.trim_start().starts_with(start))) {
        hasher.update(line.as_bytes());
        hasher.update(b"\n");
    }
    Ok(Some(hasher.finalize().to_hex().to_string()))
}

/// Brings up to date what the print does not tell.
async fn ask_again(monitor: &Monitor, objects: &mut [Object]) -> Result<(), GraphError> {
    let plugged = objects.iter_mut().filter(|o| PLUGGED.iter().any(|path| o.path.starts_with(path)));
    let mut links: Vec<_> =
        plugged.filter_map(|object| Some((object.path.as_str(), object.properties.get_mut("iothread")?))).collect();
    if links.is_empty() {
        return Ok(());
    }
    if monitor.raw("query-iothreads", json!({})).await?.as_array().is_some_and(Vec::is_empty) {
        links.iter_mut().for_each(|(_, value)| **value = json!(""));
        return Ok(());
    }
    let ask = async |path: &str, value: &mut Value| {
        let asked = unless_gone(monitor, "qom-get", json!({"path": path, "property": "iothread"})).await?;
        *value = asked.ok_or_else(|| GraphError::Changed(format!("no object {path}")))?;
        Ok::<_, GraphError>(())
    };
    try_join_all(links.into_iter().map(|(path, value)| ask(path, value))).await.map(drop)
}

/// A whole level is asked for at once: answering takes QEMU a few microseconds an object, and a walk one by one would
/// cost a turn of its main loop each.
async fn walk(monitor: &Monitor) -> Result<Vec<Object>, GraphError> {
    let mut found = vec![];
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
            level.extend(children);
            if depth > 0 {
                found.push(object);
            }
            if found.len() + level.len() > MAX_OBJECTS {
                return Err(GraphError::TooLarge { at: "QOM tree".into(), limit: MAX_OBJECTS as u64 });
            }
        }
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
