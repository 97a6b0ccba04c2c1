//! Verify: reads what points need again and compares it with its digests.
//!
//! 1. Index files are compared with their checksums, manifests with theirs.
//! 2. The trees of the points are walked, each shared node once; what they need is marked in a bitmap with one bit an
//!    index entry (`marks`), which bounds memory: 1 MiB for 8 Mi chunks.
//! 3. Marked blobs are read in the order in which they lie in packs, on all processors, each once (`read`).
//! 4. If something is damaged, the trees are walked again to say which bytes of which disk of which point it takes.
//! 5. Damaged places are [marked](crate::repo::damage), so that the next backup that sees their bytes stores them anew.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use crate::extent::Extent;
use crate::repo::damage::{self, Mark};
use crate::repo::digest::Digest;
use crate::repo::error::RepoError;
use crate::repo::index::heal;
use crate::repo::index::set::IndexSet;
use crate::repo::layout::Layout;
use crate::repo::lock;
use crate::repo::point::Manifest;
use crate::repo::reader::Reader;
use crate::repo::repository::Repository;
use crate::repo::tree::walk::{walk, walk_if};
use crate::units::{PackId, PointId};

mod marks;
mod read;

use marks::Marks;

/// Most damages that are reported one by one, and most byte ranges each.
pub const MAX_REPORTED: usize = 1000;

/// What is verified.
#[derive(Clone, Copy, Debug)]
pub enum Scope<'a> {
    /// What these points need.
    Points(&'a [Manifest]),
    /// All points, and all blobs that an index knows, needed or not.
    Everything,
}

/// How far a verification is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Stored bytes that were read.
    pub done_bytes: u64,
    /// Stored bytes to be read.
    pub total_bytes: u64,
}

/// Bytes of a disk that cannot be read, or that rest on damaged bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Affected {
    /// The VM.
    pub vm: String,
    /// The point.
    pub point: PointId,
    /// The disk (or file) of the point.
    pub disk: String,
    /// Its bytes.
    pub extent: Extent,
}

impl fmt::Display for Affected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}, disk {:?}, {}", self.vm, self.point, self.disk, self.extent)
    }
}

/// Something that is damaged.
#[derive(Debug)]
pub struct Damage {
    /// What it is: the error names the file, and the place in it.
    pub error: RepoError,
    /// What rests on it; empty for what no verified point needs, and for index files.
    pub affected: Vec<Affected>,
    /// Whether another pack holds the same bytes intact, so that nothing is lost.
    pub intact_copy: bool,
}

/// What a verification found.
#[derive(Debug, Default)]
pub struct Report {
    /// Points whose manifest and trees were checked.
    pub points: u64,
    /// Blobs that were read and compared.
    pub blobs: u64,
    /// Their stored bytes.
    pub stored_bytes: u64,
    /// Their bytes decoded.
    pub raw_bytes: u64,
    /// Packs that were read.
    pub packs: u64,
    /// What is damaged, up to [`MAX_REPORTED`].
    pub damage: Vec<Damage>,
    /// Damages beyond that.
    pub unreported: u64,
    /// All damaged blobs that were read.
    places: Vec<(PackId, Mark)>,
}

impl Report {
    /// Whether all is as it should be.
    pub fn is_intact(&self) -> bool {
        self.damage.is_empty()
    }

    /// Whether all can be read: what is damaged is there once more.
    pub fn is_readable(&self) -> bool {
        self.unreported == 0 && self.damage.iter().all(|damage| damage.intact_copy)
    }

    fn add(&mut self, error: RepoError, intact_copy: bool) -> Option<usize> {
        if self.damage.len() >= MAX_REPORTED {
            self.unreported += 1;
            return None;
        }
        self.damage.push(Damage { error, affected: Vec::new(), intact_copy });
        Some(self.damage.len() - 1)
    }
}

/// Verifies. `progress` is called on this thread a few times a second. Errors are those that keep it from working at all;
/// damage is in the report.
pub fn verify(repo: &Repository, scope: Scope<'_>, mut progress: impl FnMut(Progress)) -> Result<Report, RepoError> {
    let _shared = lock::shared(repo.layout())?;
    let mut report = Report::default();
    let index = index(repo.layout(), &mut report, matches!(scope, Scope::Everything))?;
    let all;
    let points = match scope {
        Scope::Points(points) => points,
        Scope::Everything => {
            all = all_points(repo, &mut report)?;
            &all
        }
    };
    report.points = points.len() as u64;
    let reader = Reader::with_index(repo.shared_layout(), index);
    let mut damaged = HashMap::new();
    let mut marks = Marks::new(reader.index());
    if matches!(scope, Scope::Everything) {
        marks.mark_all(reader.index());
    } else {
        mark_points(&reader, points, &mut marks, &mut report, &mut damaged);
    }
    read::read_marked(&reader, &mut marks, &mut report, &mut damaged, &mut progress)?;
    drop(marks);
    if matches!(scope, Scope::Everything) || !damaged.is_empty() {
        name_affected(&reader, points, &mut report, &mut damaged);
    }
    // What was found is told, also where it cannot be marked: on a medium that is read-only, say.
    if let Err(error) = damage::record(repo.layout(), &report.places, matches!(scope, Scope::Everything)) {
        tracing::warn!(%error, "what is damaged cannot be marked: backups may go on to rely on it");
    }
    Ok(report)
}

