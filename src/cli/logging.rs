//! Logging: to standard error, as much as was asked for; with `--json` an object a line. `LIVEBACKUP_LOG` takes a filter of `tracing`.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use super::args::Global;
use super::progress;

/// Starts it. A server says more by itself: its log is all that it says.
pub fn start(global: &Global, server: bool) {
    let level = match (global.quiet, global.verbose, server) {
        (true, ..) => "error",
        (_, 0, false) => "warn",
        (_, 0, true) | (_, 1, false) => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("LIVEBACKUP_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(progress::above_the_bar)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    // A second start in one process is nobody's error.
    let _ = match global.json {
        true => log.json().flatten_event(true).with_ansi(false).try_init(),
        false => log.try_init(),
    };
}
