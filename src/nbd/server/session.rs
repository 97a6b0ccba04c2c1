//! The transmission phase of one connection (proto.md, "Transmission").
//!
//! The session's own task reads requests and takes room for them, so that a client that asks for too much at once is
//! simply not read from. Each read has a task that hands its pieces to the writer as they come, so replies overtake each
//! other. The session ends with the first of: the client's goodbye or ours (what was asked is answered first), a broken
//! connection, a breach of the protocol (nothing more is said).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use super::handshake::{ALLOCATION_ID, Chosen};
use super::request::{Asked, NoRequest, Terms, next_request};
use super::writer::{Held, Reply, write_replies};
use super::{CONNECTION_BYTES, CONNECTION_REQUESTS, Content, Disk, GOODBYE, Piece, Server, Unreadable};
use super::{add, asked_to_stop};
use crate::extent::Extent;
use crate::nbd::layout::*;
use crate::nbd::proto::*;

/// Requests come through a buffer of this size.
const READ_AHEAD_BYTES: usize = 8 << 10;
/// Replies that wait for the writer.
const QUEUED_REPLIES: usize = 64;
/// Descriptors of one block-status reply. A client asks again for the rest.
const MAX_RUNS: usize = 8192;
/// Room that a block-status request takes.
const STATUS_BYTES: usize = MAX_RUNS * size_of::<Descriptor>();
/// Where zeroes have to be sent.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

const _: () = assert!(MAX_RUNS <= MAX_DESCRIPTORS && STATUS_BYTES <= CONNECTION_BYTES);

/// How a session ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    #[error("the client said goodbye")]
    Goodbye,
    #[error("the client went")]
    Gone,
    #[error("the server was told to stop")]
    Stopped,
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    #[error("it broke the protocol: {0}")]
    Protocol(Malformed),
    #[error("it left its replies unread for {0:?} while others needed the room")]
    Unread(Duration),
}

impl From<NoRequest> for Ended {
    fn from(none: NoRequest) -> Self {
        match none {
            NoRequest::Gone => Ended::Gone,
            NoRequest::Io(error) => Ended::Io(error),
            NoRequest::Protocol(malformed) => Ended::Protocol(malformed),
        }
    }
}

/// What the tasks of a session share.
struct Session {
    server: Arc<Server>,
    disk: Arc<dyn Disk>,
    terms: Terms,
    room: Arc<Semaphore>,
    places: Arc<Semaphore>,
    replies: mpsc::Sender<Reply>,
}

/// Answers a client until the session ends.
pub(super) async fn run<R, W>(
    server: Arc<Server>,
    chosen: Chosen,
    read: R,
    write: W,
    mut stop: watch::Receiver<bool>,
) -> Ended
where
    R: AsyncRead + Send + Unpin + 'static,
    W: AsyncWrite + Send + Unpin + 'static,
{
    let disk = server.offers[chosen.offer].disk.clone();
    let Chosen { structured, allocation, .. } = chosen;
    let terms = Terms { size_bytes: disk.size_bytes(), structured, allocation };
    let (replies, queued) = mpsc::channel(QUEUED_REPLIES);
    // Dropping a set ends its tasks.
    let mut writer = JoinSet::new();
    writer.spawn(write_replies(write, queued, server.clone()));
    let room = Arc::new(Semaphore::new(CONNECTION_BYTES));
    let places = Arc::new(Semaphore::new(CONNECTION_REQUESTS));
    let session = Arc::new(Session { server, disk, terms, room, places, replies });
    let mut stream = BufReader::with_capacity(READ_AHEAD_BYTES, read);
    let mut tasks = JoinSet::new();
    let ended = tokio::select! {
        ended = session.take_requests(&mut stream, &mut tasks) => ended,
        () = asked_to_stop(&mut stop) => Ended::Stopped,
        Some(written) = writer.join_next() => return broken(written),
    };
    if !matches!(ended, Ended::Goodbye | Ended::Stopped) {
        return ended;
    }
    drop(session);
    let answered = async {
        while tasks.join_next().await.is_some() {}
        writer.join_next().await
    };
    let _ = tokio::time::timeout(GOODBYE, answered).await;
    ended
}

