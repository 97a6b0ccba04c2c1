//! Areas that are left out, on real QEMUs of both versions: swap by partition table and signature, whole disks of swap, named
//! partitions and byte ranges; switched on and off between fulls, incrementals and scans, with all that can be audited. The
//! oracles are the bytes that the test wrote, `sfdisk`, `mkswap`, and what `blkid` says of a restored disk.

#![allow(clippy::unwrap_used)]

use std::process::Command;

use crate::common::partitioned::*;
use crate::common::side::*;
use crate::common::*;
use serde_json::{Value, json};

const CHUNK: u64 = 128 << 10;
const UUID: &str = "12345678-9abc-def0-1234-56789abcdef0";
/// The swap partition of [`GPT`]: not at a chunk's edge.
const SWAP: (u64, u64) = (2100 * 512, 5000 * 512);
const GPT: &str =
    "label: gpt\nstart=2100, size=5000, type=S, name=\"swap\"\nstart=8192, size=3000, type=L, name=\"root\"\n";
const SKIP: [&str; 3] = ["--skip-swap", "--audit", "100"];
const ALL: [&str; 2] = ["--audit", "100"];

/// The whole chunks within, without the header's page.
fn whole_chunks((start, len): (u64, u64)) -> (u64, u64) {
    ((start + 4096).next_multiple_of(CHUNK), (start + len) / CHUNK * CHUNK)
}

fn machine(version: Version, script: &str) -> Side {
    let mut side = Side::new(version);
    let image = side.path("vd0.raw");
    partition(&image, script, &[]);
    side.models[0] = std::fs::read(&image).unwrap();
    side
}

/// Bytes that the guest writes.
fn write_bytes(side: &mut Side, disk: usize, offset: u64, bytes: &[u8]) {
    let file = side.home.path().join("pattern");
    std::fs::write(&file, bytes).unwrap();
    side.models[disk][offset as usize..][..bytes.len()].copy_from_slice(bytes);
    let path = format!("/machine/peripheral/{}/virtio-backend", DISKS[disk].0);
    side.qemu().qemu_io(&path, &format!("write -s {} {offset} {}", file.display(), bytes.len()));
}

/// A backup with these options, of which the point must be what the guest wrote but for these ranges of the disks, which are
/// zero in it.
fn backup(side: &mut Side, options: &[&str], zero: &[(usize, (u64, u64))]) -> Value {
    let (source, repo) = (side.source(), side.repo().to_str().unwrap().to_owned());
    let report = side.ok(&[&["backup", &source, &repo], options].concat());
    let models = side.models.clone();
    for (disk, (from, to)) in zero {
        side.models[*disk][*from as usize..*to as usize].fill(0);
    }
    side.prove("latest");
    side.models = models;
    report
}

fn taken(report: &Value, disk: usize) -> &str {
    report["disks"][disk]["taken"].as_str().unwrap()
}

fn read_bytes(report: &Value, disk: usize) -> u64 {
    report["disks"][disk]["read_bytes"].as_u64().unwrap()
}

/// (what, from, to) of all that a disk's report says to have been left out.
fn left_out(report: &Value, disk: usize) -> Vec<(String, u64, u64)> {
    let areas = report["disks"][disk]["areas"]["areas"].as_array().cloned().unwrap_or_default();
    let number = |area: &Value, name: &str| area["left_out"][name].as_u64().unwrap();
    let one = |area: &Value| {
        let from = number(area, "offset_bytes");
        (area["what"].as_str().unwrap().to_owned(), from, from + number(area, "len_bytes"))
    };
    areas.iter().map(one).collect()
}

fn kept(report: &Value, disk: usize) -> String {
    report["disks"][disk]["areas"]["kept"].to_string()
}

/// Our bitmaps, removed behind our back.
fn break_tracking(side: &mut Side) {
    for (node, name) in side.qemu().bitmaps() {
        if name.contains("-since-") {
            side.qemu().qmp("block-dirty-bitmap-remove", json!({"node": node, "name": name}));
        }
    }
}

