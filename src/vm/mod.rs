//! A virtual machine under our care.
//!
//! ```text
//!  attach: lock ─► undo left-overs ─► idle ◄───────────────────────────────┐
//!                                      │ begin                              │ undo
//!                                      ▼                                    │
//!                         plan ─► fleece: prepare, instant, proof ─► transfer
//!                                        harvest, seal, forget
//! ```
//!
//! Between sessions the VM is tended (`power`): a guest's power-off is noticed, and what its QEMU knows is taken in time.
//! Tracking that a predecessor of this QEMU left is carried over at attach (`carry`) where there is proof
//! ([`evidence`], [`medium`], [`persist`]).
//!
//! One session at a time. It is a task of its own: dropping the client's end ends it, and whatever happens, it takes
//! everything of ours out of QEMU again except the bitmaps that record for the next backup.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::{Mutex, OwnedMutexGuard, watch};

use crate::agent::Channel;
use crate::area::Skip;
use crate::checkpoint::{Log, Medium, QemuInstance};
use crate::grade::Held;
use crate::impact::Budget;
use crate::machine::{Disk, FoundDisk, Machine, Taken, Verdict};
use crate::monitor::{self, Capabilities, Monitor, MonitorError};
use crate::wire::Address as WireAddress;
use crate::wire::message::{Begin, Failure, FailureCode, LastSession, SessionStatus, TrackingStatus};

mod agent;
mod areas;
mod attach;
mod boot_file;
mod carry;
pub mod compare;
mod descriptors;
pub mod device;
mod discards;
pub mod doctor;
mod estimate;
pub mod evidence;
pub mod fleece;
pub mod gauge;
pub mod graph;
pub mod guardian;
pub mod harvest;
mod known;
pub mod medium;
pub mod meter;
pub mod names;
pub mod pace;
pub mod persist;
mod pin;
pub mod place;
mod power;
pub mod quiet;
mod reach;
pub mod scratch;
mod select;
mod sending;
mod session;
mod sharers;
mod status;
pub mod tracking;
pub mod transfer;
pub mod undo;

pub use agent::Absence as AgentAbsence;
pub use attach::absolute;
pub use device::Exclusive;
pub use doctor::{Check, CheckVerdict};
pub use power::{Hold, Parting, PowerOff};
pub use quiet::QuietOptions;

use evidence::{Doubt, Proof};
use gauge::Gauge;
use graph::Graph;
use names::Names;
use place::Place;
use tracking::{Bench, Plan, Wish};

/// How the data of a disk is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// vhost-user-blk where this QEMU has it, else NBD.
    #[default]
    Auto,
    /// vhost-user-blk, or not at all.
    Vhost,
    /// NBD.
    Nbd,
}

/// How a VM is attached.
#[derive(Clone, Debug, Default)]
pub struct VmOptions {
    /// State directory.
    pub state: PathBuf,
    /// Scratch directory; `STATE/scratch` when absent.
    pub scratch: Option<PathBuf>,
    /// Most scratch that a session may use; as much as the file system's reserve allows when absent.
    pub scratch_budget_bytes: Option<u64>,
    /// What the VM is called here; QEMU's `-name`, else its UUID, when absent.
    pub name: Option<String>,
    /// How data is read.
    pub transport: Transport,
    /// How the guest is made quiet around the instant.
    pub quiet: QuietOptions,
    /// What is left out of its disks.
    pub skip: Vec<Skip>,
    /// What a session may cost the guest.
    pub budget: Budget,
    /// Where this process serves the VM to clients, if it does: others are sent there.
    pub served_at: Option<WireAddress>,
    /// Attached for a session that is begun at once, without anything of ours that may change the machine before: what attaching
    /// saw a moment ago is not asked for again.
    pub begins_at_once: bool,
    /// What becomes of QEMU when the guest powers off.
    pub power_off: PowerOff,
    /// Whether images that can are to keep our bitmaps from one QEMU to the next, see [`persist`].
    pub persistent_bitmaps: bool,
    /// Disks whose device nobody else writes to, by the operator's word, see [`device`].
    pub exclusive_device: Exclusive,
}

