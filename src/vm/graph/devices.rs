//! Guest devices, and what a backup does with each.
//!
//! | found as | verdict |
//! |---|---|
//! | virtio-blk, scsi-hd, ide-hd, nvme, nvme-ns, usb-storage, pflash, with a medium | protectable |
//! | CD, floppy, empty drive, drive that no device uses | left out |
//! | scsi-block, scsi-generic | not protectable: commands pass the block layer by, so writes are not seen |
//! | vhost-user-blk, vhost-scsi, vhost-user-scsi, vDPA storage, VFIO storage, persistent memory | not protectable: QEMU does not see the writes |
//! | `snapshot=on` | not protectable: QEMU throws the writes away at its end |
//! | two devices on one node that can be written to | not protectable: what one writes goes past the other's filter |
//! | any other type with a medium | not protectable: unknown |

use std::collections::BTreeMap;

use serde_json::Value;

use super::item::{Item, MAX_TEXT_BYTES};
use super::names::{self, Candidates};
use super::options::{self, Wanted};
use super::{Answers, Graph, GraphError, Object, nodes};
use crate::limits::MAX_DISKS;
use crate::machine::{Disk, DiskKind, FoundDisk, MediumFile, Verdict};

/// A device before it has a name.
struct Device<'a> {
    qom_path: String,
    kind: &'a str,
    backend: &'a str,
    /// Root node, our filter included.
    top: Option<&'a str>,
    /// The disk's own root node.
    node: Option<String>,
    verdict: Verdict,
}

/// Reads all devices and notes their top nodes in the graph.
pub(super) fn read(answers: &Answers, graph: &mut Graph, owner_prefix: &str) -> Result<Vec<FoundDisk>, GraphError> {
    let objects: BTreeMap<&str, &Object> = answers.objects.iter().map(|o| (o.path.as_str(), o)).collect();
    let mut devices = vec![];
    for item in Item::root("query-block", &answers.block).list(nodes::MAX_NODES)? {
        devices.push(backed(&item, graph, &objects, owner_prefix)?);
    }
    let mut unbacked: Vec<_> = answers.objects.iter().filter_map(|o| without_backend(o, answers)).collect();
    unbacked.sort_by(|a, b| a.qom_path.cmp(&b.qom_path));
    devices.extend(unbacked);
    if devices.len() > MAX_DISKS {
        return Err(GraphError::TooLarge { at: "the number of disks".into(), limit: MAX_DISKS as u64 });
    }

    let candidates: Vec<_> = devices.iter().map(|d| d.candidates()).collect();
    let names = names::assign(&candidates);
    let shared = shared(&devices, graph, &objects, &names, answers);
    let together = together(&devices, graph);
    let mut found = vec![];
    for (((device, name), shared), other) in devices.iter().zip(&names).zip(shared).zip(together) {
        if let Some(top) = device.top {
            graph.tops.insert(device.qom_path.clone(), top.to_owned());
        }
        let verdict = match other {
            Some(other) => Verdict::NotProtectable(format!(
                "disk {} is on the same block node, and QEMU puts no filter between a node and one of two devices that write \
                 to it",
                names[other]
            )),
            None => device.verdict.clone(),
        };
        let verdict = match &verdict {
            Verdict::NotProtectable(why) => Verdict::NotProtectable(format!(
                "{why}; leave it out by name (--exclude {name}), or attach it otherwise"
            )),
            other => other.clone(),
        };
        found.push(FoundDisk { disk: device.disk(name.clone(), shared, graph, &objects, answers)?, verdict });
    }
    Ok(found)
}