/// Writes into swap and beside it: not everywhere, and not the same each time.
fn work(side: &mut Side, rng: &mut Rng) {
    for (start, len) in [SWAP, (8192 * 512, 3000 * 512)] {
        for _ in 0..3 {
            // The chunk of swap's header is left alone.
            let offset = start + CHUNK + rng.below((len - CHUNK) / 512 - 300) * 512;
            side.write_at(0, offset, 512 * (1 + rng.below(200)), 1 + rng.below(255) as u8);
        }
    }
    side.write_at(1, rng.below(SIZE / 512) * 512, 512, 1 + rng.below(255) as u8);
}

fn points(side: &Side) -> u64 {
    let repo = side.repo();
    side.ok(&["verify", repo.to_str().unwrap()])["points"].as_u64().unwrap_or_default()
}

#[test]
fn swap_is_left_out_as_long_as_that_is_wanted() {
    for version in VERSIONS {
        let mut rng = Rng::new();
        let mut side = machine(version, GPT);
        side.start();
        write_bytes(&mut side, 0, SWAP.0, &swap_header(SWAP.1, 4096, "swap0", UUID));
        side.write_at(0, SWAP.0 + 4096, SWAP.1 - 4096, 0x51);
        side.write_at(0, 8192 * 512, 3000 * 512, 0x11);
        let out = whole_chunks(SWAP);
        let expected = vec![("swap".to_owned(), out.0, out.1)];
        let zero = [(0, out)];

        let full = backup(&mut side, &SKIP, &zero);
        assert_eq!((taken(&full, 0), left_out(&full, 0)), ("full", expected.clone()), "{full}");
        assert_eq!(read_bytes(&full, 0), SIZE - (out.1 - out.0), "{full}");
        assert_eq!(left_out(&full, 1), []);
        // A machine that boots from it finds its swap.
        let restored = side.home.path().join("restored/vd0.raw");
        let blkid = run(Command::new("blkid").args(["-p", "-O", &SWAP.0.to_string()]).arg(&restored));
        assert!(blkid.contains(UUID) && blkid.contains("swap0") && blkid.contains("TYPE=\"swap\""), "{blkid}");
        assert_eq!(partitions(&restored).len(), 2);

        for _ in 0..3 {
            work(&mut side, &mut rng);
            let some = backup(&mut side, &SKIP, &zero);
            assert_eq!((taken(&some, 0), left_out(&some, 0)), ("incremental", expected.clone()), "{some}");
            // The partition beside it, at most, and the header's chunk and what is audited: nothing of swap.
            assert!(read_bytes(&some, 0) <= SIZE - (out.1 - out.0), "{some}");
        }
        // Switched off: what was not stored is needed, written since or not.
        work(&mut side, &mut rng);
        let off = backup(&mut side, &ALL, &[]);
        assert_eq!((taken(&off, 0), left_out(&off, 0)), ("incremental", vec![]), "{off}");
        assert!(read_bytes(&off, 0) >= out.1 - out.0, "{off}");
        // Now that all is there, little is needed, and all of it can be audited.
        let mut same = 0;
        for pattern in [0x77, 0x78] {
            side.write_at(0, SWAP.0 + (1 << 20), 512, pattern);
            let little = backup(&mut side, &ALL, &[]);
            assert_eq!((taken(&little, 0), left_out(&little, 0)), ("incremental", vec![]), "{little}");
            same += little["disks"][0]["same_bytes"].as_u64().unwrap();
        }
        assert!(same > 0, "a round may end with one of them, and not with both");
        // On again. Where to look was forgotten with the point in between: the partition table says it, and the header is not
        // among what is read. So this one takes what was written, and the next one knows.
        work(&mut side, &mut rng);
        let on = backup(&mut side, &["--skip-swap", "--audit", "0"], &[]);
        assert_eq!((taken(&on, 0), left_out(&on, 0)), ("incremental", vec![]), "{on}");
        assert!(kept(&on, 0).contains("the next backup looks there"), "{on}");
        work(&mut side, &mut rng);
        let again = backup(&mut side, &SKIP, &zero);
        assert_eq!((taken(&again, 0), left_out(&again, 0)), ("incremental", expected.clone()), "{again}");

        // Scans, in each state: what is compared is what the point has.
        for options in [&SKIP[..], &ALL, &SKIP, &SKIP] {
            work(&mut side, &mut rng);
            break_tracking(&mut side);
            let skips = options.len() > 2;
            let scan = backup(&mut side, options, if skips { &zero } else { &[] });
            assert_eq!((taken(&scan, 0), left_out(&scan, 0).len()), ("scan", usize::from(skips)), "{scan}");
        }
        // A point since which nothing is lacking, and a differential since one that lacks: the newest full.
        work(&mut side, &mut rng);
        let whole = backup(&mut side, &["--level", "differential", "--audit", "100"], &[]);
        assert_eq!((taken(&whole, 0), left_out(&whole, 0)), ("scan", vec![]), "its epoch is over: {whole}");

        // What is there instead of swap is kept, whoever wrote it: the area, and what it left behind.
        let full = backup(&mut side, &[&SKIP[..], &["--level", "full"]].concat(), &zero);
        assert_eq!(left_out(&full, 0), expected);
        side.write_at(0, SWAP.0, 4096, 0);
        let gone = backup(&mut side, &SKIP, &[]);
        assert_eq!((taken(&gone, 0), left_out(&gone, 0)), ("incremental", vec![]), "{gone}");
        assert!(kept(&gone, 0).contains("holds no swap area"), "{gone}");
        let point = gone["point"].as_str().unwrap();
        assert!(points(&side) > 10);
        let shown = side.ok(&["show", side.repo().to_str().unwrap(), &format!("vm1@{point}")]);
        assert_eq!(shown["disks"][0]["areas"]["areas"].as_array().unwrap().len(), 0);
        assert!(side.qemu().alive());
    }
}

