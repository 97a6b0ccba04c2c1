//! Several connections for one session: what is sent arrives whole and in order, a connection that has no business in a
//! session is not let in, and what goes wrong on one is seen at both ends.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::proxy::Proxy;
use crate::wire_begun::begun;
use livebackup::codec::Unpacker;
use livebackup::extent::Extent;
use livebackup::pki::{Authority, Purpose};
use livebackup::wire::frame::{Encoded, MAX_REPLY_BYTES, decode_control};
use livebackup::wire::message::*;
use livebackup::wire::packing::{How, Wanted};
use livebackup::wire::reader::{Frame, FrameReader};
use livebackup::wire::resume::Token;
use livebackup::wire::tls::{Acceptor, Connector, TlsFiles};
use livebackup::wire::trunk::Trunks;
use livebackup::wire::writer::FrameWriter;
use livebackup::wire::{Address, Answer, Client, Common, Stream, Timing, hello, serve_with};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

const LONG: Duration = Duration::from_secs(60);
const CHUNK: u64 = 64 << 10;
const SIZE: u64 = 64 << 30;

/// The n-th event of a session at an offset: data that compresses by half, or zeroes.
fn event(n: u64, offset_bytes: u64) -> Event {
    let len = (1 + n % 5) * CHUNK;
    if n % 7 == 3 {
        return Event::Zero { disk: 0, extent: Extent::new(offset_bytes, len) };
    }
    let mut state = n;
    let byte = |i: u64| {
        if i.is_multiple_of(64) {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        }
        if i & 32 == 0 { n as u8 } else { (state >> (8 * (i % 8))) as u8 }
    };
    Event::Data { disk: 0, offset_bytes, bytes: (0..len).map(byte).collect() }
}

/// A session that goes on until it is enough.
fn session(enough: Arc<AtomicBool>) -> Session {
    let (to_client, events) = mpsc::channel(2);
    let (acks, mut acked) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut offset = 0;
        for n in 0.. {
            let event = event(n, offset);
            offset += (1 + n % 5) * CHUNK;
            if to_client.send(Ok(event)).await.is_err() {
                return;
            }
            if n >= 40 && enough.load(Ordering::SeqCst) {
                break;
            }
        }
        for event in [Event::Sent, Event::End(Totals::default())] {
            let _ = to_client.send(Ok(event)).await;
        }
        while acked.recv().await.is_some() {}
    });
    Session { begun: begun(&[SIZE]), events, acks, digests: None, lasting: None }
}

/// A server of one such session, and how its connections ended.
struct Server {
    address: String,
    ended: mpsc::UnboundedReceiver<Result<(), Failure>>,
    enough: Arc<AtomicBool>,
    serving: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn server(trunks: Trunks, tls: Option<Arc<Acceptor>>) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (to_test, ended) = mpsc::unbounded_channel();
    let enough = Arc::new(AtomicBool::new(false));
    let flag = enough.clone();
    let serving = tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (trunks, tls, to_test, flag) = (trunks.clone(), tls.clone(), to_test.clone(), flag.clone());
            tokio::spawn(async move {
                let stream = match &tls {
                    Some(tls) => tls.accept(socket, LONG).await.unwrap().0,
                    None => Stream::tcp(socket).unwrap(),
                };
                let handler = |request| {
                    let flag = flag.clone();
                    async move {
                        match request {
                            Request::Begin(_) => Ok(Answer::Session(session(flag))),
                            _ => Ok(Answer::Reply(Reply::List { vms: vec![] })),
                        }
                    }
                };
                let common = Common { trunks, ..Common::default() };
                let _ = to_test.send(serve_with(stream, Timing::default(), common, handler).await);
            });
        }
    });
    Server { address, ended, enough, serving }
}

