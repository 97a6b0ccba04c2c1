//! What the repository costs: ingest, scattered incrementals, restore, verify, by chunk size and compression.
//!
//! `cargo bench --bench repo -- [MIB] [DIR]`: MIB of half-compressible data (default 2048) in a repository below DIR
//! (default: the system's directory for temporary files, which must not be in memory for the figures to mean anything).

use std::path::{Path, PathBuf};
use std::time::Instant;

use bytes::Bytes;
use livebackup::repo::{Compression, Image, ReadOptions, RepoError, Repository, WriterOptions};
use livebackup::units::{GIB, KIB, MIB};
use nix::sys::resource::UsageWho;

mod common;
use common::{fill, peak_mib, processor_seconds};

struct Line {
    label: String,
    bytes: u64,
    seconds: f64,
    processor: (f64, f64),
    stored: u64,
}

impl Line {
    fn print(&self) {
        let gib = self.bytes as f64 / GIB as f64;
        println!(
            "{:<28} {:>7.0} MiB/s  processor s/GiB {:>5.2} ({:.2} + {:.2} kernel) {:>8.1} MiB stored ({:>5.1} %)",
            self.label,
            self.bytes as f64 / MIB as f64 / self.seconds,
            (self.processor.0 + self.processor.1) / gib,
            self.processor.0 / gib,
            self.processor.1 / gib,
            self.stored as f64 / MIB as f64,
            self.stored as f64 * 100.0 / self.bytes as f64,
        );
    }
}

fn stored(dir: &Path) -> u64 {
    let dirs = std::fs::read_dir(dir.join("packs")).expect("packs are there");
    let packs = dirs.flat_map(|d| std::fs::read_dir(d.expect("listed").path()).expect("listed"));
    packs.map(|p| p.expect("listed").metadata().expect("stat").len()).sum()
}

fn measure<T>(label: String, bytes: u64, dir: &Path, run: impl FnOnce() -> T) -> T {
    let (before, processor, start) = (stored(dir), processor_seconds(UsageWho::RUSAGE_SELF), Instant::now());
    let result = run();
    let (seconds, after) = (start.elapsed().as_secs_f64(), processor_seconds(UsageWho::RUSAGE_SELF));
    let processor = (after.0 - processor.0, after.1 - processor.1);
    Line { label, bytes, seconds, processor, stored: stored(dir) - before }.print();
    result
}

fn ingest(repo: &Repository, options: WriterOptions, chunk: u32, data: &[Bytes]) -> Image {
    let writer = repo.writer(options).expect("writer");
    let disk = writer.disk(data.len() as u64 * MIB, chunk, None).expect("disk");
    for (i, piece) in data.iter().enumerate() {
        writer.put_blocking(disk, i as u64 * MIB, piece.clone()).expect("put");
    }
    writer.finish().expect("finish").disks[0].image
}

fn main() {
    let mut args = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let mib: u64 = args.next().and_then(|a| a.parse().ok()).unwrap_or(2048);
    let base = args.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let mut all = vec![0; (mib * MIB) as usize];
    for (i, piece) in all.chunks_mut(MIB as usize).enumerate() {
        fill(i as u64 + 1, piece);
    }
    let all = Bytes::from(all);
    let data: Vec<_> = (0..mib).map(|i| all.slice((i * MIB) as usize..((i + 1) * MIB) as usize)).collect();
    println!("{mib} MiB in memory; peak so far {} MiB", peak_mib());
    let chunks: Vec<u64> = match std::env::var("CHUNK_KIB").ok().and_then(|c| c.parse::<u64>().ok()) {
        Some(kib) => vec![kib * KIB],
        None => vec![64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, MIB],
    };
    for compression in [Compression::None, Compression::Zstd(1)] {
        for chunk in chunks.iter().copied() {
            let dir = tempfile::tempdir_in(&base).expect("a directory");
            let repo = Repository::init(dir.path(), chunk as u32).expect("init");
            let options = WriterOptions { compression, ..WriterOptions::default() };
            let name = |what: &str| format!("{what} {compression:?} {} KiB", chunk / KIB);
            // Makes the peak start again from what is in use now.
            let _ = std::fs::write("/proc/self/clear_refs", "5");
            let image = measure(name("full"), mib * MIB, dir.path(), || ingest(&repo, options, chunk as u32, &data));
            let bytes = mib * MIB;
            measure(name("read"), bytes, dir.path(), || {
                let reader = repo.reader().expect("reader");
                reader.read_image::<RepoError>(image, &ReadOptions::default(), |_, _| Ok(())).expect("read")
            });
            println!("{:<28} {} MiB of memory at most beside the data", "", peak_mib().saturating_sub(mib));
            incremental(&repo, options, chunk, image, &all, dir.path(), &name("1600 x 4 KiB"));
        }
    }
}

/// 1,600 writes of 4 KiB, each in another granule: what is read and stored are the chunks around them.
fn incremental(
    repo: &Repository,
    options: WriterOptions,
    chunk: u64,
    base: Image,
    all: &Bytes,
    dir: &Path,
    label: &str,
) {
    let step = (all.len() as u64 / 1600 / (64 * KIB)).max(1) * 64 * KIB;
    let mut chunks: Vec<(u64, Vec<u8>)> = Vec::new();
    for i in 0..1600 {
        let write = (i * step).min(all.len() as u64 - 64 * KIB) + 8 * KIB;
        let offset = write / chunk * chunk;
        if chunks.last().is_none_or(|(last, _)| *last != offset) {
            chunks.push((offset, all[offset as usize..(offset + chunk) as usize].to_vec()));
        }
        if let Some((_, bytes)) = chunks.last_mut() {
            let at = (write - offset) as usize;
            fill(1_000_000 + i, &mut bytes[at..at + 4096]);
        }
    }
    measure(label.to_owned(), chunks.len() as u64 * chunk, dir, || {
        let writer = repo.writer(options).expect("writer");
        let disk = writer.disk(base.size_bytes, chunk as u32, Some(base)).expect("disk");
        for (offset, bytes) in chunks {
            writer.put_blocking(disk, offset, Bytes::from(bytes)).expect("put");
        }
        writer.finish().expect("finish")
    });
}
