//! What can go wrong: while connecting ([`NegotiateError`]) and afterwards ([`NbdError`]).

use std::io;
use std::time::Duration;

use nix::errno::Errno;

use super::layout::Malformed;
use crate::extent::Extent;

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum NegotiateError {
    /// The socket cannot be connected.
    #[error("cannot connect to the NBD server at {peer}: {source}; is it running?")]
    Connect {
        /// Where.
        peer: String,
        /// What the system said.
        source: io::Error,
    },
    /// The connection broke, or the server closed it.
    #[error("the NBD server at {peer} broke off while we {doing}: {source}; look into its log")]
    Io {
        /// Where.
        peer: String,
        /// `read its greeting`, `asked for export …`, …
        doing: &'static str,
        /// What the system said; `UnexpectedEof` when the server closed.
        source: io::Error,
    },
    /// No answer in time.
    #[error("the server at {peer} did not finish the NBD handshake in {after:?}; it may serve one client at a time")]
    Timeout {
        /// Where.
        peer: String,
        /// The limit.
        after: Duration,
    },
    /// The first bytes are not NBD's.
    #[error("what listens at {peer} is no NBD server: it began with {saw:?}; check the address")]
    NotNbd {
        /// Where.
        peer: String,
        /// Its first bytes, escaped.
        saw: String,
    },
    /// Oldstyle, not fixed newstyle, or without an option that we need.
    #[error("the NBD server at {peer} is too old: it lacks {lacks}")]
    TooOld {
        /// Where.
        peer: String,
        /// What is missing.
        lacks: &'static str,
    },
    /// TLS only.
    #[error("the NBD server at {peer} wants TLS, which this client does not speak; use its unix socket")]
    TlsRequired {
        /// Where.
        peer: String,
    },
    /// No export of this name.
    #[error("the NBD server at {peer} has no export {export:?} ({message}); list them with nbdinfo --list")]
    UnknownExport {
        /// Where.
        peer: String,
        /// The name.
        export: String,
        /// What the server added.
        message: String,
    },
    /// The export exists, but one context was not given.
    #[error("export {export:?} at {peer} has no metadata context {context:?}; was the bitmap exported with it?")]
    NoContext {
        /// Where.
        peer: String,
        /// The export.
        export: String,
        /// The context.
        context: String,
    },
    /// The server says no.
    #[error("the NBD server at {peer} refused when we {doing}: {why} {message}")]
    Refused {
        /// Where.
        peer: String,
        /// As in [`NegotiateError::Io`].
        doing: &'static str,
        /// `forbidden by policy`, `it is shutting down`, …
        why: String,
        /// What the server added.
        message: String,
    },
    /// The server broke the protocol.
    #[error("the NBD server at {peer} broke the protocol while we {doing}: {source}")]
    Protocol {
        /// Where.
        peer: String,
        /// As in [`NegotiateError::Io`].
        doing: &'static str,
        /// Which rule.
        source: Malformed,
    },
    /// Connections to one export that do not show the same disk.
    #[error("two connections to export {export:?} at {peer} differ: {first_bytes} and {second_bytes} bytes")]
    SizeDiffers {
        /// Where.
        peer: String,
        /// The export.
        export: String,
        /// Size on the first connection.
        first_bytes: u64,
        /// Size on a later one.
        second_bytes: u64,
    },
    /// The caller asked for what cannot be sent.
    #[error("cannot ask an NBD server for {what}")]
    BadArgument {
        /// What is wrong.
        what: String,
    },
}

/// Why a request failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NbdError {
    /// The server answered with an error. The session goes on.
    #[error("the NBD server at {peer} failed the {what} of {extent}: {errno}{}", shown(message))]
    Server {
        /// Where.
        peer: String,
        /// `read`, `trim`, …
        what: &'static str,
        /// Which bytes.
        extent: Extent,
        /// What it answered.
        errno: Errno,
        /// What it added, or nothing.
        message: String,
    },
    /// The session ended before the answer came. Nothing is known about the request.
    #[error("the NBD session with {peer} ended: {reason}")]
    Gone {
        /// Where.
        peer: String,
        /// What was seen.
        reason: String,
    },
    /// No answer within the deadline. The session goes on and a late answer is dropped.
    #[error("the NBD server at {peer} did not answer the {what} of {extent} in {after:?}")]
    Deadline {
        /// Where.
        peer: String,
        /// `read`, `trim`, …
        what: &'static str,
        /// Which bytes.
        extent: Extent,
        /// The limit.
        after: Duration,
    },
    /// The caller asked for what this export cannot do; nothing was sent.
    #[error("cannot {what} {extent} of the export at {peer}: {why}")]
    BadRequest {
        /// Where.
        peer: String,
        /// `read`, `trim`, …
        what: &'static str,
        /// Which bytes.
        extent: Extent,
        /// `outside the export`, `not aligned to its blocks`, …
        why: &'static str,
    },
    /// The caller asked for the status of a context that was not negotiated; nothing was sent.
    #[error("the session with {peer} did not negotiate metadata context {context:?}; connect with it")]
    NoContext {
        /// Where.
        peer: String,
        /// The context.
        context: String,
    },
}

fn shown(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}

/// Text of a peer for a message: printable, short.
pub(super) fn printable(bytes: &[u8]) -> String {
    bytes[..bytes.len().min(64)].escape_ascii().to_string()
}
