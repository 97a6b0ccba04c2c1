//! Threads that read, decompress and compare digests, a fixed number of them: none of that belongs on the runtime.
//!
//! Jobs are done in the order in which they came, by whichever thread is free, so that none of them waits for ever. When
//! the pool is dropped, jobs that have not begun are dropped, too, and the threads end by themselves after what they are at.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::repo::RepoError;
use crate::repo::reader::Scratch;

type Job = Box<dyn FnOnce(&mut Scratch) + Send>;

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Option<Job> {
        let idle = |queue: &mut Queue| queue.jobs.is_empty() && !queue.closed;
        let mut queue = self.changed.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        queue.jobs.pop_front()
    }
}

/// The threads.
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: usize,
}

impl Workers {
    pub fn start(threads: usize) -> Result<Self, RepoError> {
        let this = Self { shared: Arc::default(), threads };
        for _ in 0..threads {
            // Made here, where it may still fail.
            let mut scratch = Scratch::new()?;
            let shared = this.shared.clone();
            let work = move || {
                while let Some(job) = shared.next() {
                    // Who waits for a job sees that it ended without a result; the next job finds its buffers as usual.
                    let _ = catch_unwind(AssertUnwindSafe(|| job(&mut scratch)));
                }
            };
            let started = thread::Builder::new().name("map".to_owned()).spawn(work);
            started.map_err(|e| RepoError::Refused(format!("a thread for reading cannot be started: {e}")))?;
        }
        Ok(this)
    }

    /// Has something done.
    pub fn run(&self, job: impl FnOnce(&mut Scratch) + Send + 'static) {
        self.shared.lock().jobs.push_back(Box::new(job));
        self.shared.changed.notify_one();
    }

    /// Whether more waits than the threads have to do next: no time for what nobody has asked for.
    pub fn are_busy(&self) -> bool {
        self.shared.lock().jobs.len() > self.threads
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        let left = {
            let mut queue = self.shared.lock();
            queue.closed = true;
            std::mem::take(&mut queue.jobs)
        };
        self.shared.changed.notify_all();
        drop(left);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_job_that_panics_takes_nothing_with_it() {
        let workers = Workers::start(1).unwrap();
        let (sender, receiver) = channel();
        workers.run(|_| panic!("on purpose"));
        workers.run(move |_| sender.send(7).unwrap());
        assert_eq!(receiver.recv(), Ok(7));
        let (sender, receiver) = channel::<()>();
        let (begun, begins) = channel();
        let (go, wait) = channel::<()>();
        workers.run(move |_| {
            begun.send(()).unwrap();
            _ = wait.recv();
        });
        begins.recv().unwrap();
        workers.run(move |_| drop(sender));
        assert!(!workers.are_busy());
        drop(workers);
        assert!(receiver.recv().is_err(), "what has not begun is dropped");
        drop(go);
    }
}
