//! An index, and look-ups in it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    livebackup::repo::fuzz::index(data);
});
