//! The arguments: commands in the order in which one meets them.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use super::{
    backup, bench, detach, disks, doctor, estimate, exit, guardian, init, map, pki, points, restore, run, serve, show,
    status, verify,
};
use crate::area::Skip;
use crate::vm;

/// Live backup of QEMU virtual machines: incremental, consistent, verifiable, on an unmodified QEMU.
#[derive(Debug, Parser)]
#[command(version, after_help = help(), max_term_width = 110, disable_help_subcommand = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Args)]
pub struct Global {
    /// Where livebackup keeps what it knows of VMs [default: /var/lib/livebackup, or the XDG state home when not root].
    #[arg(long, global = true, value_name = "DIR", help_heading = "Global options")]
    pub state: Option<PathBuf>,
    /// Where the guest's old data lies while a backup runs; a local file system [default: in the state directory].
    #[arg(long, global = true, value_name = "DIR", help_heading = "Global options")]
    pub scratch: Option<PathBuf>,
    /// Most scratch that a backup may use; beyond it the backup fails and the guest goes on.
    #[arg(long, global = true, value_name = "SIZE", value_parser = super::values::size, help_heading = "Global options")]
    pub scratch_budget: Option<u64>,
    /// A client's certificate, as `livebackup pki issue` makes it [default: livebackup/tls in the XDG config home].
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "LIVEBACKUP_TLS",
        hide_env_values = true,
        help_heading = "Global options"
    )]
    pub tls: Option<PathBuf>,
    /// Print results, errors and progress as JSON.
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    /// Print only what was asked for, and errors.
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Global options")]
    pub quiet: bool,
    /// Say more on standard error; twice: everything.
    #[arg(short, long, global = true, action = ArgAction::Count, help_heading = "Global options")]
    pub verbose: u8,
    /// How a disk is read.
    #[arg(long, global = true, hide = true, value_enum, default_value_t = TransportName::Auto)]
    pub transport: TransportName,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TransportName {
    Auto,
    Vhost,
    Nbd,
}

impl From<TransportName> for vm::Transport {
    fn from(name: TransportName) -> Self {
        match name {
            TransportName::Auto => Self::Auto,
            TransportName::Vhost => Self::Vhost,
            TransportName::Nbd => Self::Nbd,
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a repository
    Init(init::InitArgs),
    /// List the disks of a VM, and what a backup does with each
    Disks(disks::DisksArgs),
    /// Back up a VM into a repository
    Backup(backup::BackupArgs),
    /// Say what a backup would read; changes nothing
    Estimate(estimate::EstimateArgs),
    /// List the restore points of a repository
    Points(points::PointsArgs),
    /// Show a restore point
    Show(show::ShowArgs),
    /// Read restore points again and compare them with their digests
    Verify(verify::VerifyArgs),
    /// Restore the disks of a restore point
    Restore(restore::RestoreArgs),
    /// Serve the disks of a restore point to NBD clients, read-only, without restoring them
    Map(map::MapArgs),
    /// Serve VMs to backup clients
    Serve(serve::ServeArgs),
    /// Run a QEMU, with all its disks tracked from its start to its end
    Run(run::RunArgs),
    /// Make certificates for serving and backing up across a network
    Pki(pki::PkiArgs),
    /// Show a VM's tracking, and its running backup
    Status(status::StatusArgs),
    /// Check what a backup needs, on this host and in a VM
    Doctor(doctor::DoctorArgs),
    /// Remove all that livebackup put into a VM; the next backup reads all
    Detach(detach::DetachArgs),
    /// Measure what backups cost
    Bench(bench::BenchArgs),
    /// Owes a guest its thaw if the sidecar dies
    #[command(hide = true)]
    Guardian(guardian::GuardianArgs),
}

/// What is left out of the disks.
#[derive(Debug, Args)]
pub struct SkipArgs {
    /// Leave swap out: it is zero in the restore point, but for its header, so that a restored machine finds it.
    #[arg(long)]
    skip_swap: bool,
    /// Leave an area out: DISK=swap, a partition as DISK=NUMBER, DISK=label:NAME or DISK=partuuid:UUID, or bytes as
    /// DISK=bytes:FROM-TO (like 10G-20G). It is zero in the restore point. May be repeated.
    #[arg(long, value_name = "DISK=AREA")]
    skip: Vec<Skip>,
}

impl SkipArgs {
    pub fn options(&self) -> Vec<Skip> {
        self.skip_swap.then_some(Skip::SWAP).into_iter().chain(self.skip.iter().cloned()).collect()
    }
}

/// A VM.
#[derive(Debug, Args)]
pub struct SourceArgs {
    /// The VM: qmp:PATH, qmp:HOST:PORT, livebackup://HOST:PORT/VM or unix:PATH/VM.
    pub source: String,
    /// Name of the VM, when QEMU has neither -name nor a UUID, or another is wanted.
    #[arg(long, value_name = "NAME")]
    pub vm: Option<String>,
}

/// The exit codes in the help of every command too, on a line or two.
pub fn with_exit_codes(cli: clap::Command) -> clap::Command {
    let codes: Vec<_> = exit::Code::ALL.iter().map(|code| format!("{} {}", code.number(), code.name())).collect();
    let codes = format!("Exit codes: {}; `livebackup --help` says more", codes.join(", "));
    cli.mut_subcommands(|command| {
        let before = command.get_after_help().map(|help| format!("{help}\n\n")).unwrap_or_default();
        command.after_help(format!("{before}{codes}"))
    })
}

fn help() -> String {
    let mut text = "SOURCE  qmp:PATH | qmp:HOST:PORT | livebackup://HOST:PORT/VM | unix:PATH/VM\n\
        REPO    a directory\n\
        POINT   latest | latest~N | ID | the start of a point's time (RFC 3339)\n\nExit codes:\n"
        .to_owned();
    for code in exit::Code::ALL {
        text += &format!("  {:>3}  {}\n", code.number(), code.words());
    }
    text
}
