//! Random backups while somebody writes all the time: every point that is made must equal the disk after some number of
//! the writes, between those done before the backup began and those done when it ended.
//!
//! `LIVEBACKUP_SEED=…` replays a run; `LIVEBACKUP_ROUNDS=…` makes it longer.

#![allow(clippy::unwrap_used)]

mod common;
use common::*;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

const PATH: &str = "/machine/peripheral/vd0/virtio-backend";
const BLOCK: usize = 512;

#[derive(Clone, Copy)]
struct Write {
    offset: u64,
    len: u64,
    pattern: u8,
}

/// A point that was made, with the numbers of writes done before it began and when it had ended.
struct Made {
    id: String,
    /// The backup's own report, for a failure.
    report: Value,
    from: usize,
    to: usize,
}

fn livebackup_json(state: &std::path::Path, args: &[&str]) -> Value {
    let text = run(livebackup().arg("--json").arg("--state").arg(state).args(args));
    if text.trim().is_empty() {
        Value::Null
    } else {
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }
}

/// Whether `image` is the disk after `n` writes for some `n` in `from..=to`.
fn is_an_instant(image: &[u8], writes: &[Write], size: usize, from: usize, to: usize) -> bool {
    let mut model = vec![0; size];
    let apply = |model: &mut [u8], w: &Write| model[w.offset as usize..(w.offset + w.len) as usize].fill(w.pattern);
    writes[..from].iter().for_each(|w| apply(&mut model, w));
    let blocks = size / BLOCK;
    let differs = |model: &[u8], b: usize| model[b * BLOCK..(b + 1) * BLOCK] != image[b * BLOCK..(b + 1) * BLOCK];
    let mut wrong: Vec<bool> = (0..blocks).map(|b| differs(&model, b)).collect();
    let mut count = wrong.iter().filter(|w| **w).count();
    for n in from..=to {
        if count == 0 {
            return true;
        }
        let Some(w) = writes.get(n).filter(|_| n < to) else { break };
        apply(&mut model, w);
        for (b, was) in wrong.iter_mut().enumerate().skip(w.offset as usize / BLOCK).take(w.len as usize / BLOCK) {
            let now = differs(&model, b);
            count = count + usize::from(now) - usize::from(*was);
            *was = now;
        }
    }
    count == 0
}

/// For a failure: what differs from the disk after `from` writes and after `to` writes, in blocks.
fn differences(image: &[u8], writes: &[Write], size: usize, from: usize, to: usize) -> String {
    let mut out = String::new();
    for n in [from, to] {
        let mut model = vec![0; size];
        writes[..n].iter().for_each(|w| model[w.offset as usize..(w.offset + w.len) as usize].fill(w.pattern));
        let wrong =
            (0..size / BLOCK).filter(|b| model[b * BLOCK..(b + 1) * BLOCK] != image[b * BLOCK..(b + 1) * BLOCK]);
        let list: Vec<_> = wrong.map(|b| format!("{}:{}", b * BLOCK, image[b * BLOCK])).collect();
        out += &format!("against {n} writes {} blocks differ: {}\n", list.len(), list[..list.len().min(40)].join(" "));
    }
    for (n, w) in writes.iter().enumerate().take(to + 1).skip(from.saturating_sub(3)) {
        out += &format!("write {n}: {}..{} {}\n", w.offset, w.offset + w.len, w.pattern);
    }
    out
}

#[test]
fn the_check_can_fail() {
    let writes = [Write { offset: 0, len: 512, pattern: 1 }, Write { offset: 512, len: 512, pattern: 2 }];
    let image = |a: u8, b: u8| [vec![a; 512], vec![b; 512]].concat();
    for (a, b, expected) in [(0, 0, true), (1, 0, true), (1, 2, true), (0, 2, false), (1, 3, false)] {
        assert_eq!(is_an_instant(&image(a, b), &writes, 1024, 0, 2), expected, "{a} {b}");
    }
    assert!(!is_an_instant(&image(0, 0), &writes, 1024, 1, 2));
}

