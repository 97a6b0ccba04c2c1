//! Control messages: what a client asks a sidecar, and what it answers. Payloads are JSON; a field that is not known is
//! ignored, a missing optional one has its default, so that both ends may grow.
//!
//! The same types are spoken inside one process, where no frame is made.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::boot_file;
use super::digests::{ChunkDigest, Digests};
use super::packing::Wanted;
use super::resume::{Lasting, Resume, Token};
use crate::area::Areas;
use crate::codec::Packed;
use crate::extent::Extent;
use crate::grade::{Evidence, Policy};
use crate::impact::{Budget, DiskImpact};
use crate::machine::{Disk, FoundDisk, Machine, Taken};
use crate::units::{CheckpointId, EpochId};

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Which VMs are there?
    List,
    /// What was found in a VM?
    Disks {
        /// Which VM.
        vm: String,
    },
    /// State of one VM or all.
    Status {
        /// Which VM; all when absent.
        vm: Option<String>,
    },
    /// What stands in the way of a good backup? Changes nothing.
    Doctor {
        /// Which VM.
        vm: String,
    },
    /// What would this backup read? Changes nothing in the guest and takes no checkpoint.
    Estimate(Begin),
    /// Open a fleece and send the needed set.
    Begin(Begin),
    /// These bytes are durable at the client: the sidecar may discard them.
    Ack(Ack),
    /// Go on with a session whose connection was lost.
    Resume(Resume),
    /// All that was sent has arrived: the fleece may be closed. Only in a session that can be resumed, after `Sent`.
    Received,
    /// This connection is one more for the session of a [`trunk`](super::trunk). Nothing else is said on it.
    Join {
        /// From [`Reply::Joinable`].
        token: Token,
    },
    /// A session that could be resumed is given up, in it or over another connection.
    Leave {
        /// Its VM.
        vm: String,
        /// What was chosen for it.
        token: Token,
    },
    /// A piece of a [boot file](boot_file).
    BootFile(boot_file::Wanted),
    /// Remove all that the sidecar put into a VM and end its epochs.
    Detach {
        /// Which VM.
        vm: String,
        /// Also what sidecars with other state directories have left.
        #[serde(default)]
        all: bool,
    },
}

/// What the backup is to hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Begin {
    /// Which VM.
    pub vm: String,
    /// Only these disks (all protectable ones when empty).
    #[serde(default)]
    pub include: Vec<String>,
    /// Not these disks.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Per disk the checkpoint that the client has; a disk that is not named is sent whole.
    #[serde(default)]
    pub since: BTreeMap<String, CheckpointId>,
    /// Why a disk that is not in `since` is sent whole, in the client's words, for the report.
    #[serde(default)]
    pub full_reason: Option<String>,
    /// Chunk size of the client's repository: the needed set is rounded out to it. A power of two in
    /// `MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES`.
    pub chunk_bytes: u32,
    /// Whether to take a checkpoint (no for the level `copy`).
    pub checkpoint: bool,
    /// Refuse before the instant if any disk would have to be sent whole.
    #[serde(default)]
    pub incremental_only: bool,
    /// Wait for one's turn where another backup runs; else the answer is [`FailureCode::Busy`].
    #[serde(default)]
    pub wait: bool,
    /// Whether the guest's file systems are frozen around the instant; as the sidecar is configured when absent.
    #[serde(default)]
    pub freeze: Option<Policy>,
    /// What the backup may cost the guest; the sidecar's own limits hold, too.
    #[serde(default, skip_serializing_if = "Budget::is_unlimited")]
    pub budget: Budget,
    /// Disks of which the client can give the digests of an earlier point, of the same size and chunk size: where such a
    /// disk would be sent whole, it is scanned. A sidecar that does not know this field sends it whole.
    #[serde(default)]
    pub digests: BTreeSet<String>,
    /// Chunks to be confirmed by the way, of disks that are sent since a checkpoint.
    #[serde(default)]
    pub audit: Option<Audit>,
    /// Chosen by a client that wants to [resume](super::resume) the session should its connection be lost. A sidecar that can
    /// do that says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<Token>,
    /// By disk what was left out of the point that it is sent since; disks of which all is there need not be named. Absent when
    /// the client knows nothing of areas that are left out: then none are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub areas: Option<BTreeMap<String, KnownAreas>>,
    /// The client takes packed frames. Absent of one that does not know them, or wants none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<Wanted>,
    /// Over how many connections the client would take the session, if it knows [`trunk`](super::trunk)s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<u32>,
}

