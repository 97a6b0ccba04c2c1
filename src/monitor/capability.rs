//! What this QEMU can really do.
//!
//! Builds may leave out block drivers and their schema shows them all the same, so each ability is tried on small nodes
//! that belong to nobody. What cannot be tried without data of a guest follows from the version: the fault of snapshot
//! reads that cross a cluster was fixed in 8.0 (hbitmap, a4d5224c2cb6), and an NBD client that goes away aborted
//! versions before 10 when the node was in an iothread. A distribution may have brought a fix to an older version; then
//! we are slower than needed and never wrong.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Monitor, MonitorError, Version, trial};
use crate::limits::MAX_READ_BYTES;
use crate::units::GRANULE_BYTES;

/// What this QEMU can really do: found by [`probe`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capabilities {
    /// QEMU's version.
    pub version: Version,
    /// `copy-before-write` with `on-cbw-error`, `cbw-timeout` and `bitmap`. Without it there is no live backup.
    pub copy_before_write: bool,
    /// `min-cluster-size` of `copy-before-write`.
    pub min_cluster_size: bool,
    /// `snapshot-access`. Without it there is no live backup.
    pub snapshot_access: bool,
    /// Bitmaps can be merged from one node into another's. Without it there are no incremental backups.
    pub bitmap_merge: bool,
    /// vhost-user-blk exports: the fast way to read.
    pub vhost_user_blk: bool,
    /// NBD exports: the way to read bitmaps, and the slow way to read data.
    pub nbd_export: bool,
    /// An NBD server of somebody else runs. QEMU has one, and does not tell its address.
    pub nbd_server_running: bool,
    /// Sockets can be passed (`getfd`).
    pub sockets_by_descriptor: bool,
    /// A scratch file can be passed (`add-fd`). Not tried but assumed below 10 while the guest does not run: QEMU would
    /// keep the descriptor.
    pub files_by_descriptor: bool,
    /// Latency histograms of guest devices.
    pub latency_histogram: bool,
    /// No read of a snapshot may cross a multiple of this: older versions then give wrong data without an error.
    pub snapshot_boundary_bytes: u64,
    /// Whether block status of a snapshot is right.
    pub trust_block_status: bool,
    /// Whether an NBD export of a node in an iothread survives its client's end. If not, QEMU aborts.
    pub nbd_safe_in_iothread: bool,
    /// Whether a discard of the snapshot that is not aligned to the cluster aborts QEMU.
    pub discard_unaligned_aborts: bool,
    /// What QEMU refused, and its words. Not stored.
    #[serde(skip)]
    pub refusals: Vec<(&'static str, String)>,
}

/// Tries what QEMU can do, on nodes whose names start with `prefix` (at most 26 bytes, so that QEMU's limit of 31 is
/// kept). Takes about 25 commands, 15 to 40 ms, in which QEMU's only NBD server is ours unless another runs already.
///
/// Leaves nothing behind. A caller that goes away does not stop it: it runs on to its end by itself. Only when QEMU's
/// monitor dies or hangs meanwhile may something stay, with a name that starts with `prefix`.
///
/// # Errors
///
/// Only what ends the monitor, or time limits: a refusal is an answer.
pub async fn probe(monitor: &Monitor, prefix: &str) -> Result<Capabilities, MonitorError> {
    let (task_monitor, prefix) = (monitor.clone(), prefix.to_owned());
    let task = tokio::spawn(async move { trial::run(&task_monitor, &prefix).await });
    match task.await {
        Ok(result) => result,
        Err(_) => Err(MonitorError::Closed {
            address: monitor.address().clone(),
            reason: "the task that tried what QEMU can do was stopped".into(),
        }),
    }
}

impl Capabilities {
    /// What the version alone says; nothing tried yet.
    pub(super) fn of_version(version: Version) -> Self {
        let fixed = version.at_least(8, 0);
        let ten = version.at_least(10, 0);
        Self {
            version,
            copy_before_write: false,
            min_cluster_size: false,
            snapshot_access: false,
            bitmap_merge: false,
            vhost_user_blk: false,
            nbd_export: false,
            nbd_server_running: false,
            sockets_by_descriptor: false,
            files_by_descriptor: false,
            latency_histogram: false,
            snapshot_boundary_bytes: if fixed { MAX_READ_BYTES } else { GRANULE_BYTES },
            trust_block_status: fixed,
            nbd_safe_in_iothread: ten,
            // Seen on 7.2, not on 10.0; the versions between were not tried.
            discard_unaligned_aborts: !ten,
            refusals: vec![],
        }
    }

