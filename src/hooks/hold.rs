//! Hold: a database kept quiet over the instant.
//!
//! ```text
//! prepare ─► program starts ─► PREPARED … lock ─► (positions) ─► READY ══ instant ══ release: standard input closes ─► it ends
//!               │ (what is slow)                    │               │
//!               └── not ready in time: killed ──────┴───────────────┴── ends, or its time is over: it did not hold
//! ```
//!
//! The step before the lock is there so that no database waits for another one's checkpoint: all are prepared, then all are
//! locked at once.
//!
//! On the host a hold is a program. It prints `NAME=VALUE` lines (positions) and then a line `READY`, holds until its
//! standard input closes, prints more lines if it likes, and ends with exit code 0. So a dead sidecar releases it: its end
//! of the pipe closes however it dies. The [profiles](super::profile) are such programs, made of a database's own client
//! and what it is to be told; they say `PREPARED` first. A program of the operator has no such step, and is started when the
//! others are locked. In the guest the same is done by the agent ([`super::guest_hold`]).
//!
//! * **Held** means: ready in time, alive and within its limit at the release, and ended with 0 after its farewell (for a
//!   database: over the same connection that has the lock). Everything else is a hold that failed, with its reason.
//! * Nothing secret is in its arguments: clients read their passwords from files of their own.
//! * Its output is bounded, and its process group is killed when it does not end.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use crate::fault;
use crate::grade::{Held, Policy};

/// What a hold may last when nobody says otherwise.
pub const DEFAULT_LIMIT: Duration = Duration::from_secs(30);
/// How long it may take to be ready when nobody says otherwise.
pub const DEFAULT_READY_WITHIN: Duration = Duration::from_secs(30);
/// Longest of both.
pub const MAX_LIMIT: Duration = Duration::from_secs(600);
/// What a hold prints when it holds.
pub const READY: &str = "READY";
/// What a hold of ours prints when all is done that can be done before the lock.
pub const PREPARED: &str = "PREPARED";

/// How long a program may take to end after its release.
const ENDS_WITHIN: Duration = Duration::from_secs(10);
/// How long its complaints are waited for after its end.
const COMPLAINTS_WITHIN: Duration = Duration::from_secs(1);
/// Longest line and most lines that are read of a program; the rest is thrown away.
const MAX_LINE_BYTES: u64 = 4096;
const MAX_POSITIONS: usize = 64;
/// How much of its complaints is kept.
const MAX_ERROR_BYTES: u64 = 2048;

/// A hold, as it is configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// Its name.
    pub name: String,
    /// What happens when it does not hold.
    pub policy: Policy,
    /// How long it may take to be ready.
    pub ready_within: Duration,
    /// How long it may hold.
    pub limit: Duration,
    /// What holds.
    pub script: Script,
    /// Where it runs.
    pub place: Place,
}

/// Where a hold runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// On this host.
    Host,
    /// In the guest, started by its agent.
    Guest,
}

/// A program, and what it is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Script {
    /// The program and its arguments.
    pub run: Vec<String>,
    /// What is added to its environment.
    pub env: BTreeMap<String, String>,
    /// What is written to its standard input at first, until it says `PREPARED`; if that is empty, it is started for the lock.
    pub prepare: String,
    /// What is written to its standard input for the lock, until it says `READY`.
    pub input: String,
    /// What is written before its standard input closes.
    pub farewell: String,
    /// Any line but a position, a number, `READY` and these is a failure: for clients that go on after an error.
    pub only: Option<&'static [&'static str]>,
}

impl Script {
    /// What a line says.
    pub(super) fn read(&self, line: &str) -> Said {
        let line = line.trim();
        if line == READY {
            return Said::Ready;
        }
        if line == PREPARED {
            return Said::Prepared;
        }
        if let Some((file, offset)) = binary_log(line) {
            return Said::Position("binlog".into(), format!("{file}:{offset}"));
        }
        let position = line.split_once('=').or_else(|| line.split_once('\t')).filter(|(name, _)| is_name(name));
        if let Some((name, value)) = position {
            return Said::Position(name.to_owned(), value.trim().replace('\t', " "));
        }
        match self.only {
            Some(allowed) if !line.is_empty() && !allowed.contains(&line) && line.parse::<u64>().is_err() => {
                Said::Failure(line.to_owned())
            }
            _ => Said::Nothing,
        }
    }
}

