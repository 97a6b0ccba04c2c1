//! Harvest: how a bitmap leaves QEMU, and how bits get into one.
//!
//! A disk's own bitmap is never exported: it would get busy, and its export can abort QEMU. It is merged into a bitmap on a
//! **helper node** (a node without a medium, of the disk's size), and that one is read. There are two ways:
//!
//! | way | a bitmap is read | bits are set | when |
//! |---|---|---|---|
//! | server | over an NBD export of the helper, with its bitmap | by writing zeroes to that export | QEMU's only NBD server can be ours |
//! | [`file`] | QEMU stores it into a qcow2 file of ours | QEMU loads them from one | another program has started the server |
//!
//! Which way it is, the first need decides, once for a [`Harvester`]. The server, where it is ours, also says which parts
//! of a disk are empty and can serve its data.
//!
//! What a crash leaves: helper nodes, their exports and file nodes (found by name), descriptors (found by label), and
//! QEMU's NBD server (a debt).

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::descriptors::pass_listener;
use super::reach::reach;
use super::undo::{self, Debt, Debts};
use super::{internal, qemu_failed};
use crate::checkpoint::Bitmap;
use crate::extent::Extent;
use crate::monitor::{Monitor, MonitorError};
use crate::nbd::{self, Client, ConnectOptions, NbdError, Wanted};
use crate::wire::message::Failure;

mod file;
pub mod qcow2;

/// What QEMU knows our listening socket by.
const LISTENER: &str = "livebackup-nbd";

/// Reads and sets bitmaps of helper nodes. What it starts in QEMU is taken out by [`undo::remove_all`].
#[derive(Debug)]
pub struct Harvester {
    monitor: Monitor,
    sockets: PathBuf,
    way: Option<Way>,
}

/// How bitmaps go in and out.
#[derive(Clone, Debug)]
enum Way {
    /// Over QEMU's NBD server, which is ours, at this socket.
    Server(PathBuf),
    /// By files: the server is another's.
    File,
}

impl Harvester {
    /// For one QEMU; sockets and debts are kept in `sockets`.
    pub fn new(monitor: Monitor, sockets: &Path) -> Self {
        Self { monitor, sockets: sockets.to_owned(), way: None }
    }

    /// Reads a bitmap of a helper node.
    pub async fn read(&mut self, node: &str, bitmap: &str, size_bytes: u64) -> Result<Bitmap, Failure> {
        let Some(socket) = self.server().await? else {
            return file::read(&self.monitor, &self.sockets, node, bitmap, size_bytes).await;
        };
        let export = json!({"type": "nbd", "id": node, "node-name": node, "bitmaps": [bitmap]});
        let context = nbd::dirty_bitmap_context(bitmap);
        let is_dirty = |flags| flags & nbd::proto::STATE_DIRTY != 0;
        let (all, none) = ([Extent::new(0, size_bytes)], Bitmap::new(size_bytes));
        self.marked(&socket, export, &context, &all, none, is_dirty).await?.map_err(internal)
    }

    /// Sets bits in an enabled bitmap of a helper node. By the server they get into its other enabled bitmaps too.
    pub async fn set_bits(&mut self, node: &str, bitmap: &str, bits: &Bitmap) -> Result<(), Failure> {
        let Some(socket) = self.server().await? else {
            return file::set_bits(&self.monitor, &self.sockets, node, bitmap, bits).await;
        };
        let export = json!({"type": "nbd", "id": node, "node-name": node, "writable": true});
        let client = self.export(&socket, export, vec![]).await?;
        let whole = bits.extents().flat_map(|e| e.split_at_multiples(1 << 30));
        client.write_zeroes_all(whole, false).await.map_err(internal)?;
        client.close().await;
        undo::delete_export(&self.monitor, node).await.map_err(qemu_failed)
    }

    /// Which granules of a node may hold something else than zeroes: QEMU's block status of the extents that are `asked` for, and
    /// all others. `None` where the server is another's; the inner error is the reading's: one can do without its answer.
    pub async fn data(
        &mut self,
        node: &str,
        id: &str,
        size_bytes: u64,
        asked: &[Extent],
    ) -> Result<Option<Result<Bitmap, NbdError>>, Failure> {
        let Some(socket) = self.server().await? else { return Ok(None) };
        let export = json!({"type": "nbd", "id": id, "node-name": node, "name": id});
        let may_hold_data = |flags| flags & nbd::proto::STATE_ZERO == 0;
        let mut found = Bitmap::full(size_bytes);
        asked.iter().for_each(|extent| found.clear(*extent));
        self.marked(&socket, export, nbd::BASE_ALLOCATION, asked, found, may_hold_data).await.map(Some)
    }

