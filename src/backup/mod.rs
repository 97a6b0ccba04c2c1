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
//!   (in one process: what has arrived) is acknowledged at once, so that the guest's writes to it cost nothing any more.
//! * **Cancelling.** When `interrupted` becomes true the session is dropped, which makes the sidecar close its fleece; a
//!   sidecar in this process is waited for, and its instant is never given up half-way. From the moment at which the manifest is being written it is too late to
//!   interrupt.
//! * **Never hope.** Where a disk's tracking was broken and an earlier point has it, the digests of that are given to the
//!   sidecar, and what differs comes back. When an [audit](audit) finds tracking wrong, the points that rest on it are marked,
//!   and the backup starts over at once, with a scan of that disk; so it does when the tree that a disk goes on from turns
//!   out to be damaged.
//! * **A lost connection** is the wire's business, as long as the sidecar holds the session ([`resume`](crate::wire::resume)).
//!   Who is killed and started again goes on with it, too (`comeback`). Once it is gone, all begins anew, with another
//!   instant: what has been stored need not be stored again. Not for ever.
//! * **Memory** is what the writer has in flight, and a few events.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::backup::files::Files;
use crate::fault;
use crate::grade::Policy;
use crate::hooks::program::{self, About, Hook, Phase};
use crate::impact::Budget;
use crate::repo::point::Manifest;
use crate::repo::session_log::SessionLog;
use crate::repo::{Compression, Repository};
use crate::wire::message::{Begin, Estimated, Failure, FailureCode, Session};
use crate::wire::packing::{How, Wanted};
use crate::wire::rate::Limit;
use crate::wire::resume::{Lasting, Token};

pub mod audit;
mod comeback;
mod error;
mod files;
mod lost;
mod manifest;
pub mod plan;
pub mod report;
mod sidecar;
mod transfer;

pub use error::BackupError;
pub use plan::{LevelChoice, Plan};
pub use report::{DiskReport, Durations, Progress, Report};
pub use sidecar::{Again, Sidecar};

/// How often a backup is begun anew after its session was lost for good.
const MAX_NEW_STARTS: usize = 2;
/// How often a backup that gave way to its guest is begun anew.
const MAX_RETRIES: u32 = 5;
/// How long a sidecar may take to hear that its session is given up.
const LEAVES_WITHIN: Duration = Duration::from_secs(3);

/// What kind of backup, of what, stored how.
#[derive(Clone, Debug)]
pub struct BackupOptions {
    /// Whole, or since which point.
    pub level: LevelChoice,
    /// Only these disks; all protectable ones when empty.
    pub include: Vec<String>,
    /// Not these disks.
    pub exclude: Vec<String>,
    /// Wait for one's turn where another backup of the VM runs.
    pub wait: bool,
    /// How chunks are stored.
    pub compression: Compression,
    /// Programs of the operator around the backup.
    pub hooks: Vec<Hook>,
    /// Whether the guest's file systems are frozen; as the sidecar is configured when absent.
    pub freeze: Option<Policy>,
    /// What it may cost the guest; the sidecar's own limits hold, too.
    pub budget: Budget,
    /// After how long a backup that gave way to its guest is begun anew, at first: twice as long each time, [`MAX_RETRIES`] times.
    /// `None`: never.
    pub retry_after: Option<Duration>,
    /// Share of the needed chunks that an incremental has confirmed beside them, in thousandths.
    pub audit_permille: u32,
    /// Most bytes a second that come, as they come.
    pub limit_rate: Option<u64>,
    /// How data is compressed on its way here; as the server is configured when absent.
    pub wire_compression: Option<How>,
    /// Over how many connections a server sends the data.
    pub connections: u32,
}

