//! Medium: which files a disk really is, and the stamp that shows whether anybody wrote to them while no bitmap recorded.
//!
//! A stamp is (device, inode, size, mtime, ctime) of every file of the chain. It is proof of "nothing was written" under
//! conditions, and each of them is looked at; where one does not hold there is no stamp, with the reason in words:
//!
//! * **The file is the one that QEMU has open.** A path may lead elsewhere by now: QEMU writes on to the inode that it
//!   opened, whatever `mv` put in its place. So the path's numbers must be among those of `/proc/PID/fd`, and the file is
//!   held (`O_PATH`) from before QEMU's exit until the stamp is taken.
//! * **The file system keeps honest times**: a local one that we know, mounted without `lazytime`, with times finer than a
//!   second. Network file systems cache times, and others write behind our host's back.
//! * **The clock has moved on.** A kernel takes a file's times from a clock that ticks (every 1 to 10 ms): a write in the
//!   same tick as the last one leaves no mark. So a stamp counts only when every time in it is older than the clock by
//!   more than a tick, and the files still stand so when looked at again. We wait for that.
//! * **Nobody opened the file while QEMU ended.** What somebody writes between QEMU's exit and the stamp would be in the stamp. So
//!   each file is watched (inotify(7)) from before `quit`: QEMU has it open, and whoever else opens it voids the stamp.
//! * **A host's crash ends all of it**: after it the content may be newer than the times. The boot is compared by
//!   [`evidence`](super::evidence).
//!
//! A block device has no times that prove anything: a rolled-back LV or zvol has the same name, number and size. What can be had
//! of one is in [`device`](super::device).
//!
//! **Comparing**: the new QEMU's bitmap is added first, then the files are looked at. QEMU marks a write as dirty when it
//! completes, and by then the kernel has set the file's mtime. So a write either completed before we looked, and shows in the
//! times, or completes later, and is in the bitmap.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::libc;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::statfs::{FsType, fstatfs};
use nix::time::{ClockId, clock_getres, clock_gettime};

use super::graph::Graph;
use crate::checkpoint::{FileNumbers, FileStamp, Layer, Medium, Stamp};
use crate::machine::{Disk, MediumFile};

/// Local file systems that set a file's times with every write.
const HONEST: [(i64, &str); 9] = [
    (0xef53, "ext"),
    (0x5846_5342, "XFS"),
    (0x9123_683e, "Btrfs"),
    (0x0102_1994, "tmpfs"),
    (0x2fc1_2fc1, "ZFS"),
    (0xf2f5_2010, "F2FS"),
    (0xca45_1a4e, "bcachefs"),
    (0x794c_7630, "overlay"),
    (0x3153_464a, "JFS"),
];
/// Most layers of a chain that is looked at.
const MAX_LAYERS: usize = 1024;
/// Most descriptors of QEMU that are looked at.
const MAX_DESCRIPTORS: usize = 64 << 10;
/// How often we wait for the clock to pass a file's times: something writes to it all the time then.
const MAX_WAITS: usize = 50;

/// The files that a process has open, by their numbers: a descriptor of each.
#[derive(Clone, Debug, Default)]
pub struct OpenFiles(HashMap<(u64, u64), i32>);

impl OpenFiles {
    /// Those of this process; none if they cannot be seen.
    pub fn of(pid: i32) -> Self {
        let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten().take(MAX_DESCRIPTORS);
        let numbers = |entry: fs::DirEntry| {
            let about = fs::metadata(entry.path()).ok()?;
            let numbers = numbers(&about)?;
            Some(((numbers.dev, numbers.inode), entry.file_name().to_str()?.parse().ok()?))
        };
        Self(entries.filter_map(numbers).collect())
    }

    /// A descriptor of this file.
    pub fn descriptor(&self, file: FileNumbers) -> Option<i32> {
        self.0.get(&(file.dev, file.inode)).copied()
    }
}

/// Numbers of a regular file or block device.
pub(super) fn numbers(about: &fs::Metadata) -> Option<FileNumbers> {
    if about.file_type().is_block_device() {
        return Some(FileNumbers { dev: 0, inode: about.rdev() });
    }
    about.file_type().is_file().then(|| FileNumbers { dev: about.dev(), inode: about.ino() })
}

