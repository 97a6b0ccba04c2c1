//! A peer that sends mutated QMP: every call ends, no task panics.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::Rng;
use livebackup::monitor::{Address, Monitor, MonitorError, machine, probe};
use serde_json::{Value, json};

static PANICS: AtomicUsize = AtomicUsize::new(0);

/// A value that QEMU would not send there.
fn strange(rng: &mut Rng) -> Value {
    match rng.below(8) {
        0 => Value::Null,
        1 => json!(-1),
        2 => json!(u64::MAX),
        3 => json!(1e300),
        4 => json!([[[]], {}, ""]),
        5 => json!("x".repeat(rng.below(1 << 12) as usize)),
        6 => json!({"return": {"id": 1}, "status": 7, "name": {}, "qemu": []}),
        _ => json!({}),
    }
}

fn mutate(rng: &mut Rng, mut line: Vec<u8>) -> Vec<u8> {
    for _ in 0..rng.below(3) {
        let at = rng.below(line.len() as u64) as usize;
        match rng.below(3) {
            0 => line[at] = rng.next() as u8,
            1 => line.insert(at, rng.next() as u8),
            _ => line.truncate(at.max(1)),
        }
    }
    line
}

/// Answers each line of the client with something; mostly with a reply that has the right id.
fn serve(listener: &UnixListener, mut rng: Rng) {
    let Ok((stream, _)) = listener.accept() else { return };
    let mut stream = BufReader::new(stream);
    let qemu = json!({"major": 10, "minor": 0, "micro": 0});
    let greeting = json!({"QMP": {"version": {"qemu": qemu, "package": ""}, "capabilities": []}});
    let _ = stream.get_mut().write_all(format!("{greeting}\r\n").as_bytes());
    let mut line = String::new();
    while stream.read_line(&mut line).is_ok_and(|n| n > 0) {
        let id = serde_json::from_str::<Value>(&line).unwrap()["id"].as_u64().unwrap();
        line.clear();
        for _ in 0..=rng.below(2) {
            let answer = match rng.below(10) {
                0 => json!({"event": strange(&mut rng), "timestamp": strange(&mut rng), "data": strange(&mut rng)}),
                1 => json!({"event": "STOP", "timestamp": {"seconds": rng.next(), "microseconds": rng.next()}}),
                2 => json!({"error": strange(&mut rng), "id": id}),
                3 => json!({"error": {"class": strange(&mut rng), "desc": strange(&mut rng)}, "id": strange(&mut rng)}),
                4 => json!({"return": {}, "id": id.wrapping_add(rng.below(3))}),
                5 => greeting.clone(),
                _ => json!({"return": strange(&mut rng), "id": id}),
            };
            let mut bytes = answer.to_string().into_bytes();
            if rng.below(20) == 0 {
                bytes = mutate(&mut rng, bytes);
            }
            bytes.extend_from_slice(b"\r\n");
            if stream.get_mut().write_all(&bytes).is_err() {
                return;
            }
        }
        // Or no answer at all: an id that never comes. Answer it now, or the call waits for its limit.
        if writeln!(stream.get_mut(), "{}\r", json!({"return": {}, "id": id})).is_err() {
            return;
        }
    }
}

// Two threads: this one waits for the peer while the connection closes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_ends() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        hook(info);
    }));
    let mut rng = Rng::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peer");
    let listener = UnixListener::bind(&path).unwrap();
    let (mut connected, mut calls) = (0, 0);
    for _ in 0..1000 {
        let seed = rng.next();
        let listener = listener.try_clone().unwrap();
        let server = std::thread::spawn(move || serve(&listener, Rng::seeded(seed)));
        if let Ok(monitor) = Monitor::connect(&Address::Unix(path.clone())).await {
            connected += 1;
            for _ in 0..20 {
                let call = monitor.raw_within(Duration::from_secs(10), "query-status", json!({}));
                match call.await {
                    Err(e @ MonitorError::Deadline { .. }) => panic!("seed {seed}: {e}"),
                    Err(e) if e.is_closed() => break,
                    _ => calls += 1,
                }
            }
            let _ = machine(&monitor).await;
            let _ = probe(&monitor, "x-").await;
        }
        server.join().unwrap();
    }
    println!("{connected} connections, {calls} calls answered");
    assert!(connected > 50 && calls > 500, "{connected} connections, {calls} calls");
    assert_eq!(PANICS.load(Ordering::SeqCst), 0);
}
