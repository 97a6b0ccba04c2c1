//! Damage: which blobs a verification found damaged, remembered so that nothing new comes to depend on them.
//!
//! ```text
//! repo/damaged/<PackId>      sealed JSON, one file a pack: { "pack": id, "all": bool, "blobs": [ {"offset_bytes", "digest"}, … ] }
//! ```
//!
//! A writer takes a blob that is marked for one that is not there: it is stored again, in another pack, from where it is read
//! from then on. So any backup that sees the bytes heals the points that rest on them: a full one, or a scan, which does not
//! offer the digests of what is marked. Marks name a place and not a digest: the new copy is not marked.
//!
//! Marks are added by every verification; one of the whole repository also takes away what is not damaged (any more). They
//! are written for others to find, not for the reader, who sees for himself. A file of marks that cannot be read counts
//! against all of its pack.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io::ErrorKind;

use serde::{Deserialize, Serialize};

use crate::durable::{self, Replace};
use crate::repo::digest::Digest;
use crate::repo::error::{FormatError, RepoError};
use crate::repo::layout::Layout;
use crate::repo::repository::read_bounded;
use crate::repo::sealed::{self, Kind, MAX_SEALED_BYTES};
use crate::units::PackId;

const KIND: Kind = Kind { format: "livebackup-damaged", version: 1 };
/// With more marks than this a pack is marked as a whole.
const MAX_MARKS: usize = 50_000;

/// A blob that is damaged where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Mark {
    /// Where in the pack.
    pub offset_bytes: u32,
    /// What should be there.
    pub digest: Digest,
}

/// The marks of one pack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Marked {
    pack: PackId,
    all: bool,
    blobs: Vec<Mark>,
}

/// What is marked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    packs: HashMap<PackId, Option<HashSet<u32>>>,
}

impl Marks {
    /// Whether there is any mark in a pack.
    pub fn touches(&self, pack: PackId) -> bool {
        self.packs.contains_key(&pack)
    }

    /// Whether the blob at this place is marked.
    pub fn has(&self, pack: PackId, offset_bytes: u32) -> bool {
        self.packs.get(&pack).is_some_and(|some| some.as_ref().is_none_or(|some| some.contains(&offset_bytes)))
    }

    /// Number of marks; a pack that is marked as a whole counts as one.
    pub fn count(&self) -> usize {
        self.packs.values().map(|some| some.as_ref().map_or(1, HashSet::len)).sum()
    }
}

/// Decodes a file of marks.
pub fn decode(file: &[u8]) -> Result<(PackId, Vec<Mark>), FormatError> {
    let Marked { pack, blobs, .. } = sealed::decode(KIND, file)?;
    Ok((pack, blobs))
}

fn list(layout: &Layout) -> Result<Vec<PackId>, RepoError> {
    let dir = layout.damaged();
    let entries = match fs::read_dir(&dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(RepoError::io("list", &dir))?,
    };
    let mut packs = Vec::new();
    for entry in entries {
        let name = entry.map_err(RepoError::io("list", &dir))?.file_name();
        packs.extend(name.to_str().and_then(|name| name.parse::<PackId>().ok()));
    }
    Ok(packs)
}

fn read(layout: &Layout, pack: PackId) -> Result<Option<Marked>, RepoError> {
    let path = layout.damaged().join(pack.to_string());
    let file = match read_bounded(&path, MAX_SEALED_BYTES) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        other => other.map_err(RepoError::io("read", &path))?,
    };
    let marked: Marked = sealed::decode(KIND, &file).map_err(|e| e.at("file of marks", &path))?;
    Ok(Some(marked).filter(|marked| marked.pack == pack))
}

/// Reads all marks.
pub fn load(layout: &Layout) -> Result<Marks, RepoError> {
    let mut marks = Marks::default();
    for pack in list(layout)? {
        let some = match read(layout, pack) {
            Ok(Some(marked)) if !marked.all => Some(marked.blobs.iter().map(|mark| mark.offset_bytes).collect()),
            Ok(_) => None,
            Err(error) => {
                tracing::warn!(%error, %pack, "marks of damage cannot be read: the whole pack counts as damaged");
                None
            }
        };
        marks.packs.insert(pack, some);
    }
    Ok(marks)
}

