//! The reader thread: it alone owns the virtqueue.
//!
//! Futures leave commands in the [`Inbox`]; the thread puts them into the ring, one request per piece that crosses no
//! boundary, and answers each when its last piece is done. All that has come in is submitted with one kick, all that has
//! completed is reaped at once, and nobody is woken who is awake: the thread sleeps in one `poll` on QEMU's completions, the
//! inbox and QEMU's socket, and asks for each of these wake-ups only just before.
//!
//! **A batch enters the ring only when the ring is empty.** QEMU (10.0 seen) aborts, and the guest with it, when it finds
//! our end closed while requests are in flight and is kicked for more before they are done (`vhost_user_server_inc_in_flight:
//! Assertion !server->wait_idle`). We cannot choose when we are killed, so that state must never exist: either QEMU has not
//! taken the batch, and nothing is in flight; or it has, all of it in one go, and nothing is left to take. For the same
//! reason a reader that leaves first waits for its batch.
//!
//! A command whose future was dropped stays here with its slot until QEMU has done all its pieces that are in the ring,
//! since until then QEMU may write into it; pieces that are not in the ring yet are never submitted.
//!
//! It ends when the source is dropped or the connection ends. Slots of unfinished reads are then never lent again: the
//! pool is closed first. A reader that leaves closes its half of the socket and waits for QEMU to close the other.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use blkio::{Blkio, Blkioq, Completion, ReqFlags};
use bytes::Bytes;
use nix::errno::Errno;
use tokio::sync::oneshot;

use super::link::{self, wait};
use super::pool::{Pool, Slot};
use super::{CLOSE_TIMEOUT, TRANSPORT};
use crate::block::SourceError;
use crate::extent::Extent;
use crate::units::MIB;

/// Entries of the ring: as many as QEMU's export takes.
pub(super) const RING_ENTRIES: usize = 1024;
/// A request is a chain of three entries: header, data, status.
const ENTRIES_PER_REQUEST: usize = 3;
/// Most requests in the ring.
const MAX_REQUESTS: usize = RING_ENTRIES / ENTRIES_PER_REQUEST;
/// Bytes that the ring takes in one batch: past this, no more are put in. The guest's requests wait for a batch in the same
/// thread and the same processors. 16 MiB are read a tenth faster than 4 where nobody holds the reader up, and the guest then
/// gets a fifth less done, with twice the latency.
const BATCH_BYTES: u64 = 4 * MIB;
/// Completions taken in one go.
const REAP: usize = 64;

/// Why requests fail after the source was closed.
const CLOSED: &str = "the source was closed";

/// What a future asks for.
pub(super) struct Command {
    /// The sectors to read or discard.
    pub sectors: Extent,
    pub kind: Kind,
}

pub(super) enum Kind {
    /// Read the sectors into `slot`, and answer with `wanted`, which lies within them.
    Read {
        slot: Slot,
        wanted: Extent,
        answer: oneshot::Sender<Result<Bytes, SourceError>>,
    },
    Discard {
        answer: oneshot::Sender<Result<(), SourceError>>,
    },
}

impl Command {
    fn is_cancelled(&self) -> bool {
        match &self.kind {
            Kind::Read { answer, .. } => answer.is_closed(),
            // A discard that was asked for is carried out: QEMU's answer is lost, its effect is not.
            Kind::Discard { .. } => false,
        }
    }

    /// Answers; QEMU has nothing of this command any more.
    fn finish(self, errno: Option<Errno>) {
        let refused = |what, extent| errno.map(|errno| SourceError::Refused { what, extent, errno });
        // A future that was dropped does not take its answer, and then the bytes go back to the pool.
        match self.kind {
            Kind::Read { slot, wanted, answer } => {
                let start = (wanted.offset_bytes - self.sectors.offset_bytes) as usize;
                let _ = answer.send(match refused("read", wanted) {
                    Some(error) => Err(error),
                    None => Ok(slot.freeze(start, wanted.len_bytes as usize)),
                });
            }
            Kind::Discard { answer } => {
                let _ = answer.send(refused("discard", self.sectors).map_or(Ok(()), Err));
            }
        }
    }
}

/// Where commands wait for the thread.
pub(super) struct Inbox {
    state: Mutex<InboxState>,
    /// Written to when the thread sleeps and shall not.
    waker: std::io::PipeWriter,
}

#[derive(Default)]
struct InboxState {
    commands: Vec<Command>,
    asleep: bool,
    stop: bool,
    /// Why no command is taken any more.
    gone: Option<String>,
}

impl Inbox {
    /// An inbox, and what becomes readable when the thread shall wake up.
    pub(super) fn new() -> std::io::Result<(Arc<Inbox>, std::io::PipeReader)> {
        let (reader, waker) = std::io::pipe()?;
        Ok((Arc::new(Inbox { state: Mutex::default(), waker }), reader))
    }

    /// Hands a command to the thread.
    pub(super) fn push(&self, command: Command) -> Result<(), SourceError> {
        let mut state = self.lock();
        if state.gone.is_some() {
            drop(state);
            return Err(self.gone());
        }
        state.commands.push(command);
        self.wake(state);
        Ok(())
    }

