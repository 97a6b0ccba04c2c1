//! Disks with partition tables by `sfdisk` and swap areas by `mkswap`: what they mean is said by those tools, not by us.

use std::io::Write;
use std::os::unix::fs::FileExt;

use super::*;

/// Lets `sfdisk` partition an image by a script.
pub fn partition(image: &Path, script: &str, options: &[&str]) {
    let mut command = Command::new("sfdisk");
    command.args(["--quiet", "--no-reread", "--no-tell-kernel"]).args(options).arg(image);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("sfdisk: run tests/setup.sh (as root) first");
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// What `sfdisk` says of an image.
pub fn partitions(image: &Path) -> Vec<Value> {
    let text = run(Command::new("sfdisk").args(["--json"]).arg(image));
    let table: Value = serde_json::from_str(&text).unwrap();
    table["partitiontable"]["partitions"].as_array().cloned().unwrap_or_default()
}

/// The header that `mkswap` writes for an area of this size.
pub fn swap_header(len_bytes: u64, page_bytes: u64, label: &str, uuid: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("swap");
    std::fs::File::create(&file).unwrap().set_len(len_bytes).unwrap();
    run(Command::new("mkswap").args(["-p", &page_bytes.to_string(), "-L", label, "-U", uuid]).arg(&file));
    let mut header = std::fs::read(&file).unwrap();
    header.truncate(page_bytes as usize);
    header
}

/// Writes into an image that no QEMU has.
pub fn put(image: &Path, offset: u64, bytes: &[u8]) {
    std::fs::OpenOptions::new().write(true).open(image).unwrap().write_all_at(bytes, offset).unwrap();
}
