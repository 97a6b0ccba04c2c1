//! How fast a mapped restore point is read, beside the repository's own reader and `qemu-nbd` of an equal qcow2 image.
//!
//! `cargo bench --bench map -- [MIB] [DIR]`: a disk of MIB of half-compressible data (default 1024), stored with zstd and
//! as it is, below DIR (default: the system's directory for temporary files). Sequential: all of it, three times in turn,
//! medians; "reader" is what a restore reads with, into nothing; nbdcopy copies into nothing. Small: our own client, one
//! read at a time, 64 KiB in the order of the disk and 4 KiB here and there. All sources are in the page cache, or are
//! read past it, alike.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use livebackup::extent::Extent;
use livebackup::nbd::{Address, Client, ConnectOptions, Wanted, connect};
use livebackup::repo::{Compression, ReadOptions, RepoError};
use livebackup::units::{KIB, MIB};

#[allow(dead_code)]
mod common;
#[path = "common/point.rs"]
mod point;
use point::backup;

const ROUNDS: usize = 3;
const SMALL_READS: u64 = 4000;

/// A server on a socket; ended when dropped.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn map(repo: &Path, socket: &Path) -> Served {
    let mut command = Command::new(env!("CARGO_BIN_EXE_livebackup"));
    command.arg("map").arg(repo).args(["vm", "--json", "--socket"]).arg(socket).stdout(Stdio::piped());
    let mut child = command.spawn().expect("livebackup runs");
    let said = child.stdout.take().map(BufReader::new).expect("a pipe").lines().next();
    assert!(said.is_some_and(|line| line.is_ok()), "the map says what it serves");
    Served(child)
}

fn qemu_nbd(image: &Path, socket: &Path) -> Served {
    let mut command = Command::new("qemu-nbd");
    command.args(["-t", "-r", "-e", "8", "-f", "qcow2", "-k"]).arg(socket).arg(image);
    let child = command.spawn().expect("qemu-nbd (package qemu-utils) runs");
    let begun = Instant::now();
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(20), "qemu-nbd listens");
        std::thread::sleep(Duration::from_millis(10));
    }
    Served(child)
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status();
    assert!(status.expect("qemu-utils and libnbd-bin are installed").success(), "{program} {arguments:?}");
}

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

async fn small_reads(client: &Client, read: impl Fn(u64) -> Extent) -> Duration {
    let begun = Instant::now();
    for n in 0..SMALL_READS {
        client.read(read(n)).await.expect("a read");
    }
    begun.elapsed()
}

fn main() {
    let mut args = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let mib: u64 = args.next().and_then(|a| a.parse().ok()).unwrap_or(1024);
    let base = args.next().map_or_else(std::env::temp_dir, Into::into);
    let dir = tempfile::tempdir_in(&base).expect("a directory");
    let path = |name: &str| dir.path().join(name);
    let stored = [("raw", Compression::None), ("zstd", Compression::Zstd(1))].map(|(name, compression)| {
        (name, backup(&path(name), compression, mib, mib * MIB), path(&format!("{name}.sock")))
    });
    let maps = stored.each_ref().map(|(name, _, socket)| map(&path(name), socket));
    let (image, qemu_socket) = (path("qcow2"), path("qemu.sock"));
    run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "qcow2", &uri(&stored[0].2), image.to_str().expect("a plain path")],
    );
    run("sync", &[]);
    let qemu = qemu_nbd(&image, &qemu_socket);

    let mut ways: Vec<(String, Box<dyn Fn() + '_>)> = vec![];
    for (name, (repo, point), socket) in &stored {
        let (reader, image) = (repo.reader().expect("reader"), point.disks[0].image);
        let read = move || {
            let into_nothing = |_: u64, _: &[u8]| Ok::<(), RepoError>(());
            reader.read_image(image, &ReadOptions::default(), into_nothing).expect("read");
        };
        ways.push((format!("reader, {name}"), Box::new(read)));
        ways.push((format!("map, {name}: nbdcopy"), Box::new(move || run("nbdcopy", &[&uri(socket), "null:"]))));
    }
    ways.push(("qemu-nbd, qcow2: nbdcopy".to_owned(), Box::new(|| run("nbdcopy", &[&uri(&qemu_socket), "null:"]))));
    let mut rounds = vec![vec![]; ways.len()];
    for _ in 0..ROUNDS {
        for ((_, way), took) in ways.iter().zip(&mut rounds) {
            let begun = Instant::now();
            way();
            took.push(begun.elapsed().as_secs_f64());
        }
    }
    println!("{mib} MiB; medians of {ROUNDS}");
    for ((label, _), took) in ways.iter().zip(rounds) {
        println!("{label:28} {:7.0} MiB/s", mib as f64 / median(took));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let sockets = [("map, raw", &stored[0].2), ("map, zstd", &stored[1].2), ("qemu-nbd, qcow2", &qemu_socket)];
    for (label, socket) in sockets {
        let (sequential, random) = runtime.block_on(async {
            let address = Address::Unix(socket.clone());
            let client = connect(&address, &Wanted::default(), &ConnectOptions::default()).await.expect("connects");
            let blocks = mib * MIB / (64 * KIB);
            let in_order = small_reads(&client, |n| Extent::new(n % blocks * 64 * KIB, 64 * KIB)).await;
            let pages = mib * MIB / (4 * KIB);
            let about = |n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % pages * 4 * KIB;
            let here_and_there = small_reads(&client, |n| Extent::new(about(n), 4 * KIB)).await;
            client.close().await;
            (in_order.as_secs_f64(), here_and_there.as_secs_f64())
        });
        let rate = (SMALL_READS * 64 * KIB) as f64 / MIB as f64 / sequential;
        let each = random * 1e6 / SMALL_READS as f64;
        println!("{label:28} {rate:7.0} MiB/s by 64 KiB, one at a time; {each:6.0} µs for 4 KiB somewhere");
    }
    drop((maps, qemu));
}
