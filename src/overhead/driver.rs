//! The guest's driver: a virtio-blk disk, used from outside of the machine.
//!
//! What backups insert sits between a guest's device and its disk, so only requests that go through the device meet it: an
//! export of the disk would pass it by. And a real guest's processor would be software here wherever there is no KVM, and
//! disturb the figures everywhere. So this process plays the guest. It shares the machine's memory with QEMU and has the
//! device's virtqueue in it; it tells the device of new requests through QEMU's test protocol ([`super::qtest`]), which is
//! in every QEMU, and watches the queue for answers. The machine's own processor executes one `hlt`.
//!
//! ```text
//!   this process                         QEMU
//!   requests, bytes ──► shared memory ◄──► virtio-blk-pci ──► (filter) ──► disk node
//!   doorbell ─────────► qtest socket ────►   "
//!   answers  ◄───────── used ring    ◄────   "
//! ```
//!
//! * **Doorbells** ring once for all requests that were added together, and not while the device says that it is still
//!   looking (`NO_NOTIFY`), as drivers do. No interrupts are asked for.
//! * **Waiting** sleeps for a moment between two looks, so that it does not take the processor from what is measured: a
//!   latency may come out up to a tenth of a millisecond too long, of every method alike.
//! * Numbers in the queue are little-endian, as the hosts are that this runs on.
//! * A doorbell reaches a stopped machine as well, which a guest's never does: so the load stands still from the event `STOP`
//!   to `RESUME`. What was rung for just before QEMU sent the event may still fall into the stop.
//! * **Safety.** Each slot's bytes belong to the driver until they are submitted, and to the device until its answer.
//!
//! The device: Virtual I/O Device (VIRTIO) 1.2, sections 2.7 (split queues), 4.1 (PCI) and 5.2 (block).

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering, fence};

use memmap2::{MmapOptions, MmapRaw};

use super::error::DriverError;
use super::qtest::Qtest;

/// The machine's memory.
pub const MEMORY_BYTES: u64 = 64 << 20;
/// Most requests under way: three descriptors each fit into a queue of 256.
pub const MAX_DEPTH: u16 = 64;
/// Longest request.
pub const MAX_REQUEST_BYTES: usize = 64 << 10;
/// The device's place on the bus, `addr=4`.
pub const SLOT: u32 = 4;

const SECTOR_BYTES: u64 = 512;
const QUEUE: u16 = 256;
/// Where the device's registers are put: a hole of the machine's address space.
const WINDOW: u64 = 0xe000_0000;
/// Parts of the memory. Above 1 MiB, where the firmware has nothing.
const DESCRIPTORS: usize = 0x20_0000;
const AVAILABLE: usize = 0x21_0000;
const USED: usize = 0x22_0000;
const HEADERS: usize = 0x23_0000;
const DATA: usize = 0x40_0000;
const _: () = assert!(DATA + MAX_DEPTH as usize * MAX_REQUEST_BYTES <= MEMORY_BYTES as usize);
const _: () = assert!(MAX_DEPTH * 3 <= QUEUE);
/// A header, and behind it the answer's byte.
const HEADER_BYTES: usize = 32;

const VENDOR_CAPABILITY: u32 = 9;
const COMMON: u32 = 1;
const NOTIFY: u32 = 2;
const DEVICE: u32 = 4;
const FLUSH_FEATURE: u32 = 1 << 9;
const VERSION_1: u32 = 1;
const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// What is asked of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// The slot's bytes become those of the disk.
    Read,
    /// The disk's bytes become those of the slot.
    Write,
    /// What was written is to be durable.
    Flush,
}

/// The disk.
#[derive(Debug)]
pub struct Disk {
    qtest: Qtest,
    memory: MmapRaw,
    doorbell: String,
    size_bytes: u64,
    depth: u16,
    /// Which slots the device has.
    busy: Vec<bool>,
    /// Requests that were ever added, and of which the device was told.
    added: u16,
    /// Answers that were ever taken.
    taken: u16,
    told: u16,
}

/// Where a capability says that registers are.
#[derive(Clone, Copy, Default)]
struct Registers {
    bar: u32,
    offset: u64,
    multiplier: u64,
}

