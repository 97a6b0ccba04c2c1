//! The server's end of a connection; what is asked is answered by a handler.
//!
//! ```text
//! hello ─► waiting ─► request ─► handler ─┬─► reply ─► waiting
//!             │                           └─► session: pump of events ∥ reader of acknowledgements ─► drained, closed
//!             └─► the client closed, or asked for nothing for long, or the server ends
//! ```
//!
//! A client that leaves or misbehaves ends what it asked for: the handler's future is dropped, or the session is; but a
//! [session that can be resumed](super::resume) only loses its connection when the client is not heard of any more. A client
//! that reads slowly slows its session down, since events are taken only as fast as they are written. What arrives is
//! bounded before memory is taken, and read only while there is room for it.
//!
//! A session may have [several connections](super::trunk): what is pumped goes to all of them, and a connection that joined
//! does nothing else any more.

use std::fmt;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::client::place_of;
use super::common::Common;
use super::contract::{Acks, Breach, Given, check_begin};
use super::digests::Digests;
use super::frame::{self, Encoded, FrameError, MAX_REPLY_BYTES, MAX_REQUEST_BYTES};
use super::hello::{self, HelloError};
use super::link::{LinkError, Stream, Timing, every};
use super::message::{Ack, Begin, Event, Failure, FailureCode, Reply, Request, Session, Waiting};
use super::packing::{Outgoing, Spent};
use super::reader::{Frame, FrameReader};
use super::resume::{Attachment, Lasting, Word};
use super::spread::{Line, Lines};
use super::trunk::Trunk;
use super::writer::FrameWriter;
use crate::block::BoxFuture;

/// What a handler answers.
pub enum Answer {
    /// To all but [`Request::Begin`].
    Reply(Reply),
    /// To [`Request::Begin`].
    Session(Session),
    /// To [`Request::Begin`] and [`Request::Resume`]: a session that can be resumed.
    Attached(Box<Attachment>),
    /// To [`Request::Begin`]: not yet. The client is told why, and waits for the other answer.
    Later(Waiting, BoxFuture<'static, Result<Answer, Failure>>),
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reply(reply) => f.debug_tuple("Reply").field(reply).finish(),
            Self::Session(session) => f.debug_tuple("Session").field(session).finish(),
            Self::Attached(attachment) => f.debug_tuple("Attached").field(attachment).finish(),
            Self::Later(waiting, _) => f.debug_tuple("Later").field(waiting).finish(),
        }
    }
}

/// Serves one connection to its end: says hello, hands each request to `handler`, and carries a session's events and
/// acknowledgements. The future that `handler` gives is dropped when the client leaves before it is done: what it began
/// must end by that. [`Request::Ack`] never reaches it. An acknowledged extent was sent, consists of whole chunks, and is
/// acknowledged once.
///
/// What went wrong with the connection is logged here and returned for the curious.
///
/// # Errors
/// When the connection did not end the way it should.
pub async fn serve_connection<H, F>(stream: Stream, timing: Timing, handler: H) -> Result<(), Failure>
where
    H: FnMut(Request) -> F,
    F: Future<Output = Result<Answer, Failure>>,
{
    serve_with(stream, timing, Common::default(), handler).await
}

/// [`serve_connection`], as one of several connections.
///
/// # Errors
/// As [`serve_connection`].
pub async fn serve_with<H, F>(stream: Stream, timing: Timing, common: Common, handler: H) -> Result<(), Failure>
where
    H: FnMut(Request) -> F,
    F: Future<Output = Result<Answer, Failure>>,
{
    let peer = stream.peer().to_owned();
    let outcome = converse(stream, timing, common, handler).await;
    match &outcome {
        Ok(()) => tracing::debug!(peer, "the connection ended"),
        Err(failure) => tracing::warn!(peer, "the connection was closed: {failure}"),
    }
    outcome
}

