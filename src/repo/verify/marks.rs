//! Marks: one bit for each entry of each index file.

use bitvec::vec::BitVec;

use crate::repo::error::FormatError;
use crate::repo::index::format::Entry;
use crate::repo::index::set::{IndexSet, Location};

/// Which entries are to be read.
pub(super) struct Marks {
    files: Vec<BitVec>,
    /// Stored bytes of what was marked.
    pub stored_bytes: u64,
}

impl Marks {
    pub fn new(index: &IndexSet) -> Self {
        let bits = |entries: u64| BitVec::repeat(false, entries as usize);
        Self { files: index.files().iter().map(|f| bits(f.view().header().entries)).collect(), stored_bytes: 0 }
    }

    /// Marks an entry; `false` if it was marked before.
    pub fn mark(&mut self, location: &Location) -> bool {
        let (file, entry) = location.entry;
        let before = self.files[file as usize].replace(entry as usize, true);
        self.stored_bytes += if before { 0 } else { u64::from(location.placed.stored_len) };
        !before
    }

    /// Marks all entries that can be decoded.
    pub fn mark_all(&mut self, index: &IndexSet) {
        for (number, file) in index.files().iter().enumerate() {
            let view = file.view();
            // What cannot be read was reported when the index was compared with its checksum.
            let Ok(packs) = view.all_packs() else { continue };
            let pack = |n: u32| packs.get(n as usize).copied().ok_or_else(|| FormatError::bad("no such pack"));
            for (n, raw) in view.entries().enumerate() {
                if let Ok(entry) = raw.and_then(|raw| Entry::decode(&raw, pack)) {
                    self.files[number].set(n, true);
                    self.stored_bytes += u64::from(entry.placed.stored_len);
                }
            }
        }
    }

    /// Takes the mark of an entry; `false` if there was none.
    pub fn take(&mut self, location: &Location) -> bool {
        let (file, entry) = location.entry;
        self.files[file as usize].replace(entry as usize, false)
    }

    /// The entries of a file that are marked still.
    pub fn left(&self, file: usize) -> impl Iterator<Item = u64> {
        self.files[file].iter_ones().map(|n| n as u64)
    }
}
