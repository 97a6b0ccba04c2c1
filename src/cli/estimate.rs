//! `livebackup estimate SOURCE REPO`

use std::fmt;

use clap::Args;
use serde::Serialize;

use super::args::SourceArgs;
use super::backup::WhatArgs;
use super::context::Context;
use super::exit::Code;
use super::output;
use super::table::Table;
use super::{open, repository};
use crate::backup;
use crate::machine::Taken;
use crate::units::human_bytes;
use crate::wire::message::Estimated;

#[derive(Debug, Args)]
pub struct EstimateArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// The repository: a directory made by `livebackup init`.
    repo: String,
    #[command(flatten)]
    what: WhatArgs,
}

#[derive(Serialize)]
struct EstimateReport {
    vm: String,
    disks: Vec<Estimated>,
    needed_bytes: u64,
}

impl fmt::Display for EstimateReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(&["DISK", ">SIZE", ">READ", "HOW"]);
        for disk in &self.disks {
            let how = match &disk.taken {
                Taken::Full { reason } => format!("whole: {reason}"),
                Taken::Scan { reason } => format!("whole, to be compared: {reason}"),
                Taken::Incremental { since } => format!("since checkpoint {}", since.short()),
            };
            table.row([disk.disk.clone(), human_bytes(disk.size_bytes), human_bytes(disk.needed_bytes), how]);
        }
        write!(f, "{table}")?;
        writeln!(f, "a backup of {} would read {}", output::name(&self.vm), human_bytes(self.needed_bytes))
    }
}

pub async fn run(context: &Context, args: &EstimateArgs) -> anyhow::Result<Code> {
    repository::check_order(&args.source.source, &args.repo)?;
    let repo = repository::open(&args.repo)?;
    let sidecar = open::open(context, &args.source).await?;
    let vm = sidecar.vm().to_owned();
    let disks = context.unless_interrupted(backup::estimate(sidecar, repo, args.what.options())).await?;
    let needed_bytes = disks.iter().map(|disk| disk.needed_bytes).fold(0, u64::saturating_add);
    context.output.print(&EstimateReport { vm, disks, needed_bytes });
    Ok(Code::Good)
}
