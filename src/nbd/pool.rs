//! Buffers that come back: a fresh mebibyte costs 256 page faults, a used one none.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedSemaphorePermit;

use crate::limits::MAX_READ_BYTES;
use crate::units::GRANULE_BYTES;

/// The two sizes that are kept: one granule, and the longest read.
const CLASSES: [usize; 2] = [GRANULE_BYTES as usize, MAX_READ_BYTES as usize];

/// Keeps used buffers up to a number of bytes.
#[derive(Debug)]
pub struct Pool {
    keep_bytes: usize,
    idle: Mutex<Idle>,
}

#[derive(Debug, Default)]
struct Idle {
    bytes: usize,
    classes: [Vec<Vec<u8>>; CLASSES.len()],
}

impl Pool {
    /// A pool that keeps at most `keep_bytes` of idle buffers.
    pub fn new(keep_bytes: usize) -> Arc<Pool> {
        Arc::new(Pool { keep_bytes, idle: Mutex::default() })
    }

    /// A buffer of `len` bytes with any content; `permit` is given back when it is dropped.
    pub fn take(self: &Arc<Pool>, len: usize, permit: Option<OwnedSemaphorePermit>) -> Buffer {
        let class = CLASSES.iter().position(|size| len <= *size);
        let reused = class.and_then(|class| {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            let bytes = idle.classes[class].pop()?;
            idle.bytes -= bytes.len();
            Some(bytes)
        });
        let bytes = reused.unwrap_or_else(|| vec![0; class.map_or(len, |class| CLASSES[class])]);
        Buffer { bytes, len, home: class.map(|_| self.clone()), _permit: permit }
    }

    fn give_back(&self, bytes: Vec<u8>) {
        let Some(class) = CLASSES.iter().position(|size| bytes.len() == *size) else { return };
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.bytes + bytes.len() <= self.keep_bytes {
            idle.bytes += bytes.len();
            idle.classes[class].push(bytes);
        }
    }
}

/// Memory that a read fills. Goes back to its pool when dropped.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    len: usize,
    home: Option<Arc<Pool>>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Buffer {
    /// A buffer of its own, without a pool.
    pub fn plain(len: usize) -> Buffer {
        Buffer { bytes: vec![0; len], len, home: None, _permit: None }
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes as a vector of their own; a pooled buffer is lost to its pool.
    pub fn into_vec(mut self) -> Vec<u8> {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.truncate(self.len);
        bytes
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            home.give_back(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_the_rest_is_freed() {
        let pool = Pool::new(2 << 20);
        let mut first = pool.take(1 << 20, None);
        first.as_mut()[0] = 7;
        let at = first.as_ref().as_ptr();
        drop(first);
        let again = pool.take(70_000, None);
        assert_eq!((again.as_ref().as_ptr(), again.len(), again.as_ref()[0]), (at, 70_000, 7));
        drop([pool.take(1 << 20, None), pool.take(1 << 20, None), pool.take(1 << 20, None)]);
        drop(again);
        assert_eq!(pool.idle.lock().unwrap().bytes, 2 << 20);
        drop(pool.take(5 << 20, None)); // larger than any class: not kept
        assert_eq!(pool.idle.lock().unwrap().bytes, 2 << 20);
    }
}
