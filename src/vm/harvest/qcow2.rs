//! A qcow2 file without data that carries one bitmap: what QEMU stores a persistent bitmap into, and loads one from.
//!
//! ```text
//! header, extensions | refcount table | refcount block | L1 table | [bitmap directory | bitmap table | bitmap data]
//! ```
//!
//! Version 3, clusters of 64 KiB, every L1 entry empty: the image reads as zeroes. [`empty`] ends before the brackets, and
//! QEMU adds what is in them when the node goes; [`with_bitmap`] writes them. [`read`] believes no number of the file:
//! the disk's size is known, so the length of everything else is too. Section names in the comments are those of QEMU's
//! `docs/interop/qcow2.rst`; all numbers are big-endian, but the bitmap's data is a string of bytes with the lowest bit
//! first.

use std::io;

use crate::checkpoint::Bitmap;
use crate::units::{GRANULE_BYTES, human_bytes};

const CLUSTER_BITS: u32 = 16;
const CLUSTER_BYTES: u64 = 1 << CLUSTER_BITS;
/// What a cluster of an L2 table maps, and so an entry of the L1 table.
const L1_ENTRY_BYTES: u64 = CLUSTER_BYTES / 8 * CLUSTER_BYTES;
const SECTOR_BYTES: u64 = 512;

/// "Header" with the fields of version 3.
const HEADER_BYTES: usize = 104;
const MAGIC: u32 = 0x5146_49fb;
/// "Bitmaps extension", and its autoclear bit.
const BITMAPS_EXTENSION: u32 = 0x2385_2875;
const BITMAPS_AUTOCLEAR: u64 = 1;
const BITMAPS_EXTENSION_BYTES: usize = 24;
/// "Bitmap directory": an entry before its name.
const ENTRY_BYTES: usize = 24;
/// Bit 0 of an entry's flags: the bitmap was not stored.
const IN_USE: u32 = 1;
const TYPE_TRACKING: u8 = 1;
/// "Bitmap table": an entry's offset; bit 0 without an offset is a cluster of ones; all else is reserved.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const ALL_ONES: u64 = 1;

/// QEMU stores no bitmap with more data (`BME_MAX_PHYS_SIZE`).
const MAX_BITMAP_BYTES: u64 = 512 << 20;
/// One refcount block of 16-bit counts counts this many clusters.
const REFCOUNT_BLOCK_CLUSTERS: u64 = CLUSTER_BYTES / 2;
/// Longest bitmap directory that is read: of ours, one entry; QEMU adds none.
const MAX_DIRECTORY_BYTES: u64 = 4096;

const _: () = assert!(MAX_BITMAP_BYTES / CLUSTER_BYTES * 8 <= CLUSTER_BYTES, "a bitmap table is one cluster at most");
const _: () = assert!(
    5 + MAX_L1_CLUSTERS + MAX_BITMAP_BYTES / CLUSTER_BYTES <= REFCOUNT_BLOCK_CLUSTERS,
    "one refcount block is enough"
);
/// Of the largest disk whose bitmap is small enough.
const MAX_L1_CLUSTERS: u64 = (MAX_BITMAP_BYTES * 8 * GRANULE_BYTES / L1_ENTRY_BYTES * 8).div_ceil(CLUSTER_BYTES);

/// Why a file cannot be made, or not be read.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// The format ends there.
    #[error("a disk of {} is larger than a bitmap in a qcow2 file can describe", human_bytes(*size_bytes))]
    TooLarge {
        /// Of the disk.
        size_bytes: u64,
    },
    /// No disk of QEMU has such a size.
    #[error("a disk of {size_bytes} bytes is no whole number of sectors")]
    NoSectors {
        /// Of the disk.
        size_bytes: u64,
    },
    /// What QEMU wrote is not what it was asked for.
    #[error("the qcow2 file that QEMU stored a bitmap in is wrong in its {0}")]
    Field(&'static str),
    /// The file could not be read.
    #[error("the qcow2 file that QEMU stored a bitmap in cannot be read: {0}")]
    Io(#[from] io::Error),
}

fn bitmap_bytes(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(GRANULE_BYTES).div_ceil(8)
}

fn l1_entries(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(L1_ENTRY_BYTES).max(1)
}

fn check(size_bytes: u64) -> Result<(), Qcow2Error> {
    if !size_bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(Qcow2Error::NoSectors { size_bytes });
    }
    if bitmap_bytes(size_bytes) > MAX_BITMAP_BYTES {
        return Err(Qcow2Error::TooLarge { size_bytes });
    }
    Ok(())
}

