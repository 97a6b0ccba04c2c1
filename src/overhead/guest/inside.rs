//! Inside of the guest: programs are started through its agent, and waited for.
//!
//! The agent's channel takes one client. A session that freezes the guest is one of its own, so the channel is let go before a
//! backup begins; fio is found again by its number, which the agent keeps. The agent cannot end what it has started: that is done by
//! a `kill` in the guest, of what has this measurement's own name on its command line and nothing else. So is a fio found whose
//! number never came. An agent that does not answer at once is asked again: the guest has much to do.

use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::sleep;

use super::GuestOptions;
use super::error::GuestError;
use super::fio::{self, Fio, Said, Task, Wrong, last_words};
use crate::agent::{AgentError, Channel, Executed};
use crate::units::{PackId, human_bytes};
use crate::vm::{AgentAbsence, Vm};

/// How often a program is asked for.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A small program takes no longer, whatever the guest does beside.
const SHORT: Duration = Duration::from_secs(30);
/// How much longer than its run fio may take: to start, to write its last requests, to end.
const FIO_ENDS_WITHIN: Duration = Duration::from_secs(60);
/// How long the agent's channel may seem to be ours after we have let it go.
const FREE_WITHIN: Duration = Duration::from_secs(2);
/// What runs the guest.
const RUNNING: &str = "running";

/// Makes the file, which must not be there, and says how much space there is beside it.
const MAKE: &str = r#"if [ -e "$1" ] || [ -L "$1" ]; then echo "it is there already" >&2; exit 1; fi
umask 077; set -C; : >"$1" || exit 1; set +C
df -Pk "$1" 2>/dev/null; exit 0"#;
/// Ends the fio of a name, and says its numbers. The pattern is not what is on its own command line.
const STOP: &str = r#"for c in $(grep -ls -e "--[n]ame=$1" /proc/[0-9]*/cmdline); do
  p=${c#/proc/}; p=${p%/cmdline}; echo "$p"; kill -INT "$p" 2>/dev/null
done; exit 0"#;
/// How often it is tried to take something back from a guest that does not answer.
const TRIES: usize = 3;

/// What the guest is.
#[derive(Clone, Debug)]
pub struct AboutGuest {
    /// fio's version.
    pub fio: (u32, u32),
    /// System, kernel, agent and fio, for people.
    pub words: String,
}

/// A program that was started.
#[derive(Clone, Copy, Debug)]
pub struct Started {
    number: i64,
    at: Instant,
    limit: Duration,
}

/// Whether there is a file of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Made {
    No,
    /// The guest has not said whether it made it.
    Perhaps,
    Yes,
}

/// What is done in the guest. [`Inside::leave`] takes it back.
pub struct Inside {
    vm: Vm,
    channel: Option<Channel>,
    fio: String,
    file: String,
    /// What fio is called on its command line.
    name: String,
    /// Since when a fio may run, and for how long.
    runs: Option<(Instant, Duration)>,
    made: Made,
    interrupted: watch::Receiver<bool>,
}

impl Inside {
    /// Does nothing yet.
    pub fn new(vm: Vm, options: &GuestOptions, interrupted: watch::Receiver<bool>) -> Self {
        let (fio, file) = (options.fio.clone(), options.file.clone());
        let name = format!("livebackup-{}", PackId::random().short());
        Self { vm, channel: None, fio, file, name, runs: None, made: Made::No, interrupted }
    }

    /// fio and its file.
    pub fn fio_of(&self, about: &AboutGuest, size_bytes: u64) -> Fio {
        Fio { version: about.fio, name: self.name.clone(), file: self.file.clone(), size_bytes }
    }