/// Numbers of a file or device of QEMU's, if it can be seen.
pub fn numbers_at(pid: i32, name: &str) -> Option<FileNumbers> {
    numbers(&fs::metadata(inside(pid, name)).ok()?)
}

/// A path of QEMU's as this process can open it: QEMU may have another root or working directory.
fn inside(pid: i32, path: &str) -> PathBuf {
    match path.strip_prefix('/') {
        Some(rest) => Path::new(&format!("/proc/{pid}/root")).join(rest),
        None => Path::new(&format!("/proc/{pid}/cwd")).join(path),
    }
}

/// A disk as far as its medium goes: what can be taken to a thread that blocks.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The chain, the guest-visible layer first.
    pub chain: Vec<MediumFile>,
    /// What the root node calls itself, if that says more than the path of its file: only then it has an offset or the
    /// like.
    pub options: Option<String>,
}

impl Subject {
    /// The medium of a disk.
    pub fn of(graph: &Graph, disk: &Disk) -> Self {
        let own = graph.node(&disk.node).map(|n| n.filename.clone());
        Self { chain: disk.chain.clone(), options: own.filter(|name| name.starts_with("json:")) }
    }
}

/// The numbers of a disk's files, as far as they are files or devices. Blocks on files.
pub(super) fn numbers_of(pid: i32, subject: &Subject) -> Vec<FileNumbers> {
    let layers = subject.chain.iter().take(MAX_LAYERS);
    layers.filter_map(|layer| numbers(&fs::metadata(inside(pid, &layer.filename)).ok()?)).collect()
}

/// What a disk is made of now. Blocks on files.
pub fn look(pid: i32, open: &OpenFiles, subject: &Subject) -> Medium {
    let layers = subject.chain.iter().take(MAX_LAYERS).map(|layer| {
        let file = fs::metadata(inside(pid, &layer.filename)).ok().and_then(|about| numbers(&about));
        Layer {
            format: layer.format.clone(),
            protocol: layer.protocol.clone(),
            filename: layer.filename.clone(),
            file: file.filter(|file| open.descriptor(*file).is_some()),
        }
    });
    Medium { options: subject.options.clone(), layers: layers.collect(), migration: None }
}

/// The files of a disk, held so that they can be looked at after QEMU's exit.
#[derive(Debug)]
pub struct HeldMedium {
    options: Option<String>,
    files: Vec<HeldFile>,
    /// Tells who opens one of the files from now on.
    opened: Inotify,
}

#[derive(Debug)]
struct HeldFile {
    format: String,
    filename: String,
    file: File,
}

/// Takes hold of the files of a disk, as QEMU has them open. Blocks on files.
///
/// # Errors
/// Why this medium can have no stamp, to be read after "the medium".
pub fn hold(pid: i32, subject: &Subject) -> Result<HeldMedium, String> {
    let open = OpenFiles::of(pid);
    let chain = &subject.chain;
    if chain.is_empty() || chain.len() > MAX_LAYERS {
        return Err(format!("consists of {} files", chain.len()));
    }
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    let lazy = lazy_mounts(&mounts);
    let mut files = vec![];
    let opened = watcher()?;
    for layer in chain {
        let name = &layer.filename;
        if layer.protocol != "file" {
            return Err(match layer.protocol.as_str() {
                "host_device" => format!(
                    "is the block device {name}, which shows no trace of a write or a rollback (if nobody else writes to it, the \
                     service's configuration can say exclusive_device)"
                ),
                other => format!("is reached by {other}, where no trace of others' writes can be seen"),
            });
        }
        let about = fs::metadata(inside(pid, name)).map_err(|e| format!("cannot be looked at: {name}: {e}"))?;
        let numbers = numbers(&about).filter(|n| n.dev != 0).ok_or(format!("is no regular file: {name}"))?;
        let descriptor = open.descriptor(numbers).ok_or_else(|| {
            format!("cannot be told for certain: {name} is not the file that QEMU has open (it was moved or replaced)")
        })?;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(format!("/proc/{pid}/fd/{descriptor}"))
            .map_err(|e| format!("cannot be held: {name}: {e}"))?;
        watch(&opened, &file).map_err(|e| format!("cannot be watched: {name}: {e}"))?;
        has_honest_times(&file, &lazy).map_err(|why| format!("shows no honest times: {name} {why}"))?;
        files.push(HeldFile { format: layer.format.clone(), filename: name.clone(), file });
    }
    Ok(HeldMedium { options: subject.options.clone(), files, opened })
}

