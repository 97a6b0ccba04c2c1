//! Transfer: from a session's events to durable packs, and of what is scanned from the repository's trees to the session.
//!
//! A sidecar's "same" is believed only for bytes whose digests it was given: it leaves them to the image that the disk goes on
//! from. They are durable, and acknowledged at once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::mpsc::{Receiver, Sender, UnboundedReceiver, UnboundedSender};

use crate::backup::audit::Picked;
use crate::backup::comeback::{Count, Replay};
use crate::backup::files::{self, Files, KeptFile};
use crate::backup::plan::{LevelChoice, Plan};
use crate::backup::report::{Phase, Progress};
use crate::backup::{BackupError, blocking};
use crate::extent::Extent;
use crate::fault;
use crate::machine::Taken;
use crate::repo::digest::Digest;
use crate::repo::offer::Offer;
use crate::repo::session_log::Left;
use crate::repo::writer::{DiskHandle, Durable, Finished};
use crate::repo::{Compression, Image, Reader, RepoError, Repository, Writer, WriterOptions};
use crate::units::human_bytes;
use crate::wire::digests::{ChunkDigest, Digests, MAX_DIGESTS};
use crate::wire::frame::MAX_ACK_EXTENTS;
use crate::wire::message::{Ack, Begun, Event, Failure, FailureCode, Session, Totals};
use crate::wire::rate::Limit;
use crate::wire::resume::{Again, Lasting};

/// What the manifest says about the run itself.
#[derive(Debug)]
pub struct Head {
    pub vm: String,
    pub started: Timestamp,
    pub level: LevelChoice,
    pub prepared: Duration,
    pub clock: Instant,
    pub over_a_connection: bool,
}

impl Default for Head {
    fn default() -> Self {
        Self {
            vm: String::new(),
            started: Timestamp::UNIX_EPOCH,
            level: LevelChoice::Auto,
            prepared: Duration::ZERO,
            clock: Instant::now(),
            over_a_connection: false,
        }
    }
}

/// All that is durable, and only lacks its manifest.
#[derive(Debug)]
pub struct Stored {
    pub head: Head,
    pub begun: Begun,
    pub received: Vec<u64>,
    /// Of those, bytes that were the same.
    pub same: Vec<u64>,
    /// Data as it came from the sidecar, compressed or not.
    pub wire_bytes: u64,
    pub picked: BTreeMap<String, Picked>,
    pub plan: Plan,
    pub finished: Finished,
    pub files: Vec<KeptFile>,
    pub totals: Totals,
    pub warnings: Vec<String>,
    pub transfer: Duration,
    pub store: Duration,
}

/// A writer that is dropped where it may block: its threads are waited for.
pub struct OpenWriter(Option<Writer>);

impl OpenWriter {
    pub fn get(&self) -> Result<&Writer, BackupError> {
        self.0.as_ref().ok_or(BackupError::Panicked)
    }

    async fn finish(mut self) -> Result<Finished, BackupError> {
        let writer = self.0.take().ok_or(BackupError::Panicked)?;
        Ok(blocking(move || writer.finish()).await??)
    }
}

impl Drop for OpenWriter {
    fn drop(&mut self) {
        if let Some(writer) = self.0.take() {
            tokio::task::spawn_blocking(move || drop(writer));
        }
    }
}

pub async fn open_writer(repo: &Repository, compression: Compression) -> Result<OpenWriter, BackupError> {
    let repo = repo.clone();
    let options = WriterOptions { compression, ..WriterOptions::default() };
    Ok(OpenWriter(Some(blocking(move || repo.writer(options)).await??)))
}

