//! A loop device as a disk of a machine: it stands for an LV or zvol.

use super::side::{SIZE, Side};
use super::*;

/// A loop device over an image, detached when dropped.
pub struct Loop {
    pub device: String,
    pub image: PathBuf,
}

impl Loop {
    /// A device for this image.
    pub fn new(image: &Path) -> Loop {
        let said = run(Command::new("losetup").args(["--find", "--show"]).arg(image));
        Loop { device: said.trim().to_owned(), image: image.to_owned() }
    }

    /// Puts an empty one under the raw disk of a machine that has not been started. It is 512 bytes smaller than the file
    /// was: a device has whole pages.
    pub fn under(side: &mut Side) -> Loop {
        let image = side.home.path().join("volume");
        std::fs::File::create(&image).unwrap().set_len(SIZE - 512).unwrap();
        let volume = Loop::new(&image);
        for argument in &mut side.args {
            *argument = argument.replace(
                "file.driver=file,file.filename=DIR/vd0.raw",
                &format!("file.driver=host_device,file.filename={}", volume.device),
            );
        }
        side.models[0].truncate(SIZE as usize - 512);
        volume
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
    }
}
