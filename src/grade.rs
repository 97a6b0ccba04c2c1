//! The grade of a restore point, and the evidence that it rests on: carried over the wire and kept in every manifest.
//!
//! | grade | what was reached |
//! |---|---|
//! | crash | as after a power failure: all disks of one instant, and no more |
//! | filesystem | the guest's file systems were frozen over the whole instant |
//! | application | and every hold that is configured held over it |
//!
//! The grade is computed from the evidence, never set: what was not proven does not count.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// In which state the guest's data was at the instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grade {
    /// As after a power failure.
    Crash,
    /// The guest's file systems were frozen.
    Filesystem,
    /// Its databases were quiet, too.
    Application,
}

impl Grade {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Crash => "crash",
            Self::Filesystem => "filesystem",
            Self::Application => "application",
        }
    }
}

/// What to do about something that makes a backup better and can fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Do it, or make no backup.
    Require,
    /// Do it if possible, else say why not, with the lower grade.
    #[default]
    Prefer,
    /// Do not even try.
    Never,
}

/// File systems that were frozen over the instant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// How many.
    pub file_systems: u64,
    /// Only these mount points; all when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mount_points: Vec<String>,
    /// From asking for the freeze to the answer to the thaw, in microseconds: never less than the guest waited.
    pub frozen_us: u64,
}

/// File systems that told their disks what is free, before a disk was read whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trimmed {
    /// How many.
    pub file_systems: u64,
    /// How long it took, in microseconds.
    pub took_us: u64,
    /// Why it was not done, if it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

/// What became of a hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The hold's name.
    pub name: String,
    /// Why it did not hold over the instant, if it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// From its start to the word that it holds, in microseconds.
    pub ready_us: u64,
    /// From that word until it had let go, in microseconds.
    pub held_us: u64,
    /// What the database said of itself: `wal_lsn`, `gtid_binlog_pos`, …
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub positions: BTreeMap<String, String>,
}

/// A file system of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFileSystem {
    /// Where it is mounted.
    pub mount_point: String,
    /// `ext4`, `NTFS`, …
    pub kind: String,
    /// What it lies on, as the guest calls it: `vda1`.
    pub device: String,
    /// The disks that it lies on: the VM's names of those that could be told, else the guest's.
    pub disks: Vec<String>,
}

/// What the agent said of the guest; empty where it said nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// The agent's version.
    pub agent_version: String,
    /// The operating system, for people.
    #[serde(default)]
    pub os: String,
    /// Its kernel.
    #[serde(default)]
    pub kernel: String,
    /// The host name.
    #[serde(default)]
    pub host_name: String,
    /// The mounted file systems.
    #[serde(default)]
    pub file_systems: Vec<GuestFileSystem>,
}

/// What a grade rests on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// How long the guest was stopped for the instant, in microseconds.
    #[serde(default)]
    pub stopped_us: u64,
    /// What was frozen over the whole instant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<Frozen>,
    /// What was trimmed, if that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trimmed: Option<Trimmed>,
    /// The holds that are configured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub holds: Vec<Held>,
    /// Why the grade is no better, in sentences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
    /// What the agent said of the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<Guest>,
    /// What a later version wrote.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

impl Evidence {
    /// The grade that was reached.
    pub fn grade(&self) -> Grade {
        let held = !self.holds.is_empty() && self.holds.iter().all(|hold| hold.failed.is_none());
        match &self.frozen {
            None => Grade::Crash,
            Some(frozen) if !frozen.mount_points.is_empty() && !self.covers(&frozen.mount_points) => Grade::Crash,
            Some(_) if held => Grade::Application,
            Some(_) => Grade::Filesystem,
        }
    }

    /// Whether these mount points are all that lie on disks, as far as the agent said what there is.
    fn covers(&self, mount_points: &[String]) -> bool {
        let known = self.guest.as_ref().map(|guest| &guest.file_systems);
        known.is_some_and(|all| {
            !all.is_empty() && all.iter().filter(|f| !f.disks.is_empty()).all(|f| mount_points.contains(&f.mount_point))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_grade_needs_all_below_it(
            frozen in any::<bool>(), named in any::<bool>(), covered in any::<bool>(),
            holds in prop::collection::vec(any::<bool>(), 0..3),
        ) {
            let file_system = |at: &str| GuestFileSystem {
                mount_point: at.into(), disks: vec!["vd0".into()], ..GuestFileSystem::default()
            };
            let evidence = Evidence {
                frozen: frozen.then(|| Frozen {
                    mount_points: if named { vec!["/a".into()] } else { vec![] }, ..Frozen::default()
                }),
                holds: holds.iter().map(|h| Held { failed: (!h).then(String::new), ..Held::default() }).collect(),
                guest: Some(Guest {
                    file_systems: if covered { vec![file_system("/a")] } else { vec![file_system("/a"), file_system("/b")] },
                    ..Guest::default()
                }),
                ..Evidence::default()
            };
            let quiet = frozen && (!named || covered);
            let expected = match (quiet, !holds.is_empty() && holds.iter().all(|h| *h)) {
                (false, _) => Grade::Crash,
                (true, false) => Grade::Filesystem,
                (true, true) => Grade::Application,
            };
            prop_assert_eq!(evidence.grade(), expected);
            let text = serde_json::to_string(&evidence).unwrap();
            prop_assert_eq!(serde_json::from_str::<Evidence>(&text).unwrap(), evidence);
        }
    }

    #[test]
    fn what_others_wrote_is_kept() {
        let old: Evidence = serde_json::from_str("{\"stopped_us\":7,\"moon\":\"full\"}").unwrap();
        assert_eq!((old.stopped_us, old.grade()), (7, Grade::Crash));
        assert!(serde_json::to_string(&old).unwrap().contains("moon"));
        assert_eq!(serde_json::from_str::<Evidence>("{}").unwrap(), Evidence::default());
    }
}
