//! The monitor: QMP, QEMU's control protocol, over a byte stream.
//!
//! ```text
//!  clones of Monitor ──► channel ──► writer task ──► socket ──► QEMU
//!        ▲                                             │
//!        ├── slot of the call's id ◄── reader task ◄───┘
//!        └── broadcast of events   ◄──────┘
//! ```
//!
//! * One command is one [`Monitor::raw`] (or typed, [`Monitor::execute`]). Replies are matched by an id of our own; the
//!   numbers start at a random value, so that a reply meant for a client before us cannot be taken for ours.
//! * **Cancelling** a call (dropping its future, or its time limit) gives up its slot. A command that the writer has
//!   begun is still written whole and QEMU executes it; its late reply is dropped.
//! * **QEMU executes commands one after the other**, and some hold its main loop for long (`stop` and `blockdev-del`
//!   flush). A time limit therefore says that we stopped waiting, never that the command did nothing.
//! * **Closing**: when the last clone is dropped, commands that were handed over are written (for at most two seconds)
//!   and the socket is closed. QEMU drops commands that it has read and not begun when its client goes.
//! * **A crash leaves** what the commands made. Nothing is bound to the connection but passed descriptors that no
//!   command has taken.
//!
//! Messages that are not QMP end the connection: a stream that has lost its framing cannot be trusted again. Events and
//! reply members that we do not know are normal: QEMU grows.
//!
//! The protocol: QEMU's `docs/interop/qmp-spec.rst`; the commands: `qapi/*.json`, reduced to what we use in
//! `qmp-schemas/`.

mod address;
mod capability;
mod client;
mod connection;
mod error;
mod machine;
mod message;
mod process;
mod socket;
mod trial;

pub use address::{Address, BadAddress};
pub use capability::{Capabilities, probe};
pub use client::Monitor;
pub use error::MonitorError;
pub use machine::{machine, migration, run_state};
pub use message::{Event, Version, fuzz};
pub use process::Process;