impl Default for BackupOptions {
    fn default() -> Self {
        Self {
            level: LevelChoice::Auto,
            include: Vec::new(),
            exclude: Vec::new(),
            wait: true,
            compression: Compression::Zstd(1),
            hooks: Vec::new(),
            freeze: None,
            budget: Budget::default(),
            retry_after: None,
            audit_permille: audit::DEFAULT_PERMILLE,
            limit_rate: None,
            wire_compression: None,
            connections: 1,
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
    distrusted: &[Distrusted],
) -> Result<(Plan, Begin), BackupError> {
    let (_machine, found) = sidecar.disks().await?;
    fault::point("backup.looked");
    let points = points(repo, sidecar.vm()).await?;
    let chunk_bytes = repo.config().chunk_bytes;
    let mut plan = plan::choose(options.level, &points, &found, chunk_bytes)
        .map_err(|reason| BackupError::NotPossible { vm: sidecar.vm().to_owned(), level: options.level, reason })?;
    for Distrusted { disk, reason, .. } in distrusted {
        plan.distrust(disk, reason);
    }
    let begin = Begin {
        vm: sidecar.vm().to_owned(),
        include: options.include.clone(),
        exclude: options.exclude.clone(),
        since: plan.since(),
        full_reason: plan.full_reason.clone(),
        chunk_bytes,
        checkpoint: options.level != LevelChoice::Copy,
        incremental_only: options.level == LevelChoice::Incremental,
        wait: options.wait,
        freeze: options.freeze,
        budget: options.budget,
        digests: plan.scans.keys().cloned().collect(),
        audit: None,
        resume: None,
        areas: Some(plan.areas()),
        compression: sidecar.here().is_none().then(|| wanted(options)).flatten(),
        connections: Some(options.connections).filter(|count| *count > 1 && sidecar.here().is_none()),
    };
    Ok((plan, begin))
}

/// What is asked of a server: zstd at the level at which it would be stored.
fn wanted(options: &BackupOptions) -> Option<Wanted> {
    let level = match options.compression {
        Compression::Zstd(level) => level,
        Compression::None => 1,
    };
    let how = options.wire_compression;
    (how != Some(How::None)).then_some(Wanted { how, level })
}

/// What a backup with these options would read. Changes nothing anywhere.
pub async fn estimate(
    mut sidecar: Sidecar,
    repo: Repository,
    options: BackupOptions,
) -> Result<Vec<Estimated>, BackupError> {
    let (_plan, mut begin) = choose(&mut sidecar, &repo, &options, &[]).await?;
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
    let (again, vm) = (sidecar.again(), sidecar.vm().to_owned());
    let mut about = About { vm: vm.clone(), level: options.level.to_string(), point: None };
    let mut distrusted = vec![];
    // Begun anew, it waits for the end of its own session before.
    let anew = BackupOptions { wait: true, ..options.clone() };
    let mut stored = match program::before(&options.hooks, Phase::Backup, &about).await {
        Ok(()) => store(sidecar, &repo, &options, &distrusted, &mut progress, &mut interrupted).await,
        Err(why) => Err(Failed { error: Failure::new(FailureCode::Refused, why).into(), plan: None }),
    };
    let (mut told, mut lost, mut gave_way) = (vec![], 0, 0);
    while let Err(Failed { error, plan }) = &mut stored {
        if let BackupError::Sidecar(failure) = &*error
            && failure.code == FailureCode::SessionGone
            && lost < MAX_NEW_STARTS
        {
            lost += 1;
            let warning = format!("{failure}; the backup was begun anew, with another instant");
            tracing::warn!(%vm, "{failure}; the backup begins anew");
            told.push(warning);
        } else if let BackupError::Sidecar(failure) = &*error
            && failure.code == FailureCode::GaveWay
            && let Some(first) = options.retry_after
            && gave_way < MAX_RETRIES
            && again.is_some()
        {
            let wait = first.saturating_mul(1 << gave_way);
            gave_way += 1;
            let seconds = wait.as_secs();
            tracing::warn!(%vm, "{failure}; what has come is kept, and the backup begins anew in {seconds} s");
            told.push(format!("{failure}; the backup was begun anew after {seconds} s, with another instant"));
            let waiting = async {
                tokio::time::sleep(wait).await;
                Ok(())
            };
            if let Err(stop) = stoppable(&mut interrupted, waiting).await {
                *error = stop;
                break;
            }
        } else if let Some(plan) = plan
            && let Some(found) = doubt(&repo, &vm, error, plan, options.audit_permille > 0).await?
        {
            tracing::error!(%vm, "{}", found.told);
            // Who asked for nothing but an incremental gets the failure.
            let known = distrusted.iter().any(|before| before.disk == found.disk);
            if known || options.level == LevelChoice::Incremental {
                break;
            }
            told.push(found.told.clone());
            distrusted.push(found);
        } else {
            break;
        }
        let Some(again) = again.clone() else { break };
        stored = match stoppable(&mut interrupted, async { Ok(again.open().await?) }).await {
            Ok(sidecar) => store(sidecar, &repo, &anew, &distrusted, &mut progress, &mut interrupted).await,
            Err(error) => Err(error.into()),
        };
    }
    if let Ok(stored) = &mut stored {
        stored.warnings.append(&mut told);
    }
    let mut report = match stored.map_err(|failed| failed.error) {
        Ok(stored) => manifest::commit(&repo, stored).await,
        Err(error) => Err(error),
    };
    if here.is_none() {
        comeback::forget(&repo, &vm).await;
    }
    if let Ok(report) = &report {
        about.point = Some(report.point.to_string());
        about.level = report.level.name().to_owned();
    }
    let result = report.as_ref().map(drop).map_err(ToString::to_string);
    let warnings = program::after(&options.hooks, Phase::Backup, &about, result).await;
    if let Ok(report) = &mut report {
        report.warnings.extend(warnings);
    }
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

/// A disk that does not go on from the point before.
struct Distrusted {
    disk: String,
    /// Why: the reason of its scan.
    reason: String,
    /// The same with what follows from it, for the operator.
    told: String,
}

/// A backup that failed, with what it asked for, if it came so far.
struct Failed {
    error: BackupError,
    plan: Option<Plan>,
}

impl<E: Into<BackupError>> From<E> for Failed {
    fn from(error: E) -> Self {
        Self { error: error.into(), plan: None }
    }
}

/// Whether a backup failed by what one disk goes on from, and may start over without that. Where an audit found tracking
/// wrong, the points that rest on it are marked; `audits` says whether one was asked for.
async fn doubt(
    repo: &Repository,
    vm: &str,
    error: &BackupError,
    plan: &mut Plan,
    audits: bool,
) -> Result<Option<Distrusted>, BackupError> {
    match error {
        BackupError::BaseLost { disk, source } => {
            let reason = format!("the restore point that it goes on from is damaged: {source}");
            let told = format!("disk {disk}: {reason}");
            Ok(Some(Distrusted { disk: disk.clone(), reason, told }))
        }
        // Who was not asked for an audit has none to tell of.
        BackupError::Sidecar(failure) if failure.code == FailureCode::AuditMismatch && audits => {
            let Some(disk) = failure.disk.clone() else { return Ok(None) };
            let marked = distrust(repo, vm, &disk, plan, &failure.message).await?;
            let reason = format!("an audit failed: {}", failure.message);
            let are = if marked == 1 { "restore point of the VM is" } else { "restore points of the VM are" };
            let told = format!("{reason}; {marked} {are} marked as suspect");
            Ok(Some(Distrusted { disk, reason, told }))
        }
        _ => Ok(None),
    }
}

/// Marks the points that rest on what an audit found wrong. Gives their number.
async fn distrust(
    repo: &Repository,
    vm: &str,
    disk: &str,
    plan: &mut Plan,
    reason: &str,
) -> Result<usize, BackupError> {
    let Some(base) = plan.distrust(disk, reason) else { return Ok(0) };
    let (repo, vm, disk, reason) = (repo.clone(), vm.to_owned(), disk.to_owned(), reason.to_owned());
    Ok(blocking(move || audit::distrust(&repo, &vm, &disk, &base, &reason)).await??)
}

/// All steps before the manifest.
async fn store(
    mut sidecar: Sidecar,
    repo: &Repository,
    options: &BackupOptions,
    distrusted: &[Distrusted],
    progress: &mut impl FnMut(Progress),
    interrupted: &mut watch::Receiver<bool>,
) -> Result<transfer::Stored, Failed> {
    let (started, clock) = (Timestamp::now(), Instant::now());
    let vm = sidecar.vm().to_owned();
    let here = sidecar.here().is_some();
    let again = sidecar.again();
    let mut warnings = vec![];
    let ready = match stoppable(interrupted, go_on(&mut sidecar, repo, options, &mut warnings)).await? {
        Some(ready) => ready,
        None => begin_new(sidecar, repo, options, distrusted, interrupted).await?,
    };
    let Ready { mut session, writer, wish, log } = ready;
    if let Some(log) = log {
        writer.get()?.log_session(log);
    }
    fault::point("backup.begun");
    let prepared = clock.elapsed();
    let chunk_bytes = repo.config().chunk_bytes;
    let plan = wish.plan.clone();
    let over = match &mut session.lasting {
        Some(Lasting::Client { over, .. }) => over.take(),
        _ => None,
    };
    let limit = options.limit_rate.map(Limit::new);
    let files = Files { from: again, vm: &vm, repo };
    let storing = transfer::run(session, writer, wish, (chunk_bytes, limit), here, files, progress);
    let stored = stoppable(interrupted, storing).await;
    if stored.is_err() {
        if let Some(over) = over {
            // The sidecar hears that nobody will come back, and need not hold the fleece.
            let _ = timeout(LEAVES_WITHIN, over).await;
        }
        comeback::forget(repo, &vm).await;
    }
    let mut stored = stored.map_err(|error| Failed { error, plan: Some(plan) })?;
    fault::point("backup.stored");
    stored.warnings.append(&mut warnings);
    stored.head = transfer::Head { vm, started, level: options.level, prepared, clock, over_a_connection: !here };
    Ok(stored)
}

/// A session that is open, and what is to be done with it.
struct Ready {
    session: Session,
    writer: transfer::OpenWriter,
    wish: transfer::Wish,
    log: Option<SessionLog>,
}

/// Goes on with the session of a backup of the same VM that was killed, if there is one and it can be had.
async fn go_on(
    sidecar: &mut Sidecar,
    repo: &Repository,
    options: &BackupOptions,
    warnings: &mut Vec<String>,
) -> Result<Option<Ready>, BackupError> {
    let (Some(again), false) = (sidecar.again(), sidecar.here().is_some()) else { return Ok(None) };
    let Some((memory, left)) = comeback::find(repo, sidecar.vm()).await else { return Ok(None) };
    let chunk_bytes = repo.config().chunk_bytes;
    let left = Arc::new(left);
    let trying = async {
        if !memory.is_of(options, chunk_bytes) {
            return Err(Failure::new(FailureCode::SessionGone, "it was to be another kind of backup").into());
        }
        let writer = transfer::open_writer(repo, options.compression).await?;
        if !comeback::is_whole(left.clone(), &memory.begun, chunk_bytes, writer.get()?.reader()).await? {
            return Err(Failure::new(FailureCode::SessionGone, "what it had stored is not all there").into());
        }
        let (reader, plan) = (writer.get()?.reader(), memory.plan.clone());
        if let Some((disk, source)) = blocking(move || lost::find(&reader, &plan)).await? {
            let message = format!("what disk {disk:?} goes on from is damaged: {source}");
            return Err(Failure::new(FailureCode::SessionGone, message).into());
        }
        let session = again.open().await?.begin_again(memory.begin.clone(), &memory.begun).await?;
        let log = left.go_on()?;
        Ok::<_, BackupError>((session, writer, Some(log)))
    };
    match trying.await {
        Ok((session, writer, log)) => {
            let warning = "an earlier backup was killed; this one went on with its point in time".to_owned();
            tracing::warn!(vm = sidecar.vm(), "{warning}");
            warnings.push(warning);
            let wish = transfer::Wish { plan: memory.plan, picked: memory.picked, left: Some(left) };
            Ok(Some(Ready { session, writer, wish, log }))
        }
        Err(error) => {
            tracing::warn!(vm = sidecar.vm(), "an earlier backup was killed, and all begins anew: {error}");
            sidecar.leave(&memory.begin).await;
            comeback::forget(repo, sidecar.vm()).await;
            Ok(None)
        }
    }
}

/// Begins a session.
async fn begin_new(
    mut sidecar: Sidecar,
    repo: &Repository,
    options: &BackupOptions,
    distrusted: &[Distrusted],
    interrupted: &mut watch::Receiver<bool>,
) -> Result<Ready, Failed> {
    let (plan, mut begin) = stoppable(interrupted, choose(&mut sidecar, repo, options, distrusted)).await?;
    // Before the instant: it may have work to do for a writer that died.
    let writer = stoppable(interrupted, transfer::open_writer(repo, options.compression)).await?;
    let reader = writer.get()?.reader();
    let looking = blocking(move || (lost::find(&reader, &plan), reader, plan));
    let (lost, reader, plan) = stoppable(interrupted, looking).await?;
    if let Some((disk, source)) = lost {
        return Err(Failed { error: BackupError::BaseLost { disk, source }, plan: Some(plan) });
    }
    let permille = options.audit_permille;
    let picking = blocking(move || {
        let (audit, picked) = audit::pick(&reader, &plan, permille);
        (audit, transfer::Wish { plan, picked, left: None })
    });
    let (audit, wish) = stoppable(interrupted, picking).await?;
    begin.audit = audit;
    let here = sidecar.here().is_some();
    begin.resume = (!here).then(Token::random);
    let beginning = async { Ok(sidecar.begin(begin.clone()).await?) };
    let session = match here {
        // Never given up half-way, with the guest stopped; it takes a moment.
        true => beginning.await?,
        false => stoppable(interrupted, beginning).await?,
    };
    let log = match &session.lasting {
        Some(_) => {
            let (plan, picked) = (wish.plan.clone(), wish.picked.clone());
            comeback::remember(repo, options, begin, session.begun.clone(), plan, picked).await?
        }
        None => None,
    };
    Ok(Ready { session, writer, wish, log })
}
