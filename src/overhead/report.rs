//! The report: every run, their medians and spreads, and what was hoped for.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;

use super::about::About;
use super::figures::{Figures, Latency, Point, Spread};
use super::load::Workload;
use super::method::{Case, Method};

/// How it was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Settings {
    /// Size of the disk.
    pub size_bytes: u64,
    /// Longest time of a backup.
    pub seconds: u32,
    /// How often each was measured.
    pub rounds: u32,
    /// Requests under way.
    pub depth: u16,
    /// QEMU's cache mode of the disk.
    pub cache: &'static str,
    /// Rates of the reader; as fast as it can where it is null.
    pub readers_bytes_per_second: Vec<Option<u64>>,
}

/// What a backup was like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Backup {
    /// From its begin until all was out of QEMU.
    pub took_s: f64,
    /// Whether it was not broken off.
    pub finished: bool,
    /// Read or copied of the disk.
    pub read_bytes: u64,
    /// What livebackup copied to scratch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copied_bytes: Option<u64>,
}

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Run {
    /// What the guest did.
    pub workload: &'static str,
    /// What was done to it.
    pub method: &'static str,
    /// How fast its reader was allowed to be; as fast as it can, or none, when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reader_bytes_per_second: Option<u64>,
    /// Counts from 1.
    pub round: u32,
    /// Before the backup.
    pub before: Figures,
    /// While it was there.
    pub during: Figures,
    /// After it.
    pub after: Figures,
    /// The backup.
    pub backup: Backup,
    /// Requests of the guest that failed.
    pub failed_requests: u64,
    /// How many processors others kept busy meanwhile.
    pub others_cores: f64,
    /// Its course, where it is known.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub course: Vec<Point>,
}

/// What is measured: workload, method, reader.
type Key = (&'static str, &'static str, Option<u64>);

fn key(workload: Workload, case: &Case) -> Key {
    (workload.name(), case.method.name(), case.reader)
}

impl Run {
    fn key(&self) -> Key {
        (self.workload, self.method, self.reader_bytes_per_second)
    }
}

/// One phase of a method over all rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Phase {
    /// Operations in a second.
    pub per_second: Spread,
    /// MiB in a second.
    pub mib_per_second: Spread,
    /// Latencies of writes.
    pub p50_us: Spread,
    /// 99 of 100.
    pub p99_us: Spread,
    /// 999 of 1000.
    pub p999_us: Spread,
    /// The slowest.
    pub max_us: Spread,
}

impl Phase {
    fn of(runs: &[&Run], of_run: impl Fn(&Run) -> &Figures) -> Option<Self> {
        let spread = |figure: &dyn Fn(&Figures) -> f64| Spread::of(runs.iter().map(|run| figure(of_run(run))));
        let took = |figure: fn(Latency) -> f64| {
            Spread::of(runs.iter().filter_map(|run| of_run(run).write).map(figure)).unwrap_or_default()
        };
        Some(Self {
            per_second: spread(&|f| f.per_second)?,
            mib_per_second: spread(&|f| f.mib_per_second)?,
            p50_us: took(|l| l.p50_us),
            p99_us: took(|l| l.p99_us),
            p999_us: took(|l| l.p999_us),
            max_us: took(|l| l.max_us),
        })
    }
}

/// All rounds of a method under a workload.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// What the guest did.
    pub workload: &'static str,
    /// What was done to it.
    pub method: &'static str,
    /// How fast its reader was allowed to be; as fast as it can, or none, when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reader_bytes_per_second: Option<u64>,
    /// Method and reader, as tables name them.
    pub case: String,
    /// The same, for people.
    pub words: &'static str,
    /// Runs that were measured.
    pub rounds: usize,
    /// Why there are fewer than there should be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_measured: Option<String>,
    /// The figures; absent without a run.
    #[serde(flatten)]
    pub measured: Option<Measured>,
}