    /// Whether the guest is one that can be measured.
    pub async fn look(&mut self) -> Result<AboutGuest, GuestError> {
        self.must_run().await?;
        let channel = self.channel().await?;
        // An agent that does not say what it can may be able to.
        let info = channel.info().await.unwrap_or_default();
        let os = channel.os().await.unwrap_or_default();
        for command in ["guest-exec", "guest-exec-status"] {
            if !info.enabled.is_empty() && !info.can(command) {
                return Err(GuestError::Blocked(command.to_owned()));
            }
        }
        if os.id == "mswindows" {
            return Err(GuestError::NotLinux(os.pretty_name));
        }
        let program = self.fio.clone();
        let no_fio = |why: String| GuestError::NoFio { program: program.clone(), why };
        let said = match self.run(&program, &["--version"]).await {
            Ok(Executed { exit_code: Some(0), output, .. }) => last_words(&output),
            Ok(ended) => return Err(no_fio(last_words(&[ended.errors, ended.output].concat()))),
            Err(GuestError::Agent(AgentError::Refused { desc, .. })) => return Err(no_fio(desc)),
            Err(error) => return Err(error),
        };
        let old = || GuestError::OldFio { program: program.clone(), version: said.clone() };
        let version = fio::version(&said).filter(|(major, _)| *major >= 3).ok_or_else(old)?;
        let or = |text: String, other: &str| if text.is_empty() { other.to_owned() } else { text };
        let words = format!(
            "{}, Linux {}, agent {}, {said}",
            or(os.pretty_name, "a system that its agent does not name"),
            or(os.kernel_release, "?"),
            or(info.version, "?")
        );
        Ok(AboutGuest { fio: version, words })
    }

    /// Makes the file and fills it.
    pub async fn make_file(&mut self, fio: &Fio) -> Result<(), GuestError> {
        let file = self.file.clone();
        self.made = Made::Perhaps;
        let made = self.shell(MAKE, &[&file]).await?;
        if made.exit_code != Some(0) {
            self.made = Made::No;
            return Err(GuestError::File { file, why: last_words(&made.errors) });
        }
        self.made = Made::Yes;
        // A quarter more: others write there as well.
        let needed = fio.size_bytes.saturating_add(fio.size_bytes / 4);
        let no_space = |free: Option<u64>| GuestError::NoSpace {
            file: file.clone(),
            free: free.map_or("too little".to_owned(), human_bytes),
            needed: human_bytes(needed),
        };
        let free = free_bytes(&made.output);
        if free.is_some_and(|free| free < needed) {
            return Err(no_space(free));
        }
        let started = self.start_fio(fio, Task::Fill).await?;
        match self.said(started).await? {
            Ok(said) if said.written_bytes < fio.size_bytes => {
                Err(GuestError::Slow { file, seconds: fio::FILLS_WITHIN.as_secs() })
            }
            Ok(_) => Ok(()),
            Err(Wrong::NoSpace) => Err(no_space(None)),
            Err(Wrong::Else(words)) if ["O_DIRECT", "Invalid argument"].iter().any(|why| words.contains(why)) => {
                let why = format!("its file system takes no direct I/O, as one in memory ({words})");
                Err(GuestError::File { file, why })
            }
            Err(Wrong::Else(words)) => Err(GuestError::Fio(words)),
        }
    }

    /// Runs fio to its end. Gives its figures, and how long it took beside its run.
    pub async fn fio(&mut self, fio: &Fio, task: Task) -> Result<(Said, Duration), GuestError> {
        let started = self.start_fio(fio, task).await?;
        let said = self.figures(started).await?;
        let beside = started.at.elapsed().saturating_sub(Duration::from_secs_f64(said.figures.seconds.max(0.0)));
        Ok((said, beside))
    }

    /// Starts fio.
    pub async fn start_fio(&mut self, fio: &Fio, task: Task) -> Result<Started, GuestError> {
        let program = self.fio.clone();
        let arguments = fio.arguments(task);
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        self.runs = Some((Instant::now(), task.limit()));
        self.start(&program, &arguments, task.limit()).await.map_err(|error| match error {
            GuestError::Agent(AgentError::Refused { desc, .. }) => GuestError::NoFio { program, why: desc },
            error => error,
        })
    }

    /// The figures of a fio that was started, when it has ended.
    pub async fn figures(&mut self, started: Started) -> Result<Said, GuestError> {
        self.said(started).await?.map_err(|wrong| match wrong {
            Wrong::NoSpace => GuestError::Fio("no space is left on the guest's file system".into()),
            Wrong::Else(words) => GuestError::Fio(words),
        })
    }

