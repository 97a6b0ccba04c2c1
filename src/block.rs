//! Block source: how the bytes of a disk at an instant are read.
//!
//! Two transports implement it: [vhost-user-blk](crate) through shared memory (fast, the rule), and NBD (the fallback).
//! Both obey [`SourceRules`], which say what this QEMU can be trusted with.

use std::future::Future;
use std::pin::Pin;

use bytes::Bytes;

use crate::extent::Extent;

/// A boxed future, so that a source can be used behind `dyn`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A read that is under way. Dropping it gives it up.
pub type Reading<'a> = BoxFuture<'a, Result<Bytes, SourceError>>;

/// What a source must keep to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceRules {
    /// No single request on the transport crosses a multiple of this (a multiple of a granule). QEMU 7.2 returns
    /// live data for a snapshot read that starts in a copied cluster and runs into one that was not copied, so
    /// there this is one granule; elsewhere it is the longest read.
    pub boundary_bytes: u64,
    /// Bytes in flight and held by readers at most, over the whole source. The permit travels with the buffer.
    pub in_flight_bytes: u64,
}

/// Why a read or discard failed.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// QEMU answered with an error. On a snapshot this means that the fleece is broken.
    #[error("{extent}: QEMU refused the {what}: {errno}")]
    Refused {
        /// `read` or `discard`.
        what: &'static str,
        /// Which bytes.
        extent: Extent,
        /// The errno that came back (transports map them differently: EINVAL, EACCES and EIO all mean "broken").
        errno: nix::errno::Errno,
    },
    /// The connection ended or the peer broke the protocol.
    #[error("the {transport} connection to QEMU ended: {reason}")]
    Gone {
        /// `vhost-user-blk` or `NBD`.
        transport: &'static str,
        /// What was seen.
        reason: String,
    },
    /// The caller asked for something outside the disk or past a limit.
    #[error("{extent} is outside the disk ({size_bytes} bytes) or longer than a request may be")]
    OutOfBounds {
        /// Which bytes.
        extent: Extent,
        /// Size of the disk.
        size_bytes: u64,
    },
}

/// Reads one disk as it was at its instant.
pub trait BlockSource: Send + Sync {
    /// Size of the disk, to the byte.
    fn size_bytes(&self) -> u64;

    /// Begins to read `extent` (at most [`crate::limits::MAX_READ_BYTES`], within the disk) whole, once there is room for its
    /// bytes. The buffer may be shared memory that is lent out: dropping it gives its bytes in flight back, holding it
    /// holds the source up.
    ///
    /// Room is given in the order of the calls that wait for it, and a read that is under way ends without more of it. So who
    /// passes reads on in order must start them in order, one after the other: a read that was started ahead of its turn
    /// could have the room that an earlier one needs, and be held until that one is passed on. For the same reason nobody
    /// waits for another read of the source while he holds bytes back.
    ///
    /// The order is that of the futures' first polls. What is under way goes on only while it is polled.
    fn start(&self, extent: Extent) -> BoxFuture<'_, Result<Reading<'_>, SourceError>>;

    /// Starts a read, and waits for its bytes.
    fn read(&self, extent: Extent) -> Reading<'_> {
        Box::pin(async move { self.start(extent).await?.await })
    }

    /// Tells QEMU that `extent` will not be read again, so that copy-before-write stops copying it. Must be
    /// granule-aligned, at most [`crate::limits::MAX_DISCARD_BYTES`], and must not touch a last partial granule.
    fn discard(&self, extent: Extent) -> BoxFuture<'_, Result<(), SourceError>>;
}
