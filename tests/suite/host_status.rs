//! What `status` and `doctor` say of VMs that another process of this host has, or a server.

#![allow(clippy::unwrap_used)]

use crate::common::*;
use crate::session_fixture::*;

use std::process::{Child, Command, Stdio};

use livebackup::vm::Transport;
use serde_json::{Value, json};

fn ask(qemu: &Qemu, args: &[&str]) -> Value {
    let text = run(livebackup().arg("--json").arg("--state").arg(qemu.path("state")).args(args));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args:?}: {e}: {text}"))
}

/// What is said of the VM behind this monitor, among whatever else this host has.
fn held<'a>(report: &'a Value, qemu: &Qemu) -> Option<&'a Value> {
    report["vms"].as_array().unwrap().iter().find(|vm| vm["qemu_pid"] == qemu.pid())
}

fn a_qemu(version: Version) -> Qemu {
    let (device, path) = SCSI_IOTHREAD;
    start(&Case { version, transport: Transport::Auto, device, path, size: MIB })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_another_process_has_is_shown_with_who_that_is() {
    let qemu = a_qemu(Version::V10);
    assert_eq!(held(&ask(&qemu, &["status"]), &qemu), None);
    let vm = attach(&qemu, Transport::Auto).await;
    let source = format!("qmp:{}", qemu.socket().display());
    for args in [vec!["status"], vec!["status", &source]] {
        let report = ask(&qemu, &args);
        let found = held(&report, &qemu).unwrap_or_else(|| panic!("{report}"));
        assert_eq!((&found["vm"], &found["held_by"]), (&json!("vm1"), &json!(std::process::id())), "{found}");
        let own = std::env::current_exe().unwrap();
        assert!(found["command"].as_str().unwrap().contains(own.to_str().unwrap()), "{found}");
        assert_eq!(found["status"], Value::Null);
        let text = run(livebackup().args(&args));
        assert!(text.contains("held by process") && text.contains("vm1"), "{text}");
    }
    drop(vm);
    assert_eq!(held(&ask(&qemu, &["status"]), &qemu), None);
    assert_eq!(ask(&qemu, &["status", &source])["vm"], "vm1");
}

/// A backup in one process serves nobody; what it tells is shown until it is over.
#[tokio::test(flavor = "multi_thread")]
async fn the_backup_of_another_process_is_shown_with_how_far_it_is() {
    let (device, path) = VIRTIO;
    // More than is on its way at a time: the session waits for who reads it.
    let size = 80 * MIB;
    let mut qemu = start(&Case { version: Version::V10, transport: Transport::Auto, device, path, size });
    qemu.write(0, size, 7);
    let vm = attach(&qemu, Transport::Auto).await;
    let session = vm.begin(begin(None)).await.unwrap();
    let source = format!("qmp:{}", qemu.socket().display());
    for args in [vec!["status"], vec!["status", &source]] {
        let report = ask(&qemu, &args);
        let found = held(&report, &qemu).unwrap_or_else(|| panic!("{report}"));
        assert_eq!(found["session"]["needed_bytes"], json!(size), "{found}");
        let text = run(livebackup().args(&args));
        assert!(text.contains("a backup is running: instant") && text.contains("of 80.0 MiB sent"), "{text}");
    }
    let mut image = vec![0; size as usize];
    apply(session, &mut image, || ()).await;
    wait_until("its end to be told", || held(&ask(&qemu, &["status"]), &qemu).unwrap()["session"] == Value::Null);
    drop(vm);
}

/// Names come from QEMU: what is in them is neither a command to the terminal nor a line of ours.
#[test]
fn a_name_is_no_command_to_a_terminal() {
    let name = "vm\u{1b}[2J\nvm2: fine";
    let disk = "driver=raw,node-name=disk0,file.driver=file,file.filename=DIR/disk0.raw";
    let args = ["-name", name, "-blockdev", disk, "-device", VIRTIO.0];
    let qemu = Qemu::start_with(Version::V10, &args, |dir| {
        std::fs::File::create(dir.join("disk0.raw")).unwrap().set_len(MIB).unwrap();
    });
    let (repo, source) = (qemu.path("repo"), format!("qmp:{}", qemu.socket().display()));
    let repo = repo.to_str().unwrap();
    run(livebackup().args(["init", repo]));
    assert_eq!(ask(&qemu, &["disks", &source])["vm"], name, "JSON has it as it is");
    let state = qemu.path("state");
    for args in [
        vec!["disks", &source],
        vec!["status", &source],
        vec!["estimate", &source, repo],
        vec!["backup", &source, repo],
        vec!["points", repo],
        vec!["show", repo, name],
        vec!["verify", repo, name],
        vec!["restore", repo, name, qemu.path("out").to_str().unwrap()],
        vec!["detach", &source],
        vec!["show", repo, "vm\u{1b}[3J"],
    ] {
        let out = livebackup().arg("--state").arg(&state).args(&args).output().unwrap();
        let said = String::from_utf8([out.stdout, out.stderr].concat()).unwrap();
        assert!(!said.contains(|c: char| c.is_control() && c != '\n'), "{args:?}: {said:?}");
        assert!(!said.contains("\nvm2"), "{args:?}: {said}");
    }
}

/// A small file system that goes with the test.
struct Small(std::path::PathBuf);

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_state_directory_is_named() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("NOT TESTED: mounts need root");
        return;
    }
    let qemu = a_qemu(Version::V10);
    let state = qemu.path("small");
    std::fs::create_dir(&state).unwrap();
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(&state));
    let small = Small(state.clone());
    let (repo, scratch) = (qemu.path("repo"), qemu.path("scratch"));
    run(livebackup().arg("init").arg(&repo));
    let source = format!("qmp:{}", qemu.socket().display());
    let (mut refused, mut pages) = (0, 0);
    loop {
        // Each time with a page more than the time before.
        for entry in std::fs::read_dir(&state).unwrap().map(Result::unwrap) {
            match entry.path().is_dir() {
                true => std::fs::remove_dir_all(entry.path()).unwrap(),
                false => std::fs::remove_file(entry.path()).unwrap(),
            }
        }
        std::fs::write(state.join("full"), vec![1; (16 - pages) * 4096]).unwrap();
        let mut command = livebackup();
        command.args(["backup", &source]).arg(&repo).arg("--state").arg(&state).arg("--scratch").arg(&scratch);
        let out = command.output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        if out.status.success() {
            break;
        }
        assert_eq!(out.status.code(), Some(7), "{pages} pages: {said}");
        assert!(said.contains(state.to_str().unwrap()) && said.contains("make room"), "{pages} pages: {said}");
        (refused, pages) = (refused + 1, pages + 1);
    }
    assert!(refused > 2, "{refused}");
    drop(small);
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(qemu: &Qemu) -> Server {
    let config = qemu.path("serve.toml");
    let (socket, state) = (qemu.path("serve.sock"), qemu.path("state"));
    let text = format!(
        "listen = \"unix:{}\"\nstate = \"{}\"\n[[vm]]\nmonitor = \"qmp:{}\"\n",
        socket.display(),
        state.display(),
        qemu.socket().display()
    );
    std::fs::write(&config, text).unwrap();
    let mut command: Command = livebackup();
    let child = command.args(["serve", "--config"]).arg(config).stdin(Stdio::null()).stderr(Stdio::null()).spawn();
    let server = Server(child.unwrap());
    wait_until("the server to have the VM", || {
        held(&ask(qemu, &["status"]), qemu).is_some_and(|vm| vm["status"] != Value::Null)
    });
    server
}

