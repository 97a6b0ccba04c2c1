//! `livebackup bench guest-writes`: with fio in a real guest on QEMUs of both versions it measures, and nothing is left in QEMU or
//! in the guest, however it ends. What the figures are is nobody's business here.

#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::process::{Child, Command, Stdio};

use crate::common::guest::*;
use crate::common::*;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const FILE: &str = "/mnt/vd0/measured";

/// The guest with what a user has in it, of which nothing may change.
struct Measured {
    guest: Guest,
    bitmaps: Vec<(String, String)>,
    nodes: Vec<String>,
}

impl Measured {
    fn boot(version: Version) -> Measured {
        let mut guest = Guest::boot(version, &[GuestDisk::qcow2("vd0", 64 * MIB).with_ext4()]);
        let theirs = json!({"node": "vd0-node", "name": "of-the-user", "persistent": true});
        guest.qmp("block-dirty-bitmap-add", theirs);
        let (bitmaps, nodes) = (guest.bitmaps(), guest.nodes());
        Measured { guest, bitmaps, nodes }
    }

    fn command(&self, args: &[&str]) -> Command {
        let text = |name: &str| self.guest.path(name).to_str().unwrap().to_owned();
        let mut command = livebackup();
        command.args(["--json", "--state", &text("state"), "--scratch", &text("measures")]);
        command.args(["bench", "guest-writes", &format!("qmp:{}", text("qmp"))]);
        // What is said later counts.
        let has = |name: &str| args.contains(&name);
        for pair in [["--file", FILE], ["--size", "8M"], ["--seconds", "2"], ["--rounds", "1"]] {
            if !has(pair[0]) {
                command.args(pair);
            }
        }
        std::fs::create_dir_all(self.guest.path("measures")).unwrap();
        command.args(args).stdin(Stdio::null());
        command
    }

    /// One that fails: its exit code and words.
    fn refused(&self, args: &[&str]) -> (i32, String) {
        let out = self.command(args).output().unwrap();
        let said: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {out:?}"));
        (out.status.code().unwrap(), said["error"]["message"].as_str().unwrap_or_else(|| panic!("{said}")).to_owned())
    }

