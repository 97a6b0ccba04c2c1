//! The command line without a VM: what it prints, what it answers to newcomers, and how it ends.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

const ID: &str = "4e4908a7e19ce2a689acbbcc5006f214";

/// How a run ended, and what it printed.
struct Ended {
    code: i32,
    out: String,
    err: String,
}

impl Ended {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {:?}", self.out))
    }
}

/// A place with a copy of the stored example of a repository: commands make lock files.
struct Place {
    dir: TempDir,
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target)
        } else {
            drop(fs::copy(entry.path(), target))
        }
    }
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/repo-v1"), &dir.path().join("repo"));
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `livebackup` here, with these words as arguments.
    fn run(&self, arguments: &str) -> Ended {
        let out = Command::new(env!("CARGO_BIN_EXE_livebackup"))
            .args(arguments.split_whitespace())
            .current_dir(self.dir.path())
            .env("XDG_STATE_HOME", self.path("state"))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ended { code: out.status.code().unwrap(), out: text(out.stdout), err: text(out.stderr) }
    }
}

#[test]
fn help_lists_the_exit_codes_and_the_commands_in_order() {
    let help = Place::new().run("--help");
    assert_eq!(help.code, 0);
    for line in ["  0  all went well", "  5  an incremental was demanded", "130  interrupted"] {
        assert!(help.out.contains(line), "{line:?} is missing:\n{}", help.out);
    }
    let commands = "init disks backup estimate points show verify restore map serve run pki status doctor detach bench";
    let mut at = 0;
    for command in commands.split(' ') {
        let found = help.out[at..].find(&format!("\n  {command} ")).unwrap_or_else(|| panic!("{command} is missing"));
        at += found + 1;
    }
    assert!(!help.out.contains("guardian") && !help.out.contains("transport"));
}

#[test]
fn a_repository_is_made_once_and_has_nothing_in_it() {
    let place = Place::new();
    let made = place.run("--json init new --chunk-size 64K");
    assert_eq!((made.code, &made.json()["chunk_bytes"]), (0, &65536.into()));
    assert_eq!(place.run("init new").code, 1);
    assert!(place.run("points new").out.contains("no restore points yet"));
    assert_eq!(place.run("verify new").code, 0);
    let none = place.run("show new vm1");
    assert!(none.code == 3 && none.err.contains("none at all yet"), "{}", none.err);
    for bad in ["init other --chunk-size 100K", "init other --chunk-size 2M", "init qmp:/run/vm.qmp", "init s3://b/p"] {
        assert_eq!(place.run(bad).code, 2, "{bad}");
    }
    assert!(!place.path("other").exists());
}

#[test]
fn points_are_listed_shown_and_verified() {
    let place = Place::new();
    let listed = place.run("points repo");
    assert!(listed.code == 0 && listed.out.contains("4e4908a7") && listed.out.contains("example/vm"), "{}", listed.out);
    let points = place.run("points repo example/vm --json").json();
    assert_eq!(points["points"].as_array().unwrap().len(), 2);
    assert_eq!(points["points"][1]["point"], ID);
    for name in ["example/vm", "example/vm@latest", "example/vm@4e49", "example/vm@2026-11-21T04:45:09.38"] {
        assert_eq!(place.run(&format!("show repo {name} --json")).json()["id"], ID, "{name}");
    }
    assert!(place.run("show repo example/vm").out.contains(ID));
    for what in ["", "example/vm", "example/vm@latest~1"] {
        let verified = place.run(&format!("verify repo {what} --json"));
        assert_eq!((verified.code, &verified.json()["intact"]), (0, &true.into()), "{what:?}");
    }
}

#[test]
fn damage_has_an_exit_code_of_its_own() {
    let place = Place::new();
    let pack = place.path("repo/packs/c9/c9d98e0071cd27fc7074e1144b5d44f8");
    let mut bytes = fs::read(&pack).unwrap();
    bytes[5000] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let verified = place.run("verify repo");
    assert!(verified.code == 6 && verified.out.contains("DAMAGED"), "{}{}", verified.out, verified.err);
    let damage = place.run("verify repo --json");
    assert_eq!((damage.code, &damage.json()["intact"]), (6, &false.into()));
    assert!(!damage.json()["damage"].as_array().unwrap().is_empty());
}

#[test]
fn a_point_is_restored() {
    let place = Place::new();
    let restored = place.run("restore repo example/vm@4e49 out --json");
    assert_eq!(restored.code, 0, "{}{}", restored.out, restored.err);
    let disk = &restored.json()["disks"][0];
    assert_eq!((&disk["disk"], &disk["size_bytes"]), (&"disk0".into(), &328192.into()));
    assert_eq!(fs::metadata(place.path("out/disk0.raw")).unwrap().len(), 328192);
    assert_eq!(place.run("restore repo example/vm@4e49 out").code, 1, "what exists is not replaced");
    assert_eq!(place.run("restore repo example/vm@4e49 out --force -q").out, "");
    let other = place.run("restore repo example/vm out2 --disk nope");
    assert!(other.code == 3 && other.err.contains("disk0"), "{}", other.err);
}

