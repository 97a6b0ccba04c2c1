//! Quiet: databases are held and file systems stand still around the instant, as far as the policies ask and the guest can.
//!
//! ```text
//!  prepare (guest runs: agent found, guest asked, trim) ─► enter ═════════ instant ═════════ leave ─► evidence
//!                                                            │                                 │
//!     hooks ─► holds prepared, guest flushed, guardian ─► holds locked ─► debt, freeze    thaw ─► release ─► hooks
//! ```
//!
//! * Whatever is slow comes before the first lock, and the locks come all at once: a database's writers wait for the freeze
//!   and the instant, and for no other database.
//! * What fails becomes a reason in the [`Evidence`], and with [`Policy::Require`] a failure of the backup.
//! * `leave` is called whatever happened since `enter`; it waits for the guest for a bounded time only, and what is not
//!   over then is tried on by the lease's own task.
//! * **A crash leaves** the debt file `owed-thaw`, with the agent's address and a token; the guardian pays it, else the
//!   next start ([`thaw_left_over`]). It needs no fsync, as no debt does. A token that changed is another freeze's debt.

use std::path::Path;
use std::time::{Duration, Instant};

use futures_util::future::{join, join_all};
use serde::{Deserialize, Serialize};

use super::guardian::Guardian;
use super::undo::{Debt, Debts};
use super::{agent, internal};
use crate::agent::{Address, Channel};
use crate::fault;
use crate::grade::{Evidence, Frozen, Held, Policy, Trimmed};
use crate::hooks::freeze::{self, DEFAULT_LEASE, Lease, Wish};
use crate::hooks::guest_hold;
use crate::hooks::hold::{self, Hold};
use crate::hooks::program::{self, About, Hook, Phase};
use crate::machine::Disk;
use crate::monitor::{self, Monitor};
use crate::units::PackId;
use crate::wire::message::{Failure, FailureCode};

/// How long the instant's end waits for a thaw: then the backup goes on, and the thaw too.
const THAW_WITHIN: Duration = Duration::from_secs(10);
/// How long a start waits for the thaw of a guest that was left frozen.
const LEFT_OVER_WITHIN: Duration = Duration::from_secs(10);
/// How long an agent may take to answer that has just been there.
const AGENT_WITHIN: Duration = Duration::from_secs(5);
/// How long the guest may take to write out what it has in memory, before anything is held.
const FLUSH_WITHIN: Duration = Duration::from_secs(20);
/// How long the guest may take to trim its file systems: a large one on a slow disk takes minutes.
const TRIM_WITHIN: Duration = Duration::from_secs(300);
/// Longest debt file that is read.
const MAX_OWED_BYTES: u64 = 8192;

/// How a VM is made quiet.
#[derive(Clone, Debug)]
pub struct QuietOptions {
    /// Where the agent is; found through QEMU when absent.
    pub agent: Option<Address>,
    /// Whether file systems are frozen.
    pub freeze: Policy,
    /// Only these mount points; all when empty.
    pub mount_points: Vec<String>,
    /// For how long at most.
    pub lease: Duration,
    /// Whether the guest's file systems are trimmed before a disk is read whole.
    pub trim: Policy,
    /// Databases that are held.
    pub holds: Vec<Hold>,
    /// Programs of the operator around the sidecar's phases.
    pub hooks: Vec<Hook>,
}

impl Default for QuietOptions {
    fn default() -> Self {
        let (freeze, lease, trim) = (Policy::default(), DEFAULT_LEASE, Policy::Never);
        Self { agent: None, freeze, mount_points: vec![], lease, trim, holds: vec![], hooks: vec![] }
    }
}

/// The content of the file of [`Debt::Thaw`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Owed {
    agent: Address,
    token: String,
}

/// One backup's quiet.
#[derive(Debug)]
pub struct Quiet {
    monitor: Monitor,
    debts: Debts,
    options: QuietOptions,
    agent: Option<Channel>,
    /// Why there is no agent to ask.
    no_agent: String,
    /// Where the agent was.
    address: Option<Address>,
    about: About,
    /// Whether the instant's hooks have to be run.
    entered: bool,
    held_here: Vec<hold::Taken>,
    held_in_guest: Vec<guest_hold::Taken>,
    /// Owes the thaw that there may be; started before the first lock.
    guardian: Option<Guardian>,
    lease: Option<Lease>,
    evidence: Evidence,
}

fn not_quiet(reason: &str) -> Failure {
    Failure::new(
        FailureCode::NotQuiet,
        format!("the guest's file systems were not frozen, which was required: {reason}"),
    )
}

