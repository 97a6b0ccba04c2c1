//! livebackup's own backups, through the library, as its client would make them.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::time::timeout_at;

use super::error::OverheadError;
use super::method::{Bench, Outcome, keep_pace};
use super::rig::{DISK, WorkDir};
use crate::extent::Extent;
use crate::impact::Budget;
use crate::limits::{MAX_DISCARD_BYTES, MIN_CHUNK_BYTES};
use crate::monitor::Address;
use crate::units::MIB;
use crate::vm::{Vm, VmOptions};
use crate::wire::message::{Ack, Begin, Event, Session};

/// Of the disk so much is dirty for an incremental.
const DIRTY_SHARE: u64 = 16;
/// How long the guest writes there before.
const DIRTIES_FOR: Duration = Duration::from_millis(300);
/// What may still be on its way to a client that takes no more.
const ON_THE_WAY_BYTES: u64 = 64 * MIB;
/// Discards of what was acknowledged take a fraction of that.
const DISCARDED_WITHIN: Duration = Duration::from_millis(500);

/// Takes the machine, as the service does when it starts.
pub async fn attach(work: &WorkDir, scratch: &Path) -> Result<Vm, OverheadError> {
    let options = VmOptions {
        state: work.path("state"),
        scratch: Some(scratch.to_owned()),
        name: Some("overhead".into()),
        ..VmOptions::default()
    };
    let vm = Vm::attach(&Address::Unix(work.path("qmp")), options).await?;
    vm.watch_latency().await;
    Ok(vm)
}

fn begin(rate: Option<u64>) -> Begin {
    Begin {
        vm: "overhead".into(),
        chunk_bytes: MIN_CHUNK_BYTES * 2,
        checkpoint: true,
        budget: Budget { max_read_rate: rate, ..Budget::default() },
        ..Begin::default()
    }
}

/// What a reader has had.
#[derive(Debug, Default)]
pub(super) struct Drained {
    /// How much.
    pub bytes: u64,
    /// What was copied to scratch.
    pub copied_bytes: Option<u64>,
    /// Whether that was all.
    pub finished: bool,
}

/// Reads a session to its end, or to the deadline; takes no more than `rate` in a second.
pub(super) async fn drain(
    session: &mut Session,
    drained: &mut Drained,
    deadline: Instant,
    rate: Option<u64>,
) -> Result<(), OverheadError> {
    let began = Instant::now();
    while let Ok(event) = timeout_at(deadline.into(), session.events.recv()).await {
        let (disk, extent) = match event {
            Some(Ok(Event::Data { disk, offset_bytes, bytes })) => {
                (disk, Extent::new(offset_bytes, bytes.len() as u64))
            }
            Some(Ok(Event::Packed { disk, offset_bytes, packed })) => {
                (disk, Extent::new(offset_bytes, packed.raw_len().into()))
            }
            Some(Ok(Event::Zero { disk, extent } | Event::Same { disk, extent })) => (disk, extent),
            Some(Ok(Event::Sent)) => continue,
            Some(Ok(Event::End(totals))) => {
                drained.finished = true;
                let copied = totals.impact.iter().map(|disk| disk.impact.copied_bytes);
                drained.copied_bytes = copied.reduce(u64::saturating_add);
                break;
            }
            Some(Err(failure)) => return Err(failure.into()),
            None => return Err(OverheadError::Panicked),
        };
        drained.bytes += extent.len_bytes;
        // As the client does in one process. Who has ended takes no more.
        let _ = session.acks.send(Ack { disk, extents: vec![extent] });
        keep_pace(began, drained.bytes, rate).await;
    }
    Ok(())
}

/// A full.
pub async fn full(bench: &Bench<'_>, vm: &Vm) -> Result<Outcome, OverheadError> {
    let began_ns = bench.load.now_ns();
    one(bench, vm, began_ns, begin(bench.reader)).await
}

async fn one(bench: &Bench<'_>, vm: &Vm, began_ns: u64, begin: Begin) -> Result<Outcome, OverheadError> {
    let session = vm.begin(begin).await?;
    to_the_end(bench, vm, began_ns, session).await
}

