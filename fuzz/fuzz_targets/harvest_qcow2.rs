//! A bitmap in a qcow2 file.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    livebackup::vm::harvest::qcow2::fuzz(data);
});
