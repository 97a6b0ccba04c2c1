//! One session with many requests in flight (proto.md, "Transmission").
//!
//! Two tasks own the stream: a writer that sends whole requests, so that a caller who goes away never leaves half of
//! one, and a reader. Callers put their request into the table, hand its bytes to the writer and wait. Requests may
//! be answered in any order. Dropping a caller's future changes nothing for the others. Dropping the client closes the
//! socket at once; [`Client::close`] says goodbye first.

use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::error::NbdError;
use super::layout::{Request, encode_request};
use super::negotiate::Export;
use super::proto::{CMD_DISC, REQUEST_BYTES};
use super::reader::read_replies;
use super::table::{MAX_PARTS, Operation, Outcome, Part, Table, Work};
use crate::extent::Extent;

/// Headers come through a buffer of this size; longer data goes past it into the caller's.
const READ_AHEAD_BYTES: usize = 8 << 10;
/// How long a session may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// How a session behaves.
#[derive(Clone, Copy, Debug)]
pub struct ClientOptions {
    /// Most requests on the wire at once (1..=1024); further ones wait. QEMU works on 16 per connection.
    pub max_in_flight: usize,
    /// How long a request may take, its waiting for a place included. `None`: until the session ends.
    pub deadline: Option<Duration>,
}

impl Default for ClientOptions {
    fn default() -> Self {
        ClientOptions { max_in_flight: 512, deadline: None }
    }
}

/// A session in its transmission phase.
#[derive(Debug)]
pub struct Client {
    peer: String,
    export: Export,
    options: ClientOptions,
    table: Arc<Shared>,
    queue: mpsc::Sender<Vec<u8>>,
    places: Arc<Semaphore>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
}

struct Shared(Table);

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} waiting", self.0.waiting())
    }
}

impl Client {
    /// Starts the session on the two halves of a stream whose negotiation gave `export`. Needs a tokio runtime.
    pub fn start<R, W>(read: R, write: W, peer: &str, export: Export, options: ClientOptions) -> Client
    where
        R: AsyncRead + Send + Unpin + 'static,
        W: AsyncWrite + Send + Unpin + 'static,
    {
        let max_in_flight = options.max_in_flight.clamp(1, MAX_PARTS);
        let table = Arc::new(Shared(Table::default()));
        // One message holds at least one place, so the queue never fills while the server plays by the rules. One more
        // for the goodbye.
        let (queue, requests) = mpsc::channel(max_in_flight + 1);
        let structured = export.structured;
        let shared = table.clone();
        let reader = tokio::spawn(async move {
            let stream = BufReader::with_capacity(READ_AHEAD_BYTES, read);
            let ended = read_replies(stream, &shared.0, structured).await;
            shared.0.end(&ended.to_string());
        });
        let shared = table.clone();
        let writer = tokio::spawn(async move {
            if let Err(e) = write_requests(write, requests).await {
                shared.0.end(&format!("the connection broke: {e}"));
            }
        });
        let places = Arc::new(Semaphore::new(max_in_flight));
        let options = ClientOptions { max_in_flight, ..options };
        Client { peer: peer.to_owned(), export, options, table, queue, places, reader, writer }
    }

    /// The export as negotiated.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// How it behaves.
    pub fn options(&self) -> &ClientOptions {
        &self.options
    }

    /// Name of the server for messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Why the session ended, once it has.
    pub fn ended(&self) -> Option<String> {
        self.table.0.ended()
    }

    /// How many operations wait for their replies.
    pub fn waiting(&self) -> usize {
        self.table.0.waiting()
    }

    /// Says goodbye (DISC) and closes, waiting at most a second. Waiting requests fail.
    pub async fn close(self) {
        let disc = Request { flags: 0, command: CMD_DISC, cookie: 0, offset: 0, len: 0 };
        let _ = self.queue.try_send(encode_request(&disc).to_vec());
        let mut me = self;
        // The server closes after DISC; the reader sees that and ends.
        let _ = tokio::time::timeout(GOODBYE, &mut me.reader).await;
    }

    pub(super) fn gone(&self, reason: String) -> NbdError {
        NbdError::Gone { peer: self.peer.clone(), reason }
    }

    /// Sends an operation and waits for its outcome, which is never `Failed` or `Gone`: those become errors.
    pub(super) async fn perform(
        &self,
        what: &'static str,
        command: u16,
        flags: u16,
        extent: Extent,
        work: Work,
        parts: Vec<Part>,
    ) -> Result<Outcome, NbdError> {
        let exchange = self.exchange(command, flags, work, parts);
        let outcome = match self.options.deadline {
            None => exchange.await,
            Some(after) => tokio::time::timeout(after, exchange).await.map_err(|_| {
                let peer = self.peer.clone();
                NbdError::Deadline { peer, what, extent, after }
            })?,
        };
        match outcome {
            Outcome::Gone(reason) => Err(self.gone(reason)),
            Outcome::Failed(errno, message) => {
                let errno = Errno::from_raw(i32::try_from(errno).unwrap_or(i32::MAX));
                Err(NbdError::Server { peer: self.peer.clone(), what, extent, errno, message })
            }
            other => Ok(other),
        }
    }

    async fn exchange(&self, command: u16, flags: u16, work: Work, parts: Vec<Part>) -> Outcome {
        let count = parts.len();
        let Ok(places) = self.places.clone().acquire_many_owned(count as u32).await else {
            return Outcome::Gone("it was closed".into());
        };
        let mut bytes = Vec::with_capacity(count * REQUEST_BYTES);
        let extents: Vec<_> = parts.iter().map(Part::extent).collect();
        let (reply, answer) = oneshot::channel();
        let operation = Operation { work, parts, reply, places: Some(places), left: count, failed: None };
        // From here to try_send nothing waits: the table and the wire stay in step whatever becomes of the caller.
        let first = match self.table.0.insert(operation) {
            Ok(cookie) => cookie,
            Err(reason) => return Outcome::Gone(reason),
        };
        for (cookie, (offset, len)) in (first..).zip(extents) {
            bytes.extend_from_slice(&encode_request(&Request { flags, command, cookie, offset, len }));
        }
        if self.queue.try_send(bytes).is_err() {
            // Full only when replies came to what was not sent yet; closed when the writer ended.
            self.table.0.end("the connection takes no more requests");
        }
        answer.await.unwrap_or_else(|_| Outcome::Gone("it was closed".into()))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.reader.abort();
        self.writer.abort();
        self.table.0.end("it was closed");
    }
}

/// Sends what is queued, several requests in one write where they wait.
async fn write_requests<W>(mut stream: W, mut requests: mpsc::Receiver<Vec<u8>>) -> std::io::Result<()>
where
    W: AsyncWrite + Unpin,
{
    const AT_ONCE: usize = 64;
    let mut waiting = Vec::with_capacity(AT_ONCE);
    let mut bytes = vec![];
    while requests.recv_many(&mut waiting, AT_ONCE).await > 0 {
        bytes.clear();
        waiting.drain(..).for_each(|one| bytes.extend_from_slice(&one));
        stream.write_all(&bytes).await?;
        stream.flush().await?;
    }
    Ok(())
}
