//! What a monitor sends, line by line.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    livebackup::monitor::fuzz(data);
});