    async fn said(&mut self, started: Started) -> Result<Result<Said, Wrong>, GuestError> {
        // It is not asked for while it runs: the guest has enough to do.
        let fills = started.limit == fio::FILLS_WITHIN || started.limit == fio::DIRTIES_WITHIN;
        if !fills {
            self.pause(started.limit.saturating_sub(started.at.elapsed())).await?;
        }
        let ended = self.ended("fio", started, FIO_ENDS_WITHIN).await?;
        self.runs = None;
        Ok(fio::read(ended.exit_code, &ended.output, &ended.errors))
    }

    /// Lets the agent's channel go: a session needs it, to freeze the guest.
    pub fn let_go(&mut self) {
        self.channel = None;
    }

    /// Sleeps, unless the user wants to stop.
    pub async fn pause(&mut self, time: Duration) -> Result<(), GuestError> {
        let stop = tokio::time::timeout(time, self.interrupted.wait_for(|stop| *stop)).await;
        if stop.is_ok_and(|stop| stop.is_ok()) { Err(GuestError::Interrupted) } else { Ok(()) }
    }

    /// Something that may be dropped, unless the user wants to stop.
    pub async fn unless_interrupted<T>(&mut self, work: impl Future<Output = T>) -> Result<T, GuestError> {
        tokio::select! {
            biased;
            Ok(_) = self.interrupted.wait_for(|stop| *stop) => Err(GuestError::Interrupted),
            done = work => Ok(done),
        }
    }

    /// Stops a fio that runs.
    pub async fn stop_fio(&mut self) -> Result<(), GuestError> {
        let Some((since, limit)) = self.runs else { return Ok(()) };
        let deadline = Instant::now() + limit.saturating_sub(since.elapsed()) + FIO_ENDS_WITHIN;
        let name = self.name.clone();
        while !self.shell(STOP, &[&name]).await?.output.is_empty() {
            if Instant::now() > deadline {
                return Err(GuestError::Hangs { what: "fio".into(), seconds: since.elapsed().as_secs() });
            }
            sleep(LOOK_EVERY).await;
        }
        self.runs = None;
        Ok(())
    }

    async fn remove_file(&mut self) -> Result<(), GuestError> {
        if self.made == Made::Yes {
            let file = self.file.clone();
            let ended = self.run("rm", &["-f", "--", &file]).await?;
            if ended.exit_code != Some(0) {
                return Err(GuestError::File { file, why: last_words(&ended.errors) });
            }
            self.made = Made::No;
        }
        Ok(())
    }

    /// Takes back what was done in the guest. Says what is left of it.
    pub async fn leave(&mut self) -> Vec<String> {
        // A guest that stands still answers nothing.
        let mut done = self.must_run().await;
        for _ in 0..TRIES {
            if done.is_ok() {
                done = self.stop_fio().await;
                // The file can go while somebody writes to it.
                done = self.remove_file().await.and(done);
            }
            match &done {
                Err(error) if is_lapse(error) => done = self.must_run().await,
                _ => break,
            }
        }
        self.let_go();
        let why = done.err().map(|error| format!(" ({error})")).unwrap_or_default();
        let mut left = vec![];
        if let Some((since, limit)) = self.runs {
            let seconds = limit.saturating_sub(since.elapsed()).as_secs();
            left.push(format!("fio in the guest, which ends by itself within {seconds} s of its time"));
        }
        let file = &self.file;
        match self.made {
            Made::No => {}
            Made::Yes => left.push(format!("the file {file} in the guest: remove it there{why}")),
            Made::Perhaps => left.push(format!("perhaps an empty file {file} in the guest{why}")),
        }
        left
    }

    async fn must_run(&self) -> Result<(), GuestError> {
        match self.vm.run_state().await.map_err(GuestError::Machine)?.as_str() {
            RUNNING => Ok(()),
            state => Err(GuestError::NotRunning(state.to_owned())),
        }
    }

