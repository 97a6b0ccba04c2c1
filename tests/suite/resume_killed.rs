//! A backup that is killed and started again goes on with the same point in time: what was acknowledged, and so discarded,
//! comes from the repository, the rest from the server once more.

#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use crate::common::proxy::{Proxy, Way};
use crate::common::*;
use crate::tls_common::*;
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// More than a pack.
const SIZE: u64 = 100 * MIB;
const GRANTS: &str = "[[client]]\nname = \"backup1\"\nvms = [\"*\"]\n";

struct Bench {
    qemu: Qemu,
    server: Server,
    proxy: Proxy,
    home: tempfile::TempDir,
}

impl Bench {
    async fn new() -> Bench {
        let qemu = Qemu::with_raw_disk(Version::V10, SIZE);
        // No two chunks alike, so that nothing is durable before a pack is.
        let mut random = std::fs::File::open("/dev/urandom").unwrap().take(SIZE);
        std::io::copy(&mut random, &mut std::fs::File::create(qemu.path("disk0.raw")).unwrap()).unwrap();
        let vm = format!("{GRANTS}\n[[vm]]\nname = \"real\"\nmonitor = \"qmp:{}\"\n", qemu.socket().display());
        let server = Server::start(&vm).await;
        let proxy = Proxy::tcp(&server.address);
        let home = tempfile::tempdir().unwrap();
        let bench = Bench { qemu, server, proxy, home };
        run(livebackup().arg("init").arg(bench.repo()));
        bench
    }

    fn repo(&self) -> PathBuf {
        self.home.path().join("repo")
    }

    fn disk(&self) -> Vec<u8> {
        std::fs::read(self.qemu.path("disk0.raw")).unwrap()
    }

    fn log(&self) -> PathBuf {
        let entries = std::fs::read_dir(self.repo().join("journal")).unwrap();
        let found = entries.map(|entry| entry.unwrap().path()).find(|path| path.extension().is_some());
        found.unwrap_or_default()
    }

    /// Length of what the log says is durable, if there is a log.
    fn logged_bytes(&self) -> Option<u64> {
        let log = std::fs::read(self.log()).ok()?;
        let begun = u32::from_le_bytes(log.get(8..12)?.try_into().unwrap());
        Some(log.len() as u64 - 20 - u64::from(begun))
    }

    fn backup(&self, more: &[&str]) -> Child {
        let mut command = livebackup();
        command.args(["--json", "--tls", self.server.pki.bundle("backup1").to_str().unwrap(), "backup"]);
        command.arg(format!("livebackup://{}/real", self.proxy.address)).arg(self.repo()).args(more);
        // It is killed after so many bytes have come.
        command.args(["--wire-compression", "none"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// A backup that is killed after so many bytes have come, and some are in the log.
    fn killed(&self, after: u64, logged_bytes: u64) {
        // Who finds what a killed one has left comes back over a connection of its own.
        self.proxy.stall(&[(Way::ToClient, after), (Way::ToClient, after)]);
        let before = self.proxy.cuts_made();
        let mut child = self.backup(&["--compression", "none"]);
        wait_until("the connection to stall", || self.proxy.cuts_made() > before);
        wait_until("the log", || self.logged_bytes() >= Some(logged_bytes));
        // Time for the acknowledgement to arrive: without it all is as right, and more comes again.
        std::thread::sleep(std::time::Duration::from_millis(500));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn done(&self, more: &[&str]) -> (Value, String) {
        self.proxy.cut(&[]);
        let out = self.backup(more).wait_with_output().unwrap();
        let (text, said) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{}\n{text}\n{said}", out.status);
        assert!(!self.log().exists(), "it is forgotten with the commit");
        (serde_json::from_str(&text).unwrap(), said.into_owned())
    }

    fn prove(&self, expected: &[u8]) {
        let dir = self.home.path().join("restored");
        run(livebackup().arg("restore").arg(self.repo()).arg("real@latest").arg(&dir).arg("--force"));
        let image = std::fs::read(dir.join("vd0.raw")).unwrap();
        assert!(image == expected, "at {:?}", (0..expected.len()).find(|at| image.get(*at) != expected.get(*at)));
    }
}

fn went_on(report: &Value) -> bool {
    report["warnings"].to_string().contains("went on with its point in time")
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_killed_goes_on_with_the_same_instant() {
    let mut bench = Bench::new().await;
    tokio::task::block_in_place(|| {
        let first = bench.disk();
        // One pack is durable: 512 chunks.
        bench.killed(90 * MIB, 512 * 32);
        // The guest goes on, also over what was acknowledged and discarded.
        bench.qemu.write(0, 2 * MIB, 0x11);
        bench.qemu.write(SIZE - 2 * MIB, 2 * MIB, 0x22);
        // Killed again before any other.
        bench.killed(8 * MIB, 512 * 32);
        bench.qemu.write(80 * MIB, 2 * MIB, 0x33);
        let before = bench.proxy.bytes(Way::ToClient);
        let (report, said) = bench.done(&["--compression", "none"]);
        assert!(report["level"] == "full" && went_on(&report), "{report} {said}");
        assert_eq!(report["disks"][0]["read_bytes"], SIZE);
        println!("{} MiB came the last time", (bench.proxy.bytes(Way::ToClient) - before) / MIB);
        bench.prove(&first);

        // An incremental: new chunks, chunks that the repository has, and zeroes.
        bench.qemu.write(20 * MIB, MIB, 0x44);
        bench.qemu.write(40 * MIB, MIB, 0x11);
        bench.qemu.write(60 * MIB, MIB, 0);
        for at in 70..80 {
            bench.qemu.write(at * MIB, MIB, at as u8);
        }
        let second = bench.disk();
        bench.killed(7 * MIB, 0);
        bench.qemu.write(30 * MIB, MIB, 0x55);
        bench.qemu.write(20 * MIB, MIB, 0x66);
        let (report, said) = bench.done(&["--compression", "none"]);
        assert!(report["level"] == "incremental" && went_on(&report), "{report} {said}");
        bench.prove(&second);
        // What the guest wrote since the instant is in the next.
        let (report, _) = bench.done(&["--level", "incremental"]);
        assert!(!went_on(&report), "{report}");
        bench.prove(&bench.disk());

        // Who wants another kind of backup does not wait for the grace time.
        bench.qemu.write(50 * MIB, 12 * MIB, 0x77);
        bench.killed(5 * MIB, 0);
        let (report, said) = bench.done(&["--level", "full"]);
        assert!(report["level"] == "full" && said.contains("another kind"), "{report} {said}");
        bench.prove(&bench.disk());
        let verified = run(livebackup().arg("verify").arg(bench.repo()));
        assert!(!verified.contains("damaged"), "{verified}");
    });
}
