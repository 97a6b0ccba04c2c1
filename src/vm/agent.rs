//! The guest's agent, found through QEMU: where its channel is, who has it, and what it says of the guest.
//!
//! ```text
//!  virtserialport with the name org.qemu.guest_agent.0 ──chardev──► label ──query-chardev──► unix:PATH,server=on
//! ```
//!
//! QEMU knows what a client of the channel cannot: whether the agent has the guest's end open (`frontend-open`), and
//! whether another client has ours (else the chardev's file name begins with `disconnected:`). So the usual cases of
//! silence are told apart without waiting for it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::agent::{Address, AgentError, Channel, FileSystemDisk, PciAddress};
use crate::grade::{Guest, GuestFileSystem};
use crate::machine::Disk;
use crate::monitor::{Monitor, MonitorError};

/// The name of the agent's port.
const PORT: &str = "org.qemu.guest_agent.0";
/// How long an agent may take to answer for the first time.
const OPEN_WITHIN: Duration = Duration::from_secs(5);
/// How often a program in the guest is asked for.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Most devices that are looked at, and bridges below one another.
const MAX_DEVICES: usize = 4096;
const MAX_DEPTH: usize = 16;

/// Why there is no agent to talk to.
#[derive(Debug, thiserror::Error)]
pub enum Absence {
    /// QEMU has no channel for one.
    #[error(
        "the virtual machine has no channel to a guest agent: a unix socket chardev with a virtserialport named {PORT}"
    )]
    NoPort,
    /// Nobody in the guest listens.
    #[error("no agent runs in the guest: nobody has its port open")]
    NotRunning,
    /// Its only place is taken.
    #[error("another program has the guest agent's channel at {0}, which takes one at a time")]
    Taken(Address),
    /// It does not answer.
    #[error("{0}")]
    Silent(String),
    /// QEMU cannot be asked.
    #[error("{0}")]
    Unknown(String),
}

/// Opens the agent's channel: at the address that is configured, else at that which QEMU has.
pub async fn open(monitor: &Monitor, configured: Option<&Address>) -> Result<Channel, Absence> {
    let address = match find(monitor, configured).await.map_err(|e| Absence::Unknown(e.to_string()))? {
        Found::At { agent_runs: false, .. } => return Err(Absence::NotRunning),
        Found::At { address, taken: true, .. } => return Err(Absence::Taken(address)),
        Found::At { address, .. } | Found::Elsewhere(address) => address,
        Found::Nowhere => return Err(Absence::NoPort),
    };
    Channel::open(&address, OPEN_WITHIN).await.map_err(|e| Absence::Silent(e.to_string()))
}

/// What QEMU knows of the agent's channel.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// It is here.
    At { address: Address, agent_runs: bool, taken: bool },
    /// It is where the configuration says, which is no chardev's socket that QEMU shows.
    Elsewhere(Address),
    /// There is none.
    Nowhere,
}

async fn find(monitor: &Monitor, configured: Option<&Address>) -> Result<Found, MonitorError> {
    let chardevs = monitor.raw("query-chardev", json!({})).await?;
    let all = chardevs.as_array().map(Vec::as_slice).unwrap_or_default().iter().take(MAX_DEVICES);
    let sockets = all.filter_map(|c| Some((c, socket_of(c["filename"].as_str()?)?)));
    let label = match configured {
        Some(_) => None,
        None => port_label(monitor).await?,
    };
    for (chardev, (path, taken)) in sockets {
        let ours = match configured {
            Some(address) => same_file(&address.0, &path),
            None => label.is_some() && chardev["label"].as_str() == label.as_deref(),
        };
        if ours {
            // The path as the operator wrote it may be reachable where QEMU's is not.
            let address = configured.cloned().unwrap_or(Address(path));
            let agent_runs = chardev["frontend-open"].as_bool().unwrap_or(true);
            return Ok(Found::At { address, agent_runs, taken });
        }
    }
    Ok(configured.map_or(Found::Nowhere, |address| Found::Elsewhere(address.clone())))
}

/// The label of the chardev behind the agent's port.
async fn port_label(monitor: &Monitor) -> Result<Option<String>, MonitorError> {
    for parent in ["/machine/peripheral", "/machine/peripheral-anon"] {
        let children = monitor.raw("qom-list", json!({"path": parent})).await?;
        for child in children.as_array().into_iter().flatten().take(MAX_DEVICES) {
            let Some(name) = child["name"].as_str().filter(|_| child["type"] == "child<virtserialport>") else {
                continue;
            };
            let get = |property: &'static str| {
                monitor.raw("qom-get", json!({"path": format!("{parent}/{name}"), "property": property}))
            };
            // A port may be unplugged meanwhile.
            if get("name").await.is_ok_and(|name| name == PORT)
                && let Ok(Value::String(label)) = get("chardev").await
            {
                return Ok(Some(label));
            }
        }
    }
    Ok(None)
}

