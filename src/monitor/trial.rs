//! Trying things in QEMU, and taking each of them back.
//!
//! ```text
//!  base (null-co) ◄─ file ── cbw ◄─ file ── snap ◄── vhost-user-blk export
//!  scratch (file on a passed memfd, else null-co) ◄─ target ─┘
//!  helper (null-co, bitmap h) ◄── NBD export
//! ```
//!
//! The inverse of every command is noted before the command is sent and dropped only when QEMU says that it refused, so
//! that a command whose reply never came is taken back too. They run last first.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use serde_json::{Value, json};

use super::capability::Capabilities;
use super::{Monitor, MonitorError};
use crate::units::GRANULE_BYTES;

/// Per command.
const LIMIT: Duration = Duration::from_secs(10);
/// Of the nodes: a few granules.
const SIZE_BYTES: u64 = 16 * GRANULE_BYTES;

struct Trial<'a> {
    monitor: &'a Monitor,
    found: Capabilities,
    inverses: Vec<(&'static str, Value)>,
    prefix: &'a str,
    /// Keeps the names of two probes apart.
    mark: u16,
}

/// Tries everything and takes it back.
pub(super) async fn run(monitor: &Monitor, prefix: &str) -> Result<Capabilities, MonitorError> {
    let mut mark = [0; 2];
    let _ = getrandom::fill(&mut mark);
    let found = Capabilities::of_version(monitor.greeting_version());
    let mark = u16::from_le_bytes(mark);
    let mut trial = Trial { monitor, found, inverses: vec![], prefix, mark };
    let result = trial.everything().await;
    trial.take_back().await;
    result.map(|()| trial.found)
}

