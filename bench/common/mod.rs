//! What the benchmarks share: what a process has used, and data that compresses by about half.

use nix::sys::resource::{UsageWho, getrusage};

/// Processor seconds so far, of a process or of its children: in them, and in the kernel for them.
pub fn processor_seconds(who: UsageWho) -> (f64, f64) {
    let usage = getrusage(who).expect("getrusage works");
    let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    (seconds(usage.user_time()), seconds(usage.system_time()))
}

/// Peak of the process's memory so far.
pub fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or("0 kB");
    line.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) / 1024
}

/// Fills with what compresses by about half: records with a random key, counters and text, as a database page.
pub fn fill(seed: u64, out: &mut [u8]) {
    const TEXT: &[u8] = b"the quick brown fox jumps over the lazy dog; customer=";
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for record in out.chunks_mut(96) {
        let mut bytes = [0u8; 96];
        for word in bytes[..40].chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        bytes[40..94].copy_from_slice(TEXT);
        record.copy_from_slice(&bytes[..record.len()]);
    }
}