/// The index, without what is damaged of it. That is made again from the packs, and so is what is lost.
fn index(layout: &Layout, report: &mut Report, everything: bool) -> Result<IndexSet, RepoError> {
    let (mut index, mut errors) = IndexSet::open_all(layout)?;
    for file in index.files() {
        errors.extend(file.view().check_body().err().map(|error| file.error(error)));
    }
    let damaged: Vec<_> = errors.iter().filter_map(heal::damaged_path).collect();
    index = index.without(&damaged);
    if everything || !damaged.is_empty() {
        // On a medium that is read-only, say, what was found is still told.
        let made = heal::durably(layout, &index, &damaged).or_else(|error| {
            tracing::warn!("the index cannot be made again: {error}");
            heal::in_memory(layout, &index)
        });
        if let Some(made) = made? {
            index.add(Arc::new(made));
        }
    }
    for error in errors {
        report.add(error, false);
    }
    Ok(index)
}

fn all_points(repo: &Repository, report: &mut Report) -> Result<Vec<Manifest>, RepoError> {
    let mut points = Vec::new();
    for vm in repo.vm_directories()? {
        let listing = repo.points_in(&vm)?;
        points.extend(listing.points);
        for error in listing.damaged {
            report.add(error, false);
        }
    }
    Ok(points)
}

/// Marks what the points need. What no index knows, and nodes that cannot be read, are damage at once.
fn mark_points(
    reader: &Reader,
    points: &[Manifest],
    marks: &mut Marks,
    report: &mut Report,
    damaged: &mut HashMap<Digest, Option<usize>>,
) {
    for (_, image) in points.iter().flat_map(Manifest::images) {
        // The marks are borrowed by the walk and by its consumer in turn.
        let shared = std::cell::RefCell::new((&mut *marks, &mut *report, &mut *damaged));
        let mark = |digest: &Digest| {
            let (marks, report, damaged) = &mut *shared.borrow_mut();
            match reader.index().find(digest) {
                Ok(Some(location)) => return marks.mark(&location),
                Ok(None) => {
                    damaged.entry(*digest).or_insert_with(|| report.add(RepoError::Missing { digest: *digest }, false))
                }
                Err(error) => damaged.entry(*digest).or_insert_with(|| report.add(error, false)),
            };
            false
        };
        for item in walk_if(reader, image, mark) {
            match item {
                Ok(chunk) => {
                    mark(&chunk.digest);
                }
                // Its blob is marked, and reported when it is read in its turn.
                Err(_broken) => {}
            }
        }
    }
}

/// Walks the trees again to say what rests on damaged blobs.
fn name_affected(
    reader: &Reader,
    points: &[Manifest],
    report: &mut Report,
    damaged: &mut HashMap<Digest, Option<usize>>,
) {
    for point in points {
        for (disk, image) in point.images() {
            for item in walk(reader, image) {
                let (digest, extent, error) = match item {
                    Ok(chunk) => match damaged.contains_key(&chunk.digest) {
                        true => (chunk.digest, chunk.extent, None),
                        // With `Everything`, what the trees need was not looked up before.
                        false => match reader.index().find(&chunk.digest) {
                            Ok(Some(_)) => continue,
                            Ok(None) => (chunk.digest, chunk.extent, Some(RepoError::Missing { digest: chunk.digest })),
                            Err(error) => (chunk.digest, chunk.extent, Some(error)),
                        },
                    },
                    Err(broken) => (broken.node, broken.extent, Some(*broken.source)),
                };
                let number = damaged.entry(digest).or_insert_with(|| error.and_then(|e| report.add(e, false)));
                let Some(damage) = number.and_then(|number| report.damage.get_mut(number)) else { continue };
                let full = damage.affected.len() >= MAX_REPORTED;
                match damage.affected.last_mut() {
                    Some(last)
                        if last.point == point.id && last.disk == disk && last.extent.end() == extent.offset_bytes =>
                    {
                        last.extent.len_bytes += extent.len_bytes;
                    }
                    _ if !full => damage.affected.push(Affected {
                        vm: point.vm.clone(),
                        point: point.id,
                        disk: disk.to_owned(),
                        extent,
                    }),
                    _ => {}
                }
            }
        }
    }
}
