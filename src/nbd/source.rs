//! A disk at its instant, read over NBD: the fallback beside vhost-user-blk.
//!
//! A read goes to the connection with the fewest requests on the wire, as one or several requests into one buffer: split
//! where [`SourceRules::boundary_bytes`] or [`SourceOptions::request_bytes`] demands. Bytes in flight are bounded by a budget, and a read's share
//! travels with its buffer: through the wire, also when its caller goes away, and with the [`Bytes`] until they are
//! dropped. There is no reconnecting: a session that ends takes the fleece's proof with it, so the owner decides.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures_util::future::try_join_all;
use nix::errno::Errno;
use tokio::sync::Semaphore;

use super::client::Client;
use super::connect::{Address, ConnectOptions, connect};
use super::error::{NbdError, NegotiateError};
use super::negotiate::{Export, Wanted};
use super::pool::Pool;
use super::proto::{CAN_MULTI_CONN, READ_ONLY, SEND_TRIM};
use crate::block::{BlockSource, BoxFuture, Reading, SourceError, SourceRules};
use crate::extent::Extent;
use crate::limits::{MAX_DISCARD_BYTES, MAX_READ_BYTES};
use crate::units::GRANULE_BYTES;

/// Most connections of a source.
pub const MAX_CONNECTIONS: usize = 8;
/// Idle buffers that are kept at most.
const KEEP_BYTES: u64 = 64 << 20;

/// Which disk, and how to read it.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// Where.
    pub address: Address,
    /// Name of the export.
    pub export: String,
    /// 1..=[`MAX_CONNECTIONS`]. A server that does not say that several connections see the same gets one.
    pub connections: usize,
    /// What to keep to.
    pub rules: SourceRules,
    /// Split reads at multiples of this too (at least a granule; it divides the boundary): shorter ones are on their way at once.
    pub request_bytes: Option<u64>,
    /// Time limits.
    pub connect: ConnectOptions,
}

/// A [`BlockSource`] over NBD. Dropping it closes the sockets at once: below QEMU 10 delete the export first.
#[derive(Debug)]
pub struct NbdSource {
    clients: Vec<Client>,
    turn: AtomicUsize,
    /// No request crosses a multiple of this; divides the boundary.
    split_bytes: u64,
    in_flight_bytes: u64,
    budget: Arc<Semaphore>,
    pool: Arc<Pool>,
}

impl NbdSource {
    /// Connects. `boundary_bytes` is a multiple of a granule, `in_flight_bytes` at least one; a single read longer
    /// than that waits until it is alone.
    pub async fn open(options: &SourceOptions) -> Result<NbdSource, NegotiateError> {
        let rules = options.rules;
        let bad = |what: &str| Err(NegotiateError::BadArgument { what: what.to_owned() });
        if !(1..=MAX_CONNECTIONS).contains(&options.connections) {
            return bad("other than 1 to 8 connections");
        }
        if rules.boundary_bytes == 0 || !rules.boundary_bytes.is_multiple_of(GRANULE_BYTES) {
            return bad("a boundary that is no multiple of 64 KiB");
        }
        if rules.in_flight_bytes < GRANULE_BYTES {
            return bad("less than 64 KiB in flight");
        }
        let split_bytes = options.request_bytes.unwrap_or(rules.boundary_bytes);
        if split_bytes < GRANULE_BYTES || !rules.boundary_bytes.is_multiple_of(split_bytes) {
            return bad("requests of a length that does not divide the boundary, or below 64 KiB");
        }
        let wanted = Wanted { export: options.export.clone(), contexts: vec![] };
        let mut clients = vec![connect(&options.address, &wanted, &options.connect).await?];
        let size_bytes = clients[0].export().size_bytes;
        if clients[0].export().can(CAN_MULTI_CONN) {
            let more = (1..options.connections).map(|_| connect(&options.address, &wanted, &options.connect));
            clients.extend(try_join_all(more).await?);
        }
        if let Some(other) = clients.iter().find(|c| c.export().size_bytes != size_bytes) {
            return Err(NegotiateError::SizeDiffers {
                peer: options.address.to_string(),
                export: options.export.clone(),
                first_bytes: size_bytes,
                second_bytes: other.export().size_bytes,
            });
        }
        let permits = rules.in_flight_bytes.min(u64::from(u32::MAX)) as usize;
        let pool = Pool::new(rules.in_flight_bytes.min(KEEP_BYTES) as usize);
        Ok(NbdSource {
            clients,
            turn: AtomicUsize::new(0),
            split_bytes,
            in_flight_bytes: rules.in_flight_bytes,
            budget: Arc::new(Semaphore::new(permits)),
            pool,
        })
    }

