//! What can go wrong in a measurement.

use std::io;
use std::path::PathBuf;

use crate::monitor::MonitorError;
use crate::nbd::NegotiateError;
use crate::vm::AttachError;
use crate::wire::message::Failure;

/// Why the guest's part cannot be played.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// QEMU has closed the connection.
    #[error("QEMU ended in the middle of the measurement")]
    Gone,
    /// An answer that is none.
    #[error("QEMU's qtest answered {0:?}")]
    Answer(String),
    /// The device is not what it should be.
    #[error("the virtio-blk device cannot be used: {0}")]
    Device(&'static str),
    /// A request has had no answer for long.
    #[error("the disk did not answer for {0} s")]
    Hangs(u64),
    /// A read gave something else than what was written.
    #[error("the disk gave back at byte {0} what was never written there")]
    Wrong(u64),
    /// The connection failed.
    #[error("the connection to QEMU's qtest failed: {0}")]
    Io(#[from] io::Error),
}

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
pub enum OverheadError {
    /// A file or directory.
    #[error("{what} {}: {source}", path.display())]
    Path {
        /// What was tried.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// There is too little space.
    #[error(
        "{} has {free} free and the measurement needs about {needed}; give another directory with --dir, or a smaller --size",
        dir.display()
    )]
    NoSpace {
        /// Where.
        dir: PathBuf,
        /// Bytes, for people.
        free: String,
        /// Bytes, for people.
        needed: String,
    },
    /// A socket's path would be too long.
    #[error("{} is too long for a socket's path; give a shorter directory with --dir", .0.display())]
    TooLong(PathBuf),
    /// A program is missing or did not do what it should.
    #[error("{program} {why}; name QEMU with --qemu PATH (Debian: apt install qemu-system-x86 qemu-utils)")]
    Program {
        /// Its path.
        program: String,
        /// What is wrong.
        why: String,
    },
    /// Another program did not do what it should.
    #[error("{program} {why}")]
    Tool {
        /// With its arguments.
        program: String,
        /// What is wrong.
        why: String,
    },
    /// The guest's part.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// QEMU refused.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// livebackup could not attach.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// livebackup's session failed.
    #[error(transparent)]
    Session(#[from] Failure),
    /// The export could not be read.
    #[error("QEMU's NBD export: {0}")]
    Nbd(#[from] NegotiateError),
    /// Something took too long.
    #[error("{0}")]
    Late(String),
    /// The disk does not hold what the guest wrote. Must never be.
    #[error(
        "after {after}, block {block} (4 KiB) of the disk is not what the guest wrote last: this is a fault of QEMU's or of livebackup's; please report it"
    )]
    NotWhatWasWritten {
        /// Which round.
        after: String,
        /// The first wrong block.
        block: u64,
    },
    /// The user stopped it.
    #[error("interrupted; the machines that were measured are ended, and their files removed")]
    Interrupted,
    /// A task panicked.
    #[error("a part of the measurement ended unexpectedly; the log says why")]
    Panicked,
}

/// An error of a path.
pub(super) fn path(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> OverheadError {
    let path = path.into();
    move |source| OverheadError::Path { what, path, source }
}