/// Stores what the session sends. Dropping it drops the session. With a sidecar in this process (`here`) nobody can come back
/// for the rest of it: what has arrived is acknowledged before it is durable, and so costs the guest nothing any more.
pub async fn run(
    session: Session,
    mut writer: OpenWriter,
    wish: Wish,
    (chunk_bytes, limit): (u32, Option<Limit>),
    here: bool,
    files: Files<'_>,
    progress: &mut impl FnMut(Progress),
) -> Result<Stored, BackupError> {
    let clock = Instant::now();
    let Wish { plan, picked, left } = wish;
    let Session { begun, mut events, acks, digests, lasting } = session;
    let again = match lasting {
        Some(Lasting::Client { again, .. }) => Some(again),
        _ => None,
    };
    let durable = writer.0.as_mut().and_then(Writer::take_durable).ok_or(BackupError::Panicked)?;
    let compared = add_disks(writer.get()?, &begun, &plan, &picked, chunk_bytes)?;
    // Of how many disks it is told what is durable.
    let disks = if here { 0 } else { begun.disks.len() };
    let mut replay = Replay::new(left, &begun, chunk_bytes);
    let reader = Arc::new(writer.get()?.reader());

    let work = async {
        let data = async {
            let inlet = Inlet { events: &mut events, acks: &acks, at_once: here, limit };
            receive(inlet, writer.get()?, &begun, &compared, &mut replay, progress).await
        };
        let kept = files::keep(writer.get()?, files, &begun, chunk_bytes);
        let (received, (files, warnings)) = tokio::try_join!(data, kept)?;
        fault::point("backup.sent");
        let transfer = clock.elapsed();
        // The rest is stored while the sidecar closes the fleece.
        let (finished, totals) = tokio::try_join!(writer.finish(), end(&mut events))?;
        let store = clock.elapsed() - transfer;
        Ok::<_, BackupError>((received, files, warnings, finished, totals, transfer, store))
    };
    let (received, files, warnings, finished, totals, transfer, store) = tokio::select! {
        done = work => done,
        () = acknowledge(durable, &acks, disks) => Err(BackupError::Panicked),
        failed = give_always(digests, again, reader, &compared) => Err(failed),
    }
    .map_err(|error| name_cause(error, &begun))?;
    let head = Head::default();
    let Received { read: received, same, wire_bytes } = received;
    Ok(Stored {
        head,
        begun,
        received,
        same,
        wire_bytes,
        picked,
        plan,
        finished,
        files,
        totals,
        warnings,
        transfer,
        store,
    })
}

/// Names the disk that cannot go on from its base, or the server that sent what cannot be stored.
fn name_cause(error: BackupError, begun: &Begun) -> BackupError {
    let BackupError::Repository(source) = error else { return error };
    if source.is_bad_piece() {
        let what =
            format!("the server sent compressed bytes that are not what it says: {source}; no restore point was made");
        return Failure::new(FailureCode::Protocol, what).into();
    }
    match source.base_lost().and_then(|index| begun.disks.get(index)) {
        Some(lost) => BackupError::BaseLost { disk: lost.disk.name.clone(), source },
        None => BackupError::Repository(source),
    }
}

/// What was asked for.
#[derive(Debug)]
pub struct Wish {
    /// What disks go on from.
    pub plan: Plan,
    /// What is to be confirmed.
    pub picked: BTreeMap<String, Picked>,
    /// What a killed backup has left of the same session.
    pub left: Option<Arc<Left>>,
}

/// What a disk is compared with: of that it may be said that it is the same.
enum Compared {
    Nothing,
    All(Offer, Image),
    Some(Picked, u64),
}

impl Compared {
    fn covers(&self, extent: Extent) -> bool {
        match self {
            Self::Nothing => false,
            Self::All(offer, _) => offer.covers(extent),
            Self::Some(picked, chunk_bytes) => picked.covers(extent, *chunk_bytes),
        }
    }
}

