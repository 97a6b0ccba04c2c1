//! `livebackup detach [--all] SOURCE`

use std::fmt;

use clap::Args;
use serde::Serialize;

use super::args::SourceArgs;
use super::context::Context;
use super::exit::Code;
use super::open;
use super::output;

#[derive(Debug, Args)]
pub struct DetachArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Also what livebackups with other state directories have left, for one whose state directory is lost.
    #[arg(long)]
    all: bool,
}

#[derive(Serialize)]
struct DetachReport {
    vm: String,
    removed: Vec<String>,
    left: Vec<String>,
}

impl fmt::Display for DetachReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.removed.iter().try_for_each(|what| writeln!(f, "removed {what}"))?;
        self.left.iter().try_for_each(|what| writeln!(f, "still there: {what}; --all removes it"))?;
        match self.removed.is_empty() {
            true => writeln!(f, "nothing of this livebackup's was in {}", output::name(&self.vm)),
            false => writeln!(
                f,
                "nothing of this livebackup's is in {} any more; its next backup reads all",
                output::name(&self.vm)
            ),
        }
    }
}

pub async fn run(context: &Context, args: &DetachArgs) -> anyhow::Result<Code> {
    let mut sidecar = open::open(context, &args.source).await?;
    // Not interrupted half-way: it is short.
    let (removed, left) = sidecar.detach(args.all).await?;
    context.output.done(&DetachReport { vm: sidecar.vm().to_owned(), removed, left });
    Ok(Code::Good)
}
