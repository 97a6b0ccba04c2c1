//! A compressed chunk from a peer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    livebackup::codec::fuzz(data);
});
