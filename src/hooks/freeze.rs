//! Freeze lease: the guest's file systems stand still for a bounded time.
//!
//! ```text
//!  status ─► freeze ─► lease ──(released, or run out)──► status ─► thaw ─► thawed
//!     │        │                                            │        │
//!   frozen   refused: nothing is owed                        └────────┴─(no answer)─► again and again until the
//!   already    (no answer, or half done)─────────────────────────────────────────────► status says thawed
//! ```
//!
//! * A lease is a task of its own: it thaws when it is released, when it is dropped, and when its time has run out,
//!   whatever its owner does meanwhile.
//! * **Held** means: the status was `frozen` after the instant, and the thaw freed as many file systems as the freeze had
//!   taken. Else somebody thawed in between (Windows does so by itself after ten seconds), and the freeze does not count.
//!   Nor does one that took none: there was no file system to freeze.
//! * A guest that somebody else has frozen is left alone.
//! * A freeze that was not answered may come true later; so its thaw is owed, too.
//! * The agent's channel takes one client: while the lease lives, nobody else can ask the agent anything.
//! * **A crash leaves** the guest frozen. Who calls writes the debt down before, and [`thaw_until_done`] pays it from any
//!   process.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::agent::{Address, AgentError, Channel, FreezeStatus};
use crate::fault;

/// What a lease may last when nobody says otherwise: Windows' own limit.
pub const DEFAULT_LEASE: Duration = Duration::from_secs(10);
/// Longest lease that can be asked for.
pub const MAX_LEASE: Duration = Duration::from_secs(60);

/// How long one try of a thaw waits for an agent.
const TRY_WITHIN: Duration = Duration::from_secs(5);
/// Pause between two tries.
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(200);
/// How often a guest that cannot be thawed is spoken of.
const ALARM_EVERY: Duration = Duration::from_secs(30);

/// What to freeze.
#[derive(Clone, Debug)]
pub struct Wish {
    /// These mount points; all file systems when empty.
    pub mount_points: Vec<String>,
    /// For how long at most, from the moment at which the freeze is asked for.
    pub lease: Duration,
}

/// How a lease ended.
#[derive(Debug)]
pub struct Ended {
    /// From asking for the freeze to the answer to the thaw.
    pub frozen: Duration,
    /// Whether the file systems stood still until the release; if not, why that is not certain.
    pub held: Result<(), String>,
    /// The agent, for whoever goes on talking to it.
    pub agent: Option<Channel>,
}

/// A frozen guest.
#[derive(Debug)]
pub struct Lease {
    /// How many file systems were frozen.
    pub file_systems: u64,
    release: oneshot::Sender<()>,
    ended: oneshot::Receiver<Ended>,
}

/// Why a guest is not frozen.
#[derive(Debug)]
pub struct NotFrozen {
    /// In words.
    pub reason: String,
    /// The agent, if it still makes sense to talk to it.
    pub agent: Option<Box<Channel>>,
}

/// Freezes. `thawed` is called once, when nothing is owed any more: at once if nothing was frozen, and never if QEMU
/// dies with its frozen guest before we do (then nothing is owed either, and whoever finds the debt sees that).
pub async fn freeze(agent: Channel, wish: Wish, thawed: impl FnOnce() + Send + 'static) -> Result<Lease, NotFrozen> {
    let (answer, answered) = oneshot::channel();
    let (release, released) = oneshot::channel();
    let (end, ended) = oneshot::channel();
    // A task of its own: a caller that goes away must not leave the guest frozen.
    tokio::spawn(lease(agent, wish, answer, released, end, thawed));
    match answered.await {
        Ok(Ok(file_systems)) => Ok(Lease { file_systems, release, ended }),
        Ok(Err(not)) => Err(not),
        Err(_) => Err(NotFrozen { reason: "the freeze's task ended early; the log says why".into(), agent: None }),
    }
}

impl Lease {
    /// Thaws, and waits for that; for `wait` at most, then the thaw is tried on without us.
    pub async fn end(self, wait: Duration) -> Ended {
        let asked = Instant::now();
        let Self { release, ended, .. } = self;
        let _ = release.send(());
        match timeout(wait, ended).await {
            Ok(Ok(ended)) => ended,
            _ => Ended {
                frozen: asked.elapsed(),
                held: Err("the guest agent did not confirm the thaw; it is tried again and again".into()),
                agent: None,
            },
        }
    }
}

