//! A node of an image tree.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    livebackup::repo::fuzz::node(data);
});
