//! What a session's two ends owe each other beyond well-formed frames. Pure.
//!
//! A client does not believe a server: [`Promise`] holds its events to what [`Event`](super::message::Event) promises, so
//! that a rogue or broken one can spoil nothing but its own session. A server does not believe a client: [`Acks`] lets
//! it acknowledge what was sent, and each byte once, so that acknowledgements cannot pile up without end; [`Given`] holds
//! its digests to their order.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::digests::Digests;
use super::frame::{MAX_ACK_EXTENTS, Place};
use super::message::{Ack, Begin, Begun};
use crate::area::MAX_AREAS;
use crate::codec::Packed;
use crate::extent::Extent;
use crate::limits::{MAX_CHUNK_BYTES, MAX_DISK_BYTES, MAX_DISKS, MAX_NAME_BYTES, MIN_CHUNK_BYTES};
use crate::machine::Taken;

/// What was broken, in words to be read after "the peer broke the protocol:".
pub type Breach = String;

/// Chunks of a disk that an audit may always have: some 2 MiB to be read.
pub const AUDIT_FLOOR_CHUNKS: u64 = 16;
/// Most chunks of one audit: half a request.
pub const MAX_AUDIT_CHUNKS: usize = 4096;
const _: () =
    assert!(MAX_AUDIT_CHUNKS * r#"{"chunk":,"digest":""},"#.len() + MAX_AUDIT_CHUNKS * (20 + 64) <= 512 * 1024);

/// Most extents of [`KnownAreas`](super::message::KnownAreas) in one request: a quarter of it.
pub const MAX_KNOWN_EXTENTS: usize = 4096;
const _: () = assert!(
    MAX_KNOWN_EXTENTS * (r#"{"offset_bytes":,"len_bytes":},"#.len() + 2 * "72057594037927936".len()) <= 288 * 1024
);

const _: () = assert!(MAX_DISKS * MAX_AREAS <= MAX_KNOWN_EXTENTS);

/// Checks what a client asks for.
pub fn check_begin(begin: &Begin) -> Result<(), Breach> {
    if !begin.chunk_bytes.is_power_of_two() || !(MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&begin.chunk_bytes) {
        return Err(format!(
            "chunks of {} bytes; {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES} are allowed",
            begin.chunk_bytes
        ));
    }
    if begin.digests.len() > MAX_DISKS {
        return Err(format!("digests of {} disks; {MAX_DISKS} are the most", begin.digests.len()));
    }
    if let Some(audit) = &begin.audit {
        let chunks = audit.disks.values().map(Vec::len).fold(0, usize::saturating_add);
        if audit.disks.len() > MAX_DISKS || chunks > MAX_AUDIT_CHUNKS {
            return Err(format!("an audit of {chunks} chunks; {MAX_AUDIT_CHUNKS} are the most"));
        }
    }
    if let Some(areas) = &begin.areas {
        let extents =
            areas.values().map(|known| known.left_out.len() + known.seen.len()).fold(0, usize::saturating_add);
        if areas.len() > MAX_DISKS || extents > MAX_KNOWN_EXTENTS {
            return Err(format!("{extents} extents of areas; {MAX_KNOWN_EXTENTS} are the most"));
        }
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
    /// Whether packed bytes were asked for.
    packs: bool,
    disks: Vec<Promised>,
    sent: bool,
    /// All was said to be sent on an earlier connection.
    was_sent: bool,
}

#[derive(Debug)]
struct Promised {
    size_bytes: u64,
    /// No further byte of the disk may lie before this.
    next_bytes: u64,
    /// Whether bytes may be said to be the same: the client gave digests.
    compared: bool,
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
        let mut disks = Vec::with_capacity(begun.disks.len());
        for one in &begun.disks {
            let (name, size_bytes) = (&one.disk.name, one.disk.size_bytes);
            let scanned = matches!(one.taken, Taken::Scan { .. });
            if scanned && !begin.digests.contains(name) {
                return Err(format!("a scan of disk {name:?}, of which no digests were offered"));
            }
            let audit = begin.audit.as_ref().and_then(|audit| audit.disks.get(name)).map_or(0, Vec::len);
            if one.audited_chunks > audit as u64 {
                return Err(format!("an audit of {} chunks of disk {name:?}; {audit} were given", one.audited_chunks));
            }
            if let Some(areas) = &one.areas {
                if begin.areas.is_none() && !areas.areas.is_empty() {
                    return Err(format!("areas of disk {name:?} as left out, which nobody asked for"));
                }
                if let Some(wrong) = areas.wrong(size_bytes) {
                    return Err(format!("{wrong} of disk {name:?}"));
                }
            }
            disks.push(Promised { size_bytes, next_bytes: 0, compared: scanned || one.audited_chunks > 0 });
        }
        let packs = begin.compression.is_some();
        Ok(Self { chunk_bytes: begin.chunk_bytes.into(), packs, disks, sent: false, was_sent: false })
    }

    /// Checks that bytes may be said to be the same.
    pub fn same(&mut self, place: Place) -> Result<(), Breach> {
        self.place(place)?;
        match self.disks.get(usize::from(place.disk)) {
            Some(disk) if disk.compared => Ok(()),
            _ => Err(format!("{} of disk {} as the same, which was not to be compared", place.extent, place.disk)),
        }
    }

    /// Checks packed bytes, as far as they can be without unpacking them.
    pub fn packed(&mut self, place: Place, packed: &Packed) -> Result<(), Breach> {
        self.place(place)?;
        let Place { disk, extent } = place;
        if !self.packs {
            return Err(format!("packed bytes of disk {disk}, which nobody asked for"));
        }
        match packed.is_in_chunks_of(self.chunk_bytes as u32) {
            true => Ok(()),
            false => Err(format!("{packed:?} as {extent} of disk {disk}, not in chunks of {}", self.chunk_bytes)),
        }
    }

    /// Checks a data or zero event.
    pub fn place(&mut self, place: Place) -> Result<(), Breach> {
        let Place { disk: index, extent } = place;
        let sent = self.is_sent();
        let Some(disk) = self.disks.get_mut(usize::from(index)) else {
            return Err(format!("{extent} of disk {index}, which was not begun"));
        };
        if sent {
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

    /// Of each disk, how far its bytes have come.
    pub fn have(&self) -> Vec<u64> {
        self.disks.iter().map(|disk| disk.next_bytes).collect()
    }

    /// All goes on from where it is, and is said to be sent once more.
    pub fn resumed(&mut self) {
        self.was_sent |= std::mem::take(&mut self.sent);
    }

    /// Whether all was said to be sent, on this connection or an earlier one.
    pub fn is_sent(&self) -> bool {
        self.sent || self.was_sent
    }

    /// Whether that was on an earlier one.
    pub fn is_sent_again(&self) -> bool {
        self.was_sent
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

/// In which order a client gives digests.
#[derive(Debug)]
pub struct Given {
    /// Disks that are scanned: index, and how many chunks they have.
    scans: Vec<(u16, u64)>,
    /// Which of them it is at.
    at: usize,
    /// The chunk that no digest may lie before.
    next_chunk: u64,
}

impl Given {
    /// For the session that was begun in answer to `begin`.
    pub fn new(begin: &Begin, begun: &Begun) -> Self {
        let scanned = |(_, disk): &(usize, &super::message::BegunDisk)| matches!(disk.taken, Taken::Scan { .. });
        let chunks = |size_bytes: u64| size_bytes.div_ceil(begin.chunk_bytes.into());
        let disks = begun.disks.iter().enumerate().filter(scanned);
        let scans = disks.map(|(i, disk)| (i as u16, chunks(disk.disk.size_bytes))).collect();
        Self { scans, at: 0, next_chunk: 0 }
    }

    /// Checks a batch.
    pub fn take(&mut self, digests: &Digests) -> Result<(), Breach> {
        let Digests { disk, first_chunk, .. } = *digests;
        let Some((_, chunks)) = self.scans.get(self.at).filter(|(scanned, _)| *scanned == disk) else {
            return Err(format!("digests of disk {disk}, which is not the one to be scanned now"));
        };
        if first_chunk < self.next_chunk || digests.end_chunk() > *chunks {
            let end = digests.end_chunk();
            return Err(format!("digests of chunks {first_chunk}..{end}; {}..{chunks} are left", self.next_chunk));
        }
        self.next_chunk = digests.end_chunk();
        if digests.digests.is_empty() {
            if first_chunk != *chunks {
                return Err(format!("the end of the digests of disk {disk} at chunk {first_chunk} of {chunks}"));
            }
            (self.at, self.next_chunk) = (self.at + 1, 0);
        }
        Ok(())
    }
}

/// What a client may acknowledge. Shared by the two directions of one connection.
#[derive(Debug)]
pub struct Acks {
    chunk_bytes: u64,
    disks: Vec<Acked>,
    sent: AtomicBool,
    over: AtomicBool,
    /// Acknowledgements that were taken.
    heard: AtomicU64,
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
        Self {
            chunk_bytes: begin.chunk_bytes.into(),
            disks,
            sent: AtomicBool::new(false),
            over: AtomicBool::new(false),
            heard: AtomicU64::new(0),
        }
    }

    /// A client has come back and has of each disk all before these offsets: what lies behind is sent again where it is not
    /// acknowledged, and is not to be acknowledged before that.
    pub fn resumed(&self, have: &[u64]) {
        self.sent.store(false, Ordering::Relaxed);
        for (disk, have) in self.disks.iter().zip(have.iter().copied().chain(std::iter::repeat(0))) {
            disk.end_bytes.store(have, Ordering::Relaxed);
        }
    }

    /// All is about to have been sent.
    pub fn all_sent(&self) {
        self.sent.store(true, Ordering::Relaxed);
    }

    /// Whether the client may say that it has all.
    pub fn are_sent(&self) -> bool {
        self.sent.load(Ordering::Relaxed)
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
        self.heard.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// How many acknowledgements were taken, over all connections.
    pub fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }
}
