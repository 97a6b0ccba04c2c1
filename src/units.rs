//! Identifiers and byte units.
//!
//! Ids are random 128-bit numbers: they need no coordination, survive clones of state directories and machines without
//! colliding, and mean nothing by themselves. In text they are 32 lower-case hexadecimal digits.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// 2¹⁰ bytes.
pub const KIB: u64 = 1 << 10;
/// 2²⁰ bytes.
pub const MIB: u64 = 1 << 20;
/// 2³⁰ bytes.
pub const GIB: u64 = 1 << 30;

/// Granule: the unit of every dirty bitmap, and the cluster of QEMU's copy-before-write filter (its floor).
pub const GRANULE_BYTES: u64 = 64 * KIB;

/// A text that is not 32 lower-case hexadecimal digits.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("an id is 32 hexadecimal digits, not {0:?}")]
pub struct BadId(String);

fn parse_hex16(text: &str) -> Option<[u8; 16]> {
    if text.len() != 32 || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    let mut out = [0; 16];
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(out)
}

macro_rules! id {
    ($(#[$doc:meta] $name:ident),+ $(,)?) => {$(
        #[$doc]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 16]);

        impl $name {
            /// A new id from the system's random source.
            #[allow(clippy::new_without_default)]
            pub fn random() -> Self {
                let mut bytes = [0; 16];
                getrandom::fill(&mut bytes).expect("the system's random source works");
                Self(bytes)
            }

            /// The id made of these bytes.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// The bytes of the id.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }

            /// The first eight digits: for people, and for names inside QEMU.
            pub fn short(&self) -> String {
                self.to_string()[..8].to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{self}")
            }
        }

        impl FromStr for $name {
            type Err = BadId;
            fn from_str(text: &str) -> Result<Self, BadId> {
                parse_hex16(text).map(Self).ok_or_else(|| BadId(text.chars().take(64).collect()))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = String::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )+};
}

id! {
    /// Names a checkpoint: an instant of one disk's tracking.
    CheckpointId,
    /// Names an epoch: an unbroken run of checkpoints of one disk's medium.
    EpochId,
    /// Names a restore point.
    PointId,
    /// Names a repository.
    RepositoryId,
    /// Names a state directory; part of every name that we use inside QEMU.
    OwnerId,
    /// Names a pack file of a repository.
    PackId,
    /// Names a session, to who began it.
    SessionId,
}

/// A byte count for people: `17 B`, `1.5 GiB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < KIB {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_text_and_refuse_anything_else() {
        let id = PointId::random();
        assert_eq!(id.to_string().parse::<PointId>().unwrap(), id);
        assert_eq!(serde_json::from_str::<PointId>(&serde_json::to_string(&id).unwrap()).unwrap(), id);
        for bad in ["", "00", &"g".repeat(32), &"A".repeat(32), &"0".repeat(33), "é0000000000000000000000000000000"] {
            assert!(bad.parse::<PointId>().is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn bytes_for_people() {
        assert_eq!(human_bytes(17), "17 B");
        assert_eq!(human_bytes(1536 * MIB), "1.5 GiB");
        assert_eq!(human_bytes(GIB - 1), "1.0 GiB");
        assert_eq!(human_bytes(u64::MAX), "16.0 EiB");
    }
}
