//! NBD replies to requests that wait for them.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = livebackup::nbd::fuzz::replies(data);
});
