//! The harness itself: both QEMU versions start, take guest writes and show them.

use crate::common::*;

#[test]
fn a_guest_write_reaches_the_image() {
    for version in VERSIONS {
        let mut qemu = Qemu::with_raw_disk(version, 1 << 20);
        qemu.write(65536, 4096, 0xab);
        let image = std::fs::read(qemu.path("disk0.raw")).unwrap();
        assert!(image[65536..69632].iter().all(|b| *b == 0xab));
        assert!(image[..65536].iter().all(|b| *b == 0));
        assert_eq!(qemu.status(), "prelaunch");
    }
}
