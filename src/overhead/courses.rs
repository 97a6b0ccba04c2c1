//! Courses as text: how a backup went over time, a row of bars for each figure.
//!
//! ```text
//! fleece  operations/s  ▇▇▇▇▇▇▇▇│▂▁▂▃▄▅▆▆▇▇│▇▇▇▇
//!         p99           ▂▂▂▂▂▂▂▂│▆▇▆▅▄▃▃▂▂▂│▂▂▂▂
//! ```
//!
//! Of the rounds of a case it is the middle one, by how long its backup took; each has pictures on the page ([`super::html`]).
//! All rows of a workload have the same scales: the rate from none, latencies from one power of ten to another.

use std::fmt;

use super::figures::Point;
use super::report::{Run, Summary};
use super::text::micros;

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Points that share a bar: a row stays within a line of a terminal.
const POINTS: usize = 2;

/// The scales of all courses of a workload.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scales {
    /// The highest rate, in operations a second.
    pub most_per_second: f64,
    /// Latencies, in microseconds: a power of ten that none is below.
    pub least_us: f64,
    /// One that none is above.
    pub most_us: f64,
}

impl Scales {
    /// What all these runs have room in.
    pub fn of<'a>(runs: impl Iterator<Item = &'a Run> + Clone) -> Self {
        let points = runs.flat_map(|run| &run.course);
        let took = points.clone().flat_map(|p| [p.write.p50_us, p.write.max_us]).filter(|us| *us > 0.0);
        Self {
            most_per_second: points.map(|p| p.per_second).fold(1.0, f64::max),
            least_us: 10f64.powf(took.clone().fold(f64::MAX, f64::min).clamp(1.0, 1e6).log10().floor()),
            most_us: 10f64.powf(took.fold(10.0, f64::max).log10().ceil()),
        }
    }

    /// A rate's share of the scale.
    pub fn rate(&self, per_second: f64) -> f64 {
        per_second / self.most_per_second
    }

    /// How many powers of ten the latencies have.
    pub fn decades(&self) -> f64 {
        (self.most_us / self.least_us).log10().max(1.0)
    }

    /// A latency's share of the scale.
    pub fn latency(&self, us: f64) -> f64 {
        (us / self.least_us).log10() / self.decades()
    }
}

/// The rows of a workload.
pub struct Courses<'a> {
    scales: Scales,
    /// Name and run.
    cases: Vec<(&'a str, &'a Run)>,
}

impl<'a> Courses<'a> {
    /// Of what was measured of these summaries.
    pub fn of(runs: &'a [Run], summaries: &[&'a Summary]) -> Self {
        let all: Vec<_> = summaries.iter().map(|summary| (*summary, summary.of(runs))).collect();
        let scales = Scales::of(all.iter().flat_map(|(_, own)| own.iter().copied()));
        let cases = all.into_iter().filter_map(|(summary, own)| Some((summary.case.as_str(), middle(own)?)));
        Self { scales, cases: cases.collect() }
    }
}

/// The run whose backup took neither longest nor shortest.
fn middle(mut runs: Vec<&Run>) -> Option<&Run> {
    runs.sort_by(|a, b| a.backup.took_s.total_cmp(&b.backup.took_s));
    runs.get(runs.len() / 2).copied()
}

/// Bars of a course, with the backup between two lines. `share` gives a point's share of its scale; nothing is drawn where
/// nothing is known.
fn row(run: &Run, share: impl Fn(&Point) -> Option<f64>) -> String {
    let took_s = run.backup.took_s;
    let phase = |point: &&Point| (point.at_s >= 0.0, point.at_s > took_s);
    let course: Vec<_> = run.course.iter().collect();
    let phases = course.chunk_by(|a, b| phase(a) == phase(b)).map(|stretch| {
        let bar = |points: &[&Point]| {
            let most = points.iter().filter_map(|point| share(point)).max_by(f64::total_cmp);
            let step = |share: f64| ((share.clamp(0.0, 1.0) * BARS.len() as f64) as usize).min(BARS.len() - 1);
            most.map_or(' ', |share| BARS[step(share)])
        };
        stretch.chunks(POINTS).map(bar).collect::<String>()
    });
    phases.collect::<Vec<_>>().join("│")
}

impl fmt::Display for Courses<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.cases.is_empty() {
            return Ok(());
        }
        let (scales, from, to) = (self.scales, micros(self.scales.least_us), micros(self.scales.most_us));
        let rate = scales.most_per_second;
        writeln!(
            f,
            "\nOver time, of the round in the middle: before │ during │ after. Up to {rate:.0} operations/s; writes from {from} to \
             {to}, each bar {:.1} times the one below",
            10f64.powf(scales.decades() / BARS.len() as f64)
        )?;
        let width = self.cases.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        for (name, run) in &self.cases {
            writeln!(f, "{name:<width$}  operations/s  {}", row(run, |p| Some(scales.rate(p.per_second))))?;
            let mut write = |figure: &str, of: fn(&Point) -> f64| {
                let bars = row(run, |p| Some(of(p)).filter(|us| *us > 0.0).map(|us| scales.latency(us)));
                writeln!(f, "{:width$}  {figure:<12}  {}", "", bars.trim_end())
            };
            write("p50", |p| p.write.p50_us)?;
            write("p99", |p| p.write.p99_us)?;
            write("p99.9", |p| p.write.p999_us)?;
            write("slowest", |p| p.write.max_us)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::figures::Latency;
    use super::super::report::tests::run;
    use super::*;

    #[test]
    fn a_course_has_its_phases_and_its_scale() {
        let write = |us: f64| Latency { p50_us: us, p99_us: us, p999_us: us, max_us: us };
        let point = |at_s: f64, per_second: f64, us: f64| Point { at_s, per_second, write: write(us) };
        let mut run = run("fleece", 1, 50.0);
        run.backup.took_s = 1.0;
        run.course = vec![
            point(-0.4, 800.0, 10.0),
            point(-0.3, 100.0, 10.0),
            point(-0.2, 1.0, 0.0),
            point(0.1, 99.0, 1000.0),
            point(1.1, 400.0, 99.0),
        ];
        let scales = Scales::of([&run].into_iter());
        assert_eq!((scales.most_per_second, scales.least_us, scales.most_us), (800.0, 10.0, 1000.0));
        assert_eq!(row(&run, |p| Some(scales.rate(p.per_second))), "█▁│▁│▅");
        // Two points share a bar, and the higher one is drawn; nothing began in the third.
        assert_eq!(row(&run, |p| Some(p.write.max_us).filter(|us| *us > 0.0).map(|us| scales.latency(us))), "▁ │█│▄");
    }

    #[test]
    fn the_middle_round_is_shown() {
        let took = |round, took_s| {
            let mut run = run("fleece", round, 50.0);
            run.backup.took_s = took_s;
            run
        };
        let runs = [took(1, 3.0), took(2, 1.0), took(3, 2.0)];
        assert_eq!(middle(runs.iter().collect()).map(|run| run.round), Some(3));
        assert!(middle(vec![]).is_none());
    }
}
