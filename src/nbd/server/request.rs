//! Requests: read off the stream, and judged by what was agreed on (proto.md, "Request types").

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

use super::MAX_READ_BYTES;
use crate::extent::Extent;
use crate::nbd::layout::{Malformed, Request, decode_request};
use crate::nbd::proto::*;

/// Data that nobody wants is read over in pieces of this length.
const DRAIN_BYTES: usize = 16 << 10;

/// What was agreed on.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Size of the disk.
    pub size_bytes: u64,
    /// Whether replies are structured.
    pub structured: bool,
    /// Whether the allocation may be asked for.
    pub allocation: bool,
}

/// A request that makes sense, or how it is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Read this, not empty and at most [`MAX_READ_BYTES`].
    Read {
        /// Which bytes.
        extent: Extent,
        /// All of it in one chunk.
        whole: bool,
    },
    /// What is known of this, not empty.
    Status {
        /// Which bytes.
        extent: Extent,
        /// One descriptor only.
        one: bool,
    },
    /// This will be read soon.
    Expect(Extent),
    /// Nothing to do.
    Flush,
    /// The end of the session.
    Disconnect,
    /// An error, with words for people.
    Refuse(u32, &'static str),
}

/// Why there is no further request.
#[derive(Debug, thiserror::Error)]
pub enum NoRequest {
    /// The client closed the connection between two requests.
    #[error("the client went")]
    Gone,
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// The client broke the protocol.
    #[error("it broke the protocol: {0}")]
    Protocol(#[from] Malformed),
}

/// Reads the next request, with the data that comes with it.
pub async fn next_request<R>(stream: &mut R, terms: &Terms) -> Result<(Request, Asked), NoRequest>
where
    R: AsyncRead + Unpin,
{
    let mut head = [0; REQUEST_BYTES];
    if stream.read(&mut head[..1]).await? == 0 {
        return Err(NoRequest::Gone);
    }
    stream.read_exact(&mut head[1..]).await?;
    let request = decode_request(&head)?;
    if request.command == CMD_WRITE {
        // "The server MAY initiate a hard disconnect" where a payload is longer than its largest block.
        if request.len > MAX_READ_BYTES {
            return Err(Malformed("a write of more than the largest block").into());
        }
        drain(stream, request.len as usize).await?;
    }
    Ok((request, judge(&request, terms)))
}

async fn drain<R: AsyncRead + Unpin>(stream: &mut R, mut len: usize) -> io::Result<()> {
    let mut unwanted = [0; DRAIN_BYTES];
    while len > 0 {
        let some = len.min(DRAIN_BYTES);
        stream.read_exact(&mut unwanted[..some]).await?;
        len -= some;
    }
    Ok(())
}

/// What a request comes to.
pub fn judge(request: &Request, terms: &Terms) -> Asked {
    let known_flags = match request.command {
        CMD_READ if terms.structured => CMD_FLAG_DF,
        CMD_BLOCK_STATUS => CMD_FLAG_REQ_ONE,
        // Refused or without an effect, whatever their flags are.
        CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES | CMD_FLUSH | CMD_DISC => u16::MAX,
        _ => 0,
    };
    let extent = Extent { offset_bytes: request.offset, len_bytes: request.len.into() };
    let flagged = |flag: u16| request.flags & flag != 0;
    match request.command {
        CMD_DISC => Asked::Disconnect,
        CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES => Asked::Refuse(EPERM, "a restore point is never written to"),
        CMD_FLUSH => Asked::Flush,
        CMD_READ | CMD_CACHE | CMD_BLOCK_STATUS if flagged(!known_flags) => {
            Asked::Refuse(EINVAL, "a flag that this command does not have here")
        }
        CMD_READ | CMD_CACHE | CMD_BLOCK_STATUS if !extent.fits(terms.size_bytes) => {
            Asked::Refuse(EINVAL, "it reaches past the end of the disk")
        }
        CMD_CACHE => Asked::Expect(extent),
        CMD_READ | CMD_BLOCK_STATUS if extent.len_bytes == 0 => Asked::Refuse(EINVAL, "it asks for nothing"),
        CMD_READ if request.len > MAX_READ_BYTES => Asked::Refuse(EINVAL, "a read of more than the largest block"),
        CMD_READ => Asked::Read { extent, whole: flagged(CMD_FLAG_DF) },
        CMD_BLOCK_STATUS if !terms.allocation => Asked::Refuse(EINVAL, "no metadata context was chosen"),
        CMD_BLOCK_STATUS => Asked::Status { extent, one: flagged(CMD_FLAG_REQ_ONE) },
        _ => Asked::Refuse(EINVAL, "this server does not know that command"),
    }
}
