//! What fuzzing runs: any bytes, which must neither panic nor take memory or time beyond what their length allows.
//!
//! A cargo-fuzz target is one line: `fuzz_target!(|data: &[u8]| livebackup::checkpoint::fuzz::file(data));`. A short run with
//! mutated valid input is part of the normal tests.

use super::bitmap::Bitmap;
use super::format::{self, Decoder, Header};
use crate::units::MIB;

/// Disks above this are not decoded here: their bitmaps would be all that is tested.
const MAX_FUZZED_DISK_BYTES: u64 = 64 * 1024 * MIB;

/// The decoder of checkpoint files, of both versions. Gives what it takes.
pub fn file(bytes: &[u8]) -> Option<(Header, Bitmap)> {
    let header = Header::read(bytes, bytes.len() as u64).ok()?;
    assert_eq!(header.file_bytes(), bytes.len() as u64);
    if header.size_bytes > MAX_FUZZED_DISK_BYTES {
        return None;
    }
    let (again, bitmap) = format::decode(bytes).ok()?;
    assert_eq!(again, header);
    assert!(bitmap.extents().all(|e| e.fits(header.size_bytes)));
    let mut full = Bitmap::full(header.size_bytes);
    if full.granule_bytes() == bitmap.granule_bytes() {
        let mut decoder = Decoder::new().ok()?;
        assert!(decoder.union(bytes, &mut full).is_ok());
        assert_eq!(full.count_bytes(), header.size_bytes);
    }
    Some((header, bitmap))
}
