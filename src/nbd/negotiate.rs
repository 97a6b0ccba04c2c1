//! The handshake (proto.md, "Fixed newstyle negotiation" and "Option types").
//!
//! Order: greeting → flags → `STRUCTURED_REPLY` → `SET_META_CONTEXT` (if contexts are wanted) → `GO`. Every step sends
//! one option and reads its replies to the end before the next. After an error the stream is worth nothing: drop it.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::error::{NegotiateError, printable};
use super::layout::*;
use super::proto::*;
use crate::limits::MAX_DISK_BYTES;

/// What the caller wants of a session.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Name of the export; may be empty (the default export).
    pub export: String,
    /// Metadata contexts, all of them required, at most [`MAX_CONTEXTS`]. A bitmap's context goes alone.
    pub contexts: Vec<String>,
}

/// Block sizes of an export, in bytes (proto.md, "Block size constraints").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this.
    pub min: u32,
    /// Best.
    pub preferred: u32,
    /// No payload is longer.
    pub max: u32,
}

/// An export as it was negotiated.
#[derive(Clone, Debug)]
pub struct Export {
    /// Its name.
    pub name: String,
    /// Its size; at most [`MAX_DISK_BYTES`].
    pub size_bytes: u64,
    /// Transmission flags.
    pub flags: u16,
    /// What it demands of requests.
    pub blocks: BlockSizes,
    /// Whether replies are structured.
    pub structured: bool,
    /// Contexts in the order in which they were wanted: id on this session, name.
    pub contexts: Vec<(u32, String)>,
    /// The server's words about it.
    pub description: Option<String>,
}

impl Export {
    /// Whether the transmission flag is set.
    pub fn can(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// One line of a server's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// Its name.
    pub name: String,
    /// The server's words about it, often none.
    pub description: String,
}

/// Negotiates a session for `wanted` on a fresh stream. `peer` is a name for messages. Has no time limit of its own.
pub async fn negotiate<S>(stream: &mut S, peer: &str, wanted: &Wanted) -> Result<Export, NegotiateError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    check_wanted(wanted)?;
    let mut talk = Talk { stream, peer, doing: "read its greeting" };
    talk.greet().await?;
    let structured = talk.structured_replies().await?;
    let mut contexts = vec![];
    if !wanted.contexts.is_empty() {
        if !structured {
            return Err(NegotiateError::TooOld { peer: peer.into(), lacks: "structured replies" });
        }
        contexts = talk.contexts(wanted).await?;
    }
    let mut export = talk.go(wanted).await?;
    export.structured = structured;
    export.contexts = contexts;
    Ok(export)
}

/// Lists the server's exports (`NBD_OPT_LIST`), at most [`MAX_OPTION_REPLIES`], and ends the negotiation.
pub async fn list_exports<S>(stream: &mut S, peer: &str) -> Result<Vec<ListedExport>, NegotiateError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut talk = Talk { stream, peer, doing: "read its greeting" };
    talk.greet().await?;
    talk.doing = "listed its exports";
    talk.send(OPT_LIST, &[]).await?;
    let mut found = vec![];
    while let Some((kind, payload)) = talk.reply(OPT_LIST, found.len()).await? {
        talk.expect_kind(kind, REP_SERVER)?;
        let mut f = Fields(&payload);
        let listed = f.u32().and_then(|len| {
            Ok(ListedExport { name: f.text(len as usize)?, description: String::from_utf8_lossy(f.0).into_owned() })
        });
        found.push(listed.map_err(|e| talk.broken(e))?);
    }
    // The answer to ABORT does not matter, nor whether the server still hears it.
    let _ = talk.send(OPT_ABORT, &[]).await;
    Ok(found)
}

fn check_wanted(wanted: &Wanted) -> Result<(), NegotiateError> {
    if wanted.contexts.len() > MAX_CONTEXTS {
        return Err(NegotiateError::BadArgument { what: format!("more than {MAX_CONTEXTS} metadata contexts") });
    }
    match wanted.contexts.iter().chain([&wanted.export]).find(|name| name.len() > MAX_STRING_BYTES) {
        Some(_) => Err(NegotiateError::BadArgument { what: "a name longer than 4096 bytes".into() }),
        None => Ok(()),
    }
}

