//! Signals: the first one asks for a clean end, the second one ends at once.

use std::io::Write;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::exit::Code;

/// Becomes true at the first Ctrl-C or SIGTERM.
pub fn watch() -> std::io::Result<watch::Receiver<bool>> {
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
            let _ = writeln!(std::io::stderr(), "livebackup: ending cleanly; press Ctrl-C again to end at once");
            sender.send_replace(true);
        }
    });
    Ok(receiver)
}
