//! Which disks a backup takes.

use crate::machine::{Disk, FoundDisk, Verdict};
use crate::wire::message::{Begin, Failure, FailureCode};

/// The disks of a backup. Nothing is left out silently: a disk that cannot be protected is an error unless it is
/// excluded by name.
pub fn disks(found: &[FoundDisk], begin: &Begin) -> Result<Vec<Disk>, Failure> {
    let known = || {
        let names: Vec<_> = found.iter().map(|d| d.disk.name.as_str()).collect();
        if names.is_empty() { "it has none".to_owned() } else { format!("it has {}", names.join(", ")) }
    };
    for name in begin.include.iter().chain(&begin.exclude) {
        if !found.iter().any(|d| d.disk.name == *name) {
            return Err(Failure::new(
                FailureCode::UnknownDisk,
                format!("the virtual machine has no disk {name:?}; {}", known()),
            ));
        }
    }
    let mut taken = vec![];
    for FoundDisk { disk, verdict } in found {
        let named = begin.include.contains(&disk.name);
        if begin.exclude.contains(&disk.name) || (!begin.include.is_empty() && !named) {
            continue;
        }
        match verdict {
            Verdict::Protectable => taken.push(disk.clone()),
            Verdict::LeftOut(reason) if named => {
                return Err(Failure::new(
                    FailureCode::NotProtectable,
                    format!("disk {} cannot be taken: {reason}", disk.name),
                ));
            }
            Verdict::LeftOut(_) => {}
            Verdict::NotProtectable(reason) => {
                return Err(Failure::new(
                    FailureCode::NotProtectable,
                    format!("disk {} cannot be protected: {reason}", disk.name),
                ));
            }
        }
    }
    if taken.is_empty() {
        return Err(Failure::new(FailureCode::NotProtectable, format!("there is no disk to back up: {}", known())));
    }
    Ok(taken)
}
