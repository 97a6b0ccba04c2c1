//! Partition tables and swap headers: what `sfdisk` and `mkswap` made is read as they say; what contradicts itself is doubted;
//! no bytes make the reader panic or leave the disk.

#![allow(clippy::unwrap_used)]

use crate::common::partitioned::*;
use crate::common::*;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use livebackup::extent::Extent;
use livebackup::partition::{self, Look, Partition, Stop, SwapHeader};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const UUID: &str = "12345678-9abc-def0-1234-56789abcdef0";

const GPT: &str = "label: gpt\n\
    start=2048, size=16384, type=L, name=\"root\"\n\
    start=20480, size=32768, type=S, name=\"the swap\", uuid=11111111-2222-3333-4444-555555555555\n\
    start=65536, size=8192, type=L, name=\"scratch\"\n";
const MBR: &str = "label: dos\nlabel-id: 0x1234abcd\n\
    start=2048, size=16384, type=83, bootable\n\
    start=20480, size=100000, type=5\n\
    start=22528, size=20000, type=83\n\
    start=45056, size=32768, type=82\n\
    start=79872, size=8192, type=83\n";

struct Image {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Image {
    fn new(script: &str) -> Image {
        Self::sized(script, SIZE)
    }

    fn sized(script: &str, size: u64) -> Image {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        if !script.is_empty() {
            partition(&path, script, &[]);
        }
        Image { _dir: dir, path }
    }

    fn look(&self) -> impl FnMut(Extent) -> Result<Vec<u8>, Stop> {
        let file = std::fs::File::open(&self.path).unwrap();
        move |extent| {
            let mut bytes = vec![0; extent.len_bytes as usize];
            file.read_exact_at(&mut bytes, extent.offset_bytes).unwrap();
            Ok(bytes)
        }
    }

    fn read(&self) -> Result<Vec<Partition>, Stop> {
        partition::read(SIZE, 512, &mut self.look())
    }

    fn swap(&self, area: Extent) -> Option<SwapHeader> {
        partition::swap(area, &mut self.look()).unwrap()
    }

