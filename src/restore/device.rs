//! Block devices: held exclusively, overwritten in place.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;

use crate::extent::Extent;
use crate::restore::error::RestoreError;
use crate::restore::place::is_locked;
use crate::units::MIB;

/// Zeroed at once: so that an interrupt is heeded soon where the kernel has to write the zeroes.
const ZERO_BYTES: u64 = 256 * MIB;
/// Written at once where the kernel cannot zero.
const ZERO_BUFFER_BYTES: usize = MIB as usize;

mod request {
    // linux/fs.h: `#define BLKZEROOUT _IO(0x12,127)`; takes {start, length} in bytes. What it zeroes reads as zeroes
    // (it unmaps only where the device promises that, else zeroes are written).
    nix::ioctl_write_ptr_bad!(zero_out, nix::request_code_none!(0x12, 127), [u64; 2]);
}

/// A block device that nobody else uses.
pub(super) struct Device {
    path: PathBuf,
    file: File,
}

impl Device {
    /// Opens a device for a disk of this size.
    pub fn open(path: &Path, disk: &str, disk_bytes: u64) -> Result<Self, RestoreError> {
        let in_use = |by| RestoreError::InUse { path: path.to_owned(), by };
        // O_EXCL on a block device: refused when it, its parent or a partition is mounted or held so by another.
        let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(path);
        let mut file = match opened {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                return Err(in_use("it or a part of it is mounted, or held by another program or device"));
            }
            other => other.map_err(RestoreError::io("open the block device", path))?,
        };
        if is_locked(&file).map_err(RestoreError::io("look for locks on", path))? {
            return Err(in_use("another program, perhaps QEMU, holds a lock on it"));
        }
        let device_bytes = file.seek(SeekFrom::End(0)).map_err(RestoreError::io("ask for the size of", path))?;
        if device_bytes < disk_bytes {
            let (disk, path) = (disk.to_owned(), path.to_owned());
            return Err(RestoreError::DeviceTooSmall { disk, path, disk_bytes, device_bytes });
        }
        Ok(Self { path: path.to_owned(), file })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes bytes zero. `may_go_on` is asked from time to time.
    pub fn zero(&self, extent: Extent, may_go_on: impl Fn() -> Result<(), RestoreError>) -> Result<(), RestoreError> {
        for piece in extent.split_at_multiples(ZERO_BYTES) {
            may_go_on()?;
            let done = match zero_out(&self.file, piece) {
                // The driver cannot, or not at this alignment.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOTTY)) => {
                    write_zeroes(&self.file, piece)
                }
                other => other,
            };
            done.map_err(RestoreError::io("zero a part of", &self.path))?;
        }
        Ok(())
    }
}

fn zero_out(file: &File, extent: Extent) -> io::Result<()> {
    let range = [extent.offset_bytes, extent.len_bytes];
    // SAFETY: the request reads two u64 from the pointer, which is to such.
    unsafe { request::zero_out(file.as_raw_fd(), &range) }?;
    Ok(())
}

fn write_zeroes(file: &File, extent: Extent) -> io::Result<()> {
    let buffer = vec![0; ZERO_BUFFER_BYTES.min(extent.len_bytes as usize)];
    extent
        .split_at_multiples(ZERO_BUFFER_BYTES as u64)
        .try_for_each(|piece| file.write_all_at(&buffer[..piece.len_bytes as usize], piece.offset_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_help_of_the_kernel_zeroes_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![7; 3 << 20]).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let device = Device { path: path.clone(), file };
        device.zero(Extent::new(1000, 2 << 20), || Ok(())).unwrap();
        let found = std::fs::read(&path).unwrap();
        assert!(found.iter().enumerate().all(|(i, b)| *b == if (1000..1000 + (2 << 20)).contains(&i) { 0 } else { 7 }));
        assert!(device.zero(Extent::new(0, 1), || Err(RestoreError::Interrupted)).unwrap_err().is_interrupted());
    }
}
