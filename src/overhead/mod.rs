//! Overhead: what a backup costs the guest's writes, by method; `livebackup bench write-overhead`.
//!
//! ```text
//!   for each round, workload, method:
//!     QEMU starts ─► load starts ─► before ─► (preparation) ─► backup = during ─► after ─► load stops ─► QEMU ends
//!   after each round: the disk is held against what the load has written, byte for byte
//! ```
//!
//! The load ([`load`]) drives the guest's own virtio-blk device ([`driver`]) without a pause, and notes how long each request
//! takes. Methods ([`method`]) are livebackup's own, through the library as its users have it, and what others do with QEMU's
//! own means. They take turns, in another order each round, so that what else the machine does meets all of them.
//!
//! A backup lasts as long as it takes, and is broken off after `seconds`. A method that fails is reported and the others go on;
//! no figure fails anything. A disk that does not hold what the guest wrote does: that would be somebody's fault.
//!
//! **Cancelling** drops the run: the load is abandoned, QEMU killed, the directory removed. So it is after any error.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::watch;

pub mod about;
mod courses;
pub mod driver;
pub mod error;
pub mod figures;
pub mod guest;
pub mod html;
pub mod load;
pub mod method;
pub mod model;
mod ours;
mod qtest;
pub mod report;
pub mod rig;
mod text;
mod theirs;
mod volume;

use about::{About, Busy};
use error::{OverheadError, path};
use figures::{Stretch, course, figures};
use load::{Load, LoadOptions, Workload};
use method::{Bench, Case, MEMORY_DIR, Method, Ready};
use model::{BLOCK_BYTES, Model};
use report::{Backup, Report, Run, Settings, summaries, targets};
use rig::{Cache, Rig, RigOptions, WorkDir};
use volume::Volume;

use crate::limits::MAX_DISCARD_BYTES;
use crate::units::{MIB, human_bytes};

/// The smallest disk.
pub const MIN_SIZE_BYTES: u64 = 16 * MIB;
/// The smallest disk of which half can be acknowledged while the rest is still to be read.
const MIN_HALF_BYTES: u64 = 256 * MIB;
/// The load runs for so long before it is looked at.
const WARMS_UP: Duration = Duration::from_millis(500);

/// What is measured, and how.
#[derive(Clone, Debug)]
pub struct OverheadOptions {
    /// QEMU.
    pub rig: RigOptions,
    /// Where the disk lies.
    pub dir: PathBuf,
    /// A directory on another file system.
    pub other: Option<PathBuf>,
    /// Size of the disk, a multiple of 64 KiB.
    pub size_bytes: u64,
    /// Longest time of a backup.
    pub seconds: u32,
    /// How often each is measured.
    pub rounds: u32,
    /// Requests under way.
    pub depth: u16,
    /// What the guest does.
    pub workloads: Vec<Workload>,
    /// What is done to it.
    pub methods: Vec<Method>,
    /// Rates of the reader, in bytes a second; as fast as it can where absent.
    pub readers: Vec<Option<u64>>,
}

impl OverheadOptions {
    /// Longest time of a backup.
    pub fn during(&self) -> Duration {
        Duration::from_secs(self.seconds.into())
    }

    /// Time that is measured before the backup.
    fn before(&self) -> Duration {
        self.during() * 2 / 5
    }

    /// Time that is measured after it.
    fn after(&self) -> Duration {
        self.during() / 5
    }

    /// Size of the disk.
    pub fn blocks(&self) -> u64 {
        self.size_bytes / BLOCK_BYTES as u64
    }

    /// The first half of the disk, in what one discard takes.
    pub fn half_bytes(&self) -> u64 {
        self.size_bytes / 2 / MAX_DISCARD_BYTES * MAX_DISCARD_BYTES
    }

    fn lacks(&self, method: Method) -> Option<String> {
        match method {
            Method::Acknowledged if self.size_bytes < MIN_HALF_BYTES => {
                Some(format!("needs a --size of {} or more", human_bytes(MIN_HALF_BYTES)))
            }
            method => method.lacks(self),
        }
    }
}

