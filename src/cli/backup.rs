//! `livebackup backup SOURCE REPO`

use std::fmt;

use clap::Args;
use serde::Serialize;

use super::args::SourceArgs;
use super::context::Context;
use super::exit::Code;
use super::progress::Meter;
use super::{open, repository};
use crate::backup::report::Phase;
use crate::backup::{self, BackupOptions, LevelChoice, Report};
use crate::repo::Compression;
use crate::repo::point::{Level, Taken};
use crate::units::human_bytes;

#[derive(Debug, Args)]
pub struct BackupArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// The repository: a directory made by `livebackup init`.
    repo: String,
    #[command(flatten)]
    what: WhatArgs,
    /// How data is stored: none, zstd or zstd:LEVEL.
    #[arg(long, value_name = "HOW", value_parser = super::values::compression, default_value = "zstd:1")]
    compression: Compression,
}

/// Which kind of backup, of which disks.
#[derive(Debug, Args)]
pub struct WhatArgs {
    /// auto (incremental where possible), full, incremental (or fail), differential (since the last full), copy (full,
    /// and later backups do not go on from it).
    #[arg(long, value_parser = super::values::level, default_value = "auto")]
    level: LevelChoice,
    /// Only this disk (as `livebackup disks` names it). May be repeated.
    #[arg(long, value_name = "DISK")]
    include: Vec<String>,
    /// Not this disk. May be repeated.
    #[arg(long, value_name = "DISK")]
    exclude: Vec<String>,
}

impl WhatArgs {
    pub fn options(&self) -> BackupOptions {
        BackupOptions {
            level: self.level,
            include: self.include.clone(),
            exclude: self.exclude.clone(),
            ..BackupOptions::default()
        }
    }
}

/// The level's name.
pub fn level_name(level: Level) -> &'static str {
    match level {
        Level::Full => "full",
        Level::Incremental => "incremental",
        Level::Differential => "differential",
        Level::Copy => "copy",
    }
}

/// `1 disk`, `2 disks`.
pub fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

#[derive(Serialize)]
#[serde(transparent)]
struct BackupReport(Report);

impl fmt::Display for BackupReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = &self.0;
        for disk in &report.disks {
            let (read, size) = (human_bytes(disk.read_bytes), human_bytes(disk.size_bytes));
            let stored = human_bytes(disk.stored_bytes);
            write!(f, "{}: {read} of {size} read, {stored} stored", disk.disk)?;
            match &disk.taken {
                Taken::Full { reason } => writeln!(f, "; whole: {reason}")?,
                Taken::Incremental { .. } => writeln!(f)?,
            }
        }
        for left_out in &report.left_out {
            writeln!(f, "left out: {left_out}")?;
        }
        for warning in &report.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        let read = match report.level {
            Level::Full | Level::Copy => "read",
            Level::Incremental | Level::Differential => "changed",
        };
        let stopped = match report.durations.stopped_s {
            s if s > 0.0 => format!("; guest stopped {:.1} ms", s * 1e3),
            _ => String::new(),
        };
        writeln!(
            f,
            "{} of {}: {}, {} {read}, {} stored, {:.2} s{stopped}; point {}",
            level_name(report.level),
            report.vm,
            count(report.disks.len(), "disk"),
            human_bytes(report.read_bytes),
            human_bytes(report.stored_bytes),
            report.durations.total_s,
            report.point.short()
        )
    }
}

pub async fn run(context: &Context, args: &BackupArgs) -> anyhow::Result<Code> {
    repository::check_order(&args.source.source, &args.repo)?;
    let repo = repository::open(&args.repo)?;
    let sidecar = open::open(context, &args.source).await?;
    let options = BackupOptions { compression: args.compression, ..args.what.options() };
    let mut meter = Meter::new(context.output);
    let show = |progress: backup::Progress| {
        let doing = match progress.phase {
            Phase::Transfer => "backing up",
            Phase::Store => "storing",
        };
        meter.at(doing, progress.received_bytes, progress.needed_bytes);
    };
    let done = backup::run(sidecar, repo, options, show, context.interrupted.clone()).await;
    // The bar goes before anything is said.
    drop(meter);
    context.output.done(&BackupReport(done?));
    Ok(Code::Good)
}
