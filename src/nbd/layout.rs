//! Layouts of the NBD protocol (proto.md, "Protocol phases"), as pure functions.
//!
//! Everything on the wire is big-endian. Every length that a peer can choose is checked against its bound in
//! [`super::proto`] before anybody allocates or reads by it.

use super::proto::*;

/// Bytes that break the protocol; says which rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

/// Takes big-endian fields off the front of a payload.
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The next `n` bytes.
    pub fn bytes(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        let (head, tail) = self.0.split_at_checked(n).ok_or(Malformed("a payload is shorter than its fields"))?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let mut out = [0; N];
        out.copy_from_slice(self.bytes(N)?);
        Ok(out)
    }

    /// The next 16 bits.
    pub fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next 32 bits.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next 64 bits.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    /// The next `n` bytes as text of at most [`MAX_STRING_BYTES`].
    pub fn text(&mut self, n: usize) -> Result<String, Malformed> {
        if n > MAX_STRING_BYTES {
            return Err(Malformed("a string is longer than 4096 bytes"));
        }
        let text = std::str::from_utf8(self.bytes(n)?).map_err(|_| Malformed("a string is not UTF-8"))?;
        Ok(text.to_owned())
    }

    /// Everything that is left, as text.
    pub fn rest(&mut self) -> Result<String, Malformed> {
        self.text(self.0.len())
    }

    /// Nothing may be left.
    pub fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed("a payload is longer than its fields")) }
    }
}

/// An option: `IHAVEOPT ‖ option u32 ‖ len u32 ‖ data`.
pub fn encode_option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(OPTION_HEADER_BYTES + data.len());
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    out
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Data of `OPT_GO`: `name ‖ count u16 ‖ information u16…`.
pub fn encode_go(export: &str, information: &[u16]) -> Vec<u8> {
    let mut out = vec![];
    put_text(&mut out, export);
    out.extend_from_slice(&(information.len() as u16).to_be_bytes());
    information.iter().for_each(|i| out.extend_from_slice(&i.to_be_bytes()));
    out
}

/// Data of `OPT_SET_META_CONTEXT`: `export ‖ count u32 ‖ query…`.
pub fn encode_set_meta_context(export: &str, queries: &[String]) -> Vec<u8> {
    let mut out = vec![];
    put_text(&mut out, export);
    out.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|q| put_text(&mut out, q));
    out
}

/// An option's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHead {
    /// `OPT_…`.
    pub option: u32,
    /// Length of its data: at most [`MAX_OPTION_BYTES`].
    pub len: usize,
}

/// Decodes `IHAVEOPT ‖ option u32 ‖ len u32`.
pub fn decode_option_head(bytes: &[u8; OPTION_HEADER_BYTES]) -> Result<OptionHead, Malformed> {
    let mut f = Fields(bytes);
    if f.u64()? != OPTION_MAGIC {
        return Err(Malformed("an option does not begin with its magic number"));
    }
    let head = OptionHead { option: f.u32()?, len: f.u32()? as usize };
    if head.len > MAX_OPTION_BYTES {
        return Err(Malformed("an option is too long"));
    }
    Ok(head)
}

/// Decodes the data of `OPT_GO` and `OPT_INFO`, the inverse of [`encode_go`].
pub fn decode_go(data: &[u8]) -> Result<(String, Vec<u16>), Malformed> {
    let mut f = Fields(data);
    let len = f.u32()? as usize;
    let export = f.text(len)?;
    let count = f.u16()?;
    let information = (0..count).map(|_| f.u16()).collect::<Result<_, _>>()?;
    f.end()?;
    Ok((export, information))
}

/// Decodes the data of `OPT_LIST_META_CONTEXT` and `OPT_SET_META_CONTEXT`, the inverse of [`encode_set_meta_context`].
/// The data's length bounds the number of queries.
pub fn decode_meta_context(data: &[u8]) -> Result<(String, Vec<String>), Malformed> {
    let mut f = Fields(data);
    let len = f.u32()? as usize;
    let export = f.text(len)?;
    let mut queries = vec![];
    for _ in 0..f.u32()? {
        let len = f.u32()? as usize;
        queries.push(f.text(len)?);
    }
    f.end()?;
    Ok((export, queries))
}

/// An option's reply: `magic u64 ‖ option u32 ‖ kind u32 ‖ len u32 ‖ data`.
pub fn encode_option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(OPTION_REPLY_HEADER_BYTES + data.len());
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    out
}

/// Data of `REP_SERVER`: `len u32 ‖ name ‖ description`.
pub fn encode_listed(name: &str, description: &str) -> Vec<u8> {
    let mut out = vec![];
    put_text(&mut out, name);
    out.extend_from_slice(description.as_bytes());
    out
}

/// Data of `REP_META_CONTEXT`: `id u32 ‖ name`.
pub fn encode_meta_context(id: u32, name: &str) -> Vec<u8> {
    [&id.to_be_bytes(), name.as_bytes()].concat()
}

