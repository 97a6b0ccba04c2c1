//! Files that a machine cannot start without (kernel, initrd, firmware): kept with the point, by whoever can read them. One that
//! cannot be kept is a warning, not a failure: the disks matter more.

use crate::backup::sidecar::{Again, Sidecar};
use crate::backup::{BackupError, blocking};
use crate::extent::Extent;
use crate::limits::MAX_DISKS;
use crate::repo::digest::Digest;
use crate::repo::offer::Offer;
use crate::repo::point::PointFile;
use crate::repo::writer::DiskHandle;
use crate::repo::{RepoError, Repository, Writer};
use crate::wire::boot_file::{MAX_BOOT_FILE_BYTES, MAX_PIECE_BYTES, Piece, Wanted};
use crate::wire::digests::ChunkDigest;
use crate::wire::message::{Begun, Failure, FailureCode};

/// Chunks that are looked up at once.
const LOOKED_UP: usize = 1024;

/// A file that was given to the writer.
#[derive(Debug)]
pub struct KeptFile {
    /// Its name in the machine's definition.
    pub name: String,
    /// Its number among the writer's disks.
    pub handle: DiskHandle,
}

/// Where files come from, and what is there of them.
#[derive(Debug)]
pub struct Files<'a> {
    /// Who reads them.
    pub from: Option<Again>,
    /// The VM's name.
    pub vm: &'a str,
    /// Where an earlier point may have them.
    pub repo: &'a Repository,
}

/// Gives the machine's files to the writer. Also says in words what could not be kept.
pub async fn keep(
    writer: &Writer,
    files: Files<'_>,
    begun: &Begun,
    chunk_bytes: u32,
) -> Result<(Vec<KeptFile>, Vec<String>), BackupError> {
    let (mut kept, mut warnings) = (Vec::new(), Vec::new());
    let names = &begun.machine.boot_files;
    if names.is_empty() {
        return Ok((kept, warnings));
    }
    let not_kept = |name: &str, why: &str| format!("{name} is not kept with the point: {why}; keep a copy yourself");
    let opened = match files.from {
        Some(again) => again.beside().await.map_err(|failure| failure.message),
        None => Err("its server cannot be reached a second time".to_owned()),
    };
    let mut sidecar = match opened {
        Ok(sidecar) => sidecar,
        Err(why) => return Ok((kept, names.iter().map(|name| not_kept(name, &why)).collect())),
    };
    let earlier = super::points(files.repo, files.vm).await?.pop().map(|point| point.files).unwrap_or_default();
    for name in names {
        if begun.disks.len() + kept.len() >= MAX_DISKS {
            warnings.push(not_kept(name, "there are too many disks and files"));
            continue;
        }
        let known = known(writer, &earlier, name, chunk_bytes).await?;
        let wanted =
            Wanted { vm: files.vm.to_owned(), name: name.clone(), offset_bytes: 0, chunk_bytes, known: vec![] };
        match keep_one(writer, &mut sidecar, wanted, &known).await? {
            Ok(handle) => kept.push(KeptFile { name: name.clone(), handle }),
            Err(failure) if failure.code == FailureCode::Protocol => {
                warnings.push(not_kept(name, "its server is too old to send it"));
                break;
            }
            Err(failure) => warnings.push(not_kept(name, &failure.message)),
        }
    }
    Ok((kept, warnings))
}

/// By chunk what the repository has of a file.
async fn known(
    writer: &Writer,
    earlier: &[PointFile],
    name: &str,
    chunk_bytes: u32,
) -> Result<Vec<Option<Digest>>, BackupError> {
    let found = earlier.iter().find(|file| file.name == name && file.image.chunk_bytes == chunk_bytes);
    let Some(image) = found.map(|file| file.image).filter(|image| image.size_bytes <= MAX_BOOT_FILE_BYTES) else {
        return Ok(vec![]);
    };
    let reader = writer.reader();
    let look_up = move || {
        let mut known = vec![Some(Digest::ZERO); image.chunks() as usize];
        Offer::default().give(&reader, image, LOOKED_UP, |batch| {
            let places = known.iter_mut().skip(batch.first_chunk as usize);
            places.zip(batch.known).for_each(|(place, digest)| *place = digest);
            true
        })?;
        Ok::<_, RepoError>(known)
    };
    Ok(blocking(look_up).await??)
}

async fn keep_one(
    writer: &Writer,
    sidecar: &mut Sidecar,
    mut wanted: Wanted,
    known: &[Option<Digest>],
) -> Result<Result<DiskHandle, Failure>, BackupError> {
    let chunk_bytes = wanted.chunk_bytes;
    let mut opened = None;
    loop {
        let at = wanted.offset_bytes;
        let first_chunk = (at / u64::from(chunk_bytes)) as usize;
        let chunks = (MAX_PIECE_BYTES / u64::from(chunk_bytes)) as usize;
        let here: Option<Vec<Digest>> = known.iter().skip(first_chunk).take(chunks).copied().collect();
        let here = here.unwrap_or_default();
        wanted.known = here.iter().map(|digest| ChunkDigest::from_bytes(*digest.as_bytes())).collect();
        let Piece { size_bytes, bytes } = match sidecar.boot_file(wanted.clone()).await {
            Ok(piece) => piece,
            // What was taken of a file that cannot be read to its end is left in the packs, unused.
            Err(failure) => return Ok(Err(failure)),
        };
        let odd = |what: &str| Failure::new(FailureCode::Refused, what.to_owned());
        if size_bytes > MAX_BOOT_FILE_BYTES {
            return Ok(Err(odd("it is too long")));
        }
        let (handle, of_size) = match opened {
            Some(opened) => opened,
            None => (writer.disk(size_bytes, chunk_bytes, None)?, size_bytes),
        };
        opened = Some((handle, of_size));
        let len_bytes = size_bytes.saturating_sub(at).min(MAX_PIECE_BYTES);
        let has = bytes.as_ref().map_or(here.len() as u64, |bytes| bytes.len() as u64);
        let expected = if bytes.is_some() { len_bytes } else { len_bytes.div_ceil(chunk_bytes.into()) };
        if size_bytes != of_size || has != expected {
            return Ok(Err(odd("it has changed while it was read")));
        }
        match bytes {
            Some(bytes) if bytes.is_empty() => {}
            Some(bytes) => writer.put(handle, at, bytes).await?,
            None => writer.known(handle, Extent::new(at, len_bytes), Some(here)).await?,
        }
        if at + len_bytes >= size_bytes {
            return Ok(Ok(handle));
        }
        wanted.offset_bytes = at + len_bytes;
    }
}
