//! Gauge: QEMU's histograms of how long the guest's writes took.
//!
//! ```text
//!  switch on (serve: at attach; else: first backup) ─► read … instant ═ fleece ═ end ─► read … ─► detach: switch off
//! ```
//!
//! * **Ours** carry our owner's id in a last boundary that no write ever reaches (146 years), so that a crash leaves
//!   nothing unknown. They stay between backups, as the bitmaps that record do: the next backup has its "before" from
//!   them. Only [`Gauge::switch_off`] removes them.
//! * **Another program's** are read with its boundaries and never set or removed: to set again is to set to zero. A device
//!   where another program counts reads or flushes only is left alone, since removing ours would remove those too.
//! * QEMU keeps them with the device, not with the node: they survive the filter coming and going, and reboots.
//!
//! The debt file holds the last reading, from which the next backup counts. Nothing here makes a backup fail.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex as StdMutex, PoisonError};

use serde_json::{Value, json};

use super::names::Names;
use super::undo::{Debt, Debts, qom_path};
use crate::impact::Histogram;
use crate::monitor::{Monitor, MonitorError};

/// The first boundary.
const FIRST_NS: f64 = 10_000.0;
/// Boundaries that measure, each √2 times the one before: up to 59 s.
const BOUNDARIES: i32 = 46;
/// The last boundary is this and our owner's id.
const MARK_NS: u64 = 1 << 62;
/// Longest file of last readings.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Readings by the QOM path of the guest device.
pub type Readings = BTreeMap<String, Histogram>;

/// A device's write histogram.
struct Device {
    /// What QEMU calls the device.
    id: String,
    write: Option<Histogram>,
    /// The write histogram carries our mark.
    ours: bool,
    /// There is a histogram of reads or flushes, which we never set.
    others: bool,
}

/// Switches histograms of writes on and off, and reads them.
#[derive(Debug)]
pub struct Gauge {
    monitor: Monitor,
    debts: Debts,
    boundaries: Vec<u64>,
    /// Whether this QEMU has histograms.
    can: bool,
    last: StdMutex<Readings>,
}

impl Gauge {
    /// Changes nothing.
    pub fn new(monitor: &Monitor, names: &Names, sockets: &Path, can: bool) -> Self {
        let debts = Debts::new(sockets);
        let file = debts.path(Debt::Histogram);
        let short = std::fs::metadata(&file).is_ok_and(|about| about.len() <= MAX_FILE_BYTES);
        let text = short.then(|| std::fs::read(&file).ok()).flatten().unwrap_or_default();
        // One that was cut off by a crash is no reading.
        let last = serde_json::from_slice(&text).unwrap_or_default();
        let boundaries = boundaries(names.mark());
        Self { monitor: monitor.clone(), debts, boundaries, can, last: StdMutex::new(last) }
    }

    /// Switches histograms on where there are none on these devices. Gives the last reading that was
    /// [kept](Gauge::keep), and what they hold now. Of one of ours there always is a last one: switching on set it to zero.
    pub async fn switch_on(&self, paths: &[&str]) -> (Readings, Readings) {
        let mut devices = self.devices().await;
        let is_missing =
            |(path, d): &(&String, &Device)| paths.contains(&path.as_str()) && d.write.is_none() && !d.others;
        let new: Vec<_> = devices.iter().filter(is_missing).map(|(path, _)| path.clone()).collect();
        if !new.is_empty() {
            self.set(devices.iter().filter(is_missing)).await;
            devices = self.devices().await;
        }
        let mut last = self.with_last(|last| last.clone());
        // What one has counted since this moment says nothing of the time before.
        for (path, device) in devices.iter().filter(|(path, d)| d.ours && !new.contains(path)) {
            if let Some(write) = &device.write {
                last.entry(path.clone()).or_insert_with(|| write.emptied());
            }
        }
        (last, readings(devices))
    }

    async fn set(&self, devices: impl Iterator<Item = (&String, &Device)>) {
        for (path, device) in devices {
            if !self.debts.owed(Debt::Histogram) && self.debts.owe_with(Debt::Histogram, "{}").is_err() {
                return;
            }
            let arguments = json!({"id": device.id, "boundaries-write": self.boundaries});
            if let Err(error) = self.monitor.raw("block-latency-histogram-set", arguments).await {
                tracing::debug!(path, "the guest's write latency is not measured: {error}");
            }
            crate::fault::point("gauge.on");
            // What was read of one that went is nothing to count from.
            self.with_last(|last| last.remove(path));
        }
    }

    /// Removes ours. Says what it removed.
    pub async fn switch_off(&self) -> Result<Vec<String>, MonitorError> {
        let mut removed = vec![];
        for device in self.devices().await.into_values().filter(|d| d.ours) {
            if device.others {
                tracing::warn!(device.id, "our histogram stays: removing it would remove another program's");
                continue;
            }
            match self.monitor.raw("block-latency-histogram-set", json!({"id": device.id})).await {
                Ok(_) => removed.push(format!("latency histogram of {}", device.id)),
                // The device is being unplugged.
                Err(e) if e.refusal().is_some() => tracing::debug!(device.id, "its histogram is not removed: {e}"),
                Err(e) => return Err(e),
            }
        }
        self.with_last(Readings::clear);
        self.debts.paid(Debt::Histogram);
        Ok(removed)
    }

