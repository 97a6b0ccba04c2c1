//! The server's side of the handshake (proto.md, "Fixed newstyle negotiation" and "Option types").
//!
//! Greeting → the client's flags → options, each answered before the next is read, until one of them begins the
//! transmission, or ends all. An option that we do not know is answered so, and one whose data makes no sense, too: only
//! bytes that are no option, or an option longer than [`MAX_OPTION_BYTES`], end the conversation.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{MAX_READ_BYTES, Offer};
use crate::nbd::BASE_ALLOCATION;
use crate::nbd::error::printable;
use crate::nbd::layout::*;
use crate::nbd::proto::*;

/// Our id of [`BASE_ALLOCATION`] in every session.
pub(super) const ALLOCATION_ID: u32 = 1;
/// What a query for all contexts of the namespace looks like.
const ALLOCATION_NAMESPACE: &str = "base:";
/// Smallest block: any byte can be read.
const MIN_BLOCK_BYTES: u32 = 1;

/// What a client has chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Number of the offer.
    pub offer: usize,
    /// Whether replies are structured.
    pub structured: bool,
    /// Whether it may ask for [`BASE_ALLOCATION`].
    pub allocation: bool,
}

/// Why a client gets nothing.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection broke, or the client closed it.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// The client broke the protocol.
    #[error("it broke the protocol in its handshake: {0}")]
    Protocol(#[from] Malformed),
    /// `EXPORT_NAME` with a name that there is not: hanging up is the only answer.
    #[error("it asked for an export {0:?}, which there is not")]
    UnknownExport(String),
}

/// Talks with a client until it has chosen an export; `None` when it goes in good order without one. Has no time limit of
/// its own. After an error the stream is worth nothing: drop it.
pub async fn shake_hands<S>(stream: &mut S, offers: &[Offer]) -> Result<Option<Chosen>, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut greeting = Vec::with_capacity(18);
    greeting.extend_from_slice(&NBD_MAGIC.to_be_bytes());
    greeting.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    greeting.extend_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    stream.write_all(&greeting).await?;
    stream.flush().await?;
    let flags = stream.read_u32().await?;
    let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    if flags & !known != 0 {
        return Err(Malformed("it sent handshake flags that were not offered").into());
    }
    let (fixed, no_zeroes) = (flags & u32::from(FLAG_FIXED_NEWSTYLE) != 0, flags & u32::from(FLAG_NO_ZEROES) != 0);
    let mut talk = Talk { stream, offers, option: 0, structured: false, allocation_of: None };
    loop {
        let mut head = [0; OPTION_HEADER_BYTES];
        talk.stream.read_exact(&mut head).await?;
        let head = decode_option_head(&head)?;
        let mut data = vec![0; head.len];
        talk.stream.read_exact(&mut data).await?;
        if head.option == OPT_EXPORT_NAME {
            return talk.begin_without_reply(&data, no_zeroes).await.map(Some);
        }
        if !fixed {
            return Err(Malformed("it sent an option that needs the fixed newstyle, which it did not take").into());
        }
        talk.option = head.option;
        match talk.answer(&data).await? {
            Next::Talk => {}
            Next::Transmit(chosen) => return Ok(Some(chosen)),
            Next::End => return Ok(None),
        }
    }
}

/// What follows an option.
enum Next {
    Talk,
    Transmit(Chosen),
    End,
}

