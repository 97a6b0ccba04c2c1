//! Both ends of a connection together, and each against an end that misbehaves.

#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::wire_begun::begun;
use bytes::Bytes;
use livebackup::extent::Extent;
use livebackup::units::{KIB, MIB};
use livebackup::wire::frame::{Encoded, MAX_ACK_EXTENTS, MAX_REPLY_BYTES, MAX_REQUEST_BYTES};
use livebackup::wire::message::*;
use livebackup::wire::reader::{Frame, FrameReader};
use livebackup::wire::writer::FrameWriter;
use livebackup::wire::{Address, Answer, Client, Stream, Timing, hello, serve_connection};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

const CHUNK: u64 = 64 * KIB;
/// Two disks: one of whole chunks, one with a partial last one.
const SIZES: [u64; 2] = [64 * MIB, 10 * CHUNK + 512];
/// Long enough for any machine: a test that meets it failed.
const LONG: Duration = Duration::from_secs(60);

/// Times for tests in which an end falls silent; signs of life are frequent.
fn quick() -> Timing {
    let (alive_every, silence) = (Duration::from_millis(20), Duration::from_secs(8));
    Timing { alive_every, silence, farewell: silence, ..Timing::default() }
}

fn begin() -> Begin {
    Begin { vm: "vm".into(), chunk_bytes: CHUNK as u32, checkpoint: true, ..Begin::default() }
}

/// The sidecar's half of a session.
struct Sidecar {
    events: mpsc::Sender<Result<Event, Failure>>,
    acks: mpsc::UnboundedReceiver<Ack>,
}

impl Sidecar {
    async fn send(&self, event: Event) {
        timeout(LONG, self.events.send(Ok(event))).await.expect("the pump goes on").expect("the session is open");
    }

    async fn end(&self) {
        self.send(Event::Sent).await;
        self.send(Event::End(Totals { data_bytes: 5, ..Totals::default() })).await;
    }
}

/// A server for one connection: lists no VM, begins sessions of `SIZES`, works for ever on a status, refuses the rest.
struct Server {
    address: SocketAddr,
    sidecars: mpsc::Receiver<Sidecar>,
    served: JoinHandle<Result<(), Failure>>,
    /// Handlers that were given up.
    dropped: Arc<AtomicUsize>,
}

struct CountsDrops(Arc<AtomicUsize>);
impl Drop for CountsDrops {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

async fn server(timing: Timing) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (to_test, sidecars) = mpsc::channel(1);
    let dropped = Arc::new(AtomicUsize::new(0));
    let counter = dropped.clone();
    let served = tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        let stream = Stream::tcp(socket).unwrap();
        serve_connection(stream, timing, |request| handle(request, to_test.clone(), counter.clone())).await
    });
    Server { address, sidecars, served, dropped }
}

async fn handle(
    request: Request,
    to_test: mpsc::Sender<Sidecar>,
    dropped: Arc<AtomicUsize>,
) -> Result<Answer, Failure> {
    match request {
        Request::List => Ok(Answer::Reply(Reply::List { vms: vec![] })),
        Request::Begin(_) => {
            let (events_to, events) = mpsc::channel(2);
            let (acks, acked) = mpsc::unbounded_channel();
            to_test.send(Sidecar { events: events_to, acks: acked }).await.unwrap();
            Ok(Answer::Session(Session { begun: begun(&SIZES), events, acks, digests: None, lasting: None }))
        }
        Request::Status { .. } => {
            let _counts = CountsDrops(dropped);
            std::future::pending().await
        }
        _ => Err(Failure::new(FailureCode::UnknownVm, "no such VM")),
    }
}

async fn connect(server: &Server, timing: Timing) -> Client {
    Client::connect_with(&Address::Tcp(server.address.to_string()), timing).await.unwrap()
}

async fn next(session: &mut Session) -> Result<Event, Failure> {
    timeout(LONG, session.events.recv()).await.expect("an event comes").expect("before the events are closed")
}

fn data(disk: u16, chunk: u64, chunks: u64) -> Event {
    let len = (chunks * CHUNK).min(SIZES[usize::from(disk)] - chunk * CHUNK);
    let bytes: Vec<u8> = (0..len).map(|i| (i as u8) ^ (chunk as u8)).collect();
    Event::Data { disk, offset_bytes: chunk * CHUNK, bytes: bytes.into() }
}

