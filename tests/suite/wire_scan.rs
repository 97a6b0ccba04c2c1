//! Scans and audits on the wire: digests there, "same" back, and each end held to its rules.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use livebackup::extent::Extent;
use livebackup::machine::Taken;
use livebackup::units::{KIB, MIB};
use livebackup::wire::contract::{Given, MAX_AUDIT_CHUNKS, Promise, check_begin};
use livebackup::wire::digests::{ChunkDigest, Digests, MAX_DIGESTS};
use livebackup::wire::frame::Place;
use livebackup::wire::message::*;
use livebackup::wire::{Address, Answer, Client, Door, Stream, Timing, serve_connection};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;

const CHUNK: u64 = 64 * KIB;
const LONG: Duration = Duration::from_secs(60);
/// Of these the second is no scan.
const SIZES: [u64; 3] = [64 * MIB, 4 * CHUNK, 10 * CHUNK + 512];

fn begin() -> Begin {
    let digests = ["disk0", "disk1", "disk2"].map(str::to_owned).into();
    Begin { vm: "vm".into(), chunk_bytes: CHUNK as u32, checkpoint: true, digests, ..Begin::default() }
}

fn begun() -> Begun {
    let mut begun = crate::wire_begun::begun(&SIZES);
    for disk in [0, 2] {
        begun.disks[disk].taken = Taken::Scan { reason: "broken".into() };
    }
    begun
}

fn batch(disk: u16, first_chunk: u64, count: usize) -> Digests {
    let digests = (0..count).map(|i| ChunkDigest::from_bytes([(first_chunk as u8).wrapping_add(i as u8) | 1; 32]));
    Digests { disk, first_chunk, digests: digests.collect() }
}

fn same(disk: u16, chunk: u64, chunks: u64) -> Event {
    let end = ((chunk + chunks) * CHUNK).min(SIZES[usize::from(disk)]);
    Event::Same { disk, extent: Extent::between(chunk * CHUNK, end) }
}

/// The sidecar's half of a session.
struct Sidecar {
    events: mpsc::Sender<Result<Event, Failure>>,
    acks: mpsc::UnboundedReceiver<Ack>,
    digests: mpsc::Receiver<Digests>,
}

/// A server that begins what [`begun`] says, and a client's session with it.
async fn session() -> (Session, Sidecar, tokio::task::JoinHandle<Result<(), Failure>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (to_test, mut sidecars) = mpsc::channel(1);
    let served = tokio::spawn(async move {
        let stream = Stream::tcp(listener.accept().await.unwrap().0).unwrap();
        let handle = |request| {
            let to_test = to_test.clone();
            async move {
                assert!(matches!(request, Request::Begin(_)));
                let (events_to, events) = mpsc::channel(2);
                let (acks, acked) = mpsc::unbounded_channel();
                let (digests, given) = mpsc::channel(1);
                to_test.send(Sidecar { events: events_to, acks: acked, digests: given }).await.unwrap();
                Ok(Answer::Session(Session { begun: begun(), events, acks, digests: Some(digests), lasting: None }))
            }
        };
        serve_connection(stream, Timing::default(), handle).await
    });
    let client = Client::connect(&Address::Tcp(address.to_string())).await.unwrap();
    assert!(matches!(client.door(), Some(Door::Plain(Address::Tcp(to), _)) if *to == address.to_string()));
    let session = client.begin(begin()).await.unwrap();
    (session, sidecars.recv().await.unwrap(), served)
}

