//! Sessions that outlive their connections: whatever byte a connection is lost at, the backup goes on over another, of
//! the same instant, and the restored bytes are the test's own.

#![allow(clippy::unwrap_used)]

mod common;

use std::process::{Child, Stdio};
use std::time::Duration;

use common::proxy::{Proxy, Way};
use common::side::{Serve, Side, socket};
use common::*;
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
    assert!(said.contains("gone") && said.contains("begun anew"), "{said}");
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