fn begin(connections: u32) -> Begin {
    Begin { vm: "vm".into(), chunk_bytes: CHUNK as u32, connections: Some(connections), ..Begin::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_arrives_whole_over_any_number_of_connections() {
    let dir = tempfile::tempdir().unwrap();
    Authority::init(dir.path(), "test", 100).unwrap();
    let pki = Authority::open(dir.path()).unwrap();
    pki.issue("server", &Purpose::Server(vec!["127.0.0.1".into()]), 50, false).unwrap();
    pki.issue("client", &Purpose::Client, 50, false).unwrap();
    let acceptor = Arc::new(Acceptor::new(TlsFiles::in_dir(&pki.bundle("server"))).unwrap());
    let connector = Connector::open(&pki.bundle("client")).unwrap();
    for (connections, tls, how) in [
        (1, false, How::None),
        (2, false, How::None),
        (4, false, How::None),
        (8, false, How::Zstd),
        (2, true, How::Lz4),
        (4, true, How::None),
        (4, true, How::Zstd),
    ] {
        let mut server = server(Trunks::default().of("client".into()), tls.then(|| acceptor.clone())).await;
        let proxy = Proxy::tcp(&server.address);
        let client = match tls {
            true => Client::connect_tls(&proxy.address, &connector, Timing::default()).await.unwrap(),
            false => Client::connect(&Address::Tcp(proxy.address.clone())).await.unwrap(),
        };
        let compression = Some(Wanted { how: Some(how), level: 1 });
        let mut session = client.begin(Begin { compression, ..begin(connections) }).await.unwrap();
        let (mut n, mut offset, mut unpacker) = (0, 0, Unpacker::new().unwrap());
        loop {
            let came = timeout(LONG, session.events.recv()).await.expect("the session goes on").unwrap().unwrap();
            let came = match came {
                Event::Sent => continue,
                Event::End(_) => break,
                Event::Packed { disk, offset_bytes, packed } => {
                    let (mut bytes, mut at) = (vec![0; packed.raw_len() as usize], 0);
                    for (piece, into) in packed.pieces().iter().zip(bytes.chunks_mut(CHUNK as usize)) {
                        unpacker.unpack(piece.codec, &packed.bytes()[at..at + piece.len as usize], into).unwrap();
                        at += piece.len as usize;
                    }
                    Event::Data { disk, offset_bytes, bytes: bytes.into() }
                }
                event => event,
            };
            assert!(came == event(n, offset), "event {n} of {connections} connections");
            (n, offset) = (n + 1, offset + (1 + n % 5) * CHUNK);
            let extent = Extent::new(0, CHUNK);
            if n == 1 {
                session.acks.send(Ack { disk: 0, extents: vec![extent] }).unwrap();
            }
            // Each connection has carried much more than what is said on it before.
            let each = proxy.bytes_to_client_of_each();
            if each.len() == connections as usize && each.iter().all(|bytes| *bytes > 100_000) {
                server.enough.store(true, Ordering::SeqCst);
            }
        }
        assert!(n > 40);
        for _ in 0..connections {
            timeout(LONG, server.ended.recv()).await.expect("it ends").unwrap().unwrap();
        }
    }
}

/// A connection by hand, after the hello.
async fn raw(address: &str) -> (FrameReader, FrameWriter) {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(&hello::encode_offer(&[1])).await.unwrap();
    let mut answer = [0; 23];
    socket.read_exact(&mut answer).await.unwrap();
    socket.read_exact(&mut vec![0; answer[22].into()]).await.unwrap();
    let (reader, writer) = socket.into_split();
    let reader = FrameReader::new(Box::new(reader), "server".into(), MAX_REPLY_BYTES, LONG);
    (reader, FrameWriter::new(Box::new(writer), "server".into()))
}

async fn say(writer: &mut FrameWriter, request: &Request) {
    writer.push(Encoded::control(request, 100_000).unwrap());
    writer.flush().await.unwrap();
}

async fn hear(reader: &mut FrameReader) -> Reply {
    match timeout(LONG, reader.next(LONG)).await.unwrap().unwrap() {
        Some(Frame::Control(json)) => decode_control(&json).unwrap(),
        other => panic!("{other:?}"),
    }
}

/// A session by hand, of three connections at most: its first one, and the token.
async fn begun_by_hand(address: &str) -> (FrameReader, FrameWriter, Token) {
    let (mut reader, mut writer) = raw(address).await;
    say(&mut writer, &Request::Begin(begin(3))).await;
    let Reply::Joinable { token, more: 2 } = hear(&mut reader).await else { panic!() };
    (reader, writer, token)
}

async fn join(address: &str, token: Token) -> (FrameReader, FrameWriter, Reply) {
    let (mut reader, mut writer) = raw(address).await;
    say(&mut writer, &Request::Join { token }).await;
    let reply = hear(&mut reader).await;
    (reader, writer, reply)
}

/// Reads parts to the end; whether it was one in good order.
async fn read_parts(reader: &mut FrameReader, into: &mut BTreeMap<u64, Vec<u8>>) -> bool {
    let (mut last, mut ended) = (None, false);
    loop {
        match timeout(LONG, reader.next(LONG)).await.unwrap() {
            Ok(Some(Frame::Part(number, bytes))) => {
                assert!(!ended && last.is_none_or(|last| last < number), "{number} after {last:?}");
                (last, ended) = (Some(number), bytes.is_empty());
                if !ended {
                    assert!(into.insert(number, bytes.to_vec()).is_none(), "{number} twice");
                }
            }
            Ok(Some(Frame::Alive)) => {}
            Ok(Some(other)) => panic!("{other:?}"),
            Ok(None) => return ended,
            Err(_) => return false,
        }
    }
}

/// The frames of parts, without what does not matter here.
async fn frames(parts: BTreeMap<u64, Vec<u8>>) -> Vec<Frame> {
    assert!(parts.keys().copied().eq(0..parts.len() as u64));
    let bytes = parts.into_values().collect::<Vec<_>>().concat();
    let mut reader = FrameReader::new(Box::new(std::io::Cursor::new(bytes)), "parts".into(), MAX_REPLY_BYTES, LONG);
    let mut frames = vec![];
    while let Some(frame) = reader.next(LONG).await.unwrap() {
        frames.push(frame);
    }
    frames
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_has_the_token_joins_and_not_too_often() {
    let trunks = Trunks::default();
    let mut one = server(trunks.of("one".into()), None).await;
    let two = server(trunks.of("two".into()), None).await;
    let (mut first, first_writer, token) = begun_by_hand(&one.address).await;
    // Another's token, and one that nobody has; the connection is good for something else then.
    for (address, token) in [(&one.address, Token::random()), (&two.address, token), (&two.address, Token::random())] {
        let (mut reader, mut writer, refused) = join(address, token).await;
        let Reply::Failed(refused) = refused else { panic!("{refused:?}") };
        assert_eq!(refused.code, FailureCode::SessionGone);
        say(&mut writer, &Request::List).await;
        assert!(matches!(hear(&mut reader).await, Reply::List { .. }));
    }
    let (mut second, _second_writer, reply) = join(&one.address, token).await;
    assert_eq!(reply, Reply::Joined);
    let (mut third, _third_writer, reply) = join(&one.address, token).await;
    assert_eq!(reply, Reply::Joined);
    let (_, _, refused) = join(&one.address, token).await;
    assert!(matches!(refused, Reply::Failed(Failure { code: FailureCode::Busy, .. })), "{refused:?}");
    // None of that has harmed the session.
    one.enough.store(true, Ordering::SeqCst);
    let (mut parts, mut of_second, mut of_third) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let ended = tokio::join!(
        read_parts(&mut first, &mut parts),
        read_parts(&mut second, &mut of_second),
        read_parts(&mut third, &mut of_third)
    );
    assert_eq!(ended, (true, true, true));
    parts.append(&mut of_second);
    parts.append(&mut of_third);
    let frames = frames(parts).await;
    let [Frame::Control(begun), .., Frame::Control(sent), Frame::Control(end)] = &frames[..] else { panic!() };
    assert!(matches!(decode_control(begun).unwrap(), Reply::Begun(_)));
    assert!(decode_control::<Reply>(sent).unwrap() == Reply::Sent);
    assert!(matches!(decode_control(end).unwrap(), Reply::End(_)));
    // Over, it cannot be joined. Four others have ended by now, or will.
    drop((first, first_writer, second, third));
    for _ in 0..2 {
        timeout(LONG, one.ended.recv()).await.unwrap().unwrap().unwrap();
    }
    crate::common::wait_until("the session to be gone", || one.ended.try_recv().is_err());
    let (mut again, mut writer, _) = loop {
        let (reader, writer, reply) = join(&one.address, token).await;
        match reply {
            Reply::Failed(Failure { code: FailureCode::SessionGone, .. }) => break (reader, writer, reply),
            // The server has not seen yet that its client is gone.
            Reply::Failed(Failure { code: FailureCode::Busy, .. }) => {}
            other => panic!("{other:?}"),
        }
    };
    say(&mut writer, &Request::List).await;
    assert!(matches!(hear(&mut again).await, Reply::List { .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_connections_that_do_not_come() {
    let one = server(Trunks::default().of("one".into()), None).await;
    one.enough.store(true, Ordering::SeqCst);
    let (mut first, _writer, _) = begun_by_hand(&one.address).await;
    let mut parts = BTreeMap::new();
    assert!(read_parts(&mut first, &mut parts).await);
    assert!(frames(parts).await.len() > 40);
    // Nor a client whose further connections are refused.
    let none = server(Trunks::default(), None).await;
    none.enough.store(true, Ordering::SeqCst);
    let client = Client::connect(&Address::Tcp(none.address.clone())).await.unwrap();
    let mut session = client.begin(begin(4)).await.unwrap();
    while let Some(event) = session.events.recv().await {
        event.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_wrong_on_one_connection_ends_all() {
    let alive = Encoded::alive();
    let list = Encoded::control(&Request::List, 1000).unwrap();
    let bytes = |frame: &Encoded| [frame.head(), frame.body()].concat();
    let cases = [
        (Some(bytes(&alive)), FailureCode::Protocol),
        (Some(bytes(&list)), FailureCode::Protocol),
        (Some(b"garbage garbage".to_vec()), FailureCode::Protocol),
        (None, FailureCode::Disconnected),
    ];
    for (said, code) in cases {
        let mut one = server(Trunks::default().of("one".into()), None).await;
        let (mut first, _writer, token) = begun_by_hand(&one.address).await;
        let mut socket = TcpStream::connect(&one.address).await.unwrap();
        let join = bytes(&Encoded::control(&Request::Join { token }, 1000).unwrap());
        socket.write_all(&[hello::encode_offer(&[1]), join].concat()).await.unwrap();
        let mut answer = vec![0; 23 + hello::SOFTWARE.len() + 12];
        socket.read_exact(&mut answer).await.unwrap();
        let (mut second, mut second_writer) = socket.into_split();
        match said {
            Some(said) => second_writer.write_all(&said).await.unwrap(),
            None => second_writer.shutdown().await.unwrap(),
        }
        // Neither connection ends as if that were the session's end; the broken one says why.
        let (mut parts, mut rest) = (BTreeMap::new(), vec![]);
        let (ended, _) = tokio::join!(read_parts(&mut first, &mut parts), second.read_to_end(&mut rest));
        assert!(!ended, "{code:?}");
        let last = frames_of_broken(parts).await;
        assert!(
            last.iter().all(|frame| !matches!(frame, Frame::Control(json) if json.starts_with(b"{\"reply\":\"failed")))
        );
        let mut codes = vec![];
        for _ in 0..2 {
            codes.push(timeout(LONG, one.ended.recv()).await.unwrap().unwrap().unwrap_err().code);
        }
        assert!(codes.contains(&code), "{codes:?}");
    }
}

/// The frames that are whole in the parts that came, up to the first that did not.
async fn frames_of_broken(parts: BTreeMap<u64, Vec<u8>>) -> Vec<Frame> {
    let whole = parts.into_iter().zip(0..).take_while(|((number, _), n)| number == n).map(|((_, bytes), _)| bytes);
    let bytes = whole.collect::<Vec<_>>().concat();
    let mut reader = FrameReader::new(Box::new(std::io::Cursor::new(bytes)), "parts".into(), MAX_REPLY_BYTES, LONG);
    let mut frames = vec![];
    while let Ok(Some(frame)) = reader.next(LONG).await {
        frames.push(frame);
    }
    frames
}

/// What becomes of a client of two connections when a server says these frames, and closes or not.
async fn rogue(said: &[Encoded], closes: bool) -> Failure {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answer = hello::encode_answer(Some(hello::Version::V1), &[1], "rogue");
    let said = said.iter().flat_map(|frame| [frame.head(), frame.body()].concat()).collect::<Vec<_>>();
    let (over, is_over) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        drop(listener);
        socket.write_all(&answer).await.unwrap();
        let mut offer = [0; 20];
        socket.read_exact(&mut offer).await.unwrap();
        socket.write_all(&said).await.unwrap();
        if closes {
            socket.shutdown().await.unwrap();
        }
        let _ = is_over.await;
    });
    let client = Client::connect(&Address::Tcp(address)).await.unwrap();
    let failure = match timeout(LONG, client.begin(begin(2))).await.expect("it ends") {
        Err(failure) => failure,
        Ok(mut session) => loop {
            if let Err(failure) = timeout(LONG, session.events.recv()).await.expect("it ends").unwrap() {
                break failure;
            }
        },
    };
    drop(over);
    serving.await.unwrap();
    failure
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_cannot_offer_or_send_what_it_likes() {
    let reply = |reply: &Reply| Encoded::control(reply, MAX_REPLY_BYTES).unwrap();
    let joinable = |more| reply(&Reply::Joinable { token: Token::random(), more });
    let begun = reply(&Reply::Begun(Box::new(begun(&[SIZE]))));
    let begun = [begun.head(), begun.body()].concat();
    let part = |number, bytes: &[u8]| Encoded::part(number, bytes.to_vec().into()).unwrap();
    let inner = |frame: &Encoded| [frame.head(), frame.body()].concat();
    let cases: Vec<(Vec<Encoded>, bool, FailureCode)> = vec![
        // More than was asked for, twice, and within itself.
        (vec![joinable(2)], false, FailureCode::Protocol),
        (vec![joinable(u32::MAX)], false, FailureCode::Protocol),
        (vec![joinable(1), joinable(1)], false, FailureCode::Protocol),
        (vec![joinable(1), part(0, &inner(&joinable(1)))], false, FailureCode::Protocol),
        // Parts where none belong, and what is none where they do.
        (vec![part(0, &begun)], false, FailureCode::Protocol),
        (vec![joinable(1), part(0, &begun), part(1, &inner(&part(0, b"x")))], false, FailureCode::Protocol),
        (
            vec![joinable(1), part(0, &begun), Encoded::zero(0, Extent::new(0, CHUNK)).unwrap()],
            false,
            FailureCode::Protocol,
        ),
        (vec![joinable(1), part(0, &begun), reply(&Reply::Sent)], false, FailureCode::Protocol),
        // Twice, and one missing that nobody can bring.
        (vec![joinable(1), part(0, &begun), part(0, b"x")], false, FailureCode::Protocol),
        (vec![joinable(1), part(0, &begun), part(2, b"x"), part(3, b"")], true, FailureCode::Protocol),
        // Cut off.
        (vec![joinable(1), part(0, &begun)], true, FailureCode::Disconnected),
        (vec![joinable(1), part(0, &begun), part(1, b"")], true, FailureCode::Disconnected),
        // A word in the right place.
        (
            vec![
                joinable(1),
                part(0, &begun),
                part(1, &inner(&reply(&Reply::Failed(Failure::new(FailureCode::Broken, "b"))))),
            ],
            false,
            FailureCode::Broken,
        ),
    ];
    for (n, (said, closes, code)) in cases.into_iter().enumerate() {
        let failure = rogue(&said, closes).await;
        assert_eq!(failure.code, code, "{n}: {failure}");
    }
}
