//! The sidecar service: keeps VMs attached and serves clients.
//!
//! ```text
//!  listeners ── a task a connection ──► door: who is it? ──► requests, as granted ──► the VM that they name
//!  VM: attach ──► attached ──(monitor closed)──► wait ──► attach …     or on demand, see `on_demand`
//! ```
//!
//! Over TCP clients prove who they are by TLS; without it the service listens on the loopback and on unix sockets only.
//! A client that loses its connection in the middle of a backup may come back for a while, see `held`. Ending the service (SIGTERM, SIGINT) ends running sessions, takes every fleece out of QEMU, and leaves the bitmaps that record.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::select_all;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::block::BoxFuture;
use crate::vm::VmOptions;
use crate::wire::message::{Failure, FailureCode};
use crate::wire::packing::{How, Packing};
use crate::wire::rate::Limit;
use crate::wire::{Address, Common, Timing, serve_with};

mod config;
mod door;
pub mod grants;
mod held;
mod keep;
mod listen;
mod on_demand;
mod queue;
pub mod run;
mod service;

pub use config::Config;

use door::{Door, Incoming};
use keep::keep;
use listen::Listener;
use on_demand::OnDemand;
use service::Service;

/// Connections at once, at most.
const MAX_CONNECTIONS: usize = 256;

fn bad(message: impl Into<String>) -> Failure {
    Failure::new(FailureCode::Internal, message)
}

/// Where a process of this host finds the service best: a unix socket asks for no certificate.
fn nearest(listeners: &[Listener]) -> Option<Address> {
    let addresses = || listeners.iter().filter_map(Listener::address);
    addresses().find(|address| matches!(address, Address::Unix(_))).or_else(|| addresses().next())
}

/// The next connection of any listener.
async fn accept(listeners: &[Listener]) -> std::io::Result<Incoming> {
    let accepting: Vec<BoxFuture<'_, _>> = listeners.iter().map(|listener| Box::pin(listener.accept()) as _).collect();
    select_all(accepting).await.0
}

/// Serves until `stop` says true. What the configuration leaves open is as in `base`.
pub async fn serve(config: Config, base: VmOptions, mut stop: watch::Receiver<bool>) -> Result<(), Failure> {
    let door = Arc::new(Door::new(&config)?);
    let mut listeners = vec![];
    for address in &config.listen {
        listeners.push(Listener::bind(address, door.group()).await?);
    }
    let served_at = nearest(&listeners);
    let service = Service::new(config.max_sessions, config.resume_grace);
    let mut keepers = JoinSet::new();
    for vm in &config.vms {
        let options = VmOptions {
            state: config.state.clone().unwrap_or_else(|| base.state.clone()),
            scratch: config.scratch.clone().or_else(|| base.scratch.clone()),
            scratch_budget_bytes: config.scratch_budget_bytes.or(base.scratch_budget_bytes),
            name: vm.name.clone(),
            transport: base.transport,
            quiet: vm.quiet.clone(),
            skip: vm.skip.clone(),
            budget: vm.budget,
            served_at: served_at.clone(),
            begins_at_once: false,
            power_off: vm.power_off,
            exclusive_device: vm.exclusive_device.clone(),
            persistent_bitmaps: vm.persistent_bitmaps || base.persistent_bitmaps,
        };
        let (service, stop) = (service.clone(), stop.clone());
        match (vm.on_demand, &vm.name) {
            (true, Some(name)) => {
                let on_demand = OnDemand::new(vm.monitor.clone(), options);
                keepers.spawn(on_demand::keep(service, name.clone(), on_demand, stop));
            }
            _ => {
                keepers.spawn(keep(service, vm.monitor.clone(), options, stop));
            }
        }
    }
    for address in listeners.iter().filter_map(Listener::address) {
        tracing::info!("listening at {address}");
    }
    let line = Outgoing {
        limit: config.limit_rate.map(Limit::new),
        packing: Packing::default(),
        tcp: config.wire_compression,
    };
    // What is under way would go on for long.
    answer_clients(door, service, &listeners, line, &mut stop, Duration::ZERO).await;
    tracing::info!("ending: sessions are closed and every fleece is taken out of QEMU");
    while keepers.join_next().await.is_some() {}
    Ok(())
}

/// What goes for all that is sent.
#[derive(Clone)]
struct Outgoing {
    limit: Option<Limit>,
    packing: Packing,
    /// How data is compressed over TCP.
    tcp: How,
}

impl Outgoing {
    /// For unix sockets.
    fn unlimited() -> Self {
        Self { limit: None, packing: Packing::default(), tcp: How::None }
    }
}

/// Answers whoever comes, until it is asked to stop; what is under way then has the time of `last_words` to end by itself.
async fn answer_clients(
    door: Arc<Door>,
    service: Service,
    listeners: &[Listener],
    line: Outgoing,
    stop: &mut watch::Receiver<bool>,
    last_words: Duration,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            incoming = accept(listeners) => match incoming {
                Ok(incoming) if connections.len() < MAX_CONNECTIONS => {
                    connections.spawn(converse(door.clone(), service.clone(), incoming, line.clone(), stop.clone()));
                }
                Ok(_) => tracing::warn!("a connection was refused: {MAX_CONNECTIONS} are open"),
                Err(e) => {
                    tracing::warn!("cannot accept a connection: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
            () = asked_to_stop(stop) => break,
        }
    }
    let _ = timeout(last_words, async { while connections.join_next().await.is_some() {} }).await;
    connections.shutdown().await;
    service.give_up();
}

async fn asked_to_stop(stop: &mut watch::Receiver<bool>) {
    // Nobody who could ask any more is as good as being asked.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// A connection, from the door to its end.
async fn converse(
    door: Arc<Door>,
    service: Service,
    incoming: Incoming,
    line: Outgoing,
    ending: watch::Receiver<bool>,
) {
    let timing = Timing::default();
    let packing = line.packing.by_default(if incoming.is_tcp() { line.tcp } else { How::None });
    let admitted = door.admit(incoming, timing.hello).await;
    let admitted = admitted.and_then(|(stream, caller)| Ok((stream, door.place(&caller)?, caller)));
    match admitted {
        Err(failure) => tracing::warn!("{failure}"),
        Ok((stream, _place, caller)) => {
            let (service, caller) = (&service, &caller);
            let stream = match line.limit {
                Some(limit) => stream.limited(limit),
                None => stream,
            };
            // What went wrong is logged where it was seen.
            let trunks = service.trunks().of(caller.identity());
            let common = Common { packing, trunks, ending: Some(ending) };
            let _ = serve_with(stream, timing, common, |request| service.answer(caller, request)).await;
        }
    }
}
