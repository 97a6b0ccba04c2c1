//! Checkpoints: what was written to a disk between two instants, and the sealed log that remembers it.
//!
//! - [`bitmap`]: which granules were written, in memory.
//! - [`mod@format`]: one checkpoint in one file, byte for byte.
//! - [`log`]: the files of one disk, the running epoch, and the answer to "what changed since?"; old neighbours are merged.

pub mod bitmap;
mod epoch;
mod error;
pub mod format;
pub mod fuzz;
pub mod log;
mod merge;
mod open;
mod runs;
mod stamp;

pub use bitmap::{Bitmap, SizeMismatch};
pub use epoch::{Epoch, EpochEnd, QemuInstance};
pub use error::{LogError, NotInLog};
pub use format::{FormatError, Header, Payload};
pub use log::{Damaged, EpochStart, Log, Sealed};
pub use merge::Limits;
pub use stamp::{Closed, DeviceCounters, DeviceStamp, FileNumbers, FileStamp, Layer, Medium, Stamp};
