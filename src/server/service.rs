//! What the service answers: the VMs that it knows, and each request given to the VM that it names, as far as the caller
//! sees it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::bad;
use super::grants::Caller;
use super::held::Held;
use super::on_demand::OnDemand;
use super::queue::{Place, Queue};
use crate::vm::Vm;
use crate::wire::message::{Begin, Failure, FailureCode, Reply, Request, Session, VmEntry, VmStatus};
use crate::wire::trunk::Trunks;
use crate::wire::{Answer, Timing};

/// How long a request waits for VMs that are being attached at the service's start.
const FIRST_ATTACH_WITHIN: Duration = Duration::from_secs(10);
/// How long an answer about a VM that is away waits for it to come back.
const COMES_BACK_WITHIN: Duration = Duration::from_secs(1);
/// What is said of such a VM.
const STARTING: &str = "being attached";
/// What is said of one that is attached on demand, while it is not.
const ON_DEMAND: &str = "not attached: that is done on demand";

/// A VM as the service sees it.
#[derive(Clone)]
pub enum State {
    Starting,
    Attached(Vm),
    OnDemand(Arc<OnDemand>),
    Away(String),
}

#[derive(Clone)]
pub struct Service {
    /// By name. A VM without a configured name is known by its monitor until it was attached.
    vms: Arc<Mutex<BTreeMap<String, State>>>,
    queue: Queue,
    held: Held,
    trunks: Trunks,
}

impl Service {
    /// A service that knows no VM yet, and holds lost clients' sessions for `grace`.
    pub fn new(max_sessions: usize, grace: Duration) -> Self {
        let held = Held::new(grace, Timing::default().session);
        Self { vms: Arc::default(), queue: Queue::new(max_sessions), held, trunks: Trunks::default() }
    }

    /// The sessions with several connections.
    pub fn trunks(&self) -> &Trunks {
        &self.trunks
    }

    /// Gives up all sessions that are held for clients to come back.
    pub fn give_up(&self) {
        self.held.give_up();
    }

