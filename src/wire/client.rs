//! The client's end of a connection.
//!
//! A [`Client`] asks one thing at a time. [`Client::begin`] turns it into a [`Session`] with a task of its own.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::AsyncRead;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::contract::Promise;
use super::frame::{self, Encoded, MAX_REPLY_BYTES, MAX_REQUEST_BYTES, Place};
use super::gather::{Gather, Half, Missed};
use super::hello::{self, Version};
use super::link::{LinkError, Stream, Timing, every};
use super::message::{Begin, Begun, Event, Failure, FailureCode, Reply, Request, Session, Waiting};
use super::reader::{Frame, FrameReader};
use super::resume::{Resume, Token};
use super::session;
use super::tls::Connector;
use super::trunk::MAX_CONNECTIONS;
use super::writer::FrameWriter;
use crate::extent::Extent;

/// Events that wait for the session's owner at most: 8 MiB of data.
pub const EVENTS_WAITING: usize = 8;

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
    pub(super) reader: FrameReader,
    pub(super) writer: FrameWriter,
    pub(super) timing: Timing,
    /// How it connected, if it did so itself.
    pub(super) door: Option<Door>,
    pub(super) peer: String,
    software: String,
    version: Version,
    /// How long the server holds a session whose connection is lost, once it has said so.
    pub(super) grace: Option<Duration>,
    /// How many of the session's acknowledgements it has heard, if it counts them.
    pub(super) acks_heard: Option<u64>,
    /// A request was given up half-way: its answer may still come, and would be taken for the next one's.
    spent: bool,
    /// Further connections are not opened, although the server offers them.
    pub(super) alone: bool,
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
            grace: None,
            acks_heard: None,
            spent: false,
            alone: false,
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
        if matches!(request, Request::Begin(_) | Request::Resume(_) | Request::Ack(_)) {
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
        let mut joinable = match &request {
            Request::Begin(begin) => begin.connections.unwrap_or(0),
            Request::Resume(_) => MAX_CONNECTIONS,
            _ => 0,
        };
        // Who joins has nothing more to say, however long the answer takes.
        let is_last_word = matches!(request, Request::Join { .. });
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
                        Reply::Resumable { grace_ms, acks } => {
                            (self.grace, self.acks_heard) = (Some(Duration::from_millis(grace_ms)), acks);
                        }
                        Reply::Joinable { token, more } if more < joinable => {
                            joinable = 0;
                            // Whoever does not come is missed by nobody.
                            self.gather(token, if self.alone { 0 } else { more });
                        }
                        reply => break reply,
                    },
                    Some(_) => return Err(breach(&self.peer, "data without a session")),
                    None => return Err(closed(&self.peer)),
                },
                _ = alive.tick(), if !is_last_word => {
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

    /// Reads on from several connections together: this one, and so many that are opened meanwhile.
    fn gather(&mut self, token: Token, more: u32) {
        let silence = self.timing.silence;
        // Each connection is watched for itself. What is in order may come as slowly as one of them brings a part.
        self.timing.silence = silence.saturating_mul(more.saturating_add(1));
        let (peer, slowest) = (self.peer.clone(), self.timing.silence);
        let reader = |stream: Box<dyn AsyncRead + Send + Unpin>| {
            FrameReader::new(stream, peer.clone(), MAX_REPLY_BYTES, slowest)
        };
        let first = std::mem::replace(&mut self.reader, reader(Box::new(tokio::io::empty())));
        let door = self.door.clone().into_iter();
        let more = door.flat_map(|door| std::iter::repeat_n(door, more as usize)).map(|door| async move {
            // Boxed, since a connection that joins is a client's like any other.
            let client: Client = Box::pin(door.enter()).await.map_err(Missed::Absent)?;
            client.join(token).await
        });
        self.reader = reader(Box::new(Gather::new(first, &self.peer, silence, more)));
    }

    /// Joins a session with this connection.
    async fn join(mut self, token: Token) -> Result<Half, Missed> {
        match self.exchange(Request::Join { token }, &mut |_| {}).await {
            Ok(Reply::Joined) => Ok((self.reader, Some(self.writer))),
            Ok(other) => Err(Missed::Lost(breach(&self.peer, &format!("{} in answer to a join", name(&other))))),
            // The answer was lost, or was none.
            Err(failure) if self.spent => Err(Missed::Lost(failure)),
            Err(refused) => Err(Missed::Absent(refused)),
        }
    }

    fn begun(&self, reply: Reply) -> Result<Begun, Failure> {
        match reply {
            Reply::Begun(begun) => Ok(*begun),
            other => Err(breach(&self.peer, &format!("{} in answer to a begin", name(&other)))),
        }
    }

    /// Comes back, over a fresh connection, to a session of which the client has so much. Its events are for who knows how to read
    /// them: a session that [`Client::begin`] gave comes back by itself.
    ///
    /// # Errors
    /// What the server answers, or what happened to the connection.
    pub async fn resume(mut self, resume: Resume) -> Result<(Self, Begun), Failure> {
        let reply = self.exchange(Request::Resume(resume), &mut |_| {}).await?;
        let begun = self.begun(reply)?;
        Ok((self, begun))
    }

    /// Asks once whether a session was begun although nobody heard of it.
    async fn come_back_to(door: Option<Door>, vm: &str, token: Token, lost: Failure) -> Result<(Self, Begun), Failure> {
        let Some(door) = door else { return Err(lost) };
        tracing::warn!("{lost}; connecting again");
        let resume = Resume { vm: vm.to_owned(), token, have: vec![] };
        let again = async { door.enter().await?.resume(resume).await };
        // Where it was not begun, it may be asked for anew.
        again.await.map_err(|error| Failure { message: format!("{lost}; then: {error}"), ..error })
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
        mut begin: Begin,
        mut on_waiting: impl FnMut(&Waiting) + Send,
    ) -> Result<Session, Failure> {
        // Where it does not know how to connect again, it cannot do so several times.
        begin.connections = begin.connections.filter(|_| self.door.is_some());
        let asked = self.exchange(Request::Begin(begin.clone()), &mut on_waiting).await;
        let begun = match (asked, begin.resume) {
            (Err(lost), Some(token)) if self.spent && lost.code == FailureCode::Disconnected => {
                // The instant may be behind us, and only its answer lost.
                let (client, begun) = Self::come_back_to(self.door.take(), &begin.vm, token, lost).await?;
                self = client;
                begun
            }
            (asked, _) => self.begun(asked?)?,
        };
        self.started(begin, begun)
    }

    /// Begins to go on with a session that an earlier process has begun so, and that was answered so, over a fresh connection.
    /// What was acknowledged does not come again, all else does.
    ///
    /// # Errors
    /// What the server answers, or what happened to the connection.
    pub async fn begin_again(self, begin: Begin, begun: &Begun) -> Result<Session, Failure> {
        let gone = || Failure::new(FailureCode::SessionGone, "a session without a token cannot be gone on with");
        let resume = Resume { vm: begin.vm.clone(), token: begin.resume.ok_or_else(gone)?, have: vec![] };
        let (client, now) = self.resume(resume).await?;
        match now == *begun {
            true => client.started(begin, now),
            false => Err(breach(&client.peer, "another instant as the same session")),
        }
    }

    fn started(self, begin: Begin, begun: Begun) -> Result<Session, Failure> {
        let promise = Promise::new(&begin, &begun).map_err(|b| breach(&self.peer, &b))?;
        Ok(session::start(self, promise, begin, begun))
    }
}