#[test]
fn disks_of_swap_logical_partitions_and_named_areas() {
    const MBR: &str = "label: dos\nlabel-id: 0xabcd0123\nstart=2048, size=1024, type=83\nstart=3072, size=9000, type=5\n\
        start=4096, size=2500, type=82\nstart=7000, size=2048, type=83\n";
    let (swap, scratch, bytes) = ((4096 * 512, 2500 * 512), (7000 * 512, 2048 * 512), (5 << 20, 512 << 10));
    for version in VERSIONS {
        let mut side = machine(version, MBR);
        side.start();
        write_bytes(&mut side, 0, swap.0, &swap_header(swap.1, 4096, "", UUID));
        side.write_at(0, swap.0 + 4096, swap.1 - 4096, 0x51);
        side.write_at(0, scratch.0, scratch.1, 0x52);
        side.write_at(0, bytes.0, bytes.1, 0x53);
        // A whole disk, with a larger page, and not all of it.
        write_bytes(&mut side, 1, 0, &swap_header(5 << 20, 65536, "all", UUID));
        side.write_at(1, 65536, SIZE - 65536, 0x54);
        let range = format!("vd0=bytes:{}-{}", bytes.0, bytes.0 + bytes.1);
        let options = ["--skip-swap", "--skip", "vd0=partuuid:ABCD0123-06", "--skip", &range, "--audit", "100"];
        let inner = |(start, len): (u64, u64)| (start.next_multiple_of(CHUNK), (start + len) / CHUNK * CHUNK);
        let zero = [(0, whole_chunks(swap)), (0, inner(scratch)), (0, inner(bytes)), (1, (CHUNK, 5 << 20))];
        for round in 0..3 {
            let report = backup(&mut side, &options, &zero);
            assert_eq!(left_out(&report, 0).len(), 3, "{report}");
            assert_eq!(left_out(&report, 1), [("swap".to_owned(), CHUNK, 5 << 20)], "{report}");
            assert_eq!(taken(&report, 0), if round == 0 { "full" } else { "incremental" });
            side.write_at(0, scratch.0 + 8192, 200_192, 0x60 + round);
            side.write_at(0, swap.0 + 200_192, 8192, 0x70 + round);
            side.write_at(1, 3 << 20, 70_144, 0x80 + round);
            side.write_at(1, SIZE - 512, 512, 0x90 + round);
        }
        // What is not there is said, and nothing is left out for it.
        let report = backup(&mut side, &["--skip", "vd0=9", "--skip", "vd1=label:x", "--skip", "vd0=swap"], &zero[..1]);
        assert!(kept(&report, 0).contains("no such partition"), "{report}");
        assert!(kept(&report, 1).contains("no partition table"), "{report}");
        // A table that cannot be believed: all is kept.
        side.write_at(0, 446 + 8, 4, 0xff);
        let report = backup(&mut side, &options[..1], &zero[3..]);
        assert!(kept(&report, 0).contains("lies outside the disk"), "{report}");
        assert!(side.qemu().alive());
    }
}

