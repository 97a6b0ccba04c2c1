//! Where a sidecar keeps things, and the locks that keep it alone.
//!
//! ```text
//! STATE/owner                  our owner id: part of every name that we use inside QEMU
//!       scratch/               where copy-before-write puts old data (unlinked files)
//!       vms/VM/lock            flock: one sidecar at a time
//!              qemu.json       what its QEMU process can do, and its devices (`known`)
//!              disks/DISK/     the sealed checkpoint log of a disk
//! RUN/qemu-PID-START.lock      flock: one sidecar per QEMU process, with who holds it
//!     OWNER8-PID-START/        sockets for this QEMU, and `owed-*` files: debts that carry no name inside QEMU
//!                     session  how far a session is, where its sidecar serves nobody whom one could ask
//! ```
//!
//! RUN is `/run/livebackup` for root, else `livebackup` in `$XDG_RUNTIME_DIR`, or in `/run/user/UID` where that is not said: it
//! goes with the host's start, as QEMU does. Sidecars of two users have two of them; what keeps these apart is a lock on the QEMU
//! process itself, an flock of `/proc/PID/cmdline`. That does not say who holds it.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::undo::Debts;
use crate::durable::{self, Replace};
use crate::monitor::Process;
use crate::repo::layout::directory_of_vm;
use crate::units::OwnerId;
use crate::wire::Address as WireAddress;
use crate::wire::message::{Failure, FailureCode, SessionStatus};

/// Longest holder description that is read back.
const MAX_HOLDER_BYTES: u64 = 4096;
/// The same of a session.
const MAX_TOLD_BYTES: u64 = 256 << 10;
const TOLD: &str = "session";

fn failed(what: &str, path: &Path, error: impl Into<Box<dyn std::error::Error>>) -> Failure {
    let error = error.into();
    let words = format!("cannot {what} {}: {error}", path.display());
    match durable::is_full(&*error) {
        true => Failure::new(FailureCode::NoSpace, format!("{words}; make room in the file system of that directory")),
        false => Failure::new(FailureCode::Internal, words),
    }
}

/// A failure of what is kept in the state directory.
pub fn not_kept(error: impl std::error::Error + 'static) -> Failure {
    match durable::is_full(&error) {
        true => Failure::new(
            FailureCode::NoSpace,
            format!(
                "{error}; the state directory is full: make room in its file system, or name another one with --state"
            ),
        ),
        false => super::internal(error),
    }
}

/// Reads or makes the owner id of a state directory.
pub fn owner(state: &Path) -> Result<OwnerId, Failure> {
    let path = state.join("owner");
    durable::create_dir(state).map_err(|e| match e.is_no_space() {
        true => not_kept(e),
        false => failed("use the state directory", state, format!("{e}; see --state")),
    })?;
    for _ in 0..2 {
        match fs::read_to_string(&path) {
            Ok(text) => return text.trim().parse().map_err(|_| not_an_owner(&path)),
            Err(e) if e.kind() == ErrorKind::InvalidData => return Err(not_an_owner(&path)),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                match durable::write_file(&path, format!("{}\n", OwnerId::random()).as_bytes(), Replace::No) {
                    Err(e) if e.source.kind() != ErrorKind::AlreadyExists => return Err(not_kept(e)),
                    // Whoever comes second reads what the first wrote.
                    _ => {}
                }
            }
            Err(e) => return Err(failed("read", &path, e)),
        }
    }
    Err(failed("make", &path, "it comes and goes; is another program at work there?"))
}

fn not_an_owner(path: &Path) -> Failure {
    Failure::new(
        FailureCode::Internal,
        format!(
            "{} is damaged: it should hold the id of this state directory. Remove it, and a new one is made; what the old one \
             left in a running QEMU is removed by `livebackup detach --all SOURCE`, and the next backup of each VM scans its disks",
            path.display()
        ),
    )
}

/// The directory for locks and sockets.
pub fn run_dir() -> Result<PathBuf, Failure> {
    let dir = if nix::unistd::geteuid().is_root() {
        PathBuf::from("/run/livebackup")
    } else if let Some(dir) = std::env::var_os("XDG_RUNTIME_DIR") {
        PathBuf::from(dir).join("livebackup")
    } else {
        let user = nix::unistd::geteuid();
        match PathBuf::from(format!("/run/user/{user}")) {
            dir if dir.is_dir() => dir.join("livebackup"),
            _ => std::env::temp_dir().join(format!("livebackup-{user}")),
        }
    };
    durable::create_dir(&dir).map_err(|e| failed("use the directory", &dir, e))?;
    Ok(dir)
}

