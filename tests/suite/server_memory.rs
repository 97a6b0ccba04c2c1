//! The memory of a server stays flat, whatever strangers send it: measured at the process itself, as the most that it has ever
//! had. The limits are those that the documents give, not what was seen.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::Duration;

use crate::common::*;
use livebackup::extent::Extent;
use livebackup::wire::frame::{Encoded, HEAD_BYTES, MAX_REQUEST_BYTES};
use livebackup::wire::hello;
use livebackup::wire::message::{Ack, Request};

/// Connections that a server has at once, at most.
const CONNECTIONS: u64 = 256;
const KIB: u64 = 1 << 10;

/// A `livebackup serve` over TCP, of a VM that is not there.
struct Server {
    child: Child,
    address: String,
    _home: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start() -> Server {
        let home = tempfile::tempdir().unwrap();
        let (config, log) = (home.path().join("serve.toml"), home.path().join("serve.log"));
        let (state, monitor) = (home.path().join("state"), home.path().join("none.qmp"));
        let text = format!(
            "listen = \"127.0.0.1:0\"\nstate = \"{}\"\n[[vm]]\nname = \"vm1\"\nmonitor = \"qmp:{}\"\n",
            state.display(),
            monitor.display()
        );
        std::fs::write(&config, text).unwrap();
        let out = std::fs::File::create(&log).unwrap();
        let mut command = livebackup();
        command.args(["-v", "serve", "--config"]).arg(&config).stdin(Stdio::null());
        let child = command.stdout(out.try_clone().unwrap()).stderr(out).spawn().unwrap();
        let mut address = None;
        wait_until("the server to say where it listens", || {
            let said = std::fs::read_to_string(&log).unwrap();
            let at = said.split("listening at ").nth(1).and_then(|rest| rest.split_whitespace().next());
            address = at.map(str::to_owned);
            address.is_some()
        });
        Server { child, address: address.unwrap(), _home: home }
    }

