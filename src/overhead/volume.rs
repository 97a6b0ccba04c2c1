//! Volume: a logical volume for the machine's disk, and the snapshot that LVM's users back up from.
//!
//! ```text
//!   DIR/overhead-ID/volumes ── loop device ── volume group livebackup-overhead-ID ─┬─ disk        QEMU's
//!                                                                                  └─ instant     its snapshot, during the backup
//! ```
//!
//! It is there for one run: the disk's bytes are copied onto it before QEMU starts and back after QEMU has ended, so that
//! every method goes on from the same disk. LVM is told of no other device than ours (`--devices`) and to keep no copies of what
//! it knows of it, so it looks at no other and notes ours nowhere. The snapshot has room for all of the disk: it never gets full.
//!
//! **A crash of ours** leaves the group and its loop device: `vgremove --yes --devices /dev/loopN NAME` and `losetup
//! --detach` take them out. The name is that of the directory, with our process id in it.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::error::{OverheadError, path};
use super::method::{Bench, Outcome};
use super::rig::WorkDir;
use super::theirs::copy_image;
use crate::units::MIB;

/// Where programs for the administrator are, which need not be in the path.
const SBIN: [&str; 2] = ["/usr/sbin", "/sbin"];
/// Volumes are whole multiples of this, as disks are: the guest sees a disk as long as the image.
const EXTENT: &str = "64k";
/// What LVM keeps at both ends of the group.
const ENDS_BYTES: u64 = 16 * MIB;
/// There where udev runs. Else LVM has to make the nodes of its devices itself.
const UDEV: &str = "/run/udev/control";
const OWN_NODES: &str = "activation { udev_sync=0 udev_rules=0 }";
/// No files in /etc/lvm about a group that is gone soon.
const NO_COPIES: &str = "backup { backup=0 archive=0 }";
/// How long a volume that was just closed may be said to be in use: whoever watches devices looks into it, too.
const FREE_WITHIN: Duration = Duration::from_secs(10);

/// Why there can be none here.
pub fn lacks() -> Option<String> {
    if !Path::new("/dev/mapper/control").exists() {
        return Some("no device-mapper".into());
    }
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root, for a volume group of its own".into());
    }
    let missing = ["lvm", "losetup"].into_iter().find(|name| program(name).is_none());
    missing.map(|name| format!("{name} is not installed (Debian: apt install lvm2 mount)"))
}

fn program(name: &str) -> Option<PathBuf> {
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<_> = std::env::split_paths(&dirs).chain(SBIN.map(PathBuf::from)).collect();
    dirs.into_iter().map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// Runs a program to its end; gives what it printed.
fn run(name: &str, arguments: &[&str]) -> Result<String, OverheadError> {
    let failed = |why: String| OverheadError::Tool { program: format!("{name} {}", arguments.join(" ")), why };
    let program = program(name).ok_or_else(|| failed("is not installed".into()))?;
    // A group of its own: a Ctrl-C is for us, and what was begun is ended and undone.
    let out = Command::new(program).args(arguments).env("LC_ALL", "C").stdin(Stdio::null()).process_group(0).output();
    let out = out.map_err(|e| failed(format!("cannot be run: {e}")))?;
    match out.status.success() {
        true => Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned()),
        false => Err(failed(format!("failed: {}", String::from_utf8_lossy(&out.stderr).trim()))),
    }
}

/// A volume group with the disk in it. Removed when dropped.
#[derive(Debug)]
pub struct Volume {
    group: String,
    loop_device: String,
    file: PathBuf,
    /// Whether there is a group to be removed.
    is_made: bool,
}

