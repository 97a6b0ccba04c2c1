//! Evidence: whether an epoch goes on. A pure decision; every doubt ends the epoch, with a sentence for the operator.
//!
//! An epoch goes on by one of three proofs:
//!
//! | proof | why nothing was missed |
//! |---|---|
//! | [`Proof::SameProcess`] | our bitmap is in this QEMU's memory, and every write passed it |
//! | [`Proof::Stamp`] | the last QEMU's bitmap was sealed after its guest had stopped, and the medium stands as it stood when that QEMU had exited; a bitmap was added to this one before that was looked at. Of a device that is the operator's word, and its [fingerprint](super::device) |
//! | [`Proof::Stored`] | the image itself carried our bitmap from one QEMU to the next, see [`persist`](super::persist) |
//!
//! Anything else is a [`Doubt`]. The order in which doubts are looked for is the order in which they explain most.

use std::fmt;

use crate::checkpoint::{Epoch, Medium, QemuInstance};
use crate::units::human_bytes;

/// Run states in which every write passes QEMU's block layer and so our bitmap. In `shutdown` the guest has powered off
/// and QEMU was told to stay.
const RECORDING_STATES: [&str; 9] =
    ["running", "paused", "prelaunch", "io-error", "suspended", "watchdog", "guest-panicked", "debug", "shutdown"];

/// What is seen of a disk now.
#[derive(Clone, Debug)]
pub struct Seen<'a> {
    /// The QEMU process.
    pub qemu: &'a QemuInstance,
    /// QEMU's run state.
    pub run_state: &'a str,
    /// The disk's root node.
    pub node: &'a str,
    /// Its size.
    pub size_bytes: u64,
    /// Why the medium is shared, if it is.
    pub shared: Option<&'a str>,
    /// What the disk is made of.
    pub medium: &'a Medium,
    /// The bitmap that records since the epoch's last checkpoint.
    pub bitmap: Recording,
    /// Whether the sentinel is there with its bit. Not asked of a QEMU that the epoch comes to by its stamp.
    pub sentinel: bool,
    /// Why the image can keep no bitmap that is to be believed, if it cannot.
    pub cannot_keep: Option<&'a str>,
    /// How the medium compares with the stamp, looked at after the bitmap was added; `None` where nobody looked.
    pub stamp: Option<&'a Result<(), String>>,
}

/// State of the bitmap that records since the last checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recording {
    /// It is there and records, or what came after it does: a sidecar died between two checkpoints.
    Unbroken,
    /// As before, and the image itself keeps it.
    Stored,
    /// It is there and does not record, and nothing took over from it.
    Stopped,
    /// It is there, kept by the image, and was not stored when its QEMU ended.
    Inconsistent,
    /// It is not there.
    Missing,
}

/// Why an epoch goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// It is the same QEMU.
    SameProcess,
    /// The medium stands as it stood when the last QEMU had exited.
    Stamp,
    /// The image carried our bitmap.
    Stored,
}

