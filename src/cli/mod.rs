//! The command line: one file per command. A command asks an engine, builds a report, and hands it to [`output`], which
//! prints text or JSON; what went wrong becomes an exit code in [`exit`], once.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, FromArgMatches};

mod args;
mod backup;
mod bench;
mod context;
mod detach;
mod dial;
mod disks;
mod doctor;
mod estimate;
mod exit;
mod guardian;
mod held;
mod host;
mod init;
mod logging;
mod map;
mod open;
mod output;
mod pki;
mod points;
mod progress;
mod repository;
mod restore;
mod run;
mod serve;
mod show;
mod signals;
mod source;
mod status;
mod table;
mod values;
mod verify;

use args::{Cli, Command};
use context::Context;
use exit::Code;
use output::Output;

/// Runs the program: reads the arguments, does what they say, prints what came of it.
pub fn main() -> ExitCode {
    let arguments = args::with_exit_codes(Cli::command()).try_get_matches();
    let cli = match arguments.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => return refuse(error),
    };
    let output = Output { json: cli.global.json, quiet: cli.global.quiet };
    logging::start(&cli.global, matches!(cli.command, Command::Serve(_)));
    let code = run(cli, output).unwrap_or_else(|error| output.error(&error));
    output.checked(code).into()
}

/// Arguments that mean nothing, or a demand for help.
fn refuse(mut error: clap::Error) -> ExitCode {
    let wants_json = error.use_stderr() && std::env::args_os().any(|arg| arg == "--json");
    let output = Output { json: wants_json, quiet: false };
    if error.kind() == ErrorKind::InvalidUtf8 {
        return output.error(&exit::usage(not_text(std::env::args_os()))).into();
    }
    // What is not in the help is not for people.
    if let Some(ContextValue::Strings(commands)) = error.get(ContextKind::ValidSubcommand) {
        let seen: Vec<_> =
            Cli::command().get_subcommands().filter(|c| !c.is_hide_set()).map(|c| c.get_name().to_owned()).collect();
        let shown = commands.iter().filter(|name| seen.contains(name)).cloned().collect();
        error.insert(ContextKind::ValidSubcommand, ContextValue::Strings(shown));
    }
    if wants_json {
        return output.error(&exit::usage(error.to_string().trim_end())).into();
    }
    // A closed standard output is nobody's loss.
    let _ = error.print();
    if error.use_stderr() { Code::Usage.into() } else { Code::Good.into() }
}

/// Which arguments are not UTF-8, and what to do.
fn not_text(arguments: impl Iterator<Item = OsString>) -> String {
    let bad: Vec<_> =
        arguments.filter(|argument| argument.to_str().is_none()).map(|argument| format!("{argument:?}")).collect();
    format!(
        "not UTF-8: {}; repositories, sources and names are named in UTF-8 only: rename it, or use a symbolic link to it",
        bad.join(", ")
    )
}

fn run(cli: Cli, output: Output) -> anyhow::Result<Code> {
    if let Command::Guardian(args) = &cli.command {
        return guardian::run(args);
    }
    if let Command::Run(args) = cli.command {
        return run::run(&cli.global, output, args);
    }
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if matches!(cli.command, Command::Backup(_)) {
        // Hashing and compressing have threads of their own; more of the runtime's would wake each other for every piece.
        runtime.worker_threads(1);
    }
    let runtime = runtime.enable_all().build()?;
    let done = runtime.block_on(async {
        let context = Context::new(&cli.global, output, signals::watch(cli.global.json)?)?;
        match cli.command {
            Command::Init(args) => init::run(&context, &args),
            Command::Disks(args) => disks::run(&context, &args).await,
            Command::Backup(args) => backup::run(&context, &args).await,
            Command::Estimate(args) => estimate::run(&context, &args).await,
            Command::Points(args) => points::run(&context, &args),
            Command::Show(args) => show::run(&context, &args),
            Command::Verify(args) => verify::run(&context, &args).await,
            Command::Restore(args) => restore::run(&context, &args).await,
            Command::Map(args) => map::run(&context, &args).await,
            Command::Serve(args) => serve::run(&context, &args).await,
            Command::Pki(args) => pki::run(&context, &args),
            Command::Status(args) => status::run(&context, &args).await,
            Command::Doctor(args) => doctor::run(&context, &args).await,
            Command::Bench(args) => bench::run(&context, &args).await,
            Command::Detach(args) => detach::run(&context, &args).await,
            Command::Guardian(_) | Command::Run(_) => Ok(Code::Good),
        }
    });
    // A thread that reads for a verification that was interrupted is not waited for; nothing depends on it.
    runtime.shutdown_background();
    done
}