    pub fn set(&self, name: &str, state: State) {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), state);
    }

    pub fn forget(&self, name: &str) {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    fn all(&self) -> BTreeMap<String, State> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Those that a caller sees.
    fn seen_by(&self, caller: &Caller) -> BTreeMap<String, State> {
        let mut all = self.all();
        all.retain(|vm, _| caller.sees(vm));
        all
    }

    /// A VM by its name. One that is being attached for the first time is waited for.
    async fn vm(&self, caller: &Caller, name: &str) -> Result<Vm, Failure> {
        let deadline = tokio::time::Instant::now() + FIRST_ATTACH_WITHIN;
        while self.all().values().any(|state| matches!(state, State::Starting))
            && tokio::time::Instant::now() < deadline
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // It may be coming back this very moment: its locks, by which clients find us, are taken before it can be used.
        let deadline = tokio::time::Instant::now() + COMES_BACK_WITHIN;
        while matches!(self.seen_by(caller).get(name), Some(State::Away(_))) && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let all = self.seen_by(caller);
        match all.get(name) {
            Some(State::Starting) => {
                Err(Failure::new(FailureCode::Qemu, format!("VM {name:?} is still being attached; try again")))
            }
            Some(State::Attached(vm)) => Ok(vm.clone()),
            Some(State::OnDemand(vm)) => vm.attach().await,
            Some(State::Away(why)) => {
                Err(Failure::new(FailureCode::Qemu, format!("VM {name:?} cannot be reached now: {why}")))
            }
            None => {
                let names: Vec<_> = all.into_keys().collect();
                Err(Failure::new(
                    FailureCode::UnknownVm,
                    match names.is_empty() {
                        true => format!("no VM {name:?} is served here to {}", caller.name()),
                        false => format!("no VM {name:?} is served here; there are: {}", names.join(", ")),
                    },
                ))
            }
        }
    }

    /// Answers a request of a caller.
    pub async fn answer(&self, caller: &Caller, request: Request) -> Result<Answer, Failure> {
        caller.check(&request)?;
        let reply = match request {
            Request::List => Reply::List { vms: self.list(caller).await },
            Request::Disks { vm } => {
                let (machine, disks) = self.vm(caller, &vm).await?.disks().await?;
                Reply::Disks { machine, disks }
            }
            Request::Status { vm } => Reply::Status { vms: self.status(caller, vm).await? },
            Request::Doctor { vm } => Reply::Doctor { checks: self.vm(caller, &vm).await?.doctor().await },
            Request::Estimate(begin) => {
                Reply::Estimate { disks: self.vm(caller, &begin.vm).await?.estimate(begin).await? }
            }
            Request::Begin(begin) => return self.begin(caller, begin).await,
            Request::Resume(resume) => {
                return Ok(Answer::Attached(Box::new(self.held.resume(caller, resume).await?)));
            }
            Request::Leave { vm, token } => self.held.leave(caller, &vm, token).map(|()| Reply::Left)?,
            Request::BootFile(wanted) => Reply::BootFile(self.vm(caller, &wanted.vm).await?.boot_file(wanted).await?),
            Request::Detach { vm, all } => {
                let (removed, left) = self.vm(caller, &vm).await?.detach(all).await?;
                Reply::Detached { removed, left }
            }
            Request::Ack(_) | Request::Received | Request::Join { .. } => {
                return Err(Failure::new(FailureCode::Protocol, "a message of a session without one"));
            }
        };
        Ok(Answer::Reply(reply))
    }

    /// Begins a session, or puts the caller into the queue.
    async fn begin(&self, caller: &Caller, mut begin: Begin) -> Result<Answer, Failure> {
        begin.resume = begin.resume.filter(|_| self.held.holds());
        // One that is attached on demand is not held by who waits.
        let known = match self.on_demand(caller, &begin.vm) {
            Some(_) => None,
            None => Some(self.vm(caller, &begin.vm).await?),
        };
        let name = known.as_ref().map_or(begin.vm.as_str(), Vm::name);
        let place = self.queue.join(name, caller.name())?;
        if place.runs() {
            let vm = match known {
                Some(vm) => vm,
                None => self.vm(caller, &begin.vm).await?,
            };
            return self.opened(caller, vm, begin, place).await;
        }
        let reason = place.reason();
        if !begin.wait {
            return Err(Failure::new(
                FailureCode::Busy,
                format!("{}; without --no-wait its turn is waited for", reason.why),
            ));
        }
        let (service, caller) = (self.clone(), caller.clone());
        let later = async move {
            place.turn().await;
            // QEMU may have been started anew meanwhile.
            let vm = service.vm(&caller, &begin.vm).await?;
            service.opened(&caller, vm, begin, place).await
        };
        Ok(Answer::Later(reason, Box::pin(later)))
    }

    /// Opens a session, which is known from then on if it can be resumed.
    async fn opened(&self, caller: &Caller, vm: Vm, begin: Begin, place: Place) -> Result<Answer, Failure> {
        let session = open(vm, begin.clone(), place, self.on_demand(caller, &begin.vm)).await?;
        match begin.resume {
            Some(token) => Ok(Answer::Attached(Box::new(self.held.attach(caller, token, begin, session)?))),
            None => Ok(Answer::Session(session)),
        }
    }

    /// A VM that is attached on demand.
    fn on_demand(&self, caller: &Caller, name: &str) -> Option<Arc<OnDemand>> {
        match self.seen_by(caller).remove(name) {
            Some(State::OnDemand(vm)) => Some(vm),
            _ => None,
        }
    }

    /// A VM's state, with what the queue knows.
    fn with_queue(&self, mut status: VmStatus) -> VmStatus {
        status.queue = self.queue.waiting_for(&status.vm);
        if let Some(session) = &mut status.session {
            session.client = self.queue.running(&status.vm).map(|running| running.client);
            session.lost = self.held.lost_since(&status.vm);
            session.connections = self.trunks.connections_of(&status.vm);
        }
        status
    }

    async fn list(&self, caller: &Caller) -> Vec<VmEntry> {
        let mut out = vec![];
        for (vm, state) in self.seen_by(caller) {
            let state = match state {
                State::Starting => STARTING.to_owned(),
                State::Attached(v) => v.status().await.state,
                State::OnDemand(_) => ON_DEMAND.to_owned(),
                State::Away(why) => why,
            };
            out.push(VmEntry { vm, state });
        }
        out
    }

    async fn status(&self, caller: &Caller, vm: Option<String>) -> Result<Vec<VmStatus>, Failure> {
        if let Some(name) = vm {
            let mut status = self.vm(caller, &name).await?.status().await;
            let last = || self.on_demand(caller, &name)?.last();
            status.last = status.last.take().or_else(last);
            return Ok(vec![self.with_queue(status)]);
        }
        let mut out = vec![];
        for (vm, state) in self.seen_by(caller) {
            out.push(match state {
                State::Attached(v) => self.with_queue(v.status().await),
                // Nobody is kept from the monitor for a look at all VMs.
                State::OnDemand(v) => match v.attached().await {
                    Some(attached) => self.with_queue(attached.status().await),
                    None => VmStatus { last: v.last(), ..unreached(vm, ON_DEMAND.to_owned()) },
                },
                State::Starting => unreached(vm, STARTING.to_owned()),
                State::Away(why) => unreached(vm, why),
            });
        }
        Ok(out)
    }
}

/// Opens a session in a task of its own, which keeps the place in the queue until the fleece is out of QEMU, also when the
/// caller has left.
async fn open(vm: Vm, begin: Begin, place: Place, on_demand: Option<Arc<OnDemand>>) -> Result<Session, Failure> {
    let (reply, answer) = oneshot::channel();
    tokio::spawn(async move {
        // A session that nobody hears of any more is dropped, and so ended.
        let _ = reply.send(vm.begin(begin).await);
        vm.idle().await;
        if let Some(on_demand) = on_demand {
            on_demand.note_last(&vm);
        }
        // Whose turn is next may attach.
        drop(vm);
        drop(place);
    });
    answer.await.map_err(|_| bad("the session's task ended before its instant; the log says why"))?
}

/// Status of a VM that is not attached.
fn unreached(vm: String, state: String) -> VmStatus {
    VmStatus { vm, state, qemu_version: None, session: None, disks: vec![], alarms: vec![], queue: vec![], last: None }
}
