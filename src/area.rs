//! Areas: parts of a disk that are left out of a backup, because the operator said so: swap, or areas that are named.
//!
//! ```text
//! swap                       swap partitions, and disks that are swap, by partition table and signature
//! DISK=swap                  the same of one disk
//! DISK=2                     a partition, by its number
//! DISK=label:NAME            by its name in a GPT
//! DISK=partuuid:UUID         by its PARTUUID
//! DISK=bytes:FROM-TO         bytes, the last one not included; each a number, or one with K, M, G, T (KiB, MiB, …)
//! ```
//!
//! What is left out are the whole chunks inside an area; of swap all but the first page, which has its UUID and label, so that a
//! restored machine finds it. In the restore point they are zero. Where an area is, is decided at the instant, from the
//! disk as it is there; what is not certain is not left out, and it is said why.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::extent::Extent;
use crate::units::{GIB, KIB, MIB};

/// Most areas of a disk: those of as many disks as can be fit in one request.
pub const MAX_AREAS: usize = 16;
/// Most places of a disk that are looked at to find them.
pub const MAX_SEEN: usize = 256;

/// What is to be left out of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// All swap.
    Swap,
    /// The partition with this number.
    Partition(u32),
    /// The partition with this name.
    Label(String),
    /// The partition with this PARTUUID, in lower case.
    PartUuid(String),
    /// These bytes.
    Bytes(Extent),
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Swap => f.write_str("swap"),
            Self::Partition(number) => write!(f, "{number}"),
            Self::Label(label) => write!(f, "label:{label}"),
            Self::PartUuid(uuid) => write!(f, "partuuid:{uuid}"),
            Self::Bytes(extent) => write!(f, "bytes:{}-{}", extent.offset_bytes, extent.end()),
        }
    }
}

/// One setting.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Skip {
    /// Which disk; all when absent.
    pub disk: Option<String>,
    /// What of it.
    pub what: Wanted,
}

impl Skip {
    /// Swap of all disks.
    pub const SWAP: Self = Self { disk: None, what: Wanted::Swap };

    /// Whether it is for this disk.
    pub fn is_for(&self, disk: &str) -> bool {
        self.disk.as_deref().is_none_or(|name| name == disk)
    }
}

impl TryFrom<String> for Skip {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for Skip {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "swap" {
            return Ok(Self::SWAP);
        }
        let wrong = || {
            format!(
                "{text:?} names no area: write swap, or DISK= and swap, a partition's number, label:NAME, partuuid:UUID, or bytes:FROM-TO"
            )
        };
        let (disk, area) = text.split_once('=').filter(|(disk, _)| !disk.is_empty()).ok_or_else(wrong)?;
        let what = match area.split_once(':') {
            None if area == "swap" => Wanted::Swap,
            None => Wanted::Partition(area.parse().ok().filter(|number| *number > 0).ok_or_else(wrong)?),
            Some(("label", label)) if !label.is_empty() => Wanted::Label(label.to_owned()),
            Some(("partuuid", uuid)) if !uuid.is_empty() => Wanted::PartUuid(uuid.to_lowercase()),
            Some(("bytes", range)) => {
                let (from, to) = range.split_once('-').ok_or_else(wrong)?;
                match (number(from), number(to)) {
                    (Some(from), Some(to)) if from < to => Wanted::Bytes(Extent::between(from, to)),
                    _ => {
                        return Err(format!(
                            "{range:?} of {text:?} are no bytes: write FROM-TO, FROM below TO, each a number or one with K, M, \
                             G or T (powers of 1024), like bytes:10G-20G"
                        ));
                    }
                }
            }
            Some(_) => return Err(wrong()),
        };
        Ok(Self { disk: Some(disk.to_owned()), what })
    }
}

/// `4096`, `20 GiB`.
fn number(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match text[digits.len()..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => KIB,
        "m" | "mib" => MIB,
        "g" | "gib" => GIB,
        "t" | "tib" => 1024 * GIB,
        _ => return None,
    };
    digits.trim().parse::<u64>().ok()?.checked_mul(unit)
}

/// An area that was left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Area {
    /// What it is: `swap`, or as the setting names it.
    pub what: String,
    /// What is known of it: which partition, its label and UUID.
    pub found: String,
    /// Where it is.
    pub extent: Extent,
    /// The whole chunks of it that were not read, and are zero in the point.
    pub left_out: Extent,
}

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}), {}", self.what, self.found, crate::units::human_bytes(self.left_out.len_bytes))
    }
}

