//! The agent's channel: a real qemu-ga in a real guest, on both QEMUs; and peers that play an agent where the real one
//! cannot be made to misbehave that way.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::guest::*;
use common::*;
use livebackup::agent::{Address, AgentError, Channel, FreezeStatus};
use serde_json::{Value, json};

/// A hang guard.
const LONG: Duration = Duration::from_secs(60);
/// For what must not be answered.
const SHORT: Duration = Duration::from_millis(1500);

async fn open(socket: &Path) -> Channel {
    Channel::open(&Address(socket.into()), LONG).await.unwrap()
}

fn restart_agent(guest: &mut Guest, options: &str) {
    guest.sh("killall -9 qemu-ga; while pidof qemu-ga; do usleep 20000; done");
    guest.sh(&format!(
        "setsid qemu-ga -m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0 -t /run {options} \
         </dev/null >/dev/null 2>&1 &"
    ));
}

async fn with_a_real_agent(version: Version) {
    let disks = [GuestDisk::raw("vd0", 16 << 20).with_ext4(), GuestDisk::qcow2("vd1", 16 << 20).with_ext4()];
    let mut guest = Guest::boot(version, &disks);
    let socket = guest.agent();

    // What it tells.
    let mut agent = open(&socket).await;
    let info = agent.info().await.unwrap();
    assert!(info.version.starts_with(|c: char| c.is_ascii_digit()) && info.can("guest-fsfreeze-freeze"), "{info:?}");
    guest.sh("hostname small-guest");
    assert_eq!(agent.host_name().await.unwrap(), "small-guest");
    assert!(!agent.os().await.unwrap().kernel_release.is_empty());
    let mut found = agent.file_systems().await.unwrap();
    found.sort_by(|a, b| a.mountpoint.cmp(&b.mountpoint));
    let seen: Vec<_> = found.iter().map(|f| (f.mountpoint.as_str(), f.kind.as_str())).collect();
    assert_eq!(seen, [("/mnt/vd0", "ext4"), ("/mnt/vd1", "ext4")]);
    assert_eq!(found[0].disk[0].dev, "/dev/vda", "{found:?}");

    // A program, with input, output and an exit code.
    let number = agent.execute("/bin/sh", &["-c", "cat; echo no >&2; exit 7"], b"\0said").await.unwrap();
    let done = loop {
        if let Some(done) = agent.executed(number).await.unwrap() {
            break done;
        }
    };
    assert_eq!((done.exit_code, &*done.output, &*done.errors), (Some(7), &b"\0said"[..], &b"no\n"[..]));

    // A second client gets silence, and the channel when the first has gone.
    let taken = Channel::open(&Address(socket.clone()), SHORT).await.unwrap_err();
    assert!(matches!(taken, AgentError::Silent { .. }) && taken.to_string().contains("another program"), "{taken}");
    drop(agent);

    // What dead clients left: half a line, and answers that nobody took.
    UnixStream::connect(&socket).unwrap().write_all(b"{\"execute\":\"guest-pi").unwrap();
    assert_eq!(open(&socket).await.freeze_status().await.unwrap(), FreezeStatus::Thawed);
    let mut left = UnixStream::connect(&socket).unwrap();
    left.write_all(b"{\"execute\":\"guest-get-host-name\"}\n{\"execute\":\"guest-info\"}\n{\"exec").unwrap();
    drop(left);
    let mut agent = open(&socket).await;
    assert_eq!(agent.freeze_status().await.unwrap(), FreezeStatus::Thawed);

    // It hangs; its late answer is nobody's.
    guest.sh("killall -STOP qemu-ga");
    let late = agent.call("guest-get-host-name", json!({}), SHORT).await.unwrap_err();
    assert!(matches!(late, AgentError::Late { .. }) && late.to_string().contains("guest-get-host-name"), "{late}");
    let silent = agent.call("guest-ping", json!({}), SHORT).await.unwrap_err();
    assert!(matches!(silent, AgentError::Silent { .. }), "{silent}");
    guest.sh("killall -CONT qemu-ga");
    assert_eq!(agent.freeze_status().await.unwrap(), FreezeStatus::Thawed);

    // Frozen, all and by name; it refuses nearly everything.
    assert_eq!(agent.freeze(&["/mnt/vd1".to_owned()], LONG).await.unwrap(), 1);
    guest.sh("touch /mnt/vd0/works");
    assert_eq!(agent.thaw().await.unwrap(), 1);
    assert_eq!(agent.freeze(&[], LONG).await.unwrap(), 2);
    assert_eq!(agent.freeze_status().await.unwrap(), FreezeStatus::Frozen);
    for refused in [agent.freeze(&[], LONG).await.map(drop), agent.os().await.map(drop)] {
        let refused = refused.unwrap_err();
        assert!(refused.is_disabled(), "{refused}");
    }

    // Killed while frozen: silence until it runs again, then it still knows.
    guest.sh("(touch /mnt/vd0/blocked; touch /run/went-on) >/dev/null 2>&1 &");
    guest.sh("killall -9 qemu-ga");
    let silent = agent.freeze_status().await.unwrap_err();
    assert!(matches!(silent, AgentError::Late { .. }), "{silent}");
    drop(agent);
    restart_agent(&mut guest, "");
    let mut agent = open(&socket).await;
    assert_eq!(agent.freeze_status().await.unwrap(), FreezeStatus::Frozen);
    assert_ne!(guest.try_sh("test -e /run/went-on").0, 0, "a write went on in a frozen file system");
    assert_eq!(agent.thaw().await.unwrap(), 2);
    wait_until("the blocked write", || guest.try_sh("test -e /run/went-on").0 == 0);
    assert_eq!(agent.thaw().await.unwrap(), 0);
    drop(agent);

    // An administrator's word.
    restart_agent(&mut guest, "-b guest-fsfreeze-freeze,guest-exec");
    let mut agent = open(&socket).await;
    assert!(!agent.info().await.unwrap().can("guest-exec"));
    let refused = agent.freeze(&[], LONG).await.unwrap_err();
    assert!(refused.is_disabled() && refused.to_string().contains("disabled"), "{refused}");
    assert!(agent.execute("/bin/true", &[], b"").await.unwrap_err().is_disabled());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_agent_behind_10() {
    with_a_real_agent(Version::V10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_agent_behind_7() {
    with_a_real_agent(Version::V7).await;
}

/// Plays an agent at a socket, for one client.
fn peer(dir: &Path, play: impl FnOnce(BufReader<UnixStream>) + Send + 'static) -> Address {
    let path = dir.join("agent");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        if let Ok((stream, _)) = listener.accept() {
            play(BufReader::new(stream));
        }
    });
    Address(path)
}

/// The next command of the client.
fn command(stream: &mut BufReader<UnixStream>) -> Option<Value> {
    let mut line = vec![];
    stream.read_until(b'\n', &mut line).ok().filter(|n| *n > 0)?;
    Some(serde_json::from_slice(line.strip_prefix(b"\xff").unwrap_or(&line)).unwrap())
}

fn sync(stream: &mut BufReader<UnixStream>) {
    let number = command(stream).unwrap()["arguments"]["id"].clone();
    let reply = json!({"return": number});
    let _ = stream.get_mut().write_all(b"{\"error\":{}}\n\0\n");
    let _ = stream.get_mut().write_all(&[b"\xff", reply.to_string().as_bytes(), b"\n"].concat());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_none_is_said_so_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = Channel::open(&Address(dir.path().join("nothing")), LONG).await.unwrap_err();
    assert!(nowhere.is_gone(), "{nowhere}");

    // Answers to others, without end; a number that is not ours; a line without end.
    for (noise, every) in [(&b"{\"return\":{}}\n"[..], 1), (b"\xff{\"return\":1}\n", 1), (b"x", 1 << 16)] {
        let noise = noise.repeat(every);
        let address = peer(dir.path(), move |mut stream| while stream.get_mut().write_all(&noise).is_ok() {});
        let silent = Channel::open(&address, SHORT).await.unwrap_err();
        assert!(matches!(silent, AgentError::Silent { .. }), "{silent}");
    }

    let address = peer(dir.path(), drop);
    let closed = Channel::open(&address, LONG).await.unwrap_err();
    assert!(matches!(closed, AgentError::Closed { .. }), "{closed}");

    for (answer, what) in [
        ("[]", "garbage"),
        ("{\"return\":\"melted\"}", "garbage"),
        ("{\"error\":{\"class\":1}}", "garbage"),
        ("{\"error\":{\"class\":\"GenericError\",\"desc\":\"no\"}}", "refused"),
        ("\u{ff}\u{fe}", "garbage"),
    ] {
        let address = peer(dir.path(), move |mut stream| {
            sync(&mut stream);
            command(&mut stream);
            let _ = stream.get_mut().write_all(format!("{answer}\n").as_bytes());
            command(&mut stream);
        });
        let error = Channel::open(&address, LONG).await.unwrap().freeze_status().await.unwrap_err();
        let kind = match &error {
            AgentError::Garbage { .. } => "garbage",
            AgentError::Refused { .. } => "refused",
            _ => "other",
        };
        assert_eq!(kind, what, "{answer}: {error}");
    }
}

static PANICS: AtomicUsize = AtomicUsize::new(0);

/// A peer that answers with mutated answers of a real agent: every call ends, nothing panics.
#[tokio::test(flavor = "multi_thread")]
async fn fuzzed_answers() {
    std::panic::set_hook(Box::new(|info| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        eprintln!("{info}");
    }));
    let dir = tempfile::tempdir().unwrap();
    let mut seeds = Rng::new();
    for _ in 0..200 {
        let mut rng = Rng::seeded(seeds.next());
        let address = peer(dir.path(), move |mut stream| {
            sync(&mut stream);
            while let Some(asked) = command(&mut stream) {
                let answer = match asked["execute"].as_str().unwrap() {
                    "guest-info" => {
                        json!({"version": "7.2.22", "supported_commands": [{"name": "guest-exec", "enabled": true}]})
                    }
                    "guest-get-fsinfo" => json!([{"name": "vda", "mountpoint": "/", "type": "ext4", "disk": [
                        {"dev": "/dev/vda", "serial": "x", "bus-type": "virtio"}]}]),
                    "guest-get-host-name" => json!({"host-name": "a"}),
                    "guest-exec-status" => json!({"exited": true, "exitcode": 0, "out-data": "Zm9v"}),
                    "guest-exec" => json!({"pid": 5}),
                    _ => json!("frozen"),
                };
                let mut line = json!({"return": answer}).to_string().into_bytes();
                for _ in 0..rng.below(3) {
                    let at = rng.below(line.len() as u64) as usize;
                    match rng.below(4) {
                        0 => line[at] = rng.next() as u8,
                        1 => line.insert(at, rng.next() as u8),
                        2 => line.truncate(at.max(1)),
                        _ => line.splice(at..at, *b"99999999999999999999").for_each(drop),
                    }
                }
                line.push(b'\n');
                if stream.get_mut().write_all(&line).is_err() {
                    return;
                }
                if rng.below(20) == 0 {
                    return;
                }
            }
        });
        let calls = async {
            let Ok(mut agent) = Channel::open(&address, LONG).await else { return };
            let _ = agent.info().await;
            let _ = agent.file_systems().await;
            let _ = agent.host_name().await;
            let _ = agent.execute("/bin/true", &[], b"").await;
            let _ = agent.executed(5).await;
            let _ = agent.freeze_status().await;
        };
        // A peer that cut its line waits for ever; what matters is that nothing breaks.
        let _ = tokio::time::timeout(Duration::from_millis(50), calls).await;
    }
    assert_eq!(PANICS.load(Ordering::SeqCst), 0);
}
