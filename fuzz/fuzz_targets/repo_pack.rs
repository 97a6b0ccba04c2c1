//! A pack's header, footer and directory.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    livebackup::repo::fuzz::pack(data);
});
