//! The restore points of a repository: committing, listing, finding.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use crate::durable::{self, Replace};
use crate::fault;
use crate::repo::error::{FormatError, RepoError};
use crate::repo::layout::{POINT_ENDING, vm_of_directory};
use crate::repo::point::Manifest;
use crate::repo::repository::{Repository, read_bounded};
use crate::repo::sealed::MAX_SEALED_BYTES;
use crate::units::PointId;

/// Shortest prefix of an id that is taken.
const MIN_PREFIX: usize = 4;

/// The points of one VM, and what could not be read.
#[derive(Debug, Default)]
pub struct Listing {
    /// By instant, the oldest first.
    pub points: Vec<Manifest>,
    /// Manifests that are damaged: each error names the file.
    pub damaged: Vec<RepoError>,
}

impl Repository {
    /// Makes a restore point exist. Everything that it refers to must be durable: [`crate::repo::Writer::finish`] has
    /// returned. The VM's lock must be held.
    pub fn commit(&self, manifest: &Manifest) -> Result<(), RepoError> {
        let path = self.layout().point(&manifest.vm, manifest.id)?;
        let file = manifest.encode().map_err(|e| e.at("restore point", &path))?;
        if let Some(dir) = path.parent() {
            durable::create_dir(dir)?;
        }
        fault::point("repo.before-manifest");
        durable::write_file(&path, &file, Replace::No)?;
        fault::point("repo.after-manifest");
        Ok(())
    }

    /// The names of all VMs that have points, sorted.
    pub fn vms(&self) -> Result<Vec<String>, RepoError> {
        let mut vms = Vec::new();
        for path in self.vm_directories()? {
            let files = point_files(&path)?;
            let name = path.file_name().and_then(|n| n.to_str()).and_then(vm_of_directory);
            // The name of a directory whose name was cut is in its manifests.
            let name = name.or_else(|| files.iter().find_map(|(_, path)| read(path).ok()).map(|m| m.vm));
            vms.extend(name.filter(|_| !files.is_empty()));
        }
        vms.sort();
        Ok(vms)
    }

    /// What lies in `points/`.
    pub(crate) fn vm_directories(&self) -> Result<Vec<PathBuf>, RepoError> {
        let dir = self.layout().points();
        let entries = fs::read_dir(&dir).map_err(RepoError::io("list", &dir))?;
        entries.map(|entry| Ok(entry.map_err(RepoError::io("list", &dir))?.path())).collect()
    }

    /// The points of one VM. None is no error.
    pub fn points(&self, vm: &str) -> Result<Listing, RepoError> {
        self.points_in(&self.layout().vm(vm)?)
    }

    /// The points in a VM's directory.
    pub(crate) fn points_in(&self, dir: &Path) -> Result<Listing, RepoError> {
        let mut listing = Listing::default();
        for (id, path) in point_files(dir)? {
            match read(&path) {
                Ok(manifest) if self.layout().point(&manifest.vm, manifest.id).is_ok_and(|p| p == path) => {
                    debug_assert_eq!(manifest.id, id);
                    listing.points.push(manifest);
                }
                Ok(_) => listing
                    .damaged
                    .push(FormatError::bad("it is another point's file under this name").at("restore point", &path)),
                Err(error) => listing.damaged.push(error),
            }
        }
        listing.points.sort_by_key(|m| (m.instant, m.id));
        Ok(listing)
    }

    /// The latest point of a VM that can be read, if there is one.
    pub fn latest(&self, vm: &str) -> Result<Option<Manifest>, RepoError> {
        Ok(self.points(vm)?.points.pop())
    }

    /// The point that a text names: `latest`, `latest~N` (N before it), an id or the beginning of one (4 digits or more),
    /// or the beginning of its start time or instant in RFC 3339 (UTC, or whole in any zone).
    pub fn find_point(&self, vm: &str, text: &str) -> Result<Manifest, RepoError> {
        let no = |reason: String| RepoError::NoPoint { vm: vm.to_owned(), point: text.to_owned(), reason };
        if let Ok(id) = text.parse::<PointId>() {
            let path = self.layout().point(vm, id)?;
            return match read(&path) {
                Err(RepoError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                    Err(no("it does not exist; `livebackup points` lists what does".to_owned()))
                }
                other => other,
            };
        }
        let Listing { mut points, damaged } = self.points(vm)?;
        for error in &damaged {
            tracing::warn!(%error, "a restore point cannot be read");
        }
        let count = points.len();
        let damaged = damaged.into_iter().next();
        let Some(newest) = points.last().map(|point| point.id.short()) else {
            return Err(damaged.unwrap_or_else(|| no("the VM has no restore points here".to_owned())));
        };
        if let Some(back) = text.strip_prefix("latest") {
            let back = match back.strip_prefix('~') {
                Some(number) => number.parse().map_err(|_| no("after `latest~` comes a number".to_owned()))?,
                None if back.is_empty() => 0usize,
                None => return Err(no("it is `latest` or `latest~N`".to_owned())),
            };
            // Nobody gets an older one without a word.
            if let Some(source) = damaged.map(Box::new) {
                return Err(RepoError::LatestUnknown { vm: vm.to_owned(), source, newest: newest.to_string() });
            }
            let at = count.checked_sub(back.saturating_add(1));
            return at.map(|at| points.swap_remove(at)).ok_or_else(|| no(format!("there are only {count} points")));
        }
        let mut found: Vec<_> = points.into_iter().filter(|m| is_named(m, text)).collect();
        match found.len() {
            1 => Ok(found.remove(0)),
            0 => Err(no("it does not exist; `livebackup points` lists what does".to_owned())),
            _ => {
                let ids: Vec<_> = found.iter().take(4).map(|m| m.id.short()).collect();
                Err(no(format!("{} points are named so: {}, …; give more of it", found.len(), ids.join(", "))))
            }
        }
    }
}