/// Who holds a QEMU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its process.
    pub pid: i32,
    /// The monitor that it uses, as its address prints, paths made absolute.
    pub monitor: String,
    /// The VM's name there.
    pub vm: String,
    /// `HOST:PORT` where it serves clients, if it does.
    pub served_at: Option<String>,
}

impl Holder {
    /// Where it can be talked to.
    pub fn address(&self) -> Option<WireAddress> {
        self.served_at.clone().map(|text| match text.strip_prefix("unix:") {
            Some(path) => WireAddress::Unix(path.into()),
            None => WireAddress::Tcp(text),
        })
    }
}

/// How a served address is written in a [`Holder`].
pub fn served_text(address: &WireAddress) -> String {
    match address {
        WireAddress::Tcp(text) => text.clone(),
        WireAddress::Unix(path) => format!("unix:{}", path.display()),
    }
}

/// A lock file that is held.
#[derive(Debug)]
pub struct Held {
    file: Flock<File>,
    path: PathBuf,
}

/// Takes the lock, or says who has it.
fn lock(path: &Path) -> Result<Result<Held, Option<Holder>>, Failure> {
    let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    loop {
        let file = open().map_err(|e| failed("open the lock", path, e))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => {
                // The holder before us may have removed the file while we waited for nothing: look again.
                let same = fs::metadata(path).ok().zip(file.metadata().ok()).is_some_and(|(a, b)| {
                    use std::os::unix::fs::MetadataExt;
                    a.ino() == b.ino()
                });
                if same {
                    return Ok(Ok(Held { file, path: path.to_owned() }));
                }
            }
            Err((file, nix::errno::Errno::EWOULDBLOCK)) => return Ok(Err(read_holder(file))),
            Err((_, e)) => return Err(failed("take the lock", path, e)),
        }
    }
}

fn read_holder(file: File) -> Option<Holder> {
    let mut text = String::new();
    file.take(MAX_HOLDER_BYTES).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

impl Held {
    fn describe(&mut self, holder: &Holder) -> Result<(), Failure> {
        let text = serde_json::to_vec(holder).map_err(|e| failed("write", &self.path, e))?;
        let write = |file: &mut File| file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(&text));
        write(&mut self.file).map_err(|e| failed("write", &self.path, e))
    }
}

/// What is kept for one VM. Both locks go when it is dropped.
#[derive(Debug)]
pub struct Place {
    /// Logs of the disks.
    pub disks: PathBuf,
    /// What is known of its QEMU.
    pub known: PathBuf,
    /// Sockets and debts for this QEMU.
    pub sockets: PathBuf,
    _vm: Held,
    qemu: Held,
    _process: Option<Flock<File>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        // Only when empty: a debt or a socket that is still there is the next start's to settle.
        let _ = fs::remove_dir(&self.sockets);
        let _ = fs::remove_file(&self.qemu.path);
    }
}

/// Why there is no place.
#[derive(Debug)]
pub enum Taken {
    /// By this holder (if it could be read).
    By(Option<Holder>),
    /// Something else.
    Failure(Failure),
}

impl From<Failure> for Taken {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

/// A session of a sidecar that serves nobody, as it is told to who asks.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    /// Whose: one that was killed leaves it.
    pid: u32,
    session: SessionStatus,
}

impl Place {
    /// Tells how far the session is, or that there is none. Nothing depends on it.
    pub fn tell(&self, session: Option<SessionStatus>) {
        let path = self.sockets.join(TOLD);
        let Some(session) = session else {
            let _ = fs::remove_file(path);
            return;
        };
        let Ok(text) = serde_json::to_vec(&Told { pid: std::process::id(), session }) else { return };
        let new = self.sockets.join(format!("{TOLD}.{}", durable::TEMPORARY_ENDING));
        let told = fs::write(&new, text).and_then(|()| fs::rename(&new, path));
        if let Err(error) = told {
            tracing::debug!("how far the session is cannot be told: {error}");
        }
    }
}

/// How far the session of a sidecar of this host is, if it has one and tells: of who holds this QEMU process.
pub fn told(qemu_pid: i32, holder: &Holder) -> Option<SessionStatus> {
    let found = fs::read_dir(run_dir().ok()?).ok()?.flatten().filter_map(|entry| {
        let name = entry.file_name();
        let (owner, key) = name.to_str()?.split_once('-')?;
        let is_its = is_short_id(owner) && key.split_once('-')?.0.parse() == Ok(qemu_pid);
        let file = is_its.then(|| File::open(entry.path().join(TOLD)).ok())??;
        let told: Told = serde_json::from_reader(file.take(MAX_TOLD_BYTES)).ok()?;
        (i64::from(told.pid) == i64::from(holder.pid)).then_some(told.session)
    });
    let running_ms =
        |session: &SessionStatus| Timestamp::now().duration_since(session.instant).as_millis().max(0) as u64;
    found.map(|session| SessionStatus { running_ms: running_ms(&session), ..session }).next()
}