    /// The export as negotiated.
    pub fn export(&self) -> &Export {
        self.clients[0].export()
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.clients.len()
    }

    /// Whether [`BlockSource::discard`] can work: the export is writable and offers TRIM. (QEMU's snapshot-access
    /// takes it and does nothing unless it has `discard: unmap`.)
    pub fn can_discard(&self) -> bool {
        self.export().can(SEND_TRIM) && !self.export().can(READ_ONLY)
    }

    /// Says goodbye on every connection.
    pub async fn close(self) {
        futures_util::future::join_all(self.clients.into_iter().map(Client::close)).await;
    }

    /// The connection with the fewest requests on the wire; among equals, in turn.
    fn idlest(&self) -> &Client {
        let start = self.turn.fetch_add(1, Ordering::Relaxed);
        let in_turn = (0..self.clients.len()).map(|i| &self.clients[(start + i) % self.clients.len()]);
        in_turn.min_by_key(|c| c.waiting()).unwrap_or(&self.clients[0])
    }

    async fn start_whole(&self, extent: Extent) -> Result<Reading<'_>, SourceError> {
        if extent.len_bytes > MAX_READ_BYTES || !extent.fits(self.size_bytes()) {
            return Err(self.out_of_bounds(extent));
        }
        if extent.len_bytes == 0 {
            return Ok(Box::pin(async { Ok(Bytes::new()) }));
        }
        let share = extent.len_bytes.min(self.in_flight_bytes) as u32;
        let permit = self.budget.clone().acquire_many_owned(share).await.map_err(|e| gone(e.to_string()))?;
        let buffer = self.pool.take(extent.len_bytes as usize, Some(permit));
        Ok(Box::pin(async move {
            match self.idlest().read_into(extent, self.split_bytes, buffer).await {
                Ok(buffer) => Ok(Bytes::from_owner(buffer)),
                Err(e) => Err(self.source_error("read", extent, e)),
            }
        }))
    }

    async fn discard_whole(&self, extent: Extent) -> Result<(), SourceError> {
        let aligned =
            extent.offset_bytes.is_multiple_of(GRANULE_BYTES) && extent.len_bytes.is_multiple_of(GRANULE_BYTES);
        // `fits` together with alignment keeps off a last partial granule.
        if !aligned || extent.len_bytes > MAX_DISCARD_BYTES || !extent.fits(self.size_bytes()) {
            return Err(self.out_of_bounds(extent));
        }
        if extent.len_bytes == 0 {
            return Ok(());
        }
        self.idlest().trim(extent).await.map_err(|e| self.source_error("discard", extent, e))
    }

    fn out_of_bounds(&self, extent: Extent) -> SourceError {
        SourceError::OutOfBounds { extent, size_bytes: self.size_bytes() }
    }

    fn source_error(&self, what: &'static str, extent: Extent, error: NbdError) -> SourceError {
        match error {
            NbdError::Server { errno: Errno::ESHUTDOWN, .. } => gone(error.to_string()),
            NbdError::Server { errno, .. } => SourceError::Refused { what, extent, errno },
            NbdError::BadRequest { .. } if what == "discard" && !self.can_discard() => {
                SourceError::Refused { what, extent, errno: Errno::EOPNOTSUPP }
            }
            NbdError::BadRequest { .. } | NbdError::NoContext { .. } => self.out_of_bounds(extent),
            NbdError::Gone { reason, .. } => gone(reason),
            NbdError::Deadline { .. } => gone(error.to_string()),
        }
    }
}

fn gone(reason: String) -> SourceError {
    SourceError::Gone { transport: "NBD", reason }
}

impl BlockSource for NbdSource {
    fn size_bytes(&self) -> u64 {
        self.export().size_bytes
    }

    fn start(&self, extent: Extent) -> BoxFuture<'_, Result<Reading<'_>, SourceError>> {
        Box::pin(self.start_whole(extent))
    }

    fn discard(&self, extent: Extent) -> BoxFuture<'_, Result<(), SourceError>> {
        Box::pin(self.discard_whole(extent))
    }
}
