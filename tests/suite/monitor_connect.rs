//! Making, refusing and ending connections: to both QEMU versions, and to peers that behave badly.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::*;
use livebackup::monitor::{Address, Monitor, MonitorError, Process};
use serde_json::json;

const SHORT: Duration = Duration::from_millis(300);

async fn refused(path: &Path) -> MonitorError {
    Monitor::connect_within(&Address::Unix(path.to_owned()), SHORT).await.unwrap_err()
}

/// A listener of the test's own that treats its first client like this.
fn peer(dir: &Path, serve: impl FnOnce(UnixStream) + Send + 'static) -> Address {
    let path = dir.join("peer");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || serve(listener.accept().unwrap().0));
    Address::Unix(path)
}

fn greeting(major: u32, minor: u32) -> String {
    let version = json!({"qemu": {"major": major, "minor": minor, "micro": 0}, "package": ""});
    json!({"QMP": {"version": version, "capabilities": ["oob"]}}).to_string() + "\r\n"
}

/// Greets as QEMU 10.0 and answers the two commands of the handshake; `serve` goes on from there.
fn polite(stream: UnixStream, serve: impl FnOnce(BufReader<UnixStream>)) {
    let mut stream = BufReader::new(stream);
    stream.get_mut().write_all(greeting(10, 0).as_bytes()).unwrap();
    for answer in [json!({}), json!([])] {
        let id = read_id(&mut stream);
        writeln!(stream.get_mut(), "{}\r", json!({"return": answer, "id": id})).unwrap();
    }
    serve(stream);
}

fn read_id(stream: &mut BufReader<UnixStream>) -> u64 {
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    serde_json::from_str::<serde_json::Value>(&line).unwrap()["id"].as_u64().unwrap()
}

#[tokio::test]
async fn a_taken_monitor_says_what_to_do() {
    for version in VERSIONS {
        let qemu = Qemu::with_raw_disk(version, 1 << 20);
        let address = Address::Unix(qemu.socket());
        let first = Monitor::connect(&address).await.unwrap();
        // One waits in the backlog, the others are not even let into it.
        for _ in 0..4 {
            let error = refused(&qemu.socket()).await;
            assert!(matches!(error, MonitorError::Taken { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains("another client has it") && text.contains("-qmp unix:"), "{text}");
        }
        let mut waiting = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let path = qemu.socket();
            waiting.spawn(async move { refused(&path).await });
        }
        for error in waiting.join_all().await {
            assert!(matches!(error, MonitorError::Taken { .. }), "{error}");
        }
        first.raw("query-status", json!({})).await.unwrap();
    }
}

#[tokio::test]
async fn what_is_no_monitor_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = refused(&dir.path().join("nothing")).await;
    assert!(matches!(error, MonitorError::NoSocket { .. }), "{error}");
    assert!(error.to_string().contains("nothing") && error.to_string().contains("Is QEMU running"), "{error}");

    std::fs::write(dir.path().join("file"), "").unwrap();
    assert!(matches!(refused(&dir.path().join("file")).await, MonitorError::NoSocket { .. }));
    assert!(matches!(refused(dir.path()).await, MonitorError::NoSocket { .. }));
    drop(UnixListener::bind(dir.path().join("left-over")).unwrap());
    assert!(matches!(refused(&dir.path().join("left-over")).await, MonitorError::NoSocket { .. }));
    let long = refused(&dir.path().join("x".repeat(200))).await;
    assert!(matches!(long, MonitorError::Unreachable { .. }), "{long}");

    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let error = Monitor::connect(&Address::Tcp("127.0.0.1".into(), unused)).await.unwrap_err();
    assert!(matches!(error, MonitorError::NoSocket { .. }), "{error}");
    let error = Monitor::connect(&Address::Tcp("no-such-host.invalid".into(), 1)).await.unwrap_err();
    assert!(matches!(error, MonitorError::Unreachable { .. }), "{error}");
}

#[tokio::test]
async fn the_human_monitor_is_not_taken_for_qmp() {
    for version in VERSIONS {
        let qemu = Qemu::start_with(version, &["-monitor", "unix:DIR/hmp,server=on,wait=off"], |_| ());
        let error = refused(&qemu.path("hmp")).await;
        assert!(matches!(error, MonitorError::NotQmp { .. }), "{error}");
        assert!(error.to_string().contains("QEMU") && error.to_string().contains("-monitor"), "{error}");
    }
}

#[tokio::test]
async fn garbage_instead_of_a_greeting() {
    let dir = tempfile::tempdir().unwrap();
    for said in [
        "hello\n",
        "{\n",
        "[]\n",
        "7\n",
        "{\"QMP\":{}}\n",
        "\u{fffd}\0\n",
        "{\"QMP\":{\"version\":{\"qemu\":{\"major\":-1}}}}\n",
    ] {
        let address = peer(dir.path(), move |mut stream| {
            stream.write_all(said.as_bytes()).unwrap();
            std::thread::sleep(SHORT * 2);
        });
        let error = Monitor::connect_within(&address, SHORT).await.unwrap_err();
        assert!(matches!(error, MonitorError::NotQmp { .. }), "{said:?}: {error}");
    }
    let address = peer(dir.path(), drop);
    let error = Monitor::connect_within(&address, SHORT).await.unwrap_err();
    assert!(matches!(error, MonitorError::Closed { .. }), "{error}");
}