async fn to_the_end(bench: &Bench<'_>, vm: &Vm, began_ns: u64, mut session: Session) -> Result<Outcome, OverheadError> {
    let deadline = bench.deadline();
    let mut drained = Drained::default();
    drain(&mut session, &mut drained, deadline, None).await?;
    drop(session);
    vm.idle().await;
    let Drained { bytes: read_bytes, copied_bytes, finished } = drained;
    Ok(Outcome { began_ns, ended_ns: bench.load.now_ns(), finished, read_bytes, copied_bytes })
}

/// An incremental: a full before it, while the guest rests; then some writes to one part of the disk. It is read for about
/// half of the time, as by a client that has other work: else it would be over before anything could be seen.
///
/// `quiet`: the guest rests at the instant, as when its agent has frozen its file systems; the time of that is not measured.
pub async fn incremental(bench: &Bench<'_>, vm: &Vm, quiet: bool) -> Result<Outcome, OverheadError> {
    bench.load.hold(true).await?;
    let mut session = vm.begin(begin(None)).await?;
    let checkpoint = session.begun.disks.first().and_then(|disk| disk.checkpoint);
    drain(&mut session, &mut Drained::default(), Instant::now() + Duration::from_secs(3600), None).await?;
    drop(session);
    vm.idle().await;
    let blocks = bench.options.blocks();
    bench.load.stay_below(blocks / DIRTY_SHARE);
    bench.load.hold(false).await?;
    tokio::time::sleep(DIRTIES_FOR).await;
    bench.load.hold(true).await?;
    bench.load.stay_below(blocks);
    let since = checkpoint.map(|id| (DISK.to_owned(), id));
    let needed_bytes = bench.options.size_bytes / DIRTY_SHARE;
    let slow = (needed_bytes as f64 / (bench.options.during().as_secs_f64() / 2.0)) as u64;
    let rate = bench.reader.unwrap_or(slow).max(MIB);
    let begin = Begin { since: BTreeMap::from_iter(since), incremental_only: true, ..begin(Some(rate)) };
    if !quiet {
        bench.load.hold(false).await?;
        let began_ns = bench.load.now_ns();
        return one(bench, vm, began_ns, begin).await;
    }
    let session = vm.begin(begin).await?;
    let began_ns = bench.load.now_ns();
    bench.load.hold(false).await?;
    to_the_end(bench, vm, began_ns, session).await
}

/// The second half of a full, for a guest that writes only to the first: the client has all of that, and has said so.
pub async fn acknowledged(bench: &Bench<'_>, vm: &Vm) -> Result<Outcome, OverheadError> {
    bench.load.hold(true).await?;
    let mut session = vm.begin(begin(None)).await?;
    let half = bench.options.size_bytes / 2 / MAX_DISCARD_BYTES * MAX_DISCARD_BYTES;
    let mut read_bytes = 0;
    while read_bytes < (half + ON_THE_WAY_BYTES).min(bench.options.size_bytes / 4 * 3) {
        match session.events.recv().await {
            Some(Ok(Event::Data { bytes, .. })) => read_bytes += bytes.len() as u64,
            Some(Ok(Event::Zero { extent, .. })) => read_bytes += extent.len_bytes,
            Some(Ok(_)) => break,
            Some(Err(failure)) => return Err(failure.into()),
            None => return Err(OverheadError::Panicked),
        }
    }
    let _ = session.acks.send(Ack { disk: 0, extents: vec![Extent::between(0, half)] });
    tokio::time::sleep(DISCARDED_WITHIN).await;
    let began_ns = bench.load.now_ns();
    bench.load.hold(false).await?;
    tokio::time::sleep(bench.options.during() / 2).await;
    let ended_ns = bench.load.now_ns();
    let copied_bytes = vm.status().await.session.map(|session| session.scratch_bytes);
    drop(session);
    vm.idle().await;
    Ok(Outcome { began_ns, ended_ns, finished: true, read_bytes, copied_bytes })
}