    async fn channel(&mut self) -> Result<&mut Channel, GuestError> {
        let channel = match self.channel.take() {
            Some(channel) => channel,
            None => {
                let since = Instant::now();
                loop {
                    match self.vm.agent().await {
                        // A session has let it go a moment ago, or we have.
                        Err(AgentAbsence::Taken(_)) if since.elapsed() < FREE_WITHIN => sleep(LOOK_EVERY).await,
                        Ok(channel) => break channel,
                        Err(absence) => {
                            self.must_run().await?;
                            return Err(match absence {
                                AgentAbsence::Taken(_) => GuestError::AgentTaken(absence),
                                absence => GuestError::NoAgent(absence),
                            });
                        }
                    }
                }
            }
        };
        Ok(self.channel.insert(channel))
    }

    /// What an agent's error means.
    async fn explained(&self, error: AgentError) -> GuestError {
        match error {
            AgentError::Refused { ref command, .. } if error.is_disabled() => GuestError::Blocked(command.clone()),
            AgentError::Refused { .. } => error.into(),
            // It does not answer, or its channel is gone.
            _ => self.must_run().await.err().unwrap_or(GuestError::Agent(error)),
        }
    }

    async fn start(&mut self, program: &str, arguments: &[&str], limit: Duration) -> Result<Started, GuestError> {
        let at = Instant::now();
        match self.channel().await?.execute(program, arguments, b"").await {
            Ok(number) => Ok(Started { number, at, limit }),
            Err(error) => Err(self.explained(error).await),
        }
    }

    async fn status(&mut self, number: i64) -> Result<Option<Executed>, GuestError> {
        match self.channel().await?.executed(number).await {
            Ok(ended) => Ok(ended),
            Err(error) => Err(self.explained(error).await),
        }
    }

    async fn ended(&mut self, what: &str, started: Started, grace: Duration) -> Result<Executed, GuestError> {
        let limit = started.limit + grace;
        loop {
            if let Some(ended) = self.look_at(what, started, limit).await? {
                return Ok(ended);
            }
            self.pause(LOOK_EVERY).await?;
        }
    }

    /// What a program has come to, if it has ended; an error when it should have.
    async fn look_at(&mut self, what: &str, started: Started, limit: Duration) -> Result<Option<Executed>, GuestError> {
        match self.status(started.number).await {
            Ok(Some(ended)) => return Ok(Some(ended)),
            Ok(None) => {}
            Err(error) if is_lapse(&error) => {}
            Err(error) => return Err(error),
        }
        if started.at.elapsed() > limit {
            self.must_run().await?;
            return Err(GuestError::Hangs { what: what.to_owned(), seconds: limit.as_secs() });
        }
        Ok(None)
    }

    /// Runs a small program to its end. Not interrupted: it is short.
    async fn run(&mut self, program: &str, arguments: &[&str]) -> Result<Executed, GuestError> {
        let started = self.start(program, arguments, SHORT).await?;
        loop {
            if let Some(ended) = self.look_at(program, started, SHORT).await? {
                return Ok(ended);
            }
            sleep(LOOK_EVERY / 4).await;
        }
    }

    async fn shell(&mut self, script: &str, arguments: &[&str]) -> Result<Executed, GuestError> {
        let all = [&["-c", script, "livebackup"], arguments].concat();
        self.run("sh", &all).await.map_err(|error| match error {
            GuestError::Agent(AgentError::Refused { desc, .. }) => GuestError::NoProgram { program: "sh", why: desc },
            error => error,
        })
    }
}

/// Whether the agent has only not answered yet; the guest runs.
fn is_lapse(error: &GuestError) -> bool {
    use GuestError::{Agent, NoAgent};
    matches!(error, Agent(AgentError::Late { .. } | AgentError::Silent { .. }) | NoAgent(AgentAbsence::Silent(_)))
}

/// What is free by `df -Pk`; nothing where that says nothing.
fn free_bytes(df: &[u8]) -> Option<u64> {
    let text = String::from_utf8_lossy(df);
    let kib: u64 = text.lines().last()?.split_whitespace().nth(3)?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_space_is_read() {
        let df = "Filesystem     1024-blocks  Used Available Capacity Mounted on\n/dev/vda1         10255636 6 2048    61% /\n";
        assert_eq!(free_bytes(df.as_bytes()), Some(2 << 20));
        for none in ["", "nonsense", "a b c d", "1 2 3 99999999999999999999"] {
            assert_eq!(free_bytes(none.as_bytes()), None, "{none}");
        }
    }
}
