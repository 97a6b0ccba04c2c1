//! `livebackup status [SOURCE]`

use std::fmt;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::args::SourceArgs;
use super::context::Context;
use super::dial::dial;
use super::exit::Code;
use super::output;
use super::source::{self, Source};
use super::table::Table;
use super::{held, open};
use crate::backup::Sidecar;
use crate::units::human_bytes;
use crate::wire::Client;
use crate::wire::message::{Failure, FailureCode, Reply, Request, SessionStatus, VmStatus};

const WATCH_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The VM: qmp:PATH, qmp:HOST:PORT, livebackup://HOST:PORT/VM or unix:PATH/VM; without it, all that a livebackup of
    /// this host holds now.
    source: Option<String>,
    /// Name of the VM, when QEMU has neither -name nor a UUID, or another is wanted.
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Show it again every second, until Ctrl-C.
    #[arg(long)]
    watch: bool,
}

/// VMs of one look; `before` is the look before it.
#[derive(Serialize)]
#[serde(transparent)]
pub struct StatusReport<'a> {
    status: &'a VmStatus,
    #[serde(skip)]
    before: Option<&'a VmStatus>,
}

impl<'a> StatusReport<'a> {
    /// Of one look.
    pub fn new(status: &'a VmStatus) -> Self {
        Self { status, before: None }
    }
}

/// All VMs of a server.
#[derive(Serialize)]
struct ServerReport<'a> {
    vms: Vec<StatusReport<'a>>,
}

/// Bytes a second: since the look before where it was of the same session, else since the instant.
fn rate(now: &SessionStatus, before: Option<&SessionStatus>) -> u64 {
    let before = before.filter(|before| before.instant == now.instant && before.running_ms < now.running_ms);
    let (bytes, ms) = before.map_or((0, 0), |before| (before.sent_bytes, before.running_ms));
    let (bytes, ms) = (now.sent_bytes.saturating_sub(bytes), now.running_ms - ms);
    (u128::from(bytes) * 1000 / u128::from(ms.max(1))) as u64
}

/// A running backup; `before` is the look before it.
pub fn write_session(
    f: &mut fmt::Formatter<'_>,
    session: &SessionStatus,
    before: Option<&SessionStatus>,
) -> fmt::Result {
    let rate = rate(session, before);
    let by = session.client.as_ref().map(|client| format!(" for {client}")).unwrap_or_default();
    let over = session.connections.map(|count| format!(" over {count} connections")).unwrap_or_default();
    writeln!(
        f,
        "a backup is running{by}{over}: instant {:.0}, {} of {} sent, {}/s, {} of scratch",
        session.instant,
        human_bytes(session.sent_bytes),
        human_bytes(session.needed_bytes),
        human_bytes(rate),
        human_bytes(session.scratch_bytes)
    )?;
    match session.lost {
        Some(since) => writeln!(f, "its client is lost since {since:.0}; it is held for it to come back"),
        None => Ok(()),
    }
}

impl fmt::Display for StatusReport<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = self.status;
        write!(f, "{}: {}", output::name(&status.vm), output::name(&status.state))?;
        match &status.qemu_version {
            Some(version) => writeln!(f, ", QEMU {version}")?,
            None => writeln!(f)?,
        }
        status.alarms.iter().try_for_each(|alarm| writeln!(f, "ALARM: {alarm}"))?;
        match &status.session {
            None if status.qemu_version.is_none() => {}
            None => writeln!(f, "no backup is running")?,
            Some(session) => {
                write_session(f, session, self.before.and_then(|before| before.session.as_ref()))?;
            }
        }
        for waiting in &status.queue {
            writeln!(f, "waiting: {}, since {:.0}", waiting.client, waiting.since)?;
        }
        if let Some(last) = &status.last {
            let took_s = last.took_ms as f64 / 1000.0;
            match &last.failure {
                None => writeln!(f, "last: {:.0}, {} sent, {took_s:.1} s", last.ended, human_bytes(last.sent_bytes))?,
                Some(failure) => writeln!(f, "last: {:.0}, failed after {took_s:.1} s: {failure}", last.ended)?,
            }
        }
        if status.disks.is_empty() {
            return Ok(());
        }
        for disk in status.session.iter().flat_map(|session| &session.impact) {
            writeln!(f, "  guest on {}: {}", output::name(&disk.disk), disk.impact)?;
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

impl fmt::Display for ServerReport<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.vms.is_empty() {
            return writeln!(f, "the server shows no VM");
        }
        for (i, vm) in self.vms.iter().enumerate() {
            let gap = if i > 0 { "\n" } else { "" };
            write!(f, "{gap}{vm}")?;
        }
        Ok(())
    }
}

