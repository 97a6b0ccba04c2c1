//! An instant that has to be taken again, since a write fell between the merge and the filter: nothing written before the
//! instant that counts is missed.

#![allow(clippy::unwrap_used)]

use crate::common::*;

use serde_json::{Value, json};

#[test]
fn writes_between_two_tries_of_an_instant_are_in_the_point() {
    for version in VERSIONS {
        let disk = "driver=raw,node-name=disk0,file.driver=file,file.filename=DIR/disk0.raw";
        let args = ["-name", "vm1", "-blockdev", disk, "-device", "virtio-blk-pci,drive=disk0,id=vd0"];
        let mut qemu = Qemu::start_with(version, &args, |dir| {
            std::fs::File::create(dir.join("disk0.raw")).unwrap().set_len(4 << 20).unwrap();
        });
        qemu.qmp("cont", json!({}));
        let (state, repo) = (qemu.path("state"), qemu.path("repo"));
        let source = format!("qmp:{}", qemu.socket().display());
        let base = || {
            let mut command = livebackup();
            command.arg("--json").arg("--state").arg(&state);
            command
        };
        run(base().arg("init").arg(&repo));
        run(base().args(["backup", &source]).arg(&repo));

        // Held up before and after the filter goes in, at every try; writes into new granules fall into all of
        // the gaps, also where a loaded machine makes few of them.
        let mut child = base()
            .args(["backup", &source])
            .arg(&repo)
            .env("LIVEBACKUP_PAUSE_AT", "fleece.filter=500,fleece.instant=500")
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut written = 0u64;
        let ended = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if written < 64 {
                qemu.write(written * 65536, 512, 1 + written as u8);
                written += 1;
            }
            std::thread::sleep(std::time::Duration::from_millis(40));
        };
        assert!(ended.success());
        let report: Value = serde_json::from_reader(child.stdout.take().unwrap()).unwrap();
        assert_eq!(report["level"], "incremental");
        assert!(written > 8, "the pauses were too short to show anything: {written} writes");

        let dir = qemu.path("restored");
        run(base().arg("restore").arg(&repo).arg("vm1@latest").arg(&dir));
        let image = std::fs::read(dir.join("vd0.raw")).unwrap();
        let there: Vec<_> = (0..written).map(|n| image[(n * 65536) as usize] == 1 + n as u8).collect();
        let first_missing = there.iter().position(|t| !t).unwrap_or(there.len());
        assert!(first_missing > 3, "{version:?}: the point has only the first {first_missing} of {written} writes");
        assert!(
            there[first_missing..].iter().all(|t| !t),
            "{version:?}: a later write is there, an earlier one is not: {there:?}"
        );
    }
}
