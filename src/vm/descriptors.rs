//! Descriptors: files and listening sockets of ours that QEMU is given without a path. Nothing is left of them on a file
//! system, and no rule about paths (AppArmor, SELinux, another user) is in their way.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use serde_json::{Value, json};

use super::{internal, qemu_failed};
use crate::monitor::Monitor;
use crate::wire::message::Failure;

/// Our sets are numbered from here. QEMU numbers its own from 0 up, and so does libvirt; a number must fit an `int`.
const FIRST_SET: u64 = 0x6c62_0000;

/// A file that QEMU has as a set of descriptors.
#[derive(Clone, Copy, Debug)]
pub struct FileSet(u64);

impl FileSet {
    /// Passes a file. The label makes the set ours after a crash.
    pub async fn pass(monitor: &Monitor, file: &File, label: &str) -> Result<Self, Failure> {
        let sets = monitor.raw("query-fdsets", json!({})).await.map_err(qemu_failed)?;
        let taken = |id: u64| sets.as_array().is_some_and(|all| all.iter().any(|set| set["fdset-id"] == id));
        // A set that is there already would get a second file, and QEMU would open the first. Old ones of ours may be:
        // QEMU 7.2 keeps them while the guest does not run.
        let id = (FIRST_SET..FIRST_SET + 0x1_0000).find(|id| !taken(*id));
        let id = id.ok_or_else(|| internal("QEMU holds 65,536 descriptors of ours"))?;
        let arguments = json!({"fdset-id": id, "opaque": label});
        monitor.send_fd("add-fd", arguments, file.as_fd()).await.map_err(qemu_failed)?;
        Ok(Self(id))
    }

    /// What QEMU calls the file.
    pub fn filename(&self) -> String {
        format!("/dev/fdset/{}", self.0)
    }

    /// Takes the descriptors back; QEMU may have let them go already.
    pub async fn take_back(self, monitor: &Monitor) -> Result<(), Failure> {
        let answer: Result<Value, _> = monitor.raw("remove-fd", json!({"fdset-id": self.0})).await;
        match answer {
            Err(e) if e.refusal().is_none() => Err(qemu_failed(e)),
            _ => Ok(()),
        }
    }
}

/// Binds a socket and gives it to QEMU as a descriptor with this name.
pub async fn pass_listener(monitor: &Monitor, socket: &Path, name: &str) -> Result<(), Failure> {
    let _ = std::fs::remove_file(socket);
    let listener =
        UnixListener::bind(socket).map_err(|e| internal(format!("cannot listen at {}: {e}", socket.display())))?;
    monitor.send_fd("getfd", json!({"fdname": name}), listener.as_fd()).await.map(drop).map_err(qemu_failed)
}
