//! The machine under the load: a QEMU of our own, without a guest system.
//!
//! ```text
//!   DIR/overhead-ID/            made by us, removed at the end, whatever that is
//!       disk.raw                the disk; laid out once, written on by every run (by way of `volume` for one method)
//!       bios                    64 KiB that say `hlt`
//!       qmp, own, qtest         sockets of the QEMU that runs now: for livebackup, for us, for the load
//!       state, scratch, …       what methods make
//! ```
//!
//! Its memory is a file without a name, which QEMU opens through `/proc`. **A crash of ours** ends QEMU (its parent is a
//! thread that lives as long as the run, and the kernel ends it with that) and leaves the directory, which has our process
//! id in its name.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use super::driver::{MEMORY_BYTES, SLOT};
use super::error::{OverheadError, path};
use crate::monitor::{Address, Monitor};
use crate::units::PackId;

/// Longest path of a socket.
const MAX_SOCKET_PATH: usize = 107;
const STARTS_WITHIN: Duration = Duration::from_secs(20);
/// The disk's node, and its device.
pub const NODE: &str = "disk0";
/// What livebackup calls the disk.
pub const DISK: &str = "vd0";

/// Whether the host's page cache stands between QEMU and the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// It does: `cache=writeback`, QEMU's own default.
    #[default]
    Writeback,
    /// It does not: `cache=none`.
    None,
}

impl Cache {
    /// As QEMU calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Writeback => "writeback",
            Self::None => "none",
        }
    }
}

/// A directory that goes when this does.
#[derive(Debug)]
pub struct WorkDir(PathBuf);

impl WorkDir {
    /// Makes one inside of `dir`, which can have sockets.
    pub fn create(dir: &Path) -> Result<Self, OverheadError> {
        let work = Self::beside(dir)?;
        match work.path("qtest").as_os_str().len() > MAX_SOCKET_PATH {
            true => Err(OverheadError::TooLong(work.0.clone())),
            false => Ok(work),
        }
    }

    /// Makes one inside of `dir`, for files only.
    pub fn beside(dir: &Path) -> Result<Self, OverheadError> {
        let dir = std::fs::canonicalize(dir).map_err(path("cannot use the directory", dir))?;
        let name = format!("livebackup-overhead-{}-{}", std::process::id(), &PackId::random().short()[..4]);
        let own = dir.join(name);
        std::fs::create_dir(&own).map_err(path("cannot make the directory", &own))?;
        Ok(Self(own))
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Its own name, which no other run has.
    pub fn name(&self) -> String {
        self.0.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Removes what a method has made: a file or directory that may not be there.
    pub fn remove(&self, name: &str) {
        let path = self.path(name);
        let _ = std::fs::remove_dir_all(&path).or_else(|_| std::fs::remove_file(&path));
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!("{} is left: {error}", self.0.display());
        }
    }
}

/// How QEMU is started.
#[derive(Clone, Debug)]
pub struct RigOptions {
    /// `qemu-system-x86_64`.
    pub qemu: PathBuf,
    /// How its image is used.
    pub cache: Cache,
}

/// A running QEMU. Ended when dropped.
#[derive(Debug)]
pub struct Rig {
    /// Our own monitor.
    pub monitor: Monitor,
    /// The machine's memory.
    pub memory: File,
    process: Process,
}

/// QEMU's process, and the thread that is its parent.
#[derive(Debug)]
struct Process {
    /// Dropped to end it.
    end: Option<mpsc::Sender<()>>,
    parent: Option<JoinHandle<()>>,
}

impl Process {
    fn start(mut command: Command) -> Result<(Self, mpsc::Receiver<std::io::Result<ExitStatus>>), OverheadError> {
        // SAFETY: between fork and exec only a system call is made, which allocates nothing and takes no lock.
        unsafe {
            command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?));
        }
        let (end, told) = mpsc::channel::<()>();
        let (tell, status) = mpsc::channel();
        let watch = move || match command.spawn() {
            Ok(mut child) => loop {
                match (told.recv_timeout(Duration::from_millis(20)), child.try_wait()) {
                    (_, Ok(Some(status))) => return drop(tell.send(Ok(status))),
                    (Err(mpsc::RecvTimeoutError::Timeout), _) => {}
                    _ => return end_child(&mut child),
                }
            },
            Err(error) => drop(tell.send(Err(error))),
        };
        let parent = std::thread::Builder::new().name("qemu-parent".into()).spawn(watch);
        let parent = parent.map_err(path("cannot start a thread for", "QEMU"))?;
        Ok((Self { end: Some(end), parent: Some(parent) }, status))
    }
}

fn end_child(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end.take();
        if let Some(parent) = self.parent.take() {
            let _ = parent.join();
        }
    }
}