impl Disk {
    /// Brings the device up, as a guest's driver does at its start. `memory` is the machine's; `depth` requests (1 to
    /// [`MAX_DEPTH`]) can be under way.
    pub fn connect(socket: &Path, memory: &File, depth: u16) -> Result<Self, DriverError> {
        let mut qtest = Qtest::connect(socket)?;
        let memory = MmapOptions::new().len(MEMORY_BYTES as usize).map_raw(memory)?;
        let (common, notify, device) = find_registers(&mut qtest)?;
        if [common, notify, device].iter().any(|r| r.bar != common.bar || r.offset > 0x1_0000) {
            return Err(DriverError::Device("its registers lie in several windows"));
        }
        // A 64-bit window, memory and bus mastering switched on.
        qtest.pci_write(SLOT, 0x10 + 4 * common.bar, WINDOW as u32)?;
        qtest.pci_write(SLOT, 0x14 + 4 * common.bar, 0)?;
        let command = qtest.pci_read(SLOT, 4)?;
        qtest.pci_write(SLOT, 4, command | 6)?;

        let base = WINDOW + common.offset;
        let mut write =
            |width: char, at: u64, value: u64| qtest.call(&format!("write{width} {:#x} {value:#x}", base + at));
        write('b', 0x14, 0)?;
        write('b', 0x14, 3)?;
        for (half, feature) in [(0, FLUSH_FEATURE), (1, VERSION_1)] {
            write('l', 0x08, half)?;
            write('l', 0x0c, u64::from(feature))?;
        }
        write('b', 0x14, 0x0b)?;
        write('w', 0x16, 0)?;
        write('w', 0x18, u64::from(QUEUE))?;
        for (at, place) in [(0x20, DESCRIPTORS), (0x28, AVAILABLE), (0x30, USED)] {
            write('l', at, place as u64)?;
            write('l', at + 4, 0)?;
        }
        write('w', 0x1c, 1)?;
        write('b', 0x14, 0x0f)?;
        if qtest.call(&format!("readb {:#x}", base + 0x14))? != 0x0f {
            return Err(DriverError::Device("it refuses to be driven with flushes"));
        }
        let place = qtest.call(&format!("readw {:#x}", base + 0x1e))?;
        let doorbell = format!("writew {:#x} 0\n", WINDOW + notify.offset + place * notify.multiplier);
        let sectors = qtest.call(&format!("readq {:#x}", WINDOW + device.offset))?;
        let size_bytes = sectors.checked_mul(SECTOR_BYTES).ok_or(DriverError::Device("its size is nonsense"))?;
        let depth = depth.clamp(1, MAX_DEPTH);
        let busy = vec![false; usize::from(depth)];
        let mut disk = Self { qtest, memory, doorbell, size_bytes, depth, busy, added: 0, taken: 0, told: 0 };
        disk.prepare();
        Ok(disk)
    }

    /// Size of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// How many slots there are.
    pub fn depth(&self) -> usize {
        usize::from(self.depth)
    }

    /// Writes the parts of the memory that never change: each slot has its own three descriptors.
    fn prepare(&mut self) {
        for slot in 0..self.depth() {
            let header = HEADERS + slot * HEADER_BYTES;
            let first = slot * 3;
            self.put_descriptor(first, header, 16, NEXT, first as u16 + 1);
            self.put_descriptor(first + 2, header + 16, 1, DEVICE_WRITES, 0);
        }
        self.word(AVAILABLE).store(NO_INTERRUPT, Ordering::Relaxed);
    }

    fn put_descriptor(&mut self, index: usize, at: usize, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&(at as u64).to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(DESCRIPTORS + index * 16, &bytes);
    }

