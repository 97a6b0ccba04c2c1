//! Writing index files, and merging many small ones into one.
//!
//! A merge reads its inputs in step, so it needs no memory to speak of. Crash before the new file is durable: as if it had
//! not been tried. Crash after: entries are found twice, in the new file and in old ones, which is no harm; the next merge
//! drops the doubles.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;

use crate::durable::{self, Pending, Replace};
use crate::fault;
use crate::repo::digest::Digest;
use crate::repo::error::RepoError;
use crate::repo::index::format::{HEADER_BYTES, PackRef, RawEntry, encode_header};
use crate::repo::index::set::{IndexFile, IndexSet};
use crate::repo::layout::Layout;
use crate::repo::lock;
use crate::units::PackId;

/// With more index files than this, small ones are merged.
pub const MAX_INDEX_FILES: usize = 16;
/// So many are left by a merge.
const FILES_AFTER_MERGE: usize = 8;

const _: () = assert!(FILES_AFTER_MERGE < MAX_INDEX_FILES);

/// Writes an index file, durably. The entries ascend by digest.
pub fn write(
    layout: &Layout,
    packs: &[PackRef],
    entries: impl Iterator<Item = RawEntry>,
) -> Result<IndexFile, RepoError> {
    try_write(layout, packs, entries.map(Ok))
}

/// [`write`] of entries of which one may be an error: then nothing is written.
fn try_write(
    layout: &Layout,
    packs: &[PackRef],
    mut entries: impl Iterator<Item = Result<RawEntry, RepoError>>,
) -> Result<IndexFile, RepoError> {
    let path: PathBuf = layout.index().join(PackId::random().to_string());
    let pending = Pending::create(&path)?;
    let mut failure = None;
    let good = std::iter::from_fn(|| entries.next()?.map_err(|error| failure = Some(error)).ok());
    write_into(pending.file(), packs, good).map_err(RepoError::io("write the index", pending.temporary()))?;
    if let Some(error) = failure {
        return Err(error);
    }
    pending.commit(Replace::No)?;
    fault::point("repo.index-written");
    IndexFile::open(&path)
}

/// Writes an index into an empty file.
pub(super) fn write_into(file: &File, packs: &[PackRef], entries: impl Iterator<Item = RawEntry>) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(256 << 10, file);
    let mut crc = crc32fast::Hasher::new();
    out.write_all(&[0; HEADER_BYTES])?;
    let mut put = |bytes: &[u8]| {
        crc.update(bytes);
        out.write_all(bytes)
    };
    packs.iter().try_for_each(|pack| put(&pack.encode()))?;
    let mut count = 0u64;
    for entry in entries {
        put(&entry)?;
        count += 1;
    }
    out.flush()?;
    drop(out);
    let created_us = Timestamp::now().as_microsecond().max(0) as u64;
    file.write_all_at(&encode_header(packs.len() as u32, count, created_us, crc.finalize()), 0)
}

/// Merges small index files if there are more than [`MAX_INDEX_FILES`]. Does nothing while another process merges.
/// Returns the new set, if anything was done.
pub fn merge_if_many(layout: &Layout) -> Result<Option<IndexSet>, RepoError> {
    if IndexSet::open_all(layout)?.0.files().len() <= MAX_INDEX_FILES {
        return Ok(None);
    }
    let Some(_lock) = lock::index(layout)? else { return Ok(None) };
    let (set, _) = IndexSet::open_all(layout)?;
    // A damaged file is left for `verify` to speak about.
    let mut files: Vec<_> = set.files().iter().filter(|f| f.view().check_body().is_ok()).cloned().collect();
    if files.len() <= MAX_INDEX_FILES {
        return Ok(None);
    }
    files.sort_by_key(|file| file.view().header().entries);
    files.truncate(files.len() - FILES_AFTER_MERGE + 1);
    merge(layout, &files)?;
    IndexSet::open(layout).map(Some)
}

/// Merges these files into one and removes them.
pub(super) fn merge(layout: &Layout, files: &[Arc<IndexFile>]) -> Result<(), RepoError> {
    let mut packs = Vec::new();
    let mut numbers = HashMap::new();
    let mut inputs = Vec::new();
    for file in files {
        let mut translation = Vec::new();
        for pack in file.view().all_packs().map_err(|e| file.error(e))? {
            translation.push(*numbers.entry(pack.id).or_insert_with(|| {
                packs.push(pack);
                packs.len() as u32 - 1
            }));
        }
        inputs.push((file.view().entries().peekable(), translation));
    }
    let mut last: Option<RawEntry> = None;
    let next = || {
        loop {
            // What cannot be read comes first, and ends it: it is not a file's end.
            let heads = inputs.iter_mut().enumerate().filter_map(|(i, (entries, _))| {
                Some((entries.peek()?.as_ref().ok().and_then(|raw| Digest::from_slice(raw)), i))
            });
            let (_, from) = heads.min()?;
            let (entries, translation) = &mut inputs[from];
            let mut entry = match entries.next()? {
                Ok(entry) => entry,
                Err(error) => return Some(Err(files[from].error(error))),
            };
            let number = u32::from_le_bytes([entry[32], entry[33], entry[34], entry[35]]);
            let number = translation.get(number as usize).copied().unwrap_or(u32::MAX);
            entry[32..36].copy_from_slice(&number.to_le_bytes());
            if last.replace(entry) != Some(entry) {
                return Some(Ok(entry));
            }
        }
    };
    try_write(layout, &packs, std::iter::from_fn(next))?;
    fault::point("repo.index-merged");
    for file in files {
        durable::remove_file(file.path())?;
    }
    Ok(())
}
