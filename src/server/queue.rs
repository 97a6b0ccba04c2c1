//! Whose turn it is: one session a VM, so many in all, the others wait in the order in which they came.
//!
//! ```text
//! join ─► waiting ──(its VM is free, a place is free, and nobody before it could go instead)──► running ─► ended
//!            └─► dropped: the client left
//! ```
//!
//! A session counts as running until its fleece is out of QEMU. Waiting holds nothing of any guest.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use tokio::sync::Notify;

use crate::wire::message::{Failure, FailureCode, Queued, Waiting};

/// Clients that wait at once, at most.
const MAX_WAITING: usize = 256;

/// The queue; clones share it.
#[derive(Clone, Debug)]
pub struct Queue {
    lines: Arc<Mutex<Lines>>,
    changed: Arc<Notify>,
}

#[derive(Debug)]
struct Lines {
    max_running: usize,
    next: u64,
    /// By the number that each got when it came: all that run and wait.
    entries: BTreeMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    vm: String,
    client: String,
    since: Timestamp,
    runs: bool,
}

impl Lines {
    fn running(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values().filter(|entry| entry.runs)
    }

    fn is_free(&self, vm: &str) -> bool {
        self.running().all(|entry| entry.vm != vm)
    }

    /// Lets those run that can, the first come first.
    fn settle(&mut self) {
        while self.running().count() < self.max_running {
            let first = self.entries.iter().find(|(_, entry)| !entry.runs && self.is_free(&entry.vm));
            let Some((&number, _)) = first else { return };
            if let Some(entry) = self.entries.get_mut(&number) {
                (entry.runs, entry.since) = (true, Timestamp::now());
            }
        }
    }
}

impl Queue {
    /// A queue of which so many run at once.
    pub fn new(max_running: usize) -> Self {
        let lines = Lines { max_running, next: 0, entries: BTreeMap::new() };
        Self { lines: Arc::new(Mutex::new(lines)), changed: Arc::default() }
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gets in line for a session of a VM.
    pub fn join(&self, vm: &str, client: &str) -> Result<Place, Failure> {
        let mut lines = self.lines();
        if lines.entries.values().filter(|entry| !entry.runs).count() >= MAX_WAITING {
            let what = format!("{MAX_WAITING} backups wait at this server already: try again later");
            return Err(Failure::new(FailureCode::Busy, what));
        }
        let number = lines.next;
        lines.next += 1;
        let entry = Entry { vm: vm.to_owned(), client: client.to_owned(), since: Timestamp::now(), runs: false };
        lines.entries.insert(number, entry);
        lines.settle();
        Ok(Place { queue: self.clone(), number })
    }

    /// Who waits for a VM, the first first.
    pub fn waiting_for(&self, vm: &str) -> Vec<Queued> {
        let lines = self.lines();
        let waiting = lines.entries.values().filter(|entry| !entry.runs && entry.vm == vm);
        waiting.map(|entry| Queued { client: entry.client.clone(), since: entry.since }).collect()
    }

    /// Whose session of a VM runs.
    pub fn running(&self, vm: &str) -> Option<Queued> {
        let lines = self.lines();
        let entry = lines.running().find(|entry| entry.vm == vm)?;
        Some(Queued { client: entry.client.clone(), since: entry.since })
    }
}

/// A place in the queue, first waiting, then running. It is given up by dropping it.
#[derive(Debug)]
pub struct Place {
    queue: Queue,
    number: u64,
}

impl Place {
    /// Whether it is this one's turn.
    pub fn runs(&self) -> bool {
        self.queue.lines().entries.get(&self.number).is_some_and(|entry| entry.runs)
    }

    /// What is waited for.
    pub fn reason(&self) -> Waiting {
        let lines = self.queue.lines();
        let vm = lines.entries.get(&self.number).map(|entry| entry.vm.clone()).unwrap_or_default();
        let ahead = lines.entries.range(..self.number).filter(|(_, e)| !e.runs && e.vm == vm).count() as u32;
        match lines.running().find(|entry| entry.vm == vm) {
            Some(entry) => {
                let why = format!("{} backs up VM {vm:?} since {:.0}", entry.client, entry.since);
                Waiting { why, since: Some(entry.since), ahead }
            }
            // Other VMs may be none of this client's business.
            None => {
                let count = lines.running().count();
                let why = format!("{count} backups run at this server, and more are not allowed at once");
                Waiting { why, since: lines.running().map(|entry| entry.since).min(), ahead }
            }
        }
    }

    /// Waits for the turn.
    pub async fn turn(&self) {
        loop {
            let changed = self.queue.changed.notified();
            let mut changed = std::pin::pin!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            if self.runs() {
                return;
            }
            changed.await;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut lines = self.queue.lines();
        lines.entries.remove(&self.number);
        lines.settle();
        drop(lines);
        self.queue.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_runs_a_vm_and_so_many_in_all_in_order() {
        let queue = Queue::new(2);
        let join = |vm: &str, client: &str| queue.join(vm, client).unwrap();
        let a1 = join("a", "one");
        let a2 = join("a", "two");
        let b1 = join("b", "one");
        let c1 = join("c", "one");
        assert!(a1.runs() && !a2.runs() && b1.runs() && !c1.runs());
        assert!(a2.reason().why.contains("one backs up VM \"a\""), "{:?}", a2.reason());
        assert!(c1.reason().why.contains("2 backups run"), "{:?}", c1.reason());
        let a3 = join("a", "three");
        assert_eq!(a3.reason().ahead, 1);
        assert_eq!(queue.waiting_for("a").iter().map(|q| q.client.as_str()).collect::<Vec<_>>(), ["two", "three"]);
        drop(b1);
        assert!(c1.runs() && !a2.runs(), "a VM that is busy holds up no other");
        drop(a2);
        drop(a1);
        assert!(a3.runs() && queue.running("a").unwrap().client == "three");
        let b2 = join("b", "two");
        assert!(!b2.runs());
        drop(c1);
        assert!(b2.runs());
    }

    #[test]
    fn waiting_has_a_limit() {
        let queue = Queue::new(1);
        let places: Vec<_> = (0..=MAX_WAITING).map(|_| queue.join("a", "x").unwrap()).collect();
        assert_eq!(queue.join("b", "x").unwrap_err().code, FailureCode::Busy);
        drop(places);
        assert!(queue.join("b", "x").unwrap().runs());
    }

    #[tokio::test]
    async fn a_turn_comes_when_the_one_before_goes() {
        let queue = Queue::new(1);
        let first = queue.join("a", "one").unwrap();
        let second = queue.join("a", "two").unwrap();
        let waiting = tokio::spawn(async move {
            second.turn().await;
            second
        });
        tokio::task::yield_now().await;
        drop(first);
        assert!(waiting.await.unwrap().runs());
        assert!(queue.running("a").is_none());
    }
}
