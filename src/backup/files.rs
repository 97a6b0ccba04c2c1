//! Files that a machine cannot start without (kernel, initrd, firmware): kept with the point when they can be read here.
//! One that cannot be kept is a warning, not a failure: the disks matter more.

use std::path::Path;

use bytes::Bytes;
use tokio::fs::File;
use tokio::io::AsyncReadExt;

use crate::backup::BackupError;
use crate::limits::{MAX_DISKS, MAX_READ_BYTES};
use crate::repo::Writer;
use crate::repo::writer::DiskHandle;
use crate::units::{GIB, human_bytes};
use crate::wire::message::Begun;

/// Longest file that is kept.
const MAX_FILE_BYTES: u64 = GIB;

/// A file that was given to the writer.
#[derive(Debug)]
pub struct KeptFile {
    /// Its name in the machine's definition.
    pub name: String,
    /// Its number among the writer's disks.
    pub handle: DiskHandle,
}

/// Gives the files to the writer. Also says in words what could not be kept.
pub async fn keep(
    writer: &Writer,
    paths: &[String],
    begun: &Begun,
    chunk_bytes: u32,
) -> Result<(Vec<KeptFile>, Vec<String>), BackupError> {
    let (mut kept, mut warnings) = (Vec::new(), Vec::new());
    for name in paths {
        if begun.disks.len() + kept.len() >= MAX_DISKS {
            warnings.push(format!("{name} is not kept with the point: there are too many disks and files"));
            continue;
        }
        match keep_one(writer, name, chunk_bytes).await? {
            Ok(handle) => kept.push(KeptFile { name: name.clone(), handle }),
            Err(why) => warnings.push(format!("{name} is not kept with the point: {why}; keep a copy yourself")),
        }
    }
    Ok((kept, warnings))
}

async fn keep_one(writer: &Writer, name: &str, chunk_bytes: u32) -> Result<Result<DiskHandle, String>, BackupError> {
    let (mut file, len_bytes) = match open(Path::new(name)).await {
        Ok(opened) => opened,
        Err(why) => return Ok(Err(why)),
    };
    let handle = writer.disk(len_bytes, chunk_bytes, None)?;
    let mut offset_bytes = 0;
    while offset_bytes < len_bytes {
        let mut piece = vec![0; MAX_READ_BYTES.min(len_bytes - offset_bytes) as usize];
        // What was taken of a file that cannot be read to its end is left in the packs, unused.
        if let Err(error) = file.read_exact(&mut piece).await {
            return Ok(Err(format!("it cannot be read: {error}")));
        }
        let next = offset_bytes + piece.len() as u64;
        writer.put(handle, offset_bytes, Bytes::from(piece)).await?;
        offset_bytes = next;
    }
    Ok(Ok(handle))
}

async fn open(path: &Path) -> Result<(File, u64), String> {
    // Asked first: opening a FIFO would wait for ever.
    let about = tokio::fs::metadata(path).await.map_err(|e| e.to_string())?;
    if !about.is_file() {
        return Err("it is no regular file".to_owned());
    }
    if about.len() > MAX_FILE_BYTES {
        return Err(format!("it is longer than {}", human_bytes(MAX_FILE_BYTES)));
    }
    let file = File::open(path).await.map_err(|e| e.to_string())?;
    Ok((file, about.len()))
}