/// A device of `query-block`.
fn backed<'a>(
    item: &Item<'a>,
    graph: &Graph,
    objects: &BTreeMap<&'a str, &'a Object>,
    owner_prefix: &str,
) -> Result<Device<'a>, GraphError> {
    let backend = item.member("device")?.text()?;
    let qdev = item.optional("qdev")?.map(|q| q.text()).transpose()?.filter(|q| !q.is_empty());
    let top = match item.optional("inserted")? {
        Some(inserted) => Some(inserted.member("node-name")?.text()?),
        None => None,
    };
    let node = top.map(|top| below_ours(graph, top, owner_prefix)).transpose()?;
    let Some(qdev) = qdev else {
        let why = Verdict::LeftOut("no guest device uses it".into());
        return Ok(Device { qom_path: String::new(), kind: "", backend, top, node, verdict: why });
    };
    let qom_path = if qdev.starts_with('/') { qdev.to_owned() } else { format!("/machine/peripheral/{qdev}") };
    let Some(object) = objects.get(qom_path.as_str()) else {
        return Err(GraphError::Changed(format!("no object {qom_path}")));
    };
    let kind = match usb_parent(&qom_path, objects) {
        Some(usb) => usb,
        None => object.kind.as_str(),
    };
    let verdict = match &node {
        _ if matches!(kind, "ide-cd" | "scsi-cd") => Verdict::LeftOut("a CD drive".into()),
        _ if kind == "floppy" => Verdict::LeftOut("a floppy drive".into()),
        None => Verdict::LeftOut("an empty drive".into()),
        Some(node) => judge(kind, node, graph)?,
    };
    Ok(Device { qom_path, kind, backend, top, node, verdict })
}

/// The node that belongs to the disk: below all filters of ours, by the edge.
fn below_ours(graph: &Graph, top: &str, owner_prefix: &str) -> Result<String, GraphError> {
    let mut name = top;
    for _ in 0..8 {
        let Some(node) = graph.node(name) else {
            return Err(GraphError::Changed(format!("no node {name:?}")));
        };
        if !(name.starts_with(owner_prefix) && node.driver == "copy-before-write") {
            return Ok(name.to_owned());
        }
        name = graph
            .child(name, "file")
            .ok_or_else(|| GraphError::Broken(format!("our filter {name:?} has no edge to the disk below it")))?;
    }
    Err(GraphError::Broken(format!("too many filters of ours above {name:?}")))
}

/// `usb-storage` has a scsi-hd of its own making below it, which has the medium.
fn usb_parent<'a>(qom_path: &str, objects: &BTreeMap<&'a str, &'a Object>) -> Option<&'a str> {
    let (bus, last) = qom_path.rsplit_once('/')?;
    let (device, _) = bus.rsplit_once('/')?;
    let kind = objects.get(device)?.kind.as_str();
    (last.starts_with("legacy[") && kind == "usb-storage").then_some(kind)
}

/// A device with a medium.
fn judge(kind: &str, node: &str, graph: &Graph) -> Result<Verdict, GraphError> {
    let why = match kind {
        "virtio-blk-device" | "scsi-hd" | "ide-hd" | "nvme" | "nvme-ns" | "usb-storage" => None,
        _ if is_pflash(kind) => None,
        "scsi-block" | "scsi-generic" => {
            Some(format!("{kind} hands the guest's SCSI commands to the device, past QEMU's block layer"))
        }
        _ => Some(format!("device type {kind:?} is not known to livebackup")),
    };
    if let Some(why) = why {
        return Ok(Verdict::NotProtectable(why));
    }
    for name in graph.below(node, false) {
        let Some(node) = graph.node(name) else {
            return Err(GraphError::Changed(format!("no node {name:?}")));
        };
        if is_temporary_overlay(graph, node) {
            return Ok(Verdict::NotProtectable(
                "it runs with snapshot=on: what the guest writes is thrown away when QEMU ends".into(),
            ));
        }
        if matches!(node.driver.as_str(), "virtio-blk-vhost-vdpa" | "virtio-blk-vhost-user" | "virtio-blk-vfio-pci") {
            return Ok(Verdict::NotProtectable(format!("its medium is reached by {}", node.driver)));
        }
    }
    if graph.node(node).is_some_and(|n| n.size_bytes == 0) {
        return Ok(Verdict::LeftOut("its medium has no size".into()));
    }
    Ok(Verdict::Protectable)
}

fn is_pflash(kind: &str) -> bool {
    kind.starts_with("cfi.pflash")
}

