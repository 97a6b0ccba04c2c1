//! fio: how it is called, and what it says. Pure.
//!
//! | workload | fio |
//! |---|---|
//! | random | `randwrite`, 4 KiB |
//! | sequential | `write`, 64 KiB |
//! | database | `randwrite`, 4 KiB, of up to four writers, each write with a flush (`O_DSYNC`): both are one operation |
//! | mixed | `randrw`, 4 KiB, 70 % reads |
//!
//! All past the guest's page cache (`O_DIRECT`), with libaio, on a file that is full of data: what reaches the disk is what fio
//! asks for. Every run has a time limit.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;

use super::super::figures::{Figures, Latency};
use super::super::load::{COMMITTERS, Workload};
use crate::units::{GRANULE_BYTES, MIB};

/// Longest time for filling the file.
pub const FILLS_WITHIN: Duration = Duration::from_secs(600);
/// Longest time for making a part of it dirty.
pub const DIRTIES_WITHIN: Duration = Duration::from_secs(60);
/// Of the file so much is dirty for an incremental.
const DIRTY_SHARE: u64 = 4;
/// Since then `sync=dsync` is known for sure; before it a flush is `O_SYNC`'s, with more of the file system in it.
const HAS_DSYNC: (u32, u32) = (3, 27);
/// Longest words of fio's that are shown.
const MAX_WORDS: usize = 300;
/// ENOSPC, as fio says it in its JSON.
const NO_SPACE: i64 = 28;

/// What fio is to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Task {
    /// Fill the file.
    Fill,
    /// Write once to a part of it.
    Dirty,
    /// A workload.
    Load {
        /// Which.
        workload: Workload,
        /// Requests under way.
        depth: u16,
        /// For how long.
        lasts: Duration,
        /// For the choice of blocks.
        seed: u64,
    },
}

impl Task {
    /// fio ends by itself after so long.
    pub fn limit(self) -> Duration {
        match self {
            Self::Fill => FILLS_WITHIN,
            Self::Dirty => DIRTIES_WITHIN,
            Self::Load { lasts, .. } => lasts,
        }
    }
}

/// The fio of a guest, and its file.
#[derive(Clone, Debug)]
pub struct Fio {
    /// Its version.
    pub version: (u32, u32),
    /// What it is called on its command line: of letters, digits and `-`.
    pub name: String,
    /// The file.
    pub file: String,
    /// Its size.
    pub size_bytes: u64,
}

/// Whether a path is one that fio and shells take as it is: absolute, of letters, digits and `/._-+@`.
pub fn is_plain(path: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || "/._-+@".contains(c);
    let names = path.split('/').skip(1).all(|name| !matches!(name, "" | "." | ".."));
    path.starts_with('/') && path.len() < 1024 && path.chars().all(known) && names
}

/// The version in what `fio --version` says: `fio-3.33`, `fio-3.36-dirty`.
pub fn version(said: &str) -> Option<(u32, u32)> {
    let mut numbers = said.trim().strip_prefix("fio-")?.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next().and_then(|minor| minor.parse().ok()).unwrap_or(0)))
}

