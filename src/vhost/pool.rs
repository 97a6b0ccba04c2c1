//! The memory that we share with QEMU: one sealed memfd, lent out in runs of granules.
//!
//! A run ([`Slot`]) is in exactly one hand: the read that QEMU is filling, or the [`Bytes`] that a reader holds. Giving it
//! back is dropping it. The mapping lives until the last slot is dropped, whatever happened to the connection.
//!
//! Runs are handed out first come, first served: a long read is never starved by short ones that would still fit.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use memmap2::MmapRaw;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use tokio::sync::oneshot;

use crate::units::GRANULE_BYTES;

/// What runs are counted in.
const UNIT_BYTES: usize = GRANULE_BYTES as usize;

/// The shared memory and who has which part of it.
pub(super) struct Pool {
    file: File,
    map: MmapRaw,
    state: Mutex<State>,
}

struct State {
    /// One per unit.
    taken: Vec<bool>,
    waiting: VecDeque<Waiter>,
    closed: bool,
}

struct Waiter {
    units: usize,
    answer: oneshot::Sender<Slot>,
}

impl Pool {
    /// Shared memory of `len_bytes`, rounded down to whole units.
    pub(super) fn new(len_bytes: u64) -> io::Result<Arc<Pool>> {
        let units = usize::try_from(len_bytes).map_err(io::Error::other)? / UNIT_BYTES;
        let fd = memfd_create("livebackup-vhost", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let file = File::from(fd);
        file.set_len((units * UNIT_BYTES) as u64)?;
        // QEMU gets this descriptor. Nobody, itself included, may cut the memory from under either of us: that is SIGBUS.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let map = MmapRaw::map_raw(&file)?;
        let state = State { taken: vec![false; units], waiting: VecDeque::new(), closed: false };
        Ok(Arc::new(Pool { file, map, state: Mutex::new(state) }))
    }

    /// The descriptor that QEMU maps; it lives as long as the pool.
    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Where the mapping starts here.
    pub(super) fn address(&self) -> usize {
        self.map.as_mut_ptr() as usize
    }

    /// Length of the mapping.
    pub(super) fn len_bytes(&self) -> usize {
        self.map.len()
    }

    /// A run of at least `len_bytes`, once there is one; `None` when the pool was closed. Dropping the future gives up
    /// the place in the queue.
    pub(super) async fn lend(self: &Arc<Self>, len_bytes: usize) -> Option<Slot> {
        let units = len_bytes.div_ceil(UNIT_BYTES);
        let answered = {
            let mut state = self.lock();
            if state.closed || units > state.taken.len() {
                return None;
            }
            if state.waiting.is_empty()
                && let Some(first) = state.take(units)
            {
                return Some(Slot { pool: self.clone(), first, units });
            }
            let (answer, answered) = oneshot::channel();
            state.waiting.push_back(Waiter { units, answer });
            answered
        };
        /// A waiter that gives up may have been the one who held up those behind it.
        struct Leave<'a>(&'a Arc<Pool>);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                self.0.serve(self.0.lock());
            }
        }
        // Dropped after `answered`, which is declared inside the block below.
        let _leave = Leave(self);
        { answered }.await.ok()
    }

    /// No more slots from now on; those who wait are told.
    pub(super) fn close(&self) {
        let waiting = {
            let mut state = self.lock();
            state.closed = true;
            std::mem::take(&mut state.waiting)
        };
        drop(waiting);
    }

    /// Units in somebody's hand.
    #[cfg(test)]
    fn taken_units(&self) -> usize {
        self.lock().taken.iter().filter(|t| **t).count()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock and has changed only half of the state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves those at the head of the queue for whom there is room.
    fn serve<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State>) {
        while let Some(head) = state.waiting.front() {
            if head.answer.is_closed() {
                state.waiting.pop_front();
                continue;
            }
            let units = head.units;
            let Some(first) = state.take(units) else { return };
            let Some(waiter) = state.waiting.pop_front() else { return };
            if let Err(slot) = waiter.answer.send(Slot { pool: self.clone(), first, units }) {
                // Cancelled this moment. `Slot::drop` would lock again: undo by hand.
                state.give_back(slot.first, slot.units);
                slot.forget();
            }
        }
    }
}

impl State {
    /// Takes the first run of so many free units.
    fn take(&mut self, units: usize) -> Option<usize> {
        let mut run = 0;
        for at in 0..self.taken.len() {
            run = if self.taken[at] { 0 } else { run + 1 };
            if run == units {
                let first = at + 1 - units;
                self.taken[first..=at].fill(true);
                return Some(first);
            }
        }
        None
    }

    fn give_back(&mut self, first: usize, units: usize) {
        self.taken[first..first + units].fill(false);
    }
}

/// A run of units that nobody else has.
pub(super) struct Slot {
    pool: Arc<Pool>,
    first: usize,
    units: usize,
}

