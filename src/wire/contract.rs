//! What a session's two ends owe each other beyond well-formed frames. Pure.
//!
//! A client does not believe a server: [`Promise`] holds its events to what [`Event`](super::message::Event) promises, so
//! that a rogue or broken one can spoil nothing but its own session. A server does not believe a client: [`Acks`] lets
//! it acknowledge what was sent, and each byte once, so that acknowledgements cannot pile up without end.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::frame::{MAX_ACK_EXTENTS, Place};
use super::message::{Ack, Begin, Begun};
use crate::extent::Extent;
use crate::limits::{MAX_CHUNK_BYTES, MAX_DISK_BYTES, MAX_DISKS, MAX_NAME_BYTES, MIN_CHUNK_BYTES};

/// What was broken, in words to be read after "the peer broke the protocol:".
pub type Breach = String;

/// Checks what a client asks for.
pub fn check_begin(begin: &Begin) -> Result<(), Breach> {
    if !begin.chunk_bytes.is_power_of_two() || !(MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&begin.chunk_bytes) {
        return Err(format!(
            "chunks of {} bytes; {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES} are allowed",
            begin.chunk_bytes
        ));
    }
    Ok(())
}

/// Whether an extent consists of whole chunks of a disk, the last of which may be cut by the disk's end.
fn is_aligned(extent: Extent, chunk_bytes: u64, size_bytes: u64) -> bool {
    extent.offset_bytes.is_multiple_of(chunk_bytes)
        && (extent.end().is_multiple_of(chunk_bytes) || extent.end() == size_bytes)
}

/// What a server promised: the order and bounds of its events.
#[derive(Debug)]
pub struct Promise {
    chunk_bytes: u64,
    disks: Vec<Promised>,
    sent: bool,
}

#[derive(Debug)]
struct Promised {
    size_bytes: u64,
    /// No further byte of the disk may lie before this.
    next_bytes: u64,
}

impl Promise {
    /// Checks what was begun in answer to `begin`, and remembers what follows from it.
    pub fn new(begin: &Begin, begun: &Begun) -> Result<Self, Breach> {
        if begun.disks.len() > MAX_DISKS {
            return Err(format!("{} disks; {MAX_DISKS} are the most", begun.disks.len()));
        }
        for (i, one) in begun.disks.iter().enumerate() {
            let (name, size) = (&one.disk.name, one.disk.size_bytes);
            if name.is_empty() || name.len() > MAX_NAME_BYTES {
                return Err(format!("a disk with a name of {} bytes", name.len()));
            }
            if begun.disks[..i].iter().any(|other| other.disk.name == *name) {
                return Err(format!("two disks with the name {name:?}"));
            }
            if size > MAX_DISK_BYTES {
                return Err(format!("disk {name:?} with an impossible size of {size} bytes"));
            }
        }
        let promised = |size_bytes| Promised { size_bytes, next_bytes: 0 };
        let disks = begun.disks.iter().map(|d| promised(d.disk.size_bytes)).collect();
        Ok(Self { chunk_bytes: begin.chunk_bytes.into(), disks, sent: false })
    }

    /// Checks a data or zero event.
    pub fn place(&mut self, place: Place) -> Result<(), Breach> {
        let Place { disk: index, extent } = place;
        let Some(disk) = self.disks.get_mut(usize::from(index)) else {
            return Err(format!("{extent} of disk {index}, which was not begun"));
        };
        if self.sent {
            return Err(format!("{extent} of disk {index} after all was said to be sent"));
        }
        if !extent.fits(disk.size_bytes) {
            return Err(format!("{extent} of disk {index}, which has {} bytes", disk.size_bytes));
        }
        if !is_aligned(extent, self.chunk_bytes, disk.size_bytes) {
            return Err(format!("{extent} of disk {index}, not in chunks of {}", self.chunk_bytes));
        }
        if extent.offset_bytes < disk.next_bytes {
            return Err(format!("{extent} of disk {index} after bytes up to {}", disk.next_bytes));
        }
        disk.next_bytes = extent.end();
        Ok(())
    }

    /// Checks that all was sent, once.
    pub fn sent(&mut self) -> Result<(), Breach> {
        if std::mem::replace(&mut self.sent, true) { Err("\"sent\" twice".to_owned()) } else { Ok(()) }
    }

    /// Checks the end.
    pub fn end(&self) -> Result<(), Breach> {
        if self.sent { Ok(()) } else { Err("the end before all was sent".to_owned()) }
    }
}

/// What a client may acknowledge. Shared by the two directions of one connection.
#[derive(Debug)]
pub struct Acks {
    chunk_bytes: u64,
    disks: Vec<Acked>,
    over: AtomicBool,
}

#[derive(Debug)]
struct Acked {
    size_bytes: u64,
    /// First byte after all that was sent.
    end_bytes: AtomicU64,
    /// Bytes that were sent and not acknowledged.
    open_bytes: AtomicU64,
}

impl Acks {
    /// For the session that was begun in answer to `begin`.
    pub fn new(begin: &Begin, begun: &Begun) -> Self {
        let fresh = |size_bytes| Acked { size_bytes, end_bytes: AtomicU64::new(0), open_bytes: AtomicU64::new(0) };
        let disks = begun.disks.iter().map(|d| fresh(d.disk.size_bytes)).collect();
        Self { chunk_bytes: begin.chunk_bytes.into(), disks, over: AtomicBool::new(false) }
    }

    /// The end is about to be sent: the client may close from now on.
    pub fn over(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// Whether the client may close.
    pub fn are_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// These bytes are about to be sent.
    pub fn sending(&self, place: Place) {
        let Some(disk) = self.disks.get(usize::from(place.disk)) else { return };
        disk.end_bytes.fetch_max(place.extent.end(), Ordering::Relaxed);
        disk.open_bytes.fetch_add(place.extent.len_bytes, Ordering::Relaxed);
    }

    /// Checks an acknowledgement and books it.
    pub fn take(&self, ack: &Ack) -> Result<(), Breach> {
        let index = ack.disk;
        let Some(disk) = self.disks.get(usize::from(index)) else {
            return Err(format!("an acknowledgement for disk {index}, which was not begun"));
        };
        if ack.extents.is_empty() || ack.extents.len() > MAX_ACK_EXTENTS {
            return Err(format!("an acknowledgement of {} extents", ack.extents.len()));
        }
        let end_bytes = disk.end_bytes.load(Ordering::Relaxed);
        for extent in &ack.extents {
            if extent.len_bytes == 0 || !extent.fits(end_bytes) {
                return Err(format!(
                    "an acknowledgement of {extent} of disk {index}; bytes up to {end_bytes} were sent"
                ));
            }
            if !is_aligned(*extent, self.chunk_bytes, disk.size_bytes) {
                return Err(format!("an acknowledgement of {extent}, not in chunks of {}", self.chunk_bytes));
            }
            let booked = disk
                .open_bytes
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |open| open.checked_sub(extent.len_bytes));
            booked.map_err(|_| format!("more acknowledgements for disk {index} than was sent"))?;
        }
        Ok(())
    }
}
