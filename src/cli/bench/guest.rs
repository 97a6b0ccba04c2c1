//! `livebackup bench guest-writes SOURCE`

use std::path::PathBuf;

use clap::Args;

use super::{Reader, Teller, chosen, markdown, reader, readers, try_file, write};
use crate::agent;
use crate::cli::context::Context;
use crate::cli::exit::{self, Code};
use crate::cli::source::{self, Source};
use crate::cli::values;
use crate::grade::Policy;
use crate::overhead::Progress;
use crate::overhead::guest::{self, GuestOptions, MAX_SIZE_BYTES, METHODS, MIN_SIZE_BYTES, fio};
use crate::overhead::load::Workload;
use crate::units::{MIB, human_bytes};

#[derive(Debug, Args)]
pub struct GuestWritesArgs {
    /// The VM: the monitor of its QEMU on this host, qmp:PATH or qmp:HOST:PORT.
    source: String,
    /// Name of the VM, when QEMU has neither -name nor a UUID.
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// The file in the guest that fio writes to: on the disk that is of interest. It must not be there, and is removed at the end.
    #[arg(long, value_name = "PATH", default_value = "/var/tmp/livebackup-fio")]
    file: String,
    /// Its size; a quarter more must be free there.
    #[arg(long, value_name = "SIZE", value_parser = values::size, default_value = "256M")]
    size: u64,
    /// fio in the guest: a name that the agent's PATH has, or a path.
    #[arg(long, value_name = "NAME", default_value = "fio")]
    fio: String,
    /// How long fio runs while there is a backup, which is slowed to go on for nearly as long, and broken off then; two fifths of it
    /// are measured before, one fifth after.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600), default_value_t = 10)]
    seconds: u32,
    /// How often each is measured; the methods take turns.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1000), default_value_t = 3)]
    rounds: u32,
    /// What fio does: random (4 KiB writes), sequential (64 KiB writes), database (4 KiB writes, each with a flush), mixed (4 KiB,
    /// 7 reads to 3 writes), or all. May be repeated [default: random].
    #[arg(long, value_name = "WORKLOAD")]
    workload: Vec<String>,
    /// What is done meanwhile: none, bitmap (only what is recorded between two backups), fleece (a full), incremental, or all. May be
    /// repeated [default: all].
    #[arg(long, value_name = "METHOD")]
    method: Vec<String>,
    /// Requests of fio that are under way at once.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=64), default_value_t = 8)]
    depth: u16,
    /// Read backups no faster than this in a second, or unlimited. May be repeated: each method that has a reader is measured with
    /// each [default: unlimited].
    #[arg(long, value_name = "SIZE", value_parser = reader)]
    reader_rate: Vec<Reader>,
    /// Freeze the guest's file systems at the instants, as a backup does: require, prefer or never.
    #[arg(long, value_name = "POLICY", value_parser = values::policy, default_value = "prefer")]
    freeze: Policy,
    /// Leave a disk out of the backups. May be repeated.
    #[arg(long, value_name = "DISK")]
    exclude: Vec<String>,
    /// Socket of the guest agent's channel [default: found through QEMU].
    #[arg(long, value_name = "PATH")]
    agent: Option<agent::Address>,
    /// Write everything, each run too, as JSON.
    #[arg(long, value_name = "FILE")]
    json_file: Option<PathBuf>,
    /// Write the tables as Markdown.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

impl GuestWritesArgs {
    fn options(&self, context: &Context) -> anyhow::Result<GuestOptions> {
        let Source::Monitor(monitor) = source::parse(&self.source)? else {
            return Err(exit::usage(
                "the SOURCE of a measurement is a QEMU of this host: qmp:PATH or qmp:HOST:PORT (and no running service may have it)",
            ));
        };
        if !(MIN_SIZE_BYTES..=MAX_SIZE_BYTES).contains(&self.size) || !self.size.is_multiple_of(MIB) {
            return Err(exit::usage("--size is 1M to 64G, in whole 1M"));
        }
        if !fio::is_plain(&self.file) {
            return Err(exit::usage(format!(
                "--file {:?} cannot be used: it is a path in the guest from / on, of letters, digits and ._-+@ only",
                self.file
            )));
        }
        if self.fio.is_empty() || self.fio.starts_with('-') {
            return Err(exit::usage("--fio is the name or path of fio in the guest"));
        }
        Ok(GuestOptions {
            monitor,
            vm: self.vm.clone(),
            agent: self.agent.clone(),
            freeze: self.freeze,
            exclude: self.exclude.clone(),
            transport: context.transport(),
            dir: context.usual_scratch(),
            scratch_budget_bytes: context.scratch_budget_bytes(),
            fio: self.fio.clone(),
            file: self.file.clone(),
            size_bytes: self.size,
            seconds: self.seconds,
            rounds: self.rounds,
            depth: self.depth,
            workloads: chosen(&self.workload, &Workload::ALL, &[Workload::Random])?,
            methods: chosen(&self.method, &METHODS, &METHODS)?,
            readers: readers(&self.reader_rate),
        })
    }
}

pub async fn run(context: &Context, args: &GuestWritesArgs) -> anyhow::Result<Code> {
    let options = args.options(context)?;
    [&args.json_file, &args.markdown].into_iter().flatten().try_for_each(|file| try_file(file))?;
    let mut teller = Teller::new(context);
    let file = args.file.clone();
    let tell = |progress| match progress {
        Progress::LayingOut { total_bytes, .. } => {
            teller.say(&format!("filling {file} in the guest, {}", human_bytes(total_bytes)));
        }
        progress => teller.tell(progress),
    };
    let done = guest::run(options, tell, context.interrupted.clone()).await;
    drop(teller);
    let report = done?;
    if let Some(file) = &args.json_file {
        write(file, &(serde_json::to_string_pretty(&report)? + "\n"))?;
    }
    if let Some(file) = &args.markdown {
        write(file, &markdown("guest-writes", &report))?;
    }
    context.output.print(&report);
    Ok(if report.left.is_empty() { Code::Good } else { Code::Failed })
}
