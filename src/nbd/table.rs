//! What is on the wire: every request that waits for its reply, and what arrived of it (pure, under a lock).
//!
//! An *operation* is what a caller asked for; it goes out as one request or, for a read that has to be split, as
//! several *parts* into one buffer. Its cookies are `operation << 16 | part`. An operation stays here until the last
//! part is answered, also when its caller has gone: only so can a late reply be read over.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::coverage::Coverage;
use super::layout::{Descriptor, Malformed};
use super::pool::Buffer;

/// Most parts of one operation.
pub(super) const MAX_PARTS: usize = 1024;
const PART_BITS: u32 = 16;
const _: () = assert!(MAX_PARTS < 1 << PART_BITS);

/// A cookie that names no request: connection-fatal, since we cannot know what its reply carries.
const UNKNOWN: Malformed = Malformed("a reply to a request that is not waiting");

/// How an operation ended, for its caller.
#[derive(Debug)]
pub(super) enum Outcome {
    /// All of a read.
    Read(Buffer),
    /// Trim, zeroes, flush.
    Done,
    /// Block status: context id, descriptors.
    Status(Vec<(u32, Vec<Descriptor>)>),
    /// The server's errno (never 0) and words; the first of several.
    Failed(u32, String),
    /// The session ended.
    Gone(String),
}

/// What an operation collects.
pub(super) enum Work {
    /// A read into `buffer` (`None` while the reader fills it).
    Read {
        /// Where the bytes go.
        buffer: Option<Buffer>,
        /// Disk offset of the buffer's first byte.
        offset: u64,
    },
    /// Nothing but success.
    Plain,
    /// Descriptors of these contexts.
    Status {
        /// Ids that may come.
        contexts: Vec<u32>,
        /// What came.
        found: Vec<(u32, Vec<Descriptor>)>,
    },
}

/// One request of an operation.
pub(super) struct Part {
    offset: u64,
    len: u32,
    arrived: Coverage,
    done: bool,
}

impl Part {
    pub(super) fn new(offset: u64, len: u32) -> Part {
        Part { offset, len, arrived: Coverage::default(), done: false }
    }

    /// Offset and length on the disk.
    pub(super) fn extent(&self) -> (u64, u32) {
        (self.offset, self.len)
    }
}

/// An operation under way.
pub(super) struct Operation {
    pub(super) work: Work,
    pub(super) parts: Vec<Part>,
    pub(super) reply: oneshot::Sender<Outcome>,
    /// Places among the requests in flight; given back when the last part is answered.
    pub(super) places: Option<OwnedSemaphorePermit>,
    pub(super) left: usize,
    pub(super) failed: Option<(u32, String)>,
}

/// A buffer that the reader borrows to fill `range` of it.
pub(super) struct Landing {
    operation: u64,
    pub(super) buffer: Buffer,
    pub(super) range: std::ops::Range<usize>,
}

#[derive(Default)]
struct Inner {
    next: u64,
    waiting: HashMap<u64, Operation>,
    ended: Option<String>,
}

/// The table.
#[derive(Default)]
pub(super) struct Table(Mutex<Inner>);