/// Why a VM cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A running service has it.
    #[error("VM {vm:?} is served at {address}")]
    Served {
        /// Where to talk to it.
        address: WireAddress,
        /// What it is called there.
        vm: String,
    },
    /// Anything else.
    #[error(transparent)]
    Failure(#[from] Failure),
}

/// A failure of QEMU or its monitor.
pub(crate) fn qemu_failed(error: MonitorError) -> Failure {
    Failure::new(FailureCode::Qemu, error.to_string())
}

/// A failure that has no code of its own.
pub(crate) fn internal(error: impl std::fmt::Display) -> Failure {
    Failure::new(FailureCode::Internal, error.to_string())
}

/// How long a session waits for whoever looks at the VM.
const LOOK_WITHIN: Duration = Duration::from_secs(5);
/// For how long what attaching found is as good as a look, to a backup that is begun right after it.
const FRESH: Duration = Duration::from_secs(1);

/// An attached VM. Clones share it; the locks go with the last one.
#[derive(Clone)]
pub struct Vm {
    inner: Arc<Inner>,
}

/// A VM that may have been let go.
#[derive(Clone, Default)]
pub struct WeakVm {
    inner: Weak<Inner>,
}

impl WeakVm {
    /// The VM, if somebody has it.
    pub fn upgrade(&self) -> Option<Vm> {
        self.inner.upgrade().map(|inner| Vm { inner })
    }
}

struct Inner {
    name: String,
    machine: Machine,
    bench_parts: (Monitor, Names, Capabilities),
    qemu: QemuInstance,
    options: VmOptions,
    /// Before the place: it may have a file there to remove.
    gauge: Gauge,
    place: Place,
    session: Arc<Mutex<()>>,
    /// What attaching found, and when: for a backup that is begun right after it.
    looked: StdMutex<Option<(Instant, Graph)>>,
    /// Its devices, as they were last seen.
    board: Mutex<graph::Board>,
    progress: StdMutex<Option<SessionStatus>>,
    last: StdMutex<Option<LastSession>>,
    /// What became of the holds the last time, and when that was.
    held: StdMutex<Vec<(Timestamp, Held)>>,
    /// What the last status said of the disks.
    tracking: StdMutex<Vec<TrackingStatus>>,
    /// Why epochs were not carried over to this QEMU, by disk.
    doubts: StdMutex<BTreeMap<String, String>>,
    /// Counts sessions that are over.
    sessions: watch::Sender<u64>,
    /// Why a running session must end now.
    give_up: watch::Sender<Option<&'static str>>,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vm({})", self.inner.name)
    }
}

impl Vm {
    /// What it is called here.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The VM, without keeping it.
    pub fn downgrade(&self) -> WeakVm {
        WeakVm { inner: Arc::downgrade(&self.inner) }
    }

    /// Its QEMU's process.
    pub fn qemu_pid(&self) -> i32 {
        self.inner.qemu.pid
    }

    /// The run state in QEMU's words: `running`, `paused`, …
    pub async fn run_state(&self) -> Result<String, Failure> {
        monitor::run_state(self.monitor()).await.map_err(qemu_failed)
    }

    /// The channel of the guest's agent, which takes one client: while it is open, no session can freeze the guest.
    pub async fn agent(&self) -> Result<Channel, AgentAbsence> {
        agent::open(self.monitor(), self.inner.options.quiet.agent.as_ref()).await
    }

    /// Resolves when QEMU's monitor has closed.
    pub async fn closed(&self) {
        self.monitor().closed().await;
    }

    fn monitor(&self) -> &Monitor {
        &self.inner.bench_parts.0
    }

    fn names(&self) -> &Names {
        &self.inner.bench_parts.1
    }

