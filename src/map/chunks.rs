//! Chunks, decoded once for all who ask for them.
//!
//! ```text
//!  absent ──asked for──► coming (who waits for it) ──read, right──► kept ──others were used──► absent
//!                            └─────────────────────damaged────────────────────────────────────► absent
//! ```
//!
//! Chunks are known by their digests: what two disks or two places of one have in common is kept once. Chunks that are
//! asked for together are read together, in batches, and each is handed out as soon as it is decoded. Who stops waiting
//! stops nothing: the chunk is kept for the next one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::sync::oneshot;

use super::lru::Lru;
use super::workers::Workers;
use crate::block::BoxFuture;
use crate::repo::{Digest, Reader, RepoError};
use crate::units::MIB;

/// Bytes of decoded chunks that are kept.
const KEPT_BYTES: usize = 64 * MIB as usize;
/// Bytes of chunks that one job decodes, at most.
const BATCH_BYTES: usize = MIB as usize;

/// A chunk, or why there is none. The error is everybody's who waited.
pub(super) type Decoded = Result<Bytes, Arc<RepoError>>;

struct State {
    kept: Lru<Digest, Bytes>,
    coming: HashMap<Digest, Vec<oneshot::Sender<Decoded>>>,
}

/// The chunks of a repository.
pub(super) struct Chunks {
    reader: Arc<Reader>,
    workers: Arc<Workers>,
    state: Arc<Mutex<State>>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Chunks {
    pub fn new(reader: Arc<Reader>, workers: Arc<Workers>) -> Self {
        let state = State { kept: Lru::new(KEPT_BYTES), coming: HashMap::new() };
        Self { reader, workers, state: Arc::new(Mutex::new(state)) }
    }

    /// Asks for chunks, by digest (never [`Digest::ZERO`]) and length. All of them are on their way when this returns.
    pub fn get(&self, wanted: &[(Digest, usize)]) -> Vec<BoxFuture<'static, Decoded>> {
        let (mut answers, mut absent): (Vec<BoxFuture<'static, Decoded>>, _) = (vec![], vec![]);
        let mut state = lock(&self.state);
        for (digest, len) in wanted {
            if let Some(bytes) = state.kept.get(digest) {
                answers.push(Box::pin(std::future::ready(Ok(bytes))));
                continue;
            }
            let (sender, receiver) = oneshot::channel();
            let waiting = state.coming.entry(*digest).or_insert_with(|| {
                absent.push((*digest, *len));
                vec![]
            });
            waiting.push(sender);
            answers.push(Box::pin(receiver.map(|answer| answer.unwrap_or_else(|_| Err(unanswered())))));
        }
        drop(state);
        self.read(absent);
        answers
    }

    /// Has chunks decoded that somebody will ask for.
    pub fn expect(&self, wanted: &[(Digest, usize)]) {
        let mut absent = vec![];
        let mut state = lock(&self.state);
        for (digest, len) in wanted {
            if !state.kept.has(digest) && !state.coming.contains_key(digest) {
                state.coming.insert(*digest, vec![]);
                absent.push((*digest, *len));
            }
        }
        drop(state);
        self.read(absent);
    }

    /// Reads chunks of which the state says that they are coming.
    fn read(&self, absent: Vec<(Digest, usize)>) {
        let mut rest = &absent[..];
        while !rest.is_empty() {
            let mut sum = 0;
            let fit = rest.iter().take_while(|(_, len)| {
                sum += len;
                sum <= BATCH_BYTES
            });
            let (batch, behind) = rest.split_at(fit.count().max(1));
            rest = behind;
            let batch = Batch { state: self.state.clone(), wanted: batch.to_vec(), done: 0 };
            let reader = self.reader.clone();
            self.workers.run(move |scratch| batch.read(&reader, scratch));
        }
    }
}

/// Chunks that are read together. All that wait for one get an answer, whatever becomes of it.
struct Batch {
    state: Arc<Mutex<State>>,
    wanted: Vec<(Digest, usize)>,
    done: usize,
}

impl Batch {
    fn read(mut self, reader: &Reader, scratch: &mut crate::repo::reader::Scratch) {
        let wanted = self.wanted.clone();
        reader.read_each(scratch, &wanted, |_, chunk| self.answer(chunk.map(Bytes::from).map_err(Arc::new)));
    }

    /// For the next one of the batch.
    fn answer(&mut self, chunk: Decoded) {
        let Some((digest, _)) = self.wanted.get(self.done) else { return };
        self.done += 1;
        let mut state = lock(&self.state);
        let waiting = state.coming.remove(digest).unwrap_or_default();
        let gone = chunk.as_ref().ok().map(|bytes| state.kept.insert(*digest, bytes.clone(), bytes.len()));
        drop(state);
        drop(gone);
        for waits in waiting {
            // Who waited may have gone.
            let _ = waits.send(chunk.clone());
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        while self.done < self.wanted.len() {
            self.answer(Err(unanswered()));
        }
    }
}

fn unanswered() -> Arc<RepoError> {
    Arc::new(RepoError::Refused("it was not read to the end".to_owned()))
}