/// Whose state is asked for.
enum Asked {
    One(Sidecar),
    All(Box<Client>),
}

impl Asked {
    async fn look(&mut self) -> Result<Vec<VmStatus>, Failure> {
        match self {
            Self::One(sidecar) => Ok(vec![sidecar.status().await?]),
            Self::All(client) => match client.request(Request::Status { vm: None }).await? {
                Reply::Status { vms } => Ok(vms),
                _ => Err(Failure::new(FailureCode::Protocol, "the server answered something else to `status`")),
            },
        }
    }
}

/// Waits until it is time to look again; no more when the user stops it.
async fn look_again(context: &Context) -> bool {
    tokio::select! {
        () = context.asked_to_stop() => false,
        () = tokio::time::sleep(WATCH_EVERY) => true,
    }
}

/// Of VMs of this host: all that are held, or the one behind this monitor.
async fn of_this_host(context: &Context, monitor: Option<&str>, watch: bool) -> anyhow::Result<Code> {
    loop {
        let looking = async { Ok::<_, anyhow::Error>(held::on_this_host(context, monitor).await) };
        context.output.print(&context.unless_interrupted(looking).await?);
        if !watch || context.output.is_closed() || !look_again(context).await {
            return Ok(Code::Good);
        }
    }
}

pub async fn run(context: &Context, args: &StatusArgs) -> anyhow::Result<Code> {
    let Some(source) = args.source.clone() else { return of_this_host(context, None, args.watch).await };
    if let Some(monitor) = held::held_monitor(&source) {
        return of_this_host(context, Some(&monitor), args.watch).await;
    }
    let mut asked = match source::parse(&source)? {
        Source::Server(address, None) if args.vm.is_none() => {
            Asked::All(Box::new(context.unless_interrupted(dial(context, &address)).await?))
        }
        _ => Asked::One(open::open(context, &SourceArgs { source, vm: args.vm.clone() }).await?),
    };
    let mut before: Vec<VmStatus> = vec![];
    loop {
        let now = context.unless_interrupted(asked.look()).await?;
        let reports = now
            .iter()
            .map(|status| StatusReport { status, before: before.iter().find(|before| before.vm == status.vm) });
        let mut reports: Vec<_> = reports.collect();
        match asked {
            Asked::One(_) => reports.drain(..).for_each(|report| context.output.print(&report)),
            Asked::All(_) => context.output.print(&ServerReport { vms: reports }),
        }
        if !args.watch || context.output.is_closed() {
            return Ok(Code::Good);
        }
        before = now;
        if !look_again(context).await {
            return Ok(Code::Good);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_the_time_between_two_looks() {
        let session = |sent_bytes, running_ms| SessionStatus {
            instant: jiff::Timestamp::UNIX_EPOCH,
            needed_bytes: 1 << 30,
            sent_bytes,
            scratch_bytes: 0,
            running_ms,
            client: None,
            lost: None,
            connections: None,
            impact: vec![],
        };
        assert_eq!(rate(&session(5000, 1000), None), 5000);
        assert_eq!(rate(&session(9000, 2000), Some(&session(5000, 1000))), 4000);
        let other = SessionStatus { instant: jiff::Timestamp::MAX, ..session(100, 1) };
        assert_eq!(rate(&session(5000, 1000), Some(&other)), 5000);
        assert_eq!(rate(&session(0, 0), Some(&session(0, 0))), 0);
    }
}
