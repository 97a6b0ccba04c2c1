//! What may go wrong with certificates, keys and their files.

use std::io;
use std::path::PathBuf;

use crate::durable::DurableError;

/// See the variants.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file could not be written.
    #[error(transparent)]
    Durable(#[from] DurableError),
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file that is not what it should be.
    #[error("{}: {what}", path.display())]
    Bad {
        /// Which.
        path: PathBuf,
        /// What is wrong, and what to do.
        what: String,
    },
    /// A directory without an authority.
    #[error("{} is no certificate authority: make one with `livebackup pki init DIR`", dir.display())]
    NoAuthority {
        /// Which.
        dir: PathBuf,
    },
    /// The authority is there already.
    #[error("{} has a certificate authority already; nothing was changed", dir.display())]
    AuthorityExists {
        /// Which.
        dir: PathBuf,
    },
    /// A directory that has something else.
    #[error(
        "{} is not empty (it has {found:?}); nothing was changed: name a directory that is empty or does not exist",
        dir.display()
    )]
    NotEmpty {
        /// Which.
        dir: PathBuf,
        /// Something of what it has.
        found: String,
    },
    /// A certificate of that name is valid already.
    #[error("{name:?} has a certificate that is valid until {until}: give --renew to make another")]
    Exists {
        /// Whose.
        name: String,
        /// Its end.
        until: String,
    },
    /// A name or host that cannot be in a certificate.
    #[error("{name:?} cannot be in a certificate: {what}")]
    Name {
        /// The name.
        name: String,
        /// Why.
        what: &'static str,
    },
    /// Nothing to revoke.
    #[error("no certificate that is valid has the name or serial number {name:?}; there are: {there_are}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        there_are: String,
    },
    /// The certificate library refused.
    #[error("cannot make the {what}: {why}")]
    Make {
        /// What.
        what: &'static str,
        /// Its words.
        why: String,
    },
}