/// `snapshot=on` shows as a qcow2 node that never flushes, on a file `…/vl.XXXXXX` (QEMU removes the name at once).
fn is_temporary_overlay(graph: &Graph, node: &nodes::Node) -> bool {
    let file = graph.child(&node.name, "file").and_then(|f| graph.node(f));
    let name = file.and_then(|f| f.filename.rsplit('/').next()).and_then(|name| name.strip_prefix("vl."));
    let backing = graph.child(&node.name, "backing");
    node.driver == "qcow2"
        && node.no_flush
        && backing.is_some()
        && name.is_some_and(|x| x.len() == 6 && x.bytes().all(|b| b.is_ascii_alphanumeric()))
}

/// Storage that has no block backend: the guest's writes never reach QEMU's block layer.
fn without_backend<'a>(object: &'a Object, answers: &Answers) -> Option<Device<'a>> {
    let kind = object.kind.as_str();
    let why = match kind {
        "vhost-user-blk" | "vhost-user-scsi" => "another process serves it, QEMU does not see its writes".to_owned(),
        "vhost-scsi" => "the kernel serves it, QEMU does not see its writes".to_owned(),
        "vhost-vdpa-device" => match answers.virtio.get(&object.path).map(String::as_str) {
            Some(name) if !is_virtio_storage(name) => return None,
            Some(name) => format!("a vDPA device ({name}) serves it, QEMU does not see its writes"),
            None => "a vDPA device, and QEMU does not say whether it is storage".to_owned(),
        },
        "vfio-ccw" => "a channel device given to the guest, QEMU does not see its writes".to_owned(),
        "vfio-pci" | "vfio-pci-nohotplug" | "vfio-user-pci" => match answers.pci_classes.get(&object.path) {
            Some(class) if class >> 16 != 0x01 => return None,
            Some(_) => "a storage controller given to the guest, QEMU does not see its writes".to_owned(),
            None => "a PCI device given to the guest, and its class could not be read: it may be storage".to_owned(),
        },
        "nvdimm" | "virtio-pmem" => "persistent memory, which the guest writes without QEMU".to_owned(),
        _ => return None,
    };
    Some(Device {
        qom_path: object.path.clone(),
        kind,
        backend: "",
        top: None,
        node: None,
        verdict: Verdict::NotProtectable(why),
    })
}

fn is_virtio_storage(name: &str) -> bool {
    let name = name.strip_prefix("virtio-").unwrap_or(name);
    name.starts_with("blk") || name.starts_with("block") || name.starts_with("scsi") || name == "vhost-vdpa-device"
}

/// For each device that could be protected another one on the same node, if it can be written to.
fn together(devices: &[Device], graph: &Graph) -> Vec<Option<usize>> {
    let node_of = |device: &Device| {
        let node = device.node.as_deref().and_then(|node| graph.node(node)).filter(|node| !node.read_only)?;
        (!matches!(device.verdict, Verdict::LeftOut(_))).then(|| node.name.clone())
    };
    let nodes: Vec<_> = devices.iter().map(node_of).collect();
    let other = |i: usize| nodes.iter().enumerate().position(|(j, node)| j != i && node.is_some() && *node == nodes[i]);
    (0..devices.len()).map(|i| other(i).filter(|_| devices[i].verdict == Verdict::Protectable)).collect()
}

/// Why each device's medium counts as shared, if it does.
fn shared(
    devices: &[Device],
    graph: &Graph,
    objects: &BTreeMap<&str, &Object>,
    names: &[String],
    answers: &Answers,
) -> Vec<Option<String>> {
    // What a device's bytes are in: its root node, and each node below that holds data, by file where it is one.
    let media = |d: &Device| -> Vec<String> {
        let Some(node) = d.node.as_deref() else { return vec![] };
        let mut keys = vec![format!("node {node}")];
        for name in graph.below(node, false) {
            if graph.children(name).next().is_none()
                && let Some(leaf) = graph.node(name)
            {
                keys.push(format!("node {name}"));
                keys.extend(answers.files.get(&leaf.filename).map(|id| format!("file {}:{}", id.dev, id.inode)));
                if leaf.filename.starts_with('/') {
                    keys.push(format!("path {}", leaf.filename));
                }
            }
        }
        keys
    };
    let writable = |d: &Device| d.node.as_deref().and_then(|n| graph.node(n)).is_some_and(|n| !n.read_only);
    let all: Vec<_> = devices.iter().map(media).collect();
    let mut users: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (i, keys) in all.iter().enumerate() {
        for key in keys {
            let list = users.entry(key).or_default();
            if list.last() != Some(&i) {
                list.push(i);
            }
        }
    }
    (0..devices.len())
        .map(|i| {
            let share_rw = objects.get(devices[i].qom_path.as_str()).and_then(|o| o.properties.get("share-rw"));
            if share_rw == Some(&Value::Bool(true)) {
                return Some("share-rw=on: others may write to it".to_owned());
            }
            all[i].iter().find_map(|key| {
                let other = users[key.as_str()]
                    .iter()
                    .find(|o| **o != i && (writable(&devices[**o]) || writable(&devices[i])))?;
                Some(format!("disk {} has the same medium", names[*other]))
            })
        })
        .collect()
}