#[tokio::test]
async fn digests_go_there_and_same_comes_back() {
    let (mut session, mut sidecar, served) = session().await;
    let digests = session.digests.take().unwrap();
    // More than fits anywhere on the way: whoever gives waits for whoever takes, and neither for the events.
    let batches: Vec<_> =
        (0..64).map(|n| batch(0, n * 16, 16)).chain([batch(0, 1024, 0), batch(2, 10, 1), batch(2, 11, 0)]).collect();
    let expected = batches.clone();
    let giving = tokio::spawn(async move {
        for batch in batches {
            digests.send(batch).await.unwrap();
        }
    });
    for expected in expected {
        assert_eq!(timeout(LONG, sidecar.digests.recv()).await.unwrap().unwrap(), expected);
    }
    giving.await.unwrap();
    let events =
        [same(0, 0, 1000), same(2, 10, 1), Event::Sent, Event::End(Totals { same_bytes: 7, ..Totals::default() })];
    let ack = Ack { disk: 0, extents: vec![Extent::new(0, 1000 * CHUNK)] };
    for event in events {
        sidecar.events.send(Ok(event.clone())).await.unwrap();
        assert_eq!(timeout(LONG, session.events.recv()).await.unwrap().unwrap().unwrap(), event);
        if event == same(0, 0, 1000) {
            // What is the same is acknowledged, too.
            session.acks.send(ack.clone()).unwrap();
            assert_eq!(timeout(LONG, sidecar.acks.recv()).await.unwrap().unwrap(), ack);
        }
    }
    drop(session);
    timeout(LONG, served).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn digests_that_break_the_order_end_the_connection() {
    let wrong = [
        vec![batch(1, 0, 1)],
        vec![batch(2, 0, 1)],
        vec![batch(0, 5, 2), batch(0, 6, 1)],
        vec![batch(0, 1020, 5)],
        vec![batch(0, 7, 0)],
        vec![batch(0, 1024, 0), batch(0, 1024, 0)],
        vec![batch(0, 1024, 0), batch(2, 11, 0), batch(2, 11, 0)],
    ];
    for batches in wrong {
        let (mut session, mut sidecar, served) = session().await;
        tokio::spawn(async move { while sidecar.digests.recv().await.is_some() {} });
        for batch in batches.clone() {
            let _ = session.digests.as_ref().unwrap().send(batch).await;
        }
        let failure = timeout(LONG, session.events.recv()).await.unwrap().unwrap().unwrap_err();
        assert_eq!(failure.code, FailureCode::Protocol, "{batches:?}: {failure}");
        assert_eq!(timeout(LONG, served).await.unwrap().unwrap().unwrap_err().code, FailureCode::Protocol);
    }
}

#[tokio::test]
async fn a_server_says_same_only_of_what_is_compared() {
    for (event, fine) in [(same(0, 3, 2), true), (same(1, 0, 1), false), (same(2, 0, 11), true)] {
        let (mut session, sidecar, _served) = session().await;
        sidecar.events.send(Ok(event.clone())).await.unwrap();
        let got = timeout(LONG, session.events.recv()).await.unwrap().unwrap();
        assert_eq!(got.as_ref().ok() == Some(&event), fine, "{got:?}");
        assert!(fine || got.unwrap_err().code == FailureCode::Protocol);
    }
}

#[test]
fn what_was_not_offered_is_not_begun() {
    let offered = |names: &[&str]| Begin { digests: names.iter().map(|n| (*n).to_owned()).collect(), ..begin() };
    assert!(Promise::new(&offered(&["disk0", "disk2"]), &begun()).is_ok());
    assert!(Promise::new(&offered(&["disk0"]), &begun()).unwrap_err().contains("disk2"));
    assert!(
        Promise::new(&Begin { digests: Default::default(), ..begin() }, &begun()).is_err(),
        "an old client never offers"
    );
    let chunk = AuditChunk { chunk: 0, digest: ChunkDigest::ZERO };
    let audit = |count| Some(Audit { permille: 10, disks: [("disk1".to_owned(), vec![chunk; count])].into() });
    let mut answer = begun();
    answer.disks[1].audited_chunks = 2;
    assert!(Promise::new(&Begin { audit: audit(2), ..begin() }, &answer).is_ok());
    assert!(Promise::new(&Begin { audit: audit(1), ..begin() }, &answer).unwrap_err().contains("audit of 2 chunks"));
    assert!(check_begin(&Begin { audit: audit(MAX_AUDIT_CHUNKS), ..begin() }).is_ok());
    assert!(check_begin(&Begin { audit: audit(MAX_AUDIT_CHUNKS + 1), ..begin() }).is_err());
    let many = (0..300).map(|n| n.to_string()).collect();
    assert!(check_begin(&Begin { digests: many, ..begin() }).is_err());
}

#[test]
fn an_audit_makes_same_possible_for_its_disk() {
    let chunk = AuditChunk { chunk: 0, digest: ChunkDigest::ZERO };
    let audit = Some(Audit { permille: 10, disks: [("disk1".to_owned(), vec![chunk])].into() });
    let mut answer = begun();
    let place = Place { disk: 1, extent: Extent::new(0, CHUNK) };
    let begin = Begin { audit, ..begin() };
    assert!(Promise::new(&begin, &answer).unwrap().same(place).is_err());
    answer.disks[1].audited_chunks = 1;
    assert!(Promise::new(&begin, &answer).unwrap().same(place).is_ok());
}

/// Zeroes between batches need not be given; the end must.
#[test]
fn batches_may_leave_gaps() {
    let mut given = Given::new(&begin(), &begun());
    assert!(given.take(&batch(0, 100, MAX_DIGESTS.min(50))).is_ok());
    assert!(given.take(&batch(0, 1023, 1)).is_ok());
    assert!(given.take(&batch(2, 0, 1)).is_err(), "the first disk has not ended");
    let mut given = Given::new(&begin(), &begun());
    assert!(given.take(&batch(0, 1024, 0)).is_ok(), "a disk of zeroes");
    assert!(given.take(&batch(2, 11, 0)).is_ok());
}

/// What is sent as JSON keeps its form, and what older ends send is taken.
#[test]
fn the_json_of_a_scan_is_this() {
    let digest = ChunkDigest::from_bytes([0xa5; 32]);
    let audit = Audit { permille: 10, disks: [("d".to_owned(), vec![AuditChunk { chunk: 7, digest }])].into() };
    let json = serde_json::to_value(Begin { audit: Some(audit.clone()), ..begin() }).unwrap();
    assert_eq!(json["digests"], serde_json::json!(["disk0", "disk1", "disk2"]));
    assert_eq!(
        json["audit"],
        serde_json::json!({"permille": 10, "disks": {"d": [{"chunk": 7, "digest": "a5".repeat(32)}]}})
    );
    assert_eq!(serde_json::from_value::<Audit>(json["audit"].clone()).unwrap(), audit);
    for bad in ["", "a5", &"a5".repeat(31), &"a5".repeat(33), &"g5".repeat(32), &"é".repeat(32)] {
        assert!(serde_json::from_value::<ChunkDigest>((*bad).into()).is_err(), "{bad}");
    }
    let old = serde_json::json!({"vm": "v", "chunk_bytes": 65536, "checkpoint": true});
    let old: Begin = serde_json::from_value(old).unwrap();
    assert!(old.digests.is_empty() && old.audit.is_none());
    let taken = serde_json::to_value(Taken::Scan { reason: "r".into() }).unwrap();
    assert_eq!(taken, serde_json::json!({"taken": "scan", "reason": "r"}));
    let failure = serde_json::to_value(Failure::new(FailureCode::AuditMismatch, "m")).unwrap();
    assert_eq!(failure, serde_json::json!({"code": "audit-mismatch", "message": "m"}));
}
