//! Real databases in a real guest, with writes going on: what is backed up is restored and booted, every transaction that
//! was committed before the instant is there, and the sequence has no gap. Holds by the databases' own clients on the host
//! and in the guest.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::common::guest::*;
use crate::common::*;
use serde_json::{Value, json};

const PASSWORD: &str = "only-for-tests";

struct Databases {
    guest: Guest,
    /// Ports of this host: PostgreSQL, MariaDB, Redis.
    ports: [u16; 3],
}

/// Boots from the images of a directory.
fn boot(dir: tempfile::TempDir, disk: GuestDisk) -> Databases {
    let forward = "user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:0-:5432,hostfwd=tcp:127.0.0.1:0-:3306,\
                   hostfwd=tcp:127.0.0.1:0-:6379";
    let args = ["-m", "768", "-smp", "2", "-netdev", forward, "-device", "virtio-net-pci,netdev=net0"];
    let mut guest = Guest::boot_in(Version::V10, dir, &[disk], &args);
    let said = guest.qmp("human-monitor-command", json!({"command-line": "info usernet"}));
    // TCP[HOST_FORWARD]  FD  SOURCE-ADDRESS PORT  DEST-ADDRESS PORT …
    let port = |inside: &str| {
        let lines = said.as_str().unwrap().lines().map(|l| l.split_whitespace().collect::<Vec<_>>());
        let found = lines.into_iter().find(|l| l.first().is_some_and(|w| w.contains("HOST_FORWARD")) && l[5] == inside);
        found.unwrap_or_else(|| panic!("{said}"))[3].parse().unwrap()
    };
    let ports = ["5432", "3306", "6379"].map(port);
    Databases { guest, ports }
}

impl Databases {
    fn text(&self, name: &str) -> String {
        self.guest.path(name).to_str().unwrap().to_owned()
    }

    /// Starts a known sequence of transactions in both, each committed by itself.
    fn start_sequences(&mut self) {
        let numbers = "i=0; while :; do i=\\$((i+1)); echo";
        self.guest.sh(&format!(
            "(sh -c \"{numbers} \\\"INSERT INTO sequence VALUES (\\$i) RETURNING n;\\\"; done\" | \
             psql -d postgres -Atq >/run/pg.done) >/run/pg.said 2>&1 &"
        ));
        self.guest.sh(&format!(
            "(sh -c \"{numbers} \\\"INSERT INTO sequence VALUES (\\$i); SELECT \\$i;\\\"; done\" | \
             mariadb -NB --unbuffered proof >/run/maria.done) >/run/maria.said 2>&1 &"
        ));
        self.wait_for_commits(20);
    }

    /// The last transactions that are known to be committed: PostgreSQL's, MariaDB's.
    fn committed(&mut self) -> [u64; 2] {
        ["pg", "maria"].map(|name| {
            // The last line may be half written.
            let said = self.guest.sh(&format!("tail -n 2 /run/{name}.done | head -n 1; cat /run/{name}.said >&2"));
            said.lines().next().and_then(|l| l.parse().ok()).unwrap_or(0)
        })
    }

    fn wait_for_commits(&mut self, count: u64) {
        let start = self.committed();
        wait_until("commits in both databases", || {
            let now = self.committed();
            now[0] >= start[0] + count && now[1] >= start[1] + count
        });
    }

    /// Every number from 1 on is there; gives the last ones.
    fn proven_sequences(&mut self) -> [u64; 2] {
        let query = "SELECT count(*), min(n), max(n) FROM sequence";
        let said = [
            self.guest.sh(&format!("psql -d postgres -At -F \" \" -c \"{query}\"")),
            self.guest.sh(&format!("mariadb -NB proof -e \"{query}\"")),
        ];
        said.map(|line| {
            let numbers: Vec<u64> = line.split_whitespace().map(|w| w.parse().unwrap()).collect();
            assert!(numbers[0] == numbers[2] && numbers[1] == 1, "a gap in the sequence: {line}");
            numbers[2]
        })
    }

