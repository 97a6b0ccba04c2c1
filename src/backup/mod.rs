//! The client's engine: takes a backup of one VM from a sidecar into a repository.
//!
//! ```text
//!  lock of the VM ─► parent chosen ─► writer ─► begin ═══ instant ═══► events ─► Sent ─► writer.finish ─┐
//!  (one at a time)   (`plan`)                                          │  ▲               ∥            ├─► manifest
//!                                                              put, zero  acks            End ──────────┘
//! ```
//!
//! * **All or nothing.** The manifest is the last thing written, after everything that it needs is durable and after the
//!   sidecar has said that the session ended well. A crash before leaves packs that the next writer adopts.
//! * **The guest first.** Bytes are dropped as soon as they are stored: they may be memory that QEMU lends. What is durable
//!   is acknowledged at once, so that the guest's writes to it cost nothing any more.
//! * **Cancelling.** When `interrupted` becomes true the session is dropped, which makes the sidecar close its fleece; a
//!   sidecar in this process is waited for, and its instant is never given up half-way. From the moment at which the manifest is being written it is too late to
//!   interrupt.
//! * **Memory** is what the writer has in flight, and a few events.

use std::time::Instant;

use jiff::Timestamp;
use tokio::sync::watch;

use crate::fault;
use crate::grade::Policy;
use crate::repo::point::Manifest;
use crate::repo::{Compression, Repository};
use crate::wire::message::{Begin, Estimated};

mod error;
mod files;
mod manifest;
pub mod plan;
pub mod report;
mod sidecar;
mod transfer;

pub use error::BackupError;
pub use plan::{LevelChoice, Plan};
pub use report::{DiskReport, Durations, Progress, Report};
pub use sidecar::Sidecar;

/// What kind of backup, of what, stored how.
#[derive(Clone, Debug)]
pub struct BackupOptions {
    /// Whole, or since which point.
    pub level: LevelChoice,
    /// Only these disks; all protectable ones when empty.
    pub include: Vec<String>,
    /// Not these disks.
    pub exclude: Vec<String>,
    /// How chunks are stored.
    pub compression: Compression,
    /// Whether the guest's file systems are frozen; as the sidecar is configured when absent.
    pub freeze: Option<Policy>,
}

impl Default for BackupOptions {
    fn default() -> Self {
        Self {
            level: LevelChoice::Auto,
            include: Vec::new(),
            exclude: Vec::new(),
            compression: Compression::Zstd(1),
            freeze: None,
        }
    }
}

/// Runs a call that may block where it holds nobody up.
async fn blocking<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> Result<T, BackupError> {
    tokio::task::spawn_blocking(call).await.map_err(|_| BackupError::Panicked)
}

/// The readable points of a VM, the oldest first.
async fn points(repo: &Repository, vm: &str) -> Result<Vec<Manifest>, BackupError> {
    let (repo, vm) = (repo.clone(), vm.to_owned());
    let listing = blocking(move || repo.points(&vm)).await??;
    for error in &listing.damaged {
        tracing::warn!(%error, "a restore point cannot be read; the backup does without it");
    }
    Ok(listing.points)
}

/// Asks what is there and chooses what to ask for.
async fn choose(
    sidecar: &mut Sidecar,
    repo: &Repository,
    options: &BackupOptions,
) -> Result<(Plan, Begin), BackupError> {
    let (_machine, found) = sidecar.disks().await?;
    let points = points(repo, sidecar.vm()).await?;
    let chunk_bytes = repo.config().chunk_bytes;
    let plan = plan::choose(options.level, &points, &found, chunk_bytes)
        .map_err(|reason| BackupError::NotPossible { vm: sidecar.vm().to_owned(), level: options.level, reason })?;
    let begin = Begin {
        vm: sidecar.vm().to_owned(),
        include: options.include.clone(),
        exclude: options.exclude.clone(),
        since: plan.since(),
        full_reason: plan.full_reason.clone(),
        chunk_bytes,
        checkpoint: options.level != LevelChoice::Copy,
        incremental_only: options.level == LevelChoice::Incremental,
        freeze: options.freeze,
    };
    Ok((plan, begin))
}

/// What a backup with these options would read. Changes nothing anywhere.
pub async fn estimate(
    mut sidecar: Sidecar,
    repo: Repository,
    options: BackupOptions,
) -> Result<Vec<Estimated>, BackupError> {
    let (_plan, mut begin) = choose(&mut sidecar, &repo, &options).await?;
    // What it would cost is said even where it would be refused.
    begin.incremental_only = false;
    Ok(sidecar.estimate(begin).await?)
}

/// Takes a backup. `progress` is called for every event, so it must be quick.
///
/// # Errors
/// No point was made, unless the error is of the commit itself and says so. A sidecar in this process has cleaned up.
pub async fn run(
    sidecar: Sidecar,
    repo: Repository,
    options: BackupOptions,
    mut progress: impl FnMut(Progress),
    mut interrupted: watch::Receiver<bool>,
) -> Result<Report, BackupError> {
    // Held until all is over, on every way out.
    let lock = repo.lock_vm(sidecar.vm())?;
    let here = sidecar.here();
    let stored = store(sidecar, &repo, &options, &mut progress, &mut interrupted).await;
    let report = match stored {
        Ok(stored) => manifest::commit(&repo, stored).await,
        Err(error) => Err(error),
    };
    if let Some(vm) = here {
        vm.idle().await;
    }
    drop(lock);
    report
}

/// Does something unless the user stops it.
async fn stoppable<T>(
    interrupted: &mut watch::Receiver<bool>,
    work: impl Future<Output = Result<T, BackupError>>,
) -> Result<T, BackupError> {
    tokio::select! {
        biased;
        () = asked_to_stop(interrupted) => Err(BackupError::Interrupted),
        done = work => done,
    }
}

/// Waits for the flag; for ever when nobody can raise it any more.
async fn asked_to_stop(interrupted: &mut watch::Receiver<bool>) {
    if interrupted.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// All steps before the manifest.
async fn store(
    mut sidecar: Sidecar,
    repo: &Repository,
    options: &BackupOptions,
    progress: &mut impl FnMut(Progress),
    interrupted: &mut watch::Receiver<bool>,
) -> Result<transfer::Stored, BackupError> {
    let (started, clock) = (Timestamp::now(), Instant::now());
    let (plan, begin) = stoppable(interrupted, choose(&mut sidecar, repo, options)).await?;
    let vm = begin.vm.clone();
    // Before the instant: it may have work to do for a writer that died.
    let writer = stoppable(interrupted, transfer::open_writer(repo, options.compression)).await?;
    let here = sidecar.here().is_some();
    let beginning = async { Ok(sidecar.begin(begin).await?) };
    let session = match here {
        // Never given up half-way, with the guest stopped; it takes a moment.
        true => beginning.await?,
        false => stoppable(interrupted, beginning).await?,
    };
    fault::point("backup.begun");
    let prepared = clock.elapsed();
    let chunk_bytes = repo.config().chunk_bytes;
    let storing = transfer::run(session, writer, &plan, chunk_bytes, here, progress);
    let mut stored = stoppable(interrupted, storing).await?;
    fault::point("backup.stored");
    stored.head = transfer::Head { vm, started, level: options.level, prepared, clock };
    Ok(stored)
}
