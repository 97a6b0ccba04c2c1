//! Audit: which chunks a backup has confirmed by the way, and what that says of the points before.
//!
//! An incremental rests on tracking: a chunk that no bitmap has is taken to be what it was. The audit looks. In each
//! incremental some chunks that nobody is said to have written are read beside the needed ones, and must be what the
//! repository has. Chunks are taken in the order of a random permutation that goes on from point to point, so that none comes
//! twice before all have come: after k runs of n chunks, k × n of the disk are confirmed, and a round ends with all of it.
//! Chunks that were written meanwhile are sent anyway, and count as confirmed by that.
//!
//! ```text
//! point      1 full    2     3     4     5 …                 where the round is, is in the manifest of each point
//! round      0 % ───── 8 ─── 15 ── 23 ── 31 %
//! ```
//!
//! A mismatch says that some write was missed since the chunk was last looked at. What else was missed nobody knows: the
//! points of the epoch since all of the disk was last known to be right (read whole, or at the start of the last round that
//! ended well) are marked as suspect.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::backup::plan::{Base, Plan};
use crate::extent::Extent;
use crate::machine::Taken;
use crate::repo::point::{AuditRecord, Manifest};
use crate::repo::suspect::SuspectDisk;
use crate::repo::{Image, Reader, RepoError, Repository};
use crate::units::PointId;
use crate::wire::contract::{AUDIT_FLOOR_CHUNKS, MAX_AUDIT_CHUNKS};
use crate::wire::digests::ChunkDigest;
use crate::wire::message::{Audit, AuditChunk};

/// Share of the needed chunks that an audit has by default, in thousandths: with it, of the time.
pub const DEFAULT_PERMILLE: u32 = 10;
/// What an incremental is guessed to need, in chunks, where the one before does not tell. To offer a chunk costs a few reads
/// of tree nodes before the backup begins, so only as many are offered as the sidecar may take up.
const GUESSED_CHUNKS: u64 = 6400;

/// What was picked of one disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Picked {
    /// For each chunk the position in the permutation that comes after it and after those that are passed over.
    next: Vec<u64>,
    chunks: BTreeSet<u64>,
    /// Nothing of the round is left but what is passed over.
    is_over: bool,
}

impl Picked {
    /// Whether all of these bytes are chunks that were picked.
    pub fn covers(&self, extent: Extent, chunk_bytes: u64) -> bool {
        let mut chunks = extent.offset_bytes / chunk_bytes..extent.end().div_ceil(chunk_bytes);
        // Not more than were picked are ever looked at: the first that was not ends it.
        chunks.all(|chunk| self.chunks.contains(&chunk))
    }
}

/// Picks chunks of all disks that go on from a point. Reads tree nodes. What cannot be read is passed over.
pub fn pick(reader: &Reader, plan: &Plan, permille: u32) -> (Option<Audit>, BTreeMap<String, Picked>) {
    let mut audit = Audit { permille, disks: BTreeMap::new() };
    let mut picked = BTreeMap::new();
    if permille == 0 || plan.bases.is_empty() {
        return (None, picked);
    }
    let most = (MAX_AUDIT_CHUNKS / plan.bases.len()) as u64;
    for (name, base) in &plan.bases {
        // Twice what the last one had: this one may be larger.
        let guess = base.changed_chunks.unwrap_or(GUESSED_CHUNKS).saturating_mul(2);
        let count = (guess.saturating_mul(permille.into()) / 1000).max(AUDIT_FLOOR_CHUNKS).min(most);
        let (chunks, mine) = pick_of(reader, base, count);
        if !chunks.is_empty() {
            audit.disks.insert(name.clone(), chunks);
        }
        picked.insert(name.clone(), mine);
    }
    (Some(audit), picked)
}

fn pick_of(reader: &Reader, base: &Base, count: u64) -> (Vec<AuditChunk>, Picked) {
    let (mut chunks, mut mine) = (Vec::new(), Picked::default());
    let Some(record) = base.audit else { return (chunks, mine) };
    let all = base.image.chunks();
    let mut looked = 0;
    mine.is_over = true;
    for position in record.position..all {
        let chunk = permuted(record.seed, all, position);
        // What was left out is not what the disk has.
        if base.areas.share_bytes(base.image.chunk_extent(chunk)) > 0 {
            if let Some(next) = mine.next.last_mut().filter(|next| **next == position) {
                *next = position + 1;
            }
            continue;
        }
        mine.is_over = false;
        if looked >= count {
            break;
        }
        looked += 1;
        let Some(digest) = digest(reader, base.image, chunk) else { continue };
        chunks.push(AuditChunk { chunk, digest });
        mine.next.push(position + 1);
        mine.chunks.insert(chunk);
    }
    (chunks, mine)
}

fn digest(reader: &Reader, image: Image, chunk: u64) -> Option<ChunkDigest> {
    match reader.walk(image, image.chunk_extent(chunk)).next() {
        None => Some(ChunkDigest::ZERO),
        Some(Ok(found)) => Some(ChunkDigest::from_bytes(*found.digest.as_bytes())),
        Some(Err(_)) => None,
    }
}