impl Summary {
    fn key(&self) -> Key {
        (self.workload, self.method, self.reader_bytes_per_second)
    }

    /// Its runs, of all.
    pub(super) fn of<'a>(&self, runs: &'a [Run]) -> Vec<&'a Run> {
        runs.iter().filter(|run| run.key() == self.key()).collect()
    }
}

/// The figures of a summary.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// Before the backup.
    pub before: Phase,
    /// While it was there.
    pub during: Phase,
    /// After it.
    pub after: Phase,
    /// Rate during, as a share of the idle one of its round.
    pub rate_share: Spread,
    /// p99 of writes during, in multiples of the idle one of its round.
    pub p99_times: Spread,
    /// How long the backup took.
    pub took_s: Spread,
    /// For how long the guest could have worked as when idle, with what it did not get done meanwhile. Of a backup that was
    /// broken off, only up to there.
    pub lost_s: Spread,
    /// How many came to their end.
    pub finished: usize,
    /// Requests of the guest that failed, in all.
    pub failed_requests: u64,
    /// How many processors others kept busy meanwhile.
    pub others_cores: Spread,
}

/// What the guest gets done while there is no backup: the middle of what was measured before all backups of a round on the same
/// disk (a logical volume is another one). What
/// else a machine does meets one short measurement more than another, and hardly all of them.
#[derive(Clone, Copy, Debug)]
struct Idle {
    per_second: f64,
    p99_us: f64,
}

impl Idle {
    fn of<'a>(runs: impl Iterator<Item = &'a Run> + Clone) -> Self {
        let median = |spread: Option<Spread>| spread.unwrap_or_default().median;
        Self {
            per_second: median(Spread::of(runs.clone().map(|run| run.before.per_second))),
            p99_us: median(Spread::of(runs.filter_map(|run| run.before.write).map(|latency| latency.p99_us))),
        }
    }
}

impl Measured {
    fn of(runs: &[&Run], idle: impl Fn(&Run) -> Idle) -> Option<Self> {
        let share = |run: &&Run| match idle(run).per_second {
            0.0 => 0.0,
            per_second => run.during.per_second / per_second,
        };
        let times = |run: &&Run| {
            let p99_us = idle(run).p99_us;
            run.during.write.filter(|_| p99_us > 0.0).map(|during| during.p99_us / p99_us)
        };
        Some(Self {
            before: Phase::of(runs, |run| &run.before)?,
            during: Phase::of(runs, |run| &run.during)?,
            after: Phase::of(runs, |run| &run.after)?,
            rate_share: Spread::of(runs.iter().map(share))?,
            p99_times: Spread::of(runs.iter().filter_map(times)).unwrap_or_default(),
            took_s: Spread::of(runs.iter().map(|run| run.backup.took_s))?,
            lost_s: Spread::of(runs.iter().map(|run| run.backup.took_s * (1.0 - share(run)).max(0.0)))?,
            finished: runs.iter().filter(|run| run.backup.finished).count(),
            failed_requests: runs.iter().map(|run| run.failed_requests).sum(),
            others_cores: Spread::of(runs.iter().map(|run| run.others_cores))?,
        })
    }
}

/// Something hoped for. Fails nothing.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Target {
    /// What, and how much.
    pub words: String,
    /// What it was; absent when it was not measured.
    pub value: Option<f64>,
    /// Whether that is as hoped for.
    pub met: Option<bool>,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// When it began.
    pub began: Timestamp,
    /// How long it took.
    pub took_s: f64,
    /// The machine.
    pub about: About,
    /// How it was measured.
    pub settings: Settings,
    /// By workload and method.
    pub summaries: Vec<Summary>,
    /// What was hoped for.
    pub targets: Vec<Target>,
    /// Each run.
    pub runs: Vec<Run>,
}

