//! Buffers that come back: a fresh megabyte costs 256 page faults, more than its transport.
//!
//! Handed out as [`Bytes`]; when the last reference is dropped, the buffer returns to its pool. Sizes go by powers of two
//! from a granule to the longest read, so that a small frame does not hold a megabyte.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::limits::MAX_READ_BYTES;
use crate::units::{GRANULE_BYTES, MIB};

const CLASSES: usize = (MAX_READ_BYTES / GRANULE_BYTES).ilog2() as usize + 1;
/// Free buffers of one class that are kept, in bytes; the rest goes back to the system.
const KEPT_BYTES: usize = 32 * MIB as usize;

const _: () = assert!((GRANULE_BYTES << (CLASSES - 1)) == MAX_READ_BYTES);

type Free = [Mutex<Vec<Box<[u8]>>>; CLASSES];

/// A source of buffers; clones share the buffers.
#[derive(Clone, Debug, Default)]
pub struct Pool(Arc<Free>);

/// A buffer of a pool, for one owner to fill.
#[derive(Debug)]
pub struct Buffer {
    data: Box<[u8]>,
    len: usize,
    class: usize,
    pool: Arc<Free>,
}

impl Pool {
    /// A buffer of `len` bytes (at most `MAX_READ_BYTES`) with whatever content.
    pub fn take(&self, len: usize) -> Buffer {
        debug_assert!(len as u64 <= MAX_READ_BYTES);
        let class = len.div_ceil(GRANULE_BYTES as usize).next_power_of_two().ilog2() as usize;
        let kept = self.0[class].lock().unwrap_or_else(PoisonError::into_inner).pop();
        let data = kept.unwrap_or_else(|| vec![0; (GRANULE_BYTES as usize) << class].into());
        Buffer { data, len, class, pool: self.0.clone() }
    }
}

impl Buffer {
    /// The bytes, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.data[..self.len]
    }

    /// Shares the buffer as it is now.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.data[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        let mut free = self.pool[self.class].lock().unwrap_or_else(PoisonError::into_inner);
        if (free.len() + 1) * data.len() <= KEPT_BYTES {
            free.push(data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back() {
        let pool = Pool::default();
        let mut one = pool.take(MAX_READ_BYTES as usize - 3);
        one.bytes_mut().fill(7);
        let at = one.as_ref().as_ptr();
        let bytes = one.freeze();
        let part = bytes.slice(5..9);
        drop(bytes);
        assert_ne!(pool.take(MAX_READ_BYTES as usize).as_ref().as_ptr(), at, "still lent");
        assert_eq!(&part[..], [7; 4]);
        drop(part);
        let lent: Vec<_> = (0..2).map(|_| pool.take(MAX_READ_BYTES as usize)).collect();
        assert!(lent.iter().any(|b| b.as_ref().as_ptr() == at));
        assert_eq!(pool.take(1).data.len() as u64, GRANULE_BYTES);
        assert_eq!(pool.take(GRANULE_BYTES as usize + 1).data.len() as u64, 2 * GRANULE_BYTES);
    }

    #[test]
    fn not_more_than_so_much_is_kept() {
        let pool = Pool::default();
        let lent: Vec<_> = (0..100).map(|_| pool.take(MAX_READ_BYTES as usize)).collect();
        drop(lent);
        assert_eq!(pool.0[CLASSES - 1].lock().unwrap().len() as u64 * MAX_READ_BYTES, KEPT_BYTES as u64);
    }
}
