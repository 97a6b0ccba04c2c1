//! What can go wrong at a monitor.

use std::io;
use std::time::Duration;

use super::{Address, Version};

/// What went wrong at a monitor, to what, and what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MonitorError {
    /// Nothing listens there.
    #[error(
        "no monitor listens at {address}: {source}. Is QEMU running, with -qmp unix:PATH,server=on,wait=off for that \
         path?"
    )]
    NoSocket {
        /// Where.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
    /// The system does not let us in.
    #[error("not allowed to open the monitor at {address}: {source}. Run as QEMU's user, or as root")]
    Permission {
        /// Where.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
    /// The connection cannot be made for another reason: an unknown host, no route, a path that is too long.
    #[error("cannot reach the monitor at {address}: {source}")]
    Unreachable {
        /// Where.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
    /// Something answers that does not speak QMP.
    #[error(
        "{address} does not speak QMP: {found}. Give the socket of QEMU's -qmp option, not of -monitor or an agent"
    )]
    NotQmp {
        /// Where.
        address: Address,
        /// What it said instead of a greeting.
        found: String,
    },
    /// The connection stands and no greeting comes: QEMU serves one client at a time.
    #[error(
        "the monitor at {address} sent no greeting for {} s: another client has it (QEMU serves one at a time), or \
         QEMU hangs. Give livebackup a monitor of its own: a second option \
         -qmp unix:/run/livebackup-VM.qmp,server=on,wait=off",
        waited.as_secs_f32()
    )]
    Taken {
        /// Where.
        address: Address,
        /// How long we waited.
        waited: Duration,
    },
    /// This QEMU cannot be backed up live.
    #[error("QEMU {version} is too old: {needs} or later is needed, because {reason}. Upgrade QEMU")]
    TooOld {
        /// Its version.
        version: Version,
        /// The first version that will do.
        needs: Version,
        /// What the older one lacks.
        reason: &'static str,
    },
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {desc} ({class})")]
    Command {
        /// The command's name.
        command: String,
        /// QEMU's error class: `GenericError`, `CommandNotFound`, `DeviceNotFound`, …
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// No reply in time. The command may still be executed.
    #[error(
        "QEMU did not answer {command} within {} s; it may still execute it. Its main loop is busy or hangs: look at \
         its storage",
        limit.as_secs_f32()
    )]
    Deadline {
        /// The command's name, or the step of the handshake.
        command: String,
        /// The limit.
        limit: Duration,
    },
    /// The connection is gone: QEMU ended or closed it, or sent what is not QMP.
    #[error("the monitor at {address} is closed: {reason}. Connect again if QEMU still runs")]
    Closed {
        /// Where.
        address: Address,
        /// Why.
        reason: String,
    },
    /// A descriptor cannot be passed.
    #[error("cannot pass a descriptor with {command} to the monitor at {address}: {reason}. Use a unix socket")]
    Descriptor {
        /// The command's name.
        command: String,
        /// Where.
        address: Address,
        /// Why.
        reason: String,
    },
    /// A reply that does not have the form that we expect.
    #[error("QEMU answered {command} in a form that livebackup does not know ({reason}): please report it")]
    Reply {
        /// The command's name.
        command: String,
        /// What does not fit.
        reason: String,
    },
}

impl MonitorError {
    /// QEMU's words if it refused a command: `None` for every other error.
    pub fn refusal(&self) -> Option<&str> {
        match self {
            MonitorError::Command { desc, .. } => Some(desc),
            _ => None,
        }
    }

    /// Whether QEMU does not know the command.
    pub fn is_unknown_command(&self) -> bool {
        matches!(self, MonitorError::Command { class, .. } if class == "CommandNotFound")
    }

    /// Whether the connection is gone, and with it every later call on it.
    pub fn is_closed(&self) -> bool {
        matches!(self, MonitorError::Closed { .. })
    }
}
