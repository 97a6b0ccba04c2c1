//! Backups over several connections: whichever is lost, at whatever byte, the backup goes on, of the same instant, and the
//! restored bytes are the test's own.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use crate::common::proxy::{Cut, Proxy, Way};
use crate::common::side::{self, Serve, Side};
use crate::common::*;
use livebackup::extent::Extent;
use livebackup::wire::frame::{Encoded, MAX_REPLY_BYTES, decode_control};
use livebackup::wire::message::*;
use livebackup::wire::reader::{Frame, FrameReader};
use livebackup::wire::resume::Token;
use livebackup::wire::{Address, Client, hello};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

const LONG: Duration = Duration::from_secs(60);
/// More than all connections together hold on their way.
const SIZE: u64 = 64 << 20;

/// A machine with a full disk.
fn machine() -> (Qemu, Vec<u8>) {
    let mut qemu = Qemu::with_raw_disk(Version::V10, SIZE);
    for i in 0..SIZE >> 19 {
        qemu.write(i << 19, 1 << 19, i as u8 + 1);
    }
    let model = (0..SIZE).map(|at| (at >> 19) as u8 + 1).collect();
    (qemu, model)
}

fn begin(connections: u32) -> Begin {
    let resume = Some(Token::random());
    let connections = Some(connections);
    Begin { vm: "vm1".into(), chunk_bytes: 65536, wait: true, resume, connections, ..Begin::default() }
}

/// One session; nothing of it is taken before `then`. What the disk holds.
async fn session(proxy: &Proxy, connections: u32, then: impl FnOnce()) -> Vec<u8> {
    let client = Client::connect(&Address::Unix(proxy.socket.clone())).await.unwrap();
    let mut session = client.begin(begin(connections)).await.unwrap();
    tokio::task::block_in_place(then);
    let mut image = vec![0xaa; SIZE as usize];
    loop {
        let event = timeout(LONG, session.events.recv()).await.expect("the session goes on").unwrap().unwrap();
        let extent = match event {
            Event::Data { offset_bytes, bytes, .. } => {
                image[offset_bytes as usize..][..bytes.len()].copy_from_slice(&bytes);
                Extent::new(offset_bytes, bytes.len() as u64)
            }
            Event::Zero { extent, .. } => {
                image[extent.offset_bytes as usize..extent.end() as usize].fill(0);
                extent
            }
            Event::Sent => continue,
            Event::End(_) => return image,
            other => panic!("{other:?}"),
        };
        let _ = session.acks.send(Ack { disk: 0, extents: vec![extent] });
    }
}

fn served(qemu: &Qemu, head: &str) -> (tempfile::TempDir, Serve, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let mut serve = Serve::start_for("vm1", home.path(), &qemu.socket(), (head, ""), &[]);
    serve.wait();
    let socket = home.path().join("serve.sock");
    (home, serve, socket)
}