fn zero(disk: u16, chunk: u64, chunks: u64) -> Event {
    let end = ((chunk + chunks) * CHUNK).min(SIZES[usize::from(disk)]);
    Event::Zero { disk, extent: Extent::between(chunk * CHUNK, end) }
}

#[tokio::test]
async fn a_session_arrives_as_it_was_sent() {
    let mut server = server(Timing::default()).await;
    let mut client = connect(&server, Timing::default()).await;
    assert_eq!(client.request(Request::List).await.unwrap(), Reply::List { vms: vec![] });
    let refused = client.request(Request::Disks { vm: "x".into() }).await.unwrap_err();
    assert_eq!((refused.code, refused.message.as_str()), (FailureCode::UnknownVm, "no such VM"));
    assert!(client.server_software().starts_with("livebackup "));

    let mut session = client.begin(begin()).await.unwrap();
    assert_eq!(session.begun, begun(&SIZES));
    let mut sidecar = server.sidecars.recv().await.unwrap();
    let events = [data(0, 0, 1), data(1, 3, 1), data(0, 2, 16), zero(1, 4, 6), zero(0, 100, 900), data(1, 10, 1)];
    let to_send = events.clone();
    let sending = tokio::spawn(async move {
        for event in to_send {
            sidecar.send(event).await;
        }
        let ack = sidecar.acks.recv().await.unwrap();
        sidecar.end().await;
        ack
    });
    for event in events {
        assert_eq!(next(&mut session).await.unwrap(), event);
    }
    let ack = Ack { disk: 0, extents: vec![Extent::new(2 * CHUNK, 16 * CHUNK), Extent::new(0, CHUNK)] };
    session.acks.send(ack.clone()).unwrap();
    assert_eq!(next(&mut session).await.unwrap(), Event::Sent);
    assert_eq!(next(&mut session).await.unwrap(), Event::End(Totals { data_bytes: 5, ..Totals::default() }));
    assert!(session.events.recv().await.is_none());
    assert_eq!(sending.await.unwrap(), ack);
    server.served.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_unix_socket_and_any_stream_will_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let answering = tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        let list = |_| async { Ok(Answer::Reply(Reply::List { vms: vec![] })) };
        serve_connection(Stream::unix(socket, "a client"), Timing::default(), list).await
    });
    let mut client = Client::connect(&Address::Unix(path)).await.unwrap();
    client.request(Request::List).await.unwrap();
    drop(client);
    answering.await.unwrap().unwrap();
    let refused = Client::connect(&Address::Unix(dir.path().join("nobody"))).await.unwrap_err();
    assert!(refused.message.contains("nobody") && refused.code == FailureCode::Disconnected);
}

#[tokio::test]
async fn a_failed_session_says_why() {
    let mut server = server(Timing::default()).await;
    let mut session = connect(&server, Timing::default()).await.begin(begin()).await.unwrap();
    let sidecar = server.sidecars.recv().await.unwrap();
    sidecar.send(data(0, 0, 1)).await;
    let broken = Failure::new(FailureCode::Broken, "the scratch is full");
    sidecar.events.send(Err(broken.clone())).await.unwrap();
    assert!(next(&mut session).await.is_ok());
    assert_eq!(next(&mut session).await.unwrap_err(), broken);
    assert!(session.events.recv().await.is_none());
    assert_eq!(server.served.await.unwrap().unwrap_err(), broken);
}

#[tokio::test]
async fn a_sidecar_that_vanishes_is_a_failure() {
    let mut server = server(Timing::default()).await;
    let mut session = connect(&server, Timing::default()).await.begin(begin()).await.unwrap();
    drop(server.sidecars.recv().await.unwrap());
    assert_eq!(next(&mut session).await.unwrap_err().code, FailureCode::Internal);
}

#[tokio::test]
async fn a_slow_client_slows_the_sidecar_down() {
    let mut server = server(quick()).await;
    let mut session = connect(&server, quick()).await.begin(begin()).await.unwrap();
    let sidecar = server.sidecars.recv().await.unwrap();
    let sent = Arc::new(AtomicUsize::new(0));
    let counter = sent.clone();
    let sending = tokio::spawn(async move {
        for n in 0..64 {
            sidecar.send(data(0, 16 * n, 16)).await;
            counter.fetch_add(1, Ordering::SeqCst);
        }
        sidecar.end().await;
        sidecar
    });
    // Nobody takes events: in flight are two channels, a batch and the sockets' buffers, and then it stops; longer than
    // the silence that would end a connection.
    let mut before = usize::MAX;
    while sent.load(Ordering::SeqCst) != before {
        before = sent.load(Ordering::SeqCst);
        tokio::time::sleep(quick().silence * 3 / 2).await;
    }
    assert!(before < 50, "{before} MiB were taken though nobody took them");
    for n in 0..64 {
        assert_eq!(next(&mut session).await.unwrap(), data(0, 16 * n, 16));
    }
    assert_eq!(next(&mut session).await.unwrap(), Event::Sent);
    assert!(matches!(next(&mut session).await.unwrap(), Event::End(_)));
    sending.await.unwrap();
    server.served.await.unwrap().unwrap();
}

