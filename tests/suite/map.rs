//! A restore point is read by other programs as it was backed up. The oracle is the bytes that the test itself stored.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use crate::map_common::*;
use crate::repo_common::{manifest, noise, pattern, store};
use crate::restore_common::*;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use livebackup::block::{BlockSource, SourceRules};
use livebackup::extent::Extent;
use livebackup::nbd::{BASE_ALLOCATION, ConnectOptions, NbdSource, NegotiateError, SourceOptions, Wanted, connect};
use livebackup::repo::WriterOptions;
use livebackup::units::MIB;
use nix::sys::signal::Signal::{SIGINT, SIGKILL, SIGTERM};

fn disks() -> Vec<(&'static str, Vec<u8>)> {
    let mib = MIB as usize;
    vec![
        ("odd", mixed(1, mib + 512)),
        ("long", mixed(2, 40 * mib + 1536)),
        ("noise", noise(3, 3 * mib + 512)),
        ("zero", vec![0; 5 * mib]),
        ("small", pattern(4, 1024)),
        ("bytes", mixed(5, 300_001)),
        ("dis/k ä&'?", mixed(6, 2 * mib)),
    ]
}

fn assert_file(stored: &Stored, file: &str, disk: &str) {
    assert!(fs::read(stored.dir.path().join(file)).unwrap() == stored.bytes(disk), "{disk} in {file}");
}

#[test]
fn programs_read_what_was_backed_up() {
    let stored = stored(disks());
    let map = Running::on_socket(&stored, &[]);
    let file = |name: &str| stored.dir.path().join(name).to_str().unwrap().to_owned();
    for (disk, bytes) in &stored.disks {
        let uri = &map.uri(disk);
        for (n, how) in [&["--connections=4", "--threads=4"][..], &["--synchronous"], &["--requests=1", "--no-extents"]]
            .iter()
            .enumerate()
        {
            let copy = file(&format!("copy{n}"));
            let _ = fs::remove_file(&copy);
            run("nbdcopy", &[*how, &[uri, copy.as_str()]].concat());
            assert_file(&stored, &format!("copy{n}"), disk);
        }
        if bytes.len() % 512 == 0 {
            run("qemu-img", &["convert", "-f", "raw", "-O", "raw", "-m", "16", uri, &file("converted")]);
            assert_file(&stored, "converted", disk);
            run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", uri, &file("qcow2")]);
            run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", uri, &file("qcow2")]);
            run("qemu-img", &["compare", "-f", "raw", "-F", "raw", uri, &file("copy0")]);
        }
        let info: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--json", uri])).unwrap();
        let export = &info["exports"][0];
        assert_eq!((&export["export-size"], &export["is_read_only"]), (&bytes.len().into(), &true.into()), "{disk}");
        let sizes =
            ["minimum", "preferred", "maximum"].map(|key| export[format!("block_size_{key}")].as_u64().unwrap());
        assert_eq!(sizes, [1, CHUNK.into(), 32 << 20]);
    }
    let list: serde_json::Value =
        serde_json::from_str(&run("nbdinfo", &["--list", "--json", &map.uri("odd")])).unwrap();
    let names: Vec<_> =
        list["exports"].as_array().unwrap().iter().map(|e| e["export-name"].as_str().unwrap()).collect();
    assert_eq!(names, stored.disks.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>());
    assert_eq!(fs::metadata(map.socket()).unwrap().mode() & 0o777, 0o600);
    assert_eq!(map.end(SIGTERM).code, Some(0));
}