/// What a client lacks of a disk, and where that was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownAreas {
    /// The bytes that the client has as zeroes: they are needed, unless they are left out again.
    pub left_out: Vec<Extent>,
    /// Where to look for areas to be left out: [`Areas::seen`] of that point.
    #[serde(default)]
    pub seen: Vec<Extent>,
}

/// What a client would like to have confirmed: that chunks that nobody is said to have written are still as it knows them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audit {
    /// Of a disk not more chunks than so many thousandths of those that it needs anyway, but
    /// [`AUDIT_FLOOR_CHUNKS`](super::contract::AUDIT_FLOOR_CHUNKS) at least.
    pub permille: u32,
    /// By disk the chunks, in the order in which they are wanted; not more than
    /// [`MAX_AUDIT_CHUNKS`](super::contract::MAX_AUDIT_CHUNKS) in all.
    pub disks: BTreeMap<String, Vec<AuditChunk>>,
}

/// A chunk to be confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditChunk {
    /// Its number.
    pub chunk: u64,
    /// What it should be.
    pub digest: ChunkDigest,
}

/// What the client says is durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// Index of the disk in [`Begun::disks`].
    pub disk: u16,
    /// Which bytes.
    pub extents: Vec<Extent>,
}

/// What a sidecar answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// To [`Request::List`].
    List {
        /// The VMs.
        vms: Vec<VmEntry>,
    },
    /// To [`Request::Disks`].
    Disks {
        /// The VM's definition.
        machine: Machine,
        /// All guest block devices.
        disks: Vec<FoundDisk>,
    },
    /// To [`Request::Status`].
    Status {
        /// One entry a VM.
        vms: Vec<VmStatus>,
    },
    /// To [`Request::Doctor`].
    Doctor {
        /// What was looked at.
        checks: Vec<Check>,
    },
    /// To [`Request::Estimate`].
    Estimate {
        /// One entry a disk.
        disks: Vec<Estimated>,
    },
    /// To [`Request::Begin`] with [`Begin::wait`], before the answer itself: it is not this client's turn yet.
    Waiting(Waiting),
    /// To [`Request::Begin`] with [`Begin::resume`] and to [`Request::Resume`], before the answer itself: the session is held
    /// when its connection is lost.
    Resumable {
        /// For so many milliseconds.
        grace_ms: u64,
        /// Acknowledgements of the session that were heard so far. Absent where nobody counts them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        acks: Option<u64>,
    },
    /// To [`Request::Begin`] with [`Begin::connections`] and to its [`Request::Resume`], before the answer itself: what comes now
    /// comes in parts, and further connections may join.
    Joinable {
        /// What they are to show.
        token: Token,
        /// How many.
        more: u32,
    },
    /// To [`Request::Join`]: parts follow.
    Joined,
    /// To [`Request::Begin`]: the instant is behind us; data follows. To [`Request::Resume`]: the same as the first time.
    Begun(Box<Begun>),
    /// All data of the needed set has been sent; the fleece is being closed.
    Sent,
    /// The session is over; the fleece is closed.
    End(Totals),
    /// To [`Request::Leave`] outside of the session.
    Left,
    /// To [`Request::BootFile`].
    BootFile(boot_file::Piece),
    /// To [`Request::Detach`].
    Detached {
        /// What was removed, in words.
        removed: Vec<String>,
        /// What sidecars with other state directories have left and is still there, in words.
        #[serde(default)]
        left: Vec<String>,
    },
    /// The request or session failed.
    Failed(Failure),
}

/// What a session waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// In words.
    pub why: String,
    /// Since when that runs.
    pub since: Option<Timestamp>,
    /// Others that wait for the same VM and came before.
    pub ahead: u32,
}

/// Somebody in the queue of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queued {
    /// The client.
    pub client: String,
    /// Since when it waits, or runs.
    pub since: Timestamp,
}

/// How the last session of a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastSession {
    /// When.
    pub ended: Timestamp,
    /// How long it was open, in milliseconds.
    pub took_ms: u64,
    /// Bytes sent (zeroes count).
    pub sent_bytes: u64,
    /// Why it failed, if it did.
    pub failure: Option<String>,
}

/// One VM in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmEntry {
    /// Its name.
    pub vm: String,
    /// QEMU's run state, or why it cannot be reached.
    pub state: String,
}

