//! The livebackup protocol: one byte stream (TCP, a unix socket, TLS above either) between a client and a sidecar.
//!
//! ```text
//! client                                   sidecar
//!   offer of versions        ─────────►                      hello: frozen, see `hello`
//!                            ◄─────────    chosen version
//!   Request::Disks, …        ─────────►                      frames from here on, see `frame`
//!                            ◄─────────    Reply::Disks, …   one request at a time, as many as one likes
//!   Request::Begin           ─────────►
//!                            ◄─────────    Reply::Begun      the instant is behind us
//!                            ◄─────────    Data, Packed, Zero, Same … as fast as the client reads
//!   Digests …                ─────────►                      of disks that are scanned, as fast as the sidecar reads
//!   Request::Ack …           ─────────►                      at any time, no answer
//!                            ◄─────────    Reply::Sent
//!                            ◄─────────    Reply::End        the last frame; the connection is closed
//! ```
//!
//! `Reply::Failed` takes the place of any reply; inside a session it is the last frame. Whoever has nothing to say while
//! the other waits sends an Alive frame every [`Timing::alive_every`]; whoever hears nothing for [`Timing::silence`] while
//! it waits closes. Closing the connection ends a session and closes its fleece, unless both ends can [`resume`] it. A
//! session's data may come over several connections, a [`trunk`].
//!
//! Neither side believes the other: every length is bounded before memory is taken for it, and [`contract`] holds a
//! session to what [`message`] promises.

pub mod boot_file;
pub mod client;
mod common;
pub mod contract;
pub mod digests;
pub mod frame;
pub mod fuzz;
mod gather;
pub mod hello;
pub mod link;
pub mod message;
pub mod packing;
pub mod pool;
pub mod rate;
pub mod reader;
pub mod resume;
pub mod server;
pub mod session;
mod spread;
pub mod tls;
pub mod trunk;
pub mod unheard;
pub mod writer;

pub use client::{Address, Client, Door};
pub use common::Common;
pub use link::{Stream, Timing};
pub use server::{Answer, serve_connection, serve_with};
