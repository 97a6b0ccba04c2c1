//! Figures: what many operations come to.
//!
//! An operation belongs to the time in which it began: who waits for a backup's instant began to wait before it, or at it,
//! never after. Percentiles are exact (nearest rank), not of a histogram.

use serde::Serialize;

use super::load::Sample;
use crate::units::MIB;

/// Points of a run's course.
const POINTS: u64 = 120;
/// The finest course.
const LEAST_BIN_NS: u64 = 50_000_000;

/// How long writes took, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Half of them took no longer.
    pub p50_us: f64,
    /// 99 of 100.
    pub p99_us: f64,
    /// 999 of 1000.
    pub p999_us: f64,
    /// All.
    pub max_us: f64,
}

/// What a guest got done in some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// The time.
    pub seconds: f64,
    /// Operations that began in it; reads too.
    pub operations: u64,
    /// Of them in a second.
    pub per_second: f64,
    /// Their bytes in a second.
    pub mib_per_second: f64,
    /// Of writes only; absent without any.
    pub write: Option<Latency>,
    /// Of reads only; absent without any.
    pub read: Option<Latency>,
}

/// A stretch of time, in nanoseconds since the load began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stretch {
    /// From here.
    pub from_ns: u64,
    /// To here, without it.
    pub to_ns: u64,
}

impl Stretch {
    fn has(self, sample: &Sample) -> bool {
        (self.from_ns..self.to_ns).contains(&sample.began_ns)
    }

    fn seconds(self) -> f64 {
        self.to_ns.saturating_sub(self.from_ns) as f64 / 1e9
    }
}

/// The value that so many of a thousand do not exceed; of ascending values, in nanoseconds. In microseconds.
fn permille_us(ascending_ns: &[u64], permille: usize) -> f64 {
    let rank = (ascending_ns.len() * permille).div_ceil(1000).max(1);
    ascending_ns.get(rank - 1).map_or(0.0, |ns| *ns as f64 / 1e3)
}

fn latency(mut took_ns: Vec<u64>) -> Option<Latency> {
    if took_ns.is_empty() {
        return None;
    }
    took_ns.sort_unstable();
    let at = |permille| permille_us(&took_ns, permille);
    Some(Latency { p50_us: at(500), p99_us: at(990), p999_us: at(999), max_us: at(1000) })
}

/// What began in a stretch of time.
pub fn figures(samples: &[Sample], stretch: Stretch) -> Figures {
    let within: Vec<_> = samples.iter().filter(|s| stretch.has(s)).collect();
    let took = |read: bool| within.iter().filter(|s| s.read == read).map(|s| s.took_ns).collect();
    let seconds = stretch.seconds();
    let bytes: u64 = within.iter().map(|s| u64::from(s.bytes)).sum();
    let rate = |number: f64| if seconds > 0.0 { number / seconds } else { 0.0 };
    Figures {
        seconds,
        operations: within.len() as u64,
        per_second: rate(within.len() as f64),
        mib_per_second: rate(bytes as f64 / MIB as f64),
        write: latency(took(false)),
        read: latency(took(true)),
    }
}

/// A moment of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    /// Seconds since the backup began; negative before.
    pub at_s: f64,
    /// Operations in a second.
    pub per_second: f64,
    /// Of writes; zeroes where none began.
    #[serde(flatten)]
    pub write: Latency,
}

/// The course of a run over some stretches (ascending), seen from the start of the backup.
pub fn course(samples: &[Sample], stretches: &[Stretch], zero_ns: u64) -> Vec<Point> {
    let all_ns: u64 = stretches.iter().map(|s| s.to_ns.saturating_sub(s.from_ns)).sum();
    let bin_ns = (all_ns / POINTS).max(LEAST_BIN_NS);
    let mut points = vec![];
    for stretch in stretches {
        let bins = stretch.to_ns.saturating_sub(stretch.from_ns).div_ceil(bin_ns);
        let mut counts = vec![0u64; bins as usize];
        let mut writes = vec![vec![]; bins as usize];
        for sample in samples.iter().filter(|s| stretch.has(s)) {
            let bin = ((sample.began_ns - stretch.from_ns) / bin_ns) as usize;
            counts[bin] += 1;
            if !sample.read {
                writes[bin].push(sample.took_ns);
            }
        }
        for (bin, (count, writes)) in (0..).zip(counts.into_iter().zip(writes)) {
            let from_ns = stretch.from_ns + bin * bin_ns;
            let wide_ns = bin_ns.min(stretch.to_ns - from_ns);
            // A last bin that is hardly one would be noise.
            if wide_ns * 4 < bin_ns {
                continue;
            }
            points.push(Point {
                at_s: (from_ns + wide_ns / 2) as f64 / 1e9 - zero_ns as f64 / 1e9,
                per_second: count as f64 / (wide_ns as f64 / 1e9),
                write: latency(writes).unwrap_or_default(),
            });
        }
    }
    points
}

/// A figure over all rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one, or the mean of the two.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
}

impl Spread {
    /// Of at least one figure.
    pub fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut all: Vec<f64> = figures.into_iter().collect();
        all.sort_by(f64::total_cmp);
        let (least, most) = (*all.first()?, *all.last()?);
        let median = (all[(all.len() - 1) / 2] + all[all.len() / 2]) / 2.0;
        Some(Self { median, least, most })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(began_ns: u64, took_ns: u64, read: bool) -> Sample {
        Sample { began_ns, took_ns, bytes: 4096, read }
    }

    #[test]
    fn percentiles_are_the_nearest_ranks() {
        let took: Vec<u64> = (1..=1000).map(|us| us * 1000).collect();
        let found = latency(took.iter().rev().copied().collect()).unwrap();
        assert_eq!(found, Latency { p50_us: 500.0, p99_us: 990.0, p999_us: 999.0, max_us: 1000.0 });
        let one = latency(vec![7000]).unwrap();
        assert_eq!(one, Latency { p50_us: 7.0, p99_us: 7.0, p999_us: 7.0, max_us: 7.0 });
        assert_eq!(latency(vec![]), None);
    }

    #[test]
    fn an_operation_counts_where_it_began() {
        let samples = [sample(5, 1000, false), sample(10, 2000, false), sample(15, 9, true), sample(20, 1, false)];
        let found = figures(&samples, Stretch { from_ns: 10, to_ns: 20 });
        assert_eq!((found.operations, found.write.unwrap().max_us, found.read.unwrap().max_us), (2, 2.0, 0.009));
        assert!((found.per_second - 2e8).abs() < 1.0);
        assert_eq!(figures(&samples, Stretch::default()), Figures::default());
    }

    #[test]
    fn a_course_has_the_stretches_and_not_what_is_between() {
        let second = 1_000_000_000;
        let samples: Vec<_> = (0..3000).map(|i| sample(i * second / 1000, 1000, false)).collect();
        let stretches = [Stretch { from_ns: 0, to_ns: second }, Stretch { from_ns: 2 * second, to_ns: 3 * second }];
        let points = course(&samples, &stretches, 2 * second);
        assert_eq!(points.len(), 40);
        assert!(points.iter().all(|p| (p.per_second - 1000.0).abs() < 1.0 && p.write.p99_us == 1.0));
        assert!(points.is_sorted_by(|a, b| a.at_s < b.at_s));
        assert!(!points.iter().any(|p| (-1.0..0.0).contains(&p.at_s)));
    }

    #[test]
    fn spreads() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Some(Spread { median: 2.0, least: 1.0, most: 3.0 }));
        assert_eq!(Spread::of([4.0, 1.0]), Some(Spread { median: 2.5, least: 1.0, most: 4.0 }));
    }
}
