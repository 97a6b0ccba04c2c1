//! Device: the fingerprint of a host block device, for operators who say that nobody but the virtual machine writes to it.
//!
//! A device has no times, and a rollback of an LV, zvol or LUN leaves no mark. So no epoch is carried over a device from one
//! QEMU to the next, unless the operator says `exclusive_device`: between two runs of the virtual machine under our care
//! nobody writes to it, nobody runs another QEMU on it, and nobody rolls it back. That is taken at its word only as far as it
//! cannot be checked. What is noted after QEMU's exit, and compared in the next QEMU after the bitmap was added:
//!
//! | what | who shows |
//! |---|---|
//! | number, size and sequence (`diskseq`) of the device | another device under the same name, also a loop device that was detached and attached |
//! | the host's counters of writes and discards | whoever wrote through the device: another QEMU, a mount, the guest before we came |
//! | a digest of granules: the first and last MiB, and at most [`RECENT_GRANULES`] that were written last, by the last bitmaps | a rollback, which leaves the counters alone and takes what was written last |
//!
//! So at most 66 MiB are read each time. A rollback is overlooked if it changed none of these granules: of a device that had
//! more granules written since the last checkpoint, an even choice is taken.
//!
//! Only a device that is a disk's whole medium, raw and from its start, is done so: there a granule of the guest's is one of the
//! device. All is read past the page cache, which may keep what a rollback took away. A host that was started anew ends it, as
//! with [files](super::medium).

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::stat::{major, minor};

use super::medium::{self, HeldMedium, OpenFiles, Subject};
use crate::checkpoint::{Bitmap, Closed, DeviceCounters, DeviceStamp, FileNumbers, Log, Stamp};
use crate::direct::{AlignedBytes, DirectReader};
use crate::units::{GRANULE_BYTES, MIB};

/// Most granules that were written last and are in a fingerprint: 64 MiB.
pub const RECENT_GRANULES: usize = 1024;
/// Checkpoints whose bitmaps are looked at for granules, if the last one has too few.
const RECENT_CHECKPOINTS: usize = 8;
/// At both ends of the device.
const END_GRANULES: u64 = MIB / GRANULE_BYTES;

/// Which disks have a device that nobody else writes to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Exclusive {
    /// None.
    #[default]
    No,
    /// Every disk that is on a device.
    All,
    /// These.
    Disks(Vec<String>),
}

impl Exclusive {
    /// Whether this disk has.
    pub fn has(&self, disk: &str) -> bool {
        match self {
            Exclusive::No => false,
            Exclusive::All => true,
            Exclusive::Disks(names) => names.iter().any(|name| name == disk),
        }
    }
}

/// A disk's medium, held from before QEMU's exit until it is stamped.
#[derive(Debug)]
pub enum Held {
    /// Files.
    Files(HeldMedium),
    /// A device, and the granules for its fingerprint.
    Device(HeldDevice, Vec<u64>),
}

impl Held {
    /// Takes hold of a medium, as QEMU has it open. `recent` are granules for a device's fingerprint, if the operator says
    /// that the device is exclusive. Blocks on files.
    ///
    /// # Errors
    /// Why this medium can have no stamp, to be read after "the medium".
    pub fn new(pid: i32, subject: &Subject, recent: Option<Vec<u64>>) -> Result<Self, String> {
        match recent.filter(|_| subject.chain.iter().any(|layer| layer.protocol == "host_device")) {
            Some(granules) => Ok(Held::Device(HeldDevice::new(pid, subject)?, granules)),
            None => medium::hold(pid, subject).map(Held::Files),
        }
    }

    /// How the files stand now. Blocks on files.
    ///
    /// # Errors
    /// Why that cannot be told, to be read after "the medium".
    pub fn look(&self) -> Result<Stamp, String> {
        match self {
            Held::Files(files) => files.look(),
            Held::Device(device, _) => Err(format!(
                "is the device {}, and the QEMU that had it open stayed after its guest had powered off",
                device.filename
            )),
        }
    }

    /// How the medium stands now that QEMU has exited. Blocks.
    ///
    /// # Errors
    /// Why there is no stamp, to be read after "the medium".
    pub fn close(&self) -> Result<Closed, String> {
        let closed = Closed { time: Timestamp::now(), stamp: None, device: None, no_stamp: None };
        Ok(match self {
            Held::Files(files) => Closed { stamp: Some(files.stamp()?), ..closed },
            Held::Device(device, granules) => Closed { device: Some(device.stamp(granules)?), ..closed },
        })
    }
}

