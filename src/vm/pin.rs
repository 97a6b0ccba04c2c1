//! Pins: a disk keeps its size while it is under a fleece.
//!
//! Whoever runs the machine may resize a disk at any moment, and with a filter above it QEMU goes on with sizes that do not fit any
//! more: a read of what was cut off ends QEMU by an assertion (7.2 and 10.0), and what the guest writes beyond the old end of
//! one that has grown fails.
//!
//! | when | a resize of the disk's node | of the device, by the name of its `-drive` |
//! |---|---|---|
//! | before the filter is in place | is [seen](check), and the backup begun anew | likewise |
//! | once it is | QEMU refuses it, for the filter | reaches the filter: the pin has QEMU refuse it |
//!
//! A pin is a `raw` node over the filter, with a size of its own; such a node lets nobody resize what is below it. It cannot
//! stand any earlier: a filter with a node on it denies others to write to the disk, and the guest is one of them until
//! the filter is in place. So sizes are looked at once more when it stands.

use serde_json::{Value, json};

use super::fleece::FleeceDisk;
use super::names::Names;
use super::tracking::Plan;
use crate::fault;
use crate::monitor::{Monitor, MonitorError};
use crate::wire::message::{Failure, FailureCode};

/// Adds the pins of all disks with a filter.
pub async fn add(monitor: &Monitor, names: &Names, disks: &[FleeceDisk]) -> Result<(), MonitorError> {
    for disk in disks.iter().filter(|disk| disk.has_filter()) {
        let (node, file, size) = (names.pin(disk.index), names.filter(disk.index), disk.plan.disk.size_bytes);
        let options = json!({"driver": "raw", "node-name": node, "file": file, "size": size, "read-only": true});
        monitor.raw("blockdev-add", options).await?;
        fault::point("fleece.pinned");
    }
    Ok(())
}

/// Removes the pin of a disk.
pub async fn remove(monitor: &Monitor, names: &Names, index: usize) -> Result<(), MonitorError> {
    monitor.raw("blockdev-del", json!({"node-name": names.pin(index)})).await.map(drop)
}

/// Whether disks have the size that they are planned with, by an answer of `query-named-block-nodes`. A disk that goes on from a
/// checkpoint had the bit of its sentinel: if it has lost it, it was shrunk and grown again meanwhile.
///
/// # Errors
/// [`FailureCode::SessionGone`]: another session may be begun at once.
pub fn check(nodes: &Value, names: &Names, disks: &[FleeceDisk]) -> Result<(), Failure> {
    for FleeceDisk { plan, .. } in disks.iter().filter(|disk| disk.has_filter()) {
        let node =
            nodes.as_array().and_then(|all| all.iter().find(|node| node["node-name"] == plan.disk.node.as_str()));
        let Some(node) = node else { continue };
        check_size(plan, node["image"]["virtual-size"].as_u64())?;
        let mut bitmaps = node["dirty-bitmaps"].as_array().into_iter().flatten();
        if plan.sealed.is_some()
            && bitmaps.any(|b| b["count"] == 0 && b["name"].as_str().is_some_and(|name| names.is_sentinel(name)))
        {
            return Err(resized(plan, "and back again"));
        }
    }
    Ok(())
}

/// Whether a disk has still the size that it is planned with.
pub fn check_size(plan: &Plan, now: Option<u64>) -> Result<(), Failure> {
    let then = plan.disk.size_bytes;
    match now {
        Some(now) if now != then => Err(resized(plan, &format!("from {then} to {now} bytes"))),
        _ => Ok(()),
    }
}

fn resized(plan: &Plan, how: &str) -> Failure {
    let what = format!("disk {} was resized while the backup began, {how}", plan.disk.name);
    Failure::new(FailureCode::SessionGone, what)
}
