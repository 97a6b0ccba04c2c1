//! Sessions with servers that say exactly what the test wants: right, wrong, late, in any order, or nothing.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use crate::nbd_help::*;
use livebackup::extent::Extent;
use livebackup::nbd::{Address, Client, ClientOptions, ConnectOptions, NbdError, NegotiateError, connect, list};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

/// A server that says `bytes` to its first client and then waits for it to go, or closes at once.
async fn says(bytes: Vec<u8>, close: bool) -> (tempfile::TempDir, Address) {
    let dir = tempdir();
    let path = dir.path().join("sock");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.write_all(&bytes).await;
        if !close {
            let _ = stream.read_to_end(&mut vec![]).await;
        }
    });
    (dir, Address::Unix(path))
}

async fn refused(bytes: Vec<u8>, close: bool, contexts: &[&str]) -> NegotiateError {
    let (_dir, address) = says(bytes, close).await;
    let options = ConnectOptions { handshake: Duration::from_millis(300), ..ConnectOptions::default() };
    let error = connect(&address, &wanted("disk", contexts), &options).await.unwrap_err();
    println!("{error}");
    error
}

#[tokio::test]
async fn handshakes_that_fail_say_why() {
    let greeted = |rest: &[u8]| [say::GREETING, rest].concat();
    let reply = say::option_reply;
    let error = |n| (1u32 << 31) + n;

    let e = refused(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n".to_vec(), false, &[]).await;
    assert!(matches!(&e, NegotiateError::NotNbd { saw, .. } if saw == "SSH-2.0-"), "{e}");
    let e = refused(b"NBDMAGICgarbage!".to_vec(), false, &[]).await;
    assert!(matches!(e, NegotiateError::NotNbd { .. }), "{e}");
    let e = refused(b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53".to_vec(), false, &[]).await;
    assert!(matches!(e, NegotiateError::TooOld { lacks: "newstyle negotiation", .. }), "{e}");
    let e = refused(b"NBDMAGICIHAVEOPT\0\0".to_vec(), false, &[]).await;
    assert!(matches!(e, NegotiateError::TooOld { lacks: "fixed newstyle negotiation", .. }), "{e}");
    let e = refused(vec![], true, &[]).await;
    assert!(matches!(e, NegotiateError::Io { .. }), "{e}");
    let e = refused(vec![], false, &[]).await;
    assert!(matches!(e, NegotiateError::Timeout { .. }), "{e}");
    let e = refused(greeted(&reply(8, error(5), b"")), false, &[]).await;
    assert!(matches!(e, NegotiateError::TlsRequired { .. }), "{e}");
    let e = refused(greeted(&[reply(8, 1, b""), reply(7, error(2), b"not you")].concat()), false, &[]).await;
    assert!(matches!(&e, NegotiateError::Refused { message, .. } if message == "not you"), "{e}");
    let e = refused(greeted(&[reply(8, 1, b""), reply(7, error(6), b"")].concat()), false, &[]).await;
    assert!(matches!(&e, NegotiateError::UnknownExport { export, .. } if export == "disk"), "{e}");
    let e = refused(greeted(&[reply(8, 1, b""), reply(7, error(1), b"")].concat()), false, &[]).await;
    assert!(matches!(e, NegotiateError::TooOld { .. }), "{e}");
    let e = refused(greeted(&[reply(8, error(1), b"")].concat()), false, &["base:allocation"]).await;
    assert!(matches!(e, NegotiateError::TooOld { lacks: "structured replies", .. }), "{e}");
    let e = refused(greeted(&[reply(8, 1, b""), reply(10, 1, b"")].concat()), false, &["base:allocation"]).await;
    assert!(matches!(&e, NegotiateError::NoContext { context, .. } if context == "base:allocation"), "{e}");
    let e = refused(greeted(&[reply(8, 1, b""), reply(7, 1, b"")].concat()), false, &[]).await;
    assert!(matches!(e, NegotiateError::Protocol { .. }), "{e}");
    let e = refused(greeted(&reply(8, 1, b"")[..17]), true, &[]).await;
    assert!(matches!(e, NegotiateError::Io { .. }), "{e}");
    let e = refused(say::negotiation(true, &[], (1 << 56) + 1, 1), false, &[]).await;
    assert!(matches!(e, NegotiateError::Protocol { .. }), "{e}");
    let nowhere = Address::Unix("/nonexistent/sock".into());
    let e = connect(&nowhere, &wanted("", &[]), &ConnectOptions::default()).await.unwrap_err();
    assert!(matches!(e, NegotiateError::Connect { .. }), "{e}");

    // A server that lists exports without end is left.
    let one = [&4u32.to_be_bytes()[..], b"disk"].concat();
    let endless = [say::GREETING.to_vec(), reply(3, 2, &one).repeat(5000)].concat();
    let (_dir, address) = says(endless, false).await;
    let e = list(&address, &ConnectOptions::default()).await.unwrap_err();
    assert!(matches!(e, NegotiateError::Protocol { .. }), "{e}");
}

/// A client with a 1 MiB export, and the server's end of its session.
async fn session(structured: bool, contexts: &[&str], options: ClientOptions) -> (Client, UnixStream) {
    let dir = tempdir();
    let path = dir.path().join("sock");
    let listener = UnixListener::bind(&path).unwrap();
    let says = say::negotiation(structured, contexts, MIB, 0x1fd);
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&says).await.unwrap();
        // Read the negotiation up to the end of GO, which asks for two pieces of information.
        let mut heard = vec![];
        while !heard.windows(6).any(|w| w == [0, 2, 0, 3, 0, 2]) {
            stream.read_buf(&mut heard).await.unwrap();
        }
        stream
    });
    let options = ConnectOptions { client: options, ..ConnectOptions::default() };
    let client = connect(&Address::Unix(path), &wanted("disk", contexts), &options).await.unwrap();
    (client, server.await.unwrap())
}