/// Marks what was found, durably. With `everything`, all was looked at: what is not found loses its mark.
pub fn record(layout: &Layout, found: &[(PackId, Mark)], everything: bool) -> Result<(), RepoError> {
    let mut by_pack: BTreeMap<PackId, Vec<Mark>> = BTreeMap::new();
    found.iter().for_each(|(pack, mark)| by_pack.entry(*pack).or_default().push(*mark));
    if !by_pack.is_empty() {
        durable::create_dir(&layout.damaged())?;
    }
    if everything {
        for pack in list(layout)?.iter().filter(|pack| !by_pack.contains_key(pack)) {
            durable::remove_file(&layout.damaged().join(pack.to_string()))?;
        }
    }
    for (pack, mut blobs) in by_pack {
        let path = layout.damaged().join(pack.to_string());
        // What cannot be read is replaced by what was found now.
        let before = if everything { None } else { read(layout, pack).ok().flatten() };
        let was_all = before.as_ref().is_some_and(|before| before.all);
        blobs.extend(before.into_iter().flat_map(|before| before.blobs));
        blobs.sort_unstable();
        blobs.dedup();
        let all = was_all || blobs.len() > MAX_MARKS;
        blobs.truncate(MAX_MARKS);
        let file = sealed::encode(KIND, &Marked { pack, all, blobs }).map_err(|e| e.at("file of marks", &path))?;
        durable::write_file(&path, &file, Replace::Yes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(n: u32) -> Mark {
        Mark { offset_bytes: n, digest: Digest::of(&n.to_le_bytes()) }
    }

    #[test]
    fn marks_are_added_and_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        assert_eq!(load(&layout).unwrap(), Marks::default());
        record(&layout, &[], true).unwrap();
        assert!(!layout.damaged().exists(), "nothing is made for nothing");
        let (one, two) = (PackId::random(), PackId::random());
        record(&layout, &[(one, mark(5)), (two, mark(6))], false).unwrap();
        record(&layout, &[(one, mark(7))], false).unwrap();
        let marks = load(&layout).unwrap();
        assert!(marks.has(one, 5) && marks.has(one, 7) && marks.has(two, 6) && !marks.has(two, 5));
        assert!(marks.touches(one) && !marks.touches(PackId::random()));
        assert_eq!(marks.count(), 3);
        record(&layout, &[(one, mark(7))], true).unwrap();
        let marks = load(&layout).unwrap();
        assert!(!marks.has(one, 5) && marks.has(one, 7) && !marks.touches(two));
    }

    #[test]
    fn a_damaged_file_of_marks_counts_against_its_whole_pack() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        let pack = PackId::random();
        record(&layout, &[(pack, mark(5))], false).unwrap();
        let path = layout.damaged().join(pack.to_string());
        let file = fs::read(&path).unwrap();
        assert_eq!(decode(&file).unwrap(), (pack, vec![mark(5)]));
        for at in 0..file.len() {
            let mut twin = file.clone();
            twin[at] ^= 1;
            assert!(decode(&twin).is_err(), "byte {at}");
            fs::write(&path, twin).unwrap();
            assert!(load(&layout).unwrap().has(pack, 99), "byte {at}");
        }
        // Another pack's marks under this name say nothing that can be believed.
        let other = PackId::random();
        fs::write(layout.damaged().join(other.to_string()), &file).unwrap();
        assert!(load(&layout).unwrap().has(other, 99));
        record(&layout, &[(pack, mark(8))], false).unwrap();
        assert!(load(&layout).unwrap().has(pack, 8));
    }

    #[test]
    fn too_many_marks_are_one_for_the_pack() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        let pack = PackId::random();
        let many: Vec<_> = (0..MAX_MARKS as u32 + 1).map(|n| (pack, mark(n))).collect();
        record(&layout, &many, false).unwrap();
        assert!(load(&layout).unwrap().has(pack, u32::MAX));
        record(&layout, &[(pack, mark(1))], false).unwrap();
        assert!(load(&layout).unwrap().has(pack, u32::MAX), "it stays so until all was looked at");
    }
}
