//! A peer's frames, both directions.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    livebackup::wire::fuzz::frames(data);
});
