//! A monitor that is connected and ready for commands.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use qapi::qmp::QmpCommand;
use serde_json::{Value, json};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::timeout;

use super::connection::{Connection, End, Outcome, Outgoing};
use super::message::{Event, Version};
use super::process::{self, Process};
use super::socket::{Socket, copy_of};
use super::{Address, MonitorError};

/// How long a command may take unless the caller says otherwise. `blockdev-del` was seen to flush for 21 s.
const DEFAULT_LIMIT: Duration = Duration::from_secs(30);
/// How long each step of the handshake may take: connecting, the greeting, the first command.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// The oldest QEMU that we work with.
const OLDEST: Version = Version::new(7, 2, 0);

/// A connection to QEMU's monitor, ready for commands. Clones are cheap and share the connection; it is closed when the
/// last one is dropped.
#[derive(Clone, Debug)]
pub struct Monitor {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    connection: Arc<Connection>,
    outgoing: mpsc::Sender<Outgoing>,
    /// Dropped with the last clone: the writer then has little time left.
    _alive: watch::Sender<()>,
    next_id: AtomicU64,
    can_pass_fds: bool,
    version: Version,
    process: Option<Process>,
}

impl Monitor {
    /// Connects, waits for the greeting and negotiates; 5 s for each step. Needs QEMU 7.2 or later. Must be called
    /// within a tokio runtime, which the connection then belongs to. Takes a few milliseconds.
    ///
    /// # Errors
    ///
    /// Nothing there ([`MonitorError::NoSocket`], [`MonitorError::Permission`], [`MonitorError::Unreachable`]), another
    /// client has it ([`MonitorError::Taken`]), no QMP ([`MonitorError::NotQmp`]), [`MonitorError::TooOld`].
    pub async fn connect(address: &Address) -> Result<Monitor, MonitorError> {
        Self::connect_within(address, HANDSHAKE_LIMIT).await
    }

    /// As [`Monitor::connect`], with another limit for each step of the handshake.
    pub async fn connect_within(address: &Address, limit: Duration) -> Result<Monitor, MonitorError> {
        let socket = Arc::new(Socket::connect(address, limit).await?);
        let can_pass_fds = socket.can_pass_fds();
        let (alive_sender, alive) = watch::channel(());
        let (connection, greeting, outgoing) = Connection::start(address.clone(), socket.clone(), alive);
        let version = match timeout(limit, greeting).await {
            Ok(Ok(Ok(version))) => version,
            Ok(Ok(Err(End::Garbage(found)))) => return Err(MonitorError::NotQmp { address: address.clone(), found }),
            Ok(Ok(Err(End::Gone(reason)))) => return Err(MonitorError::Closed { address: address.clone(), reason }),
            Ok(Err(_)) => {
                return Err(MonitorError::Closed { address: address.clone(), reason: "its task ended".into() });
            }
            Err(_) => return Err(MonitorError::Taken { address: address.clone(), waited: limit }),
        };
        if version < OLDEST {
            return Err(MonitorError::TooOld {
                version,
                needs: OLDEST,
                reason: "before that a copy-before-write filter cannot give way to the guest's writes",
            });
        }
        let mut shared = Shared {
            connection,
            outgoing,
            _alive: alive_sender,
            next_id: AtomicU64::new(first_id()),
            can_pass_fds,
            version,
            process: None,
        };
        shared.call(limit, "qmp_capabilities", json!({}), None).await?;
        // QEMU answers in order: what the client before us had asked is answered by now, and ids may be short.
        shared.next_id = AtomicU64::new(0);
        let cpus = match shared.call(limit, "query-cpus-fast", json!({}), None).await {
            // As long as QEMU waits for its configuration (`-preconfig`).
            Err(e) if e.refusal().is_some() => Value::Null,
            other => other?,
        };
        shared.process = process::behind(socket, address, process::thread_ids(&cpus)).await;
        Ok(Monitor { shared: Arc::new(shared) })
    }

    /// Executes a command; waits for its reply for at most 30 s.
    ///
    /// # Errors
    ///
    /// As [`Monitor::raw_within`].
    pub async fn raw(&self, command: &str, arguments: Value) -> Result<Value, MonitorError> {
        self.raw_within(DEFAULT_LIMIT, command, arguments).await
    }

    /// Executes a command. `arguments` is a JSON object; null stands for none.
    ///
    /// # Errors
    ///
    /// QEMU refuses ([`MonitorError::Command`]), does not answer within `limit` ([`MonitorError::Deadline`]; it may
    /// still execute the command), or is gone ([`MonitorError::Closed`]).
    pub async fn raw_within(&self, limit: Duration, command: &str, arguments: Value) -> Result<Value, MonitorError> {
        self.shared.call(limit, command, arguments, None).await
    }

