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
//!
//! The sidecar's end of the pipe closes however it dies. Only then does the guardian touch the monitor or the agent, so
//! that the two never compete. If both die, the debt file in the run directory makes the next start pay.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};

use super::quiet;
use super::undo::Debt;
use crate::fault;
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

    /// From now on the guardian owes this debt, which is written down in this file too. Call it before the step.
    pub fn owe(&mut self, debt: Debt, file: &Path) -> std::io::Result<()> {
        let line = [b"owe ", debt.name().as_bytes(), b" ", file.as_os_str().as_encoded_bytes(), b"\n"].concat();
        self.pipe.write_all(&line)
    }

    /// The debt is paid. Call it after the inverse.
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
    let mut owed: Option<(Debt, PathBuf)> = None;
    while let Ok(Some(line)) = lines.next_line().await {
        owed = line.strip_prefix("owe ").and_then(|rest| rest.split_once(' ')).and_then(|(debt, file)| {
            let debt = [Debt::Cont, Debt::Thaw].into_iter().find(|d| d.name() == debt)?;
            Some((debt, PathBuf::from(file)))
        });
    }
    match owed {
        Some((Debt::Cont, file)) => {
            let paid = tokio::time::timeout(TRY_FOR, pay(address)).await;
            let _ = paid.map(|()| std::fs::remove_file(file));
        }
        // As long as it takes: nobody else will.
        Some((Debt::Thaw, file)) => {
            fault::point("guardian.thaw");
            quiet::pay_thaw(&file).await;
        }
        _ => {}
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
