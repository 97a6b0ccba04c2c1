//! Trunk: several connections for what a server sends in one session.
//!
//! One TCP connection carries little over a long way on which packets get lost: what it may have under way is cut with each loss,
//! and grows slowly after it. Several have several times as much.
//!
//! ```text
//! client                                         sidecar
//!   Begin { connections: 4 }     ─────►                       over the first connection, as ever
//!                                ◄─────   Joinable { token, more: 3 }    an older sidecar says nothing
//!                                ◄═════   Begun, data, … in parts        from here on, over all that there are
//!   Join { token }               ─────►                       over each further connection
//!                                ◄─────   Joined
//!                                ◄═════   parts
//!   Ack, digests, …              ─────►                       over the first connection only
//! ```
//!
//! After `Joinable` the sidecar cuts its frames, `Begun` and everything after it, into parts of up to [`MAX_PART_BYTES`] that
//! are numbered from 0. Whichever connection takes bytes gets the next part (`spread`). The client puts
//! them together again by their numbers (`gather`) and reads frames from that. So to all that is above,
//! a trunk is one connection: order, checks, signs of life, a slow reader that slows its sender down. The other direction is
//! thin, and stays as it was.
//!
//! ```text
//!                       ┌─► connection ──parts──► 4 MiB ─┐
//!  frames ─► few parts ─┼─► connection ──parts──► 4 MiB ─┼─► in order ─► frames
//!                       └─► connection ──parts──► 4 MiB ─┘
//! ```
//!
//! * **Order on a connection.** Numbers ascend. The client reads no further on a connection than [`WINDOW_PARTS`] ahead of
//!   what is in order: the part that all wait for is never behind that, since it is the next one of its connection. That bounds
//!   the memory; at the sidecar there are [`QUEUED_PARTS`] and one for each connection.
//! * **Nobody waits for a connection.** Data flows over the first one at once. One that cannot be opened or is refused is
//!   missed by nobody: it is said, and the session goes on over those that there are. One that is lost after `Join` was said may
//!   have joined, and counts as if it had.
//! * **One lost, all lost.** What was on its way over a lost connection is missing in the middle. So both ends close all of
//!   them, and the client comes back, where the session can be [resumed](super::resume): with a new first connection, another
//!   token, and further connections of its own. A part without bytes says that a connection ends in good order: one that
//!   ends without is lost. So is one on which nothing was heard for long; a sidecar says on each that it is alive.
//! * **The token** of a trunk is 128 random bits that the sidecar chose. It is good for the first connection that it was
//!   said on, until that ends, and only for the client whose session it is: whoever else shows it is refused as if it were unknown,
//!   and the log says so. Who joins is granted nothing, cannot ask for anything, and has nothing to say any more: a joined
//!   connection on which the client says something is closed as broken.
//! * **Bounds.** A session has at most [`MAX_CONNECTIONS`] connections. Each counts as a connection of its client and of
//!   the service; those that joined may be so many of one client and in all that there is always room for first ones.
//!   A sidecar's limit on what it sends is one for all connections anyway; a client's is on what it takes out of the trunk.
//!
//! `Joinable` comes only where `Begin` asked for more than one connection, so an older client meets none of this. With one,
//! nothing changes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;

use super::message::{Begin, Failure, FailureCode};
use super::resume::Token;
use super::spread::{Line, Lines};
use super::writer::FrameWriter;

pub use super::frame::MAX_PART_BYTES;

/// Most connections of a session.
pub const MAX_CONNECTIONS: u32 = 8;
/// Parts of one connection that wait for those before them, at most: 4 MiB.
pub const WINDOW_PARTS: usize = 64;
/// Parts that wait for a connection, at most.
pub const QUEUED_PARTS: usize = 4;
/// Connections of one client that have joined, at most.
const MAX_JOINED_OF_ONE: usize = 16;
/// Connections that have joined, at most.
const MAX_JOINED: usize = 128;

