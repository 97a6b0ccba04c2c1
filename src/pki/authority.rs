//! The authority's directory: makes it, issues, lists, revokes.

use std::collections::BTreeMap;
use std::fs::{DirEntry, File};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevocationReason, RevokedCertParams,
    SerialNumber,
};
use rustls::pki_types::ServerName;
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{CertificateRevocationList, FromDer};

use super::certificate::{self, About, serial_text};
use super::error::PkiError;
use super::files::{self, CA, CERT, CRL, KEY, bad};
use crate::durable::{self, Replace};

/// How long an authority is valid unless something else is asked for.
pub const DEFAULT_AUTHORITY_DAYS: u32 = 3650;
/// How long a certificate is valid unless something else is asked for.
pub const DEFAULT_DAYS: u32 = 730;
/// Longest validity.
const MAX_DAYS: u32 = 36_500;
/// A certificate is valid from a little before it is made on: clocks differ.
const CLOCKS_DIFFER: Duration = Duration::hours(1);

const AUTHORITY_KEY: &str = "ca.key";
const ISSUED: &str = "issued";
const BUNDLE: &str = "bundle";
/// Most certificates of an authority.
const MAX_ISSUED: usize = 100_000;
/// Most hosts of a server.
const MAX_HOSTS: usize = 64;

/// What a certificate is made for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A client.
    Client,
    /// A server that is reached by these names or addresses.
    Server(Vec<String>),
}

/// A certificate that was issued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// What it says.
    pub about: About,
    /// When it was revoked, if it was.
    pub revoked: Option<Timestamp>,
}

impl Issued {
    /// Whether it is good for something now.
    pub fn is_valid(&self, now: Timestamp) -> bool {
        self.revoked.is_none() && self.about.ends > now
    }
}

/// An authority's directory, locked.
#[derive(Debug)]
pub struct Authority {
    dir: PathBuf,
    _lock: File,
}

fn make<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> PkiError {
    move |error| PkiError::Make { what, why: error.to_string() }
}

fn lock(dir: &Path) -> Result<File, PkiError> {
    let at = |source| PkiError::Read { path: dir.to_owned(), source };
    let lock = File::open(dir).map_err(at)?;
    lock.lock().map_err(at)?;
    Ok(lock)
}

fn write(path: &Path, text: &str, replace: Replace) -> Result<(), PkiError> {
    Ok(durable::write_file(path, text.as_bytes(), replace)?)
}

