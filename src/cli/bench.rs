//! `livebackup bench write-overhead`; `guest-writes` is in [`guest`].

mod guest;

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;

use super::context::Context;
use super::exit::{self, Code};
use super::progress::{self, Meter};
use crate::overhead::error::OverheadError;
use crate::overhead::html;
use crate::overhead::load::Workload;
use crate::overhead::method::Method;
use crate::overhead::report::Report;
use crate::overhead::rig::{Cache, RigOptions};
use crate::overhead::{self, MIN_SIZE_BYTES, OverheadOptions, Progress};
use crate::units::{GIB, GRANULE_BYTES};

#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Measure what backup methods cost a guest's writes, on a machine of its own
    ///
    /// Starts QEMUs without a guest system, writes to their disk as a guest would, without a pause, and makes backups
    /// meanwhile: livebackup's and those of QEMU's own means, in turn. Needs no VM and touches none; what it makes is in
    /// a directory of its own inside of --dir and is removed at the end; for the method lvm, which only root can have, that
    /// is a volume group on a loop device. By default it takes some 4 minutes and 2 GiB (3 with lvm).
    WriteOverhead(WriteOverheadArgs),
    /// Measure what livebackup's backups cost the writes of a VM that runs, with fio in its guest
    ///
    /// Runs fio in the guest, through the guest's agent, on a file of its own, and backs the VM up meanwhile; what is read is thrown
    /// away. The guest needs Linux, QEMU's agent with guest-exec allowed, and fio. Nothing is left, in QEMU or in the guest: the
    /// file is removed, also after an error and Ctrl-C; what livebackup knows of the VM otherwise is not touched. A VM that a
    /// running `livebackup serve` has cannot be measured. The guest has as much to do as it can, and --size is written to its disk
    /// again and again: not for a machine that others are waiting for. By default it takes some 4 minutes.
    GuestWrites(guest::GuestWritesArgs),
}

#[derive(Debug, Args)]
struct WriteOverheadArgs {
    /// QEMU. A qemu-img beside it is used, else the one that is installed.
    #[arg(long, value_name = "PATH", default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    /// Where the disk, targets and scratch go: on the file system that is of interest [default: the directory for temporary
    /// files].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// A directory on another file system, for scratch (method fleece-other).
    #[arg(long, value_name = "DIR")]
    other_dir: Option<PathBuf>,
    /// Size of the disk.
    #[arg(long, value_name = "SIZE", value_parser = super::values::size, default_value = "1G")]
    size: u64,
    /// Break a backup off that has not ended then; two fifths of it are measured before, one fifth after.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600), default_value_t = 5)]
    seconds: u32,
    /// How often each is measured; the methods take turns.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1000), default_value_t = 3)]
    rounds: u32,
    /// What the guest does: random (4 KiB writes), sequential (64 KiB writes), database (4 KiB writes, each with a flush),
    /// mixed (4 KiB, 7 reads to 3 writes), or all. May be repeated [default: random].
    #[arg(long, value_name = "WORKLOAD")]
    workload: Vec<String>,
    /// What is done meanwhile: none, bitmap, fleece, fleece-other, fleece-memory, incremental, incremental-busy, acknowledged,
    /// qemu-fleece, push, push-slow, overlay, lvm, or all. May be repeated [default: all].
    #[arg(long, value_name = "METHOD")]
    method: Vec<String>,
    /// Requests of the guest that are under way at once.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=64), default_value_t = 8)]
    depth: u16,
    /// Read backups no faster than this in a second, or unlimited. May be repeated: each method that has a reader is measured with
    /// each [default: unlimited].
    #[arg(long, value_name = "SIZE", value_parser = reader)]
    reader_rate: Vec<Reader>,
    /// QEMU's cache mode of the disk: writeback (the host's page cache) or none.
    #[arg(long, value_name = "MODE", value_parser = cache, default_value = "writeback")]
    cache: Cache,
    /// Write everything, each run with its course, as JSON.
    #[arg(long, value_name = "FILE")]
    json_file: Option<PathBuf>,
    /// Write a page with pictures for a browser; one file that needs no other.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the tables as Markdown.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

/// A reader's rate; none is as fast as it can.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Reader(Option<u64>);

fn reader(text: &str) -> Result<Reader, String> {
    match text {
        "unlimited" => Ok(Reader(None)),
        text => super::values::read_rate(text).map(|rate| Reader(Some(rate))),
    }
}

/// Each rate once; without any, as fast as it can.
fn readers(named: &[Reader]) -> Vec<Option<u64>> {
    let mut readers: Vec<_> = named.iter().map(|reader| reader.0).collect();
    readers.sort();
    readers.dedup();
    if readers.is_empty() {
        readers.push(None);
    }
    readers
}

fn cache(text: &str) -> Result<Cache, String> {
    let all = [Cache::Writeback, Cache::None];
    all.into_iter().find(|c| c.name() == text).ok_or_else(|| "it is writeback or none".to_owned())
}

/// The named ones in their usual order, or all.
fn chosen<T: Copy + PartialEq + std::fmt::Display + std::str::FromStr<Err = String>>(
    names: &[String],
    all: &[T],
    default: &[T],
) -> anyhow::Result<Vec<T>> {
    if names.is_empty() {
        return Ok(default.to_vec());
    }
    if names.iter().any(|name| name == "all") {
        return Ok(all.to_vec());
    }
    let named = names.iter().map(|name| name.parse().map_err(exit::usage)).collect::<anyhow::Result<Vec<T>>>()?;
    if let Some(other) = named.iter().find(|one| !all.contains(one)) {
        let all: Vec<_> = all.iter().map(T::to_string).collect();
        return Err(exit::usage(format!("{other} cannot be measured here: it is one of {}", all.join(", "))));
    }
    Ok(all.iter().copied().filter(|one| named.contains(one)).collect())
}

impl WriteOverheadArgs {
    fn options(&self) -> anyhow::Result<OverheadOptions> {
        if self.size < MIN_SIZE_BYTES || self.size > 64 * GIB || !self.size.is_multiple_of(GRANULE_BYTES) {
            return Err(exit::usage("--size is 16M to 64G, in whole 64K"));
        }
        Ok(OverheadOptions {
            rig: RigOptions { qemu: found(&self.qemu)?, cache: self.cache },
            dir: self.dir.clone().unwrap_or_else(std::env::temp_dir),
            other: self.other_dir.clone(),
            size_bytes: self.size,
            seconds: self.seconds,
            rounds: self.rounds,
            depth: self.depth,
            workloads: chosen(&self.workload, &Workload::ALL, &[Workload::Random])?,
            methods: chosen(&self.method, &Method::ALL, &Method::ALL)?,
            readers: readers(&self.reader_rate),
        })
    }
}

/// A program's path; a bare name is looked up as a shell does.
fn found(program: &Path) -> anyhow::Result<PathBuf> {
    if program.components().count() > 1 {
        return Ok(program.to_owned());
    }
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&dirs).map(|dir| dir.join(program)).find(|path| path.is_file());
    found.ok_or_else(|| {
        let name = program.display();
        exit::not_found(format!(
            "{name} is not installed; name it with --qemu PATH (Debian: apt install qemu-system-x86)"
        ))
    })
}

