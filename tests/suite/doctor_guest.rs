//! What `doctor` says of the guest: its agent, which grade a backup could reach, and the holds; for a monitor, and of a service.
//! The agent is played, but for what a real one says in `freeze.rs`.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use crate::common::played::Played;
use crate::common::*;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// What QEMU needs for an agent.
const PORT: [&str; 6] = [
    "-device",
    "virtio-serial",
    "-chardev",
    "socket,id=qga0,path=DIR/qga,server=on,wait=off",
    "-device",
    "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0",
];

fn a_qemu(more: &[&str]) -> Qemu {
    let disk = "driver=raw,node-name=disk0,file.driver=file,file.filename=DIR/vd0.raw";
    let args = ["-name", "vm1", "-blockdev", disk, "-device", "virtio-blk-pci,drive=disk0,id=vd0"];
    let mut qemu = Qemu::start_with(Version::V10, &[&args, more].concat(), |dir| {
        std::fs::File::create(dir.join("vd0.raw")).unwrap().set_len(MIB).unwrap();
    });
    qemu.qmp("cont", json!({}));
    qemu
}

fn lb(qemu: &Qemu, args: &[&str]) -> Value {
    let mut command = livebackup();
    command.args(["--json", "--state", qemu.path("state").to_str().unwrap()]).args(args).stdin(Stdio::null());
    let out = command.output().unwrap();
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {out:?}"))
}

