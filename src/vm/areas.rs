//! Areas of a disk that are left out: found at the instant, in the disk as it is there.
//!
//! ```text
//!  before the instant     probes join what the fleece keeps: the first sectors, and wherever the last point was looked at
//!  instant ═══════════════════════════════════════════════════════════════════════════════════════════════════════════
//!  look (from the fleece) ─► partition table ─► swap headers, named partitions ─► whole chunks inside
//!                              │ doubt, or not among what the fleece has: kept, and said why
//!                              ▼
//!  leave out: sent as zeroes where the client has something else, else not at all; discarded, so that the guest's writes
//!             there cost nothing from now on
//! ```
//!
//! An incremental's fleece has only what was needed before the instant. A swap area that was not known then is taken as it is
//! once more, and found by the next backup, since the client gives back [where](Areas::seen) was looked.

use std::collections::BTreeMap;

use serde_json::json;

use super::qemu_failed;
use super::tracking::Plan;
use super::transfer::ReadyDisk;
use crate::area::{Area, Areas, MAX_AREAS, MAX_SEEN, Skip, Wanted};
use crate::checkpoint::Bitmap;
use crate::extent::Extent;
use crate::monitor::Monitor;
use crate::partition::{self, Look, Partition, Stop};
use crate::units::{KIB, human_bytes};
use crate::wire::message::{Begin, Failure};

/// What of every disk is looked at: a partition table, or a header of swap.
const FIRST_BYTES: u64 = 68 * KIB;
/// Bytes of a sector, where the device does not say otherwise; reads are of these.
const SECTOR_BYTES: u64 = 512;
/// Most reads for one disk.
const MAX_READS: usize = 1024;

fn wanted<'a>(skip: &'a [Skip], plan: &'a Plan) -> impl Iterator<Item = &'a Skip> {
    skip.iter().filter(|skip| skip.is_for(&plan.disk.name))
}

/// Chooses what an incremental's fleece has to have beside what is needed.
pub(super) fn probe(plan: &mut Plan, begin: &Begin, skip: &[Skip]) {
    if plan.sealed.is_none() || begin.areas.is_none() || wanted(skip, plan).next().is_none() {
        return;
    }
    plan.probes = plan.known.seen.iter().copied().filter(|seen| seen.fits(plan.disk.size_bytes)).collect();
    plan.probes.push(Extent::between(0, FIRST_BYTES.min(plan.disk.size_bytes)));
}

/// Finds what is to be left out of a disk that is ready to be read, and leaves it out.
pub(super) async fn leave_out(
    monitor: &Monitor,
    ready: &mut ReadyDisk,
    plan: &Plan,
    skip: &[Skip],
) -> Result<Areas, Failure> {
    let mut areas = Areas::default();
    if wanted(skip, plan).next().is_none() {
        return Ok(areas);
    }
    let sector_bytes = sector_bytes(monitor, &plan.disk.qom_path).await?;
    let size_bytes = plan.disk.size_bytes;
    let readable = plan.sealed.is_some().then(|| {
        let mut readable = ready.needed.clone();
        plan.also_read(ready.chunk_bytes).for_each(|extent| readable.set(extent));
        readable.round_out(ready.chunk_bytes);
        readable
    });
    let mut reading = Reading { ready, readable, size_bytes, pieces: BTreeMap::new(), seen: vec![] };
    let mut found = vec![];
    let mut table = None;
    for skip in wanted(skip, plan) {
        if let Wanted::Bytes(extent) = skip.what {
            found.push((&skip.what, "as configured".to_owned(), extent));
            continue;
        }
        if table.is_none() {
            table = Some(reading.ask(|look| partition::read(size_bytes, sector_bytes, look)).await?);
        }
        match &table {
            Some(Ok(partitions)) if skip.what == Wanted::Swap => {
                reading.swaps(partitions, skip, &mut found, &mut areas.kept).await?;
            }
            Some(Ok(partitions)) => match named(partitions, &skip.what) {
                Ok(partition) => found.push((&skip.what, words(partition), partition.extent)),
                Err(why) => areas.kept.push(format!("{} is not left out: {why}", skip.what)),
            },
            Some(Err(why)) => areas.kept.push(format!("{} is not left out: {why}", skip.what)),
            None => {}
        }
    }
    let mut seen = std::mem::take(&mut reading.seen);
    if seen.len() > MAX_SEEN {
        seen.truncate(MAX_SEEN);
    }
    areas.seen = seen;
    found.sort_by_key(|(_, _, extent)| *extent);
    let mut at = 0;
    for (what, found, extent) in found {
        let rest = Extent::between(extent.offset_bytes.max(at).min(extent.end()), extent.end());
        let Some(left_out) = rest.whole_chunks(ready.chunk_bytes, size_bytes) else {
            if extent.end() > at {
                let chunk = human_bytes(ready.chunk_bytes);
                areas.kept.push(format!("{what} ({found}) is not left out: no chunk of {chunk} lies wholly inside"));
            }
            continue;
        };
        if areas.areas.len() >= MAX_AREAS {
            areas.kept.push(format!("{what} ({found}) is not left out: there are more than {MAX_AREAS} areas"));
            continue;
        }
        at = left_out.end();
        ready.leave_out(left_out, &plan.known.left_out).await;
        areas.areas.push(Area { what: what.to_string(), found, extent, left_out });
    }
    areas.kept.truncate(MAX_AREAS);
    Ok(areas)
}

