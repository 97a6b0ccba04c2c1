//! Sessions that outlive their connections: whatever byte a connection is lost at, the backup goes on over another, of
//! the same instant, and the restored bytes are the test's own.

#![allow(clippy::unwrap_used)]

use std::process::{Child, Stdio};
use std::time::Duration;

use crate::common::proxy::{Proxy, Way};
use crate::common::side::{self, Serve, Side, socket};
use crate::common::*;
use livebackup::wire::message::{Ack, Begin, Event, Failure, FailureCode};
use livebackup::wire::resume::{Resume, Token};
use livebackup::wire::{Address, Client};
use serde_json::Value;
use tokio::time::timeout;

const LONG: Duration = Duration::from_secs(60);

/// A machine with something on both disks, its service, and a proxy before that.
fn served(version: Version, head: &str) -> (Side, Serve, Proxy) {
    let mut side = Side::new(version);
    side.start();
    side.cont();
    let mut rng = Rng::seeded(5);
    for _ in 0..4 {
        side.scatter(&mut rng);
    }
    let mut serve = Serve::start_configured(&side, head, "", &[]);
    serve.wait_until_attached(&side);
    let proxy = Proxy::unix(&socket(&side));
    (side, serve, proxy)
}

/// A running `livebackup backup` through the proxy.
fn backup(side: &Side, proxy: &Proxy, more: &[&str], environment: &[(&str, &str)]) -> Child {
    let mut command = livebackup();
    command.args(["--json", "backup", &format!("unix:{}/vm1", proxy.socket.display())]).arg(side.repo()).args(more);
    command.envs(environment.iter().copied()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Waits for it; its report and what it said.
fn done(child: Child) -> (Value, String) {
    let out = child.wait_with_output().unwrap();
    let (text, said) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{}\n{text}\n{said}", out.status);
    (serde_json::from_str(&text).unwrap(), said.into_owned())
}

/// One session through the proxy, acknowledging all as it comes; what the disks hold then.
async fn session(proxy: &Proxy, sizes: [u64; 2]) -> Result<[Vec<u8>; 2], Failure> {
    session_of(Token::random(), proxy, sizes).await
}

async fn session_of(token: Token, proxy: &Proxy, sizes: [u64; 2]) -> Result<[Vec<u8>; 2], Failure> {
    let client = Client::connect(&Address::Unix(proxy.socket.clone())).await?;
    let resume = Some(token);
    let begin = Begin { vm: "vm1".into(), chunk_bytes: 65536, wait: true, resume, ..Begin::default() };
    let mut session = client.begin(begin).await?;
    let mut images = sizes.map(|size| vec![0xaa; size as usize]);
    loop {
        let event = timeout(LONG, session.events.recv()).await.expect("the session goes on").unwrap()?;
        let (disk, extent) = match event {
            Event::Data { disk, offset_bytes, bytes } => {
                images[usize::from(disk)][offset_bytes as usize..][..bytes.len()].copy_from_slice(&bytes);
                (disk, livebackup::extent::Extent::new(offset_bytes, bytes.len() as u64))
            }
            Event::Zero { disk, extent } => {
                images[usize::from(disk)][extent.offset_bytes as usize..extent.end() as usize].fill(0);
                (disk, extent)
            }
            Event::Sent => continue,
            Event::Packed { .. } => panic!("nobody asked for compression"),
            Event::Same { .. } => panic!("nobody asked for a comparison"),
            Event::End(_) => return Ok(images),
        };
        let _ = session.acks.send(Ack { disk, extents: vec![extent] });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_byte_may_be_the_last_of_a_connection() {
    let (side, serve, proxy) = tokio::task::block_in_place(|| served(Version::V10, ""));
    let sizes = [side::SIZE; 2];
    assert!(session(&proxy, sizes).await.unwrap() == side.models);
    let (to_server, to_client) = (proxy.bytes(Way::ToServer), proxy.bytes(Way::ToClient));
    assert!(to_server > 500 && to_client > 1 << 20, "{to_server} {to_client}");
    let mut rng = Rng::seeded(11);
    // Begin ends some 300 bytes after the hello's 20; its answer some kilobytes after the server's.
    let mut cuts: Vec<_> = [20, 21, 100, 250, 350, 400].map(|at| (Way::ToServer, at)).into();
    cuts.extend([60, 80, 130, 140, 200, 1000, 3000].map(|at| (Way::ToClient, at)));
    cuts.extend((0..6).map(|_| (Way::ToServer, 350 + rng.below(to_server - 350))));
    cuts.extend((0..10).map(|_| (Way::ToClient, 4000 + rng.below(to_client - 4000))));
    cuts.extend([1, 12, 100, 500].map(|back| (Way::ToClient, to_client - back)));
    let mut gone = 0;
    for cut in cuts {
        let before = proxy.cuts_made();
        proxy.cut(&[cut]);
        let images = match session(&proxy, sizes).await {
            // The server had not begun, or did not know that the answer was lost: it is asked for anew.
            Err(failure) if matches!(failure.code, FailureCode::SessionGone | FailureCode::Disconnected) => {
                assert!(cut.1 < 8000, "{cut:?}: {failure}");
                gone += 1;
                proxy.cut(&[]);
                session(&proxy, sizes).await.unwrap()
            }
            other => other.unwrap_or_else(|failure| panic!("{cut:?}: {failure}")),
        };
        assert!(images == side.models, "{cut:?}");
        // Acknowledgements need not come before the end, and the last words are not always as long.
        let late = cut.0 == Way::ToServer || cut.1 + 2000 > to_client;
        assert!(proxy.cuts_made() > before || late, "{cut:?}");
        proxy.cut(&[]);
    }
    assert!(gone < 14, "{gone} sessions were not resumed");
    // Several cuts of one session.
    proxy.cut(&[(Way::ToClient, 2 << 20), (Way::ToClient, 700_000), (Way::ToServer, 400), (Way::ToClient, 5000)]);
    let (connections, token) = (proxy.connections(), Token::random());
    assert!(session_of(token, &proxy, sizes).await.unwrap() == side.models);
    assert!(proxy.connections() >= connections + 4);
    // Its token is good for nothing any more.
    let client = Client::connect(&Address::Unix(proxy.socket.clone())).await.unwrap();
    let refused = client.resume(Resume { vm: "vm1".into(), token, have: vec![] }).await.unwrap_err();
    assert_eq!(refused.code, FailureCode::SessionGone);
    assert!(serve.log().contains("a session that is not there was to be resumed: refused"), "{}", serve.log());
}

#[test]
fn a_full_and_an_incremental_go_on_where_they_were_lost() {
    for version in VERSIONS {
        let (mut side, serve, proxy) = served(version, "");
        proxy.cut(&[(Way::ToClient, 1_500_000), (Way::ToClient, 900_000)]);
        let (report, said) = done(backup(&side, &proxy, &["--compression", "none"], &[]));
        assert_eq!((&report["level"], proxy.cuts_made()), (&"full".into(), 2), "{said}");
        assert!(said.contains("connecting again") && report["warnings"] == serde_json::json!([]), "{said} {report}");
        side.prove("latest");

        // The guest goes on while the connection is away: the point is of the instant all the same.
        side.write_at(0, 0, 1 << 20, 0x11);
        side.write_at(1, 1 << 20, 2 << 20, 0x22);
        let models = side.models.clone();
        proxy.cut(&[(Way::ToClient, 1_000_000)]);
        proxy.fall_with_the_next_cut();
        let running = backup(&side, &proxy, &[], &[]);
        wait_until("the cut", || proxy.cuts_made() == 3);
        wait_until("the server to hold it", || serve.log().matches("point in time is held").count() == 3);
        let status = side.ok(&["status", &format!("unix:{}/vm1", socket(&side).display())]);
        assert!(!status["session"]["lost"].is_null(), "{status}");
        let after = {
            side.write_at(0, 0, 3 << 20, 0x33);
            side.write_at(1, 0, 3 << 20, 0x44);
            std::mem::replace(&mut side.models, models)
        };
        proxy.rise();
        let (report, _) = done(running);
        assert_eq!(report["level"], "incremental");
        side.prove("latest");
        side.models = after;
        let (report, _) = done(backup(&side, &proxy, &[], &[]));
        assert_eq!(report["level"], "incremental");
        side.prove("latest");
        assert_eq!(serve.log().matches("ERROR").count(), 0, "{}", serve.log());
    }
}

/// Bytes that compress by about half; no two KiB alike.
fn text(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng::seeded(seed);
    let words = |n: usize| match (n / 128).is_multiple_of(2) {
        true => rng.below(u64::MAX),
        false => 0x2020_6f6c_6c65_6820 ^ (n as u64 / 128),
    };
    (0..len / 8).map(words).flat_map(u64::to_le_bytes).chain(vec![7; len % 8]).collect()
}

#[test]
fn what_is_compressed_goes_on_where_it_was_lost() {
    for (version, how) in [(Version::V10, "zstd"), (Version::V7, "zstd"), (Version::V10, "lz4"), (Version::V10, "auto")]
    {
        let mut side = Side::new(version);
        side.models[0] = text(3, side.models[0].len());
        std::fs::write(side.path("vd0.raw"), &side.models[0]).unwrap();
        side.start();
        side.cont();
        let mut serve = Serve::start(&side, "");
        serve.wait_until_attached(&side);
        let proxy = Proxy::unix(&socket(&side));
        proxy.cut(&[(Way::ToClient, 1_500_000), (Way::ToClient, 900_000)]);
        let (report, said) = done(backup(&side, &proxy, &["--wire-compression", how], &[]));
        assert_eq!((&report["level"], proxy.cuts_made()), (&"full".into(), 2), "{said}");
        side.prove("latest");
        let came = report["wire_bytes"].as_u64().unwrap();
        let stored = report["disks"][0]["stored_bytes"].as_u64().unwrap();
        // Whether auto has begun to compress is a matter of time.
        assert!(how == "auto" || came < side::SIZE * 2 / 3, "{how}: {came} {report}");
        assert!(how != "zstd" || came.abs_diff(stored) < 100_000, "what came is what is stored: {report}");
        assert!(stored < side::SIZE * 2 / 3, "{report}");

        side.write_at(0, 1 << 20, 3 << 20, 0x11);
        side.write_at(1, 1 << 20, 2 << 20, 0x22);
        proxy.cut(&[(Way::ToClient, 5000)]);
        let (report, _) = done(backup(&side, &proxy, &["--wire-compression", how], &[]));
        assert_eq!((&report["level"], proxy.cuts_made()), (&"incremental".into(), 3));
        assert!(how == "auto" || report["wire_bytes"].as_u64().unwrap() < 200_000, "{report}");
        side.prove("latest");
        // In one process there is no line.
        assert_eq!(serve.log().matches("ERROR").count(), 0, "{}", serve.log());
        serve.stop();
        let report = side.backup("full");
        assert!(report["wire_bytes"].is_null(), "{report}");
    }
}

#[test]
fn a_scan_goes_on_where_it_was_lost() {
    for (version, how) in [(Version::V10, "none"), (Version::V10, "zstd"), (Version::V7, "none")] {
        let (mut side, serve, proxy) = served(version, "");
        let options = ["--wire-compression", how];
        for disk in 0..2 {
            for n in 0..48 {
                side.write_at(disk, n << 17, 1 << 17, 1 + n as u8);
            }
        }
        done(backup(&side, &proxy, &options, &[]));
        side.prove("latest");
        // Lost on the way to the client with much of what differs; early, with the digests; on the way to the server.
        let much = if how == "none" { 60_000 } else { 7000 };
        let cuts = [
            vec![(Way::ToClient, much), (Way::ToClient, 6000)],
            vec![(Way::ToClient, 4500)],
            vec![(Way::ToServer, 1500)],
        ];
        for (round, cuts) in cuts.iter().enumerate() {
            let fill = 60 + 60 * round as u8;
            let old = side.models.clone();
            for n in 0..24 {
                side.write_at(0, n << 18, 1 << 17, fill + n as u8);
                side.write_at(1, (n << 18) + (1 << 16), 1 << 16, fill + 30 + n as u8);
            }
            side.write_at(1, 5 << 20, 1 << 20, 0);
            for (node, name) in side.qemu().bitmaps().into_iter().filter(|(_, name)| name.contains("-since-")) {
                side.qemu().qmp("block-dirty-bitmap-remove", serde_json::json!({"node": node, "name": name}));
            }
            let before = proxy.cuts_made();
            proxy.cut(cuts);
            let (report, said) = done(backup(&side, &proxy, &options, &[]));
            assert!(proxy.cuts_made() > before, "{how} {cuts:?}: {said}");
            proxy.cut(&[]);
            for (index, (old, new)) in old.iter().zip(&side.models).enumerate() {
                let disk = &report["disks"][index];
                assert_eq!((&disk["taken"], &disk["read_bytes"]), (&"scan".into(), &side::SIZE.into()), "{report}");
                let chunk = 128 << 10;
                let same = old
                    .chunks(chunk)
                    .zip(new.chunks(chunk))
                    .filter(|(a, b)| a == b)
                    .map(|(a, _)| a.len())
                    .sum::<usize>();
                assert_eq!(disk["same_bytes"], same, "{cuts:?}: {report}");
            }
            side.prove("latest");
        }
        assert_eq!(serve.log().matches("ERROR").count(), 0, "{}", serve.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledgements_that_a_cut_has_swallowed_are_said_again() {
    let (mut side, serve, proxy) = tokio::task::block_in_place(|| served(Version::V10, ""));
    tokio::task::block_in_place(|| {
        side.write_at(0, 0, 6 << 20, 0x11);
        // Many events, so that the session is open for long.
        (0..48).for_each(|n| side.write_at(1, n << 17, 1 << 16, 0x22));
    });
    let models = side.models.clone();
    let client = Client::connect(&Address::Unix(proxy.socket.clone())).await.unwrap();
    let resume = Some(Token::random());
    let begin = Begin { vm: "vm1".into(), chunk_bytes: 65536, resume, ..Begin::default() };
    let mut session = client.begin(begin).await.unwrap();
    let mut images = models.clone().map(|model| vec![0xaa; model.len()]);
    let mut apply = |event| {
        let (disk, extent) = match event {
            Event::Data { disk, offset_bytes, bytes } => {
                images[usize::from(disk)][offset_bytes as usize..][..bytes.len()].copy_from_slice(&bytes);
                (disk, livebackup::extent::Extent::new(offset_bytes, bytes.len() as u64))
            }
            Event::Zero { disk, extent } => {
                images[usize::from(disk)][extent.offset_bytes as usize..extent.end() as usize].fill(0);
                (disk, extent)
            }
            other => panic!("{other:?}"),
        };
        Ack { disk, extents: vec![extent] }
    };
    // All of the first disk arrives, and is acknowledged; the server does not hear of it.
    let mut acks = vec![];
    while acks.last().is_none_or(|ack: &Ack| ack.extents[0].end() < side::SIZE) {
        let event = timeout(LONG, session.events.recv()).await.unwrap().unwrap().unwrap();
        acks.push(apply(event));
    }
    // The guest writes all over it: the old bytes are kept for who has them already.
    let scratch = |side: &Side| {
        let status = side.ok(&["status", &format!("unix:{}/vm1", socket(side).display())]);
        status["session"]["scratch_bytes"].as_u64().unwrap_or_else(|| panic!("the session is over: {status}"))
    };
    tokio::task::block_in_place(|| {
        side.write_at(0, 0, 6 << 20, 0x33);
        wait_until("the scratch to hold it", || scratch(&side) >= 6 << 20);
    });
    proxy.swallow();
    for ack in acks {
        session.acks.send(ack).unwrap();
    }
    wait_until("them to be swallowed", || proxy.swallowed() > 100);
    assert!(scratch(&side) >= 6 << 20);
    proxy.sever();
    // As many as wait, and one more: who reads sees that the connection is gone.
    for _ in 0..10 {
        let event = timeout(LONG, session.events.recv()).await.unwrap().unwrap().unwrap();
        apply(event);
    }
    tokio::task::block_in_place(|| wait_until("the scratch to shrink", || scratch(&side) < 1 << 20));
    assert!(serve.log().contains("a client is back"), "{}", serve.log());
    loop {
        match timeout(LONG, session.events.recv()).await.unwrap().unwrap().unwrap() {
            Event::Sent => {}
            Event::End(_) => break,
            event => drop(apply(event)),
        }
    }
    assert!(images == models);
}

#[test]
fn past_the_grace_time_all_is_taken_out_and_begun_anew() {
    let (mut side, serve, proxy) = served(Version::V10, "resume_grace_s = 1");
    let before = side.qemu().nodes();
    proxy.cut(&[(Way::ToClient, 2_000_000)]);
    proxy.fall_with_the_next_cut();
    let running = backup(&side, &proxy, &[], &[]);
    wait_until("the server to give it up", || serve.log().contains("did not come back in time"));
    wait_until("the fleece to be out of QEMU", || side.qemu().nodes() == before);
    side.write_at(0, 0, 1 << 20, 0x55);
    proxy.rise();
    let (report, said) = done(running);
    assert!(report["warnings"][0].as_str().unwrap().contains("begun anew"), "{report}");
    assert!(said.contains("gone") && said.contains("begins anew"), "{said}");
    side.prove("latest");
}

#[test]
fn a_server_that_was_started_anew_knows_no_session() {
    for kill in [true, false] {
        let (mut side, serve, proxy) = served(Version::V10, "");
        proxy.cut(&[(Way::ToClient, 2_000_000)]);
        proxy.fall_with_the_next_cut();
        let running = backup(&side, &proxy, &[], &[]);
        wait_until("the server to hold it", || serve.log().contains("point in time is held"));
        // Ended in good order, it does not wait for the grace time.
        if kill {
            serve.kill()
        } else {
            serve.stop()
        }
        side.write_at(1, 0, 1 << 20, 0x66);
        let mut serve = Serve::start(&side, "");
        serve.wait_until_attached(&side);
        proxy.rise();
        let (report, said) = done(running);
        assert!(report["warnings"][0].as_str().unwrap().contains("started anew"), "{report} {said}");
        side.prove("latest");
    }
}

#[test]
fn who_stops_a_backup_leaves_nothing_held() {
    let (mut side, serve, proxy) = served(Version::V10, "");
    let before = side.qemu().nodes();
    let go = side.home.path().join("go");
    let pause = format!("backup.begun={}", go.display());
    let running = backup(&side, &proxy, &[], &[("LIVEBACKUP_PAUSE_AT", &pause)]);
    wait_until("the fleece", || side.qemu().nodes() != before);
    wait_until("the answer", || proxy.bytes(Way::ToClient) > 200_000);
    let pid = nix::unistd::Pid::from_raw(running.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    std::fs::write(&go, "").unwrap();
    let out = running.wait_with_output().unwrap();
    assert!(!out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    wait_until("the fleece to be out of QEMU", || side.qemu().nodes() == before);
    assert!(serve.log().contains("gave its backup up") && !serve.log().contains("is held"), "{}", serve.log());
}