fn is_named(manifest: &Manifest, text: &str) -> bool {
    let by_id = text.len() >= MIN_PREFIX && manifest.id.to_string().starts_with(text);
    // A time has its year and a dash, which no id has.
    let is_time = text.len() > 4 && text.as_bytes()[4] == b'-';
    let parsed = text.parse::<Timestamp>().ok();
    let by_time = |time: Timestamp| {
        is_time && (time.to_string().starts_with(text) || parsed.is_some_and(|p| p.as_second() == time.as_second()))
    };
    by_id || by_time(manifest.started) || by_time(manifest.instant)
}

/// The manifests in a VM's directory. A directory that is not there has none.
fn point_files(dir: &Path) -> Result<Vec<(PointId, PathBuf)>, RepoError> {
    let entries = match fs::read_dir(dir) {
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        other => other.map_err(RepoError::io("list", dir))?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(RepoError::io("list", dir))?.path();
        let stem = path.file_stem().and_then(|s| s.to_str()).and_then(|s| s.parse().ok());
        if let (Some(id), true) = (stem, path.extension().is_some_and(|e| e == POINT_ENDING)) {
            files.push((id, path));
        }
    }
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> Result<Manifest, RepoError> {
    let file = read_bounded(path, MAX_SEALED_BYTES).map_err(RepoError::io("read the restore point", path))?;
    Manifest::decode(&file).map_err(|e| e.at("restore point", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::DEFAULT_CHUNK_BYTES;
    use crate::repo::point::tests::manifest;

    #[test]
    fn points_are_found_by_every_name() {
        let dir = tempfile::tempdir().unwrap();
        let repo = Repository::init(dir.path(), DEFAULT_CHUNK_BYTES).unwrap();
        assert!(repo.vms().unwrap().is_empty());
        let refused = repo.find_point("vm/1", "latest").unwrap_err().to_string();
        assert!(refused.contains("no restore points here"), "{refused}");
        let mut ids = Vec::new();
        for (i, time) in ["2026-01-01T10:00:00Z", "2026-01-02T10:00:00.5Z", "2026-01-02T11:00:00Z"].iter().enumerate() {
            let mut point = manifest("vm/1", vec![]);
            point.id = PointId::from_bytes([i as u8 + 0xa0; 16]);
            point.started = time.parse().unwrap();
            point.instant = point.started;
            repo.commit(&point).unwrap();
            ids.push(point.id);
            assert!(repo.commit(&point).is_err(), "a point is never replaced");
        }
        let long = "ü".repeat(120);
        repo.commit(&manifest(&long, vec![])).unwrap();
        assert_eq!(repo.vms().unwrap(), ["vm/1", &long]);
        assert_eq!(repo.latest("vm/1").unwrap().unwrap().id, ids[2]);
        for (text, expected) in [
            ("latest", 2),
            ("latest~0", 2),
            ("latest~2", 0),
            ("a1a1", 1),
            ("2026-01-01", 0),
            ("2026-01-02T10", 1),
            ("2026-01-02T12:00:00+01:00", 2),
            (&*ids[1].to_string(), 1),
        ] {
            assert_eq!(repo.find_point("vm/1", text).unwrap().id, ids[expected], "{text}");
        }
        for bad in
            ["latest~3", "latest~x", "latest~18446744073709551615", "latests", "a1a", "2026-01-02", "2026", "", "~1"]
        {
            assert!(matches!(repo.find_point("vm/1", bad), Err(RepoError::NoPoint { .. })), "{bad}");
        }
        assert!(matches!(repo.find_point("vm/1", &"0".repeat(32)), Err(RepoError::NoPoint { .. })));
    }

    #[test]
    fn a_damaged_manifest_is_named_and_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let repo = Repository::init(dir.path(), DEFAULT_CHUNK_BYTES).unwrap();
        let (one, two) = (manifest("v", vec![]), manifest("v", vec![]));
        repo.commit(&one).unwrap();
        repo.commit(&two).unwrap();
        let path = repo.layout().point("v", two.id).unwrap();
        let mut file = fs::read(&path).unwrap();
        let middle = file.len() / 2;
        file[middle] ^= 1;
        fs::write(&path, file).unwrap();
        let listing = repo.points("v").unwrap();
        assert_eq!((listing.points.len(), listing.damaged.len()), (1, 1));
        assert!(listing.damaged[0].to_string().contains(&two.id.to_string()));
        assert!(matches!(repo.find_point("v", "latest"), Err(RepoError::LatestUnknown { .. })));
        assert_eq!(repo.find_point("v", &one.id.to_string()[..8]).unwrap().id, one.id);
        assert!(matches!(repo.find_point("v", &two.id.to_string()), Err(RepoError::Corrupt { .. })));
        fs::copy(repo.layout().point("v", one.id).unwrap(), &path).unwrap();
        assert_eq!(repo.points("v").unwrap().damaged.len(), 1);
    }
}