/// Sums runs up. `gaps` are reasons for which a method was not measured, or not always.
pub fn summaries(
    workloads: &[Workload],
    cases: &[Case],
    runs: &[Run],
    gaps: &[(Workload, Case, String)],
) -> Vec<Summary> {
    let mut all = vec![];
    for workload in workloads {
        // A logical volume is another disk.
        let disk = |run: &Run| (run.round, run.method == Method::Lvm.name());
        let of_round = |run: &Run| {
            let key = disk(run);
            Idle::of(runs.iter().filter(move |other| other.workload == workload.name() && disk(other) == key))
        };
        let idles: BTreeMap<_, Idle> =
            runs.iter().filter(|run| run.workload == workload.name()).map(|run| (disk(run), of_round(run))).collect();
        let idle = |run: &Run| idles.get(&disk(run)).copied().unwrap_or(Idle { per_second: 0.0, p99_us: 0.0 });
        for case in cases {
            let own: Vec<_> = runs.iter().filter(|run| run.key() == key(*workload, case)).collect();
            let gap = gaps.iter().find(|(w, c, _)| w == workload && c == case);
            all.push(Summary {
                workload: workload.name(),
                method: case.method.name(),
                reader_bytes_per_second: case.reader,
                case: case.to_string(),
                words: case.method.words(),
                rounds: own.len(),
                not_measured: gap.map(|(.., why)| why.clone()),
                measured: Measured::of(&own, idle),
            });
        }
    }
    all
}

