//! Signals: the first one asks for a clean end, the second one ends at once.

use std::future::pending;
use std::io::Write;

use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::exit::Code;

/// Whether SIGHUP was ignored when the program was started; proc(5).
fn is_hangup_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & (1 << (SignalKind::hangup().as_raw_value() - 1)) != 0)
}

/// Becomes true at the first Ctrl-C, SIGTERM or SIGHUP.
/// Says so on standard error, as JSON if that is wanted.
pub fn watch(json: bool) -> std::io::Result<watch::Receiver<bool>> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    // A terminal that is closed ends a backup as cleanly; not one that was started to outlive it, as by nohup.
    let mut hangup = if is_hangup_ignored() { None } else { Some(signal(SignalKind::hangup())?) };
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        for second in [false, true] {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                () = async { if let Some(hangup) = &mut hangup { hangup.recv().await; } else { pending().await } } => {}
            }
            if second {
                // What is left in a VM is undone by the guardian, or by the next run.
                std::process::exit(Code::Interrupted.number().into());
            }
            let words = "ending cleanly; press Ctrl-C again to end at once";
            let line = if json { json!({"message": words}).to_string() } else { format!("livebackup: {words}") };
            let _ = writeln!(std::io::stderr(), "{line}");
            sender.send_replace(true);
        }
    });
    Ok(receiver)
}