/// Why the writer ended before the session did.
fn broken(written: Result<Result<(), Ended>, tokio::task::JoinError>) -> Ended {
    match written {
        Ok(Err(ended)) => ended,
        Ok(Ok(())) | Err(_) => Ended::Io(io::Error::other("its replies can no longer be sent")),
    }
}

impl Session {
    async fn take_requests<R>(self: &Arc<Self>, stream: &mut R, tasks: &mut JoinSet<()>) -> Ended
    where
        R: AsyncRead + Unpin,
    {
        loop {
            let (request, asked) = match next_request(stream, &self.terms).await {
                Ok(next) => next,
                Err(none) => return none.into(),
            };
            while let Some(ended) = tasks.try_join_next() {
                if ended.is_err() {
                    // Its client would wait for ever.
                    return Ended::Io(io::Error::other("a request could not be answered"));
                }
            }
            let taken = match asked {
                Asked::Disconnect => return Ended::Goodbye,
                Asked::Refuse(errno, why) => self.say(self.refusal(&request, errno, why)).await,
                Asked::Flush => self.say(simple(&request)).await,
                Asked::Expect(extent) => {
                    self.disk.expect(extent);
                    self.say(simple(&request)).await
                }
                Asked::Read { extent, whole } => match self.take_room(extent.len_bytes as usize).await {
                    Some((held, place)) => {
                        tasks.spawn(self.clone().read(request, extent, whole, held, place));
                        true
                    }
                    None => false,
                },
                Asked::Status { extent, one } => match self.take_room(STATUS_BYTES).await {
                    Some((held, place)) => {
                        tasks.spawn(self.clone().status(request, extent, one, held, place));
                        true
                    }
                    None => false,
                },
            };
            if !taken {
                return Ended::Gone;
            }
        }
    }

    /// Waits for room; `None` only when the session is over.
    async fn take_room(&self, len: usize) -> Option<(Held, OwnedSemaphorePermit)> {
        let place = self.places.clone().acquire_owned().await.ok()?;
        let len = len as u32;
        let connection = self.room.clone().acquire_many_owned(len).await.ok()?;
        let server = self.server.take_room(len).await?;
        Some((Held { connection, server }, place))
    }

    /// Hands bytes to the writer; `false` when it has ended.
    async fn say(&self, bytes: Vec<u8>) -> bool {
        self.send(vec![bytes.into()], None).await
    }

    async fn send(&self, bytes: Vec<Bytes>, held: Option<Held>) -> bool {
        self.replies.send(Reply { bytes, _held: held }).await.is_ok()
    }

    fn refusal(&self, request: &Request, errno: u32, why: &str) -> Vec<u8> {
        match self.terms.structured {
            true => encode_error_chunk(CHUNK_DONE, request.cookie, errno, why, None),
            false => encode_simple_reply(request.cookie, errno).to_vec(),
        }
    }

    async fn read(
        self: Arc<Self>,
        request: Request,
        extent: Extent,
        whole: bool,
        held: Held,
        _place: OwnedSemaphorePermit,
    ) {
        let pieces = self.disk.read(extent).await;
        let counters = &self.server.counters;
        add(&counters.reads, 1);
        let failed = match self.terms.structured && !whole {
            true => self.send_pieces(request.cookie, pieces, held).await,
            false => self.send_whole(&request, extent, pieces, held).await,
        };
        if failed {
            add(&counters.failed_reads, 1);
        }
    }

