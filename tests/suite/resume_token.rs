//! Whose session it is: only its client comes back to it, for its own VM, over one connection at a time.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use crate::common::proxy::{Proxy, Way};
use crate::common::*;
use crate::tls_common::*;
use livebackup::wire::message::{Ack, Begin, Event, Failure, FailureCode, Reply, Request, Session};
use livebackup::wire::resume::{Resume, Token};
use livebackup::wire::tls::Connector;
use livebackup::wire::{Client, Timing};
use tokio::time::timeout;

const LONG: Duration = Duration::from_secs(60);
const SIZE: u64 = 24 << 20;

async fn connect(server: &Server, address: &str, name: &str) -> Client {
    let connector = Connector::open(&server.pki.bundle(name)).unwrap();
    Client::connect_tls(address, &connector, Timing::default()).await.unwrap()
}

fn machine() -> (Qemu, String) {
    let mut qemu = Qemu::with_raw_disk(Version::V10, SIZE);
    for i in 0..SIZE >> 20 {
        qemu.write(i << 20, 1 << 20, i as u8 + 1);
    }
    let clients = two_clients("*");
    let vm = format!("{clients}\n[[vm]]\nname = \"real\"\nmonitor = \"qmp:{}\"\n", qemu.socket().display());
    (qemu, vm)
}

fn begin(token: Token) -> Begin {
    Begin { vm: "real".into(), chunk_bytes: 65536, resume: Some(token), wait: true, ..Begin::default() }
}

async fn next(session: &mut Session) -> Result<Event, Failure> {
    timeout(LONG, session.events.recv()).await.expect("the session goes on").unwrap()
}

/// Reads on into the image, acknowledging all; to the end.
async fn read_to_end(session: &mut Session, image: &mut [u8]) {
    loop {
        let (at, len) = match next(session).await.unwrap() {
            Event::Data { offset_bytes, bytes, .. } => {
                image[offset_bytes as usize..][..bytes.len()].copy_from_slice(&bytes);
                (offset_bytes, bytes.len() as u64)
            }
            Event::End(_) => return,
            _ => continue,
        };
        let _ = session.acks.send(Ack { disk: 0, extents: vec![livebackup::extent::Extent::new(at, len)] });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_good_for_its_client_and_its_vm_and_once() {
    let (qemu, config) = tokio::task::block_in_place(machine);
    let server = Server::start(&config).await;
    let proxy = Proxy::tcp(&server.address);
    proxy.cut(&[(Way::ToClient, 3 << 20)]);
    proxy.fall_with_the_next_cut();
    let token = Token::random();
    let mut session = connect(&server, &proxy.address, "backup1").await.begin(begin(token)).await.unwrap();
    let mut image = vec![0; SIZE as usize];
    // What is sent before the cut fits into what waits for us.
    tokio::task::block_in_place(|| wait_until("the cut", || proxy.cuts_made() == 1));
    for (name, vm) in [("watcher", "real"), ("watcher", "vm1"), ("backup1", "vm1")] {
        let resume = Resume { vm: vm.into(), token, have: vec![] };
        let refused = connect(&server, &server.address, name).await.resume(resume).await.unwrap_err();
        assert_eq!(refused.code, FailureCode::SessionGone, "{name} {vm}: {refused}");
        let leave = Request::Leave { vm: vm.into(), token };
        let refused = connect(&server, &server.address, name).await.request(leave).await.unwrap_err();
        assert_eq!(refused.code, FailureCode::SessionGone, "{name} {vm}: {refused}");
    }
    let again = connect(&server, &server.address, "watcher").await.begin(Begin { wait: false, ..begin(token) }).await;
    assert_eq!(again.unwrap_err().code, FailureCode::Busy, "it is held for its client");
    // A connection that breaks in the middle of TLS's handshake ends nothing.
    tokio::task::block_in_place(|| wait_until("a try to come back", || proxy.refused() >= 1));
    proxy.rise();
    read_to_end(&mut session, &mut image).await;
    assert!(image == std::fs::read(qemu.path("disk0.raw")).unwrap());
    let resume = Resume { vm: "real".into(), token, have: vec![] };
    let refused = connect(&server, &server.address, "backup1").await.resume(resume).await.unwrap_err();
    assert_eq!(refused.code, FailureCode::SessionGone, "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_back_takes_the_place_of_the_old_connection() {
    let (_qemu, config) = tokio::task::block_in_place(machine);
    let server = Server::start(&config).await;
    let token = Token::random();
    let mut first = connect(&server, &server.address, "backup1").await.begin(begin(token)).await.unwrap();
    let resume = |have: &[u64]| Resume { vm: "real".into(), token, have: have.to_vec() };
    let second = connect(&server, &server.address, "backup1").await.resume(resume(&[1 << 20])).await;
    let (second, begun) = second.unwrap();
    assert_eq!(begun, first.begun);
    let failure = loop {
        if let Err(failure) = next(&mut first).await {
            break failure;
        }
    };
    assert!(failure.message.contains("another connection"), "{failure}");
    // Nobody says goodbye for it, so it is held; positions that no client can have end it.
    drop(second);
    let absurd = connect(&server, &server.address, "backup1").await.resume(resume(&[12345])).await.unwrap_err();
    assert!(absurd.code == FailureCode::Protocol && absurd.message.contains("position 12345"), "{absurd}");
    let refused = connect(&server, &server.address, "backup1").await.resume(resume(&[])).await.unwrap_err();
    assert_eq!(refused.code, FailureCode::SessionGone, "{refused}");

    let token = Token::random();
    let mut third = connect(&server, &server.address, "backup1").await.begin(begin(token)).await.unwrap();
    let leave = Request::Leave { vm: "real".into(), token };
    let left = connect(&server, &server.address, "backup1").await.request(leave).await.unwrap();
    assert_eq!(left, Reply::Left);
    while next(&mut third).await.is_ok() {}
    let refused = connect(&server, &server.address, "backup1").await.resume(Resume { token, ..resume(&[]) }).await;
    assert_eq!(refused.unwrap_err().code, FailureCode::SessionGone);
}