/// A service of this VM, with lines of its table. Killed when dropped.
struct Server(std::process::Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A service with these lines in its `[[vm]]` table, and the VM there.
fn serve(qemu: &Qemu, lines: &str) -> (Server, String) {
    let text = |name: &str| qemu.path(name).to_str().unwrap().to_owned();
    let config = format!(
        "listen = \"unix:{}\"\nstate = \"{}\"\n[[vm]]\nname = \"vm1\"\nmonitor = \"qmp:{}\"\n{lines}\n",
        text("sock"),
        text("state"),
        text("qmp")
    );
    std::fs::write(qemu.path("serve.toml"), config).unwrap();
    let log = std::fs::File::create(qemu.path("serve.log")).unwrap();
    let mut command = livebackup();
    command.args(["serve", "--config", &text("serve.toml")]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let server = Server(command.spawn().unwrap());
    let source = format!("unix:{}/vm1", text("sock"));
    wait_until("the service to attach", || {
        UnixStream::connect(qemu.path("sock")).is_ok() && !lb(qemu, &["status", &source])["qemu_version"].is_null()
    });
    (server, source)
}

/// The verdict and words of a check.
fn check(report: &Value, name: &str) -> (String, String) {
    let checks = report["checks"].as_array().unwrap_or_else(|| panic!("{report}"));
    let found = checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("{name}: {report}"));
    let text = |field: &str| found[field].as_str().unwrap().to_owned();
    (text("verdict"), text("words"))
}

fn says(report: &Value, name: &str, verdict: &str, parts: &[&str]) {
    let (found, words) = check(report, name);
    assert_eq!(found, verdict, "{name}: {words}");
    for part in parts {
        assert!(words.contains(part), "{name}: {part:?} is not in: {words}");
    }
}

/// A monitor's source.
fn monitor(qemu: &Qemu) -> String {
    format!("qmp:{}", qemu.socket().display())
}

/// What a well-kept agent executes.
fn info(without: &[&str]) -> Value {
    let names =
        ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status", "guest-exec", "guest-exec-status"];
    let all = names.into_iter().chain(["guest-fstrim", "guest-info"]);
    let commands: Vec<_> = all.map(|name| json!({"name": name, "enabled": !without.contains(&name)})).collect();
    json!({"return": {"version": "9.9.9", "supported_commands": commands}})
}

#[test]
fn a_guest_without_an_agent_is_told_how_to_get_one() {
    let qemu = a_qemu(&[]);
    let report = lb(&qemu, &["doctor", &monitor(&qemu)]);
    says(&report, "guest agent", "warn", &["no channel", "virtserialport,chardev=qga0", "qemu-guest-agent"]);
    says(&report, "grade", "warn", &["crash at most"]);
    assert_eq!(report["good"], true, "a backup works: {report}");

    let mut qemu = a_qemu(&PORT);
    let report = lb(&qemu, &["doctor", &monitor(&qemu)]);
    says(&report, "guest agent", "warn", &["no agent runs", "install the package qemu-guest-agent"]);
    qemu.qmp("stop", json!({}));
    let report = lb(&qemu, &["doctor", &monitor(&qemu)]);
    says(&report, "guest agent", "warn", &["does not run"]);
    says(&report, "grade", "warn", &["crash at most", "does not run"]);
}

#[test]
fn an_agent_is_asked_what_it_can() {
    let qemu = a_qemu(&[]);
    let agent = |answers: fn(&str, bool) -> Option<Value>| {
        let _ = std::fs::remove_file(qemu.path("agent"));
        Played::start(&qemu.path("agent"), answers)
    };
    let lines = format!("agent = \"unix:{}\"\n", qemu.path("agent").display());
    let (server, source) = serve(&qemu, &lines);
    let doctor = || lb(&qemu, &["doctor", &source]);

    agent(|name, _| (name == "guest-info").then(|| info(&[])));
    let report = doctor();
    says(&report, "guest agent", "good", &["version 9.9.9", "freezes file systems"]);
    says(&report, "grade", "good", &["filesystem can be reached", "hold"]);
    agent(|name, _| (name == "guest-info").then(|| info(&["guest-exec", "guest-fstrim"])));
    let report = doctor();
    says(&report, "guest agent", "warn", &["does not execute guest-exec, guest-fstrim", "block-rpcs"]);
    says(&report, "grade", "good", &["filesystem"]);
    agent(|name, _| (name == "guest-info").then(|| info(&["guest-fsfreeze-freeze"])));
    says(&doctor(), "grade", "warn", &["crash at most", "configuration"]);
    agent(|name, _| match name {
        "guest-info" => Some(info(&[])),
        "guest-fsfreeze-status" => Some(json!({"return": "frozen"})),
        _ => None,
    });
    says(&doctor(), "guest agent", "warn", &["FROZEN", "another program"]);
    agent(|name, _| (name == "guest-info").then(|| json!("silence")));
    says(&doctor(), "guest agent", "warn", &["not answered guest-info", "start the agent in the guest again"]);
    drop(server);

    // Required, it is what keeps a backup from working.
    std::fs::remove_file(qemu.path("agent")).unwrap();
    let (_server, source) = serve(&qemu, &format!("{lines}freeze = \"require\"\n"));
    let report = lb(&qemu, &["doctor", &source]);
    says(&report, "guest agent", "bad", &["no guest agent channel"]);
    says(&report, "grade", "bad", &["no backup", "required"]);
    assert_eq!(report["good"], false);
}

#[test]
fn holds_are_looked_at() {
    let qemu = a_qemu(&[]);
    let program = qemu.path("hold");
    let write = |script: &str| {
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    };
    write("echo READY; cat >/dev/null");
    Played::start(&qemu.path("agent"), |name, _| (name == "guest-info").then(|| info(&["guest-exec"])));
    let lines = format!(
        "agent = \"unix:{}\"\n\
         [[vm.hold]]\nname = \"orders\"\nrun = [\"{}\"]\n\
         [[vm.hold]]\nname = \"gone\"\npolicy = \"require\"\nrun = [\"/no/such/program\"]\n\
         [[vm.hold]]\nname = \"inside\"\nwhere = \"guest\"\nrun = [\"/bin/hold\"]\n",
        qemu.path("agent").display(),
        program.display()
    );
    let (server, source) = serve(&qemu, &lines);
    let report = lb(&qemu, &["doctor", &source]);
    says(&report, "hold orders", "good", &["can be run on this host", "not tried yet"]);
    says(&report, "hold gone", "bad", &["no program /no/such/program"]);
    says(&report, "hold inside", "warn", &["does not execute guest-exec"]);
    says(&report, "grade", "warn", &["filesystem at most"]);
    drop(server);

    // The last result is remembered, good or bad.
    let lines: String = lines.split("[[vm.hold]]").take(2).collect::<Vec<_>>().join("[[vm.hold]]");
    let (_server, source) = serve(&qemu, &lines);
    let repo = qemu.path("repo").to_str().unwrap().to_owned();
    run(livebackup().args(["init", &repo]));
    says(&lb(&qemu, &["doctor", &source]), "grade", "good", &["application can be reached"]);
    assert_eq!(lb(&qemu, &["backup", &source, &repo])["grade"], "application");
    says(&lb(&qemu, &["doctor", &source]), "hold orders", "good", &["it held at", " ms"]);
    write("echo database is down >&2; exit 1");
    assert_eq!(lb(&qemu, &["backup", &source, &repo])["grade"], "filesystem");
    says(&lb(&qemu, &["doctor", &source]), "hold orders", "warn", &["did not hold", "database is down"]);
}