#[tokio::test(flavor = "multi_thread")]
async fn any_connection_may_be_lost_at_any_byte() {
    let (qemu, model) = tokio::task::block_in_place(machine);
    let (_home, serve, socket) = tokio::task::block_in_place(|| served(&qemu, ""));
    let proxy = Proxy::unix(&socket);
    // What is said before a connection has joined: by the client, and the server's hello.
    let hello = 23 + hello::SOFTWARE.len() as u64;
    let join = 20 + Encoded::control(&Request::Join { token: Token::random() }, 1000).unwrap().len_bytes() as u64;
    let mut rng = Rng::seeded(7);
    // By connection: the first one's beginning is another test's.
    let mut cuts: Vec<(usize, Cut)> = vec![];
    for line in 0..4 {
        cuts.extend((0..3).map(|_| (line, (Way::ToClient, 100_000 + rng.below(3_000_000)))));
    }
    for line in 1..4 {
        cuts.push((line, (Way::ToServer, [0, 10, 20, join - 1][line])));
        cuts.push((line, (Way::ToServer, join)));
        cuts.push((line, (Way::ToClient, [0, 10, hello - 1, hello + 20][line])));
    }
    for (line, cut) in cuts {
        let (before, made) = (proxy.connections(), proxy.cuts_made());
        let all = (0..line).map(|_| (Way::ToClient, u64::MAX)).chain([cut]).collect::<Vec<_>>();
        proxy.cut(&all);
        // Nothing is taken meanwhile, so every connection gets its share.
        let image = session(&proxy, 4, || {
            wait_until("the cut", || proxy.cuts_made() > made);
        });
        assert!(image.await == model, "{line} {cut:?}");
        let opened = proxy.connections() - before;
        // Before it has asked to join, it is missed by nobody; once it has joined, all are opened anew.
        match cut {
            (Way::ToServer, ..20) => assert_eq!(opened, 4, "{cut:?}"),
            (Way::ToClient, at) if at < hello => assert_eq!(opened, 4, "{cut:?}"),
            (Way::ToClient, 100_000..) => assert!(opened > 4, "{line} {cut:?}: {opened}"),
            _ => {}
        }
    }
    let log = serve.log();
    assert!(log.contains("a client is back") && !log.contains("ERROR"), "{log}");
}

/// A connection by hand: says these words, and gives what is answered.
async fn answer(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: &Request,
) -> (Frame, FrameReader) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    writer.write_all(&hello::encode_offer(&[1])).await.unwrap();
    let mut head = [0; 23];
    reader.read_exact(&mut head).await.unwrap();
    reader.read_exact(&mut vec![0; head[22].into()]).await.unwrap();
    let frame = Encoded::control(request, 10_000).unwrap();
    writer.write_all(&[frame.head(), frame.body()].concat()).await.unwrap();
    // The other direction stays open.
    std::mem::forget(writer);
    let mut reader = FrameReader::new(Box::new(reader), "server".into(), MAX_REPLY_BYTES, LONG);
    loop {
        match timeout(LONG, reader.next(LONG)).await.unwrap().unwrap().unwrap() {
            Frame::Control(json) if json.starts_with(b"{\"reply\":\"resumable") => {}
            Frame::Alive => {}
            frame => return (frame, reader),
        }
    }
}