impl Device<'_> {
    fn candidates(&self) -> Candidates<'_> {
        Candidates {
            pflash: is_pflash(self.kind),
            qom_path: &self.qom_path,
            backend: self.backend,
            node: self.node.as_deref().unwrap_or(""),
        }
    }

    fn disk(
        &self,
        name: String,
        shared: Option<String>,
        graph: &Graph,
        objects: &BTreeMap<&str, &Object>,
        answers: &Answers,
    ) -> Result<Disk, GraphError> {
        let mut disk = Disk {
            name,
            kind: if is_pflash(self.kind) { DiskKind::Pflash } else { DiskKind::Disk },
            device: self.kind.to_owned(),
            qom_path: self.qom_path.clone(),
            node: String::new(),
            size_bytes: 0,
            read_only: true,
            iothread: in_iothread(&self.qom_path, objects),
            discard_unmap: false,
            chain: vec![],
            shared,
        };
        if let Some(name) = &self.node
            && let Some(node) = graph.node(name)
        {
            disk.chain = chain(graph, name)?;
            let filename = disk.chain.first().map_or("", |f| f.filename.as_str());
            let wanted = Wanted { node: name, backend: self.backend, filename };
            disk.discard_unmap = node.unmaps_zeroes || options::discard(&answers.command_line, &wanted).unwrap_or(true);
            disk.node.clone_from(name);
            disk.size_bytes = node.size_bytes;
            disk.read_only = node.read_only;
        }
        Ok(disk)
    }
}

/// Whether the device, or the controller whose bus it is on, runs in an iothread.
fn in_iothread(qom_path: &str, objects: &BTreeMap<&str, &Object>) -> bool {
    let says = |object: &Object| {
        let one = object.properties.get("iothread").and_then(Value::as_str).is_some_and(|path| !path.is_empty());
        let many = object.properties.get("iothread-vq-mapping").and_then(Value::as_array);
        one || many.is_some_and(|list| !list.is_empty())
    };
    let Some(device) = objects.get(qom_path) else { return false };
    let bus = device.properties.get("parent_bus").and_then(Value::as_str);
    let controller = bus.filter(|b| b.len() <= MAX_TEXT_BYTES).and_then(|b| b.rsplit_once('/')).map(|(path, _)| path);
    says(device) || controller.and_then(|path| objects.get(path)).is_some_and(|c| says(c))
}

/// The files of a node, the guest-visible layer first: every leaf below it, with the format of the layer that it holds.
fn chain(graph: &Graph, root: &str) -> Result<Vec<MediumFile>, GraphError> {
    let order = graph.below(root, true);
    let mut formats: BTreeMap<&str, &str> = BTreeMap::new();
    let mut files = vec![];
    for name in order {
        let Some(node) = graph.node(name) else {
            return Err(GraphError::Changed(format!("no node {name:?}")));
        };
        if graph.children(name).next().is_none() {
            files.push(MediumFile {
                format: formats.get(name).copied().unwrap_or("raw").to_owned(),
                protocol: node.driver.clone(),
                filename: node.filename.clone(),
                read_only: node.read_only,
            });
            continue;
        }
        for edge in graph.children(name) {
            let format = match edge.role.as_str() {
                _ if node.is_filter() => formats.get(name).copied().unwrap_or("raw"),
                "data-file" | "backing" => "raw",
                _ => node.driver.as_str(),
            };
            formats.entry(edge.child.as_str()).or_insert(format);
        }
    }
    Ok(files)
}
