//! Values of options: sizes, compression, levels.

use crate::backup::LevelChoice;
use crate::grade::Policy;
use crate::repo::Compression;
use crate::units::{GIB, KIB, MIB};
use crate::wire::rate::MIN_RATE;

/// A byte count: `65536`, `64K`, `64KiB`, `1M`, `2G`, `1T`.
pub fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let number: u64 = digits.parse().map_err(|_| "a size is a number with K, M, G or T, like 64K".to_owned())?;
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => KIB,
        "m" | "mib" => MIB,
        "g" | "gib" => GIB,
        "t" | "tib" => 1024 * GIB,
        _ => return Err("a size is a number with K, M, G or T (powers of 1024), like 64K".to_owned()),
    };
    number.checked_mul(unit).ok_or_else(|| "this size is too large".to_owned())
}

/// Bytes a second, 1 MiB at least.
pub fn read_rate(text: &str) -> Result<u64, String> {
    size(text).and_then(|rate| if rate < MIB { Err("1M is the slowest".to_owned()) } else { Ok(rate) })
}

/// Bytes a second.
pub fn rate(text: &str) -> Result<u64, String> {
    match size(text)? {
        slow if slow < MIN_RATE => Err("a rate is at least 64K a second".to_owned()),
        rate => Ok(rate),
    }
}

/// `none`, `zstd` or `zstd:LEVEL`.
pub fn compression(text: &str) -> Result<Compression, String> {
    let wrong = || "compression is none, zstd or zstd:LEVEL with a level from 1 to 19".to_owned();
    match text.split_once(':') {
        None if text == "none" => Ok(Compression::None),
        None if text == "zstd" => Ok(Compression::Zstd(1)),
        Some(("zstd", level)) => match level.parse() {
            Ok(level) if (1..=19).contains(&level) => Ok(Compression::Zstd(level)),
            _ => Err(wrong()),
        },
        _ => Err(wrong()),
    }
}

/// `require`, `prefer` or `never`.
pub fn policy(text: &str) -> Result<Policy, String> {
    match text {
        "require" => Ok(Policy::Require),
        "prefer" => Ok(Policy::Prefer),
        "never" => Ok(Policy::Never),
        _ => Err("it is require, prefer or never".to_owned()),
    }
}

/// A share in percent, to a tenth; in thousandths.
pub fn percent(text: &str) -> Result<u32, String> {
    let number = text.trim_end_matches('%');
    let (whole, tenths) = number.split_once('.').unwrap_or((number, "0"));
    match (whole.parse::<u32>(), tenths.parse::<u32>(), tenths.len()) {
        (Ok(whole @ 0..=100), Ok(tenths @ 0..=9), 1) if whole * 10 + tenths <= 1000 => Ok(whole * 10 + tenths),
        _ => Err("a share is 0 to 100 percent, to a tenth".to_owned()),
    }
}

/// The level of a backup.
pub fn level(text: &str) -> Result<LevelChoice, String> {
    text.parse()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [("0", 0), ("65536", 65536), ("64K", 65536), ("1MiB", MIB), ("2g", 2 * GIB)] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "K", "1X", "-1", "1.5G", "16777216T", "1é"] {
            assert!(size(bad).is_err(), "{bad:?}");
        }
        assert!(rate("20MiB") == Ok(20 * MIB) && rate("63K").is_err());
    }

    #[test]
    fn shares() {
        for (text, permille) in [("0", 0), ("1", 10), ("0.5%", 5), ("100", 1000), ("12.5", 125)] {
            assert_eq!(percent(text), Ok(permille), "{text}");
        }
        for bad in ["", "%", "-1", "101", "100.1", "1.25", "1.", ".5", "4294967295"] {
            assert!(percent(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn compressions() {
        assert_eq!(compression("none"), Ok(Compression::None));
        assert_eq!(compression("zstd"), Ok(Compression::Zstd(1)));
        assert_eq!(compression("zstd:19"), Ok(Compression::Zstd(19)));
        for bad in ["", "zstd:", "zstd:0", "zstd:20", "gzip", "none:1"] {
            assert!(compression(bad).is_err(), "{bad:?}");
        }
    }
}
