//! Peers that are not a well-behaved QEMU: silent, talking nonsense, or with a ring that makes no sense. Whatever they do ends
//! in an error, soon, and without a panic or a hang.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::common::Rng;
use crate::vhost_fixture::{MIB, block_on};
use livebackup::block::{BlockSource, SourceError, SourceRules};
use livebackup::extent::Extent;
use livebackup::vhost::{VhostError, VhostSource};

const RULES: SourceRules = SourceRules { boundary_bytes: MIB, in_flight_bytes: 4 * MIB };
const SIZE: u64 = 8 * MIB;

/// Connects to a peer that a thread plays.
fn against(timeout: Duration, peer: impl FnOnce(UnixStream) + Send + 'static) -> Result<VhostSource, VhostError> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || peer(theirs));
    VhostSource::over(timeout, ours, SIZE, RULES)
}

#[test]
fn a_peer_that_never_answers() {
    let start = Instant::now();
    let error = against(Duration::from_millis(300), |mut peer| {
        let _ = peer.read_to_end(&mut vec![]);
    });
    assert!(matches!(error, Err(VhostError::NoAnswer { .. })));
    assert!(start.elapsed() < Duration::from_secs(60));
    // One that answers some of it, a byte at a time, is no better.
    let error = against(Duration::from_millis(300), |mut peer| {
        // The header of a right answer, and then nothing like its end.
        let answer = [1u32.to_le_bytes(), 5u32.to_le_bytes(), 8u32.to_le_bytes()].concat();
        for byte in answer {
            let _ = peer.write_all(&[byte]);
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = peer.read_to_end(&mut vec![]);
    });
    assert!(matches!(error, Err(VhostError::NoAnswer { .. })), "{:?}", error.err());
}

#[test]
fn a_peer_that_hangs_up() {
    for wait in [0, 1, 30] {
        let error = against(Duration::from_secs(10), move |mut peer| {
            if wait > 0 {
                let _ = peer.read(&mut vec![0; wait]);
            }
        });
        assert!(matches!(error, Err(VhostError::Handshake { .. })));
    }
}

#[test]
fn a_peer_that_talks_nonsense() {
    let seed = Rng::new().next();
    for round in 0..60 {
        let result = against(Duration::from_secs(10), move |mut peer| {
            let mut rng = Rng::seeded(seed ^ round);
            let mut noise = vec![0; 1 + rng.below(6000) as usize];
            rng.fill(&mut noise);
            if round % 2 == 0 {
                // A plausible header: the request asked for, version 1, a reply, any length.
                noise.resize(noise.len().max(16), 0);
                noise[..4].copy_from_slice(&1u32.to_le_bytes());
                noise[4..8].copy_from_slice(&5u32.to_le_bytes());
                noise[8..12].copy_from_slice(&(rng.below(400) as u32).to_le_bytes());
            }
            let _ = peer.write_all(&noise);
            let _ = peer.shutdown(std::net::Shutdown::Write);
            let _ = peer.read_to_end(&mut vec![]);
        });
        assert!(result.is_err());
    }
}

/// A device that shakes hands as QEMU does, and whose ring the test writes.
struct Device {
    peer: UnixStream,
    /// Ring memory and where our process has it (its address in the requests).
    regions: Vec<(u64, memmap2::MmapMut)>,
    used_address: u64,
    call: Option<OwnedFd>,
}

impl Device {
    /// Plays the handshake until both regions, the ring and the buffers, are there.
    fn shake_hands(peer: UnixStream, change_reply: impl Fn(u32, &mut Vec<u8>)) -> Option<Device> {
        let mut device = Device { peer, regions: vec![], used_address: 0, call: None };
        while device.regions.len() < 2 {
            let (request, needs_reply, body, fd) = device.message()?;
            let u64_at = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().unwrap());
            let mut reply = match request {
                1 => (1u64 << 32 | 1 << 30 | 1 << 29 | 1 << 13 | 1 << 9).to_le_bytes().to_vec(), // features
                15 => (1u64 << 0 | 1 << 3 | 1 << 9 | 1 << 15).to_le_bytes().to_vec(),            // protocol features
                17 => 1u64.to_le_bytes().to_vec(),                                               // queues
                36 => 8u64.to_le_bytes().to_vec(),                                               // memory slots
                24 => {
                    let mut config = body.clone();
                    config[12..20].copy_from_slice(&(SIZE / 512).to_le_bytes());
                    config
                }
                _ => 0u64.to_le_bytes().to_vec(),
            };
            match request {
                37 => {
                    let file = std::fs::File::from(fd.unwrap());
                    // SAFETY: shared with this process on purpose; accessed as plain bytes.
                    let map = unsafe { memmap2::MmapOptions::new().len(u64_at(16) as usize).map_mut(&file) };
                    device.regions.push((u64_at(24), map.unwrap()));
                }
                9 => device.used_address = u64_at(16),
                13 => device.call = fd,
                _ => drop(fd),
            }
            change_reply(request, &mut reply);
            if needs_reply || matches!(request, 1 | 15 | 17 | 24 | 36) {
                let mut out = vec![];
                out.extend(request.to_le_bytes());
                out.extend(5u32.to_le_bytes());
                out.extend((reply.len() as u32).to_le_bytes());
                out.extend(reply);
                device.peer.write_all(&out).ok()?;
            }
        }
        Some(device)
    }

    fn message(&mut self) -> Option<(u32, bool, Vec<u8>, Option<OwnedFd>)> {
        use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
        let mut head = [0; 12];
        let mut space = nix::cmsg_space!([std::os::fd::RawFd; 4]);
        let mut iov = [std::io::IoSliceMut::new(&mut head)];
        let got = recvmsg::<()>(self.peer.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).ok()?;
        let len = got.bytes;
        let fd = got.cmsgs().unwrap().find_map(|c| match c {
            // SAFETY: the kernel has just made it for us.
            ControlMessageOwned::ScmRights(fds) => Some(unsafe { OwnedFd::from_raw_fd(fds[0]) }),
            _ => None,
        });
        if len < 12 {
            return None;
        }
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
        let mut body = vec![0; word(8) as usize];
        self.peer.read_exact(&mut body).ok()?;
        Some((word(0), word(4) & 8 != 0, body, fd))
    }

    /// Writes the used ring: these elements, and the index of the next one.
    fn complete(&mut self, elements: &[u32], index: u16) {
        let (base, ring) = &mut self.regions[0];
        let used = (self.used_address - *base) as usize;
        for (i, id) in elements.iter().enumerate() {
            ring[used + 4 + i * 8..][..4].copy_from_slice(&id.to_le_bytes());
            ring[used + 8 + i * 8..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
        }
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        ring[used + 2..used + 4].copy_from_slice(&index.to_le_bytes());
        nix::unistd::write(self.call.as_ref().unwrap(), &1u64.to_ne_bytes()).unwrap();
    }
}

#[test]
fn a_handshake_with_one_wrong_answer() {
    for wrong in [1, 15, 17, 24, 36, 37, 8, 9, 12, 13, 18] {
        for len in [0, 1, 7, 9, 72, 300, 5000] {
            let result = against(Duration::from_millis(500), move |peer| {
                let change = move |request, reply: &mut Vec<u8>| {
                    if request == wrong {
                        *reply = vec![0xff; len];
                    }
                };
                let _ = Device::shake_hands(peer, change);
            });
            assert!(result.is_err(), "request {wrong} with {len} bytes");
        }
    }
}

#[test]
fn rings_that_make_no_sense() {
    let seed = Rng::new().next();
    for round in 0..40 {
        let source = against(Duration::from_secs(10), move |peer| {
            let mut rng = Rng::seeded(seed ^ round);
            let Some(mut device) = Device::shake_hands(peer, |_, _| ()) else { return };
            // Let the reads come in; then say all manner of things.
            std::thread::sleep(Duration::from_millis(20));
            let elements: Vec<_> = (0..1024)
                .map(|i| match round % 4 {
                    0 => rng.next() as u32,
                    1 => 0,
                    2 => i * 3,
                    _ => rng.below(1100) as u32,
                })
                .collect();
            device.complete(&elements, rng.next() as u16);
            std::thread::sleep(Duration::from_millis(30));
        })
        .unwrap();
        block_on(async {
            let reads = (0..8).map(|i| source.read(Extent::new(i * 1000, 4096)));
            let start = Instant::now();
            for got in futures_util::future::join_all(reads).await {
                // What a liar says was read is not for us to know; what he did not say ends with him.
                match got {
                    Ok(bytes) => assert_eq!(bytes.len(), 4096),
                    Err(error) => assert!(matches!(error, SourceError::Gone { .. }), "{error}"),
                }
            }
            assert!(start.elapsed() < Duration::from_secs(60));
        });
    }
}