/// How far it is.
#[derive(Clone, Debug)]
pub enum Progress {
    /// The disk is laid out.
    LayingOut {
        /// So far.
        done_bytes: u64,
        /// Of it.
        total_bytes: u64,
    },
    /// A run begins.
    Begins {
        /// Counts from 1.
        step: usize,
        /// How many runs there are.
        steps: usize,
        /// Counts from 1.
        round: u32,
        /// What the guest does.
        workload: Workload,
        /// What is done to it.
        case: Case,
    },
    /// It is over.
    Ended(Box<Run>),
    /// It failed.
    Failed {
        /// What was done.
        case: Case,
        /// Why.
        why: String,
    },
    /// The disk holds what the guest wrote.
    Checked {
        /// After this round.
        round: u32,
    },
}

/// Measures. `progress` is told of every step.
///
/// # Errors
/// The machine cannot be made, the disk does not hold what was written, or the user interrupts. Nothing is left then.
pub async fn run(
    options: OverheadOptions,
    progress: impl FnMut(Progress),
    mut interrupted: watch::Receiver<bool>,
) -> Result<Report, OverheadError> {
    let stop = interrupted.clone();
    let asked = async move {
        if interrupted.wait_for(|stop| *stop).await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        biased;
        () = asked => Err(OverheadError::Interrupted),
        report = measure(options, progress, stop) => report,
    }
}

/// Where things lie during a measurement.
struct Places {
    work: WorkDir,
    memory: Option<WorkDir>,
    other: Option<WorkDir>,
}

impl Places {
    fn make(options: &OverheadOptions) -> Result<Self, OverheadError> {
        let work = WorkDir::create(&options.dir)?;
        let wanted = |method| options.methods.contains(&method);
        let memory = Path::new(MEMORY_DIR);
        let memory = wanted(Method::FleeceMemory) && memory.is_dir();
        Ok(Self {
            work,
            memory: memory.then(|| WorkDir::create(Path::new(MEMORY_DIR))).transpose()?,
            other: options.other.as_deref().map(WorkDir::create).transpose()?,
        })
    }

    fn scratch(&self, method: Method) -> PathBuf {
        let elsewhere = match method {
            Method::FleeceMemory => self.memory.as_ref(),
            Method::FleeceOther => self.other.as_ref(),
            _ => None,
        };
        elsewhere.unwrap_or(&self.work).path("scratch")
    }
}

async fn measure(
    options: OverheadOptions,
    mut progress: impl FnMut(Progress),
    interrupted: watch::Receiver<bool>,
) -> Result<Report, OverheadError> {
    let (began, started, busy) = (Timestamp::now(), Instant::now(), Busy::now());
    check_space(&options)?;
    let places = Places::make(&options)?;
    let mut seen = vec![("the disk", options.dir.as_path()), ("memory", Path::new(MEMORY_DIR))];
    seen.extend(options.other.as_deref().map(|dir| ("the other", dir)));
    let mut about = About::here(qemu_version(&options.rig.qemu).await?, &seen);
    let mut model = lay_out(&options, &places.work, &mut progress, &interrupted).await?;

    let (mut runs, mut gaps) = (vec![], vec![]);
    let mut turns = vec![];
    let cases = Case::all(&options.methods, &options.readers);
    for workload in &options.workloads {
        for case in &cases {
            match options.lacks(case.method) {
                Some(why) => gaps.push((*workload, *case, why)),
                None => turns.push((*workload, *case)),
            }
        }
    }
    let steps = turns.len() * options.rounds as usize;
    for round in 1..=options.rounds {
        let order = (0..turns.len()).map(|i| turns[(i + 3 * (round as usize - 1)) % turns.len()]);
        for (i, (workload, case)) in order.enumerate() {
            let step = (round as usize - 1) * turns.len() + i + 1;
            progress(Progress::Begins { step, steps, round, workload, case });
            let seed = step as u64;
            let (result, now) = one(&options, &places, (workload, case, round, seed), model).await?;
            model = now;
            match result {
                Ok(run) => {
                    progress(Progress::Ended(Box::new(run.clone())));
                    runs.push(run);
                }
                Err(error) => {
                    let why = format!("failed: {error}");
                    progress(Progress::Failed { case, why: why.clone() });
                    gaps.push((workload, case, why));
                }
            }
        }
        model = check(&places.work, model, round).await?;
        progress(Progress::Checked { round });
    }
    about.load_after = about::load();
    about.others_cores = busy.others_since();
    let summaries = summaries(&options.workloads, &cases, &runs, &gaps);
    let targets = targets(&summaries);
    let settings = Settings {
        size_bytes: options.size_bytes,
        seconds: options.seconds,
        rounds: options.rounds,
        depth: options.depth,
        cache: options.rig.cache.name(),
        readers_bytes_per_second: options.readers,
    };
    Ok(Report { began, took_s: started.elapsed().as_secs_f64(), about, settings, summaries, targets, runs })
}