    async fn graph(&self) -> Result<Graph, Failure> {
        let mut board = self.inner.board.lock().await;
        let before = board.clone();
        let found = graph::discover(self.monitor(), self.names().prefix(), &mut board).await;
        if *board != before {
            // A file of some KiB, seldom.
            tokio::task::block_in_place(|| known::remember(&self.inner.place.known, &board));
        }
        found.map_err(|e| Failure::new(FailureCode::Qemu, e.to_string()))
    }

    /// The VM's definition and all devices that are or could be taken for a disk.
    pub async fn disks(&self) -> Result<(Machine, Vec<FoundDisk>), Failure> {
        let looked =
            self.looked().as_ref().filter(|looked| self.is_fresh(looked)).map(|(_, graph)| graph.disks.clone());
        let disks = match looked {
            Some(disks) => disks,
            None => self.graph().await?.disks,
        };
        Ok((self.inner.machine.clone(), disks))
    }

    fn looked(&self) -> MutexGuard<'_, Option<(Instant, Graph)>> {
        self.inner.looked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether what was seen at the attach still goes: for who attaches for one backup. Others see what has happened since.
    fn is_fresh(&self, (at, _): &(Instant, Graph)) -> bool {
        self.inner.options.begins_at_once && at.elapsed() < FRESH
    }

    /// The machine as a session finds it, without what an earlier one may have left.
    async fn found(&self) -> Result<Graph, Failure> {
        let looked = self.looked().take();
        if let Some((_, graph)) = looked.filter(|looked| self.is_fresh(looked)) {
            return Ok(graph);
        }
        self.clean_up_now().await?;
        self.carried_over().await
    }

    /// Switches on the histograms of how long the guest's writes take, on all disks that are backed up: whoever stays
    /// attached knows what is usual before the first backup.
    pub async fn watch_latency(&self) {
        let _guard = self.inner.session.lock().await;
        match self.graph().await {
            Ok(graph) => {
                let disks = graph.disks.iter().filter(|d| d.verdict == Verdict::Protectable && !d.disk.read_only);
                let paths: Vec<_> = disks.map(|d| d.disk.qom_path.as_str()).collect();
                self.inner.gauge.switch_on(&paths).await;
            }
            Err(failure) => tracing::debug!(vm = self.inner.name, "the guest's latency is not watched: {failure}"),
        }
    }

    /// Waits until no session is open and everything of the last one is cleaned up.
    pub async fn idle(&self) {
        let _guard = self.inner.session.lock().await;
    }

    fn claim(&self) -> Result<OwnedMutexGuard<()>, Failure> {
        self.inner.session.clone().try_lock_owned().map_err(|_| {
            let since = self.progress().map(|p| format!(", since {:.0}", p.instant)).unwrap_or_default();
            Failure::new(
                FailureCode::Busy,
                format!("another backup of VM {:?} is running{since}; wait for its end", self.inner.name),
            )
        })
    }

    /// The lock for a session. A look at the VM's state is waited for, and so is a session that is about to end.
    async fn claim_for_session(&self) -> Result<OwnedMutexGuard<()>, Failure> {
        match tokio::time::timeout(LOOK_WITHIN, self.inner.session.clone().lock_owned()).await {
            Ok(guard) => Ok(guard),
            Err(_) => self.claim(),
        }
    }

