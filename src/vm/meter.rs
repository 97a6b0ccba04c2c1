//! Meter: what one session costs the guest, disk by disk.
//!
//! Begun just before the guest is made quiet, fed with looks at the scratch, and read when the fleece is out of QEMU again.

use super::gauge::Readings;
use crate::impact::{DiskImpact, Histogram, Impact, Writes};

/// A disk's share.
#[derive(Debug)]
struct Disk {
    name: String,
    qom_path: String,
    at_instant: Option<Histogram>,
    before: Option<Writes>,
    scratch_bytes: u64,
    scratch_peak_bytes: u64,
    copied_bytes: u64,
}

/// The figures of a session.
#[derive(Debug)]
pub struct Meter {
    disks: Vec<Disk>,
    scratch_peak_bytes: u64,
}

impl Meter {
    /// Of disks by (name, QOM path): `last` is what they count from, `now` the reading before the instant.
    pub fn new<'a>(disks: impl Iterator<Item = (&'a str, &'a str)>, last: &Readings, now: &Readings) -> Self {
        let disk = |(name, qom_path): (&str, &str)| {
            let at_instant = now.get(qom_path).cloned();
            let between = at_instant.as_ref().zip(last.get(qom_path)).and_then(|(now, last)| now.since(last));
            Disk {
                name: name.to_owned(),
                qom_path: qom_path.to_owned(),
                at_instant,
                before: between.as_ref().map(Writes::from),
                scratch_bytes: 0,
                scratch_peak_bytes: 0,
                copied_bytes: 0,
            }
        };
        Self { disks: disks.map(disk).collect(), scratch_peak_bytes: 0 }
    }

    /// Takes a look at the scratch: bytes in use, by disk.
    pub fn look(&mut self, scratch: &[u64]) {
        self.scratch_peak_bytes = self.scratch_peak_bytes.max(scratch.iter().sum());
        for (disk, used) in self.disks.iter_mut().zip(scratch) {
            disk.copied_bytes += used.saturating_sub(disk.scratch_bytes);
            disk.scratch_bytes = *used;
            disk.scratch_peak_bytes = disk.scratch_peak_bytes.max(*used);
        }
    }

    /// Most scratch of all disks at once.
    pub fn scratch_peak_bytes(&self) -> u64 {
        self.scratch_peak_bytes
    }

    /// The impact up to this reading.
    pub fn impact(&self, now: &Readings) -> Vec<DiskImpact> {
        let impact = |disk: &Disk| {
            let now = now.get(&disk.qom_path).zip(disk.at_instant.as_ref());
            let during = now.and_then(|(now, then)| now.since(then));
            Impact {
                before: disk.before,
                during: during.as_ref().map(Writes::from),
                scratch_peak_bytes: disk.scratch_peak_bytes,
                copied_bytes: disk.copied_bytes,
            }
        };
        self.disks.iter().map(|d| DiskImpact { disk: d.name.clone(), impact: impact(d) }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_differences_and_scratch_is_summed_as_it_grows() {
        let reading = |bins: [u64; 2]| Histogram::new(vec![10], bins.to_vec()).unwrap();
        let readings = |bins| Readings::from([("/a".to_owned(), reading(bins))]);
        let disks = [("a", "/a"), ("b", "/b")];
        let mut meter = Meter::new(disks.into_iter(), &readings([1, 1]), &readings([5, 1]));
        for scratch in [[0, 0], [30, 1], [10, 1], [20, 0]] {
            meter.look(&scratch);
        }
        let impact = meter.impact(&readings([5, 3]));
        let a = impact[0].impact;
        assert_eq!((a.before.unwrap().count, a.during.unwrap().count), (4, 2));
        assert_eq!(a.before.unwrap().highest.unwrap().below_ns, Some(10));
        assert_eq!(a.during.unwrap().p50.unwrap().from_ns, 10);
        assert_eq!((a.scratch_peak_bytes, a.copied_bytes, meter.scratch_peak_bytes()), (30, 40, 31));
        let b = impact[1].impact;
        assert_eq!((b.before, b.during, b.copied_bytes), (None, None, 1));
        // Another program set its histogram anew: nothing can be said.
        assert_eq!(meter.impact(&readings([0, 0]))[0].impact.during, None);
    }
}