    /// Tells the thread to end.
    pub(super) fn stop(&self) {
        let mut state = self.lock();
        state.stop = true;
        self.wake(state);
    }

    /// The error for everything after the end of the connection.
    pub(super) fn gone(&self) -> SourceError {
        let reason = self.lock().gone.clone().unwrap_or_else(|| "the reader is closing".into());
        SourceError::Gone { transport: TRANSPORT, reason }
    }

    fn wake(&self, mut state: MutexGuard<'_, InboxState>) {
        let asleep = std::mem::take(&mut state.asleep);
        drop(state);
        if asleep {
            // One byte for one sleep: the pipe never fills. It is broken only when the thread has ended.
            let _ = (&self.waker).write(&[1]);
        }
    }

    /// Refuses commands from now on, and drops (which fails) those that nobody took.
    fn close(&self, reason: String) {
        let commands = {
            let mut state = self.lock();
            state.gone = Some(reason);
            std::mem::take(&mut state.commands)
        };
        drop(commands);
    }

    fn lock(&self) -> MutexGuard<'_, InboxState> {
        // No code panics while it holds the lock and has changed only half of the state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A command that the thread has taken.
struct Task {
    command: Command,
    /// Offset of the first byte that was not submitted yet.
    next: u64,
    /// Requests in the ring.
    in_ring: usize,
    errno: Option<Errno>,
}

/// All that the thread owns. Fields are dropped in this order: the queue before the device whose memory it uses, and QEMU's
/// socket last, so that QEMU sees the end when all is over.
pub(super) struct Worker {
    tasks: Vec<Option<Task>>,
    /// Unused places in `tasks`.
    vacant: Vec<usize>,
    /// Tasks with something left to submit.
    ready: VecDeque<usize>,
    in_ring: usize,
    boundary_bytes: u64,
    queue: Blkioq,
    _device: Blkio,
    inbox: Arc<Inbox>,
    wake: std::io::PipeReader,
    pool: Arc<Pool>,
    /// blkio's counterpart; silent after the handshake.
    _private: UnixStream,
    qemu: UnixStream,
}

/// The thread's part of the connection.
pub(super) struct Parts {
    pub queue: Blkioq,
    pub device: Blkio,
    pub inbox: Arc<Inbox>,
    pub wake: std::io::PipeReader,
    pub pool: Arc<Pool>,
    pub private: UnixStream,
    pub qemu: UnixStream,
    pub boundary_bytes: u64,
}

impl Worker {
    pub(super) fn new(parts: Parts) -> Worker {
        Worker {
            tasks: Vec::new(),
            vacant: Vec::new(),
            ready: VecDeque::new(),
            in_ring: 0,
            boundary_bytes: parts.boundary_bytes,
            queue: parts.queue,
            _device: parts.device,
            inbox: parts.inbox,
            wake: parts.wake,
            pool: parts.pool,
            _private: parts.private,
            qemu: parts.qemu,
        }
    }

