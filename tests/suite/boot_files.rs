//! Files that a machine cannot start without, over a server as in one process: kept with each point, sent once, and anew where they
//! have changed.

#![allow(clippy::unwrap_used)]

use crate::common::*;

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};

use serde_json::Value;

const MIB: usize = 1 << 20;

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = (self.0.kill(), self.0.wait());
    }
}

fn firmware(seed: u64) -> Vec<u8> {
    let mut rng = Rng::seeded(seed);
    let mut bytes: Vec<u8> = (0..2 * MIB + (64 << 10)).map(|_| rng.below(256) as u8).collect();
    // Chunks of zeroes, too.
    bytes[MIB / 2..MIB].fill(0);
    bytes
}

fn are_kept(over_a_server: bool) {
    let disk = "driver=raw,node-name=disk0,file.driver=file,file.filename=DIR/disk0.raw";
    let args = ["-name", "vm1", "-bios", "DIR/fw", "-blockdev", disk, "-device", "virtio-blk-pci,drive=disk0,id=vd0"];
    let mut content = firmware(7);
    let qemu = Qemu::start_with(Version::V10, &args, |dir| {
        std::fs::write(dir.join("fw"), &content).unwrap();
        std::fs::File::create(dir.join("disk0.raw")).unwrap().set_len(MIB as u64).unwrap();
    });
    let (repo, state) = (qemu.path("repo"), qemu.path("state"));
    run(livebackup().arg("init").arg(&repo));
    let mut source = format!("qmp:{}", qemu.socket().display());
    let mut server = None;
    if over_a_server {
        let (socket, config) = (qemu.path("serve.sock"), qemu.path("serve.toml"));
        let text = format!(
            "listen = \"unix:{}\"\nstate = \"{}\"\n[[vm]]\nmonitor = \"{source}\"\nname = \"vm1\"\n",
            socket.display(),
            state.display()
        );
        std::fs::write(&config, text).unwrap();
        let child = livebackup().arg("serve").arg("--config").arg(config).stdin(Stdio::null()).spawn().unwrap();
        server = Some(Server(child));
        wait_until("the server to listen", || UnixStream::connect(&socket).is_ok());
        source = format!("unix:{}/vm1", socket.display());
    }
    let backup = || {
        let mut command = livebackup();
        command.arg("--json").arg("--state").arg(&state).args(["backup", &source]).arg(&repo);
        let report: Value = serde_json::from_str(&run(&mut command)).unwrap();
        assert_eq!(report["warnings"].as_array().unwrap().len(), 0, "{report}");
        report
    };
    let packs = || {
        let files = walk(&repo.join("packs"));
        files.iter().map(|file| file.metadata().unwrap().len()).sum::<u64>()
    };
    let restored = |content: &[u8]| {
        let dir = qemu.path("restored");
        run(livebackup().args(["restore", "--force"]).arg(&repo).arg("vm1").arg(&dir));
        assert!(std::fs::read(dir.join("files/fw")).unwrap() == content);
    };
    backup();
    let first = packs();
    assert!(first > MIB as u64, "{first}");
    restored(&content);
    backup();
    let again = packs() - first;
    assert!(again < 64 << 10, "{again} bytes were stored of a file that is as it was");
    restored(&content);
    // One chunk of the second piece.
    content[MIB + 5] ^= 1;
    let file = std::fs::File::options().write(true).open(qemu.path("fw")).unwrap();
    file.write_all_at(&content[MIB + 5..MIB + 6], MIB as u64 + 5).unwrap();
    backup();
    let changed = packs() - first - again;
    assert!((100 << 10..400 << 10).contains(&changed), "{changed} bytes were stored for a chunk that has changed");
    restored(&content);
    // One that is gone is told of.
    std::fs::remove_file(qemu.path("fw")).unwrap();
    let mut command = livebackup();
    command.arg("--json").arg("--state").arg(&state).args(["backup", &source]).arg(&repo);
    let report: Value = serde_json::from_str(&run(&mut command)).unwrap();
    assert!(report["warnings"].to_string().contains("is not kept with the point: "), "{report}");
    drop(server);
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[test]
fn boot_files_are_kept() {
    are_kept(false);
}

#[test]
fn boot_files_are_kept_over_a_server() {
    are_kept(true);
}