/// The record of a disk that was read whole at `instant`.
pub fn begin(instant: Timestamp) -> AuditRecord {
    let seed = u64::from_le_bytes(*PointId::random().as_bytes().first_chunk().unwrap_or(&[0; 8]));
    let (position, runs, confirmed_chunks) = (0, 0, 0);
    AuditRecord { seed, position, runs, confirmed_chunks, trusted: Some(instant), round_started: instant }
}

/// The record after a run that took up the first `audited` of what was picked and confirmed so many chunks by comparing.
pub fn go_on(base: &Base, picked: &Picked, audited: u64, confirmed_chunks: u64, instant: Timestamp) -> AuditRecord {
    let before = base.audit.unwrap_or(AuditRecord { trusted: None, ..begin(instant) });
    let position = match audited.checked_sub(1).and_then(|last| picked.next.get(last as usize)) {
        Some(next) => *next,
        None if picked.is_over => base.image.chunks(),
        None => return before,
    };
    let after = AuditRecord {
        position,
        runs: before.runs + 1,
        confirmed_chunks: before.confirmed_chunks.saturating_add(confirmed_chunks),
        ..before
    };
    match after.position < base.image.chunks() {
        true => after,
        false => AuditRecord { trusted: Some(before.round_started), ..begin(instant) },
    }
}

/// Marks the points that rest on what an audit found wrong. Gives their number.
pub fn distrust(repo: &Repository, vm: &str, disk: &str, base: &Base, reason: &str) -> Result<usize, RepoError> {
    let trusted = base.audit.and_then(|record| record.trusted);
    let mut marked = 0;
    for point in repo.points(vm)?.points {
        if is_suspect(&point, disk, base, trusted) {
            let suspect = SuspectDisk { disk: disk.to_owned(), found: Timestamp::now(), reason: reason.to_owned() };
            repo.mark_suspect(vm, point.id, suspect)?;
            marked += 1;
        }
    }
    Ok(marked)
}

fn is_suspect(point: &Manifest, disk: &str, base: &Base, trusted: Option<Timestamp>) -> bool {
    point.disks.iter().any(|kept| {
        kept.disk.name == disk
            && kept.epoch == base.epoch
            && matches!(kept.taken, Taken::Incremental { .. })
            && trusted.is_none_or(|trusted| point.instant > trusted)
    })
}

/// The number at a position of a permutation of `0..count` (`count` > 0, `position` < `count`): four rounds of a Feistel
/// network on the next even number of bits, walked until it is in range.
fn permuted(seed: u64, count: u64, position: u64) -> u64 {
    let half_bits = (64 - (count - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1u64 << half_bits) - 1;
    let mut number = position;
    loop {
        let (mut left, mut right) = (number >> half_bits, number & mask);
        for round in 0..4 {
            (left, right) = (right, left ^ (mix(seed ^ mix(right << 2 | round)) & mask));
        }
        number = left << half_bits | right;
        if number < count {
            return number;
        }
    }
}

/// The finaliser of splitmix64.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::area::Areas;
    use crate::units::CheckpointId;
    use proptest::prelude::*;

    fn base(chunks: u64, audit: Option<AuditRecord>) -> Base {
        let image = Image::zero(chunks * 65536, 65536).unwrap();
        let (point, checkpoint) = (PointId::random(), CheckpointId::random());
        Base { point, checkpoint, epoch: None, image, audit, areas: Areas::default(), changed_chunks: None }
    }

    proptest! {
        #[test]
        fn every_chunk_comes_once(seed in any::<u64>(), count in 1u64..3000) {
            let all: BTreeSet<_> = (0..count).map(|position| permuted(seed, count, position)).collect();
            prop_assert_eq!(all.len() as u64, count);
            prop_assert!(all.last().is_some_and(|last| *last < count));
        }
    }

    #[test]
    fn the_order_looks_random() {
        let first: Vec<_> = (0..64).map(|position| permuted(7, 1 << 20, position)).collect();
        let upper = first.iter().filter(|chunk| **chunk >= 1 << 19).count();
        assert!((16..48).contains(&upper), "{first:?}");
        assert_ne!(first, (0..64).map(|position| permuted(8, 1 << 20, position)).collect::<Vec<_>>());
    }

    #[test]
    fn a_round_goes_on_and_ends() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let first = begin(at(1));
        assert_eq!((first.position, first.runs, first.trusted), (0, 0, Some(at(1))));
        let picked = Picked { next: vec![1, 2, 4, 5], ..Picked::default() };
        let base = |audit| base(10, Some(audit));
        let second = go_on(&base(first), &picked, 3, 2, at(2));
        assert_eq!((second.position, second.runs, second.confirmed_chunks), (4, 1, 2));
        assert_eq!(go_on(&base(second), &Picked::default(), 0, 0, at(3)), second, "nothing was looked at");
        let picked = Picked { next: (5..11).collect(), ..Picked::default() };
        let third = go_on(&base(second), &picked, 6, 6, at(4));
        assert_eq!((third.position, third.trusted, third.round_started), (0, Some(at(1)), at(4)), "a round has ended");
        assert_eq!(go_on(&base(third), &picked, 6, 6, at(5)).trusted, Some(at(4)));
        let over = Picked { is_over: true, ..Picked::default() };
        let fourth = go_on(&base(second), &over, 0, 0, at(6));
        assert_eq!((fourth.position, fourth.trusted), (0, Some(at(1))), "all that was left was left out of the point");
    }
}
