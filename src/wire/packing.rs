//! Packing: a server compresses what it sends, chunk by chunk, as the repository would.
//!
//! ```text
//!            ┌─► worker ─┐
//!  events ───┼─► worker ─┼─► in order ─► frames         a worker is a permit: half of the processors, for all sessions
//!            └─ as it is ┘                              together; a few megabytes are under way in a session
//! ```
//!
//! The client says in its [`Begin`](super::message::Begin) that it takes packed frames, and how it would like them; a server
//! that does not know the field sends data frames, and so does this one to a client that does not send it. Every data event
//! may be packed or not, as the server likes. What is under way when a connection is lost is read again, like all else.
//!
//! * `zstd`: what the client's repository stores as it came.
//! * `lz4`: less work here, more bytes, and the client compresses once more for its repository.
//! * `auto`: zstd where it makes the backup faster. [`Auto`] measures windows of a second:
//!
//!   ```text
//!            most of the window the socket took nothing           disk bytes a second < 1.1 × those before
//!     plain ────────────────────────────────────────────► packing ────────────────────────────────────────► plain, and
//!       ▲                                                     │                                            not again for 4,
//!       └──────── after 60 windows: is it still so? ◄─────────┘                                            8, … 64 windows
//!   ```
//!
//!   It is not tried where more goes than the workers could compress. So it does not matter which of line, this processor, and the client is the slow one, or what the data is like. The first
//!   window after each change is not counted: buffers on the way hide what is going on.
//!
//! Nothing is packed over unix sockets unless the client asks for it by name.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

use super::frame::PACKED_HEAD_BYTES;
use super::message::{Event, Failure, FailureCode};
use super::pool::Pool;
use crate::codec::{Codec, Packed, Packer};

/// zstd's level at most: it is the hypervisor's processor.
const MAX_LEVEL: i32 = 9;
/// Events under way in one session, for each worker and in all.
const UNDER_WAY: (usize, usize) = (2, 6);
/// What a worker may compress in a second at best.
const WORKER_BYTES_PER_S: f64 = 400.0 * 1048576.0;

/// How bytes are compressed on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// Not at all.
    None,
    /// With lz4.
    Lz4,
    /// With zstd.
    Zstd,
    /// With zstd, where that makes it faster.
    Auto,
    /// In a way of a later version.
    #[serde(other)]
    Other,
}

impl std::str::FromStr for How {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "lz4" => Ok(Self::Lz4),
            "zstd" => Ok(Self::Zstd),
            "auto" => Ok(Self::Auto),
            _ => Err("compression on the wire is none, lz4, zstd or auto".to_owned()),
        }
    }
}

/// What a client that takes packed frames would like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// As the server is configured when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub how: Option<How>,
    /// zstd's level. The server does not go beyond its own limit.
    pub level: i32,
}

/// The workers of a server, and what it does unless a client says otherwise; clones share the workers.
#[derive(Clone)]
pub struct Packing {
    default: How,
    workers: Arc<Semaphore>,
    count: usize,
    packers: Arc<Mutex<Vec<Packer>>>,
    pool: Pool,
}

impl fmt::Debug for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packing({:?}, {} workers)", self.default, self.count)
    }
}

impl Default for Packing {
    /// Half of the processors, at least one; nothing unless a client asks for it.
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self::new(How::None, processors.div_ceil(2))
    }
}

impl Packing {
    /// With so many workers.
    pub fn new(default: How, workers: usize) -> Self {
        let count = workers.max(1);
        let workers = Arc::new(Semaphore::new(count));
        Self { default, workers, count, packers: Arc::default(), pool: Pool::default() }
    }

    /// The same workers, and this unless a client says otherwise.
    pub fn by_default(&self, default: How) -> Self {
        Self { default, ..self.clone() }
    }

