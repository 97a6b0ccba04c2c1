//! Resume: a session that outlives its connection.
//!
//! ```text
//! client                                       sidecar
//!   Begin { resume: token }     ─────►
//!                               ◄─────   Resumable { grace_ms, … } "I hold it for so long"; an older sidecar says nothing
//!                               ◄─────   Begun, data, …
//!                ╳ the connection is lost ╳          the fleece stays open, for the grace time at most
//!   Resume { vm, token, have }  ─────►
//!                               ◄─────   Resumable, Begun         the same instant again
//!                               ◄─────   data, …                  what `have` does not cover and nobody acknowledged
//!                               ◄─────   Sent
//!   Received                    ─────►                            only now is the fleece closed
//!                               ◄─────   End
//!
//!   Leave { vm, token }         ─────►                            at any time: the fleece is closed at once
//! ```
//!
//! At the sidecar:
//!
//! ```text
//!             connection lost ─────►
//!  attached ◄──────────────────────── lost ──(grace is over; the machine's own limits)──► gone
//!     │        Resume, not too often                                                       ▲
//!     └──(End was sent; Leave; the protocol was broken; stuck)─────────────────────────────┘
//! ```
//!
//! * **The token** is 128 random bits that the client chooses before it begins, so that it can come back although the answer to
//!   its Begin was lost. It is good for one session, of the client that began it, and of the VM that it named. Anybody
//!   else who shows it is refused as if there were no such session, and the log says so.
//! * **Nothing is asked for twice that was acknowledged.** What is acknowledged may have been discarded, so the sidecar never
//!   sends it again, whatever `have` says: a client must keep what it acknowledges. All other bytes of the needed set are still
//!   in the fleece. Whatever was under way when the connection was lost is read again.
//! * **No acknowledgement is lost.** `Resumable` says how many were heard in all; a client says the rest again.
//! * **The guest first.** A held fleece is under the same watch as a read one: scratch, monitor and the machine's end close it
//!   before the grace is over.
//! * A client that comes back before the sidecar has noticed that it was away takes its old connection's place.
//! * After `Sent` the client has all data. Should it not get back to hear the `End`, only figures are lost.
//!
//! Without a token in Begin all is as it was: the connection's end is the session's end. Frames of this page come only
//! where Begin asked for them, so an older peer never meets one.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::contract::Acks;
use super::digests::Digests;
use super::message::{Begin, Event, Failure, Session};
use crate::limits::MAX_DISKS;
use crate::units::SessionId;

/// How long a lost client's fleece is held unless something else is configured.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(60);
/// Longest that may be configured.
pub const MAX_GRACE: Duration = Duration::from_secs(3600);
/// How often one session may be resumed.
pub const MAX_RESUMES: u32 = 64;
/// Between two tries to come back: from the one to the other, twice as long each time.
pub const COME_BACK_AFTER: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// What a client shows to come back to its session. Secret: it is not printed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(SessionId);

impl Token {
    /// A new one.
    #[allow(clippy::new_without_default)]
    pub fn random() -> Self {
        Self(SessionId::random())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Comes back to a session whose connection was lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// The VM that was named at the beginning.
    pub vm: String,
    /// The token that was chosen then.
    pub token: Token,
    /// Of each disk, in the order of their indices: all that was needed before this offset is at the client. A disk that
    /// is not listed has nothing there.
    pub have: Vec<u64>,
}

/// Whether these positions can be those of a client of this session.
pub fn check_have(have: &[u64], chunk_bytes: u32, sizes: impl ExactSizeIterator<Item = u64>) -> Result<(), String> {
    if have.len() > sizes.len() || have.len() > MAX_DISKS {
        return Err(format!("positions in {} disks; the session has {}", have.len(), sizes.len()));
    }
    for (at, size_bytes) in have.iter().zip(sizes) {
        if *at > size_bytes || !(at.is_multiple_of(chunk_bytes.into()) || *at == size_bytes) {
            return Err(format!("position {at} in a disk of {size_bytes} bytes, in chunks of {chunk_bytes}"));
        }
    }
    Ok(())
}

/// Where a session's events go, and a scan's digests come from, over one connection.
#[derive(Debug)]
pub struct Line {
    /// The events.
    pub events: mpsc::Receiver<Result<Event, Failure>>,
    /// Where digests go, if a disk is scanned.
    pub digests: Option<mpsc::Sender<Digests>>,
}

/// What a session that outlives its connections is told. When nobody can tell it anything any more, it ends with its
/// connection.
#[derive(Debug)]
pub enum Word {
    /// The client is back: go on over a new line, from here on.
    Resume {
        /// As in [`Resume::have`], checked.
        have: Vec<u64>,
        /// Where the line goes.
        reply: oneshot::Sender<Line>,
    },
    /// The client has all that was sent: the fleece may be closed.
    Received,
}

/// A request of a client's connection for digests, from the beginning of a disk on.
#[derive(Debug)]
pub struct Again {
    /// As in [`Resume::have`]: what lies before need not be given.
    pub have: Vec<u64>,
    /// Where they go.
    pub digests: mpsc::Sender<Digests>,
}

/// What a session has that outlives its connections.
#[derive(Debug)]
pub enum Lasting {
    /// At the sidecar's end.
    Sidecar(mpsc::UnboundedSender<Word>),
    /// At the client's end.
    Client {
        /// Digests are wanted again, after a connection was lost.
        again: mpsc::Receiver<Again>,
        /// Resolves when the session has ended, and the sidecar has been told if that was early.
        over: Option<oneshot::Receiver<()>>,
    },
}

/// A session on one of its connections, at the server.
#[derive(Debug)]
pub struct Attachment {
    /// What was begun with.
    pub begin: Begin,
    /// The session; its events and digests are this connection's.
    pub session: Session,
    /// What may be acknowledged; the same over all connections.
    pub acks: Arc<Acks>,
    /// How long it is held when the connection is lost.
    pub grace: Duration,
    /// When it must have ended.
    pub until: Instant,
    /// Resolves when the client came back over another connection, or gave the session up there.
    pub replaced: oneshot::Receiver<()>,
    /// Told when the session ends; without that, its connection was lost.
    pub over: oneshot::Sender<()>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_checked() {
        let check = |have: &[u64]| check_have(have, 65536, [1 << 20, 65536 + 512].into_iter());
        for good in [&[][..], &[0], &[65536, 65536 + 512], &[1 << 20, 65536]] {
            check(good).unwrap();
        }
        for bad in [&[512][..], &[2 << 20], &[0, 512], &[0, 0, 0], &[u64::MAX]] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_token_is_not_printed() {
        let token = Token::random();
        let text = serde_json::to_string(&token).unwrap();
        assert_eq!(text.len(), 34);
        assert_eq!(serde_json::from_str::<Token>(&text).unwrap(), token);
        assert!(!format!("{token:?}").contains(&text[1..9]));
    }
}
