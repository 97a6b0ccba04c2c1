//! The way by a file: QEMU stores a bitmap into a qcow2 file of ours, or loads one from it.
//!
//! ```text
//!  helper (bitmap b) ── merge ─► file node (persistent, disabled bitmap) ── blockdev-del ─► our memory file ─► us
//!  us ─► our memory file ─► file node (bitmap loaded, disabled) ── merge ─► helper (bitmap b)
//! ```
//!
//! The file is in memory and passed as a descriptor; where the monitor cannot carry one, it lies beside the sockets. A
//! crash leaves the node, which is found by its name, and a set of descriptors, found by its label.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::json;

use super::super::descriptors::FileSet;
use super::super::tracking::merge;
use super::super::{internal, qemu_failed};
use super::qcow2;
use crate::checkpoint::Bitmap;
use crate::fault;
use crate::monitor::Monitor;
use crate::units::GRANULE_BYTES;
use crate::wire::message::Failure;

/// What the bitmap is called in the file.
const BITMAP: &str = "livebackup";

/// A qcow2 file that QEMU has as a node.
struct Shuttle<'a> {
    monitor: &'a Monitor,
    node: String,
    file: File,
    set: Option<FileSet>,
    path: Option<PathBuf>,
}

impl<'a> Shuttle<'a> {
    /// Adds a node named after `helper`, on a file with this content.
    async fn add(monitor: &'a Monitor, dir: &Path, helper: &str, content: &[u8]) -> Result<Self, Failure> {
        let node = format!("{helper}q");
        let no_file = |e: std::io::Error| internal(format!("cannot make a file for a bitmap: {e}"));
        let (file, set, path) = if monitor.can_pass_fds() {
            let file = memory_file().map_err(no_file)?;
            file.write_all_at(content, 0).map_err(no_file)?;
            let set = FileSet::pass(monitor, &file, &node).await?;
            (file, Some(set), None)
        } else {
            let path = dir.join(&node);
            std::fs::write(&path, content).map_err(no_file)?;
            let file = File::options().read(true).write(true).open(&path).map_err(no_file)?;
            (file, None, Some(path))
        };
        let filename = match (&set, &path) {
            (Some(set), _) => json!(set.filename()),
            (None, path) => json!(path),
        };
        let options = json!({"driver": "qcow2", "node-name": node, "file": {"driver": "file", "filename": filename}});
        monitor.raw("blockdev-add", options).await.map_err(qemu_failed)?;
        fault::point("harvest.file");
        Ok(Self { monitor, node, file, set, path })
    }

    /// Deletes the node, which makes QEMU store its bitmap; gives the file.
    async fn land(self) -> Result<File, Failure> {
        self.monitor.raw("blockdev-del", json!({"node-name": self.node})).await.map_err(qemu_failed)?;
        if let Some(set) = self.set {
            set.take_back(self.monitor).await?;
        }
        if let Some(path) = self.path {
            let _ = std::fs::remove_file(path);
        }
        Ok(self.file)
    }
}

/// Reads a bitmap of a helper node.
pub async fn read(
    monitor: &Monitor,
    dir: &Path,
    helper: &str,
    bitmap: &str,
    size_bytes: u64,
) -> Result<Bitmap, Failure> {
    let content = qcow2::empty(size_bytes).map_err(internal)?;
    let shuttle = Shuttle::add(monitor, dir, helper, &content).await?;
    let add = json!({
        "node": shuttle.node, "name": BITMAP, "granularity": GRANULE_BYTES, "persistent": true, "disabled": true,
    });
    monitor.raw("block-dirty-bitmap-add", add).await.map_err(qemu_failed)?;
    merge(monitor, (&shuttle.node, BITMAP), &[(helper, bitmap)]).await.map_err(qemu_failed)?;
    let file = shuttle.land().await?;
    let read = qcow2::read(&file, BITMAP, size_bytes).map_err(internal);
    // QEMU 7.2 keeps a passed descriptor while the guest does not run; its memory need not be kept.
    let _ = file.set_len(0);
    read
}

/// Sets the bits of `bits` in a bitmap of a helper node.
pub async fn set_bits(monitor: &Monitor, dir: &Path, helper: &str, bitmap: &str, bits: &Bitmap) -> Result<(), Failure> {
    let content = qcow2::with_bitmap(BITMAP, bits).map_err(internal)?;
    let shuttle = Shuttle::add(monitor, dir, helper, &content).await?;
    merge(monitor, (helper, bitmap), &[(&shuttle.node, BITMAP)]).await.map_err(qemu_failed)?;
    let _ = shuttle.land().await?.set_len(0);
    Ok(())
}

fn memory_file() -> std::io::Result<File> {
    Ok(memfd_create(c"livebackup-bitmap", MFdFlags::MFD_CLOEXEC)?.into())
}
