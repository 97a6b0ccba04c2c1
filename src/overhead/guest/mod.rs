//! What a backup costs the writes of a guest that is there already; `livebackup bench guest-writes`.
//!
//! [`write-overhead`](super) plays a guest on a QEMU of its own. This one measures somebody's own machine: fio runs in the guest,
//! started through the guest's agent ([`inside`]), on a file that is made for it, while livebackup backs the machine up and throws
//! away what it reads ([`backups`]).
//!
//! ```text
//!   attach ─► agent? fio? space? ─► the file is made and filled
//!   for each round, workload, method:    fio = before ─► (preparation) ─► fio + backup = during ─► fio = after ─► detach
//!   the end, whatever that is:           fio stopped, file removed, session closed, detach, state directory removed
//! ```
//!
//! **Time.** Each phase is one run of fio, by fio's own clock in the guest, and its figures are those that fio prints ([`fio`]).
//! So no clocks have to be compared. A run during a backup is started before the backup, so that the instant is in it, by as long
//! as fio took for anything but its run in the phase before; and the reader is slowed, if it has to be, so that the backup goes on
//! for nine tenths of what is left of that run. What is shorter than fio's run would be lost in it. A backup that has not ended
//! with fio's run is broken off. `took_s` beside the seconds of `during` says how much of the run had a backup.
//!
//! **Latencies** are fio's `lat`, from submission to completion, as of the driver of write-overhead; its percentiles are those of
//! a histogram, exact to 1/64.
//!
//! **Methods**: none; bitmap (livebackup's tracking, as between two backups); fleece (a full); incremental (of a quarter of the
//! file, and what else was written). Before each phase `before` nothing of ours is in QEMU.
//!
//! **Nothing is left.** The state directory is one of our own, so that what `livebackup` knows of the machine otherwise, and
//! bitmaps of its, are not touched; a running service has the machine's lock, and that is an error. fio has a time limit in all
//! its runs, and its file must not be there before. The file is removed and fio stopped in the end, after errors and Ctrl-C, too.
//! No step of that is cancelled by dropping it: who waits looks whether the user wants to stop. **A crash of ours** leaves the file
//! (fio ends by itself), and in QEMU what `livebackup detach --all` takes out; the guardian lets a guest go that stood still.
//!
//! What a guest says is a stranger's: numbers are looked at before they are used, texts are cut.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::Value;
use tokio::sync::watch;

pub mod backups;
pub mod error;
pub mod fio;
pub mod inside;
pub mod report;

use backups::Measure;
use error::GuestError;
use inside::Inside;
use report::{GuestReport, GuestSettings, words};

use super::Progress;
use super::about::{self, About, Busy};
use super::load::Workload;
use super::method::{Case, Method};
use super::report::summaries;
use super::rig::WorkDir;
use crate::agent;
use crate::grade::Policy;
use crate::monitor::Address;
use crate::vm::{QuietOptions, Transport, Vm, VmOptions};

/// What can be done to a machine that is somebody's.
pub const METHODS: [Method; 4] = [Method::Nothing, Method::Bitmap, Method::Fleece, Method::Incremental];
/// The smallest file.
pub const MIN_SIZE_BYTES: u64 = 1 << 20;
/// The most of a guest's file system that is measured on.
pub const MAX_SIZE_BYTES: u64 = 64 << 30;

/// What is measured, and how.
#[derive(Clone, Debug)]
pub struct GuestOptions {
    /// The machine's monitor.
    pub monitor: Address,
    /// What it is called, where QEMU does not say.
    pub vm: Option<String>,
    /// Where the guest's agent is; found through QEMU when absent.
    pub agent: Option<agent::Address>,
    /// Whether the guest is frozen at the instants that are measured.
    pub freeze: Policy,
    /// Disks that are not backed up.
    pub exclude: Vec<String>,
    /// How data is read.
    pub transport: Transport,
    /// Where state and scratch go, for the time of the measurement.
    pub dir: PathBuf,
    /// Most scratch.
    pub scratch_budget_bytes: Option<u64>,
    /// fio's name or path in the guest.
    pub fio: String,
    /// The file in the guest, see [`fio::is_plain`].
    pub file: String,
    /// Its size, a multiple of 1 MiB.
    pub size_bytes: u64,
    /// Longest time of a backup.
    pub seconds: u32,
    /// How often each is measured.
    pub rounds: u32,
    /// Requests under way.
    pub depth: u16,
    /// What the guest does.
    pub workloads: Vec<Workload>,
    /// What is done to it, of [`METHODS`].
    pub methods: Vec<Method>,
    /// Rates of the reader, in bytes a second; as fast as it can where absent.
    pub readers: Vec<Option<u64>>,
}

impl GuestOptions {
    /// Longest time of a backup.
    pub fn during(&self) -> Duration {
        Duration::from_secs(self.seconds.into())
    }