impl Fio {
    /// Its arguments.
    pub fn arguments(&self, task: Task) -> Vec<String> {
        let mut all = vec![
            format!("--name={}", self.name),
            format!("--filename={}", self.file),
            "--ioengine=libaio".into(),
            "--direct=1".into(),
            "--thread".into(),
            format!("--runtime={}ms", task.limit().as_millis()),
            "--group_reporting".into(),
            "--clat_percentiles=0".into(),
            "--lat_percentiles=1".into(),
            "--percentile_list=50:99:99.9".into(),
            "--eta=never".into(),
            "--output-format=json".into(),
        ];
        // What somebody has removed meanwhile is not made again. To fio a file that grows is one that it makes.
        if task != Task::Fill {
            all.push("--allow_file_create=0".into());
        }
        let mut add = |more: &[&str]| all.extend(more.iter().map(|text| (*text).to_owned()));
        let (size_bytes, depth) = match task {
            Task::Fill => {
                add(&["--rw=write", "--bs=1M", "--end_fsync=1"]);
                (self.size_bytes, 4)
            }
            Task::Dirty => {
                add(&["--rw=write", "--bs=64k"]);
                ((self.size_bytes / DIRTY_SHARE).next_multiple_of(GRANULE_BYTES), 4)
            }
            Task::Load { workload, depth, seed, .. } => {
                add(&["--time_based", "--norandommap", &format!("--randseed={seed}")]);
                match workload {
                    Workload::Random => add(&["--rw=randwrite", "--bs=4k"]),
                    Workload::Sequential => add(&["--rw=write", "--bs=64k"]),
                    Workload::Mixed => add(&["--rw=randrw", "--rwmixread=70", "--bs=4k"]),
                    Workload::Database => {
                        let sync = if self.version >= HAS_DSYNC { "dsync" } else { "1" };
                        let writers = usize::from(depth).min(COMMITTERS);
                        add(&["--rw=randwrite", "--bs=4k", &format!("--sync={sync}"), &format!("--numjobs={writers}")]);
                    }
                }
                (self.size_bytes, if workload == Workload::Database { 1 } else { depth })
            }
        };
        add(&[&format!("--size={size_bytes}"), &format!("--iodepth={depth}")]);
        all
    }
}

/// What fio has said.
#[derive(Clone, Debug, PartialEq)]
pub struct Said {
    /// Its figures.
    pub figures: Figures,
    /// Bytes written.
    pub written_bytes: u64,
}

/// What is wrong with what fio has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// The disk is full.
    NoSpace,
    /// Anything else, in words.
    Else(String),
}

#[derive(Deserialize)]
struct Output {
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    #[serde(default)]
    error: i64,
    #[serde(default)]
    read: Side,
    #[serde(default)]
    write: Side,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Side {
    io_bytes: u64,
    /// In milliseconds.
    runtime: u64,
    total_ios: u64,
    lat_ns: Took,
    clat_ns: Took,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Took {
    max: f64,
    percentile: BTreeMap<String, f64>,
}

impl Side {
    fn latency(&self) -> Result<Option<Latency>, Wrong> {
        if self.total_ios == 0 {
            return Ok(None);
        }
        let us =
            |ns: f64| if ns.is_finite() && ns >= 0.0 { Ok(ns / 1e3) } else { Err(senseless("a latency that is none")) };
        let at = |wanted: f64| {
            let is_it = |key: &&String| key.parse::<f64>().is_ok_and(|found| (found - wanted).abs() < 1e-6);
            // Older ones give those of `lat` there, too.
            let all = [&self.lat_ns, &self.clat_ns];
            let mut found = all.iter().filter_map(|took| took.percentile.get(took.percentile.keys().find(is_it)?));
            us(*found.next().ok_or_else(|| senseless("no percentiles of latencies"))?)
        };
        Ok(Some(Latency { p50_us: at(50.0)?, p99_us: at(99.0)?, p999_us: at(99.9)?, max_us: us(self.lat_ns.max)? }))
    }
}

fn senseless(what: &str) -> Wrong {
    Wrong::Else(format!("its report has {what}"))
}

/// Text of a guest's, for a message: its last lines, without control characters.
pub fn last_words(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(4096)..]).into_owned();
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let last = lines[lines.len().saturating_sub(2)..].join("; ");
    let clean: Vec<char> = last.chars().filter(|c| !c.is_control()).collect();
    clean[clean.len().saturating_sub(MAX_WORDS)..].iter().collect()
}