/// State of one VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Its name.
    pub vm: String,
    /// QEMU's run state, or why it cannot be reached.
    pub state: String,
    /// QEMU's version, when it could be reached.
    pub qemu_version: Option<String>,
    /// The running session, if any.
    pub session: Option<SessionStatus>,
    /// Per disk the state of tracking.
    pub disks: Vec<TrackingStatus>,
    /// Who waits for a session, the first first.
    #[serde(default)]
    pub queue: Vec<Queued>,
    /// The last session since the sidecar was started.
    #[serde(default)]
    pub last: Option<LastSession>,
    /// What somebody has to look at now, in sentences.
    #[serde(default)]
    pub alarms: Vec<String>,
}

/// A running session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// When its instant was.
    pub instant: Timestamp,
    /// Bytes of the needed sets.
    pub needed_bytes: u64,
    /// Bytes sent so far (zeroes count).
    pub sent_bytes: u64,
    /// Scratch in use.
    pub scratch_bytes: u64,
    /// What it has cost the guest so far, by disk.
    #[serde(default)]
    pub impact: Vec<DiskImpact>,
    /// Milliseconds since the instant.
    #[serde(default)]
    pub running_ms: u64,
    /// Whose session it is, where there is a queue.
    #[serde(default)]
    pub client: Option<String>,
    /// Since when its client's connection is lost, if it is: the session is held for it to come back.
    #[serde(default)]
    pub lost: Option<Timestamp>,
    /// Over how many connections its data goes, where there are several.
    #[serde(default)]
    pub connections: Option<u32>,
}

/// Tracking of one disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrackingStatus {
    /// The disk.
    pub disk: String,
    /// Its epoch, if it is tracked.
    pub epoch: Option<EpochId>,
    /// Number of the last checkpoint.
    pub checkpoint_number: Option<u64>,
    /// When that was.
    pub checkpoint_time: Option<Timestamp>,
    /// Bytes written since then, in granules.
    pub dirty_bytes: Option<u64>,
    /// Why the last epoch ended, if one did.
    pub last_end: Option<String>,
}

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckVerdict {
    /// As it should be.
    Good,
    /// It works, with a drawback.
    Warn,
    /// Backups fail.
    Bad,
}

/// One check of a doctor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it came out.
    pub verdict: CheckVerdict,
    /// What was seen, and what to do.
    pub words: String,
}

impl Check {
    /// A check with its outcome.
    pub fn new(name: &str, verdict: CheckVerdict, words: impl Into<String>) -> Self {
        Self { name: name.to_owned(), verdict, words: words.into() }
    }
}

/// What a backup would read of one disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimated {
    /// The disk.
    pub disk: String,
    /// Size of the disk.
    pub size_bytes: u64,
    /// Whole or since a checkpoint.
    pub taken: Taken,
    /// Bytes that would be read.
    pub needed_bytes: u64,
}

/// The instant is behind us.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Begun {
    /// The VM's definition.
    pub machine: Machine,
    /// The instant.
    pub instant: Timestamp,
    /// The disks, in the order of their indices.
    pub disks: Vec<BegunDisk>,
    /// Devices that were left out, with the reason.
    pub left_out: Vec<FoundDisk>,
    /// How long the guest was stopped for the instant, in microseconds (0 when it was not).
    pub stopped_us: u64,
    /// What the guest's state at the instant rests on.
    #[serde(default)]
    pub evidence: Box<Evidence>,
}

/// One disk of a session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BegunDisk {
    /// The disk.
    pub disk: Disk,
    /// The checkpoint that was taken at the instant.
    pub checkpoint: Option<CheckpointId>,
    /// Its epoch.
    pub epoch: Option<EpochId>,
    /// Whole or since a checkpoint.
    pub taken: Taken,
    /// Bytes of the needed set; of a scan, all of the disk.
    pub needed_bytes: u64,
    /// Of the chunks to be confirmed the first so many were taken up: those that turn out to be written are sent, the rest
    /// is compared.
    #[serde(default)]
    pub audited_chunks: u64,
    /// What is left out: it is sent as zeroes where the client has something else there. Absent when the sidecar did not
    /// look at [`Begin::areas`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub areas: Option<Areas>,
}