/// What a directory has that no killed `init` has left. A key of which certificates were made must not be made anew.
fn something_else(dir: &Path) -> Result<Option<String>, PkiError> {
    for entry in list(dir)? {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        let left_over = match &*name {
            AUTHORITY_KEY | CRL => path.is_file(),
            ISSUED | BUNDLE => path.is_dir() && list(&path)?.is_empty(),
            _ => path.extension().is_some_and(|e| e == durable::TEMPORARY_ENDING),
        };
        if !left_over {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

fn list(dir: &Path) -> Result<Vec<DirEntry>, PkiError> {
    let at = |source| PkiError::Read { path: dir.to_owned(), source };
    std::fs::read_dir(dir).map_err(at)?.collect::<Result<_, _>>().map_err(at)
}

/// A random serial number: positive, 16 bytes in any encoding.
fn serial() -> Result<[u8; 16], PkiError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(make("serial number"))?;
    bytes[0] = bytes[0] & 0x3f | 0x40;
    Ok(bytes)
}

/// What every certificate has.
fn params(name: &str, days: u32) -> Result<CertificateParams, PkiError> {
    let now = OffsetDateTime::now_utc();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = now - CLOCKS_DIFFER;
    params.not_after = now + Duration::days(days.clamp(1, MAX_DAYS).into());
    params.serial_number = Some(SerialNumber::from_slice(&serial()?));
    Ok(params)
}

/// A name that may be a client's, a server's, and a directory's.
fn check_name(name: &str) -> Result<(), PkiError> {
    let no = |what| Err(PkiError::Name { name: name.chars().take(100).collect(), what });
    if name.is_empty() || name.len() > certificate::MAX_NAME_BYTES {
        return no("a name has 1 to 64 characters");
    }
    if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) || name.starts_with(['.', '-']) {
        return no("a name has letters, digits and . _ - only, and begins with a letter or digit");
    }
    Ok(())
}

fn check_hosts(hosts: &[String]) -> Result<(), PkiError> {
    if hosts.is_empty() || hosts.len() > MAX_HOSTS {
        let what = "a server has 1 to 64 names or addresses by which clients reach it";
        return Err(PkiError::Name { name: hosts.join(","), what });
    }
    match hosts.iter().find(|host| ServerName::try_from(host.as_str()).is_err()) {
        Some(host) => {
            let what = "it is neither a DNS name nor an IP address (leave the port out)";
            Err(PkiError::Name { name: host.chars().take(100).collect(), what })
        }
        None => Ok(()),
    }
}

impl Authority {
    /// Makes an authority in `dir`, which is empty, or does not exist, or has what an `init` that was killed left.
    pub fn init(dir: &Path, name: &str, days: u32) -> Result<Self, PkiError> {
        check_name(name)?;
        durable::create_dir(dir)?;
        let lock = lock(dir)?;
        if dir.join(CA).exists() {
            return Err(PkiError::AuthorityExists { dir: dir.to_owned() });
        }
        if let Some(found) = something_else(dir)? {
            return Err(PkiError::NotEmpty { dir: dir.to_owned(), found });
        }
        let mut params = params(name, days)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().map_err(make("authority's key"))?;
        let certificate = params.self_signed(&key).map_err(make("authority's certificate"))?;
        durable::create_dir(&dir.join(ISSUED))?;
        durable::create_dir(&dir.join(BUNDLE))?;
        write(&dir.join(AUTHORITY_KEY), &key.serialize_pem(), Replace::Yes)?;
        let authority = Self { dir: dir.to_owned(), _lock: lock };
        let list = revocations(&Issuer::from_params(&params, &key), params.not_after, 1, &BTreeMap::new())?;
        write(&dir.join(CRL), &list, Replace::Yes)?;
        // The last step: from now on there is an authority.
        write(&dir.join(CA), &certificate.pem(), Replace::No)?;
        Ok(authority)
    }

    /// Opens an authority's directory; waits while another command works on it.
    pub fn open(dir: &Path) -> Result<Self, PkiError> {
        if !dir.join(CA).is_file() {
            return Err(PkiError::NoAuthority { dir: dir.to_owned() });
        }
        Ok(Self { dir: dir.to_owned(), _lock: lock(dir)? })
    }

    /// Where the bundle of a name is.
    pub fn bundle(&self, name: &str) -> PathBuf {
        self.dir.join(BUNDLE).join(name)
    }

    /// Where the revocation list is.
    pub fn crl(&self) -> PathBuf {
        self.dir.join(CRL)
    }

    /// What the authority's own certificate says.
    pub fn about(&self) -> Result<About, PkiError> {
        let path = self.dir.join(CA);
        let certificates = files::read_certificates(&path)?;
        certificate::read(&certificates[0]).map_err(|what| bad(&path, what))
    }

    fn issuer(&self) -> Result<Issuer<'static, KeyPair>, PkiError> {
        let path = self.dir.join(AUTHORITY_KEY);
        // Checked for its mode and that it is a key; the library reads it again from its text.
        files::read_key(&path)?;
        let text = String::from_utf8(files::read(&path)?).map_err(|_| bad(&path, "it is no text"))?;
        let key = KeyPair::from_pem(&text).map_err(|e| bad(&path, format!("this key cannot be used: {e}")))?;
        let path = self.dir.join(CA);
        let certificates = files::read_certificates(&path)?;
        Issuer::from_ca_cert_der(&certificates[0], key).map_err(|e| bad(&path, e.to_string()))
    }

    /// Makes a certificate and its bundle. A name whose certificate is valid gets another only to `renew` it; the old one
    /// stays valid until its end or until it is revoked.
    pub fn issue(&self, name: &str, purpose: &Purpose, days: u32, renew: bool) -> Result<About, PkiError> {
        check_name(name)?;
        let (now, own) = (Timestamp::now(), self.about()?);
        let valid = self.list()?.into_iter().filter(|i| i.about.name == name && i.is_valid(now));
        if let Some(exists) = valid.map(|issued| issued.about.ends).max().filter(|_| !renew) {
            return Err(PkiError::Exists { name: name.to_owned(), until: format!("{exists:.0}") });
        }
        let issuer = self.issuer()?;
        let mut params = params(name, days)?;
        let hosts = match purpose {
            Purpose::Client => vec![],
            Purpose::Server(hosts) => {
                check_hosts(hosts)?;
                hosts.clone()
            }
        };
        params.subject_alt_names = CertificateParams::new(hosts).map_err(make("certificate"))?.subject_alt_names;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match purpose {
            Purpose::Client => ExtendedKeyUsagePurpose::ClientAuth,
            Purpose::Server(_) => ExtendedKeyUsagePurpose::ServerAuth,
        }];
        params.use_authority_key_identifier_extension = true;
        let end = OffsetDateTime::from_unix_timestamp(own.ends.as_second()).map_err(make("certificate"))?;
        params.not_after = params.not_after.min(end);
        let key = KeyPair::generate().map_err(make("key"))?;
        let made = params.signed_by(&key, &issuer).map_err(make("certificate"))?;
        let about = certificate::read(made.der()).map_err(make("certificate"))?;

        write(&self.dir.join(ISSUED).join(format!("{}.pem", about.serial)), &made.pem(), Replace::No)?;
        let bundle = self.bundle(name);
        durable::create_dir(&bundle)?;
        for (file, from) in [(CA, self.dir.join(CA)), (CRL, self.dir.join(CRL))] {
            let text = files::read(&from)?;
            durable::write_file(&bundle.join(file), &text, Replace::Yes)?;
        }
        write(&bundle.join(KEY), &key.serialize_pem(), Replace::Yes)?;
        write(&bundle.join(CERT), &made.pem(), Replace::Yes)?;
        Ok(about)
    }

    /// All that was issued, by name and end.
    pub fn list(&self) -> Result<Vec<Issued>, PkiError> {
        let dir = self.dir.join(ISSUED);
        let revoked = self.revoked()?.1;
        let at = |source| PkiError::Read { path: dir.clone(), source };
        let mut list = vec![];
        for entry in std::fs::read_dir(&dir).map_err(at)? {
            let path = entry.map_err(at)?.path();
            if path.extension().is_none_or(|ending| ending != "pem") {
                continue;
            }
            if list.len() >= MAX_ISSUED {
                return Err(bad(&dir, format!("more than {MAX_ISSUED} certificates are in it")));
            }
            let certificates = files::read_certificates(&path)?;
            let about = certificate::read(&certificates[0]).map_err(|what| bad(&path, what))?;
            let revoked = revoked.get(&about.serial).map(|(_, time)| *time);
            list.push(Issued { about, revoked });
        }
        list.sort_by(|a, b| (&a.about.name, a.about.ends).cmp(&(&b.about.name, b.about.ends)));
        Ok(list)
    }

    /// Revokes what has this name, or this serial number (or the start of one, at least 8 digits), and gives it back.
    pub fn revoke(&self, name: &str) -> Result<Vec<About>, PkiError> {
        let (number, mut revoked) = self.revoked()?;
        let (now, list) = (Timestamp::now(), self.list()?);
        let is_meant = |a: &About| a.name == name || (name.len() >= 8 && a.serial.starts_with(name));
        let valid = || list.iter().filter(|i| i.revoked.is_none());
        let meant: Vec<_> = valid().filter(|i| is_meant(&i.about)).map(|i| i.about.clone()).collect();
        if meant.is_empty() {
            let mut names: Vec<_> = valid().map(|i| i.about.name.clone()).collect();
            names.dedup();
            let there_are = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            return Err(PkiError::Unknown { name: name.to_owned(), there_are });
        }
        for about in &meant {
            revoked.insert(about.serial.clone(), (bytes_of(&about.serial), now));
        }
        let end = OffsetDateTime::from_unix_timestamp(self.about()?.ends.as_second()).map_err(make("list"))?;
        let text = revocations(&self.issuer()?, end, number + 1, &revoked)?;
        write(&self.dir.join(CRL), &text, Replace::Yes)?;
        Ok(meant)
    }

    /// The list's number, and what is on it.
    fn revoked(&self) -> Result<(u64, Revoked), PkiError> {
        let path = self.dir.join(CRL);
        let der = files::read_crl(&path)?;
        let (_, list) = CertificateRevocationList::from_der(&der).map_err(|e| bad(&path, e.to_string()))?;
        let number = list.crl_number().and_then(|n| n.to_u64_digits().first().copied()).unwrap_or(0);
        let mut revoked = BTreeMap::new();
        for one in list.iter_revoked_certificates() {
            let time =
                Timestamp::from_second(one.revocation_date.timestamp()).map_err(|e| bad(&path, e.to_string()))?;
            let serial = serial_text(one.raw_serial());
            revoked.insert(serial.clone(), (bytes_of(&serial), time));
        }
        Ok((number, revoked))
    }
}

