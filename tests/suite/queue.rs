//! Many clients of one service: who has to wait is told for whom, is shown, and gets its turn.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use crate::common::*;
use crate::tls_common::*;
use livebackup::wire::message::{Begin, Event, FailureCode, Reply, Request, Session, VmStatus};
use livebackup::wire::tls::Connector;
use livebackup::wire::{Client, Timing};
use tokio::sync::mpsc;
use tokio::time::timeout;

const LONG: Duration = Duration::from_secs(60);

const SIZE: u64 = 96 << 20;

async fn connect(server: &Server, name: &str) -> Client {
    let connector = Connector::open(&server.pki.bundle(name)).unwrap();
    Client::connect_tls(&server.address, &connector, Timing::default()).await.unwrap()
}

async fn status(client: &mut Client) -> VmStatus {
    match client.request(Request::Status { vm: Some("real".into()) }).await.unwrap() {
        Reply::Status { mut vms } => vms.remove(0),
        other => panic!("{other:?}"),
    }
}

/// Asks for the state until it is as it should be.
async fn status_when(client: &mut Client, what: &str, is: impl Fn(&VmStatus) -> bool) -> VmStatus {
    let looking = async {
        loop {
            let status = status(client).await;
            if is(&status) {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LONG, looking).await.unwrap_or_else(|_| panic!("waited a minute for: {what}"))
}

fn begin(wait: bool) -> Begin {
    Begin { vm: "real".into(), chunk_bytes: 65536, checkpoint: true, wait, ..Begin::default() }
}

async fn read_to_end(mut session: Session) -> Vec<u8> {
    let mut image = vec![0xaa; session.begun.disks[0].disk.size_bytes as usize];
    loop {
        match timeout(LONG, session.events.recv()).await.unwrap().unwrap().unwrap() {
            Event::Data { offset_bytes, bytes, .. } => {
                image[offset_bytes as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
            Event::Zero { extent, .. } => image[extent.offset_bytes as usize..extent.end() as usize].fill(0),
            Event::Sent => {}
            Event::Packed { .. } => panic!("nobody asked for compression"),
            Event::Same { .. } => panic!("nobody asked for a comparison"),
            Event::End(_) => return image,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_waits_for_the_first_and_everybody_sees_it() {
    // More than all buffers on the way hold: a session whose client does not read goes on until it does.
    let mut qemu = Qemu::with_raw_disk(Version::V10, SIZE);
    for i in 0..SIZE >> 22 {
        qemu.write(i << 22, 4 << 20, i as u8 + 1);
    }
    let vm = format!("\n[[vm]]\nname = \"real\"\nmonitor = \"qmp:{}\"\n", qemu.socket().display());
    let server = Server::start(&format!("{}{vm}", two_clients("real"))).await;
    let mut watcher = connect(&server, "watcher").await;
    status_when(&mut watcher, "the VM to be attached", |s| s.qemu_version.is_some()).await;

    let first = connect(&server, "backup1").await.begin(begin(false)).await.unwrap();
    let refused = connect(&server, "watcher").await.begin(begin(false)).await.unwrap_err();
    assert_eq!(refused.code, FailureCode::Busy);
    assert!(refused.message.contains("backup1 backs up VM \"real\" since"), "{refused}");

    let (said, mut hears) = mpsc::unbounded_channel();
    let second = connect(&server, "watcher").await;
    let second = tokio::spawn(async move {
        second.begin_when_free(begin(true), |waiting| said.send(waiting.clone()).unwrap()).await
    });
    let waiting = timeout(LONG, hears.recv()).await.unwrap().unwrap();
    assert!(waiting.why.contains("backup1") && waiting.ahead == 0, "{waiting:?}");
    // A third comes and leaves.
    let third = connect(&server, "backup1").await;
    let third = tokio::spawn(third.begin(begin(true)));
    let seen = status_when(&mut watcher, "the third to wait", |s| s.queue.len() == 2).await;
    assert_eq!((seen.queue[0].client.as_str(), seen.queue[1].client.as_str()), ("watcher", "backup1"));
    assert_eq!(seen.session.unwrap().client.as_deref(), Some("backup1"));
    third.abort();
    status_when(&mut watcher, "the third to be forgotten", |s| s.queue.len() == 1).await;

    let expected = std::fs::read(qemu.path("disk0.raw")).unwrap();
    assert!(read_to_end(first).await == expected);
    let second = timeout(LONG, second).await.unwrap().unwrap().expect("its turn has come");
    let seen = status_when(&mut watcher, "the second to run", |s| s.session.is_some()).await;
    assert!(seen.queue.is_empty() && seen.session.unwrap().client.as_deref() == Some("watcher"));
    let last = seen.last.expect("the first has ended");
    assert_eq!((last.failure, last.sent_bytes), (None, SIZE));
    // A client that vanishes ends its own session, and the next one's turn comes.
    drop(second);
    let seen = status_when(&mut watcher, "the second's end", |s| {
        s.session.is_none() && s.last.as_ref().is_some_and(|l| l.failure.is_some())
    })
    .await;
    assert!(seen.last.unwrap().failure.unwrap().contains("left"));
    let fourth = connect(&server, "backup1").await.begin(begin(true)).await.unwrap();
    assert!(read_to_end(fourth).await == expected);

    let program = |arguments: &str| {
        let mut command = livebackup();
        command.args(arguments.split_whitespace()).args(["--tls", server.pki.bundle("watcher").to_str().unwrap()]);
        run(&mut command)
    };
    tokio::task::block_in_place(|| {
        let said = program(&format!("status livebackup://{}", server.address));
        assert!(said.contains("real: ") && said.contains("last: ") && !said.contains("vm1"), "{said}");
        let json = program(&format!("status --json livebackup://{}", server.address));
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!((&json["vms"][0]["vm"], json["vms"].as_array().unwrap().len()), (&"real".into(), 1));
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn one_client_cannot_take_all_places() {
    let server = Server::start(&two_clients("real")).await;
    let mut open = vec![];
    for _ in 0..32 {
        let mut client = connect(&server, "backup1").await;
        client.request(Request::List).await.unwrap();
        open.push(client);
    }
    let connector = Connector::open(&server.pki.bundle("backup1")).unwrap();
    let refused = Client::connect_tls(&server.address, &connector, Timing::default()).await.unwrap_err();
    assert_eq!(refused.code, FailureCode::Disconnected, "{refused}");
    connect(&server, "watcher").await.request(Request::List).await.expect("others have places of their own");
    drop(open.pop());
    let again = async {
        while Client::connect_tls(&server.address, &connector, Timing::default()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LONG, again).await.expect("a place that was left is free");
}
