//! A disk's partition table and swap headers.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    livebackup::partition::fuzz(data);
});
