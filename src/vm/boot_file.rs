//! Files that the machine cannot start without, read for whoever keeps them with a point.

use std::fs::File;
use std::os::unix::fs::FileExt;

use bytes::Bytes;

use super::{Vm, compare, internal};
use crate::limits::{MAX_CHUNK_BYTES, MIN_CHUNK_BYTES};
use crate::units::human_bytes;
use crate::wire::boot_file::{MAX_BOOT_FILE_BYTES, MAX_PIECE_BYTES, Piece, Wanted};
use crate::wire::message::{Failure, FailureCode};

impl Vm {
    /// A piece of one of the machine's boot files, and of no other file.
    pub async fn boot_file(&self, wanted: Wanted) -> Result<Piece, Failure> {
        let Wanted { name, offset_bytes, chunk_bytes, known, .. } = wanted;
        let sizes = MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES;
        if !sizes.contains(&chunk_bytes)
            || !chunk_bytes.is_power_of_two()
            || !offset_bytes.is_multiple_of(MAX_PIECE_BYTES)
        {
            return Err(Failure::new(
                FailureCode::Protocol,
                "a piece of a boot file that begins or ends within a chunk",
            ));
        }
        if !self.inner.machine.boot_files.contains(&name) {
            return Err(refused(format!("{name} is no boot file of this machine")));
        }
        let read = tokio::task::spawn_blocking(move || read(&name, offset_bytes)).await.map_err(internal)?;
        let (size_bytes, bytes) = read.map_err(refused)?;
        let (bytes, found) = compare::hash(bytes, chunk_bytes.into()).await?;
        let is_known = !known.is_empty() && found == known;
        Ok(Piece { size_bytes, bytes: (!is_known).then_some(bytes) })
    }
}

fn refused(why: String) -> Failure {
    Failure::new(FailureCode::Refused, why)
}

/// The file's length, and the piece.
fn read(name: &str, offset_bytes: u64) -> Result<(u64, Bytes), String> {
    // Asked first: opening a FIFO would wait for ever.
    let about = std::fs::metadata(name).map_err(|e| e.to_string())?;
    let size_bytes = about.len();
    if !about.is_file() {
        return Err("it is no regular file".to_owned());
    }
    if size_bytes > MAX_BOOT_FILE_BYTES {
        return Err(format!("it is longer than {}", human_bytes(MAX_BOOT_FILE_BYTES)));
    }
    let mut bytes = vec![0; size_bytes.saturating_sub(offset_bytes).min(MAX_PIECE_BYTES) as usize];
    let file = File::open(name).map_err(|e| e.to_string())?;
    file.read_exact_at(&mut bytes, offset_bytes).map_err(|e| format!("it cannot be read: {e}"))?;
    Ok((size_bytes, bytes.into()))
}
