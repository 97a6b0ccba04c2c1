//! What a certificate says, for people and for grants. Pure.
//!
//! Nothing here decides whether a certificate is to be believed: that is TLS's part, and comes before.

use jiff::Timestamp;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Longest name of a client.
pub const MAX_NAME_BYTES: usize = 64;
/// Longest serial number: 20 bytes are allowed by RFC 5280, and some exceed them.
const MAX_SERIAL_BYTES: usize = 32;
/// Most hosts that are shown.
const MAX_HOSTS: usize = 256;

/// What a certificate may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// By a server.
    Server,
    /// By a client.
    Client,
    /// By both, or something else.
    Other,
}

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// The common name of its subject.
    pub name: String,
    /// What it may be used for.
    pub role: Role,
    /// Names and addresses that a server has by it.
    pub hosts: Vec<String>,
    /// Its serial number, in hexadecimal digits.
    pub serial: String,
    /// Its first moment.
    pub begins: Timestamp,
    /// Its last moment.
    pub ends: Timestamp,
}

impl About {
    /// Days until it ends, rounded down; negative afterwards.
    pub fn days_left(&self, now: Timestamp) -> i64 {
        (self.ends.as_second() - now.as_second()).div_euclid(24 * 3600)
    }
}

/// Reads a certificate.
///
/// # Errors
/// What is wrong with it, in words.
pub fn read(der: &[u8]) -> Result<About, String> {
    let (rest, certificate) = X509Certificate::from_der(der).map_err(|e| format!("it is no certificate: {e}"))?;
    if !rest.is_empty() {
        return Err("it is no certificate: something follows it".to_owned());
    }
    let mut names = certificate.subject().iter_common_name();
    let (Some(name), None) = (names.next(), names.next()) else {
        return Err("its subject has not exactly one common name".to_owned());
    };
    let name = name.as_str().map_err(|_| "its subject's common name is no text")?.to_owned();
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains(char::is_control) {
        return Err(format!("its subject's common name is empty, longer than {MAX_NAME_BYTES} bytes, or no line"));
    }
    let serial = certificate.raw_serial();
    if serial.len() > MAX_SERIAL_BYTES {
        return Err("its serial number is too long".to_owned());
    }
    let usage = certificate.extended_key_usage().map_err(|e| format!("its extended key usage is malformed: {e}"))?;
    let role = match usage.map(|usage| (usage.value.server_auth, usage.value.client_auth, usage.value.any)) {
        Some((true, false, false)) => Role::Server,
        Some((false, true, false)) => Role::Client,
        _ => Role::Other,
    };
    let alternatives = certificate.subject_alternative_name();
    let alternatives = alternatives.map_err(|e| format!("its alternative names are malformed: {e}"))?;
    let hosts = alternatives.iter().flat_map(|names| &names.value.general_names).take(MAX_HOSTS).filter_map(host);
    let moment = |time: x509_parser::time::ASN1Time| {
        Timestamp::from_second(time.timestamp()).map_err(|_| "it is valid at impossible times".to_owned())
    };
    Ok(About {
        name,
        role,
        hosts: hosts.collect(),
        serial: serial_text(serial),
        begins: moment(certificate.validity().not_before)?,
        ends: moment(certificate.validity().not_after)?,
    })
}

/// A serial number as it is shown: without the zero that keeps it positive.
pub fn serial_text(serial: &[u8]) -> String {
    match serial {
        [0, rest @ ..] if !rest.is_empty() => hex(rest),
        all => hex(all),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn host(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some(name.chars().take(255).collect()),
        GeneralName::IPAddress(bytes) => match **bytes {
            [a, b, c, d] => Some(std::net::Ipv4Addr::new(a, b, c, d).to_string()),
            _ => Some(std::net::Ipv6Addr::from(<[u8; 16]>::try_from(*bytes).ok()?).to_string()),
        },
        _ => None,
    }
}

/// Reads whatever bytes: must neither panic nor take long.
pub fn fuzz(bytes: &[u8]) {
    if let Ok(about) = read(bytes) {
        assert!(about.name.len() <= MAX_NAME_BYTES && about.hosts.len() <= MAX_HOSTS);
    }
}