/// What was left out of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Areas {
    /// The areas, none over another.
    pub areas: Vec<Area>,
    /// Where was looked for them: a later backup looks there again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub seen: Vec<Extent>,
    /// What of the setting was not left out, and why, in sentences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept: Vec<String>,
}

impl Areas {
    /// Whether nothing is to be said.
    pub fn is_empty(&self) -> bool {
        self.areas.is_empty() && self.seen.is_empty() && self.kept.is_empty()
    }

    /// The bytes that were left out, in order.
    pub fn left_out(&self) -> impl Iterator<Item = Extent> + '_ {
        self.areas.iter().map(|area| area.left_out)
    }

    /// How many bytes were left out.
    pub fn left_out_bytes(&self) -> u64 {
        self.left_out().map(|extent| extent.len_bytes).fold(0, u64::saturating_add)
    }

    /// How many bytes of an extent were left out.
    pub fn share_bytes(&self, extent: Extent) -> u64 {
        self.left_out().filter_map(|out| out.shared(extent)).map(|both| both.len_bytes).sum()
    }

    /// What cannot be, if anything: from a peer or a file.
    pub fn wrong(&self, size_bytes: u64) -> Option<String> {
        if self.areas.len() > MAX_AREAS || self.seen.len() > MAX_SEEN || self.kept.len() > MAX_AREAS {
            return Some(format!("{} areas that were left out", self.areas.len()));
        }
        let mut at = 0;
        for area in &self.areas {
            if !area.left_out.fits(size_bytes) || area.left_out.offset_bytes < at {
                return Some(format!("{} as an area that was left out", area.left_out));
            }
            at = area.left_out.end();
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings() {
        for text in ["swap", "vd0=swap", "vd0=3", "vd0=label:a b", "vd0=partuuid:12ab-01", "vd0=bytes:65536-131072"] {
            let skip: Skip = text.parse().unwrap();
            let disk = skip.disk.as_ref().map(|disk| format!("{disk}=")).unwrap_or_default();
            assert_eq!(format!("{disk}{}", skip.what), text);
            assert_eq!((skip.is_for("vd0"), skip.is_for("vd1")), (true, skip.disk.is_none()));
        }
        let range: Skip = "vd0=bytes:1 MiB-2GiB".parse().unwrap();
        assert_eq!(range.what, Wanted::Bytes(Extent::between(1 << 20, 2 << 30)));
        let range: Skip = "vd0=bytes:64k-1M".parse().unwrap();
        assert_eq!(range.what, Wanted::Bytes(Extent::between(64 << 10, 1 << 20)));
        for wrong in
            ["", "vd0", "vd0=", "=3", "vd0=0", "vd0=-1", "vd0=label:", "vd0=uuid:x", "vd0:bytes:0-1M", "vd0=bytes:7"]
        {
            assert!(wrong.parse::<Skip>().unwrap_err().contains("label:NAME"), "{wrong}");
        }
        for wrong in ["2-1", "1-2 EiB", "16777216 TiB-16777217 TiB", "0-1.5M", "0-", "-1M"] {
            let error = format!("vd0=bytes:{wrong}").parse::<Skip>().unwrap_err();
            assert!(error.contains(wrong) && error.contains("bytes:10G-20G"), "{error}");
        }
    }

    #[test]
    fn impossible_areas_are_told() {
        let area = |offset, len| Area {
            what: "swap".into(),
            found: String::new(),
            extent: Extent::new(0, 1),
            left_out: Extent { offset_bytes: offset, len_bytes: len },
        };
        let areas =
            |list: &[(u64, u64)]| Areas { areas: list.iter().map(|(o, l)| area(*o, *l)).collect(), ..Areas::default() };
        assert_eq!(areas(&[(0, 4), (4, 4), (12, 4)]).wrong(16), None);
        assert_eq!(areas(&[(0, 4), (4, 4), (12, 4)]).share_bytes(Extent::between(2, 13)), 7);
        for list in [&[(0, 4), (3, 4)][..], &[(12, 5)], &[(u64::MAX, 2)], &[(8, 4), (0, 4)], &[(0, 0); MAX_AREAS + 1]] {
            assert!(areas(list).wrong(16).is_some(), "{list:?}");
        }
    }
}
