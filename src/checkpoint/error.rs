//! What the log says when it cannot go on, or cannot answer.

use std::path::PathBuf;

use jiff::Timestamp;

use super::format::FormatError;
use crate::durable::DurableError;
use crate::units::CheckpointId;

/// Why the log cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file system refused.
    #[error(transparent)]
    Durable(#[from] DurableError),
    /// A checkpoint could not be put into a file.
    #[error("checkpoint {id} {source}")]
    Encode {
        /// Which one.
        id: CheckpointId,
        /// Why.
        source: FormatError,
    },
    /// A checkpoint was to be sealed without an epoch.
    #[error("checkpoint {0} cannot be sealed: no epoch is running; begin one")]
    NoEpoch(CheckpointId),
    /// A checkpoint that does not follow the last one.
    #[error("checkpoint {id} cannot be sealed: it follows {prev:?}, the log's last one is {last}; begin a new epoch")]
    OutOfOrder {
        /// Which one.
        id: CheckpointId,
        /// What it follows.
        prev: Option<CheckpointId>,
        /// The head.
        last: CheckpointId,
    },
    /// The bitmap is not of the epoch's size.
    #[error(
        "a bitmap for {found_bytes} bytes in an epoch of {epoch_bytes} bytes: the disk was resized; begin a new epoch"
    )]
    WrongSize {
        /// The epoch's size.
        epoch_bytes: u64,
        /// The bitmap's.
        found_bytes: u64,
    },
    /// After a failed write of the head nobody knows what is on the disk.
    #[error("the log {} failed to move its head before; open it again to see what was written", .0.display())]
    Poisoned(PathBuf),
}

/// Why "what changed since?" has no answer. The disk must be scanned then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotInLog {
    /// No such checkpoint here.
    #[error("checkpoint {0} is not in this log: it was taken by another sidecar or is too old")]
    Unknown(CheckpointId),
    /// The checkpoint's epoch ended.
    #[error("tracking was interrupted after checkpoint {id} (at {time:.0}): {reason}")]
    OtherEpoch {
        /// The checkpoint.
        id: CheckpointId,
        /// When the end was noticed.
        time: Timestamp,
        /// Why it ended.
        reason: String,
    },
    /// A file that is needed for the answer is missing or damaged.
    #[error("the changes since checkpoint {id} are lost: {} {reason}", file.display())]
    Damaged {
        /// The checkpoint.
        id: CheckpointId,
        /// Which file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}
