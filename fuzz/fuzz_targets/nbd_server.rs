//! A client's side of a session with the NBD server: its handshake and its requests.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = livebackup::nbd::fuzz::server(data);
});
