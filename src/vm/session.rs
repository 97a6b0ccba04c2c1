//! A session: from a client's request to its last event.
//!
//! Opening and running are tasks of their own: a caller that goes away in the middle must not leave the guest stopped or a
//! fleece behind.
//!
//! ```text
//!  open ──► run ──► close sources ──► scratch answers? ──► undo ──► over
//!  ╰── under watch: scratch, monitor ─╯      ╰── no, or stuck: again, with pauses; after a while in the background
//! ```
//!
//! From the proof of the instant on, scratch and monitor are watched: whatever is wrong ends the session. What ends it in
//! the middle of opening leaves what a crash there would leave, and the same undo takes it out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::{OwnedMutexGuard, mpsc, oneshot};

use super::compare::Compared;
use super::fleece::{Bench, Fleece, FleeceDisk};
use super::meter::Meter;
use super::pace::Pace;
use super::place::not_kept;
use super::quiet::{Quiet, QuietOptions};
use super::scratch::{Scratch, ScratchDir};
use super::sending::{self, FromClient, Outlet};
use super::transfer::{self, Needed, ReadyDisk};
use super::{Inner, Vm, areas, internal, qemu_failed, select, tracking, undo};
use crate::checkpoint::Bitmap;
use crate::grade::{Evidence, Policy};
use crate::hooks::program::{self, About, Phase};
use crate::machine::{FoundDisk, Taken};
use crate::monitor::MonitorError;
use crate::units::EpochId;
use crate::wire::message::{Begin, Begun, BegunDisk, Event, Failure, FailureCode, Session, SessionStatus, Totals};
use crate::wire::resume::{Lasting, Line};

/// How often the scratch is looked at.
const WATCH_EVERY: Duration = Duration::from_millis(100);
/// How often the monitor is asked whether QEMU still answers, and how long it may take: no command may take longer.
const ASK_EVERY: Duration = Duration::from_secs(2);
const ANSWERS_WITHIN: Duration = Duration::from_secs(30);
const QEMU_ENDED: &str = "QEMU ended, or closed its monitor, during the backup";
/// How much later than its other sockets QEMU's monitor may close.
const CLOSES_WITHIN: Duration = Duration::from_millis(200);
/// How long a scratch may take to answer before it counts as hung.
const SCRATCH_ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// How long a session's end waits for QEMU to let everything go; then it is tried in the background.
const CLEAN_UP_WITHIN: Duration = Duration::from_secs(30);
/// Between two tries: from the one to the other, twice as long each time.
const TRY_AGAIN_AFTER: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How often the guest's latency is read for whoever watches.
const READ_EVERY: Duration = Duration::from_secs(1);

/// What an instant leaves.
struct Opened {
    fleece: Fleece,
    disks: Vec<(ReadyDisk, BegunDisk)>,
    left_out: Vec<FoundDisk>,
    /// What the guest's state rests on.
    evidence: Evidence,
    meter: Meter,
    pace: Arc<Pace>,
}

impl Vm {
    /// Opens a fleece and starts to send. The session ends when its events have been taken, or are dropped; a caller that
    /// goes away before there is one ends it too.
    pub async fn begin(&self, begin: Begin) -> Result<Session, Failure> {
        let guard = self.claim_for_session().await?;
        let (reply, answer) = oneshot::channel();
        let vm = self.clone();
        tokio::spawn(async move { vm.session(begin, reply, guard).await });
        answer.await.map_err(|_| internal("the session's task ended before its instant; the log says why"))?
    }

