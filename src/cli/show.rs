//! `livebackup show REPO VM[@POINT]`

use std::fmt;

use clap::Args;
use serde::Serialize;

use super::backup::{count, level_name};
use super::context::Context;
use super::exit::Code;
use super::output;
use super::repository;
use super::table::Table;
use crate::machine::{Taken, Verdict};
use crate::repo::Manifest;
use crate::repo::point::{AuditRecord, Evidence};
use crate::repo::suspect::{self, SuspectDisk};
use crate::units::human_bytes;

#[derive(Debug, Args)]
pub struct ShowArgs {
    /// The repository.
    repo: String,
    /// The VM, and the point: the latest unless it is said.
    #[arg(value_name = "VM[@POINT]")]
    point: String,
}

#[derive(Serialize)]
struct ShowReport {
    #[serde(flatten)]
    point: Manifest,
    /// Why the point rests on what cannot be believed, if it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    suspect: Option<Vec<SuspectDisk>>,
}

/// What an audit has confirmed so far, in words.
fn coverage(record: &AuditRecord, chunks: u64) -> Option<String> {
    let percent = (record.position * 100).checked_div(chunks)?;
    let runs = count(record.runs as usize, "run");
    match record.trusted {
        Some(trusted) if record.runs > 0 || trusted != record.round_started => {
            Some(format!("{percent} % of the chunks confirmed in {runs}; all of them were right at {trusted:.0}"))
        }
        Some(_) => None,
        None => Some(format!("{percent} % of the chunks confirmed in {runs}")),
    }
}

impl fmt::Display for ShowReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let point = &self.point;
        writeln!(f, "point     {}", point.id)?;
        writeln!(f, "vm        {}", output::name(&point.vm))?;
        writeln!(f, "instant   {}", point.instant)?;
        match point.parent {
            Some(parent) => writeln!(f, "level     {}, since point {}", level_name(point.level), parent.short())?,
            None => writeln!(f, "level     {}", level_name(point.level))?,
        }
        write!(f, "grade     {}", point.grade.name())?;
        evidence(f, &point.evidence)?;
        writeln!(f, "took      {:.2} s", point.finished.duration_since(point.started).as_secs_f64())?;
        let machine = &point.machine;
        let kind = machine.machine_type.as_deref().unwrap_or("unknown machine type");
        writeln!(f, "machine   QEMU {}, {}, {kind}", machine.qemu_version, machine.target)?;
        writeln!(f, "made by   livebackup {}\n", point.livebackup)?;
        let mut table = Table::new(&["DISK", ">SIZE", ">READ", ">STORED", "TAKEN"]);
        for disk in &point.disks {
            let taken = match &disk.taken {
                Taken::Full { reason } => format!("whole: {reason}"),
                Taken::Scan { reason } => format!("scanned, {} the same: {reason}", human_bytes(disk.same_bytes)),
                Taken::Incremental { since } => format!("since checkpoint {}", since.short()),
            };
            let [size, read, stored] = [disk.disk.size_bytes, disk.read_bytes, disk.stored_bytes].map(human_bytes);
            table.row([disk.disk.name.clone(), size, read, stored, taken]);
        }
        write!(f, "{table}")?;
        for disk in &point.disks {
            if let Some(words) = disk.audit.and_then(|record| coverage(&record, disk.image.chunks())) {
                writeln!(f, "audit of {}: {words}", output::name(&disk.disk.name))?;
            }
            if let Some(impact) = &disk.impact {
                writeln!(f, "guest on {} meanwhile: {impact}", output::name(&disk.disk.name))?;
            }
            for area in &disk.areas.areas {
                writeln!(f, "left out of {}, zero in this point: {area}", output::name(&disk.disk.name))?;
            }
            disk.areas
                .kept
                .iter()
                .try_for_each(|why| writeln!(f, "note on {}: {why}", output::name(&disk.disk.name)))?;
        }
        if let Some(suspect) = &self.suspect {
            writeln!(f, "SUSPECT: {}", suspect::in_words(suspect))?;
        }
        for file in &point.files {
            writeln!(f, "file {}, {}", output::name(&file.name), human_bytes(file.image.size_bytes))?;
        }
        for found in &point.left_out {
            let reason = match &found.verdict {
                Verdict::Protectable => "it was excluded",
                Verdict::LeftOut(reason) | Verdict::NotProtectable(reason) => reason,
            };
            writeln!(f, "left out: {}: {reason}", found.disk.name)?;
        }
        Ok(())
    }
}

/// What the grade rests on.
fn evidence(f: &mut fmt::Formatter<'_>, evidence: &Evidence) -> fmt::Result {
    if let Some(frozen) = &evidence.frozen {
        write!(f, "; {} frozen for {}", count(frozen.file_systems as usize, "file system"), ms(frozen.frozen_us))?;
        if !frozen.mount_points.is_empty() {
            write!(f, " ({})", output::names(&frozen.mount_points))?;
        }
    }
    if evidence.stopped_us > 0 {
        write!(f, "; guest stopped for {}", ms(evidence.stopped_us))?;
    }
    writeln!(f)?;
    for hold in &evidence.holds {
        match &hold.failed {
            None => write!(f, "  held    {} for {}", hold.name, ms(hold.held_us))?,
            Some(why) => write!(f, "  NOT held {}: {why}", hold.name)?,
        }
        hold.positions.iter().try_for_each(|(name, value)| write!(f, "; {name} {value}"))?;
        writeln!(f)?;
    }
    match evidence.trimmed.as_ref().map(|trimmed| (trimmed, &trimmed.failed)) {
        Some((trimmed, None)) => {
            let number = count(trimmed.file_systems as usize, "file system");
            writeln!(f, "  trimmed {number} before, in {}", ms(trimmed.took_us))?;
        }
        Some((_, Some(why))) => writeln!(f, "  NOT trimmed: {why}")?,
        None => {}
    }
    evidence.reasons.iter().try_for_each(|reason| writeln!(f, "  but     {reason}"))?;
    if let Some(guest) = &evidence.guest {
        let told = [&guest.host_name, &guest.os, &guest.kernel].map(String::as_str);
        let told: Vec<_> = told.into_iter().filter(|text| !text.is_empty()).collect();
        writeln!(f, "guest     {}; agent {}", told.join(", "), guest.agent_version)?;
        for fs in &guest.file_systems {
            writeln!(
                f,
                "  {} ({}) on {}: {}",
                output::name(&fs.mount_point),
                output::name(&fs.kind),
                output::name(&fs.device),
                output::names(&fs.disks)
            )?;
        }
    }
    Ok(())
}

/// Microseconds, for people.
fn ms(us: u64) -> String {
    format!("{:.1} ms", us as f64 / 1e3)
}

pub fn run(context: &Context, args: &ShowArgs) -> anyhow::Result<Code> {
    let repo = repository::open(&args.repo)?;
    let point = repository::point(&repo, &args.point)?;
    let suspect = repo.suspects(&point.vm)?.remove(&point.id);
    context.output.print(&ShowReport { point, suspect });
    Ok(Code::Good)
}
