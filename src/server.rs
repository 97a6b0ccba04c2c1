//! The sidecar service: keeps VMs attached and serves clients.
//!
//! ```text
//!  listener ── a task a connection ──► requests ──► the VM that they name
//!  VM: attach ──► attached ──(monitor closed)──► wait ──► attach …
//! ```
//!
//! It listens on the loopback or a unix socket only, until clients can prove who they are. Ending it (SIGTERM, SIGINT) ends
//! running sessions, takes every fleece out of QEMU, and leaves the bitmaps that record.
//!
//! # Configuration (TOML)
//!
//! ```toml
//! listen = "127.0.0.1:7870"        # or "unix:/run/livebackup/serve.sock"
//! state = "/var/lib/livebackup"    # may be left out
//! scratch = "/var/scratch"         # may be left out
//! scratch_budget = "20 GiB"        # may be left out
//!
//! [[vm]]
//! monitor = "qmp:/run/vm1.qmp"
//! name = "vm1"                     # may be left out: QEMU's -name, else its UUID
//! ```

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::monitor::Address;
use crate::units::{GIB, KIB, MIB};
use crate::vm::{AttachError, Vm, VmOptions};
use crate::wire::message::{Failure, FailureCode, Reply, Request, VmEntry, VmStatus};
use crate::wire::{Address as WireAddress, Answer, Stream, Timing, serve_connection};

/// How long to wait before a VM that could not be attached is tried again.
const ATTACH_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// How long a request waits for VMs that are being attached at the service's start.
const FIRST_ATTACH_WITHIN: Duration = Duration::from_secs(10);
/// What is said of such a VM.
const STARTING: &str = "being attached";
/// Connections at once, at most.
const MAX_CONNECTIONS: usize = 64;
/// Longest configuration file.
const MAX_CONFIG_BYTES: u64 = MIB;

fn bad(message: impl Into<String>) -> Failure {
    Failure::new(FailureCode::Internal, message)
}

/// The service's configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it listens.
    pub listen: WireAddress,
    /// State directory, if the file names one.
    pub state: Option<PathBuf>,
    /// Scratch directory.
    pub scratch: Option<PathBuf>,
    /// Most scratch of one session.
    pub scratch_budget_bytes: Option<u64>,
    /// The VMs: monitor, and name if given.
    pub vms: Vec<(Address, Option<String>)>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    listen: String,
    state: Option<PathBuf>,
    scratch: Option<PathBuf>,
    scratch_budget: Option<String>,
    #[serde(default)]
    vm: Vec<VmTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VmTable {
    monitor: String,
    name: Option<String>,
}

impl Config {
    /// Reads the file.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let at = |e: &dyn std::fmt::Display| bad(format!("the configuration {}: {e}", path.display()));
        if std::fs::metadata(path).map_err(|e| at(&e))?.len() > MAX_CONFIG_BYTES {
            return Err(at(&"it is too large to be one"));
        }
        let text = std::fs::read_to_string(path).map_err(|e| at(&e))?;
        Self::parse(&text).map_err(|e| at(&e))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let file: File = toml::from_str(text).map_err(|e| e.to_string())?;
        if file.vm.is_empty() {
            return Err("it names no VM: add a [[vm]] table with monitor = \"qmp:…\"".into());
        }
        let mut vms = vec![];
        for vm in file.vm {
            let address = vm
                .monitor
                .strip_prefix("qmp:")
                .ok_or_else(|| format!("monitor = {:?}: write it as \"qmp:PATH\" or \"qmp:HOST:PORT\"", vm.monitor))?;
            vms.push((address.parse::<Address>().map_err(|e| e.to_string())?, vm.name));
        }
        let mut names: Vec<_> = vms.iter().filter_map(|(_, name)| name.as_ref()).collect();
        names.sort();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("two VMs are called {:?}: give each a name of its own", twice[0]));
        }
        let budget = file.scratch_budget.as_deref().map(parse_size).transpose()?;
        Ok(Self {
            listen: parse_listen(&file.listen)?,
            state: file.state,
            scratch: file.scratch,
            scratch_budget_bytes: budget,
            vms,
        })
    }
}

/// `20 GiB`, `500 MiB`, `4096`.
fn parse_size(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is no size: write it as \"20 GiB\"");
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match text[digits.len()..].trim() {
        "" | "B" => 1,
        "KiB" => KIB,
        "MiB" => MIB,
        "GiB" => GIB,
        "TiB" => 1024 * GIB,
        _ => return Err(bad()),
    };
    digits.trim().parse::<u64>().ok().and_then(|n| n.checked_mul(unit)).ok_or_else(bad)
}