/// The next request: command, cookie, offset, length.
async fn request(server: &mut UnixStream) -> (u16, u64, u64, u32) {
    let mut b = [0; 28];
    server.read_exact(&mut b).await.unwrap();
    assert_eq!(b[..4], 0x2560_9513_u32.to_be_bytes());
    let word = |at: usize| u64::from_be_bytes(b[at..at + 8].try_into().unwrap());
    (u16::from_be_bytes([b[6], b[7]]), word(8), word(16), u32::from_be_bytes(b[24..].try_into().unwrap()))
}

#[tokio::test]
async fn replies_come_in_any_order() {
    for structured in [false, true] {
        let (client, mut server) = session(structured, &[], ClientOptions::default()).await;
        let served = tokio::spawn(async move {
            let mut asked = vec![];
            for _ in 0..50 {
                asked.push(request(&mut server).await);
            }
            for (command, cookie, offset, len) in asked.into_iter().rev() {
                assert_eq!(command, 0);
                let bytes = vec![(offset / 512) as u8; len as usize];
                let half = bytes.len() / 2;
                let reply = match structured {
                    false => say::simple(cookie, 0, &bytes),
                    true => [
                        say::data(false, cookie, offset + half as u64, &bytes[half..]),
                        say::data(true, cookie, offset, &bytes[..half]),
                    ]
                    .concat(),
                };
                server.write_all(&reply).await.unwrap();
            }
            server
        });
        let reads = (0..50u64).map(|i| client.read(Extent::new(i * 512, 512)));
        for (i, bytes) in futures_util::future::join_all(reads).await.into_iter().enumerate() {
            assert_eq!(bytes.unwrap(), [i as u8; 512]);
        }
        served.await.unwrap();
    }
}