/// Makes the place of a VM and takes its locks.
pub fn take(state: &Path, owner: OwnerId, qemu: &Process, holder: &Holder) -> Result<Place, Taken> {
    let run = run_dir()?;
    let key = format!("{}-{}", qemu.pid, qemu.start_time);
    let mut qemu_lock = lock(&run.join(format!("qemu-{key}.lock")))?.map_err(Taken::By)?;
    qemu_lock.describe(holder)?;
    let process = lock_process(qemu).map_err(|()| Taken::By(None))?;
    let name = directory_of_vm(&holder.vm).map_err(|e| Failure::new(FailureCode::UnknownVm, e.to_string()))?;
    let dir = state.join("vms").join(name);
    let disks = dir.join("disks");
    durable::create_dir(&disks).map_err(not_kept)?;
    let mut vm_lock = lock(&dir.join("lock"))?.map_err(|other| {
        Taken::Failure(Failure::new(
            FailureCode::Busy,
            match other {
                Some(h) => format!(
                    "the state of VM {:?} is in use by process {} for another QEMU of the same name ({}); \
                     give this one a name of its own with --vm",
                    h.vm, h.pid, h.monitor
                ),
                None => format!("the state in {} is in use by another livebackup", dir.display()),
            },
        ))
    })?;
    vm_lock.describe(holder)?;
    sweep(&run);
    let sockets = run.join(format!("{}-{key}", owner.short()));
    durable::create_dir(&sockets).map_err(|e| failed("make", &sockets, e))?;
    Ok(Place { disks, known: dir.join("qemu.json"), sockets, _vm: vm_lock, qemu: qemu_lock, _process: process })
}

/// Locks a process for who looks after it, of all users of the host. Nothing where that cannot be done.
///
/// # Errors
/// Another has it.
fn lock_process(process: &Process) -> Result<Option<Flock<File>>, ()> {
    let Ok(file) = File::open(format!("/proc/{}/cmdline", process.pid)) else { return Ok(None) };
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(()),
        Err((_, error)) => {
            tracing::debug!(process.pid, "the process cannot be locked: {error}");
            Ok(None)
        }
    }
}

/// The holder of the QEMU behind this monitor, found without connecting: its monitor may have one place only.
pub fn holder_of(monitor: &str) -> Option<Holder> {
    holders().find(|(_, holder)| holder.monitor == monitor).map(|(_, holder)| holder)
}

/// The QEMU processes of this host that a sidecar holds now, by their ids, and who that is.
pub fn holders() -> impl Iterator<Item = (i32, Holder)> {
    let entries = run_dir().ok().and_then(|dir| fs::read_dir(dir).ok());
    entries.into_iter().flatten().flatten().filter_map(|entry| {
        let path = entry.path();
        let key = path.file_name()?.to_str()?.strip_prefix("qemu-")?.strip_suffix(".lock")?;
        let (qemu, start_time) = key.split_once('-')?;
        let (qemu, start_time): (i32, u64) = (qemu.parse().ok()?, start_time.parse().ok()?);
        let open = || OpenOptions::new().read(true).write(true).open(&path).ok();
        if !runs(qemu, start_time) {
            // Nobody will ever want it again.
            if let Ok(_held) = Flock::lock(open()?, FlockArg::LockExclusiveNonblock) {
                let _ = fs::remove_file(&path);
            }
            return None;
        }
        let holder = read_holder(open()?)?;
        // A dead holder's lock can be taken.
        match Flock::lock(open()?, FlockArg::LockExclusiveNonblock) {
            Ok(_) => None,
            Err(_) => Some((qemu, holder)),
        }
    })
}

/// Whether this process runs, by its id and start time.
fn runs(pid: i32, start_time: u64) -> bool {
    Process::of_pid(pid).is_some_and(|process| process.start_time == start_time)
}

/// Removes what sidecars left for QEMUs that have ended since: sockets, debts, named scratch files. Of whatever owner: a state
/// directory may be gone for good.
fn sweep(run: &Path) {
    for entry in fs::read_dir(run).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let key = name.to_str().and_then(|name| name.split_once('-')).filter(|(owner, _)| is_short_id(owner));
        let Some((pid, start_time)) = key.and_then(|(_, key)| key.split_once('-')) else { continue };
        let (Ok(pid), Ok(start_time)) = (pid.parse(), start_time.parse()) else { continue };
        // Who still holds it has the end of its QEMU to see to.
        let is_held = || matches!(lock(&run.join(format!("qemu-{pid}-{start_time}.lock"))), Ok(Err(_)));
        if !runs(pid, start_time) && !is_held() {
            Debts::new(&entry.path()).pay_files();
            let _ = fs::remove_dir_all(entry.path());
            let _ = fs::remove_file(run.join(format!("qemu-{pid}-{start_time}.lock")));
        }
    }
}

