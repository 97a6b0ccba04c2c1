//! Damage, and clients that are not what they should be: the others go on, and no wrong byte is read.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::map_common::*;
use crate::repo_common::noise;
use crate::restore_common::*;
use livebackup::map::{At, Map, MapOptions, Totals};
use livebackup::nbd::server::ServerOptions;
use livebackup::units::MIB;
use nix::sys::signal::Signal::SIGTERM;
use tokio::sync::watch;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;

/// All files of the repository's packs of one kind: data (0) or trees (1).
fn packs(stored: &Stored, kind: u8) -> Vec<PathBuf> {
    let dirs = fs::read_dir(stored.dir.path().join("repo/packs")).unwrap().map(|dir| dir.unwrap().path());
    let files = dirs.flat_map(|dir| fs::read_dir(dir).unwrap().map(|file| file.unwrap().path()));
    files.filter(|file| fs::read(file).unwrap()[10] == kind).collect()
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

/// Finds the stored bytes of an incompressible chunk, by the bytes alone.
fn flip_chunk(stored: &Stored, chunk: &[u8]) -> PathBuf {
    for pack in packs(stored, 0) {
        let bytes = fs::read(&pack).unwrap();
        if let Some(at) = bytes.windows(64).position(|window| *window == chunk[..64]) {
            flip(&pack, at + 5000);
            return pack;
        }
    }
    panic!("the chunk is stored nowhere");
}

fn read_structured(raw: &mut Raw, cookie: u64, offset: u64, len: u32) -> Vec<(u16, Vec<u8>)> {
    raw.request(0, 0, cookie, offset, len);
    raw.reply(cookie)
}

#[test]
fn a_flipped_bit_costs_the_bytes_that_it_hit() {
    let stored = stored(vec![("d", noise(1, 12 * MIB as usize + 512)), ("e", mixed(2, MIB as usize))]);
    let (bytes, chunk) = (stored.bytes("d").to_vec(), CHUNK as usize);
    let map = Running::on_socket(&stored, &[]);
    let pack = flip_chunk(&stored, &bytes[41 * chunk..]);
    let (from, to) = (41 * chunk, 42 * chunk);

    // One error at one place in the middle of what is right.
    let mut raw = Raw::session(&map.socket(), "d", true);
    let (mut found, mut errors) = (vec![0xee; 20 * chunk], vec![]);
    let base = 30 * chunk + 77;
    for (kind, payload) in read_structured(&mut raw, 1, base as u64, 20 * CHUNK) {
        match kind {
            1 => {
                let at = u64::from_be_bytes(payload[..8].try_into().unwrap()) as usize - base;
                found[at..at + payload.len() - 8].copy_from_slice(&payload[8..]);
            }
            0x8002 => {
                assert_eq!(payload[..4], EIO.to_be_bytes());
                errors.push(u64::from_be_bytes(payload[payload.len() - 8..].try_into().unwrap()) as usize);
            }
            other => panic!("chunk {other}"),
        }
    }
    assert_eq!(errors, [from]);
    assert!(found[..from - base] == bytes[base..from], "what is before it");
    assert!(found[from - base..to - base].iter().all(|byte| *byte == 0xee), "not a byte of it");
    assert!(found[to - base..] == bytes[to..base + 20 * chunk], "what is behind it");

    // By simple replies, and with all in one chunk: an error or the right bytes.
    let mut simple = Raw::session(&map.socket(), "d", false);
    for (at, len) in [(from - 1, 1), (from - 1, 2), (from, 1), (to - 1, 1), (to - 1, 2), (to, 1), (0, 20 << 20)] {
        let len = len.min(bytes.len() - at);
        let damaged = at < to && at + len > from;
        let expected = if damaged { Err(EIO) } else { Ok(bytes[at..at + len].to_vec()) };
        assert!(simple.read_simple(at as u64, len as u32) == expected, "{at}+{len}");
        raw.request(4, 0, 2, at as u64, len as u32);
        let reply = raw.reply(2);
        let [(kind, payload)] = &reply[..] else { panic!("{} chunks", reply.len()) };
        match damaged {
            true => assert_eq!((*kind, &payload[..4]), (0x8001, &EIO.to_be_bytes()[..])),
            false => assert!(*kind == 1 && payload[8..] == bytes[at..at + len], "{at}+{len}"),
        }
    }
    assert!(!program("nbdcopy", &[&map.uri("d"), "null:"]).0, "a copy of the disk fails");
    run("nbdcopy", &[&map.uri("e"), stored.dir.path().join("e").to_str().unwrap()]);
    assert!(fs::read(stored.dir.path().join("e")).unwrap() == stored.bytes("e"));

    drop((raw, simple));
    let ended = map.end(SIGTERM);
    assert_eq!(ended.code, Some(6), "what is damaged was asked for");
    assert!(ended.said["failed_reads"].as_u64().unwrap() >= 8);
    let said = ended.log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let told: Vec<_> = said.filter_map(|said| said["message"].as_str().map(str::to_owned)).collect();
    let told: Vec<_> = told.iter().filter(|message| message.contains("cannot be read")).collect();
    assert_eq!(told.len(), 1, "said once: {}", ended.log);
    for part in [&format!("bytes {from}..{to} of disk \"d\""), pack.to_str().unwrap(), "livebackup verify"] {
        assert!(told[0].contains(part), "{part} in {}", told[0]);
    }
}

#[test]
fn a_damaged_tree_costs_its_leaf() {
    // Two leaves, of 256 chunks each, and a root.
    let stored = stored(vec![("d", noise(1, 40 * MIB as usize))]);
    let bytes = stored.bytes("d").to_vec();
    let trees = packs(&stored, 1);
    assert_eq!(trees.len(), 1);
    flip(&trees[0], 4096 + 60);
    let map = Running::on_socket(&stored, &[]);
    let mut simple = Raw::session(&map.socket(), "", false);
    let right: Vec<bool> = (0..320u64)
        .map(|n| {
            let at = n * u64::from(CHUNK);
            match simple.read_simple(at, CHUNK) {
                Ok(found) => assert!(found == bytes[at as usize..][..CHUNK as usize], "chunk {n}"),
                Err(errno) => {
                    assert_eq!(errno, EIO);
                    return false;
                }
            }
            true
        })
        .collect();
    assert!(
        right == [[false; 256].as_slice(), &[true; 64]].concat()
            || right == [[true; 256].as_slice(), &[false; 64]].concat()
    );
    // It is not said to be a hole.
    let said = run("nbdinfo", &["--map", "--json", &map.uri("d")]);
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!((said.as_array().unwrap().len(), &said[0]["type"]), (1, &0.into()));
    assert_eq!(map.log().matches("cannot be read").count(), 1, "{}", map.log());
}

#[test]
fn nothing_is_written() {
    let stored = stored(vec![("d", mixed(1, 700_000))]);
    let map = Running::on_socket(&stored, &[]);
    for structured in [false, true] {
        let mut raw = Raw::session(&map.socket(), "d", structured);
        let refused = |raw: &mut Raw, cookie: u64, expected: u32| match raw.hear() {
            Heard::Simple(errno, heard) => assert_eq!((errno, heard, structured), (expected, cookie, false)),
            Heard::Chunk(done, kind, heard, payload) => {
                assert!(structured && done && kind == 0x8001);
                assert_eq!((&payload[..4], heard), (&expected.to_be_bytes()[..], cookie));
            }
        };
        // Data that looks like requests is data.
        raw.request(0, 1, 10, 0, 2800);
        raw.say(&[&0x2560_9513_u32.to_be_bytes()[..], &[0; 24]].concat().repeat(100));
        refused(&mut raw, 10, EPERM);
        raw.request(1, 1, 11, 0, 0);
        refused(&mut raw, 11, EPERM);
        for (command, cookie) in [(4, 12), (6, 13)] {
            raw.request(0, command, cookie, 0, 65536);
            refused(&mut raw, cookie, EPERM);
        }
        // What makes no sense, either.
        let size = 700_000;
        for (flags, command, offset, len) in [
            (0, 0, size, 1),
            (0, 0, 0, 0),
            (0, 0, u64::MAX, 2),
            (0, 0, 0, size as u32 + 1),
            (1, 0, 0, 512),
            (if structured { 8 } else { 4 }, 0, 0, 512),
            (0, 7, 0, 512),
            (0, 5, size, 1),
            (0, 8, 0, 512),
            (0, 99, 0, 0),
        ] {
            raw.request(flags, command, 14, offset, len);
            refused(&mut raw, 14, EINVAL);
        }
        raw.request(0, 3, 15, 0, 0);
        assert_eq!(raw.hear(), Heard::Simple(0, 15), "a flush is done");
        raw.request(0, 5, 16, 512, 500_000);
        assert_eq!(raw.hear(), Heard::Simple(0, 16), "a hint is taken");
        match structured {
            true => assert!(read_structured(&mut raw, 17, 0, 512)[0].1[8..] == stored.bytes("d")[..512]),
            false => assert!(raw.read_simple(0, 512).unwrap() == stored.bytes("d")[..512]),
        }
        raw.request(0, 2, 18, 0, 0);
        assert!(raw.is_closed());
    }
    // More than any client writes at once.
    let mut raw = Raw::session(&map.socket(), "d", true);
    raw.request(0, 1, 1, 0, u32::MAX);
    assert!(raw.is_closed());
}

#[test]
fn the_handshake_is_as_the_protocol_says() {
    let stored = stored(vec![("a", mixed(1, 700_000)), ("b", vec![0; 512])]);
    let map = Running::on_socket(&stored, &[]);
    let mut raw = Raw::greeted(&map.socket());
    let kinds = |replies: &[(u32, Vec<u8>)]| replies.iter().map(|(kind, _)| *kind).collect::<Vec<_>>();
    let last = |replies: Vec<(u32, Vec<u8>)>| replies.last().unwrap().0;
    const INVALID: u32 = ERROR + 3;
    const UNKNOWN: u32 = ERROR + 6;

    for unknown in [5, 11, 77, u32::MAX] {
        assert_eq!(last(raw.option(unknown, b"whatever")), ERROR + 1, "option {unknown}");
    }
    let listed = raw.option(3, b"");
    assert_eq!(kinds(&listed), [2, 2, 1]);
    assert!(listed[0].1.starts_with(b"\0\0\0\x01a") && listed[1].1.starts_with(b"\0\0\0\x01b"));
    assert_eq!(last(raw.option(3, b"x")), INVALID);
    // Contexts before structured replies, for an unknown disk, in a list, and chosen.
    assert_eq!(last(raw.option(10, &queries("a", &["base:allocation"]))), INVALID);
    let context = |id: u32| [&id.to_be_bytes()[..], b"base:allocation"].concat();
    for list in [&[][..], &["base:"], &["x:y", "base:allocation"]] {
        assert_eq!(raw.option(9, &queries("a", list)), [(4, context(0)), (1, vec![])]);
    }
    assert_eq!(kinds(&raw.option(9, &queries("a", &["qemu:"]))), [1]);
    assert_eq!(last(raw.option(8, b"x")), INVALID);
    assert_eq!(kinds(&raw.option(8, b"")), [1]);
    assert_eq!(last(raw.option(10, &queries("c", &["base:allocation"]))), UNKNOWN);
    assert_eq!(kinds(&raw.option(10, &queries("a", &["base:"]))), [1]);
    assert_eq!(raw.option(10, &queries("a", &["base:allocation"])), [(4, context(1)), (1, vec![])]);
    // Data that makes no sense.
    let lying = [&u32::MAX.to_be_bytes()[..], b"a"].concat();
    for option in [6, 7, 9, 10] {
        for data in
            [&b""[..], &lying, &go("a", &[])[..5], &[0, 0, 0, 1, 0xff, 0, 0], &[&go("a", &[1])[..], b"x"].concat()]
        {
            assert_eq!(last(raw.option(option, data)), INVALID, "option {option}: {data:?}");
        }
    }
    // Information, of any disk, and then another disk is chosen: the context was the first one's.
    let info = raw.option(6, &go("a", &[1, 2, 3]));
    assert_eq!(kinds(&info), [3, 3, 3, 3, 1]);
    assert_eq!(info[0].1[2..10], 700_000u64.to_be_bytes());
    assert_eq!(u16::from_be_bytes([info[0].1[10], info[0].1[11]]), 0b101_1000_0111);
    assert_eq!(
        info[1].1,
        [&[0, 3][..], &1u32.to_be_bytes(), &CHUNK.to_be_bytes(), &(32u32 << 20).to_be_bytes()].concat()
    );
    assert_eq!(info[2].1, b"\0\x01a");
    assert_eq!(last(raw.option(7, &go("", &[]))), UNKNOWN, "there are two");
    assert_eq!(last(raw.option(7, &go("b", &[]))), 1);
    raw.request(0, 7, 5, 0, 512);
    assert_eq!(raw.reply(5)[0].0, 0x8001);
    drop(raw);
    let mut raw = Raw::greeted(&map.socket());
    raw.option(8, b"");
    raw.option(10, &queries("a", &["base:allocation"]));
    raw.option(7, &go("a", &[]));
    for (flags, expected) in
        [(8, vec![(2 * CHUNK, 0)]), (0, vec![(2 * CHUNK, 0), (2 * CHUNK, 3), (700_000 - 4 * CHUNK, 0)])]
    {
        raw.request(flags, 7, 6, 0, 700_000);
        let words: Vec<u8> = expected
            .iter()
            .flat_map(|(len, flags): &(u32, u32)| [len.to_be_bytes(), flags.to_be_bytes()].concat())
            .collect();
        assert_eq!(raw.reply(6), [(5, [&1u32.to_be_bytes()[..], &words].concat())]);
    }
    // The old way in: with and without zeroes behind it.
    for (flags, zeroes) in [(1u32, 124), (3, 0)] {
        let mut raw = Raw::connect(&map.socket());
        raw.say(&flags.to_be_bytes());
        raw.say(b"IHAVEOPT\0\0\0\x01\0\0\0\x01a");
        let said = raw.take(10 + zeroes);
        assert_eq!(
            (&said[..8], u16::from_be_bytes([said[8], said[9]])),
            (&700_000u64.to_be_bytes()[..], 0b101_0000_0111)
        );
        assert!(said[10..].iter().all(|byte| *byte == 0));
        assert!(raw.read_simple(1, 699_999).unwrap() == stored.bytes("a")[1..]);
    }
    // What ends the conversation.
    for bytes in [
        &b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x01c"[..],
        b"\0\0\0\x00IHAVEOPT\0\0\0\x03\0\0\0\x00",
        b"\0\0\0\x07",
        b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff",
        b"\0\0\0\x03GET / HTTP/1.1\r\n\r\n",
    ] {
        let mut raw = Raw::connect(&map.socket());
        raw.say(bytes);
        assert!(raw.is_closed(), "{bytes:?}");
    }
    let mut raw = Raw::greeted(&map.socket());
    assert_eq!(kinds(&raw.option(2, b"")), [1]);
    assert!(raw.is_closed());
}

#[test]
fn garbage_and_half_handshakes_hurt_nobody_else() {
    let stored = stored(vec![("d", mixed(1, 30 * MIB as usize))]);
    let map = Running::on_socket(&stored, &[]);
    let halves: Vec<_> = (0..20)
        .map(|n| {
            let mut raw = Raw::connect(&map.socket());
            raw.say(&b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\xff12345"[..n % 21]);
            raw
        })
        .collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 0..3 {
            let (map, done) = (&map, &done);
            scope.spawn(move || {
                let mut round = seed;
                while !done.load(Ordering::Relaxed) {
                    round += 3;
                    // In the handshake, and in a session (some with reads under way); some go at once, some hear the answer.
                    let mut raw = match round % 2 {
                        0 => Raw::connect(&map.socket()),
                        _ => Raw::session(&map.socket(), "d", round % 4 == 1),
                    };
                    if round % 6 == 3 {
                        (0..40).for_each(|n| raw.request(0, 0, n, n * 65536, 1 << 20));
                    }
                    let _ = raw.0.write_all(&noise(round, 1 + round as usize % 3000));
                    if round % 5 == 0 {
                        let _ = raw.0.shutdown(std::net::Shutdown::Write);
                        let _ = raw.0.read_to_end(&mut vec![]);
                    }
                }
            });
        }
        for n in 0..5 {
            let to = stored.dir.path().join(format!("copy{n}"));
            run("nbdcopy", &[&map.uri("d"), to.to_str().unwrap()]);
            assert!(fs::read(to).unwrap() == stored.bytes("d"));
        }
        done.store(true, Ordering::Relaxed);
    });
    drop(halves);
    let ended = map.end(SIGTERM);
    assert_eq!(ended.code, Some(0));
    assert!(ended.log.contains("broke the protocol"), "{}", ended.log);
}

