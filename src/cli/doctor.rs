//! `livebackup doctor [SOURCE]`

use std::fmt;

use clap::Args;
use serde::Serialize;

use super::args::SourceArgs;
use super::context::Context;
use super::exit::Code;
use super::{host, open};
use crate::vm::{Check, CheckVerdict};

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// A VM to look at, too: qmp:PATH, qmp:HOST:PORT, livebackup://HOST:PORT/VM or unix:PATH/VM.
    source: Option<String>,
    /// Name of the VM, when QEMU has neither -name nor a UUID, or another is wanted.
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
}

#[derive(Serialize)]
struct CheckLine {
    name: String,
    verdict: &'static str,
    words: String,
}

#[derive(Serialize)]
struct DoctorReport {
    good: bool,
    checks: Vec<CheckLine>,
}

impl DoctorReport {
    fn new(checks: Vec<Check>) -> Self {
        let good = checks.iter().all(|check| check.verdict != CheckVerdict::Bad);
        let line = |check: Check| {
            let verdict = match check.verdict {
                CheckVerdict::Good => "good",
                CheckVerdict::Warn => "warn",
                CheckVerdict::Bad => "bad",
            };
            CheckLine { name: check.name, verdict, words: check.words }
        };
        Self { good, checks: checks.into_iter().map(line).collect() }
    }
}

impl fmt::Display for DoctorReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.checks.iter().map(|check| check.name.chars().count()).max().unwrap_or(0);
        for check in &self.checks {
            let mark = if check.verdict == "good" { "ok" } else { check.verdict };
            writeln!(f, "{mark:<4}  {:<width$}  {}", check.name, check.words)?;
        }
        match self.good {
            true => writeln!(f, "all that a backup needs is there"),
            false => writeln!(f, "what is marked `bad` keeps a backup from working"),
        }
    }
}

pub async fn run(context: &Context, args: &DoctorArgs) -> anyhow::Result<Code> {
    let mut checks = vec![host::program()];
    match &args.source {
        // Who has the VM looks at its own state and scratch.
        Some(source) => {
            let source = SourceArgs { source: source.clone(), vm: args.vm.clone() };
            let mut sidecar = open::open(context, &source).await?;
            checks.extend(context.unless_interrupted(sidecar.doctor()).await?);
        }
        None => checks.extend(host::places(context)),
    }
    let report = DoctorReport::new(checks);
    context.output.print(&report);
    Ok(if report.good { Code::Good } else { Code::Failed })
}
