//! `livebackup backup SOURCE REPO`

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::args::{SkipArgs, SourceArgs};
use super::context::Context;
use super::exit::{self, Code};
use super::output;
use super::progress::Meter;
use super::{open, repository};
use crate::agent;
use crate::backup::report::Phase;
use crate::backup::{self, BackupOptions, LevelChoice, Report};
use crate::grade::Policy;
use crate::hooks::config;
use crate::hooks::program::{self, Hook};
use crate::impact::{Budget, MAX_BUDGET_MS};
use crate::machine::Taken;
use crate::repo::Compression;
use crate::repo::point::Level;
use crate::units::human_bytes;
use crate::vm::{QuietOptions, VmOptions};
use crate::wire::packing::How;
use crate::wire::trunk::MAX_CONNECTIONS;

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
    /// How data is compressed on its way from a server: none, lz4, zstd or auto (zstd where that is faster). What comes as zstd
    /// is stored as it came [default: as the server is configured].
    #[arg(long, value_name = "HOW")]
    wire_compression: Option<How>,
    /// In an incremental, have so many percent of the needed chunks confirmed beside them, of those that nobody is said to have
    /// written: finds out whether tracking can be believed. 0 for none; else 16 chunks of each disk at least.
    #[arg(long, value_name = "PERCENT", value_parser = super::values::percent, default_value = "1")]
    audit: u32,
    /// Do not wait for one's turn where another backup of the VM runs.
    #[arg(long)]
    no_wait: bool,
    /// Have our bitmaps kept by those qcow2 images that can, so that incrementals go on after an orderly end of QEMU; see the
    /// service's persistent_bitmaps.
    #[arg(long)]
    persistent_bitmaps: bool,
    /// Take not more than so much a second, as it comes over the line (20MiB, 500KiB): for a line that others use as well.
    #[arg(long, value_name = "SIZE", value_parser = super::values::rate)]
    limit_rate: Option<u64>,
    /// Take the data over so many connections: for a long way on which packets get lost. Others on the same line get less of it.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_CONNECTIONS)), default_value = "1")]
    connections: u32,
    #[command(flatten)]
    quiet: QuietArgs,
    #[command(flatten)]
    skip: SkipArgs,
    #[command(flatten)]
    budget: BudgetArgs,
    /// Where the backup gave way to the guest's writes, begin it anew after so many seconds, and twice as many each time, up to five
    /// times; 0: end with exit code 4.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=86_400), default_value = "60")]
    retry_after: u64,
}

/// What the backup may cost the guest.
#[derive(Debug, Args)]
pub struct BudgetArgs {
    /// Read slower when the guest's writes take so much longer than before (p99), and give up when that does not help.
    #[arg(long, value_name = "MILLISECONDS", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_BUDGET_MS)))]
    max_added_write_latency: Option<u32>,
    /// Read no more than this in a second, like 200M.
    #[arg(long, value_name = "SIZE", value_parser = super::values::read_rate)]
    max_read_rate: Option<u64>,
}

impl BudgetArgs {
    fn budget(&self) -> Budget {
        Budget { max_added_write_latency_ms: self.max_added_write_latency, max_read_rate: self.max_read_rate }
    }
}

/// How the guest is made quiet around the instant.
#[derive(Debug, Args)]
pub struct QuietArgs {
    /// Freeze the guest's file systems through its agent: require (or make no backup), prefer (else say why not) or
    /// never [default: prefer, or as the server is configured].
    #[arg(long, value_name = "POLICY", value_parser = super::values::policy)]
    freeze: Option<Policy>,
    /// Longest time for which they are frozen [default: 10].
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=60))]
    freeze_lease: Option<u64>,
    /// Let the guest trim its file systems (guest-fstrim, for up to 5 minutes) before a disk is read whole, so that what is
    /// free there is not read: require, prefer or never [default: never].
    #[arg(long, value_name = "POLICY", value_parser = super::values::policy)]
    trim: Option<Policy>,
    /// A file (TOML) of databases to be held and of programs to be run around the instant: tables [[hold]] and [[hook]], as
    /// in a server's configuration.
    #[arg(long, value_name = "FILE")]
    holds: Option<PathBuf>,
    /// Socket of the guest agent's channel [default: found through QEMU].
    #[arg(long, value_name = "PATH")]
    agent: Option<agent::Address>,
}

impl QuietArgs {
    /// How the VM is made quiet, and the hooks of the backup itself.
    fn options(&self) -> anyhow::Result<(QuietOptions, Vec<Hook>)> {
        let mut options = QuietOptions { agent: self.agent.clone(), ..QuietOptions::default() };
        if let Some(seconds) = self.freeze_lease {
            options.lease = Duration::from_secs(seconds);
        }
        options.trim = self.trim.unwrap_or(options.trim);
        let Some(file) = &self.holds else { return Ok((options, vec![])) };
        let (holds, hooks) = config::read(file).map_err(exit::usage)?;
        options.holds = holds;
        let (own, others) = hooks.into_iter().partition(|hook| hook.phase == program::Phase::Backup);
        options.hooks = others;
        Ok((options, own))
    }

