//! What a backup tells: how far it is, and what it did.

use jiff::Timestamp;
use serde::Serialize;

use crate::area::Areas;
use crate::impact::Impact;
use crate::machine::Taken;
use crate::repo::point::{Evidence, Grade, Level};
use crate::units::PointId;

/// What a backup is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Bytes arrive.
    Transfer,
    /// All have arrived; the rest is being made durable.
    Store,
}

/// How far a backup is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// What it is doing.
    pub phase: Phase,
    /// Bytes to be received, zeroes included.
    pub needed_bytes: u64,
    /// Bytes received.
    pub received_bytes: u64,
}

/// How long things took, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Durations {
    /// From the start to the answer after the instant.
    pub prepare_s: f64,
    /// The guest stood still.
    pub stopped_s: f64,
    /// From that answer to the last byte received.
    pub transfer_s: f64,
    /// From the last byte received until all was durable and the fleece closed.
    pub store_s: f64,
    /// Everything.
    pub total_s: f64,
}

/// What was done for one disk.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DiskReport {
    /// The disk.
    pub disk: String,
    /// Its size.
    pub size_bytes: u64,
    /// Whole and why, scanned and why, or since which checkpoint.
    #[serde(flatten)]
    pub taken: Taken,
    /// Bytes read from the VM, zeroes included.
    pub read_bytes: u64,
    /// Of those, bytes that were not sent: found equal in a scan, or confirmed in an audit.
    pub same_bytes: u64,
    /// Of those, bytes that the repository did not have, before compression.
    pub new_bytes: u64,
    /// Bytes added to the repository's packs.
    pub stored_bytes: u64,
    /// What it cost the guest.
    pub impact: Option<Impact>,
    /// What was left out, as the operator said.
    #[serde(skip_serializing_if = "Areas::is_empty")]
    pub areas: Areas,
}

/// What a backup did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The new restore point.
    pub point: PointId,
    /// The VM.
    pub vm: String,
    /// What really happened, which may differ from what was asked for.
    pub level: Level,
    /// The point that it goes on from.
    pub parent: Option<PointId>,
    /// The instant that the point shows.
    pub instant: Timestamp,
    /// In which state the guest's data is.
    pub grade: Grade,
    /// What that rests on.
    pub evidence: Evidence,
    /// The disks.
    pub disks: Vec<DiskReport>,
    /// Devices that were left out, each with the reason.
    pub left_out: Vec<String>,
    /// Sizes of the disks.
    pub size_bytes: u64,
    /// Bytes read from the VM.
    pub read_bytes: u64,
    /// Data as it came over the connection, compressed or not; none from a sidecar in this process.
    pub wire_bytes: Option<u64>,
    /// Bytes that the repository did not have.
    pub new_bytes: u64,
    /// Bytes added to the repository's packs, tree nodes included.
    pub stored_bytes: u64,
    /// Most scratch that was in use at once.
    pub scratch_peak_bytes: u64,
    /// How long things took.
    pub durations: Durations,
    /// What did not go as it should but harmed nothing.
    pub warnings: Vec<String>,
}
