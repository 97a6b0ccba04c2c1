//! Claims: which digests this writer stores, so that equal chunks in flight are stored once.
//!
//! Workers finish out of order, results are appended in order. So that a duplicate without bytes never comes before the
//! chunk that has them, the claim belongs to the earliest in order: who comes before the holder takes the claim over and
//! brings the bytes as well; the appender drops the later ones.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::repo::digest::Digest;

#[derive(Clone, Copy)]
struct Claim {
    order: u64,
    /// Number of the pack that it was appended to; 0 before that.
    pack: u64,
}

/// Digests that are not in an index file yet.
#[derive(Default)]
pub(super) struct Claims(Mutex<HashMap<Digest, Claim>>);

impl Claims {
    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Claim>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an earlier chunk has the digest.
    pub fn is_claimed(&self, digest: &Digest, order: u64) -> bool {
        self.lock().get(digest).is_some_and(|claim| claim.pack != 0 || claim.order < order)
    }

    /// Claims a digest: `true` when the bytes must be brought.
    pub fn claim(&self, digest: Digest, order: u64) -> bool {
        match self.lock().entry(digest) {
            Entry::Vacant(entry) => {
                entry.insert(Claim { order, pack: 0 });
                true
            }
            Entry::Occupied(mut entry) => {
                let claim = entry.get_mut();
                let takes = claim.pack == 0 && order < claim.order;
                if takes {
                    claim.order = order;
                }
                takes
            }
        }
    }

    /// The bytes are about to be appended to a pack: `false` when they have been already.
    pub fn append(&self, digest: &Digest, pack: u64) -> bool {
        match self.lock().get_mut(digest) {
            Some(claim) if claim.pack == 0 => {
                claim.pack = pack;
                true
            }
            // Appended before; or even in an index file by now.
            _ => false,
        }
    }

    /// The pack that a claimed digest was appended to; 0 when an index file has it by now.
    pub fn pack(&self, digest: &Digest) -> u64 {
        self.lock().get(digest).map_or(0, |claim| claim.pack)
    }

    /// Forgets digests that an index file has.
    pub fn forget<'a>(&self, digests: impl Iterator<Item = &'a Digest>) {
        let mut claims = self.lock();
        for digest in digests {
            claims.remove(digest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_in_order_brings_the_bytes() {
        let claims = Claims::default();
        let digest = Digest::of(b"x");
        assert!(claims.claim(digest, 20));
        assert!(claims.is_claimed(&digest, 21) && !claims.is_claimed(&digest, 19));
        assert!(!claims.claim(digest, 21));
        assert!(claims.claim(digest, 10), "an earlier one takes over");
        assert!(claims.append(&digest, 3));
        assert!(!claims.append(&digest, 3), "the later one is dropped");
        assert!(!claims.claim(digest, 1));
        assert_eq!(claims.pack(&digest), 3);
        claims.forget([digest].iter());
        assert_eq!(claims.pack(&digest), 0);
        assert!(!claims.append(&digest, 4));
    }
}
