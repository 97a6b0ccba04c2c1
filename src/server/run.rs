//! Running a QEMU of our own: the easiest way to tracking without a gap.
//!
//! ```text
//!  start it stopped (-S), with a monitor of ours ─► attach ─► carry epochs over, or begin them ─► hold its end ─► cont
//!     │                                                                                            │ clients at our socket
//!     │ it does not start                                                                          ▼
//!     └────────────────► its own words and exit code ◄─── last bitmaps, quit, stamp ◄─── power-off, or a signal to us
//! ```
//!
//! * **QEMU is the user's own**: its standard input and outputs are ours, we print nothing on standard output, and its exit
//!   code is ours (128 + N for signal N).
//! * **A signal** that would end QEMU (SIGTERM, SIGINT, SIGHUP, SIGQUIT) is sent to us: the guest is stopped, its last bitmaps
//!   are taken, QEMU quits. A second one goes straight to QEMU. On a terminal Ctrl-C reaches all its processes, so QEMU is
//!   started with those signals blocked that a terminal sends; SIGTERM it always takes.
//! * **If we are killed**, QEMU goes on: it is not bound to our life. The guardian lets it end by itself at the guest's
//!   power-off; its monitor stays where it is, and another livebackup may attach there.
//! * **Before the guest has run** everything that fails ends QEMU again, and is said: an operator who asked for tracking is not
//!   left without.

use std::ffi::{OsStr, OsString};
use std::io::IsTerminal;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, pthread_sigmask};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};

use super::door::Door;
use super::listen::Listener;
use super::service::{Service, State};
use super::{Outgoing, answer_clients, bad};
use crate::durable;
use crate::monitor::{Address, Monitor, Process};
use crate::vm::{AttachError, Parting, PowerOff, Vm, VmOptions, place};
use crate::wire::Address as WireAddress;
use crate::wire::message::{Failure, FailureCode};
use crate::wire::resume::DEFAULT_GRACE;

/// How often a monitor that does not answer yet is tried. QEMU may take minutes to start: it fills its memory first.
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(20);
/// How long clients are told that QEMU has ended, and why, where they take it slowly.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Signals that end a QEMU, and so a virtual machine under our care.
const ENDING: [Signal; 4] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];

/// What the arguments of QEMU say that matters here.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    /// The guest is not to be let go (`-S`).
    stopped: bool,
    /// It waits for a migration (`-incoming`): its guest has run elsewhere.
    incoming: bool,
}

impl Asked {
    /// # Errors
    /// Of usage: with these QEMU cannot be run as a child of ours.
    fn of(arguments: &[OsString]) -> Result<Self, Failure> {
        let mut asked = Self { stopped: false, incoming: false };
        for argument in arguments {
            let text = argument.to_string_lossy();
            match text.strip_prefix('-').map(|o| o.strip_prefix('-').unwrap_or(o)) {
                Some("S") => asked.stopped = true,
                Some("incoming") => asked.incoming = true,
                Some("daemonize") => {
                    return Err(bad(
                        "QEMU cannot be run with -daemonize: livebackup run stays as its parent; put that into the \
                                    background instead",
                    ));
                }
                Some("preconfig") => {
                    return Err(bad("QEMU cannot be run with -preconfig: its disks are not there yet then"));
                }
                _ => {}
            }
        }
        Ok(asked)
    }
}

/// Our directory for one QEMU: its monitor, and the socket for clients. It goes with this value.
struct Room {
    dir: PathBuf,
    keep: bool,
}

impl Room {
    fn make() -> Result<Self, Failure> {
        let run = place::run_dir()?;
        for old in std::fs::read_dir(&run).into_iter().flatten().flatten() {
            let name = old.file_name();
            let owner = name.to_str().and_then(|name| name.strip_prefix("run-")?.parse().ok());
            // Its owner is gone, and nobody answers at its monitor: QEMU is gone too.
            let is_left = owner.is_some_and(|pid| Process::of_pid(pid).is_none());
            if is_left && std::os::unix::net::UnixStream::connect(old.path().join("qmp")).is_err() {
                let _ = std::fs::remove_dir_all(old.path());
            }
        }
        let dir = run.join(format!("run-{}", std::process::id()));
        durable::create_dir(&dir).map_err(|e| bad(format!("cannot make a directory for QEMU's monitor: {e}")))?;
        Ok(Self { dir, keep: false })
    }