async fn lease(
    mut agent: Channel,
    wish: Wish,
    answer: oneshot::Sender<Result<u64, NotFrozen>>,
    released: oneshot::Receiver<()>,
    end: oneshot::Sender<Ended>,
    thawed: impl FnOnce(),
) {
    // Where nobody waits for the answer any more, nothing is lost.
    let refused = |reason: String, agent: Option<Channel>| Err(NotFrozen { reason, agent: agent.map(Box::new) });
    match agent.freeze_status().await {
        Ok(FreezeStatus::Thawed) => {}
        Ok(FreezeStatus::Frozen) => {
            thawed();
            let _ = answer.send(refused("somebody else has frozen the guest's file systems".into(), Some(agent)));
            return;
        }
        Err(error) => {
            thawed();
            let _ = answer.send(refused(error.to_string(), None));
            return;
        }
    }
    let start = Instant::now();
    let deadline = start + wish.lease;
    let address = agent.address().clone();
    fault::point("freeze.owed");
    let file_systems = match agent.freeze(&wish.mount_points, wish.lease).await {
        Ok(number) => number,
        Err(error) if error.is_disabled() => {
            thawed();
            let _ = answer.send(refused(error.to_string(), Some(agent)));
            return;
        }
        Err(error) => {
            // Some may be frozen, or be so soon. The answer does not wait for their thaw: the guest may not answer.
            let _ = answer.send(refused(format!("{error}; the freeze is taken back"), None));
            if thaw_until_done(&address, Some(agent), || true).await {
                thawed();
            }
            return;
        }
    };
    fault::point("freeze.frozen");
    let in_time = answer.send(Ok(file_systems)).is_ok() && timeout_at(deadline, released).await.is_ok();
    let (held, agent) = match thaw(&mut agent, file_systems).await {
        Ok(Ok(())) if in_time => (Ok(()), Some(agent)),
        Ok(Ok(())) => {
            let words = format!("the lease of {} s ran out before the instant was over", wish.lease.as_secs_f32());
            (Err(words), Some(agent))
        }
        Ok(Err(why)) => (Err(why), Some(agent)),
        Err(error) => {
            tracing::error!("the guest is frozen and its agent does not thaw it, trying again: {error}");
            if !thaw_until_done(&address, Some(agent), || true).await {
                return;
            }
            (Err(format!("the thaw came late: {error}")), None)
        }
    };
    let frozen = start.elapsed();
    fault::point("freeze.thawed");
    thawed();
    if !in_time {
        tracing::warn!("the guest was thawed because the lease of its freeze ran out");
    }
    let _ = end.send(Ended { frozen, held, agent });
}

/// One thaw, with the proof that nobody thawed before.
async fn thaw(agent: &mut Channel, frozen: u64) -> Result<Result<(), String>, AgentError> {
    let status = agent.freeze_status().await?;
    let freed = agent.thaw().await?;
    Ok(match status {
        // Of nothing, agents say either.
        _ if frozen == 0 => Ok(()),
        FreezeStatus::Thawed => Err("somebody thawed the guest's file systems before the instant was over".into()),
        FreezeStatus::Frozen if freed < frozen => {
            Err(format!("of {frozen} file systems only {freed} were still frozen after the instant"))
        }
        FreezeStatus::Frozen => Ok(()),
    })
}

/// Thaws until the agent says that nothing is frozen. Gives false when it is hopeless: QEMU is gone (then nothing is
/// frozen any more), or `owed` says that nothing is owed any more.
pub async fn thaw_until_done(address: &Address, agent: Option<Channel>, owed: impl Fn() -> bool) -> bool {
    let (mut agent, mut spoken): (_, Option<Instant>) = (agent, None);
    while owed() {
        match try_to_thaw(address, &mut agent, &owed).await {
            Ok(thawed) => return thawed,
            Err(error) if error.is_gone() => return false,
            Err(error) => {
                if spoken.is_none_or(|at| at.elapsed() > ALARM_EVERY) {
                    tracing::error!("the guest may be FROZEN by us and cannot be thawed yet, trying on: {error}");
                    spoken = Some(Instant::now());
                }
                agent = None;
                sleep(TRY_AGAIN_AFTER).await;
            }
        }
    }
    false
}

async fn try_to_thaw(
    address: &Address,
    agent: &mut Option<Channel>,
    owed: &impl Fn() -> bool,
) -> Result<bool, AgentError> {
    let agent = match agent {
        Some(agent) => agent,
        none => none.insert(Channel::open(address, TRY_WITHIN).await?),
    };
    let status = agent.freeze_status().await?;
    if !owed() {
        // While we waited for the channel, its owner before us has paid: a freeze now is a new one.
        return Ok(false);
    }
    if status == FreezeStatus::Frozen {
        agent.thaw().await?;
        if agent.freeze_status().await? == FreezeStatus::Frozen {
            return Err(AgentError::Garbage {
                command: "guest-fsfreeze-thaw".into(),
                found: "a thaw that thaws not".into(),
            });
        }
    }
    Ok(true)
}
