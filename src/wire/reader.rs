//! Reads frames from a stream. A call that is cancelled loses nothing: the reader keeps what it has of a frame.
//!
//! Every check that a header allows is made before memory is taken. The bytes of a data frame go from the socket straight
//! into a buffer of the [pool](super::pool); the checksum follows them while they are in the cache.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use crc32fast::Hasher;
use tokio::io::{AsyncRead, AsyncReadExt, BufReader};
use tokio::time::{Instant, timeout_at};

use super::digests::Digests;
use super::frame::{FrameError, HEAD_BYTES, Head, Kind, MAX_FIXED_BYTES, PART_HEAD_BYTES, Place, ZERO_BYTES};
use super::link::LinkError;
use super::pool::{Buffer, Pool};
use crate::codec::{Packed, Piece};

/// A frame that arrived whole.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// JSON, not looked at yet.
    Control(Vec<u8>),
    /// Bytes of a disk.
    Data(Place, Bytes),
    /// Bytes of a disk, compressed; not unpacked yet.
    Packed(Place, Packed),
    /// Zeroes of a disk.
    Zero(Place),
    /// Bytes of a disk that are as the client knows them.
    Same(Place),
    /// What a client knows of a disk's chunks.
    Digests(Digests),
    /// A piece of a session's frames: its number, and the bytes.
    Part(u64, Bytes),
    /// A sign of life.
    Alive,
}

/// Small reads (headers, control) go through a buffer of this size; longer ones straight to where they belong.
const READ_AHEAD_BYTES: usize = 8 * 1024;
/// A control payload's memory grows by this much as it arrives.
const CONTROL_STEP_BYTES: usize = 64 * 1024;

/// Reads frames.
pub struct FrameReader {
    inner: BufReader<Box<dyn AsyncRead + Send + Unpin>>,
    peer: String,
    max_control_bytes: u32,
    silence: Duration,
    pool: Pool,
    heard: Instant,
    head: [u8; HEAD_BYTES],
    head_have: usize,
    open: Option<Open>,
}

/// A frame whose header was read.
struct Open {
    head: Head,
    hasher: Hasher,
    fixed: [u8; MAX_FIXED_BYTES],
    fixed_have: usize,
    rest: Rest,
    rest_have: usize,
}

enum Rest {
    None,
    Control(Vec<u8>),
    Data(Place, Buffer),
    Packed(Place, Vec<Piece>, Buffer),
    Digests(Digests, Buffer),
    Part(Buffer),
}

impl FrameReader {
    /// Reads from `reader`, from a peer whose control payloads may be so long, and who may stop for `silence` in the
    /// middle of a frame.
    pub fn new(
        reader: Box<dyn AsyncRead + Send + Unpin>,
        peer: String,
        max_control_bytes: u32,
        silence: Duration,
    ) -> Self {
        Self {
            silence,
            inner: BufReader::with_capacity(READ_AHEAD_BYTES, reader),
            peer,
            max_control_bytes,
            pool: Pool::default(),
            heard: Instant::now(),
            head: [0; HEAD_BYTES],
            head_have: 0,
            open: None,
        }
    }

    /// Starts the clock again: for a reader that did not listen for a while.
    pub fn resume(&mut self) {
        self.heard = Instant::now();
    }

    /// Reads and forgets until the peer closes, or is silent for too long. What it still sends is not looked at; the caller
    /// bounds the time.
    pub async fn discard(&mut self) -> Result<(), LinkError> {
        self.resume();
        let mut sink = [0; 4096];
        let heard = |limit| lost(&self.peer, limit);
        while hear(&mut self.inner, &mut sink, &mut self.heard, self.silence).await.map_err(heard(self.silence))? > 0 {}
        Ok(())
    }