#[tokio::test]
async fn a_caller_that_goes_away_disturbs_nobody() {
    let options = ClientOptions { max_in_flight: 2, deadline: Some(Duration::from_millis(200)) };
    let (client, mut server) = session(true, &[], options).await;
    // One read is dropped, one runs into its deadline; both keep their places on the wire.
    let dropped = tokio::time::timeout(Duration::from_millis(20), client.read(Extent::new(0, 4096))).await;
    assert!(dropped.is_err());
    let e = client.read(Extent::new(4096, 4096)).await.unwrap_err();
    assert!(matches!(e, NbdError::Deadline { what: "read", .. }), "{e}");
    assert_eq!(client.waiting(), 2);
    let (first, second) = (request(&mut server).await, request(&mut server).await);
    // A third has no place until a late reply comes, which is dropped.
    let third = client.read(Extent::new(8192, 4096));
    let serve = async {
        server.write_all(&say::data(true, second.1, 4096, &[2; 4096])).await.unwrap();
        let third = request(&mut server).await;
        server.write_all(&say::error(true, first.1, 5, "late", None)).await.unwrap();
        server.write_all(&say::data(true, third.1, 8192, &[3; 4096])).await.unwrap();
    };
    let (third, ()) = tokio::join!(third, serve);
    assert_eq!(third.unwrap(), [3; 4096]);
    assert_eq!(client.waiting(), 0);
    assert_eq!(client.ended(), None);
}

#[tokio::test]
async fn errors_of_one_request_stay_with_it() {
    let (client, mut server) = session(true, &[], ClientOptions::default()).await;
    let serve = async {
        let (_, cookie, ..) = request(&mut server).await;
        let said = [
            say::data(false, cookie, 0, &[1; 1024]),
            say::error(false, cookie, 5, "sector 2 is torn", Some(1024)),
            say::error(false, cookie, 28, "a second one", None),
            say::chunk(true, 0, cookie, b""),
        ];
        server.write_all(&said.concat()).await.unwrap();
    };
    let (read, ()) = tokio::join!(client.read(Extent::new(0, 4096)), serve);
    let e = read.unwrap_err();
    assert!(matches!(&e, NbdError::Server { errno: nix::errno::Errno::EIO, message, .. } if message.contains("torn")));
    println!("{e}");
    // Not sent at all:
    for (offset, len) in [(0, 0), (MIB, 512), (MIB - 512, 1024), (0, 1 << 40), (u64::MAX - 5, 10)] {
        let e = client.read(Extent { offset_bytes: offset, len_bytes: len }).await.unwrap_err();
        assert!(matches!(e, NbdError::BadRequest { .. }), "{e}");
    }
    let e = client.block_status("base:allocation", Extent::new(0, 512)).await.unwrap_err();
    assert!(matches!(e, NbdError::NoContext { .. }), "{e}");
    assert_eq!(client.ended(), None);
}

#[tokio::test]
async fn a_server_that_breaks_the_protocol_is_left_and_everyone_told() {
    type Say = fn(u64) -> Vec<u8>;
    let wrong: [(&str, Say); 18] = [
        ("magic number", |_| vec![0x55; 64]),
        ("does not fit", |c| say::data(true, c + (1 << 16), 0, &[1; 4096])), // to the trim
        ("not waiting", |c| say::data(true, c + (9 << 16), 0, &[1; 4096])),
        ("not waiting", |c| say::data(true, c + 1, 0, &[1; 4096])),
        ("overlap", |c| [say::data(false, c, 0, &[1; 1024]), say::hole(true, c, 512, 1024)].concat()),
        ("overlap", |c| [say::data(false, c, 0, &[1; 1024]), say::data(true, c, 0, &[1; 1024])].concat()),
        ("before all", |c| say::data(true, c, 0, &[1; 4095])),
        ("before all", |c| [say::data(false, c, 1, &[1; 4095]), say::chunk(true, 0, c, b"")].concat()),
        ("before all", |c| say::chunk(true, 0, c, b"")),
        ("past its read", |c| say::hole(true, c, 1, 4096)),
        ("outside its read", |c| say::data(true, c, 4096, &[1; 1])),
        ("does not fit", |c| say::data(true, c, 0, &[1; 4097])),
        ("does not fit", |c| say::data(true, c, 0, &[])),
        ("empty", |c| say::hole(true, c, 0, 0)),
        ("simple reply to a read", |c| say::simple(c, 0, &[1; 4096])),
        ("another request", |c| say::status(true, c, 1, &[(4096, 0)])),
        ("without an error", |c| say::error(true, c, 0, "fine", None)),
        ("unknown kind", |c| say::chunk(true, 77, c, b"what")),
    ];
    for (reason, say) in wrong {
        let (client, mut server) = session(true, &[], ClientOptions::default()).await;
        let serve = async {
            let first = request(&mut server).await;
            request(&mut server).await;
            server.write_all(&say(first.1)).await.unwrap();
        };
        let (first, second) = (client.read(Extent::new(0, 4096)), client.trim(Extent::new(0, 65536)));
        let (first, second, ()) = tokio::join!(first, second, serve);
        for e in [first.unwrap_err(), second.unwrap_err(), client.flush().await.unwrap_err()] {
            assert!(matches!(&e, NbdError::Gone { reason: r, .. } if r.contains(reason)), "{reason}: {e}");
        }
        assert!(client.ended().unwrap().contains("broke the protocol"));
    }
}

