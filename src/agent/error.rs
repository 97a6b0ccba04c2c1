//! What can go wrong at an agent.

use std::io;
use std::time::Duration;

use super::Address;

/// What went wrong at an agent, to what, and what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// Nothing listens there.
    #[error("no guest agent channel is at {address}: {source}. Is QEMU running, with a chardev at that path?")]
    NoSocket {
        /// Where.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
    /// The system does not let us in, or the path cannot be used.
    #[error("cannot reach the guest agent at {address}: {source}")]
    Unreachable {
        /// Where.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
    /// The connection stands and the agent does not answer.
    #[error(
        "the guest agent at {address} has not answered for {} s: it does not run in the guest, it hangs, or another \
         program has its channel (which takes one client at a time)",
        waited.as_secs_f32()
    )]
    Silent {
        /// Where.
        address: Address,
        /// How long we waited.
        waited: Duration,
    },
    /// The agent answered before, and not this command.
    #[error("the guest agent has not answered {command} within {} s", limit.as_secs_f32())]
    Late {
        /// The command.
        command: String,
        /// How long we waited.
        limit: Duration,
    },
    /// The connection ended: QEMU is gone, or took the channel away.
    #[error("the guest agent's channel at {address} was closed during {command}: {reason}")]
    Closed {
        /// Where.
        address: Address,
        /// The command.
        command: String,
        /// What the system said.
        reason: String,
    },
    /// The agent refused a command.
    #[error("the guest agent refused {command}: {desc} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// The agent's error class.
        class: String,
        /// The agent's words.
        desc: String,
    },
    /// What came back is no answer.
    #[error("the guest agent answered {command} with {found}, which makes no sense")]
    Garbage {
        /// The command.
        command: String,
        /// The beginning of what it said.
        found: String,
    },
}

impl AgentError {
    /// Whether the agent does not know the command, or was told not to execute it. Frozen, it says the same of nearly
    /// all its commands.
    pub fn is_disabled(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "CommandNotFound")
    }

    /// Whether the agent refused, as opposed to not answering: it is well, and the command did nothing or failed.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Whether nobody will ever answer there: QEMU is gone.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::NoSocket { .. })
    }
}
