//! The two tasks of a connection, and the slots in which calls wait for their replies.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::sleep;

use super::message::{Lines, MAX_LINE_BYTES, Message, Version, excerpt};
use super::socket::Socket;
use super::{Address, Event};

/// Events that a slow receiver may lag behind before it loses the oldest (and is told so).
const EVENTS_KEPT: usize = 1024;
/// Commands that may wait for the writer before callers wait.
pub(super) const COMMANDS_QUEUED: usize = 64;
/// How long the writer may go on after the last clone of the monitor is gone.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What becomes of a call.
#[derive(Debug)]
pub(super) enum Outcome {
    Return(Value),
    Refused { class: String, desc: String },
    NotSent(io::Error),
    Closed(Arc<str>),
}

/// Why a connection ended.
#[derive(Clone, Debug)]
pub(super) enum End {
    /// The peer sent what is not QMP.
    Garbage(String),
    /// The peer, the system or we ended it.
    Gone(String),
}

impl End {
    fn gone(reason: impl Into<String>) -> Self {
        End::Gone(reason.into())
    }

    fn reason(&self) -> &str {
        let (End::Garbage(reason) | End::Gone(reason)) = self;
        reason
    }
}

/// A command on its way to the writer: its whole line, and the descriptor that goes with its first byte.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub id: u64,
    pub line: Vec<u8>,
    pub fd: Option<OwnedFd>,
}

#[derive(Debug)]
struct State {
    slots: HashMap<u64, oneshot::Sender<Outcome>>,
    /// `None` once closed, so that receivers learn of the end.
    events: Option<broadcast::Sender<Event>>,
    /// The greeting goes here.
    greeting: Option<oneshot::Sender<Result<Version, End>>>,
}

/// What the tasks and the clones of a monitor share.
#[derive(Debug)]
pub(super) struct Connection {
    pub address: Address,
    state: Mutex<State>,
    /// The reason, once closed.
    closed: watch::Sender<Option<Arc<str>>>,
}

/// Frees a slot when its call is over, whether answered, timed out or cancelled.
#[derive(Debug)]
pub(super) struct Slot<'a> {
    connection: &'a Connection,
    id: u64,
    pub outcome: oneshot::Receiver<Outcome>,
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.connection.state().slots.remove(&self.id);
    }
}

impl Connection {
    /// Starts the tasks. Gives the greeting's receiver and the way to the writer. The writer ends, and closes the
    /// socket, when `alive` is dropped and all that was sent to it is written.
    pub(super) fn start(
        address: Address,
        socket: Arc<Socket>,
        alive: watch::Receiver<()>,
    ) -> (Arc<Connection>, oneshot::Receiver<Result<Version, End>>, mpsc::Sender<Outgoing>) {
        let (greeting_sender, greeting) = oneshot::channel();
        let (outgoing, commands) = mpsc::channel(COMMANDS_QUEUED);
        let connection = Arc::new(Connection {
            address,
            state: Mutex::new(State {
                slots: HashMap::new(),
                events: Some(broadcast::Sender::new(EVENTS_KEPT)),
                greeting: Some(greeting_sender),
            }),
            closed: watch::Sender::new(None),
        });
        let reader = tokio::spawn({
            let (connection, socket) = (connection.clone(), socket.clone());
            async move {
                let end = connection.read(&socket).await;
                connection.close(end);
            }
        });
        tokio::spawn({
            let connection = connection.clone();
            async move {
                let end = connection.write(&socket, commands, alive).await;
                connection.close(end);
                reader.abort();
            }
        });
        (connection, greeting, outgoing)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock can leave it half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot for the reply to `id`.
    pub(super) fn slot(&self, id: u64) -> Slot<'_> {
        let (sender, outcome) = oneshot::channel();
        let mut state = self.state();
        match &*self.closed.borrow() {
            Some(reason) => drop(sender.send(Outcome::Closed(reason.clone()))),
            None => drop(state.slots.insert(id, sender)),
        }
        drop(state);
        Slot { connection: self, id, outcome }
    }

    /// A receiver of events from now on; at its end at once when the connection is closed.
    pub(super) fn subscribe(&self) -> broadcast::Receiver<Event> {
        match &self.state().events {
            Some(sender) => sender.subscribe(),
            None => broadcast::Sender::new(1).subscribe(),
        }
    }

