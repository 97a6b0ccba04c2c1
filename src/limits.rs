//! Constants that bound something, together, with the relations between them asserted.

use crate::units::{GRANULE_BYTES, KIB, MIB};

/// Largest disk that we take: 2⁵⁶ bytes (64 PiB). Every size from QEMU, a peer or a file is checked against it.
pub const MAX_DISK_BYTES: u64 = 1 << 56;
/// Most disks of one virtual machine.
pub const MAX_DISKS: usize = 256;
/// Longest name of a virtual machine or disk, in bytes.
pub const MAX_NAME_BYTES: usize = 255;

/// Smallest chunk of a repository.
pub const MIN_CHUNK_BYTES: u32 = 64 * KIB as u32;
/// Largest chunk of a repository.
pub const MAX_CHUNK_BYTES: u32 = MIB as u32;

/// Longest single read of a block source, and so the largest data payload on the wire.
pub const MAX_READ_BYTES: u64 = MIB;
/// Longest single discard of a block source (QEMU's vhost-user-blk export refuses more).
pub const MAX_DISCARD_BYTES: u64 = 16 * MIB;

const _: () = assert!(MIN_CHUNK_BYTES as u64 == GRANULE_BYTES);
const _: () = assert!(MAX_CHUNK_BYTES as u64 <= MAX_READ_BYTES);
const _: () = assert!(MAX_READ_BYTES.is_multiple_of(GRANULE_BYTES) && MAX_DISCARD_BYTES.is_multiple_of(GRANULE_BYTES));