    fn monitor(&self) -> PathBuf {
        self.dir.join("qmp")
    }

    fn clients(&self) -> PathBuf {
        self.dir.join("clients")
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// A path as the value of a QEMU option: a comma is doubled.
fn option_value(path: &Path) -> OsString {
    let doubled = path.as_os_str().as_bytes().iter().flat_map(|b| if *b == b',' { vec![b',', b','] } else { vec![*b] });
    OsString::from_vec(doubled.collect())
}

/// Runs QEMU and keeps its virtual machine until it has ended. `name` in `base` names the VM. Gives QEMU's exit status.
///
/// # Errors
/// When the virtual machine cannot be tracked; QEMU is gone then.
pub async fn run(program: &OsStr, arguments: &[OsString], base: VmOptions) -> Result<ExitStatus, Failure> {
    let asked = Asked::of(arguments)?;
    let mut signals = Signals::watch()?;
    let mut room = Room::make()?;
    let mut qemu = start(program, arguments, &asked, &room)?;
    match attached(&mut qemu, &mut signals, &asked, base, &room).await {
        Ok(Some((vm, listener))) => {
            let ended = tend(&mut qemu, &mut signals, vm, listener, &asked).await;
            // Somebody may need the monitor of a QEMU that lives.
            room.keep = qemu.id().is_some();
            ended
        }
        Ok(None) => wait(&mut qemu, &mut signals).await,
        Err(failure) => {
            let _ = qemu.start_kill();
            let _ = qemu.wait().await;
            Err(failure)
        }
    }
}

fn start(program: &OsStr, arguments: &[OsString], asked: &Asked, room: &Room) -> Result<Child, Failure> {
    let mut command = Command::new(program);
    command.args(arguments);
    if !asked.stopped && !asked.incoming {
        command.arg("-S");
    }
    let mut chardev = OsString::from("socket,id=livebackup-run,server=on,wait=off,path=");
    chardev.push(option_value(&room.monitor()));
    command.arg("-chardev").arg(chardev).args(["-mon", "chardev=livebackup-run,mode=control"]);
    command.env_remove("LIVEBACKUP_KILL_AT");
    if std::io::stdin().is_terminal() {
        let block = || {
            let terminal = SigSet::from_iter([Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT]);
            pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&terminal), None).map_err(Into::into)
        };
        // SAFETY: setting the signal mask is async-signal-safe and touches nothing of this process.
        unsafe { command.pre_exec(block) };
    }
    command.spawn().map_err(|e| bad(format!("cannot start {}: {e}", program.display())))
}

/// Attaches to the QEMU that is starting, and lets its guest go. Nothing when it ended before that.
async fn attached(
    qemu: &mut Child,
    signals: &mut Signals,
    asked: &Asked,
    base: VmOptions,
    room: &Room,
) -> Result<Option<(Vm, Listener)>, Failure> {
    let address = Address::Unix(room.monitor());
    let answers = async {
        loop {
            match Monitor::connect(&address).await {
                Ok(monitor) => return monitor.greeting_version(),
                Err(_) => tokio::time::sleep(TRY_AGAIN_AFTER).await,
            }
        }
    };
    tokio::select! {
        version = answers => tracing::debug!("QEMU {version} answers"),
        _ = qemu.wait() => return Ok(None),
        signal = signals.next() => {
            forward(qemu.id(), signal);
            return Ok(None);
        }
    }
    let clients = WireAddress::Unix(room.clients());
    let listener = Listener::bind(&clients, None).await?;
    let options = VmOptions { served_at: Some(clients), power_off: PowerOff::Harvest, ..base };
    let vm = match Vm::attach(&address, options).await {
        Ok(vm) => vm,
        Err(AttachError::Failure(failure)) => return Err(failure),
        Err(served) => return Err(Failure::new(FailureCode::Busy, served.to_string())),
    };
    if !asked.incoming {
        track(&vm, asked).await?;
    }
    Ok(Some((vm, listener)))
}

/// Tracks all disks from here on. Once more if that fails: somebody may have changed one at the same time.
async fn track(vm: &Vm, asked: &Asked) -> Result<(), Failure> {
    let Err(first) = vm.track_all().await else { return Ok(()) };
    tracing::warn!("trying again: {first}");
    match vm.track_all().await {
        // The guest was let go by its owner: it is not ended for this. The next backup begins to track.
        Err(failure) if asked.stopped && !vm.is_before_start().await => {
            tracing::error!("the disks are not tracked until the next backup: {failure}");
            Ok(())
        }
        done => done,
    }
}

