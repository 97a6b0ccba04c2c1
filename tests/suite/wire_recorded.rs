//! Peers of version 1 as they spoke when it was new, byte for byte: what is read today must go on to understand them, and
//! they must understand what is said today as far as they read it.
//!
//! ```text
//! wire-v1/client.bin       offer, list, status, alive, begin       as a client of livebackup 0.1.0 sends them
//! wire-v1/client-ack.bin   an acknowledgement of 128 KiB
//! wire-v1/server.bin       answer, list, status, alive, begun, data, zero, alive, data, data, sent, end
//! ```

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use livebackup::extent::Extent;
use livebackup::wire::frame::MAX_REPLY_BYTES;
use livebackup::wire::message::*;
use livebackup::wire::packing::{How, Packing, Wanted};
use livebackup::wire::reader::{Frame, FrameReader};
use livebackup::wire::trunk::Trunks;
use livebackup::wire::{Address, Answer, Client, Common, Stream, Timing, serve_with};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

const CLIENT: &[u8] = include_bytes!("../fixtures/wire-v1/client.bin");
const CLIENT_ACK: &[u8] = include_bytes!("../fixtures/wire-v1/client-ack.bin");
const SERVER: &[u8] = include_bytes!("../fixtures/wire-v1/server.bin");
const LONG: Duration = Duration::from_secs(60);

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(7)).collect()
}

/// The same over TCP, for a client that knows how to connect again; how often it did so.
async fn recorded_server_at_an_address() -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, connections) = (listener.local_addr().unwrap().to_string(), Arc::new(AtomicUsize::new(0)));
    let count = connections.clone();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            socket.write_all(SERVER).await.unwrap();
            let _ = socket.read_to_end(&mut vec![]).await;
        }
    });
    (address, connections)
}

/// A client over what the recorded server said.
async fn recorded_server() -> (Client, tokio::io::DuplexStream) {
    let (mut near, far) = tokio::io::duplex(1 << 20);
    near.write_all(SERVER).await.unwrap();
    (Client::over(Stream::new(far, "recorded"), Timing::default()).await.unwrap(), near)
}

