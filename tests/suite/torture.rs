//! Random backups while several writers write to two disks all the time: every point that is made must be of one instant,
//! the same one for both disks. What that means is in `torture_log`.
//!
//! The writers have a monitor each and write anywhere on both disks, one write at a time or several at once (`aio_write`);
//! their regions overlap. A write is filled with its number among its writer's. After the last of them there is one more backup,
//! which must be what the disks then hold.
//!
//! `LIVEBACKUP_SEED=…` replays a run: the machine, the backups, and each writer's writes in their order. How the writers fall
//! between each other and the backups is not in it, since they are threads. `LIVEBACKUP_ROUNDS=…` makes it longer.

#![allow(clippy::unwrap_used)]

use crate::common::*;
use crate::torture_log::{BLOCK, Model, Write};

use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

const ROUNDS: usize = 5;
const WRITERS: usize = 4;
/// Size of the part of a disk where a writer works for a while.
const REGION: usize = 128 << 10;
/// Patterns of a writer: from `1 + writer * PATTERNS` on. 0 is everybody's.
const PATTERNS: usize = 63;

fn livebackup_json(state: &std::path::Path, args: &[&str]) -> Value {
    let text = run(livebackup().arg("--json").arg("--state").arg(state).args(args));
    if text.trim().is_empty() {
        Value::Null
    } else {
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }
}

/// What the writers share.
struct Shared {
    version: Version,
    paths: [&'static str; 2],
    sizes: [usize; 2],
    /// Whether the second disk belongs to an I/O thread. Such a disk gets no `aio_write`: QEMU 7.2 hung with `aio_write` and
    /// `aio_flush` on it.
    iothread: bool,
    clock: AtomicU64,
    end: AtomicBool,
    pause_us: AtomicU64,
}

impl Shared {
    fn step(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }
}

/// Stops of the machine and resumptions that this monitor has told of.
fn stops(monitor: &Qmp) -> (u64, u64) {
    let count = |name: &str| monitor.events.iter().filter(|event| event["event"] == name).count() as u64;
    (count("STOP"), count("RESUME"))
}

struct Writer<'a> {
    shared: &'a Shared,
    number: usize,
    monitor: Qmp,
    rng: Rng,
    /// Where it writes, modulo the disk.
    region: usize,
    log: Vec<Write>,
}

impl Writer<'_> {
    fn qemu_io(&mut self, disk: usize, command: &str) {
        let line = format!("qemu-io -d {} \"{command}\"", self.shared.paths[disk]);
        let said = self.monitor.call("human-monitor-command", json!({"command-line": line}));
        assert!(said.as_str().unwrap().is_empty(), "{line}: {said}");
    }

    /// A write. Of one that does not wait it is not known when it is complete.
    fn begin(&mut self, waits: bool) {
        let (rng, shared) = (&mut self.rng, self.shared);
        let disk = rng.below(2) as usize;
        let how = if waits || disk == 1 && shared.iothread { "write" } else { "aio_write" };
        // One in eight into a part where all of them meet; else into a region of the writer's, which moves on now and then:
        // so that a backup does not need all of a disk.
        let size = shared.sizes[disk];
        if self.log.len().is_multiple_of(32) {
            self.region = rng.next() as usize;
        }
        let region = if rng.below(8) == 0 { 0 } else { self.region % (size - REGION) / BLOCK * BLOCK };
        let offset = region + rng.below((REGION / BLOCK) as u64) as usize * BLOCK;
        let longest = if rng.below(8) == 0 { 400 } else { 16 };
        let len = ((1 + rng.below(longest)) as usize * BLOCK).min(size - offset);
        let pattern = if rng.below(16) == 0 { 0 } else { 1 + self.number * PATTERNS + self.log.len() % PATTERNS } as u8;
        let zeroes = pattern == 0 && shared.version == Version::V10;
        let what = if zeroes { "-z".to_owned() } else { format!("-P {pattern}") };
        let begun = shared.step();
        self.qemu_io(disk, &format!("{how} -q {what} {offset} {len}"));
        let (stops, resumes) = stops(&self.monitor);
        let in_stop = stops > resumes;
        let writer = self.number;
        self.log.push(Write { writer, disk, offset, len, pattern, begun, done: u64::MAX, stops, in_stop });
        self.stand_still();
    }

    /// As long as the machine does.
    fn stand_still(&mut self) {
        while let (stops, resumes) = stops(&self.monitor)
            && stops > resumes
        {
            std::thread::sleep(Duration::from_millis(1));
            self.monitor.call("query-status", json!({}));
        }
    }

    /// Waits for what is under way, where that is safe: `aio_flush` drains all disks, as `stop` does, from which QEMU 10 may
    /// never come back while an export is read. There a stop is the end of what was under way.
    fn waits_for_all(&mut self) -> bool {
        let is_safe = self.shared.version == Version::V7 && !self.shared.iothread;
        if is_safe {
            self.qemu_io(0, "aio_flush");
        }
        is_safe
    }

    fn write(mut self) -> Vec<Write> {
        while !self.shared.end.load(Ordering::SeqCst) {
            let first = self.log.len();
            let waits = self.rng.below(4) > 0;
            (0..if waits { 1 } else { 1 + self.rng.below(6) }).for_each(|_| self.begin(waits));
            if waits || self.waits_for_all() {
                let done = self.shared.step();
                self.log[first..].iter_mut().for_each(|write| write.done = done);
            }
            std::thread::sleep(Duration::from_micros(self.shared.pause_us.load(Ordering::SeqCst)));
        }
        self.log
    }
}

