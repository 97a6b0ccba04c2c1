//! The client's end of a connection.
//!
//! A [`Client`] asks one thing at a time. [`Client::begin`] turns it into a [`Session`] with a task of its own, which reads
//! into [`Session::events`] and writes what [`Session::acks`] gets. The task holds no more than a few events: when nobody
//! takes them, it stops reading, and the server stops with it. Dropping the receiver of the events closes the connection,
//! and so ends the session at the server. When the connection breaks, the last event says why.
//!
//! Acknowledgements may be refused while events still wait: the end, or a failure, has arrived behind them. That is no
//! error of its own, the last event tells.

use std::fmt;
use std::path::PathBuf;

use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::contract::{Breach, Promise};
use super::digests::Digests;
use super::frame::{self, Encoded, MAX_ACK_EXTENTS, MAX_REPLY_BYTES, MAX_REQUEST_BYTES, Place};
use super::hello::{self, Version};
use super::link::{LinkError, Stream, Timing, every};
use super::message::{Ack, Begin, Event, Failure, FailureCode, Reply, Request, Session, Waiting};
use super::reader::{Frame, FrameReader};
use super::tls::Connector;
use super::writer::FrameWriter;
use crate::extent::Extent;
use crate::machine::Taken;

/// Events that wait for the session's owner at most: 8 MiB of data.
pub const EVENTS_WAITING: usize = 8;

/// Batches of digests that wait to be written.
const DIGESTS_WAITING: usize = 4;

/// Where a sidecar listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `HOST:PORT`.
    Tcp(String),
    /// A unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// How a client connected, to do so again.
#[derive(Clone, Debug)]
pub enum Door {
    /// Without TLS.
    Plain(Address, Timing),
    /// With TLS, to `HOST:PORT`.
    Tls(String, Connector, Timing),
}

impl Door {
    /// Connects and says hello.
    pub async fn enter(&self) -> Result<Client, Failure> {
        match self {
            Self::Plain(address, timing) => Client::connect_with(address, *timing).await,
            Self::Tls(host_port, tls, timing) => Client::connect_tls(host_port, tls, *timing).await,
        }
    }
}

/// A connection to a sidecar, between requests.
pub struct Client {
    reader: FrameReader,
    writer: FrameWriter,
    timing: Timing,
    /// How it connected, if it did so itself.
    door: Option<Door>,
    peer: String,
    software: String,
    version: Version,
    /// A request was given up half-way: its answer may still come, and would be taken for the next one's.
    spent: bool,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({}, {}, {:?})", self.peer, self.software, self.version)
    }
}

impl Client {
    /// Connects and says hello.
    pub async fn connect(address: &Address) -> Result<Self, Failure> {
        Self::connect_with(address, Timing::default()).await
    }

    /// Connects with other limits of time.
    pub async fn connect_with(address: &Address, timing: Timing) -> Result<Self, Failure> {
        let connecting = async {
            match address {
                Address::Tcp(host_port) => Stream::tcp(TcpStream::connect(host_port).await?),
                Address::Unix(path) => Ok(Stream::unix(UnixStream::connect(path).await?, address.to_string())),
            }
        };
        let connected = timeout(timing.hello, connecting).await;
        let stream = connected.map_err(|_| refused(address, "no answer"))?.map_err(|e| refused(address, e))?;
        let door = Door::Plain(address.clone(), timing);
        Ok(Self { door: Some(door), ..Self::over(stream, timing).await? })
    }

    /// Connects to `HOST:PORT` with TLS.
    pub async fn connect_tls(host_port: &str, tls: &Connector, timing: Timing) -> Result<Self, Failure> {
        let connecting = async {
            let stream = TcpStream::connect(host_port).await.map_err(|e| refused(&host_port, e))?;
            tls.connect(stream, host_port).await
        };
        let connected = timeout(timing.hello, connecting).await;
        let stream = connected.map_err(|_| refused(&host_port, "no answer"))??;
        let door = Door::Tls(host_port.to_owned(), tls.clone(), timing);
        Ok(Self { door: Some(door), ..Self::over(stream, timing).await? })
    }

    /// Says hello over a stream that is connected already.
    pub async fn over(mut stream: Stream, timing: Timing) -> Result<Self, Failure> {
        let welcome = hello::offer(&mut stream, timing.hello).await?;
        let Stream { reader, writer, peer } = stream;
        Ok(Self {
            reader: FrameReader::new(reader, peer.clone(), MAX_REPLY_BYTES, timing.silence),
            writer: FrameWriter::new(writer, peer.clone()),
            timing,
            door: None,
            peer,
            software: welcome.software,
            version: welcome.version,
            spent: false,
        })
    }

    /// How to connect to the same server again; none over a stream that was connected already.
    pub fn door(&self) -> Option<&Door> {
        self.door.as_ref()
    }

    /// What the server calls itself.
    pub fn server_software(&self) -> &str {
        &self.software
    }

