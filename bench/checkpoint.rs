//! Bitmaps of a 1 TiB disk (16 Mi granules, 2 MiB) and a log of 1,000 checkpoints: `cargo bench --bench checkpoint`.
//! Medians, in milliseconds.

use std::hint::black_box;
use std::time::Instant;

use jiff::Timestamp;
use livebackup::checkpoint::format::{self, Content};
use livebackup::checkpoint::{Bitmap, EpochStart, Limits, Log, QemuInstance, Sealed};
use livebackup::extent::Extent;
use livebackup::units::{CheckpointId, EpochId, GIB, GRANULE_BYTES, MIB};

const SIZE_BYTES: u64 = 1024 * GIB;
const GRANULES: u64 = SIZE_BYTES / GRANULE_BYTES;

fn main() {
    let mut sparse = Bitmap::new(SIZE_BYTES);
    (0..1000).for_each(|n| sparse.set(Extent::new(n * (SIZE_BYTES / 1000), 1)));
    let mut scattered = Bitmap::new(SIZE_BYTES);
    let mut state = 1u64;
    for _ in 0..GRANULES / 10 {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        scattered.set(Extent::new((state >> 24) % GRANULES * GRANULE_BYTES, 1));
    }
    for (name, bitmap) in [("1,000 granules", &sparse), ("10 % at random", &scattered)] {
        println!("\n1 TiB, {name}");
        report("set all", || Bitmap::full(SIZE_BYTES).count_granules());
        report("count", || bitmap.count_bytes());
        report("clone and union", || bitmap.clone().union_with(&scattered).is_ok());
        report("clone and round out to 1 MiB", || bitmap.clone().round_out(MIB));
        report("clone and round out to 16 MiB", || bitmap.clone().round_out(16 * MIB));
        report("extents", || bitmap.extents().count());
        let content = Content {
            id: CheckpointId::random(),
            prev: None,
            epoch: EpochId::random(),
            number: 1,
            time: Timestamp::now(),
            covers: &[],
            bitmap,
        };
        report("encode", || content.encode().expect("encode"));
        let (header, file) = content.encode().expect("encode");
        report(&format!("decode ({} bytes)", header.file_bytes()), || format::decode(&file).expect("decode"));
    }

    for (name, scattered) in [("1,000 granules", None), ("1 % at random", Some(GRANULES / 100))] {
        let dir = tempfile::tempdir().expect("directory");
        let mut log = Log::open(dir.path()).expect("open");
        let first = CheckpointId::random();
        let qemu = QemuInstance { pid: 1, start_time: 1, boot_id: "boot".into() };
        let (id, time, node) = (EpochId::random(), Timestamp::now(), "node".to_owned());
        log.begin_epoch(EpochStart { id, first, time, size_bytes: SIZE_BYTES, qemu, node, medium: None }, "first")
            .expect("begin");
        let mut prev = first;
        let mut slowest = 0f64;
        for number in 2..=1000 {
            let id = CheckpointId::random();
            let mut changed = sparse.clone();
            if let Some(writes) = scattered {
                changed = Bitmap::new(SIZE_BYTES);
                for _ in 0..writes {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    changed.set(Extent::new((state >> 24) % GRANULES * GRANULE_BYTES, 1));
                }
            }
            let start = Instant::now();
            log.seal(Sealed { id, prev: Some(prev), number, time, bitmap: &changed }).expect("seal");
            slowest = slowest.max(start.elapsed().as_secs_f64() * 1e3);
            prev = id;
        }
        println!("\na log of 1,000 checkpoints of 1 TiB, each with {name}");
        let bytes: u64 = log.checkpoints().iter().map(|h| h.file_bytes()).sum();
        println!("  {:<32}{:>10}", "files", log.checkpoints().len());
        println!("  {:<32}{:>10.1}", "MiB on disk", bytes as f64 / MIB as f64);
        println!("  {:<32}{slowest:>10.3}", "slowest seal");
        report("open", || Log::open(dir.path()).expect("open").checkpoints().len());
        report("since the first", || log.since(first).expect("since").count_granules());
        if scattered.is_some() {
            report("merge two", || {
                let files = log.checkpoints().len() - 1;
                log.merge_old(Limits { files, bytes: u64::MAX }).expect("merge")
            });
        }
    }
}

fn report<T>(what: &str, mut run: impl FnMut() -> T) {
    let mut times: Vec<f64> = (0..11)
        .map(|_| {
            let start = Instant::now();
            black_box(run());
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    println!("  {what:<32}{:>10.3}", times[times.len() / 2]);
}
