//! The repository: deduplicated, verifiable restore points in a directory.
//!
//! ```text
//! backup ─ put ─► writer ── hash, compress ──► packs ─► index ─► point (the commit)
//!                    └──── digests ─────► trees ──┘
//! restore ◄────── reader ◄── walk a tree, look digests up, read packs
//! ```
//!
//! What is stored: chunks of disks, named by their [digest]; a [tree] of digests per disk; both as [blobs](blob) in
//! [packs](pack); an [index] that finds them; and [points](point), the only thing that makes a restore point exist.
//! [layout] says where the files are, [lock] who may do what at the same time.
//!
//! # What a crash leaves
//!
//! A manifest is written last, atomically, after all that it refers to is durable. A crash before that leaves the
//! repository as it was, and in it: packs that are listed in a [journal], adopted by the next writer; at most one
//! unfinished pack a kind, which is dropped then; `*.tmp` files. Nothing that exists is ever changed in place.
//!
//! # Cancelling
//!
//! Dropping a [`writer::Writer`] is the same as a crash of it, tidied up.

pub mod blob;
pub mod config;
pub mod damage;
pub mod digest;
pub mod error;
pub(crate) mod fields;
pub mod fuzz;
pub mod index;
pub mod journal;
pub mod layout;
pub mod lock;
pub mod offer;
pub mod pack;
pub mod packfile;
pub mod point;
pub mod points;
pub mod reader;
pub mod repository;
pub mod sealed;
pub mod session_log;
pub mod suspect;
pub mod tree;
pub mod verify;
pub mod writer;

pub use digest::Digest;
pub use error::RepoError;
pub use point::Manifest;
pub use reader::{ReadOptions, Reader};
pub use repository::{DEFAULT_CHUNK_BYTES, Repository};
pub use tree::Image;
pub use writer::{Compression, Writer, WriterOptions};