/// Serves the VM and keeps it until QEMU has ended.
async fn tend(
    qemu: &mut Child,
    signals: &mut Signals,
    vm: Vm,
    listener: Listener,
    asked: &Asked,
) -> Result<ExitStatus, Failure> {
    let held = async {
        let hold = vm.hold().await?;
        if !asked.stopped && !asked.incoming {
            vm.let_run().await?;
        }
        Ok::<_, Failure>(hold)
    };
    let hold = match held.await {
        Ok(hold) => hold,
        Err(failure) => {
            let _ = qemu.start_kill();
            let _ = qemu.wait().await;
            return Err(failure);
        }
    };
    let (close, mut closed) = watch::channel(false);
    let service = Service::new(1, DEFAULT_GRACE);
    service.set(vm.name(), State::Attached(vm.clone()));
    let clients = tokio::spawn(async move {
        let (door, line) = (Arc::new(Door::private()), Outgoing::unlimited());
        answer_clients(door, service, &[listener], line, &mut closed, LAST_WORDS).await;
    });
    let (end, ended) = oneshot::channel::<()>();
    let parting = async {
        let _ = ended.await;
        Parting::End
    };
    let tending = vm.tend(hold, parting);
    tokio::pin!(tending);
    let mut end = Some(end);
    loop {
        tokio::select! {
            _ = &mut tending => break,
            signal = signals.next() => match end.take() {
                Some(end) => drop(end.send(())),
                // Somebody is out of patience.
                None => forward(qemu.id(), signal),
            },
        }
    }
    close.send_replace(true);
    let abort = clients.abort_handle();
    tokio::select! {
        _ = clients => {}
        signal = signals.next() => {
            forward(qemu.id(), signal);
            abort.abort();
        }
    }
    wait(qemu, signals).await
}

/// Waits for QEMU's end; signals go straight to it.
async fn wait(qemu: &mut Child, signals: &mut Signals) -> Result<ExitStatus, Failure> {
    loop {
        let pid = qemu.id();
        tokio::select! {
            status = qemu.wait() => return status.map_err(|e| bad(format!("QEMU's end cannot be seen: {e}"))),
            signal = signals.next() => forward(pid, signal),
        }
    }
}

/// Sends QEMU a signal, if it has not been waited for.
fn forward(pid: Option<u32>, signal: Signal) {
    if let Some(pid) = pid.and_then(|pid| i32::try_from(pid).ok()) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// The signals that would end a QEMU, as they come.
struct Signals(mpsc::UnboundedReceiver<Signal>);

impl Signals {
    fn watch() -> Result<Self, Failure> {
        let (sender, receiver) = mpsc::unbounded_channel();
        for which in ENDING {
            let mut source = signal(SignalKind::from_raw(which as i32)).map_err(|e| bad(format!("no signals: {e}")))?;
            let sender = sender.clone();
            tokio::spawn(async move { while source.recv().await.is_some() && sender.send(which).is_ok() {} });
        }
        Ok(Self(receiver))
    }

    async fn next(&mut self) -> Signal {
        match self.0.recv().await {
            Some(signal) => signal,
            None => std::future::pending().await,
        }
    }
}

/// The exit code of a process as a shell gives it: 128 + N for signal N.
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code & 0xff).ok()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_that_matter() {
        let of = |line: &str| Asked::of(&line.split(' ').map(OsString::from).collect::<Vec<_>>());
        assert_eq!(of("-m 64").unwrap(), Asked { stopped: false, incoming: false });
        assert_eq!(of("-m 64 --S").unwrap(), Asked { stopped: true, incoming: false });
        assert_eq!(of("-incoming tcp:0:1").unwrap(), Asked { stopped: false, incoming: true });
        assert!(of("-m 64 -daemonize").unwrap_err().message.contains("-daemonize"));
        assert!(of("-preconfig").unwrap_err().message.contains("-preconfig"));
        assert_eq!(option_value(Path::new("/a,b")), "/a,,b");
    }

    #[test]
    fn exit_codes_as_a_shell_gives_them() {
        for (raw, code) in [(0, 0), (3 << 8, 3), (9, 137), (15, 143)] {
            assert_eq!(exit_code(ExitStatus::from_raw(raw)), code);
        }
    }
}
