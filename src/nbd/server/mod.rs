//! The server: disks for any NBD client to read.
//!
//! ```text
//!  connection ─► handshake ─────────────► session ──────────────────────────────► end
//!                one option after another  requests in, replies out, in any order
//!                under one time limit       │ request   what it may ask for (pure)
//!                                           │ a task a request: waits for the disk, hands pieces on
//!                                           └ writer: one task that sends whole replies
//! ```
//!
//! Nothing can be written: that is answered with EPERM, and the data is read over. A request that cannot be answered is
//! answered with an error and the session goes on; bytes that break the protocol end that session and no other. When
//! [`Server::serve`] is told to stop, nobody is let in any more, what was asked is answered for a second, and then every
//! connection is closed. Dropping its future closes all of them at once.
//!
//! # Memory
//!
//! A read takes room for its bytes before it begins, of its connection and of the whole server, and each piece gives its
//! share back when it is sent. A client that asks and does not read is waited for as long as nobody needs the room that it
//! holds; then it is let go.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

use crate::block::BoxFuture;
use crate::extent::Extent;
use handshake::{HandshakeError, shake_hands};

pub(super) mod handshake;
pub(super) mod request;
mod session;
mod writer;

/// Longest read that is answered ("Block size constraints": what every client may ask for).
pub const MAX_READ_BYTES: u32 = super::proto::DEFAULT_MAX_BLOCK_BYTES;
/// Bytes that one connection may wait for at once.
const CONNECTION_BYTES: usize = 32 << 20;
/// Requests that one connection may wait for at once.
const CONNECTION_REQUESTS: usize = 256;
/// How long what was asked is still answered after the end.
const GOODBYE: Duration = Duration::from_secs(1);
/// Pause after a connection that the system did not give us.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

const _: () = assert!(MAX_READ_BYTES as usize <= CONNECTION_BYTES, "the longest read gets room");

/// A disk that is served.
pub trait Disk: Send + Sync {
    /// Its size, to the byte.
    fn size_bytes(&self) -> u64;

    /// Length and alignment of the reads that suit it best: a power of two, 512 at least.
    fn preferred_bytes(&self) -> u32;

    /// Begins to read `extent` (not empty, within the disk, at most [`MAX_READ_BYTES`]). The pieces cover it in order and
    /// without gaps. What a piece keeps in memory is at most twice as long as the piece.
    fn read(&self, extent: Extent) -> BoxFuture<'_, Vec<Piece>>;

    /// What is known of `extent` (not empty, within the disk) without reading it: from its beginning on, in order and
    /// without gaps, one run at least and `most` at most, together perhaps shorter than asked.
    fn runs(&self, extent: Extent, most: usize) -> BoxFuture<'_, Vec<Run>>;

    /// Somebody will read `extent` (within the disk) soon. A hint: as much of it as is sensible, or nothing.
    fn expect(&self, extent: Extent);
}

/// A part of a read.
pub struct Piece {
    /// Its bytes; never empty.
    pub extent: Extent,
    /// What they are.
    pub content: Content,
}

/// What a piece is made of.
pub enum Content {
    /// Zeroes.
    Zeroes,
    /// Bytes that are on their way, as many as the piece is long.
    Data(BoxFuture<'static, Result<Bytes, Unreadable>>),
}

/// The bytes are lost. Who served the disk has said why, in its log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("these bytes cannot be read; the server's log says why")]
pub struct Unreadable;

/// Bytes of a disk that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// How many; never 0.
    pub len_bytes: u64,
    /// Whether they are known to be zero, and take no room.
    pub hole: bool,
}

/// A disk, as clients see it.
pub struct Offer {
    /// Name of the export.
    pub name: String,
    /// Words for people.
    pub description: String,
    /// What is served.
    pub disk: Arc<dyn Disk>,
}

/// How a server behaves.
#[derive(Clone, Copy, Debug)]
pub struct ServerOptions {
    /// Limit of a whole handshake.
    pub handshake: Duration,
    /// Connections at once, at most; further ones are closed.
    pub max_clients: usize,
    /// Bytes that all connections together may wait for at once; [`MAX_READ_BYTES`] at least.
    pub in_flight_bytes: usize,
    /// How long a client may leave its replies unread while others need the room.
    pub patience: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            handshake: Duration::from_secs(15),
            max_clients: 64,
            in_flight_bytes: 256 << 20,
            patience: Duration::from_secs(30),
        }
    }
}

/// What a server has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Connections that chose an export.
    pub clients: u64,
    /// Reads that were answered, well or not.
    pub reads: u64,
    /// Bytes that they were answered with.
    pub read_bytes: u64,
    /// Of them, zeroes that were not sent as such.
    pub hole_bytes: u64,
    /// Reads that failed, all or in part.
    pub failed_reads: u64,
}

#[derive(Debug, Default)]
struct Counters {
    clients: AtomicU64,
    reads: AtomicU64,
    read_bytes: AtomicU64,
    hole_bytes: AtomicU64,
    failed_reads: AtomicU64,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// Where clients come from.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket.
    Unix(UnixListener),
    /// A TCP port.
    Tcp(TcpListener),
}

enum Connection {
    Unix(tokio::net::UnixStream),
    Tcp(tokio::net::TcpStream),
}

