//! The plan: what is restored where to, checked in full before the first byte is written.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;

use crate::durable::{self, Replace};
use crate::extent::Extent;
use crate::repo::point::PointDisk;
use crate::repo::{Image, Manifest, RepoError, Repository};
use crate::restore::chunks::ChunkMap;
use crate::restore::definition::{COMMAND_FILE, DEFINITION_FILE, may_write_command, may_write_definition};
use crate::restore::device::Device;
use crate::restore::error::RestoreError;
use crate::restore::place::{Key, MAX_FILE_NAME_BYTES, Place, begin, look, remove_left_overs};
use crate::restore::qcow2::Layout;
use crate::restore::{DiskTarget, Format, Job, RestoreOptions, compare};

/// Where a point's other files are made, below the directory.
const FILES_DIR: &str = "files";
/// What a new file needs beside its data, at most: its inode, and file system metadata of a thousandth.
const FILE_OVERHEAD_BYTES: u64 = 64 << 10;

/// A disk or file that is restored.
pub(super) struct Item {
    /// Name of the disk, or of the file as the point has it.
    pub name: String,
    pub is_disk: bool,
    pub image: Image,
    pub chunks: ChunkMap,
    pub place: Place,
}

impl Item {
    /// Bytes to write.
    pub fn data_bytes(&self) -> u64 {
        self.chunks.data_bytes()
    }

    /// Makes the temporary file, as long as it will be.
    pub fn begin(&mut self) -> Result<(), RestoreError> {
        if let Place::New { path, pending, layout, .. } = &mut self.place {
            let file_bytes = layout.as_ref().map_or(self.image.size_bytes, |layout| layout.file_bytes());
            let begun = begin(path)?;
            begun.file().set_len(file_bytes).map_err(RestoreError::io("set the length of", begun.temporary()))?;
            *pending = Some(begun);
        }
        Ok(())
    }

    /// Gives a written file its name.
    pub fn commit(&mut self) -> Result<(), RestoreError> {
        if let Place::New { pending, replace, .. } = &mut self.place
            && let Some(pending) = pending.take()
        {
            pending.commit(*replace)?;
        }
        Ok(())
    }
}

/// What is restored.
pub(super) struct Plan {
    pub dir: PathBuf,
    pub items: Vec<Item>,
    made: MadeDirs,
}

impl Plan {
    /// The restore has succeeded: what was made stays.
    pub fn done(&mut self) {
        self.made.0.clear();
    }
}

/// Directories that were made for the restore; removed again (if they are empty) unless it succeeds.
#[derive(Default)]
struct MadeDirs(Vec<PathBuf>);

impl MadeDirs {
    fn make(&mut self, dir: &Path) -> Result<(), RestoreError> {
        let missing: Vec<_> = dir
            .ancestors()
            .take_while(|d| !d.as_os_str().is_empty() && fs::symlink_metadata(d).is_err())
            .map(Path::to_owned)
            .collect();
        // From the outermost to the innermost; they are removed in the opposite order.
        self.0.extend(missing.into_iter().rev());
        Ok(durable::create_dir(dir)?)
    }
}

impl Drop for MadeDirs {
    fn drop(&mut self) {
        for dir in self.0.iter().rev() {
            let _ = fs::remove_dir(dir);
        }
    }
}

