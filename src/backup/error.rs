//! Why a backup failed.

use crate::backup::plan::{LevelChoice, NotPossible};
use crate::repo::RepoError;
use crate::wire::message::Failure;

/// Why there is no new restore point.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The repository's side.
    #[error(transparent)]
    Repository(#[from] RepoError),
    /// The sidecar's side.
    #[error(transparent)]
    Sidecar(#[from] Failure),
    /// The level needs an earlier point.
    #[error("no {level} backup of {vm:?} is possible: {reason}; `--level auto` takes what is possible")]
    NotPossible {
        /// Which VM.
        vm: String,
        /// What was asked for.
        level: LevelChoice,
        /// What is missing.
        reason: NotPossible,
    },
    /// What a disk goes on from is damaged in the repository.
    #[error(
        "disk {disk:?} cannot go on from its last restore point, which is damaged: {source}; no restore point was made: \
         `--level auto` compares the disk with what is left"
    )]
    BaseLost {
        /// Which disk.
        disk: String,
        /// What cannot be read.
        source: RepoError,
    },
    /// The session's events ended before its end.
    #[error(
        "the sidecar ended the session without saying how; no restore point was made: look at its log, then run the \
         backup again"
    )]
    Unfinished,
    /// The sidecar said something that cannot be.
    #[error("the sidecar contradicts itself: {0}; no restore point was made. This is a bug: please report it")]
    Contradiction(String),
    /// The user stopped it.
    #[error("interrupted: no restore point was made, and the guest has been let go")]
    Interrupted,
    /// A thread of ours panicked.
    #[error("a thread of the backup panicked; no restore point was made. This is a bug: please report it")]
    Panicked,
}