/// Why an epoch does not go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// QEMU is in a state in which writes pass our bitmap by.
    RunState(String),
    /// Others may write to the medium.
    Shared(String),
    /// The disk has another size.
    Size {
        /// The epoch's.
        then_bytes: u64,
        /// The disk's.
        now_bytes: u64,
    },
    /// The bitmap that the image keeps was not stored.
    Inconsistent,
    /// The image was to keep our bitmap, and does not have it.
    NotKept,
    /// The image has our bitmap, which tells nothing of what is outside of it.
    NotOnItsOwn(String),
    /// The image that has our bitmap is another file.
    AnotherImage(String),
    /// The host was started anew.
    HostStarted,
    /// Another QEMU, and the last one's end was not seen.
    EndNotSeen {
        /// The last QEMU's process.
        then: i32,
        /// This one's.
        now: i32,
    },
    /// Another QEMU, and this medium can have no stamp.
    NoStamp(String),
    /// Another QEMU, and nobody has looked at the medium after adding the bitmap.
    NotCompared,
    /// Somebody wrote to the medium in between.
    MediumWritten(String),
    /// The disk has another top node.
    Node {
        /// The epoch's.
        then: String,
        /// The disk's.
        now: String,
    },
    /// The same node has something else open.
    Medium(String),
    /// A migration has ended in this QEMU.
    Migrated(String),
    /// Somebody switched our bitmap off.
    Stopped,
    /// Somebody removed our bitmap.
    Missing,
    /// The disk was made smaller and larger again.
    Shrunk,
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Doubt::RunState(state) => {
                write!(f, "QEMU is in the state {state:?}, in which writes may pass our bitmap by")
            }
            Doubt::Shared(why) => write!(f, "the medium is shared, so others may write to it unseen: {why}"),
            Doubt::Size { then_bytes, now_bytes } => {
                let (then, now) = (human_bytes(*then_bytes), human_bytes(*now_bytes));
                match then == now {
                    true => write!(f, "the disk's size changed from {then_bytes} to {now_bytes} bytes"),
                    false => write!(f, "the disk's size changed from {then} to {now}"),
                }
            }
            Doubt::Inconsistent => f.write_str(
                "QEMU was killed or crashed before it stored our bitmap in the image, so what was written is unknown",
            ),
            Doubt::NotKept => f.write_str(
                "the image does not have our bitmap: QEMU was killed before it had stored it, the image was put back to an \
                 older copy, or a program that knows no bitmaps wrote to it",
            ),
            Doubt::NotOnItsOwn(why) => write!(f, "our bitmap was in the image, and says nothing, since the image {why}"),
            Doubt::AnotherImage(how) => write!(f, "our bitmap was in an image that need not be the one it was: {how}"),
            Doubt::HostStarted => f.write_str(
                "the host was started anew since the last checkpoint, and what was written meanwhile is unknown",
            ),
            Doubt::EndNotSeen { then, now } => write!(
                f,
                "the virtual machine runs in another QEMU process (now {now}, then {then}), and what was written in between \
                 is unknown, since nobody took the last bitmap from the old one (livebackup run, or serve with \
                 shutdown = \"harvest\", does)"
            ),
            Doubt::NoStamp(why) => write!(
                f,
                "the virtual machine was started again, and whether anybody wrote in between cannot be told: the medium {why}"
            ),
            Doubt::NotCompared => f.write_str(
                "the virtual machine was started again, and its disk was not looked at before the guest could write",
            ),
            Doubt::MediumWritten(what) => {
                write!(
                    f,
                    "the disk was changed between two runs of the virtual machine, or before tracking was back: {what}"
                )
            }
            Doubt::Node { then, now } => write!(
                f,
                "the disk's top node is now {now:?} and was {then:?}: a snapshot, a copy or a commit changed its chain"
            ),
            Doubt::Medium(what) => write!(f, "the disk's medium was exchanged in the running virtual machine: {what}"),
            Doubt::Migrated(how) => write!(
                f,
                "the virtual machine was migrated, or that was tried ({how}), so another QEMU may have written to the disk"
            ),
            Doubt::Stopped => f.write_str("our bitmap in QEMU was switched off by somebody"),
            Doubt::Missing => f.write_str("our bitmap is gone from QEMU: somebody removed it"),
            Doubt::Shrunk => {
                f.write_str("the disk was made smaller and larger again, which loses what the bitmap knew")
            }
        }
    }
}

/// Why no backup is taken in a run state: another QEMU has the disks, or may have them the next moment.
pub fn elsewhere(run_state: &str) -> Option<String> {
    ["inmigrate", "finish-migrate", "postmigrate"].contains(&run_state).then(|| {
        format!(
            "the virtual machine is being migrated (QEMU is in the state {run_state:?}), and its disks are another QEMU's \
             now or soon: back it up where it runs"
        )
    })
}