    fn start(&self, args: &[&str]) -> Child {
        self.command(args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
    }

    fn fio_runs(&mut self) -> bool {
        self.guest.try_sh("pidof fio").0 == 0
    }

    fn file_is_there(&mut self) -> bool {
        self.guest.try_sh(&format!("test -e {FILE}")).0 == 0
    }

    /// What is ours in QEMU and on the host.
    fn nothing_is_left_outside(&mut self) {
        assert_eq!((self.guest.bitmaps(), self.guest.nodes()), (self.bitmaps.clone(), self.nodes.clone()));
        assert_eq!(self.guest.exports(), Vec::<String>::new());
        assert_eq!(self.guest.qmp("query-jobs", json!({})), json!([]));
        let stats = self.guest.qmp("query-blockstats", json!({}));
        assert!(!stats.to_string().contains("histogram"), "{stats}");
        let left: Vec<_> = std::fs::read_dir(self.guest.path("measures")).unwrap().map(|e| e.unwrap().path()).collect();
        assert!(left.is_empty() && !self.guest.path("state").exists(), "{left:?}");
    }

    fn nothing_is_left(&mut self) {
        self.nothing_is_left_outside();
        assert!(!self.fio_runs() && !self.file_is_there());
        assert_eq!(self.guest.status(), "running");
    }
}

fn ended(mut child: Child) -> (i32, Value) {
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    (child.wait().unwrap().code().unwrap(), serde_json::from_str(&said).unwrap())
}

/// Ctrl-C.
fn interrupted(child: Child) {
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let (code, said) = ended(child);
    assert!(code == 130 && said["error"]["message"].as_str().unwrap().contains("its file is removed"), "{said}");
}

#[test]
fn a_guests_writes_are_measured_and_nothing_is_left() {
    let mut measured = Measured::boot(Version::V10);
    let said: Value = serde_json::from_str(&run(&mut measured.command(&["--freeze", "require"]))).unwrap();
    measured.nothing_is_left();
    let methods = ["none", "bitmap", "fleece", "incremental"];
    let summaries = said["summaries"].as_array().unwrap();
    assert_eq!(summaries.len(), methods.len(), "{said}");
    for method in methods {
        let found = summaries.iter().find(|s| s["workload"] == "random" && s["method"] == method);
        let found = found.unwrap_or_else(|| panic!("no row of {method}: {said}"));
        assert!(found["not_measured"].is_null() && found["rounds"] == 1 && found["finished"].is_number(), "{found}");
    }
    let runs = said["runs"].as_array().unwrap();
    assert_eq!(runs.len(), methods.len());
    for run in runs {
        for phase in ["before", "during", "after"] {
            let (figures, write) = (&run[phase], &run[phase]["write"]);
            assert!(figures["operations"].as_u64().unwrap() > 0 && figures["read"].is_null(), "{run}");
            let of = |name: &str| write[name].as_f64().unwrap();
            assert!(0.0 < of("p50_us") && of("p50_us") <= of("p99_us") && of("p99_us") <= of("p999_us"), "{run}");
            // fio's percentiles are of a histogram, its maximum is exact.
            assert!(of("p999_us") <= of("max_us") * 1.1, "{run}");
        }
        let read = run["backup"]["read_bytes"].as_u64().unwrap();
        match run["method"].as_str().unwrap() {
            "fleece" => assert!(read > 2 * MIB && read <= 64 * MIB, "{run}"),
            "incremental" => assert!((MIB..32 * MIB).contains(&read), "{run}"),
            _ => assert_eq!(read, 0, "{run}"),
        }
    }
    assert!(said["guest"].as_str().unwrap().contains("fio-3."), "{said}");

    // Workloads that are no mere writes; without a backup, since that has nothing to do with them.
    let args =
        ["--seconds", "1", "--method", "none", "--workload", "database", "--workload", "mixed", "--fio", "/bin/fio"];
    let said: Value = serde_json::from_str(&run(&mut measured.command(&args))).unwrap();
    measured.nothing_is_left();
    for (run, workload) in said["runs"].as_array().unwrap().iter().zip(["database", "mixed"]) {
        assert!(run["workload"] == workload && run["during"]["operations"].as_u64().unwrap() > 0, "{run}");
        assert_eq!(run["during"]["read"].is_null(), workload != "mixed", "{run}");
    }
}

#[test]
fn what_is_in_the_way_is_said_and_nothing_is_left() {
    let mut measured = Measured::boot(Version::V7);
    for (args, code, words) in [
        (vec!["--fio", "fio-of-nobody"], 1, "apt install fio"),
        (vec!["--size", "128M"], 7, "has"),
        (vec!["--file", "/mnt/none/x"], 1, "--file"),
        (vec!["--file", "/proc/livebackup-fio"], 1, "--file"),
        (vec!["--file", "/dev/vda"], 1, "it is there already"),
        (vec!["--file", "/run/in-memory"], 1, "no direct I/O"),
        (vec!["--method", "push"], 2, "one of none, bitmap, fleece, incremental"),
        (vec!["--file", "../x"], 2, "from / on"),
        (vec!["--size", "1000"], 2, "in whole 1M"),
        (vec!["--exclude", "vd7"], 1, "no disk \"vd7\""),
    ] {
        let args = if args[0] == "--exclude" { [args, vec!["--method", "fleece"]].concat() } else { args };
        if args[0] == "--exclude" {
            // A method that fails is a row that says so.
            let said: Value = serde_json::from_str(&run(&mut measured.command(&args))).unwrap();
            assert!(said["summaries"][0]["not_measured"].as_str().unwrap().contains(words), "{said}");
        } else {
            let (found, said) = measured.refused(&args);
            assert!(found == code && said.contains(words), "{args:?}: {found} {said}");
        }
        measured.nothing_is_left();
    }

    // The user's own file stays as it is.
    measured.guest.sh(&format!("echo mine >{FILE}"));
    let (code, said) = measured.refused(&[]);
    assert!(code == 1 && said.contains("it is there already") && said.contains("--file"), "{said}");
    assert_eq!(measured.guest.sh(&format!("cat {FILE}; rm {FILE}")), "mine\n");

    // Ctrl-C, while fio runs for long.
    let child = measured.start(&["--seconds", "600", "--method", "none"]);
    wait_until("fio to run", || measured.fio_runs() && measured.file_is_there());
    interrupted(child);
    measured.nothing_is_left();
    let child = measured.start(&["--seconds", "4", "--method", "fleece"]);
    wait_until("the backup to run", || measured.file_is_there() && !measured.guest.exports().is_empty());
    interrupted(child);
    measured.nothing_is_left();
    // While it tries what QEMU can do.
    let child = measured.start(&[]);
    wait_until("it to attach", || !measured.guest.exports().is_empty());
    interrupted(child);
    measured.nothing_is_left();

    // The guest is stopped meanwhile, and before.
    let child = measured.start(&["--seconds", "5", "--method", "none"]);
    wait_until("fio to run", || measured.fio_runs() && measured.file_is_there());
    measured.guest.qmp("stop", json!({}));
    let (code, said) = ended(child);
    let words = said["error"]["message"].as_str().unwrap();
    assert!(code == 1 && words.contains("does not run") && words.contains("LEFT BEHIND"), "{said}");
    assert!(words.contains(FILE) && measured.guest.status() == "paused", "{said}");
    measured.nothing_is_left_outside();
    let (code, said) = measured.refused(&[]);
    assert!(code == 1 && said.contains("does not run"), "{said}");
    measured.guest.qmp("cont", json!({}));
    wait_until("fio to end by itself", || !measured.fio_runs());
    measured.guest.sh(&format!("rm {FILE}"));
    measured.nothing_is_left();

    // An agent that may not run programs, and none.
    measured.guest.sh("killall -9 qemu-ga; while pidof qemu-ga; do usleep 20000; done");
    let (code, said) = measured.refused(&[]);
    assert!(code == 1 && said.contains("apt install qemu-guest-agent"), "{said}");
    measured
        .guest
        .sh("setsid qemu-ga -m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0 -t /run -b guest-exec \
         </dev/null >/dev/null 2>&1 &");
    Agent::connect(&measured.guest.agent());
    let (code, said) = measured.refused(&[]);
    assert!(code == 1 && said.contains("refuses guest-exec") && said.contains("block-rpcs"), "{said}");
    measured.nothing_is_left();
}

#[test]
fn a_machine_that_a_service_has_is_left_to_it() {
    let mut qemu = Qemu::with_raw_disk(Version::V10, MIB);
    qemu.qmp("cont", json!({}));
    let text = |name: &str| qemu.path(name).to_str().unwrap().to_owned();
    let config = format!(
        "listen = \"unix:{}\"\nstate = \"{}\"\n[[vm]]\nname = \"vm1\"\nmonitor = \"qmp:{}\"\n",
        text("sock"),
        text("state"),
        text("qmp")
    );
    std::fs::write(qemu.path("serve.toml"), config).unwrap();
    let mut serve = livebackup();
    serve.args(["serve", "--config", &text("serve.toml")]).stdin(Stdio::null()).stdout(Stdio::null());
    let mut server = serve.stderr(Stdio::null()).spawn().unwrap();
    let command = || {
        let mut command = livebackup();
        command.args(["--scratch", &text(""), "bench", "guest-writes", &format!("qmp:{}", text("qmp")), "--vm", "vm1"]);
        command.stdin(Stdio::null()).output().unwrap()
    };
    let mut said = String::new();
    wait_until("the service to have the machine", || {
        let out = command();
        said = String::from_utf8_lossy(&out.stderr).into_owned();
        out.status.code() == Some(4)
    });
    assert!(said.contains("served by a livebackup at") && said.contains("stop that service"), "{said}");
    server.kill().unwrap();
    server.wait().unwrap();
    // Without a channel for an agent.
    let out = command();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(1) && said.contains("no channel to a guest agent"), "{said}");
}