/// A point that was made, in one of these stops of the machine.
struct Made {
    id: String,
    /// The backup's own report, for a failure.
    report: Value,
    stops: std::ops::RangeInclusive<u64>,
}

/// A machine with a raw disk of QEMU's main loop and a qcow2 disk there or in an I/O thread, and monitors for the writers and
/// for one who counts.
fn start(version: Version, iothread: bool, sizes: [usize; 2]) -> (Qemu, Vec<Qmp>) {
    let controller = if iothread { "virtio-scsi-pci,id=s0,iothread=io0" } else { "virtio-scsi-pci,id=s0" };
    let mut args = vec!["-name", "vm1", "-object", "iothread,id=io0", "-device", controller];
    for (disk, device) in [
        ("driver=raw,node-name=disk0,file.filename=DIR/0.raw", "virtio-blk-pci,drive=disk0,id=vd0"),
        ("driver=qcow2,node-name=disk1,file.filename=DIR/1.qcow2", "scsi-hd,drive=disk1,id=vd1,bus=s0.0"),
    ] {
        args.extend(["-blockdev", disk, "-device", device]);
    }
    let unmap = |arg: &str| match arg.contains("node-name") {
        true => format!("{arg},discard=unmap,file.driver=file,file.discard=unmap"),
        false => arg.to_owned(),
    };
    let mut args: Vec<_> = args.into_iter().map(unmap).collect();
    for number in 0..=WRITERS {
        args.extend(["-qmp".to_owned(), format!("unix:DIR/writer{number},server=on,wait=off")]);
    }
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let mut qemu = Qemu::start_with(version, &args, |dir| {
        std::fs::File::create(dir.join("0.raw")).unwrap().set_len(sizes[0] as u64).unwrap();
        let mut create = Command::new(version.program("qemu-img"));
        run(create.args(["create", "-q", "-f", "qcow2"]).arg(dir.join("1.qcow2")).arg(sizes[1].to_string()));
    });
    qemu.qmp("cont", json!({}));
    // The machine has not been stopped since: all of them count from here.
    let monitors = (0..=WRITERS).map(|number| Qmp::connect(&qemu.path(&format!("writer{number}")))).collect();
    (qemu, monitors)
}

