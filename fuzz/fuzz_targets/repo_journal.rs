//! A journal's list.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    livebackup::repo::fuzz::journal(data);
});
