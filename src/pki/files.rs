//! Reads certificates, keys and revocation lists from PEM files. Bounded; a key that others may read is refused.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use super::error::PkiError;
use crate::units::MIB;

/// The certificate of a bundle.
pub const CERT: &str = "cert.pem";
/// The key of a bundle.
pub const KEY: &str = "key.pem";
/// The authority's certificate.
pub const CA: &str = "ca.pem";
/// The revocation list.
pub const CRL: &str = "crl.pem";

/// Longest file that is read: a list of 20,000 revoked certificates.
const MAX_FILE_BYTES: u64 = MIB;
/// Most certificates in a file.
const MAX_CERTIFICATES: usize = 64;

pub(super) fn bad(path: &Path, what: impl Into<String>) -> PkiError {
    PkiError::Bad { path: path.to_owned(), what: what.into() }
}

/// Reads a small file.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, PkiError> {
    let at = |source| PkiError::Read { path: path.to_owned(), source };
    let mut bytes = vec![];
    File::open(path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)).map_err(at)?;
    match bytes.len() as u64 > MAX_FILE_BYTES {
        true => Err(bad(path, "it is too large to be a file of certificates")),
        false => Ok(bytes),
    }
}

/// The certificates in a file: at least one.
pub fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    let bytes = read(path)?;
    let found: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&bytes).take(MAX_CERTIFICATES + 1).collect();
    let found = found.map_err(|e| bad(path, format!("it is no file of certificates: {e}")))?;
    match found.len() {
        0 => Err(bad(path, "there is no certificate in it")),
        n if n > MAX_CERTIFICATES => Err(bad(path, format!("more than {MAX_CERTIFICATES} certificates are in it"))),
        _ => Ok(found),
    }
}

/// The private key in a file that is its owner's only.
pub fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, PkiError> {
    let about = std::fs::metadata(path).map_err(|source| PkiError::Read { path: path.to_owned(), source })?;
    // A group may read it: services are given keys that way. Nobody else may, and nobody else may replace it.
    if about.mode() & 0o027 != 0 {
        return Err(bad(path, format!("others may read or change this key: chmod 600 {}", path.display())));
    }
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|e| bad(path, format!("there is no private key in it: {e}")))
}

/// The revocation list in a file.
pub fn read_crl(path: &Path) -> Result<CertificateRevocationListDer<'static>, PkiError> {
    let bytes = read(path)?;
    CertificateRevocationListDer::from_pem_slice(&bytes)
        .map_err(|e| bad(path, format!("there is no revocation list in it: {e}")))
}