const _: () = assert!(MAX_CONNECTIONS as usize <= MAX_JOINED_OF_ONE && MAX_JOINED_OF_ONE <= MAX_JOINED);

/// The trunks of a server; clones share them. The default one is of nobody in particular: it offers none and knows none.
#[derive(Clone, Debug, Default)]
pub struct Trunks {
    shared: Arc<Mutex<Shared>>,
    /// Whose connection this is for.
    identity: Option<String>,
}

#[derive(Debug, Default)]
struct Shared {
    open: HashMap<Token, Open>,
    /// Connections that have joined, by client.
    joined: HashMap<String, usize>,
}

#[derive(Debug)]
struct Open {
    identity: String,
    vm: String,
    lines: Lines,
    /// So many there are, with the first.
    connections: u32,
    /// So many more may join.
    left: u32,
}

/// A trunk that may be joined; not any more once this is dropped.
#[derive(Debug)]
pub(super) struct Offer {
    trunks: Trunks,
    /// What to show.
    pub token: Token,
    /// How many connections may join.
    pub more: u32,
}

impl Drop for Offer {
    fn drop(&mut self) {
        self.trunks.shared().open.remove(&self.token);
    }
}

/// A session's connections, at the first of them. They end with this.
#[derive(Debug)]
pub(super) struct Trunk {
    /// All of them.
    pub lines: Lines,
    _offer: Offer,
    _first: JoinSet<()>,
}

impl Trunk {
    /// Lets parts go over the first connection. Must be called within a tokio runtime.
    pub fn open(lines: Lines, offer: Offer, mut writer: FrameWriter, alive_every: Duration) -> Self {
        let (line, mut first) = (lines.line(), JoinSet::new());
        first.spawn(async move {
            if let Err(error) = line.carry(&mut writer, alive_every).await {
                line.lines().fail(error.into());
            }
            // To be read to its end by the client, the connection stays.
            std::future::pending::<()>().await;
        });
        Self { lines, _offer: offer, _first: first }
    }
}

impl Drop for Trunk {
    fn drop(&mut self) {
        // One that is not read, or was cut, would keep its place for hours. In good order the client has closed all by now.
        let words = "the session's first connection has ended";
        self.lines.fail(Failure::new(FailureCode::Disconnected, words));
    }
}

/// A connection that has joined; it counts until this is dropped.
#[derive(Debug)]
pub(super) struct Joined {
    trunks: Trunks,
    identity: String,
    /// What it carries.
    pub line: Line,
}

impl Drop for Joined {
    fn drop(&mut self) {
        let mut shared = self.trunks.shared();
        match shared.joined.get_mut(&self.identity) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(shared.joined.remove(&self.identity)),
        }
    }
}

