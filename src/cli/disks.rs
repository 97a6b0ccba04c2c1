//! `livebackup disks SOURCE`

use std::fmt;

use clap::Args;
use serde::Serialize;

use super::args::SourceArgs;
use super::context::Context;
use super::exit::Code;
use super::open;
use super::output;
use super::table::Table;
use crate::machine::{FoundDisk, Machine, Verdict};
use crate::units::human_bytes;

#[derive(Debug, Args)]
pub struct DisksArgs {
    #[command(flatten)]
    source: SourceArgs,
}

#[derive(Serialize)]
struct DisksReport {
    vm: String,
    machine: Machine,
    disks: Vec<FoundDisk>,
}

/// `qcow2 /images/vm1.qcow2`
pub fn medium(found: &FoundDisk) -> String {
    match found.disk.chain.first() {
        Some(file) => format!("{} {}", file.format, file.filename),
        None => "-".to_owned(),
    }
}

/// What a backup does with a device, in a word or two.
fn verdict(found: &FoundDisk) -> &'static str {
    match (&found.verdict, &found.disk.shared) {
        (Verdict::Protectable, None) => "backed up",
        (Verdict::Protectable, Some(_)) => "backed up, always in full",
        (Verdict::LeftOut(_), _) => "left out",
        (Verdict::NotProtectable(_), _) => "not protectable",
    }
}

impl fmt::Display for DisksReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machine = self.machine.machine_type.as_deref().unwrap_or("unknown machine type");
        writeln!(
            f,
            "{}: QEMU {}, {}, {machine}",
            output::name(&self.vm),
            self.machine.qemu_version,
            self.machine.target
        )?;
        let mut table = Table::new(&["DISK", "DEVICE", ">SIZE", "VERDICT", "MEDIUM"]);
        for found in &self.disks {
            let size = human_bytes(found.disk.size_bytes);
            let disk = &found.disk;
            table.row([disk.name.clone(), disk.device.clone(), size, verdict(found).to_owned(), medium(found)]);
        }
        write!(f, "{table}")?;
        for found in &self.disks {
            match (&found.verdict, &found.disk.shared) {
                (Verdict::Protectable, None) => {}
                (Verdict::Protectable, Some(reason)) => {
                    writeln!(f, "{} is read whole every time: {reason}", output::name(&found.disk.name))?;
                }
                (Verdict::LeftOut(reason), _) => {
                    writeln!(f, "{} is left out: {reason}", output::name(&found.disk.name))?
                }
                (Verdict::NotProtectable(reason), _) => writeln!(
                    f,
                    "{0} cannot be protected: {reason}; a backup needs `--exclude {0}`",
                    output::name(&found.disk.name)
                )?,
            }
        }
        let taken = || self.disks.iter().filter(|found| found.verdict == Verdict::Protectable);
        let bytes = taken().map(|found| found.disk.size_bytes).fold(0, u64::saturating_add);
        writeln!(f, "a backup takes {} of {} devices, {}", taken().count(), self.disks.len(), human_bytes(bytes))
    }
}

pub async fn run(context: &Context, args: &DisksArgs) -> anyhow::Result<Code> {
    let mut sidecar = open::open(context, &args.source).await?;
    let (machine, disks) = context.unless_interrupted(sidecar.disks()).await?;
    context.output.print(&DisksReport { vm: sidecar.vm().to_owned(), machine, disks });
    Ok(Code::Good)
}