fn parse_listen(text: &str) -> Result<WireAddress, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return Ok(WireAddress::Unix(path.into()));
    }
    let address: SocketAddr =
        text.parse().map_err(|_| format!("listen = {text:?}: write it as \"127.0.0.1:7870\" or \"unix:PATH\""))?;
    if !address.ip().is_loopback() {
        return Err(format!(
            "listen = {text:?} is not on the loopback, and this version cannot ask clients who they are: listen on 127.0.0.1 or a \
             unix socket, and let clients come through ssh -L"
        ));
    }
    Ok(WireAddress::Tcp(address.to_string()))
}

/// A VM as the service sees it.
#[derive(Clone)]
enum State {
    Starting,
    Attached(Vm),
    Away(String),
}

#[derive(Clone)]
struct Service {
    /// By name. A VM without a configured name is known by its monitor until it was attached.
    vms: Arc<Mutex<BTreeMap<String, State>>>,
}

impl Service {
    fn set(&self, name: &str, state: State) {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), state);
    }

    fn forget(&self, name: &str) {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    fn all(&self) -> BTreeMap<String, State> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A VM by its name. One that is being attached for the first time is waited for.
    async fn vm(&self, name: &str) -> Result<Vm, Failure> {
        let deadline = tokio::time::Instant::now() + FIRST_ATTACH_WITHIN;
        while self.all().values().any(|state| matches!(state, State::Starting))
            && tokio::time::Instant::now() < deadline
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let all = self.all();
        match all.get(name) {
            Some(State::Starting) => {
                Err(Failure::new(FailureCode::Qemu, format!("VM {name:?} is still being attached; try again")))
            }
            Some(State::Attached(vm)) => Ok(vm.clone()),
            Some(State::Away(why)) => {
                Err(Failure::new(FailureCode::Qemu, format!("VM {name:?} cannot be reached now: {why}")))
            }
            None => {
                let names: Vec<_> = all.into_keys().collect();
                Err(Failure::new(
                    FailureCode::UnknownVm,
                    format!("no VM {name:?} is served here; there are: {}", names.join(", ")),
                ))
            }
        }
    }

    async fn answer(&self, request: Request) -> Result<Answer, Failure> {
        let reply = match request {
            Request::List => Reply::List { vms: self.list().await },
            Request::Disks { vm } => {
                let (machine, disks) = self.vm(&vm).await?.disks().await?;
                Reply::Disks { machine, disks }
            }
            Request::Status { vm } => Reply::Status { vms: self.status(vm).await? },
            Request::Estimate(begin) => Reply::Estimate { disks: self.vm(&begin.vm).await?.estimate(begin).await? },
            Request::Begin(begin) => return Ok(Answer::Session(self.vm(&begin.vm).await?.begin(begin).await?)),
            Request::Detach { vm } => Reply::Detached { removed: self.vm(&vm).await?.detach().await? },
            Request::Ack(_) => return Err(Failure::new(FailureCode::Protocol, "an acknowledgement without a session")),
        };
        Ok(Answer::Reply(reply))
    }

    async fn list(&self) -> Vec<VmEntry> {
        let mut out = vec![];
        for (vm, state) in self.all() {
            let state = match state {
                State::Starting => STARTING.to_owned(),
                State::Attached(v) => v.status().await.state,
                State::Away(why) => why,
            };
            out.push(VmEntry { vm, state });
        }
        out
    }

    async fn status(&self, vm: Option<String>) -> Result<Vec<VmStatus>, Failure> {
        if let Some(name) = vm {
            return Ok(vec![self.vm(&name).await?.status().await]);
        }
        let mut out = vec![];
        for (vm, state) in self.all() {
            out.push(match state {
                State::Attached(v) => v.status().await,
                State::Starting => unreached(vm, STARTING.to_owned()),
                State::Away(why) => unreached(vm, why),
            });
        }
        Ok(out)
    }
}

/// Status of a VM that is not attached.
fn unreached(vm: String, state: String) -> VmStatus {
    VmStatus { vm, state, qemu_version: None, session: None, disks: vec![] }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    async fn bind(address: &WireAddress) -> Result<Self, Failure> {
        let at =
            |e: std::io::Error| bad(format!("cannot listen at {address}: {e}; is another livebackup serve running?"));
        match address {
            WireAddress::Tcp(text) => TcpListener::bind(text).await.map(Listener::Tcp).map_err(at),
            WireAddress::Unix(path) => {
                // A socket that nobody answers at is a dead server's.
                use std::os::unix::fs::FileTypeExt;
                let socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
                if socket && std::os::unix::net::UnixStream::connect(path).is_err() {
                    let _ = std::fs::remove_file(path);
                }
                UnixListener::bind(path).map(|l| Listener::Unix(l, path.clone())).map_err(at)
            }
        }
    }

    async fn accept(&self) -> std::io::Result<Stream> {
        match self {
            Listener::Tcp(listener) => Stream::tcp(listener.accept().await?.0),
            Listener::Unix(listener, path) => {
                Ok(Stream::unix(listener.accept().await?.0, format!("a client of {}", path.display())))
            }
        }
    }

    fn address(&self) -> Option<WireAddress> {
        match self {
            Listener::Tcp(listener) => Some(WireAddress::Tcp(listener.local_addr().ok()?.to_string())),
            Listener::Unix(_, path) => Some(WireAddress::Unix(path.clone())),
        }
    }
}