impl Trunks {
    /// The same, for a connection of this client.
    pub fn of(&self, identity: String) -> Self {
        Self { shared: self.shared.clone(), identity: Some(identity) }
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Over how many connections the session of a VM goes, where there are several.
    pub fn connections_of(&self, vm: &str) -> Option<u32> {
        let shared = self.shared();
        shared.open.values().find(|open| open.vm == vm).map(|open| open.connections).filter(|count| *count > 1)
    }

    /// Lets the connections that a client would like to have join `lines`.
    pub(super) fn offer(&self, begin: &Begin, lines: &Lines) -> Option<Offer> {
        let identity = self.identity.clone()?;
        let more = begin.connections?.min(MAX_CONNECTIONS).checked_sub(1).filter(|more| *more > 0)?;
        let token = Token::random();
        let (vm, lines) = (begin.vm.clone(), lines.clone());
        self.shared().open.insert(token, Open { identity, vm, lines, connections: 1, left: more });
        Some(Offer { trunks: self.clone(), token, more })
    }

    /// A place in the trunk of a token, for the connection of `peer`.
    ///
    /// # Errors
    /// For the client; the log has been told.
    pub(super) fn join(&self, token: Token, peer: &str) -> Result<Joined, Failure> {
        let refused = |code, what: &str| {
            tracing::warn!(peer, "a connection was not joined to a session: {what}");
            Failure::new(code, format!("this connection was not joined to a session: {what}"))
        };
        let gone = || refused(FailureCode::SessionGone, "it is gone, or its first connection is another one by now");
        let mut shared = self.shared();
        let Some(identity) = &self.identity else { return Err(gone()) };
        let (of_all, of_one) = (shared.joined.values().sum::<usize>(), shared.joined.get(identity).copied());
        let open = match shared.open.get_mut(&token) {
            Some(open) if open.identity == *identity => open,
            Some(open) => {
                tracing::error!(
                    peer,
                    "{identity} showed the token of connections of {}: somebody has read its token",
                    open.identity
                );
                return Err(gone());
            }
            None => return Err(gone()),
        };
        if open.left == 0 {
            return Err(refused(FailureCode::Busy, "it has all the connections that it may have"));
        }
        if of_one.unwrap_or(0) >= MAX_JOINED_OF_ONE || of_all >= MAX_JOINED {
            return Err(refused(FailureCode::Busy, "too many have joined sessions here already"));
        }
        open.left -= 1;
        open.connections += 1;
        let line = open.lines.line();
        *shared.joined.entry(identity.clone()).or_default() += 1;
        Ok(Joined { trunks: self.clone(), identity: identity.clone(), line })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(connections: Option<u32>) -> Begin {
        Begin { vm: "vm".into(), connections, ..Begin::default() }
    }

    #[test]
    fn places_are_counted_and_come_back() {
        let trunks = Trunks::default();
        assert!(trunks.offer(&begin(Some(4)), &Lines::default()).is_none(), "nobody in particular");
        let one = trunks.of("one".into());
        for none in [None, Some(0), Some(1)] {
            assert!(one.offer(&begin(none), &Lines::default()).is_none());
        }
        assert_eq!(one.offer(&begin(Some(u32::MAX)), &Lines::default()).unwrap().more, MAX_CONNECTIONS - 1);
        let offer = one.offer(&begin(Some(3)), &Lines::default()).unwrap();
        assert_eq!((offer.more, trunks.connections_of("vm")), (2, None));
        let joined = [one.join(offer.token, "peer").unwrap(), one.join(offer.token, "peer").unwrap()];
        assert_eq!((trunks.connections_of("vm"), trunks.connections_of("vm2")), (Some(3), None));
        assert_eq!(one.join(offer.token, "peer").unwrap_err().code, FailureCode::Busy);
        assert_eq!(trunks.of("two".into()).join(offer.token, "peer").unwrap_err().code, FailureCode::SessionGone);
        assert_eq!(trunks.join(offer.token, "peer").unwrap_err().code, FailureCode::SessionGone);
        assert_eq!(trunks.shared().joined["one"], 2);
        drop(joined);
        assert!(trunks.shared().joined.is_empty());
        let token = offer.token;
        drop(offer);
        assert_eq!(one.join(token, "peer").unwrap_err().code, FailureCode::SessionGone);
        assert!(trunks.shared().open.is_empty());
    }

    #[test]
    fn one_client_does_not_take_all_places() {
        let trunks = Trunks::default();
        let join_all = |identity: &str| {
            let trunks = trunks.of(identity.to_owned());
            let offers: Vec<_> = (0..8).map(|_| trunks.offer(&begin(Some(8)), &Lines::default()).unwrap()).collect();
            let tokens = offers.iter().flat_map(|offer| [offer.token; 7]);
            (tokens.filter_map(|token| trunks.join(token, "peer").ok()).collect::<Vec<_>>(), offers)
        };
        let all: Vec<_> = (0..10).map(|n| join_all(&format!("client {n}"))).collect();
        let counts: Vec<_> = all.iter().map(|(joined, _)| joined.len()).collect();
        assert_eq!(counts, [16, 16, 16, 16, 16, 16, 16, 16, 0, 0]);
    }
}