/// Data of `REP_INFO` with `INFO_EXPORT`: `information u16 ‖ size u64 ‖ flags u16`.
pub fn encode_info_export(size_bytes: u64, flags: u16) -> Vec<u8> {
    [&INFO_EXPORT.to_be_bytes()[..], &size_bytes.to_be_bytes(), &flags.to_be_bytes()].concat()
}

/// Data of `REP_INFO` with `INFO_NAME` or `INFO_DESCRIPTION`: `information u16 ‖ text`.
pub fn encode_info_text(information: u16, text: &str) -> Vec<u8> {
    [&information.to_be_bytes(), text.as_bytes()].concat()
}

/// Data of `REP_INFO` with `INFO_BLOCK_SIZE`: `information u16 ‖ min u32 ‖ preferred u32 ‖ max u32`.
pub fn encode_info_block_size(min: u32, preferred: u32, max: u32) -> Vec<u8> {
    let sizes = [min, preferred, max].map(u32::to_be_bytes);
    [&INFO_BLOCK_SIZE.to_be_bytes()[..], sizes.as_flattened()].concat()
}

/// Header of an option's reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// The option that it answers.
    pub option: u32,
    /// `REP_…`.
    pub kind: u32,
    /// Length of its payload: at most [`MAX_OPTION_REPLY_BYTES`].
    pub len: usize,
}

/// Decodes `magic u64 ‖ option u32 ‖ kind u32 ‖ len u32`.
pub fn decode_option_reply(bytes: &[u8; OPTION_REPLY_HEADER_BYTES]) -> Result<OptionReply, Malformed> {
    let mut f = Fields(bytes);
    if f.u64()? != OPTION_REPLY_MAGIC {
        return Err(Malformed("an option's reply does not begin with its magic number"));
    }
    let reply = OptionReply { option: f.u32()?, kind: f.u32()?, len: f.u32()? as usize };
    if reply.len > MAX_OPTION_REPLY_BYTES {
        return Err(Malformed("an option's reply is too long"));
    }
    Ok(reply)
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// `CMD_FLAG_…`.
    pub flags: u16,
    /// `CMD_…`.
    pub command: u16,
    /// Comes back in the reply.
    pub cookie: u64,
    /// Where.
    pub offset: u64,
    /// How long.
    pub len: u32,
}

/// Encodes `magic u32 ‖ flags u16 ‖ command u16 ‖ cookie u64 ‖ offset u64 ‖ len u32`.
pub fn encode_request(request: &Request) -> [u8; REQUEST_BYTES] {
    let mut out = [0; REQUEST_BYTES];
    out[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&request.flags.to_be_bytes());
    out[6..8].copy_from_slice(&request.command.to_be_bytes());
    out[8..16].copy_from_slice(&request.cookie.to_be_bytes());
    out[16..24].copy_from_slice(&request.offset.to_be_bytes());
    out[24..].copy_from_slice(&request.len.to_be_bytes());
    out
}

/// Decodes a request, the inverse of [`encode_request`]. What it asks for is not checked.
pub fn decode_request(bytes: &[u8; REQUEST_BYTES]) -> Result<Request, Malformed> {
    let mut f = Fields(bytes);
    if f.u32()? != REQUEST_MAGIC {
        return Err(Malformed("a request does not begin with its magic number"));
    }
    Ok(Request { flags: f.u16()?, command: f.u16()?, cookie: f.u64()?, offset: f.u64()?, len: f.u32()? })
}

/// Encodes a simple reply, `magic u32 ‖ error u32 ‖ cookie u64`; the data of a read that went well follows it.
pub fn encode_simple_reply(cookie: u64, error: u32) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut out = [0; SIMPLE_REPLY_BYTES];
    out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&error.to_be_bytes());
    out[8..].copy_from_slice(&cookie.to_be_bytes());
    out
}

/// A chunk's header, and as much of its payload as is given: `magic u32 ‖ flags u16 ‖ kind u16 ‖ cookie u64 ‖ len u32 ‖
/// payload`. `rest` is the length of the payload that the caller sends after it.
fn encode_chunk(flags: u16, kind: u16, cookie: u64, payload: &[&[u8]], rest: u32) -> Vec<u8> {
    let len = payload.iter().map(|part| part.len() as u32).sum::<u32>() + rest;
    let mut out = Vec::with_capacity(CHUNK_HEADER_BYTES + (len - rest) as usize);
    out.extend_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    payload.iter().for_each(|part| out.extend_from_slice(part));
    out
}

/// The last chunk of a reply, with nothing in it.
pub fn encode_done_chunk(cookie: u64) -> Vec<u8> {
    encode_chunk(CHUNK_DONE, CHUNK_NONE, cookie, &[], 0)
}

/// What goes before `len` bytes of data at `offset`. `flags`: [`CHUNK_DONE`] or nothing.
pub fn encode_data_chunk(flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    encode_chunk(flags, CHUNK_OFFSET_DATA, cookie, &[&offset.to_be_bytes()], len)
}

