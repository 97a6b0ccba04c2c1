//! `livebackup guardian ADDRESS`: the process that a sidecar starts beside itself.

use clap::Args;

use super::exit::{self, Code};
use crate::monitor;
use crate::vm::guardian;

#[derive(Debug, Args)]
pub struct GuardianArgs {
    /// Where the monitor listens.
    address: String,
}

pub fn run(args: &GuardianArgs) -> anyhow::Result<Code> {
    let address: monitor::Address = args.address.parse().map_err(|e| exit::usage(format!("{e}")))?;
    // One thread: it has one thing to do, and little memory to do it in.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(guardian::run(&address));
    Ok(Code::Good)
}