impl Listener {
    async fn accept(&self) -> std::io::Result<Connection> {
        match self {
            Listener::Unix(listener) => Ok(Connection::Unix(listener.accept().await?.0)),
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Connection::Tcp(stream))
            }
        }
    }
}

/// Serves disks, read-only.
pub struct Server {
    offers: Vec<Offer>,
    options: ServerOptions,
    room: Arc<Semaphore>,
    /// Who waits for room.
    waiting: AtomicU64,
    counters: Counters,
}

impl Server {
    /// A server of these disks, whose names differ. The empty name is another one of the disk if there is only one.
    pub fn new(offers: Vec<Offer>, options: ServerOptions) -> Arc<Server> {
        let room = options.in_flight_bytes.max(MAX_READ_BYTES as usize);
        let (waiting, counters) = Default::default();
        Arc::new(Server { offers, options, room: Arc::new(Semaphore::new(room)), waiting, counters })
    }

    /// What was done so far.
    pub fn totals(&self) -> Totals {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counters { clients, reads, read_bytes, hole_bytes, failed_reads } = &self.counters;
        Totals {
            clients: of(clients),
            reads: of(reads),
            read_bytes: of(read_bytes),
            hole_bytes: of(hole_bytes),
            failed_reads: of(failed_reads),
        }
    }

    /// Serves whoever comes until `stop` says true.
    pub async fn serve(self: &Arc<Self>, listener: &Listener, mut stop: watch::Receiver<bool>) {
        let (mut clients, mut number, mut full) = (JoinSet::new(), 0u64, false);
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok(connection) if clients.len() < self.options.max_clients => {
                        number += 1;
                        full = false;
                        clients.spawn(self.clone().converse(connection, number, stop.clone()));
                    }
                    // Said once: somebody may try again and again.
                    Ok(_) if !std::mem::replace(&mut full, true) => tracing::warn!(
                        "a client was turned away: {} are connected, and that is the most; disconnect one",
                        self.options.max_clients
                    ),
                    Ok(_) => {}
                    Err(error) => {
                        tracing::warn!("cannot accept a connection: {error}");
                        tokio::time::sleep(ACCEPT_AGAIN).await;
                    }
                },
                Some(_) = clients.join_next() => {}
                () = asked_to_stop(&mut stop) => break,
            }
        }
        let all_gone = async { while clients.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(GOODBYE, all_gone).await;
        clients.shutdown().await;
    }

    /// A connection, from its first byte to its end.
    async fn converse(self: Arc<Self>, connection: Connection, client: u64, mut stop: watch::Receiver<bool>) {
        let limit = self.options.handshake;
        let greet = async {
            match connection {
                Connection::Unix(mut stream) => {
                    let chosen = shake_hands(&mut stream, &self.offers).await;
                    (chosen, Connection::Unix(stream))
                }
                Connection::Tcp(mut stream) => {
                    let chosen = shake_hands(&mut stream, &self.offers).await;
                    (chosen, Connection::Tcp(stream))
                }
            }
        };
        let greeted = tokio::select! {
            greeted = tokio::time::timeout(limit, greet) => greeted,
            () = asked_to_stop(&mut stop) => return,
        };
        let (chosen, connection) = match greeted {
            Ok((Ok(Some(chosen)), connection)) => (chosen, connection),
            Ok((Ok(None), _)) => return tracing::debug!(client, "ended after it had looked around"),
            Ok((Err(HandshakeError::Io(error)), _)) => {
                return tracing::debug!(client, "went in the middle of its handshake: {error}");
            }
            Ok((Err(error), _)) => return tracing::warn!(client, "a client was turned away: {error}"),
            Err(_) => {
                return tracing::warn!(
                    client,
                    "a client was turned away: it did not finish its handshake in {limit:?}"
                );
            }
        };
        add(&self.counters.clients, 1);
        let name = self.offers[chosen.offer].name.clone();
        tracing::info!(client, export = name, "connected");
        let ended = match connection {
            Connection::Unix(stream) => {
                let (read, write) = stream.into_split();
                session::run(self, chosen, read, write, stop).await
            }
            Connection::Tcp(stream) => {
                let (read, write) = stream.into_split();
                session::run(self, chosen, read, write, stop).await
            }
        };
        match ended {
            session::Ended::Protocol(_) | session::Ended::Unread(_) => {
                tracing::warn!(client, export = name, "a client was let go: {ended}");
            }
            _ => tracing::info!(client, export = name, "{ended}"),
        }
    }

    /// Takes room for so many bytes, at most all that there is, as soon as others give it back.
    async fn take_room(&self, len: u32) -> Option<OwnedSemaphorePermit> {
        let _waits = Waits::new(&self.waiting);
        self.room.clone().acquire_many_owned(len).await.ok()
    }

    /// Whether somebody waits for room.
    fn is_short_of_room(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }
}

/// Counts who waits, until it is dropped.
struct Waits<'a>(&'a AtomicU64);

impl<'a> Waits<'a> {
    fn new(waiting: &'a AtomicU64) -> Self {
        add(waiting, 1);
        Self(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn asked_to_stop(stop: &mut watch::Receiver<bool>) {
    // Nobody who could ask any more is as good as being asked.
    let _ = stop.wait_for(|stop| *stop).await;
}