async fn converse<H, F>(mut stream: Stream, timing: Timing, common: Common, mut handler: H) -> Result<(), Failure>
where
    H: FnMut(Request) -> F,
    F: Future<Output = Result<Answer, Failure>>,
{
    match hello::answer(&mut stream, timing.hello).await {
        // Whoever leaves before its hello is over has asked for nothing; most only look whether the port is open.
        Err(HelloError::Closed { .. }) => return Ok(()),
        answered => drop(answered?),
    }
    let Stream { reader, writer, peer } = stream;
    let mut connection = Connection {
        reader: FrameReader::new(reader, peer.clone(), MAX_REQUEST_BYTES, timing.silence),
        writer: FrameWriter::new(writer, peer.clone()),
        timing,
        common,
        trunk: None,
        peer,
    };
    let outcome = connection.requests(&mut handler).await;
    if let Err(failure) = &outcome {
        connection.farewell(failure).await;
    }
    outcome
}

struct Connection {
    reader: FrameReader,
    writer: FrameWriter,
    timing: Timing,
    common: Common,
    /// If the session has several connections.
    trunk: Option<Trunk>,
    peer: String,
}

impl Connection {
    /// Answers until the client closes or a session ends.
    async fn requests<H, F>(&mut self, handler: &mut H) -> Result<(), Failure>
    where
        H: FnMut(Request) -> F,
        F: Future<Output = Result<Answer, Failure>>,
    {
        loop {
            self.reader.resume();
            let next = tokio::select! {
                next = self.reader.next(self.timing.idle) => next?,
                () = self.common.ends() => return Ok(()),
            };
            let request = match next {
                None => return Ok(()),
                Some(Frame::Alive) => continue,
                Some(frame) => self.request(frame)?,
            };
            let begin = match &request {
                Request::Ack(_) => return Err(self.breach("an acknowledgement without a session")),
                Request::Received => return Err(self.breach("that it has all, without a session")),
                Request::Begin(begin) | Request::Estimate(begin) => {
                    check_begin(begin).map_err(|b| self.breach(&b))?;
                    Some(begin.clone())
                }
                Request::Join { token } => match self.common.trunks.join(*token, &self.peer) {
                    Ok(joined) => return self.joined(&joined.line).await,
                    Err(failure) => {
                        self.reply(&Reply::Failed(failure)).await?;
                        continue;
                    }
                },
                _ => None,
            };
            let mut answer = self.while_alive(handler(request)).await?;
            while let Ok(Answer::Later(waiting, later)) = answer {
                self.reply(&Reply::Waiting(waiting)).await?;
                answer = self.while_alive(later).await?;
            }
            match (answer, begin) {
                (Ok(Answer::Session(session)), Some(begin)) => return self.session(&begin, session).await,
                (Ok(Answer::Attached(attachment)), _) => return self.attached(*attachment).await,
                (Ok(Answer::Session(_) | Answer::Later(..)), _) => {
                    return Err(internal("a session was opened that nobody asked for"));
                }
                (Ok(Answer::Reply(reply)), _) => self.reply(&reply).await?,
                (Err(failure), _) => self.reply(&Reply::Failed(failure)).await?,
            }
        }
    }

    fn request(&self, frame: Frame) -> Result<Request, Failure> {
        match frame {
            Frame::Control(json) => frame::decode_control(&json).map_err(|e| self.breach(&e.to_string())),
            Frame::Digests(_) => Err(self.breach("digests without a scan")),
            _ => Err(self.breach("data, which only a server sends")),
        }
    }

    /// Waits for an answer while both ends show signs of life.
    async fn while_alive<T>(&mut self, answer: impl Future<Output = T>) -> Result<T, Failure> {
        let mut answer = std::pin::pin!(answer);
        self.reader.resume();
        let mut alive = every(self.timing.alive_every);
        loop {
            tokio::select! {
                answer = &mut answer => return Ok(answer),
                frame = self.reader.next(self.timing.silence) => match frame? {
                    Some(Frame::Alive) => {}
                    Some(_) => return Err(self.breach("another message before the answer to the last")),
                    None => return Err(self.left("while its request was worked on")),
                },
                _ = alive.tick() => {
                    self.writer.push(Encoded::alive());
                    self.flush().await?;
                }
            }
        }
    }