fn watcher() -> Result<Inotify, String> {
    Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).map_err(|e| format!("cannot be watched: {e}"))
}

/// Watches the file behind a descriptor that was opened with `O_PATH`, whatever its name is now.
fn watch(opened: &Inotify, file: &File) -> nix::Result<()> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    opened.add_watch(path.as_str(), AddWatchFlags::IN_OPEN).map(drop)
}

/// Whether a mount with this id is lazy; a mount that is not listed is unknown.
type LazyMounts = HashMap<u64, bool>;

/// Reads `/proc/PID/mountinfo` (proc(5)): `id parent dev root point options … - type source super-options`.
fn lazy_mounts(mountinfo: &str) -> LazyMounts {
    let mount = |line: &str| {
        let id = line.split(' ').next()?.parse().ok()?;
        let (options, superblock) = line.split_once(" - ")?;
        let all: BTreeSet<_> = options
            .split(' ')
            .nth(5)
            .into_iter()
            .chain(superblock.split(' ').nth(2))
            .flat_map(|o| o.split(','))
            .collect();
        Some((id, all.contains("lazytime")))
    };
    mountinfo.lines().filter_map(mount).collect()
}

fn has_honest_times(file: &File, lazy: &LazyMounts) -> Result<(), String> {
    let kind = fstatfs(file).map_err(|e| format!("is on an unknown file system: {e}"))?.filesystem_type();
    if !HONEST.iter().any(|(magic, _)| kind == FsType(*magic as _)) {
        return Err(format!("is on a file system (type {:#x}) that is not local, or not known to us", kind.0));
    }
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).unwrap_or_default();
    let id = info.lines().find_map(|l| l.strip_prefix("mnt_id:")?.trim().parse().ok());
    match id.and_then(|id: u64| lazy.get(&id)) {
        Some(false) => {}
        Some(true) => return Err("is on a file system that is mounted with lazytime".to_owned()),
        None => return Err("is on a mount that cannot be seen".to_owned()),
    }
    let about = file.metadata().map_err(|e| e.to_string())?;
    match about.ctime_nsec() {
        // A kernel's clock does not stand on a whole second by chance (one in a hundred at worst): then it is the file
        // system that knows no more.
        0 => Err("is on a file system that keeps times in whole seconds".to_owned()),
        _ => Ok(()),
    }
}

impl HeldMedium {
    /// The files as they stand now. Blocks on files.
    ///
    /// # Errors
    /// Why that cannot be seen, to be read after "the medium".
    pub fn look(&self) -> Result<Stamp, String> {
        let stamp = |held: &HeldFile| {
            let about = held.file.metadata().map_err(|e| format!("cannot be looked at: {}: {e}", held.filename))?;
            let time_ns = |seconds: i64, ns: i64| seconds.checked_mul(1_000_000_000).and_then(|t| t.checked_add(ns));
            let times = time_ns(about.mtime(), about.mtime_nsec()).zip(time_ns(about.ctime(), about.ctime_nsec()));
            let (mtime_ns, ctime_ns) = times.ok_or(format!("has impossible times: {}", held.filename))?;
            Ok::<_, String>(FileStamp {
                format: held.format.clone(),
                filename: held.filename.clone(),
                file: FileNumbers { dev: about.dev(), inode: about.ino() },
                size_bytes: about.len(),
                mtime_ns,
                ctime_ns,
            })
        };
        let files = self.files.iter().map(stamp).collect::<Result<_, _>>()?;
        Ok(Stamp { options: self.options.clone(), files })
    }

    /// The files as they stand now, to be compared with a stamp that was taken before. Blocks on files.
    ///
    /// # Errors
    /// Why there is none, to be read after "the medium".
    pub fn compare_with(&self, before: &Stamp) -> Result<(), String> {
        match self.look()?.difference(before) {
            None => Ok(()),
            Some(difference) => Err(difference),
        }
    }

