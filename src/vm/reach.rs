//! Connecting to QEMU's NBD server without keeping QEMU from ever ending a wait.
//!
//! Whatever stills QEMU's disks (`stop`, a hot-plug, a node or an export that comes or goes) waits in its main loop until no
//! request is under way. A connected client counts as one, unless it was told before to be still. But handshakes go on in that
//! wait, and nobody tells a client whose handshake ends in it. Then the wait lasts for as long as that client is connected:
//! QEMU turns round in it, monitors get no answers, the guest stands still, and further clients are not accepted, so that a
//! second connection's handshake does not end (`nbd_drained_begin` and `nbd_drained_poll` in QEMU's `nbd/server.c`).
//!
//! So it is in QEMU 10.0, for every client (nbdcopy), with and without a filter or an I/O thread; 10.2 has the same lines.
//! Before 8.2 (its commit 06e0f098) a handshake waited itself until the wait was over: 7.2 cannot be made to hang so. While
//! somebody stopped the guest all the time, one backup in ten met it. A client that was connected before is told, and never
//! does.
//!
//! So a connection counts only when QEMU's main loop has answered something that it was asked after the handshake: the wait
//! that this may have fallen into is over then. If that answer takes long, the connections are given up, which ends such a
//! wait at once, and made again. So somebody's `stop` now and then takes [`SHORTEST`] longer, instead of for ever.

use std::time::Duration;

use serde_json::json;

use super::{internal, qemu_failed};
use crate::monitor::Monitor;
use crate::nbd::NegotiateError;
use crate::wire::message::{Failure, FailureCode};

/// How long the first try may take: a few milliseconds are usual. Each further one has twice as long, since QEMU or the host
/// may just be slow.
const SHORTEST: Duration = Duration::from_millis(250);
/// How long the last try may take.
const LONGEST: Duration = Duration::from_secs(8);

/// Connects to exports of QEMU as often as it takes. What `connect` gives must close its connections when it is dropped, and so
/// must `connect` itself.
pub async fn reach<T, F>(monitor: &Monitor, connect: impl Fn() -> F) -> Result<T, Failure>
where
    F: Future<Output = Result<T, NegotiateError>>,
{
    let mut limit = SHORTEST;
    loop {
        let reached = async {
            let connected = connect().await.map_err(internal)?;
            look(monitor).await?;
            Ok(connected)
        };
        match tokio::time::timeout(limit, reached).await {
            Ok(reached) => return reached,
            Err(_) if limit >= LONGEST => {
                let words = "QEMU did not answer while its disks were connected, as often as it was tried: it is busy, or \
                             somebody stops and starts the guest all the time; run the backup again later";
                return Err(Failure::new(FailureCode::Qemu, words));
            }
            Err(_) => tracing::debug!(?limit, "QEMU does not answer while it is connected: once more, from the start"),
        }
        look(monitor).await?;
        limit *= 2;
    }
}

/// Returns once QEMU's main loop has got round to an answer.
async fn look(monitor: &Monitor) -> Result<(), Failure> {
    monitor.raw("query-status", json!({})).await.map(drop).map_err(qemu_failed)
}