#[test]
fn clients_that_die_or_sleep_are_nobodys_trouble() {
    let stored = stored(vec![("d", noise(1, 80 * MIB as usize))]);
    let map = Running::on_socket(&stored, &[]);
    // Nobody reads what these copy: they are stuck in the middle of it.
    let stuck: Vec<_> = (0..3)
        .map(|_| {
            let mut copy = Command::new("nbdcopy");
            let mut copy = copy.args([&map.uri("d"), "-"]).stdout(Stdio::piped()).spawn().expect("install libnbd-bin");
            copy.stdout.as_mut().unwrap().read_exact(&mut [0; 1 << 20]).unwrap();
            copy
        })
        .collect();
    // And this one asks for all that it may, and reads nothing.
    let mut sleeper = Raw::session(&map.socket(), "d", true);
    (0..40).for_each(|n| sleeper.request(0, 0, n, n << 20, 1 << 20));
    for mut copy in stuck {
        copy.kill().unwrap();
        copy.wait().unwrap();
        let to = stored.dir.path().join("copy");
        run("nbdcopy", &[&map.uri("d"), to.to_str().unwrap()]);
        assert!(fs::read(to).unwrap() == stored.bytes("d"));
    }
    assert!(map.peak_memory() < 300 << 20, "{} MiB", map.peak_memory() >> 20);
    let (begun, socket) = (Instant::now(), map.socket());
    let ended = map.end(SIGTERM);
    assert_eq!((ended.code, socket.exists()), (Some(0), false));
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    drop(sleeper);
}