#[test]
fn a_server_is_asked_for_what_it_knows() {
    for version in VERSIONS {
        let qemu = a_qemu(version);
        let _server = serve(&qemu);
        let report = ask(&qemu, &["status"]);
        let found = held(&report, &qemu).unwrap();
        assert_eq!(
            (&found["status"]["vm"], &found["status"]["state"]),
            (&json!("vm1"), &json!("prelaunch")),
            "{found}"
        );
        let source = format!("unix:{}/vm1", qemu.path("serve.sock").display());
        let monitor = format!("qmp:{}", qemu.socket().display());
        for source in [source, monitor] {
            let report = ask(&qemu, &["doctor", &source]);
            let checks = report["checks"].as_array().unwrap();
            let of = |name: &str| checks.iter().filter(|c| c["name"] == name).collect::<Vec<_>>();
            assert_eq!(report["good"], true, "{report}");
            assert_eq!(of("run state")[0]["words"], "prelaunch", "{report}");
            assert_eq!((of("scratch").len(), of("state").len()), (1, 0), "{report}");
            let warned =
                of("disk vd0").iter().any(|c| c["verdict"] == "warn" && c["words"].as_str().unwrap().contains("quit"));
            assert_eq!(warned, version == Version::V7, "{report}");
        }
    }
}