/// By serial number: its bytes, and when it was revoked.
type Revoked = BTreeMap<String, (Vec<u8>, Timestamp)>;

/// The bytes of a serial number's text.
fn bytes_of(serial: &str) -> Vec<u8> {
    let pairs = serial.as_bytes().chunks(2);
    pairs.filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

/// A signed revocation list, as PEM. It has no end of its own: nobody should be locked out because a list is old.
fn revocations<K: rcgen::SigningKey>(
    issuer: &Issuer<'_, K>,
    end: OffsetDateTime,
    number: u64,
    revoked: &Revoked,
) -> Result<String, PkiError> {
    let mut revoked_certs = vec![];
    for (bytes, time) in revoked.values() {
        revoked_certs.push(RevokedCertParams {
            serial_number: SerialNumber::from_slice(bytes),
            revocation_time: OffsetDateTime::from_unix_timestamp(time.as_second()).map_err(make("revocation list"))?,
            reason_code: Some(RevocationReason::Unspecified),
            invalidity_date: None,
        });
    }
    let list = CertificateRevocationListParams {
        this_update: OffsetDateTime::now_utc() - CLOCKS_DIFFER,
        next_update: end,
        crl_number: SerialNumber::from(number),
        issuing_distribution_point: None,
        revoked_certs,
        key_identifier_method: KeyIdMethod::Sha256,
    };
    list.signed_by(issuer).and_then(|list| list.pem()).map_err(make("revocation list"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_hosts_are_checked() {
        for good in ["backup1", "a", "host.example_2-x"] {
            check_name(good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "-x", "ä", "a b", "a\n", &"x".repeat(65)] {
            check_name(bad).unwrap_err();
        }
        for good in ["vmhost", "vmhost.example.org", "192.0.2.7", "2001:db8::1"] {
            check_hosts(&[good.to_owned()]).unwrap();
        }
        for bad in ["", "host:7870", "a b", "https://x", "[::1]"] {
            check_hosts(&[bad.to_owned()]).unwrap_err();
        }
        check_hosts(&[]).unwrap_err();
    }

    #[test]
    fn what_is_issued_is_listed_and_revoked_for_good() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("ca");
        let authority = Authority::init(&dir, "example", 10).unwrap();
        drop(authority);
        assert!(matches!(Authority::init(&dir, "other", 10), Err(PkiError::AuthorityExists { .. })));
        let authority = Authority::open(&dir).unwrap();
        let server = Purpose::Server(vec!["vmhost".into(), "192.0.2.7".into(), "2001:db8::1".into()]);
        let about = authority.issue("vmhost", &server, 5, false).unwrap();
        assert_eq!((about.role, about.hosts.len()), (certificate::Role::Server, 3));
        assert!((4..=5).contains(&about.days_left(Timestamp::now())));
        let client = authority.issue("backup1", &Purpose::Client, 5000, false).unwrap();
        assert!(client.role == certificate::Role::Client && client.ends <= authority.about().unwrap().ends);
        assert!(matches!(authority.issue("backup1", &Purpose::Client, 5, false), Err(PkiError::Exists { .. })));
        let renewed = authority.issue("backup1", &Purpose::Client, 5, true).unwrap();
        assert_eq!(authority.list().unwrap().len(), 3);

        assert_eq!(authority.revoke(&client.serial[..12]).unwrap(), std::slice::from_ref(&client));
        assert_eq!(authority.revoke("backup1").unwrap(), std::slice::from_ref(&renewed));
        assert!(matches!(authority.revoke("backup1"), Err(PkiError::Unknown { .. })));
        authority.issue("backup1", &Purpose::Client, 5, false).expect("a name whose certificates are revoked is free");
        let revoked: Vec<_> = authority.list().unwrap().into_iter().filter(|i| i.revoked.is_some()).collect();
        assert_eq!(revoked.len(), 2);
        assert!(revoked.iter().all(|i| i.about.serial == client.serial || i.about.serial == renewed.serial));
        let (number, list) = authority.revoked().unwrap();
        assert_eq!((number, list.len()), (3, 2));
    }

    #[test]
    fn an_authority_gets_a_directory_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("notes"), "").unwrap();
        let error = Authority::init(dir.path(), "example", 10).unwrap_err().to_string();
        assert!(error.contains("\"notes\"") && error.contains("empty"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        std::fs::remove_file(dir.path().join("notes")).unwrap();
        // As one leaves that was killed before its last step.
        Authority::init(dir.path(), "example", 10).unwrap();
        std::fs::remove_file(dir.path().join(CA)).unwrap();
        let authority = Authority::init(dir.path(), "example", 10).unwrap();
        authority.issue("a", &Purpose::Client, 5, false).unwrap();
        std::fs::remove_file(dir.path().join(CA)).unwrap();
        drop(authority);
        let key = std::fs::read(dir.path().join(AUTHORITY_KEY)).unwrap();
        assert!(matches!(Authority::init(dir.path(), "example", 10), Err(PkiError::NotEmpty { .. })));
        assert!(std::fs::read(dir.path().join(AUTHORITY_KEY)).unwrap() == key, "certificates were made of it");
    }

    #[test]
    fn keys_are_for_their_owner() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::init(dir.path(), "example", 10).unwrap();
        authority.issue("a", &Purpose::Client, 5, false).unwrap();
        let key = authority.bundle("a").join(KEY);
        for path in [&key, &dir.path().join(AUTHORITY_KEY)] {
            assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        files::read_key(&key).unwrap();
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(files::read_key(&key).unwrap_err().to_string().contains("chmod 600"));
    }

    #[test]
    fn a_certificate_is_read_whatever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::init(dir.path(), "example", 10).unwrap();
        authority.issue("a", &Purpose::Server(vec!["b.example".into()]), 5, false).unwrap();
        let der = files::read_certificates(&authority.bundle("a").join(CERT)).unwrap();
        let mut bytes = der[0].to_vec();
        certificate::fuzz(&bytes);
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        for round in 0..20_000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (at, old) = ((seed >> 33) as usize % bytes.len(), bytes.clone());
            bytes[at] = (seed >> 8) as u8;
            certificate::fuzz(&bytes);
            certificate::fuzz(&bytes[..at]);
            // Damage adds up for a while.
            if round % 16 == 0 {
                bytes = der[0].to_vec()
            } else if round % 3 == 0 {
                bytes = old
            }
        }
    }
}