    /// The version that is spoken.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Asks one thing and waits for the answer, as long as the server shows signs of life. [`Reply::Failed`] is an error.
    /// When the call is dropped half-way, the connection is of no more use.
    ///
    /// # Errors
    /// What the server answers, or what happened to the connection.
    pub async fn request(&mut self, request: Request) -> Result<Reply, Failure> {
        if matches!(request, Request::Begin(_) | Request::Ack(_)) {
            return Err(Failure::new(FailureCode::Internal, "sessions are begun with Client::begin"));
        }
        self.exchange(request, &mut |_| {}).await
    }

    async fn exchange(
        &mut self,
        request: Request,
        on_waiting: &mut (dyn FnMut(&Waiting) + Send),
    ) -> Result<Reply, Failure> {
        if self.spent {
            let what = format!("the connection to {} was given up in the middle of a request", self.peer);
            return Err(Failure::new(FailureCode::Disconnected, what));
        }
        let frame = Encoded::control(&request, MAX_REQUEST_BYTES)
            .map_err(|e| Failure::new(FailureCode::Internal, format!("the request cannot be sent: {e}")))?;
        self.spent = true;
        self.writer.push(frame);
        self.flush().await?;
        self.reader.resume();
        let mut alive = every(self.timing.alive_every);
        let reply = loop {
            tokio::select! {
                frame = self.reader.next(self.timing.silence) => match frame? {
                    Some(Frame::Alive) => {}
                    Some(Frame::Control(json)) => match read_reply(&json, &self.peer)? {
                        Reply::Waiting(waiting) => on_waiting(&waiting),
                        reply => break reply,
                    },
                    Some(Frame::Data(..) | Frame::Zero(_) | Frame::Same(_) | Frame::Digests(_)) => {
                        return Err(breach(&self.peer, "data without a session"));
                    }
                    None => return Err(closed(&self.peer)),
                },
                _ = alive.tick() => {
                    self.writer.push(Encoded::alive());
                    self.flush().await?;
                }
            }
        };
        self.spent = false;
        match reply {
            Reply::Failed(failure) => Err(failure),
            reply => Ok(reply),
        }
    }

    async fn flush(&mut self) -> Result<(), Failure> {
        let flushing = timeout(self.timing.silence, self.writer.flush());
        Ok(flushing.await.map_err(|_| silent(&self.peer, &self.timing))??)
    }

    /// Begins a session; the connection is the session's from now on. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// What the server answers, or what happened to the connection.
    pub async fn begin(self, begin: Begin) -> Result<Session, Failure> {
        self.begin_when_free(begin, |_| {}).await
    }

    /// [`Client::begin`], with a word on what is waited for.
    ///
    /// # Errors
    /// As [`Client::begin`].
    pub async fn begin_when_free(
        mut self,
        begin: Begin,
        mut on_waiting: impl FnMut(&Waiting) + Send,
    ) -> Result<Session, Failure> {
        let begun = match self.exchange(Request::Begin(begin.clone()), &mut on_waiting).await? {
            Reply::Begun(begun) => *begun,
            other => return Err(breach(&self.peer, &format!("{} in answer to a begin", name(&other)))),
        };
        let promise = Promise::new(&begin, &begun).map_err(|b| breach(&self.peer, &b))?;
        let (to_owner, events) = mpsc::channel(EVENTS_WAITING);
        let (acks, acks_to_send) = mpsc::unbounded_channel();
        let (digests, digests_to_send) = mpsc::channel(DIGESTS_WAITING);
        let scans = begun.disks.iter().any(|disk| matches!(disk.taken, Taken::Scan { .. }));
        tokio::spawn(self.run(promise, to_owner, acks_to_send, digests_to_send));
        Ok(Session { begun, events, acks, digests: scans.then_some(digests) })
    }

    /// The session's task.
    async fn run(
        self,
        mut promise: Promise,
        events: mpsc::Sender<Result<Event, Failure>>,
        acks: mpsc::UnboundedReceiver<Ack>,
        digests: mpsc::Receiver<Digests>,
    ) {
        let Self { mut reader, writer, timing, peer, .. } = self;
        let outcome = tokio::select! {
            outcome = read_events(&mut reader, &mut promise, &events, timing, &peer) => outcome,
            () = write_all(writer, acks, digests, timing) => Ok(()),
            () = events.closed() => Ok(()),
        };
        // The connection closes now, not when somebody takes the last event.
        drop(reader);
        if let Err(failure) = outcome {
            // Nobody may be there to hear it; then the session was dropped.
            let _ = events.send(Err(failure)).await;
        }
    }
}

fn refused(address: &impl fmt::Display, why: impl fmt::Display) -> Failure {
    let what = format!("cannot connect to {address}: {why}; is `livebackup serve` running there?");
    Failure::new(FailureCode::Disconnected, what)
}

