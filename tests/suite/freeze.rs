//! The freeze lease: a real guest with a real agent on both QEMUs, whose file systems a restored image shows to have been
//! quiet, and which is never left frozen: not by a killed sidecar, not by both processes killed, not by a hung agent. And
//! peers that play an agent where the real one cannot be made to misbehave that way.

#![allow(clippy::unwrap_used)]

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use crate::common::guest::*;
use crate::common::played::Played;
use crate::common::*;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// Runs the program on a QEMU.
struct Side {
    source: String,
    state: String,
    repo: String,
}

impl Side {
    fn of(qemu: &Qemu) -> Side {
        let text = |name: &str| qemu.path(name).to_str().unwrap().to_owned();
        let side = Side { source: format!("qmp:{}", text("qmp")), state: text("state"), repo: text("repo") };
        side.json(&["init", &side.repo], &[]);
        side
    }

    fn command(&self, args: &[&str], env: &[(&str, &str)]) -> Command {
        let mut command = livebackup();
        command.args(["--json", "--state", &self.state]).args(args).envs(env.iter().copied()).stdin(Stdio::null());
        command
    }

    fn json(&self, args: &[&str], env: &[(&str, &str)]) -> Value {
        let out = self.command(args, env).output().unwrap();
        let (text, err) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{args:?}: {}\n{text}\n{err}", out.status);
        if text.trim().is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() }
    }

    fn backup_args<'a>(&'a self, options: &[&'a str]) -> Vec<&'a str> {
        [&["backup", &self.source, &self.repo], options].concat()
    }

    /// A backup that works; its report.
    fn backup(&self, options: &[&str]) -> Value {
        self.json(&self.backup_args(options), &[])
    }

    /// A backup that fails; what it said.
    fn refused(&self, options: &[&str]) -> String {
        let out = self.command(&self.backup_args(options), &[]).output().unwrap();
        assert!(!out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
        format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
    }

    /// A backup that is killed at a point.
    fn killed_at(&self, point: &str, env: &[(&str, &str)]) {
        let env = [&[("LIVEBACKUP_KILL_AT", point)], env].concat();
        let out: Output = self.command(&self.backup_args(&["--freeze", "require"]), &env).output().unwrap();
        assert_eq!(out.status.signal(), Some(9), "{point} was not reached: {}", String::from_utf8_lossy(&out.stderr));
    }

    fn restore(&self, dir: &Path) {
        self.json(&["restore", &self.repo, "guest", dir.to_str().unwrap(), "--force"], &[]);
    }

    fn alarms(&self) -> Vec<Value> {
        self.json(&["status", &self.source], &[])["alarms"].as_array().unwrap().clone()
    }

    /// Ids of the guardians of this QEMU.
    fn guardians(&self) -> Vec<i32> {
        let address = self.source.strip_prefix("qmp:").unwrap();
        let is_one = |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<_> = line.split(|b| *b == 0).collect();
            words.get(1) == Some(&&b"guardian"[..]) && words.get(2) == Some(&address.as_bytes())
        };
        let all = std::fs::read_dir("/proc").unwrap().flatten();
        all.filter_map(|e| e.file_name().to_str()?.parse().ok()).filter(is_one).collect()
    }
}

fn reasons(report: &Value) -> String {
    report["evidence"]["reasons"].to_string()
}

/// Whether a write to the file system goes through now. It is tried in the background: in a frozen one it blocks.
fn start_write(guest: &mut Guest) {
    guest.sh("rm -f /run/wrote; (echo x >/mnt/vd0/probe; sync; touch /run/wrote) >/dev/null 2>&1 &");
}

fn wrote(guest: &mut Guest) -> bool {
    guest.try_sh("test -e /run/wrote").0 == 0
}

fn free(guest: &mut Guest) {
    start_write(guest);
    wait_until("the guest to be thawed", || wrote(guest));
}

