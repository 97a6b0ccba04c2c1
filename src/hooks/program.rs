//! Host hooks: programs of the operator, before and after a phase of a backup.
//!
//! | phase | before | after |
//! |---|---|---|
//! | backup (at the client) | before anything is asked of the VM | when the point exists, or does not |
//! | session (at the sidecar) | before anything is done in QEMU | when the fleece is closed |
//! | instant (at the sidecar) | before holds and freeze | when the guest is free again |
//!
//! A hook learns of what is going on by its environment: `LIVEBACKUP_VM`, `LIVEBACKUP_PHASE`, `LIVEBACKUP_WHEN` (`pre`,
//! `post`), `LIVEBACKUP_LEVEL`; after it `LIVEBACKUP_RESULT` (`ok`, `failed`), and where they are known
//! `LIVEBACKUP_POINT` and `LIVEBACKUP_MESSAGE`.
//!
//! * One before that fails, or is not done in time, refuses the phase.
//! * Every one after runs whatever happened, also when one before refused; one that fails is a warning.
//! * A hook that is not done in time is killed with all that it started.

use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::process::Command;
use tokio::time::timeout;

/// How long a hook may take when nobody says otherwise.
pub const DEFAULT_LIMIT: Duration = Duration::from_secs(60);
/// Longest time that can be given to one.
pub const MAX_LIMIT: Duration = Duration::from_secs(3600);
/// How much of what it says is kept.
const MAX_SAID_BYTES: u64 = 2048;

/// A phase with hooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The whole backup, at the client.
    Backup,
    /// The sidecar's part.
    Session,
    /// From quiet to free.
    Instant,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Backup => "backup",
            Self::Session => "session",
            Self::Instant => "instant",
        }
    }
}

/// Programs around a phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// Which phase.
    pub phase: Phase,
    /// Run before it; nothing when empty.
    pub pre: Vec<String>,
    /// Run after it; nothing when empty.
    pub post: Vec<String>,
    /// How long each may take.
    pub limit: Duration,
}

/// What a hook is told.
#[derive(Clone, Debug, Default)]
pub struct About {
    /// The VM.
    pub vm: String,
    /// The level that was asked for, or that it became.
    pub level: String,
    /// The restore point.
    pub point: Option<String>,
}

/// Runs all hooks before a phase, in their order.
///
/// # Errors
/// The first that failed, in words. Those after it are not run.
pub async fn before(hooks: &[Hook], phase: Phase, about: &About) -> Result<(), String> {
    for hook in hooks.iter().filter(|hook| hook.phase == phase && !hook.pre.is_empty()) {
        run(&hook.pre, environment(phase, "pre", about), hook.limit).await?;
    }
    Ok(())
}

/// Runs all hooks after a phase, in the reverse order. Says what went wrong with them.
pub async fn after(hooks: &[Hook], phase: Phase, about: &About, result: Result<(), String>) -> Vec<String> {
    let mut warnings = vec![];
    for hook in hooks.iter().rev().filter(|hook| hook.phase == phase && !hook.post.is_empty()) {
        let mut env = environment(phase, "post", about);
        env.push(("LIVEBACKUP_RESULT", if result.is_ok() { "ok" } else { "failed" }.into()));
        env.extend(result.as_ref().err().map(|why| ("LIVEBACKUP_MESSAGE", why.clone())));
        if let Err(why) = run(&hook.post, env, hook.limit).await {
            tracing::warn!("{why}");
            warnings.push(why);
        }
    }
    warnings
}

fn environment(phase: Phase, when: &str, about: &About) -> Vec<(&'static str, String)> {
    let mut env = vec![
        ("LIVEBACKUP_VM", about.vm.clone()),
        ("LIVEBACKUP_PHASE", phase.name().into()),
        ("LIVEBACKUP_WHEN", when.into()),
        ("LIVEBACKUP_LEVEL", about.level.clone()),
    ];
    env.extend(about.point.as_ref().map(|point| ("LIVEBACKUP_POINT", point.clone())));
    env
}

async fn run(program: &[String], env: Vec<(&'static str, String)>, limit: Duration) -> Result<(), String> {
    let (name, arguments) = program.split_first().ok_or("no program is configured")?;
    let mut command = Command::new(name);
    // A nul byte cannot be in an environment.
    command.args(arguments).envs(env.into_iter().map(|(name, value)| (name, value.replace('\0', " "))));
    command.env_remove("LIVEBACKUP_KILL_AT").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.process_group(0).kill_on_drop(true);
    let mut child = command.spawn().map_err(|e| format!("the hook {name} cannot be started: {e}"))?;
    let (output, errors) = (child.stdout.take(), child.stderr.take());
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    // Both are read to their ends, so that it never waits for us; the first bytes of each are kept.
    let said = tokio::spawn(async move { (keep(output).await, keep(errors).await) });
    let status = match timeout(limit, child.wait()).await {
        Ok(status) => status.map_err(|e| format!("the hook {name}: {e}"))?,
        Err(_) => {
            if let Some(pid) = pid {
                let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
            }
            let _ = child.wait().await;
            return Err(format!("the hook {name} was not done within {} s and was killed", limit.as_secs_f32()));
        }
    };
    if status.success() {
        return Ok(());
    }
    // What it started may hold its pipes open: that is not waited for.
    let (output, errors) = timeout(Duration::from_secs(1), said).await.ok().and_then(Result::ok).unwrap_or_default();
    let words = if errors.is_empty() { output } else { errors };
    let words = if words.is_empty() { String::new() } else { format!(": {words}") };
    Err(format!("the hook {name} failed ({status}){words}"))
}

async fn keep(stream: Option<impl AsyncReadExt + Unpin>) -> String {
    let Some(mut stream) = stream else { return String::new() };
    let mut kept = vec![];
    let _ = (&mut stream).take(MAX_SAID_BYTES).read_to_end(&mut kept).await;
    let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    String::from_utf8_lossy(&kept).split_whitespace().collect::<Vec<_>>().join(" ")
}