/// The disk, a target or scratch as large, and what a file system keeps for itself.
fn check_space(options: &OverheadOptions) -> Result<(), OverheadError> {
    let about = nix::sys::statvfs::statvfs(&options.dir);
    let about = about.map_err(std::io::Error::from).map_err(path("cannot use the directory", &options.dir))?;
    let free = about.blocks_available().saturating_mul(about.fragment_size());
    // livebackup's scratch leaves a twentieth of the file system alone, or 1 GiB.
    let reserve = (about.blocks().saturating_mul(about.fragment_size()) / 20).min(1024 * MIB);
    // A logical volume is a copy of the disk.
    let copies = if options.methods.contains(&Method::Lvm) && volume::lacks().is_none() { 3 } else { 2 };
    let needed = options.size_bytes * copies + reserve + 64 * MIB;
    match free < needed {
        true => Err(OverheadError::NoSpace {
            dir: options.dir.clone(),
            free: human_bytes(free),
            needed: human_bytes(needed),
        }),
        false => Ok(()),
    }
}

async fn qemu_version(qemu: &Path) -> Result<String, OverheadError> {
    let failed = |why: String| OverheadError::Program { program: qemu.display().to_string(), why };
    let out = tokio::process::Command::new(qemu).arg("--version").output().await;
    let out = out.map_err(|e| failed(format!("cannot be run: {e}")))?;
    let text = String::from_utf8_lossy(&out.stdout);
    let version = text.lines().next().and_then(|line| line.strip_prefix("QEMU emulator version "));
    version.map(str::to_owned).ok_or_else(|| failed("does not tell its version".into()))
}

/// Makes the disk's image, full of data.
async fn lay_out(
    options: &OverheadOptions,
    work: &WorkDir,
    progress: &mut impl FnMut(Progress),
    interrupted: &watch::Receiver<bool>,
) -> Result<Model, OverheadError> {
    let (image, total_bytes) = (work.path("disk.raw"), options.size_bytes);
    let model = Model::new(total_bytes, options.blocks());
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let (stop, to) = (interrupted.clone(), image.clone());
    let writing = tokio::task::spawn_blocking(move || {
        let file = std::fs::File::create(&to)?;
        // Whoever has gone wants no more of it.
        model.lay_out(&file, |done| tell.send(done).is_ok() && !*stop.borrow())?;
        file.sync_data()?;
        Ok(model)
    });
    while let Some(done_bytes) = told.recv().await {
        progress(Progress::LayingOut { done_bytes, total_bytes });
    }
    let written: std::io::Result<Model> = writing.await.map_err(|_| OverheadError::Panicked)?;
    let model = written.map_err(path("cannot write", &image))?;
    if options.rig.cache == Cache::None && !rig::takes_direct_writes(&image) {
        let source = std::io::ErrorKind::Unsupported.into();
        return Err(OverheadError::Path { what: "no direct I/O (--cache none) on", path: image, source });
    }
    Ok(model)
}

/// Holds the disk against what was written.
async fn check(work: &WorkDir, model: Model, round: u32) -> Result<Model, OverheadError> {
    let image = work.path("disk.raw");
    let checking = tokio::task::spawn_blocking(move || {
        let wrong = std::fs::File::open(&image).and_then(|file| model.first_wrong(&file));
        (wrong.map_err(path("cannot read", image)), model)
    });
    let (wrong, model) = checking.await.map_err(|_| OverheadError::Panicked)?;
    match wrong? {
        Some(block) => Err(OverheadError::NotWhatWasWritten { after: format!("round {round}"), block }),
        None => Ok(model),
    }
}