/// The socket of a chardev by its file name, and whether a client has it: `unix:PATH,server=on`, with `disconnected:`
/// before it while nobody has.
fn socket_of(filename: &str) -> Option<(PathBuf, bool)> {
    let (rest, taken) = match filename.strip_prefix("disconnected:") {
        Some(rest) => (rest, false),
        None => (filename, true),
    };
    let path = rest.strip_prefix("unix:")?;
    let path = path.rsplit_once(",server").map_or(path, |(path, _)| path);
    (!path.is_empty()).then(|| (path.into(), taken))
}

fn same_file(a: &Path, b: &Path) -> bool {
    a == b || std::fs::canonicalize(a).ok().zip(std::fs::canonicalize(b).ok()).is_some_and(|(a, b)| a == b)
}

/// What the agent says of the guest. Commands that it does not execute leave their part empty; an agent that stops to
/// answer is an error.
pub async fn guest(monitor: &Monitor, agent: &mut Channel, disks: &[&Disk]) -> Result<Guest, AgentError> {
    fn or_empty<T: Default>(result: Result<T, AgentError>) -> Result<T, AgentError> {
        match result {
            Err(e) if e.is_refusal() => Ok(T::default()),
            other => other,
        }
    }
    let info = or_empty(agent.info().await)?;
    let os = or_empty(agent.os().await)?;
    let host_name = or_empty(agent.host_name().await)?;
    let found = or_empty(agent.file_systems().await)?;
    let ids = pci_ids(&monitor.raw("query-pci", json!({})).await.unwrap_or_default());
    let file_systems = found.into_iter().map(|f| GuestFileSystem {
        mount_point: f.mountpoint,
        kind: f.kind,
        device: f.name,
        disks: f.disk.iter().filter_map(|d| disk_name(d, &ids, disks)).collect(),
    });
    Ok(Guest {
        agent_version: info.version,
        os: os.pretty_name,
        kernel: os.kernel_release,
        host_name,
        file_systems: file_systems.collect(),
    })
}

/// Lets a guest that is no Windows write out what it has in memory, so that a freeze right after it has little to write. What
/// fails, or is not allowed, does no harm.
pub async fn flush(agent: &mut Channel, within: Duration) {
    let deadline = Instant::now() + within;
    let Ok(number) = agent.execute("sync", &[], b"").await else { return };
    while Instant::now() < deadline && matches!(agent.executed(number).await, Ok(None)) {
        sleep(LOOK_EVERY).await;
    }
}

/// The VM's name of a disk, else the guest's.
fn disk_name(seen: &FileSystemDisk, ids: &HashMap<[i64; 3], String>, disks: &[&Disk]) -> Option<String> {
    let PciAddress { bus, slot, function } = seen.pci_controller;
    let by_pci = ids.get(&[bus, slot, function]).filter(|id| disks.iter().any(|d| d.name == **id)).cloned();
    let by_serial = disks.iter().find(|d| d.name == seen.serial).map(|d| d.name.clone());
    by_pci.or(by_serial).or_else(|| (!seen.dev.is_empty()).then(|| seen.dev.clone()))
}

/// The ids of the devices with their own PCI function.
fn pci_ids(buses: &Value) -> HashMap<[i64; 3], String> {
    fn walk(devices: &Value, depth: usize, ids: &mut HashMap<[i64; 3], String>) {
        for device in devices.as_array().into_iter().flatten().take(MAX_DEVICES) {
            let number = |name: &str| device[name].as_i64();
            if let (Some(bus), Some(slot), Some(function)) = (number("bus"), number("slot"), number("function"))
                && let Some(id) = device["qdev_id"].as_str().filter(|id| !id.is_empty())
            {
                ids.insert([bus, slot, function], id.to_owned());
            }
            if depth < MAX_DEPTH {
                walk(&device["pci_bridge"]["devices"], depth + 1, ids);
            }
        }
    }
    let mut ids = HashMap::new();
    for bus in buses.as_array().into_iter().flatten().take(MAX_DEVICES) {
        walk(&bus["devices"], 0, &mut ids);
    }
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chardevs_file_name() {
        for (text, path, taken) in [
            ("disconnected:unix:/run/vm1.qga,server=on", "/run/vm1.qga", false),
            ("unix:/run/vm1.qga,server=on", "/run/vm1.qga", true),
            ("disconnected:unix:/a,b,server=on", "/a,b", false),
            ("unix:/a", "/a", true),
        ] {
            assert_eq!(socket_of(text), Some((path.into(), taken)), "{text}");
        }
        for none in ["disconnected:tcp:127.0.0.1:1,server=on", "pty:/dev/pts/1", "unix:", "", "file"] {
            assert_eq!(socket_of(none), None, "{none}");
        }
    }

    #[test]
    fn functions_behind_bridges_are_found() {
        let buses = json!([{"bus": 0, "devices": [
            {"bus": 0, "slot": 3, "function": 0, "qdev_id": "vd0"},
            {"bus": 0, "slot": 4, "function": 0, "qdev_id": "", "pci_bridge": {"devices": [
                {"bus": 1, "slot": 0, "function": 0, "qdev_id": "vd1"}]}}]}]);
        let ids = pci_ids(&buses);
        assert_eq!(ids.get(&[1, 0, 0]).map(String::as_str), Some("vd1"));
        assert_eq!(ids.len(), 2);
    }
}