    async fn pack(self, codec: Codec, level: i32, chunk_bytes: u32, data: Data) -> Event {
        let Ok(_worker) = self.workers.clone().acquire_owned().await else { return data.event() };
        let plain = data.clone();
        // A worker that panicked has packed nothing.
        let work = move || self.pack_now(codec, level, chunk_bytes, data);
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| plain.event())
    }

    fn pack_now(&self, codec: Codec, level: i32, chunk_bytes: u32, data: Data) -> Event {
        let packers = || self.packers.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = packers().pop();
        let Some(mut packer) = idle.or_else(|| Packer::new(level).ok()) else { return data.event() };
        if packer.set_level(level).is_err() {
            return data.event();
        }
        let mut buffer = self.pool.take(data.bytes.len());
        let packed = packer.pack_all(codec, &data.bytes, chunk_bytes as usize, buffer.bytes_mut());
        packers().push(packer);
        let packed = packed.filter(|(_, used)| used + PACKED_HEAD_BYTES < data.bytes.len());
        let packed = packed
            .and_then(|(pieces, used)| Packed::new(data.bytes.len() as u32, pieces, buffer.freeze().slice(..used)));
        match packed {
            Some(packed) => Event::Packed { disk: data.disk, offset_bytes: data.offset_bytes, packed },
            None => data.event(),
        }
    }
}

/// A data event's content.
#[derive(Clone)]
struct Data {
    disk: u16,
    offset_bytes: u64,
    bytes: Bytes,
}

impl Data {
    fn event(self) -> Event {
        let Self { disk, offset_bytes, bytes } = self;
        Event::Data { disk, offset_bytes, bytes }
    }
}

/// An event, or the end of all.
type Next = Option<Result<Event, Failure>>;

enum Slot {
    Ready(Next),
    UnderWay(JoinHandle<Event>),
}

/// A session's events on their way to the frames of one connection.
pub(super) struct Outgoing {
    packing: Packing,
    codec: Codec,
    level: i32,
    chunk_bytes: u32,
    on: bool,
    auto: Option<Auto>,
    slots: VecDeque<Slot>,
    /// The events are at their end.
    ended: bool,
}

impl Outgoing {
    /// For a client that would like this.
    pub fn new(packing: &Packing, wanted: Option<Wanted>, chunk_bytes: u32) -> Self {
        let how = wanted.map_or(How::None, |wanted| match wanted.how {
            None | Some(How::Other) => packing.default,
            Some(how) => how,
        });
        Self {
            packing: packing.clone(),
            codec: if how == How::Lz4 { Codec::Lz4 } else { Codec::Zstd },
            level: wanted.map_or(1, |wanted| wanted.level).clamp(1, MAX_LEVEL),
            chunk_bytes,
            on: matches!(how, How::Lz4 | How::Zstd),
            auto: (how == How::Auto).then(|| Auto::new(packing.count)),
            slots: VecDeque::new(),
            ended: false,
        }
    }

    /// How the time since the last call was spent, and with what success.
    pub fn measured(&mut self, spent: Spent) {
        if let Some(auto) = &mut self.auto {
            let on = auto.measured(spent);
            if on != self.on {
                tracing::debug!(on, "compression on the wire");
            }
            self.on = on;
        }
    }

    /// The next event in order. May be cancelled and called again.
    pub async fn next(&mut self, events: &mut mpsc::Receiver<Result<Event, Failure>>) -> Next {
        loop {
            let has_room = self.has_room();
            tokio::select! {
                biased;
                event = events.recv(), if has_room => {
                    if let Some(next) = self.take(event) {
                        return next;
                    }
                }
                next = front(&mut self.slots), if !self.slots.is_empty() => {
                    self.slots.pop_front();
                    return next;
                }
                else => return None,
            }
        }
    }

    /// The next event, if it is there already.
    pub fn try_next(&mut self, events: &mut mpsc::Receiver<Result<Event, Failure>>) -> Option<Next> {
        while self.has_room() {
            let Ok(event) = events.try_recv() else { break };
            if let Some(next) = self.take(Some(event)) {
                return Some(next);
            }
        }
        let next = front(&mut self.slots).now_or_never()?;
        self.slots.pop_front();
        Some(next)
    }

