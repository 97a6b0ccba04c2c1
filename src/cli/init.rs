//! `livebackup init REPO`

use std::fmt;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::context::Context;
use super::exit::{self, Code};
use super::repository;
use crate::repo::{DEFAULT_CHUNK_BYTES, Repository};
use crate::units::{RepositoryId, human_bytes};

#[derive(Debug, Args)]
pub struct InitArgs {
    /// A directory that is empty or does not exist.
    repo: String,
    /// Unit of deduplication: a power of two from 64K to 1M.
    #[arg(long, value_name = "SIZE", value_parser = super::values::size, default_value = "128K")]
    chunk_size: u64,
}

#[derive(Serialize)]
struct InitReport {
    repository: RepositoryId,
    path: PathBuf,
    chunk_bytes: u32,
}

impl fmt::Display for InitReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, chunks) = (self.path.display(), human_bytes(self.chunk_bytes.into()));
        write!(f, "{path} is a livebackup repository now, with chunks of {chunks}")
    }
}

pub fn run(context: &Context, args: &InitArgs) -> anyhow::Result<Code> {
    let path = repository::directory(&args.repo)?;
    let chunk_bytes = u32::try_from(args.chunk_size).ok().filter(|size| crate::repo::config::is_chunk_size(*size));
    let chunk_bytes = chunk_bytes.ok_or_else(|| {
        let usual = human_bytes(DEFAULT_CHUNK_BYTES.into());
        exit::usage(format!("--chunk-size is a power of two from 64K to 1M, usually {usual}"))
    })?;
    let made = Repository::init(path, chunk_bytes)?;
    context.output.done(&InitReport { repository: made.config().id, path: path.to_owned(), chunk_bytes });
    Ok(Code::Good)
}