/// Makes the plan. What it leaves on an error is what was there before.
pub(super) fn make(
    repo: &Repository,
    manifest: &Manifest,
    options: &RestoreOptions,
    job: &Job,
) -> Result<Plan, RestoreError> {
    let wanted = wanted_disks(manifest, &options.disks)?;
    for (name, image) in manifest.images() {
        image.check().map_err(|e| RepoError::Refused(format!("{name:?} of {:?} cannot be: {e}", manifest.vm)))?;
    }
    let targets = disk_paths(&wanted, options)?;
    let names = file_names(manifest)?;

    let mut made = MadeDirs::default();
    made.make(&options.dir)?;
    let dir = options.dir.canonicalize().map_err(RestoreError::io("find the directory", &options.dir))?;
    outside(repo, &dir, &dir)?;
    may_write_definition(manifest, &dir, options.force)?;
    may_write_command(&dir, options.force)?;

    let mut taken = HashMap::new();
    for name in [DEFINITION_FILE, COMMAND_FILE, FILES_DIR] {
        taken.insert(Key::Name(dir.join(name)), format!("the {name} of the restore"));
    }
    let mut items = Vec::new();
    for ((disk, _), path) in wanted.iter().zip(&targets) {
        let key = look(path, options.force)?;
        if let Key::Name(name) = &key {
            outside(repo, name.parent().unwrap_or(name), path)?;
        }
        // Before it is opened: a device of our own would only be said to be in use.
        claim(&mut taken, key.clone(), &disk.disk.name, path)?;
        let place = disk_place(disk, path, key, options)?;
        items.push((disk.disk.name.clone(), true, disk.image, place));
    }
    if !names.is_empty() {
        made.make(&dir.join(FILES_DIR))?;
        // Not through a link to somewhere else.
        let found =
            fs::symlink_metadata(dir.join(FILES_DIR)).map_err(RestoreError::io("look at", &dir.join(FILES_DIR)))?;
        if !found.is_dir() {
            return Err(RestoreError::NotATarget { path: dir.join(FILES_DIR), kind: "no directory" });
        }
    }
    for (file, name) in manifest.files.iter().zip(names) {
        let path = options.dir.join(FILES_DIR).join(name);
        let place = match look(&path, options.force) {
            Err(RestoreError::Exists { .. }) if compare::file_holds(job, &file.image, &path)? => Place::Kept(path),
            other => new_file(path, other.map(|_| options.force)?),
        };
        items.push((file.name.clone(), false, file.image, place));
    }

    for (.., place) in &items {
        if let Place::New { path, .. } = place {
            remove_left_overs(path);
        }
    }
    let mut planned = Vec::new();
    for (name, is_disk, image, mut place) in items {
        let chunks = match place {
            Place::Kept(_) => ChunkMap::new(image),
            _ => chunks_of(job, &name, image)?,
        };
        if let (Place::New { layout, .. }, Format::Qcow2, true) = (&mut place, options.format, is_disk) {
            let made = Layout::new(image.size_bytes, u64::from(image.chunk_bytes), &chunks);
            *layout = Some(made.map_err(|reason| RestoreError::NotAsQcow2 { disk: name.clone(), reason })?);
        }
        planned.push(Item { name, is_disk, image, chunks, place });
    }
    check_space(&planned)?;
    Ok(Plan { dir, items: planned, made })
}

/// The disks that were asked for, in that order, with their targets.
fn wanted_disks<'a>(
    manifest: &'a Manifest,
    asked: &[DiskTarget],
) -> Result<Vec<(&'a PointDisk, Option<PathBuf>)>, RestoreError> {
    let names: Vec<_> = asked.iter().map(|asked| asked.disk.as_str()).collect();
    let targets = asked.iter().map(|asked| asked.target.clone()).chain(std::iter::repeat(None));
    Ok(manifest.choose(&names)?.into_iter().zip(targets).collect())
}

fn disk_paths(
    wanted: &[(&PointDisk, Option<PathBuf>)],
    options: &RestoreOptions,
) -> Result<Vec<PathBuf>, RestoreError> {
    let path = |(disk, target): &(&PointDisk, Option<PathBuf>)| match target {
        Some(target) => Ok(target.clone()),
        None => {
            let name = &disk.disk.name;
            let file = format!("{name}.{}", options.format.name());
            let bad = name.is_empty()
                || name.starts_with('.')
                || name.contains('/')
                || name.chars().any(char::is_control)
                || file.len() > MAX_FILE_NAME_BYTES;
            match bad {
                true => Err(RestoreError::UnsafeName { what: "disk", name: name.clone() }),
                false => Ok(options.dir.join(file)),
            }
        }
    };
    wanted.iter().map(path).collect()
}