#[test]
fn zero_chunks_are_holes() {
    let stored = stored(disks());
    let map = Running::on_socket(&stored, &[]);
    for (disk, bytes) in stored.disks.iter().filter(|(_, bytes)| bytes.len() % 512 == 0) {
        let expected = holes(bytes);
        let said = run("qemu-img", &["map", "--output=json", "-f", "raw", &map.uri(disk)]);
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        let found: Vec<_> = said
            .as_array()
            .unwrap()
            .iter()
            .map(|e| {
                let (start, length) = (e["start"].as_u64().unwrap(), e["length"].as_u64().unwrap());
                assert_ne!(e["zero"], e["data"], "{e}");
                (start, start + length, e["zero"].as_bool().unwrap())
            })
            .collect();
        assert_eq!(found, expected, "{disk}");
        let said = run("nbdinfo", &["--map", "--json", &map.uri(disk)]);
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        let found = said.as_array().unwrap().iter().map(|e| {
            let (offset, length) = (e["offset"].as_u64().unwrap(), e["length"].as_u64().unwrap());
            (offset, offset + length, e["type"] == 3)
        });
        assert_eq!(found.collect::<Vec<_>>(), expected, "{disk}");
    }
    // And reads say so: nothing but a hole is sent for a disk of zeroes.
    let mut raw = Raw::session(&map.socket(), "zero", true);
    for flags in [0, 4] {
        raw.request(flags, 0, 7, 513, 3 << 20);
        let hole = [&513u64.to_be_bytes()[..], &(3u32 << 20).to_be_bytes()].concat();
        assert_eq!(raw.reply(7), [(2, hole)]);
    }
    drop(raw);
    let ended = map.end(SIGTERM);
    assert_eq!((ended.code, ended.said["failed_reads"].as_u64()), (Some(0), Some(0)));
    assert_eq!(ended.said["hole_bytes"].as_u64(), Some(6 << 20));
}

#[test]
fn points_that_share_chunks_are_each_their_own() {
    let stored = stored(vec![("d", mixed(1, 20 * MIB as usize + 512)), ("e", noise(2, MIB as usize))]);
    let mut versions = vec![stored.bytes("d").to_vec()];
    let mut image = stored.point.disks[0].image;
    for round in 1..3usize {
        let mut next = versions[round - 1].clone();
        for at in (round * 700_000..next.len() - 200_000).step_by(3_000_000) {
            next[at..at + 130_000].copy_from_slice(&pattern((round * 1000 + at) as u64, 130_000));
        }
        next[round * 9_000_000..][..CHUNK as usize * 2].fill(0);
        image = store(&stored.repo, &next, CHUNK, Some(image));
        stored.repo.commit(&manifest("vm", &[("d", image)])).unwrap();
        versions.push(next);
    }
    let maps: Vec<_> = (0..3)
        .map(|n| {
            let socket = stored.dir.path().join(format!("s{n}"));
            Running::start(&stored, &format!("vm@latest~{}", 2 - n), &["--socket", socket.to_str().unwrap()])
        })
        .collect();
    let copies: Vec<_> = maps
        .iter()
        .enumerate()
        .map(|(n, map)| {
            let to = stored.dir.path().join(format!("copy{n}"));
            Command::new("nbdcopy").arg(map.uri("d")).arg(to).spawn().expect("install libnbd-bin")
        })
        .collect();
    for (n, mut copy) in copies.into_iter().enumerate() {
        assert!(copy.wait().unwrap().success());
        assert!(fs::read(stored.dir.path().join(format!("copy{n}"))).unwrap() == versions[n], "version {n}");
    }
    assert_eq!(maps[0].said["point"], stored.point.id.to_string());
}

#[tokio::test]
async fn our_own_client_reads_anything_anywhere() {
    let stored = stored(disks());
    let map = Running::on_socket(&stored, &[]);
    for (disk, bytes) in &stored.disks {
        let connect = ConnectOptions::default();
        let rules = SourceRules { boundary_bytes: MIB, in_flight_bytes: 16 * MIB };
        let (address, export) = (map.address(), disk.clone());
        let options = SourceOptions { address, export, connections: 4, rules, request_bytes: None, connect };
        let source = NbdSource::open(&options).await.unwrap();
        assert_eq!(source.size_bytes(), bytes.len() as u64);
        let mut state = 7u64;
        let mut below = |bound: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % bound
        };
        let reads: Vec<_> = (0..300)
            .map(|_| {
                let offset = below(bytes.len() as u64);
                Extent::new(offset, (1 + below(400_000)).min(bytes.len() as u64 - offset))
            })
            .collect();
        let source = &source;
        let mut found = stream::iter(reads)
            .map(|extent| async move { source.read(extent).await.map(|found| (extent, found)) })
            .buffer_unordered(32);
        while let Some((extent, found)) = found.try_next().await.unwrap() {
            assert!(found == bytes[extent.offset_bytes as usize..extent.end() as usize], "{disk} {extent}");
        }
        let client = map.client(disk, &[BASE_ALLOCATION]).await;
        let (mut runs, all) = (vec![], Extent::new(0, bytes.len() as u64));
        let each = |e: Extent, flags| runs.push((e.offset_bytes, e.end(), flags == 3));
        client.block_status_all(BASE_ALLOCATION, all, each).await.unwrap();
        assert_eq!(runs, holes(bytes), "{disk}");
        client.close().await;
    }
    let wanted = |export: &str| Wanted { export: export.into(), contexts: vec![] };
    for name in ["nothing", "", "Odd"] {
        let refused = connect(&map.address(), &wanted(name), &ConnectOptions::default()).await.unwrap_err();
        assert!(matches!(refused, NegotiateError::UnknownExport { .. }), "{name:?}: {refused}");
    }
    assert!(!program("nbdinfo", &[&map.uri("odd").replace("/odd?", "/even?")]).0);
}

