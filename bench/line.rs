//! The wire as a whole, beside what it can be at best in the same run: `cargo bench --bench line`. Figures: [WIRE.md](WIRE.md).
//!
//! * **data**: a QEMU's disk in the page cache, read by `livebackup serve` and taken by a client that acknowledges it and drops
//!   it, over loopback TCP, plain and with TLS; beside our own NBD client reading the same snapshot, and without a connection.
//! * **line**: the protocol alone over an emulated line of [`LINE_BYTES_PER_S`], some delay and some loss, over 1, 2, 4 and 8
//!   connections, beside as many plain sockets. The line is two tun devices, each in a network namespace of its own, and this
//!   program between them: the kernel's own TCP on both sides, real packets of 1500 bytes, and a router's queue of one
//!   bandwidth-delay product that drops what does not fit. Needs root (`ip netns`). `LIVEBACKUP_BENCH_LINE=50,50/1` measures
//!   only these lines (milliseconds, percent of loss); `LIVEBACKUP_BENCH_CONGESTION=cubic` has the senders use that congestion
//!   control.
//! * **many**: 64 idle and 8 active clients of one server process, and the most memory that it has had.
//!
//! `LIVEBACKUP_BENCH_ONLY=WORD` measures only one of them.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "line/link.rs"]
mod link;
#[path = "../tests/nbd_help/mod.rs"]
mod nbd_help;
#[path = "../tests/wire_begun/mod.rs"]
mod wire_begun;

use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::*;
use futures_util::{StreamExt, stream};
use link::{LINE_BYTES_PER_S, Link};
use livebackup::block::BlockSource;
use livebackup::extent::Extent;
use livebackup::pki::{Authority, Purpose};
use livebackup::vm::{Vm, VmOptions};
use livebackup::wire::message::*;
use livebackup::wire::packing::{How, Wanted};
use livebackup::wire::tls::Connector;
use livebackup::wire::trunk::Trunks;
use livebackup::wire::{Address, Answer, Client, Common, Stream, Timing, serve_with};
use nbd_help::source_options;
use nix::libc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use wire_begun::begun;

const MIB: u64 = 1 << 20;
const DATA_BYTES: u64 = 1 << 30;
const ROUNDS: usize = 5;
const CHUNK: u32 = 128 << 10;
/// What goes over a line is counted between these: slow starts are over then.
const LINE_SECONDS: (u64, u64) = (1, 5);
/// Lines: milliseconds of a round trip, packets of a hundred that are lost.
const LINES: [(u64, u64); 5] = [(0, 0), (10, 0), (50, 0), (10, 1), (50, 1)];
const LINE_ROUNDS: usize = 3;
/// More than any line carries.
const LINE_DISK_BYTES: u64 = 1 << 50;

