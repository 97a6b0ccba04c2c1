//! **livebackup** backs up virtual machines while they run, on an unmodified QEMU.
//!
//! ```text
//!  hypervisor                                                      backup host
//! ┌───────────────────────────────────────────┐                  ┌─────────────────────────────────┐
//! │ guest                                      │                  │ livebackup backup               │
//! │   │                                        │   TCP            │   hash → dedup → compress       │
//! │ QEMU ── QMP ── monitor ┐                   │   wire protocol  │      ▼                          │
//! │   └─ vhost-user-blk, NBD ─► livebackup     ├─────────────────►│   repository (a directory)      │
//! │      (snapshot-access node)   serve        │   NBD            │      ▼         ▼        ▼       │
//! │                 state: checkpoint log      │◄─────────────────┤   restore     map     verify    │
//! │                 guardian (tiny process)    │                  │                                 │
//! └───────────────────────────────────────────┘                  └─────────────────────────────────┘
//! ```
//!
//! With no daemon and no network the same engines run in one process.
//!
//! # Invariants
//!
//! 1. A backup never makes a guest write fail and never makes it wait beyond stated bounds.
//! 2. An incremental never misses a changed block: a superset of the dirty blocks is always allowed, a subset never.
//! 3. A restore point is all or nothing: it becomes visible by one atomic rename, after all that it needs is durable.
//! 4. We leave no trace: what we add to QEMU carries our owner id and has its inverse written down first.
//! 5. Every length, count and offset from a peer or a stored file is bounded before it is used.
//! 6. Cost follows change.
//!
//! # Layers
//!
//! A room imports only rooms of the lines below its own; `tests/suite/layers.rs` checks it.
//!
//! ```text
//! cli
//! backup map overhead restore server
//! vm
//! hooks
//! checkpoint repo wire nbd vhost monitor agent
//! area machine grade impact pki
//! block codec direct durable extent fault limits partition units
//! ```

pub mod agent;
pub mod area;
pub mod backup;
pub mod block;
pub mod checkpoint;
pub mod cli;
pub mod codec;
pub mod direct;
pub mod durable;
pub mod extent;
pub mod fault;
pub mod grade;
pub mod hooks;
pub mod impact;
pub mod limits;
pub mod machine;
pub mod map;
pub mod monitor;
pub mod nbd;
pub mod overhead;
pub mod partition;
pub mod pki;
pub mod repo;
pub mod restore;
pub mod server;
pub mod units;
pub mod vhost;
pub mod vm;
pub mod wire;