    async fn reply(&mut self, reply: &Reply) -> Result<(), Failure> {
        let frame = Encoded::control(reply, MAX_REPLY_BYTES).map_err(unsendable)?;
        self.writer.push(frame);
        self.flush().await
    }

    async fn flush(&mut self) -> Result<(), Failure> {
        match timeout(self.timing.silence, self.writer.flush()).await {
            Ok(written) => Ok(written?),
            Err(_) => Err(self.left("without reading its answer")),
        }
    }

    /// Carries parts of a session that has another connection.
    async fn joined(&mut self, line: &Line) -> Result<(), Failure> {
        self.writer.push(Encoded::control(&Reply::Joined, MAX_REPLY_BYTES).map_err(unsendable)?);
        let Self { reader, writer, timing, peer, .. } = self;
        let carried = tokio::select! {
            carried = line.carry(writer, timing.alive_every) => carried.map_err(Failure::from),
            // A client has nothing to say here, not even that it is alive.
            said = reader.next(timing.session) => Err(match said {
                Ok(Some(_)) => Failure::new(
                    FailureCode::Protocol,
                    format!("{peer} broke the protocol: it sent something on a connection that had joined a session"),
                ),
                Ok(None) => Failure::new(FailureCode::Disconnected, format!("{peer} left before its backup was done")),
                Err(error) => error.into(),
            }),
            _ = line.lines().lost() => return Ok(()),
        };
        match carried {
            // Closed by the client once it has read all.
            Ok(()) => drop(timeout(timing.silence, reader.discard()).await),
            // It may have done so before we knew that this was all.
            Err(failure)
                if failure.code != FailureCode::Disconnected
                    || timeout(LAST_WORDS, line.lines().closed()).await.is_err() =>
            {
                line.lines().fail(failure.clone());
                return Err(failure);
            }
            Err(_) => {}
        }
        Ok(())
    }

    /// Carries a session to its end.
    async fn session(&mut self, begin: &Begin, session: Session) -> Result<(), Failure> {
        let acks = Acks::new(begin, &session.begun);
        self.carry(begin, session, &acks, None).await.map_err(|ended| self.ended(ended))
    }

    /// Why it ended. Once a connection is lost, nothing is said over the others: it would be taken for the session's end.
    fn ended(&self, ended: Ended) -> Failure {
        if let (Ended::Lost(failure), Some(trunk)) = (&ended, &self.trunk) {
            trunk.lines.fail(failure.clone());
        }
        ended.failure()
    }

    /// Carries a session that can be resumed, to its end or this connection's.
    async fn attached(&mut self, attachment: Attachment) -> Result<(), Failure> {
        let Attachment { begin, session, acks, grace, until, replaced, over } = attachment;
        let grace_ms = grace.as_millis() as u64;
        let resumable = Reply::Resumable { grace_ms, acks: Some(acks.heard()) };
        self.writer.push(Encoded::control(&resumable, MAX_REPLY_BYTES).map_err(unsendable)?);
        let carried = self.carry(&begin, session, &acks, Some((replaced, until))).await;
        if !matches!(carried, Err(Ended::Lost(_) | Ended::Replaced(_))) {
            // Who holds sessions may be gone with the service.
            let _ = over.send(());
        }
        carried.map_err(|ended| self.ended(ended))
    }

