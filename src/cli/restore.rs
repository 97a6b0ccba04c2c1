//! `livebackup restore REPO VM[@POINT] DIR`

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::context::Context;
use super::exit::Code;
use super::output;
use super::progress::Meter;
use super::repository;
use crate::area::Area;
use crate::restore::{self, DiskTarget, RestoreOptions, RestoreReport};
use crate::units::{PointId, human_bytes};

#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The repository.
    repo: String,
    /// The VM, and the point: the latest unless it is said.
    #[arg(value_name = "VM[@POINT]")]
    point: String,
    /// Where the disks and the machine's definition go.
    dir: PathBuf,
    /// Only this disk, and into this file or device if it is said. May be repeated.
    #[arg(long, value_name = "DISK[=TARGET]")]
    disk: Vec<String>,
    /// Format of the disks' files.
    #[arg(long, value_enum, default_value_t = FormatName::Raw)]
    format: FormatName,
    /// Overwrite what is there.
    #[arg(long)]
    force: bool,
    /// Read every disk again when it is written, and compare it with the point.
    #[arg(long)]
    compare: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FormatName {
    Raw,
    Qcow2,
}

impl From<FormatName> for restore::Format {
    fn from(name: FormatName) -> Self {
        match name {
            FormatName::Raw => Self::Raw,
            FormatName::Qcow2 => Self::Qcow2,
        }
    }
}

fn target(text: &str) -> DiskTarget {
    match text.split_once('=') {
        Some((disk, target)) => DiskTarget { disk: disk.to_owned(), target: Some(target.into()) },
        None => DiskTarget { disk: text.to_owned(), target: None },
    }
}

#[derive(Serialize)]
struct RestoredLine {
    disk: String,
    path: PathBuf,
    size_bytes: u64,
    data_bytes: u64,
    zero_bytes: u64,
    compared: bool,
    /// What was left out of the point, and is zero here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    left_out: Vec<Area>,
}

#[derive(Serialize)]
struct Restored {
    vm: String,
    point: PointId,
    disks: Vec<RestoredLine>,
    files: Vec<PathBuf>,
    definition: PathBuf,
    command: Option<PathBuf>,
    /// What of it may be older than the point.
    #[serde(skip_serializing_if = "Option::is_none")]
    suspect: Option<String>,
    seconds: f64,
}

impl Restored {
    fn new(
        (vm, point): (String, PointId),
        report: RestoreReport,
        mut areas: BTreeMap<String, Vec<Area>>,
        suspect: Option<String>,
    ) -> Self {
        let line = |disk: restore::RestoredDisk| RestoredLine {
            left_out: areas.remove(&disk.disk).unwrap_or_default(),
            disk: disk.disk,
            path: disk.path,
            size_bytes: disk.size_bytes,
            data_bytes: disk.data_bytes,
            zero_bytes: disk.zero_bytes,
            compared: disk.compared,
        };
        Self {
            vm,
            point,
            disks: report.disks.into_iter().map(line).collect(),
            files: report.files,
            definition: report.definition,
            command: report.command,
            suspect,
            seconds: report.elapsed.as_secs_f64(),
        }
    }
}

impl fmt::Display for Restored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for disk in &self.disks {
            let (size, data) = (human_bytes(disk.size_bytes), human_bytes(disk.data_bytes));
            let compared = if disk.compared { ", compared" } else { "" };
            writeln!(f, "{}: {}, {size}, {data} of data{compared}", output::name(&disk.disk), disk.path.display())?;
            disk.left_out.iter().try_for_each(|area| writeln!(f, "  zero, as it was left out of the point: {area}"))?;
        }
        for file in &self.files {
            writeln!(f, "file: {}", file.display())?;
        }
        writeln!(f, "definition: {}", self.definition.display())?;
        if let Some(command) = &self.command {
            writeln!(f, "its command line, with the restored disks: {}", command.display())?;
        }
        if let Some(suspect) = &self.suspect {
            writeln!(f, "SUSPECT: {suspect}")?;
        }
        let bytes = human_bytes(self.disks.iter().map(|disk| disk.data_bytes).sum());
        let disks = super::backup::count(self.disks.len(), "disk");
        writeln!(
            f,
            "restored {}@{}: {disks}, {bytes} of data, {:.2} s",
            output::name(&self.vm),
            self.point.short(),
            self.seconds
        )
    }
}

pub async fn run(context: &Context, args: &RestoreArgs) -> anyhow::Result<Code> {
    let repo = repository::open(&args.repo)?;
    let manifest = repository::point(&repo, &args.point)?;
    let options = RestoreOptions {
        disks: args.disk.iter().map(|text| target(text)).collect(),
        format: args.format.into(),
        force: args.force,
        compare: args.compare,
        ..RestoreOptions::new(&args.dir)
    };
    let (vm, point) = (manifest.vm.clone(), manifest.id);
    let chosen: Vec<_> = options.disks.iter().map(|disk| disk.disk.clone()).collect();
    let suspect = repository::suspect(&repo, &manifest, &chosen);
    let areas = manifest.disks.iter().map(|disk| (disk.disk.name.clone(), disk.areas.areas.clone())).collect();
    let stop = Arc::new(AtomicBool::new(false));
    let mut meter = Meter::new(context.output);
    let flag = stop.clone();
    let mut work = tokio::task::spawn_blocking(move || {
        let mut show = |progress: restore::Progress| {
            meter.at(&format!("restoring {}", progress.disk), progress.done_bytes, progress.total_bytes);
        };
        restore::restore(&repo, &manifest, &options, &flag, &mut show)
    });
    let report = tokio::select! {
        done = &mut work => done?,
        () = context.asked_to_stop() => {
            // It cleans up what is half written, then ends.
            stop.store(true, Ordering::Relaxed);
            work.await?
        }
    };
    context.output.done(&Restored::new((vm, point), report?, areas, suspect));
    Ok(Code::Good)
}