fn start_agent(guest: &mut Guest, options: &str) {
    guest.sh(&format!(
        "setsid qemu-ga -m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0 -t /run {options} \
         </dev/null >/dev/null 2>&1 &"
    ));
    Agent::connect(&guest.agent());
}

fn kill_agent(guest: &mut Guest) {
    guest.sh("killall -9 qemu-ga; while pidof qemu-ga; do usleep 20000; done");
}

/// Whether an ext4 image wants its journal replayed, by its superblock alone; and e2fsck finds nothing.
fn wants_recovery(image: &Path) -> bool {
    let said = run(Command::new("dumpe2fs").arg("-h").arg(image).env("LC_ALL", "C"));
    let features = said.lines().find(|l| l.starts_with("Filesystem features:")).unwrap().to_owned();
    if !features.contains("needs_recovery") {
        run(Command::new("e2fsck").args(["-f", "-n"]).arg(image));
    }
    features.contains("needs_recovery")
}

fn a_real_guest(version: Version, disks: &[GuestDisk]) {
    let mut guest = Guest::boot(version, disks);
    guest.sh("hostname small-guest");
    let side = Side::of(&guest);
    let dir = guest.path("restored");
    let churn = "while :; do i=$((i+1)); echo $i >/mnt/vd0/f$((i%50)); done";
    guest.sh(&format!("sh -c \"{}\" >/dev/null 2>&1 & echo $! >/run/churn", churn.replace('$', "\\$")));

    // Frozen: the restored file system needs no recovery, and the grade says so; not frozen: it does.
    for (policy, grade) in [("require", "filesystem"), ("prefer", "filesystem"), ("never", "crash")] {
        let report = side.backup(&["--freeze", policy]);
        assert_eq!(report["grade"], grade, "{report}");
        side.restore(&dir);
        assert_eq!(wants_recovery(&dir.join("vd0.raw")), grade == "crash", "{report}");
        let points = side.json(&["points", &side.repo], &[]);
        assert_eq!(points["points"].as_array().unwrap().last().unwrap()["grade"], grade, "{points}");
        if grade == "filesystem" {
            let evidence = &report["evidence"];
            assert_eq!(evidence["frozen"]["file_systems"], 1, "{report}");
            assert!(evidence["frozen"]["frozen_us"].as_u64().unwrap() > 0);
            let guest = &evidence["guest"];
            assert_eq!(guest["host_name"], "small-guest");
            assert_eq!(guest["file_systems"][0]["mount_point"], "/mnt/vd0", "{guest}");
            assert_eq!(guest["file_systems"][0]["disks"], json!(["vd0"]), "{guest}");
            assert_eq!(side.json(&["show", &side.repo, "guest"], &[])["evidence"]["guest"], *guest);
        } else {
            assert!(reasons(&report).contains("switched off"), "{report}");
        }
    }
    guest.sh("kill $(cat /run/churn)");

    // What was deleted is given back before a full backup reads it, if that is wanted, and only then.
    let deleted = "head -c 4000000 /dev/urandom >/mnt/vd0/large; sync; rm /mnt/vd0/large; sync";
    guest.sh(deleted);
    let before = side.backup(&["--level", "full"])["disks"][0]["stored_bytes"].as_u64().unwrap();
    guest.sh(deleted);
    let trimmed = side.backup(&["--level", "full", "--trim", "require"]);
    assert_eq!(trimmed["evidence"]["trimmed"]["file_systems"], 1, "{trimmed}");
    assert!(before > 3_000_000 && trimmed["disks"][0]["stored_bytes"].as_u64().unwrap() < 2_000_000, "{trimmed}");
    assert_eq!(
        side.backup(&["--trim", "require"])["evidence"].get("trimmed"),
        None,
        "an incremental reads what changed"
    );
    let checks = side.json(&["doctor", &side.source], &[])["checks"].to_string();
    assert!(checks.contains("it freezes file systems, starts programs and trims"), "{checks}");
    assert!(checks.contains("filesystem can be reached"), "{checks}");

    // Killed at every step of the freeze, and with the guest stopped in the freeze: the guardians let it go.
    let stopped: &[&str] = if disks.len() > 1 { &["fleece.stopped"] } else { &[] };
    for point in [&["freeze.owed", "freeze.frozen", "fleece.inserted", "freeze.thawed"], stopped].concat() {
        side.killed_at(point, &[]);
        wait_until("the guest to run", || guest.status() == "running");
        free(&mut guest);
        assert_eq!(side.backup(&["--freeze", "require"])["grade"], "filesystem", "after {point}");
    }

    // Both killed: frozen until the next start.
    let pause = format!("guardian.thaw={}/never", side.state);
    side.killed_at("freeze.frozen", &[("LIVEBACKUP_PAUSE_AT", &pause)]);
    let guardians = side.guardians();
    assert!(!guardians.is_empty(), "the guardian waits");
    for pid in guardians {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    start_write(&mut guest);
    assert!(!wrote(&mut guest), "the guest is frozen");
    let status = side.json(&["status", &side.source], &[]);
    assert_eq!(status["alarms"], json!([]), "{status}");
    wait_until("the guest to be thawed", || wrote(&mut guest));

    // The lease runs out before the instant is over.
    let env = [("LIVEBACKUP_PAUSE_AT", "fleece.filter=3000")];
    let report = side.json(&side.backup_args(&["--freeze-lease", "1"]), &env);
    assert!(report["grade"] == "crash" && reasons(&report).contains("lease of 1 s ran out"), "{report}");
    free(&mut guest);
    let out = side.command(&side.backup_args(&["--freeze-lease", "1", "--freeze", "require"]), &env).output().unwrap();
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("lease"), "{out:?}");
    free(&mut guest);

    // Somebody else's freeze is left alone.
    let mut other = Agent::connect(&guest.agent());
    other.call("guest-fsfreeze-freeze");
    let checks = side.json(&["doctor", &side.source], &[])["checks"].to_string();
    assert!(checks.contains("another program has the guest agent's channel") && checks.contains("libvirt"), "{checks}");
    let taken = side.backup(&[]);
    assert!(reasons(&taken).contains("another program has the guest agent's channel"), "{taken}");
    drop(other);
    let report = side.backup(&[]);
    assert!(report["grade"] == "crash" && reasons(&report).contains("somebody else"), "{report}");
    let mut other = Agent::connect(&guest.agent());
    assert_eq!(other.call("guest-fsfreeze-status"), "frozen");
    other.call("guest-fsfreeze-thaw");
    drop(other);

    // Where nothing is mounted there is nothing to freeze, and nobody is to blame.
    guest.sh("umount /mnt/vd0");
    let report = side.backup(&[]);
    assert!(report["grade"] == "crash" && reasons(&report).contains("froze no file system"), "{report}");
    assert!(!reasons(&report).contains("somebody"), "{report}");
    assert!(side.refused(&["--freeze", "require"]).contains("froze no file system"));
    guest.sh("mount -t ext4 -o noatime /dev/disk/vd0 /mnt/vd0");

    // A guest that does not run cannot answer.
    guest.qmp("stop", json!({}));
    assert!(reasons(&side.backup(&[])).contains("does not run"));
    assert_eq!(guest.status(), "paused", "its owner paused it");
    guest.qmp("cont", json!({}));

    // The agent hangs.
    guest.sh("killall -STOP qemu-ga");
    let report = side.backup(&[]);
    assert!(report["grade"] == "crash" && reasons(&report).contains("not answered"), "{report}");
    assert!(side.refused(&["--freeze", "require"]).contains("not answered"));
    guest.sh("killall -CONT qemu-ga");

    // The agent dies while the guest is frozen: said loudly, and put right when it runs again.
    let go = guest.path("go");
    let pause = format!("freeze.frozen={}", go.display());
    let env = [("LIVEBACKUP_PAUSE_AT", pause.as_str())];
    let backup =
        side.command(&side.backup_args(&[]), &env).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("the freeze", || {
        start_write(&mut guest);
        std::thread::sleep(Duration::from_millis(300));
        !wrote(&mut guest)
    });
    kill_agent(&mut guest);
    std::fs::write(go, b"").unwrap();
    let out = backup.wait_with_output().unwrap();
    let report: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {out:?}"));
    assert!(report["grade"] == "crash" && reasons(&report).contains("did not confirm the thaw"), "{report}");
    assert!(String::from_utf8_lossy(&out.stderr).contains("FROZEN"), "{out:?}");
    assert!(!wrote(&mut guest), "nobody can thaw it");
    assert!(side.alarms()[0].as_str().unwrap().contains("FROZEN"));
    let report = side.backup(&[]);
    assert!(report["grade"] == "crash" && reasons(&report).contains("earlier backup"), "{report}");
    guest.sh(
        "setsid qemu-ga -m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0 -t /run </dev/null >/dev/null 2>&1 &",
    );
    wait_until("the guest to be thawed", || wrote(&mut guest));
    wait_until("the debt to be struck out", || side.guardians().is_empty());
    assert_eq!(side.alarms(), [] as [Value; 0]);
    assert_eq!(side.backup(&["--freeze", "require"])["grade"], "filesystem");

    // An administrator's word, and no agent at all.
    kill_agent(&mut guest);
    assert!(reasons(&side.backup(&[])).contains("no agent runs in the guest"));
    start_agent(&mut guest, "-b guest-fsfreeze-freeze,guest-get-fsinfo");
    let report = side.backup(&[]);
    assert!(report["grade"] == "crash" && reasons(&report).contains("disabled"), "{report}");
    free(&mut guest);
}