    /// Whether something is said that a server's configuration has to say.
    fn is_local(&self, options: &QuietOptions) -> bool {
        let runs = !options.holds.is_empty() || !options.hooks.is_empty();
        self.agent.is_some() || self.freeze_lease.is_some() || self.trim.is_some() || runs
    }
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
    level.name()
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
            write!(f, "{}: {read} of {size} read, {stored} stored", output::name(&disk.disk))?;
            match &disk.taken {
                Taken::Full { reason } => writeln!(f, "; whole: {reason}")?,
                Taken::Scan { reason } => {
                    writeln!(f, "; scanned, {} the same: {reason}", human_bytes(disk.same_bytes))?;
                }
                Taken::Incremental { .. } if disk.same_bytes > 0 => {
                    writeln!(f, "; {} of it confirmed to be the same", human_bytes(disk.same_bytes))?;
                }
                Taken::Incremental { .. } => writeln!(f)?,
            }
            if let Some(impact) = &disk.impact {
                writeln!(f, "  guest meanwhile: {impact}")?;
            }
            disk.areas.areas.iter().try_for_each(|area| writeln!(f, "  left out: {area}"))?;
            disk.areas.kept.iter().try_for_each(|why| writeln!(f, "  note: {why}"))?;
        }
        for left_out in &report.left_out {
            writeln!(f, "left out: {left_out}")?;
        }
        for warning in &report.warnings {
            writeln!(f, "warning: {}", output::name(warning))?;
        }
        let (bytes, read) = match report.level {
            Level::Full | Level::Copy => (report.read_bytes, "read"),
            // What was scanned or audited and found the same has not changed.
            Level::Incremental | Level::Differential => {
                let same = report.disks.iter().map(|disk| disk.same_bytes).sum();
                (report.read_bytes.saturating_sub(same), "changed")
            }
        };
        let stopped = match report.durations.stopped_s {
            s if s > 0.0 => format!("; guest stopped {:.1} ms", s * 1e3),
            _ => String::new(),
        };
        let frozen = match &report.evidence.frozen {
            Some(frozen) => format!("; file systems frozen {:.1} ms", frozen.frozen_us as f64 / 1e3),
            None => String::new(),
        };
        match report.evidence.trimmed.as_ref().map(|trimmed| (trimmed.took_us, &trimmed.failed)) {
            Some((took_us, None)) => writeln!(f, "trimmed by the guest before, {:.2} s", took_us as f64 / 1e6)?,
            Some((_, Some(why))) => writeln!(f, "note: not trimmed: {why}")?,
            None => {}
        }
        for reason in &report.evidence.reasons {
            writeln!(f, "note: {}", output::name(reason))?;
        }
        let wire = match report.wire_bytes {
            Some(bytes) => format!(", {} over the line", human_bytes(bytes)),
            None => String::new(),
        };
        writeln!(
            f,
            "{} of {}: {}, {} {read}{wire}, {} stored, {:.2} s{frozen}{stopped}; {}-consistent point {}",
            level_name(report.level),
            output::name(&report.vm),
            count(report.disks.len(), "disk"),
            human_bytes(bytes),
            human_bytes(report.stored_bytes),
            report.durations.total_s,
            report.grade.name(),
            report.point.short()
        )
    }
}

pub async fn run(context: &Context, args: &BackupArgs) -> anyhow::Result<Code> {
    repository::check_order(&args.source.source, &args.repo)?;
    let repo = repository::open(&args.repo)?;
    let (quiet, hooks) = args.quiet.options()?;
    let skip = args.skip.options();
    let local = args.quiet.is_local(&quiet) || args.persistent_bitmaps || !skip.is_empty();
    let own = context.vm_options(args.source.vm.clone());
    // A hook may change the machine.
    let begins_at_once = hooks.is_empty() && quiet.hooks.is_empty();
    let persistent_bitmaps = args.persistent_bitmaps;
    let options = VmOptions { quiet, skip, persistent_bitmaps, begins_at_once, ..own };
    let sidecar = open::open_with(context, &args.source, options).await?;
    if local && sidecar.here().is_none() {
        return Err(exit::usage(
            "--agent, --freeze-lease, --trim, --persistent-bitmaps, --skip, --skip-swap, holds and their hooks are for a VM that no server has: the server's configuration says them",
        ));
    }
    let (compression, freeze, audit_permille) = (args.compression, args.quiet.freeze, args.audit);
    let (wait, budget, limit_rate) = (!args.no_wait, args.budget.budget(), args.limit_rate);
    let options = BackupOptions {
        limit_rate,
        compression,
        wire_compression: args.wire_compression,
        connections: args.connections,
        freeze,
        audit_permille,
        budget,
        retry_after: (args.retry_after > 0).then(|| Duration::from_secs(args.retry_after)),
        hooks,
        wait,
        ..args.what.options()
    };
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
