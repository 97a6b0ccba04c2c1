//! Context: what every command gets.

use std::future::Future;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use tokio::sync::watch;

use super::args::Global;
use super::exit;
use super::output::Output;
use crate::vm::{QuietOptions, Transport, VmOptions};

/// What every command gets.
#[derive(Debug)]
pub struct Context {
    pub output: Output,
    pub state: PathBuf,
    pub scratch: Option<PathBuf>,
    /// Where the client's certificate is, when that was said.
    pub tls: Option<PathBuf>,
    pub interrupted: watch::Receiver<bool>,
    scratch_budget_bytes: Option<u64>,
    transport: Transport,
}

impl Context {
    pub fn new(global: &Global, output: Output, interrupted: watch::Receiver<bool>) -> anyhow::Result<Self> {
        let state = match &global.state {
            Some(dir) => dir.clone(),
            None => default_state()?,
        };
        Ok(Self {
            output,
            // The program may change its directory, and QEMU has another.
            state: directory("--state", &state)?,
            scratch: global.scratch.as_ref().map(|dir| directory("--scratch", dir)).transpose()?,
            tls: global.tls.clone(),
            interrupted,
            scratch_budget_bytes: global.scratch_budget,
            transport: global.transport.into(),
        })
    }

    /// How to attach to a VM.
    pub fn vm_options(&self, name: Option<String>) -> VmOptions {
        VmOptions {
            state: self.state.clone(),
            scratch: self.scratch.clone(),
            scratch_budget_bytes: self.scratch_budget_bytes,
            name,
            transport: self.transport,
            quiet: QuietOptions::default(),
            served_at: None,
            ..VmOptions::default()
        }
    }

    /// A directory that is there, on the file system that the scratch of a backup would be on.
    pub fn usual_scratch(&self) -> PathBuf {
        let usual = self.scratch.clone().unwrap_or_else(|| self.state.join("scratch"));
        let there = usual.ancestors().find(|dir| dir.is_dir());
        there.map_or_else(std::env::temp_dir, PathBuf::from)
    }

    /// How disks are read.
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// Most scratch, where that was said.
    pub fn scratch_budget_bytes(&self) -> Option<u64> {
        self.scratch_budget_bytes
    }

    /// Does something until the user stops it.
    pub async fn unless_interrupted<T, E: Into<anyhow::Error>>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> anyhow::Result<T> {
        tokio::select! {
            biased;
            () = self.asked_to_stop() => Err(exit::interrupted("interrupted")),
            done = work => done.map_err(Into::into),
        }
    }

    /// Waits until the user wants to stop.
    pub async fn asked_to_stop(&self) {
        if self.interrupted.clone().wait_for(|stop| *stop).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// A directory that an option names, made absolute; it may be missing.
fn directory(option: &str, path: &Path) -> anyhow::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    match path.metadata() {
        Ok(about) if !about.is_dir() => {
            Err(exit::usage(format!("{option} {} is no directory: name one", path.display())))
        }
        Err(e) if e.kind() == ErrorKind::NotADirectory => {
            Err(exit::usage(format!("{option} {} cannot be a directory: a part of the path is a file", path.display())))
        }
        _ => Ok(path),
    }
}

fn default_state() -> anyhow::Result<PathBuf> {
    if nix::unistd::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib/livebackup"));
    }
    let dir = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|dir| dir.is_absolute());
    let base = dir("XDG_STATE_HOME").or_else(|| Some(dir("HOME")?.join(".local/state")));
    let base = base.ok_or_else(|| exit::usage("there is no home directory to keep state in: give --state DIR"))?;
    Ok(base.join("livebackup"))
}