/// A device that QEMU has open, opened by us.
#[derive(Debug)]
pub struct HeldDevice {
    filename: String,
    number: u64,
    size_bytes: u64,
    sysfs: PathBuf,
    file: File,
}

impl HeldDevice {
    /// # Errors
    /// Why this device can have no fingerprint, to be read after "the medium".
    fn new(pid: i32, subject: &Subject) -> Result<Self, String> {
        let [layer] = &subject.chain[..] else { return Err("is a device below or above other files".to_owned()) };
        let name = &layer.filename;
        if layer.format != "raw" || subject.options.is_some() {
            return Err(format!("is the device {name}, used in another way than raw and whole"));
        }
        let numbers = medium::numbers_at(pid, name).filter(|n| n.dev == 0);
        let numbers: FileNumbers = numbers.ok_or_else(|| format!("is no block device that can be seen: {name}"))?;
        let descriptor = OpenFiles::of(pid).descriptor(numbers);
        let descriptor = descriptor.ok_or_else(|| format!("is not the device that QEMU has open: {name}"))?;
        let file = OpenOptions::new().read(true).open(format!("/proc/{pid}/fd/{descriptor}"));
        let file = file.map_err(|e| format!("cannot be read: {name}: {e}"))?;
        let about = file.metadata().map_err(|e| format!("cannot be looked at: {name}: {e}"))?;
        if !about.file_type().is_block_device() || about.rdev() != numbers.inode {
            return Err(format!("was exchanged: {name}"));
        }
        let sysfs = PathBuf::from(format!("/sys/dev/block/{}:{}", major(about.rdev()), minor(about.rdev())));
        let size_bytes = number_in(&sysfs.join("size")).and_then(|sectors| sectors.checked_mul(512));
        let size_bytes = size_bytes.ok_or_else(|| format!("does not tell its size: {name}"))?;
        Ok(Self { filename: name.clone(), number: about.rdev(), size_bytes, sysfs, file })
    }

    /// Everything but the digest. What is in the page cache is written first, so that it is counted.
    fn counters(&self) -> Result<DeviceCounters, String> {
        let name = &self.filename;
        self.file.sync_all().map_err(|e| format!("cannot be flushed: {name}: {e}"))?;
        // Of a partition, its disk has these.
        let of_disk =
            |file: &str| number_in(&self.sysfs.join(file)).or_else(|| number_in(&self.sysfs.join("..").join(file)));
        if of_disk("queue/iostats") != Some(1) {
            return Err(format!("does not count its writes (queue/iostats): {name}"));
        }
        let text = fs::read_to_string(self.sysfs.join("stat")).map_err(|e| format!("has no counters: {name}: {e}"))?;
        // Kernel documentation, block/stat: the 7th and 14th field. Numbers of requests count flushes, too.
        let fields: Vec<u64> = text.split_ascii_whitespace().map_while(|field| field.parse().ok()).collect();
        let field = |at: usize| fields.get(at).copied().unwrap_or(0);
        let writes = [field(6), field(13)];
        if writes[0] == 0 {
            return Err(format!("does not count its writes: {name}"));
        }
        Ok(DeviceCounters { sequence: of_disk("diskseq"), writes })
    }

    /// The fingerprint, of a device that nobody writes to.
    ///
    /// # Errors
    /// Why there is none, to be read after "the medium".
    fn stamp(&self, granules: &[u64]) -> Result<DeviceStamp, String> {
        let counters = self.counters()?;
        let digest = self.digest(granules)?;
        if self.counters()? != counters {
            return Err(format!("is written to by somebody although QEMU has ended: {}", self.filename));
        }
        let (filename, number, size_bytes) = (self.filename.clone(), self.number, self.size_bytes);
        Ok(DeviceStamp { filename, number, size_bytes, counters, granules: granules.to_vec(), digest })
    }