/// A safe and unique file name for each of the point's files: the last part of its path on the old host.
fn file_names(manifest: &Manifest) -> Result<Vec<String>, RestoreError> {
    let mut names: Vec<String> = Vec::new();
    for file in &manifest.files {
        let bad = || RestoreError::UnsafeName { what: "file", name: file.name.clone() };
        let last = file.name.rsplit('/').next().filter(|last| !matches!(*last, "" | "." | "..")).ok_or_else(bad)?;
        if file.name.chars().any(char::is_control) {
            return Err(bad());
        }
        let safe = |c: char| if c.is_ascii_alphanumeric() || "._+-".contains(c) { c } else { '_' };
        let mut base: String = last.chars().map(safe).take(200).collect();
        if base.starts_with('.') {
            base.insert(0, '_');
        }
        let mut name = base.clone();
        let mut count = 1;
        while names.contains(&name) {
            count += 1;
            name = format!("{base}~{count}");
        }
        names.push(name);
    }
    Ok(names)
}

fn new_file(path: PathBuf, force: bool) -> Place {
    let replace = if force { Replace::Yes } else { Replace::No };
    Place::New { path, replace, pending: None, layout: None }
}

fn disk_place(disk: &PointDisk, path: &Path, key: Key, options: &RestoreOptions) -> Result<Place, RestoreError> {
    let name = &disk.disk.name;
    match key {
        Key::Device(_) if options.format == Format::Qcow2 => {
            let reason = "its target is a block device, which holds the bytes themselves";
            Err(RestoreError::NotAsQcow2 { disk: name.clone(), reason })
        }
        Key::Device(_) => Ok(Place::Device(Device::open(path, name, disk.image.size_bytes)?)),
        Key::Name(_) => Ok(new_file(path.to_owned(), options.force)),
    }
}

fn claim(taken: &mut HashMap<Key, String>, key: Key, name: &str, path: &Path) -> Result<(), RestoreError> {
    match taken.insert(key, name.to_owned()) {
        Some(first) => Err(RestoreError::SameTarget { first, second: name.to_owned(), path: path.to_owned() }),
        None => Ok(()),
    }
}

/// Whether `dir` (canonical) is outside the repository.
fn outside(repo: &Repository, dir: &Path, path: &Path) -> Result<(), RestoreError> {
    let root = repo.layout().root();
    let root = root.canonicalize().map_err(RestoreError::io("find the repository", root))?;
    match dir.starts_with(root) {
        true => Err(RestoreError::InRepository { path: path.to_owned() }),
        false => Ok(()),
    }
}

fn chunks_of(job: &Job, name: &str, image: Image) -> Result<ChunkMap, RestoreError> {
    let mut chunks = ChunkMap::new(image);
    for chunk in job.reader.walk(image, Extent::new(0, image.size_bytes)) {
        let chunk = chunk.map_err(|broken| RestoreError::Unreadable {
            vm: job.vm.to_owned(),
            disk: name.to_owned(),
            extent: broken.extent,
            source: broken.source,
        })?;
        chunks.push(chunk.extent);
        if chunks.chunks().is_multiple_of(4096) {
            job.check_interrupted()?;
        }
    }
    Ok(chunks)
}

/// Whether each file system has room for all that comes to it. What is replaced is there until the end.
fn check_space(items: &[Item]) -> Result<(), RestoreError> {
    let mut needed: BTreeMap<u64, (PathBuf, u64)> = BTreeMap::new();
    for item in items {
        let Place::New { path, layout, .. } = &item.place else { continue };
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let device = match fs::metadata(dir) {
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            found => found.map_err(RestoreError::io("look at", dir))?.dev(),
        };
        let bytes = layout.as_ref().map_or(item.data_bytes(), |layout| layout.file_bytes());
        needed.entry(device).or_insert_with(|| (dir.to_owned(), 0)).1 += bytes + bytes / 1024 + FILE_OVERHEAD_BYTES;
    }
    for (path, needed_bytes) in needed.into_values() {
        let found =
            statvfs(&path).map_err(|errno| RestoreError::io("look at the file system of", &path)(errno.into()))?;
        let available_bytes = found.blocks_available() as u64 * found.fragment_size() as u64;
        if needed_bytes > available_bytes {
            return Err(RestoreError::NoSpace { path, needed_bytes, available_bytes });
        }
    }
    Ok(())
}
