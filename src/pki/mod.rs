//! A small certificate authority: what TLS needs, made by one command each.
//!
//! ```text
//! pki init DIR                      DIR/ca.pem           the authority's certificate: every server and client has a copy
//!                                   DIR/ca.key           its key; stays here
//!                                   DIR/crl.pem          what was revoked, signed: every server has a copy
//! pki issue DIR NAME --client       DIR/issued/SERIAL.pem  every certificate ever issued, without its key
//! pki issue DIR NAME --server HOST  DIR/bundle/NAME/     cert.pem key.pem ca.pem crl.pem: all that one end needs
//! pki revoke DIR NAME               DIR/crl.pem          written again
//! ```
//!
//! A bundle is moved to the server (`[tls] dir = …`) or client (`--tls …`) that it is for; nobody else needs its key. The
//! authority's directory belongs on neither: who has `ca.key` is every client at once.
//!
//! * **Keys** are ECDSA P-256; files are for their owner only (0600) and appear whole or not at all.
//! * **A certificate says what it is for.** A client's cannot play the server and the other way round (extended key usage);
//!   the authority's signs nothing but certificates of ends (path length 0).
//! * **The name of a client** is the common name of its subject. A server is known by the hosts in its alternative names.
//! * **Order.** The certificate is kept in `issued/` before its bundle is written: what exists can be listed and revoked.
//!   A crash leaves at most a certificate whose bundle is not whole; `pki issue --renew` makes another.
//! * Two commands at once wait for each other (a lock on the directory).

mod authority;
pub mod certificate;
mod error;
mod files;

pub use authority::{Authority, DEFAULT_AUTHORITY_DAYS, DEFAULT_DAYS, Issued, Purpose};
pub use certificate::{About, Role};
pub use error::PkiError;
pub use files::{CA, CERT, CRL, KEY, read_certificates, read_crl, read_key};

/// From so many days before its end on, a certificate is warned about.
pub const WARN_DAYS: i64 = 30;