    fn digest(&self, granules: &[u64]) -> Result<String, String> {
        let failed = |e: std::io::Error| format!("cannot be read: {}: {e}", self.filename);
        // For what is too small to be read past it.
        let _ = posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        let reader = DirectReader::new(self.file.try_clone().map_err(failed)?);
        let mut buffer = AlignedBytes::new(GRANULE_BYTES as usize);
        let mut hasher = blake3::Hasher::new();
        for granule in granules {
            let from = granule.checked_mul(GRANULE_BYTES).filter(|from| *from < self.size_bytes);
            let from = from.ok_or_else(|| format!("is smaller than it was: {}", self.filename))?;
            let len = GRANULE_BYTES.min(self.size_bytes - from) as usize;
            hasher.update(&granule.to_le_bytes());
            hasher.update(reader.read_around(&mut buffer, from, len).map_err(failed)?);
        }
        Ok(hasher.finalize().to_hex().to_string())
    }
}

/// Compares a disk's device with its fingerprint from before, after the bitmap was added. Blocks.
///
/// # Errors
/// What differs.
pub fn compare(pid: i32, subject: &Subject, before: &DeviceStamp) -> Result<(), String> {
    let device = HeldDevice::new(pid, subject).map_err(|why| format!("the medium {why}"))?;
    let name = &device.filename;
    if (device.number, device.size_bytes) != (before.number, before.size_bytes) {
        return Err(format!("{name} is another device than before, or has another size"));
    }
    let counters = device.counters().map_err(|why| format!("the medium {why}"))?;
    if counters.sequence != before.counters.sequence {
        return Err(format!("{name} is another device than before: it was taken down and set up again"));
    }
    if counters.writes != before.counters.writes {
        return Err(format!("{name} was written to, by its counters"));
    }
    match device.digest(&before.granules).map_err(|why| format!("the medium {why}"))? == before.digest {
        true => Ok(()),
        false => Err(format!(
            "{name} holds something else than before, by its fingerprint: it was rolled back or written to"
        )),
    }
}

/// The granules for a fingerprint: both ends, and what was written last. `last` is the last bitmap, sealed already.
pub fn choose(log: &Log, last: &Bitmap) -> Vec<u64> {
    let count = last.size_bytes().div_ceil(GRANULE_BYTES);
    let mut chosen: BTreeSet<u64> =
        (0..count.min(END_GRANULES)).chain(count.saturating_sub(END_GRANULES)..count).collect();
    let most = chosen.len() + RECENT_GRANULES;
    add_some(&mut chosen, most, last);
    if chosen.len() < most {
        let before = log.checkpoints().iter().rev().nth(RECENT_CHECKPOINTS).or(log.checkpoints().first());
        if let Some(older) = before.and_then(|header| log.since(header.id).ok()) {
            add_some(&mut chosen, most, &older);
        }
    }
    chosen.into_iter().collect()
}

/// Adds granules of a bitmap, an even choice if there are too many, until there are `most`.
fn add_some(chosen: &mut BTreeSet<u64>, most: usize, bitmap: &Bitmap) {
    let room = most.saturating_sub(chosen.len());
    let granules = || bitmap.extents().flat_map(|e| e.offset_bytes / GRANULE_BYTES..e.end().div_ceil(GRANULE_BYTES));
    let count = granules().filter(|granule| !chosen.contains(granule)).count();
    if count == 0 || room == 0 {
        return;
    }
    let new = granules().filter(|granule| !chosen.contains(granule)).step_by(count.div_ceil(room));
    let new: Vec<_> = new.collect();
    chosen.extend(new);
}

fn number_in(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::Extent;

    #[test]
    fn a_choice_is_bounded_even_and_has_all_of_a_few() {
        let size_bytes = 10_000 * GRANULE_BYTES + 512;
        let dir = tempfile::tempdir().unwrap();
        let log = Log::open(dir.path()).unwrap();
        let mut bitmap = Bitmap::new(size_bytes);
        let ends = || (0..16).chain(9985..10_001);
        assert_eq!(choose(&log, &bitmap), ends().collect::<Vec<_>>());
        bitmap.set(Extent::new(20 * GRANULE_BYTES, 3 * GRANULE_BYTES));
        assert_eq!(choose(&log, &bitmap).len(), 35);
        bitmap.set(Extent::between(0, size_bytes));
        let many = choose(&log, &bitmap);
        assert!(many.len() <= 32 + RECENT_GRANULES && many.len() > RECENT_GRANULES, "{}", many.len());
        assert!(many.windows(2).all(|pair| pair[0] < pair[1] && pair[1] - pair[0] <= 10), "{many:?}");
        let small = Bitmap::new(512);
        assert_eq!(choose(&log, &small), [0]);
    }
}
