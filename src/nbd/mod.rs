//! NBD: our own client, for QEMU's built-in server and any other that speaks fixed newstyle, and our own [server].
//!
//! What the client is for: reading dirty bitmaps out of QEMU, setting bits in one, and reading disk data where
//! vhost-user-blk cannot be used. What the server is for: any NBD client reads a disk that we have. "proto.md" in these
//! files is `doc/proto.md` of the NBD project, the protocol's definition; the section is named where something comes
//! from it.
//!
//! ```text
//!  source      BlockSource over 1..=8 connections: rules, budget, pool
//!  status      whole bitmaps, piece by piece
//!  commands    read, write zeroes, trim, flush, block status: what is checked before it is sent
//!  client      one connection, many requests in flight
//!  ├─ reader   the one task that reads replies          ├─ a writer task that sends whole requests
//!  └─ table    what is on the wire (pure), coverage     └─ pool: buffers that come back
//!  connect     a socket, and the handshake on it
//!  negotiate   the handshake                             layout, proto: layouts, numbers and bounds (pure)
//!  server      the other side, read-only: handshake, request, session, writer
//! ```
//!
//! A client's session is in one of three states: *negotiating* (one exchange after another, under one time limit),
//! *transmitting* (requests and replies by cookie, in any order) and *ended* (with a reason; every request that waits
//! gets it, every later one too). It never goes back. Dropping a caller's future leaves the request on the wire: its
//! late reply is read, checked and thrown away. A crash of either side leaves nothing to clean here.
//!
//! Rules of use that QEMU's behaviour dictates: negotiate a bitmap's context on a connection of its own (a
//! `base:allocation` that fails would fail the whole request); below QEMU 10 never open a session to an export whose
//! node is in an iothread (QEMU aborts when it ends) and never let a read cross a copy-before-write cluster.

pub mod client;
mod commands;
pub mod connect;
mod coverage;
pub mod error;
pub mod fuzz;
pub mod layout;
pub mod negotiate;
pub mod pool;
pub mod proto;
mod reader;
pub mod server;
pub mod source;
mod status;
mod table;

pub use client::{Client, ClientOptions};
pub use connect::{Address, ConnectOptions, connect, list};
pub use error::{NbdError, NegotiateError};
pub use negotiate::{BlockSizes, Export, ListedExport, Wanted};
pub use source::{NbdSource, SourceOptions};

/// Context of allocation: flags [`proto::STATE_HOLE`] and [`proto::STATE_ZERO`].
pub const BASE_ALLOCATION: &str = "base:allocation";

/// The context name of QEMU's dirty bitmap `bitmap`: flag [`proto::STATE_DIRTY`]. It has no node and no export in it.
pub fn dirty_bitmap_context(bitmap: &str) -> String {
    format!("qemu:dirty-bitmap:{bitmap}")
}