fn torture(version: Version, transport: &str) {
    let mut rng = Rng::new();
    let rounds = std::env::var("LIVEBACKUP_ROUNDS").map_or(14, |r| r.parse().expect("a number"));
    let size = (3 << 20) + 65536 * rng.below(20) + 512 * rng.below(128);
    let disk =
        "driver=raw,node-name=disk0,discard=unmap,file.driver=file,file.filename=DIR/disk0.raw,file.discard=unmap";
    let args = ["-name", "vm1", "-blockdev", disk, "-device", "virtio-blk-pci,drive=disk0,id=vd0"];
    let mut qemu = Qemu::start_with(version, &args, |dir| {
        std::fs::File::create(dir.join("disk0.raw")).unwrap().set_len(size).unwrap();
    });
    qemu.qmp("cont", json!({}));
    let (state, repo) = (qemu.path("state"), qemu.path("repo").to_str().unwrap().to_owned());
    let source = format!("qmp:{}", qemu.socket().display());
    let dir = qemu.path("restored");
    let chunk = ["64KiB", "128KiB", "1MiB"][rng.below(3) as usize];
    livebackup_json(&state, &["init", &repo, "--chunk-size", chunk]);

    let log: Arc<Mutex<Vec<Write>>> = Arc::default();
    let (stop, pace) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let seed = rng.next();
    let writer = {
        let (log, stop, pace) = (log.clone(), stop.clone(), pace.clone());
        std::thread::spawn(move || {
            let mut rng = Rng::seeded(seed);
            while !stop.load(Ordering::SeqCst) {
                let offset = rng.below(size / 512) * 512;
                let longest = if rng.below(4) == 0 { 400 } else { 16 };
                let len = ((1 + rng.below(longest)) * 512).min(size - offset);
                let pattern = rng.below(256) as u8;
                // Known before it is done: a write that is under way when a backup ends may be in it or not.
                log.lock().unwrap().push(Write { offset, len, pattern });
                let zeroes = pattern == 0 && version == Version::V10;
                let write = if zeroes {
                    format!("write -z {offset} {len}")
                } else {
                    format!("write -P {pattern} {offset} {len}")
                };
                qemu.qemu_io(PATH, &write);
                std::thread::sleep(std::time::Duration::from_micros(pace.load(Ordering::SeqCst)));
            }
            qemu
        })
    };
    let mut made = vec![];
    for round in 0..rounds {
        pace.store(rng.below(3) * 3000, Ordering::SeqCst);
        std::thread::sleep(std::time::Duration::from_millis(rng.below(60)));
        let level = if round == 0 {
            "auto"
        } else {
            ["auto", "auto", "incremental", "differential", "full", "copy"][rng.below(6) as usize]
        };
        let from = log.lock().unwrap().len().saturating_sub(1);
        let report = livebackup_json(&state, &["--transport", transport, "backup", &source, &repo, "--level", level]);
        let to = log.lock().unwrap().len();
        let id = report["point"].as_str().unwrap_or_else(|| panic!("{report}")).to_owned();
        made.push(Made { id, report, from, to });
    }
    stop.store(true, Ordering::SeqCst);
    let mut qemu = writer.join().unwrap();
    assert!(qemu.alive());
    let writes = log.lock().unwrap().clone();
    for (round, Made { id, report, from, to }) in made.iter().enumerate() {
        livebackup_json(&state, &["restore", &repo, &format!("vm1@{id}"), dir.to_str().unwrap(), "--force"]);
        let image = std::fs::read(dir.join("vd0.raw")).unwrap();
        assert_eq!(image.len() as u64, size);
        assert!(
            is_an_instant(&image, &writes, size as usize, *from, *to),
            "round {round}, point {id}: not the disk after {from} to {to} writes (chunk {chunk}, size {size})\n{}\n{report}",
            differences(&image, &writes, size as usize, *from, *to)
        );
    }
    assert!(qemu.nodes().iter().all(|n| !n.contains("livebackup")));
    println!("{rounds} rounds, {} writes, {:?} over {transport}: every point is an instant", writes.len(), version);
}

#[test]
fn qemu_10_vhost() {
    torture(Version::V10, "vhost");
}

#[test]
fn qemu_10_nbd() {
    torture(Version::V10, "nbd");
}

#[test]
fn qemu_7_vhost() {
    torture(Version::V7, "vhost");
}