/// A row of `SHOW MASTER STATUS`: file, offset, and more.
fn binary_log(line: &str) -> Option<(&str, u64)> {
    let mut columns = line.split('\t');
    let (file, offset) = (columns.next()?, columns.next()?.parse().ok()?);
    let number = file.rsplit_once('.')?.1;
    (number.len() >= 6 && number.bytes().all(|b| b.is_ascii_digit())).then_some((file, offset))
}

fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

/// What a line of a hold says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    Prepared,
    Ready,
    Position(String, String),
    Failure(String),
    Nothing,
}

/// A hold that can be locked.
#[derive(Debug)]
pub struct Prepared {
    name: String,
    lock: oneshot::Sender<()>,
    locked: oneshot::Receiver<Result<(), Held>>,
    release: oneshot::Sender<()>,
    ended: oneshot::Receiver<Held>,
}

/// A hold that holds.
#[derive(Debug)]
pub struct Taken {
    name: String,
    release: oneshot::Sender<()>,
    ended: oneshot::Receiver<Held>,
}

fn lost(name: &str) -> Held {
    let failed = Some("its task ended early; the log says why".into());
    Held { name: name.to_owned(), failed, ..Held::default() }
}

/// Prepares a hold of this host: all that is slow. When what it gives is dropped, nothing of it is left.
///
/// # Errors
/// What the manifest says of it: why it does not hold. Nothing of it is left.
pub async fn prepare(hold: &Hold) -> Result<Prepared, Held> {
    let (answer, answered) = oneshot::channel();
    let (lock, lock_asked) = oneshot::channel();
    let (lock_answer, locked) = oneshot::channel();
    let (release, released) = oneshot::channel();
    let (end, ended) = oneshot::channel();
    // A task of its own: it keeps its limits whatever its owner does.
    tokio::spawn(run(hold.clone(), answer, (lock_asked, lock_answer), (released, end)));
    let name = hold.name.clone();
    match answered.await {
        Ok(Ok(())) => Ok(Prepared { name, lock, locked, release, ended }),
        Ok(Err(held)) => Err(held),
        Err(_) => Err(lost(&name)),
    }
}

impl Prepared {
    /// Locks.
    ///
    /// # Errors
    /// As [`prepare`].
    pub async fn lock(self) -> Result<Taken, Held> {
        let Self { name, lock, locked, release, ended } = self;
        // Where the task has ended already, it says why.
        let _ = lock.send(());
        match locked.await {
            Ok(Ok(())) => Ok(Taken { name, release, ended }),
            Ok(Err(held)) => Err(held),
            Err(_) => Err(lost(&name)),
        }
    }
}

impl Taken {
    /// Lets go and waits for the end. Says what became of the hold.
    pub async fn release(self) -> Held {
        // Where the task has ended already, it says why.
        let _ = self.release.send(());
        self.ended.await.unwrap_or_else(|_| lost(&self.name))
    }
}

/// Starts it and waits for a word, for its limit at most. Takes the program, and gives it back when it has said that.
async fn until(hold: &Hold, program: Option<Program>, input: &str, word: Said) -> Result<Program, String> {
    let mut program = match program {
        Some(program) => program,
        None => Program::start(&hold.script)?,
    };
    let said = timeout(hold.ready_within, program.until(&hold.script, input, word)).await;
    let late = || format!("it was not ready within {} s", hold.ready_within.as_secs_f32());
    match said.unwrap_or_else(|_| Err(late())) {
        Ok(()) => Ok(program),
        Err(why) => Err(program.kill(why).await),
    }
}