    async fn session(
        &self,
        begin: Begin,
        reply: oneshot::Sender<Result<Session, Failure>>,
        guard: OwnedMutexGuard<()>,
    ) {
        let start = Instant::now();
        let (hooks, about) = (&self.inner.options.quiet.hooks, self.about(&begin));
        let opened = match program::before(hooks, Phase::Session, &about).await {
            Ok(()) => self.open(&begin).await,
            Err(why) => Err(Failure::new(FailureCode::Refused, why)),
        };
        let Opened { fleece, disks, left_out, mut evidence, meter, pace } = match opened {
            Ok(opened) => opened,
            Err(failure) => {
                self.set_last(start, 0, Some(&failure));
                program::after(hooks, Phase::Session, &about, Err(failure.message.clone())).await;
                // Who hears of it may ask again at once.
                drop(guard);
                self.count_session();
                let _ = reply.send(Err(failure));
                return;
            }
        };
        let prepare_us = start.elapsed().as_micros() as u64;
        let (ready, disks): (Vec<_>, Vec<_>) = disks.into_iter().unzip();
        evidence.stopped_us = fleece.stopped.as_micros() as u64;
        let begun = Begun {
            machine: self.inner.machine.clone(),
            instant: fleece.instant,
            disks,
            left_out,
            stopped_us: evidence.stopped_us,
            evidence: Box::new(evidence),
        };
        let needed_bytes = begun.disks.iter().map(|d| d.needed_bytes).sum();
        let progress = SessionStatus {
            instant: begun.instant,
            needed_bytes,
            sent_bytes: 0,
            scratch_bytes: 0,
            running_ms: 0,
            client: None,
            lost: None,
            connections: None,
            impact: vec![],
        };
        self.set_progress(|p| *p = Some(progress));
        self.tell_progress();
        let scans = begun.disks.iter().any(|disk| matches!(disk.taken, Taken::Scan { .. }));
        let (mut outlet, Line { events, digests }) = Outlet::open(scans);
        let (acks, acks_heard) = mpsc::unbounded_channel();
        let (lasting, words) = begin.resume.map(|_| mpsc::unbounded_channel()).unzip();
        let lasting = lasting.map(Lasting::Sidecar);
        // When nobody waits for it any more, the session is dropped here, and running it closes the fleece at once.
        let _ = reply.send(Ok(Session { begun, events, acks, digests, lasting }));
        let totals = Totals { prepare_us, ..Totals::default() };
        let mut last = self.run((fleece, meter, pace), ready, &mut outlet, (acks_heard, words), totals).await;
        let result = last.as_ref().map(drop).map_err(|failure| failure.message.clone());
        let warnings = program::after(hooks, Phase::Session, &about, result).await;
        if let Ok(Event::End(totals)) = &mut last {
            totals.warnings.extend(warnings);
        }
        let sent_bytes = match &last {
            Ok(Event::End(totals)) => totals.data_bytes + totals.zero_bytes,
            _ => 0,
        };
        self.set_last(start, sent_bytes, last.as_ref().err());
        // The VM is free; a client that takes its time with the last word keeps nobody waiting.
        drop(guard);
        self.count_session();
        outlet.last(last).await;
    }

