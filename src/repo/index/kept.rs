//! What was read of an index file, kept in memory: the hot path of a backup is a look-up in every index file.
//!
//! A part is kept the first time that it is looked at, so who looks up little reads little. All open files of this process
//! together keep [`MAX_KEPT_BYTES`] at most, enough for the index of about 180 GB of data in chunks of 128 KiB; what is beyond
//! is read each time it is asked for.

use std::borrow::Cow;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::units::MIB;

/// Most bytes that are kept.
pub const MAX_KEPT_BYTES: usize = 64 * MIB as usize;
/// Most parts of one file of which any is kept: the table of parts takes memory as well.
const MAX_PARTS: u64 = 1 << 18;

static KEPT_BYTES: AtomicUsize = AtomicUsize::new(0);

/// Parts of a file that are kept.
#[derive(Debug)]
pub struct Kept<T> {
    parts: Box<[OnceLock<Box<[T]>>]>,
}

impl<T: Clone> Kept<T> {
    /// None yet, of a file that has so many.
    pub fn new(parts: u64) -> Self {
        let parts = if parts <= MAX_PARTS { parts } else { 0 };
        Self { parts: (0..parts).map(|_| OnceLock::new()).collect() }
    }

    /// Part number `n`, which `read` gets where it is not kept.
    pub fn get<E>(&self, n: u64, read: impl FnOnce() -> Result<Vec<T>, E>) -> Result<Cow<'_, [T]>, E> {
        let place = usize::try_from(n).ok().and_then(|n| self.parts.get(n));
        if let Some(part) = place.and_then(OnceLock::get) {
            return Ok(Cow::Borrowed(part));
        }
        let part = read()?;
        let Some(place) = place else { return Ok(Cow::Owned(part)) };
        let bytes = size_of_val(&part[..]);
        if KEPT_BYTES.fetch_add(bytes, Ordering::Relaxed) + bytes > MAX_KEPT_BYTES {
            KEPT_BYTES.fetch_sub(bytes, Ordering::Relaxed);
            return Ok(Cow::Owned(part));
        }
        if place.set(part.into_boxed_slice()).is_err() {
            // Another thread was faster.
            KEPT_BYTES.fetch_sub(bytes, Ordering::Relaxed);
        }
        Ok(Cow::Borrowed(place.get().map_or(&[], |part| part)))
    }
}

impl<T> Drop for Kept<T> {
    fn drop(&mut self) {
        let bytes = self.parts.iter().filter_map(OnceLock::get).map(|part| size_of_val(&part[..])).sum();
        KEPT_BYTES.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_not_read_again_and_has_a_bound() {
        let kept = Kept::new(4);
        let part = |n: u64, bytes: usize| kept.get(n, || Ok::<_, ()>(vec![n as u8; bytes])).unwrap().into_owned();
        assert_eq!(part(1, 10), [1; 10]);
        assert_eq!(kept.get(1, || Err("read again")).unwrap(), vec![1; 10]);
        assert_eq!(kept.get(2, || Err("cannot be read")), Err("cannot be read"));
        assert_eq!(part(2, MAX_KEPT_BYTES).len(), MAX_KEPT_BYTES);
        assert_eq!(kept.get(2, || Err("read again")), Err("read again"), "more than all may keep");
        assert_eq!(part(9, 10), [9; 10], "a part that the file should not have");
        let none = Kept::new(u64::MAX);
        assert_eq!(none.get(0, || Ok::<_, ()>(vec![0; 3])).unwrap(), vec![0; 3]);
    }
}