async fn run(
    hold: Hold,
    answer: oneshot::Sender<Result<(), Held>>,
    (lock_asked, lock_answer): (oneshot::Receiver<()>, oneshot::Sender<Result<(), Held>>),
    (released, end): (oneshot::Receiver<()>, oneshot::Sender<Held>),
) {
    let start = Instant::now();
    let mut held = Held { name: hold.name.clone(), ..Held::default() };
    let mut program = None;
    if !hold.script.prepare.is_empty() {
        match until(&hold, None, &hold.script.prepare, Said::Prepared).await {
            Ok(prepared) => program = Some(prepared),
            Err(why) => {
                let _ = answer.send(Err(Held { failed: Some(why), ..held }));
                return;
            }
        }
    }
    let gave_up = answer.send(Ok(())).is_err() || lock_asked.await.is_err();
    if gave_up {
        if let Some(program) = program {
            program.kill(String::new()).await;
        }
        return;
    }
    // From now on others may wait for the database.
    let locked_at = Instant::now();
    let mut program = match until(&hold, program, &hold.script.input, Said::Ready).await {
        Ok(program) => program,
        Err(why) => {
            held.ready_us = start.elapsed().as_micros() as u64;
            let _ = lock_answer.send(Err(Held { failed: Some(why), ..held }));
            return;
        }
    };
    held.ready_us = start.elapsed().as_micros() as u64;
    fault::point("hold.ready");
    let deadline = Instant::now() + hold.limit;
    if lock_answer.send(Ok(())).is_err() {
        program.kill(String::new()).await;
        return;
    }
    let broken = tokio::select! {
        biased;
        // Both a release and an owner that went away.
        _ = released => None,
        _ = program.child.wait() => Some("it ended before it was released".to_owned()),
        () = sleep_until(deadline) => {
            Some(format!("its limit of {} s ran out before the instant was over", hold.limit.as_secs_f32()))
        }
    };
    let late = || Err(format!("it did not end within {} s of its release", ENDS_WITHIN.as_secs()));
    let broken = match broken {
        Some(why) => Some(why),
        None => timeout(ENDS_WITHIN, program.end(&hold.script)).await.unwrap_or_else(|_| late()).err(),
    };
    held.held_us = locked_at.elapsed().as_micros() as u64;
    held.positions = std::mem::take(&mut program.positions);
    if let Some(why) = broken {
        held.failed = Some(program.kill(why).await);
    }
    if let Some(why) = &held.failed {
        tracing::warn!(hold = hold.name, "the hold did not hold: {why}");
    }
    let _ = end.send(held);
}

/// A running program, with its lines.
struct Program {
    child: Child,
    /// Closed by taking it.
    input: Option<ChildStdin>,
    lines: BufReader<ChildStdout>,
    errors: JoinHandle<String>,
    positions: BTreeMap<String, String>,
}

impl Program {
    fn start(script: &Script) -> Result<Self, String> {
        let (program, arguments) = script.run.split_first().ok_or("no program is configured")?;
        let mut command = Command::new(program);
        command.args(arguments).envs(&script.env).env_remove("LIVEBACKUP_KILL_AT");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Its own group: Ctrl-C at a terminal is for us, and a kill is for all that it started.
        command.process_group(0).kill_on_drop(true);
        let mut child = command.spawn().map_err(|e| format!("cannot start {program}: {e}"))?;
        let (Some(input), Some(output), Some(mut errors)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(format!("{program} has no pipes"));
        };
        let errors = tokio::spawn(async move {
            let mut kept = vec![];
            let _ = (&mut errors).take(MAX_ERROR_BYTES).read_to_end(&mut kept).await;
            // What is not kept is read, too: a full pipe would stop it.
            let _ = tokio::io::copy(&mut errors, &mut tokio::io::sink()).await;
            String::from_utf8_lossy(&kept).split_whitespace().collect::<Vec<_>>().join(" ")
        });
        let (input, lines) = (Some(input), BufReader::new(output));
        Ok(Self { child, input, lines, errors, positions: BTreeMap::new() })
    }