/// Adds the session's disks to the writer, in order: a handle is the disk's index.
fn add_disks(
    writer: &Writer,
    begun: &Begun,
    plan: &Plan,
    picked: &BTreeMap<String, Picked>,
    chunk_bytes: u32,
) -> Result<Vec<Compared>, BackupError> {
    let mut compared = Vec::with_capacity(begun.disks.len());
    for (index, taken) in begun.disks.iter().enumerate() {
        let disk = &taken.disk;
        let unasked =
            |how: String| BackupError::Contradiction(format!("disk {:?} was {how}, which nobody asked for", disk.name));
        let handle = match &taken.taken {
            Taken::Full { .. } => {
                compared.push(Compared::Nothing);
                writer.disk(disk.size_bytes, chunk_bytes, None)?
            }
            Taken::Incremental { since } => {
                let base = plan.bases.get(&disk.name).filter(|base| base.checkpoint == *since);
                let base = base.ok_or_else(|| unasked(format!("sent since {since}")))?;
                if taken.areas.is_none() && !base.areas.areas.is_empty() {
                    let what = format!(
                        "areas of disk {:?} were left out of the point that it goes on from, and this sidecar is too old to \
                         know of that: update it, or use --level full",
                        disk.name
                    );
                    return Err(Failure::new(FailureCode::Protocol, what).into());
                }
                let some = picked.get(&disk.name).cloned().unwrap_or_default();
                compared.push(Compared::Some(some, chunk_bytes.into()));
                writer.disk(disk.size_bytes, chunk_bytes, Some(base.image))?
            }
            Taken::Scan { .. } => {
                let (_, image) = plan.scans.get(&disk.name).ok_or_else(|| unasked("scanned".to_owned()))?;
                if image.size_bytes != disk.size_bytes {
                    let (name, then, now) = (&disk.name, image.size_bytes, disk.size_bytes);
                    let what = format!("disk {name} was resized while the backup began, from {then} to {now} bytes");
                    return Err(Failure::new(FailureCode::SessionGone, what).into());
                }
                let offer = Offer::default();
                let broken = offer.broken();
                compared.push(Compared::All(offer, *image));
                writer.scanned_disk(disk.size_bytes, chunk_bytes, *image, broken)?
            }
        };
        if usize::from(handle.0) != index {
            return Err(BackupError::Contradiction(format!("disk {index} became number {}", handle.0)));
        }
    }
    Ok(compared)
}

/// Gives the digests of all disks that are scanned, and once more whenever a connection was lost. Never returns but with
/// an error.
async fn give_always(
    digests: Option<Sender<Digests>>,
    again: Option<Receiver<Again>>,
    reader: Arc<Reader>,
    compared: &[Compared],
) -> BackupError {
    let mut next = digests.map(|digests| Again { have: vec![], digests });
    let mut again = again;
    loop {
        if let Some(Again { have, digests }) = next
            && let Err(error) = give(digests, have, reader.clone(), compared).await
        {
            return error;
        }
        next = match &mut again {
            Some(again) => again.recv().await,
            None => None,
        };
        if next.is_none() {
            std::future::pending::<()>().await;
        }
    }
}

/// Gives the digests of all disks that are scanned, as fast as they are taken, but for what lies before `have`.
async fn give(
    digests: Sender<Digests>,
    have: Vec<u64>,
    reader: Arc<Reader>,
    compared: &[Compared],
) -> Result<(), BackupError> {
    let scans = compared.iter().enumerate().filter_map(|(index, one)| match one {
        Compared::All(offer, image) => Some((index as u16, offer.clone(), *image)),
        _ => None,
    });
    let scans: Vec<_> = scans.collect();
    let known =
        |digest: Option<Digest>| digest.map_or(ChunkDigest::UNKNOWN, |d| ChunkDigest::from_bytes(*d.as_bytes()));
    let work = move || {
        for (disk, offer, image) in scans {
            // Whoever does not take them says why in the events.
            let send = |first_chunk, known: Vec<_>| {
                digests.blocking_send(Digests { disk, first_chunk, digests: known }).is_ok()
            };
            let have_chunks = have.get(usize::from(disk)).copied().unwrap_or(0).div_ceil(image.chunk_bytes.into());
            offer.give(&reader, image, MAX_DIGESTS, |batch| {
                batch.first_chunk + batch.known.len() as u64 <= have_chunks
                    || send(batch.first_chunk, batch.known.into_iter().map(known).collect())
            })?;
            send(image.chunks(), Vec::new());
            if offer.unknown_bytes() > 0 {
                let bytes = human_bytes(offer.unknown_bytes());
                tracing::warn!(
                    disk,
                    "{bytes} that an earlier point has are damaged or gone: they are sent and stored again"
                );
            }
        }
        Ok::<_, RepoError>(())
    };
    blocking(work).await??;
    Ok(())
}