#[derive(Serialize)]
struct StepLine {
    progress: String,
    step: usize,
    steps: usize,
}

/// Says how far it is.
struct Teller<'a> {
    context: &'a Context,
    meter: Option<Meter>,
    step: (usize, usize),
    doing: String,
}

impl<'a> Teller<'a> {
    fn new(context: &'a Context) -> Self {
        Self { context, meter: None, step: (0, 0), doing: String::new() }
    }

    fn say(&self, words: &str) {
        let (step, steps) = self.step;
        let line = match (self.context.output.quiet, self.context.output.json) {
            (true, _) => return,
            (false, true) => {
                serde_json::to_string(&StepLine { progress: words.to_owned(), step, steps }).unwrap_or_default()
            }
            (false, false) if steps == 0 => words.to_owned(),
            (false, false) => format!("[{step}/{steps}] {words}"),
        };
        let _ = writeln!(progress::above_the_bar(), "{line}");
    }

    fn tell(&mut self, progress: Progress) {
        match progress {
            Progress::LayingOut { done_bytes, total_bytes } => {
                let meter = self.meter.get_or_insert_with(|| Meter::new(self.context.output));
                meter.at("laying out the disk", done_bytes, total_bytes);
            }
            Progress::Begins { step, steps, round, workload, case } => {
                self.meter = None;
                self.step = (step, steps);
                self.doing = format!("round {round}, {workload}, {case}");
            }
            Progress::Ended(run) => {
                let took = run.during.write.map_or(0.0, |l| l.p99_us / 1e3);
                let (before, during) = (run.before.per_second, run.during.per_second);
                let ended = if run.backup.finished { "" } else { ", broken off" };
                let doing = &self.doing;
                self.say(&format!("{doing}: {before:.0} -> {during:.0} operations/s, p99 {took:.1} ms{ended}"));
            }
            Progress::Failed { why, .. } => self.say(&format!("{}: {why}", self.doing)),
            Progress::Checked { round } => self.say(&format!("round {round}: the disk holds what the guest wrote")),
        }
    }
}

fn write(file: &Path, content: &str) -> anyhow::Result<()> {
    std::fs::write(file, content).map_err(|e| anyhow::anyhow!("cannot write {}: {e}", file.display()))
}

fn markdown(command: &str, report: &impl std::fmt::Display) -> String {
    format!("# What backups cost a guest's writes\n\nBy `livebackup bench {command}`.\n\n```\n{report}```\n")
}

/// Files that cannot be written are known before the measurement; what is in them stays until there is something better.
fn try_file(file: &Path) -> anyhow::Result<()> {
    let tried = std::fs::File::options().append(true).create(true).open(file);
    tried.map(drop).map_err(|e| anyhow::anyhow!("cannot write {}: {e}", file.display()))
}

impl WriteOverheadArgs {
    fn try_files(&self) -> anyhow::Result<()> {
        [&self.json_file, &self.html, &self.markdown].into_iter().flatten().try_for_each(|file| try_file(file))
    }

    fn write_files(&self, report: &Report) -> anyhow::Result<()> {
        if let Some(file) = &self.json_file {
            write(file, &(serde_json::to_string_pretty(report)? + "\n"))?;
        }
        if let Some(file) = &self.html {
            write(file, &html::page(report))?;
        }
        if let Some(file) = &self.markdown {
            write(file, &markdown("write-overhead", report))?;
        }
        Ok(())
    }
}

pub async fn run(context: &Context, args: &BenchArgs) -> anyhow::Result<Code> {
    match &args.command {
        BenchCommand::WriteOverhead(args) => write_overhead(context, args).await,
        BenchCommand::GuestWrites(args) => guest::run(context, args).await,
    }
}

async fn write_overhead(context: &Context, args: &WriteOverheadArgs) -> anyhow::Result<Code> {
    let options = args.options()?;
    args.try_files()?;
    let mut teller = Teller::new(context);
    let done = overhead::run(options, |progress| teller.tell(progress), context.interrupted.clone()).await;
    drop(teller);
    let report = match done {
        Err(OverheadError::Interrupted) => return Err(exit::interrupted(OverheadError::Interrupted.to_string())),
        done => done?,
    };
    args.write_files(&report)?;
    context.output.print(&report);
    Ok(Code::Good)
}