/// Whether the epoch goes on, and by which proof; if not, why not.
pub fn decide(epoch: &Epoch, seen: &Seen<'_>) -> Result<Proof, Doubt> {
    if !RECORDING_STATES.contains(&seen.run_state) {
        return Err(Doubt::RunState(seen.run_state.to_owned()));
    }
    if let Some(why) = seen.shared {
        return Err(Doubt::Shared(why.to_owned()));
    }
    let same = epoch.qemu == *seen.qemu;
    let size = match epoch.size_bytes == seen.size_bytes {
        true => Ok(()),
        false => Err(Doubt::Size { then_bytes: epoch.size_bytes, now_bytes: seen.size_bytes }),
    };
    if !same {
        return between_processes(epoch, seen).and_then(|proof| size.map(|()| proof));
    }
    if epoch.node != seen.node {
        return Err(Doubt::Node { then: epoch.node.clone(), now: seen.node.to_owned() });
    }
    if let Some(then) = &epoch.medium
        && seen.medium.migration != then.migration
    {
        return Err(Doubt::Migrated(seen.medium.migration.clone().unwrap_or_else(|| "it is forgotten".to_owned())));
    }
    if let Some(difference) = epoch.medium.as_ref().and_then(|then| seen.medium.difference(then)) {
        return Err(Doubt::Medium(difference));
    }
    size?;
    recording(seen.bitmap)?;
    if !seen.sentinel {
        return Err(Doubt::Shrunk);
    }
    Ok(Proof::SameProcess)
}

/// The decision for another QEMU than the epoch's last.
fn between_processes(epoch: &Epoch, seen: &Seen<'_>) -> Result<Proof, Doubt> {
    match seen.bitmap {
        Recording::Stored => return stored(epoch, seen),
        Recording::Inconsistent => return Err(Doubt::Inconsistent),
        Recording::Missing if epoch.kept && epoch.closed.is_none() => return Err(Doubt::NotKept),
        _ => {}
    }
    if epoch.qemu.boot_id != seen.qemu.boot_id {
        return Err(Doubt::HostStarted);
    }
    let Some(closed) = &epoch.closed else {
        return Err(Doubt::EndNotSeen { then: epoch.qemu.pid, now: seen.qemu.pid });
    };
    if closed.stamp.is_none() && closed.device.is_none() {
        return Err(Doubt::NoStamp(closed.no_stamp.clone().unwrap_or_else(|| "has no stamp".to_owned())));
    }
    match seen.stamp {
        None => return Err(Doubt::NotCompared),
        Some(Err(difference)) => return Err(Doubt::MediumWritten(difference.clone())),
        Some(Ok(())) => {}
    }
    recording(seen.bitmap)?;
    Ok(Proof::Stamp)
}

/// The decision for a bitmap that the image has kept. Its name, with the random id of the epoch's last checkpoint, is looked
/// at already.
fn stored(epoch: &Epoch, seen: &Seen<'_>) -> Result<Proof, Doubt> {
    if let Some(why) = seen.cannot_keep {
        return Err(Doubt::NotOnItsOwn(why.to_owned()));
    }
    let same_boot = epoch.qemu.boot_id == seen.qemu.boot_id;
    let other = match &epoch.medium {
        Some(then) => seen.medium.is_another_image(then, same_boot),
        None => Some("which file it was then is not known".to_owned()),
    };
    match (other, seen.sentinel) {
        (Some(how), _) => Err(Doubt::AnotherImage(how)),
        (None, false) => Err(Doubt::Shrunk),
        (None, true) => Ok(Proof::Stored),
    }
}

