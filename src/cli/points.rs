//! `livebackup points REPO [VM]`

use std::fmt;

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::backup::{count, level_name};
use super::context::Context;
use super::exit::Code;
use super::output;
use super::repository;
use super::table::Table;
use crate::machine::Taken;
use crate::repo::Manifest;
use crate::repo::point::{Grade, Level, PointTotals};
use crate::repo::suspect;
use crate::units::{PointId, human_bytes};

#[derive(Debug, Args)]
pub struct PointsArgs {
    /// The repository.
    repo: String,
    /// Only this VM's.
    vm: Option<String>,
}

#[derive(Serialize)]
struct PointLine {
    vm: String,
    point: PointId,
    instant: Timestamp,
    level: Level,
    grade: Grade,
    parent: Option<PointId>,
    disks: Vec<String>,
    #[serde(flatten)]
    totals: PointTotals,
    /// Disks that were scanned: `DISK: REASON`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    scanned: Vec<String>,
    /// Why the point rests on what cannot be believed, if it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    suspect: Option<String>,
}

impl From<Manifest> for PointLine {
    fn from(manifest: Manifest) -> Self {
        let scanned = manifest.disks.iter().filter_map(|disk| match &disk.taken {
            Taken::Scan { reason } => Some(format!("{}: {reason}", disk.disk.name)),
            _ => None,
        });
        Self {
            scanned: scanned.collect(),
            suspect: None,
            vm: manifest.vm,
            point: manifest.id,
            instant: manifest.instant,
            level: manifest.level,
            grade: manifest.grade,
            parent: manifest.parent,
            disks: manifest.disks.into_iter().map(|disk| disk.disk.name).collect(),
            totals: manifest.totals,
        }
    }
}

#[derive(Default, Serialize)]
struct PointsReport {
    points: Vec<PointLine>,
    damaged: Vec<String>,
}

impl fmt::Display for PointsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = ["VM", "POINT", "INSTANT", "LEVEL", "GRADE", ">DISKS", ">SIZE", ">READ", ">STORED"];
        let mut table = Table::new(&columns);
        for point in &self.points {
            table.row([
                point.vm.clone(),
                point.point.short(),
                format!("{:.0}", point.instant),
                level_name(point.level).to_owned(),
                point.grade.name().to_owned(),
                point.disks.len().to_string(),
                human_bytes(point.totals.size_bytes),
                human_bytes(point.totals.read_bytes),
                human_bytes(point.totals.stored_bytes),
            ]);
        }
        match self.points.is_empty() {
            true => writeln!(f, "no restore points yet; `livebackup backup` makes one")?,
            false => write!(f, "{table}")?,
        }
        for point in &self.points {
            for scanned in &point.scanned {
                writeln!(f, "{} of {}: scanned {scanned}", point.point.short(), output::name(&point.vm))?;
            }
            if let Some(suspect) = &point.suspect {
                writeln!(f, "SUSPECT: {} of {}: {suspect}", point.point.short(), output::name(&point.vm))?;
            }
        }
        if !self.damaged.is_empty() {
            let number = count(self.damaged.len(), "restore point");
            writeln!(f, "{number} cannot be read; `livebackup verify` looks at all:")?;
        }
        self.damaged.iter().try_for_each(|error| writeln!(f, "  {error}"))
    }
}

pub fn run(context: &Context, args: &PointsArgs) -> anyhow::Result<Code> {
    let repo = repository::open(&args.repo)?;
    let vms = match &args.vm {
        Some(vm) => vec![repository::vm(&repo, vm)?.to_owned()],
        None => repo.vms()?,
    };
    let mut report = PointsReport::default();
    for vm in vms {
        let listing = repo.points(&vm)?;
        let mut suspects = repo.suspects(&vm)?;
        report.points.extend(listing.points.into_iter().map(|point| {
            let suspect = suspects.remove(&point.id).map(|disks| suspect::in_words(&disks));
            PointLine { suspect, ..PointLine::from(point) }
        }));
        report.damaged.extend(listing.damaged.into_iter().map(|error| error.to_string()));
    }
    context.output.print(&report);
    Ok(Code::Good)
}