impl Trial<'_> {
    fn name(&self, role: char) -> String {
        format!("{}{role}{:04x}", self.prefix, self.mark)
    }

    /// Sends a command, with its inverse. A refusal is `Some(words)`.
    async fn attempt(
        &mut self,
        command: &'static str,
        arguments: Value,
        inverse: Option<(&'static str, Value)>,
        fd: Option<&OwnedFd>,
    ) -> Result<Option<String>, MonitorError> {
        let noted = inverse.is_some();
        self.inverses.extend(inverse);
        let answer = match fd {
            None => self.monitor.raw_within(LIMIT, command, arguments).await,
            Some(fd) => self.monitor.send_fd(command, arguments, fd.as_fd()).await,
        };
        match answer {
            Ok(_) => Ok(None),
            Err(MonitorError::Command { desc, .. }) => {
                if noted {
                    self.inverses.pop();
                }
                Ok(Some(desc))
            }
            Err(e) => Err(e),
        }
    }

    /// As [`Trial::attempt`]; true when it worked, else the refusal is noted for `what`.
    async fn works(
        &mut self,
        what: &'static str,
        command: &'static str,
        arguments: Value,
        inverse: Option<(&'static str, Value)>,
    ) -> Result<bool, MonitorError> {
        let refusal = self.attempt(command, arguments, inverse, None).await?;
        let worked = refusal.is_none();
        self.found.refusals.extend(refusal.map(|words| (what, words)));
        Ok(worked)
    }

    async fn node(&mut self, what: &'static str, role: char, mut options: Value) -> Result<bool, MonitorError> {
        let name = self.name(role);
        options["node-name"] = json!(name);
        let inverse = ("blockdev-del", json!({"node-name": name}));
        self.works(what, "blockdev-add", options, Some(inverse)).await
    }

    async fn everything(&mut self) -> Result<(), MonitorError> {
        let null = json!({"driver": "null-co", "size": SIZE_BYTES, "read-zeroes": true});
        let (base, helper) = (self.name('b'), self.name('h'));
        let nodes = self.node("copy-before-write", 'b', null.clone()).await?
            && self.node("copy-before-write", 'h', null.clone()).await?;
        if nodes {
            self.bitmaps(&base, &helper).await?;
            let scratch = self.scratch(null).await?;
            if self.filter(&base, &helper, scratch).await? {
                let snap = json!({"driver": "snapshot-access", "file": self.name('f')});
                self.found.snapshot_access = self.node("snapshot-access", 's', snap).await?;
            }
            let exported = if self.found.snapshot_access { self.name('s') } else { base };
            self.vhost_user_blk(&exported).await?;
            self.nbd(&helper).await?;
        }
        let nobody = json!({"id": self.name('d')});
        let refusal = self.monitor.raw_within(LIMIT, "block-latency-histogram-set", nobody).await;
        self.found.latency_histogram = match refusal {
            Ok(_) => true,
            Err(e @ MonitorError::Command { .. }) => !e.is_unknown_command(),
            Err(e) => return Err(e),
        };
        Ok(())
    }

    /// A bitmap on each node, and one merged into the other. They go with their nodes.
    async fn bitmaps(&mut self, base: &str, helper: &str) -> Result<(), MonitorError> {
        const WHAT: &str = "bitmap merge";
        let add = |node: &str, name: &str, disabled: bool| json!({"node": node, "name": name, "granularity": GRANULE_BYTES, "disabled": disabled});
        let merge = json!({"node": helper, "target": "h", "bitmaps": [{"node": base, "name": "b"}]});
        self.found.bitmap_merge = self.works(WHAT, "block-dirty-bitmap-add", add(base, "b", false), None).await?
            && self.works(WHAT, "block-dirty-bitmap-add", add(helper, "h", true), None).await?
            && self.works(WHAT, "block-dirty-bitmap-merge", merge, None).await?;
        Ok(())
    }

    /// The scratch node: a file that we pass, else one that stores nothing.
    async fn scratch(&mut self, null: Value) -> Result<bool, MonitorError> {
        const WHAT: &str = "files by descriptor";
        if self.monitor.can_pass_fds() && self.forgets_descriptors().await? {
            let file = memory_file().map_err(|e| self.own("memfd_create", e))?;
            // QEMU reads the number in a file's name as an `int`, and makes sets of its own from 0 up.
            let set = 0x6c62_0000 + u32::from(self.mark);
            let add = json!({"fdset-id": set, "opaque": self.name('s')});
            let inverse = ("remove-fd", json!({"fdset-id": set}));
            let refusal = self.attempt("add-fd", add, Some(inverse), Some(&file)).await?;
            let taken = refusal.is_none();
            self.found.refusals.extend(refusal.map(|words| (WHAT, words)));
            let options = json!({"driver": "file", "filename": format!("/dev/fdset/{set}"), "discard": "unmap"});
            self.found.files_by_descriptor = taken && self.node(WHAT, 't', options).await?;
            return Ok(self.found.files_by_descriptor || self.node("copy-before-write", 't', null).await?);
        }
        // Not tried: every build has the file driver, and add-fd is older than all that we work with.
        self.found.files_by_descriptor = self.monitor.can_pass_fds();
        self.node("copy-before-write", 't', null).await
    }

    /// Before 10 (seen on 7.2) a descriptor set is not removed while the guest does not run: it would stay behind.
    async fn forgets_descriptors(&self) -> Result<bool, MonitorError> {
        Ok(self.found.version.at_least(10, 0) || super::run_state(self.monitor).await? == "running")
    }

    async fn filter(&mut self, base: &str, helper: &str, scratch: bool) -> Result<bool, MonitorError> {
        if !(scratch && self.found.bitmap_merge) {
            return Ok(false);
        }
        let mut options = json!({
            "driver": "copy-before-write", "file": base, "target": self.name('t'), "on-cbw-error": "break-snapshot",
            "cbw-timeout": 4, "bitmap": {"node": helper, "name": "h"}, "min-cluster-size": GRANULE_BYTES,
        });
        self.found.min_cluster_size = self.node("min-cluster-size", 'f', options.clone()).await?;
        if !self.found.min_cluster_size {
            options.as_object_mut().map(|o| o.remove("min-cluster-size"));
        }
        self.found.copy_before_write =
            self.found.min_cluster_size || self.node("copy-before-write", 'f', options).await?;
        Ok(self.found.copy_before_write)
    }

    async fn vhost_user_blk(&mut self, node: &str) -> Result<(), MonitorError> {
        const WHAT: &str = "vhost-user-blk";
        let id = self.name('v');
        let socket = self.listener().await?;
        let addr = match &socket {
            Some(fdname) => json!({"type": "fd", "str": fdname}),
            None => json!({"type": "unix", "path": id, "abstract": true}),
        };
        let add = json!({"type": "vhost-user-blk", "id": id, "node-name": node, "addr": addr, "writable": true});
        let inverse = ("block-export-del", json!({"id": id, "mode": "hard"}));
        self.found.vhost_user_blk = self.works(WHAT, "block-export-add", add, Some(inverse)).await?;
        Ok(())
    }

    async fn nbd(&mut self, node: &str) -> Result<(), MonitorError> {
        const WHAT: &str = "NBD export";
        let addr = match self.listener().await? {
            Some(fdname) => json!({"type": "fd", "data": {"str": fdname}}),
            None => json!({"type": "unix", "data": {"path": self.name('n'), "abstract": true}}),
        };
        let start = json!({"addr": addr, "max-connections": 1});
        match self.attempt("nbd-server-start", start, Some(("nbd-server-stop", json!({}))), None).await? {
            None => {}
            // An export on another's server works as well: it has a name of its own.
            Some(words) if words.contains("already running") => self.found.nbd_server_running = true,
            Some(words) => {
                self.found.refusals.push((WHAT, words));
                return Ok(());
            }
        }
        let id = self.name('n');
        let bitmaps = if self.found.bitmap_merge { json!(["h"]) } else { json!([]) };
        let add = json!({"type": "nbd", "id": id, "node-name": node, "name": id, "bitmaps": bitmaps});
        let inverse = ("block-export-del", json!({"id": id, "mode": "hard"}));
        self.found.nbd_export = self.works(WHAT, "block-export-add", add, Some(inverse)).await?;
        Ok(())
    }

    /// Passes a listening socket without a name in the file system; `None` where that cannot be.
    async fn listener(&mut self) -> Result<Option<String>, MonitorError> {
        const WHAT: &str = "sockets by descriptor";
        if !self.monitor.can_pass_fds() {
            return Ok(None);
        }
        let socket = nameless_listener().map_err(|e| self.own("a listening socket", e))?;
        let fdname = self.name('l');
        // The name is gone once it was used: closing it then is refused, and that is fine.
        let inverse = ("closefd", json!({"fdname": fdname}));
        let refusal = self.attempt("getfd", json!({"fdname": fdname}), Some(inverse), Some(&socket)).await?;
        self.found.sockets_by_descriptor = refusal.is_none();
        self.found.refusals.extend(refusal.map(|words| (WHAT, words)));
        Ok(self.found.sockets_by_descriptor.then_some(fdname))
    }

    fn own(&self, what: &str, error: io::Error) -> MonitorError {
        MonitorError::Descriptor {
            command: what.to_owned(),
            address: self.monitor.address().clone(),
            reason: error.to_string(),
        }
    }

    /// Undoes everything, last first.
    async fn take_back(&mut self) {
        let mut limit = LIMIT;
        while let Some((command, arguments)) = self.inverses.pop() {
            // An export goes a moment after the reply; until then its node is in use.
            for pause_ms in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 0] {
                match self.monitor.raw_within(limit, command, arguments.clone()).await {
                    Err(e) if e.refusal().is_some_and(|words| words.contains("in use")) && pause_ms > 0 => {
                        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
                        continue;
                    }
                    // QEMU executes in order: hand over the rest without waiting for each.
                    Err(MonitorError::Deadline { .. }) => limit = Duration::from_millis(1),
                    Err(e) if command != "closefd" => {
                        tracing::debug!(command, %arguments, error = %e, "taking back a trial failed");
                    }
                    _ => {}
                }
                break;
            }
        }
    }
}

fn memory_file() -> io::Result<OwnedFd> {
    let fd = memfd_create(c"livebackup-probe", MFdFlags::MFD_CLOEXEC)?;
    nix::unistd::ftruncate(&fd, SIZE_BYTES as i64)?;
    Ok(fd)
}

/// Bound to an abstract name that the kernel chose: unix(7), autobind.
fn nameless_listener() -> io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(fd.as_raw_fd(), &UnixAddr::new_unnamed())?;
    listen(&fd, Backlog::new(1)?)?;
    Ok(fd)
}