/// What the disks hold, by QEMU's own tools, when nobody writes.
fn contents(qemu: &mut Qemu, shared: &Shared) -> [Vec<u8>; 2] {
    shared.paths.iter().for_each(|path| qemu.qemu_io(path, "flush"));
    let (raw, qcow2, copy) = (qemu.path("0.raw"), qemu.path("1.qcow2"), qemu.path("1.copy"));
    let mut convert = Command::new(qemu.version.program("qemu-img"));
    run(convert.args(["convert", "-U", "-f", "qcow2", "-O", "raw"]).args([&qcow2, &copy]));
    [raw, copy].map(|path| std::fs::read(path).unwrap())
}

fn torture(version: Version, transport: &str) {
    let mut rng = Rng::new();
    let rounds = std::env::var("LIVEBACKUP_ROUNDS").map_or(ROUNDS, |r| r.parse().expect("a number"));
    let raw = (6 << 20) + 65536 * rng.below(20) + 512 * rng.below(128);
    let sizes = [raw, (6 << 20) + 65536 * rng.below(20)].map(|size| size as usize);
    let chunk = ["64KiB", "128KiB", "1MiB"][rng.below(3) as usize];
    // A disk of an I/O thread is not read over NBD from this QEMU, which would not survive it.
    let iothread = (version, transport) != (Version::V7, "nbd") && rng.below(2) == 0;
    let (mut qemu, mut monitors) = start(version, iothread, sizes);
    let mut counter = monitors.pop().unwrap();
    let (state, repo) = (qemu.path("state"), qemu.path("repo").to_str().unwrap().to_owned());
    let (source, dir) = (format!("qmp:{}", qemu.socket().display()), qemu.path("restored"));
    livebackup_json(&state, &["init", &repo, "--chunk-size", chunk]);

    let paths = ["/machine/peripheral/vd0/virtio-backend", "/machine/peripheral/vd1"];
    let (clock, pause_us) = Default::default();
    let shared = Shared { version, paths, sizes, iothread, clock, end: AtomicBool::new(false), pause_us };
    let mut made = vec![];
    let mut back_up = |level: &str| {
        let mut count = || {
            counter.call("query-status", json!({}));
            stops(&counter).0
        };
        let before = count();
        let report = livebackup_json(&state, &["--transport", transport, "backup", &source, &repo, "--level", level]);
        let id = report["point"].as_str().unwrap_or_else(|| panic!("{report}")).to_owned();
        made.push(Made { id, report, stops: before + 1..=count() });
    };
    let writes = std::thread::scope(|threads| {
        // Also if a backup fails.
        let _end = EndWhenDropped(&shared.end);
        let start = |(number, monitor)| {
            let writer =
                Writer { shared: &shared, number, monitor, rng: Rng::seeded(rng.next()), region: 0, log: vec![] };
            threads.spawn(|| writer.write())
        };
        let writers: Vec<_> = monitors.into_iter().enumerate().map(start).collect();
        for round in 0..rounds {
            shared.pause_us.store(rng.below(3) * 3000, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(rng.below(60)));
            let levels = ["auto", "auto", "incremental", "differential", "full", "copy"];
            back_up(if round == 0 { "auto" } else { levels[rng.below(6) as usize] });
        }
        shared.end.store(true, Ordering::SeqCst);
        writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect::<Vec<_>>()
    });
    back_up("auto");
    assert!(qemu.alive() && qemu.nodes().iter().all(|n| !n.contains("livebackup")));
    let held = contents(&mut qemu, &shared);

    let (count, in_stop) = (writes.len(), writes.iter().filter(|write| write.in_stop).count());
    let mut model = Model::new(sizes, writes);
    let mut images = held.clone();
    for (round, Made { id, report, stops }) in made.iter().enumerate() {
        livebackup_json(&state, &["restore", &repo, &format!("vm1@{id}"), dir.to_str().unwrap(), "--force"]);
        images = ["vd0.raw", "vd1.raw"].map(|name| std::fs::read(dir.join(name)).unwrap());
        if let Err(why) = model.check(images.each_ref().map(Vec::as_slice), stops.clone()) {
            panic!("round {round}, point {id}: of no instant (chunk {chunk}, sizes {sizes:?})\n{why}\n{report}");
        }
    }
    // Nobody wrote during the last one.
    assert!(images == held, "the last point is not what the disks hold");
    let disputed = model.disputed();
    println!(
        "{rounds} rounds, {count} writes, {in_stop} into a stop, {disputed} disputed blocks, {version:?} over {transport}, \
         I/O thread {iothread}: every point is of one instant"
    );
}

