//! Keeps a VM attached, across ends and starts of its QEMU.

use std::time::Duration;

use tokio::sync::watch;

use super::service::{Service, State};
use crate::monitor::Address;
use crate::vm::{AttachError, Hold, Parting, Vm, VmOptions};

/// How long to wait before a VM that could not be attached is tried again.
/// Soon: a guest that was started again is tracked without a gap only if its disk is looked at before it writes.
const ATTACH_AGAIN_AFTER: Duration = Duration::from_millis(250);

/// Nobody who could ask any more is as good as being asked.
fn is_asked_to_stop(stop: &watch::Receiver<bool>) -> bool {
    *stop.borrow() || stop.has_changed().is_err()
}

/// Keeps one VM attached.
pub async fn keep(service: Service, monitor: Address, options: VmOptions, mut stop: watch::Receiver<bool>) {
    let mut known = options.name.clone().unwrap_or_else(|| monitor.to_string());
    service.set(&known, State::Starting);
    let mut said = String::new();
    while !is_asked_to_stop(&stop) {
        let attached = Vm::attach(&monitor, options.clone()).await;
        match attached {
            Ok(vm) => {
                said.clear();
                if vm.name() != known {
                    service.forget(&known);
                    known = vm.name().to_owned();
                }
                tracing::info!(vm = known, "attached");
                // Before any client can come.
                vm.watch_latency().await;
                service.set(&known, State::Attached(vm.clone()));
                let parting = async {
                    let _ = stop.wait_for(|stop| *stop).await;
                    Parting::LetGo
                };
                let hold = vm.hold().await.unwrap_or_else(|failure| {
                    tracing::error!(vm = known, "QEMU will not wait for us at the guest's power-off: {failure}");
                    Hold::default()
                });
                if vm.tend(hold, parting).await {
                    tracing::info!(vm = known, "QEMU ended");
                }
                service.set(&known, State::Away("QEMU ended, or closed its monitor".into()));
                // A session's task holds the VM until its fleece is out.
                vm.idle().await;
            }
            Err(error) => {
                let words = match error {
                    AttachError::Failure(failure) => failure.message,
                    served => served.to_string(),
                };
                if words != said {
                    tracing::warn!(vm = known, "cannot attach: {words}");
                    said.clone_from(&words);
                }
                service.set(&known, State::Away(words));
                tokio::select! {
                    () = tokio::time::sleep(ATTACH_AGAIN_AFTER) => {}
                    _ = stop.wait_for(|stop| *stop) => {}
                }
            }
        }
    }
    service.forget(&known);
}
