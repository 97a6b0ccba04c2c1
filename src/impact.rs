//! Impact: what a backup cost the guest, from QEMU's latency histograms.
//!
//! A histogram counts since it was switched on, so figures are differences of two readings. Its bins are all that is known:
//! a percentile is the bin that it falls into, and there is no maximum but the highest bin that was hit. Carried over the
//! wire and kept in every manifest; a figure that was not measured is absent.
//!
//! ```text
//! boundaries      10 µs     14 µs     20 µs    …
//! bins        n₀   │   n₁   │   n₂    │    …    │ last: no upper bound
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::MIB;

/// Most boundaries of a histogram that is looked at. QEMU knows no limit; other programs use a few dozen.
const MAX_BOUNDARIES: usize = 4096;

/// How many requests took how long, since it was switched on or between two readings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// In nanoseconds, ascending.
    boundaries: Vec<u64>,
    /// One more than boundaries.
    bins: Vec<u64>,
}

impl Histogram {
    /// A histogram, if it is one: boundaries ascend from above zero, and there is one bin more.
    pub fn new(boundaries: Vec<u64>, bins: Vec<u64>) -> Option<Self> {
        let fits = boundaries.len() <= MAX_BOUNDARIES && bins.len() == boundaries.len() + 1;
        let ascends = boundaries.first().is_none_or(|first| *first > 0) && boundaries.is_sorted_by(|a, b| a < b);
        (fits && ascends).then_some(Self { boundaries, bins })
    }

    /// The same boundaries, and nothing counted.
    pub fn emptied(&self) -> Self {
        Self { boundaries: self.boundaries.clone(), bins: vec![0; self.bins.len()] }
    }

    /// What was counted between an earlier reading and this one. None if they are not of the same histogram: other
    /// boundaries, or counts that went back.
    pub fn since(&self, earlier: &Self) -> Option<Self> {
        if self.boundaries != earlier.boundaries || self.bins.len() != earlier.bins.len() {
            return None;
        }
        let bins = self.bins.iter().zip(&earlier.bins).map(|(now, then)| now.checked_sub(*then));
        Some(Self { boundaries: self.boundaries.clone(), bins: bins.collect::<Option<_>>()? })
    }

    /// Requests counted.
    pub fn count(&self) -> u64 {
        self.bins.iter().fold(0, |sum, bin| sum.saturating_add(*bin))
    }

    /// The bin that holds the percentile (nearest rank); none if nothing was counted.
    pub fn percentile(&self, percent: u8) -> Option<Bucket> {
        let all: u128 = self.bins.iter().map(|bin| u128::from(*bin)).sum();
        let rank = (all * u128::from(percent.min(100))).div_ceil(100).max(1);
        let mut seen = 0;
        let found = self.bins.iter().position(|bin| {
            seen += u128::from(*bin);
            seen >= rank
        });
        found.map(|bin| self.bucket(bin))
    }

    /// The highest bin that was hit.
    pub fn highest(&self) -> Option<Bucket> {
        self.bins.iter().rposition(|bin| *bin > 0).map(|bin| self.bucket(bin))
    }

    fn bucket(&self, bin: usize) -> Bucket {
        let from_ns = bin.checked_sub(1).and_then(|below| self.boundaries.get(below)).copied().unwrap_or(0);
        Bucket { from_ns, below_ns: self.boundaries.get(bin).copied() }
    }
}

/// A bin of a histogram: how long something took, as exactly as is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// At least so long.
    pub from_ns: u64,
    /// Less than so long; no bound for the last bin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub below_ns: Option<u64>,
}

impl Bucket {
    /// The middle of it, in nanoseconds; of one without a bound its start.
    pub fn middle_ns(&self) -> u64 {
        self.below_ns.map_or(self.from_ns, |below| self.from_ns + below.saturating_sub(self.from_ns) / 2)
    }
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.below_ns {
            Some(below) => write!(f, "< {}", Span(below)),
            None => write!(f, "> {}", Span(self.from_ns)),
        }
    }
}

/// Nanoseconds, for people.
struct Span(u64);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0 as f64 / 1e6;
        match ms {
            ms if ms < 10.0 => write!(f, "{ms:.2} ms"),
            ms if ms < 1000.0 => write!(f, "{ms:.0} ms"),
            ms => write!(f, "{:.1} s", ms / 1e3),
        }
    }
}

/// Guest writes of one disk over some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Writes {
    /// How many ended.
    pub count: u64,
    /// Half of them were no slower; none without writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p50: Option<Bucket>,
    /// 99 of 100 were no slower.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p99: Option<Bucket>,
    /// The slowest one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub highest: Option<Bucket>,
}

impl From<&Histogram> for Writes {
    fn from(of: &Histogram) -> Self {
        Self { count: of.count(), p50: of.percentile(50), p99: of.percentile(99), highest: of.highest() }
    }
}

impl fmt::Display for Writes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.p50, self.p99, self.highest) {
            (Some(p50), Some(p99), Some(highest)) => {
                let what = if self.count == 1 { "write" } else { "writes" };
                write!(f, "{} {what} (p50 {p50}, p99 {p99}, slowest {highest})", self.count)
            }
            _ => write!(f, "no writes"),
        }
    }
}

