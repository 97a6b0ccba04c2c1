//! Evidence: whether an epoch goes on. A pure decision; every doubt ends the epoch, with a sentence for the operator.
//!
//! Today an epoch lives as long as one QEMU process: our bitmap is in its memory, and what it saw is all there was.
//! Carrying an epoch from one process to the next needs other proof, and finds its place here.

use crate::checkpoint::{Epoch, QemuInstance};
use crate::units::human_bytes;

/// Run states in which every write passes QEMU's block layer and so our bitmap.
const RECORDING_STATES: [&str; 8] =
    ["running", "paused", "prelaunch", "io-error", "suspended", "watchdog", "guest-panicked", "debug"];

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
    /// The bitmap that records since the epoch's last checkpoint.
    pub bitmap: Recording,
    /// Whether the sentinel is there with its bit.
    pub sentinel: bool,
}

/// State of the bitmap that records since the last checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recording {
    /// It is there and records, or what came after it does: a sidecar died between two checkpoints.
    Unbroken,
    /// It is there and does not record, and nothing took over from it.
    Stopped,
    /// It is not there.
    Missing,
}

/// Whether the epoch goes on; if not, why not.
pub fn decide(epoch: &Epoch, seen: &Seen<'_>) -> Result<(), String> {
    if epoch.qemu.boot_id != seen.qemu.boot_id {
        return Err(
            "the host was started anew since the last checkpoint, and what was written meanwhile is unknown".into()
        );
    }
    if epoch.qemu != *seen.qemu {
        return Err(format!(
            "the virtual machine runs in another QEMU process (now {}, then {}), and what was written in between is unknown",
            seen.qemu.pid, epoch.qemu.pid
        ));
    }
    if !RECORDING_STATES.contains(&seen.run_state) {
        return Err(format!("QEMU is in the state {:?}, in which writes may pass our bitmap by", seen.run_state));
    }
    if let Some(why) = seen.shared {
        return Err(format!("the medium is shared, so others may write to it unseen: {why}"));
    }
    if epoch.node != seen.node {
        return Err(format!(
            "the disk's top node is now {:?} and was {:?}: a snapshot, a copy or a commit changed its chain",
            seen.node, epoch.node
        ));
    }
    if epoch.size_bytes != seen.size_bytes {
        return Err(format!(
            "the disk's size changed from {} to {}",
            human_bytes(epoch.size_bytes),
            human_bytes(seen.size_bytes)
        ));
    }
    match seen.bitmap {
        Recording::Unbroken => {}
        Recording::Stopped => return Err("our bitmap in QEMU was switched off by somebody".into()),
        Recording::Missing => return Err("our bitmap is gone from QEMU: somebody removed it".into()),
    }
    if !seen.sentinel {
        return Err("the disk was made smaller and larger again, which loses what the bitmap knew".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{CheckpointId, EpochId};
    use proptest::prelude::*;

    fn instance(pid: i32, boot: &str) -> QemuInstance {
        QemuInstance { pid, start_time: 5, boot_id: boot.into() }
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
        }
    }

    proptest! {
        #[test]
        fn an_epoch_goes_on_only_when_everything_speaks_for_it(
            pid in 1..3i32, boot in "[ab]", state in prop::sample::select(vec!["running", "paused", "inmigrate", "postmigrate", "new"]),
            node in prop::sample::select(vec!["disk0", "overlay"]), size in prop::sample::select(vec![1u64 << 20, 1 << 21]),
            shared in any::<bool>(), sentinel in any::<bool>(),
            bitmap in prop::sample::select(vec![Recording::Unbroken, Recording::Stopped, Recording::Missing]),
        ) {
            let qemu = instance(pid, &boot);
            let shared = shared.then_some("x");
            let seen = Seen { qemu: &qemu, run_state: state, node, size_bytes: size, shared, bitmap, sentinel };
            let all = pid == 1 && boot == "a" && matches!(state, "running" | "paused") && node == "disk0"
                && size == 1 << 20 && shared.is_none() && sentinel && bitmap == Recording::Unbroken;
            prop_assert_eq!(decide(&epoch(), &seen).is_ok(), all);
        }
    }
}
