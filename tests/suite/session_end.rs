//! How a session ends when something is in its way: QEMU that does not answer, a scratch that hangs, a reader that does not
//! go, an instant that takes too long. The guest goes on, and in the end nothing of ours is left.

#![allow(clippy::unwrap_used)]

use crate::common::*;
use crate::session_fixture::*;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use livebackup::vm::{Transport, Vm, VmOptions};
use livebackup::wire::message::{Begin, Event, Failure, FailureCode, Session};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

fn case(version: Version) -> Case {
    let (device, path) = VIRTIO;
    Case { version, transport: Transport::Auto, device, path, size: 32 * MIB }
}

/// Takes events until the last one, acknowledging nothing.
async fn last_word(mut session: Session) -> Result<(), Failure> {
    loop {
        match session.events.recv().await.expect("a last event") {
            Ok(Event::End(_)) => return Ok(()),
            Ok(_) => {}
            Err(failure) => return Err(failure),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_is_stopped_in_the_middle_ends_the_session() {
    let mut qemu = start(&case(Version::V10));
    qemu.write(0, 32 * MIB, 5);
    let vm = attach(&qemu, Transport::Auto).await;
    let mut session = vm.begin(begin(None)).await.unwrap();
    session.events.recv().await.unwrap().unwrap();
    let pid = Pid::from_raw(qemu.pid() as i32);
    kill(pid, Signal::SIGSTOP).unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(300), last_word(session)).await;
    kill(pid, Signal::SIGCONT).unwrap();
    let failure = ended.expect("the session ends").unwrap_err();
    assert_eq!(failure.code, FailureCode::Qemu, "{failure}");
    assert!(failure.message.contains("hangs or was stopped"), "{failure}");
    // The next session takes out what is left, or it was done in the background.
    wait_until_begun(&vm, begin(None)).await;
    vm.idle().await;
    assert_no_fleece(&mut qemu);
    qemu.write(0, MIB, 6);
}

/// Begins as soon as the VM is free again, and ends it.
async fn wait_until_begun(vm: &Vm, begin: Begin) {
    for _ in 0..600 {
        match vm.begin(begin.clone()).await {
            Ok(session) => return drop(session),
            Err(failure) if failure.code == FailureCode::Busy => tokio::time::sleep(Duration::from_millis(100)).await,
            Err(failure) => panic!("{failure}"),
        }
    }
    panic!("a minute went by");
}

/// An ext4 of its own, which can be frozen: whatever is written to it then waits.
struct Frozen {
    dir: tempfile::TempDir,
    frozen: bool,
}

impl Frozen {
    fn new() -> Frozen {
        let dir = tempfile::Builder::new().prefix("livebackup-test-").tempdir().unwrap();
        let (image, at) = (dir.path().join("image"), dir.path().join("at"));
        std::fs::File::create(&image).unwrap().set_len(256 * MIB).unwrap();
        std::fs::create_dir(&at).unwrap();
        run(Command::new("mkfs.ext4").arg("-q").arg(&image));
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at));
        Frozen { dir, frozen: false }
    }

    fn at(&self) -> PathBuf {
        self.dir.path().join("at")
    }

    fn freeze(&mut self, freeze: bool) {
        if self.frozen != freeze {
            run(Command::new("fsfreeze").arg(if freeze { "-f" } else { "-u" }).arg(self.at()));
            self.frozen = freeze;
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.freeze(false);
        let _ = Command::new("umount").arg("-l").arg(self.at()).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scratch_that_hangs_keeps_its_filter_until_it_answers() {
    for version in VERSIONS {
        let mut scratch = Frozen::new();
        let mut qemu = start(&case(version));
        qemu.write(0, 32 * MIB, 5);
        let address = qemu.socket().to_str().unwrap().parse().unwrap();
        let options = VmOptions { state: qemu.path("state"), scratch: Some(scratch.at()), ..VmOptions::default() };
        let vm = Vm::attach(&address, options).await.unwrap();
        let mut session = vm.begin(begin(None)).await.unwrap();
        session.events.recv().await.unwrap().unwrap();
        scratch.freeze(true);
        // Has to be copied first, which hangs; QEMU gives the point in time up.
        qemu.write(31 * MIB, 65536, 9);
        let ending = tokio::spawn(last_word(session));
        let filter = |qemu: &mut Qemu| qemu.nodes().iter().any(|n| n.contains("-cbw"));
        // By now the session is over but for the scratch, or about to be: the guest and QEMU go on in any case.
        for n in 0..20 {
            qemu.write(n * MIB, 4096, 10 + n as u8);
            assert!(filter(&mut qemu), "the filter goes while the scratch hangs");
            tokio::time::sleep(Duration::from_millis(400)).await;
        }
        assert!(!ending.is_finished(), "the session is over while its filter is in");
        scratch.freeze(false);
        let failure =
            tokio::time::timeout(Duration::from_secs(60), ending).await.expect("an end").unwrap().unwrap_err();
        assert_eq!(failure.code, FailureCode::Broken, "{failure}");
        vm.idle().await;
        let gone = || {
            let left = filter(&mut qemu);
            !left
        };
        wait_until("the filter to go", gone);
        assert_no_fleece(&mut qemu);
        let expected: Vec<u8> = std::fs::read(qemu.path("disk0.raw")).unwrap();
        assert_eq!((expected[31 << 20], expected[19 << 20], expected[(19 << 20) + 4096]), (9, 29, 5));
        let mut image = vec![0; 32 << 20];
        apply(vm.begin(begin(None)).await.unwrap(), &mut image, || ()).await;
        assert!(image == expected);
    }
}

/// The directory of our sockets for a QEMU.
fn sockets(qemu: &Qemu) -> PathBuf {
    let dir = if nix::unistd::geteuid().is_root() {
        PathBuf::from("/run/livebackup")
    } else {
        Path::new(&std::env::var_os("XDG_RUNTIME_DIR").unwrap()).join("livebackup")
    };
    let process = livebackup::monitor::Process::of_pid(qemu.pid() as i32).unwrap();
    let key = format!("-{}-{}", process.pid, process.start_time);
    let of_qemu = |path: &PathBuf| path.is_dir() && path.to_str().unwrap().ends_with(&key);
    let found = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).find(of_qemu);
    found.expect("a directory for the sockets")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_on_an_export_holds_the_end_up_but_not_for_good() {
    for version in VERSIONS {
        let (device, path) = SCSI_IOTHREAD;
        let mut qemu = start(&Case { device, path, ..case(version) });
        qemu.qemu_io(path, "write -P 5 0 32M");
        let vm = attach(&qemu, Transport::Vhost).await;
        let mut session = vm.begin(begin(None)).await.unwrap();
        // Ours reads by now, and has more to tell than we have taken.
        session.events.recv().await.unwrap().unwrap();
        let export = std::fs::read_dir(sockets(&qemu)).unwrap().map(|e| e.unwrap().path());
        let export = export.into_iter().find(|p| p.extension().is_some_and(|e| e == "vhost")).unwrap();
        // QEMU serves one reader at a time: this one waits for ours to go, and then stays.
        let stranger = std::os::unix::net::UnixStream::connect(export).unwrap();
        let ending = tokio::spawn(last_word(session));
        // Longer than one try takes; a slower machine tries less often, which is fine too.
        tokio::time::sleep(Duration::from_secs(8)).await;
        qemu.qemu_io(path, "write -P 3 0 64k");
        drop(stranger);
        tokio::time::timeout(Duration::from_secs(60), ending).await.expect("an end").unwrap().unwrap();
        vm.idle().await;
        assert_clean(&mut qemu);
    }
}

#[test]
fn the_guest_is_let_go_when_the_lease_is_over() {
    for version in VERSIONS {
        let args = [
            "-name",
            "vm1",
            "-blockdev",
            "driver=raw,node-name=disk0,file.driver=file,file.filename=DIR/disk0.raw",
            "-device",
            VIRTIO.0,
            "-blockdev",
            "driver=raw,node-name=disk1,file.driver=file,file.filename=DIR/disk1.raw",
            "-device",
            "virtio-blk-pci,drive=disk1,id=vd1",
        ];
        let mut qemu = Qemu::start_with(version, &args, |dir| {
            for name in ["disk0.raw", "disk1.raw"] {
                std::fs::File::create(dir.join(name)).unwrap().set_len(MIB).unwrap();
            }
        });
        qemu.qmp("cont", json!({}));
        let base = || {
            let mut command = livebackup();
            command.arg("--state").arg(qemu.path("state"));
            command
        };
        let (source, repo) = (format!("qmp:{}", qemu.socket().display()), qemu.path("repo"));
        run(base().arg("init").arg(&repo));
        // We sleep for longer than the lease with the guest standing still.
        let mut late = base();
        late.args(["backup", &source]).arg(&repo).env("LIVEBACKUP_PAUSE_AT", "fleece.stopped=10500");
        let ended = late.output().unwrap();
        let words = String::from_utf8_lossy(&ended.stderr);
        assert!(!ended.status.success() && words.contains("stop, and the instant"), "{words}");
        run(base().args(["backup", &source]).arg(&repo));
        assert_eq!(qemu.status(), "running");
        assert_no_fleece(&mut qemu);
    }
}