    fn doubt(&self) -> String {
        match self.read() {
            Err(Stop::Doubt(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        put(&self.path, offset, bytes);
    }

    fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        self.look()(Extent::new(offset, len as u64)).unwrap()
    }
}

#[test]
fn tables_are_read_as_sfdisk_says() {
    for (script, swaps) in [(GPT, [2].as_slice()), (MBR, &[6])] {
        let image = Image::new(script);
        let found = image.read().unwrap();
        // An extended partition holds others, and nothing itself.
        let told: Vec<_> = partitions(&image.path).into_iter().filter(|p| p["type"] != "5").collect();
        assert_eq!(found.len(), told.len(), "{found:?}");
        for (ours, theirs) in found.iter().zip(&told) {
            let number: u32 =
                theirs["node"].as_str().unwrap().trim_start_matches(image.path.to_str().unwrap()).parse().unwrap();
            let at = |name: &str| theirs[name].as_u64().unwrap() * 512;
            assert_eq!((ours.number, ours.extent), (number, Extent::new(at("start"), at("size"))));
            assert_eq!(ours.label, theirs["name"].as_str().unwrap_or_default());
            if let Some(uuid) = theirs["uuid"].as_str() {
                assert_eq!(ours.uuid, uuid.to_lowercase());
            } else {
                assert_eq!(ours.uuid, format!("1234abcd-{number:02x}"));
            }
            assert_eq!(ours.for_swap, swaps.contains(&number), "{ours:?}");
        }
    }
    assert_eq!(Image::new("").read(), Ok(vec![]));
}

#[test]
fn a_reader_says_what_it_needs() {
    let image = Image::new(MBR);
    let mut pieces: Vec<(Extent, Vec<u8>)> = vec![];
    let found = loop {
        let mut look = |extent: Extent| {
            let known = pieces.iter().find(|(at, _)| *at == extent);
            known.map(|(_, bytes)| bytes.clone()).ok_or(Stop::Wants(extent))
        };
        let answer = partition::read(SIZE, 512, &mut look as &mut Look<'_>);
        match answer {
            Err(Stop::Wants(extent)) => {
                pieces.push((extent, image.bytes(extent.offset_bytes, extent.len_bytes as usize)))
            }
            other => break other,
        }
    };
    assert_eq!(found, image.read());
    assert_eq!(pieces.len(), 4, "the first sector, and one for each logical partition");
}

#[test]
fn swap_is_what_mkswap_made() {
    let area = Extent::new(8 * MIB, 16 * MIB);
    for page in [4096, 8192, 65536] {
        let image = Image::new("");
        let header = swap_header(area.len_bytes, page, "swap0", UUID);
        image.put(area.offset_bytes, &header);
        let found = image.swap(area).unwrap();
        assert_eq!((found.page_bytes, found.len_bytes), (page, area.len_bytes));
        assert_eq!((found.label.as_str(), found.uuid.as_str()), ("swap0", UUID));
        // What lies in swap says nothing.
        image.put(area.offset_bytes + page, &vec![0xa5; 65536 - page as usize]);
        assert_eq!(image.swap(area), Some(found));
        assert_eq!(image.swap(Extent::new(area.offset_bytes, area.len_bytes - 4096)), None, "longer than its place");
        assert_eq!(image.swap(Extent::new(area.offset_bytes + 512, area.len_bytes)), None);
    }
    assert_eq!(Image::new("").swap(area), None);
}

#[test]
fn what_was_swap_once_is_none() {
    let area = Extent::new(8 * MIB, 16 * MIB);
    let header = swap_header(area.len_bytes, 4096, "swap0", UUID);
    for (what, offset, bytes) in [
        ("a hibernated system", 4086, b"S1SUSPEND\0".as_slice()),
        ("a boot sector", 510, &[0x55, 0xaa]),
        ("XFS", 0, b"XFSB"),
        ("a physical volume", 512, b"LABELONE"),
        ("another version", 1024, &[2]),
        ("bad pages", 1032, &[1]),
        ("an ext4 superblock's magic", 1080, &[0x53, 0xef]),
        ("MD", 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
        ("Btrfs", 65600, b"_BHRfS_M"),
    ] {
        let image = Image::new("");
        image.put(area.offset_bytes, &header);
        assert!(image.swap(area).is_some());
        image.put(area.offset_bytes + offset, bytes);
        assert_eq!(image.swap(area), None, "{what}");
    }
    // The real thing: the signature at the page's end survives it.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("area");
    std::fs::File::create(&file).unwrap().set_len(area.len_bytes).unwrap();
    put(&file, 0, &header);
    run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&file));
    let image = Image::new("");
    image.put(area.offset_bytes, &std::fs::read(&file).unwrap());
    assert_eq!(image.swap(area), None, "a file system");
}

#[test]
fn what_contradicts_itself_is_doubted() {
    let flip = |image: &Image, offset: u64| image.put(offset, &[image.bytes(offset, 1)[0] ^ 1]);
    for (offset, says) in [
        (512, "header is not there"),
        (520, "another version"),
        (512 + 60, "crc"),
        (512 + 88, "crc"),
        (1024 + 40, "table does not match"),
    ] {
        let image = Image::new(GPT);
        flip(&image, offset);
        assert!(image.doubt().contains(says), "{offset}: {}", image.doubt());
    }
    // Behind the primary ones: a disk that was made smaller.
    let image = Image::new(GPT);
    let small = partition::read(32 * MIB, 512, &mut image.look());
    assert!(matches!(&small, Err(Stop::Doubt(why)) if why.contains("another size")), "{small:?}");
    // An MBR counts in sectors, and does not say how long they are.
    let image = Image::new(MBR);
    assert_eq!(image.read().unwrap().len(), 4);
    let larger = partition::read(SIZE, 4096, &mut image.look());
    assert!(matches!(&larger, Err(Stop::Doubt(why)) if why.contains("4096")), "{larger:?}");
    for (offset, bytes, says) in [
        (446 + 16 + 8, 30_000u32.to_le_bytes(), "chain of logical partitions"),
        (446 + 8, 200_000u32.to_le_bytes(), "partition 1 lies outside"),
        (446 + 12, 30_000u32.to_le_bytes(), "partitions 1 and 5 overlap"),
        (446, [1, 0, 0, 0], "boot sector"),
        // The second link of the chain points to the first.
        (45056 * 512 - MIB + 446 + 16 + 8, [0; 4], "endless"),
    ] {
        let image = Image::new(MBR);
        image.put(offset, &bytes);
        let why = image.doubt();
        assert!(why.contains(says), "{offset}: {why}");
    }
}

#[test]
fn fuzzed_disks() {
    let mut rng = Rng::new();
    let area = 1048576;
    let mut swap = vec![0; 80 << 10];
    swap[..4096].copy_from_slice(&swap_header(area, 4096, "swap0", UUID));
    let gpt = "label: gpt\nstart=64, size=500, type=S, name=\"swap\"\nstart=600, size=500, type=L\n";
    let mbr = "label: dos\nstart=64, size=64, type=83\nstart=256, size=1500, type=5\nstart=320, size=200, type=83\n\
        start=640, size=700, type=82\n";
    let mut examples: Vec<_> = [gpt, mbr].map(|script| Image::sized(script, MIB).bytes(0, MIB as usize)).into();
    examples.push(swap);
    for round in 0..3000 {
        let mut bytes = examples[round % examples.len()].clone();
        if round % 8 < 2 {
            bytes.truncate(rng.below(70 << 10) as usize);
        }
        for _ in 0..1 + rng.below(4) {
            // Where the tables are: the first sectors, and the chain's.
            let base = [0, 446, 512, 1024, 256 * 512, 639 * 512][rng.below(6) as usize];
            let at = base + rng.below(600) as usize;
            if let Some(byte) = bytes.get_mut(at) {
                *byte = [0, 1, 0x82, 0xee, 0xff, rng.below(256) as u8][rng.below(6) as usize];
            }
        }
        // What a crc would hide is behind it: it is made right again now and then.
        if round % 2 == 0 && bytes.len() > 20 << 10 {
            let table = crc32fast::hash(&bytes[1024..1024 + 128 * 128]);
            bytes[512 + 88..][..4].copy_from_slice(&table.to_le_bytes());
            bytes[528..532].fill(0);
            let header = crc32fast::hash(&bytes[512..604]);
            bytes[528..532].copy_from_slice(&header.to_le_bytes());
        }
        partition::fuzz(&bytes);
    }
}