    /// Why the connection is closed, if it is.
    pub(super) fn reason(&self) -> Option<Arc<str>> {
        self.closed.borrow().clone()
    }

    /// Waits for the end of the connection.
    pub(super) async fn closed(&self) {
        // The sender lives as long as `self`.
        let _ = self.closed.subscribe().wait_for(Option::is_some).await;
    }

    /// Ends every call and every receiver. The first reason stays.
    fn close(&self, end: End) {
        let mut state = self.state();
        let reason: Arc<str> = end.reason().into();
        let first = self.closed.send_if_modified(|r| r.is_none() && r.replace(reason.clone()).is_none());
        if !first {
            return;
        }
        tracing::debug!(address = %self.address, %reason, "the monitor is closed");
        state.events = None;
        if let Some(greeting) = state.greeting.take() {
            let _ = greeting.send(Err(end));
        }
        for (_, slot) in state.slots.drain() {
            let _ = slot.send(Outcome::Closed(reason.clone()));
        }
    }

    /// Reads until the end; gives the reason.
    async fn read(&self, socket: &Socket) -> End {
        let mut lines = Lines::new(MAX_LINE_BYTES);
        let mut buffer = vec![0; 64 << 10];
        loop {
            match socket.read(&mut buffer).await {
                Ok(0) if lines.rest().is_empty() => return End::gone("QEMU ended, or closed the connection"),
                Ok(0) => {
                    return End::Gone(format!("QEMU ended in the middle of {}", excerpt(lines.rest())));
                }
                Ok(n) => lines.push(&buffer[..n]),
                Err(e) => return End::Gone(format!("reading from it failed: {e}")),
            }
            loop {
                let message = match lines.next() {
                    Ok(Some(line)) => Message::parse(line),
                    Ok(None) => break,
                    Err(reason) => return End::Garbage(reason),
                };
                match message {
                    Ok(message) => self.take(message),
                    Err(reason) => return End::Garbage(reason),
                }
            }
        }
    }

    /// Hands a message to whom it concerns.
    fn take(&self, message: Message) {
        let mut state = self.state();
        let (id, outcome) = match message {
            Message::Greeting(version) => {
                if let Some(greeting) = state.greeting.take() {
                    let _ = greeting.send(Ok(version));
                }
                return;
            }
            Message::Event(event) => {
                tracing::debug!(address = %self.address, name = event.name, data = %event.data, "event");
                if let Some(events) = &state.events {
                    let _ = events.send(event);
                }
                return;
            }
            Message::Return { id, value } => (id, Outcome::Return(value)),
            Message::Error { id, class, desc } => (id, Outcome::Refused { class, desc }),
        };
        match id.and_then(|id| state.slots.remove(&id)) {
            Some(slot) => drop(slot.send(outcome)),
            None => tracing::debug!(address = %self.address, ?id, ?outcome, "a reply that nobody waits for"),
        }
    }

    /// Writes commands until the last clone is gone or the connection is closed.
    async fn write(
        &self,
        socket: &Socket,
        mut commands: mpsc::Receiver<Outgoing>,
        mut alive: watch::Receiver<()>,
    ) -> End {
        let work = async {
            while let Some(command) = commands.recv().await {
                if let Err(end) = self.write_one(socket, command).await {
                    return end;
                }
            }
            End::gone("livebackup closed it")
        };
        let given_up = async {
            let _ = alive.changed().await;
            sleep(LAST_WORDS).await;
        };
        tokio::select! {
            biased;
            end = work => end,
            () = self.closed() => End::gone("it was closed"),
            () = given_up => End::gone("livebackup closed it while QEMU took no commands"),
        }
    }

    async fn write_one(&self, socket: &Socket, command: Outgoing) -> Result<(), End> {
        let end = |e: io::Error| match e.kind() {
            io::ErrorKind::BrokenPipe => End::gone("QEMU ended, or closed the connection"),
            _ => End::Gone(format!("writing to it failed: {e}")),
        };
        let sent = match &command.fd {
            None => 0,
            Some(fd) => match socket.write_first(&command.line, fd).await {
                Ok(sent) => sent,
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Err(end(e)),
                Err(e) => {
                    // Nothing of the command was sent: only this call fails.
                    if let Some(slot) = self.state().slots.remove(&command.id) {
                        let _ = slot.send(Outcome::NotSent(e));
                    }
                    return Ok(());
                }
            },
        };
        socket.write_all(&command.line[sent..]).await.map_err(end)
    }
}
