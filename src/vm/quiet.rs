//! Quiet: databases are held and file systems stand still around the instant, as far as the policies ask and the guest can.
//!
//! ```text
//!  prepare (guest runs: agent found, guest asked) ─► enter ═════════ instant ═════════ leave ─► evidence
//!                                                      │                                 │
//!                             hooks ─► holds ─► debt, guardian, freeze    thaw, debt struck out ─► release ─► hooks
//! ```
//!
//! * What fails becomes a reason in the [`Evidence`], and with [`Policy::Require`] a failure of the backup.
//! * `leave` is called whatever happened since `enter`; it waits for the guest for a bounded time only, and what is not
//!   over then is tried on by the lease's own task.
//! * **A crash leaves** the debt file `owed-thaw`, with the agent's address and a token; the guardian pays it, else the
//!   next start ([`thaw_left_over`]). It needs no fsync, as no debt does. A token that changed is another freeze's debt.

use std::path::Path;
use std::time::Duration;

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};

use super::guardian::Guardian;
use super::undo::{Debt, Debts};
use super::{agent, internal};
use crate::agent::{Address, Channel};
use crate::fault;
use crate::grade::{Evidence, Frozen, Held, Policy};
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
    /// Databases that are held.
    pub holds: Vec<Hold>,
    /// Programs of the operator around the sidecar's phases.
    pub hooks: Vec<Hook>,
}

impl Default for QuietOptions {
    fn default() -> Self {
        let (freeze, lease) = (Policy::default(), DEFAULT_LEASE);
        Self { agent: None, freeze, mount_points: vec![], lease, holds: vec![], hooks: vec![] }
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
    held: Vec<Holding>,
    lease: Option<Lease>,
    evidence: Evidence,
}

/// A hold that holds.
#[derive(Debug)]
enum Holding {
    Host(String, hold::Taken),
    Guest(Box<guest_hold::Taken>),
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
    /// Everything slow, while the guest runs.
    pub async fn prepare(
        monitor: &Monitor,
        sockets: &Path,
        options: QuietOptions,
        about: About,
        disks: &[&Disk],
    ) -> Result<Self, Failure> {
        let mut this = Self {
            monitor: monitor.clone(),
            debts: Debts::new(sockets),
            agent: None,
            no_agent: String::new(),
            address: None,
            about,
            entered: false,
            held: vec![],
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
        Ok(this)
    }

    async fn find_agent(&mut self, disks: &[&Disk]) -> Result<Channel, String> {
        if self.options.freeze == Policy::Never && !self.options.holds.iter().any(|h| h.place == hold::Place::Guest) {
            return Err("it is switched off (freeze = never)".into());
        }
        let state = monitor::run_state(&self.monitor).await.map_err(|e| e.to_string())?;
        if state != "running" {
            return Err(format!("the guest does not run (it is in the state {state:?})"));
        }
        if self.debts.owed(Debt::Thaw) {
            return Err("the guest may be frozen by an earlier backup still, whose thaw is being tried".into());
        }
        let mut agent = agent::open(&self.monitor, self.options.agent.as_ref()).await?;
        let guest = agent::guest(&self.monitor, &mut agent, disks).await.map_err(|e| e.to_string())?;
        self.evidence.guest = Some(guest);
        Ok(agent)
    }

    /// Makes the guest quiet. On an error too, [`Quiet::leave`] has to be called.
    pub async fn enter(&mut self) -> Result<(), Failure> {
        let Evidence { guest, stopped_us, .. } = std::mem::take(&mut self.evidence);
        self.evidence = Evidence { guest, stopped_us, ..Evidence::default() };
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

    /// Takes all holds: those of the host at once, those of the guest after them, one by one.
    async fn hold(&mut self) -> Result<(), Failure> {
        let holds = std::mem::take(&mut self.options.holds);
        let (guest, host): (Vec<_>, Vec<_>) = holds.iter().partition(|h| h.place == hold::Place::Guest);
        let taken = join_all(host.iter().map(|hold| hold::take(hold))).await;
        for (hold, taken) in host.iter().zip(taken) {
            match taken {
                Ok(taken) => self.held.push(Holding::Host(hold.name.clone(), taken)),
                Err(held) => self.evidence.holds.push(held),
            }
        }
        for hold in guest {
            let taken = match &mut self.agent {
                Some(agent) => guest_hold::take(agent, hold).await,
                None => {
                    let (name, failed) = (hold.name.clone(), Some(self.no_agent.clone()));
                    Err(Held { name, failed, ..Held::default() })
                }
            };
            match taken {
                Ok(taken) => self.held.push(Holding::Guest(Box::new(taken))),
                Err(held) => self.evidence.holds.push(held),
            }
        }
        self.options.holds = holds;
        fault::point("quiet.held");
        self.check_holds()
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
        let mut guardian = Guardian::spawn(self.monitor.address()).map_err(failed)?;
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
        let (mut of_host, mut of_guest) = (vec![], vec![]);
        for holding in self.held.drain(..) {
            match holding {
                Holding::Host(name, taken) => of_host.push(async move { taken.release(&name).await }),
                Holding::Guest(taken) => of_guest.push(taken),
            }
        }
        self.evidence.holds.extend(join_all(of_host).await);
        for taken in of_guest {
            if self.agent.is_none()
                && let Some(address) = &self.address
            {
                // The freeze has used it up.
                self.agent = Channel::open(address, AGENT_WITHIN).await.ok();
            }
            self.evidence.holds.push(match &mut self.agent {
                Some(agent) => taken.release(agent).await,
                None => taken.abandon("the agent does not answer any more"),
            });
        }
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