/// Where data comes from, how fast at most, and where is said what need not come again.
struct Inlet<'a> {
    events: &'a mut Receiver<Result<Event, Failure>>,
    acks: &'a UnboundedSender<Ack>,
    /// Whether that is said of what has arrived, durable or not.
    at_once: bool,
    limit: Option<Limit>,
}

impl Inlet<'_> {
    fn arrived(&self, disk: u16, extent: Extent) {
        if self.at_once {
            self.acknowledge(disk, extent);
            fault::point("backup.arrived");
        }
    }

    fn acknowledge(&self, disk: u16, extent: Extent) {
        // Whoever is not there any more says so in the events.
        let _ = self.acks.send(Ack { disk, extents: vec![extent] });
    }
}

/// What has come.
struct Received {
    /// Bytes read, of each disk.
    read: Vec<u64>,
    /// Of those, bytes that were the same.
    same: Vec<u64>,
    /// Data as it came, compressed or not.
    wire_bytes: u64,
}

/// Stores data until the session says that all was sent.
async fn receive(
    inlet: Inlet<'_>,
    writer: &Writer,
    begun: &Begun,
    compared: &[Compared],
    replay: &mut Replay,
    progress: &mut impl FnMut(Progress),
) -> Result<Received, BackupError> {
    let mut count = Count::new(begun);
    let mut wire_bytes = 0;
    let needed_bytes = begun.disks.iter().map(|d| d.needed_bytes).fold(0, u64::saturating_add);
    let mut so_far = Progress { phase: Phase::Transfer, needed_bytes, received_bytes: 0 };
    progress(so_far);
    loop {
        match next(inlet.events).await? {
            Event::Data { disk, offset_bytes, bytes } => {
                let len = bytes.len() as u64;
                let extent = Extent { offset_bytes, len_bytes: len };
                replay.before(writer, disk, extent, &mut count).await?;
                writer.put(DiskHandle(known(disk, &count.received)?), offset_bytes, bytes).await?;
                // Who waits takes no more, and the line is filled no further.
                if let Some(limit) = &inlet.limit {
                    limit.pass(len).await;
                }
                wire_bytes += len;
                count.data(disk, extent);
                inlet.arrived(disk, extent);
            }
            Event::Packed { disk, offset_bytes, packed } => {
                let extent = Extent { offset_bytes, len_bytes: packed.raw_len().into() };
                let came = packed.bytes().len() as u64;
                replay.before(writer, disk, extent, &mut count).await?;
                writer.put_packed(DiskHandle(known(disk, &count.received)?), offset_bytes, packed).await?;
                if let Some(limit) = &inlet.limit {
                    limit.pass(came).await;
                }
                wire_bytes += came;
                count.data(disk, extent);
                inlet.arrived(disk, extent);
            }
            Event::Zero { disk, extent } => {
                replay.before(writer, disk, extent, &mut count).await?;
                writer.zero(DiskHandle(known(disk, &count.received)?), extent).await?;
                count.zero(disk, extent);
                inlet.arrived(disk, extent);
            }
            Event::Same { disk, extent } => {
                let index = usize::from(known(disk, &count.received)?);
                if !compared.get(index).is_some_and(|compared| compared.covers(extent)) {
                    let what = format!("{extent} of disk {disk} are the same, it says, as what it was not given");
                    return Err(BackupError::Contradiction(what));
                }
                replay.before(writer, disk, extent, &mut count).await?;
                count.same(disk, extent);
                writer.log_same(DiskHandle(disk), extent, replay.chunk_bytes())?;
                inlet.acknowledge(disk, extent);
            }
            Event::Sent => {
                replay.rest(writer, &mut count).await?;
                break;
            }
            Event::End(_) => {
                return Err(BackupError::Contradiction("the session ended before all was sent".to_owned()));
            }
        }
        so_far.received_bytes = count.received.iter().sum();
        progress(so_far);
    }
    progress(Progress { phase: Phase::Store, ..so_far });
    for (begun, received) in begun.disks.iter().zip(&count.received) {
        if begun.needed_bytes != *received {
            if replay.goes_on() {
                // A crash of this host took back what its log did not flush and was acknowledged all the same.
                let words = "what the killed backup had stored is not all there";
                return Err(Failure::new(FailureCode::SessionGone, words).into());
            }
            return Err(BackupError::Contradiction(format!(
                "disk {} should have brought {} bytes, and brought {received}",
                begun.disk.name, begun.needed_bytes
            )));
        }
    }
    let (read, same) = count.read();
    Ok(Received { read, same, wire_bytes })
}