/// An image of a disk's size without data and without bitmaps.
pub fn empty(size_bytes: u64) -> Result<Vec<u8>, Qcow2Error> {
    check(size_bytes)?;
    Ok(image(size_bytes, None))
}

/// An image of a disk's size with one stored bitmap, which QEMU loads disabled.
pub fn with_bitmap(name: &str, bitmap: &Bitmap) -> Result<Vec<u8>, Qcow2Error> {
    check(bitmap.size_bytes())?;
    if name.is_empty() || name.len() > 1023 || bitmap.granule_bytes() != GRANULE_BYTES {
        return Err(Qcow2Error::Field("bitmap's name or granularity"));
    }
    Ok(image(bitmap.size_bytes(), Some((name, bitmap))))
}

fn image(size_bytes: u64, bitmap: Option<(&str, &Bitmap)>) -> Vec<u8> {
    let l1_clusters = (l1_entries(size_bytes) * 8).div_ceil(CLUSTER_BYTES);
    let directory_at = 3 + l1_clusters;
    let mut file = vec![0; (directory_at * CLUSTER_BYTES) as usize];
    let mut header = header(size_bytes, bitmap.is_some());
    if let Some((name, bitmap)) = bitmap {
        let data: Vec<u8> = bitmap.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        let data = &data[..bitmap_bytes(size_bytes) as usize];
        let (table_at, data_at) = (directory_at + 1, directory_at + 2);
        let entry = directory_entry(name, table_at * CLUSTER_BYTES, data.chunks(CLUSTER_BYTES as usize).len() as u32);
        header.extend(BITMAPS_EXTENSION.to_be_bytes());
        header.extend((BITMAPS_EXTENSION_BYTES as u32).to_be_bytes());
        header.extend(1u32.to_be_bytes()); // nb_bitmaps
        header.extend(0u32.to_be_bytes()); // reserved
        header.extend((entry.len() as u64).to_be_bytes());
        header.extend((directory_at * CLUSTER_BYTES).to_be_bytes());
        let mut table = vec![];
        let mut stored = vec![];
        for cluster in data.chunks(CLUSTER_BYTES as usize) {
            if cluster.iter().all(|byte| *byte == 0) {
                table.extend(0u64.to_be_bytes());
            } else {
                table.extend((data_at * CLUSTER_BYTES + stored.len() as u64).to_be_bytes());
                stored.extend_from_slice(cluster);
                pad(&mut stored);
            }
        }
        for mut part in [entry, table, stored] {
            pad(&mut part);
            file.extend(part);
        }
    }
    file[..header.len()].copy_from_slice(&header);
    // "Host cluster management": each cluster of the file is used once.
    let clusters = file.len() / CLUSTER_BYTES as usize;
    let at = |cluster: u64| (cluster * CLUSTER_BYTES) as usize;
    file[at(1)..][..8].copy_from_slice(&(2 * CLUSTER_BYTES).to_be_bytes());
    file[at(2)..][..2 * clusters].copy_from_slice(&[0, 1].repeat(clusters));
    file
}

/// To whole clusters.
fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(CLUSTER_BYTES as usize), 0);
}

fn header(size_bytes: u64, bitmaps: bool) -> Vec<u8> {
    let u32 = |n: u32| n.to_be_bytes().to_vec();
    let u64 = |n: u64| n.to_be_bytes().to_vec();
    [
        u32(MAGIC),
        u32(3), // version
        u64(0), // backing_file_offset
        u32(0), // backing_file_size
        u32(CLUSTER_BITS),
        u64(size_bytes),
        u32(0), // crypt_method
        u32(l1_entries(size_bytes) as u32),
        u64(3 * CLUSTER_BYTES), // l1_table_offset
        u64(CLUSTER_BYTES),     // refcount_table_offset
        u32(1),                 // refcount_table_clusters
        u32(0),                 // nb_snapshots
        u64(0),                 // snapshots_offset
        u64(0),                 // incompatible_features
        u64(0),                 // compatible_features
        u64(if bitmaps { BITMAPS_AUTOCLEAR } else { 0 }),
        u32(4), // refcount_order: 16 bits
        u32(HEADER_BYTES as u32),
    ]
    .concat()
}

fn directory_entry(name: &str, table_at: u64, table_entries: u32) -> Vec<u8> {
    let mut entry = table_at.to_be_bytes().to_vec();
    entry.extend(table_entries.to_be_bytes());
    entry.extend(0u32.to_be_bytes()); // flags: neither in use nor enabled
    entry.push(TYPE_TRACKING);
    entry.push(GRANULE_BYTES.trailing_zeros() as u8);
    entry.extend((name.len() as u16).to_be_bytes());
    entry.extend(0u32.to_be_bytes()); // extra_data_size
    entry.extend(name.as_bytes());
    entry.resize(entry.len().next_multiple_of(8), 0);
    entry
}

