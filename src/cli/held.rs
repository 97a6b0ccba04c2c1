//! The VMs that a livebackup of this host holds: what `status` shows without a SOURCE, and where another process has the
//! VM for itself alone, since its monitor may have one place only.

use std::fmt;

use serde::Serialize;

use super::context::Context;
use super::dial::dial;
use super::output;
use super::source::{self, Source};
use super::status::{self, StatusReport};
use crate::backup::Sidecar;
use crate::vm;
use crate::vm::place::{self, Holder};
use crate::wire::Address;
use crate::wire::message::{SessionStatus, VmStatus};

/// A VM that a sidecar of this host holds.
#[derive(Serialize)]
struct HeldVm {
    vm: String,
    qemu_pid: i32,
    monitor: String,
    held_by: i32,
    command: String,
    served_at: Option<String>,
    /// What the server says of it, if one has it.
    status: Option<VmStatus>,
    /// How far its backup is, where it serves nobody and has one.
    session: Option<SessionStatus>,
    /// Why the server says nothing.
    silent: Option<String>,
}

#[derive(Serialize)]
pub struct HostReport {
    vms: Vec<HeldVm>,
}

impl fmt::Display for HostReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.vms.is_empty() {
            writeln!(
                f,
                "no livebackup holds a virtual machine on this host; `livebackup status qmp:PATH` looks at one"
            )?;
        }
        for (i, held) in self.vms.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            let HeldVm { vm, qemu_pid, monitor, held_by, command, .. } = held;
            writeln!(f, "{}: QEMU is process {qemu_pid}, its monitor {monitor}", output::name(vm))?;
            writeln!(f, "held by process {held_by} ({command})")?;
            match (&held.status, &held.silent, &held.served_at) {
                (Some(status), _, _) => write!(f, "{}", StatusReport::new(status))?,
                (None, Some(why), Some(at)) => writeln!(f, "served at {at}, which does not answer: {why}")?,
                _ => {
                    if let Some(session) = &held.session {
                        status::write_session(f, session, None)?;
                    }
                    writeln!(f, "it serves nobody else: ask again when it is done")?;
                }
            }
        }
        Ok(())
    }
}

/// What a process was started as; never more than a line.
fn command_of(pid: i32) -> String {
    const MAX_CHARS: usize = 200;
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<_> = bytes.split(|byte| *byte == 0).filter(|w| !w.is_empty()).map(String::from_utf8_lossy).collect();
    words.join(" ").chars().filter(|c| !c.is_control()).take(MAX_CHARS).collect()
}

async fn held(context: &Context, qemu_pid: i32, holder: Holder) -> HeldVm {
    let (mut status, mut silent) = (None, None);
    if let Some(address) = holder.address() {
        match ask(context, &address, &holder.vm).await {
            Ok(answer) => status = Some(answer),
            Err(error) => silent = Some(format!("{error:#}")),
        }
    }
    let session = if holder.served_at.is_none() { place::told(qemu_pid, &holder) } else { None };
    let Holder { pid, monitor, vm, served_at } = holder;
    HeldVm { vm, qemu_pid, monitor, held_by: pid, command: command_of(pid), served_at, status, session, silent }
}

async fn ask(context: &Context, address: &Address, vm: &str) -> anyhow::Result<VmStatus> {
    let client = dial(context, address).await?;
    Ok(Sidecar::Remote(Box::new(client), vm.to_owned()).status().await?)
}

/// All VMs that are held on this host, or the one behind this monitor.
pub async fn on_this_host(context: &Context, monitor: Option<&str>) -> HostReport {
    let mut vms = vec![];
    for (qemu_pid, holder) in place::holders().filter(|(_, h)| monitor.is_none_or(|m| h.monitor == m)) {
        vms.push(held(context, qemu_pid, holder).await);
    }
    vms.sort_by(|a, b| a.vm.cmp(&b.vm));
    HostReport { vms }
}

/// The monitor that a source names, if another process holds it for itself alone.
pub fn held_monitor(text: &str) -> Option<String> {
    let Ok(Source::Monitor(address)) = source::parse(text) else { return None };
    let monitor = vm::absolute(&address);
    place::holder_of(&monitor).filter(|holder| holder.served_at.is_none()).map(|_| monitor)
}