fn not_held(held: &Held) -> Failure {
    let reason = held.failed.as_deref().unwrap_or_default();
    Failure::new(FailureCode::NotQuiet, format!("the hold {:?}, which is required, did not hold: {reason}", held.name))
}

impl Quiet {
    /// Everything slow, while the guest runs. `whole` says whether a disk will be read whole.
    pub async fn prepare(
        monitor: &Monitor,
        sockets: &Path,
        options: QuietOptions,
        about: About,
        disks: &[&Disk],
        whole: bool,
    ) -> Result<Self, Failure> {
        let mut this = Self {
            monitor: monitor.clone(),
            debts: Debts::new(sockets),
            agent: None,
            no_agent: String::new(),
            address: None,
            about,
            entered: false,
            held_here: vec![],
            held_in_guest: vec![],
            guardian: None,
            lease: None,
            evidence: Evidence::default(),
            options,
        };
        match this.find_agent(disks).await {
            Ok(agent) => {
                this.address = Some(agent.address().clone());
                this.agent = Some(agent);
            }
            Err(reason) if this.options.freeze == Policy::Require => return Err(not_quiet(&reason)),
            Err(reason) => this.no_agent = reason,
        }
        if whole && this.options.trim != Policy::Never {
            this.trim().await?;
        }
        Ok(this)
    }

    /// Lets the guest tell its disks what is free, so that it need not be read.
    async fn trim(&mut self) -> Result<(), Failure> {
        let start = Instant::now();
        let trimmed = match &mut self.agent {
            Some(agent) => agent.trim(TRIM_WITHIN).await.map_err(|e| (e.to_string(), !e.is_refusal())),
            None => Err((self.no_agent.clone(), false)),
        };
        let took_us = start.elapsed().as_micros() as u64;
        let (file_systems, failed) = match trimmed {
            Ok(file_systems) => (file_systems as u64, None),
            Err((why, silent)) => {
                if let Some(address) = self.address.as_ref().filter(|_| silent) {
                    // It may be at it still; then nothing can be asked of it.
                    let again = Channel::open(address, AGENT_WITHIN).await;
                    self.no_agent = format!("it does not answer since it was told to trim: {why}");
                    self.agent = again.ok();
                }
                (0, Some(why))
            }
        };
        if let Some(why) = failed.as_ref().filter(|_| self.options.trim == Policy::Require) {
            let what = format!("the guest's file systems were not trimmed, which was required: {why}");
            return Err(Failure::new(FailureCode::NotQuiet, what));
        }
        self.evidence.trimmed = Some(Trimmed { file_systems, took_us, failed });
        Ok(())
    }

    async fn find_agent(&mut self, disks: &[&Disk]) -> Result<Channel, String> {
        let trims = self.options.trim != Policy::Never;
        if self.options.freeze == Policy::Never
            && !trims
            && !self.options.holds.iter().any(|h| h.place == hold::Place::Guest)
        {
            return Err("it is switched off (freeze = never)".into());
        }
        let state = monitor::run_state(&self.monitor).await.map_err(|e| e.to_string())?;
        if state != "running" {
            return Err(format!("the guest does not run (it is in the state {state:?})"));
        }
        if self.debts.owed(Debt::Thaw) {
            return Err("the guest may be frozen by an earlier backup still, whose thaw is being tried".into());
        }
        let mut agent = agent::open(&self.monitor, self.options.agent.as_ref()).await.map_err(|e| e.to_string())?;
        let guest = agent::guest(&self.monitor, &mut agent, disks).await.map_err(|e| e.to_string())?;
        self.evidence.guest = Some(guest);
        Ok(agent)
    }

    /// Makes the guest quiet. On an error too, [`Quiet::leave`] has to be called.
    pub async fn enter(&mut self) -> Result<(), Failure> {
        let Evidence { guest, stopped_us, trimmed, .. } = std::mem::take(&mut self.evidence);
        self.evidence = Evidence { guest, stopped_us, trimmed, ..Evidence::default() };
        self.entered = true;
        let hooks = program::before(&self.options.hooks, Phase::Instant, &self.about).await;
        hooks.map_err(|why| Failure::new(FailureCode::Refused, why))?;
        self.hold().await?;
        if let Err(reason) = self.freeze().await {
            if self.options.freeze == Policy::Require {
                return Err(not_quiet(&reason));
            }
            tracing::info!("file systems are not frozen: {reason}");
            self.evidence.reasons.push(format!("file systems were not frozen: {reason}"));
        }
        Ok(())
    }