#[test]
fn a_service_says_what_is_left_out() {
    let mut side = machine(Version::V10, GPT);
    side.start();
    write_bytes(&mut side, 0, SWAP.0, &swap_header(SWAP.1, 4096, "swap0", UUID));
    side.write_at(0, SWAP.0 + 4096, SWAP.1 - 4096, 0x51);
    let zero = [(0, whole_chunks(SWAP)), (1, (0, SIZE))];
    let mut serve = Serve::start(&side, "skip_swap = true\nskip = [\"vd1=bytes:0-1 TiB\"]");
    serve.wait_until_attached(&side);
    // Through its socket, since it has the VM.
    for round in 0..3 {
        let report = backup(&mut side, &ALL, &zero);
        assert_eq!((left_out(&report, 0).len(), left_out(&report, 1).len()), (1, 1), "{report}");
        assert_eq!(read_bytes(&report, 1), 0);
        side.write_at(0, SWAP.0 + 300_000 / 512 * 512, 4096, 0x60 + round);
        side.write_at(1, 4096, 4096, 0x60 + round);
    }
    let (source, repo) = (side.source(), side.repo());
    // What was written since lies in what was left out, and will most likely be again.
    assert_eq!(side.ok(&["estimate", &source, repo.to_str().unwrap()])["needed_bytes"], 0);
    let refused = side.livebackup(&["backup", &source, repo.to_str().unwrap(), "--skip-swap"]);
    let said = format!("{}{}", String::from_utf8_lossy(&refused.stdout), String::from_utf8_lossy(&refused.stderr));
    assert!(!refused.status.success() && said.contains("the server's configuration"), "{said}");
    let shown = livebackup().arg("show").arg(&repo).arg("vm1").output().unwrap();
    let shown = String::from_utf8_lossy(&shown.stdout);
    assert!(shown.contains("left out of vd0, zero in this point: swap (partition 1 \"swap\""), "{shown}");
    let restored = side.ok(&["restore", repo.to_str().unwrap(), "vm1", side.path("said").to_str().unwrap()]);
    let what = restored["disks"][0]["left_out"][0]["what"].as_str();
    assert!(what == Some("swap") && restored["disks"][1]["left_out"].is_array(), "{restored}");
    serve.stop();
    // The service no longer leaves it out: the same epoch goes on, and all comes.
    let mut serve = Serve::start(&side, "");
    serve.wait_until_attached(&side);
    let report = backup(&mut side, &ALL, &[]);
    assert_eq!((taken(&report, 0), taken(&report, 1)), ("incremental", "incremental"), "{report}");
    assert_eq!(read_bytes(&report, 1), SIZE);
    serve.stop();
}
