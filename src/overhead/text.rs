//! The report as text, for people.

use std::fmt;

use super::courses::Courses;
use super::figures::Spread;
use super::load::Workload;
use super::report::{Measured, Phase, Report, Summary};
use crate::units::human_bytes;

/// Cells of a table, under a head; the first column is text.
struct Rows(Vec<Vec<String>>);

impl fmt::Display for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.0.iter().map(Vec::len).max().unwrap_or(0);
        let cell = |row: &[String], column: usize| row.get(column).cloned().unwrap_or_default();
        let width = |column| self.0.iter().map(|row| cell(row, column).chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.0 {
            let mut line = String::new();
            for (column, width) in widths.iter().enumerate() {
                let text = cell(row, column);
                line += &if column < 2 { format!("{text:<width$}  ") } else { format!("{text:>width$}  ") };
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Microseconds as `87 us`, `1.2 ms`, `35 ms`, `1.20 s`.
pub(super) fn micros(us: f64) -> String {
    match us {
        us if us < 1e3 => format!("{us:.0} us"),
        us if us < 1e4 => format!("{:.1} ms", us / 1e3),
        us if us < 1e6 => format!("{:.0} ms", us / 1e3),
        us => format!("{:.2} s", us / 1e6),
    }
}

fn rate(spread: Spread) -> String {
    format!("{:.0} ({:.0}-{:.0})", spread.median, spread.least, spread.most)
}

fn times(spread: Spread) -> String {
    format!("{:.2} ({:.2}-{:.2})", spread.median, spread.least, spread.most)
}

fn phase_row(method: &str, name: &str, phase: &Phase) -> Vec<String> {
    let took = |spread: Spread| micros(spread.median);
    let spread = phase.p99_us;
    vec![
        method.to_owned(),
        name.to_owned(),
        rate(phase.per_second),
        format!("{:.1}", phase.mib_per_second.median),
        took(phase.p50_us),
        format!("{} ({}-{})", micros(spread.median), micros(spread.least), micros(spread.most)),
        took(phase.p999_us),
        micros(phase.max_us.most),
    ]
}

fn short_row(summary: &Summary, measured: &Measured) -> Vec<String> {
    let failed = match measured.failed_requests {
        0 => String::new(),
        number => format!("{number} requests FAILED"),
    };
    vec![
        summary.case.clone(),
        summary.words.to_owned(),
        times(measured.rate_share),
        times(measured.p99_times),
        micros(measured.during.max_us.most),
        format!("{:.2} s", measured.took_s.median),
        format!("{:.2} s", measured.lost_s.median),
        format!("{} of {}", measured.finished, summary.rounds),
        format!("{:.1}", measured.others_cores.median),
        failed,
    ]
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// Rates of readers.
pub(super) fn rates(readers: &[Option<u64>]) -> String {
    let one = |rate: &Option<u64>| match rate {
        Some(rate) => format!("{}/s", human_bytes(*rate)),
        None => "as fast as it can".to_owned(),
    };
    readers.iter().map(one).collect::<Vec<_>>().join(" and ")
}

/// The tables of a workload: what it comes to, and each phase.
pub(super) fn tables(f: &mut fmt::Formatter<'_>, own: &[&Summary]) -> fmt::Result {
    let head = [
        "METHOD",
        "WHAT",
        "RATE DURING/IDLE",
        "P99 DURING/IDLE",
        "SLOWEST",
        "BACKUP TOOK",
        "GUEST LOST",
        "ENDED",
        "OTHERS' CPUS",
    ];
    let mut short = vec![strings(&head)];
    let head = ["METHOD", "PHASE", "OPERATIONS/S", "MiB/S", "P50", "P99", "P99.9", "SLOWEST"];
    let mut long = vec![strings(&head)];
    for summary in own {
        let Some(measured) = &summary.measured else { continue };
        short.push(short_row(summary, measured));
        let phases = [("before", measured.before), ("during", measured.during), ("after", measured.after)];
        for (i, (name, phase)) in phases.iter().enumerate() {
            long.push(phase_row(if i == 0 { &summary.case } else { "" }, name, phase));
        }
    }
    write!(f, "{}\n{}", Rows(short), Rows(long))
}

/// What was not measured of a workload, and why.
pub(super) fn gaps(f: &mut fmt::Formatter<'_>, own: &[&Summary]) -> fmt::Result {
    for summary in own {
        if let Some(why) = &summary.not_measured {
            let which = if summary.rounds == 0 { "not measured" } else { "not always measured" };
            writeln!(f, "{}: {which}: {why}", summary.case)?;
        }
    }
    Ok(())
}

impl Report {
    /// Lines about the machine and the settings.
    pub(super) fn head(&self) -> Vec<String> {
        let (about, settings) = (&self.about, &self.settings);
        let [host, meanwhile] = about.lines();
        vec![
            format!(
                "began {:.0}, took {:.0} s; livebackup {}, QEMU {}",
                self.began, self.took_s, about.livebackup, about.qemu
            ),
            host,
            meanwhile,
            format!(
                "disk of {}, cache={}, {} requests under way, {} rounds, backups of up to {} s, reader {}",
                human_bytes(settings.size_bytes),
                settings.cache,
                settings.depth,
                settings.rounds,
                settings.seconds,
                rates(&settings.readers_bytes_per_second)
            ),
        ]
    }

    /// The workloads that were measured, in order.
    pub(super) fn workloads(&self) -> Vec<Workload> {
        let has = |w: &Workload| self.summaries.iter().any(|s| s.workload == w.name());
        Workload::ALL.into_iter().filter(has).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.head().iter().try_for_each(|line| writeln!(f, "{line}"))?;
        for workload in self.workloads() {
            let own: Vec<_> = self.summaries.iter().filter(|s| s.workload == workload.name()).collect();
            writeln!(
                f,
                "\n{workload}: {}. Medians of the rounds (least-most). Idle: the median before all backups of a round (lvm: before it)",
                workload.words()
            )?;
            tables(f, &own)?;
            write!(f, "{}", Courses::of(&self.runs, &own))?;
            gaps(f, &own)?;
        }
        let hoped: Vec<_> = self.targets.iter().filter_map(|t| Some((t, t.value?, t.met?))).collect();
        if !hoped.is_empty() {
            writeln!(f, "\nWhat is hoped for (fails nothing):")?;
        }
        for (target, value, met) in hoped {
            writeln!(f, "  {}: {value:.2}{}", target.words, if met { "" } else { "; MISSED" })?;
        }
        Ok(())
    }
}
