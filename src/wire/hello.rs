//! The hello: which version the two ends speak. Frozen for all versions, byte for byte; everything after it may change.
//!
//! All numbers are little-endian.
//!
//! ```text
//! client: magic [16] ‖ count u16 ‖ version u16 × count                   what it offers, best first; 1 <= count <= 16
//! server: magic [16] ‖ chosen u16 ‖ count u16 ‖ version u16 × count      what it knows, best first; 1 <= count <= 16
//!         ‖ len u8 ‖ software [len]                                      name and version for people: UTF-8, len <= 64
//! magic = "LIVEBACKUP\r\n\x00\x1a\n\xff"
//! ```
//!
//! The server chooses the first of its own versions that the client offers; 0 means that there is none, and closes. Version
//! numbers that an end does not know are passed over.
//!
//! Reasons. The line ends, the zero and the 0xff in the magic notice a text channel, and no other protocol starts like
//! this. The client speaks first, so that a server says nothing to a port scanner. The name of the software tells the
//! operator which end to renew.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::link::Stream;
use super::message::{Failure, FailureCode};

/// First bytes of both directions.
pub const MAGIC: [u8; 16] = *b"LIVEBACKUP\r\n\x00\x1a\n\xff";
/// Most versions in a list.
pub const MAX_VERSIONS: usize = 16;
/// Longest name of a software.
pub const MAX_SOFTWARE_BYTES: usize = 64;
/// What this end calls itself.
pub const SOFTWARE: &str = concat!("livebackup ", env!("CARGO_PKG_VERSION"));

const _: () = assert!(SOFTWARE.len() <= MAX_SOFTWARE_BYTES);
const _: () = assert!(!Version::KNOWN.is_empty() && Version::KNOWN.len() <= MAX_VERSIONS);

/// History of the protocol. A change of frames or of the meaning of messages is a new version; a new optional field of a
/// message is not, nor are frames that come only where such a field asked for them (those of a scan).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
pub enum Version {
    /// The first: frames of `frame`, messages of `message`.
    V1 = 1,
}

impl Version {
    /// All that this livebackup speaks, best first.
    pub const KNOWN: &[Version] = &[Version::V1];
}

/// Why two ends did not come to terms.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    /// The system's error.
    #[error("the connection to {peer} failed: {source}")]
    Io {
        /// The other end.
        peer: String,
        /// The error.
        source: io::Error,
    },
    /// Nothing, or not all, came in time.
    #[error("{peer} did not finish its hello within {} s: is it livebackup that listens there?", .limit.as_secs_f64())]
    Silent {
        /// The other end.
        peer: String,
        /// The time that it had.
        limit: Duration,
    },
    /// It closed first.
    #[error(
        "{peer} closed the connection without a hello: it is ending, has too many connections, or is not livebackup"
    )]
    Closed {
        /// The other end.
        peer: String,
    },
    /// It speaks something else.
    #[error("{peer} does not speak the livebackup protocol{}; check the address", guess(.seen))]
    Stranger {
        /// The other end.
        peer: String,
        /// Its first bytes.
        seen: Vec<u8>,
    },
    /// It speaks ours, but breaks its rules.
    #[error("{peer} sent a hello with {what}")]
    Malformed {
        /// The other end.
        peer: String,
        /// What is wrong.
        what: &'static str,
    },
    /// No version in common.
    #[error(
        "{peer} ({software}) speaks protocol versions {theirs:?}, this livebackup {ours:?}: bring the older one up to date"
    )]
    NoCommonVersion {
        /// The other end.
        peer: String,
        /// What it calls itself.
        software: String,
        /// What it speaks.
        theirs: Vec<u16>,
        /// What we speak.
        ours: Vec<u16>,
    },
}

impl From<HelloError> for Failure {
    fn from(error: HelloError) -> Self {
        let code = match &error {
            // TLS's word: our certificate was refused after the handshake, as version 1.3 does it.
            HelloError::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => FailureCode::Denied,
            HelloError::Io { .. } | HelloError::Silent { .. } | HelloError::Closed { .. } => FailureCode::Disconnected,
            _ => FailureCode::Protocol,
        };
        Failure::new(code, error.to_string())
    }
}

/// What a server answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The version to speak.
    pub version: Version,
    /// What the server calls itself.
    pub software: String,
}

/// The client's bytes for these versions.
pub fn encode_offer(versions: &[u16]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    put_versions(&mut out, versions);
    out
}

/// The server's bytes.
pub fn encode_answer(chosen: Option<Version>, known: &[u16], software: &str) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend(chosen.map_or(0, |v| v as u16).to_le_bytes());
    put_versions(&mut out, known);
    out.push(software.len() as u8);
    out.extend(software.as_bytes());
    out
}

fn put_versions(out: &mut Vec<u8>, versions: &[u16]) {
    out.extend((versions.len() as u16).to_le_bytes());
    versions.iter().for_each(|v| out.extend(v.to_le_bytes()));
}

/// Our best version among those that were offered.
pub fn choose(offered: &[u16]) -> Option<Version> {
    Version::KNOWN.iter().copied().find(|v| offered.contains(&(*v as u16)))
}

fn known() -> Vec<u16> {
    Version::KNOWN.iter().map(|v| *v as u16).collect()
}