impl Volume {
    /// Makes one in the directory, with what the image holds. Blocks.
    pub fn create(work: &WorkDir, image: &Path, size_bytes: u64) -> Result<Self, OverheadError> {
        let file = work.path("volumes");
        // The disk, a snapshot that takes all of it with 16 bytes for each 4 KiB, and the rest.
        let room_bytes = 2 * size_bytes + size_bytes / 128 + ENDS_BYTES;
        // One that is there is under a group that could not be removed.
        File::create_new(&file).and_then(|file| file.set_len(room_bytes)).map_err(path("cannot make", &file))?;
        let attached = run("losetup", &["--find", "--show", "--direct-io=on", &file.display().to_string()]);
        let loop_device = attached.inspect_err(|_| drop(std::fs::remove_file(&file)))?;
        // From here on it is undone by being dropped.
        let mut volume = Self { group: work.name(), loop_device, file, is_made: false };
        volume.lvm("vgcreate", &["--yes", "--physicalextentsize", EXTENT, &volume.group, &volume.loop_device])?;
        volume.is_made = true;
        let size = format!("{size_bytes}b");
        volume
            .lvm("lvcreate", &["--yes", "--wipesignatures", "n", "--size", &size, "--name", "disk", &volume.group])?;
        copy(image, &volume.disk(), size_bytes)?;
        Ok(volume)
    }

    fn lvm(&self, command: &str, arguments: &[&str]) -> Result<String, OverheadError> {
        let nodes = if Path::new(UDEV).exists() { "" } else { OWN_NODES };
        let config = format!("{NO_COPIES} {nodes}");
        let ours = [command, "--quiet", "--devices", &self.loop_device, "--config", &config];
        run("lvm", &[&ours, arguments].concat())
    }

    /// The disk's block device.
    pub fn disk(&self) -> PathBuf {
        Path::new("/dev").join(&self.group).join("disk")
    }

    fn snapshot(&self) -> PathBuf {
        self.disk().with_file_name("instant")
    }

    /// Takes a snapshot of the disk. Blocks.
    fn take(&self) -> Result<(), OverheadError> {
        let origin = format!("{}/disk", self.group);
        self.lvm("lvcreate", &["--yes", "--snapshot", "--extents", "100%FREE", "--name", "instant", &origin]).map(drop)
    }

    /// Removes it. Blocks.
    fn release(&self) -> Result<(), OverheadError> {
        self.remove("lvremove", &format!("{}/instant", self.group))
    }

    /// Removes what may be in use for another moment.
    fn remove(&self, command: &str, name: &str) -> Result<(), OverheadError> {
        let since = Instant::now();
        loop {
            match self.lvm(command, &["--yes", name]) {
                Err(_) if since.elapsed() < FREE_WITHIN => std::thread::sleep(Duration::from_millis(100)),
                done => return done.map(drop),
            }
        }
    }

    /// Copies the disk back into the image; QEMU has ended. Blocks.
    pub fn copy_back(&self, image: &Path, size_bytes: u64) -> Result<(), OverheadError> {
        copy(&self.disk(), image, size_bytes)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        if self.is_made
            && let Err(error) = self.remove("vgremove", &self.group)
        {
            tracing::warn!("the volume group {} on {} is left: {error}", self.group, self.loop_device);
            return;
        }
        if let Err(error) = run("losetup", &["--detach", &self.loop_device]) {
            tracing::warn!("{error}");
        }
        let _ = std::fs::remove_file(&self.file);
    }
}

/// Copies the beginning of one file or device onto that of another, and flushes it.
fn copy(from: &Path, to: &Path, size_bytes: u64) -> Result<(), OverheadError> {
    use io::Read;
    let source = File::open(from).map_err(path("cannot open", from))?;
    let mut target = File::options().write(true).open(to).map_err(path("cannot open", to))?;
    let copied = io::copy(&mut source.take(size_bytes), &mut target).and_then(|copied| {
        target.sync_all()?;
        if copied == size_bytes { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    });
    copied.map_err(path("cannot copy the disk to", to))
}

/// A snapshot, a reader of it, and its removal.
pub async fn backup(bench: &Bench<'_>) -> Result<Outcome, OverheadError> {
    let Some(volume) = bench.volume else { return Err(OverheadError::Panicked) };
    let began_ns = bench.load.now_ns();
    let deadline = bench.deadline();
    tokio::task::block_in_place(|| volume.take())?;
    let (read_bytes, finished) = copy_image(bench, &volume.snapshot(), deadline).await?;
    tokio::task::block_in_place(|| volume.release())?;
    Ok(Outcome { began_ns, ended_ns: bench.load.now_ns(), finished, read_bytes, copied_bytes: None })
}