    fn has_room(&self) -> bool {
        !self.ended && self.slots.len() < (UNDER_WAY.0 * self.packing.count).min(UNDER_WAY.1)
    }

    /// Begins to pack an event, or gives it at once if it need not be and none is before it.
    fn take(&mut self, next: Next) -> Option<Next> {
        self.ended = next.is_none();
        let slot = match next {
            Some(Ok(Event::Data { disk, offset_bytes, bytes })) if self.on => {
                let data = Data { disk, offset_bytes, bytes };
                let packing = self.packing.clone().pack(self.codec, self.level, self.chunk_bytes, data);
                Slot::UnderWay(tokio::spawn(packing))
            }
            next if self.slots.is_empty() => return Some(next),
            next => Slot::Ready(next),
        };
        self.slots.push_back(slot);
        None
    }
}

/// What is in the first slot, once it is done. The slot is to be dropped then.
async fn front(slots: &mut VecDeque<Slot>) -> Next {
    match slots.front_mut() {
        Some(Slot::Ready(next)) => next.take(),
        Some(Slot::UnderWay(work)) => Some(work.await.map_err(|_| {
            let what = "a worker that compresses for the wire panicked; this is a bug";
            Failure::new(FailureCode::Internal, what)
        })),
        None => std::future::pending().await,
    }
}

/// How a connection's time was spent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Spent {
    /// Writing: the socket took nothing more for most of that.
    pub writing: Duration,
    /// Waiting for something to write.
    pub waiting: Duration,
    /// Bytes of disks that were written, before compression.
    pub disk_bytes: u64,
}

/// Whether compressing is worth it. Pure: it is told what time has passed.
#[derive(Debug, Default)]
pub(super) struct Auto {
    /// What can be compressed in a second at best.
    most: f64,
    on: bool,
    window: Spent,
    /// The first window after a change was seen.
    settled: bool,
    /// Disk bytes a second without compression.
    plain: f64,
    /// Windows since the last change.
    since: u32,
    /// Windows for which it stays plain.
    rest: u32,
    /// The next such number.
    next_rest: u32,
}

impl Auto {
    const WINDOW: Duration = Duration::from_secs(1);
    const RESTS: (u32, u32) = (4, 64);
    const LONGEST: u32 = 60;
    /// It must be so much faster.
    const GAIN: f64 = 1.1;

    fn new(workers: usize) -> Self {
        Self { most: WORKER_BYTES_PER_S * workers as f64, ..Self::default() }
    }

    /// Adds to the window; says whether to compress from now on.
    fn measured(&mut self, spent: Spent) -> bool {
        self.window.writing += spent.writing;
        self.window.waiting += spent.waiting;
        self.window.disk_bytes += spent.disk_bytes;
        let took = self.window.writing + self.window.waiting;
        if took >= Self::WINDOW {
            let window = std::mem::take(&mut self.window);
            if std::mem::replace(&mut self.settled, true) {
                self.judge(window.writing > window.waiting, window.disk_bytes as f64 / took.as_secs_f64());
            }
        }
        self.on
    }

    fn judge(&mut self, socket_is_slow: bool, rate: f64) {
        self.since = self.since.saturating_add(1);
        if !self.on {
            self.plain = rate;
            if socket_is_slow && rate < self.most && self.since > self.rest {
                self.change();
            }
        } else if rate < self.plain * Self::GAIN {
            self.rest = self.next_rest.clamp(Self::RESTS.0, Self::RESTS.1);
            self.next_rest = self.rest * 2;
            self.change();
        } else if self.since >= Self::LONGEST {
            (self.rest, self.next_rest) = (0, 0);
            self.change();
        }
    }