/// What was hoped for, of random writes of 4 KiB and readers without a limit.
pub fn targets(summaries: &[Summary]) -> Vec<Target> {
    let of = |method: Method| {
        let case = Case { method, reader: None };
        summaries.iter().find(|summary| summary.key() == key(Workload::Random, &case))?.measured
    };
    let target = |words: &str, value: Option<f64>, met: fn(f64) -> bool| Target {
        words: words.to_owned(),
        value,
        met: value.map(met),
    };
    let tracking = of(Method::Bitmap).map(|m| m.p99_times.median);
    let share = of(Method::Fleece).map(|m| m.rate_share.median);
    let others = [Method::QemuFleece, Method::Push, Method::PushSlow, Method::Overlay, Method::Lvm];
    let best = others.iter().filter_map(|m| Some(of(*m)?.rate_share.median)).max_by(f64::total_cmp);
    let lost = of(Method::Fleece).map(|m| m.lost_s.median);
    let least_lost = others.iter().filter_map(|m| Some(of(*m)?.lost_s.median)).min_by(f64::total_cmp);
    vec![
        target("tracking only: p99 of writes beside idle, at most 1.10", tracking, |v| v <= 1.10),
        target("a full, reader unbounded: rate beside idle, at least 0.50", share, |v| v >= 0.50),
        target(
            "the same: in multiples of the best of the others, at least 1.00",
            share.zip(best).filter(|(_, best)| *best > 0.0).map(|(share, best)| share / best),
            |v| v >= 1.0,
        ),
        target(
            "the same: what the guest loses over the whole backup, in multiples of the least of the others, at most 1.00",
            lost.zip(least_lost).filter(|(_, least)| *least > 0.0).map(|(lost, least)| lost / least),
            |v| v <= 1.0,
        ),
        target(
            "writes to what is acknowledged: cost beside idle, at most 1.10",
            of(Method::Acknowledged).map(|m| m.rate_share.median).filter(|share| *share > 0.0).map(|s| 1.0 / s),
            |v| v <= 1.10,
        ),
    ]
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A run whose guest got so much done during the backup, and twice as much of 100 before it.
    pub fn run(method: &'static str, round: u32, during: f64) -> Run {
        let figures = |per_second: f64, p99_us: f64| Figures {
            seconds: 1.0,
            operations: per_second as u64,
            per_second,
            mib_per_second: per_second / 256.0,
            write: Some(Latency { p50_us: p99_us / 2.0, p99_us, p999_us: p99_us, max_us: p99_us * 2.0 }),
            read: None,
        };
        let write = Latency { p50_us: 50.0, p99_us: 100.0, p999_us: 150.0, max_us: 200.0 };
        let point = |at_s| Point { at_s, per_second: during, write };
        Run {
            workload: Workload::Random.name(),
            method,
            reader_bytes_per_second: None,
            round,
            before: figures(100.0, 1000.0),
            during: figures(during, 1100.0),
            after: figures(100.0, 1000.0),
            backup: Backup { took_s: 1.0, finished: round == 1, read_bytes: 1, copied_bytes: None },
            failed_requests: 0,
            others_cores: 0.5,
            course: [-0.2, -0.1, 0.1, 0.2].map(point).to_vec(),
        }
    }

    #[test]
    fn rounds_are_summed_up_by_method() {
        let runs = [run("none", 1, 100.0), run("fleece", 1, 60.0), run("fleece", 2, 40.0), run("fleece", 3, 55.0)];
        let cases = Case::all(&[Method::Fleece, Method::Push], &[None]);
        let gap = (Workload::Random, cases[1], "failed".to_owned());
        let all = summaries(&[Workload::Random], &cases, &runs, std::slice::from_ref(&gap));
        let fleece = all[0].measured.unwrap();
        assert_eq!((all[0].rounds, fleece.finished, &all[0].not_measured), (3, 1, &None));
        assert_eq!(fleece.rate_share, Spread { median: 0.55, least: 0.4, most: 0.6 });
        assert!((fleece.p99_times.median - 1.1).abs() < 1e-9);
        assert!((fleece.lost_s.median - 0.45).abs() < 1e-9);
        assert_eq!((all[1].rounds, &all[1].measured, &all[1].not_measured), (0, &None, &Some(gap.2)));
    }

    #[test]
    fn each_reader_is_a_row_of_its_own() {
        let slow = Run { reader_bytes_per_second: Some(100 << 20), ..run("fleece", 1, 90.0) };
        let cases = Case::all(&[Method::Nothing, Method::Fleece], &[None, Some(100 << 20)]);
        let runs = [run("none", 1, 100.0), run("fleece", 1, 60.0), slow];
        let all = summaries(&[Workload::Random], &cases, &runs, &[]);
        let rows = all.iter().map(|s| (s.case.as_str(), s.measured.unwrap().rate_share.median));
        assert_eq!(rows.collect::<Vec<_>>(), [("none", 1.0), ("fleece", 0.6), ("fleece, 100.0 MiB/s", 0.9)]);
        assert_eq!(all[2].of(&runs).len(), 1);
        // What is hoped for is of the reader without a limit.
        assert_eq!(targets(&all)[1].value, Some(0.6));
    }

    #[test]
    fn a_volume_is_held_against_itself() {
        let mut slow = run("lvm", 1, 20.0);
        slow.before.per_second = 40.0;
        let cases = Case::all(&[Method::Fleece, Method::Lvm], &[None]);
        let all = summaries(&[Workload::Random], &cases, &[run("fleece", 1, 60.0), slow], &[]);
        let shares = all.iter().map(|summary| summary.measured.unwrap().rate_share.median);
        assert_eq!(shares.collect::<Vec<_>>(), [0.6, 0.5]);
    }

    #[test]
    fn what_was_not_measured_meets_and_misses_nothing() {
        let runs = [run("none", 1, 100.0), run("bitmap", 1, 99.0), run("fleece", 1, 60.0), run("push", 1, 80.0)];
        let of =
            |methods: &[Method]| targets(&summaries(&[Workload::Random], &Case::all(methods, &[None]), &runs, &[]));
        assert!(of(&[]).iter().all(|t| t.value.is_none() && t.met.is_none()));
        let met: Vec<_> = of(&Method::ALL).iter().map(|t| t.met).collect();
        assert_eq!(met, [Some(true), Some(true), Some(false), Some(false), None]);
    }
}