#[tokio::main]
async fn main() {
    let words: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = words.iter().skip(1).map(String::as_str).filter(|word| *word != "--bench").collect();
    match words[..] {
        ["serve", address] => return serve_line(address).await,
        ["take", address, what] => return take_line(address, what).await,
        _ => {}
    }
    let only = std::env::var("LIVEBACKUP_BENCH_ONLY").unwrap_or_default();
    println!("load before: {}", std::fs::read_to_string("/proc/loadavg").unwrap().trim());
    if "data".contains(&only) {
        data().await;
    }
    if "line".contains(&only) {
        tokio::task::block_in_place(line);
    }
    if "many".contains(&only) {
        many().await;
    }
    println!("load after: {}", std::fs::read_to_string("/proc/loadavg").unwrap().trim());
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn bar(what: &str, value: f64, bar: f64, at_least: bool) {
    let met = if at_least { value >= bar } else { value <= bar };
    let (word, how) = (if met { "met    " } else { "NOT MET" }, if at_least { "at least" } else { "at most" });
    println!("{word}  {what}: {value:.2} ({how} {bar:.2})");
}

/// A QEMU whose disk holds what does not compress.
fn qemu(version: Version, bytes: u64) -> Qemu {
    let qemu = Qemu::with_raw_disk(version, bytes);
    let mut random = std::fs::File::open("/dev/urandom").unwrap().take(bytes);
    std::io::copy(&mut random, &mut std::fs::File::create(qemu.path("disk0.raw")).unwrap()).unwrap();
    qemu
}

/// A `livebackup serve` process.
struct Serve {
    child: Child,
    address: String,
    home: tempfile::TempDir,
    tls: bool,
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Serve {
    fn start(monitors: &[PathBuf], tls: bool) -> Serve {
        let home = tempfile::tempdir().unwrap();
        let mut text = format!(
            "listen = \"127.0.0.1:0\"\nmax_sessions = 16\nstate = \"{}\"\n",
            home.path().join("state").display()
        );
        if tls {
            let pki = home.path().join("pki");
            Authority::init(&pki, "bench", 100).unwrap();
            let pki = Authority::open(&pki).unwrap();
            pki.issue("server", &Purpose::Server(vec!["127.0.0.1".into()]), 50, false).unwrap();
            pki.issue("client", &Purpose::Client, 50, false).unwrap();
            let dir = home.path().join("pki/bundle/server");
            text += &format!("[tls]\ndir = \"{}\"\n[[client]]\nname = \"client\"\nvms = [\"*\"]\n", dir.display());
        }
        for (n, monitor) in monitors.iter().enumerate() {
            text += &format!("[[vm]]\nname = \"vm{n}\"\nmonitor = \"qmp:{}\"\n", monitor.display());
        }
        let (config, log) = (home.path().join("serve.toml"), home.path().join("serve.log"));
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
        Serve { child, address: address.unwrap(), home, tls }
    }

    async fn connect(&self) -> Client {
        match self.tls {
            false => Client::connect(&Address::Tcp(self.address.clone())).await.unwrap(),
            true => {
                let tls = Connector::open(&self.home.path().join("pki/bundle/client")).unwrap();
                Client::connect_tls(&self.address, &tls, Timing::default()).await.unwrap()
            }
        }
    }

    fn peak_mib(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
    }
}

fn begin(vm: &str, how: How) -> Begin {
    let compression = (how != How::None).then_some(Wanted { how: Some(how), level: 1 });
    Begin { vm: vm.into(), chunk_bytes: CHUNK, wait: true, compression, ..Begin::default() }
}

/// Takes a session, acknowledges it, and drops it. Gives the bytes of the disk.
async fn drain(session: Session) -> u64 {
    let taken = Arc::new(AtomicU64::new(0));
    drain_counting(session, taken.clone()).await;
    taken.load(Ordering::Relaxed)
}

async fn drain_counting(mut session: Session, taken: Arc<AtomicU64>) {
    while let Some(event) = session.events.recv().await {
        let (disk, extent) = match event.expect("the session goes well") {
            Event::Data { disk, offset_bytes, bytes } => (disk, Extent::new(offset_bytes, bytes.len() as u64)),
            Event::Packed { disk, offset_bytes, packed } => (disk, Extent::new(offset_bytes, packed.raw_len().into())),
            Event::Zero { disk, extent } => (disk, extent),
            _ => continue,
        };
        taken.fetch_add(extent.len_bytes, Ordering::Relaxed);
        // Refused once the end has arrived behind the events that still wait here.
        let _ = session.acks.send(Ack { disk, extents: vec![extent] });
    }
}

fn rate(start: Instant, bytes: u64) -> f64 {
    bytes as f64 / MIB as f64 / start.elapsed().as_secs_f64()
}

async fn data() {
    println!("\ndata: {} MiB of a disk in the page cache, medians of {ROUNDS} rounds in turn", DATA_BYTES / MIB);
    let version = Version::V10;
    let vms = [qemu(version, DATA_BYTES), qemu(version, DATA_BYTES), qemu(version, DATA_BYTES)];
    let mut nbd_vm = qemu(version, DATA_BYTES);
    let servers = [Serve::start(&[vms[0].socket()], false), Serve::start(&[vms[1].socket()], true)];
    let options = VmOptions { state: vms[2].path("state"), name: Some("vm0".into()), ..VmOptions::default() };
    let here = Vm::attach(&vms[2].socket().to_str().unwrap().parse().unwrap(), options).await.unwrap();
    let address = nbd_vm.nbd_server();
    nbd_vm.fleece();
    let mut rates = vec![vec![]; 5];
    for round in 0..ROUNDS {
        for n in (0..5).map(|n| (n + round) % 5) {
            rates[n].push(match n {
                0 | 1 => {
                    let session = servers[n].connect().await.begin(begin("vm0", How::None)).await.unwrap();
                    let start = Instant::now();
                    assert_eq!(drain(session).await, DATA_BYTES);
                    rate(start, DATA_BYTES)
                }
                2 => {
                    let session = here.begin(begin("vm0", How::None)).await.unwrap();
                    let start = Instant::now();
                    assert_eq!(drain(session).await, DATA_BYTES);
                    let rate = rate(start, DATA_BYTES);
                    here.idle().await;
                    rate
                }
                _ => {
                    let (connections, request) = if n == 3 { (2, 64 << 10) } else { (4, MIB) };
                    let mut options = source_options(&address, "snap", connections, MIB);
                    options.request_bytes = Some(request);
                    let source = livebackup::nbd::NbdSource::open(&options).await.unwrap();
                    let start = Instant::now();
                    let reads = (0..DATA_BYTES).step_by(MIB as usize).map(|at| source.read(Extent::new(at, MIB)));
                    let mut reads = stream::iter(reads).buffered(12);
                    while let Some(bytes) = reads.next().await {
                        assert_eq!(bytes.unwrap().len() as u64, MIB);
                    }
                    let rate = rate(start, DATA_BYTES);
                    drop(reads);
                    source.close().await;
                    rate
                }
            });
        }
    }
    let names = ["loopback TCP", "loopback TCP, TLS", "in one process", "NBD only, 2 x 64 KiB", "NBD only, 4 x 1 MiB"];
    let medians: Vec<_> = rates.into_iter().map(median).collect();
    names.iter().zip(&medians).for_each(|(name, rate)| println!("{name:<28}{rate:>8.0} MiB/s"));
    bar("plain beside the better NBD", medians[0] / medians[3].max(medians[4]), 0.9, true);
    bar("TLS beside plain", medians[1] / medians[0], 0.6, true);
}

/// Measures all ways over each line, in turn.
fn line() {
    let Some(devices) = link::devices() else {
        println!("\nline: not measured: it needs root, `ip` and /dev/net/tun");
        return;
    };
    let full = LINE_BYTES_PER_S as f64 / MIB as f64;
    let congestion = congestion().unwrap_or_else(|| {
        std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap().trim().to_owned()
    });
    println!("\nline: {full:.0} MiB/s, {congestion}; MiB of the disk a second, medians of {LINE_ROUNDS}");
    let only = std::env::var("LIVEBACKUP_BENCH_LINE").unwrap_or_default();
    for (round_trip_ms, loss) in LINES {
        let name = if loss == 0 { round_trip_ms.to_string() } else { format!("{round_trip_ms}/{loss}") };
        if !only.is_empty() && !only.split(',').any(|word| word == name) {
            continue;
        }
        let link = Link::up(&devices, Duration::from_millis(round_trip_ms), loss);
        let mut ways: Vec<_> = [1, 2, 4, 8].iter().flat_map(|n| [format!("plain:{n}"), format!("none:{n}")]).collect();
        if loss == 0 {
            ways.extend(["zstd:1".to_owned(), "auto:1".to_owned()]);
        }
        let mut rates = vec![vec![]; ways.len()];
        for round in 0..LINE_ROUNDS {
            for n in (0..ways.len()).map(|n| (n + round) % ways.len()) {
                rates[n].push(link.measure(&ways[n]));
            }
        }
        let rates: Vec<_> = rates.into_iter().map(median).collect();
        let all: Vec<_> = ways.iter().zip(&rates).map(|(way, rate)| format!("{way} {rate:.1}")).collect();
        println!("{round_trip_ms:>3} ms, {loss} % lost: {}; dropped {}", all.join(", "), link.dropped());
        if name == "50" {
            bar("at 50 ms beside the line", rates[1] / full, 0.8, true);
        }
    }
}

/// The congestion control that is asked for.
fn congestion() -> Option<String> {
    std::env::var("LIVEBACKUP_BENCH_CONGESTION").ok()
}

/// The server's end of a line: sessions, or plain bytes to who asks for them by one byte.
async fn serve_line(address: &str) {
    let listener = TcpListener::bind(address).await.unwrap();
    if let Some(name) = congestion() {
        // Its connections have it from the listener.
        // SAFETY: the descriptor is open, and the kernel reads so many bytes of the name during the call.
        let set = unsafe {
            let (level, option, len) = (libc::IPPROTO_TCP, libc::TCP_CONGESTION, name.len() as u32);
            libc::setsockopt(listener.as_raw_fd(), level, option, name.as_ptr().cast(), len)
        };
        assert_eq!(set, 0, "{name}: {}", std::io::Error::last_os_error());
    }
    println!("ready");
    let trunks = Trunks::default();
    loop {
        let (mut socket, _) = listener.accept().await.unwrap();
        let common = Common { trunks: trunks.of("line".into()), ..Common::default() };
        tokio::spawn(async move {
            let mut first = [0];
            socket.peek(&mut first).await.unwrap();
            if first == *b"p" {
                let bytes = source(1 << 20);
                for piece in bytes.iter().cycle() {
                    if socket.write_all(piece).await.is_err() {
                        return;
                    }
                }
            }
            let stream = Stream::tcp(socket).unwrap();
            let _ = serve_with(stream, Timing::default(), common, |_| async { Ok(Answer::Session(sidecar())) }).await;
        });
    }
}

/// The client's end: prints MiB of the disk a second. What is asked for is a way and a number of connections.
async fn take_line(address: &str, what: &str) {
    let (how, connections) = what.split_once(':').unwrap();
    let connections: u32 = connections.parse().unwrap();
    let taken = Arc::new(AtomicU64::new(0));
    let count = taken.clone();
    if how == "plain" {
        for _ in 0..connections {
            let (mut socket, count) = (TcpStream::connect(address).await.unwrap(), count.clone());
            socket.write_all(b"p").await.unwrap();
            tokio::spawn(async move {
                let mut buffer = vec![0; 1 << 20];
                while let Ok(n @ 1..) = socket.read(&mut buffer).await {
                    count.fetch_add(n as u64, Ordering::Relaxed);
                }
            });
        }
    } else {
        let client = Client::connect(&Address::Tcp(address.to_owned())).await.unwrap();
        let begin = Begin { connections: Some(connections), ..begin("vm", how.parse().unwrap()) };
        let session = client.begin(begin).await.unwrap();
        tokio::spawn(drain_counting(session, count));
    }
    tokio::time::sleep(Duration::from_secs(LINE_SECONDS.0)).await;
    let (start, before) = (Instant::now(), taken.load(Ordering::Relaxed));
    tokio::time::sleep(Duration::from_secs(LINE_SECONDS.1 - LINE_SECONDS.0)).await;
    println!("{}", rate(start, taken.load(Ordering::Relaxed) - before));
    std::process::exit(0);
}

/// Bytes that compress by about half.
fn source(len: usize) -> Vec<Bytes> {
    let piece = |n: u64| {
        let mut bytes = vec![0; len];
        let mut rng = Rng::seeded(n + 1);
        bytes.chunks_mut(1024).step_by(2).for_each(|some| rng.fill(some));
        bytes.into()
    };
    (0..16).map(piece).collect()
}

fn sidecar() -> Session {
    let (to_client, events) = mpsc::channel(4);
    let (acks, mut acked) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let bytes = source(MIB as usize);
        for (n, bytes) in bytes.iter().cycle().enumerate() {
            let event = Event::Data { disk: 0, offset_bytes: n as u64 * MIB, bytes: bytes.clone() };
            if to_client.send(Ok(event)).await.is_err() {
                return;
            }
            while acked.try_recv().is_ok() {}
        }
    });
    Session { begun: begun(&[LINE_DISK_BYTES]), events, acks, digests: None, lasting: None }
}