#[tokio::test]
async fn block_status_answers_are_checked_and_put_together() {
    let (client, mut server) = session(true, &["one", "two"], ClientOptions::default()).await;
    let serve = async {
        // Short answers, the last one longer than asked; the other context says something else.
        for descriptors in [vec![(65536u32, 1u32), (65536, 1)], vec![(131072, 0)], vec![(262144, 0), (u32::MAX, 1)]] {
            let (command, cookie, ..) = request(&mut server).await;
            assert_eq!(command, 7);
            server.write_all(&say::status(false, cookie, 1, &[(1 << 20, 9)])).await.unwrap();
            server.write_all(&say::status(true, cookie, 2, &descriptors)).await.unwrap();
        }
    };
    let (found, ()) = tokio::join!(status(&client, "two"), serve);
    assert_eq!(found, [(0, 131072, 1), (131072, 524288, 0), (524288, 1 << 20, 1)]);

    type Say = fn(u64) -> Vec<u8>;
    let wrong: [(&str, Say); 5] = [
        ("every context", |c| say::status(true, c, 1, &[(4096, 0)])),
        ("twice", |c| [say::status(false, c, 1, &[(4096, 0)]), say::status(true, c, 1, &[(4096, 0)])].concat()),
        ("not negotiated", |c| say::status(true, c, 7, &[(4096, 0)])),
        ("impossible length", |c| say::status(true, c, 1, &[])),
        ("empty or past", |c| say::status(true, c, 1, &[(4096, 0), (0, 1)])),
    ];
    for (reason, say) in wrong {
        let (client, mut server) = session(true, &["one", "two"], ClientOptions::default()).await;
        let serve = async {
            let (_, cookie, ..) = request(&mut server).await;
            server.write_all(&say(cookie)).await.unwrap();
        };
        let (found, ()) = tokio::join!(client.block_status("one", Extent::new(0, 4096)), serve);
        let e = found.unwrap_err();
        assert!(matches!(&e, NbdError::Gone { reason: r, .. } if r.contains(reason)), "{reason}: {e}");
    }
}

#[tokio::test]
async fn a_server_that_closes_in_mid_reply_ends_the_session_at_once() {
    let (client, mut server) = session(true, &[], ClientOptions::default()).await;
    let started = Instant::now();
    let serve = async move {
        let (_, cookie, ..) = request(&mut server).await;
        server.write_all(&say::data(true, cookie, 0, &[1; 4096])[..1000]).await.unwrap();
        drop(server);
    };
    let (read, ()) = tokio::join!(client.read(Extent::new(0, 4096)), serve);
    assert!(matches!(read.unwrap_err(), NbdError::Gone { .. }));
    assert!(started.elapsed() < Duration::from_secs(60));
}
