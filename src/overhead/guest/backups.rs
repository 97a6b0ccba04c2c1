//! The methods: what is done to the machine while fio runs in its guest.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::super::about::Busy;
use super::super::error::OverheadError;
use super::super::figures::Figures;
use super::super::load::Workload;
use super::super::method::{Case, Method};
use super::super::ours::{Drained, drain};
use super::super::report::{Backup, Run};
use super::GuestOptions;
use super::error::GuestError;
use super::fio::{Fio, Task};
use super::inside::Inside;
use crate::grade::Policy;
use crate::impact::Budget;
use crate::limits::MIN_CHUNK_BYTES;
use crate::units::CheckpointId;
use crate::vm::Vm;
use crate::wire::message::{Begin, Session};

/// Of what is left of fio's run when a backup has begun, the backup is to take so much.
const COVERS: f64 = 0.9;
/// Of fio's run so much may be over before the backup begins.
const BEGINS_BEFORE: f64 = 1.0 / 3.0;
/// How much longer than fio a backup may be read, should fio not end.
const AT_LAST: Duration = Duration::from_secs(120);

/// One run to be.
pub struct Measure<'a> {
    /// The machine.
    pub vm: &'a Vm,
    /// How it is measured.
    pub options: &'a GuestOptions,
    /// The guest's fio.
    pub fio: &'a Fio,
    /// What the guest does.
    pub workload: Workload,
    /// What is done to it.
    pub case: Case,
    /// Counts from 1.
    pub round: u32,
    /// For the choice of blocks.
    pub seed: u64,
}

impl Measure<'_> {
    /// Before, during, after. Nothing of ours is in QEMU then.
    pub async fn run(&self, inside: &mut Inside) -> Result<Run, GuestError> {
        let done = self.phases(inside).await;
        // The end of all: whoever called takes everything back.
        if done.as_ref().is_err_and(|error| !error.is_of_method()) {
            return done;
        }
        self.vm.idle().await;
        // After an error a fio may be left, which the next method must not meet.
        if done.is_err() {
            inside.stop_fio().await?;
        }
        self.detach().await?;
        done
    }

    async fn phases(&self, inside: &mut Inside) -> Result<Run, GuestError> {
        let busy = Busy::beside(self.vm.qemu_pid());
        let (before, beside) = inside.fio(self.fio, self.load(0, self.options.before())).await?;
        let (during, backup) = match self.case.method {
            Method::Bitmap => {
                self.checkpoint(inside).await?;
                self.undisturbed(inside).await?
            }
            Method::Fleece => self.backup(inside, BTreeMap::new(), beside).await?,
            Method::Incremental => {
                let since = self.checkpoint(inside).await?;
                inside.fio(self.fio, Task::Dirty).await?;
                self.backup(inside, since, beside).await?
            }
            _ => self.undisturbed(inside).await?,
        };
        if self.case.method == Method::Bitmap {
            self.detach().await?;
        }
        let (after, _) = inside.fio(self.fio, self.load(2, self.options.after())).await?;
        Ok(Run {
            workload: self.workload.name(),
            method: self.case.method.name(),
            reader_bytes_per_second: self.case.reader,
            round: self.round,
            before: before.figures,
            during,
            after: after.figures,
            backup,
            failed_requests: 0,
            others_cores: busy.others_since(),
            course: vec![],
        })
    }

    async fn detach(&self) -> Result<(), GuestError> {
        self.vm.detach(false).await.map(drop).map_err(GuestError::Machine)
    }

    fn load(&self, phase: u64, lasts: Duration) -> Task {
        let depth = self.options.depth;
        Task::Load { workload: self.workload, depth, lasts, seed: self.seed * 3 + phase }
    }

    /// A phase without a backup.
    async fn undisturbed(&self, inside: &mut Inside) -> Result<(Figures, Backup), GuestError> {
        let (said, _) = inside.fio(self.fio, self.load(1, self.options.during() / 2)).await?;
        let took_s = said.figures.seconds;
        Ok((said.figures, Backup { took_s, finished: true, ..Backup::default() }))
    }

    fn begin(&self) -> Begin {
        Begin {
            vm: self.vm.name().to_owned(),
            exclude: self.options.exclude.clone(),
            chunk_bytes: MIN_CHUNK_BYTES * 2,
            checkpoint: true,
            budget: Budget { max_read_rate: self.case.reader, ..Budget::default() },
            ..Begin::default()
        }
    }

    async fn session(&self, inside: &mut Inside, begin: Begin) -> Result<Session, GuestError> {
        // A session that freezes asks the agent itself.
        inside.let_go();
        Ok(inside.unless_interrupted(self.vm.begin(begin)).await??)
    }

    /// Has writes recorded from now on. Gives the checkpoints by disk.
    async fn checkpoint(&self, inside: &mut Inside) -> Result<BTreeMap<String, CheckpointId>, GuestError> {
        let begin = Begin { freeze: Some(Policy::Never), ..self.begin() };
        let session = self.session(inside, begin).await?;
        let each = session.begun.disks.iter().filter_map(|disk| Some((disk.disk.name.clone(), disk.checkpoint?)));
        let checkpoints = each.collect();
        // Nobody reads it: the point in time is let go, and the bitmaps stay.
        drop(session);
        self.vm.idle().await;
        Ok(checkpoints)
    }

    /// A backup under fio.
    async fn backup(
        &self,
        inside: &mut Inside,
        since: BTreeMap<String, CheckpointId>,
        beside: Duration,
    ) -> Result<(Figures, Backup), GuestError> {
        let lasts = self.options.during();
        let started = Instant::now();
        let running = inside.start_fio(self.fio, self.load(1, lasts)).await?;
        inside.let_go();
        inside.pause(beside.min(lasts.mul_f64(BEGINS_BEFORE))).await?;
        let began = Instant::now();
        let incremental_only = !since.is_empty();
        let mut session = self.session(inside, Begin { since, incremental_only, ..self.begin() }).await?;
        let needed: u64 = session.begun.disks.iter().map(|disk| disk.needed_bytes).fold(0, u64::saturating_add);
        let left_s = lasts.saturating_sub(started.elapsed()).as_secs_f64() * COVERS;
        let rate = ((needed as f64 / left_s.max(0.1)) as u64).max(1);

        let mut drained = Drained::default();
        let mut ended = None;
        let fio = {
            let reading = async {
                drain(&mut session, &mut drained, Instant::now() + lasts + AT_LAST, Some(rate)).await?;
                drop(session);
                self.vm.idle().await;
                Ok::<_, OverheadError>(Instant::now())
            };
            let (mut reading, mut fio) = (std::pin::pin!(reading), std::pin::pin!(inside.figures(running)));
            loop {
                tokio::select! {
                    fio = &mut fio => break fio,
                    read = &mut reading, if ended.is_none() => ended = Some(read?),
                }
            }
        };
        // Whoever has not ended is broken off: the session was dropped with its reader.
        self.vm.idle().await;
        let took_s = ended.unwrap_or_else(Instant::now).duration_since(began).as_secs_f64();
        let Drained { bytes: read_bytes, copied_bytes, finished } = drained;
        Ok((fio?.figures, Backup { took_s, finished, read_bytes, copied_bytes }))
    }
}
