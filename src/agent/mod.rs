//! The guest agent: qemu-ga's protocol over a byte stream.
//!
//! ```text
//!  Channel ──► unix socket ──► QEMU's chardev ──► virtio-serial port ──► qemu-ga
//!          ◄── lines ◄────────────────────────────────────────────────────┘
//! ```
//!
//! The stream outlives its clients: what a client before us left half written, and what the agent still answers to it,
//! is in front of us. So every channel begins in step with `guest-sync-delimited`: a byte 0xff makes the agent drop half
//! a line (and complain of it in a line of its own), and its reply begins with 0xff and has our number; all before
//! that reply is stale.
//!
//! * **One command at a time**, each with its own time limit. A call that was given up, by its limit or by dropping its
//!   future, leaves the channel out of step: the next call finds the step again first. The agent executes a command
//!   that was given up.
//! * **One client at a time.** QEMU lets a second one connect and gives it silence, as it does when no agent runs in the
//!   guest. Who asks QEMU can tell the two apart; here both are [`AgentError::Silent`].
//! * **A reply may never come**: the agent hangs, was killed, or the guest stands still.
//! * **While file systems are frozen** the agent refuses nearly everything but ping, sync, status and thaw.
//! * **A crash leaves** what the commands did: a frozen guest above all. Any process may thaw it.
//!
//! What the guest sends is a stranger's: lines are bounded, members that we do not know are normal, and wrong types are
//! errors, never panics.
//!
//! The protocol: QEMU's `docs/interop/qemu-ga.rst` and `qga/qapi-schema.json`.

mod address;
mod channel;
mod commands;
mod error;
mod lines;

pub use address::{Address, BadAddress};
pub use channel::Channel;
pub use commands::{AgentInfo, Executed, FileSystem, FileSystemDisk, FreezeStatus, GuestOs, PciAddress};
pub use error::AgentError;
