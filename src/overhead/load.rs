//! The load: what the guest does to its disk, without a pause, and how long each request takes.
//!
//! A closed loop on a thread of its own: each lane has one request under way, and begins the next when that is answered.
//! No two lanes are at the same block at once, so that it is always known what the disk must hold ([`Model`]).
//!
//! ```text
//!   Run ◄──► Hold (the last requests are answered, then it waits)        Run, Hold ──► Stop (likewise, then it ends)
//!                                                                        any ──► Abandon (it ends at once)
//! ```

use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::broadcast;
use tokio::task::AbortHandle;

use super::driver::{Ask, Disk, MAX_REQUEST_BYTES};
use super::error::{DriverError, OverheadError};
use super::model::{BLOCK_BYTES, Model, Rng};
use crate::monitor::Event;

/// Lanes of the database: a few transactions commit at the same time.
pub(super) const COMMITTERS: usize = 4;
/// Of ten requests of the mixed load so many are reads.
const READS_OF_TEN: u64 = 7;
/// Looks at the queue before it sleeps.
const LOOKS: u32 = 4;
/// Sleep between two looks.
const NAP: Duration = Duration::from_micros(20);
/// When to see whether QEMU is still there.
const NUDGE_AFTER: Duration = Duration::from_secs(1);
/// When to give up.
const HANGS_AFTER: Duration = Duration::from_secs(120);

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Workload {
    /// 4 KiB anywhere.
    Random,
    /// 64 KiB, one after the other.
    Sequential,
    /// 4 KiB anywhere, and a flush after each; both together are one operation.
    Database,
    /// 4 KiB anywhere, seven reads to three writes.
    Mixed,
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Random, Self::Sequential, Self::Database, Self::Mixed];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Sequential => "sequential",
            Self::Database => "database",
            Self::Mixed => "mixed",
        }
    }

    /// What it does, for people.
    pub fn words(self) -> &'static str {
        match self {
            Self::Random => "4 KiB random writes",
            Self::Sequential => "64 KiB sequential writes",
            Self::Database => "4 KiB random writes, each followed by a flush",
            Self::Mixed => "4 KiB random, 70 % reads and 30 % writes",
        }
    }

    fn request_bytes(self) -> usize {
        if self == Self::Sequential { MAX_REQUEST_BYTES } else { BLOCK_BYTES }
    }

    fn lanes(self, depth: usize) -> usize {
        if self == Self::Database { depth.min(COMMITTERS) } else { depth }
    }
}

impl FromStr for Workload {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|w| w.name() == text).ok_or_else(|| format!("a workload is one of {}", names()))
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One operation of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// When it began, in nanoseconds since the load did.
    pub began_ns: u64,
    /// How long it took.
    pub took_ns: u64,
    /// Bytes read or written.
    pub bytes: u32,
    /// Whether it was a read.
    pub read: bool,
}

/// What a load leaves.
#[derive(Debug)]
pub struct Loaded {
    /// In the order of their ends.
    pub samples: Vec<Sample>,
    /// Requests that the disk refused.
    pub failed: u64,
    /// What the disk must hold now.
    pub model: Model,
}

const RUN: u8 = 0;
const HOLD: u8 = 1;
const STOP: u8 = 2;
const ABANDON: u8 = 3;

#[derive(Debug)]
struct Control {
    wanted: AtomicU8,
    /// The load stays below this block.
    area_blocks: AtomicU64,
    /// The machine stands still: nothing begins, as in a guest.
    stands: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Works,
    Rests,
    Over,
}

/// A running load. Dropping it abandons it.
#[derive(Debug)]
pub struct Load {
    control: Arc<Control>,
    started: Instant,
    thread: Option<JoinHandle<Result<Loaded, DriverError>>>,
}

/// What a load is started with.
#[derive(Debug)]
pub struct LoadOptions {
    /// QEMU's qtest socket.
    pub socket: PathBuf,
    /// The machine's memory.
    pub memory: File,
    /// Requests under way.
    pub depth: u16,
    /// What is done.
    pub workload: Workload,
    /// For the choice of blocks.
    pub seed: u64,
}

impl Load {
    /// Starts it, on all of the disk.
    pub fn start(options: LoadOptions, model: Model) -> Result<Self, OverheadError> {
        let control = Arc::new(Control {
            wanted: AtomicU8::new(RUN),
            area_blocks: AtomicU64::new(model.blocks()),
            stands: AtomicBool::new(false),
            state: Mutex::new(State::Works),
            changed: Condvar::new(),
        });
        let (theirs, started) = (control.clone(), Instant::now());
        let work = move || {
            let done = drive(&options, model, &theirs, started);
            theirs.set(State::Over);
            done
        };
        let thread = std::thread::Builder::new().name("guest-load".into()).spawn(work).map_err(DriverError::Io)?;
        Ok(Self { control, started, thread: Some(thread) })
    }