/// Whether this is what [`OwnerId::short`] gives.
fn is_short_id(text: &str) -> bool {
    text.len() == 8 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_state_directory_is_told_as_one() {
        let full = || std::io::Error::from(ErrorKind::StorageFull);
        let path = Path::new("/state/vms/a/disks/vd0/epoch");
        let failures = [
            not_kept(crate::checkpoint::LogError::from(durable::DurableError::at("write", path)(full()))),
            not_kept(durable::DurableError::at("create", path)(full())),
            failed("write", path, full()),
        ];
        for failure in failures {
            assert_eq!(failure.code, FailureCode::NoSpace, "{failure}");
            assert!(failure.message.contains("/state/vms/a") && failure.message.contains("make room"), "{failure}");
        }
        let denied = durable::DurableError::at("write", path)(ErrorKind::PermissionDenied.into());
        assert_eq!(not_kept(denied).code, FailureCode::Internal);
    }

    #[test]
    fn an_owner_stays_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("a/b");
        let first = owner(&state).unwrap();
        assert_eq!(owner(&state).unwrap(), first);
        fs::write(state.join("owner"), "rubbish").unwrap();
        for rubbish in [&b"rubbish"[..], b"", b"\xff\xfe"] {
            fs::write(state.join("owner"), rubbish).unwrap();
            let error = owner(&state).unwrap_err().message;
            assert!(error.contains("owner") && error.contains("Remove it"), "{error}");
        }
    }

    #[test]
    fn a_place_is_taken_once_and_says_by_whom() {
        let dir = tempfile::tempdir().unwrap();
        let id = owner(dir.path()).unwrap();
        let me = Process::of_pid(std::process::id() as i32).unwrap();
        let holder = Holder { pid: 7, monitor: format!("/tmp/{id}"), vm: "a/b".into(), served_at: Some("x:1".into()) };
        let place = take(dir.path(), id, &me, &holder).unwrap();
        assert!(matches!(take(dir.path(), id, &me, &holder), Err(Taken::By(Some(h))) if h == holder));
        assert_eq!(holder_of(&holder.monitor), Some(holder.clone()));
        drop(place);
        assert_eq!(holder_of(&holder.monitor), None);
        take(dir.path(), id, &me, &holder).unwrap();
    }

    #[test]
    fn locks_go_when_both_sides_are_dead() {
        let first = Process::of_pid(1).unwrap();
        let lock = |start_time| run_dir().unwrap().join(format!("qemu-1-{start_time}.lock"));
        let (dead, alive) = (lock(first.start_time + 1), lock(first.start_time));
        [&dead, &alive].into_iter().for_each(|path| fs::write(path, "{}").unwrap());
        // Another test's look may have it locked for a moment.
        for _ in 0..1000 {
            holders().for_each(drop);
            if !dead.exists() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(!dead.exists() && alive.exists());
        fs::remove_file(alive).unwrap();
    }

    #[test]
    fn what_is_left_for_ended_qemus_goes() {
        let (state, run) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let owner = owner(state.path()).unwrap();
        let now = Process::of_pid(1).unwrap().start_time;
        let dir = |time| run.path().join(format!("{}-1-{time}", owner.short()));
        let (dead, alive, held, strange) = (dir(now + 1), dir(now), dir(now + 2), run.path().join("run-1-2"));
        let scratch = state.path().join("named-scratch");
        fs::write(&scratch, "").unwrap();
        [&dead, &alive, &held, &strange].into_iter().for_each(|dir| fs::create_dir(dir).unwrap());
        Debts::new(&dead).owe_file(0, &scratch).unwrap();
        let lock_path = run.path().join(format!("qemu-1-{}.lock", now + 2));
        let lock = lock(&lock_path).unwrap().unwrap();
        sweep(run.path());
        assert!(!dead.exists() && !scratch.exists() && alive.exists() && held.exists() && strange.exists());
        drop(lock);
        sweep(run.path());
        assert!(!held.exists() && !lock_path.exists() && alive.exists());
    }

    #[test]
    fn a_process_is_locked_once_whoever_asks() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of_pid(child.id() as i32).unwrap();
        let lock = lock_process(&process).unwrap().expect("a process can be locked");
        assert!(lock_process(&process).is_err());
        drop(lock);
        assert!(lock_process(&process).is_ok());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