/// Serves until `stop` says true. What the configuration leaves open is as in `base`.
pub async fn serve(config: Config, base: VmOptions, mut stop: watch::Receiver<bool>) -> Result<(), Failure> {
    let listener = Listener::bind(&config.listen).await?;
    let address = listener.address();
    let service = Service { vms: Arc::default() };
    let mut keepers = JoinSet::new();
    for (monitor, name) in &config.vms {
        let options = VmOptions {
            state: config.state.clone().unwrap_or_else(|| base.state.clone()),
            scratch: config.scratch.clone().or_else(|| base.scratch.clone()),
            scratch_budget_bytes: config.scratch_budget_bytes.or(base.scratch_budget_bytes),
            name: name.clone(),
            transport: base.transport,
            served_at: address.clone(),
        };
        keepers.spawn(keep(service.clone(), monitor.clone(), options, stop.clone()));
    }
    tracing::info!("listening at {}", address.as_ref().unwrap_or(&config.listen));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            stream = listener.accept() => match stream {
                Ok(stream) if connections.len() < MAX_CONNECTIONS => {
                    let service = service.clone();
                    connections.spawn(async move {
                        let answer = |request| { let service = service.clone(); async move { service.answer(request).await } };
                        let _ = serve_connection(stream, Timing::default(), answer).await;
                    });
                }
                Ok(stream) => tracing::warn!(peer = stream.peer(), "refused: {MAX_CONNECTIONS} connections are open"),
                Err(e) => {
                    tracing::warn!("cannot accept a connection: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
            _ = stop.wait_for(|stop| *stop) => break,
        }
    }
    tracing::info!("ending: sessions are closed and every fleece is taken out of QEMU");
    connections.shutdown().await;
    while keepers.join_next().await.is_some() {}
    if let Listener::Unix(_, path) = &listener {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// Keeps one VM attached.
async fn keep(service: Service, monitor: Address, options: VmOptions, mut stop: watch::Receiver<bool>) {
    let mut known = options.name.clone().unwrap_or_else(|| monitor.to_string());
    service.set(&known, State::Starting);
    let mut said = String::new();
    while !*stop.borrow() {
        let attached = Vm::attach(&monitor, options.clone()).await;
        match attached {
            Ok(vm) => {
                said.clear();
                if vm.name() != known {
                    service.forget(&known);
                    known = vm.name().to_owned();
                }
                tracing::info!(vm = known, "attached");
                service.set(&known, State::Attached(vm.clone()));
                tokio::select! {
                    () = vm.closed() => tracing::warn!(vm = known, "QEMU ended, or closed its monitor"),
                    _ = stop.wait_for(|stop| *stop) => {}
                }
                service.set(&known, State::Away("QEMU ended, or closed its monitor".into()));
                // A session's task holds the VM until its fleece is out.
                vm.idle().await;
            }
            Err(error) => {
                let words = match error {
                    AttachError::Failure(failure) => failure.message,
                    served => served.to_string(),
                };
                if words != said {
                    tracing::warn!(vm = known, "cannot attach: {words}");
                    said.clone_from(&words);
                }
                service.set(&known, State::Away(words));
                tokio::select! {
                    () = tokio::time::sleep(ATTACH_AGAIN_AFTER) => {}
                    _ = stop.wait_for(|stop| *stop) => {}
                }
            }
        }
    }
    service.forget(&known);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_says_what_is_wrong_with_it() {
        let good = "listen = \"127.0.0.1:0\"\nscratch_budget = \"20 GiB\"\n[[vm]]\nmonitor = \"qmp:/a\"\n";
        let config = Config::parse(good).unwrap();
        assert_eq!(config.scratch_budget_bytes, Some(20 * GIB));
        assert_eq!(config.vms, [(Address::Unix("/a".into()), None)]);
        for (text, says) in [
            (good.replace("127.0.0.1:0", "0.0.0.0:1"), "loopback"),
            (good.replace("127.0.0.1:0", "here"), "listen"),
            (good.replace("qmp:/a", "/a"), "qmp:PATH"),
            (good.replace("20 GiB", "lots"), "no size"),
            (good.replace("monitor", "monitr"), "monitr"),
            ("listen = \"unix:/x\"".into(), "names no VM"),
        ] {
            let said = Config::parse(&text).unwrap_err();
            assert!(said.contains(says), "{text}: {said}");
        }
    }
}