    /// Takes all holds, wherever they are: prepares all of them, then locks all of them.
    async fn hold(&mut self) -> Result<(), Failure> {
        let holds = std::mem::take(&mut self.options.holds);
        let (guest, host): (Vec<_>, Vec<_>) = holds.iter().partition(|h| h.place == hold::Place::Guest);
        let agent = &mut self.agent;
        let no_agent = |hold: &&Hold| {
            let (name, failed) = (hold.name.clone(), Some(self.no_agent.clone()));
            Err(Held { name, failed, ..Held::default() })
        };
        let in_guest = async {
            match agent {
                _ if guest.is_empty() => vec![],
                Some(agent) => guest_hold::prepare(agent, &guest).await,
                None => guest.iter().map(no_agent).collect(),
            }
        };
        let (here, in_guest) = join(join_all(host.iter().map(|hold| hold::prepare(hold))), in_guest).await;
        let here = self.sort_out(here);
        self.held_in_guest = self.sort_out(in_guest);
        self.options.holds = holds;
        self.check_holds()?;
        self.get_ready_to_freeze().await;
        self.lock(here).await;
        fault::point("quiet.held");
        self.check_holds()
    }

    /// Keeps what went well; the rest is evidence.
    fn sort_out<T>(&mut self, results: Vec<Result<T, Held>>) -> Vec<T> {
        let mut good = vec![];
        for result in results {
            match result {
                Ok(one) => good.push(one),
                Err(held) => self.evidence.holds.push(held),
            }
        }
        good
    }

    async fn lock(&mut self, here: Vec<hold::Prepared>) {
        let Self { agent, held_in_guest, .. } = self;
        let in_guest = async {
            match agent {
                Some(agent) if !held_in_guest.is_empty() => match guest_hold::lock(agent, held_in_guest).await {
                    Ok(not) if not.is_empty() => vec![],
                    Ok(not) => guest_hold::release(agent, not).await,
                    Err(why) => held_in_guest.drain(..).map(|taken| taken.abandon(&why)).collect(),
                },
                _ => vec![],
            }
        };
        let (here, failed) = join(join_all(here.into_iter().map(hold::Prepared::lock)), in_guest).await;
        self.held_here = self.sort_out(here);
        self.evidence.holds.extend(failed);
    }

    /// What can be done for the freeze while nobody waits: the guest writes out what it has in memory, and the guardian is
    /// there.
    async fn get_ready_to_freeze(&mut self) {
        let Some(agent) = self.agent.as_mut().filter(|_| self.options.freeze != Policy::Never) else { return };
        agent::flush(agent, FLUSH_WITHIN).await;
        self.guardian = Guardian::spawn(self.monitor.address()).ok();
    }

    /// Whether all that are required hold, as far as it is known.
    fn check_holds(&self) -> Result<(), Failure> {
        let required = |held: &&Held| {
            let of = |hold: &Hold| hold.name == held.name && hold.policy == Policy::Require;
            held.failed.is_some() && self.options.holds.iter().any(of)
        };
        self.evidence.holds.iter().find(required).map_or(Ok(()), |held| Err(not_held(held)))
    }

    async fn freeze(&mut self) -> Result<(), String> {
        if self.options.freeze == Policy::Never {
            return Err("it is switched off (freeze = never)".into());
        }
        let Some(agent) = self.agent.take() else { return Err(self.no_agent.clone()) };
        let failed = |e: std::io::Error| format!("the debt of its thaw cannot be written down: {e}");
        let owed = Owed { agent: agent.address().clone(), token: PackId::random().to_string() };
        let text = serde_json::to_string(&owed).map_err(|e| failed(e.into()))?;
        let ready = self.guardian.take().map(Ok);
        let mut guardian = ready.unwrap_or_else(|| Guardian::spawn(self.monitor.address())).map_err(failed)?;
        self.debts.owe_with(Debt::Thaw, &text).map_err(failed)?;
        if let Err(e) = guardian.owe(Debt::Thaw, &self.debts.path(Debt::Thaw)) {
            self.debts.paid(Debt::Thaw);
            return Err(failed(e));
        }
        let debts = self.debts.clone();
        let thawed = move || {
            debts.paid(Debt::Thaw);
            guardian.paid();
        };
        let wish = Wish { mount_points: self.options.mount_points.clone(), lease: self.options.lease };
        match freeze::freeze(agent, wish, thawed).await {
            Ok(lease) => {
                self.lease = Some(lease);
                Ok(())
            }
            Err(not) => {
                self.agent = not.agent.map(|agent| *agent);
                if self.agent.is_none() {
                    self.no_agent.clone_from(&not.reason);
                }
                Err(not.reason)
            }
        }
    }

    /// Lets the guest go.
    pub async fn leave(&mut self, result: Result<(), String>) {
        if let Some(lease) = self.lease.take() {
            self.thaw(lease).await;
        }
        self.release().await;
        if std::mem::take(&mut self.entered) {
            // Its warnings are in the log; what it is told is what became of the instant.
            program::after(&self.options.hooks, Phase::Instant, &self.about, result).await;
        }
    }

