//! Guardian: a tiny second process that owes the guest its `cont` if we die while we hold it stopped.
//!
//! ```text
//!   sidecar                      guardian (own session, deaf to terminal signals)
//!   spawn ─────────────────────► waits on its standard input
//!   "owe DEBT-FILE" ─► then `stop`
//!   `cont` ─► then "paid" ─────► forgets
//!   (closes its end) ──────────► ends; but if something is owed: connects to the monitor, `cont`, strikes the
//!                                debt out (else the next start might wake a guest that its owner has paused), ends
//! ```
//!
//! The sidecar's end of the pipe closes however it dies. Only then does the guardian touch the monitor, so that the two
//! never compete for it. If both die, the debt file in the run directory makes the next start pay.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::monitor::{Address, Monitor, MonitorError};

/// How long the guardian tries to reach the monitor.
const TRY_FOR: Duration = Duration::from_secs(60);

/// The sidecar's end.
#[derive(Debug)]
pub struct Guardian {
    child: Child,
    pipe: ChildStdin,
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
        Ok(Self { child, pipe })
    }

    /// From now on the guardian owes `cont`; the debt is written down in this file too. Call it before `stop`.
    pub fn owe(&mut self, debt: &Path) -> std::io::Result<()> {
        let line = [b"owe ", debt.as_os_str().as_encoded_bytes(), b"\n"].concat();
        self.pipe.write_all(&line)
    }

    /// The debt is paid. Call it after `cont`.
    pub fn paid(mut self) {
        let _ = self.pipe.write_all(b"paid\n");
        drop(self.pipe);
        let _ = self.child.wait();
    }
}

/// The guardian's own life: the hidden command `livebackup guardian ADDRESS`.
pub async fn run(address: &Address) {
    ignore_signals();
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut owed: Option<PathBuf> = None;
    while let Ok(Some(line)) = lines.next_line().await {
        owed = line.strip_prefix("owe ").map(PathBuf::from);
    }
    if let Some(debt) = owed
        && tokio::time::timeout(TRY_FOR, pay(address)).await.is_ok()
    {
        let _ = std::fs::remove_file(debt);
    }
}

async fn pay(address: &Address) {
    loop {
        match cont(address).await {
            Ok(()) => return,
            // QEMU itself is gone.
            Err(MonitorError::NoSocket { .. }) => return,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

async fn cont(address: &Address) -> Result<(), MonitorError> {
    let monitor = Monitor::connect(address).await?;
    let status = monitor.raw("query-status", json!({})).await?;
    if status["status"] == "paused" {
        monitor.raw("cont", json!({})).await?;
    }
    Ok(())
}

fn ignore_signals() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    for which in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: SIG_IGN is no handler: no code of ours runs in a signal's context.
        let _ = unsafe { signal(which, SigHandler::SigIgn) };
    }
}