#[test]
fn one_disk_is_also_the_nameless_export() {
    let stored = stored(disks());
    let map = Running::on_socket(&stored, &["--disk", "noise"]);
    assert_eq!(map.said["exports"].as_array().unwrap().len(), 1);
    run("nbdcopy", &[&map.uri("noise").replace("/noise?", "/?"), stored.dir.path().join("c").to_str().unwrap()]);
    assert_file(&stored, "c", "noise");
    assert!(!program("nbdinfo", &[&map.uri("noise").replace("/noise?", "/odd?")]).0);
    drop(map);
    for (arguments, code, said) in [
        (&["--disk", "nope"][..], 3, "noise"),
        (&["--disk", "odd", "--disk", "odd"], 2, "twice"),
        (&["--listen", "0.0.0.0:0"], 2, "ssh -L"),
        (&["--listen", "127.0.0.1"], 2, "HOST:PORT"),
        (&["--listen", "127.0.0.1:0", "--socket", "s"], 2, "cannot be used with"),
    ] {
        let Err(ended) = Running::try_start(&stored, "vm", arguments) else { panic!("{arguments:?} was taken") };
        let message = ended.said["error"]["message"].as_str().unwrap();
        assert!(ended.code == Some(code) && message.contains(said), "{arguments:?}: {:?} {message}", ended.code);
    }
}

#[test]
fn many_clients_read_at_once_over_tcp() {
    let stored = stored(vec![("a", mixed(1, 24 * MIB as usize)), ("b", noise(2, 16 * MIB as usize))]);
    let map = Running::start(&stored, "vm", &["--listen", "127.0.0.1:0"]);
    assert!(map.uri("a").starts_with("nbd://127.0.0.1:"), "{}", map.uri("a"));
    let copies: Vec<_> = (0..6)
        .map(|n| {
            let disk = ["a", "b"][n % 2];
            let to = stored.dir.path().join(format!("copy{n}"));
            (n, disk, Command::new("nbdcopy").arg(map.uri(disk)).arg(to).spawn().expect("install libnbd-bin"))
        })
        .collect();
    for (n, disk, mut copy) in copies {
        assert!(copy.wait().unwrap().success());
        assert_file(&stored, &format!("copy{n}"), disk);
    }
    let ended = map.end(SIGINT);
    assert_eq!(ended.code, Some(0));
    assert!(ended.said["clients"].as_u64().unwrap() >= 6 && ended.said["reads"].as_u64().unwrap() > 6);
    // Each byte of data was read once by each.
    let data = |disk: &str| holes(stored.bytes(disk)).iter().filter(|h| !h.2).map(|h| h.1 - h.0).sum::<u64>();
    let bytes = |key: &str| ended.said[key].as_u64().unwrap();
    assert_eq!(bytes("read_bytes") - bytes("hole_bytes"), 3 * (data("a") + data("b")));
}

#[test]
fn a_machine_may_write_to_a_snapshot_of_it() {
    let stored = stored(vec![("d", mixed(1, 4 * MIB as usize))]);
    let map = Running::on_socket(&stored, &[]);
    let uri = &map.uri("d");
    let (written, said) = program("qemu-io", &["-f", "raw", "-c", "write -P 7 0 64k", uri]);
    assert!(!written && said.contains("denied"), "{said}");
    run("qemu-io", &["-f", "raw", "-s", "-c", "write -P 7 4k 64k", "-c", "read -P 7 4k 64k", "-c", "flush", uri]);
    run("nbdcopy", &[uri, stored.dir.path().join("c").to_str().unwrap()]);
    assert_file(&stored, "c", "d");
}