/// `len` zeroes at `offset`. `flags`: [`CHUNK_DONE`] or nothing.
pub fn encode_hole_chunk(flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    encode_chunk(flags, CHUNK_OFFSET_HOLE, cookie, &[&offset.to_be_bytes(), &len.to_be_bytes()], 0)
}

/// An error with words for people (at most [`MAX_STRING_BYTES`]); of the bytes at `offset`, if it is theirs. `flags`:
/// [`CHUNK_DONE`] or nothing. The inverse of [`decode_error_chunk`].
pub fn encode_error_chunk(flags: u16, cookie: u64, errno: u32, message: &str, offset: Option<u64>) -> Vec<u8> {
    debug_assert!(message.len() <= MAX_STRING_BYTES);
    let offset_bytes = offset.map(u64::to_be_bytes);
    let kind = if offset.is_some() { CHUNK_ERROR_OFFSET } else { CHUNK_ERROR };
    let len = (message.len() as u16).to_be_bytes();
    let at = offset_bytes.as_ref().map_or(&[][..], |bytes| bytes);
    encode_chunk(flags, kind, cookie, &[&errno.to_be_bytes(), &len, message.as_bytes(), at], 0)
}

/// The whole reply to a block-status request of one context. The inverse of [`decode_block_status`].
pub fn encode_block_status(cookie: u64, context: u32, descriptors: &[Descriptor]) -> Vec<u8> {
    let words: Vec<_> = descriptors.iter().flat_map(|(len, flags)| [len.to_be_bytes(), flags.to_be_bytes()]).collect();
    encode_chunk(CHUNK_DONE, CHUNK_BLOCK_STATUS, cookie, &[&context.to_be_bytes(), words.as_flattened()], 0)
}

/// The first 16 bytes of any reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHead {
    /// `magic ‖ error u32 ‖ cookie u64`; the data of a read that went well follows.
    Simple {
        /// An errno, or 0.
        error: u32,
        /// The request's.
        cookie: u64,
    },
    /// `magic ‖ flags u16 ‖ type u16 ‖ cookie u64`; `len u32` follows, then the payload.
    Chunk {
        /// `CHUNK_DONE` or nothing.
        flags: u16,
        /// `CHUNK_…`.
        kind: u16,
        /// The request's.
        cookie: u64,
    },
}

/// Decodes the first 16 bytes of a reply.
pub fn decode_reply_head(bytes: &[u8; SIMPLE_REPLY_BYTES]) -> Result<ReplyHead, Malformed> {
    let mut f = Fields(bytes);
    match f.u32()? {
        SIMPLE_REPLY_MAGIC => Ok(ReplyHead::Simple { error: f.u32()?, cookie: f.u64()? }),
        STRUCTURED_REPLY_MAGIC => Ok(ReplyHead::Chunk { flags: f.u16()?, kind: f.u16()?, cookie: f.u64()? }),
        _ => Err(Malformed("a reply does not begin with a magic number")),
    }
}

/// Decodes an error chunk's payload, `errno u32 ‖ len u16 ‖ message ‖ (offset u64)`, to errno and message. Of kinds
/// that we do not know only the common beginning is read, as proto.md asks.
pub fn decode_error_chunk(payload: &[u8]) -> Result<(u32, String), Malformed> {
    let mut f = Fields(payload);
    let errno = f.u32()?;
    let len = f.u16()? as usize;
    if len > MAX_STRING_BYTES {
        return Err(Malformed("an error's message is longer than 4096 bytes"));
    }
    let message = String::from_utf8_lossy(f.bytes(len)?).into_owned();
    if errno == 0 {
        return Err(Malformed("an error chunk without an error"));
    }
    Ok((errno, message))
}

/// One descriptor of a block-status chunk: length in bytes and flags.
pub type Descriptor = (u32, u32);

/// Decodes a block-status chunk's payload, `context u32 ‖ (len u32 ‖ flags u32)…`, for a request of `asked` bytes.
/// No descriptor is empty, and only the last may reach past what was asked: it is cut there.
pub fn decode_block_status(payload: &[u8], asked: u32) -> Result<(u32, Vec<Descriptor>), Malformed> {
    let mut f = Fields(payload);
    let context = f.u32()?;
    let count = f.0.len() / 8;
    if !f.0.len().is_multiple_of(8) || count == 0 || count > MAX_DESCRIPTORS {
        return Err(Malformed("a block-status chunk of an impossible length"));
    }
    let mut out = Vec::with_capacity(count);
    let mut left = asked;
    for _ in 0..count {
        let (len, flags) = (f.u32()?, f.u32()?);
        if len == 0 || left == 0 {
            return Err(Malformed("block-status descriptors that are empty or past the request"));
        }
        out.push((len.min(left), flags));
        left -= len.min(left);
    }
    Ok((context, out))
}