#[test]
fn a_real_guest_with_two_disks_on_10() {
    a_real_guest(Version::V10, &[GuestDisk::raw("vd0", 32 * MIB).with_ext4(), GuestDisk::raw("vd1", 4 * MIB)]);
}

#[test]
fn a_real_guest_with_one_disk_on_7() {
    a_real_guest(Version::V7, &[GuestDisk::raw("vd0", 32 * MIB).with_ext4()]);
}

/// A QEMU whose guest is nobody, with an agent that the test plays.
fn with_played(answer: impl Fn(&str, bool) -> Option<Value> + Send + 'static) -> (Qemu, Side, Played) {
    let disk = "driver=raw,node-name=disk0,file.driver=file,file.filename=DIR/vd0.raw";
    let args = ["-name", "guest", "-blockdev", disk, "-device", "virtio-blk-pci,drive=disk0,id=vd0"];
    let mut qemu = Qemu::start_with(Version::V10, &args, |dir| {
        std::fs::File::create(dir.join("vd0.raw")).unwrap().set_len(MIB).unwrap();
    });
    qemu.qmp("cont", json!({}));
    let side = Side::of(&qemu);
    let played = Played::start(&qemu.path("agent"), answer);
    (qemu, side, played)
}

#[test]
fn a_freeze_that_is_not_answered_gets_its_thaw() {
    // It freezes and says nothing; the thaw is refused twice before it works.
    let tries = Mutex::new(0);
    let (qemu, side, played) = with_played(move |name, frozen| match name {
        "guest-fsfreeze-thaw" => {
            let mut tries = tries.lock().unwrap();
            *tries += 1;
            (*tries < 3).then(|| json!({"error": {"class": "GenericError", "desc": "not now"}}))
        }
        "guest-fsfreeze-status" => Some(json!({"return": if frozen { "frozen" } else { "thawed" }})),
        _ => None,
    });
    // The freeze's answer gets lost on the way: the lease is over before it comes.
    let agent = qemu.path("agent").to_str().unwrap().to_owned();
    let report = side.backup(&["--agent", &agent]);
    assert_eq!(report["grade"], "crash", "{report}");
    assert!(reasons(&report).contains("thaw came late"), "{report}");
    wait_until("the thaw", || !played.is_frozen());
    assert!(played.asked().iter().filter(|n| *n == "guest-fsfreeze-thaw").count() >= 3);
}

