//! `livebackup detach SOURCE`

use std::fmt;

use clap::Args;
use serde::Serialize;

use super::args::SourceArgs;
use super::context::Context;
use super::exit::Code;
use super::open;

#[derive(Debug, Args)]
pub struct DetachArgs {
    #[command(flatten)]
    source: SourceArgs,
}

#[derive(Serialize)]
struct DetachReport {
    vm: String,
    removed: Vec<String>,
}

impl fmt::Display for DetachReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.removed.iter().try_for_each(|what| writeln!(f, "removed {what}"))?;
        match self.removed.is_empty() {
            true => writeln!(f, "nothing of livebackup's was in {}", self.vm),
            false => writeln!(f, "nothing of livebackup's is in {} any more; its next backup reads all", self.vm),
        }
    }
}

pub async fn run(context: &Context, args: &DetachArgs) -> anyhow::Result<Code> {
    let mut sidecar = open::open(context, &args.source).await?;
    // Not interrupted half-way: it is short.
    let removed = sidecar.detach().await?;
    context.output.done(&DetachReport { vm: sidecar.vm().to_owned(), removed });
    Ok(Code::Good)
}
