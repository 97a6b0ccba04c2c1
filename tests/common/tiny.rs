//! A guest of some fifty bytes in place of the firmware: there at once, it waits for a letter on the serial port, and powers
//! off or resets the machine as a real one does (ACPI, port 0xcf9). Its disks are written through `qemu-io`.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Arguments for a machine with this guest; `DIR` as in [`super::Qemu::start_with`]. By a name in QEMU's
/// own directories, as a firmware of its installation: another is kept with each point, over a connection of its own, which tests
/// that count connections do not want.
pub const ARGS: [&str; 8] = [
    "-L",
    "DIR",
    "-bios",
    "tiny.bin",
    "-chardev",
    "socket,id=tiny,path=DIR/tiny,server=on,wait=off",
    "-serial",
    "chardev:tiny",
];

/// Real mode, by hand; see Intel's ICH9 datasheet (PMBASE, ACPI_CNTL, PM1_CNT, RST_CNT) and the 16550's line status.
const CODE: [u8; 81] = [
    0xfa, // cli
    0x66, 0xb8, 0x40, 0xf8, 0x00, 0x80, 0xba, 0xf8, 0x0c, 0x66, 0xef, // PCI 0:1f.0 register 0x40, PMBASE
    0x66, 0xb8, 0x01, 0x06, 0x00, 0x00, 0xba, 0xfc, 0x0c, 0x66, 0xef, // = 0x600
    0x66, 0xb8, 0x44, 0xf8, 0x00, 0x80, 0xba, 0xf8, 0x0c, 0x66, 0xef, // register 0x44, ACPI_CNTL
    0xb0, 0x80, 0xba, 0xfc, 0x0c, 0xee, // = enabled
    0xba, 0xf8, 0x03, 0xb0, b'R', 0xee, // say R
    0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf8, // wait for a letter
    0xba, 0xf8, 0x03, 0xec, // take it
    0x3c, b'p', 0x75, 0x07, 0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, // p: PM1_CNT = sleep, type S5
    0x3c, b'r', 0x75, 0xe5, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xeb, 0xdd, // r: RST_CNT = full reset; again
];

/// Writes the guest into a directory: `tiny.bin`.
pub fn write(dir: &Path) {
    let mut image = vec![0_u8; 64 << 10];
    image[0xff00..0xff00 + CODE.len()].copy_from_slice(&CODE);
    // The reset vector: a jump to f000:ff00.
    image[0xfff0..0xfff5].copy_from_slice(&[0xea, 0x00, 0xff, 0x00, 0xf0]);
    std::fs::write(dir.join("tiny.bin"), image).unwrap();
}

/// The guest's serial port.
pub struct Tiny(UnixStream);

impl Tiny {
    /// Connects. The guest may be stopped still.
    pub fn connect(dir: &Path) -> Tiny {
        let stream = UnixStream::connect(dir.join("tiny")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Tiny(stream)
    }

    /// Waits until the guest has started (again).
    pub fn wait(&mut self) {
        let mut letter = [0];
        self.0.read_exact(&mut letter).expect("the tiny guest says that it runs");
        assert_eq!(letter, *b"R");
    }

    /// Powers the machine off.
    pub fn power_off(&mut self) {
        self.0.write_all(b"p").unwrap();
    }

    /// Resets the machine.
    pub fn reset(&mut self) {
        self.0.write_all(b"r").unwrap();
    }
}
