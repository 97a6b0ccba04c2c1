//! DISK names: stable over restarts of the same machine, unique in it, and safe as file names.
//!
//! In order of preference: the device's id, the name of its backend (`virtio0`, or the id of a `-drive`), a node name
//! that its user gave, a name from the QOM path. A flash chip is `pflash0`, `pflash1`, whatever it is made of.

use std::collections::BTreeSet;

use crate::limits::MAX_NAME_BYTES;

/// Longest name that we give: leaves room for `.qcow2` and the suffix of a temporary file in a file name.
const LONGEST_BYTES: usize = 200;
/// What a longer one is cut to, before a digest of all of it.
const CUT_BYTES: usize = 160;
const _: () = assert!(LONGEST_BYTES + 32 < MAX_NAME_BYTES && CUT_BYTES + 1 + 16 < LONGEST_BYTES);

/// What a device offers to be called by.
#[derive(Default)]
pub(super) struct Candidates<'a> {
    /// Whether it is a flash chip.
    pub pflash: bool,
    /// Full QOM path; may be empty for a drive that no device uses.
    pub qom_path: &'a str,
    /// Name of the block backend, or empty.
    pub backend: &'a str,
    /// Name of the disk's own node, or empty.
    pub node: &'a str,
}

/// The id of the device that a QOM path belongs to, where its user gave one.
pub(super) fn device_id(qom_path: &str) -> Option<&str> {
    qom_path.strip_prefix("/machine/peripheral/")?.split('/').next().filter(|id| !id.is_empty())
}

/// Names for all devices, in their order. Better sources win where two would have the same name.
pub(super) fn assign(devices: &[Candidates]) -> Vec<String> {
    let wanted: Vec<_> = devices.iter().map(candidate).collect();
    let mut order: Vec<usize> = (0..devices.len()).collect();
    order.sort_by_key(|i| wanted[*i].0);
    let mut names = vec![String::new(); devices.len()];
    let mut taken = BTreeSet::new();
    for i in order {
        let base = safe(&wanted[i].1);
        let mut name = base.clone();
        let mut count = 1;
        // `~` is in no escaped name, so a numbered name meets only other numbered ones.
        while !taken.insert(name.clone()) {
            count += 1;
            name = format!("{base}~{count}");
        }
        names[i] = name;
    }
    names
}

/// Rank (lower is better) and text.
fn candidate(c: &Candidates) -> (u8, String) {
    if let Some(id) = device_id(c.qom_path) {
        return (0, id.to_owned());
    }
    if c.pflash {
        let chip = c.qom_path.rsplit('/').next().filter(|last| last.contains(".flash")).and_then(trailing_number);
        if let Some(number) = chip {
            return (1, format!("pflash{number}"));
        }
    }
    if !c.backend.is_empty() {
        return (2, c.backend.to_owned());
    }
    if !c.node.is_empty() && !c.node.starts_with('#') {
        return (3, c.node.to_owned());
    }
    let place = |rest: &str, word| {
        let first = rest.split('/').next().unwrap_or(rest);
        match trailing_number(first.trim_end_matches(']')) {
            Some(number) if first.starts_with("device[") => format!("{word}{number}"),
            _ => format!("{word}-{first}"),
        }
    };
    let text = if let Some(rest) = c.qom_path.strip_prefix("/machine/peripheral-anon/") {
        place(rest, "anon")
    } else if let Some(rest) = c.qom_path.strip_prefix("/machine/unattached/") {
        place(rest, "builtin")
    } else {
        c.qom_path.rsplit('/').find(|part| !part.is_empty()).unwrap_or("disk").to_owned()
    };
    (4, text)
}

fn trailing_number(text: &str) -> Option<&str> {
    let digits = text.len() - text.bytes().rev().take_while(u8::is_ascii_digit).count();
    text.get(digits..).filter(|d| !d.is_empty() && d.len() < 10)
}

/// A name that is safe as the first part of a file name, as a command line argument and in `DISK=TARGET`: letters,
/// digits, `_`, `.` and `-`, the last two not in front; every other byte becomes `%XX`. What is too long is cut, and ends
/// in a digest of the whole.
pub(super) fn safe(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for (i, byte) in text.bytes().enumerate() {
        match byte {
            b'.' | b'-' if i > 0 => out.push(byte.into()),
            b'_' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => out.push(byte.into()),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    if out.is_empty() {
        return "disk".to_owned();
    }
    if out.len() > LONGEST_BYTES {
        out.truncate(CUT_BYTES);
        out.push('-');
        out.push_str(&blake3::hash(text.as_bytes()).to_hex()[..16]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn device<'a>(qom_path: &'a str, backend: &'a str, node: &'a str) -> Candidates<'a> {
        Candidates { pflash: qom_path.contains("flash"), qom_path, backend, node }
    }

    #[test]
    fn the_best_source_names_it() {
        let names = assign(&[
            device("/machine/peripheral/vd0/virtio-backend", "drive0", "disk0"),
            device("/machine/peripheral-anon/device[0]/virtio-backend", "virtio0", "#block173"),
            device("/machine/peripheral-anon/device[1]", "", "sys"),
            device("/machine/peripheral-anon/device[12]/scsi.0/legacy[0]", "", "#block1"),
            device("/machine/unattached/device[4]", "", ""),
            device("/machine/system.flash1", "", "vars"),
            device("/machine/virt.flash0", "pflash7", ""),
        ]);
        assert_eq!(names, ["vd0", "virtio0", "sys", "anon12", "builtin4", "pflash1", "pflash0"]);
    }

    #[test]
    fn two_of_a_name_are_told_apart_and_the_id_wins() {
        let names = assign(&[
            device("/machine/peripheral-anon/device[0]", "vd0", ""),
            device("/machine/peripheral-anon/device[1]", "", "vd0"),
            device("/machine/peripheral/vd0", "", ""),
        ]);
        assert_eq!(names, ["vd0~2", "vd0~3", "vd0"]);
    }

    proptest! {
        #[test]
        fn names_are_file_names(text in any::<String>(), long in 0usize..400) {
            let text = text.repeat(1 + long / 10);
            let name = safe(&text);
            prop_assert!(!name.is_empty() && name.len() <= LONGEST_BYTES);
            prop_assert!(!name.starts_with(['.', '-', '~']));
            prop_assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b"%_.-".contains(&b)));
        }

        #[test]
        fn different_names_stay_different(a in "[a%A./~ -]{1,9}", b in "[a%A./~ -]{1,9}") {
            prop_assert_eq!(a == b, safe(&a) == safe(&b));
        }
    }
}
