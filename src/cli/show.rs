//! `livebackup show REPO VM[@POINT]`

use std::fmt;

use clap::Args;
use serde::Serialize;

use super::backup::level_name;
use super::context::Context;
use super::exit::Code;
use super::points::grade_name;
use super::repository;
use super::table::Table;
use crate::machine::Verdict;
use crate::repo::Manifest;
use crate::repo::point::Taken;
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
#[serde(transparent)]
struct ShowReport(Manifest);

impl fmt::Display for ShowReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let point = &self.0;
        writeln!(f, "point     {}", point.id)?;
        writeln!(f, "vm        {}", point.vm)?;
        writeln!(f, "instant   {}", point.instant)?;
        match point.parent {
            Some(parent) => writeln!(f, "level     {}, since point {}", level_name(point.level), parent.short())?,
            None => writeln!(f, "level     {}", level_name(point.level))?,
        }
        write!(f, "grade     {}", grade_name(point.grade))?;
        for (name, value) in &point.evidence {
            write!(f, "; {name} {value}")?;
        }
        writeln!(f, "\ntook      {:.2} s", point.finished.duration_since(point.started).as_secs_f64())?;
        let machine = &point.machine;
        let kind = machine.machine_type.as_deref().unwrap_or("unknown machine type");
        writeln!(f, "machine   QEMU {}, {}, {kind}", machine.qemu_version, machine.target)?;
        writeln!(f, "made by   livebackup {}\n", point.livebackup)?;
        let mut table = Table::new(&["DISK", ">SIZE", ">READ", ">STORED", "TAKEN"]);
        for disk in &point.disks {
            let taken = match &disk.taken {
                Taken::Full { reason } => format!("whole: {reason}"),
                Taken::Incremental { since } => format!("since checkpoint {}", since.short()),
            };
            let [size, read, stored] = [disk.disk.size_bytes, disk.read_bytes, disk.stored_bytes].map(human_bytes);
            table.row([disk.disk.name.clone(), size, read, stored, taken]);
        }
        write!(f, "{table}")?;
        for file in &point.files {
            writeln!(f, "file {}, {}", file.name, human_bytes(file.image.size_bytes))?;
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

pub fn run(context: &Context, args: &ShowArgs) -> anyhow::Result<Code> {
    let repo = repository::open(&args.repo)?;
    context.output.print(&ShowReport(repository::point(&repo, &args.point)?));
    Ok(Code::Good)
}