    /// Nanoseconds since it started.
    pub fn now_ns(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    /// From now on only the first blocks are used.
    pub fn stay_below(&self, blocks: u64) {
        self.control.area_blocks.store(blocks.max(1), Ordering::Relaxed);
    }

    /// Tells the load of `STOP` and `RESUME`, until it is aborted: a guest's processors stand still between them.
    pub fn follow(&self, mut events: broadcast::Receiver<Event>) -> AbortHandle {
        let control = self.control.clone();
        let follow = async move {
            loop {
                match events.recv().await {
                    Ok(event) if event.name == "STOP" => control.stands.store(true, Ordering::Relaxed),
                    Ok(event) if event.name == "RESUME" => control.stands.store(false, Ordering::Relaxed),
                    Ok(_) => {}
                    // What was lost may have been either: a load that goes on is seen.
                    Err(broadcast::error::RecvError::Lagged(_)) => control.stands.store(false, Ordering::Relaxed),
                    Err(broadcast::error::RecvError::Closed) => break,
                }
            }
            control.stands.store(false, Ordering::Relaxed);
        };
        tokio::spawn(follow).abort_handle()
    }

    /// Lets all requests be answered, and begins no more; or goes on.
    pub async fn hold(&self, hold: bool) -> Result<(), OverheadError> {
        let control = self.control.clone();
        let held = tokio::task::spawn_blocking(move || {
            control.want(if hold { HOLD } else { RUN });
            let state = control.state.lock().unwrap_or_else(PoisonError::into_inner);
            let other = if hold { State::Works } else { State::Rests };
            let wait = |state: &mut State| *state == other && control.wanted.load(Ordering::Relaxed) != ABANDON;
            drop(control.changed.wait_timeout_while(state, HANGS_AFTER, wait));
        });
        held.await.map_err(|_| OverheadError::Panicked)
    }

    /// Whether it has ended by itself: it failed.
    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends it when all requests are answered.
    pub async fn stop(mut self) -> Result<Loaded, OverheadError> {
        self.control.want(STOP);
        let Some(thread) = self.thread.take() else { return Err(OverheadError::Panicked) };
        let joined = tokio::task::spawn_blocking(|| thread.join()).await.map_err(|_| OverheadError::Panicked)?;
        Ok(joined.map_err(|_| OverheadError::Panicked)??)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.control.want(ABANDON);
        if let Some(thread) = self.thread.take() {
            // It looks at what is wanted every moment.
            let _ = thread.join();
        }
    }
}

impl Control {
    fn want(&self, what: u8) {
        let _state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.wanted.store(what, Ordering::Relaxed);
        self.changed.notify_all();
    }

    fn set(&self, state: State) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        self.changed.notify_all();
    }

    /// Waits while it is to stand still.
    fn wait(&self) {
        self.set(State::Rests);
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let held = |_: &mut State| self.wanted.load(Ordering::Relaxed) == HOLD;
        drop(self.changed.wait_while(state, held).unwrap_or_else(PoisonError::into_inner));
        self.set(State::Works);
    }
}

/// What a lane waits for.
#[derive(Clone, Copy)]
struct Asked {
    ask: Ask,
    block: u64,
    began: Instant,
}

struct Lanes {
    disk: Disk,
    workload: Workload,
    model: Model,
    rng: Rng,
    asked: Vec<Option<Asked>>,
    next: u64,
    failed: u64,
}