struct EndWhenDropped<'a>(&'a AtomicBool);

impl Drop for EndWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Writes of a block each, as (disk, block, pattern, begun, done, stops, in a stop).
fn model(writes: &[(usize, usize, u8, u64, u64, u64, bool)]) -> Model {
    let write = |&(disk, block, pattern, begun, done, stops, in_stop)| {
        let (offset, len) = (block * BLOCK, BLOCK);
        Write { writer: 0, disk, offset, len, pattern, begun, done, stops, in_stop }
    };
    Model::new([1024, 512], writes.iter().map(write).collect())
}

#[test]
fn the_check_can_fail() {
    let image = |patterns: &[u8]| patterns.iter().flat_map(|p| vec![*p; BLOCK]).collect::<Vec<_>>();
    let holds =
        |model: &mut Model, a: [u8; 2], b: u8, stop: u64| model.check([&image(&a), &image(&[b])], stop..=stop).is_ok();
    // Before the first stop, a write to each disk, one after the other; another before the second.
    let ordered = [(0, 0, 1, 0, 1, 0, false), (1, 0, 2, 2, 3, 0, false), (0, 1, 3, 4, 5, 1, false)];
    for (a, b, expected) in
        [([1, 0], 2, true), ([1, 0], 0, false), ([0, 0], 2, false), ([1, 3], 2, false), ([1, 0], 7, false)]
    {
        assert_eq!(holds(&mut model(&ordered), a, b, 1), expected, "{a:?} {b}");
    }
    assert!(holds(&mut model(&ordered), [1, 3], 2, 2) && !holds(&mut model(&ordered), [1, 0], 2, 2));
    let of_either = model(&ordered).check([&image(&[1, 0]), &image(&[2])], 1..=2);
    assert_eq!(of_either, Ok(1));
    let of_none = model(&ordered).check([&image(&[1, 0]), &image(&[2])], std::ops::RangeInclusive::new(1, 0));
    assert!(of_none.is_err(), "no stop at all");
    // Two writes to a machine that stands still: whole or not at all, and in their order on one disk.
    let in_stop = [(0, 0, 1, 0, 1, 1, true), (0, 1, 2, 2, 3, 1, true), (1, 0, 3, 4, 5, 1, true)];
    for (a, b, expected) in
        [([0, 0], 0, true), ([0, 0], 3, true), ([1, 0], 3, true), ([1, 2], 0, true), ([0, 2], 0, false)]
    {
        assert_eq!(holds(&mut model(&in_stop), a, b, 1), expected, "{a:?} {b}");
    }
    // Two at once to the same block: either, but always the same one.
    let at_once = [(0, 0, 1, 0, 3, 0, false), (0, 0, 2, 1, 4, 0, false), (0, 1, 5, 6, 7, 1, false)];
    for (first, then, expected) in
        [(1, 1, true), (2, 2, true), (1, 2, false), (2, 1, false), (0, 0, false), (5, 5, false)]
    {
        let mut model = model(&at_once);
        let both = holds(&mut model, [first, 0], 0, 1) && holds(&mut model, [then, 5], 0, 2);
        assert_eq!(both, expected, "{first} {then}");
    }
    // One after the other to the same block: the later one. A stop between is an order too.
    for second in [(0, 0, 2, 2, 3, 0, false), (0, 0, 2, 1, 3, 1, false)] {
        let first = (0, 0, 1, 0, if second.5 == 0 { 1 } else { 9 }, 0, false);
        let mut model = model(&[first, second]);
        assert!(!holds(&mut model, [1, 0], 0, 2) && holds(&mut model, [2, 0], 0, 2));
    }
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

#[test]
fn qemu_7_nbd() {
    torture(Version::V7, "nbd");
}