#[test]
fn a_silent_freeze_ends_with_its_lease() {
    let (qemu, side, played) = with_played(|name, _| (name == "guest-fsfreeze-freeze").then(|| json!("silence")));
    let agent = qemu.path("agent").to_str().unwrap().to_owned();
    let options = ["--agent", &agent, "--freeze-lease", "1"];
    let report = side.backup(&options);
    assert!(report["grade"] == "crash" && reasons(&report).contains("taken back"), "{report}");
    assert!(side.refused(&[&options[..], &["--freeze", "require"]].concat()).contains("required"));
    // It asked for the status after the freeze: what had not been frozen needs no thaw.
    let asked = played.asked();
    let freeze = asked.iter().position(|n| n == "guest-fsfreeze-freeze").unwrap();
    wait_until("the look after the freeze", || played.asked()[freeze..].iter().any(|n| n == "guest-fsfreeze-status"));
    assert_eq!(side.alarms(), [] as [Value; 0]);
}

#[test]
fn a_trim_that_fails_fails_nothing_unless_it_has_to() {
    let (qemu, side, played) = with_played(|name, _| {
        (name == "guest-fstrim").then(|| json!({"error": {"class": "GenericError", "desc": "no discards here"}}))
    });
    let agent = qemu.path("agent").to_str().unwrap().to_owned();
    let report = side.backup(&["--agent", &agent, "--trim", "prefer"]);
    assert_eq!(report["grade"], "filesystem", "{report}");
    assert!(report["evidence"]["trimmed"]["failed"].as_str().unwrap().contains("no discards here"), "{report}");
    let options = ["--agent", &agent, "--level", "full", "--trim", "require"];
    assert!(side.refused(&options).contains("no discards here"));
    let asked = played.asked();
    let first = |name: &str| asked.iter().position(|n| n == name).unwrap();
    assert!(first("guest-fstrim") < first("guest-fsfreeze-freeze"), "{asked:?}");
    assert!(!played.is_frozen());
}