/// What a session did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Bytes sent as data.
    pub data_bytes: u64,
    /// Bytes sent as zeroes.
    pub zero_bytes: u64,
    /// Bytes that were read and are as the client knows them.
    #[serde(default)]
    pub same_bytes: u64,
    /// Most scratch that was in use at once.
    pub scratch_peak_bytes: u64,
    /// From the request to the instant, in microseconds.
    pub prepare_us: u64,
    /// From the instant to the last byte sent, in microseconds.
    pub transfer_us: u64,
    /// What it cost the guest, by disk.
    #[serde(default)]
    pub impact: Vec<DiskImpact>,
    /// What did not go as it should but harmed nothing, in words.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// Kinds of failure that a program may tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureCode {
    /// No VM of that name.
    UnknownVm,
    /// No disk of that name.
    UnknownDisk,
    /// A disk cannot be protected and was not excluded, or there is none.
    NotProtectable,
    /// Another session or sidecar has the VM.
    Busy,
    /// An incremental was demanded and cannot be had.
    NotIncremental,
    /// QEMU cannot be reached, is too old, or lacks what is needed.
    Qemu,
    /// The fleece broke: no more data of this instant can be had. The guest is well.
    Broken,
    /// A chunk that nobody is said to have written is not as the client knows it: tracking missed a write. The disk's
    /// epoch has ended.
    AuditMismatch,
    /// Not enough space for scratch or state.
    NoSpace,
    /// The peer broke the protocol, or its version is not ours.
    Protocol,
    /// Who asks is not known, or was not granted this.
    Denied,
    /// The connection ended.
    Disconnected,
    /// A session that was to be resumed is over, or never was; or a disk was resized while it was opened. Another may be
    /// begun at once.
    SessionGone,
    /// The guest could not be made quiet, and that was required.
    NotQuiet,
    /// The guest's writes suffered more than the budget allows, and the fleece was let go.
    GaveWay,
    /// A hook of the operator refused.
    Refused,
    /// The session was interrupted by this side's user.
    Interrupted,
    /// Anything else.
    Internal,
    /// A code of a later version.
    #[serde(other)]
    Other,
}

/// A failure, in words that say what happened, to what, and what to do next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The kind.
    pub code: FailureCode,
    /// The words.
    pub message: String,
    /// Which disk, where a program must know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
}

impl Failure {
    /// A failure of this kind.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), disk: None }
    }
}

/// What arrives after [`Begun`].
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Bytes of a disk at the instant. Never longer than `MAX_READ_BYTES`; aligned to the session's chunk size but for
    /// the disk's end; extents of one disk ascend and do not overlap.
    Data {
        /// Index of the disk.
        disk: u16,
        /// Where.
        offset_bytes: u64,
        /// The bytes. May be lent shared memory: dropping it lets the reader go on.
        bytes: Bytes,
    },
    /// The same, compressed chunk by chunk; only where the client said that it takes that, and never from a sidecar in this
    /// process. The pieces are those of the extent's chunks; what is in them nobody has looked at.
    Packed {
        /// Index of the disk.
        disk: u16,
        /// Where.
        offset_bytes: u64,
        /// The bytes.
        packed: Packed,
    },
    /// These bytes of a disk are zero. Aligned as data is; of any length.
    Zero {
        /// Index of the disk.
        disk: u16,
        /// Which bytes.
        extent: Extent,
    },
    /// These bytes of a disk are as the client knows them: by the digests that it gives for a scan, or by those of an audit.
    /// Aligned as data is; of any length.
    Same {
        /// Index of the disk.
        disk: u16,
        /// Which bytes.
        extent: Extent,
    },
    /// All was sent; the fleece is being closed.
    Sent,
    /// The fleece is closed. The last event.
    End(Totals),
}

/// An open session, in this process or over a connection.
#[derive(Debug)]
pub struct Session {
    /// What was begun.
    pub begun: Begun,
    /// The events; a failure is the last one. Closed early only if the sidecar's side is gone.
    pub events: mpsc::Receiver<Result<Event, Failure>>,
    /// Acknowledgements. Dropping the session ends it: the sidecar closes the fleece.
    pub acks: mpsc::UnboundedSender<Ack>,
    /// Where digests go, if a disk is scanned, in the order that [`digests`](super::digests) asks for. When it is dropped
    /// early, what is left is sent whatever it holds.
    pub digests: Option<mpsc::Sender<Digests>>,
    /// What outlives a lost connection, if anything does.
    pub lasting: Option<Lasting>,
}