fn reply(frame: &Frame) -> Reply {
    let Frame::Control(json) = frame else { panic!("{frame:?}") };
    decode_control(json).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_good_for_its_own_client() {
    let (qemu, _) = tokio::task::block_in_place(machine);
    let clients = crate::tls_common::two_clients("*");
    let vm = format!("{clients}\n[[vm]]\nname = \"real\"\nmonitor = \"qmp:{}\"\n", qemu.socket().display());
    let server = crate::tls_common::Server::start(&vm).await;
    let connect = async |name| crate::tls_common::socket(&server, Some(&server.pki.bundle(name))).await.unwrap();
    let begin = Request::Begin(Begin { vm: "real".into(), ..begin(3) });
    let (frame, _first) = answer(connect("backup1").await, &begin).await;
    let Reply::Joinable { token, more: 2 } = reply(&frame) else { panic!("{frame:?}") };
    let (frame, _) = answer(connect("watcher").await, &Request::Join { token }).await;
    assert!(matches!(reply(&frame), Reply::Failed(Failure { code: FailureCode::SessionGone, .. })), "{frame:?}");
    let (frame, _) = answer(connect("backup1").await, &Request::Join { token: Token::random() }).await;
    assert!(matches!(reply(&frame), Reply::Failed(Failure { code: FailureCode::SessionGone, .. })), "{frame:?}");
    let (frame, mut second) = answer(connect("backup1").await, &Request::Join { token }).await;
    assert_eq!(reply(&frame), Reply::Joined);
    let part = timeout(LONG, second.next(LONG)).await.unwrap().unwrap().unwrap();
    assert!(matches!(part, Frame::Part(..)), "{part:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_refused_is_in_the_log() {
    let (qemu, model) = tokio::task::block_in_place(machine);
    let (_home, serve, socket) = tokio::task::block_in_place(|| served(&qemu, ""));
    let proxy = Proxy::unix(&socket);
    let stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
    let (frame, _) = answer(stream, &Request::Join { token: Token::random() }).await;
    assert!(matches!(reply(&frame), Reply::Failed(Failure { code: FailureCode::SessionGone, .. })), "{frame:?}");
    assert!(serve.log().contains("a connection was not joined to a session"), "{}", serve.log());
    // And the next session is none the worse.
    let connections = || {
        let mut command = livebackup();
        let out = command.args(["--json", "status", &serve.source]).stdin(Stdio::null()).output().unwrap();
        serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap()["session"]["connections"].as_u64()
    };
    let image = session(&proxy, 2, || wait_until("both", || connections() == Some(2))).await;
    assert!(image == model);
    // A session by hand, on whose second connection something is said.
    let stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
    let (frame, _first) = answer(stream, &Request::Begin(begin(2))).await;
    let Reply::Joinable { token, more: 1 } = reply(&frame) else { panic!("{frame:?}") };
    let mut stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
    let join = Encoded::control(&Request::Join { token }, 1000).unwrap();
    let said = [hello::encode_offer(&[1]), [join.head(), join.body()].concat(), b"garbage garbage".to_vec()].concat();
    stream.write_all(&said).await.unwrap();
    let mut rest = vec![];
    let _ = stream.read_to_end(&mut rest).await;
    tokio::task::block_in_place(|| {
        wait_until("the session to be held for its client", || serve.log().contains("point in time is held"));
    });
    assert!(serve.log().contains("broke the protocol"), "{}", serve.log());
}

#[test]
fn the_command_line_takes_a_full_and_an_incremental() {
    for (version, how) in [(Version::V10, "none"), (Version::V10, "zstd"), (Version::V7, "none")] {
        let mut side = Side::new(version);
        // What does not compress.
        Rng::seeded(9).fill(&mut side.models[0]);
        std::fs::write(side.path("vd0.raw"), &side.models[0]).unwrap();
        side.start();
        side.cont();
        let mut rng = Rng::seeded(5);
        (0..4).for_each(|_| side.scatter(&mut rng));
        let mut serve = Serve::start(&side, "");
        serve.wait_until_attached(&side);
        let proxy = Proxy::unix(&side::socket(&side));
        let backup = |side: &Side, cuts: &[Cut], connections: &str| {
            proxy.cut(cuts);
            let mut command = livebackup();
            command.args(["--json", "backup", &format!("unix:{}/vm1", proxy.socket.display())]).arg(side.repo());
            command.args(["--wire-compression", how, "--connections", connections]).stdin(Stdio::null());
            let out = command.output().unwrap();
            let (text, said) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
            assert!(out.status.success(), "{}\n{text}\n{said}", out.status);
            serde_json::from_str::<serde_json::Value>(&text).unwrap()
        };
        // One of them at least carries so much.
        let report = backup(&side, &[(Way::ToClient, 150_000); 4], "4");
        assert_eq!((&report["level"], proxy.cuts_made() > 0), (&"full".into(), true), "{report}");
        assert_eq!(report["warnings"], serde_json::json!([]), "{report}");
        side.prove("latest");
        side.write_at(0, 0, 1 << 20, 0x11);
        side.write_at(1, 1 << 20, 2 << 20, 0x22);
        let report = backup(&side, &[], "8");
        assert_eq!(report["level"], "incremental");
        side.prove("latest");
        assert_eq!(serve.log().matches("ERROR").count(), 0, "{}", serve.log());
    }
    let out = livebackup().args(["backup", "qmp:/x", "/y", "--connections", "9"]).output().unwrap();
    assert!(!out.status.success());
}