    fn count_session(&self) {
        self.inner.sessions.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// Resolves when the session must end for the machine's sake.
    async fn told_to_give_up(&self) -> Failure {
        let mut receiver = self.inner.give_up.subscribe();
        match receiver.wait_for(Option::is_some).await.map(|why| *why) {
            Ok(Some(why)) => Failure::new(FailureCode::Qemu, why),
            _ => std::future::pending().await,
        }
    }

    /// Opens a fleece, or leaves nothing.
    async fn open(&self, begin: &Begin) -> Result<Opened, Failure> {
        let Inner { options, .. } = &*self.inner;
        let dir = options.scratch.clone().unwrap_or_else(|| options.state.join("scratch"));
        let scratch = Scratch::new(ScratchDir::open(&dir, options.scratch_budget_bytes)?);
        match self.open_with(begin, scratch.clone()).await {
            Ok(opened) => Ok(opened),
            Err(failure) => {
                let failure = self.explained(failure).await;
                for warning in self.tear_down(&scratch, true).await {
                    tracing::error!(vm = self.inner.name, "{warning}");
                }
                Err(failure)
            }
        }
    }

    /// Says so of a failure that the end of QEMU brought about: a socket of its may tell of that before its monitor does.
    async fn explained(&self, failure: Failure) -> Failure {
        let may_be = matches!(failure.code, FailureCode::Qemu | FailureCode::Internal | FailureCode::Broken);
        let is_said = failure.message.starts_with(QEMU_ENDED);
        if !may_be || is_said || tokio::time::timeout(CLOSES_WITHIN, self.closed()).await.is_err() {
            return failure;
        }
        Failure { message: format!("{QEMU_ENDED} ({})", failure.message), ..failure }
    }

    async fn open_with(&self, begin: &Begin, scratch: Scratch) -> Result<Opened, Failure> {
        let (monitor, names, capabilities) = self.inner.bench_parts.clone();
        let Inner { place, options, .. } = &*self.inner;
        if !capabilities.can_back_up() {
            return Err(Failure::new(
                FailureCode::Qemu,
                format!("this QEMU ({}) cannot do live backups:\n{capabilities}", capabilities.version),
            ));
        }
        let graph = self.found().await?;
        let skips = options.skip.iter().filter_map(|skip| skip.disk.as_deref());
        let unknown = skips.filter(|name| graph.disk(name).is_none());
        let unknown: Vec<_> =
            unknown.map(|name| format!("nothing is left out of disk {name:?}: there is none")).collect();
        let chosen = select::disks(&graph.disks, begin)?;
        let at_work: Vec<_> =
            graph.foreign.iter().filter(|f| chosen.iter().any(|d| d.name == f.disk)).map(ToString::to_string).collect();
        if !at_work.is_empty() {
            return Err(Failure::new(
                FailureCode::Busy,
                format!(
                    "something else is at work: {}; wait until it is done, or leave the disk out with --exclude",
                    at_work.join("; ")
                ),
            ));
        }
        let mut plans = vec![];
        let mut reasons = vec![];
        for (mut plan, reason) in self.plans(begin, &graph).await? {
            if begin.checkpoint {
                if let Some(reason) = &reason {
                    plan.log.end_epoch(reason).map_err(not_kept)?;
                }
                tracking::recover(&monitor, &names, &graph, &plan.disk.node, &plan.log).await.map_err(qemu_failed)?;
            }
            reasons.push(reason.unwrap_or_default());
            plans.push(plan);
        }
        let chunk_bytes = u64::from(begin.chunk_bytes);
        let bench = Bench { monitor, names, capabilities, sockets: place.sockets.clone(), scratch };
        let disks: Vec<_> = plans.iter().map(|p| &p.disk).collect();
        let quiet_options = QuietOptions { freeze: self.freeze_policy(begin.freeze)?, ..options.quiet.clone() };
        let mut meter = self.meter(&plans).await;
        let written: Vec<_> = plans.iter().filter(|p| !p.disk.read_only).map(|p| p.disk.qom_path.as_str()).collect();
        let pace = Arc::new(Pace::prepare(options.budget.stricter(begin.budget), &self.inner.gauge, &written).await);
        let about = self.about(begin);
        let whole = plans.iter().any(|plan| plan.sealed.is_none() && !plan.disk.read_only);
        let mut quiet = Quiet::prepare(&bench.monitor, &bench.sockets, quiet_options, about, &disks, whole).await?;
        let scratch = bench.scratch.clone();
        // Not under watch: the guest may be quiet in it, and must not stay so. Each of its steps has a limit.
        let opened = Fleece::open(bench, plans, chunk_bytes, &mut quiet).await;
        self.set_held(quiet.holds());
        let mut fleece = opened?;
        let disks = tokio::select! {
            biased;
            disks = self.make_ready(&mut fleece, &reasons, begin, &pace) => disks?,
            broken = self.watch(&scratch, &mut meter) => return Err(broken),
        };
        let left_out =
            graph.disks.into_iter().filter(|d| !disks.iter().any(|(_, b)| b.disk.name == d.disk.name)).collect();
        crate::fault::point("vm.begun");
        let mut evidence = quiet.evidence();
        evidence.reasons.extend(unknown);
        Ok(Opened { fleece, disks, left_out, evidence, meter, pace })
    }

    /// Makes the checkpoints durable, and the disks readable.
    async fn make_ready(
        &self,
        fleece: &mut Fleece,
        reasons: &[String],
        begin: &Begin,
        pace: &Arc<Pace>,
    ) -> Result<Vec<(ReadyDisk, BegunDisk)>, Failure> {
        let (chunk_bytes, leaves_out) = (u64::from(begin.chunk_bytes), begin.areas.is_some());
        let mut shown = vec![];
        for (i, reason) in reasons.iter().enumerate() {
            let (epoch, needed) = self.settle(fleece, i, reason, chunk_bytes).await?;
            shown.push((epoch, transfer::show(fleece, i, needed, chunk_bytes, self.inner.options.transport).await?));
        }
        let mut disks = vec![];
        for ((epoch, shown), FleeceDisk { plan, .. }) in shown.into_iter().zip(&fleece.disks) {
            let mut ready = shown.connect(self.monitor(), chunk_bytes, pace.clone()).await?;
            let areas = match leaves_out {
                true => Some(areas::leave_out(self.monitor(), &mut ready, plan, &self.inner.options.skip).await?),
                false => None,
            };
            let needed_bytes = ready.needed.count_bytes();
            let begun = BegunDisk {
                disk: plan.disk.clone(),
                checkpoint: plan.track.next(),
                epoch,
                taken: plan.taken.clone(),
                needed_bytes,
                audited_chunks: plan.audit.len() as u64,
                areas,
            };
            disks.push((ready, begun));
        }
        Ok(disks)
    }

    /// Reads the guest's latency for the last time before the instant.
    async fn meter(&self, plans: &[tracking::Plan]) -> Meter {
        let gauge = &self.inner.gauge;
        let disks = || plans.iter().map(|p| (p.disk.name.as_str(), p.disk.qom_path.as_str()));
        let written: Vec<_> = plans.iter().filter(|p| !p.disk.read_only).map(|p| p.disk.qom_path.as_str()).collect();
        let (last, now) = gauge.switch_on(&written).await;
        Meter::new(disks(), &last, &now)
    }

    /// What the operator's hooks are told.
    fn about(&self, begin: &Begin) -> About {
        let level = match (begin.checkpoint, begin.since.is_empty()) {
            (false, _) => "copy",
            (true, true) => "full",
            (true, false) => "incremental",
        };
        About { vm: self.inner.name.clone(), level: level.into(), point: None }
    }

    /// What the client wants, within what the operator allows.
    fn freeze_policy(&self, wanted: Option<Policy>) -> Result<Policy, Failure> {
        match (self.inner.options.quiet.freeze, wanted) {
            (Policy::Never, Some(Policy::Require)) => Err(Failure::new(
                FailureCode::NotQuiet,
                "freezing this guest is switched off in the sidecar's configuration (freeze = \"never\")",
            )),
            (Policy::Never, _) => Ok(Policy::Never),
            (configured, wanted) => Ok(wanted.unwrap_or(configured)),
        }
    }

    /// Harvest, seal, forget; gives the needed set in whole chunks.
    async fn settle(
        &self,
        fleece: &mut Fleece,
        i: usize,
        reason: &str,
        chunk_bytes: u64,
    ) -> Result<(Option<EpochId>, Needed), Failure> {
        let harvest = fleece.harvest(i).await?;
        let (time, qemu) = (fleece.instant, self.inner.qemu.clone());
        let plan = &mut fleece.disks[i].plan;
        // Files of a few KiB, flushed: not worth a thread, and the fleece waits for nothing else.
        let epoch = tokio::task::block_in_place(|| tracking::settle(plan, harvest.as_ref(), time, &qemu, reason))?;
        let mut needed = match (&plan.sealed, &harvest) {
            (Some(sealed), Some(harvest)) => {
                let mut needed = sealed.clone();
                needed.union_with(harvest).map_err(internal)?;
                needed
            }
            _ => Bitmap::full(plan.disk.size_bytes),
        };
        let plan = &fleece.disks[i].plan;
        plan.known.left_out.iter().for_each(|extent| needed.set(*extent));
        needed.round_out(chunk_bytes);
        let compared = match plan.taken {
            Taken::Scan { .. } => Compared::All,
            _ => {
                // Audited chunks that were written are sent; the rest is compared.
                let clean: BTreeMap<_, _> =
                    plan.audited(chunk_bytes).filter(|(extent, _)| !needed.intersects(*extent)).collect();
                clean.keys().for_each(|extent| needed.set(*extent));
                let numbered = clean.into_iter().map(|(extent, digest)| (extent.offset_bytes / chunk_bytes, digest));
                Compared::Some(numbered.collect())
            }
        };
        fleece.forget_old(i).await?;
        Ok((epoch, Needed { bitmap: needed, compared }))
    }

    async fn run(
        &self,
        (mut fleece, mut meter, pace): (Fleece, Meter, Arc<Pace>),
        disks: Vec<ReadyDisk>,
        outlet: &mut Outlet,
        from_client: FromClient,
        mut totals: Totals,
    ) -> Result<Event, Failure> {
        let start = Instant::now();
        let scratch = fleece.bench().scratch.clone();
        let outcome = {
            let (to_sending, heard) = mpsc::channel(1);
            tokio::select! {
                biased;
                sent = self.send_all(&disks, outlet, heard, &mut totals) => sent,
                broken = self.watch(&scratch, &mut meter) => Err(broken),
                why = self.told_to_give_up() => Err(why),
                why = pace.keep(&self.inner.gauge) => Err(why),
                () = sending::listen(&disks, from_client, to_sending) => Err(transfer::left()),
            }
        };
        let outcome = match outcome {
            Err(failure) => Err(self.explained(failure).await),
            sent => sent,
        };
        totals.transfer_us = start.elapsed().as_micros() as u64;
        meter.look(&scratch.used_by_disk());
        totals.scratch_peak_bytes = meter.scratch_peak_bytes();
        crate::fault::point("vm.sent");
        if let Err(failure) = &outcome
            && failure.code == FailureCode::AuditMismatch
        {
            self.distrust(&mut fleece, failure);
        }
        totals.warnings = self.close(&scratch, disks, outcome.is_err()).await;
        totals.warnings.extend(pace.warnings());
        let readings = self.inner.gauge.read().await;
        totals.impact = meter.impact(&readings);
        self.inner.gauge.keep(readings);
        self.set_progress(|p| *p = None);
        self.tell_progress();
        if outcome.is_err() {
            // Nobody is told otherwise.
            totals.warnings.iter().for_each(|warning| tracing::warn!(vm = self.inner.name, "{warning}"));
        }
        tracing::info!(vm = self.inner.name, ?totals, "session over");
        outcome.map(|()| Event::End(totals))
    }

    /// Ends the epoch of the disk whose audit failed.
    fn distrust(&self, fleece: &mut Fleece, failure: &Failure) {
        tracing::error!(vm = self.inner.name, "{failure}");
        for disk in fleece.disks.iter_mut().filter(|d| failure.disk.as_ref() == Some(&d.plan.disk.name)) {
            // A file of a few hundred bytes, flushed. A log that cannot be written refuses the next seal, too.
            let ended = tokio::task::block_in_place(|| disk.plan.log.end_epoch(&failure.message));
            if let Err(error) = ended {
                tracing::error!(vm = self.inner.name, "an epoch that is not to be believed cannot be ended: {error}");
            }
        }
    }

    /// Looks at the scratch and the monitor until the fleece must let go.
    async fn watch(&self, scratch: &Scratch, meter: &mut Meter) -> Failure {
        let look = async {
            let mut read = Instant::now();
            loop {
                tokio::time::sleep(WATCH_EVERY).await;
                let by_disk = scratch.used_by_disk();
                meter.look(&by_disk);
                let used = by_disk.iter().sum();
                let is_time = read.elapsed() >= READ_EVERY;
                let impact = if is_time {
                    read = Instant::now();
                    Some(meter.impact(&self.inner.gauge.read().await))
                } else {
                    None
                };
                self.set_progress(|p| {
                    if let Some(p) = p {
                        p.scratch_bytes = used;
                        p.impact = impact.unwrap_or_else(|| std::mem::take(&mut p.impact));
                    }
                });
                if is_time {
                    self.tell_progress();
                }
                if let Some(why) = scratch.exhausted() {
                    return Failure::new(
                        FailureCode::NoSpace,
                        format!("the point in time was given up for the guest's sake: {why}"),
                    );
                }
            }
        };
        let ask = async {
            loop {
                tokio::time::sleep(ASK_EVERY).await;
                let answer = self.monitor().raw_within(ANSWERS_WITHIN, "query-status", json!({})).await;
                // A closed one is seen below.
                if let Err(silent @ MonitorError::Deadline { .. }) = answer {
                    return Failure::new(
                        FailureCode::Qemu,
                        format!("QEMU hangs or was stopped, and the backup was given up: {silent}"),
                    );
                }
            }
        };
        tokio::select! {
            failure = look => failure,
            failure = ask => failure,
            () = self.closed() => Failure::new(FailureCode::Qemu, QEMU_ENDED),
        }
    }

    /// Closes the sources and takes the fleece out of QEMU. Gives warnings.
    async fn close(&self, scratch: &Scratch, disks: Vec<ReadyDisk>, failed: bool) -> Vec<String> {
        let mut warnings = vec![];
        let mut after = vec![];
        for disk in disks {
            match Arc::into_inner(disk.source) {
                Some(transfer::Source::Vhost(source)) => {
                    if let Err(held) = source.close().await {
                        warnings.push(held.to_string());
                    }
                }
                Some(nbd) => after.push(nbd),
                None => {}
            }
        }
        crate::fault::point("vm.closing");
        warnings.extend(self.tear_down(scratch, failed).await);
        drop(after);
        warnings
    }

    /// Takes the fleece out of QEMU, as often as it takes. What does not go within [`CLEAN_UP_WITHIN`] is a warning, and is
    /// tried again in the background.
    async fn tear_down(&self, scratch: &Scratch, failed: bool) -> Vec<String> {
        let start = Instant::now();
        let mut pause = TRY_AGAIN_AFTER.0;
        let mut answer = scratch.release(failed);
        loop {
            let Err(failure) = self.try_to_clean_up(scratch, &mut answer).await else { return vec![] };
            if self.monitor().is_closed() {
                return vec![failure.message];
            }
            if start.elapsed() >= CLEAN_UP_WITHIN {
                tokio::spawn(self.clone().clean_up_later(scratch.clone(), answer));
                return vec![failure.message];
            }
            tracing::warn!(vm = self.inner.name, "trying again: {failure}");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(TRY_AGAIN_AFTER.1);
        }
    }

    /// Cleans up if the scratch has answered; asks it again for the next time if that fails, which also gives back what the
    /// filter has copied meanwhile.
    async fn try_to_clean_up(&self, scratch: &Scratch, answer: &mut oneshot::Receiver<()>) -> Result<(), Failure> {
        // The guest first, whatever else hangs.
        undo::resume(self.monitor(), &undo::Debts::new(&self.inner.place.sockets)).await.map_err(qemu_failed)?;
        if tokio::time::timeout(SCRATCH_ANSWERS_WITHIN, &mut *answer).await.is_err() {
            return Err(Failure::new(
                FailureCode::NoSpace,
                "the file system of the scratch does not answer; the broken filter stays above the disks until it does, since \
                 QEMU would hang with it: mend or unmount the file system, and name another directory with --scratch",
            ));
        }
        let cleaned = self.clean_up_now().await;
        // QEMU 7.2 keeps a passed descriptor while the guest does not run; its space need not be kept.
        *answer = scratch.release(cleaned.is_err());
        cleaned
    }

    /// Goes on trying until it is done, or another session does it, or QEMU is gone.
    async fn clean_up_later(self, scratch: Scratch, mut answer: oneshot::Receiver<()>) {
        while !self.monitor().is_closed() {
            tokio::time::sleep(TRY_AGAIN_AFTER.1).await;
            let Ok(_guard) = self.claim() else { return };
            match self.try_to_clean_up(&scratch, &mut answer).await {
                Ok(()) => return tracing::info!(vm = self.inner.name, "the fleece is out of QEMU at last"),
                Err(failure) => tracing::warn!(vm = self.inner.name, "{failure}"),
            }
        }
    }

    pub(super) async fn clean_up_now(&self) -> Result<(), Failure> {
        undo::remove_all(self.monitor(), self.names(), &self.inner.place.sockets).await.map(drop).map_err(Failure::from)
    }
}