    /// What the histograms of writes show now.
    pub async fn read(&self) -> Readings {
        readings(self.devices().await)
    }

    /// Keeps a reading for the next backup to count from.
    pub fn keep(&self, readings: Readings) {
        if self.debts.owed(Debt::Histogram)
            && let Ok(text) = serde_json::to_string(&readings)
            && let Err(error) = self.debts.owe_with(Debt::Histogram, &text)
        {
            tracing::debug!("the last reading of the guest's latency is not kept: {error}");
        }
        self.with_last(|last| *last = readings);
    }

    fn with_last<T>(&self, with: impl FnOnce(&mut Readings) -> T) -> T {
        with(&mut self.last.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn devices(&self) -> BTreeMap<String, Device> {
        if !self.can {
            return BTreeMap::new();
        }
        match self.monitor.raw("query-blockstats", json!({})).await {
            Ok(answer) => devices(&answer, &self.boundaries),
            Err(error) => {
                tracing::debug!("the guest's latency cannot be read: {error}");
                BTreeMap::new()
            }
        }
    }
}

impl Drop for Gauge {
    fn drop(&mut self) {
        if self.monitor.is_closed() {
            // The histograms went with QEMU; where it lives on, ours are known by their mark.
            self.debts.paid(Debt::Histogram);
        }
    }
}

/// Our boundaries, the mark last.
fn boundaries(mark: u32) -> Vec<u64> {
    let measuring = (0..BOUNDARIES).map(|i| (FIRST_NS * 2f64.powf(f64::from(i) / 2.0)).round() as u64);
    measuring.chain([MARK_NS | u64::from(mark)]).collect()
}

fn readings(devices: BTreeMap<String, Device>) -> Readings {
    devices.into_iter().filter_map(|(path, device)| Some((path, device.write?))).collect()
}

/// Devices in an answer of `query-blockstats`.
fn devices(answer: &Value, ours: &[u64]) -> BTreeMap<String, Device> {
    let mut found = BTreeMap::new();
    for device in answer.as_array().into_iter().flatten() {
        let Some(id) = device["qdev"].as_str().filter(|id| !id.is_empty()) else { continue };
        let stats = &device["stats"];
        let others = [&stats["rd_latency_histogram"], &stats["flush_latency_histogram"]].iter().any(|h| !h.is_null());
        let numbers = |of: &Value| of.as_array()?.iter().map(Value::as_u64).collect::<Option<Vec<_>>>();
        let write = &stats["wr_latency_histogram"];
        let (mut write, set) = match (numbers(&write["boundaries"]), numbers(&write["bins"])) {
            (Some(boundaries), Some(bins)) => (Some((boundaries, bins)), true),
            _ => (None, !write.is_null()),
        };
        let is_ours = write.as_ref().is_some_and(|(boundaries, bins)| boundaries == ours && bins.len() > ours.len());
        if let Some((boundaries, bins)) = write.as_mut().filter(|_| is_ours) {
            // The mark measures nothing.
            boundaries.pop();
            let beyond = bins.pop().unwrap_or_default();
            if let Some(last) = bins.last_mut() {
                *last = last.saturating_add(beyond);
            }
        }
        let write = write.and_then(|(boundaries, bins)| Histogram::new(boundaries, bins));
        // One that cannot be read is somebody's all the same.
        let others = others || (set && write.is_none());
        found.insert(qom_path(id), Device { id: id.to_owned(), write, ours: is_ours, others });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_are_told_from_others_by_the_owner() {
        let ours = boundaries(7);
        assert!(ours.is_sorted() && ours.len() == BOUNDARIES as usize + 1);
        assert_eq!((ours[0], ours[1], ours[2]), (10_000, 14_142, 20_000));
        let mut bins = vec![0; ours.len() + 1];
        (bins[0], bins[46], bins[47]) = (5, 1, 2);
        let histogram = |boundaries: &[u64]| json!({"boundaries": boundaries, "bins": bins});
        let answer = json!([
            {"qdev": "sd1", "stats": {"wr_latency_histogram": histogram(&ours)}},
            {"qdev": "/machine/peripheral/vd0/virtio-backend", "stats": {"wr_latency_histogram": histogram(&boundaries(8))}},
            {"qdev": "sd2", "stats": {"rd_latency_histogram": histogram(&ours)}},
            {"qdev": "sd3", "stats": {"wr_latency_histogram": {"boundaries": [5], "bins": [1]}}},
            {"qdev": "", "stats": {}},
            {"stats": {}},
        ]);
        let found = devices(&answer, &ours);
        assert_eq!(found.len(), 4);
        let of = |path: &str| {
            let device = &found[path];
            (device.ours, device.others, device.write.as_ref().map(Histogram::count))
        };
        assert_eq!(of("/machine/peripheral/sd1"), (true, false, Some(8)));
        assert_eq!(of("/machine/peripheral/vd0/virtio-backend"), (false, false, Some(8)));
        assert_eq!(of("/machine/peripheral/sd2"), (false, true, None));
        assert_eq!(of("/machine/peripheral/sd3"), (false, true, None));
        let highest = found["/machine/peripheral/sd1"].write.as_ref().unwrap().highest().unwrap();
        assert_eq!((highest.from_ns, highest.below_ns), (ours[45], None));
    }
}