/// The client's part: offers what we know and takes the server's choice.
pub async fn offer(stream: &mut Stream, limit: Duration) -> Result<Welcome, HelloError> {
    let all = async {
        send(stream, &encode_offer(&known())).await?;
        take_magic(stream).await?;
        let chosen = take_u16(stream).await?;
        let theirs = take_versions(stream).await?;
        let len = take::<1>(stream).await?[0] as usize;
        if len > MAX_SOFTWARE_BYTES {
            return Err(malformed(stream, "a name that is too long"));
        }
        let mut software = vec![0; len];
        fill(stream, &mut software).await?;
        // For an operator's terminal: nothing that moves a cursor.
        let software = String::from_utf8_lossy(&software).replace(char::is_control, "?");
        if let Some(version) = Version::KNOWN.iter().copied().find(|v| *v as u16 == chosen) {
            return Ok(Welcome { version, software });
        }
        if chosen != 0 {
            return Err(malformed(stream, "a version that was not offered"));
        }
        Err(HelloError::NoCommonVersion { peer: stream.peer.clone(), software, theirs, ours: known() })
    };
    within(limit, all).await.unwrap_or_else(|| Err(HelloError::Silent { peer: stream.peer.clone(), limit }))
}

/// The server's part: takes the offer, chooses, answers.
pub async fn answer(stream: &mut Stream, limit: Duration) -> Result<Version, HelloError> {
    let all = async {
        take_magic(stream).await?;
        let offered = take_versions(stream).await?;
        let chosen = choose(&offered);
        send(stream, &encode_answer(chosen, &known(), SOFTWARE)).await?;
        chosen.ok_or_else(|| HelloError::NoCommonVersion {
            peer: stream.peer.clone(),
            software: "a client".to_owned(),
            theirs: offered,
            ours: known(),
        })
    };
    within(limit, all).await.unwrap_or_else(|| Err(HelloError::Silent { peer: stream.peer.clone(), limit }))
}

async fn within<T>(limit: Duration, all: impl Future<Output = T>) -> Option<T> {
    timeout(limit, all).await.ok()
}

fn malformed(stream: &Stream, what: &'static str) -> HelloError {
    HelloError::Malformed { peer: stream.peer.clone(), what }
}

fn failed(stream: &Stream) -> impl FnOnce(io::Error) -> HelloError + use<> {
    let peer = stream.peer.clone();
    move |source| match source.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => HelloError::Closed { peer },
        _ => HelloError::Io { peer, source },
    }
}

async fn send(stream: &mut Stream, bytes: &[u8]) -> Result<(), HelloError> {
    stream.writer.write_all(bytes).await.map_err(failed(stream))?;
    stream.writer.flush().await.map_err(failed(stream))
}

async fn fill(stream: &mut Stream, into: &mut [u8]) -> Result<(), HelloError> {
    stream.reader.read_exact(into).await.map(drop).map_err(failed(stream))
}

async fn take<const N: usize>(stream: &mut Stream) -> Result<[u8; N], HelloError> {
    let mut bytes = [0; N];
    fill(stream, &mut bytes).await?;
    Ok(bytes)
}

async fn take_u16(stream: &mut Stream) -> Result<u16, HelloError> {
    take(stream).await.map(u16::from_le_bytes)
}

async fn take_versions(stream: &mut Stream) -> Result<Vec<u16>, HelloError> {
    let count = take_u16(stream).await? as usize;
    if !(1..=MAX_VERSIONS).contains(&count) {
        return Err(malformed(stream, "no or too many versions"));
    }
    let mut versions = Vec::with_capacity(count);
    for _ in 0..count {
        versions.push(take_u16(stream).await?);
    }
    Ok(versions)
}

/// Takes the magic, and stops at the first byte that differs: a stranger may wait for us.
async fn take_magic(stream: &mut Stream) -> Result<(), HelloError> {
    let mut seen = [0; MAGIC.len()];
    let mut have = 0;
    while have < seen.len() {
        let n = stream.reader.read(&mut seen[have..]).await.map_err(failed(stream))?;
        have += n;
        if seen[..have] != MAGIC[..have] {
            return Err(HelloError::Stranger { peer: stream.peer.clone(), seen: seen[..have].to_vec() });
        }
        if n == 0 {
            return Err(HelloError::Closed { peer: stream.peer.clone() });
        }
    }
    Ok(())
}

/// What the other end is, by its first bytes.
fn guess(seen: &[u8]) -> String {
    const KNOWN: [(&[u8], &str); 11] = [
        (b"HTTP/", "an HTTP server"),
        (b"GET ", "an HTTP client"),
        (b"POST ", "an HTTP client"),
        (b"HEAD ", "an HTTP client"),
        (b"PUT ", "an HTTP client"),
        (b"OPTIONS ", "an HTTP client"),
        (b"PRI * ", "an HTTP client"),
        (b"\x16\x03", "a TLS client, and this address speaks without TLS"),
        (b"\x15\x03", "a TLS server: name a certificate by --tls DIR"),
        (b"SSH-", "SSH"),
        (b"NBDMAGIC", "an NBD server"),
    ];
    match KNOWN.iter().find(|(start, _)| seen.starts_with(start)) {
        Some((_, what)) => format!(" (it is {what})"),
        None if seen.starts_with(b"{\"QMP\"") => " (it is QEMU's monitor: use qmp:)".to_owned(),
        None => format!(" (it sent \"{}\")", seen.escape_ascii()),
    }
}