fn refused(address: &impl fmt::Display, why: impl fmt::Display) -> Failure {
    let what = format!("cannot connect to {address}: {why}; is `livebackup serve` running there?");
    Failure::new(FailureCode::Disconnected, what)
}

/// The place of an event's bytes.
pub(super) fn place_of(event: &Event) -> Option<Place> {
    match event {
        Event::Data { disk, offset_bytes, bytes } => {
            let extent = Extent { offset_bytes: *offset_bytes, len_bytes: bytes.len() as u64 };
            Some(Place { disk: *disk, extent })
        }
        Event::Packed { disk, offset_bytes, packed } => {
            let extent = Extent { offset_bytes: *offset_bytes, len_bytes: packed.raw_len().into() };
            Some(Place { disk: *disk, extent })
        }
        Event::Zero { disk, extent } | Event::Same { disk, extent } => Some(Place { disk: *disk, extent: *extent }),
        Event::Sent | Event::End(_) => None,
    }
}

pub(super) fn read_reply(json: &[u8], peer: &str) -> Result<Reply, Failure> {
    frame::decode_control(json).map_err(|source| LinkError::Frame { peer: peer.to_owned(), source }.into())
}

pub(super) fn breach(peer: &str, what: &str) -> Failure {
    Failure::new(FailureCode::Protocol, format!("{peer} broke the protocol: it sent {what}"))
}

pub(super) fn closed(peer: &str) -> Failure {
    Failure::new(FailureCode::Disconnected, format!("{peer} closed the connection before it was done"))
}

fn silent(peer: &str, timing: &Timing) -> Failure {
    LinkError::Silent { peer: peer.to_owned(), silence: timing.silence }.into()
}

pub(super) fn name(reply: &Reply) -> &'static str {
    match reply {
        Reply::List { .. } => "a list",
        Reply::Disks { .. } => "disks",
        Reply::Status { .. } => "a status",
        Reply::Doctor { .. } => "a doctor's checks",
        Reply::Estimate { .. } => "an estimate",
        Reply::Begun(_) => "a second begin",
        Reply::Resumable { .. } => "\"resumable\"",
        Reply::Joinable { .. } => "\"joinable\"",
        Reply::Joined => "\"joined\"",
        Reply::Left => "\"left\"",
        Reply::Waiting(_) => "a place in the queue",
        Reply::Sent => "\"sent\"",
        Reply::End(_) => "the end",
        Reply::BootFile(_) => "a boot file",
        Reply::Detached { .. } => "\"detached\"",
        Reply::Failed(_) => "a failure",
    }
}