    /// Carries a session, which can be resumed if it may be `replaced`, until an instant.
    async fn carry(
        &mut self,
        begin: &Begin,
        session: Session,
        acks: &Acks,
        lasting: Option<(oneshot::Receiver<()>, Instant)>,
    ) -> Result<(), Ended> {
        let Session { begun, mut events, acks: to_sidecar, digests, lasting: words } = session;
        let digests = digests.map(|to_sidecar| (Given::new(begin, &begun), to_sidecar));
        let words = match words {
            Some(Lasting::Sidecar(words)) => Some(words),
            _ => None,
        };
        let is_resumable = lasting.is_some();
        let (replaced, until) = lasting.unzip();
        let until = until.unwrap_or_else(|| Instant::now() + self.timing.session);
        self.open_trunk(begin)?;
        let reply = Reply::Begun(Box::new(begun));
        self.writer.push(Encoded::control(&reply, MAX_REPLY_BYTES).map_err(unsendable)?);
        let Self { reader, writer, timing, common, trunk, peer } = self;
        let mut outgoing = Outgoing::new(&common.packing, begin.compression, begin.chunk_bytes);
        let to_sidecar = ToSidecar { acks: &to_sidecar, words, digests };
        tokio::select! {
            pumped = async {
                match pump(writer, (&mut events, &mut outgoing), acks, timing, peer).await {
                    Err(Ended::Lost(failure)) => {
                        // What it said last may still be here to be read. Where one of several is lost, it is known why.
                        sleep(LAST_WORDS).await;
                        Err(Ended::Lost(trunk.as_ref().and_then(|trunk| trunk.lines.reason()).unwrap_or(failure)))
                    }
                    pumped => pumped,
                }
            } => pumped?,
            () = sleep_until(until) => {
                let hours = timing.session.as_secs_f64() / 3600.0;
                let what = format!("the session of {peer} was given up: it was open for {hours:.1} h, and none may be longer");
                return Err(Failure::new(FailureCode::Broken, what).into());
            }
            () = replacement(replaced) => {
                let what = format!("{peer} came back over another connection, or gave its session up there");
                return Err(Ended::Replaced(Failure::new(FailureCode::Disconnected, what)));
            }
            failure = lost(trunk.as_ref(), acks, timing.silence) => return Err(Ended::Lost(failure)),
            ended = take(reader, to_sidecar, acks, timing.silence, peer) => return Err(ended),
        }
        // The sidecar has nothing more to say and needs no more acknowledgements; those under way are read and dropped,
        // since closing a socket with unread bytes would throw away what the client has not read yet.
        drop(events);
        // Over many connections much may be under way, and not everybody can come back for it.
        let waits = self.trunk.is_some() && !is_resumable;
        self.drain(if waits { until.saturating_duration_since(Instant::now()) } else { self.timing.silence }).await;
        Ok(())
    }

    /// Sends in parts from now on, if the client would like to have several connections.
    fn open_trunk(&mut self, begin: &Begin) -> Result<(), Failure> {
        let lines = Lines::default();
        let Some(offer) = self.common.trunks.offer(begin, &lines) else { return Ok(()) };
        let joinable = Reply::Joinable { token: offer.token, more: offer.more };
        self.writer.push(Encoded::control(&joinable, MAX_REPLY_BYTES).map_err(unsendable)?);
        let spread = FrameWriter::new(Box::new(lines.spread()), self.peer.clone());
        let first = std::mem::replace(&mut self.writer, spread);
        self.trunk = Some(Trunk::open(lines, offer, first, self.timing.alive_every));
        Ok(())
    }

    /// Tells the client why, if it still listens.
    async fn farewell(&mut self, failure: &Failure) {
        if let Ok(frame) = Encoded::control(&Reply::Failed(failure.clone()), MAX_REPLY_BYTES) {
            self.writer.push(frame);
            // A client that did nothing wrong may be slow to read what is under way before.
            let at_fault = matches!(failure.code, FailureCode::Protocol | FailureCode::Disconnected);
            self.drain(if at_fault { self.timing.farewell } else { self.timing.silence }).await;
        }
    }

    /// Writes what waits, says that nothing more comes, and reads until the client closes too.
    async fn drain(&mut self, limit: Duration) {
        let closing = async {
            self.writer.close().await?;
            let closed = self.reader.discard().await;
            // Somebody on the way may have closed this connection when we had said all on it; the others go on.
            if let Some(trunk) = &self.trunk {
                let _ = timeout(self.timing.silence, trunk.lines.carried()).await;
            }
            closed
        };
        if timeout(limit, closing).await.is_err() {
            tracing::debug!(peer = self.peer, "the client did not close in time");
        }
    }

