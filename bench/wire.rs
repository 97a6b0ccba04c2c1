//! The protocol over loopback TCP, one thread an end, against the same bytes without it.
//!
//! `cargo bench --bench wire`: MiB/s, and processor seconds per GiB of each end; medians of several rounds.

#[path = "../tests/wire_begun/mod.rs"]
mod wire_begun;

use std::sync::mpsc as sync;
use std::time::{Duration, Instant};

use bytes::Bytes;
use livebackup::units::{GIB, MIB};
use livebackup::wire::message::{Ack, Begin, Event, Session, Totals};
use livebackup::wire::{Address, Answer, Client, Stream, Timing, serve_connection};
use nix::sys::resource::{UsageWho, getrusage};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use wire_begun::begun;

const TOTAL_BYTES: u64 = 4 * GIB;
const ROUNDS: usize = 5;

/// One round: seconds on the clock, processor seconds of the server's and the client's thread.
type Round = (f64, f64, f64);

fn main() {
    println!("{:<34}{:>10}{:>16}{:>16}", "loopback TCP", "MiB/s", "server s/GiB", "client s/GiB");
    report("plain socket, 1 MiB", || plain(MIB as usize));
    report("livebackup, frames of 1 MiB", || protocol(MIB as usize));
    report("livebackup, frames of 256 KiB", || protocol(MIB as usize / 4));
    report("livebackup, frames of 64 KiB", || protocol(MIB as usize / 16));
}

fn report(what: &str, round: impl Fn() -> Round) {
    let rounds: Vec<Round> = (0..ROUNDS).map(|_| round()).collect();
    let median = |of: fn(&Round) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[ROUNDS / 2]
    };
    let gib = TOTAL_BYTES as f64 / GIB as f64;
    let rate = (TOTAL_BYTES / MIB) as f64 / median(|r| r.0);
    println!("{what:<34}{rate:>10.0}{:>16.3}{:>16.3}", median(|r| r.1) / gib, median(|r| r.2) / gib);
}

/// Runs `server` and `client` in a thread and runtime each; the client gets the server's address.
fn two_threads<S, C>(server: impl FnOnce(TcpListener) -> S + Send + 'static, client: impl FnOnce(String) -> C) -> Round
where
    S: Future<Output = ()>,
    C: Future<Output = ()>,
{
    let (address_to, address) = sync::channel();
    let serving = std::thread::spawn(move || {
        runtime().block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
            address_to.send(listener.local_addr().expect("address").to_string()).expect("send");
            server(listener).await;
        });
        processor_seconds()
    });
    let address = address.recv().expect("address");
    let (before, start) = (processor_seconds(), Instant::now());
    runtime().block_on(client(address));
    let (clock, used) = (start.elapsed().as_secs_f64(), processor_seconds() - before);
    (clock, serving.join().expect("server"), used)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime")
}

fn processor_seconds() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_THREAD).expect("getrusage");
    let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}

/// Bytes that do not all fit into the second-level cache, as a disk's do not.
fn source(len: usize) -> Vec<Bytes> {
    (0..16 * MIB as usize / len).map(|n| (0..len).map(|i| (i * 31 + n) as u8).collect::<Vec<u8>>().into()).collect()
}

fn plain(len: usize) -> Round {
    let server = move |listener: TcpListener| async move {
        let (mut socket, _) = listener.accept().await.expect("accept");
        for bytes in source(len).iter().cycle().take(TOTAL_BYTES as usize / len) {
            socket.write_all(bytes).await.expect("write");
        }
    };
    let client = |address| async move {
        let mut socket = TcpStream::connect(address).await.expect("connect");
        let mut buffer = vec![0; len];
        while socket.read(&mut buffer).await.expect("read") > 0 {}
    };
    two_threads(server, client)
}

fn protocol(len: usize) -> Round {
    let server = move |listener: TcpListener| async move {
        let (socket, _) = listener.accept().await.expect("accept");
        let stream = Stream::tcp(socket).expect("stream");
        serve_connection(stream, Timing::default(), move |_| async move { Ok(Answer::Session(sidecar(len))) })
            .await
            .expect("serve");
    };
    let client = |address| async move {
        let client = Client::connect(&Address::Tcp(address)).await.expect("connect");
        let begin = Begin { vm: "vm".into(), chunk_bytes: len as u32, ..Begin::default() };
        let mut session = client.begin(begin).await.expect("begin");
        let mut got = 0;
        while let Some(event) = session.events.recv().await {
            if let Event::Data { disk, offset_bytes, bytes } = event.expect("event") {
                got += bytes.len() as u64;
                let extents = vec![livebackup::extent::Extent::new(offset_bytes, bytes.len() as u64)];
                // Refused once the end has arrived behind the events that still wait here.
                let _ = session.acks.send(Ack { disk, extents });
            }
        }
        assert_eq!(got, TOTAL_BYTES);
    };
    two_threads(server, client)
}

fn sidecar(len: usize) -> Session {
    let (to_client, events) = mpsc::channel(8);
    let (acks, mut acked) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        for (n, bytes) in source(len).iter().cycle().take(TOTAL_BYTES as usize / len).enumerate() {
            let event = Event::Data { disk: 0, offset_bytes: (n * len) as u64, bytes: bytes.clone() };
            to_client.send(Ok(event)).await.expect("event");
            while acked.try_recv().is_ok() {}
        }
        for event in [Event::Sent, Event::End(Totals::default())] {
            to_client.send(Ok(event)).await.expect("event");
        }
        let _ = tokio::time::timeout(Duration::from_secs(60), async { while acked.recv().await.is_some() {} }).await;
    });
    Session { begun: begun(&[TOTAL_BYTES]), events, acks, digests: None, lasting: None }
}
