//! Opens the sidecar that a source names: a QEMU of this host is attached to, unless a running server has it.

use super::args::SourceArgs;
use super::context::Context;
use super::dial::dial;
use super::exit;
use super::output;
use super::source::{self, Source};
use crate::backup::Sidecar;
use crate::vm::{AttachError, Vm, VmOptions};
use crate::wire::Address;
use crate::wire::message::{Failure, FailureCode, Reply, Request};

/// Opens the source.
pub async fn open(context: &Context, args: &SourceArgs) -> anyhow::Result<Sidecar> {
    open_with(context, args, context.vm_options(args.vm.clone())).await
}

/// Opens the source. `options` count where this process attaches to the VM itself.
pub async fn open_with(context: &Context, args: &SourceArgs, options: VmOptions) -> anyhow::Result<Sidecar> {
    match source::parse(&args.source)? {
        Source::Monitor(address) => {
            let attached = Vm::attach(&address, options);
            match context.unless_interrupted(async { Ok::<_, anyhow::Error>(attached.await) }).await? {
                Ok(vm) => Ok(Sidecar::Local(vm)),
                Err(AttachError::Served { address, vm }) => {
                    tracing::info!(%vm, server = %address, "a server has this VM: talking to it");
                    context.unless_interrupted(connect(context, &address, Some(vm))).await
                }
                Err(AttachError::Failure(failure)) => Err(failure.into()),
            }
        }
        Source::Server(address, vm) => {
            if args.vm.is_some() {
                return Err(exit::usage("--vm is for qmp: sources; a server's VM is named in the source"));
            }
            context.unless_interrupted(connect(context, &address, vm)).await
        }
    }
}

/// Connects to a server, and looks whether it has the VM.
async fn connect(context: &Context, address: &Address, vm: Option<String>) -> anyhow::Result<Sidecar> {
    let mut client = dial(context, address).await?;
    let Reply::List { vms } = client.request(Request::List).await? else {
        return Err(Failure::new(FailureCode::Protocol, "the server answered something else to `list`").into());
    };
    let names: Vec<_> = vms.into_iter().map(|entry| entry.vm).collect();
    let there_are = match names.is_empty() {
        true => "it has none".to_owned(),
        false => format!("it has {}", output::names(&names)),
    };
    match vm {
        Some(vm) if names.contains(&vm) => Ok(Sidecar::Remote(Box::new(client), vm)),
        Some(vm) => Err(exit::not_found(format!("the server at {address} has no VM {vm:?}; {there_are}"))),
        None => Err(exit::usage(format!("say which VM of the server at {address}: append /VM; {there_are}"))),
    }
}
