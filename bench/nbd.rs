//! How fast a snapshot is read over NBD, beside `nbdcopy` of the same snapshot in the same run: `cargo bench --bench nbd`.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/nbd_help/mod.rs"]
mod nbd_help;

use std::process::Command;
use std::time::{Duration, Instant};

use common::*;
use livebackup::nbd::Address;
use nbd_help::*;

const SIZE: u64 = 1 << 30;
const ROUNDS: usize = 3;

/// Processor seconds of a process so far.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    ticks as f64 / 100.0
}

async fn drain(source: &livebackup::nbd::NbdSource, step: u64, deep: usize) {
    use futures_util::{StreamExt, stream};
    use livebackup::block::BlockSource;
    let reads = (0..SIZE).step_by(step as usize).map(|at| source.read(livebackup::extent::Extent::new(at, step)));
    let mut reads = stream::iter(reads).buffered(deep);
    while let Some(bytes) = reads.next().await {
        assert_eq!(bytes.unwrap().len() as u64, step);
    }
}

fn show(what: &str, mut took: Vec<Duration>, ours: f64, qemu: f64) {
    took.sort();
    let mib = SIZE as f64 / MIB as f64 / took[took.len() / 2].as_secs_f64();
    let per = ROUNDS as f64 * SIZE as f64 / (1u64 << 30) as f64;
    println!("{what:44} {mib:6.0} MiB/s   processor s/GiB: QEMU {:.2} reader {:.2}", qemu / per, ours / per);
}

/// A fresh QEMU for each measurement: what its memory allocator did before changes the speed by a factor of two.
fn fleece(version: Version, image: &std::path::Path) -> (Qemu, Address) {
    let mut qemu = Qemu::start_with(
        version,
        &[
            "-blockdev",
            "driver=raw,node-name=disk0,discard=unmap,file.driver=file,file.filename=DIR/disk0.raw,file.discard=unmap",
            "-device",
            "virtio-blk-pci,drive=disk0,id=vd0",
        ],
        |dir| std::fs::hard_link(image, dir.join("disk0.raw")).unwrap(),
    );
    let address = qemu.nbd_server();
    qemu.fleece();
    (qemu, address)
}

#[tokio::main]
async fn main() {
    let dir = tempdir();
    let image = dir.path().join("image");
    let mut block = vec![0; MIB as usize];
    Rng::seeded(1).fill(&mut block);
    std::fs::write(&image, block.repeat((SIZE / MIB) as usize)).unwrap();
    // (version, connections, bytes per request, MiB in flight). Twice, the second time backwards: what only the order
    // made shows.
    let mut plans = vec![];
    for version in VERSIONS {
        for (connections, request, deep) in [
            (1, MIB, 16),
            (1, MIB, 4),
            (1, MIB, 2),
            (1, 4 * K64, 2),
            (1, K64, 2),
            (1, K64, 16),
            (4, MIB, 16),
            (4, MIB, 4),
        ] {
            plans.push((version, connections, request, deep));
        }
    }
    for _ in 0..2 {
        for &(version, connections, request, deep) in &plans {
            for nbdcopy in [false, true] {
                let (qemu, address) = fleece(version, &image);
                let (mut took, ours, theirs) = (vec![], cpu_seconds(std::process::id()), cpu_seconds(qemu.pid()));
                let mut options = source_options(&address, "snap", connections, MIB);
                options.request_bytes = Some(request);
                let source = livebackup::nbd::NbdSource::open(&options).await.unwrap();
                for _ in 0..ROUNDS {
                    let started = Instant::now();
                    if nbdcopy {
                        let Address::Unix(path) = &address else { unreachable!() };
                        let requests = (deep as u64 * MIB / request / connections as u64).clamp(1, 64);
                        run(Command::new("nbdcopy").args([
                            format!("nbd+unix:///snap?socket={}", path.display()),
                            "null:".into(),
                            format!("--connections={connections}"),
                            format!("--request-size={request}"),
                            format!("--requests={requests}"),
                        ]));
                    } else {
                        drain(&source, MIB, deep).await;
                    }
                    took.push(started.elapsed());
                }
                let theirs = cpu_seconds(qemu.pid()) - theirs;
                let ours = if nbdcopy { f64::NAN } else { cpu_seconds(std::process::id()) - ours };
                let who = if nbdcopy { "nbdcopy" } else { "NbdSource" };
                let what = format!("{version:?} {connections} conn, {deep:2} MiB of {:4} KiB, {who}", request >> 10);
                show(&what, took, ours, theirs);
                source.close().await;
            }
        }
        plans.reverse();
    }
}
