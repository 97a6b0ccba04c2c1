//! The client against the servers of others: qemu-nbd of both versions and nbdkit, with nbdinfo as a second opinion.

#![allow(clippy::unwrap_used)]

use std::process::Command;
use std::time::Duration;

use crate::common::*;
use crate::nbd_help::*;
use livebackup::block::{BlockSource, SourceError};
use livebackup::extent::Extent;
use livebackup::nbd::proto::{STATE_HOLE, STATE_ZERO};
use livebackup::nbd::{
    Address, BASE_ALLOCATION, ClientOptions, ConnectOptions, NbdError, NbdSource, NegotiateError, connect, list,
};
use livebackup::units::KIB;
use nix::errno::Errno;

const LONGEST: u64 = MIB;

#[tokio::test(flavor = "multi_thread")]
async fn a_sparse_image_is_read_byte_for_byte() {
    let mut rng = Rng::new();
    for version in VERSIONS {
        let dir = tempdir();
        let image = make_image(&dir.path().join("image"), 48 * MIB + 4096, &mut rng);
        let server = qemu_nbd(version, dir, &["-f", "raw", "DIR/image"]);
        for (connections, boundary) in [(1, LONGEST), (4, LONGEST), (1, K64), (4, K64)] {
            let source = source(&server.address(), "", connections, boundary).await;
            assert_eq!(source.connections(), connections);
            for step in [MIB, K64, 96 * KIB + 512] {
                assert_same(&read_all(&source, step, 32).await.unwrap(), &image);
            }
            source.close().await;
        }
        let mut options = source_options(&server.address(), "", 2, LONGEST);
        options.request_bytes = Some(K64);
        assert_same(&read_all(&NbdSource::open(&options).await.unwrap(), MIB, 16).await.unwrap(), &image);
        for bad in [0, 4096, 192 << 10, 2 * MIB] {
            options.request_bytes = Some(bad);
            let e = NbdSource::open(&options).await.unwrap_err();
            assert!(matches!(e, NegotiateError::BadArgument { .. }), "{e}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_of_every_kind_are_read() {
    let mut rng = Rng::new();
    let size = 8 * MIB + 65536 + 512;
    let kinds: [&[&str]; 5] = [
        &["file", "DIR/image"],
        &["--no-sr", "file", "DIR/image"],
        &["-t", "1", "file", "DIR/image"],
        &[
            "--filter=blocksize-policy",
            "file",
            "DIR/image",
            "blocksize-minimum=512",
            "blocksize-preferred=4096",
            "blocksize-maximum=32K",
            "blocksize-error-policy=error",
        ],
        &["--filter=noextents", "--filter=rate", "file", "DIR/image", "rate=2G"],
    ];
    for kind in kinds {
        let dir = tempdir();
        let image = make_image(&dir.path().join("image"), size, &mut rng);
        let server = nbdkit(dir, kind);
        let source = source(&server.address(), "", 3, LONGEST).await;
        assert_same(&read_all(&source, MIB, 16).await.unwrap(), &image);
        assert_same(&read_all(&source, K64 - 512, 64).await.unwrap(), &image);
        let e = source.read(Extent::new(size - 512, 1024)).await.unwrap_err();
        assert!(matches!(e, SourceError::OutOfBounds { .. }), "{e}");
    }
}

/// Readers that give up at any moment: the others still get the right bytes, and no memory stays taken.
#[tokio::test(flavor = "multi_thread")]
async fn readers_may_give_up_at_any_moment() {
    let mut rng = Rng::new();
    let dir = tempdir();
    let image = std::sync::Arc::new(make_image(&dir.path().join("image"), 32 * MIB, &mut rng));
    let server = qemu_nbd(Version::V10, dir, &["-f", "raw", "DIR/image"]);
    for boundary in [LONGEST, K64] {
        let source = std::sync::Arc::new(source(&server.address(), "", 3, boundary).await);
        let mut readers = vec![];
        for _ in 0..40 {
            let (source, image, mut rng) = (source.clone(), image.clone(), Rng::seeded(rng.next()));
            readers.push(tokio::spawn(async move {
                let mut whole = 0;
                for _ in 0..60 {
                    let (at, len) = (rng.below(31 * MIB), 1 + rng.below(MIB));
                    let patience = match rng.below(2) {
                        0 => Duration::from_micros(rng.below(3000)),
                        _ => Duration::from_secs(60),
                    };
                    if let Ok(read) = tokio::time::timeout(patience, source.read(Extent::new(at, len))).await {
                        assert_same(&read.unwrap(), &image[at as usize..(at + len) as usize]);
                        whole += 1;
                    }
                }
                whole
            }));
        }
        let mut whole = 0;
        for reader in readers {
            whole += reader.await.unwrap();
        }
        println!("boundary {boundary}: {whole} of 2400 reads waited for");
        assert!((1000..2400).contains(&whole));
        // The whole budget is there again: sixteen reads of a mebibyte at once, held.
        let all = (0..16).map(|i| source.read(Extent::new(i * MIB, MIB)));
        let all = tokio::time::timeout(Duration::from_secs(10), futures_util::future::try_join_all(all));
        assert_eq!(all.await.unwrap().unwrap().len(), 16);
    }
}

#[tokio::test]
async fn allocation_is_what_nbdinfo_says() {
    let mut rng = Rng::new();
    for version in VERSIONS {
        let dir = tempdir();
        make_image(&dir.path().join("image"), 40 * MIB, &mut rng);
        let server = qemu_nbd(version, dir, &["-f", "raw", "DIR/image"]);
        let uri = format!("nbd+unix:///?socket={}", server.path("sock").display());
        let told = run(Command::new("nbdinfo").args(["--map", "--json", &uri]));
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        let number = |v: &serde_json::Value| v.as_u64().unwrap();
        let mut expected: Vec<(u64, u64, u32)> = vec![];
        for e in told.as_array().unwrap() {
            let (start, len, flags) = (number(&e["offset"]), number(&e["length"]), number(&e["type"]) as u32);
            match expected.last_mut() {
                Some(last) if last.2 == flags => last.1 += len,
                _ => expected.push((start, start + len, flags)),
            }
        }
        let client = client(&server.address(), "", &[BASE_ALLOCATION]).await;
        let found = status(&client, BASE_ALLOCATION).await;
        assert_eq!(found, expected);
        assert!(found.iter().any(|e| e.2 == STATE_HOLE | STATE_ZERO) && found.iter().any(|e| e.2 == 0));
        client.close().await;
    }
}

#[tokio::test]
async fn odd_sizes() {
    for (size, exported) in [(MIB + 513, MIB + 1024), (1, 512), (MIB + 4096, MIB + 4096)] {
        for version in VERSIONS {
            let dir = tempdir();
            std::fs::write(dir.path().join("image"), vec![0xa5; size as usize]).unwrap();
            let server = qemu_nbd(version, dir, &["-f", "raw", "DIR/image"]);
            let source = source(&server.address(), "", 1, LONGEST).await;
            println!("{version:?}: {size} bytes in the file, {} exported", source.size_bytes());
            assert_eq!(source.size_bytes(), exported);
            let read = read_all(&source, MIB, 4).await.unwrap();
            assert!(read[..size as usize].iter().all(|b| *b == 0xa5));
            assert!(read[size as usize..].iter().all(|b| *b == 0));
        }
        // nbdkit keeps to the byte.
        let dir = tempdir();
        std::fs::write(dir.path().join("image"), vec![0xa5; size as usize]).unwrap();
        let server = nbdkit(dir, &["file", "DIR/image"]);
        let source = source(&server.address(), "", 2, LONGEST).await;
        assert_eq!(source.size_bytes(), size);
        assert_same(&read_all(&source, 100_000, 4).await.unwrap(), &vec![0xa5; size as usize]);
    }
}

#[tokio::test]
async fn failing_reads_fail_alone() {
    let dir = tempdir();
    let trigger = dir.path().join("fail");
    let image = make_image(&dir.path().join("image"), 4 * MIB, &mut Rng::new());
    let args = "--filter=error file DIR/image error-pread=ENOSPC error-pread-rate=100% error-pread-file=DIR/fail";
    let server = nbdkit(dir, &args.split(' ').collect::<Vec<_>>());
    let source = source(&server.address(), "", 2, K64).await;
    for _ in 0..3 {
        std::fs::write(&trigger, b"").unwrap();
        let e = source.read(Extent::new(0, MIB)).await.unwrap_err();
        assert!(matches!(e, SourceError::Refused { what: "read", errno: Errno::ENOSPC, .. }), "{e}");
        std::fs::remove_file(&trigger).unwrap();
        assert_same(&read_all(&source, MIB, 4).await.unwrap(), &image);
    }
}

#[tokio::test]
async fn a_slow_server_holds_up_only_who_waits_for_it() {
    let dir = tempdir();
    make_image(&dir.path().join("image"), 4 * MIB, &mut Rng::new());
    let server = nbdkit(dir, &["--filter=delay", "file", "DIR/image", "rdelay=6000ms"]);
    let client = ClientOptions { deadline: Some(Duration::from_secs(2)), ..ClientOptions::default() };
    let options = ConnectOptions { client, ..ConnectOptions::default() };
    let client = connect(&server.address(), &wanted("", &[]), &options).await.unwrap();
    let e = client.read(Extent::new(0, 4096)).await.unwrap_err();
    assert!(matches!(e, NbdError::Deadline { .. }), "{e}");
    // Flush is not delayed, although a read is under way.
    client.flush().await.unwrap();
    assert_eq!(client.waiting(), 1);
    wait(|| client.waiting() == 0).await;
    client.flush().await.unwrap();
    assert_eq!(client.ended(), None);
}

async fn wait(done: impl Fn() -> bool) {
    for _ in 0..2000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("waited ten seconds");
}

#[tokio::test]
async fn buffers_that_are_held_hold_the_source_up() {
    let dir = tempdir();
    let image = make_image(&dir.path().join("image"), 4 * MIB, &mut Rng::new());
    let server = nbdkit(dir, &["--filter=delay", "file", "DIR/image", "rdelay=100ms"]);
    let mut options = source_options(&server.address(), "", 1, LONGEST);
    options.rules.in_flight_bytes = 2 * MIB;
    let source = NbdSource::open(&options).await.unwrap();
    let first = source.read(Extent::new(0, MIB)).await.unwrap();
    let second = source.read(Extent::new(MIB, MIB)).await.unwrap();
    let third = || source.read(Extent::new(2 * MIB, MIB));
    let soon = Duration::from_millis(500);
    assert!(tokio::time::timeout(soon, third()).await.is_err());
    let tail = first.slice(1000..);
    drop(first);
    assert!(tokio::time::timeout(soon, third()).await.is_err());
    assert_same(&tail, &image[1000..MIB as usize]);
    drop(tail);
    // A read whose caller goes away keeps its share until the server answers, and then gives it back.
    assert!(tokio::time::timeout(Duration::from_millis(20), third()).await.is_err());
    let third = tokio::time::timeout(Duration::from_secs(20), third()).await.unwrap().unwrap();
    assert_same(&third, &image[2 * MIB as usize..3 * MIB as usize]);
    assert_same(&second, &image[MIB as usize..2 * MIB as usize]);
}

#[tokio::test]
async fn names_lists_and_refusals() {
    let dir = tempdir();
    make_image(&dir.path().join("image"), MIB, &mut Rng::new());
    let server = qemu_nbd(Version::V10, dir, &["-f", "raw", "-x", "diské", "-D", "words", "DIR/image"]);
    let found = list(&server.address(), &ConnectOptions::default()).await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].name.as_str(), found[0].description.as_str()), ("diské", "words"));
    for contexts in [&[][..], &[BASE_ALLOCATION]] {
        let e = connect(&server.address(), &wanted("other", contexts), &ConnectOptions::default()).await.unwrap_err();
        assert!(matches!(&e, NegotiateError::UnknownExport { export, .. } if export == "other"), "{e}");
        println!("{e}");
    }
    let bitmap = "qemu:dirty-bitmap:none";
    let e = connect(&server.address(), &wanted("diské", &[bitmap]), &ConnectOptions::default()).await.unwrap_err();
    assert!(matches!(&e, NegotiateError::NoContext { context, .. } if context == bitmap), "{e}");
    let client = client(&server.address(), "diské", &[BASE_ALLOCATION]).await;
    assert_eq!(client.export().description.as_deref(), Some("words"));
    let e = client.trim(Extent::new(0, 4096)).await.unwrap_err();
    assert!(matches!(e, NbdError::BadRequest { why: "it is exported read-only", .. }), "{e}");

    // A server for one client at a time: the second waits, and is told so.
    let dir = tempdir();
    make_image(&dir.path().join("image"), MIB, &mut Rng::new());
    let program = Version::V10.program("qemu-nbd");
    let server = Server::start(dir, program, &["-t", "-r", "-e", "1", "-f", "raw", "-k", "DIR/sock", "DIR/image"]);
    let _first = crate::nbd_help::client(&server.address(), "", &[]).await;
    let options = ConnectOptions { handshake: Duration::from_millis(300), ..ConnectOptions::default() };
    let e = connect(&server.address(), &wanted("", &[]), &options).await.unwrap_err();
    assert!(matches!(e, NegotiateError::Timeout { .. }), "{e}");

    let dir = tempdir();
    std::fs::write(dir.path().join("keys"), "user:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff")
        .unwrap();
    let server = nbdkit(dir, &["--tls=require", "--tls-psk=DIR/keys", "null", "1M"]);
    let e = connect(&server.address(), &wanted("", &[]), &ConnectOptions::default()).await.unwrap_err();
    assert!(matches!(e, NegotiateError::TlsRequired { .. }), "{e}");
    let e = list(&server.address(), &ConnectOptions::default()).await.unwrap_err();
    assert!(matches!(e, NegotiateError::TlsRequired { .. }), "{e}");
}

#[tokio::test]
async fn over_tcp() {
    let dir = tempdir();
    let image = make_image(&dir.path().join("image"), 4 * MIB, &mut Rng::new());
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let args = ["-f", "--exit-with-parent", "-i", "127.0.0.1", "-p", &port, "-P", "DIR/sock", "file", "DIR/image"];
    let _server = Server::start(dir, "nbdkit", &args);
    let source = source(&Address::Tcp(format!("127.0.0.1:{port}")), "", 4, LONGEST).await;
    assert_same(&read_all(&source, MIB, 8).await.unwrap(), &image);
}
