//! Named points at which a test kills the process, as `kill -9` would, or holds it up.
//!
//! `LIVEBACKUP_KILL_AT=name` or `name:N` kills at the first or N-th passing of the point.
//! `LIVEBACKUP_PAUSE_AT=name=MS,…` sleeps there at every passing. Nothing is checked but a static when neither is set.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

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

fn pauses() -> &'static [(String, u64)] {
    static PAUSES: OnceLock<Vec<(String, u64)>> = OnceLock::new();
    PAUSES.get_or_init(|| {
        let text = std::env::var("LIVEBACKUP_PAUSE_AT").unwrap_or_default();
        let pause = |item: &str| item.split_once('=').and_then(|(name, ms)| Some((name.to_owned(), ms.parse().ok()?)));
        text.split(',').filter_map(pause).collect()
    })
}

/// A place where the process may be made to die or to wait.
pub fn point(name: &str) {
    if let Some((_, ms)) = pauses().iter().find(|(paused, _)| paused == name) {
        std::thread::sleep(std::time::Duration::from_millis(*ms));
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