/// How long the guest takes the disk's sectors to be.
async fn sector_bytes(monitor: &Monitor, qom_path: &str) -> Result<u64, Failure> {
    let arguments = json!({"path": qom_path, "property": "logical_block_size"});
    match monitor.raw("qom-get", arguments).await {
        Ok(said) => Ok(said.as_u64().filter(|bytes| *bytes > 0).unwrap_or(SECTOR_BYTES)),
        // A device without such a choice.
        Err(error) if error.refusal().is_some() => Ok(SECTOR_BYTES),
        Err(error) => Err(qemu_failed(error)),
    }
}

/// What a partition is, for people.
fn words(partition: &Partition) -> String {
    let label = if partition.label.is_empty() { String::new() } else { format!(" {:?}", partition.label) };
    format!("partition {}{label}, PARTUUID {}", partition.number, partition.uuid)
}

fn named<'a>(partitions: &'a [Partition], what: &Wanted) -> Result<&'a Partition, String> {
    let is_it = |partition: &&Partition| match what {
        Wanted::Partition(number) => partition.number == *number,
        Wanted::Label(label) => partition.label == *label,
        Wanted::PartUuid(uuid) => partition.uuid == *uuid,
        Wanted::Swap | Wanted::Bytes(_) => false,
    };
    let mut found = partitions.iter().filter(is_it);
    match (found.next(), found.next()) {
        (Some(partition), None) => Ok(partition),
        (None, _) if partitions.is_empty() => Err("the disk has no partition table".into()),
        (None, _) => Err("the disk has no such partition".into()),
        (Some(_), Some(_)) => Err("several partitions are called so".into()),
    }
}

/// What was read of a disk.
struct Reading<'a> {
    ready: &'a ReadyDisk,
    /// What the fleece has; all when absent.
    readable: Option<Bitmap>,
    size_bytes: u64,
    pieces: BTreeMap<Extent, Vec<u8>>,
    /// Where was looked, or should have been.
    seen: Vec<Extent>,
}

type Found<'s> = Vec<(&'s Wanted, String, Extent)>;

impl Reading<'_> {
    /// All swap of the disk.
    async fn swaps<'s>(
        &mut self,
        partitions: &[Partition],
        skip: &'s Skip,
        found: &mut Found<'s>,
        kept: &mut Vec<String>,
    ) -> Result<(), Failure> {
        let whole = (Extent::new(0, self.size_bytes), "the whole disk".to_owned());
        let candidates: Vec<_> = match partitions.is_empty() {
            true => vec![whole],
            false => partitions.iter().filter(|p| p.for_swap).map(|p| (p.extent, words(p))).collect(),
        };
        if candidates.is_empty() && skip.disk.is_some() {
            kept.push("swap is not left out: the disk has no partition for it".into());
        }
        for (extent, words) in candidates {
            match self.ask(|look| partition::swap(extent, look)).await? {
                Ok(Some(header)) => {
                    let label =
                        if header.label.is_empty() { String::new() } else { format!(", label {:?}", header.label) };
                    let words = format!("{words}; UUID {}{label}", header.uuid);
                    let past_header = extent.offset_bytes + header.page_bytes;
                    found.push((
                        &skip.what,
                        words,
                        Extent::between(past_header, extent.offset_bytes + header.len_bytes),
                    ));
                }
                Ok(None) if partitions.is_empty() && skip.disk.is_none() => {}
                Ok(None) => {
                    kept.push(format!("{words} is not left out: it holds no swap area, or a hibernated system"))
                }
                Err(why) => kept.push(format!("{words} is not left out: {why}")),
            }
        }
        Ok(())
    }

    /// Asks a reader until it has what it needs. The inner error says why it cannot know.
    async fn ask<T>(
        &mut self,
        reader: impl Fn(&mut Look<'_>) -> Result<T, Stop>,
    ) -> Result<Result<T, String>, Failure> {
        for _ in 0..MAX_READS {
            let answer = {
                let mut look = |extent: Extent| self.pieces.get(&extent).cloned().ok_or(Stop::Wants(extent));
                reader(&mut look)
            };
            match answer {
                Ok(answer) => return Ok(Ok(answer)),
                Err(Stop::Doubt(why)) => return Ok(Err(why)),
                Err(Stop::Wants(extent)) => {
                    let Some(bytes) = self.fetch(extent).await? else {
                        let why = "where it would be found was not known before this incremental; the next backup looks there";
                        return Ok(Err(why.into()));
                    };
                    self.pieces.insert(extent, bytes);
                }
            }
        }
        Ok(Err("its partition table has no end".into()))
    }

    /// Reads some bytes; none where the fleece does not have them.
    async fn fetch(&mut self, extent: Extent) -> Result<Option<Vec<u8>>, Failure> {
        let start = extent.offset_bytes / SECTOR_BYTES * SECTOR_BYTES;
        let end = extent.end().next_multiple_of(SECTOR_BYTES).min(self.size_bytes);
        let sectors = Extent::between(start, end);
        self.seen.push(sectors);
        let mut granules = sectors.split_at_multiples(crate::units::GRANULE_BYTES);
        if let Some(readable) = &self.readable
            && !granules.all(|granule| readable.is_set(granule.offset_bytes))
        {
            return Ok(None);
        }
        let bytes = self.ready.bytes(sectors).await?;
        let from = (extent.offset_bytes - start) as usize;
        Ok(bytes.get(from..from + extent.len_bytes as usize).map(<[u8]>::to_vec))
    }
}
