//! The task that reads replies (proto.md, "Transmission").
//!
//! One loop, one reply at a time, straight into the waiting caller's buffer. It ends with the reason why the session
//! ended: the stream closed or broke, or the server broke the protocol, after which nothing it says can be placed.

use tokio::io::{AsyncRead, AsyncReadExt};

use super::layout::*;
use super::proto::*;
use super::table::Table;

/// Why the loop ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    #[error("the server closed the connection")]
    Closed,
    #[error("the connection broke: {0}")]
    Io(#[from] std::io::Error),
    #[error("the server broke the protocol: {0}")]
    Protocol(#[from] Malformed),
}

/// Reads replies and hands them to `table` until the session ends. `structured` is what was negotiated.
pub(super) async fn read_replies<R: AsyncRead + Unpin>(mut stream: R, table: &Table, structured: bool) -> Ended {
    loop {
        if let Err(ended) = read_reply(&mut stream, table, structured).await {
            return ended;
        }
    }
}

async fn read_reply<R: AsyncRead + Unpin>(stream: &mut R, table: &Table, structured: bool) -> Result<(), Ended> {
    let mut head = [0; SIMPLE_REPLY_BYTES];
    if stream.read(&mut head[..1]).await? == 0 {
        return Err(Ended::Closed);
    }
    stream.read_exact(&mut head[1..]).await?;
    match decode_reply_head(&head)? {
        ReplyHead::Simple { error, cookie } => simple(stream, table, structured, cookie, error).await,
        ReplyHead::Chunk { .. } if !structured => Err(Malformed("a structured reply that was not negotiated").into()),
        ReplyHead::Chunk { flags, kind, cookie } => {
            let len = stream.read_u32().await?;
            chunk(stream, table, kind, cookie, len).await?;
            if flags & CHUNK_DONE != 0 {
                table.finish(cookie)?;
            }
            Ok(())
        }
    }
}

async fn simple<R: AsyncRead + Unpin>(
    stream: &mut R,
    table: &Table,
    structured: bool,
    cookie: u64,
    error: u32,
) -> Result<(), Ended> {
    let (offset, len, reads) = table.part(cookie)?;
    if error != 0 {
        table.fail(cookie, error, String::new())?;
    } else if reads && structured {
        // "the server MUST use structured replies to NBD_CMD_READ": what follows cannot be trusted.
        return Err(Malformed("a simple reply to a read although structured ones were negotiated").into());
    } else if reads {
        data(stream, table, cookie, offset, len).await?;
    }
    Ok(table.finish(cookie)?)
}

async fn chunk<R: AsyncRead + Unpin>(
    stream: &mut R,
    table: &Table,
    kind: u16,
    cookie: u64,
    len: u32,
) -> Result<(), Ended> {
    let (_, asked, reads) = table.part(cookie)?;
    match kind {
        // A NONE that is not the last is useless and forbidden, but harmless.
        CHUNK_NONE if len == 0 => Ok(()),
        CHUNK_OFFSET_DATA if reads && len > 8 && len - 8 <= asked => {
            let offset = stream.read_u64().await?;
            data(stream, table, cookie, offset, len - 8).await
        }
        CHUNK_OFFSET_HOLE if reads && len == 12 => {
            let (offset, hole) = (stream.read_u64().await?, stream.read_u32().await?);
            let mut landing = table.land(cookie, offset, hole)?;
            landing.buffer.as_mut()[landing.range.clone()].fill(0);
            table.landed(landing);
            Ok(())
        }
        CHUNK_BLOCK_STATUS if len as usize <= 4 + 8 * MAX_DESCRIPTORS => {
            let payload = payload(stream, len as usize).await?;
            let (context, descriptors) = decode_block_status(&payload, asked)?;
            Ok(table.status(cookie, context, descriptors)?)
        }
        kind if kind & CHUNK_FLAG_ERROR != 0 && len as usize <= MAX_ERROR_PAYLOAD_BYTES => {
            let payload = payload(stream, len as usize).await?;
            let (errno, message) = decode_error_chunk(&payload)?;
            Ok(table.fail(cookie, errno, message)?)
        }
        _ => Err(Malformed("a chunk of an unknown kind, or of a length that does not fit it").into()),
    }
}

async fn data<R: AsyncRead + Unpin>(
    stream: &mut R,
    table: &Table,
    cookie: u64,
    offset: u64,
    len: u32,
) -> Result<(), Ended> {
    let mut landing = table.land(cookie, offset, len)?;
    stream.read_exact(&mut landing.buffer.as_mut()[landing.range.clone()]).await?;
    table.landed(landing);
    Ok(())
}

/// A payload of bounded length. The memory grows with what arrives, not with what was announced.
async fn payload<R: AsyncRead + Unpin>(stream: &mut R, len: usize) -> Result<Vec<u8>, Ended> {
    const STEP: usize = 64 << 10;
    let mut bytes = vec![];
    while bytes.len() < len {
        let from = bytes.len();
        bytes.resize(len.min(from + STEP), 0);
        stream.read_exact(&mut bytes[from..]).await?;
    }
    Ok(bytes)
}
