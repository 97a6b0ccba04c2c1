//! About the machine on which it was measured: without that no figure says anything.

use std::path::Path;

use nix::unistd::{SysconfVar, sysconf};
use serde::Serialize;

use crate::units::human_bytes;

/// A directory, and the file system that it is on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// What is there.
    pub what: &'static str,
    /// The file system's type; `?` where it cannot be told.
    pub file_system: String,
    /// The device it is on.
    pub device: String,
}

/// The machine, and what others did on it meanwhile.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct About {
    /// This program.
    pub livebackup: &'static str,
    /// QEMU's own words.
    pub qemu: String,
    /// The host's kernel.
    pub kernel: String,
    /// Model of the processors.
    pub processor: String,
    /// How many may be used.
    pub cores: usize,
    /// Memory of the host.
    pub memory_bytes: u64,
    /// Where things were put.
    pub places: Vec<Place>,
    /// Load averages over 1, 5 and 15 minutes, at the start.
    pub load_before: String,
    /// The same at the end: our own part is in there.
    pub load_after: String,
    /// How many processors others kept busy meanwhile, on average.
    pub others_cores: f64,
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// The value of a `name: value` line.
fn value<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_once(':').map(|(_, value)| value.trim())
}

/// The load averages.
pub fn load() -> String {
    read("/proc/loadavg").split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

impl About {
    /// Looks around.
    pub fn here(qemu: String, places: &[(&'static str, &Path)]) -> Self {
        let processors = read("/proc/cpuinfo");
        let memory = read("/proc/meminfo");
        let kib = value(&memory, "MemTotal").and_then(|v| v.split_whitespace().next()?.parse::<u64>().ok());
        let mounts = read("/proc/self/mountinfo");
        let place = |(what, path): &(&'static str, &Path)| {
            let path = std::fs::canonicalize(path).unwrap_or_else(|_| (*path).to_owned());
            let (file_system, device) = file_system(&mounts, &path).unwrap_or_else(|| ("?".into(), "?".into()));
            Place { what, file_system, device }
        };
        Self {
            livebackup: env!("CARGO_PKG_VERSION"),
            qemu,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            processor: value(&processors, "model name").unwrap_or(std::env::consts::ARCH).to_owned(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: kib.unwrap_or(0) * 1024,
            places: places.iter().map(place).collect(),
            load_before: load(),
            load_after: String::new(),
            others_cores: 0.0,
        }
    }
}

impl About {
    /// What it says, for people.
    pub fn lines(&self) -> [String; 2] {
        let places: Vec<_> =
            self.places.iter().map(|p| format!("{} on {} ({})", p.what, p.file_system, p.device)).collect();
        [
            format!(
                "{} ({} processors), {} of memory, Linux {}",
                self.processor,
                self.cores,
                human_bytes(self.memory_bytes),
                self.kernel
            ),
            format!(
                "load {} at the start, {} at the end; others kept {:.1} processors busy; {}",
                self.load_before,
                self.load_after,
                self.others_cores,
                places.join(", ")
            ),
        ]
    }
}

/// Type and device of the file system that a path is on, by `/proc/self/mountinfo`.
fn file_system(mounts: &str, path: &Path) -> Option<(String, String)> {
    let each = mounts.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let at = left.split_whitespace().nth(4)?.replace("\\040", " ");
        let mut right = right.split_whitespace();
        let found = (right.next()?.to_owned(), right.next()?.to_owned());
        path.starts_with(&at).then_some((Path::new(&at).components().count(), found))
    });
    // Of equal ones the later hides the earlier.
    each.max_by_key(|(depth, _)| *depth).map(|(_, found)| found)
}

/// Processor time of the host, and of us and what is measured.
#[derive(Clone, Copy, Debug)]
pub struct Busy {
    at: std::time::Instant,
    all_s: f64,
    ours_s: f64,
    beside: Option<i32>,
}

impl Busy {
    /// So far. QEMUs of ours count as ours once they have ended.
    pub fn now() -> Self {
        Self::with(None)
    }

    /// So far, with a process that is measured and no child of ours.
    pub fn beside(pid: i32) -> Self {
        Self::with(Some(pid))
    }

    fn with(beside: Option<i32>) -> Self {
        let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten().filter(|hz| *hz > 0).unwrap_or(100) as f64;
        let sum = |text: &str, places: &[usize]| {
            let fields: Vec<f64> = text.split_whitespace().map(|f| f.parse().unwrap_or(0.0)).collect();
            places.iter().filter_map(|place| fields.get(*place)).sum::<f64>() / ticks
        };
        let stat = read("/proc/stat");
        let process = |pid: &str| {
            let stat = read(&format!("/proc/{pid}/stat"));
            sum(stat.rsplit_once(')').map_or("", |(_, rest)| rest), &[11, 12, 13, 14])
        };
        let ours_s = process("self") + beside.map_or(0.0, |pid| process(&pid.to_string()));
        let all_s = sum(stat.lines().next().unwrap_or(""), &[1, 2, 3, 5, 6, 7]);
        Self { at: std::time::Instant::now(), all_s, ours_s, beside }
    }

    /// How many processors others have kept busy since.
    pub fn others_since(self) -> f64 {
        let now = Self::with(self.beside);
        let seconds = now.at.duration_since(self.at).as_secs_f64().max(0.01);
        ((now.all_s - self.all_s) - (now.ours_s - self.ours_s)).max(0.0) / seconds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deepest_mount_is_the_file_system() {
        let mounts = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
                      30 22 0:25 / /dev/shm rw shared:3 - tmpfs tmpfs rw\n\
                      31 22 0:26 / /dev rw - devtmpfs udev rw\n\
                      nonsense\n";
        let of = |path: &str| file_system(mounts, Path::new(path)).unwrap();
        assert_eq!(of("/tmp/x"), ("ext4".into(), "/dev/vda".into()));
        assert_eq!(of("/dev/shm/y"), ("tmpfs".into(), "tmpfs".into()));
        assert_eq!(file_system("", Path::new("/")), None);
    }

    #[test]
    fn this_machine_is_described() {
        let about = About::here("QEMU".into(), &[("disk", Path::new("/tmp"))]);
        assert!(about.cores > 0 && about.memory_bytes > 0 && !about.kernel.is_empty(), "{about:?}");
        assert_eq!(about.load_before.split(' ').count(), 3);
        assert!(Busy::now().others_since() >= 0.0);
    }
}