impl Inner {
    fn find(&mut self, cookie: u64) -> Result<(&mut Operation, usize), Malformed> {
        let operation = self.waiting.get_mut(&(cookie >> PART_BITS)).ok_or(UNKNOWN)?;
        let part = (cookie & ((1 << PART_BITS) - 1)) as usize;
        if operation.parts.get(part).is_none_or(|p| p.done) {
            return Err(UNKNOWN);
        }
        Ok((operation, part))
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts an operation in and returns the cookie of its first part (the others follow it); or why the session ended.
    pub(super) fn insert(&self, operation: Operation) -> Result<u64, String> {
        let mut inner = self.lock();
        if let Some(reason) = &inner.ended {
            return Err(reason.clone());
        }
        inner.next += 1;
        let id = inner.next;
        inner.waiting.insert(id, operation);
        Ok(id << PART_BITS)
    }

    /// Ends the session: everyone who waits gets the reason. Only the first reason counts.
    pub(super) fn end(&self, reason: &str) {
        let waiting = {
            let mut inner = self.lock();
            if inner.ended.is_none() {
                inner.ended = Some(reason.to_owned());
            }
            std::mem::take(&mut inner.waiting)
        };
        for operation in waiting.into_values() {
            let _ = operation.reply.send(Outcome::Gone(reason.to_owned()));
        }
    }

    /// Why the session ended, once it has.
    pub(super) fn ended(&self) -> Option<String> {
        self.lock().ended.clone()
    }

    /// How many operations wait.
    pub(super) fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    /// Where and how long the part is, and whether it reads data.
    pub(super) fn part(&self, cookie: u64) -> Result<(u64, u32, bool), Malformed> {
        let mut inner = self.lock();
        let (operation, part) = inner.find(cookie)?;
        let reads = matches!(operation.work, Work::Read { .. });
        let part = &operation.parts[part];
        Ok((part.offset, part.len, reads))
    }

    /// Lends the buffer for `len` bytes of data at `offset` that are about to come.
    pub(super) fn land(&self, cookie: u64, offset: u64, len: u32) -> Result<Landing, Malformed> {
        let mut inner = self.lock();
        let (operation, part) = inner.find(cookie)?;
        let part = &mut operation.parts[part];
        let Work::Read { buffer, offset: base } = &mut operation.work else {
            return Err(Malformed("data in reply to a request that reads none"));
        };
        let start = offset.checked_sub(part.offset).filter(|s| *s < u64::from(part.len));
        let start = start.ok_or(Malformed("a chunk begins outside its read"))? as u32;
        if len == 0 || len > part.len - start {
            return Err(Malformed("a chunk is empty or reaches past its read"));
        }
        part.arrived.add(start, start + len)?;
        let at = (offset - *base) as usize;
        let buffer = buffer.take().ok_or(UNKNOWN)?;
        Ok(Landing { operation: cookie >> PART_BITS, buffer, range: at..at + len as usize })
    }

    /// Takes the buffer back.
    pub(super) fn landed(&self, landing: Landing) {
        let mut inner = self.lock();
        if let Some(Operation { work: Work::Read { buffer, .. }, .. }) = inner.waiting.get_mut(&landing.operation) {
            *buffer = Some(landing.buffer);
        }
    }

    /// Takes the descriptors of one context.
    pub(super) fn status(&self, cookie: u64, context: u32, descriptors: Vec<Descriptor>) -> Result<(), Malformed> {
        let mut inner = self.lock();
        let (operation, _) = inner.find(cookie)?;
        let Work::Status { contexts, found } = &mut operation.work else {
            return Err(Malformed("block status in reply to another request"));
        };
        if !contexts.contains(&context) || found.iter().any(|(id, _)| *id == context) {
            return Err(Malformed("block status of a context twice, or of one that was not negotiated"));
        }
        found.push((context, descriptors));
        Ok(())
    }

    /// Notes an error; the part is not over yet.
    pub(super) fn fail(&self, cookie: u64, errno: u32, message: String) -> Result<(), Malformed> {
        let mut inner = self.lock();
        let (operation, _) = inner.find(cookie)?;
        operation.failed.get_or_insert((errno, message));
        Ok(())
    }

    /// The part's reply is complete. The last part tells the caller; a caller that has gone is no matter.
    pub(super) fn finish(&self, cookie: u64) -> Result<(), Malformed> {
        let mut inner = self.lock();
        let (operation, part) = inner.find(cookie)?;
        let part = &mut operation.parts[part];
        if operation.failed.is_none() {
            match &operation.work {
                Work::Read { .. } if !part.arrived.is_whole(part.len) => {
                    return Err(Malformed("a read ended before all of its data came"));
                }
                Work::Status { contexts, found } if found.len() != contexts.len() => {
                    return Err(Malformed("block status ended before every context came"));
                }
                _ => {}
            }
        }
        part.done = true;
        operation.left -= 1;
        if operation.left > 0 {
            return Ok(());
        }
        let operation = inner.waiting.remove(&(cookie >> PART_BITS)).ok_or(UNKNOWN)?;
        drop(inner); // a buffer whose caller has gone is dropped below: not under the lock
        let outcome = match (operation.failed, operation.work) {
            (Some((errno, message)), _) => Outcome::Failed(errno, message),
            (None, Work::Read { buffer, .. }) => Outcome::Read(buffer.ok_or(UNKNOWN)?),
            (None, Work::Plain) => Outcome::Done,
            (None, Work::Status { found, .. }) => Outcome::Status(found),
        };
        drop(operation.places);
        let _ = operation.reply.send(outcome);
        Ok(())
    }
}
