//! The index files of a repository, opened together.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::durable::TEMPORARY_ENDING;
use crate::repo::blob::Placed;
use crate::repo::damage::{self, Marks};
use crate::repo::digest::Digest;
use crate::repo::error::{FormatError, RepoError};
use crate::repo::index::format::{Cache, HEADER_BYTES, Header, PackRef, View};
use crate::repo::index::heal;
use crate::repo::layout::Layout;
use crate::units::PackId;

/// An open index file.
#[derive(Debug)]
pub struct IndexFile {
    path: PathBuf,
    file: File,
    header: Header,
    cache: Cache,
    /// Numbers of packs that are not there, or not whole; filled for writers only.
    absent: HashSet<u32>,
    /// What is marked as damaged; filled for writers only.
    marks: Arc<Marks>,
}

impl IndexFile {
    /// Opens an index file and checks its header.
    pub fn open(path: &Path) -> Result<Self, RepoError> {
        let file = File::open(path).map_err(RepoError::io("open the index", path))?;
        Self::of(file, path)
    }

    /// The same of an open file, which `path` names.
    pub(super) fn of(file: File, path: &Path) -> Result<Self, RepoError> {
        let read = || RepoError::io("read the index", path);
        let file_bytes = file.metadata().map_err(read())?.len();
        let mut begin = vec![0; file_bytes.min(HEADER_BYTES as u64) as usize];
        file.read_exact_at(&mut begin, 0).map_err(read())?;
        let header = Header::decode(&begin, file_bytes).map_err(|e| e.at("index", path))?;
        let cache = Cache::new(&header);
        Ok(Self { path: path.to_owned(), file, header, cache, absent: HashSet::new(), marks: Arc::default() })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For look-ups.
    pub fn view(&self) -> View<'_> {
        View::new(&self.file, self.header, &self.cache)
    }

    /// Adds which file it was to a format error.
    pub fn error(&self, error: FormatError) -> RepoError {
        error.at("index", &self.path)
    }

    /// Whether the blob is marked as damaged there.
    fn is_marked(&self, location: &Location) -> bool {
        self.marks.has(location.pack, location.placed.offset_bytes)
    }

    /// Whether the pack was found missing or cut short.
    pub fn is_absent(&self, pack: u32) -> bool {
        self.absent.contains(&pack)
    }
}

/// Where a blob is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// In which pack.
    pub pack: PackId,
    /// Where in it.
    pub placed: Placed,
    /// Number of the index file in the set, and of the entry in it.
    pub entry: (u32, u64),
}

/// Index files, the newest first.
#[derive(Clone, Debug, Default)]
pub struct IndexSet {
    files: Vec<Arc<IndexFile>>,
}

/// What is in a directory, but for what is not finished.
pub(super) fn list(dir: &Path) -> Result<Vec<PathBuf>, RepoError> {
    let at = || RepoError::io("list", dir);
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(at())? {
        let path = entry.map_err(at())?.path();
        if path.extension() != Some(OsStr::new(TEMPORARY_ENDING)) {
            paths.push(path);
        }
    }
    Ok(paths)
}

impl IndexSet {
    /// Opens all index files; those that cannot be are returned as errors.
    pub fn open_all(layout: &Layout) -> Result<(Self, Vec<RepoError>), RepoError> {
        // A merge may remove files between listing and opening; the merged one is there before that, so list again.
        for _ in 0..100 {
            let (mut files, mut errors, mut again) = (Vec::new(), Vec::new(), false);
            for path in list(&layout.index())? {
                match IndexFile::open(&path) {
                    Ok(file) => files.push(Arc::new(file)),
                    Err(RepoError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => again = true,
                    Err(error) => errors.push(error),
                }
            }
            if !again {
                let mut this = Self { files };
                this.sort();
                return Ok((this, errors));
            }
        }
        Err(RepoError::Busy { who: "a process that keeps merging index files".to_owned() })
    }

    /// Opens all index files. What a damaged one listed is read from the packs, and remembered by this set alone.
    pub fn open(layout: &Layout) -> Result<Self, RepoError> {
        let (mut this, errors) = Self::open_all(layout)?;
        if errors.is_empty() {
            return Ok(this);
        }
        for error in errors {
            if heal::damaged_path(&error).is_none() {
                return Err(error);
            }
            tracing::warn!("{error}; the packs are asked instead, and the next backup makes it again");
        }
        this.files.extend(heal::in_memory(layout, &this)?.map(Arc::new));
        this.sort();
        Ok(this)
    }

    /// Leaves index files out.
    pub fn without(&self, paths: &[PathBuf]) -> Self {
        Self { files: self.files.iter().filter(|file| !paths.contains(&file.path)).cloned().collect() }
    }

    /// Opens all index files for a writer: packs that are missing or not of the recorded length count as not there, and so
    /// do blobs that are marked as damaged, so that nothing new comes to depend on them and what was lost with them is stored
    /// again.
    pub fn open_for_writer(layout: &Layout) -> Result<Self, RepoError> {
        let mut this = Self::open(layout)?;
        let marks = Arc::new(damage::load(layout)?);
        for file in &mut this.files {
            let mut absent = HashSet::new();
            for (n, pack) in file.view().all_packs().map_err(|e| file.error(e))?.iter().enumerate() {
                let path = layout.pack(pack.id);
                if !std::fs::metadata(&path).is_ok_and(|m| m.len() == pack.len_bytes) {
                    tracing::warn!(pack = %path.display(), "a pack is missing or cut short; run `livebackup verify`");
                    absent.insert(n as u32);
                }
            }
            if let Some(file) = Arc::get_mut(file) {
                file.absent = absent;
                file.marks = marks.clone();
            }
        }
        Ok(this)
    }

    /// Whether something is known to be absent or damaged. Of a set for a writer.
    pub fn lacks_something(&self) -> bool {
        self.files.iter().any(|file| !file.absent.is_empty() || file.marks.count() > 0)
    }

    fn sort(&mut self) {
        self.files.sort_by_key(|f| (std::cmp::Reverse(f.header.created_us), f.path.clone()));
    }

    /// Adds a file that has just been written.
    pub fn add(&mut self, file: Arc<IndexFile>) {
        self.files.push(file);
        self.sort();
    }

    /// The files, the newest first.
    pub fn files(&self) -> &[Arc<IndexFile>] {
        &self.files
    }

    /// All packs that the files name, each once.
    pub fn packs(&self) -> Result<Vec<PackRef>, RepoError> {
        let mut seen = HashSet::new();
        let mut packs = Vec::new();
        for file in &self.files {
            for pack in file.view().all_packs().map_err(|e| file.error(e))? {
                if seen.insert(pack.id) {
                    packs.push(pack);
                }
            }
        }
        Ok(packs)
    }

    /// All places of a digest, the newest index first. What is known to be absent or damaged is left out.
    pub fn find_all<'a>(&'a self, digest: &Digest) -> impl Iterator<Item = Result<Location, RepoError>> + use<'a> {
        let digest = *digest;
        self.files.iter().enumerate().flat_map(move |(number, file)| {
            file.view().find(&digest).filter_map(move |found| {
                let located = found.map(|(n, entry)| {
                    let location = Location { pack: entry.pack_id, placed: entry.placed, entry: (number as u32, n) };
                    (!file.is_absent(entry.pack) && !file.is_marked(&location)).then_some(location)
                });
                located.map_err(|e| file.error(e)).transpose()
            })
        })
    }

    /// The first place of a digest.
    pub fn find(&self, digest: &Digest) -> Result<Option<Location>, RepoError> {
        self.find_all(digest).next().transpose()
    }
}
