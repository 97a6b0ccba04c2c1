//! `livebackup run -- qemu-system-x86_64 …`

use std::ffi::OsString;

use clap::Args;
use tokio::sync::watch;

use super::args::{Global, SkipArgs};
use super::context::Context;
use super::exit::{self, Code};
use super::output::Output;
use crate::server::run as engine;
use crate::vm::{Exclusive, VmOptions};

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Name of the VM, when QEMU has neither -name nor a UUID, or another is wanted.
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Have our bitmaps kept by those qcow2 images that can: incrementals then go on also where QEMU ends, in good order,
    /// without us.
    #[arg(long)]
    persistent_bitmaps: bool,
    /// Nobody else writes to this disk's block device between two runs: incrementals go on there, too, as far as its
    /// fingerprint agrees. May be repeated.
    #[arg(long, value_name = "DISK")]
    exclusive_device: Vec<String>,
    #[command(flatten)]
    skip: SkipArgs,
    /// QEMU and its arguments.
    #[arg(last = true, required = true, value_name = "QEMU")]
    command: Vec<OsString>,
}

pub fn run(global: &Global, output: Output, args: RunArgs) -> anyhow::Result<Code> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(async {
        // Signals are the virtual machine's: they mean its end, not ours.
        let (_never, interrupted) = watch::channel(false);
        let context = Context::new(global, output, interrupted)?;
        let Some((program, arguments)) = args.command.split_first() else {
            return Err(exit::usage("say which QEMU: livebackup run -- qemu-system-x86_64 …"));
        };
        let options = VmOptions {
            persistent_bitmaps: args.persistent_bitmaps,
            exclusive_device: Exclusive::Disks(args.exclusive_device),
            skip: args.skip.options(),
            ..context.vm_options(args.vm)
        };
        let status = engine::run(program, arguments, options).await?;
        Ok(Code::Passed(engine::exit_code(status)))
    });
    runtime.shutdown_background();
    done
}