/// Reads until the end, a failure, or nobody takes the events.
async fn read_events(
    reader: &mut FrameReader,
    promise: &mut Promise,
    events: &mpsc::Sender<Result<Event, Failure>>,
    timing: Timing,
    peer: &str,
) -> Result<(), Failure> {
    let broke = |b: Breach| breach(peer, &b);
    loop {
        // While the events were full nobody listened.
        reader.resume();
        let event = match reader.next(timing.silence).await? {
            None => return Err(closed(peer)),
            Some(Frame::Alive) => continue,
            Some(Frame::Data(place, bytes)) => {
                promise.place(place).map_err(broke)?;
                Event::Data { disk: place.disk, offset_bytes: place.extent.offset_bytes, bytes }
            }
            Some(Frame::Zero(place)) => {
                promise.place(place).map_err(broke)?;
                Event::Zero { disk: place.disk, extent: place.extent }
            }
            Some(Frame::Same(place)) => {
                promise.same(place).map_err(broke)?;
                Event::Same { disk: place.disk, extent: place.extent }
            }
            Some(Frame::Digests(_)) => return Err(breach(peer, "digests, which only a client sends")),
            Some(Frame::Control(json)) => match read_reply(&json, peer)? {
                Reply::Sent => {
                    promise.sent().map_err(broke)?;
                    Event::Sent
                }
                Reply::End(totals) => {
                    promise.end().map_err(broke)?;
                    Event::End(totals)
                }
                Reply::Failed(failure) => return Err(failure),
                other => return Err(breach(peer, &format!("{} in the middle of a session", name(&other)))),
            },
        };
        let last = matches!(event, Event::End(_));
        if events.send(Ok(event)).await.is_err() || last {
            return Ok(());
        }
    }
}

/// Writes acknowledgements, digests and signs of life. Never returns: what ends a session is seen by the reader, which is told the
/// reason where a failed write is only a symptom.
async fn write_all(
    mut writer: FrameWriter,
    mut acks: mpsc::UnboundedReceiver<Ack>,
    mut digests: mpsc::Receiver<Digests>,
    timing: Timing,
) {
    let (mut open, mut digesting) = (true, true);
    loop {
        tokio::select! {
            ack = acks.recv(), if open => match ack {
                Some(ack) => {
                    push_ack(&mut writer, ack);
                    while !writer.is_full() && let Ok(ack) = acks.try_recv() {
                        push_ack(&mut writer, ack);
                    }
                }
                None => open = false,
            },
            batch = digests.recv(), if digesting => match batch.as_ref().map(Encoded::digests) {
                Some(Ok(frame)) => writer.push(frame),
                Some(Err(error)) => tracing::error!(%error, "digests cannot be sent"),
                None => digesting = false,
            },
            () = sleep(timing.alive_every) => writer.push(Encoded::alive()),
        }
        if let Err(error) = writer.flush().await {
            tracing::debug!(%error, "cannot acknowledge");
            std::future::pending().await
        }
    }
}

fn push_ack(writer: &mut FrameWriter, ack: Ack) {
    for extents in ack.extents.chunks(MAX_ACK_EXTENTS) {
        let part = Request::Ack(Ack { disk: ack.disk, extents: extents.to_vec() });
        match Encoded::control(&part, MAX_REQUEST_BYTES) {
            Ok(frame) => writer.push(frame),
            Err(error) => tracing::error!(%error, "an acknowledgement cannot be sent"),
        }
    }
}

/// The place of an event's bytes.
pub(super) fn place_of(event: &Event) -> Option<Place> {
    match event {
        Event::Data { disk, offset_bytes, bytes } => {
            let extent = Extent { offset_bytes: *offset_bytes, len_bytes: bytes.len() as u64 };
            Some(Place { disk: *disk, extent })
        }
        Event::Zero { disk, extent } | Event::Same { disk, extent } => Some(Place { disk: *disk, extent: *extent }),
        Event::Sent | Event::End(_) => None,
    }
}

fn read_reply(json: &[u8], peer: &str) -> Result<Reply, Failure> {
    frame::decode_control(json).map_err(|source| LinkError::Frame { peer: peer.to_owned(), source }.into())
}

fn breach(peer: &str, what: &str) -> Failure {
    Failure::new(FailureCode::Protocol, format!("{peer} broke the protocol: it sent {what}"))
}

fn closed(peer: &str) -> Failure {
    Failure::new(FailureCode::Disconnected, format!("{peer} closed the connection before it was done"))
}

fn silent(peer: &str, timing: &Timing) -> Failure {
    LinkError::Silent { peer: peer.to_owned(), silence: timing.silence }.into()
}

fn name(reply: &Reply) -> &'static str {
    match reply {
        Reply::List { .. } => "a list",
        Reply::Disks { .. } => "disks",
        Reply::Status { .. } => "a status",
        Reply::Doctor { .. } => "a doctor's checks",
        Reply::Estimate { .. } => "an estimate",
        Reply::Begun(_) => "a second begin",
        Reply::Waiting(_) => "a place in the queue",
        Reply::Sent => "\"sent\"",
        Reply::End(_) => "the end",
        Reply::Detached { .. } => "\"detached\"",
        Reply::Failed(_) => "a failure",
    }
}
