//! Nothing stays behind: a file of its own, since it counts what the whole process has.

#![allow(clippy::unwrap_used)]

mod common;
mod vhost_fixture;

use std::time::Duration;

use common::*;
use livebackup::block::{BlockSource, SourceRules};
use livebackup::extent::Extent;
use livebackup::vhost::VhostSource;
use vhost_fixture::*;

/// Descriptors, mappings that are ours or blkio's, and threads.
fn counts() -> (usize, usize, usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let shared = maps.lines().filter(|l| l.contains("memfd:")).count();
    let entries = |path| std::fs::read_dir(path).unwrap().count();
    (entries("/proc/self/fd"), shared, entries("/proc/self/task"))
}

#[test]
fn fifty_sources_leave_no_descriptor_mapping_thread_or_file() {
    let leftovers = || {
        let names = std::fs::read_dir(std::env::temp_dir()).unwrap().flatten().map(|e| e.file_name());
        let ours = |n: &String| n.len() == 27 && n["livebackup-".len()..].bytes().all(|b| b.is_ascii_hexdigit());
        names.flat_map(|n| n.into_string()).filter(|n| n.starts_with("livebackup-")).filter(ours).count()
    };
    for version in VERSIONS {
        let fleece = Fleece::open(version, Device::Blk, 4 * MIB);
        let size = fleece.size_bytes();
        // The first use of a runtime opens what it keeps.
        block_on(fleece.connect().close()).unwrap();
        let before = (counts(), leftovers());
        for i in 0..50 {
            let source = fleece.connect();
            block_on(async {
                let held = source.read(Extent::new(0, MIB)).await.unwrap();
                if i % 2 == 0 {
                    source.close().await.unwrap();
                } else {
                    drop(source);
                }
                assert_eq!(held, fleece.bytes[..MIB as usize]);
            });
            // Connections that come to nothing.
            if i % 5 == 0 {
                assert!(VhostSource::connect(&fleece.socket(), size + 512, fleece.rules()).is_err());
                let bad = SourceRules { boundary_bytes: 4096, ..fleece.rules() };
                assert!(VhostSource::connect(&fleece.socket(), size, bad).is_err());
            }
        }
        let first = fleece.connect();
        for _ in 0..5 {
            let short = Duration::from_millis(20);
            assert!(VhostSource::connect_within(short, &fleece.socket(), size, fleece.rules()).is_err());
        }
        drop(first);
        // Less is well too: the first source's thread may have been on its way out when it was counted.
        wait_until(&format!("no more to be there than before: {before:?}"), || {
            let ((files, shared, threads), left) = (counts(), leftovers());
            files <= before.0.0 && shared <= before.0.1 && threads <= before.0.2 && left <= before.1
        });
    }
}