#[tokio::test]
async fn an_old_qemu_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    for (major, minor) in [(6, 2), (7, 1)] {
        let address = peer(dir.path(), move |mut stream| {
            stream.write_all(greeting(major, minor).as_bytes()).unwrap();
            std::thread::sleep(SHORT);
        });
        let error = Monitor::connect(&address).await.unwrap_err();
        assert!(matches!(error, MonitorError::TooOld { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains(&format!("{major}.{minor}.0")) && text.contains("7.2") && text.contains("because"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn a_silent_peer_after_the_greeting_runs_out_of_time() {
    let dir = tempfile::tempdir().unwrap();
    let address = peer(dir.path(), |mut stream| {
        stream.write_all(greeting(10, 0).as_bytes()).unwrap();
        std::thread::sleep(SHORT * 3);
    });
    let error = Monitor::connect_within(&address, SHORT).await.unwrap_err();
    assert!(matches!(&error, MonitorError::Deadline { command, .. } if command == "qmp_capabilities"), "{error}");
}

#[tokio::test]
async fn an_end_in_mid_reply_fails_every_call() {
    let dir = tempfile::tempdir().unwrap();
    let address = peer(dir.path(), |stream| {
        polite(stream, |mut stream| {
            let id = read_id(&mut stream);
            write!(stream.get_mut(), "{{\"id\": {id}, \"return\": {{\"status\": \"runn").unwrap();
        });
    });
    let monitor = Monitor::connect(&address).await.unwrap();
    let (a, b) = tokio::join!(monitor.raw("query-status", json!({})), monitor.raw("query-block", json!({})));
    for error in [a.unwrap_err(), b.unwrap_err()] {
        assert!(error.is_closed(), "{error}");
        // Unread commands turn the peer's end into a reset; what it had said may be lost with that.
        let text = error.to_string();
        assert!(text.contains("in the middle of") || text.contains("reset") || text.contains("ended"), "{text}");
    }
    assert!(monitor.is_closed());
    monitor.closed().await;
}

#[tokio::test]
async fn garbage_after_the_handshake_ends_the_connection() {
    let dir = tempfile::tempdir().unwrap();
    let address = peer(dir.path(), |stream| {
        polite(stream, |mut stream| {
            read_id(&mut stream);
            stream.get_mut().write_all(b"{\"return\" oops}\r\n").unwrap();
            std::thread::sleep(SHORT * 3);
        });
    });
    let monitor = Monitor::connect(&address).await.unwrap();
    let error = monitor.raw("query-status", json!({})).await.unwrap_err();
    assert!(error.is_closed() && error.to_string().contains("oops"), "{error}");
}

#[tokio::test]
async fn a_line_without_end_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let address = peer(dir.path(), |stream| {
        polite(stream, |mut stream| {
            let piece = vec![b' '; 1 << 20];
            while stream.get_mut().write_all(&piece).is_ok() {}
        });
    });
    let monitor = Monitor::connect(&address).await.unwrap();
    let error = monitor.raw("query-status", json!({})).await.unwrap_err();
    assert!(error.is_closed() && error.to_string().contains("a line of more than"), "{error}");
}

#[tokio::test]
async fn replies_to_others_and_unknown_events_are_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let address = peer(dir.path(), |stream| {
        polite(stream, |mut stream| {
            let id = read_id(&mut stream);
            for line in [
                json!({"return": "for nobody", "id": id + 1}),
                json!({"return": "for another kind of client", "id": "libvirt-17"}),
                json!({"error": {"class": "GenericError", "desc": "for nobody"}}),
                json!({"event": "FROM_THE_FUTURE", "data": [1], "timestamp": {"seconds": -1, "microseconds": -1}}),
                json!({"return": "ours", "id": id, "new-member": {}}),
                json!({"return": "twice", "id": id}),
            ] {
                writeln!(stream.get_mut(), "\r\n{line}\r").unwrap();
            }
            let id = read_id(&mut stream);
            writeln!(stream.get_mut(), "{}\r", json!({"error": {"desc": "no class"}, "id": id})).unwrap();
            read_id(&mut stream);
        });
    });
    let monitor = Monitor::connect(&address).await.unwrap();
    let mut events = monitor.subscribe();
    assert_eq!(monitor.raw("query-status", json!({})).await.unwrap(), "ours");
    assert_eq!(events.recv().await.unwrap().name, "FROM_THE_FUTURE");
    let error = monitor.raw("query-status", json!({})).await.unwrap_err();
    assert_eq!(error.refusal(), Some("no class"));
}

#[tokio::test]
async fn a_dropped_monitor_makes_room_at_once() {
    for version in VERSIONS {
        let qemu = Qemu::with_raw_disk(version, 1 << 20);
        let address = Address::Unix(qemu.socket());
        let mut slowest = Duration::ZERO;
        for i in 0..20 {
            let start = Instant::now();
            let monitor = Monitor::connect(&address).await.unwrap();
            slowest = slowest.max(start.elapsed());
            let clone = monitor.clone();
            drop(monitor);
            clone.raw("query-status", json!({})).await.unwrap();
            if i % 2 == 1 {
                // Nobody waits for this one; it is handed over before the end all the same.
                drop(tokio::time::timeout(Duration::ZERO, clone.raw("query-block", json!({}))).await);
            }
            let mut events = clone.subscribe();
            drop(clone);
            assert!(events.recv().await.is_err(), "the receiver learns of the end");
        }
        assert!(slowest < Duration::from_secs(60), "{slowest:?}");
        println!("{version:?}: the slowest of 20 connections took {slowest:?}");
    }
}

#[tokio::test]
async fn a_monitor_dropped_while_qemu_hangs_is_closed_soon() {
    let dir = tempfile::tempdir().unwrap();
    let (sender, ended) = std::sync::mpsc::channel();
    let address = peer(dir.path(), move |stream| {
        polite(stream, |mut stream| {
            std::thread::sleep(Duration::from_secs(3));
            let start = Instant::now();
            std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
            sender.send(start.elapsed()).unwrap();
        });
    });
    let monitor = Monitor::connect(&address).await.unwrap();
    // More than the socket holds.
    let big = json!({"text": "x".repeat(4 << 20)});
    let error = monitor.raw_within(Duration::from_millis(50), "query-status", big).await.unwrap_err();
    assert!(matches!(error, MonitorError::Deadline { .. }), "{error}");
    drop(monitor);
    tokio::time::sleep(Duration::from_millis(3500)).await;
    assert!(ended.recv_timeout(Duration::from_secs(60)).unwrap() < Duration::from_secs(60));
}

#[tokio::test]
async fn tcp_works_but_for_descriptors() {
    for version in VERSIONS {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let qemu = Qemu::start_with(version, &["-qmp", &format!("tcp:127.0.0.1:{port},server=on,wait=off")], |_| ());
        for host in ["127.0.0.1", "localhost"] {
            let monitor = Monitor::connect(&Address::Tcp(host.into(), port)).await.unwrap();
            assert_eq!(monitor.peer_process(), Process::of_pid(qemu.pid() as i32));
            assert!(!monitor.can_pass_fds());
            let file = std::fs::File::open("/dev/null").unwrap();
            let fd = std::os::fd::AsFd::as_fd(&file);
            let error = monitor.send_fd("getfd", json!({"fdname": "x"}), fd).await.unwrap_err();
            assert!(matches!(error, MonitorError::Descriptor { .. }), "{error}");
            assert_eq!(monitor.raw("query-status", json!({})).await.unwrap()["status"], "prelaunch");
        }
    }
}

/// As libvirt does it: somebody else binds the socket and QEMU gets the listening descriptor.
#[tokio::test]
async fn the_process_is_qemu_and_not_who_bound_the_socket() {
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    for version in VERSIONS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bound-by-us");
        let listener = UnixListener::bind(&path).unwrap();
        // SAFETY: the listener's descriptor is open; the copy belongs to us alone. Copied without close-on-exec.
        let copy = unsafe { OwnedFd::from_raw_fd(nix::libc::dup(listener.as_raw_fd())) };
        let chardev = format!("socket,id=mon,fd={},server=on,wait=off", copy.as_raw_fd());
        let args = ["-chardev", &chardev, "-mon", "chardev=mon,mode=control"];
        let qemu = Qemu::start_with(version, &args, |_| ());
        let monitor = Monitor::connect(&Address::Unix(path)).await.unwrap();
        assert_eq!(monitor.peer_process(), Process::of_pid(qemu.pid() as i32));
    }
}

/// A proxy is never taken for QEMU.
#[tokio::test]
async fn behind_a_proxy_no_process_is_claimed_but_qemu() {
    let qemu = Qemu::with_raw_disk(Version::V10, 1 << 20);
    let dir = tempfile::tempdir().unwrap();
    let target = qemu.socket();
    let address = peer(dir.path(), move |client| {
        let server = UnixStream::connect(target).unwrap();
        let (mut a, mut b) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut a, &mut b));
        let (mut client, mut server) = (client, server);
        let _ = std::io::copy(&mut server, &mut client);
    });
    let monitor = Monitor::connect(&address).await.unwrap();
    assert_eq!(monitor.peer_process(), None);
    monitor.raw("query-status", json!({})).await.unwrap();
}