/// Windows thaws by itself after ten seconds: the status says thawed, and nothing that was frozen is freed.
#[test]
fn a_guest_that_thawed_by_itself_was_not_frozen() {
    let (qemu, side, _) = with_played(|name, frozen| match name {
        "guest-fsfreeze-status" if frozen => Some(json!({"return": "thawed"})),
        _ => None,
    });
    let agent = qemu.path("agent").to_str().unwrap().to_owned();
    let report = side.backup(&["--agent", &agent]);
    assert!(report["grade"] == "crash" && reasons(&report).contains("somebody thawed"), "{report}");
    assert!(side.refused(&["--agent", &agent, "--freeze", "require"]).contains("somebody thawed"));
}

#[test]
fn an_agent_that_is_none_is_no_freeze() {
    let (qemu, side, _) = with_played(|_, _| Some(json!({"return": [1, 2]})));
    let agent = qemu.path("agent").to_str().unwrap().to_owned();
    let report = side.backup(&["--agent", &agent]);
    assert!(report["grade"] == "crash" && reasons(&report).contains("makes no sense"), "{report}");
    let nowhere = qemu.path("nothing").to_str().unwrap().to_owned();
    assert!(reasons(&side.backup(&["--agent", &nowhere])).contains("no guest agent channel"));
    assert!(reasons(&side.backup(&[])).contains("no channel to a guest agent"));
    assert!(side.refused(&["--freeze", "require"]).contains("no channel to a guest agent"));
}
