//! What can go wrong in a measurement inside of a guest.

use super::super::error::OverheadError;
use crate::agent::AgentError;
use crate::vm::{AgentAbsence, AttachError};
use crate::wire::message::Failure;

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// livebackup's own service has the machine.
    #[error(
        "VM {vm:?} is served by a livebackup at {address}, which keeps its monitor: stop that service, or take the VM out of its \
         configuration, for the time of the measurement"
    )]
    Served {
        /// Where.
        address: String,
        /// What it is called there.
        vm: String,
    },
    /// QEMU, or what keeps us from it.
    #[error(transparent)]
    Machine(Failure),
    /// There is no agent to talk to.
    #[error(
        "{0}; fio is run in the guest through its agent: install and start it there (Debian: apt install qemu-guest-agent), and see \
         what `livebackup doctor` says of it"
    )]
    NoAgent(AgentAbsence),
    /// Another has it.
    #[error(
        "{0}; fio is run in the guest through that: have the other program let it go for the time of the measurement (libvirt keeps \
         the channels of its domains)"
    )]
    AgentTaken(AgentAbsence),
    /// The agent must not run programs.
    #[error(
        "the guest's agent refuses {0}: allow guest-exec and guest-exec-status in the guest (allow-rpcs and block-rpcs in \
         /etc/qemu/qemu-ga.conf, in older versions `blacklist`; in /etc/sysconfig/qemu-ga on Red Hat's systems), and start the agent \
         again"
    )]
    Blocked(String),
    /// The guest runs something else than a Linux.
    #[error(
        "the guest runs {0}: only guests with Linux can be measured so; `livebackup bench write-overhead` needs none"
    )]
    NotLinux(String),
    /// There is no fio.
    #[error(
        "{program} cannot be run in the guest: {why}; install fio there (Debian, Ubuntu: apt install fio; Fedora, Red Hat: dnf install \
         fio), or say where it is with --fio PATH"
    )]
    NoFio {
        /// What was tried.
        program: String,
        /// What the agent said.
        why: String,
    },
    /// Its fio cannot do what is needed.
    #[error("{program} in the guest says that it is {version:?}; fio 3.0 or later is needed")]
    OldFio {
        /// What was asked.
        program: String,
        /// Its answer.
        version: String,
    },
    /// Something else that a guest with Linux has.
    #[error("the guest cannot run {program}: {why}")]
    NoProgram {
        /// What was tried.
        program: &'static str,
        /// What the agent said.
        why: String,
    },
    /// The file cannot be made.
    #[error("cannot make the file {file} in the guest: {why}; name another with --file")]
    File {
        /// Which.
        file: String,
        /// Why not.
        why: String,
    },
    /// There is too little space in the guest.
    #[error(
        "the guest's file system of {file} has {free} free and the measurement needs {needed}; name another file with --file, or give \
         a smaller --size"
    )]
    NoSpace {
        /// For which file.
        file: String,
        /// Bytes, for people.
        free: String,
        /// Bytes, for people.
        needed: String,
    },
    /// The guest's disk is slower than it may be.
    #[error("filling {file} in the guest takes longer than {seconds} s; give a smaller --size")]
    Slow {
        /// Which.
        file: String,
        /// The limit.
        seconds: u64,
    },
    /// fio failed.
    #[error("fio failed in the guest: {0}")]
    Fio(String),
    /// fio has not ended in time.
    #[error("{what} has not ended in the guest within {seconds} s; the guest, its disk or its agent hangs")]
    Hangs {
        /// What.
        what: String,
        /// The limit.
        seconds: u64,
    },
    /// The guest stands still.
    #[error(
        "the guest does not run (QEMU says: {0}); let it go on (`cont` in the monitor, `virsh resume`), and try again"
    )]
    NotRunning(String),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// livebackup's session failed.
    #[error(transparent)]
    Session(#[from] Failure),
    /// Anything that can go wrong without a guest, too.
    #[error(transparent)]
    Overhead(#[from] OverheadError),
    /// The user stopped it.
    #[error("interrupted; fio has ended in the guest, its file is removed, and nothing of the measurement is in QEMU")]
    Interrupted,
    /// An error, and not all could be taken back.
    #[error("{error}. LEFT BEHIND: {left}")]
    Left {
        /// What went wrong first.
        #[source]
        error: Box<GuestError>,
        /// What is left.
        left: String,
    },
}

impl GuestError {
    /// Whether only the method failed, and the others can go on.
    pub fn is_of_method(&self) -> bool {
        matches!(self, Self::Session(_) | Self::Overhead(OverheadError::Session(_)))
    }
}

impl From<AttachError> for GuestError {
    fn from(error: AttachError) -> Self {
        match error {
            AttachError::Served { address, vm } => Self::Served { address: address.to_string(), vm },
            AttachError::Failure(failure) => Self::Machine(failure),
        }
    }
}