    async fn write(&mut self, text: &str) -> std::io::Result<()> {
        match &mut self.input {
            Some(input) if !text.is_empty() => input.write_all(text.as_bytes()).await,
            _ => Ok(()),
        }
    }

    /// Writes some input, and reads until a word.
    async fn until(&mut self, script: &Script, input: &str, word: Said) -> Result<(), String> {
        self.write(input).await.map_err(|e| format!("it does not read its input: {e}"))?;
        loop {
            match self.line().await?.map(|line| script.read(&line)) {
                None => return Err("it ended without being ready".into()),
                Some(said) if said == word => return Ok(()),
                Some(Said::Position(name, value)) => self.keep(name, value),
                Some(Said::Failure(words)) => return Err(words),
                Some(_) => {}
            }
        }
    }

    fn keep(&mut self, name: String, value: String) {
        if self.positions.len() < MAX_POSITIONS {
            self.positions.insert(name, value);
        }
    }

    /// The next line, without its end. A very long one comes in pieces.
    async fn line(&mut self) -> Result<Option<String>, String> {
        let mut line = vec![];
        let read = (&mut self.lines).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await;
        match read.map_err(|e| format!("its output cannot be read: {e}"))? {
            0 => Ok(None),
            _ => Ok(Some(String::from_utf8_lossy(&line).into_owned())),
        }
    }

    /// Releases it, and reads what it says to the end.
    async fn end(&mut self, script: &Script) -> Result<(), String> {
        let written = self.write(&script.farewell).await;
        self.input = None;
        let mut failed = written.err().map(|e| format!("it does not read its input any more: {e}"));
        while let Some(line) = self.line().await? {
            match script.read(&line) {
                Said::Position(name, value) => self.keep(name, value),
                Said::Failure(words) => failed = failed.or(Some(words)),
                Said::Prepared | Said::Ready | Said::Nothing => {}
            }
        }
        let status = self.child.wait().await.map_err(|e| e.to_string())?;
        match failed {
            _ if !status.success() => Err(format!("it ended with {status}")),
            Some(why) => Err(why),
            None => Ok(()),
        }
    }

    /// Ends all of it, and gives the reason with its own complaints.
    async fn kill(mut self, why: String) -> String {
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.child.wait().await;
        // A process that left its group may hold the pipe open.
        match timeout(COMPLAINTS_WITHIN, self.errors).await {
            Ok(Ok(said)) if !said.is_empty() => format!("{why}: {said}"),
            _ => why,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn position(name: &str, value: &str) -> Said {
        Said::Position(name.into(), value.into())
    }

    #[test]
    fn lines() {
        let free = Script::default();
        let strict = Script { only: Some(&["OK"]), ..Script::default() };
        assert_eq!((free.read("READY\n"), strict.read("PREPARED")), (Said::Ready, Said::Prepared));
        assert_eq!(free.read("wal_lsn=0/15D68A0\n"), position("wal_lsn", "0/15D68A0"));
        assert_eq!(free.read("gtid_binlog_pos\t0-1-42\n"), position("gtid_binlog_pos", "0-1-42"));
        assert_eq!(free.read("mysqld-bin.000001\t330\t\t\n"), position("binlog", "mysqld-bin.000001:330"));
        assert_eq!(free.read("anything else\n"), Said::Nothing);
        for (line, said) in [("OK", Said::Nothing), ("17", Said::Nothing), ("", Said::Nothing)] {
            assert_eq!(strict.read(line), said);
        }
        assert_eq!(strict.read("ERR no"), Said::Failure("ERR no".into()));
    }

    proptest! {
        #[test]
        fn any_line_can_be_read(line in "[A-Z=\t.0-9\\PC]{0,40}") {
            for only in [None, Some(&["OK"][..])] {
                if let Said::Position(name, _) = (Script { only, ..Script::default() }).read(&line) {
                    prop_assert!(is_name(&name));
                }
            }
        }
    }
}