/// Serves in this process; gives the socket, and what ends it and tells what was done.
async fn in_process(stored: &Stored, server: ServerOptions) -> (PathBuf, impl AsyncFnOnce() -> Totals) {
    let socket = stored.dir.path().join("inside");
    let options = MapOptions { at: Some(At::Socket(socket.clone())), server, ..MapOptions::default() };
    let map = Map::open(&stored.repo, &stored.point, &options).await.unwrap();
    let (stop, stopped) = watch::channel(false);
    let serving = tokio::spawn(map.serve(stopped));
    (socket, async move || {
        stop.send_replace(true);
        serving.await.unwrap().totals
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_one_too_many_or_too_slow_is_turned_away() {
    let stored = stored(vec![("d", mixed(1, 700_000))]);
    let options = ServerOptions { handshake: Duration::from_millis(300), max_clients: 2, ..ServerOptions::default() };
    let (socket, end) = in_process(&stored, options).await;
    let first = Raw::session(&socket, "d", true);
    let mut half = Raw::connect(&socket);
    let mut third = Raw(std::os::unix::net::UnixStream::connect(&socket).unwrap());
    assert!(third.is_closed(), "two have come before");
    let begun = Instant::now();
    assert!(half.is_closed(), "it says nothing");
    assert!(begun.elapsed() < Duration::from_secs(10));
    let mut third = Raw::session(&socket, "d", false);
    assert!(third.read_simple(0, 512).unwrap() == stored.bytes("d")[..512]);
    drop((first, third));
    let totals = end().await;
    assert_eq!((totals.clients, totals.reads, totals.read_bytes), (2, 1, 512));
    assert!(!socket.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_replies_unread_is_let_go_when_others_need_the_room() {
    let stored = stored(vec![("d", noise(1, 40 * MIB as usize))]);
    let patience = Duration::from_millis(300);
    let options = ServerOptions { in_flight_bytes: 32 << 20, patience, ..ServerOptions::default() };
    let (socket, end) = in_process(&stored, options).await;
    let mut small = Raw::session(&socket, "d", false);
    let mut sleeper = Raw::session(&socket, "d", false);
    sleeper.request(0, 0, 1, 0, 1 << 20);
    tokio::time::sleep(patience * 4).await;
    // Nobody needed what it holds: it gets its answer, late as it reads it.
    assert_eq!(sleeper.hear(), Heard::Simple(0, 1));
    assert!(sleeper.take(1 << 20) == stored.bytes("d")[..1 << 20]);
    sleeper.request(0, 0, 2, 0, 32 << 20);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(small.read_simple(7, 100).unwrap() == stored.bytes("d")[7..107]);
    let heard = sleeper.0.read_to_end(&mut vec![]).unwrap();
    assert!(heard < 32 << 20, "it was cut off");
    drop((small, sleeper));
    end().await;
}
