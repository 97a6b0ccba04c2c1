//! A checkpoint file, of a disk of 1 TiB at most: whoever reads one knows the disk's size.
#![no_main]

use livebackup::checkpoint::{Header, format};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if Header::read(data, data.len() as u64).is_ok_and(|header| header.size_bytes <= 1 << 40) {
        let _ = format::decode(data);
    }
});
