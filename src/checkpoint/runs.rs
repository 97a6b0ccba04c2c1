//! Runs: a sparse bitmap as the distances between its runs of set granules. The payload of checkpoint files of version 2.
//!
//! ```text
//! payload = runs u32 ‖ gaps_len u32 ‖ gap × runs ‖ length × runs          little-endian
//! gap     = varint: clear granules before the run, from the end of the run before (from the disk's start for the first)
//! length  = varint: granules of the run, less one
//! varint  = 7 bits a byte, the lowest first; the high bit says that more follow; 1 to 9 bytes
//! ```
//!
//! `gaps_len` is the length of all gaps in bytes. Runs do not touch: every gap but the first is 1 at least. The last run
//! ends at the disk's last granule at most.
//!
//! Reasons. Scattered writes are what a bitmap of a large disk holds, and there the words are nearly all zero: 1 % of a
//! disk of 1 TiB at random is 2 MiB of words, which zstd makes 292 KiB of; as runs it is 368 KiB, which zstd makes 185 KiB of
//! (the least that such bits can be told in is 165), and they are joined with another bitmap without unpacking all the words.
//! Gaps and lengths lie apart because lengths are mostly 1, which then costs nothing.

use super::bitmap::Bitmap;

const HEAD_BYTES: usize = 8;
/// More would not fit into 63 bits, and no disk has so many granules.
const MAX_VARINT_BYTES: usize = 9;

/// The bitmap as runs, or `None` when that would be longer than `max_bytes`.
pub(super) fn encode(bitmap: &Bitmap, max_bytes: usize) -> Option<Vec<u8>> {
    let (mut gaps, mut lengths) = (vec![0; HEAD_BYTES], Vec::new());
    let (mut count, mut at) = (0u32, 0);
    for (first, past) in bitmap.runs() {
        put(&mut gaps, first - at);
        put(&mut lengths, past - first - 1);
        at = past;
        count = count.checked_add(1)?;
        if gaps.len() + lengths.len() > max_bytes {
            return None;
        }
    }
    let gaps_len = u32::try_from(gaps.len() - HEAD_BYTES).ok()?;
    gaps[..4].copy_from_slice(&count.to_le_bytes());
    gaps[4..HEAD_BYTES].copy_from_slice(&gaps_len.to_le_bytes());
    gaps.append(&mut lengths);
    (gaps.len() <= max_bytes).then_some(gaps)
}

/// Sets in `bitmap` what the payload says; `None` when it breaks a rule, and then some bits may be set.
pub(super) fn union(payload: &[u8], bitmap: &mut Bitmap) -> Option<()> {
    let (count, rest) = payload.split_first_chunk()?;
    let (gaps_len, rest) = rest.split_first_chunk()?;
    let (mut gaps, mut lengths) = rest.split_at_checked(u32::from_le_bytes(*gaps_len) as usize)?;
    let granules = bitmap.granules();
    let mut at = 0u64;
    for run in 0..u32::from_le_bytes(*count) {
        let (gap, length) = (take(&mut gaps)?, take(&mut lengths)?);
        if gap == 0 && run > 0 {
            return None;
        }
        // Both have 63 bits, and `at` is bounded by the disk.
        let first = at.checked_add(gap)?;
        at = first.checked_add(length)?.checked_add(1)?;
        if at > granules {
            return None;
        }
        bitmap.set_granules(first, at);
    }
    (gaps.is_empty() && lengths.is_empty()).then_some(())
}

fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

// Called for every run of every checkpoint: a call costs more than what it does.
#[inline(always)]
fn take(from: &mut &[u8]) -> Option<u64> {
    // Nearly all have one byte or two. Which of both is anybody's guess, and a processor's wrong guess costs more than the rest.
    if let [low, high, ..] = from[..]
        && low & high < 0x80
    {
        let more = low >> 7;
        *from = &from[1 + usize::from(more)..];
        return Some(u64::from(low & 0x7f) | ((u64::from(high) << 7) * u64::from(more)));
    }
    take_any(from)
}

/// A number of any length.
#[cold]
fn take_any(from: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for at in 0..MAX_VARINT_BYTES {
        let byte = *from.get(at)?;
        value |= u64::from(byte & 0x7f) << (7 * at);
        if byte < 0x80 {
            *from = &from[at + 1..];
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::GRANULE_BYTES;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_come_back(granules in 1u64..5000, set in prop::collection::vec((0u64..5000, 1u64..200), 0..60)) {
            let mut bitmap = Bitmap::new(granules * GRANULE_BYTES);
            for (first, len) in set.iter().filter(|(first, _)| *first < granules) {
                bitmap.set_granules(*first, (first + len).min(granules));
            }
            let payload = encode(&bitmap, usize::MAX).unwrap();
            let mut again = Bitmap::new(granules * GRANULE_BYTES);
            prop_assert!(union(&payload, &mut again).is_some());
            prop_assert_eq!(&again, &bitmap);
            prop_assert!(encode(&bitmap, payload.len() - 1).is_none());
            prop_assert!(encode(&bitmap, payload.len()).is_some());
            // One granule less: a run at the end does not fit any more.
            let mut smaller = Bitmap::new((granules - 1) * GRANULE_BYTES);
            let fits = !bitmap.is_set((granules - 1) * GRANULE_BYTES);
            prop_assert_eq!(union(&payload, &mut smaller).is_some(), fits);
        }

        #[test]
        fn numbers_come_back(values in prop::collection::vec((any::<u64>(), 1u32..64), 1..20)) {
            let values: Vec<_> = values.into_iter().map(|(value, bits)| value >> (64 - bits)).collect();
            let mut bytes = vec![];
            values.iter().for_each(|value| put(&mut bytes, *value));
            let mut rest = &bytes[..];
            prop_assert!(values.iter().all(|value| take(&mut rest) == Some(*value)));
            prop_assert!(rest.is_empty() && take(&mut rest).is_none());
        }

        #[test]
        fn noise_is_bounded(payload in prop::collection::vec(any::<u8>(), 0..64), cut in 0usize..64) {
            let mut bitmap = Bitmap::new(1000 * GRANULE_BYTES);
            let _ = union(&payload, &mut bitmap);
            let mut counted = payload;
            counted.splice(0..0, [3, 0, 0, 0, cut as u8 % 16, 0, 0, 0]);
            let _ = union(&counted, &mut bitmap);
            prop_assert!(bitmap.runs().all(|(_, past)| past <= 1000));
        }
    }

    #[test]
    fn what_breaks_a_rule_is_refused() {
        let union = |bytes: &[u8]| super::union(bytes, &mut Bitmap::new(100 * GRANULE_BYTES));
        let one = [1, 0, 0, 0, 1, 0, 0, 0, 7, 0];
        assert!(union(&one).is_some());
        assert!(union(&one[..9]).is_none(), "cut");
        assert!(union(&[&one[..], &[0]].concat()).is_none(), "longer");
        assert!(union(&[1, 0, 0, 0, 1, 0, 0, 0, 100, 0]).is_none(), "past the disk");
        assert!(union(&[1, 0, 0, 0, 1, 0, 0, 0, 99, 1]).is_none(), "past the disk by its length");
        assert!(union(&[2, 0, 0, 0, 2, 0, 0, 0, 7, 0, 0, 0]).is_none(), "two runs that touch");
        assert!(union(&[2, 0, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0]).is_some(), "the first may begin at once");
        let endless = [&[1, 0, 0, 0, 12, 0, 0, 0][..], &[0xff; 12], &[0]].concat();
        assert!(union(&endless).is_none(), "a number without an end");
    }
}