/// One negotiation: the stream, and what we are doing for messages.
struct Talk<'a, S> {
    stream: &'a mut S,
    peer: &'a str,
    doing: &'static str,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Talk<'_, S> {
    fn io(&self, source: std::io::Error) -> NegotiateError {
        NegotiateError::Io { peer: self.peer.into(), doing: self.doing, source }
    }

    fn broken(&self, source: Malformed) -> NegotiateError {
        NegotiateError::Protocol { peer: self.peer.into(), doing: self.doing, source }
    }

    fn expect_kind(&self, kind: u32, expected: u32) -> Result<(), NegotiateError> {
        if kind == expected { Ok(()) } else { Err(self.broken(Malformed("a reply of a kind that does not fit"))) }
    }

    async fn greet(&mut self) -> Result<(), NegotiateError> {
        let peer = || self.peer.to_owned();
        // Word by word: something that is not NBD may say less than a whole greeting.
        let mut magic = [0; 8];
        self.stream.read_exact(&mut magic).await.map_err(|e| self.io(e))?;
        if u64::from_be_bytes(magic) != NBD_MAGIC {
            return Err(NegotiateError::NotNbd { peer: peer(), saw: printable(&magic) });
        }
        let mut magic = [0; 8];
        self.stream.read_exact(&mut magic).await.map_err(|e| self.io(e))?;
        match u64::from_be_bytes(magic) {
            OPTION_MAGIC => {}
            OLDSTYLE_MAGIC => return Err(NegotiateError::TooOld { peer: peer(), lacks: "newstyle negotiation" }),
            _ => return Err(NegotiateError::NotNbd { peer: peer(), saw: printable(&magic) }),
        }
        let mut flags = [0; 2];
        self.stream.read_exact(&mut flags).await.map_err(|e| self.io(e))?;
        let flags = u16::from_be_bytes(flags);
        if flags & FLAG_FIXED_NEWSTYLE == 0 {
            return Err(NegotiateError::TooOld { peer: peer(), lacks: "fixed newstyle negotiation" });
        }
        let ours = u32::from(FLAG_FIXED_NEWSTYLE | (flags & FLAG_NO_ZEROES));
        self.stream.write_all(&ours.to_be_bytes()).await.map_err(|e| self.io(e))
    }

    async fn send(&mut self, option: u32, data: &[u8]) -> Result<(), NegotiateError> {
        self.stream.write_all(&encode_option(option, data)).await.map_err(|e| self.io(e))?;
        self.stream.flush().await.map_err(|e| self.io(e))
    }

    /// The next reply to `option`: kind and payload, or `None` for the ACK that ends it. `so_far` counts replies.
    async fn reply(&mut self, option: u32, so_far: usize) -> Result<Option<(u32, Vec<u8>)>, NegotiateError> {
        if so_far > MAX_OPTION_REPLIES {
            return Err(self.broken(Malformed("an option with too many replies")));
        }
        let mut header = [0; OPTION_REPLY_HEADER_BYTES];
        self.stream.read_exact(&mut header).await.map_err(|e| self.io(e))?;
        let reply = decode_option_reply(&header).map_err(|e| self.broken(e))?;
        let mut payload = vec![0; reply.len];
        self.stream.read_exact(&mut payload).await.map_err(|e| self.io(e))?;
        if reply.option != option {
            return Err(self.broken(Malformed("a reply to an option that was not asked")));
        }
        match reply.kind {
            REP_ACK => Ok(None),
            kind if kind & REP_FLAG_ERROR == 0 => Ok(Some((kind, payload))),
            kind => Err(self.refused(kind, &payload)),
        }
    }

    fn refused(&self, kind: u32, payload: &[u8]) -> NegotiateError {
        let peer = self.peer.to_owned();
        let message = String::from_utf8_lossy(&payload[..payload.len().min(MAX_STRING_BYTES)]).into_owned();
        let why = match kind {
            REP_ERR_TLS_REQD => return NegotiateError::TlsRequired { peer },
            // The caller fills in the name.
            REP_ERR_UNKNOWN => return NegotiateError::UnknownExport { peer, export: String::new(), message },
            REP_ERR_UNSUP => return NegotiateError::TooOld { peer, lacks: "an option that we need" },
            REP_ERR_POLICY => "forbidden by its policy".to_owned(),
            REP_ERR_SHUTDOWN => "it is shutting down".to_owned(),
            other => format!("error {}", other - REP_FLAG_ERROR),
        };
        NegotiateError::Refused { peer, doing: self.doing, why, message }
    }

    /// Whether the server takes `NBD_OPT_STRUCTURED_REPLY`.
    async fn structured_replies(&mut self) -> Result<bool, NegotiateError> {
        self.doing = "asked for structured replies";
        self.send(OPT_STRUCTURED_REPLY, &[]).await?;
        match self.reply(OPT_STRUCTURED_REPLY, 0).await {
            Ok(None) => Ok(true),
            Ok(Some(_)) => Err(self.broken(Malformed("a reply of a kind that does not fit"))),
            // Any plain refusal leaves simple replies.
            Err(NegotiateError::TooOld { .. } | NegotiateError::Refused { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    async fn contexts(&mut self, wanted: &Wanted) -> Result<Vec<(u32, String)>, NegotiateError> {
        self.doing = "asked for metadata contexts";
        self.send(OPT_SET_META_CONTEXT, &encode_set_meta_context(&wanted.export, &wanted.contexts)).await?;
        let mut given: Vec<(u32, String)> = vec![];
        while let Some((kind, payload)) =
            self.reply(OPT_SET_META_CONTEXT, given.len()).await.map_err(|e| named(e, &wanted.export))?
        {
            self.expect_kind(kind, REP_META_CONTEXT)?;
            let mut f = Fields(&payload);
            let context = f.u32().and_then(|id| Ok((id, f.rest()?))).map_err(|e| self.broken(e))?;
            let unasked = !wanted.contexts.contains(&context.1);
            if unasked || given.iter().any(|(id, name)| *id == context.0 || *name == context.1) {
                return Err(self.broken(Malformed("a metadata context twice, or one that was not asked for")));
            }
            given.push(context);
        }
        let find = |name: &String| {
            given.iter().find(|(_, n)| n == name).cloned().ok_or_else(|| NegotiateError::NoContext {
                peer: self.peer.into(),
                export: wanted.export.clone(),
                context: name.clone(),
            })
        };
        wanted.contexts.iter().map(find).collect()
    }

    async fn go(&mut self, wanted: &Wanted) -> Result<Export, NegotiateError> {
        self.doing = "asked for the export";
        self.send(OPT_GO, &encode_go(&wanted.export, &[INFO_BLOCK_SIZE, INFO_DESCRIPTION])).await?;
        let mut export = None;
        let mut blocks = None;
        let mut description = None;
        let mut replies = 0;
        while let Some((kind, payload)) = self.reply(OPT_GO, replies).await.map_err(|e| named(e, &wanted.export))? {
            replies += 1;
            self.expect_kind(kind, REP_INFO)?;
            let mut f = Fields(&payload);
            let mut take = || -> Result<(), Malformed> {
                match f.u16()? {
                    INFO_EXPORT => {
                        export = Some((f.u64()?, f.u16()?));
                        f.end()
                    }
                    INFO_BLOCK_SIZE => {
                        blocks = Some(BlockSizes { min: f.u32()?, preferred: f.u32()?, max: f.u32()? });
                        f.end()
                    }
                    INFO_DESCRIPTION => {
                        description = Some(f.rest()?);
                        Ok(())
                    }
                    _ => Ok(()), // not asked for: proto.md says ignore
                }
            };
            take().map_err(|e| self.broken(e))?;
        }
        let (size_bytes, flags) = export.ok_or(Malformed("an export without its size")).map_err(|e| self.broken(e))?;
        let blocks = blocks.unwrap_or(BlockSizes { min: 1, preferred: 4096, max: DEFAULT_MAX_BLOCK_BYTES });
        check_sizes(size_bytes, blocks).map_err(|e| self.broken(e))?;
        let flags = if flags & HAS_FLAGS == 0 { 0 } else { flags };
        let name = wanted.export.clone();
        Ok(Export { name, size_bytes, flags, blocks, structured: false, contexts: vec![], description })
    }
}

/// Puts the export's name into an error that lacks it.
fn named(error: NegotiateError, name: &str) -> NegotiateError {
    match error {
        NegotiateError::UnknownExport { peer, message, .. } => {
            NegotiateError::UnknownExport { peer, export: name.into(), message }
        }
        other => other,
    }
}

fn check_sizes(size_bytes: u64, blocks: BlockSizes) -> Result<(), Malformed> {
    if size_bytes > MAX_DISK_BYTES {
        return Err(Malformed("an export larger than 64 PiB"));
    }
    // proto.md: the minimum is a power of two of at most 64 KiB, the maximum a multiple of it (or all ones).
    let min = blocks.min;
    let aligned = blocks.max.is_multiple_of(min.max(1)) || blocks.max == u32::MAX;
    if !min.is_power_of_two() || min > 65536 || blocks.max < min || !aligned {
        return Err(Malformed("impossible block sizes"));
    }
    if !size_bytes.is_multiple_of(u64::from(min)) {
        return Err(Malformed("a size that is no multiple of the smallest block"));
    }
    Ok(())
}
