//! What a writer's threads share: options, the index, claims, the first failure, and who waits for which pack.

use std::collections::BTreeMap;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, JoinHandle, Thread};

use tokio::sync::Semaphore;
use tokio::sync::mpsc::UnboundedSender;

use crate::extent::Extent;
use crate::repo::error::RepoError;
use crate::repo::index::set::IndexSet;
use crate::repo::layout::Layout;
use crate::repo::session_log::SessionLog;
use crate::repo::writer::claims::Claims;
use crate::repo::writer::{DiskHandle, Durable, Finished, WriterOptions};
use crate::units::MIB;

pub(super) struct Shared {
    pub layout: Arc<Layout>,
    pub options: WriterOptions,
    pub permits: Arc<Semaphore>,
    pub claims: Claims,
    pub unfinished: PathBuf,
    index: RwLock<Arc<IndexSet>>,
    waiting: Mutex<Waiting>,
    log: Mutex<Option<SessionLog>>,
    failure: Mutex<Option<Arc<RepoError>>>,
    stopped: AtomicBool,
    finishing: AtomicBool,
    finished: Mutex<Finished>,
    /// Buffers that nobody uses.
    buffers: Mutex<Vec<Vec<u8>>>,
}

/// Most buffers that are kept: as many as the threads have at a time, and some on their way.
const MAX_BUFFERS: usize = 16;

/// Extents that wait for a data pack to be durable. Packs are numbered from 1 in the order in which they are made durable.
struct Waiting {
    durable: u64,
    extents: BTreeMap<(u64, u16), Vec<Extent>>,
    /// What is to be logged of them, encoded.
    records: BTreeMap<u64, Vec<u8>>,
    notify: UnboundedSender<Durable>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub fn new(
        layout: Arc<Layout>,
        options: WriterOptions,
        index: Arc<IndexSet>,
        unfinished: PathBuf,
        notify: UnboundedSender<Durable>,
    ) -> Self {
        Self {
            layout,
            options,
            permits: Arc::new(Semaphore::new(options.in_flight_bytes.max(2 * MIB as u32) as usize)),
            claims: Claims::default(),
            unfinished,
            index: RwLock::new(index),
            waiting: Mutex::new(Waiting { durable: 0, extents: BTreeMap::new(), records: BTreeMap::new(), notify }),
            log: Mutex::default(),
            failure: Mutex::default(),
            stopped: AtomicBool::new(false),
            finishing: AtomicBool::new(false),
            finished: Mutex::default(),
            buffers: Mutex::default(),
        }
    }

    /// Starts a thread whose panic becomes the writer's failure. Its error does by [`Shared::record`], called while the
    /// thread still holds its channels: who finds one closed finds the reason recorded.
    pub fn spawn(
        self: &Arc<Self>,
        name: &str,
        body: impl FnOnce(&Shared) + Send + 'static,
    ) -> Result<JoinHandle<()>, RepoError> {
        let shared = self.clone();
        let run = move || {
            if catch_unwind(AssertUnwindSafe(|| body(&shared))).is_err() {
                shared.fail(RepoError::Refused("a thread of the writer panicked; this is a bug".to_owned()));
            }
        };
        thread::Builder::new().name(name.to_owned()).spawn(run).map_err(|e| {
            self.abandon();
            RepoError::Refused(format!("a thread cannot be started: {e}"))
        })
    }

    pub fn index(&self) -> Arc<IndexSet> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set_index(&self, index: IndexSet) {
        *self.index.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(index);
    }

    /// A buffer of this many bytes at least. What is in it is anybody's.
    pub fn buffer(&self, bytes: usize) -> Vec<u8> {
        let mut free = lock(&self.buffers);
        match free.iter().position(|buffer| buffer.len() >= bytes) {
            Some(at) => free.swap_remove(at),
            None => vec![0; bytes],
        }
    }

    /// Keeps a buffer for the next who needs one.
    pub fn give_back(&self, buffer: Vec<u8>) {
        let mut free = lock(&self.buffers);
        if buffer.is_empty() {
            return;
        }
        if free.len() < MAX_BUFFERS {
            free.push(buffer);
        } else if let Some(smaller) = free.iter_mut().find(|other| other.len() < buffer.len()) {
            *smaller = buffer;
        }
    }

