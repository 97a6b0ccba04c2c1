//! Guardian: a tiny second process that pays what we owe the guest if we die: one for each debt.
//!
//! ```text
//!   sidecar                      guardian (own session, deaf to terminal signals)
//!   spawn ─────────────────────► waits on its standard input
//!   "owe DEBT FILE" ─► then the step
//!   the inverse ─► then "paid" ► forgets
//!   (closes its end) ──────────► ends; but if something is owed: connects, pays, strikes the debt out (else the
//!                                next start might wake a guest that its owner has paused), ends
//! ```
//!
//! | debt | the step | how it is paid |
//! |---|---|---|
//! | [`Debt::Cont`] | `stop` for an instant | `cont` at the monitor, if the guest is paused still |
//! | [`Debt::Thaw`] | file systems frozen | a thaw at the agent, see [`quiet`](super::quiet) |
//! | [`Debt::Quit`] | QEMU was told to stay when the guest powers off, for our harvest | QEMU is told to end by itself again; if the guest has powered off already, or was stopped to be ended, `quit` |
//!
//! The last debt lives as long as the sidecar. QEMU is told to end by itself first and looked at afterwards: a guest
//! that powers off in between takes QEMU with it, and one that was reset meanwhile runs on.
//!
//! The sidecar's end of the pipe closes however it dies. Only then does the guardian touch the monitor or the agent, so
//! that the two never compete. If both die, the debt file in the run directory makes the next start pay. That start may come
//! while the guardian still waits for the monitor: the file of a `quit` holds its guardian's process id, and a guardian
//! whose file is gone or another's owes nothing.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};

use super::quiet;
use super::undo::{self, Debt};
use crate::fault;
use crate::monitor::{Address, Monitor, MonitorError};

/// How long the guardian tries to reach the monitor for `cont`. For `quit` it tries as long as QEMU lives.
const TRY_FOR: Duration = Duration::from_secs(60);
/// Longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The sidecar's end.
#[derive(Debug)]
pub struct Guardian {
    /// Both are there until it is dropped.
    child: Option<Child>,
    pipe: Option<ChildStdin>,
    pid: u32,
}

/// Its pipe closes, and it pays what it owes. Nobody waits for its end: a database may be held still.
impl Drop for Guardian {
    fn drop(&mut self) {
        drop(self.pipe.take());
        if let Some(mut child) = self.child.take() {
            std::thread::spawn(move || child.wait());
        }
    }
}

impl Guardian {
    /// Starts the guardian of the VM behind this monitor.
    pub fn spawn(address: &Address) -> std::io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("guardian").arg(address.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).env_remove("LIVEBACKUP_KILL_AT");
        // SAFETY: setsid is async-signal-safe and touches nothing of this process.
        unsafe {
            command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(Into::into));
        }
        let mut child = command.spawn()?;
        let pipe = child.stdin.take().ok_or_else(|| std::io::Error::other("no pipe to the guardian"))?;
        Ok(Self { pid: child.id(), child: Some(child), pipe: Some(pipe) })
    }

    /// From now on the guardian owes this debt, which is written down in this file too. Call it before the step.
    pub fn owe(&mut self, debt: Debt, file: &Path) -> std::io::Result<()> {
        let line = [b"owe ", debt.name().as_bytes(), b" ", file.as_os_str().as_encoded_bytes(), b"\n"].concat();
        self.tell(&line)
    }

    /// What the file of [`Debt::Quit`] holds.
    pub fn token(&self) -> String {
        self.pid.to_string()
    }

    /// The debt is paid. Call it after the inverse.
    pub fn paid(mut self) {
        let _ = self.tell(b"paid\n");
    }

    fn tell(&mut self, line: &[u8]) -> std::io::Result<()> {
        self.pipe.as_mut().map_or(Ok(()), |pipe| pipe.write_all(line))
    }
}

/// The guardian's own life: the hidden command `livebackup guardian ADDRESS`.
pub async fn run(address: &Address) {
    ignore_signals();
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut owed: Option<(Debt, PathBuf)> = None;
    while let Ok(Some(line)) = lines.next_line().await {
        owed = line.strip_prefix("owe ").and_then(|rest| rest.split_once(' ')).and_then(|(debt, file)| {
            let debt = [Debt::Cont, Debt::Thaw, Debt::Quit].into_iter().find(|d| d.name() == debt)?;
            Some((debt, PathBuf::from(file)))
        });
    }
    match owed {
        Some((Debt::Cont, file)) => {
            let paid = tokio::time::timeout(TRY_FOR, until_paid(address, || true, cont)).await;
            let _ = paid.map(|()| std::fs::remove_file(file));
        }
        // As long as it takes: nobody else will.
        Some((Debt::Thaw, file)) => {
            fault::point("guardian.thaw");
            quiet::pay_thaw(&file).await;
        }
        Some((Debt::Quit, file)) => {
            let token = std::process::id().to_string();
            let still = || std::fs::read_to_string(&file).is_ok_and(|content| content == token);
            let ending = file.with_file_name(Debt::End.file_name());
            until_paid(address, still, async |monitor| undo::let_power_off(&monitor, ending.exists()).await.map(drop))
                .await;
            if still() {
                let _ = std::fs::remove_file(&file);
                let _ = std::fs::remove_file(ending);
                // Empty unless a session left something: then it is the next start's.
                let _ = file.parent().map(std::fs::remove_dir);
            }
        }
        _ => {}
    }
}

/// Tries until it is paid, QEMU is gone, or nothing is owed any more.
async fn until_paid(
    address: &Address,
    still: impl Fn() -> bool,
    pay: impl AsyncFn(Monitor) -> Result<(), MonitorError>,
) {
    let mut pause = Duration::from_millis(20);
    while still() {
        let paid = match Monitor::connect(address).await {
            Ok(monitor) => pay(monitor).await,
            Err(error) => Err(error),
        };
        match paid {
            Ok(()) => return,
            // QEMU itself is gone.
            Err(MonitorError::NoSocket { .. }) => return,
            Err(_) => tokio::time::sleep(pause).await,
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn cont(monitor: Monitor) -> Result<(), MonitorError> {
    let status = monitor.raw("query-status", json!({})).await?;
    if status["status"] == "paused" {
        monitor.raw("cont", json!({})).await?;
    }
    Ok(())
}

fn ignore_signals() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    for which in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        // SAFETY: SIG_IGN is no handler: no code of ours runs in a signal's context.
        let _ = unsafe { signal(which, SigHandler::SigIgn) };
    }
}
