//! `livebackup map REPO VM[@POINT]`

use std::fmt;
use std::path::PathBuf;

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::backup::count;
use super::context::Context;
use super::exit::Code;
use super::output;
use super::repository;
use super::table::Table;
use crate::area::Area;
use crate::map::{At, Map, MapOptions, MapReport, Mapped};
use crate::repo::Manifest;
use crate::units::{PointId, human_bytes};

#[derive(Debug, Args)]
#[command(
    after_help = "Each disk is an NBD export of its own, named after it. It is read-only, and nobody is asked who he is: \
    the socket is for its owner (mode 0600), a port of the loopback for every user of this host. Ends with Ctrl-C or \
    SIGTERM; with code 6 if something was asked for that is damaged."
)]
pub struct MapArgs {
    /// The repository.
    repo: String,
    /// The VM, and the point: the latest unless it is said.
    #[arg(value_name = "VM[@POINT]")]
    point: String,
    /// Only this disk. May be repeated. With one disk, the empty export name is that disk, too.
    #[arg(long, value_name = "DISK")]
    disk: Vec<String>,
    /// The unix socket to listen at [default: map-POINT.sock in /run/livebackup, or in livebackup of the XDG runtime
    /// directory when not root].
    #[arg(long, value_name = "PATH", conflicts_with = "listen")]
    socket: Option<PathBuf>,
    /// Listen at this address of the loopback instead, as 127.0.0.1:10809; port 0 is any that is free.
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
}

#[derive(Serialize)]
struct ExportLine {
    disk: String,
    size_bytes: u64,
    uri: String,
    /// What was left out of the point, and reads as zeroes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    left_out: Vec<Area>,
}

/// What is served.
#[derive(Serialize)]
struct Serving {
    vm: String,
    point: PointId,
    instant: Timestamp,
    exports: Vec<ExportLine>,
    /// What of it may be older than the point.
    #[serde(skip_serializing_if = "Option::is_none")]
    suspect: Option<String>,
    example: String,
}

impl Serving {
    fn new(manifest: &Manifest, disks: &[Mapped], suspect: Option<String>) -> Self {
        let areas = |name: &str| {
            let disk = manifest.disks.iter().find(|disk| disk.disk.name == name);
            disk.map(|disk| disk.areas.areas.clone()).unwrap_or_default()
        };
        let line = |mapped: &Mapped| ExportLine {
            disk: mapped.disk.clone(),
            size_bytes: mapped.size_bytes,
            uri: mapped.uri.clone(),
            left_out: areas(&mapped.disk),
        };
        // A URI of ours has nothing in it that ends a quotation.
        let example = disks.first().map(|first| format!("nbdcopy '{}' disk.raw", first.uri)).unwrap_or_default();
        Self {
            vm: manifest.vm.clone(),
            point: manifest.id,
            instant: manifest.instant,
            exports: disks.iter().map(line).collect(),
            suspect,
            example,
        }
    }
}

impl fmt::Display for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(&["DISK", ">SIZE", "URI"]);
        for export in &self.exports {
            table.row([export.disk.clone(), human_bytes(export.size_bytes), export.uri.clone()]);
        }
        write!(f, "{table}")?;
        for export in &self.exports {
            let told = |area| writeln!(f, "{}: zero, as it was left out of the point: {area}", export.disk);
            export.left_out.iter().try_for_each(told)?;
        }
        if let Some(suspect) = &self.suspect {
            writeln!(f, "SUSPECT: {suspect}")?;
        }
        writeln!(f, "for example: {}", self.example)?;
        let (point, instant) = (self.point.short(), self.instant);
        writeln!(f, "serving {}@{point} of {instant:.0}, read-only, until Ctrl-C or SIGTERM", output::name(&self.vm))
    }
}

/// What was done.
#[derive(Serialize)]
struct Served {
    vm: String,
    point: PointId,
    clients: u64,
    reads: u64,
    failed_reads: u64,
    read_bytes: u64,
    /// Of them, zeroes that were sent as holes.
    hole_bytes: u64,
    seconds: f64,
}

impl Served {
    fn new(vm: String, point: PointId, report: &MapReport) -> Self {
        let totals = report.totals;
        Self {
            vm,
            point,
            clients: totals.clients,
            reads: totals.reads,
            failed_reads: totals.failed_reads,
            read_bytes: totals.read_bytes,
            hole_bytes: totals.hole_bytes,
            seconds: report.elapsed.as_secs_f64(),
        }
    }
}

impl fmt::Display for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (clients, reads) = (count(self.clients as usize, "client"), count(self.reads as usize, "read"));
        let (read, holes) = (human_bytes(self.read_bytes), human_bytes(self.hole_bytes));
        let what = format!("{clients}, {reads} of {read}, {holes} of that holes");
        writeln!(f, "served {}@{}: {what}, {:.2} s", output::name(&self.vm), self.point.short(), self.seconds)?;
        if self.failed_reads > 0 {
            let failed = count(self.failed_reads as usize, "read");
            writeln!(f, "DAMAGED: {failed} failed; `livebackup verify` shows what is lost")?;
        }
        Ok(())
    }
}

pub async fn run(context: &Context, args: &MapArgs) -> anyhow::Result<Code> {
    let repo = repository::open(&args.repo)?;
    let manifest = repository::point(&repo, &args.point)?;
    let at = match (&args.socket, &args.listen) {
        (Some(path), _) => Some(At::Socket(path.clone())),
        (None, Some(address)) => Some(At::Tcp(address.clone())),
        (None, None) => None,
    };
    let options = MapOptions { disks: args.disk.clone(), at, ..MapOptions::default() };
    let map = Map::open(&repo, &manifest, &options).await?;
    let suspect = repository::suspect(&repo, &manifest, &args.disk);
    context.output.print(&Serving::new(&manifest, map.disks(), suspect));
    let report = map.serve(context.interrupted.clone()).await;
    context.output.done(&Served::new(manifest.vm, manifest.id, &report));
    Ok(if report.totals.failed_reads == 0 { Code::Good } else { Code::Damaged })
}
