//! What a restore costs, beside `qemu-img convert` of an equal qcow2 image to raw.
//!
//! `cargo bench --bench restore -- [MIB] [DIR]`: a disk of MIB of half-compressible data (default 2048) and half as many
//! zeroes behind, below DIR (default: the system's directory for temporary files, which must not be in memory for the
//! figures to mean anything). Every way is measured to its end with the data on the storage, three times in turn, and the
//! medians are printed; `qemu-img` does not flush, so it is followed by a `sync` of the file, and its time without that
//! is printed too. The sources (packs, qcow2) are in the page cache for all alike.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use livebackup::repo::{Compression, Manifest, Repository};
use livebackup::restore::{Format, RestoreOptions, restore};
use livebackup::units::MIB;
use nix::sys::resource::UsageWho;

mod common;
#[path = "common/point.rs"]
mod point;
use common::peak_mib;
use point::backup;

const ROUNDS: usize = 3;

fn processor_seconds(who: UsageWho) -> f64 {
    let (ours, kernel) = common::processor_seconds(who);
    ours + kernel
}

struct Way<'a> {
    label: &'a str,
    run: Box<dyn FnMut() -> Vec<f64> + 'a>,
    /// Seconds to the storage, seconds without the flush (if known), processor seconds.
    rounds: Vec<Vec<f64>>,
}

fn median(rounds: &[Vec<f64>], column: usize) -> Option<f64> {
    let mut values: Vec<_> = rounds.iter().filter_map(|round| round.get(column).copied()).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn main() {
    let mut args = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let mib: u64 = args.next().and_then(|a| a.parse().ok()).unwrap_or(2048);
    let base = args.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = tempfile::tempdir_in(&base).expect("a directory");
    let path = |name: &str| dir.path().join(name);
    let raw = backup(&path("raw"), Compression::None, mib, mib * MIB * 3 / 2);
    let zstd = backup(&path("zstd"), Compression::Zstd(1), mib, mib * MIB * 3 / 2);
    let (source, converted) = (path("source.qcow2"), path("converted.raw"));

    let restoring = |(repo, point): &(Repository, Manifest), format, compare| {
        let out = path("out");
        let options = RestoreOptions { format, compare, ..RestoreOptions::new(&out) };
        let (begun, before) = (Instant::now(), processor_seconds(UsageWho::RUSAGE_SELF));
        restore(repo, point, &options, &AtomicBool::new(false), &mut |_| {}).expect("restore");
        let took = [begun.elapsed().as_secs_f64(), f64::NAN, processor_seconds(UsageWho::RUSAGE_SELF) - before];
        std::fs::remove_dir_all(out).expect("remove");
        took.to_vec()
    };
    let qemu_img = |arguments: &[&str]| {
        let status = Command::new("qemu-img").args(arguments).status().expect("qemu-img (package qemu-utils) runs");
        assert!(status.success(), "qemu-img {arguments:?}");
    };
    let [source_text, converted_text] = [&source, &converted].map(|p| p.to_str().expect("a plain path").to_owned());

    // The source of qemu-img: the same disk, as qemu-img writes it.
    let first = RestoreOptions::new(path("first"));
    restore(&raw.0, &raw.1, &first, &AtomicBool::new(false), &mut |_| {}).expect("restore");
    let peak = peak_mib();
    let first_text = path("first/disk.raw").to_str().expect("a plain path").to_owned();
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &first_text, &source_text]);
    std::fs::remove_dir_all(path("first")).expect("remove");
    Command::new("sync").arg("-f").arg(&source).status().expect("sync runs");

    let convert = || {
        let (begun, before) = (Instant::now(), processor_seconds(UsageWho::RUSAGE_CHILDREN));
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &source_text, &converted_text]);
        let without_flush = begun.elapsed().as_secs_f64();
        std::fs::File::open(&converted).and_then(|f| f.sync_all()).expect("sync");
        let took = begun.elapsed().as_secs_f64();
        let processor = processor_seconds(UsageWho::RUSAGE_CHILDREN) - before;
        assert!(std::fs::metadata(&converted).expect("stat").blocks() * 512 >= mib * MIB);
        std::fs::remove_file(&converted).expect("remove");
        vec![took, without_flush, processor]
    };
    let way = |label, run| Way { label, run, rounds: Vec::new() };
    let mut ways: Vec<Way> = vec![
        way("qemu-img convert to raw", Box::new(convert)),
        way("restore raw", Box::new(|| restoring(&raw, Format::Raw, false))),
        way("restore raw, zstd", Box::new(|| restoring(&zstd, Format::Raw, false))),
        way("restore qcow2, zstd", Box::new(|| restoring(&zstd, Format::Qcow2, false))),
        way("restore raw, compare", Box::new(|| restoring(&raw, Format::Raw, true))),
        way("restore qcow2, compare", Box::new(|| restoring(&raw, Format::Qcow2, true))),
    ];
    for _ in 0..ROUNDS {
        for way in &mut ways {
            let took = (way.run)();
            way.rounds.push(took);
        }
    }
    println!(
        "{mib} MiB of data, {} MiB of zeroes; medians of {ROUNDS}; peak memory of the first restore {peak} MiB",
        mib / 2
    );
    let reference = median(&ways[0].rounds, 0).unwrap_or(f64::NAN);
    for way in &ways {
        let column = |n| median(&way.rounds, n).unwrap_or(f64::NAN);
        let rate = |seconds: f64| mib as f64 / seconds;
        print!(
            "{:<26} {:>6.0} MiB/s on the storage ({:.2} x qemu-img), processor {:>5.2} s/GiB",
            way.label,
            rate(column(0)),
            reference / column(0),
            column(2) * 1024.0 / mib as f64,
        );
        match column(1) {
            without if without.is_nan() => println!(),
            without => println!("; {:.0} MiB/s without the flush", rate(without)),
        }
    }
}