#[tokio::test]
async fn todays_client_understands_the_first_server() {
    let (address, connections) = recorded_server_at_an_address().await;
    let mut client = Client::connect(&Address::Tcp(address)).await.unwrap();
    assert_eq!(client.server_software(), "livebackup 0.1.0");
    let Reply::List { vms } = client.request(Request::List).await.unwrap() else { panic!() };
    assert_eq!((vms[0].vm.as_str(), vms[0].state.as_str()), ("vm", "running"));
    let Reply::Status { vms } = client.request(Request::Status { vm: None }).await.unwrap() else { panic!() };
    assert_eq!(vms[0].session.as_ref().unwrap().sent_bytes, 5);
    // A client of today asks for compression and several connections; a server that does not know of that sends data, over one.
    let compression = Some(Wanted { how: Some(How::Zstd), level: 1 });
    let asked = Begin { vm: "vm".into(), chunk_bytes: 65536, checkpoint: true, wait: true, ..Begin::default() };
    let begin = Begin { compression, connections: Some(4), ..asked };
    let mut session = client.begin(begin).await.unwrap();
    assert_eq!(session.begun.disks[0].disk.size_bytes, 262_656);
    let mut image = vec![0xaa; 262_656];
    loop {
        match session.events.recv().await.unwrap().unwrap() {
            Event::Data { offset_bytes, bytes, .. } => {
                image[offset_bytes as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
            Event::Zero { extent, .. } => image[extent.offset_bytes as usize..extent.end() as usize].fill(0),
            Event::Sent => {}
            Event::Packed { .. } => panic!("this server does not know how to compress"),
            Event::Same { .. } => panic!("nobody asked for a comparison"),
            Event::End(totals) => {
                assert_eq!((totals.data_bytes, totals.zero_bytes), (131_584, 131_072));
                break;
            }
        }
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1);
    let expected = [pattern(65536), vec![0; 131_072], pattern(65536), pattern(512)].concat();
    assert!(image == expected);
}

#[tokio::test]
async fn todays_server_understands_the_first_client() {
    let (mut near, far) = tokio::io::duplex(1 << 20);
    let (begun_to_test, mut begun) = mpsc::channel(1);
    let (acks_to_test, mut acked) = mpsc::channel(1);
    let serving = tokio::spawn(async move {
        let handler = |request| {
            let (begun_to_test, acks_to_test) = (begun_to_test.clone(), acks_to_test.clone());
            async move {
                match request {
                    Request::List => Ok(Answer::Reply(Reply::List { vms: vec![] })),
                    Request::Status { vm: None } => Ok(Answer::Reply(Reply::Status { vms: vec![] })),
                    Request::Begin(begin) => {
                        begun_to_test.send(begin).await.unwrap();
                        let (mut client, near) = recorded_server().await;
                        client.request(Request::List).await.unwrap();
                        client.request(Request::Status { vm: None }).await.unwrap();
                        // The recorded server's own session is passed on, and so is what is acknowledged.
                        let recorded = Begin { vm: "vm".into(), chunk_bytes: 65536, ..Begin::default() };
                        let Session { begun, events: mut recorded, .. } = client.begin(recorded).await.unwrap();
                        let (acks, mut to_check) = mpsc::unbounded_channel();
                        let (to_client, events) = mpsc::channel(1);
                        tokio::spawn(async move {
                            let mut count = 0;
                            while let Some(event) = recorded.recv().await {
                                to_client.send(event).await.unwrap();
                                count += 1;
                                if count == 2 {
                                    acks_to_test.send(to_check.recv().await.unwrap()).await.unwrap();
                                }
                            }
                            drop(near);
                        });
                        Ok(Answer::Session(Session { begun, events, acks, digests: None, lasting: None }))
                    }
                    other => panic!("{other:?}"),
                }
            }
        };
        // One that would compress all that it sends, and over several connections, does not for a client that knows nothing
        // of it.
        let packing = Packing::new(How::Zstd, 1);
        let common = Common { packing, ending: None, trunks: Trunks::default().of("recorded".into()) };
        serve_with(Stream::new(far, "recorded"), Timing::default(), common, handler).await
    });
    // It asks one thing at a time, so what it sent is played in its own steps: hello, two requests, the begin.
    let mut cuts = vec![];
    let mut at = 20;
    while at < CLIENT.len() {
        let len = u32::from_le_bytes(CLIENT[at..at + 4].try_into().unwrap()) as usize;
        cuts.push(at..at + 12 + len);
        at += 12 + len;
    }
    assert_eq!(cuts.len(), 4);
    near.write_all(&CLIENT[..20]).await.unwrap();
    let mut answer = [0; 22];
    near.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, *b"LIVEBACKUP\r\n\x00\x1a\n\xff\x01\x00\x01\x00\x01\x00", "frozen, up to the name");
    let name = near.read_u8().await.unwrap();
    near.read_exact(&mut vec![0; name.into()]).await.unwrap();
    let (reader, mut writer) = tokio::io::split(near);
    let mut frames = FrameReader::new(Box::new(reader), "today".into(), MAX_REPLY_BYTES, LONG);
    let mut next = async || match tokio::time::timeout(LONG, frames.next(LONG)).await.unwrap().unwrap().unwrap() {
        Frame::Control(json) => serde_json::from_slice::<serde_json::Value>(&json).unwrap()["reply"].clone(),
        Frame::Data(place, _) => format!("data {}", place.extent.offset_bytes).into(),
        Frame::Zero(place) => format!("zero {}", place.extent.offset_bytes).into(),
        Frame::Alive => "alive".into(),
        other => panic!("{other:?}"),
    };
    writer.write_all(&CLIENT[cuts[0].clone()]).await.unwrap();
    assert_eq!(next().await, "list");
    writer.write_all(&CLIENT[cuts[1].clone()]).await.unwrap();
    assert_eq!(next().await, "status");
    writer.write_all(&CLIENT[cuts[2].start..cuts[3].end]).await.unwrap();
    let begin: Begin = begun.recv().await.unwrap();
    assert!(begin.checkpoint && !begin.wait && begin.vm == "vm", "who knows no queue does not wait in one");
    for what in ["begun", "data 0", "zero 65536"] {
        assert_eq!(next().await, what);
    }
    writer.write_all(CLIENT_ACK).await.unwrap();
    let ack: Ack = tokio::time::timeout(LONG, acked.recv()).await.unwrap().unwrap();
    assert_eq!(ack, Ack { disk: 0, extents: vec![Extent::new(0, 131_072)] });
    for what in ["data 196608", "data 262144", "sent", "end"] {
        assert_eq!(next().await, what);
    }
    drop((frames, writer));
    serving.await.unwrap().unwrap();
}