    /// Adds an export, adds what a context marks of some extents to what was `found`, and deletes the export again, before its
    /// client leaves. The inner error is the reading's.
    async fn marked(
        &self,
        socket: &Path,
        export: Value,
        context: &str,
        asked: &[Extent],
        mut found: Bitmap,
        is_marked: impl Fn(u32) -> bool,
    ) -> Result<Result<Bitmap, NbdError>, Failure> {
        let id = export["id"].as_str().unwrap_or_default().to_owned();
        let client = self.export(socket, export, vec![context.to_owned()]).await?;
        let mut read = Ok(());
        for extent in asked {
            let mark = |extent, flags| {
                if is_marked(flags) {
                    found.set(extent);
                }
            };
            read = client.block_status_all(context, *extent, mark).await;
            if read.is_err() {
                break;
            }
        }
        undo::delete_export(&self.monitor, &id).await.map_err(qemu_failed)?;
        client.close().await;
        Ok(read.map(|()| found))
    }

    /// Adds an export and connects to it. Without a name it has its node's, which is shorter to say; for nodes of ours.
    async fn export(&self, socket: &Path, export: Value, contexts: Vec<String>) -> Result<Client, Failure> {
        let name = export.get("name").unwrap_or(&export["node-name"]).as_str().unwrap_or_default().to_owned();
        self.monitor.raw("block-export-add", export).await.map_err(qemu_failed)?;
        let wanted = Wanted { export: name, contexts };
        let (address, options) = (nbd::Address::Unix(socket.to_owned()), ConnectOptions::default());
        reach(&self.monitor, || nbd::connect(&address, &wanted, &options)).await
    }

    /// The socket of QEMU's NBD server, started if it has none; `None` where another program has started it.
    pub async fn server(&mut self) -> Result<Option<PathBuf>, Failure> {
        let way = match &self.way {
            Some(way) => way.clone(),
            None => start_nbd_server(&self.monitor, &self.sockets).await?.map_or(Way::File, Way::Server),
        };
        self.way = Some(way.clone());
        Ok(match way {
            Way::Server(socket) => Some(socket),
            Way::File => None,
        })
    }
}

/// A node without a medium, of a disk's size, that carries bitmaps.
pub async fn add_helper_node(monitor: &Monitor, node: &str, size_bytes: u64) -> Result<(), MonitorError> {
    let options = json!({"driver": "null-co", "node-name": node, "size": size_bytes, "read-zeroes": true});
    monitor.raw("blockdev-add", options).await.map(drop)
}

/// Starts QEMU's NBD server on a socket of ours; `None` when another program has started it.
async fn start_nbd_server(monitor: &Monitor, sockets: &Path) -> Result<Option<PathBuf>, Failure> {
    let socket = sockets.join(undo::NBD_SOCKET);
    // One of ours that another program used when we ended.
    if Debts::new(sockets).owed(Debt::Nbd) && undo::is_listening(monitor, sockets) {
        return Ok(Some(socket));
    }
    Debts::new(sockets).owe(Debt::Nbd).map_err(internal)?;
    let addr = if monitor.can_pass_fds() {
        pass_listener(monitor, &socket, LISTENER).await?;
        json!({"type": "fd", "data": {"str": LISTENER}})
    } else {
        json!({"type": "unix", "data": {"path": socket}})
    };
    let refused = match monitor.raw("nbd-server-start", json!({"addr": addr})).await {
        Ok(_) => return Ok(Some(socket)),
        Err(e) => e,
    };
    if refused.refusal().is_some() {
        // Else it may start yet.
        Debts::new(sockets).paid(Debt::Nbd);
    }
    if !refused.refusal().is_some_and(|words| words.contains("already running")) {
        return Err(qemu_failed(refused));
    }
    if monitor.can_pass_fds() {
        // Before it looked at the descriptor, QEMU refused: the name is there still.
        let _ = monitor.raw("closefd", json!({"fdname": LISTENER})).await;
    }
    let _ = std::fs::remove_file(&socket);
    tracing::info!("QEMU's only NBD server was started by another program: bitmaps leave QEMU by a file");
    Ok(None)
}