    fn command(&self, args: &[&str], env: &[(&str, &str)]) -> Output {
        let mut command = livebackup();
        command.args(["--json", "--state", &self.text("state")]).args(args).envs(env.iter().copied());
        command.stdin(Stdio::null()).output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> Value {
        let out = self.command(args, &[]);
        assert!(out.status.success(), "{args:?}: {out:?}");
        serde_json::from_slice(&out.stdout).unwrap_or(Value::Null)
    }

    fn backup(&self, holds: &str, freeze: &str, env: &[(&str, &str)]) -> Output {
        std::fs::write(self.guest.path("holds.toml"), holds).unwrap();
        let (source, repo, file) = (format!("qmp:{}", self.text("qmp")), self.text("repo"), self.text("holds.toml"));
        self.command(&["backup", &source, &repo, "--freeze", freeze, "--holds", &file], env)
    }

    fn good_backup(&self, holds: &str, freeze: &str) -> Value {
        let out = self.backup(holds, freeze, &[]);
        assert!(out.status.success(), "{out:?}");
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// Holds of this host, with passwords in the clients' own files.
    fn holds_of_host(&self) -> String {
        let secret = |name: &str, text: String| {
            let path = self.guest.path(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let pgpass = secret("pgpass", format!("*:*:*:livebackup:{PASSWORD}\n"));
        let cnf = secret("my.cnf", format!("[client]\npassword={PASSWORD}\n"));
        let [postgresql, mariadb, redis] = self.ports;
        let at = "where = \"host\"\npolicy = \"require\"\nhost = \"127.0.0.1\"\n";
        format!(
            "[[hold]]\nprofile = \"postgresql\"\n{at}port = {postgresql}\nuser = \"livebackup\"\npassword_file = \"{pgpass}\"\n\
             [[hold]]\nprofile = \"mariadb\"\n{at}port = {mariadb}\nuser = \"livebackup\"\npassword_file = \"{cnf}\"\n\
             [[hold]]\nprofile = \"redis\"\n{at}port = {redis}\n"
        )
    }
}

/// Holds in the guest, with accounts that the databases know by name.
fn holds_of_guest(policy: &str) -> String {
    let hold = |profile: &str| {
        format!(
            "[[hold]]\nprofile = \"{profile}\"\nwhere = \"guest\"\npolicy = \"{policy}\"\nguest_user = \"livebackup\"\n\
             ready_within_s = 60\nlimit_s = 60\n"
        )
    };
    ["postgresql", "mariadb", "redis"].map(hold).concat()
}

/// Whether an ext4 image wants its journal replayed; e2fsck finds nothing in one that does not.
fn wants_recovery(image: &Path) -> bool {
    let said = run(Command::new("dumpe2fs").arg("-h").arg(image).env("LC_ALL", "C"));
    let features = said.lines().find(|l| l.starts_with("Filesystem features:")).unwrap().to_owned();
    if !features.contains("needs_recovery") {
        run(Command::new("e2fsck").args(["-f", "-n"]).arg(image));
    }
    features.contains("needs_recovery")
}

fn image(dir: &Path) -> PathBuf {
    dir.join("db.raw")
}

fn all_held(report: &Value) {
    assert_eq!(report["grade"], "application", "{report}");
    let holds = report["evidence"]["holds"].as_array().unwrap();
    assert_eq!(holds.len(), 3, "{report}");
    let of = |name: &str| &holds.iter().find(|h| h["name"] == name).unwrap()["positions"];
    for position in ["wal_lsn", "wal_lsn_after"] {
        assert!(of("postgresql")[position].as_str().unwrap().contains('/'), "{report}");
    }
    for (position, part) in [("binlog", "binlog.0"), ("gtid_binlog_pos", "0-7-")] {
        assert!(of("mariadb")[position].as_str().unwrap().contains(part), "{report}");
    }
    let frozen_ms = report["evidence"]["frozen"]["frozen_us"].as_u64().unwrap() / 1000;
    let held_ms = holds.iter().map(|h| h["held_us"].as_u64().unwrap() / 1000).max().unwrap();
    println!("frozen {frozen_ms} ms, longest hold {held_ms} ms");
}

/// Restores the latest point, boots it, and proves that what was committed before is there.
fn prove(original: &mut Databases, report: &Value, before: [u64; 2], after: [u64; 2]) {
    let dir = tempfile::Builder::new().prefix("livebackup-guest-").tempdir().unwrap();
    let repo = original.text("repo");
    original.ok(&["restore", &repo, "guest", dir.path().to_str().unwrap()]);
    assert_eq!(wants_recovery(&image(dir.path())), report["grade"] == "crash", "{report}");
    let mut restored = boot(dir, GuestDisk::databases("db", "raw"));
    let last = restored.proven_sequences();
    for i in 0..2 {
        assert!((before[i]..=after[i] + 2).contains(&last[i]), "{before:?} {last:?} {after:?}");
    }
    if report["grade"] == "application" {
        // The lock was held over the instant: not one transaction more.
        let holds = report["evidence"]["holds"].as_array().unwrap();
        let of = |name: &str, position: &str| {
            let held = holds.iter().find(|h| h["name"] == name).unwrap();
            held["positions"][position].as_str().unwrap().to_owned()
        };
        let said = restored.guest.sh("mariadb -NBe \"SELECT @@gtid_binlog_pos\"");
        assert_eq!(said.trim(), of("mariadb", "gtid_binlog_pos"));
        let lsn = of("postgresql", "wal_lsn");
        let query = format!("psql -d postgres -Atc \"SELECT pg_current_wal_lsn() >= \\$\\${lsn}\\$\\$::pg_lsn\"");
        assert_eq!(restored.guest.sh(&query).trim(), "t");
        assert_eq!(restored.guest.sh("redis-cli GET proof").trim(), "42");
    }
}

#[test]
fn committed_transactions_come_back() {
    let dir = tempfile::Builder::new().prefix("livebackup-guest-").tempdir().unwrap();
    let disk = GuestDisk::databases("db", "qcow2");
    disk.create(Version::V10, dir.path());
    let mut databases = boot(dir, disk);
    databases.ok(&["init", &databases.text("repo")]);
    databases.guest.sh("redis-cli SET proof 42");
    databases.start_sequences();

    // Held from this host, with file systems frozen.
    let holds = databases.holds_of_host();
    let before = databases.committed();
    let report = databases.good_backup(&holds, "require");
    databases.wait_for_commits(5);
    let after = databases.committed();
    all_held(&report);
    assert_eq!(report["evidence"]["guest"]["host_name"], "databases");
    prove(&mut databases, &report, before, after);

    // Nothing held, nothing frozen: the lower grade; all that was committed is there too, after the journals' replay.
    let before = databases.committed();
    let report = databases.good_backup("", "never");
    databases.wait_for_commits(5);
    let after = databases.committed();
    assert_eq!(report["grade"], "crash", "{report}");
    prove(&mut databases, &report, before, after);
    assert_eq!(databases.good_backup("", "require")["grade"], "filesystem");

    // Held by programs in the guest.
    let report = databases.good_backup(&holds_of_guest("require"), "require");
    all_held(&report);
    databases.wait_for_commits(5);
    let left = databases.guest.sh("ls /run | grep livebackup-hold || true");
    assert_eq!(left, "", "holds clean up after themselves");

    // Killed while everything is held and frozen: all of it goes on, and nothing is left.
    for holds in [holds, holds_of_guest("require").replace("limit_s = 60", "limit_s = 5")] {
        let out = databases.backup(&holds, "require", &[("LIVEBACKUP_KILL_AT", "freeze.frozen")]);
        assert_eq!(out.status.signal(), Some(9), "{out:?}");
        databases.wait_for_commits(5);
    }

    // A database that is down: refused, or gone on without it.
    databases.guest.sh("killall mariadbd; while pidof mariadbd; do sleep 0.1; done");
    let report = databases.good_backup(&holds_of_guest("prefer"), "require");
    assert_eq!(report["grade"], "filesystem", "{report}");
    assert!(report["evidence"]["reasons"].to_string().contains("mariadb"), "{report}");
    for holds in [holds_of_guest("require"), databases.holds_of_host()] {
        let out = databases.backup(&holds, "require", &[]);
        let said = String::from_utf8_lossy(&out.stdout);
        assert!(!out.status.success() && said.contains("mariadb") && said.contains("required"), "{out:?}");
    }
}
