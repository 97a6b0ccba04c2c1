//! The report: every run, their medians and spreads, in the tables of write-overhead.

use std::fmt;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;

use super::super::about::About;
use super::super::load::Workload;
use super::super::method::Method;
use super::super::report::{Run, Summary};
use super::super::text::{gaps, rates, tables};
use crate::units::human_bytes;

/// What is done meanwhile, for people.
pub fn words(method: Method) -> &'static str {
    match method {
        Method::Bitmap => "livebackup's dirty bitmaps only",
        Method::Fleece => "livebackup, full",
        Method::Incremental => "livebackup, incremental",
        method => method.words(),
    }
}

/// How it was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GuestSettings {
    /// The file in the guest.
    pub file: String,
    /// Its size.
    pub size_bytes: u64,
    /// Longest time of a backup.
    pub seconds: u32,
    /// How often each was measured.
    pub rounds: u32,
    /// Requests under way.
    pub depth: u16,
    /// Whether the guest was to be frozen.
    pub freeze: Value,
    /// Rates of the reader; as fast as it can where it is null.
    pub readers_bytes_per_second: Vec<Option<u64>>,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GuestReport {
    /// When it began.
    pub began: Timestamp,
    /// How long it took.
    pub took_s: f64,
    /// The machine's name.
    pub vm: String,
    /// The guest's system, agent and fio.
    pub guest: String,
    /// The host.
    pub about: About,
    /// How it was measured.
    pub settings: GuestSettings,
    /// By workload and method.
    pub summaries: Vec<Summary>,
    /// What could not be taken back.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<String>,
    /// Each run.
    pub runs: Vec<Run>,
}

impl fmt::Display for GuestReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { began, took_s, vm, guest, about, settings, .. } = self;
        let (livebackup, qemu) = (about.livebackup, &about.qemu);
        writeln!(f, "{vm}: {guest}")?;
        writeln!(f, "began {began:.0}, took {took_s:.0} s; livebackup {livebackup}, QEMU {qemu}")?;
        about.lines().iter().try_for_each(|line| writeln!(f, "{line}"))?;
        writeln!(
            f,
            "fio on {} of {} in the guest, {} requests under way, {} rounds, backups of up to {} s, reader {}, freeze {}",
            settings.file,
            human_bytes(settings.size_bytes),
            settings.depth,
            settings.rounds,
            settings.seconds,
            rates(&settings.readers_bytes_per_second),
            settings.freeze.as_str().unwrap_or("?")
        )?;
        for workload in Workload::ALL {
            let own: Vec<_> = self.summaries.iter().filter(|s| s.workload == workload.name()).collect();
            if own.is_empty() {
                continue;
            }
            writeln!(
                f,
                "\n{workload}: {}. Medians of the rounds (least-most). Idle: the median before all backups of a round",
                workload.words()
            )?;
            tables(f, &own)?;
            gaps(f, &own)?;
        }
        self.left.iter().try_for_each(|left| writeln!(f, "\nLEFT BEHIND: {left}"))
    }
}