    async fn release(&mut self) {
        if self.agent.is_none()
            && !self.held_in_guest.is_empty()
            && let Some(address) = &self.address
        {
            // The freeze has used it up.
            self.agent = Channel::open(address, AGENT_WITHIN).await.ok();
        }
        let (here, in_guest) = (std::mem::take(&mut self.held_here), std::mem::take(&mut self.held_in_guest));
        let agent = &mut self.agent;
        let in_guest = async {
            match agent {
                _ if in_guest.is_empty() => vec![],
                Some(agent) => guest_hold::release(agent, in_guest).await,
                None => in_guest.into_iter().map(|t| t.abandon("the agent does not answer any more")).collect(),
            }
        };
        let (here, in_guest) = join(join_all(here.into_iter().map(hold::Taken::release)), in_guest).await;
        self.evidence.holds.extend(here.into_iter().chain(in_guest));
        for held in self.evidence.holds.iter().filter(|held| held.failed.is_some()) {
            let words = held.failed.as_deref().unwrap_or_default();
            self.evidence.reasons.push(format!("the hold {:?} did not hold: {words}", held.name));
        }
    }

    async fn thaw(&mut self, lease: Lease) {
        let file_systems = lease.file_systems;
        let ended = lease.end(THAW_WITHIN).await;
        self.agent = ended.agent;
        if self.agent.is_none() {
            self.no_agent = "its thaw was not confirmed".into();
        }
        let frozen_us = ended.frozen.as_micros() as u64;
        match ended.held {
            Ok(()) if file_systems == 0 => {
                self.evidence
                    .reasons
                    .push("the agent froze no file system: the guest has none that can be frozen".into());
            }
            Ok(()) => {
                let mount_points = self.options.mount_points.clone();
                self.evidence.frozen = Some(Frozen { file_systems, mount_points, frozen_us });
            }
            Err(reason) => {
                tracing::warn!(frozen_us, "the freeze does not count: {reason}");
                self.evidence.reasons.push(format!("the freeze does not count: {reason}"));
            }
        }
    }

    /// Whether what was reached is enough. Call it after [`Quiet::leave`].
    pub fn check(&self) -> Result<(), Failure> {
        self.check_holds()?;
        if self.options.freeze == Policy::Require && self.evidence.frozen.is_none() {
            return Err(not_quiet(&self.evidence.reasons.join("; ")));
        }
        Ok(())
    }

    /// What became of the holds.
    pub fn holds(&self) -> &[Held] {
        &self.evidence.holds
    }

    /// What was reached.
    pub fn evidence(self) -> Evidence {
        self.evidence
    }
}

fn read_owed(file: &Path) -> Option<Owed> {
    if std::fs::metadata(file).ok()?.len() > MAX_OWED_BYTES {
        return None;
    }
    serde_json::from_str(&std::fs::read_to_string(file).ok()?).ok()
}

/// Pays the debt in this file, however long it takes: until the guest is thawed, QEMU is gone, or another has paid.
pub async fn pay_thaw(file: &Path) {
    let Some(owed) = read_owed(file) else { return };
    let still = || read_owed(file).as_ref() == Some(&owed);
    if freeze::thaw_until_done(&owed.agent, None, still).await && still() {
        let _ = std::fs::remove_file(file);
    }
}

/// Thaws a guest that a sidecar left frozen. Waits a moment for that; if it takes longer, it goes on beside us, and
/// after us. Says what it did, in words, if there was anything to do.
pub async fn thaw_left_over(monitor: &Monitor, debts: &Debts) -> Result<Option<String>, Failure> {
    if !debts.owed(Debt::Thaw) {
        return Ok(None);
    }
    let file = debts.path(Debt::Thaw);
    if read_owed(&file).is_none() {
        tracing::error!("the guest may be frozen by us, and {} does not say where its agent is", file.display());
        return Ok(None);
    }
    let mut guardian = Guardian::spawn(monitor.address()).map_err(internal)?;
    guardian.owe(Debt::Thaw, &file).map_err(internal)?;
    let paying = tokio::spawn(async move {
        pay_thaw(&file).await;
        guardian.paid();
    });
    Ok(Some(match tokio::time::timeout(LEFT_OVER_WITHIN, paying).await {
        Ok(_) => "thawed the guest, which had been frozen".to_owned(),
        Err(_) => {
            tracing::error!("the guest was left FROZEN and its agent does not answer; the thaw is tried on and on");
            "are still trying to thaw the guest, which had been frozen".to_owned()
        }
    }))
}