    /// Executes a typed command, with the limit of [`Monitor::raw`]. The types are those of QEMU 9.1: what they do not
    /// know is lost on the way, so options that are newer go through [`Monitor::raw`].
    ///
    /// # Errors
    ///
    /// As [`Monitor::raw_within`], and [`MonitorError::Reply`] where a reply does not have the type's form.
    pub async fn execute<C: QmpCommand>(&self, command: C) -> Result<C::Ok, MonitorError> {
        let form = |e: serde_json::Error| MonitorError::Reply { command: C::NAME.into(), reason: e.to_string() };
        let arguments = serde_json::to_value(&command).map_err(form)?;
        let reply = self.raw(C::NAME, arguments).await?;
        serde_json::from_value(reply).map_err(form)
    }

    /// Executes `getfd` or `add-fd` and passes a descriptor with it; the caller keeps its own. Several at a time are
    /// fine: each descriptor goes with its command.
    ///
    /// # Errors
    ///
    /// As [`Monitor::raw`], and [`MonitorError::Descriptor`] over TCP.
    pub async fn send_fd(&self, command: &str, arguments: Value, fd: BorrowedFd<'_>) -> Result<Value, MonitorError> {
        let cannot = |reason: String| MonitorError::Descriptor {
            command: command.to_owned(),
            address: self.shared.connection.address.clone(),
            reason,
        };
        if !self.shared.can_pass_fds {
            return Err(cannot("TCP cannot carry it".into()));
        }
        let fd = copy_of(fd).map_err(|e| cannot(e.to_string()))?;
        self.shared.call(DEFAULT_LIMIT, command, arguments, Some(fd)).await
    }

    /// Whether [`Monitor::send_fd`] can work: the monitor is a unix socket.
    pub fn can_pass_fds(&self) -> bool {
        self.shared.can_pass_fds
    }

    /// A receiver of the events from now on. One that lags more than 1,024 events behind loses the oldest and is told
    /// so (`RecvError::Lagged`): look at the state then. `RecvError::Closed` is the end of the connection.
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.shared.connection.subscribe()
    }

    /// QEMU's version, from its greeting.
    pub fn greeting_version(&self) -> Version {
        self.shared.version.clone()
    }

    /// The QEMU process behind the monitor: `None` when it runs elsewhere, behind a proxy that hides it, or cannot be
    /// told for certain.
    pub fn peer_process(&self) -> Option<Process> {
        self.shared.process.clone()
    }

    /// Where it is connected.
    pub fn address(&self) -> &Address {
        &self.shared.connection.address
    }

    /// Whether the connection is gone.
    pub fn is_closed(&self) -> bool {
        self.shared.connection.reason().is_some()
    }

    /// Waits until the connection is gone.
    pub async fn closed(&self) {
        self.shared.connection.closed().await;
    }
}

impl Shared {
    async fn call(
        &self,
        limit: Duration,
        command: &str,
        arguments: Value,
        fd: Option<OwnedFd>,
    ) -> Result<Value, MonitorError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mut message = json!({"execute": command, "id": id});
        // QEMU reads commands byte by byte, at a few microseconds each: say nothing that need not be said.
        if !arguments.is_null() && arguments != json!({}) {
            message["arguments"] = arguments;
        }
        let line = format!("{message}\n").into_bytes();
        tracing::trace!(address = %self.connection.address, %message, "command");
        let mut slot = self.connection.slot(id);
        let work = async {
            // Refused only when the writer has ended, and then the slot has the reason.
            let _ = self.outgoing.send(Outgoing { id, line, fd }).await;
            (&mut slot.outcome).await
        };
        let outcome = timeout(limit, work).await;
        drop(slot);
        let address = || self.connection.address.clone();
        let command = command.to_owned();
        match outcome {
            Ok(Ok(Outcome::Return(value))) => Ok(value),
            Ok(Ok(Outcome::Refused { class, desc })) => Err(MonitorError::Command { command, class, desc }),
            Ok(Ok(Outcome::NotSent(e))) => {
                Err(MonitorError::Descriptor { command, address: address(), reason: e.to_string() })
            }
            Ok(Ok(Outcome::Closed(reason))) => {
                Err(MonitorError::Closed { address: address(), reason: reason.to_string() })
            }
            Ok(Err(_)) => Err(MonitorError::Closed { address: address(), reason: "its task ended".into() }),
            Err(_) => Err(MonitorError::Deadline { command, limit }),
        }
    }
}

/// Random, so that a reply to the client before us is not taken for ours.
fn first_id() -> u64 {
    let mut bytes = [0; 2];
    // Without a random source the ids are merely less unlike those of the client before us.
    let _ = getrandom::fill(&mut bytes);
    u64::from(u16::from_le_bytes(bytes))
}
