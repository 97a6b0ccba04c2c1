//! A server's list of NBD exports.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = livebackup::nbd::fuzz::listing(data);
});