    /// How the last session ended.
    pub fn last(&self) -> Option<LastSession> {
        self.inner.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_last(&self, started: Instant, sent_bytes: u64, failure: Option<&Failure>) {
        let last = LastSession {
            ended: Timestamp::now(),
            took_ms: started.elapsed().as_millis() as u64,
            sent_bytes,
            failure: failure.map(ToString::to_string),
        };
        *self.inner.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(last);
    }

    /// How a hold went the last time.
    fn last_held(&self, name: &str) -> Option<(Timestamp, Held)> {
        let all = self.inner.held.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().find(|(_, held)| held.name == name).cloned()
    }

    fn set_held(&self, holds: &[Held]) {
        let now = Timestamp::now();
        let mut all = self.inner.held.lock().unwrap_or_else(PoisonError::into_inner);
        *all = holds.iter().map(|held| (now, held.clone())).collect();
    }

    fn progress(&self) -> Option<SessionStatus> {
        self.inner.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_progress(&self, change: impl FnOnce(&mut Option<SessionStatus>)) {
        change(&mut self.inner.progress.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Tells how far the session is to who cannot ask: where nobody is served.
    fn tell_progress(&self) {
        if self.inner.options.served_at.is_none() {
            self.inner.place.tell(self.progress());
        }
    }

    fn doubt(&self, disk: &str) -> Option<String> {
        self.inner.doubts.lock().unwrap_or_else(PoisonError::into_inner).get(disk).cloned()
    }

    fn set_doubts(&self, doubts: BTreeMap<String, String>) {
        *self.inner.doubts.lock().unwrap_or_else(PoisonError::into_inner) = doubts;
    }

    /// Whether the bitmaps of a disk are to be kept by its image.
    fn keeps(&self, graph: &Graph, disk: &Disk) -> bool {
        self.inner.options.persistent_bitmaps && persist::can_keep(graph, disk).is_ok()
    }

    /// Whether a disk's epoch goes on in this QEMU, and why not.
    fn verdict(&self, log: &Log, bench: Bench<'_>, disk: &Disk, medium: &Medium) -> Result<(), String> {
        match tracking::judge(log, bench, disk, medium, None) {
            Ok(Proof::SameProcess) => Ok(()),
            Ok(_) => Err(Doubt::NotCompared.to_string()),
            Err(reason) if log.epoch().is_some_and(|e| e.qemu != self.inner.qemu) => {
                Err(self.doubt(&disk.name).unwrap_or(reason))
            }
            Err(reason) => Err(reason),
        }
    }

    /// What is decided for each disk, changing nothing.
    async fn plans(&self, begin: &Begin, graph: &Graph) -> Result<Vec<(Plan, Option<String>)>, Failure> {
        let run_state = monitor::run_state(self.monitor()).await.map_err(qemu_failed)?;
        if let Some(why) = evidence::elsewhere(&run_state) {
            return Err(Failure::new(FailureCode::Busy, why));
        }
        let mut media = self.media(graph).await;
        let bench = Bench { names: self.names(), graph, qemu: &self.inner.qemu, run_state: &run_state };
        let mut plans: Vec<(Plan, Option<String>)> = vec![];
        for disk in select::disks(&graph.disks, begin)? {
            let log = tracking::open_log(&self.inner.place.disks, &disk.name)?;
            let medium = media.remove(&disk.name).unwrap_or_default();
            let verdict = self.verdict(&log, bench, &disk, &medium);
            let reason = verdict.clone().err();
            let wish = Wish {
                since: begin.since.get(&disk.name).copied(),
                full_reason: begin.full_reason.as_deref(),
                checkpoint: begin.checkpoint,
            };
            let mut plan = tracking::plan(disk, log, verdict, &wish);
            plan.medium = Some(medium);
            plan.keep = self.keeps(graph, &plan.disk);
            plan.needs_sentinel =
                plan.needs_sentinel || plan.keep && !tracking::has_kept_sentinel(self.names(), graph, &plan.disk);
            plans.push((plan, reason));
        }
        if begin.incremental_only {
            for (plan, _) in &plans {
                if let Taken::Full { reason } = &plan.taken
                    && !plan.disk.read_only
                {
                    return Err(Failure::new(
                        FailureCode::NotIncremental,
                        format!(
                            "disk {} cannot be backed up incrementally: {reason}; use --level auto or full",
                            plan.disk.name
                        ),
                    ));
                }
            }
        }
        for (plan, _) in &mut plans {
            plan.compare(begin);
            areas::probe(plan, begin, &self.inner.options.skip);
        }
        Ok(plans)
    }
}