    /// Copies bytes into the memory.
    fn put(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.memory.len());
        // SAFETY: the range lies in the mapping, which `bytes` cannot overlap. The device reads this part only after
        // `submit`, whose fence comes later.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.memory.as_mut_ptr().add(at), bytes.len()) }
    }

    /// A 16-bit word that both sides use.
    fn word(&self, at: usize) -> &AtomicU16 {
        assert!(at.is_multiple_of(2) && at + 2 <= self.memory.len());
        // SAFETY: aligned (mappings begin at pages), inside the mapping, which lives as long as `self`, and on our side never
        // used but atomically.
        unsafe { &*self.memory.as_mut_ptr().add(at).cast::<AtomicU16>() }
    }

    /// The bytes of a slot that the device does not have; at most [`MAX_REQUEST_BYTES`].
    pub fn bytes(&mut self, slot: usize, len: usize) -> &mut [u8] {
        assert!(!self.busy[slot] && len <= MAX_REQUEST_BYTES);
        // SAFETY: inside the mapping (asserted where the parts are defined); the device does not touch it, since the slot
        // is not submitted, and the borrow of `self` keeps it so.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().add(DATA + slot * MAX_REQUEST_BYTES), len) }
    }

    /// Adds a request. The device looks at it after [`Disk::ring`] at the latest.
    pub fn submit(&mut self, slot: usize, ask: Ask, offset_bytes: u64, len: usize) {
        assert!(!self.busy[slot] && len <= MAX_REQUEST_BYTES && offset_bytes.is_multiple_of(SECTOR_BYTES));
        let (kind, flags): (u32, u16) = match ask {
            Ask::Read => (0, NEXT | DEVICE_WRITES),
            Ask::Write => (1, NEXT),
            Ask::Flush => (4, 0),
        };
        let mut header = [0; 17];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&(offset_bytes / SECTOR_BYTES).to_le_bytes());
        header[16] = 0xff;
        let (at, first) = (HEADERS + slot * HEADER_BYTES, slot * 3);
        self.put(at, &header);
        let after_header = if ask == Ask::Flush { first + 2 } else { first + 1 };
        self.put_descriptor(first, at, 16, NEXT, after_header as u16);
        if ask != Ask::Flush {
            self.put_descriptor(first + 1, DATA + slot * MAX_REQUEST_BYTES, len as u32, flags, first as u16 + 2);
        }
        self.busy[slot] = true;
        let entry = AVAILABLE + 4 + usize::from(self.added % QUEUE) * 2;
        self.word(entry).store(first as u16, Ordering::Relaxed);
        self.added = self.added.wrapping_add(1);
        self.word(AVAILABLE + 2).store(self.added, Ordering::Release);
    }

    /// Tells the device of what was added, unless it is still looking.
    pub fn ring(&mut self) -> Result<(), DriverError> {
        if self.told == self.added {
            return Ok(());
        }
        self.told = self.added;
        // The index must be seen before the device's flag is read: the device does the opposite.
        fence(Ordering::SeqCst);
        if self.word(USED).load(Ordering::Relaxed) & NO_NOTIFY == 0 {
            self.qtest.tell(&self.doorbell)?;
        }
        Ok(())
    }

    /// The next answer, if there is one: the slot, which is free again, and whether it went well.
    pub fn answer(&mut self) -> Result<Option<(usize, bool)>, DriverError> {
        if self.word(USED + 2).load(Ordering::Acquire) == self.taken {
            return Ok(None);
        }
        let entry = USED + 4 + usize::from(self.taken % QUEUE) * 8;
        let slot = usize::from(self.word(entry).load(Ordering::Relaxed)) / 3;
        if !self.busy.get(slot).is_some_and(|busy| *busy) {
            return Err(DriverError::Device("it answers what was not asked"));
        }
        self.taken = self.taken.wrapping_add(1);
        self.busy[slot] = false;
        let place = HEADERS + slot * HEADER_BYTES + 16;
        // SAFETY: inside the mapping; a byte has no alignment, and is used atomically while the device may write it.
        let status = unsafe { &*self.memory.as_mut_ptr().add(place).cast::<AtomicU8>() }.load(Ordering::Relaxed);
        Ok(Some((slot, status == 0)))
    }

    /// Whether QEMU is still there, and rings once more: the device may have missed a doorbell that was not rung.
    pub fn nudge(&mut self) -> Result<(), DriverError> {
        let doorbell = self.doorbell.clone();
        self.qtest.call(doorbell.trim_end()).map(drop)
    }
}

/// The device's registers: common, doorbells, its own.
fn find_registers(qtest: &mut Qtest) -> Result<(Registers, Registers, Registers), DriverError> {
    if qtest.pci_read(SLOT, 0)? & 0xffff != 0x1af4 {
        return Err(DriverError::Device("it is not on the bus"));
    }
    let mut found = [Registers::default(); 6];
    let mut at = qtest.pci_read(SLOT, 0x34)? & 0xfc;
    for _ in 0..48 {
        if at == 0 {
            break;
        }
        let head = qtest.pci_read(SLOT, at)?;
        if head & 0xff == VENDOR_CAPABILITY {
            let bar = qtest.pci_read(SLOT, at + 4)? & 0xff;
            let offset = u64::from(qtest.pci_read(SLOT, at + 8)?);
            let multiplier = u64::from(qtest.pci_read(SLOT, at + 16)?);
            if let Some(place) = found.get_mut((head >> 24) as usize) {
                *place = Registers { bar, offset, multiplier };
            }
        }
        at = head >> 8 & 0xfc;
    }
    let [common, notify, device] = [COMMON, NOTIFY, DEVICE].map(|kind| found[kind as usize]);
    if notify.multiplier == 0 || common.bar > 4 {
        return Err(DriverError::Device("it is not of version 1"));
    }
    Ok((common, notify, device))
}
