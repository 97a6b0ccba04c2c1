//! Harvest: how a bitmap leaves QEMU, and how bits get into one.
//!
//! A disk's own bitmap is never exported: it would get busy, and its export can abort QEMU. It is merged into a bitmap on a
//! **helper node** (a node without a medium, of the disk's size), which is read over an NBD export of its own. Bits are
//! set in a helper's enabled bitmaps by writing zeroes to the helper.
//!
//! What a crash leaves: a helper node and its export (found by name), and QEMU's NBD server (a debt).

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::undo::{self, Debt, Debts};
use super::{internal, qemu_failed};
use crate::checkpoint::Bitmap;
use crate::extent::Extent;
use crate::monitor::{Monitor, MonitorError};
use crate::nbd::{self, Client, ConnectOptions, NbdError, Wanted};
use crate::wire::message::{Failure, FailureCode};

/// Reads and sets bitmaps of helper nodes. What it starts in QEMU is taken out by [`undo::remove_all`].
#[derive(Debug)]
pub struct Harvester {
    monitor: Monitor,
    sockets: PathBuf,
    server: Option<PathBuf>,
}

impl Harvester {
    /// For one QEMU; sockets and debts are kept in `sockets`.
    pub fn new(monitor: Monitor, sockets: &Path) -> Self {
        Self { monitor, sockets: sockets.to_owned(), server: None }
    }

    /// Reads a bitmap of a helper node.
    pub async fn read(&mut self, node: &str, bitmap: &str, size_bytes: u64) -> Result<Bitmap, Failure> {
        let export = json!({"type": "nbd", "id": node, "node-name": node, "name": node, "bitmaps": [bitmap]});
        let context = nbd::dirty_bitmap_context(bitmap);
        let is_dirty = |flags| flags & nbd::proto::STATE_DIRTY != 0;
        self.marked(export, node, &context, size_bytes, is_dirty).await?.map_err(internal)
    }

    /// Sets bits in the enabled bitmaps of a helper node.
    pub async fn set_bits(&mut self, node: &str, extents: Vec<Extent>) -> Result<(), Failure> {
        let export = json!({"type": "nbd", "id": node, "node-name": node, "name": node, "writable": true});
        let client = self.export(export, node, vec![]).await?;
        let whole = extents.into_iter().flat_map(|e| e.split_at_multiples(1 << 30));
        client.write_zeroes_all(whole, false).await.map_err(internal)?;
        client.close().await;
        undo::delete_export(&self.monitor, node).await.map_err(qemu_failed)
    }

    /// Adds an export, reads which granules a context marks, and deletes it again, before its client leaves. The inner
    /// error is the reading's: some can do without its answer.
    pub(super) async fn marked(
        &mut self,
        export: Value,
        id: &str,
        context: &str,
        size_bytes: u64,
        is_marked: impl Fn(u32) -> bool,
    ) -> Result<Result<Bitmap, NbdError>, Failure> {
        let client = self.export(export, id, vec![context.to_owned()]).await?;
        let mut found = Bitmap::new(size_bytes);
        let mark = |extent, flags| {
            if is_marked(flags) {
                found.set(extent);
            }
        };
        let read = client.block_status_all(context, Extent::new(0, size_bytes), mark).await;
        undo::delete_export(&self.monitor, id).await.map_err(qemu_failed)?;
        client.close().await;
        Ok(read.map(|()| found))
    }

    async fn export(&mut self, export: Value, id: &str, contexts: Vec<String>) -> Result<Client, Failure> {
        let socket = self.server().await?;
        self.monitor.raw("block-export-add", export).await.map_err(qemu_failed)?;
        let wanted = Wanted { export: id.to_owned(), contexts };
        nbd::connect(&nbd::Address::Unix(socket), &wanted, &ConnectOptions::default()).await.map_err(internal)
    }

    /// Starts QEMU's NBD server, once; gives its socket.
    pub(super) async fn server(&mut self) -> Result<PathBuf, Failure> {
        if let Some(socket) = &self.server {
            return Ok(socket.clone());
        }
        let socket = start_nbd_server(&self.monitor, &self.sockets).await?;
        self.server = Some(socket.clone());
        Ok(socket)
    }
}

/// A node without a medium, of a disk's size, that carries bitmaps.
pub async fn add_helper_node(monitor: &Monitor, node: &str, size_bytes: u64) -> Result<(), MonitorError> {
    let options = json!({"driver": "null-co", "node-name": node, "size": size_bytes, "read-zeroes": true});
    monitor.raw("blockdev-add", options).await.map(drop)
}

/// Starts QEMU's NBD server on a socket of ours.
async fn start_nbd_server(monitor: &Monitor, sockets: &Path) -> Result<PathBuf, Failure> {
    let socket = sockets.join("nbd");
    Debts::new(sockets).owe(Debt::Nbd).map_err(internal)?;
    let addr = if monitor.can_pass_fds() {
        pass_listener(monitor, &socket, "livebackup-nbd").await?;
        json!({"type": "fd", "data": {"str": "livebackup-nbd"}})
    } else {
        json!({"type": "unix", "data": {"path": socket}})
    };
    match monitor.raw("nbd-server-start", json!({"addr": addr})).await {
        Ok(_) => Ok(socket),
        Err(e) => {
            if e.refusal().is_some() {
                // Else it may start yet.
                Debts::new(sockets).paid(Debt::Nbd);
            }
            let running = e.refusal().is_some_and(|words| words.contains("already running"));
            if !running {
                return Err(qemu_failed(e));
            }
            Err(Failure::new(
                FailureCode::Busy,
                "QEMU's only NBD server was started by another program, and bitmaps can leave QEMU no other way; \
                 wait until that program is done, or stop the server with nbd-server-stop",
            ))
        }
    }
}

/// Binds a socket and gives it to QEMU as a descriptor with this name.
pub(super) async fn pass_listener(monitor: &Monitor, socket: &Path, name: &str) -> Result<(), Failure> {
    let _ = std::fs::remove_file(socket);
    let listener =
        UnixListener::bind(socket).map_err(|e| internal(format!("cannot listen at {}: {e}", socket.display())))?;
    monitor.send_fd("getfd", json!({"fdname": name}), listener.as_fd()).await.map(drop).map_err(qemu_failed)
}