/// What a backup cost the guest on one disk. How long the guest was stopped or frozen is in the
/// [evidence](crate::grade::Evidence).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Impact {
    /// The guest's writes from the reading before (the end of the last backup, or switching on) to just before the
    /// instant; none if there was no reading before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Writes>,
    /// The guest's writes from just before the instant until the fleece was out again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub during: Option<Writes>,
    /// Most scratch that the disk had in use at once.
    #[serde(default)]
    pub scratch_peak_bytes: u64,
    /// Copied to scratch before a write: at least so much, since what was copied and given back between two looks
    /// is not seen.
    #[serde(default)]
    pub copied_bytes: u64,
}

impl fmt::Display for Impact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.before, &self.during) {
            (Some(before), Some(during)) => write!(f, "{during}; before: {before}")?,
            (None, Some(during)) => write!(f, "{during}; before: not measured")?,
            _ => write!(f, "writes not measured")?,
        }
        let human = crate::units::human_bytes;
        write!(f, "; {} copied, scratch at most {}", human(self.copied_bytes), human(self.scratch_peak_bytes))
    }
}

/// Most milliseconds that a [`Budget`] allows.
pub const MAX_BUDGET_MS: u32 = 60_000;

/// What a backup may cost the guest. A limit that is absent does not hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    /// By how many milliseconds the guest's writes may get slower (p99), on the disk that suffers most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_added_write_latency_ms: Option<u32>,
    /// Bytes that may be read in a second, of all disks together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_read_rate: Option<u64>,
}

impl Budget {
    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }

    /// The smaller of both, limit by limit, and never so small that nothing would move.
    pub fn stricter(self, other: Self) -> Self {
        fn least<T: Ord>(a: Option<T>, b: Option<T>) -> Option<T> {
            [a, b].into_iter().flatten().min()
        }
        Self {
            max_added_write_latency_ms: least(self.max_added_write_latency_ms, other.max_added_write_latency_ms)
                .map(|ms| ms.max(1)),
            max_read_rate: least(self.max_read_rate, other.max_read_rate).map(|rate| rate.max(MIB)),
        }
    }
}

/// The impact on a disk, with its name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskImpact {
    /// The disk.
    pub disk: String,
    /// What it cost.
    #[serde(flatten)]
    pub impact: Impact,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOUNDARIES: [u64; 5] = [10, 14, 20, 28, 40];

    fn counted(latencies: &[u64]) -> Histogram {
        let mut bins = vec![0; BOUNDARIES.len() + 1];
        for latency in latencies {
            bins[BOUNDARIES.iter().filter(|b| **b <= *latency).count()] += 1;
        }
        Histogram::new(BOUNDARIES.to_vec(), bins).unwrap()
    }

    fn holds(bucket: Bucket, latency: u64) -> bool {
        bucket.from_ns <= latency && bucket.below_ns.is_none_or(|below| latency < below)
    }

    proptest! {
        #[test]
        fn percentiles_of_a_difference_are_those_of_what_came_between(
            first in prop::collection::vec(0u64..60, 0..300), mut then in prop::collection::vec(0u64..60, 1..300),
        ) {
            let earlier = counted(&first);
            let all: Vec<_> = first.iter().chain(&then).copied().collect();
            let between = counted(&all).since(&earlier).unwrap();
            prop_assert_eq!(&between, &counted(&then));
            prop_assert_eq!(between.count(), then.len() as u64);
            prop_assert_eq!(earlier.since(&counted(&all)), None);
            then.sort_unstable();
            for percent in [1, 50, 99, 100] {
                let nearest = then[(then.len() * percent).div_ceil(100) - 1];
                prop_assert!(holds(between.percentile(percent as u8).unwrap(), nearest), "{percent}: {between:?}");
            }
            prop_assert!(holds(between.highest().unwrap(), *then.last().unwrap()));
        }

        #[test]
        fn nothing_that_a_peer_says_is_too_much(bins in prop::collection::vec(any::<u64>(), 6)) {
            let histogram = Histogram::new(BOUNDARIES.to_vec(), bins).unwrap();
            prop_assert_eq!(histogram.percentile(100), histogram.highest());
            let _ = (histogram.count(), histogram.percentile(255));
        }
    }

    #[test]
    fn what_is_no_histogram_is_refused_and_an_empty_one_says_nothing() {
        for (boundaries, bins) in [
            (vec![], vec![]),
            (vec![1], vec![0]),
            (vec![0], vec![0; 2]),
            (vec![2, 2], vec![0; 3]),
            (vec![3, 2], vec![0; 3]),
            ((1..=MAX_BOUNDARIES as u64 + 1).collect(), vec![0; MAX_BOUNDARIES + 2]),
        ] {
            assert_eq!(Histogram::new(boundaries, bins), None);
        }
        let one = counted(&[12]);
        assert_eq!(one.since(&Histogram::new(vec![10], vec![0; 2]).unwrap()), None);
        let none = Writes::from(&one.emptied());
        assert_eq!((none, none.to_string()), (Writes::default(), "no writes".to_owned()));
        assert_eq!(Writes::from(&one).to_string(), "1 write (p50 < 0.00 ms, p99 < 0.00 ms, slowest < 0.00 ms)");
    }

    #[test]
    fn an_impact_of_an_older_version_is_read() {
        let old: Impact = serde_json::from_str("{}").unwrap();
        assert_eq!(old, Impact::default());
        let disk = DiskImpact { disk: "vd0".into(), impact: Impact { during: Some((&counted(&[50])).into()), ..old } };
        let text = serde_json::to_string(&disk).unwrap();
        assert_eq!(serde_json::from_str::<DiskImpact>(&text).unwrap(), disk);
    }
}
