//! Named mount points: of a real guest's two file systems just those are frozen that the configuration names, and the grade does
//! not claim more than that.

#![allow(clippy::unwrap_used)]

use std::process::{Child, Command, Stdio};

use crate::common::guest::*;
use crate::common::*;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text(guest: &Guest, name: &str) -> String {
    guest.path(name).to_str().unwrap().to_owned()
}

fn lb(guest: &Guest, args: &[&str]) -> Value {
    let out = run(livebackup().args(["--json", "--state", &text(guest, "state")]).args(args));
    serde_json::from_str(&out).unwrap_or(Value::Null)
}

/// A backup by a service that freezes these mount points.
fn backup(guest: &Guest, mount_points: &[&str]) -> Value {
    let config = format!(
        "listen = \"unix:{}\"\nstate = \"{}\"\n[[vm]]\nname = \"guest\"\nmonitor = \"qmp:{}\"\nfreeze = \"require\"\n\
         freeze_mount_points = {mount_points:?}\n",
        text(guest, "sock"),
        text(guest, "state"),
        text(guest, "qmp")
    );
    std::fs::write(guest.path("serve.toml"), config).unwrap();
    let mut command = livebackup();
    command.args(["serve", "--config", &text(guest, "serve.toml")]).stdin(Stdio::null());
    let _server = Server(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    let source = format!("unix:{}/guest", text(guest, "sock"));
    wait_until("the service to attach", || {
        let out = livebackup().args(["--json", "status", &source]).output().unwrap();
        serde_json::from_slice::<Value>(&out.stdout).is_ok_and(|status| !status["qemu_version"].is_null())
    });
    lb(guest, &["backup", &source, &text(guest, "repo"), "--level", "full"])
}

/// Whether an ext4 image wants its journal replayed.
fn wants_recovery(guest: &Guest, disk: &str) -> bool {
    lb(guest, &["restore", &text(guest, "repo"), "guest", &text(guest, "restored"), "--force"]);
    let image = guest.path("restored").join(format!("{disk}.raw"));
    let said = run(Command::new("dumpe2fs").arg("-h").arg(image).env("LC_ALL", "C"));
    said.lines().any(|line| line.starts_with("Filesystem features:") && line.contains("needs_recovery"))
}

#[test]
fn only_what_is_named_is_frozen() {
    let disks = [GuestDisk::raw("vd0", 32 * MIB).with_ext4(), GuestDisk::raw("vd1", 32 * MIB).with_ext4()];
    let mut guest = Guest::boot(Version::V10, &disks);
    lb(&guest, &["init", &text(&guest, "repo")]);
    let churn = "while :; do i=$((i+1)); echo $i >/mnt/vd0/f$((i%50)); echo $i >/mnt/vd1/f$((i%50)); done";
    guest.sh(&format!("sh -c \"{}\" >/dev/null 2>&1 &", churn.replace('$', "\\$")));

    let one = backup(&guest, &["/mnt/vd0"]);
    let frozen = &one["evidence"]["frozen"];
    assert_eq!((&frozen["file_systems"], &frozen["mount_points"]), (&json!(1), &json!(["/mnt/vd0"])), "{one}");
    assert_eq!(one["grade"], "crash", "the other one was not: {one}");
    assert_eq!((wants_recovery(&guest, "vd0"), wants_recovery(&guest, "vd1")), (false, true));

    let both = backup(&guest, &["/mnt/vd0", "/mnt/vd1"]);
    assert_eq!(
        (&both["evidence"]["frozen"]["file_systems"], &both["grade"]),
        (&json!(2), &json!("filesystem")),
        "{both}"
    );
    assert_eq!((wants_recovery(&guest, "vd0"), wants_recovery(&guest, "vd1")), (false, false));
}