/// One run. An error of the method's is the inner one: the guest's writes are known, and the others can go on.
async fn one(
    options: &OverheadOptions,
    places: &Places,
    (workload, case, round, seed): (Workload, Case, u32, u64),
    model: Model,
) -> Result<(Result<Run, OverheadError>, Model), OverheadError> {
    let Case { method, reader } = case;
    let work = &places.work;
    let (image, size_bytes) = (work.path("disk.raw"), options.size_bytes);
    let volume = match method {
        Method::Lvm => match tokio::task::block_in_place(|| Volume::create(work, &image, size_bytes)) {
            Ok(volume) => Some(volume),
            Err(error) => return Ok((Err(error), model)),
        },
        _ => None,
    };
    let disk = volume.as_ref().map_or(image.clone(), Volume::disk);
    let busy = Busy::now();
    let rig = Rig::start(work, &options.rig, &disk).await?;
    let scratch = places.scratch(method);
    let memory = rig.memory.try_clone().map_err(path("cannot share", "the machine's memory"))?;
    let guest = LoadOptions { socket: work.path("qtest"), memory, depth: options.depth, workload, seed };
    let ready = Ready::make(method, work, &scratch).await;
    let load = Load::start(guest, model)?;
    let follower = load.follow(rig.monitor.subscribe());
    if method == Method::Acknowledged {
        load.stay_below(options.half_bytes() / BLOCK_BYTES as u64);
    }
    let outcome = match &ready {
        Ok(ready) => {
            let bench =
                Bench { rig: &rig, work, load: &load, options, reader, scratch: &scratch, volume: volume.as_ref() };
            phases(&bench, method, ready).await
        }
        Err(_) => Ok(None),
    };
    load.hold(false).await?;
    let ended = load.stop().await;
    follower.abort();
    let mut result = match (ended, outcome, ready) {
        (Err(error), ..) => return Err(error),
        (Ok(loaded), Ok(Some((before, outcome, after))), Ok(ready)) => {
            drop(ready);
            let during = Stretch { from_ns: outcome.began_ns, to_ns: outcome.ended_ns };
            let samples = &loaded.samples;
            let run = Run {
                workload: workload.name(),
                method: method.name(),
                reader_bytes_per_second: reader,
                round,
                before: figures(samples, before),
                during: figures(samples, during),
                after: figures(samples, after),
                backup: Backup {
                    took_s: outcome.ended_ns.saturating_sub(outcome.began_ns) as f64 / 1e9,
                    finished: outcome.finished,
                    read_bytes: outcome.read_bytes,
                    copied_bytes: outcome.copied_bytes,
                },
                failed_requests: loaded.failed,
                others_cores: 0.0,
                course: course(samples, &[before, during, after], outcome.began_ns),
            };
            (Ok(run), loaded.model)
        }
        (Ok(loaded), Err(error), _) | (Ok(loaded), _, Err(error)) => (Err(error), loaded.model),
        (Ok(loaded), Ok(None), Ok(_)) => (Err(OverheadError::Panicked), loaded.model),
    };
    rig.end().await?;
    if let (Ok(run), _) = &mut result {
        // QEMU's time counts as ours now.
        run.others_cores = busy.others_since();
    }
    if let Some(volume) = volume {
        tokio::task::block_in_place(|| {
            let copied = volume.copy_back(&image, size_bytes);
            drop(volume);
            copied
        })?;
    }
    // Scratch has no names; what a failed method has left is of no use.
    for name in ["state", "scratch", "scratch.qcow2", "target.raw", "overlay.qcow2", "nbd"] {
        work.remove(name);
    }
    Ok(result)
}

type Phases = (Stretch, method::Outcome, Stretch);

/// Before, during, after.
async fn phases(bench: &Bench<'_>, method: Method, ready: &Ready) -> Result<Option<Phases>, OverheadError> {
    let Bench { load, options, .. } = *bench;
    tokio::time::sleep(WARMS_UP).await;
    let from_ns = load.now_ns();
    tokio::time::sleep(options.before()).await;
    let before = Stretch { from_ns, to_ns: load.now_ns() };
    if load.is_over() {
        return Ok(None);
    }
    let outcome = ready.run(method, bench).await?;
    let from_ns = load.now_ns();
    tokio::time::sleep(options.after()).await;
    Ok(Some((before, outcome, Stretch { from_ns, to_ns: load.now_ns() })))
}