    fn change(&mut self) {
        (self.on, self.since, self.settled) = (!self.on, 0, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::MIB;

    /// Runs a connection for some seconds: disk bytes go at `plain` or `packed` a second, and the socket is what is waited for
    /// most of the time if it says so. Gives the share of seconds in which it was packing.
    fn share(auto: &mut Auto, seconds: u32, plain: u64, packed: u64, socket_is_slow: bool) -> f64 {
        let mut packing = 0;
        for _ in 0..seconds * 10 {
            let disk_bytes = if auto.on { packed } else { plain } / 10;
            let (slow, fast) = (Duration::from_millis(90), Duration::from_millis(10));
            let (writing, waiting) = if socket_is_slow && !auto.on { (slow, fast) } else { (fast, slow) };
            packing += u32::from(auto.measured(Spent { writing, waiting, disk_bytes }));
        }
        f64::from(packing) / f64::from(seconds * 10)
    }

    #[test]
    fn it_packs_where_that_is_faster() {
        // A slow line and data that compresses; also where compressing is the slowest then.
        assert!(share(&mut Auto::new(1), 100, 10 * MIB, 20 * MIB, true) > 0.9);
        // Nothing to gain: the data does not compress, or the client is what is slow, or the processor is worse than the line.
        assert!(share(&mut Auto::new(1), 400, 10 * MIB, 10 * MIB, true) < 0.1);
        assert!(share(&mut Auto::new(1), 400, 390 * MIB, 300 * MIB, true) < 0.1);
        assert!(share(&mut Auto::new(1), 400, 900 * MIB, 300 * MIB, true) == 0.0);
        // The disk is what is slow.
        assert!(share(&mut Auto::new(1), 100, 10 * MIB, 20 * MIB, false) == 0.0);
    }

    #[test]
    fn it_changes_its_mind() {
        let mut auto = Auto::new(1);
        assert!(share(&mut auto, 100, 10 * MIB, 30 * MIB, true) > 0.9);
        // The line is free all at once.
        assert!(share(&mut auto, 200, 900 * MIB, 300 * MIB, true) < 0.4);
        assert!(share(&mut auto, 200, 900 * MIB, 300 * MIB, true) < 0.1);
        share(&mut auto, 100, 10 * MIB, 30 * MIB, true);
        assert!(share(&mut auto, 100, 10 * MIB, 30 * MIB, true) > 0.9);
    }

    #[tokio::test]
    async fn events_come_out_in_order_and_packed() {
        let packing = Packing::new(How::Zstd, 2);
        let mut outgoing = Outgoing::new(&packing, Some(Wanted { how: None, level: 1 }), 65536);
        let (to, mut events) = mpsc::channel(64);
        let sending = tokio::spawn(async move {
            for n in 0..40u64 {
                let bytes = Bytes::from(vec![n as u8; 65536]);
                let event = match n % 4 {
                    3 => Event::Zero { disk: 0, extent: crate::extent::Extent::new(n * 65536, 65536) },
                    _ => Event::Data { disk: 0, offset_bytes: n * 65536, bytes },
                };
                to.send(Ok(event)).await.unwrap();
            }
        });
        for n in 0..40u64 {
            let next = match outgoing.try_next(&mut events) {
                Some(next) => next,
                None => outgoing.next(&mut events).await,
            };
            match next.unwrap().unwrap() {
                Event::Packed { offset_bytes, packed, .. } => {
                    assert!(offset_bytes == n * 65536 && n % 4 != 3 && packed.is_in_chunks_of(65536));
                    assert!(packed.bytes().len() < 100);
                }
                Event::Zero { extent, .. } => assert!(extent.offset_bytes == n * 65536 && n % 4 == 3),
                other => panic!("{other:?}"),
            }
        }
        assert!(outgoing.next(&mut events).await.is_none());
        assert!(outgoing.next(&mut events).await.is_none(), "and it stays at its end");
        sending.await.unwrap();
    }
}