    /// The most memory that it has ever had, in KiB.
    fn peak(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Bytes that have come for it and that it has not read, of all its connections.
    fn unread(&self) -> u64 {
        let port: u16 = self.address.rsplit(':').next().unwrap().parse().unwrap();
        let (port, connections) = (format!(":{port:04X}"), std::fs::read_to_string("/proc/net/tcp").unwrap());
        let queues = connections.lines().skip(1).filter_map(|line| {
            // "sl local_address rem_address st tx_queue:rx_queue …"; a listener's queue is one of connections.
            let mut words = line.split_whitespace().skip(1);
            let (local, _, state, queues) = (words.next()?, words.next()?, words.next()?, words.next()?);
            (local.ends_with(&port) && state == "01").then(|| queues.split_once(':'))?
        });
        queues.map(|(_, unread)| u64::from_str_radix(unread, 16).unwrap()).sum()
    }

    /// A connection that is past the hello, or was refused.
    fn connect(&self) -> Option<TcpStream> {
        let mut socket = self.open();
        socket.write_all(&hello::encode_offer(&[1])).ok()?;
        let mut answer = vec![0; hello::encode_answer(Some(hello::Version::V1), &[1], hello::SOFTWARE).len()];
        socket.read_exact(&mut answer).ok().map(|()| socket)
    }

    /// The same, once there is room.
    fn connected(&self) -> TcpStream {
        let mut socket = None;
        wait_until("a place", || {
            socket = self.connect();
            socket.is_some()
        });
        socket.unwrap()
    }

    fn open(&self) -> TcpStream {
        let socket = TcpStream::connect(&self.address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        socket.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
        socket
    }

    /// It is there for others.
    fn answers(&self) {
        wait_until("an answer", || {
            let Some(mut socket) = self.connect() else { return false };
            let list = Encoded::control(&Request::List, 1000).unwrap();
            socket.write_all(&[list.head(), list.body()].concat()).is_ok()
                && socket.read_exact(&mut [0; HEAD_BYTES]).is_ok()
        });
    }
}

/// A header of this kind that says so many bytes follow; its checksum is wrong.
fn head(kind: u8, len: u32) -> Vec<u8> {
    [&len.to_le_bytes()[..], &[kind, 0, 0, 0], &[0xab; 4]].concat()
}

#[test]
fn what_strangers_send_takes_no_memory() {
    let server = Server::start();
    // Warm: its threads, and what the first connections cost for good.
    (0..20).for_each(|_| server.answers());
    let before = server.peak();
    let grown = |what: &str, by_kib: u64| {
        server.answers();
        let now = server.peak();
        println!("{what}: {} KiB more than {before} KiB", now - before);
        assert!(now < before + by_kib, "{what}: {before} KiB before, {now} KiB after");
    };

    // Too many, all at once and over and over; those that it takes say nothing.
    for _ in 0..4 {
        let open: Vec<_> = (0..CONNECTIONS + 100).map(|_| server.open()).collect();
        drop(open);
    }
    grown("too many connections", 32 * KIB);

    // Half a hello, and half a header, of as many as there may be; a byte now and then.
    let mut slow: Vec<_> = (0..CONNECTIONS - 10).map(|_| server.connected()).collect();
    assert!(slow.len() as u64 > CONNECTIONS - 20, "{}", slow.len());
    let request = head(1, MAX_REQUEST_BYTES);
    for byte in request.iter().chain(&[b' '; 40]) {
        slow.retain_mut(|socket| socket.write_all(&[*byte]).is_ok());
    }
    drop(slow);
    // 64 KiB for the beginning of a request, 8 for what was read ahead, and the connection itself.
    grown("slow ones", CONNECTIONS * 128 + 32 * KIB);

    // Longer than any may be, of all kinds: refused by their headers, although the bytes come.
    let bytes = vec![b' '; 4 << 20];
    for kind in 0..=255u8 {
        for len in [u32::MAX, 1 << 30, MAX_REQUEST_BYTES + 1] {
            let mut socket = server.connected();
            // It may close before it has all of it.
            let _ = socket.write_all(&head(kind, len)).and_then(|()| socket.write_all(&bytes[..64 << 10]));
        }
    }
    grown("oversized frames", CONNECTIONS * 128 + 32 * KIB);

    // As long as they may be, with a wrong checksum; and good ones that are no message, or the wrong one.
    let ack = Request::Ack(Ack { disk: 0, extents: vec![Extent::new(0, 65536); 4096] });
    let no_request = Encoded::control(&vec![7; 500_000], 4 << 20).unwrap();
    let frames = [
        [head(1, MAX_REQUEST_BYTES), bytes[..MAX_REQUEST_BYTES as usize].to_vec()].concat(),
        [no_request.head(), no_request.body()].concat(),
        [head(5, 16 + 32 * 4096), vec![0; 16 + 32 * 4096]].concat(),
        [head(2, 16 + (1 << 20)), vec![0; 16 + (1 << 20)]].concat(),
        [head(7, 80 + (1 << 20)), vec![0; 80 + (1 << 20)]].concat(),
        {
            let ack = Encoded::control(&ack, MAX_REQUEST_BYTES).unwrap();
            [ack.head(), ack.body()].concat()
        },
    ];
    for _ in 0..40 {
        for frame in &frames {
            let mut socket = server.connected();
            let _ = socket.write_all(frame);
            // What it says, until it closes.
            let _ = socket.read_to_end(&mut vec![]);
        }
    }
    grown("bad frames", CONNECTIONS * 128 + 48 * KIB);

    // The worst: as many as there may be, each with all of a request but its last byte.
    let all_but_one = [head(1, MAX_REQUEST_BYTES), bytes[1..MAX_REQUEST_BYTES as usize].to_vec()].concat();
    let worst = || {
        let mut full: Vec<_> = (0..CONNECTIONS - 10).map(|_| server.connected()).collect();
        full.retain_mut(|socket| socket.write_all(&all_but_one).is_ok());
        assert!(full.len() as u64 > CONNECTIONS - 20, "{}", full.len());
        wait_until("the server to read it all", || server.unread() == 0);
    };
    let most = CONNECTIONS * (KIB + KIB / 4) + 64 * KIB;
    worst();
    grown("whole requests", most);
    // And again: what the first ones took has come back.
    worst();
    grown("whole requests again", most);
}
