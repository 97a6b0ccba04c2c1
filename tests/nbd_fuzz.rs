//! The decoders against mutated, cut and random bytes: they never panic, never hang, and never take more memory than
//! what they were sent and a fixed bound allow.

#![allow(clippy::unwrap_used)]

mod common;
mod nbd_help;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use common::Rng;
use livebackup::nbd::fuzz;
use nbd_help::say;

/// Counts what is allocated and the most of it.
struct Counting;
static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: it passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Most memory beyond the input of one run: a few payloads of the largest kind.
const MOST_BYTES: usize = 256 << 10;

fn bounded<T>(input: &[u8], target: impl Fn(&[u8]) -> T) -> T {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    let out = target(input);
    let took = PEAK.load(Relaxed) - before;
    assert!(took <= MOST_BYTES + 8 * input.len(), "{took} bytes of memory for {} of input", input.len());
    out
}

fn mutate(valid: &[u8], rng: &mut Rng) -> Vec<u8> {
    const NASTY: [u8; 6] = [0, 1, 0x7f, 0x80, 0xfe, 0xff];
    let mut bytes = valid.to_vec();
    for _ in 0..1 + rng.below(4) {
        if bytes.is_empty() {
            break;
        }
        let at = rng.below(bytes.len() as u64) as usize;
        match rng.below(6) {
            0 => bytes.truncate(at),
            1 => bytes[at] ^= 1 << rng.below(8),
            2 => bytes[at] = NASTY[rng.below(6) as usize],
            3 => bytes.insert(at, rng.next() as u8),
            4 => drop(bytes.remove(at)),
            _ => {
                let piece: Vec<u8> = bytes[at..].iter().copied().take(rng.below(64) as usize).collect();
                bytes.splice(at..at, piece);
            }
        }
    }
    bytes
}

fn run(name: &str, valid: &[Vec<u8>], target: impl Fn(&[u8])) {
    let rounds = std::env::var("LIVEBACKUP_FUZZ_ROUNDS").map_or(20_000, |n| n.parse().unwrap());
    for (seed, bytes) in valid.iter().enumerate() {
        (0..=bytes.len()).for_each(|len| bounded(&bytes[..len], &target));
        let mut rng = Rng::seeded(seed as u64);
        (0..rounds).for_each(|_| bounded(&mutate(bytes, &mut rng), &target));
    }
    let mut rng = Rng::seeded(99);
    for _ in 0..rounds {
        let mut bytes = vec![0; rng.below(200) as usize];
        rng.fill(&mut bytes);
        bounded(&bytes, &target);
    }
    println!("{name}: {} streams, {rounds} mutations each", valid.len());
}

#[test]
fn any_bytes_are_survived() {
    let context = "qemu:dirty-bitmap:b";
    let whole = say::negotiation(true, &[context], 1 << 30, 0x1ff);
    assert_eq!(fuzz::negotiation(&whole).unwrap().size_bytes, 1 << 30);
    let huge = [say::GREETING, &say::option_reply(8, 1, b"")[..16], &[0xff; 64]].concat();
    run("negotiation", &[whole, say::negotiation(false, &[], 1 << 20, 1), huge], |bytes| {
        fuzz::negotiation(bytes);
    });

    let mut list = say::GREETING.to_vec();
    for name in ["a", "disk0", ""] {
        let data = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), b"words"].concat();
        list.extend(say::option_reply(3, 2, &data));
    }
    list.extend(say::option_reply(3, 1, b""));
    assert_eq!(fuzz::listing(&list), Some(3));
    run("listing", &[list], |bytes| {
        fuzz::listing(bytes);
    });

    let [read, second, trim, status] = [1 << 16, (1 << 16) + 1, 2 << 16, 3 << 16];
    let structured = [
        vec![1],
        say::status(true, status, 1, &[(65536, 1), (65536, 0), (1 << 31, 1)]),
        say::data(false, second, 8192 + 100, &[7; 3996]),
        say::hole(false, read, 4096, 96),
        say::data(false, read, 4192, &[9; 4000]),
        say::hole(true, second, 8192, 100),
        say::chunk(true, 0, trim, b""),
        say::chunk(true, 0, read, b""),
    ]
    .concat();
    let expected = [&[0; 96][..], &[9; 4000], &[0; 100], &[7; 3996]].concat();
    assert_eq!(fuzz::replies(&structured), (Some(expected), 3));
    let simple = [
        vec![0],
        say::simple(trim, 22, b""),
        say::simple(second, 0, &[2; 4096]),
        say::simple(read, 0, &[1; 4096]),
        say::simple(status, 95, b""),
    ]
    .concat();
    assert_eq!(fuzz::replies(&simple), (Some([[1; 4096], [2; 4096]].concat()), 3));
    let errors = [
        vec![1],
        say::error(false, read, 5, "torn", Some(4096)),
        say::data(true, second, 8192, &[2; 4096]),
        say::chunk(true, 0, read, b""),
        say::error(true, trim, 1, &"x".repeat(4096), None),
    ]
    .concat();
    assert_eq!(fuzz::replies(&errors), (None, 2));
    // A status chunk that announces the longest payload and sends none of it.
    let mut long = vec![1];
    long.extend(&say::status(true, status, 1, &[])[..16]);
    long.extend((4 + 8 * (1u32 << 20)).to_be_bytes());
    run("replies", &[structured, simple, errors, long], |bytes| {
        fuzz::replies(bytes);
    });

    let option = |number: u32, data: &[u8]| {
        [b"IHAVEOPT", &number.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
    };
    let request = |flags: u16, command: u16, offset: u64, len: u32| {
        let head = [&0x2560_9513_u32.to_be_bytes()[..], &flags.to_be_bytes(), &command.to_be_bytes(), &[7; 8]].concat();
        [&head[..], &offset.to_be_bytes(), &len.to_be_bytes()].concat()
    };
    let size = fuzz::DISK_BYTES;
    let requests = [
        request(0, 0, 512, 1 << 20),
        request(4, 0, size - 1, 1),
        request(8, 7, 0, 1 << 30),
        request(0, 3, 0, 0),
        request(0, 5, 0, 65536),
        [request(0, 1, 0, 100), vec![1; 100]].concat(),
        request(0, 4, 0, 65536),
        request(0, 0, size, 1),
        request(0, 0, 0, (32 << 20) + 1),
        request(0, 2, 0, 0),
    ]
    .concat();
    let contexts = b"\0\0\0\x04disk\0\0\0\x02\0\0\0\x03x:y\0\0\0\x0fbase:allocation";
    let whole = [
        b"\0\0\0\x03".to_vec(),
        option(99, b"unknown"),
        option(3, b""),
        option(8, b""),
        option(10, contexts),
        option(6, b"\0\0\0\x04disk\0\x02\0\x01\0\x02"),
        option(7, b"\0\0\0\0\0\0"),
        requests.clone(),
    ]
    .concat();
    assert_eq!(fuzz::server(&whole), Some((10, 6)));
    let old = [b"\0\0\0\x01".to_vec(), option(1, b"disk"), requests].concat();
    // Without what was not agreed on: all in one chunk, and block status.
    assert_eq!(fuzz::server(&old), Some((10, 4)));
    let huge = [b"\0\0\0\x03IHAVEOPT\0\0\0\x0a\0\x01\0\0".to_vec(), vec![0; 100]].concat();
    run("server", &[whole, old, huge], |bytes| {
        fuzz::server(bytes);
    });
}
