//! `livebackup serve --config FILE`

use std::path::PathBuf;

use clap::Args;

use super::context::Context;
use super::exit::Code;
use crate::server::{self, Config};

#[derive(Debug, Args)]
pub struct ServeArgs {
    /// What to serve, and where: TOML.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

pub async fn run(context: &Context, args: &ServeArgs) -> anyhow::Result<Code> {
    let config = Config::read(&args.config)?;
    server::serve(config, context.vm_options(None), context.interrupted.clone()).await?;
    Ok(Code::Good)
}