    /// Time that is measured before the backup.
    pub fn before(&self) -> Duration {
        self.during() * 2 / 5
    }

    /// Time that is measured after it.
    pub fn after(&self) -> Duration {
        self.during() / 5
    }

    /// How the machine is attached to: with nothing of what is kept for it otherwise.
    fn attach(&self, work: &WorkDir) -> VmOptions {
        VmOptions {
            state: work.path("state"),
            scratch: Some(work.path("scratch")),
            scratch_budget_bytes: self.scratch_budget_bytes,
            name: self.vm.clone(),
            transport: self.transport,
            quiet: QuietOptions { agent: self.agent.clone(), freeze: self.freeze, ..QuietOptions::default() },
            ..VmOptions::default()
        }
    }
}

/// Measures. `progress` is told of every step.
///
/// # Errors
/// There is no agent, no fio, no space, or something is in the way; or the user interrupts. Nothing is left then, or the error
/// says what.
pub async fn run(
    options: GuestOptions,
    mut progress: impl FnMut(Progress),
    interrupted: watch::Receiver<bool>,
) -> Result<GuestReport, GuestError> {
    let work = WorkDir::beside(&options.dir)?;
    // To its end: it tries out what this QEMU can do, and whoever knows what is there then goes with it.
    let vm = Vm::attach(&options.monitor, options.attach(&work)).await?;
    let mut inside = Inside::new(vm.clone(), &options, interrupted);
    let done = measure(&options, &vm, &mut inside, &mut progress).await;
    // A session that was dropped while it began may have the agent's channel, and the guest frozen.
    vm.idle().await;
    let mut left = inside.leave().await;
    if let Err(failure) = vm.detach(false).await {
        let source = &options.monitor;
        left.push(format!(
            "what livebackup put into QEMU ({failure}); `livebackup detach --all qmp:{source}` takes it out"
        ));
    }
    match done {
        Ok(report) => Ok(GuestReport { left, ..report }),
        Err(error) if left.is_empty() => Err(error),
        Err(error) => Err(GuestError::Left { error: Box::new(error), left: left.join("; ") }),
    }
}

async fn measure(
    options: &GuestOptions,
    vm: &Vm,
    inside: &mut Inside,
    progress: &mut impl FnMut(Progress),
) -> Result<GuestReport, GuestError> {
    let (began, started, busy) = (Timestamp::now(), Instant::now(), Busy::beside(vm.qemu_pid()));
    inside.pause(Duration::ZERO).await?;
    let about_guest = inside.look().await?;
    let fio = inside.fio_of(&about_guest, options.size_bytes);
    let (machine, _) = vm.disks().await.map_err(GuestError::Machine)?;
    let mut about = About::here(machine.qemu_version, &[("scratch", Path::new(&options.dir))]);
    progress(Progress::LayingOut { done_bytes: 0, total_bytes: options.size_bytes });
    inside.make_file(&fio).await?;

    let (mut runs, mut gaps) = (vec![], vec![]);
    let cases = Case::all(&options.methods, &options.readers);
    let turns: Vec<_> = options.workloads.iter().flat_map(|w| cases.iter().map(move |case| (*w, *case))).collect();
    let steps = turns.len() * options.rounds as usize;
    for round in 1..=options.rounds {
        // Another order each round: what else the machine does meets all of them.
        let order = (0..turns.len()).map(|i| turns[(i + 3 * (round as usize - 1)) % turns.len()]);
        for (i, (workload, case)) in order.enumerate() {
            let step = (round as usize - 1) * turns.len() + i + 1;
            progress(Progress::Begins { step, steps, round, workload, case });
            let measure = Measure { vm, options, fio: &fio, workload, case, round, seed: step as u64 };
            match measure.run(inside).await {
                Ok(run) => {
                    progress(Progress::Ended(Box::new(run.clone())));
                    runs.push(run);
                }
                Err(error) if error.is_of_method() => {
                    let why = format!("failed: {error}");
                    progress(Progress::Failed { case, why: why.clone() });
                    gaps.push((workload, case, why));
                }
                Err(error) => return Err(error),
            }
        }
    }
    about.load_after = about::load();
    about.others_cores = busy.others_since();
    let mut summaries = summaries(&options.workloads, &cases, &runs, &gaps);
    for (summary, (_, case)) in summaries.iter_mut().zip(&turns) {
        summary.words = words(case.method);
    }
    let settings = GuestSettings {
        file: options.file.clone(),
        size_bytes: options.size_bytes,
        seconds: options.seconds,
        rounds: options.rounds,
        depth: options.depth,
        freeze: serde_json::to_value(options.freeze).unwrap_or(Value::Null),
        readers_bytes_per_second: options.readers.clone(),
    };
    let (vm, took_s) = (vm.name().to_owned(), started.elapsed().as_secs_f64());
    let guest = about_guest.words;
    Ok(GuestReport { began, took_s, vm, guest, about, settings, summaries, left: vec![], runs })
}
