//! `livebackup verify REPO [VM[@POINT]]`

use std::fmt;

use clap::Args;
use serde::Serialize;

use super::backup::count;
use super::context::Context;
use super::exit::Code;
use super::output;
use super::progress::Meter;
use super::repository;
use crate::repo::suspect;
use crate::repo::verify::{self, Report, Scope};
use crate::units::{PointId, human_bytes};

/// Most places that are printed for one damage; JSON has more.
const SHOWN: usize = 10;

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The repository.
    repo: String,
    /// A VM, or one point of it; everything in the repository unless it is said.
    #[arg(value_name = "VM[@POINT]")]
    point: Option<String>,
}

#[derive(Serialize)]
struct DamageLine {
    what: String,
    intact_copy: bool,
    affected: Vec<String>,
}

#[derive(Serialize)]
struct VerifyReport {
    intact: bool,
    points: u64,
    packs: u64,
    chunks: u64,
    stored_bytes: u64,
    raw_bytes: u64,
    damage: Vec<DamageLine>,
    unreported: u64,
    /// Points that rest on what an audit found wrong: `VM@POINT: REASON`. Their bytes may be intact and still be too old.
    suspect: Vec<String>,
}

impl From<Report> for VerifyReport {
    fn from(report: Report) -> Self {
        let line = |damage: &verify::Damage| DamageLine {
            what: damage.error.to_string(),
            intact_copy: damage.intact_copy,
            affected: damage.affected.iter().map(ToString::to_string).collect(),
        };
        Self {
            intact: report.is_readable(),
            points: report.points,
            packs: report.packs,
            chunks: report.blobs,
            stored_bytes: report.stored_bytes,
            raw_bytes: report.raw_bytes,
            damage: report.damage.iter().map(line).collect(),
            unreported: report.unreported,
            suspect: Vec::new(),
        }
    }
}

impl fmt::Display for VerifyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for damage in &self.damage {
            writeln!(f, "damaged: {}", output::name(&damage.what))?;
            for place in damage.affected.iter().take(SHOWN) {
                writeln!(f, "  takes {}", output::name(place))?;
            }
            if let Some(more @ 1..) = damage.affected.len().checked_sub(SHOWN) {
                writeln!(f, "  and {more} more")?;
            }
            match (damage.intact_copy, damage.affected.is_empty()) {
                (true, _) => writeln!(f, "  nothing is lost: another pack holds the same bytes")?,
                (false, true) => writeln!(f, "  no restore point that was verified needs it")?,
                (false, false) => {}
            }
        }
        if self.unreported > 0 {
            writeln!(f, "and {} more", count(self.unreported as usize, "damage"))?;
        }
        for suspect in &self.suspect {
            writeln!(f, "SUSPECT: {}", output::name(suspect))?;
        }
        let points = count(self.points as usize, "restore point");
        let bytes = human_bytes(self.stored_bytes);
        let chunks = count(self.chunks as usize, "chunk");
        match self.damage.len() {
            0 => writeln!(f, "intact: {points}, {chunks}, {bytes} read"),
            n if self.intact => {
                let places = count(n, "damaged place");
                writeln!(f, "intact: {points}, {chunks}, {bytes} read; {places}, and other packs hold what was there")
            }
            n => writeln!(
                f,
                "DAMAGED: {} in {points}, {chunks}, {bytes} read; a full backup, or a scan, stores what is missing anew",
                count(n, "place")
            ),
        }
    }
}

pub async fn run(context: &Context, args: &VerifyArgs) -> anyhow::Result<Code> {
    let repo = repository::open(&args.repo)?;
    let repo_again = repo.clone();
    let mut wanted: Vec<(String, Option<PointId>)> = Vec::new();
    let points = match &args.point {
        None => {
            wanted.extend(repo.vms()?.into_iter().map(|vm| (vm, None)));
            None
        }
        Some(text) => match repository::vm_and_point(&repo, text)? {
            (vm, Some(point)) => {
                let point = repo.find_point(vm, point)?;
                wanted.push((vm.to_owned(), Some(point.id)));
                Some((vec![point], Vec::new()))
            }
            (vm, None) => {
                wanted.push((vm.to_owned(), None));
                let listing = repo.points(vm)?;
                Some((listing.points, listing.damaged))
            }
        },
    };
    let mut meter = Meter::new(context.output);
    let work = tokio::task::spawn_blocking(move || {
        let show = |progress: verify::Progress| meter.at("verifying", progress.done_bytes, progress.total_bytes);
        match points {
            None => verify::verify(&repo, Scope::Everything, show),
            Some((points, unreadable)) => {
                let mut report = verify::verify(&repo, Scope::Points(&points), show)?;
                let damage = |error| verify::Damage { error, affected: Vec::new(), intact_copy: false };
                report.damage.extend(unreadable.into_iter().map(damage));
                Ok(report)
            }
        }
    });
    // Reading changes nothing but marks of damage: it is left where it is.
    let mut report = VerifyReport::from(context.unless_interrupted(work).await??);
    for (vm, id) in wanted {
        let suspects = repo_again.suspects(&vm)?;
        let named = suspects.iter().filter(|(point, _)| id.is_none_or(|id| id == **point));
        report
            .suspect
            .extend(named.map(|(point, disks)| format!("{vm}@{}: {}", point.short(), suspect::in_words(disks))));
    }
    context.output.print(&report);
    Ok(if report.intact { Code::Good } else { Code::Damaged })
}
