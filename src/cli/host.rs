//! What `doctor` looks at on this host. Changes nothing.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, access};

use super::context::Context;
use crate::units::{GIB, human_bytes};
use crate::vm::{Check, CheckVerdict};

/// Free scratch below which we warn.
const LITTLE_BYTES: u64 = GIB;

fn check(name: &str, verdict: CheckVerdict, words: String) -> Check {
    Check { name: name.to_owned(), verdict, words }
}

/// The directory, or the nearest one above it that is there.
fn nearest(dir: &Path) -> &Path {
    dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"))
}

/// The directories that this host's own sidecars would use.
pub fn places(context: &Context) -> Vec<Check> {
    let scratch = context.scratch.as_deref().unwrap_or(&context.state);
    vec![state(&context.state), unlinked(scratch), space(scratch)]
}

/// This program and its host.
pub fn program() -> Check {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let version = env!("CARGO_PKG_VERSION");
    check("program", CheckVerdict::Good, format!("livebackup {version}, Linux {}", kernel.trim()))
}

fn state(dir: &Path) -> Check {
    let there = nearest(dir);
    match access(there, AccessFlags::W_OK | AccessFlags::X_OK) {
        Ok(()) => check("state", CheckVerdict::Good, format!("{} can be written", dir.display())),
        Err(error) => {
            let words = format!("{} cannot be written ({error}): give --state DIR, or run as root", there.display());
            check("state", CheckVerdict::Bad, words)
        }
    }
}

fn unlinked(dir: &Path) -> Check {
    let there = nearest(dir);
    let opened = OpenOptions::new().write(true).custom_flags(nix::libc::O_TMPFILE).mode(0o600).open(there);
    match opened {
        Ok(_) => check("scratch", CheckVerdict::Good, format!("{} takes unlinked files", there.display())),
        Err(error) => {
            let words = format!("{} takes no unlinked files ({error}): give --scratch DIR", there.display());
            check("scratch", CheckVerdict::Bad, words)
        }
    }
}

fn space(dir: &Path) -> Check {
    let there = nearest(dir);
    match statvfs(there) {
        Ok(about) => {
            let free = about.blocks_available().saturating_mul(about.fragment_size());
            let verdict = if free < LITTLE_BYTES { CheckVerdict::Warn } else { CheckVerdict::Good };
            check("space", verdict, format!("{} free for scratch in {}", human_bytes(free), there.display()))
        }
        Err(error) => check("space", CheckVerdict::Warn, format!("{}: {error}", there.display())),
    }
}