fn drive(options: &LoadOptions, model: Model, control: &Control, started: Instant) -> Result<Loaded, DriverError> {
    // Sleeps are to be as short as they are meant to be.
    let _ = nix::sys::prctl::set_timerslack(1);
    let disk = Disk::connect(&options.socket, &options.memory, options.depth)?;
    if disk.size_bytes() != model.blocks() * BLOCK_BYTES as u64 {
        return Err(DriverError::Device("its size is not that of its image"));
    }
    let lanes = options.workload.lanes(disk.depth());
    let rng = Rng::seeded(options.seed);
    let mut lanes =
        Lanes { disk, workload: options.workload, model, rng, asked: vec![None; lanes], next: 0, failed: 0 };
    let mut samples = vec![];
    let (mut looks, mut last, mut nudged) = (0, Instant::now(), Instant::now());
    loop {
        let wanted = control.wanted.load(Ordering::Relaxed);
        let idle = lanes.asked.iter().all(Option::is_none);
        match wanted {
            RUN if control.stands.load(Ordering::Relaxed) => last = Instant::now(),
            RUN => lanes.begin_all(control.area_blocks.load(Ordering::Relaxed))?,
            HOLD if idle => {
                control.wait();
                last = Instant::now();
            }
            STOP if idle => break,
            ABANDON => break,
            _ => {}
        }
        let mut any = false;
        while let Some((lane, good)) = lanes.disk.answer()? {
            any = true;
            if let Some(asked) = lanes.ended(lane, good)? {
                let began_ns = asked.began.duration_since(started).as_nanos() as u64;
                let took_ns = asked.began.elapsed().as_nanos() as u64;
                let (bytes, read) = (lanes.workload.request_bytes() as u32, asked.ask == Ask::Read);
                samples.push(Sample { began_ns, took_ns, bytes, read });
            }
        }
        lanes.disk.ring()?;
        if any {
            (looks, last) = (0, Instant::now());
            continue;
        }
        looks += 1;
        if looks <= LOOKS {
            std::hint::spin_loop();
            continue;
        }
        std::thread::sleep(NAP);
        if last.elapsed() > NUDGE_AFTER && nudged.elapsed() > NUDGE_AFTER {
            nudged = Instant::now();
            lanes.disk.nudge()?;
        }
        if last.elapsed() > HANGS_AFTER {
            return Err(DriverError::Hangs(HANGS_AFTER.as_secs()));
        }
    }
    Ok(Loaded { samples, failed: lanes.failed, model: lanes.model })
}

impl Lanes {
    fn begin_all(&mut self, area_blocks: u64) -> Result<(), DriverError> {
        let each = (self.workload.request_bytes() / BLOCK_BYTES) as u64;
        let area = area_blocks.min(self.model.blocks()) / each;
        for lane in 0..self.asked.len() {
            if self.asked[lane].is_some() {
                continue;
            }
            let Some(block) = self.choose(area, each) else { break };
            let reads = self.workload == Workload::Mixed && self.rng.below(10) < READS_OF_TEN;
            let len = self.workload.request_bytes();
            let ask = if reads { Ask::Read } else { Ask::Write };
            if ask == Ask::Write {
                let bytes = self.disk.bytes(lane, len);
                for (block, bytes) in (block..).zip(bytes.chunks_exact_mut(BLOCK_BYTES)) {
                    self.model.write(block, bytes);
                }
            }
            self.asked[lane] = Some(Asked { ask, block, began: Instant::now() });
            self.disk.submit(lane, ask, block * BLOCK_BYTES as u64, len);
        }
        self.disk.ring()
    }

    /// A place where no lane is at work; none in an area as small as what is under way.
    fn choose(&mut self, area: u64, each: u64) -> Option<u64> {
        for _ in 0..64 {
            let at = match self.workload {
                Workload::Sequential => {
                    self.next += 1;
                    (self.next - 1) % area.max(1)
                }
                _ => self.rng.below(area.max(1)),
            };
            if !self.asked.iter().flatten().any(|asked| asked.block == at * each) {
                return Some(at * each);
            }
        }
        None
    }

    /// Takes an answer. Gives what is over.
    fn ended(&mut self, lane: usize, good: bool) -> Result<Option<Asked>, DriverError> {
        let asked = self.asked.get_mut(lane).and_then(Option::take);
        let Some(asked) = asked else { return Err(DriverError::Device("it answers a lane that asked nothing")) };
        if !good {
            self.failed += 1;
            if asked.ask == Ask::Write {
                let blocks = (self.workload.request_bytes() / BLOCK_BYTES) as u64;
                (asked.block..asked.block + blocks).for_each(|block| self.model.forget(block));
            }
        }
        match asked.ask {
            Ask::Write if self.workload == Workload::Database && good => {
                self.asked[lane] = Some(Asked { ask: Ask::Flush, ..asked });
                self.disk.submit(lane, Ask::Flush, 0, 0);
                Ok(None)
            }
            Ask::Read if good && !self.model.begins_right(asked.block, self.disk.bytes(lane, BLOCK_BYTES)) => {
                Err(DriverError::Wrong(asked.block * BLOCK_BYTES as u64))
            }
            _ => Ok(Some(asked)),
        }
    }
}