    /// The table for people: name, value, and what it means for a backup, with QEMU's words where it refused.
    pub fn rows(&self) -> Vec<(&'static str, String, String)> {
        let yes = |value: bool| if value { "yes" } else { "no" }.to_owned();
        let pick = |value: bool, good: &'static str, bad: &'static str| if value { good } else { bad };
        let mut rows = vec![("QEMU", self.version.to_string(), self.version.package.clone())];
        let mut row = |name, value: String, meaning: &str| {
            let said = self.refusals.iter().find(|(what, _)| *what == name);
            let said = said.map(|(_, words)| format!(" (QEMU: {words})")).unwrap_or_default();
            rows.push((name, value, format!("{meaning}{said}")));
        };
        row(
            "copy-before-write",
            yes(self.copy_before_write),
            pick(
                self.copy_before_write,
                "a point in time can be kept, and gives way to the guest",
                "no live backup with this build of QEMU",
            ),
        );
        row(
            "snapshot-access",
            yes(self.snapshot_access),
            pick(self.snapshot_access, "the point in time can be read", "no live backup with this build of QEMU"),
        );
        row(
            "bitmap merge",
            yes(self.bitmap_merge),
            pick(self.bitmap_merge, "incremental backups", "every backup reads the whole disk"),
        );
        row(
            "vhost-user-blk",
            yes(self.vhost_user_blk),
            pick(
                self.vhost_user_blk,
                "data is read through shared memory",
                "data is read over NBD: several times slower",
            ),
        );
        row(
            "NBD export",
            yes(self.nbd_export),
            pick(self.nbd_export, "bitmaps can be read", "bitmaps are read by way of a file"),
        );
        row(
            "NBD server",
            pick(self.nbd_server_running, "another's", "free").to_owned(),
            pick(
                self.nbd_server_running,
                "NBD server already running: bitmaps are read by way of a file",
                "QEMU has one, and it is free",
            ),
        );
        row(
            "sockets by descriptor",
            yes(self.sockets_by_descriptor),
            pick(self.sockets_by_descriptor, "no socket file, no access rule needed", "QEMU makes sockets at paths"),
        );
        row(
            "files by descriptor",
            yes(self.files_by_descriptor),
            pick(
                self.files_by_descriptor,
                "scratch has no name and vanishes by itself",
                "QEMU opens scratch by its path",
            ),
        );
        row(
            "min-cluster-size",
            yes(self.min_cluster_size),
            pick(self.min_cluster_size, "accepted", "unknown: clusters of 64 KiB, which is what we use anyway"),
        );
        row(
            "latency histogram",
            yes(self.latency_histogram),
            pick(self.latency_histogram, "the guest's latency is watched", "the guest's latency is not watched"),
        );
        row(
            "longest snapshot read",
            crate::units::human_bytes(self.snapshot_boundary_bytes),
            pick(self.trust_block_status, "by version", "by version: longer reads could return newer data"),
        );
        row(
            "block status of snapshots",
            pick(self.trust_block_status, "right", "wrong").to_owned(),
            pick(self.trust_block_status, "by version", "by version: holes are found by reading"),
        );
        row(
            "NBD in an iothread",
            pick(self.nbd_safe_in_iothread, "safe", "unsafe").to_owned(),
            pick(
                self.nbd_safe_in_iothread,
                "by version",
                "by version: a client that goes away could abort QEMU, so no disk in an iothread is exported over NBD",
            ),
        );
        row(
            "unaligned discards",
            pick(self.discard_unaligned_aborts, "unsafe", "safe").to_owned(),
            pick(self.discard_unaligned_aborts, "by version: never sent", "by version; never sent all the same"),
        );
        rows
    }

    /// Whether nothing was refused but what only newer versions have, and no backup misses.
    pub fn is_complete(&self) -> bool {
        self.refusals.iter().all(|(what, _)| *what == "min-cluster-size")
    }

    /// Whether a live backup is possible at all.
    pub fn can_back_up(&self) -> bool {
        self.copy_before_write && self.snapshot_access && (self.vhost_user_blk || self.nbd_export)
    }
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rows().iter().try_for_each(|(name, value, meaning)| writeln!(f, "{name:26} {value:10} {meaning}"))
    }
}