/// A disk of the session, and none of the files that are stored beside them.
fn known(disk: u16, received: &[u64]) -> Result<u16, BackupError> {
    match usize::from(disk) < received.len() {
        true => Ok(disk),
        false => Err(BackupError::Contradiction(format!("it sent disk {disk} of {}", received.len()))),
    }
}

async fn next(events: &mut Receiver<Result<Event, Failure>>) -> Result<Event, BackupError> {
    let event = events.recv().await.ok_or(BackupError::Unfinished)?;
    Ok(event?)
}

/// Waits for the end of a session that has sent all.
async fn end(events: &mut Receiver<Result<Event, Failure>>) -> Result<Totals, BackupError> {
    match next(events).await? {
        Event::End(totals) => Ok(totals),
        _ => Err(BackupError::Contradiction("it sent more after all was sent".to_owned())),
    }
}

/// Tells the sidecar what is durable. Never returns.
async fn acknowledge(mut durable: UnboundedReceiver<Durable>, acks: &UnboundedSender<Ack>, disks: usize) {
    let mut batch = Vec::new();
    while durable.recv_many(&mut batch, MAX_ACK_EXTENTS).await > 0 {
        for ack in merge(&mut batch, disks) {
            // Whoever is not there any more has no fleece to keep small; the events say why.
            let _ = acks.send(ack);
        }
    }
    std::future::pending().await
}

/// As few acknowledgements as hold all of the batch: extents of a disk in order, neighbours as one.
fn merge(batch: &mut Vec<Durable>, disks: usize) -> Vec<Ack> {
    let mut extents: Vec<(u16, Extent)> = Vec::new();
    for (DiskHandle(disk), some) in batch.drain(..).filter(|(handle, _)| usize::from(handle.0) < disks) {
        extents.extend(some.into_iter().filter(|e| e.len_bytes > 0).map(|extent| (disk, extent)));
    }
    extents.sort_unstable();
    let mut acks: Vec<Ack> = Vec::new();
    for (disk, extent) in extents {
        if let Some(ack) = acks.last_mut().filter(|ack| ack.disk == disk) {
            if let Some(last) = ack.extents.last_mut().filter(|last| last.end() == extent.offset_bytes) {
                last.len_bytes += extent.len_bytes;
                continue;
            }
            if ack.extents.len() < MAX_ACK_EXTENTS {
                ack.extents.push(extent);
                continue;
            }
        }
        acks.push(Ack { disk, extents: vec![extent] });
    }
    acks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acknowledgements_are_few_and_bounded() {
        let chunk = |n: u64| Extent::new(n * 65536, 65536);
        let mut batch = vec![
            (DiskHandle(1), vec![chunk(3)]),
            (DiskHandle(0), vec![chunk(1), chunk(2)]),
            (DiskHandle(0), vec![chunk(0)]),
            (DiskHandle(2), vec![chunk(0)]),
        ];
        let acks = merge(&mut batch, 2);
        assert_eq!(
            acks,
            [Ack { disk: 0, extents: vec![Extent::new(0, 3 * 65536)] }, Ack { disk: 1, extents: vec![chunk(3)] },]
        );
        assert!(batch.is_empty());
        let scattered = (0..2 * MAX_ACK_EXTENTS as u64 + 1).map(|n| chunk(2 * n)).collect();
        let acks = merge(&mut vec![(DiskHandle(0), scattered)], 1);
        assert_eq!(acks.iter().map(|a| a.extents.len()).collect::<Vec<_>>(), [MAX_ACK_EXTENTS, MAX_ACK_EXTENTS, 1]);
    }
}