#[test]
fn what_newcomers_write_is_answered_with_what_to_write() {
    let place = Place::new();
    fs::create_dir(place.path("empty")).unwrap();
    for (arguments, code, answer) in [
        ("backup /run/vm1.qmp repo", 2, "qmp:/run/vm1.qmp"),
        ("backup repo qmp:/run/vm1.qmp", 2, "swapped"),
        ("estimate repo livebackup://h:1/vm", 2, "swapped"),
        ("backup repo repo", 2, "the SOURCE comes first"),
        ("backup qmp:/run/vm1.qmp empty", 3, "livebackup init"),
        ("backup qmp:/run/vm1.qmp missing", 3, "no such directory"),
        ("backup qmp:/run/vm1.qmp s3://bucket/p", 2, "not built yet"),
        ("disks libvirt:qemu:///system/vm", 2, "not built yet"),
        ("backup qmp:/x repo --level partial", 2, "differential"),
        ("backup qmp:/x repo --compression gzip", 2, "zstd"),
        ("points repo vm1", 3, "it has those of example/vm"),
        ("show repo vm1@latest", 3, "it has those of example/vm"),
        ("show repo example/vm@7777", 3, "livebackup points"),
        ("disks livebackup://127.0.0.1:1/vm", 1, "livebackup serve"),
        ("serve --config missing.toml", 1, "missing.toml"),
        ("frobnicate", 2, "unrecognized"),
        ("-q -v points repo", 2, "cannot be used with"),
        ("disks qmp:/x --scratch repo/config", 2, "repo/config is no directory"),
        ("disks qmp:/x --state repo/config/state", 2, "a part of the path is a file"),
        ("backup qmp:/x repo --skip vd0=bytes:0-1Q", 2, "bytes:10G-20G"),
    ] {
        let ended = place.run(arguments);
        assert_eq!(ended.code, code, "{arguments}: {}", ended.err);
        assert!(ended.err.contains(answer), "{arguments}: {}", ended.err);
        assert!(ended.out.is_empty(), "{arguments}: {}", ended.out);
        let json = place.run(&format!("--json {arguments}"));
        assert_eq!(json.code, code, "--json {arguments}");
        let error = &json.json()["error"];
        assert!(error["code"].is_string() && error["message"].as_str().unwrap().contains(answer), "{}", json.out);
    }
}

#[test]
fn a_socket_that_is_no_qmp_is_told_from_one_that_is_missing() {
    let place = Place::new();
    fs::write(place.path("file"), "").unwrap();
    for source in ["qmp:missing.sock", "qmp:file", "unix:missing.sock/vm"] {
        let ended = place.run(&format!("disks {source}"));
        assert!(ended.code == 1 && ended.err.starts_with("livebackup: "), "{source}: {} {}", ended.code, ended.err);
    }
}

#[test]
fn without_a_command_those_for_people_are_named() {
    for arguments in ["", "--json"] {
        let ended = Place::new().run(arguments);
        let said = format!("{}{}", ended.out, ended.err);
        assert!(ended.code == 2 && said.contains("restore") && !said.contains("guardian"), "{said}");
    }
}

#[test]
fn an_argument_that_is_not_utf8_is_named() {
    use std::os::unix::ffi::OsStrExt;
    for json in [false, true] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_livebackup"));
        command.arg("points").arg(std::ffi::OsStr::from_bytes(b"rep\xff"));
        let out = if json { command.arg("--json") } else { &mut command }.output().unwrap();
        let said = String::from_utf8([out.stdout, out.stderr].concat()).unwrap();
        assert_eq!(out.status.code(), Some(2), "{said}");
        assert!(said.contains("UTF-8") && said.contains("rep") && said.contains("symbolic link"), "{said}");
    }
}

#[test]
fn nobody_has_to_read_to_the_end() {
    let place = Place::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_livebackup"))
        .args(["points", "repo"])
        .current_dir(place.dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let ended = child.wait_with_output().unwrap();
    assert_eq!((ended.status.code(), ended.stderr.as_slice()), (Some(0), &b""[..]));
}

#[test]
fn the_doctor_looks_at_the_host() {
    let report = Place::new().run("doctor --json");
    let checks = report.json()["checks"].as_array().unwrap().len();
    assert!(report.code == 0 && checks >= 4, "{}", report.out);
}

#[test]
fn certificates_are_made_listed_and_revoked() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    assert_eq!(place.run("pki list ca").code, 3);
    assert!(place.run("pki init ca").out.contains("pki issue ca NAME --server HOST"));
    assert_eq!(place.run("pki init ca").code, 1);
    for (arguments, code) in [
        ("pki issue ca vmhost", 2),
        ("pki issue ca vmhost --server host:7870", 2),
        ("pki issue ca ../x --client", 2),
        ("pki issue ca backup1 --client --server h", 2),
        ("pki issue ca backup1 --client --days 0", 2),
    ] {
        assert_eq!(place.run(arguments).code, code, "{arguments}");
    }
    let server = place.run("pki issue ca vmhost --server vmhost.example --server 192.0.2.7 --json").json();
    assert_eq!((&server["purpose"], &server["hosts"][1]), (&"server".into(), &"192.0.2.7".into()));
    let client = place.run("pki issue ca backup1 --client --days 20");
    assert!(client.out.contains("--tls"), "{}", client.out);
    assert!(place.run("pki issue ca backup1 --client").err.contains("--renew"));
    let key = fs::metadata(place.path("ca/bundle/backup1/key.pem")).unwrap();
    assert_eq!(key.permissions().mode() & 0o777, 0o600);
    assert!(place.run("pki list ca").out.contains("ends soon"));
    let revoked = place.run("pki revoke ca backup1");
    assert!(revoked.code == 0 && revoked.out.contains("ca/crl.pem"), "{}", revoked.out);
    let unknown = place.run("pki revoke ca backup1");
    assert!(unknown.code == 3 && unknown.err.contains("vmhost"), "{}", unknown.err);
    let states: Vec<_> = place.run("pki list ca --json").json()["certificates"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| (entry["name"].as_str().unwrap().to_owned(), entry["state"].as_str().unwrap().to_owned()))
        .collect();
    assert_eq!(states, [("backup1".into(), "revoked".into()), ("vmhost".into(), "valid".into())]);
}
