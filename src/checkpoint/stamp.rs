//! What an epoch knows of the medium itself: which files a disk was made of, and how they stood when QEMU had ended.
//!
//! Only the data and its comparison; looking at files is the sidecar's (`vm::medium`). All of it is stored in
//! `epoch.json`, in optional members: a log that was written before there were stamps opens as before.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Which file it is: numbers, not names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileNumbers {
    /// Device of the file system; 0 for a block device.
    pub dev: u64,
    /// Inode; for a block device its device number.
    pub inode: u64,
}

/// One file or device of a disk's chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Format driver: `raw`, `qcow2`, …
    pub format: String,
    /// Protocol driver: `file`, `host_device`, `nbd`, …
    pub protocol: String,
    /// Its name as QEMU prints it.
    pub filename: String,
    /// Which file QEMU has open there, if that could be seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<FileNumbers>,
}

/// What a disk is made of, the guest-visible layer first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Medium {
    /// What the root node calls itself, if it has more to say than a path: `json:{…}` with an offset, for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub options: Option<String>,
    /// The layers.
    pub layers: Vec<Layer>,
    /// How the last migration of this QEMU's virtual machine ended, in its words and times, if there was one: after it
    /// another QEMU may have had the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<String>,
}

impl Medium {
    /// How this one, seen later in the same QEMU, differs from what was seen before; nothing where it does not. Numbers
    /// that could not be seen on one side prove nothing either way.
    pub fn difference(&self, before: &Medium) -> Option<String> {
        let names = |medium: &Medium| medium.layers.iter().map(|l| l.filename.clone()).collect::<Vec<_>>().join(" on ");
        let same = |a: &Layer, b: &Layer| {
            let numbers = a.file.zip(b.file).is_none_or(|(a, b)| a == b);
            numbers && (&a.format, &a.protocol, &a.filename) == (&b.format, &b.protocol, &b.filename)
        };
        let all = self.layers.len() == before.layers.len()
            && self.options == before.options
            && self.layers.iter().zip(&before.layers).all(|(a, b)| same(a, b));
        if all {
            return None;
        }
        let (now, then) = (names(self), names(before));
        Some(match now == then {
            true => format!("the disk's node has {now} open, but not the same file or not in the same way as before"),
            false => format!("the disk's node now has {now} open and had {then}"),
        })
    }
}

impl Medium {
    /// Why this one, seen in another QEMU, is not the one image that it was, or stands on others; nothing where it is. Device
    /// numbers, and all numbers of block devices, may change when the host starts anew (`same_boot` false).
    pub fn is_another_image(&self, before: &Medium, same_boot: bool) -> Option<String> {
        let ([now], [then]) = (&self.layers[..], &before.layers[..]) else {
            return Some("the disk is, or was, put together from several files".to_owned());
        };
        let name = &now.filename;
        if now.format != then.format || self.options != before.options {
            return Some(format!("{name} is opened in another way than before"));
        }
        let same = match (now.file, then.file) {
            (Some(now), Some(then)) if same_boot => now == then,
            (Some(now), Some(then)) if now.dev != 0 && then.dev != 0 => now.inode == then.inode,
            _ => true,
        };
        (!same).then(|| format!("{name} is another file than before: it was replaced, restored or copied"))
    }
}

/// How one file stood.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStamp {
    /// Format driver of the layer that it holds.
    pub format: String,
    /// Its name then: for the operator.
    pub filename: String,
    /// Which file.
    pub file: FileNumbers,
    /// Its length.
    pub size_bytes: u64,
    /// Time of its last write, nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Time of its last change of any kind.
    pub ctime_ns: i64,
}

/// How all files of a disk's chain stood at one time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// As [`Medium::options`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub options: Option<String>,
    /// The files, the guest-visible layer first.
    pub files: Vec<FileStamp>,
}

impl Stamp {
    /// What happened to the medium between `before` and this stamp; nothing if nothing did.
    pub fn difference(&self, before: &Stamp) -> Option<String> {
        if self.files.len() != before.files.len() || self.options != before.options {
            return Some("the disk is put together from other files than before".to_owned());
        }
        self.files.iter().zip(&before.files).find_map(|(now, then)| {
            let name = &now.filename;
            if now.file != then.file {
                Some(format!("{name} is another file than before: it was replaced, restored or copied"))
            } else if now.format != then.format {
                Some(format!("{name} is opened as {} and was opened as {}", now.format, then.format))
            } else if (now.size_bytes, now.mtime_ns) != (then.size_bytes, then.mtime_ns) {
                Some(format!("{name} was written to"))
            } else if now.ctime_ns != then.ctime_ns {
                Some(format!("{name} was changed (its owner, its mode, or its content with the time set back)"))
            } else {
                None
            }
        })
    }
}

