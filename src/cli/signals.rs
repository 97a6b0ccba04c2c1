//! Signals: the first one asks for a clean end, the second one ends at once.

use std::io::Write;

use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::exit::Code;

/// Becomes true at the first Ctrl-C or SIGTERM.
/// Says so on standard error, as JSON if that is wanted.
pub fn watch(json: bool) -> std::io::Result<watch::Receiver<bool>> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        for second in [false, true] {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
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
