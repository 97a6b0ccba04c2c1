//! A session's log.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    livebackup::repo::fuzz::session_log(data);
});