/// A file that is read at offsets.
pub trait ReadAt {
    /// Fills the buffer from an offset; the end of the file within it is an error.
    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()>;
}

impl ReadAt for std::fs::File {
    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buffer, offset_bytes)
    }
}

impl ReadAt for [u8] {
    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let from = usize::try_from(offset_bytes).ok().and_then(|at| self.get(at..)?.get(..buffer.len()));
        from.map(|bytes| buffer.copy_from_slice(bytes)).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

fn be_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn be_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn be_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Reads the bitmap with this name, which QEMU stored for a disk of this size.
pub fn read(file: &(impl ReadAt + ?Sized), name: &str, size_bytes: u64) -> Result<Bitmap, Qcow2Error> {
    check(size_bytes)?;
    let mut header = vec![0; CLUSTER_BYTES as usize];
    file.read_at(&mut header, 0)?;
    let (directory_at, directory_bytes) = find_directory(&header, size_bytes)?;
    let mut directory = vec![0; directory_bytes as usize];
    file.read_at(&mut directory, directory_at)?;
    let table_at = find_entry(&directory, name, size_bytes)?;
    let mut table = vec![0; bitmap_bytes(size_bytes).div_ceil(CLUSTER_BYTES) as usize * 8];
    file.read_at(&mut table, table_at)?;

    let mut data = vec![0; bitmap_bytes(size_bytes) as usize];
    for (entry, cluster) in table.as_chunks::<8>().0.iter().zip(data.chunks_mut(CLUSTER_BYTES as usize)) {
        match u64::from_be_bytes(*entry) {
            0 => {}
            ALL_ONES => cluster.fill(0xff),
            offset if offset & !OFFSET_MASK == 0 => file.read_at(cluster, offset)?,
            _ => return Err(Qcow2Error::Field("bitmap table")),
        }
    }
    // Bits past the last granule mean nothing.
    let spare = data.len() as u64 * 8 - size_bytes.div_ceil(GRANULE_BYTES);
    if let Some(last) = data.last_mut() {
        *last &= 0xff >> spare;
    }
    data.resize(data.len().next_multiple_of(8), 0);
    let mut bitmap = Bitmap::new(size_bytes);
    bitmap.union_words(&data).ok_or(Qcow2Error::Field("bitmap"))?;
    Ok(bitmap)
}

/// Where the bitmap directory is, and how long.
fn find_directory(header: &[u8], size_bytes: u64) -> Result<(u64, u64), Qcow2Error> {
    let wrong = Qcow2Error::Field;
    let known = (be_u32(header, 0), be_u32(header, 4), be_u32(header, 20), be_u64(header, 24));
    if known != (Some(MAGIC), Some(3), Some(CLUSTER_BITS), Some(size_bytes)) {
        return Err(wrong("header"));
    }
    if be_u64(header, 88).is_none_or(|autoclear| autoclear & BITMAPS_AUTOCLEAR == 0) {
        return Err(wrong("header: it says that its bitmaps are stale"));
    }
    let mut at = be_u32(header, 100).ok_or(wrong("header"))? as usize;
    loop {
        let kind = be_u32(header, at).ok_or(wrong("header extensions"))?;
        let len = be_u32(header, at + 4).ok_or(wrong("header extensions"))? as usize;
        let body = header.get(at + 8..).and_then(|rest| rest.get(..len)).ok_or(wrong("header extensions"))?;
        match kind {
            0 => return Err(wrong("header extensions: it has no bitmaps")),
            BITMAPS_EXTENSION => {
                let directory = be_u64(body, 16).zip(be_u64(body, 8)).ok_or(wrong("bitmaps extension"))?;
                return if directory.1 <= MAX_DIRECTORY_BYTES { Ok(directory) } else { Err(wrong("bitmap directory")) };
            }
            _ => at += 8 + len.next_multiple_of(8),
        }
    }
}

/// Where the table of the bitmap with this name is.
fn find_entry(directory: &[u8], name: &str, size_bytes: u64) -> Result<u64, Qcow2Error> {
    let wrong = || Qcow2Error::Field("bitmap directory");
    let mut rest = directory;
    while !rest.is_empty() {
        let (table_at, entries) = be_u64(rest, 0).zip(be_u32(rest, 8)).ok_or_else(wrong)?;
        let flags = be_u32(rest, 12).ok_or_else(wrong)?;
        let (kind, granularity) = (rest.get(16).copied(), rest.get(17).copied());
        let name_bytes = usize::from(be_u16(rest, 18).ok_or_else(wrong)?);
        let extra_bytes = be_u32(rest, 20).ok_or_else(wrong)? as usize;
        let name_at = ENTRY_BYTES + extra_bytes;
        let found = rest.get(name_at..).and_then(|from| from.get(..name_bytes)).ok_or_else(wrong)?;
        if found == name.as_bytes() {
            let expected = bitmap_bytes(size_bytes).div_ceil(CLUSTER_BYTES);
            let granularity = granularity.map(u32::from);
            if (kind, granularity, u64::from(entries))
                != (Some(TYPE_TRACKING), Some(GRANULE_BYTES.trailing_zeros()), expected)
            {
                return Err(wrong());
            }
            if flags & IN_USE != 0 {
                return Err(Qcow2Error::Field("bitmap: QEMU has not stored it"));
            }
            return Ok(table_at);
        }
        rest = rest.get((name_at + name_bytes).next_multiple_of(8)..).unwrap_or_default();
    }
    Err(Qcow2Error::Field("bitmap directory: the bitmap is not in it"))
}

/// What fuzzing runs: any bytes as a stored file, for disks of several sizes. Must neither panic nor hang.
pub fn fuzz(bytes: &[u8]) {
    for size_bytes in [SECTOR_BYTES, 20 * GRANULE_BYTES + 512, CLUSTER_BYTES * 8 * GRANULE_BYTES * 2] {
        if let Ok(bitmap) = read(bytes, "b", size_bytes) {
            assert!(bitmap.size_bytes() == size_bytes && bitmap.count_bytes() <= size_bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::Extent;
    use proptest::prelude::*;

    const SIZE_BYTES: u64 = 20 * GRANULE_BYTES + 512;

    fn a_file() -> Vec<u8> {
        let mut bitmap = Bitmap::new(SIZE_BYTES);
        [3, 4, 20].iter().for_each(|granule| bitmap.set(Extent::new(granule * GRANULE_BYTES, 1)));
        with_bitmap("b", &bitmap).unwrap()
    }

    #[test]
    fn a_bitmap_comes_back() {
        for size_bytes in [512, SIZE_BYTES, 40 << 30, (40 << 30) + 512] {
            let mut bitmap = Bitmap::new(size_bytes);
            for at in [0, 7 * GRANULE_BYTES, size_bytes - 1, size_bytes / 2] {
                bitmap.set(Extent::new(at, 1));
            }
            let file = with_bitmap("name", &bitmap).unwrap();
            assert_eq!(read(file.as_slice(), "name", size_bytes).unwrap(), bitmap);
            assert!(matches!(read(file.as_slice(), "nam", size_bytes), Err(Qcow2Error::Field(_))));
            assert!(matches!(read(file.as_slice(), "name", size_bytes + 512), Err(Qcow2Error::Field(_))));
            assert!(read(empty(size_bytes).unwrap().as_slice(), "name", size_bytes).is_err());
        }
        assert!(matches!(empty(513), Err(Qcow2Error::NoSectors { .. })));
        assert!(matches!(empty(1 << 50), Err(Qcow2Error::TooLarge { .. })));
    }

    #[test]
    fn a_bitmap_that_was_not_stored_is_refused() {
        let mut file = a_file();
        let flags_at = 4 * CLUSTER_BYTES as usize + 15;
        file[flags_at] |= IN_USE as u8;
        assert!(read(file.as_slice(), "b", SIZE_BYTES).unwrap_err().to_string().contains("not stored"));
        let mut file = a_file();
        file[95] = 0;
        assert!(read(file.as_slice(), "b", SIZE_BYTES).unwrap_err().to_string().contains("stale"));
    }

    proptest! {
        #[test]
        fn any_damage_ends_in_a_bitmap_or_an_error(
            changes in prop::collection::vec((prop::sample::select(vec![0u64, 4, 5, 6]), 0usize..160, any::<u8>()), 1..6),
            cut in prop::option::of(0usize..0x7_0000),
        ) {
            let mut file = a_file();
            for (cluster, at, value) in changes {
                file[(cluster * CLUSTER_BYTES) as usize + at] = value;
            }
            file.truncate(cut.unwrap_or(usize::MAX));
            fuzz(&file);
        }

        #[test]
        fn any_bytes_end_in_an_error(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            fuzz(&bytes);
        }
    }
}