/// One conversation: the option that is being answered, and what was agreed on.
struct Talk<'a, S> {
    stream: &'a mut S,
    offers: &'a [Offer],
    option: u32,
    structured: bool,
    /// Number of the offer whose allocation was chosen.
    allocation_of: Option<usize>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Talk<'_, S> {
    fn find(&self, name: &str) -> Option<usize> {
        match name {
            "" if self.offers.len() == 1 => Some(0),
            name => self.offers.iter().position(|offer| offer.name == name),
        }
    }

    /// Transmission flags of an offer.
    fn flags(&self) -> u16 {
        let structured = if self.structured { SEND_DF } else { 0 };
        HAS_FLAGS | READ_ONLY | SEND_FLUSH | CAN_MULTI_CONN | SEND_CACHE | structured
    }

    fn chosen(&self, offer: usize) -> Chosen {
        Chosen { offer, structured: self.structured, allocation: self.allocation_of == Some(offer) }
    }

    async fn reply(&mut self, kind: u32, data: &[u8]) -> io::Result<()> {
        self.stream.write_all(&encode_option_reply(self.option, kind, data)).await
    }

    async fn done(&mut self) -> io::Result<Next> {
        self.reply(REP_ACK, &[]).await?;
        self.stream.flush().await?;
        Ok(Next::Talk)
    }

    async fn refuse(&mut self, kind: u32, why: &str) -> io::Result<Next> {
        self.reply(kind, why.as_bytes()).await?;
        self.stream.flush().await?;
        Ok(Next::Talk)
    }

    async fn answer(&mut self, data: &[u8]) -> io::Result<Next> {
        match self.option {
            OPT_ABORT => {
                // Whether it still hears that does not matter.
                let _ = self.done().await;
                Ok(Next::End)
            }
            OPT_STRUCTURED_REPLY | OPT_LIST if !data.is_empty() => {
                self.refuse(REP_ERR_INVALID, "this option has no data").await
            }
            OPT_STRUCTURED_REPLY => {
                self.structured = true;
                self.done().await
            }
            OPT_LIST => {
                for offer in self.offers {
                    self.reply(REP_SERVER, &encode_listed(&offer.name, &offer.description)).await?;
                }
                self.done().await
            }
            OPT_INFO | OPT_GO => match decode_go(data) {
                Ok((export, information)) => self.describe(&export, &information).await,
                Err(error) => self.refuse(REP_ERR_INVALID, error.0).await,
            },
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => match decode_meta_context(data) {
                Ok((export, queries)) => self.contexts(&export, &queries).await,
                Err(error) => self.refuse(REP_ERR_INVALID, error.0).await,
            },
            _ => self.refuse(REP_ERR_UNSUP, "this server does not know that option").await,
        }
    }

    /// `INFO` and `GO`.
    async fn describe(&mut self, export: &str, information: &[u16]) -> io::Result<Next> {
        let Some(number) = self.find(export) else { return self.unknown().await };
        let offer = &self.offers[number];
        let preferred = offer.disk.preferred_bytes();
        self.reply(REP_INFO, &encode_info_export(offer.disk.size_bytes(), self.flags())).await?;
        // Also unasked: it demands nothing that a client could miss.
        self.reply(REP_INFO, &encode_info_block_size(MIN_BLOCK_BYTES, preferred, MAX_READ_BYTES)).await?;
        for (asked, text) in [(INFO_NAME, &offer.name), (INFO_DESCRIPTION, &offer.description)] {
            if information.contains(&asked) {
                self.reply(REP_INFO, &encode_info_text(asked, text)).await?;
            }
        }
        self.done().await?;
        Ok(if self.option == OPT_GO { Next::Transmit(self.chosen(number)) } else { Next::Talk })
    }

    /// `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
    async fn contexts(&mut self, export: &str, queries: &[String]) -> io::Result<Next> {
        let sets = self.option == OPT_SET_META_CONTEXT;
        if sets {
            // What was chosen before goes, whatever comes of this.
            self.allocation_of = None;
            if !self.structured {
                return self.refuse(REP_ERR_INVALID, "ask for structured replies first").await;
            }
        }
        let Some(number) = self.find(export) else { return self.unknown().await };
        let all = !sets && (queries.is_empty() || queries.iter().any(|query| query == ALLOCATION_NAMESPACE));
        if all || queries.iter().any(|query| query == BASE_ALLOCATION) {
            // In a list the id means nothing.
            let id = if sets { ALLOCATION_ID } else { 0 };
            self.reply(REP_META_CONTEXT, &encode_meta_context(id, BASE_ALLOCATION)).await?;
            if sets {
                self.allocation_of = Some(number);
            }
        }
        self.done().await
    }

    async fn unknown(&mut self) -> io::Result<Next> {
        self.refuse(REP_ERR_UNKNOWN, "no disk of this name is served").await
    }

    /// `EXPORT_NAME`, which has no reply but the export itself.
    async fn begin_without_reply(&mut self, name: &[u8], no_zeroes: bool) -> Result<Chosen, HandshakeError> {
        let found = std::str::from_utf8(name).ok().and_then(|name| self.find(name));
        let Some(number) = found else { return Err(HandshakeError::UnknownExport(printable(name))) };
        let mut out = self.offers[number].disk.size_bytes().to_be_bytes().to_vec();
        out.extend_from_slice(&self.flags().to_be_bytes());
        out.resize(out.len() + if no_zeroes { 0 } else { EXPORT_NAME_ZEROES }, 0);
        self.stream.write_all(&out).await?;
        self.stream.flush().await?;
        Ok(self.chosen(number))
    }
}