    /// The stamp, once it counts: waits, mostly some milliseconds, until the clock has passed all times. Blocks.
    ///
    /// # Errors
    /// Why there is none, to be read after "the medium".
    pub fn stamp(&self) -> Result<Stamp, String> {
        let tick = clock_getres(ClockId::CLOCK_REALTIME_COARSE).map_or(10_000_000, |t| t.tv_nsec()).max(1_000_000);
        let mut stamp = self.look()?;
        for _ in 0..MAX_WAITS {
            let newest = stamp.files.iter().map(|f| f.mtime_ns.max(f.ctime_ns)).max().unwrap_or(0);
            let now = clock_gettime(ClockId::CLOCK_REALTIME_COARSE).map_err(|e| format!("has no clock: {e}"))?;
            let now_ns = now.tv_sec() * 1_000_000_000 + now.tv_nsec();
            if newest > now_ns.saturating_add(2_000_000_000) {
                return Err("has times in the future: the host's clock was set back".to_owned());
            }
            let passed = now_ns > newest.saturating_add(2 * tick);
            let again = self.look()?;
            match self.opened.read_events() {
                Err(nix::errno::Errno::EAGAIN) => {}
                Ok(_) => return Err("was opened by somebody while QEMU ended, who may have written to it".to_owned()),
                Err(e) => return Err(format!("could not be watched while QEMU ended: {e}")),
            }
            if passed && again == stamp {
                return Ok(stamp);
            }
            stamp = again;
            std::thread::sleep(Duration::from_nanos(tick.unsigned_abs()) * 3);
        }
        Err("is written to by somebody although QEMU has ended, or the host's clock stands still".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn held(path: &Path) -> HeldMedium {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).unwrap();
        let filename = path.display().to_string();
        let opened = watcher().unwrap();
        watch(&opened, &file).unwrap();
        HeldMedium { options: None, files: vec![HeldFile { format: "raw".into(), filename, file }], opened }
    }

    #[test]
    fn every_write_after_a_stamp_shows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, [0; 4096]).unwrap();
        // However soon the write comes after the stamp: that is what the stamp waits for.
        for round in 0..40_u8 {
            let medium = held(&path);
            let stamp = medium.stamp().unwrap();
            assert_eq!(medium.compare_with(&stamp), Ok(()));
            let mut file = OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all(&[round]).unwrap();
            drop(file);
            let said = medium.compare_with(&stamp).unwrap_err();
            assert!(said.contains("was written to"), "{said}");
        }
        let medium = held(&path);
        let stamp = medium.stamp().unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
        assert!(medium.compare_with(&stamp).unwrap_err().contains("changed"));
        // Contents with the time set back: ctime tells.
        let stamp = medium.stamp().unwrap();
        let mtime = fs::metadata(&path).unwrap().modified().unwrap();
        fs::write(&path, [9; 4096]).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_modified(mtime).unwrap();
        assert!(medium.compare_with(&stamp).unwrap_err().contains("time set back"));
        // Whoever opens it before the stamp is taken voids it.
        assert!(medium.stamp().unwrap_err().contains("opened by somebody"));
        let medium = held(&path);
        let renamed = dir.path().join("b");
        fs::rename(&path, &renamed).unwrap();
        drop(File::open(&renamed).unwrap());
        assert!(medium.stamp().unwrap_err().contains("opened by somebody"));
    }

    #[test]
    fn mounts_that_put_times_off_are_known() {
        let text = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro\n\
                    23 22 8:2 / /a rw,relatime,lazytime - xfs /dev/sdb rw\n\
                    24 22 8:3 / /b rw shared:2 master:3 - ext4 /dev/sdc rw,lazytime\nrubbish\n25 x";
        assert_eq!(lazy_mounts(text), LazyMounts::from([(22, false), (23, true), (24, true)]));
        let file = File::open(std::env::current_exe().unwrap()).unwrap();
        assert!(has_honest_times(&file, &LazyMounts::new()).unwrap_err().contains("cannot be seen"));
        let proc = File::open("/proc/self/stat").unwrap();
        assert!(has_honest_times(&proc, &LazyMounts::new()).unwrap_err().contains("not known"));
    }

    #[test]
    fn open_files_are_told_by_their_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let file = File::create(&path).unwrap();
        let numbers = numbers(&file.metadata().unwrap()).unwrap();
        let pid = std::process::id() as i32;
        assert!(OpenFiles::of(pid).descriptor(numbers).is_some());
        drop(file);
        assert_eq!(OpenFiles::of(pid).descriptor(numbers), None);
    }
}
