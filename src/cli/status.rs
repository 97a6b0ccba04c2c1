//! `livebackup status [SOURCE]`

use std::fmt;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::args::SourceArgs;
use super::context::Context;
use super::exit::{self, Code};
use super::open;
use super::table::Table;
use crate::units::human_bytes;
use crate::wire::message::VmStatus;

const WATCH_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The VM: qmp:PATH, qmp:HOST:PORT, livebackup://HOST:PORT/VM or unix:PATH/VM.
    source: Option<String>,
    /// Name of the VM, when QEMU has neither -name nor a UUID, or another is wanted.
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Show it again every second, until Ctrl-C.
    #[arg(long)]
    watch: bool,
}

#[derive(Serialize)]
#[serde(transparent)]
struct StatusReport(VmStatus);

impl fmt::Display for StatusReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = &self.0;
        write!(f, "{}: {}", status.vm, status.state)?;
        match &status.qemu_version {
            Some(version) => writeln!(f, ", QEMU {version}")?,
            None => writeln!(f)?,
        }
        status.alarms.iter().try_for_each(|alarm| writeln!(f, "ALARM: {alarm}"))?;
        match &status.session {
            None => writeln!(f, "no backup is running")?,
            Some(session) => writeln!(
                f,
                "a backup is running: instant {:.0}, {} of {} sent, {} of scratch",
                session.instant,
                human_bytes(session.sent_bytes),
                human_bytes(session.needed_bytes),
                human_bytes(session.scratch_bytes)
            )?,
        }
        for disk in status.session.iter().flat_map(|session| &session.impact) {
            writeln!(f, "  guest on {}: {}", disk.disk, disk.impact)?;
        }
        let mut table = Table::new(&["DISK", ">CHECKPOINT", "TAKEN", ">CHANGED SINCE", "TRACKING"]);
        let dash = || "-".to_owned();
        for disk in &status.disks {
            let tracking = match (&disk.epoch, &disk.last_end) {
                (Some(epoch), None) => format!("epoch {}", epoch.short()),
                (Some(epoch), Some(end)) => format!("epoch {}; the one before ended: {end}", epoch.short()),
                (None, Some(end)) => format!("none: {end}"),
                (None, None) => "none yet: the next backup is full".to_owned(),
            };
            table.row([
                disk.disk.clone(),
                disk.checkpoint_number.map_or_else(dash, |number| number.to_string()),
                disk.checkpoint_time.map_or_else(dash, |time| format!("{time:.0}")),
                disk.dirty_bytes.map_or_else(dash, human_bytes),
                tracking,
            ]);
        }
        write!(f, "{table}")
    }
}

pub async fn run(context: &Context, args: &StatusArgs) -> anyhow::Result<Code> {
    let source = args.source.clone().ok_or_else(|| {
        exit::usage("say which VM: `livebackup status qmp:PATH`, or `livebackup status livebackup://HOST:PORT/VM`")
    })?;
    let source = SourceArgs { source, vm: args.vm.clone() };
    let mut sidecar = open::open(context, &source).await?;
    loop {
        context.output.print(&StatusReport(context.unless_interrupted(sidecar.status()).await?));
        if !args.watch {
            return Ok(Code::Good);
        }
        tokio::select! {
            () = context.asked_to_stop() => return Ok(Code::Good),
            () = tokio::time::sleep(WATCH_EVERY) => {}
        }
    }
}