async fn many() {
    const ACTIVE: usize = 8;
    const IDLE: usize = 64;
    println!("\nmany: {IDLE} idle and {ACTIVE} active clients, disks of 256 MiB");
    let vms: Vec<_> = (0..ACTIVE).map(|_| qemu(Version::V10, 256 * MIB)).collect();
    let monitors: Vec<_> = vms.iter().map(Qemu::socket).collect();
    // Without TLS: a server takes few connections of one certificate.
    for (what, how) in [("plain", How::None), ("zstd", How::Zstd)] {
        let server = Serve::start(&monitors, false);
        let mut idle = vec![];
        while idle.len() < IDLE {
            let mut client = server.connect().await;
            client.request(Request::List).await.unwrap();
            idle.push(client);
        }
        let before = server.peak_mib();
        // All begin before any is read.
        let mut sessions = vec![];
        for n in 0..ACTIVE {
            sessions.push(server.connect().await.begin(begin(&format!("vm{n}"), how)).await.unwrap());
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        let start = Instant::now();
        let taken = futures_util::future::join_all(sessions.into_iter().map(drain)).await;
        let (all, rate) = (taken.iter().sum::<u64>(), rate(start, taken.iter().sum()));
        assert_eq!(all, ACTIVE as u64 * 256 * MIB);
        println!("{what:<12} {before:>6.0} MiB idle, then {rate:>6.0} MiB/s in all");
        bar(&format!("memory of the server, {what}, MiB"), server.peak_mib(), 300.0, false);
        drop(idle);
        stop(server);
    }
}

/// Ends a server so that another may have its VMs.
fn stop(mut server: Serve) {
    let pid = nix::unistd::Pid::from_raw(server.child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    server.child.wait().unwrap();
}

/// This program again, in a network namespace.
fn in_namespace(namespace: &str, words: &[&str]) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", namespace]).arg(own_path()).args(words);
    command
}

fn own_path() -> PathBuf {
    Path::new("/proc/self/exe").read_link().unwrap()
}