#[test]
fn a_socket_has_one_map_and_goes_with_it() {
    let stored = stored(vec![("d", mixed(1, 700_000))]);
    let usual = Running::start(&stored, "vm", &[]);
    let socket = usual.socket();
    let name = format!("map-{}.sock", stored.point.id.short());
    assert_eq!(socket.file_name().unwrap().to_str(), Some(name.as_str()));
    assert_eq!(fs::metadata(&socket).unwrap().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(socket.parent().unwrap()).unwrap().mode() & 0o022, 0);
    let Err(refused) = Running::try_start(&stored, "vm", &[]) else { panic!("a second map took the socket") };
    let message = refused.said["error"]["message"].as_str().unwrap();
    assert!(refused.code == Some(4) && message.contains("in use") && message.contains("--socket"), "{message}");
    run("nbdinfo", &[&usual.uri("d")]);

    usual.signal(SIGKILL);
    usual.wait();
    assert!(socket.exists(), "a kill leaves the file");
    let again = Running::start(&stored, "vm", &[]);
    run("nbdinfo", &[&again.uri("d")]);
    let ended = again.end(SIGTERM);
    assert_eq!((ended.code, ended.said["vm"].as_str()), (Some(0), Some("vm")));
    assert!(!socket.exists());
    fs::write(stored.dir.path().join("s"), "precious").unwrap();
    let path = stored.dir.path().join("s").to_str().unwrap().to_owned();
    assert!(Running::try_start(&stored, "vm", &["--socket", &path]).is_err());
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[test]
fn text_says_what_is_served_and_what_was_done() {
    use std::io::{BufRead, BufReader, Read};
    let stored = stored(vec![("d", mixed(1, 700_000))]);
    let socket = stored.dir.path().join("s");
    let mut command = Command::new(env!("CARGO_BIN_EXE_livebackup"));
    command.arg("map").arg(stored.dir.path().join("repo")).args(["vm", "--socket"]).arg(&socket);
    let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    while !text.contains("until Ctrl-C") {
        assert!(out.read_line(&mut text).unwrap() > 0, "{text}");
    }
    let uri = format!("nbd+unix:///d?socket={}", socket.display());
    assert!(text.contains(&format!("683.6 KiB  {uri}\n")), "{text}");
    assert!(text.contains(&format!("serving vm@{}", stored.point.id.short())), "{text}");
    let example = text.lines().find_map(|line| line.strip_prefix("for example: ")).unwrap();
    run("sh", &["-c", &format!("cd {} && {example}", stored.dir.path().display())]);
    assert_file(&stored, "disk.raw", "d");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), SIGTERM).unwrap();
    let mut text = String::new();
    out.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("served vm@") && text.contains("client"), "{text}");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_tebibyte_costs_what_is_read_of_it() {
    let stored = stored(vec![("small", pattern(1, 1024))]);
    let size: u64 = (1 << 40) + 512;
    let writer = stored.repo.writer(WriterOptions::default()).unwrap();
    let disk = writer.disk(size, CHUNK, None).unwrap();
    // One chunk in each of 400 leaves, far apart.
    let places: Vec<u64> = (0..400u64).map(|n| n * 81 * 256 * u64::from(CHUNK)).collect();
    for (n, at) in places.iter().enumerate() {
        writer.put_blocking(disk, *at, Bytes::from(pattern(n as u64, CHUNK as usize))).unwrap();
    }
    let image = writer.finish().unwrap().disks[0].image;
    stored.repo.commit(&manifest("vm", &[("big", image)])).unwrap();
    let map = Running::on_socket(&stored, &[]);
    let begun = std::time::Instant::now();
    let mut raw = Raw::session(&map.socket(), "", false);
    for (n, at) in places.iter().enumerate().rev() {
        let expected = &pattern(n as u64, CHUNK as usize)[CHUNK as usize - 4096..];
        let mut both = raw.read_simple(at + u64::from(CHUNK) - 4096, 8192).unwrap();
        assert!(both.split_off(4096) == [0; 4096] && both == expected, "{n}");
    }
    assert_eq!(raw.read_simple(size - 512, 512), Ok(vec![0; 512]));
    assert_eq!(raw.read_simple(size - 512, 513), Err(22));
    let said = run("nbdinfo", &["--map", "--json", &map.uri("big")]);
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said.as_array().unwrap().iter().filter(|e| e["type"] == 0).count(), places.len());
    println!("{} reads and the map of 1 TiB: {:?}, {} MiB", places.len(), begun.elapsed(), map.peak_memory() >> 20);
    assert!(map.peak_memory() < 200 << 20, "{} MiB", map.peak_memory() >> 20);
}