    fn breach(&self, what: &str) -> Failure {
        Failure::new(FailureCode::Protocol, format!("{} broke the protocol: it sent {what}", self.peer))
    }

    fn left(&self, when: &str) -> Failure {
        Failure::new(FailureCode::Disconnected, format!("{} left {when}", self.peer))
    }
}

/// How long the last words of a client may take to be read when it cannot be written to any more.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How a session ended on a connection, other than well.
enum Ended {
    /// The client was not heard of any more, or cannot be reached.
    Lost(Failure),
    /// The client is on another connection.
    Replaced(Failure),
    /// In any other way.
    Over(Failure),
}

impl Ended {
    fn failure(self) -> Failure {
        let (Self::Lost(failure) | Self::Replaced(failure) | Self::Over(failure)) = self;
        failure
    }
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Self::Over(failure)
    }
}

impl From<LinkError> for Ended {
    fn from(error: LinkError) -> Self {
        match Failure::from(error) {
            failure if failure.code == FailureCode::Disconnected => Self::Lost(failure),
            failure => Self::Over(failure),
        }
    }
}

/// Resolves when the client is on another connection.
async fn replacement(replaced: Option<oneshot::Receiver<()>>) {
    let came_back = match replaced {
        Some(replaced) => replaced.await.is_ok(),
        None => false,
    };
    if !came_back {
        std::future::pending().await
    }
}

/// Resolves when one of several connections is lost.
async fn lost(trunk: Option<&Trunk>, acks: &Acks, silence: Duration) -> Failure {
    let failure = match trunk {
        Some(trunk) => trunk.lines.lost().await,
        None => std::future::pending().await,
    };
    // A client may close once it has the end, before the pump knows that; and its last words may still be here to be read.
    sleep(if acks.are_over() { silence } else { LAST_WORDS }).await;
    failure
}

/// Writes events as they come, several at once when they are small, until the last one is written.
async fn pump(
    writer: &mut FrameWriter,
    (events, outgoing): (&mut mpsc::Receiver<Result<Event, Failure>>, &mut Outgoing),
    acks: &Acks,
    timing: &Timing,
    peer: &str,
) -> Result<(), Ended> {
    let mut spent = Spent::default();
    loop {
        let start = Instant::now();
        write_out(writer, timing, peer).await?;
        let written = Instant::now();
        let first = timeout(timing.alive_every, outgoing.next(events)).await;
        (spent.writing, spent.waiting) = (written - start, written.elapsed());
        outgoing.measured(std::mem::take(&mut spent));
        let Ok(first) = first else {
            writer.push(Encoded::alive());
            continue;
        };
        let mut next = Some(first);
        while let Some(event) = next {
            match event {
                Some(Ok(event)) => {
                    let last = matches!(event, Event::End(_));
                    if matches!(event, Event::Sent) {
                        acks.all_sent();
                    }
                    if let (Event::Data { .. } | Event::Packed { .. }, Some(place)) = (&event, place_of(&event)) {
                        spent.disk_bytes += place.extent.len_bytes;
                    }
                    push_event(writer, event, acks)?;
                    if last {
                        acks.over();
                        return write_out(writer, timing, peer).await;
                    }
                }
                Some(Err(failure)) => return Err(failure.into()),
                None => return Err(internal("the sidecar gave the session up without saying why").into()),
            }
            next = if writer.is_full() { None } else { outgoing.try_next(events) };
        }
    }
}

/// Writes what waits, unless the client is stuck: it may be alive and well otherwise, and must not keep the fleece.
async fn write_out(writer: &mut FrameWriter, timing: &Timing, peer: &str) -> Result<(), Ended> {
    match timeout(timing.stuck, writer.flush()).await {
        Ok(written) => Ok(written?),
        Err(_) => {
            let what = format!("{peer} took nothing of its backup for {} s: it is stuck", timing.stuck.as_secs_f64());
            Err(Ended::Over(Failure::new(FailureCode::Disconnected, what)))
        }
    }
}