fn recording(bitmap: Recording) -> Result<(), Doubt> {
    match bitmap {
        Recording::Unbroken | Recording::Stored => Ok(()),
        Recording::Stopped => Err(Doubt::Stopped),
        Recording::Inconsistent => Err(Doubt::Inconsistent),
        Recording::Missing => Err(Doubt::Missing),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Closed, DeviceCounters, DeviceStamp, FileNumbers, Layer, Stamp};
    use crate::units::{CheckpointId, EpochId};
    use proptest::prelude::*;

    fn instance(pid: i32, boot: &str) -> QemuInstance {
        QemuInstance { pid, start_time: 5, boot_id: boot.into() }
    }

    fn medium(inode: u64) -> Medium {
        let file = Some(FileNumbers { dev: 1, inode });
        let layer = Layer { format: "raw".into(), protocol: "file".into(), filename: "/a".into(), file };
        Medium { layers: vec![layer], ..Medium::default() }
    }

    fn epoch() -> Epoch {
        Epoch {
            id: EpochId::random(),
            started: jiff::Timestamp::UNIX_EPOCH,
            size_bytes: 1 << 20,
            qemu: instance(1, "a"),
            node: "disk0".into(),
            last: CheckpointId::random(),
            number: 3,
            medium: Some(medium(7)),
            closed: None,
            kept: false,
        }
    }

    const BITMAPS: [Recording; 5] =
        [Recording::Unbroken, Recording::Stored, Recording::Stopped, Recording::Inconsistent, Recording::Missing];
    const STATES: [&str; 8] =
        ["running", "paused", "prelaunch", "shutdown", "inmigrate", "postmigrate", "new", "internal-error"];

    /// 0: not closed, 1: closed without a stamp, 2: closed with one, 3: with one of a device.
    fn closed(kind: u8) -> Option<Closed> {
        let stamp = Stamp { options: None, files: vec![] };
        let (stamp, no_stamp) = if kind == 2 { (Some(stamp), None) } else { (None, Some("is an LV".to_owned())) };
        let device = (kind == 3).then(|| DeviceStamp {
            filename: "/dev/x".into(),
            number: 1,
            size_bytes: 1 << 20,
            counters: DeviceCounters { sequence: None, writes: [8, 0] },
            granules: vec![0],
            digest: String::new(),
        });
        (kind > 0).then_some(Closed { time: jiff::Timestamp::UNIX_EPOCH, stamp, device, no_stamp })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn an_epoch_goes_on_only_when_everything_speaks_for_it(
            pid in 1..3i32, boot in "[ab]", state in prop::sample::select(STATES.to_vec()),
            node in prop::sample::select(vec!["disk0", "overlay"]), size in prop::sample::select(vec![1u64 << 20, 1 << 21]),
            shared in prop::bool::weighted(0.2), sentinel in prop::bool::weighted(0.7),
            inode in prop::sample::select(vec![7, 7, 8]), bitmap in prop::sample::select(BITMAPS.to_vec()),
            end in 0..4u8, compared in 0..3u8, keeps in prop::bool::weighted(0.8), kept: bool,
            migrated in prop::bool::weighted(0.2),
        ) {
            let qemu = instance(pid, &boot);
            let medium = Medium { migration: migrated.then(|| "completed".to_owned()), ..medium(inode) };
            let stamp = match compared { 0 => None, 1 => Some(Err("x".to_owned())), _ => Some(Ok(())) };
            let seen = Seen {
                qemu: &qemu, run_state: state, node, size_bytes: size, shared: shared.then_some("x"), medium: &medium,
                bitmap, sentinel, cannot_keep: (!keeps).then_some("x"), stamp: stamp.as_ref(),
            };
            let mut epoch = epoch();
            epoch.closed = closed(end);
            epoch.kept = kept;
            let fine = matches!(state, "running" | "paused" | "prelaunch" | "shutdown") && !shared && size == 1 << 20;
            let same = pid == 1 && boot == "a";
            let expected = if same {
                let all = node == "disk0" && inode == 7 && sentinel && !migrated
                    && matches!(bitmap, Recording::Unbroken | Recording::Stored);
                (fine && all).then_some(Proof::SameProcess)
            } else if bitmap == Recording::Stored {
                let image = keeps && inode == 7;
                (fine && sentinel && image).then_some(Proof::Stored)
            } else {
                let all = boot == "a" && end >= 2 && compared == 2 && bitmap == Recording::Unbroken;
                (fine && all).then_some(Proof::Stamp)
            };
            let found = decide(&epoch, &seen);
            prop_assert_eq!(found.clone().ok(), expected);
            // Every doubt is a sentence that can be read on after "because".
            if let Err(doubt) = found {
                let words = doubt.to_string();
                prop_assert!(words.len() > 30 && !words.ends_with('.'), "{}", words);
            }
        }
    }

    #[test]
    fn an_epoch_from_before_media_were_noted_goes_on_in_its_process() {
        let qemu = instance(1, "a");
        let medium = medium(8);
        let seen = Seen {
            qemu: &qemu,
            run_state: "running",
            node: "disk0",
            size_bytes: 1 << 20,
            shared: None,
            medium: &medium,
            bitmap: Recording::Unbroken,
            sentinel: true,
            cannot_keep: None,
            stamp: None,
        };
        assert_eq!(decide(&Epoch { medium: None, ..epoch() }, &seen), Ok(Proof::SameProcess));
        assert!(matches!(decide(&epoch(), &seen), Err(Doubt::Medium(_))));
    }
}
