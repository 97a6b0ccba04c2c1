//! How fast a snapshot is read over vhost-user-blk, beside `nbdcopy` of the same snapshot in the same run.
//!
//! 1 GiB in the page cache, both QEMU versions (`LIVEBACKUP_BENCH_MIB` for another size): MiB/s and processor seconds per
//! GiB, of QEMU and of the reader. 16 reads at once, medians of three. Build with `cargo bench --bench vhost`.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/vhost_fixture/mod.rs"]
mod vhost_fixture;

use std::process::{Command, Stdio};
use std::time::Instant;

use common::{VERSIONS, Version};
use futures_util::StreamExt;
use livebackup::block::{BlockSource, SourceRules};
use livebackup::extent::Extent;
use livebackup::vhost::VhostSource;
use serde_json::json;
use vhost_fixture::{Device, Fleece, KIB, MIB, rules};

/// What one pass over the disk cost.
#[derive(Clone, Copy)]
struct Cost {
    seconds: f64,
    qemu: f64,
    reader: f64,
}

/// Processor seconds that a process has used.
fn processor_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    ticks as f64 / 100.0
}

/// Processor seconds of this process and of the children that it has waited for.
fn own_seconds() -> f64 {
    let of = |who| {
        let usage = nix::sys::resource::getrusage(who).unwrap();
        let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
        seconds(usage.user_time()) + seconds(usage.system_time())
    };
    of(nix::sys::resource::UsageWho::RUSAGE_SELF) + of(nix::sys::resource::UsageWho::RUSAGE_CHILDREN)
}

fn measure(qemu: u32, work: impl Fn()) -> Cost {
    let mut runs: Vec<_> = (0..3)
        .map(|_| {
            let (start, qemu_before, own_before) = (Instant::now(), processor_seconds(qemu), own_seconds());
            work();
            Cost {
                seconds: start.elapsed().as_secs_f64(),
                qemu: processor_seconds(qemu) - qemu_before,
                reader: own_seconds() - own_before,
            }
        })
        .collect();
    runs.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    runs[1]
}

fn report(what: &str, size: u64, cost: Cost) {
    let gib = size as f64 / (1 << 30) as f64;
    println!(
        "  {what:<28} {:>7.0} MiB/s   processor s/GiB: QEMU {:.2}, reader {:.2}",
        size as f64 / MIB as f64 / cost.seconds,
        cost.qemu / gib,
        cost.reader / gib
    );
}

async fn read_all(source: &VhostSource, len: u64) {
    let whole = Extent::new(0, source.size_bytes());
    let mut reads = futures_util::stream::iter(whole.split_at_multiples(len).map(|e| source.read(e))).buffered(16);
    while let Some(got) = reads.next().await {
        std::hint::black_box(got.unwrap());
    }
}

fn main() {
    let size = std::env::var("LIVEBACKUP_BENCH_MIB").map_or(1024, |t| t.parse::<u64>().unwrap()) * MIB;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    for version in VERSIONS {
        let mut fleece = Fleece::open(version, Device::Blk, size);
        println!("QEMU {}, {} MiB", if version == Version::V7 { "7.2" } else { "10.0" }, size / MIB);
        let pid = fleece.qemu.pid();
        let rules = SourceRules { in_flight_bytes: 16 * MIB, ..rules(version) };
        let source = VhostSource::connect(&fleece.socket(), size, rules).unwrap();
        runtime.block_on(read_all(&source, MIB));
        for len in [MIB, 256 * KIB, 64 * KIB] {
            let cost = measure(pid, || runtime.block_on(read_all(&source, len)));
            report(&format!("vhost-user, {} KiB reads", len / KIB), size, cost);
        }
        runtime.block_on(source.close()).unwrap();

        let socket = fleece.qemu.path("nbd.sock");
        fleece.qemu.qmp("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
        let export = json!({"id": "n0", "type": "nbd", "node-name": "snap", "name": "snap"});
        fleece.qemu.qmp("block-export-add", export);
        let uri = format!("nbd+unix:///snap?socket={}", socket.display());
        for (len, connections) in [(MIB, 1), (MIB, 4), (256 * KIB, 4), (64 * KIB, 4)] {
            // Beyond the boundary this version answers wrongly, so nobody may read like that.
            if len > rules.boundary_bytes {
                continue;
            }
            let cost = measure(pid, || {
                let mut command = Command::new("nbdcopy");
                command.args([&format!("--request-size={len}"), &format!("--connections={connections}")]);
                command.args(["--requests=16", &uri, "null:"]).stdin(Stdio::null());
                let status = command.status().expect("nbdcopy runs (Debian: libnbd-bin)");
                assert!(status.success(), "{command:?}: {status}");
            });
            report(&format!("nbdcopy, {} KiB, {connections} conn.", len / KIB), size, cost);
        }
    }
}
