//! Named points at which a test kills the process, as `kill -9` would, or holds it up.
//!
//! `LIVEBACKUP_KILL_AT=name` or `name:N` kills at the first or N-th passing of the point.
//! `LIVEBACKUP_PAUSE_AT=name=MS,…` sleeps there at every passing; `name=/PATH` waits until that file is there, and makes
//! a file with the extension `here` beside it. Nothing is checked but a static when neither is set.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for a file: a test that died must not leave processes behind.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

struct Plan {
    name: String,
    left: AtomicU64,
}

fn plan() -> Option<&'static Plan> {
    static PLAN: OnceLock<Option<Plan>> = OnceLock::new();
    PLAN.get_or_init(|| {
        let text = std::env::var("LIVEBACKUP_KILL_AT").ok()?;
        let (name, count) = text.split_once(':').unwrap_or((&text, "1"));
        Some(Plan { name: name.to_owned(), left: AtomicU64::new(count.parse().unwrap_or(1)) })
    })
    .as_ref()
}

enum Pause {
    For(Duration),
    Until(PathBuf),
}

fn pauses() -> &'static [(String, Pause)] {
    static PAUSES: OnceLock<Vec<(String, Pause)>> = OnceLock::new();
    PAUSES.get_or_init(|| {
        let text = std::env::var("LIVEBACKUP_PAUSE_AT").unwrap_or_default();
        let pause = |item: &str| {
            let (name, how) = item.split_once('=')?;
            let how = match how.starts_with('/') {
                true => Pause::Until(how.into()),
                false => Pause::For(Duration::from_millis(how.parse().ok()?)),
            };
            Some((name.to_owned(), how))
        };
        text.split(',').filter_map(pause).collect()
    })
}

/// A place where the process may be made to die or to wait.
pub fn point(name: &str) {
    match pauses().iter().find(|(paused, _)| paused == name) {
        Some((_, Pause::For(time))) => std::thread::sleep(*time),
        Some((_, Pause::Until(path))) => {
            let start = Instant::now();
            let _ = std::fs::write(path.with_extension("here"), name);
            while !path.exists() && start.elapsed() < LONGEST_PAUSE {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        None => {}
    }
    let Some(plan) = plan() else { return };
    if plan.name == name && plan.left.fetch_sub(1, Ordering::SeqCst) == 1 {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
        // The signal may take a moment to arrive; nothing after the point may run.
        loop {
            std::thread::park();
        }
    }
}