    /// Serves until the end, answers everything that is left with the reason, and says farewell. Whether QEMU has let go.
    pub(super) fn run(mut self) -> bool {
        let work = std::panic::AssertUnwindSafe(|| self.work());
        let reason = std::panic::catch_unwind(work).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<&str>().map(|s| s.to_string());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            format!("what QEMU wrote into the shared ring makes no sense ({text})")
        });
        tracing::debug!(reason, unfinished = self.in_ring, "the vhost-user-blk reader ends");
        self.pool.close();
        self.inbox.close(reason);
        // The futures of what is left see that nobody will answer. No slot is ever lent again.
        self.tasks.clear();
        // QEMU finishes what it has in hand.
        link::leave(&self.qemu, Instant::now() + CLOSE_TIMEOUT).unwrap_or(false)
    }

    /// Returns why it ended.
    fn work(&mut self) -> String {
        // When to leave even if QEMU has not done its batch: set when we are told to stop.
        let mut leave_by = None;
        loop {
            if self.take_commands() {
                leave_by = leave_by.or_else(|| Some(Instant::now() + CLOSE_TIMEOUT));
            }
            match leave_by {
                None => self.submit(),
                Some(at) if self.in_ring == 0 || at <= Instant::now() => return CLOSED.into(),
                Some(_) => {}
            }
            match self.reap() {
                Err(reason) => return reason,
                Ok(0) => {}
                Ok(_) => continue,
            }
            if let Some(reason) = self.sleep(leave_by) {
                return reason;
            }
        }
    }

    fn take_commands(&mut self) -> bool {
        let (commands, stop) = {
            let mut state = self.inbox.lock();
            state.asleep = false;
            (std::mem::take(&mut state.commands), state.stop)
        };
        for command in commands {
            let task = Task { next: command.sectors.offset_bytes, command, in_ring: 0, errno: None };
            let at = self.vacant.pop().unwrap_or(self.tasks.len());
            if at == self.tasks.len() {
                self.tasks.push(None);
            }
            self.tasks[at] = Some(task);
            self.ready.push_back(at);
        }
        stop
    }

    /// Puts as much into the ring as fits, if it is empty: see the module's words. The next `do_io` kicks QEMU once for all.
    fn submit(&mut self) {
        if self.in_ring > 0 {
            return;
        }
        let mut bytes = 0;
        while self.in_ring < MAX_REQUESTS
            && bytes < BATCH_BYTES
            && let Some(&at) = self.ready.front()
        {
            let Some(task) = &mut self.tasks[at] else {
                self.ready.pop_front();
                continue;
            };
            let end = task.command.sectors.end();
            if task.errno.is_some() || task.command.is_cancelled() {
                task.next = end;
            }
            if task.next >= end {
                self.ready.pop_front();
                self.finish_if_done(at);
                continue;
            }
            match &task.command.kind {
                Kind::Read { slot, .. } => {
                    let rest = Extent::between(task.next, end);
                    let Some(piece) = rest.split_at_multiples(self.boundary_bytes).next() else { continue };
                    let start = task.next - task.command.sectors.offset_bytes;
                    // The slot is as long as the sectors of the command, so the piece lies within it.
                    let buffer = slot.as_mut_ptr().wrapping_add(start as usize);
                    task.next = piece.end();
                    bytes += piece.len_bytes;
                    self.queue.read(piece.offset_bytes, buffer, piece.len_bytes as usize, at, ReqFlags::empty());
                }
                Kind::Discard { .. } => {
                    let all = task.command.sectors;
                    task.next = end;
                    self.queue.discard(all.offset_bytes, all.len_bytes, at, ReqFlags::empty());
                }
            }
            task.in_ring += 1;
            self.in_ring += 1;
            if task.next >= end {
                self.ready.pop_front();
            }
        }
    }

    /// Tells QEMU what is new in the ring, and takes what it has completed; how many requests that was.
    fn reap(&mut self) -> Result<usize, String> {
        let mut completions = [const { MaybeUninit::<Completion>::uninit() }; REAP];
        let done = self.queue.do_io(&mut completions, 0, None, None).map_err(|e| format!("the ring failed: {e}"))?;
        for completion in &completions[..done] {
            // SAFETY: `do_io` has written the first `done` of them.
            let completion = unsafe { completion.assume_init_ref() };
            let at = completion.user_data;
            let Some(Some(task)) = self.tasks.get_mut(at) else {
                return Err("QEMU completed a request that was never made".into());
            };
            if completion.ret != 0 {
                task.errno = Some(Errno::from_raw(-completion.ret));
            }
            task.in_ring -= 1;
            self.in_ring -= 1;
            self.finish_if_done(at);
        }
        Ok(done)
    }

    /// Answers a task of which nothing is in the ring or left to submit.
    fn finish_if_done(&mut self, at: usize) {
        let place = &mut self.tasks[at];
        if let Some(task) = place.take_if(|t| t.in_ring == 0 && t.next >= t.command.sectors.end()) {
            self.vacant.push(at);
            task.command.finish(task.errno);
        }
    }

    /// Waits for something to do. Returns why all is over, if it is.
    fn sleep(&mut self, leave_by: Option<Instant>) -> Option<String> {
        let Some(fd) = self.queue.get_completion_fd() else {
            return Some("the ring has no completion event".into());
        };
        // SAFETY: the event belongs to `self.queue` and `self._device`, which outlive this borrow.
        let completed = unsafe { BorrowedFd::borrow_raw(fd) };
        // The order is what makes this safe: forget old news, ask for new ones, look once more, and only then sleep.
        let _ = nix::unistd::read(completed, &mut [0; 8]);
        self.queue.set_completion_fd_enabled(true);
        let end = match self.reap() {
            Err(reason) => Some(reason),
            Ok(1..) => None,
            Ok(0) => {
                let nothing_new = {
                    let mut state = self.inbox.lock();
                    // Who leaves takes no more commands, and knows that it was told to.
                    state.asleep = leave_by.is_some() || state.commands.is_empty() && !state.stop;
                    state.asleep
                };
                if nothing_new { self.wait(completed, leave_by) } else { None }
            }
        };
        self.queue.set_completion_fd_enabled(false);
        end
    }

    fn wait(&mut self, completed: BorrowedFd<'_>, leave_by: Option<Instant>) -> Option<String> {
        let timeout = leave_by.map(|at| at.saturating_duration_since(Instant::now()));
        match wait([completed, self.wake.as_fd(), self.qemu.as_fd()], timeout) {
            Err(e) => Some(format!("waiting for QEMU failed: {e}")),
            Ok([_, woken, qemu]) => {
                if woken {
                    let _ = self.wake.read(&mut [0; 64]);
                }
                // What it completed before it hung up is as good as ever.
                qemu.then(|| self.reap().err().unwrap_or_else(|| self.last_words()))
            }
        }
    }

    /// QEMU has nothing to say after the handshake: what is readable is the end, or a fault.
    fn last_words(&self) -> String {
        match (&self.qemu).read(&mut [0; 16]) {
            Ok(1..) => "QEMU sent a message that nobody asked for".into(),
            _ => "QEMU closed it (the export was deleted, or QEMU ended)".into(),
        }
    }
}
