//! A server's side of an NBD negotiation.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = livebackup::nbd::fuzz::negotiation(data);
});
