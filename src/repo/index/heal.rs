//! Making index files again from the packs, whose directories say all that an index does.
//!
//! ```text
//! a damaged index file ──► reader: what no other index lists is read from packs, and kept in memory
//!                     └──► writer, verify: … is written as a new index file; then the damaged one is removed
//! ```
//!
//! A pack is taken when no good index file lists it, and no writer's journal, whose packs are listed when it ends or is
//! adopted. One that two list is no harm. Crash after the new file is durable: the next one finds nothing that is not listed, and removes
//! the damaged file.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::PathBuf;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::durable;
use crate::repo::error::RepoError;
use crate::repo::index::format::{PackRef, RawEntry, encode_entry};
use crate::repo::index::merge;
use crate::repo::index::set::{IndexFile, IndexSet, list};
use crate::repo::layout::Layout;
use crate::repo::{journal, lock, packfile};

/// What is in packs that none of these index files lists. A pack that cannot be read is left out, with a warning.
fn unlisted(layout: &Layout, set: &IndexSet) -> Result<(Vec<PackRef>, Vec<RawEntry>), RepoError> {
    let mut listed = journal::packs(layout)?;
    listed.extend(set.packs()?.into_iter().map(|pack| pack.id));
    let (mut packs, mut entries) = (Vec::new(), Vec::new());
    for dir in list(&layout.packs())? {
        for path in list(&dir)? {
            let id = path.file_name().and_then(OsStr::to_str).and_then(|name| name.parse().ok());
            if id.is_none_or(|id| listed.contains(&id)) {
                continue;
            }
            match packfile::read_directory(&path) {
                Ok((pack, blobs)) => {
                    let number = packs.len() as u32;
                    entries.extend(blobs.iter().map(|blob| encode_entry(&blob.digest, number, &blob.placed)));
                    packs.push(pack);
                }
                Err(error) => tracing::warn!(%error, "what a pack holds cannot be had"),
            }
        }
    }
    entries.sort_unstable();
    Ok((packs, entries))
}

/// What these index files do not list, for this process alone: nothing is written.
pub fn in_memory(layout: &Layout, set: &IndexSet) -> Result<Option<IndexFile>, RepoError> {
    let (packs, entries) = unlisted(layout, set)?;
    if packs.is_empty() {
        return Ok(None);
    }
    let path = layout.index().join("made again from packs");
    let failed = || RepoError::io("make an index in memory for", &path);
    let file = memfd_create(c"index", MFdFlags::MFD_CLOEXEC).map_err(|e| failed()(e.into()))?;
    let file = File::from(file);
    merge::write_into(&file, &packs, entries.into_iter()).map_err(failed())?;
    IndexFile::of(file, &path).map(Some)
}

/// Writes what these index files do not list as one more, and removes the damaged ones. Gives it, if there was anything.
pub fn durably(layout: &Layout, set: &IndexSet, damaged: &[PathBuf]) -> Result<Option<IndexFile>, RepoError> {
    // Merges remove files, too.
    let Some(_lock) = lock::index(layout)? else { return in_memory(layout, set) };
    let (packs, entries) = unlisted(layout, set)?;
    let made = match packs.is_empty() {
        true => None,
        false => Some(merge::write(layout, &packs, entries.into_iter())?),
    };
    for path in damaged {
        fs::remove_file(path).map_err(RepoError::io("remove the index", path))?;
        tracing::warn!("the damaged index {} was made again from the packs", path.display());
    }
    durable::sync_dir(&layout.index())?;
    Ok(made)
}

/// The same for index files that cannot be opened, before a writer begins.
pub fn for_writer(layout: &Layout) -> Result<(), RepoError> {
    let (set, errors) = IndexSet::open_all(layout)?;
    let damaged: Vec<_> = errors.iter().filter_map(damaged_path).collect();
    if !damaged.is_empty() {
        durably(layout, &set, &damaged)?;
    }
    Ok(())
}

/// The file that is damaged, if that is the error.
pub fn damaged_path(error: &RepoError) -> Option<PathBuf> {
    match error {
        RepoError::Corrupt { path, .. } => Some(path.clone()),
        _ => None,
    }
}