impl Slot {
    /// Where QEMU is to write.
    pub(super) fn as_mut_ptr(&self) -> *mut u8 {
        // `first` is below the number of units of the mapping, so this stays inside it.
        self.pool.map.as_mut_ptr().wrapping_add(self.first * UNIT_BYTES)
    }

    /// `len` bytes from `start` on, as a buffer that gives the slot back when the last clone of it is dropped. The caller
    /// has nothing under way that writes to the slot.
    pub(super) fn freeze(self, start: usize, len: usize) -> Bytes {
        assert!(start + len <= self.units * UNIT_BYTES, "the bytes lie within the slot");
        Bytes::from_owner(Filled { slot: self, start, len })
    }

    fn forget(self) {
        // Keeps the units marked as they are, but lets go of the pool.
        let mut slot = self;
        slot.units = 0;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.units > 0 {
            let mut state = self.pool.lock();
            state.give_back(self.first, self.units);
            self.pool.serve(state);
        }
    }
}

/// A slot whose read has completed.
struct Filled {
    slot: Slot,
    start: usize,
    len: usize,
}

impl AsRef<[u8]> for Filled {
    fn as_ref(&self) -> &[u8] {
        let first = self.slot.as_mut_ptr().wrapping_add(self.start);
        // SAFETY: `freeze` checked that the range lies within the slot, and a slot lies within the mapping, which
        // `self.slot.pool` keeps in place; the seals keep the file behind it from shrinking. Every bit pattern is a `u8`.
        // In this process nobody writes there: the slot is ours alone and the mapping is never written to by us. QEMU
        // writes only for a read that is outstanding, and this slot's read has completed (a slot whose read has not is
        // never frozen). A QEMU that breaks the protocol could still change the bytes under a reader, as it could have
        // sent other bytes in the first place: they are data that nothing but a digest is computed from.
        unsafe { std::slice::from_raw_parts(first, self.len) }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::task::{Context, Poll, Waker};

    use super::*;

    const U: usize = UNIT_BYTES;

    fn poll<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
        std::pin::Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
    }

    fn ready(pool: &Arc<Pool>, len: usize) -> Slot {
        match poll(&mut Box::pin(pool.lend(len))) {
            Poll::Ready(Some(slot)) => slot,
            _ => panic!("no room for {len}"),
        }
    }

    #[test]
    fn slots_never_overlap_and_come_back() {
        let pool = Pool::new(16 * U as u64).unwrap();
        let a = ready(&pool, 1);
        let b = ready(&pool, 3 * U);
        let c = ready(&pool, 12 * U - 5);
        assert_eq!((a.first, b.first, c.first), (0, 1, 4));
        let mut d = Box::pin(pool.lend(2 * U));
        assert!(poll(&mut d).is_pending());
        drop(a);
        assert!(poll(&mut d).is_pending(), "one unit is not two");
        drop(b);
        let Poll::Ready(Some(d)) = poll(&mut d) else { panic!("served") };
        assert_eq!(d.first, 0);
        let bytes = d.freeze(512, U);
        let clone = bytes.slice(5..9);
        drop(bytes);
        assert_eq!(pool.taken_units(), 14);
        drop((clone, c));
        assert_eq!(pool.taken_units(), 0);
    }

    #[test]
    fn a_long_read_is_not_starved_and_one_that_gives_up_holds_up_nobody() {
        let pool = Pool::new(4 * U as u64).unwrap();
        let a = ready(&pool, 2 * U);
        let mut long = Box::pin(pool.lend(4 * U));
        assert!(poll(&mut long).is_pending());
        let mut short = Box::pin(pool.lend(U));
        assert!(poll(&mut short).is_pending(), "the long one was first");
        drop(long);
        let Poll::Ready(Some(b)) = poll(&mut short) else { panic!("the way is free") };
        // Granted, but dropped before it was looked at.
        let mut lost = Box::pin(pool.lend(2 * U));
        assert!(poll(&mut lost).is_pending());
        drop(a);
        drop(lost);
        drop(b);
        drop(short);
        assert_eq!(pool.taken_units(), 0);
    }

    #[test]
    fn the_memory_cannot_be_cut_and_outlives_the_source() {
        let pool = Pool::new(4 * U as u64).unwrap();
        assert!(pool.file.set_len(0).is_err());
        assert!(pool.file.set_len(8 * U as u64).is_err());
        let bytes = ready(&pool, U).freeze(0, U);
        let mut waiting = Box::pin(pool.lend(4 * U));
        assert!(poll(&mut waiting).is_pending());
        pool.close();
        assert!(matches!(poll(&mut waiting), Poll::Ready(None)));
        drop(waiting);
        assert!(matches!(poll(&mut Box::pin(pool.lend(1))), Poll::Ready(None)));
        drop(pool);
        assert!(bytes.iter().all(|b| *b == 0));
    }
}
