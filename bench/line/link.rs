//! A line between two network namespaces: packets are taken from a tun device in one, and put into the one in the other, as late
//! and as slowly as a line would deliver them.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};

use super::{Rng, in_namespace};

/// 480 Mbit/s: what two processors can carry packet by packet beside both ends.
pub const LINE_BYTES_PER_S: u64 = 60_000_000;
const NAMES: [&str; 2] = ["lbline-a", "lbline-b"];
const ADDRESSES: [&str; 2] = ["10.99.77.1", "10.99.77.2"];
/// A router's queue is no shorter than this.
const LEAST_QUEUE_BYTES: u64 = 256 << 10;

/// `struct ifreq`, as far as it matters.
#[repr(C)]
#[allow(dead_code)]
pub struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

nix::ioctl_write_ptr_bad!(tun_set_interface, 0x4004_54ca, Request);

/// The two devices, each in its namespace. They go with this value.
pub struct Devices([File; 2]);

impl Drop for Devices {
    fn drop(&mut self) {
        for name in NAMES {
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}

fn ip(words: &str) -> bool {
    let status = Command::new("ip").args(words.split(' ')).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// Makes the devices; nothing where that is not possible.
pub fn devices() -> Option<Devices> {
    let device = |name: &str| {
        let file = File::options().read(true).write(true).open("/dev/net/tun").ok()?;
        let mut request = Request { name: [0; 16], flags: 0x0001 | 0x1000, rest: [0; 22] };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: the descriptor is open, and the kernel reads a request of this layout (IFF_TUN | IFF_NO_PI) during the call.
        unsafe { tun_set_interface(file.as_raw_fd(), &request) }.ok()?;
        Some(file)
    };
    for name in NAMES {
        let _ = ip(&format!("netns delete {name}"));
    }
    let devices = Devices([device(NAMES[0])?, device(NAMES[1])?]);
    for (name, address) in NAMES.iter().zip(ADDRESSES) {
        let done = ip(&format!("netns add {name}"))
            && ip(&format!("link set {name} netns {name}"))
            && ip(&format!("-n {name} addr add {address}/24 dev {name}"))
            && ip(&format!("-n {name} link set {name} mtu 1500 txqueuelen 1000 up"));
        if !done {
            return None;
        }
    }
    Some(devices)
}

/// What is on its way in one direction.
#[derive(Default)]
struct Way {
    packets: Mutex<VecDeque<(Instant, Vec<u8>)>>,
    more: Condvar,
}

/// The line, while it is up.
pub struct Link {
    down: Arc<AtomicBool>,
    dropped: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.down.store(true, Ordering::SeqCst);
        // The next line has the devices for itself.
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

impl Link {
    /// So many packets of a hundred are lost, each way.
    pub fn up(devices: &Devices, round_trip: Duration, loss: u64) -> Link {
        let mut link = Link { down: Arc::default(), dropped: Arc::default(), threads: vec![] };
        for (from, to) in [(0, 1), (1, 0)] {
            let to_seed = to as u64;
            let way = Arc::new(Way::default());
            let [mut from, mut to] = [from, to].map(|n: usize| devices.0[n].try_clone().unwrap());
            let (down, dropped, queue) = (link.down.clone(), link.dropped.clone(), way.clone());
            let mut rng = Rng::seeded(loss + to_seed);
            let is_lost = move || rng.below(100) < loss;
            link.threads.push(thread::spawn(move || take(&mut from, &queue, round_trip, is_lost, &down, &dropped)));
            let down = link.down.clone();
            link.threads.push(thread::spawn(move || give(&mut to, &way, &down)));
        }
        link
    }

    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::SeqCst)
    }

    /// MiB of the disk a second.
    pub fn measure(&self, what: &str) -> f64 {
        let address = format!("{}:7870", ADDRESSES[0]);
        let mut server = in_namespace(NAMES[0], &["serve", &address]).stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = String::new();
        BufReader::new(server.stdout.as_mut().unwrap()).read_line(&mut ready).unwrap();
        let out = in_namespace(NAMES[1], &["take", &address, what]).stderr(Stdio::inherit()).output().unwrap();
        server.kill().unwrap();
        server.wait().unwrap();
        String::from_utf8(out.stdout).unwrap().trim().parse().expect("a rate")
    }
}

/// Takes packets, and says when each is to arrive: after those before it, at the line's rate, and half a round trip later. What
/// finds the queue full is dropped, and so is what is lost.
fn take(
    from: &mut File,
    way: &Way,
    round_trip: Duration,
    mut is_lost: impl FnMut() -> bool,
    down: &AtomicBool,
    dropped: &AtomicU64,
) {
    let queue_bytes = (LINE_BYTES_PER_S as f64 * round_trip.as_secs_f64()) as u64;
    let longest = Duration::from_secs_f64(queue_bytes.max(LEAST_QUEUE_BYTES) as f64 / LINE_BYTES_PER_S as f64);
    let mut free = Instant::now();
    let mut buffer = vec![0; 2000];
    while !down.load(Ordering::SeqCst) {
        let mut ready = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, 100u16).unwrap() == 0 {
            continue;
        }
        let n = from.read(&mut buffer).unwrap();
        let now = Instant::now();
        if is_lost() || free.saturating_duration_since(now) > longest {
            dropped.fetch_add(1, Ordering::SeqCst);
            continue;
        }
        free = free.max(now) + Duration::from_secs_f64(n as f64 / LINE_BYTES_PER_S as f64);
        way.packets.lock().unwrap().push_back((free + round_trip / 2, buffer[..n].to_vec()));
        way.more.notify_one();
    }
}

fn give(to: &mut File, way: &Way, down: &AtomicBool) {
    while !down.load(Ordering::SeqCst) {
        let first = {
            let packets = way.packets.lock().unwrap();
            let (mut packets, _) =
                way.more.wait_timeout_while(packets, Duration::from_millis(100), |p| p.is_empty()).unwrap();
            packets.pop_front()
        };
        let Some((at, packet)) = first else { continue };
        if let Some(early) = at.checked_duration_since(Instant::now()) {
            thread::sleep(early);
        }
        // A device that is going takes nothing.
        let _ = to.write(&packet);
    }
}
