//! On demand: a VM whose monitor is ours only while somebody asks for something. QEMU serves one client a monitor, and another
//! program may need the same one.
//!
//! ```text
//!  let go ──(a request: bitmaps and log are as they were left)──► attached ──(its last user is done)──► let go
//!     │                                                              ▲
//!     └── somebody else has the monitor: it is waited for, at most 15 s, then the request fails and says so
//! ```
//!
//! A request holds the VM until it is answered, a session until its fleece is out of QEMU; requests that meet share it.
//! A backup that waits for its turn holds nothing. Between requests only what records stays in QEMU: bitmaps, and the
//! histograms of the guest's latency. So an epoch goes on from one attachment to the next as long as QEMU is the same;
//! another one is met as in every late attach.
//!
//! The VM is attached once at the service's start, to take out what a killed service left. At the service's end a running
//! session is waited for, as with a VM that stays attached.

use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, sleep, timeout_at};

use super::service::{Service, State};
use crate::monitor::Address;
use crate::vm::{AttachError, Vm, VmOptions, WeakVm};
use crate::wire::message::{Failure, FailureCode, LastSession};

/// How long a request waits for a monitor that somebody else has.
const ATTACH_WITHIN: Duration = Duration::from_secs(15);
/// Between two tries, where one does not wait by itself.
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// A VM that is attached on demand.
pub struct OnDemand {
    monitor: Address,
    options: VmOptions,
    /// Who attaches; the VM while somebody uses it.
    current: Mutex<WeakVm>,
    /// How the last session ended: an attachment forgets it.
    last: StdMutex<Option<LastSession>>,
}

impl OnDemand {
    /// A VM that nobody has asked for yet.
    pub fn new(monitor: Address, options: VmOptions) -> Self {
        Self { monitor, options, current: Mutex::default(), last: StdMutex::default() }
    }

    /// The VM, if it is attached now.
    pub async fn attached(&self) -> Option<Vm> {
        // While somebody attaches it is not.
        self.current.try_lock().ok()?.upgrade()
    }

    /// The VM, attached. It is let go when the last of these is dropped.
    ///
    /// # Errors
    /// Busy where somebody else has the monitor for too long; else what is in the way.
    pub async fn attach(&self) -> Result<Vm, Failure> {
        let deadline = Instant::now() + ATTACH_WITHIN;
        let Ok(mut current) = timeout_at(deadline, self.current.lock()).await else {
            return Err(Failure::new(
                FailureCode::Busy,
                "other requests wait for the virtual machine's monitor: try again later",
            ));
        };
        if let Some(vm) = current.upgrade() {
            return Ok(vm);
        }
        loop {
            let failure = match Vm::attach(&self.monitor, self.options.clone()).await {
                Ok(vm) => {
                    *current = vm.downgrade();
                    return Ok(vm);
                }
                // The one that is being let go by another thread of ours.
                Err(AttachError::Served { .. }) => Failure::new(
                    FailureCode::Busy,
                    "another service of this host has the virtual machine; ask there, or wait until it is done",
                ),
                Err(AttachError::Failure(failure)) => failure,
            };
            if failure.code != FailureCode::Busy || Instant::now() >= deadline {
                return Err(failure);
            }
            sleep(TRY_AGAIN_AFTER).await;
        }
    }

    /// Notes how a session ended.
    pub fn note_last(&self, vm: &Vm) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = vm.last();
    }

    /// How the last session ended.
    pub fn last(&self) -> Option<LastSession> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Keeps a VM that is attached on demand, for the service's life.
pub async fn keep(service: Service, name: String, vm: OnDemand, mut stop: watch::Receiver<bool>) {
    let vm = Arc::new(vm);
    service.set(&name, State::OnDemand(vm.clone()));
    match vm.attach().await {
        Ok(_) => tracing::info!(vm = name, "can be attached; it is let go until somebody asks for it"),
        Err(failure) => tracing::warn!(vm = name, "cannot be attached now: {failure}"),
    }
    let _ = stop.wait_for(|stop| *stop).await;
    service.forget(&name);
    // A session's task holds the VM until its fleece is out.
    if let Some(vm) = vm.current.lock().await.upgrade() {
        vm.idle().await;
    }
}