    /// Records how a thread ended.
    pub fn record(&self, result: Result<(), RepoError>) {
        if let Err(error) = result {
            self.fail(error);
        }
    }

    /// Records the first failure and stops everything.
    pub fn fail(&self, error: RepoError) {
        lock(&self.failure).get_or_insert_with(|| Arc::new(error));
        self.abandon();
    }

    /// Stops everything.
    pub fn abandon(&self) {
        self.stopped.store(true, Ordering::Release);
        self.permits.close();
    }

    pub fn has_failed(&self) -> bool {
        lock(&self.failure).is_some()
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    pub fn finishing(&self) {
        self.finishing.store(true, Ordering::Release);
    }

    pub fn is_finishing(&self) -> bool {
        self.finishing.load(Ordering::Acquire) && !self.is_stopped()
    }

    /// Why nothing more is taken.
    pub fn failure(&self) -> RepoError {
        match &*lock(&self.failure) {
            Some(error) => RepoError::Failed(error.clone()),
            None => RepoError::Refused("the writer has ended".to_owned()),
        }
    }

    pub fn check(&self) -> Result<(), RepoError> {
        if self.is_stopped() { Err(self.failure()) } else { Ok(()) }
    }

    /// Changes what [`super::Writer::finish`] returns.
    pub fn finished(&self, change: impl FnOnce(&mut Finished)) {
        change(&mut lock(&self.finished));
    }

    pub fn take_finished(&self) -> Finished {
        std::mem::take(&mut lock(&self.finished))
    }

    /// Keeps a session's log from now on.
    pub fn log_to(&self, log: SessionLog) {
        *lock(&self.log) = Some(log);
    }

    /// Appends to the session's log, if there is one.
    pub fn log(&self, record: impl FnOnce() -> Vec<u8>) -> Result<(), RepoError> {
        match &mut *lock(&self.log) {
            Some(log) => log.append(&record()),
            None => Ok(()),
        }
    }

    /// The extent is durable when data pack `pack` is; 0 means now. `record` is what a session's log says of it.
    pub fn durable_with(
        &self,
        pack: u64,
        disk: DiskHandle,
        extent: Extent,
        record: impl FnOnce() -> Vec<u8>,
    ) -> Result<(), RepoError> {
        let logs = lock(&self.log).is_some();
        let mut waiting = lock(&self.waiting);
        if pack <= waiting.durable {
            drop(waiting);
            self.log(record)?;
            // Nobody may be listening.
            let _ = lock(&self.waiting).notify.send((disk, vec![extent]));
            return Ok(());
        }
        if logs {
            waiting.records.entry(pack).or_default().extend(record());
        }
        let extents = waiting.extents.entry((pack, disk.0)).or_default();
        match extents.last_mut() {
            Some(last) if last.end() == extent.offset_bytes => last.len_bytes += extent.len_bytes,
            _ => extents.push(extent),
        }
        Ok(())
    }

    /// Data pack `pack` and all before it are durable. A session's log says so before anybody is told.
    pub fn is_durable(&self, pack: u64) -> Result<(), RepoError> {
        let (extents, records) = {
            let mut waiting = lock(&self.waiting);
            waiting.durable = pack;
            let later = waiting.extents.split_off(&(pack + 1, 0));
            let extents = std::mem::replace(&mut waiting.extents, later);
            let later = waiting.records.split_off(&(pack + 1));
            (extents, std::mem::replace(&mut waiting.records, later))
        };
        if let Some(log) = &mut *lock(&self.log) {
            records.values().try_for_each(|records| log.append(records))?;
            log.sync()?;
        }
        let waiting = lock(&self.waiting);
        for ((_, disk), extents) in extents {
            let _ = waiting.notify.send((DiskHandle(disk), extents));
        }
        Ok(())
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for a future on a thread that may block.
pub(super) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park(),
        }
    }
}
