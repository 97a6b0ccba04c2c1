//! Persistent bitmaps: tracking that the image itself carries from one QEMU to the next, for virtual machines whose end
//! nobody of ours is there to see.
//!
//! ```text
//!  QEMU 1                      the qcow2 file                   QEMU 2
//!  since-C records ──quit──►   since-C, as it stood at the end ──open──► since-C records on, before the guest runs
//!                  ──kill──►   nothing, or since-C "in use"    ──open──► not there, or inconsistent: a new epoch
//! ```
//!
//! It is an option of a VM. Our bitmaps are added as QEMU's persistent ones then, where the image can keep them; QEMU stores
//! them when it closes the image (`quit`, SIGTERM, the guest's power-off) and goes on recording in them when it opens it.
//!
//! **Why a bitmap that was kept is believed.** It lies in the file that it tells of, so both are of the same time, whatever is
//! done to the file as a whole:
//!
//! * *the image was put back to an older copy*: the bitmap's name has the random id of the checkpoint from which on it
//!   records. If that is the log's latest checkpoint, the copy was taken after it, and copy and bitmap agree. Else the bitmap
//!   has another name than the log's, and counts for nothing. A copy that was taken while QEMU had the image open has the
//!   bitmap marked "in use", or has none;
//! * *another program wrote to the disk through qcow2* (qemu-img, qemu-io, qemu-nbd, another QEMU): it records in the bitmap,
//!   as QEMU does. One that knows no bitmaps must take a mark out of the file's header (the format's rule), and QEMU then
//!   drops them all. Reverting to an internal snapshot is refused while there is a bitmap;
//! * *the image was resized*: recorded with its size; down and up again, the kept sentinel has lost its bit;
//! * *the bitmap was copied to another content* (`qemu-img convert -l SNAPSHOT --bitmaps` does that): then it is another file,
//!   by its inode, and that is not believed, though a mere copy could be;
//! * *what lies outside the image changed*: a backing file or a data file has no bitmap. Images that have one are not used so;
//! * *the host crashed*: QEMU flushes the image when it closes it. Where it was told not to (`cache.no-flush`), the image is not
//!   used so either.
//!
//! **What would not be noticed**: a program that changes data inside the file without going by the format. The
//! [audit](crate::backup) is there for such things.
//!
//! Bitmaps of others are never touched, and ours go from the image when the log does not need them any more, at the latest
//! by `livebackup detach`. A bitmap that QEMU calls inconsistent is removed, with a new epoch and that reason.

use serde_json::{Value, json};

use super::graph::Graph;
use crate::machine::Disk;
use crate::monitor::{Monitor, MonitorError};
use crate::units::GRANULE_BYTES;

/// Whether a disk's image can keep bitmaps that are to be believed.
///
/// # Errors
/// Why not, to be read after "the image".
pub fn can_keep(graph: &Graph, disk: &Disk) -> Result<(), String> {
    let Some(node) = graph.node(&disk.node) else { return Err("cannot be seen".to_owned()) };
    if node.driver != "qcow2" {
        return Err(format!("is {}, and only qcow2 can keep bitmaps", node.driver));
    }
    if disk.chain.len() != 1 {
        return Err("has a backing file or a data file, whose changes no bitmap shows".to_owned());
    }
    let below = graph.children(&disk.node).filter_map(|edge| graph.node(&edge.child));
    if node.no_flush || below.into_iter().any(|n| n.no_flush) {
        return Err("is never flushed (cache.no-flush), so that a crash of the host may leave anything".to_owned());
    }
    Ok(())
}

/// Adds the bitmap that records from now on, kept by the image where `keep` says so and the image can. Gives whether it
/// is kept.
pub async fn add_recording(monitor: &Monitor, node: &str, name: &str, keep: bool) -> Result<bool, MonitorError> {
    if keep {
        match monitor.raw("block-dirty-bitmap-add", bitmap(node, name, true)).await {
            // An image of the format's second version, for one.
            Err(e) if e.refusal().is_some() => {
                tracing::warn!(node, "the image does not keep bitmaps, so tracking ends with QEMU: {e}");
            }
            added => return added.map(|_| true),
        }
    }
    monitor.raw("block-dirty-bitmap-add", bitmap(node, name, false)).await.map(|_| false)
}

/// Arguments for adding a bitmap that records.
pub fn bitmap(node: &str, name: &str, keep: bool) -> Value {
    let mut arguments = json!({"node": node, "name": name, "granularity": GRANULE_BYTES});
    if keep {
        arguments["persistent"] = json!(true);
    }
    arguments
}