    /// The next frame, which must begin within `patience`; `None` when the peer closed between frames. An error is the
    /// end. May be cancelled and called again.
    pub async fn next(&mut self, patience: Duration) -> Result<Option<Frame>, LinkError> {
        while self.head_have < HEAD_BYTES {
            let limit = if self.head_have == 0 { patience } else { self.silence };
            let got = hear(&mut self.inner, &mut self.head[self.head_have..], &mut self.heard, limit);
            match got.await.map_err(lost(&self.peer, limit))? {
                0 if self.head_have == 0 => return Ok(None),
                0 => return Err(LinkError::Cut { peer: self.peer.clone() }),
                n => self.head_have += n,
            }
        }
        let Self { inner, peer, max_control_bytes, silence, pool, heard, head, head_have, open: slot } = self;
        if slot.is_none() {
            *slot = Some(Open::new(head, *max_control_bytes).map_err(refused(peer))?);
        }
        while let Some(open) = slot.as_mut().filter(|open| !open.is_whole()) {
            open.make_room(pool).map_err(refused(peer))?;
            match hear(inner, open.room(), heard, *silence).await.map_err(lost(peer, *silence))? {
                0 => return Err(LinkError::Cut { peer: peer.clone() }),
                n => open.took(n),
            }
        }
        *head_have = 0;
        slot.take().map(Open::finish).transpose().map_err(refused(peer))
    }
}

fn refused(peer: &str) -> impl FnOnce(FrameError) -> LinkError {
    move |source| LinkError::Frame { peer: peer.to_owned(), source }
}

fn lost(peer: &str, silence: Duration) -> impl FnOnce(Option<io::Error>) -> LinkError {
    move |error| match error {
        // Where the bytes come from connections of their own, one of those says it best.
        Some(error) => error.downcast().unwrap_or_else(|source| LinkError::Io { peer: peer.to_owned(), source }),
        None => LinkError::Silent { peer: peer.to_owned(), silence },
    }
}

/// Reads what there is, waiting until `limit` has passed since something was `heard`: then the error is `None`.
async fn hear(
    inner: &mut BufReader<Box<dyn AsyncRead + Send + Unpin>>,
    into: &mut [u8],
    heard: &mut Instant,
    limit: Duration,
) -> Result<usize, Option<io::Error>> {
    let n = timeout_at(*heard + limit, inner.read(into)).await.map_err(|_| None)?.map_err(Some)?;
    *heard = Instant::now();
    Ok(n)
}

/// The payload of a zero or same frame.
fn zero(fixed: &[u8; MAX_FIXED_BYTES]) -> &[u8; ZERO_BYTES] {
    fixed.first_chunk().expect("the longest fixed part has room for any")
}

fn part_number(fixed: &[u8; MAX_FIXED_BYTES]) -> u64 {
    let number: &[u8; PART_HEAD_BYTES] = fixed.first_chunk().expect("the longest fixed part has room for any");
    u64::from_le_bytes(*number)
}

/// A batch of digests that has none: nothing made room for its rest.
fn empty_batch(fixed: &[u8; MAX_FIXED_BYTES], payload_bytes: u32) -> Result<Digests, FrameError> {
    let head = fixed.first_chunk().expect("the longest fixed part has room for any");
    match Digests::decode_head(head)? {
        (batch, 0) => Ok(batch),
        _ => Err(FrameError::Length { kind: Kind::Digests, len_bytes: payload_bytes.into() }),
    }
}

impl Open {
    fn new(head: &[u8; HEAD_BYTES], max_control_bytes: u32) -> Result<Self, FrameError> {
        let (head, hasher) = Head::decode(head, max_control_bytes)?;
        let rest = if head.kind == Kind::Control { Rest::Control(Vec::new()) } else { Rest::None };
        Ok(Self { head, hasher, fixed: [0; MAX_FIXED_BYTES], fixed_have: 0, rest, rest_have: 0 })
    }

    fn rest_bytes(&self) -> usize {
        self.head.payload_bytes as usize - self.head.fixed_bytes()
    }

    fn is_whole(&self) -> bool {
        self.fixed_have == self.head.fixed_bytes() && self.rest_have == self.rest_bytes()
    }