fn push_event(writer: &mut FrameWriter, event: Event, acks: &Acks) -> Result<(), Failure> {
    if let Some(place) = place_of(&event) {
        acks.sending(place);
    }
    let frame = match event {
        Event::Data { disk, offset_bytes, bytes } => Encoded::data(disk, offset_bytes, bytes),
        Event::Packed { disk, offset_bytes, packed } => Encoded::packed(disk, offset_bytes, &packed),
        Event::Zero { disk, extent } => Encoded::zero(disk, extent),
        Event::Same { disk, extent } => Encoded::same(disk, extent),
        Event::Sent => Encoded::control(&Reply::Sent, MAX_REPLY_BYTES),
        Event::End(totals) => Encoded::control(&Reply::End(totals), MAX_REPLY_BYTES),
    };
    writer.push(frame.map_err(unsendable)?);
    Ok(())
}

/// Where goes what a client sends in a session.
struct ToSidecar<'a> {
    acks: &'a mpsc::UnboundedSender<Ack>,
    /// If the session can be resumed.
    words: Option<mpsc::UnboundedSender<Word>>,
    /// If a disk is scanned.
    digests: Option<(Given, mpsc::Sender<Digests>)>,
}

impl ToSidecar<'_> {
    async fn digests(&mut self, batch: Digests) -> Result<(), Breach> {
        let (given, to_sidecar) = self.digests.as_mut().ok_or("digests without a scan")?;
        given.take(&batch)?;
        // A sidecar that is gone says so in the events.
        let _ = to_sidecar.send(batch).await;
        Ok(())
    }

    /// Whether the client goes on.
    fn request(&self, json: &[u8], acks: &Acks) -> Result<bool, Breach> {
        match frame::decode_control::<Request>(json).map_err(|e| e.to_string())? {
            Request::Ack(ack) => {
                acks.take(&ack)?;
                let _ = self.acks.send(ack);
                Ok(true)
            }
            Request::Received => {
                let words = self.words.as_ref().filter(|_| acks.are_sent());
                let _ = words.ok_or("that it has all, which was not asked")?.send(Word::Received);
                Ok(true)
            }
            Request::Leave { .. } if self.words.is_some() => Ok(false),
            _ => Err("a request in the middle of a session".to_owned()),
        }
    }
}

/// Hands over what the client sends until it leaves or misbehaves. While the sidecar has digests enough, nothing is read.
async fn take(
    reader: &mut FrameReader,
    mut to_sidecar: ToSidecar<'_>,
    acks: &Acks,
    silence: Duration,
    peer: &str,
) -> Ended {
    let gone = |what: &str| Failure::new(FailureCode::Disconnected, format!("{peer} {what}"));
    reader.resume();
    loop {
        let taken = match reader.next(silence).await {
            Ok(Some(Frame::Control(json))) => to_sidecar.request(&json, acks),
            Ok(Some(Frame::Alive)) => continue,
            Ok(Some(Frame::Digests(batch))) => {
                let taken = to_sidecar.digests(batch).await;
                reader.resume();
                taken.map(|()| true)
            }
            Ok(Some(_)) => Err("data, which only a server sends".to_owned()),
            // A client may close as soon as it has the end, before the pump knows that it was written.
            Ok(None) if acks.are_over() => {
                sleep(silence).await;
                return Ended::Over(gone("left without reading the end"));
            }
            Ok(None) => return Ended::Lost(gone("left before its backup was done")),
            Err(error) => return error.into(),
        };
        match taken {
            Ok(true) => {}
            Ok(false) => return Ended::Over(gone("gave its backup up")),
            Err(what) => {
                let what = format!("{peer} broke the protocol: it sent {what}");
                return Ended::Over(Failure::new(FailureCode::Protocol, what));
            }
        }
    }
}

fn internal(what: &str) -> Failure {
    Failure::new(FailureCode::Internal, what)
}

fn unsendable(error: FrameError) -> Failure {
    internal(&format!("an answer cannot be sent: {error}"))
}