/// What the host counts of a block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceCounters {
    /// A number that no other device of this boot has had (`diskseq`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// Sectors of 512 bytes that were written, and that were discarded.
    pub writes: [u64; 2],
}

/// How a block device stood.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStamp {
    /// Its name then: for the operator.
    pub filename: String,
    /// Its device number.
    pub number: u64,
    /// Its length.
    pub size_bytes: u64,
    /// The host's counters.
    pub counters: DeviceCounters,
    /// Granules of 64 KiB that the digest is of, by their numbers.
    pub granules: Vec<u64>,
    /// BLAKE3, in hexadecimal digits: of each granule its number (u64, little-endian) and its bytes.
    pub digest: String,
}

/// How an epoch's last QEMU ended with nothing unseen: the last bitmap was sealed after the guest had stopped, nothing was
/// written from then on, and QEMU exited.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closed {
    /// When QEMU had exited.
    pub time: Timestamp,
    /// How the medium stood then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stamp: Option<Stamp>,
    /// How the device stood then, if the medium is one that nobody else writes to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceStamp>,
    /// Why there is no stamp.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_stamp: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp() -> Stamp {
        let file = |inode| FileStamp {
            format: "qcow2".into(),
            filename: format!("/f{inode}"),
            file: FileNumbers { dev: 1, inode },
            size_bytes: 4096,
            mtime_ns: 5,
            ctime_ns: 6,
        };
        Stamp { options: None, files: vec![file(1), file(2)] }
    }

    #[test]
    fn a_stamp_differs_by_each_of_its_parts() {
        assert_eq!(stamp().difference(&stamp()), None);
        type Change = fn(&mut FileStamp);
        let changes: [(Change, &str); 6] = [
            (|f| f.file.inode += 9, "another file"),
            (|f| f.file.dev += 9, "another file"),
            (|f| f.format = "raw".into(), "opened as raw"),
            (|f| f.size_bytes += 1, "written to"),
            (|f| f.mtime_ns += 1, "written to"),
            (|f| f.ctime_ns -= 1, "was changed"),
        ];
        for (change, says) in changes {
            for layer in 0..2 {
                let mut now = stamp();
                change(&mut now.files[layer]);
                let said = now.difference(&stamp()).unwrap();
                assert!(said.contains(says) && said.contains(&format!("/f{}", layer + 1)), "{said}");
            }
        }
        let mut other = stamp();
        other.files[0].filename = "/by/another/path".into();
        assert_eq!(other.difference(&stamp()), None, "a path may change, the file is the same");
        other.files.pop();
        assert!(other.difference(&stamp()).is_some());
        assert!(Stamp { options: Some("json:{}".into()), ..stamp() }.difference(&stamp()).is_some());
    }

    #[test]
    fn a_medium_differs_where_it_can_be_seen() {
        let layer = |file: Option<u64>| Layer {
            format: "raw".into(),
            protocol: "file".into(),
            filename: "/a".into(),
            file: file.map(|inode| FileNumbers { dev: 1, inode }),
        };
        let medium = |file| Medium { layers: vec![layer(file)], ..Medium::default() };
        assert_eq!(medium(Some(1)).difference(&medium(Some(1))), None);
        assert_eq!(medium(None).difference(&medium(Some(1))), None);
        assert!(medium(Some(2)).difference(&medium(Some(1))).unwrap().contains("not the same file"));
        let mut other = medium(Some(1));
        other.layers[0].filename = "/b".into();
        assert!(other.difference(&medium(Some(1))).unwrap().contains("now has /b open and had /a"));
        other.layers.clear();
        assert!(other.difference(&medium(None)).is_some());
    }

    #[test]
    fn an_image_is_the_same_by_its_inode() {
        let medium = |dev, inode| {
            let file = Some(FileNumbers { dev, inode });
            let (format, protocol, filename) = ("qcow2".into(), "file".into(), "/a".into());
            Medium { layers: vec![Layer { format, protocol, filename, file }], ..Medium::default() }
        };
        let same = |now: &Medium, then: &Medium, boot| now.is_another_image(then, boot).is_none();
        assert!(same(&medium(1, 2), &medium(1, 2), true));
        assert!(!same(&medium(3, 2), &medium(1, 2), true) && same(&medium(3, 2), &medium(1, 2), false));
        for boot in [true, false] {
            assert!(!same(&medium(1, 3), &medium(1, 2), boot), "{boot}");
            // A block device may get another number at the host's start, and no other time.
            assert_eq!(same(&medium(0, 3), &medium(0, 2), boot), !boot);
            let mut two = medium(1, 2);
            two.layers.push(two.layers[0].clone());
            assert!(!same(&two, &two, boot), "a backing file has no bitmap");
            let mut raw = medium(1, 2);
            raw.layers[0].format = "raw".into();
            assert!(!same(&raw, &medium(1, 2), boot));
        }
    }
}