    /// Takes memory for what comes next, once it is known to be allowed.
    fn make_room(&mut self, pool: &Pool) -> Result<(), FrameError> {
        if self.fixed_have < self.head.fixed_bytes() {
            return Ok(());
        }
        let rest_bytes = self.rest_bytes();
        match &mut self.rest {
            Rest::Control(json) => {
                if json.len() == self.rest_have {
                    json.resize(rest_bytes.min(self.rest_have + CONTROL_STEP_BYTES), 0);
                }
            }
            Rest::None if self.head.kind == Kind::Digests => {
                let fixed = self.fixed.first_chunk().expect("the longest fixed part has room for any");
                let (batch, len) = Digests::decode_head(fixed)?;
                if len != rest_bytes {
                    let len_bytes = self.head.payload_bytes.into();
                    return Err(FrameError::Length { kind: Kind::Digests, len_bytes });
                }
                self.rest = Rest::Digests(batch, pool.take(rest_bytes));
            }
            Rest::None if self.head.kind == Kind::Packed => {
                let (place, pieces) = Place::decode_packed(&self.fixed, self.head.payload_bytes)?;
                self.rest = Rest::Packed(place, pieces, pool.take(rest_bytes));
            }
            Rest::None if self.head.kind == Kind::Part => self.rest = Rest::Part(pool.take(rest_bytes)),
            Rest::None => {
                let fixed = self.fixed.first_chunk().expect("the longest fixed part has room for any");
                let place = Place::decode_data(fixed, self.head.payload_bytes)?;
                self.rest = Rest::Data(place, pool.take(rest_bytes));
            }
            Rest::Data(..) | Rest::Packed(..) | Rest::Digests(..) | Rest::Part(_) => {}
        }
        Ok(())
    }

    /// Where the next bytes go; never empty while the frame is not whole.
    fn room(&mut self) -> &mut [u8] {
        let fixed_bytes = self.head.fixed_bytes();
        if self.fixed_have < fixed_bytes {
            return &mut self.fixed[self.fixed_have..fixed_bytes];
        }
        match &mut self.rest {
            Rest::Control(json) => &mut json[self.rest_have..],
            Rest::Data(_, buffer) | Rest::Packed(_, _, buffer) | Rest::Digests(_, buffer) | Rest::Part(buffer) => {
                &mut buffer.bytes_mut()[self.rest_have..]
            }
            Rest::None => &mut [],
        }
    }

    /// Counts the first `n` bytes of the room as read; they are still in the cache for the checksum.
    fn took(&mut self, n: usize) {
        let mut hasher = std::mem::take(&mut self.hasher);
        hasher.update(&self.room()[..n]);
        self.hasher = hasher;
        if self.fixed_have < self.head.fixed_bytes() {
            self.fixed_have += n;
        } else {
            self.rest_have += n;
        }
    }

    fn finish(self) -> Result<Frame, FrameError> {
        self.head.check(self.hasher)?;
        Ok(match (self.head.kind, self.rest) {
            (_, Rest::Control(json)) => Frame::Control(json),
            (_, Rest::Data(place, buffer)) => Frame::Data(place, buffer.freeze()),
            (_, Rest::Packed(place, pieces, buffer)) => {
                let packed = Packed::new(place.extent.len_bytes as u32, pieces, buffer.freeze());
                Frame::Packed(place, packed.ok_or(FrameError::Pieces)?)
            }
            (_, Rest::Digests(batch, buffer)) => Frame::Digests(batch.with(buffer.as_ref())),
            (_, Rest::Part(buffer)) => Frame::Part(part_number(&self.fixed), buffer.freeze()),
            (Kind::Part, Rest::None) => Frame::Part(part_number(&self.fixed), Bytes::new()),
            (Kind::Digests, Rest::None) => Frame::Digests(empty_batch(&self.fixed, self.head.payload_bytes)?),
            (Kind::Same, Rest::None) => Frame::Same(Place::decode_zero(zero(&self.fixed))?),
            (Kind::Zero, Rest::None) => Frame::Zero(Place::decode_zero(zero(&self.fixed))?),
            (_, Rest::None) => Frame::Alive,
        })
    }
}
