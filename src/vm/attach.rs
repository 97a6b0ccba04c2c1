//! Attaching: locks, left-overs, what this QEMU can do.

use std::sync::{Arc, Mutex as StdMutex};
use std::time::Instant;

use tokio::sync::{Mutex, watch};

use super::gauge::Gauge;
use super::names::Names;
use super::place::{self, Holder, Place, Taken};
use super::{AttachError, Inner, Vm, VmOptions, known, qemu_failed, quiet, undo};
use crate::checkpoint::QemuInstance;
use crate::machine::Machine;
use crate::monitor::{self, Address, Monitor, MonitorError, Process};
use crate::units::OwnerId;
use crate::wire::message::{Failure, FailureCode};

impl Vm {
    /// Connects, takes the locks, and takes out what a dead sidecar left.
    pub async fn attach(address: &Address, options: VmOptions) -> Result<Vm, AttachError> {
        let owner = place::owner(&options.state)?;
        let monitor_text = absolute(address);
        // Asked before connecting: the monitor may have one place only, and its holder sits there.
        if let Some(holder) = place::holder_of(&monitor_text) {
            return Err(held(Some(holder)));
        }
        let monitor = match Monitor::connect(address).await {
            Ok(monitor) => monitor,
            // Somebody of ours may have come a moment before: by now it says so.
            Err(error) => match (place::holder_of(&monitor_text), &error) {
                (Some(holder), _) => return Err(held(Some(holder))),
                (None, MonitorError::Taken { .. }) => {
                    return Err(Failure::new(FailureCode::Busy, error.to_string()).into());
                }
                (None, _) => return Err(qemu_failed(error).into()),
            },
        };
        let process = monitor.peer_process().ok_or_else(|| {
            Failure::new(
                FailureCode::Qemu,
                format!("the QEMU behind {address} is no process that can be seen here; run livebackup on its host, outside of containers"),
            )
        })?;
        let machine = monitor::machine(&monitor).await.map_err(qemu_failed)?;
        let name = options.name.clone().or_else(|| machine.name.clone()).or_else(|| machine.uuid.clone());
        let name = name.ok_or_else(|| {
            Failure::new(
                FailureCode::UnknownVm,
                "the virtual machine has neither -name nor -uuid: say with --vm what to call it",
            )
        })?;
        let holder = Holder {
            pid: std::process::id() as i32,
            monitor: monitor_text,
            vm: name.clone(),
            served_at: options.served_at.as_ref().map(place::served_text),
        };
        let place = place::take(&options.state, owner, &process, &holder).map_err(|taken| match taken {
            Taken::By(holder) => held(holder),
            Taken::Failure(failure) => failure.into(),
        })?;
        let vm = Self::settle_in(monitor, process, owner, name, machine, place, options).await?;
        Ok(vm)
    }

    async fn settle_in(
        monitor: Monitor,
        process: Process,
        owner: OwnerId,
        name: String,
        machine: Machine,
        place: Place,
        options: VmOptions,
    ) -> Result<Vm, Failure> {
        let names = Names::new(owner);
        let debts = undo::Debts::new(&place.sockets);
        // The guest first: what else was left does it no harm. A stopped one cannot thaw.
        let resumed = undo::resume(&monitor, &debts).await.map_err(qemu_failed)?;
        let thawed = quiet::thaw_left_over(&monitor, &debts).await?;
        let mut removed = undo::remove_all(&monitor, &names, &place.sockets).await.map_err(Failure::from)?;
        removed.extend(resumed.then(|| "let the guest go on, which had been stopped".to_owned()));
        removed.extend(thawed);
        if !removed.is_empty() {
            tracing::warn!(vm = name, "took out what a session left that was killed: {}", removed.join(", "));
        }
        let Process { pid, start_time, boot_id } = process;
        let qemu = QemuInstance { pid, start_time, boot_id };
        let (capabilities, board) =
            known::capabilities(&monitor, &names, &qemu, &place.known).await.map_err(qemu_failed)?;
        let gauge = Gauge::new(&monitor, &names, &place.sockets, capabilities.latency_histogram);
        let inner = Inner {
            name,
            machine,
            bench_parts: (monitor, names, capabilities),
            qemu,
            options,
            gauge,
            place,
            session: Arc::new(Mutex::new(())),
            looked: StdMutex::default(),
            board: Mutex::new(board),
            progress: StdMutex::new(None),
            last: StdMutex::default(),
            held: Default::default(),
            tracking: StdMutex::default(),
            doubts: StdMutex::default(),
            sessions: watch::Sender::new(0),
            give_up: watch::Sender::new(None),
        };
        let vm = Vm { inner: Arc::new(inner) };
        vm.pay_quit().await?;
        if let Some(graph) = vm.carry_over().await? {
            *vm.looked() = Some((Instant::now(), graph));
        }
        Ok(vm)
    }
}

/// The monitor's address as every process of this host would write it.
pub fn absolute(address: &Address) -> String {
    match address {
        Address::Unix(path) => std::fs::canonicalize(path).unwrap_or_else(|_| path.clone()).display().to_string(),
        tcp => tcp.to_string(),
    }
}

fn held(holder: Option<Holder>) -> AttachError {
    match holder {
        Some(holder) => match holder.address() {
            Some(address) => AttachError::Served { address, vm: holder.vm },
            None => Failure::new(
                FailureCode::Busy,
                format!("process {} is working on VM {:?}; wait until it is done", holder.pid, holder.vm),
            )
            .into(),
        },
        None => Failure::new(
            FailureCode::Busy,
            "another livebackup is working on this virtual machine; wait until it is done",
        )
        .into(),
    }
}
