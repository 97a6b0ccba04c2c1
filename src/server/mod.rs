//! The sidecar service: keeps VMs attached and serves clients.
//!
//! ```text
//!  listener ── a task a connection ──► requests ──► the VM that they name
//!  VM: attach ──► attached ──(monitor closed)──► wait ──► attach …
//! ```
//!
//! It listens on the loopback or a unix socket only, until clients can prove who they are. Ending it (SIGTERM, SIGINT) ends
//! running sessions, takes every fleece out of QEMU, and leaves the bitmaps that record.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::vm::VmOptions;
use crate::wire::message::{Failure, FailureCode};
use crate::wire::{Timing, serve_connection};

mod config;
mod keep;
mod listen;
mod service;

pub use config::Config;

use keep::keep;
use listen::Listener;
use service::Service;

/// Connections at once, at most.
const MAX_CONNECTIONS: usize = 64;

fn bad(message: impl Into<String>) -> Failure {
    Failure::new(FailureCode::Internal, message)
}

/// Serves until `stop` says true. What the configuration leaves open is as in `base`.
pub async fn serve(config: Config, base: VmOptions, mut stop: watch::Receiver<bool>) -> Result<(), Failure> {
    let listener = Listener::bind(&config.listen).await?;
    let address = listener.address();
    let service = Service::default();
    let mut keepers = JoinSet::new();
    for vm in &config.vms {
        let options = VmOptions {
            state: config.state.clone().unwrap_or_else(|| base.state.clone()),
            scratch: config.scratch.clone().or_else(|| base.scratch.clone()),
            scratch_budget_bytes: config.scratch_budget_bytes.or(base.scratch_budget_bytes),
            name: vm.name.clone(),
            transport: base.transport,
            quiet: vm.quiet.clone(),
            served_at: address.clone(),
        };
        keepers.spawn(keep(service.clone(), vm.monitor.clone(), options, stop.clone()));
    }
    tracing::info!("listening at {}", address.as_ref().unwrap_or(&config.listen));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            stream = listener.accept() => match stream {
                Ok(stream) if connections.len() < MAX_CONNECTIONS => {
                    let service = service.clone();
                    connections.spawn(async move {
                        let answer = |request| { let service = service.clone(); async move { service.answer(request).await } };
                        let _ = serve_connection(stream, Timing::default(), answer).await;
                    });
                }
                Ok(stream) => tracing::warn!(peer = stream.peer(), "refused: {MAX_CONNECTIONS} connections are open"),
                Err(e) => {
                    tracing::warn!("cannot accept a connection: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
            _ = stop.wait_for(|stop| *stop) => break,
        }
    }
    tracing::info!("ending: sessions are closed and every fleece is taken out of QEMU");
    connections.shutdown().await;
    while keepers.join_next().await.is_some() {}
    if let Listener::Unix(_, path) = &listener {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}
