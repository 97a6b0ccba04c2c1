//! Suspect: a durable mark beside a restore point that rests on what an audit has found wrong.
//!
//! ```text
//! points/VM/<PointId>.suspect      sealed JSON: { "point": id, "disks": [ { "disk", "found", "reason" }, … ] }
//! ```
//!
//! A manifest is never changed, so the mark is a file of its own. It says that some of the disk's bytes may be older than the
//! point: nobody knows which. A mark that cannot be read counts. The VM's lock is held to write one.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::durable::{self, Replace};
use crate::limits::MAX_DISKS;
use crate::repo::error::{FormatError, RepoError};
use crate::repo::repository::{Repository, read_bounded};
use crate::repo::sealed::{self, Kind, MAX_SEALED_BYTES};
use crate::units::PointId;

const KIND: Kind = Kind { format: "livebackup-suspect", version: 1 };
/// Ending of the files.
pub(crate) const SUSPECT_ENDING: &str = "suspect";

/// Why a disk of a point is suspect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SuspectDisk {
    /// The disk.
    pub disk: String,
    /// When that was found.
    pub found: Timestamp,
    /// What was found, in a sentence.
    pub reason: String,
}

/// The mark of one point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Suspect {
    point: PointId,
    disks: Vec<SuspectDisk>,
}

/// Decodes a mark.
pub fn decode(file: &[u8]) -> Result<(PointId, Vec<SuspectDisk>), FormatError> {
    let Suspect { point, disks } = sealed::decode(KIND, file)?;
    Ok((point, disks))
}

impl Repository {
    /// Marks a disk of a point as suspect, durably. A disk that is marked already keeps its first reason.
    pub fn mark_suspect(&self, vm: &str, point: PointId, disk: SuspectDisk) -> Result<(), RepoError> {
        let path = self.layout().suspect(vm, point)?;
        let mut disks = match read_bounded(&path, MAX_SEALED_BYTES) {
            Ok(file) => decode(&file).map_or_else(|_| Vec::new(), |(_, disks)| disks),
            Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(RepoError::io("read", &path)(e)),
        };
        if disks.iter().any(|marked| marked.disk == disk.disk) || disks.len() >= MAX_DISKS {
            return Ok(());
        }
        disks.push(disk);
        let file = sealed::encode(KIND, &Suspect { point, disks }).map_err(|e| e.at("mark", &path))?;
        Ok(durable::write_file(&path, &file, Replace::Yes)?)
    }

    /// The suspect points of a VM. One whose mark cannot be read has no disks here.
    pub fn suspects(&self, vm: &str) -> Result<BTreeMap<PointId, Vec<SuspectDisk>>, RepoError> {
        let dir = self.layout().vm(vm)?;
        let entries = match fs::read_dir(&dir) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
            other => other.map_err(RepoError::io("list", &dir))?,
        };
        let mut found = BTreeMap::new();
        for entry in entries {
            let path = entry.map_err(RepoError::io("list", &dir))?.path();
            if path.extension().is_none_or(|ending| ending != SUSPECT_ENDING) {
                continue;
            }
            let Some(id) = path.file_stem().and_then(|stem| stem.to_str()?.parse::<PointId>().ok()) else { continue };
            let mark = read_bounded(&path, MAX_SEALED_BYTES).ok().and_then(|file| decode(&file).ok());
            found.insert(id, mark.filter(|(point, _)| *point == id).map_or_else(Vec::new, |(_, disks)| disks));
        }
        Ok(found)
    }

    /// What of these disks of a point (all when none is named) is suspect, in words, for who is about to use them. A mark that cannot be read may mean
    /// any.
    pub fn suspect_of(&self, vm: &str, point: PointId, disks: &[String]) -> Result<Option<String>, RepoError> {
        let Some(mark) = self.suspects(vm)?.remove(&point) else { return Ok(None) };
        if mark.is_empty() {
            return Ok(Some(in_words(&mark)));
        }
        let named: Vec<_> =
            mark.into_iter().filter(|marked| disks.is_empty() || disks.contains(&marked.disk)).collect();
        Ok((!named.is_empty()).then(|| in_words(&named)))
    }
}

/// The mark in words, for who lists points.
pub fn in_words(disks: &[SuspectDisk]) -> String {
    match disks.is_empty() {
        true => "its mark cannot be read".to_owned(),
        false => disks
            .iter()
            .map(|d| format!("{}: {} (found {:.0})", d.disk, d.reason, d.found))
            .collect::<Vec<_>>()
            .join("; "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::DEFAULT_CHUNK_BYTES;
    use crate::repo::point::tests::manifest;

    #[test]
    fn a_mark_stays_and_a_damaged_one_counts() {
        let dir = tempfile::tempdir().unwrap();
        let repo = Repository::init(dir.path(), DEFAULT_CHUNK_BYTES).unwrap();
        let (one, two) = (manifest("v", vec![]), manifest("v", vec![]));
        repo.commit(&one).unwrap();
        repo.commit(&two).unwrap();
        assert!(repo.suspects("v").unwrap().is_empty() && repo.suspects("none").unwrap().is_empty());
        let mark = |disk: &str, reason: &str| SuspectDisk {
            disk: disk.to_owned(),
            found: Timestamp::UNIX_EPOCH,
            reason: reason.to_owned(),
        };
        repo.mark_suspect("v", one.id, mark("a", "first")).unwrap();
        repo.mark_suspect("v", one.id, mark("a", "again")).unwrap();
        repo.mark_suspect("v", one.id, mark("b", "too")).unwrap();
        let found = repo.suspects("v").unwrap();
        assert_eq!(found, BTreeMap::from([(one.id, vec![mark("a", "first"), mark("b", "too")])]));
        assert!(in_words(&found[&one.id]).contains("a: first"));
        assert_eq!(repo.points("v").unwrap().points.len(), 2, "a mark is no point");
        let path = repo.layout().suspect("v", one.id).unwrap();
        let file = fs::read(&path).unwrap();
        for at in 0..file.len() {
            let mut twin = file.clone();
            twin[at] ^= 1;
            assert!(decode(&twin).is_err(), "byte {at}");
            fs::write(&path, twin).unwrap();
            assert_eq!(repo.suspects("v").unwrap(), BTreeMap::from([(one.id, vec![])]), "byte {at}");
        }
    }
}
