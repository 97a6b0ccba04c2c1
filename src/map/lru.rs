//! What was used last, up to a number of bytes (pure).

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

struct Entry<V> {
    value: V,
    len_bytes: usize,
    used: u64,
}

/// Keeps what was used last.
pub(super) struct Lru<K, V> {
    max_bytes: usize,
    held_bytes: usize,
    clock: u64,
    entries: HashMap<K, Entry<V>>,
    /// By when they were used.
    order: BTreeMap<u64, K>,
}

impl<K: Copy + Eq + Hash, V: Clone> Lru<K, V> {
    pub fn new(max_bytes: usize) -> Self {
        Self { max_bytes, held_bytes: 0, clock: 0, entries: HashMap::new(), order: BTreeMap::new() }
    }

    pub fn get(&mut self, key: &K) -> Option<V> {
        let entry = self.entries.get_mut(key)?;
        self.clock += 1;
        self.order.remove(&std::mem::replace(&mut entry.used, self.clock));
        self.order.insert(self.clock, *key);
        Some(entry.value.clone())
    }

    /// Whether it is there; does not count as use.
    pub fn has(&self, key: &K) -> bool {
        self.entries.contains_key(key)
    }

    /// Puts something in, and gives out what has to go for it: to be dropped where nobody waits.
    pub fn insert(&mut self, key: K, value: V, len_bytes: usize) -> Vec<V> {
        self.clock += 1;
        let mut gone = vec![];
        if let Some(before) = self.entries.insert(key, Entry { value, len_bytes, used: self.clock }) {
            self.order.remove(&before.used);
            self.held_bytes -= before.len_bytes;
            gone.push(before.value);
        }
        self.order.insert(self.clock, key);
        self.held_bytes += len_bytes;
        while self.held_bytes > self.max_bytes
            && let Some((_, oldest)) = self.order.pop_first()
            && let Some(entry) = self.entries.remove(&oldest)
        {
            self.held_bytes -= entry.len_bytes;
            gone.push(entry.value);
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn as_a_plain_list(steps in proptest::collection::vec((0u8..12, 1usize..40, any::<bool>()), 0..200)) {
            let mut lru = Lru::new(100);
            // The oldest use first.
            let mut list: Vec<(u8, usize)> = vec![];
            for (key, len, puts) in steps {
                let at = list.iter().position(|(k, _)| *k == key);
                let before = at.map(|at| list.remove(at));
                if puts {
                    let before = before.map(|(_, len)| len);
                    list.push((key, len));
                    let mut gone: Vec<_> = before.into_iter().collect();
                    while list.iter().map(|(_, len)| len).sum::<usize>() > 100 {
                        gone.push(list.remove(0).1);
                    }
                    prop_assert_eq!(lru.insert(key, len, len), gone);
                } else {
                    list.extend(before);
                    prop_assert_eq!(lru.get(&key), before.map(|(_, len)| len));
                }
                prop_assert!((0..12).all(|key| lru.has(&key) == list.iter().any(|(k, _)| *k == key)));
                prop_assert_eq!(lru.held_bytes, list.iter().map(|(_, len)| len).sum::<usize>());
                prop_assert_eq!((lru.entries.len(), lru.order.len()), (list.len(), list.len()));
            }
        }
    }
}