#[tokio::test]
async fn dropping_a_session_ends_it_at_the_sidecar() {
    for busy in [false, true] {
        let mut server = server(Timing::default()).await;
        let session = connect(&server, Timing::default()).await.begin(begin()).await.unwrap();
        let mut sidecar = server.sidecars.recv().await.unwrap();
        if busy {
            // The pump is blocked in a write when the client leaves.
            let mut n = 0;
            while let Ok(sent) = timeout(Duration::from_millis(200), sidecar.events.send(Ok(data(0, n, 16)))).await {
                sent.unwrap();
                n += 16;
            }
        }
        drop(session);
        timeout(LONG, sidecar.events.closed()).await.expect("the sidecar's side is closed");
        assert!(timeout(LONG, sidecar.acks.recv()).await.unwrap().is_none());
        assert_eq!(server.served.await.unwrap().unwrap_err().code, FailureCode::Disconnected);
    }
}

#[tokio::test]
async fn a_client_that_leaves_gives_its_request_up() {
    let server = server(Timing::default()).await;
    let mut client = connect(&server, Timing::default()).await;
    assert!(timeout(Duration::from_millis(100), client.request(Request::Status { vm: None })).await.is_err());
    let spent = client.request(Request::List).await.unwrap_err();
    assert!(spent.message.contains("given up"), "{spent}");
    assert_eq!(server.dropped.load(Ordering::SeqCst), 0);
    drop(client);
    assert_eq!(server.served.await.unwrap().unwrap_err().code, FailureCode::Disconnected);
    assert_eq!(server.dropped.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn signs_of_life_keep_slow_work_and_quiet_sessions_open() {
    let mut server = server(quick()).await;
    let mut client = connect(&server, quick()).await;
    let long = 2 * quick().silence;
    assert!(timeout(long, client.request(Request::Status { vm: None })).await.is_err(), "still waiting");
    drop(client);

    server = self::server(quick()).await;
    let mut session = connect(&server, quick()).await.begin(begin()).await.unwrap();
    let sidecar = server.sidecars.recv().await.unwrap();
    tokio::time::sleep(long).await;
    sidecar.end().await;
    assert_eq!(next(&mut session).await.unwrap(), Event::Sent);
    assert!(matches!(next(&mut session).await.unwrap(), Event::End(_)));
}

/// A client by hand: past the hello, and then whatever the test sends.
struct Raw {
    writer: FrameWriter,
    reader: FrameReader,
}

async fn raw(server: &Server) -> Raw {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(&hello::encode_offer(&[1])).await.unwrap();
    let len = hello::encode_answer(Some(hello::Version::V1), &[1], hello::SOFTWARE).len();
    stream.read_exact(&mut vec![0; len]).await.unwrap();
    let (reader, writer) = stream.into_split();
    Raw {
        writer: FrameWriter::new(Box::new(writer), "server".into()),
        reader: FrameReader::new(Box::new(reader), "server".into(), MAX_REPLY_BYTES, LONG),
    }
}

impl Raw {
    async fn send(&mut self, frame: Encoded) {
        self.writer.push(frame);
        self.writer.flush().await.unwrap();
    }

    async fn ask(&mut self, request: &Request) {
        self.send(Encoded::control(request, MAX_REQUEST_BYTES).unwrap()).await;
    }

    /// The next reply that is no sign of life.
    async fn reply(&mut self) -> Reply {
        loop {
            match self.reader.next(LONG).await.unwrap().expect("the server says why before it closes") {
                Frame::Control(json) => return serde_json::from_slice(&json).unwrap(),
                Frame::Alive => {}
                other => panic!("{other:?}"),
            }
        }
    }
    /// The server says what was wrong, and closes.
    async fn is_turned_out(&mut self, words: &str) {
        let Reply::Failed(failure) = self.reply().await else { panic!("no failure") };
        assert!(failure.message.contains(words), "{failure}");
        assert!(self.reader.next(LONG).await.unwrap().is_none());
    }
}

fn ack(disk: u16, extents: &[Extent]) -> Request {
    Request::Ack(Ack { disk, extents: extents.to_vec() })
}

#[tokio::test]
async fn a_client_out_of_order_is_turned_out() {
    let out_of_order: [(Encoded, &str); 7] = [
        (Encoded::control(&ack(0, &[Extent::new(0, CHUNK)]), 1000).unwrap(), "without a session"),
        (Encoded::data(0, 0, Bytes::from_static(b"x")).unwrap(), "only a server sends"),
        (Encoded::zero(0, Extent::new(0, 1)).unwrap(), "only a server sends"),
        (Encoded::control(&"no request", 1000).unwrap(), "cannot be read"),
        (Encoded::control(&vec![0; 600_000], MAX_REPLY_BYTES).unwrap(), "outside of what is allowed"),
        (Encoded::control(&Request::Begin(Begin { chunk_bytes: 3, ..begin() }), 1000).unwrap(), "chunks of 3 bytes"),
        (Encoded::control(&Request::Estimate(Begin::default()), 1000).unwrap(), "chunks of 0 bytes"),
    ];
    for (frame, words) in out_of_order {
        let server = server(Timing::default()).await;
        let mut client = raw(&server).await;
        client.ask(&Request::List).await;
        assert_eq!(client.reply().await, Reply::List { vms: vec![] });
        client.send(frame).await;
        client.is_turned_out(words).await;
        drop(client);
        assert_eq!(server.served.await.unwrap().unwrap_err().code, FailureCode::Protocol);
    }
    let server = server(Timing::default()).await;
    let mut client = raw(&server).await;
    client.ask(&Request::Status { vm: None }).await;
    client.ask(&Request::List).await;
    client.is_turned_out("before the answer").await;
}

#[tokio::test]
async fn acknowledgements_are_held_to_what_was_sent() {
    let too_many = vec![Extent::new(0, CHUNK); MAX_ACK_EXTENTS + 1];
    let bad: [(Request, &str); 8] = [
        (ack(2, &[Extent::new(0, CHUNK)]), "was not begun"),
        (ack(0, &[]), "0 extents"),
        (ack(0, &too_many), "4097 extents"),
        (ack(0, &[Extent::new(3 * CHUNK, CHUNK)]), "were sent"),
        (ack(0, &[Extent { offset_bytes: u64::MAX, len_bytes: u64::MAX }]), "were sent"),
        (ack(0, &[Extent::new(0, 512)]), "not in chunks"),
        (ack(0, &[Extent::new(0, CHUNK), Extent::new(0, CHUNK), Extent::new(0, CHUNK)]), "more acknowledgements"),
        (Request::List, "in the middle of a session"),
    ];
    for (request, words) in bad {
        let mut server = server(Timing::default()).await;
        let mut client = raw(&server).await;
        client.ask(&Request::Begin(begin())).await;
        assert!(matches!(client.reply().await, Reply::Begun(_)));
        let mut sidecar = server.sidecars.recv().await.unwrap();
        sidecar.send(zero(0, 1, 2)).await;
        assert!(matches!(client.reader.next(LONG).await.unwrap(), Some(Frame::Zero(_))));
        client.ask(&ack(0, &[Extent::new(CHUNK, CHUNK)])).await;
        assert!(sidecar.acks.recv().await.is_some());
        client.ask(&request).await;
        client.is_turned_out(words).await;
        timeout(LONG, sidecar.events.closed()).await.expect("the session ended");
    }
}

#[tokio::test]
async fn an_end_that_stops_in_the_middle_of_a_frame_is_noticed() {
    // A client at a server: after the hello, and in a session.
    for in_session in [false, true] {
        let server = server(quick()).await;
        let mut client = TcpStream::connect(server.address).await.unwrap();
        client.write_all(&hello::encode_offer(&[1])).await.unwrap();
        if in_session {
            let frame = Encoded::control(&Request::Begin(begin()), 1000).unwrap();
            client.write_all(&[frame.head(), frame.body()].concat()).await.unwrap();
        }
        let frame = Encoded::control(&ack(0, &[Extent::new(0, CHUNK)]), 1000).unwrap();
        client.write_all(&[frame.head(), &frame.body()[..5]].concat()).await.unwrap();
        let failure = timeout(LONG, server.served).await.unwrap().unwrap().unwrap_err();
        assert!(failure.message.contains("nothing was heard"), "{failure}");
    }
    // A server at a client.
    let frame = Encoded::data(0, 0, vec![1; 1000].into()).unwrap();
    let half = [frame.head(), &frame.body()[..500]].concat();
    let (mut session, _open) = session_with(&half).await;
    let failure = next(&mut session).await.unwrap_err();
    assert!(failure.message.contains("nothing was heard") && failure.code == FailureCode::Disconnected, "{failure}");
}

/// A session with a server by hand that sends these bytes after it has begun.
async fn session_with(bytes: &[u8]) -> (Session, DuplexStream) {
    session_of(&begun(&SIZES), bytes).await.unwrap()
}

async fn session_of(begun: &Begun, bytes: &[u8]) -> Result<(Session, DuplexStream), Failure> {
    let (mut near, far) = tokio::io::duplex(16 << 20);
    near.write_all(&hello::encode_answer(Some(hello::Version::V1), &[1], "test")).await.unwrap();
    let reply = Encoded::control(&Reply::Begun(Box::new(begun.clone())), MAX_REPLY_BYTES).unwrap();
    near.write_all(&[reply.head(), reply.body(), bytes].concat()).await.unwrap();
    let client = Client::over(Stream::new(far, "server"), quick()).await.unwrap();
    Ok((client.begin(begin()).await?, near))
}

fn bytes_of(events: &[Event]) -> Vec<u8> {
    let frames = events.iter().map(|event| match event.clone() {
        Event::Data { disk, offset_bytes, bytes } => Encoded::data(disk, offset_bytes, bytes).unwrap(),
        Event::Packed { disk, offset_bytes, packed } => Encoded::packed(disk, offset_bytes, &packed).unwrap(),
        Event::Zero { disk, extent } => Encoded::zero(disk, extent).unwrap(),
        Event::Same { disk, extent } => Encoded::same(disk, extent).unwrap(),
        Event::Sent => Encoded::control(&Reply::Sent, 1000).unwrap(),
        Event::End(totals) => Encoded::control(&Reply::End(totals), 1000).unwrap(),
    });
    frames.flat_map(|f| [f.head(), f.body()].concat()).collect()
}

#[tokio::test]
async fn a_server_is_held_to_what_it_promised() {
    let at = |disk, offset_bytes, len: u64| Event::Data { disk, offset_bytes, bytes: vec![0; len as usize].into() };
    let bad: [(&[Event], &str); 11] = [
        (&[data(0, 0, 1), Event::Data { disk: 2, offset_bytes: 0, bytes: vec![0; 512].into() }], "was not begun"),
        (&[at(0, 512, CHUNK)], "not in chunks"),
        (&[at(0, 0, CHUNK - 1)], "not in chunks"),
        (&[at(1, 10 * CHUNK, 513)], "which has"),
        (&[at(0, SIZES[0], CHUNK)], "which has"),
        (&[data(0, 1, 2), data(0, 2, 1)], "after bytes up to"),
        (&[data(0, 1, 1), zero(0, 0, 1)], "after bytes up to"),
        (&[Event::Sent, data(0, 0, 1)], "said to be sent"),
        (&[Event::Sent, Event::Sent], "twice"),
        (&[Event::End(Totals::default())], "before all was sent"),
        (&[zero(0, 0, 1), Event::Zero { disk: 1, extent: Extent::new(0, 1 << 40) }], "which has"),
    ];
    for (events, words) in bad {
        let (mut session, _open) = session_with(&bytes_of(events)).await;
        for event in &events[..events.len() - 1] {
            assert_eq!(next(&mut session).await.unwrap(), *event);
        }
        let failure = next(&mut session).await.unwrap_err();
        assert!(failure.message.contains(words) && failure.code == FailureCode::Protocol, "{failure}");
        assert!(session.events.recv().await.is_none());
    }
    let mut twins = begun(&SIZES);
    twins.disks[1].disk.name = "disk0".into();
    for begun in [twins, begun(&[u64::MAX]), begun(&[1; 257])] {
        assert_eq!(session_of(&begun, &[]).await.unwrap_err().code, FailureCode::Protocol);
    }
    let (mut session, server) = session_with(&bytes_of(&[data(0, 0, 1)])).await;
    drop(server);
    assert!(next(&mut session).await.is_ok());
    assert_eq!(next(&mut session).await.unwrap_err().code, FailureCode::Disconnected);
}

#[tokio::test]
async fn acknowledgements_of_any_length_go_out_in_parts() {
    let mut server = server(Timing::default()).await;
    let mut session = connect(&server, Timing::default()).await.begin(begin()).await.unwrap();
    let mut sidecar = server.sidecars.recv().await.unwrap();
    sidecar.send(zero(0, 0, 1024)).await;
    next(&mut session).await.unwrap();
    let extents: Vec<_> = (0..1024).map(|n| Extent::new(n * CHUNK, CHUNK)).collect();
    session.acks.send(Ack { disk: 0, extents: extents.clone() }).unwrap();
    assert_eq!(sidecar.acks.recv().await.unwrap().extents, extents);
}

/// Whole servers and clients fed with noise behind a good beginning: they end, with an error, and do not panic.
#[tokio::test]
async fn noise_at_either_end_is_only_an_error() {
    let mut state = 11u64;
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state >> 33
    };
    let timing = Timing { farewell: Duration::from_millis(1), ..quick() };
    for round in 0..400 {
        let mut bytes = match round % 4 {
            0 => vec![],
            1 => hello::encode_offer(&[1]),
            n => {
                let mut bytes = hello::encode_offer(&[1]);
                for request in [Request::List, Request::Begin(begin()), ack(0, &[Extent::new(0, CHUNK)])].iter().take(n)
                {
                    let frame = Encoded::control(request, 10_000).unwrap();
                    bytes.extend([frame.head(), frame.body()].concat());
                }
                let at = random() as usize % bytes.len();
                bytes[at] ^= random() as u8;
                bytes
            }
        };
        bytes.extend((0..random() % 100).map(|_| random() as u8));
        let (mut near, far) = tokio::io::duplex(1 << 16);
        near.write_all(&bytes).await.unwrap();
        near.shutdown().await.unwrap();
        let (to_test, mut sidecars) = mpsc::channel(1);
        let kept = tokio::spawn(async move { while sidecars.recv().await.is_some() {} });
        let dropped = Arc::default();
        let serving = serve_connection(Stream::new(far, "noise"), timing, |request| match request {
            Request::Begin(_) | Request::List => handle(request, to_test.clone(), Arc::clone(&dropped)),
            _ => handle(Request::Detach { vm: "x".into(), all: false }, to_test.clone(), Arc::clone(&dropped)),
        });
        let _ = timeout(LONG, serving).await.expect("it ends");
        drop(to_test);
        kept.await.unwrap();
        let mut bytes = bytes_of(&[data(0, 0, 1), zero(0, 1, 1), data(1, 10, 1), Event::Sent]);
        let cut = random() as usize % bytes.len();
        bytes[cut] ^= 1 + (random() % 255) as u8;
        let (mut session, server) = session_with(&bytes).await;
        drop(server);
        let mut last = None;
        while let Some(event) = timeout(LONG, session.events.recv()).await.expect("it ends") {
            last = Some(event);
        }
        assert!(last.unwrap().is_err());
    }
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_stuck_however_alive_it_is() {
    let timing = Timing { stuck: Duration::from_millis(300), ..quick() };
    let mut server = server(timing).await;
    let session = connect(&server, quick()).await.begin(begin()).await.unwrap();
    let sidecar = server.sidecars.recv().await.unwrap();
    // More than all buffers on the way hold; the client says that it lives all the time, and takes none of it.
    let sending = async {
        for round in 0.. {
            let bytes = Bytes::from(vec![1; MIB as usize]);
            let offset_bytes = round % 64 * MIB;
            if sidecar.events.send(Ok(Event::Data { disk: 0, offset_bytes, bytes })).await.is_err() {
                return;
            }
        }
    };
    timeout(LONG, sending).await.expect("the session is given up");
    let failure = server.served.await.unwrap().unwrap_err();
    assert!(failure.code == FailureCode::Disconnected && failure.message.contains("is stuck"), "{failure}");
    drop(session);
}

#[tokio::test]
async fn no_session_is_longer_than_the_limit() {
    let timing = Timing { session: Duration::from_millis(100), ..quick() };
    let mut server = server(timing).await;
    let mut session = connect(&server, quick()).await.begin(begin()).await.unwrap();
    let sidecar = server.sidecars.recv().await.unwrap();
    let failure = next(&mut session).await.unwrap_err();
    assert!(failure.code == FailureCode::Broken && failure.message.contains("given up"), "{failure}");
    timeout(LONG, sidecar.events.closed()).await.expect("the sidecar's side ends");
}
