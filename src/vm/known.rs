//! What a QEMU process can do and what devices it has, remembered for as long as it lives.
//!
//! Trying the one ([`monitor::probe`]) costs QEMU some 20 ms of its main loop, walking through the others as much, which are
//! large shares of a small incremental. A process can do the same all its life; its devices may change, and [`Board`] says how
//! that is seen. So both are kept in the VM's state, bound to the process (id, start, boot), to
//! the way that its monitor is reached, and to this program's version. Only a QEMU that can do all that a backup wants is
//! remembered: what was refused is worth another try. A file that cannot be read means trying again; one that cannot be written costs only
//! the next try.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::graph::Board;
use super::names::Names;
use crate::checkpoint::QemuInstance;
use crate::durable::{self, Replace};
use crate::monitor::{self, Capabilities, Monitor, MonitorError};

/// Longest file that is read back.
const MAX_BYTES: u64 = 4 << 20;

/// The file's content.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Known {
    program: String,
    qemu: QemuInstance,
    passes_descriptors: bool,
    capabilities: Capabilities,
    board: Board,
}

/// What QEMU can do: as remembered in `file`, else tried and remembered. With it the devices, where they are remembered.
pub(super) async fn capabilities(
    monitor: &Monitor,
    names: &Names,
    qemu: &QemuInstance,
    file: &Path,
) -> Result<(Capabilities, Board), MonitorError> {
    let passes_descriptors = monitor.can_pass_fds();
    let known = read(file).filter(|k| {
        k.program == env!("CARGO_PKG_VERSION") && k.qemu == *qemu && k.passes_descriptors == passes_descriptors
    });
    if let Some(known) = known {
        return Ok((known.capabilities, known.board));
    }
    let capabilities = monitor::probe(monitor, names.prefix()).await?;
    if capabilities.is_complete() && !capabilities.nbd_server_running {
        let program = env!("CARGO_PKG_VERSION").to_owned();
        let (qemu, capabilities, board) = (qemu.clone(), capabilities.clone(), Board::default());
        write(file, &Known { program, qemu, passes_descriptors, capabilities, board });
    }
    Ok((capabilities, Board::default()))
}

/// Remembers the devices, if what the QEMU can do is remembered.
pub(super) fn remember(file: &Path, board: &Board) {
    if let Some(known) = read(file) {
        write(file, &Known { board: board.clone(), ..known });
    }
}

fn write(file: &Path, known: &Known) {
    let written = serde_json::to_vec(known).map(|text| durable::write_file(file, &text, Replace::Yes));
    if !matches!(written, Ok(Ok(()))) {
        tracing::debug!(file = %file.display(), "what is known of this QEMU was not remembered");
    }
}

fn read(file: &Path) -> Option<Known> {
    let mut text = vec![];
    File::open(file).ok()?.take(MAX_BYTES).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}