    /// A chunk a piece, each as soon as it is there. What cannot be read is an error of just these bytes. Says whether
    /// there was one.
    async fn send_pieces(&self, cookie: u64, pieces: Vec<Piece>, mut held: Held) -> bool {
        let (counters, mut failed) = (&self.server.counters, false);
        let last = pieces.len().saturating_sub(1);
        for (number, Piece { extent, content }) in pieces.into_iter().enumerate() {
            let flags = if number == last { CHUNK_DONE } else { 0 };
            let (at, len) = (extent.offset_bytes, extent.len_bytes as u32);
            let bytes = match self.content(extent, content).await {
                Ok(Some(data)) => vec![encode_data_chunk(flags, cookie, at, len).into(), data],
                Ok(None) => {
                    add(&counters.hole_bytes, extent.len_bytes);
                    vec![encode_hole_chunk(flags, cookie, at, len).into()]
                }
                Err(unreadable) => {
                    failed = true;
                    vec![encode_error_chunk(flags, cookie, EIO, &unreadable.to_string(), Some(at)).into()]
                }
            };
            if !self.send(bytes, held.split(len as usize)).await {
                break;
            }
        }
        failed
    }

    /// Everything or an error. Says whether it was an error.
    async fn send_whole(&self, request: &Request, extent: Extent, pieces: Vec<Piece>, held: Held) -> bool {
        let cookie = request.cookie;
        let mut bytes = vec![Bytes::new()];
        let mut all_zero = true;
        for piece in pieces {
            match self.content(piece.extent, piece.content).await {
                Ok(Some(data)) => {
                    all_zero = false;
                    bytes.push(data);
                }
                Ok(None) => bytes.extend(zeroes(piece.extent.len_bytes as usize)),
                Err(unreadable) => {
                    self.say(self.refusal(request, EIO, &unreadable.to_string())).await;
                    return true;
                }
            }
        }
        let (at, len) = (extent.offset_bytes, extent.len_bytes as u32);
        if all_zero && self.terms.structured {
            add(&self.server.counters.hole_bytes, extent.len_bytes);
            bytes = vec![encode_hole_chunk(CHUNK_DONE, cookie, at, len).into()];
        } else {
            bytes[0] = match self.terms.structured {
                true => encode_data_chunk(CHUNK_DONE, cookie, at, len).into(),
                false => encode_simple_reply(cookie, 0).to_vec().into(),
            };
        }
        self.send(bytes, Some(held)).await;
        false
    }

    /// The bytes of a piece, or `None` for zeroes.
    async fn content(&self, extent: Extent, content: Content) -> Result<Option<Bytes>, Unreadable> {
        let bytes = match content {
            Content::Zeroes => None,
            Content::Data(coming) => Some(coming.await?),
        };
        debug_assert!(bytes.as_ref().is_none_or(|bytes| bytes.len() as u64 == extent.len_bytes));
        add(&self.server.counters.read_bytes, extent.len_bytes);
        Ok(bytes)
    }

    async fn status(
        self: Arc<Self>,
        request: Request,
        extent: Extent,
        one: bool,
        held: Held,
        _place: OwnedSemaphorePermit,
    ) {
        let runs = self.disk.runs(extent, if one { 1 } else { MAX_RUNS }).await;
        // A request is at most 4 GiB long, and so is each run.
        let descriptor = |run: &super::Run| (run.len_bytes as u32, if run.hole { STATE_HOLE | STATE_ZERO } else { 0 });
        let descriptors: Vec<_> = runs.iter().map(descriptor).collect();
        let reply = encode_block_status(request.cookie, ALLOCATION_ID, &descriptors);
        self.send(vec![reply.into()], Some(held)).await;
    }
}

/// The reply to what went well and has no data. Simple also where others are structured: proto.md leaves that free but for
/// reads and block status.
fn simple(request: &Request) -> Vec<u8> {
    encode_simple_reply(request.cookie, 0).to_vec()
}

fn zeroes(len: usize) -> impl Iterator<Item = Bytes> {
    (0..len).step_by(ZEROES.len()).map(move |at| Bytes::from_static(&ZEROES[..ZEROES.len().min(len - at)]))
}
