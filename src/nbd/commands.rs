//! The commands of a session (proto.md, "Request types"), and what is checked before one is sent.

use futures_util::{StreamExt, TryStreamExt, future, stream};

use super::client::Client;
use super::error::NbdError;
use super::layout::Descriptor;
use super::pool::Buffer;
use super::proto::*;
use super::table::{Outcome, Part, Work};
use crate::extent::Extent;

/// Requests of [`Client::write_zeroes_all`] on the wire at once.
pub const PIPELINED: usize = 64;

impl Client {
    /// Reads `extent` (not empty, within the export, in one request).
    pub async fn read(&self, extent: Extent) -> Result<Vec<u8>, NbdError> {
        // Checked before the memory is made.
        self.check("read", extent, u64::from(self.export().blocks.max))?;
        let buffer = Buffer::plain(extent.len_bytes as usize);
        Ok(self.read_into(extent, u64::MAX, buffer).await?.into_vec())
    }

    /// Reads `extent` into `buffer`, which is exactly as long, and gives it back full. The read goes out as several
    /// requests at once where it crosses a multiple of `boundary_bytes` (> 0) or is longer than the server's largest
    /// block; it fails if one of them does. Up to [`ClientOptions::max_in_flight`] such pieces.
    pub async fn read_into(&self, extent: Extent, boundary_bytes: u64, buffer: Buffer) -> Result<Buffer, NbdError> {
        self.check("read", extent, MAX_REQUEST_BYTES)?;
        if buffer.len() as u64 != extent.len_bytes || boundary_bytes == 0 {
            return Err(self.bad("read", extent, "the buffer is of another length, or the boundary is zero"));
        }
        let max_block = u64::from(self.export().blocks.max);
        let mut parts = vec![];
        for piece in extent.split_at_multiples(boundary_bytes) {
            let mut at = piece.offset_bytes;
            while at < piece.end() {
                let len = max_block.min(piece.end() - at);
                parts.push(Part::new(at, len as u32));
                at += len;
                if parts.len() > self.options().max_in_flight {
                    return Err(self.bad("read", extent, "it falls into more pieces than may be in flight"));
                }
            }
        }
        let work = Work::Read { buffer: Some(buffer), offset: extent.offset_bytes };
        match self.perform("read", CMD_READ, 0, extent, work, parts).await? {
            Outcome::Read(buffer) => Ok(buffer),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Writes zeroes (at most [`MAX_REQUEST_BYTES`], any content of the disk there is lost). `no_hole`: the blocks
    /// stay allocated. On a helper node this sets the bits of an enabled bitmap.
    pub async fn write_zeroes(&self, extent: Extent, no_hole: bool) -> Result<(), NbdError> {
        self.check_command("write zeroes to", extent, SEND_WRITE_ZEROES, true)?;
        let flags = if no_hole { CMD_FLAG_NO_HOLE } else { 0 };
        self.plain("write zeroes to", CMD_WRITE_ZEROES, flags, extent).await
    }

    /// Writes zeroes to many extents, [`PIPELINED`] at a time, in no order. Fails with the first failure; the others of
    /// its time may have been done.
    pub async fn write_zeroes_all(
        &self,
        extents: impl IntoIterator<Item = Extent>,
        no_hole: bool,
    ) -> Result<(), NbdError> {
        let all = stream::iter(extents).map(|extent| self.write_zeroes(extent, no_hole));
        all.buffer_unordered(PIPELINED).try_for_each(|()| future::ready(Ok(()))).await
    }

    /// Tells the server that the content is not needed (at most [`MAX_REQUEST_BYTES`]). What a later read gives is
    /// the server's choice; QEMU's snapshot-access fails it. On QEMU 7.2 an extent that is not aligned to the
    /// copy-before-write cluster aborts QEMU: [`super::NbdSource::discard`] checks that, this does not.
    ///
    /// [`super::NbdSource::discard`]: crate::block::BlockSource::discard
    pub async fn trim(&self, extent: Extent) -> Result<(), NbdError> {
        self.check_command("trim", extent, SEND_TRIM, true)?;
        self.plain("trim", CMD_TRIM, 0, extent).await
    }

    /// Makes finished writes durable.
    pub async fn flush(&self) -> Result<(), NbdError> {
        let all = Extent::new(0, 0);
        if !self.export().can(SEND_FLUSH) {
            return Err(self.bad("flush", all, "the server does not offer it"));
        }
        self.plain("flush", CMD_FLUSH, 0, all).await
    }

    /// One block-status request of a negotiated context: descriptors (length in bytes, flags) from the start of
    /// `extent` (at most [`MAX_REQUEST_BYTES`]) on. At least one; together perhaps shorter than asked (QEMU answers
    /// 131,072 at most): ask again for the rest, or use [`Client::block_status_all`].
    pub async fn block_status(&self, context: &str, extent: Extent) -> Result<Vec<Descriptor>, NbdError> {
        let id = self.context(context)?;
        self.check("ask the block status of", extent, MAX_REQUEST_BYTES)?;
        let contexts = self.export().contexts.iter().map(|(id, _)| *id).collect();
        let work = Work::Status { contexts, found: vec![] };
        let parts = vec![Part::new(extent.offset_bytes, extent.len_bytes as u32)];
        match self.perform("block status", CMD_BLOCK_STATUS, 0, extent, work, parts).await? {
            Outcome::Status(found) => {
                Ok(found.into_iter().find(|(found, _)| *found == id).map(|(_, d)| d).unwrap_or_default())
            }
            other => Err(self.unexpected(&other)),
        }
    }

    /// The negotiated id of a context.
    pub(super) fn context(&self, context: &str) -> Result<u32, NbdError> {
        let found = self.export().contexts.iter().find(|(_, name)| name == context);
        found
            .map(|(id, _)| *id)
            .ok_or_else(|| NbdError::NoContext { peer: self.peer().to_owned(), context: context.into() })
    }

    /// Whether `extent` may be asked for.
    pub(super) fn check(&self, what: &'static str, extent: Extent, max_bytes: u64) -> Result<(), NbdError> {
        let min = u64::from(self.export().blocks.min);
        let why = if extent.len_bytes == 0 {
            "it is empty"
        } else if !extent.fits(self.export().size_bytes) {
            "it reaches past the end"
        } else if extent.len_bytes > max_bytes {
            "it is longer than a request may be"
        } else if !extent.offset_bytes.is_multiple_of(min) || !extent.len_bytes.is_multiple_of(min) {
            "it is not aligned to the server's smallest block"
        } else {
            return Ok(());
        };
        Err(self.bad(what, extent, why))
    }

    fn check_command(&self, what: &'static str, extent: Extent, flag: u16, writes: bool) -> Result<(), NbdError> {
        if writes && self.export().can(READ_ONLY) {
            return Err(self.bad(what, extent, "it is exported read-only"));
        }
        if !self.export().can(flag) {
            return Err(self.bad(what, extent, "the server does not offer it"));
        }
        self.check(what, extent, MAX_REQUEST_BYTES)
    }

    fn bad(&self, what: &'static str, extent: Extent, why: &'static str) -> NbdError {
        NbdError::BadRequest { peer: self.peer().to_owned(), what, extent, why }
    }

    async fn plain(&self, what: &'static str, command: u16, flags: u16, extent: Extent) -> Result<(), NbdError> {
        let parts = vec![Part::new(extent.offset_bytes, extent.len_bytes as u32)];
        match self.perform(what, command, flags, extent, Work::Plain, parts).await? {
            Outcome::Done => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    /// The table answers each kind of work with its kind of outcome; this is for the compiler.
    fn unexpected(&self, _: &Outcome) -> NbdError {
        self.gone("an answer of another kind came".into())
    }
}