impl Rig {
    /// Starts QEMU on a raw image or a block device, running.
    pub async fn start(work: &WorkDir, options: &RigOptions, disk: &Path) -> Result<Self, OverheadError> {
        let memory = memfd_create(c"livebackup-overhead", MFdFlags::MFD_CLOEXEC)
            .map_err(std::io::Error::from)
            .map_err(path("cannot make the memory of", "the machine"))?;
        let memory = File::from(memory);
        memory.set_len(MEMORY_BYTES).map_err(path("cannot make the memory of", "the machine"))?;
        let log_path = work.path("qemu.log");
        let log = File::create(&log_path).map_err(path("cannot make", &log_path))?;
        write_bios(&work.path("bios"))?;
        for socket in ["qmp", "own", "qtest"] {
            work.remove(socket);
        }
        let started = Instant::now();
        let (process, status) = Process::start(command(work, options, disk, &memory, log)?)?;
        let program = || options.qemu.display().to_string();
        let address = Address::Unix(work.path("own"));
        loop {
            if let Ok(ended) = status.try_recv() {
                let said = std::fs::read_to_string(&log_path).unwrap_or_default();
                let said = said.lines().last().unwrap_or_default();
                let why = match ended {
                    Ok(status) => format!("ended at its start with {status}: {said}"),
                    Err(error) => format!("cannot be run: {error}"),
                };
                return Err(OverheadError::Program { program: program(), why });
            }
            // The last of the sockets to be made.
            if work.path("qtest").exists() && work.path("own").exists() {
                match Monitor::connect(&address).await {
                    Ok(monitor) => return Ok(Self { monitor, memory, process }),
                    Err(error) if started.elapsed() > STARTS_WITHIN => return Err(error.into()),
                    Err(_) => {}
                }
            } else if started.elapsed() > STARTS_WITHIN {
                return Err(OverheadError::Program { program: program(), why: "opened no monitor within 20 s".into() });
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Ends QEMU, and waits for that.
    pub async fn end(self) -> Result<(), OverheadError> {
        let Self { monitor, process, .. } = self;
        drop(monitor);
        tokio::task::spawn_blocking(|| drop(process)).await.map_err(|_| OverheadError::Panicked)
    }
}

fn command(
    work: &WorkDir,
    options: &RigOptions,
    disk: &Path,
    memory: &File,
    log: File,
) -> Result<Command, OverheadError> {
    let mut command = Command::new(&options.qemu);
    // A comma ends a value, two are one.
    let escaped = |path: &Path| path.display().to_string().replace(',', ",,");
    let mib = MEMORY_BYTES >> 20;
    let ram = format!(
        "memory-backend-file,id=ram,size={mib}M,share=on,mem-path=/proc/{}/fd/{}",
        std::process::id(),
        memory.as_raw_fd()
    );
    command.args(["-name", "overhead", "-nodefaults", "-display", "none", "-machine", "q35,memory-backend=ram"]);
    // No processor has anything to do; which accelerator does it does not matter.
    command.args(["-accel", "tcg", "-accel", "kvm", "-m", &mib.to_string(), "-object", &ram]);
    command.args(["-bios", &work.path("bios").display().to_string()]);
    for (option, name) in [("-qmp", "qmp"), ("-qmp", "own"), ("-qtest", "qtest")] {
        command.args([option, &format!("unix:{},server=on,wait=off", escaped(&work.path(name)))]);
    }
    // For targets that are to be slow.
    command.args(["-object", "throttle-group,id=slow"]);
    let direct = if options.cache == Cache::None { "on" } else { "off" };
    let cache = format!("cache.direct={direct},cache.no-flush=off");
    let is_device = std::fs::metadata(disk).is_ok_and(|about| about.file_type().is_block_device());
    let driver = if is_device { "host_device" } else { "file" };
    let image = escaped(disk);
    let file = format!("file.driver={driver},file.filename={image},file.discard=unmap,file.cache.direct={direct}");
    command.args(["-blockdev", &format!("driver=raw,node-name={NODE},discard=unmap,{cache},{file}")]);
    command.args(["-device", &format!("virtio-blk-pci,id={DISK},drive={NODE},addr={SLOT},disable-legacy=on")]);
    let err = log.try_clone().map_err(path("cannot use", work.path("qemu.log")))?;
    command.stdin(Stdio::null()).stdout(log).stderr(err);
    Ok(command)
}

/// What the machine's processor does: nothing, with interrupts off.
fn write_bios(to: &Path) -> Result<(), OverheadError> {
    let mut bytes = vec![0; 64 << 10];
    let reset = bytes.len() - 16;
    // cli; hlt; jmp back to the hlt
    bytes[reset..reset + 4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
    std::fs::write(to, bytes).map_err(path("cannot write", to))
}

/// Whether the file system takes writes past the page cache.
pub fn takes_direct_writes(image: &Path) -> bool {
    use std::os::unix::fs::OpenOptionsExt;
    File::options().read(true).custom_flags(libc::O_DIRECT).open(image).is_ok()
}