/// Reads what fio printed. There may be notes before its JSON.
pub fn read(exit_code: Option<i64>, output: &[u8], errors: &[u8]) -> Result<Said, Wrong> {
    let text = String::from_utf8_lossy(output);
    let from = if text.starts_with('{') { Some(0) } else { text.find("\n{").map(|at| at + 1) };
    let (notes, json) = text.split_at(from.unwrap_or(text.len()));
    let words = || match [errors, notes.as_bytes()].map(last_words) {
        [errors, notes] if errors.is_empty() => notes,
        [errors, _] => errors,
    };
    if words().contains("No space left on device") {
        return Err(Wrong::NoSpace);
    }
    let failed = || {
        let code = exit_code.map_or("by a signal".to_owned(), |code| format!("with exit code {code}"));
        Wrong::Else(format!("it ended {code}: {}", words()))
    };
    let read = serde_json::Deserializer::from_str(json).into_iter::<Output>().next();
    let output = match read {
        Some(Ok(output)) => output,
        _ if exit_code != Some(0) => return Err(failed()),
        Some(Err(error)) => return Err(Wrong::Else(format!("its report cannot be read: {error}"))),
        None => return Err(senseless(&format!("no JSON ({})", words()))),
    };
    let [job] = output.jobs.as_slice() else { return Err(senseless("not one group of jobs")) };
    match (job.error, exit_code) {
        (NO_SPACE, _) => return Err(Wrong::NoSpace),
        (0, Some(0)) => {}
        _ => return Err(failed()),
    }
    let (reads, writes) = (&job.read, &job.write);
    let seconds = reads.runtime.max(writes.runtime) as f64 / 1e3;
    let operations = reads.total_ios.saturating_add(writes.total_ios);
    let rate = |number: f64| if seconds > 0.0 { number / seconds } else { 0.0 };
    let figures = Figures {
        seconds,
        operations,
        per_second: rate(operations as f64),
        mib_per_second: rate((reads.io_bytes as f64 + writes.io_bytes as f64) / MIB as f64),
        write: writes.latency()?,
        read: reads.latency()?,
    };
    Ok(Said { figures, written_bytes: writes.io_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What fio 3.33 of Debian 12 printed in a guest, by the arguments of the workload `mixed`.
    const MIXED: &[u8] = include_bytes!("../../../tests/fixtures/fio/mixed-3.33.json");

    fn fio(version: (u32, u32)) -> Fio {
        Fio { version, name: "livebackup-1".into(), file: "/var/tmp/f".into(), size_bytes: 16 * MIB }
    }

    fn load(workload: Workload, depth: u16) -> Task {
        Task::Load { workload, depth, lasts: Duration::from_millis(1500), seed: 7 }
    }

    #[test]
    fn a_report_is_read() {
        let said = read(Some(0), MIXED, b"").unwrap();
        let Figures { seconds, operations, per_second, mib_per_second, write, read: reads } = said.figures;
        assert_eq!((seconds, operations, said.written_bytes), (2.005, 1504, 1880064));
        assert!((per_second - operations as f64 / seconds).abs() < 1e-6);
        assert!((mib_per_second - per_second / 256.0).abs() < 0.1);
        assert_eq!(write, Some(Latency { p50_us: 8978.432, p99_us: 47448.064, p999_us: 66322.432, max_us: 66391.21 }));
        assert_eq!(reads.map(|l| l.p50_us), Some(7241.728));
        // Notes may come before it, and what comes after it is not looked at.
        let noted =
            [b"note: both iodepth >= 1 and synchronous I/O\nfio: {\n".as_slice(), MIXED, b"Run status\n"].concat();
        assert_eq!(read(Some(0), &noted, b"a warning\n"), Ok(said));
    }

    #[test]
    fn percentiles_of_older_ones_are_found() {
        let text = String::from_utf8(MIXED.to_vec()).unwrap();
        // They call them clat's.
        let older = text.replace("\"clat_ns\"", "\"x\"").replace("\"lat_ns\"", "\"clat_ns\"");
        let found = read(Some(0), older.as_bytes(), b"").unwrap().figures.write.unwrap();
        let now = read(Some(0), MIXED, b"").unwrap().figures.write.unwrap();
        assert_eq!((found.p50_us, found.p999_us), (now.p50_us, now.p999_us));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let job = |job: &str| format!("{{\"jobs\": [{job}]}}");
        let errors = b"fio: io_u error on file /x: No space left on device: write offset=4, buflen=4\n";
        assert_eq!(read(Some(1), b"", errors), Err(Wrong::NoSpace));
        assert_eq!(read(Some(1), job("{\"error\": 28}").as_bytes(), b""), Err(Wrong::NoSpace));
        for (code, output, errors, words) in [
            (Some(1), String::new(), "a\nfio: unrecognized option '--x'\n", "exit code 1: a; fio: unrecognized option"),
            (None, String::new(), "", "by a signal"),
            (Some(0), String::new(), "", "no JSON"),
            (Some(0), "{\"jobs\": 5}".into(), "", "cannot be read"),
            (Some(0), "{\"jobs\": [".into(), "", "cannot be read"),
            (Some(0), job("{}, {}"), "", "not one group"),
            (Some(0), job("{\"error\": 5}"), "fio: pid=1, err=5", "err=5"),
            (Some(0), job("{\"write\": {\"total_ios\": 1}}"), "", "no percentiles"),
            (Some(0), job("{\"write\": {\"total_ios\": -1}}"), "", "cannot be read"),
        ] {
            let Err(Wrong::Else(said)) = read(code, output.as_bytes(), errors.as_bytes()) else { panic!("{words}") };
            assert!(said.contains(words), "{said}");
        }
        assert_eq!(last_words("\x1b[1ma\n\nb\tc\n".as_bytes()), "[1ma; bc");
        assert!(last_words(&[b'x'; 9999]).len() <= MAX_WORDS);
    }

    #[test]
    fn each_run_ends_by_itself() {
        for task in [Task::Fill, Task::Dirty].into_iter().chain(Workload::ALL.map(|workload| load(workload, 8))) {
            let all = fio((3, 33)).arguments(task);
            let has = |argument: &str| all.iter().any(|one| one == argument);
            assert!(has(&format!("--runtime={}ms", task.limit().as_millis())), "{all:?}");
            assert!(
                has("--name=livebackup-1")
                    && has("--filename=/var/tmp/f")
                    && has("--direct=1")
                    && has("--output-format=json"),
                "{all:?}"
            );
            assert_eq!(has("--time_based"), matches!(task, Task::Load { .. }), "{all:?}");
            assert_eq!(has("--allow_file_create=0"), task != Task::Fill, "{all:?}");
        }
        let dirty = fio((3, 33)).arguments(Task::Dirty);
        assert!(dirty.contains(&"--size=4194304".to_owned()), "{dirty:?}");
    }

    #[test]
    fn a_database_has_writers_that_wait_for_a_flush() {
        let all = |version, depth| fio(version).arguments(load(Workload::Database, depth)).join(" ");
        assert!(
            all((3, 33), 8).contains("--sync=dsync --numjobs=4 --size=16777216 --iodepth=1"),
            "{}",
            all((3, 33), 8)
        );
        assert!(all((3, 16), 2).contains("--sync=1 --numjobs=2 "), "{}", all((3, 16), 2));
    }

    #[test]
    fn versions_and_paths() {
        for (text, found) in [("fio-3.33\n", Some((3, 33))), ("fio-3.36-dirty", Some((3, 36))), ("fio-3", Some((3, 0)))]
        {
            assert_eq!(version(text), found, "{text}");
        }
        assert_eq!(version("busybox"), None);
        assert_eq!(version("fio-"), None);
        assert!(is_plain("/var/tmp/livebackup-fio") && is_plain("/mnt/a_b/c+d@e.f"));
        for bad in ["", "/", "a", "/a/", "/a:b", "/a b", "/a//b", "/a/../b", "/./a", "/a'b", "/a$b", "/a\\b", "/ä"] {
            assert!(!is_plain(bad), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn anything_is_figures_or_an_error(
            output in prop_oneof![
                "\\{\"jobs\": ?\\[\\{\"(error|read|write)\": ?(\\{\"(runtime|total_ios|io_bytes)\": ?[0-9]{1,20}\\}|-?[0-9]{1,20})\\}\\]\\}?",
                "[ -~\n]{0,60}"
            ],
            code in prop::option::of(0i64..2),
        ) {
            if let Ok(said) = read(code, output.as_bytes(), b"") {
                prop_assert!(said.figures.per_second.is_finite());
            }
        }
    }
}
