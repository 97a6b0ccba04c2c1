//! Sidecar: who has the VM, in this process or at the other end of a connection.

use crate::machine::{FoundDisk, Machine};
use crate::vm::Vm;
use crate::wire::boot_file::{Piece, Wanted};
use crate::wire::message::{
    Begin, Begun, Check, Estimated, Failure, FailureCode, Reply, Request, Session, VmStatus, Waiting,
};
use crate::wire::{Client, Door};

/// Who has the VM.
#[derive(Debug)]
pub enum Sidecar {
    /// This process.
    Local(Vm),
    /// A `livebackup serve`, and the VM's name there.
    Remote(Box<Client>, String),
}

fn odd(request: &str) -> Failure {
    Failure::new(FailureCode::Protocol, format!("the server answered something else to {request}"))
}

/// How to come back to a sidecar whose connection a session has used up.
#[derive(Clone, Debug)]
pub enum Again {
    /// This process has the VM.
    Local(Vm),
    /// To be connected to again.
    Remote(Box<Door>, String),
}

impl Again {
    /// Another connection, beside a session.
    pub async fn beside(self) -> Result<Sidecar, Failure> {
        match self {
            Self::Local(vm) => Ok(Sidecar::Local(vm)),
            remote => remote.open().await,
        }
    }

    /// Comes back. In this process, the last session is waited for.
    pub async fn open(self) -> Result<Sidecar, Failure> {
        match self {
            Self::Local(vm) => {
                vm.idle().await;
                Ok(Sidecar::Local(vm))
            }
            Self::Remote(door, vm) => Ok(Sidecar::Remote(Box::new(door.enter().await?), vm)),
        }
    }
}

impl Sidecar {
    /// How to come back after a session; `None` over a stream that somebody else made.
    pub fn again(&self) -> Option<Again> {
        match self {
            Self::Local(vm) => Some(Again::Local(vm.clone())),
            Self::Remote(client, vm) => Some(Again::Remote(Box::new(client.door()?.clone()), vm.clone())),
        }
    }

    /// The VM's name: under it the points are kept.
    pub fn vm(&self) -> &str {
        match self {
            Self::Local(vm) => vm.name(),
            Self::Remote(_, vm) => vm,
        }
    }

    /// The VM, when this process has it.
    pub fn here(&self) -> Option<Vm> {
        match self {
            Self::Local(vm) => Some(vm.clone()),
            Self::Remote(..) => None,
        }
    }

    /// The VM's definition and all its guest block devices.
    pub async fn disks(&mut self) -> Result<(Machine, Vec<FoundDisk>), Failure> {
        match self {
            Self::Local(vm) => vm.disks().await,
            Self::Remote(client, vm) => match client.request(Request::Disks { vm: vm.clone() }).await? {
                Reply::Disks { machine, disks } => Ok((machine, disks)),
                _ => Err(odd("`disks`")),
            },
        }
    }

    /// What stands in the way of a good backup.
    pub async fn doctor(&mut self) -> Result<Vec<Check>, Failure> {
        match self {
            Self::Local(vm) => Ok(vm.doctor().await),
            Self::Remote(client, vm) => match client.request(Request::Doctor { vm: vm.clone() }).await? {
                Reply::Doctor { checks } => Ok(checks),
                _ => Err(odd("`doctor`")),
            },
        }
    }

    /// What a backup would read.
    pub async fn estimate(&mut self, begin: Begin) -> Result<Vec<Estimated>, Failure> {
        match self {
            Self::Local(vm) => vm.estimate(begin).await,
            Self::Remote(client, _) => match client.request(Request::Estimate(begin)).await? {
                Reply::Estimate { disks } => Ok(disks),
                _ => Err(odd("`estimate`")),
            },
        }
    }

    /// State of the VM.
    pub async fn status(&mut self) -> Result<VmStatus, Failure> {
        match self {
            Self::Local(vm) => Ok(vm.status().await),
            Self::Remote(client, vm) => match client.request(Request::Status { vm: Some(vm.clone()) }).await? {
                Reply::Status { vms } => vms.into_iter().next().ok_or_else(|| odd("`status`")),
                _ => Err(odd("`status`")),
            },
        }
    }

    /// A piece of a file that the machine cannot start without.
    pub async fn boot_file(&mut self, wanted: Wanted) -> Result<Piece, Failure> {
        match self {
            Self::Local(vm) => vm.boot_file(wanted).await,
            Self::Remote(client, _) => match client.request(Request::BootFile(wanted)).await? {
                Reply::BootFile(piece) => Ok(piece),
                _ => Err(odd("`boot-file`")),
            },
        }
    }

    /// Removes all that the sidecar put into the VM, and with `all` what others have left. Says what was removed, and what
    /// is still there of others.
    pub async fn detach(&mut self, all: bool) -> Result<(Vec<String>, Vec<String>), Failure> {
        match self {
            Self::Local(vm) => vm.detach(all).await,
            Self::Remote(client, vm) => match client.request(Request::Detach { vm: vm.clone(), all }).await? {
                Reply::Detached { removed, left } => Ok((removed, left)),
                _ => Err(odd("`detach`")),
            },
        }
    }

    /// Goes on with a session that an earlier process has begun.
    pub async fn begin_again(self, begin: Begin, begun: &Begun) -> Result<Session, Failure> {
        match self {
            Self::Local(_) => Err(Failure::new(FailureCode::SessionGone, "no session of this process was lost")),
            Self::Remote(client, _) => client.begin_again(begin, begun).await,
        }
    }

    /// Gives up a session that an earlier process has begun. It may be gone.
    pub async fn leave(&mut self, begin: &Begin) {
        if let (Self::Remote(client, vm), Some(token)) = (self, begin.resume) {
            let left = client.request(Request::Leave { vm: vm.clone(), token }).await;
            tracing::debug!(?left, "a killed backup's session was given up");
        }
    }

    /// Opens a session. Where another backup runs, its turn is waited for, if `begin` says so.
    pub async fn begin(self, begin: Begin) -> Result<Session, Failure> {
        match self {
            Self::Local(vm) => vm.begin(begin).await,
            Self::Remote(client, _) => {
                let say = |waiting: &Waiting| tracing::warn!(ahead = waiting.ahead, "waiting: {}", waiting.why);
                client.begin_when_free(begin, say).await
            }
        }
    }
}
