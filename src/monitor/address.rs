//! Where a monitor listens.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Where a monitor listens: the part of a source after `qmp:`. A text with a `/`, or without `:` and digits at its end,
/// is the path of a unix socket; anything else is `HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Address {
    /// A unix socket: the only kind that can take descriptors.
    Unix(PathBuf),
    /// Host name or address (IPv6 without brackets), and port.
    Tcp(String, u16),
}

/// A text that is no address of a monitor.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is no monitor address ({reason}): give the path of a QMP socket, or HOST:PORT")]
pub struct BadAddress {
    text: String,
    reason: &'static str,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => {
                let text = path.to_string_lossy();
                // A relative path that would be read back as HOST:PORT.
                let dot = if !text.contains('/') && split_port(&text).is_some() { "./" } else { "" };
                write!(f, "{dot}{text}")
            }
            Address::Tcp(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

/// The host and the digits of a text that ends in `:DIGITS`.
fn split_port(text: &str) -> Option<(&str, &str)> {
    let (host, port) = text.rsplit_once(':')?;
    (!port.is_empty() && port.bytes().all(|b| b.is_ascii_digit())).then_some((host, port))
}

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        let bad = |reason| Err(BadAddress { text: text.chars().take(256).collect(), reason });
        if text.is_empty() {
            return bad("it is empty");
        }
        if text.contains('\0') {
            return bad("it contains a NUL");
        }
        if text.contains('/') {
            return Ok(Address::Unix(text.into()));
        }
        let Some((host, port)) = split_port(text) else { return Ok(Address::Unix(text.into())) };
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        if host.is_empty() {
            return bad("it has no host");
        }
        match port.parse() {
            Ok(0) | Err(_) => bad("its port is not 1 to 65535"),
            Ok(port) => Ok(Address::Tcp(host.to_owned(), port)),
        }
    }
}

impl Serialize for Address {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_become_addresses_and_texts_again() {
        let tcp = |host: &str, port| Address::Tcp(host.into(), port);
        for (text, address) in [
            ("/run/vm1.qmp", Address::Unix("/run/vm1.qmp".into())),
            ("/run/vm:1", Address::Unix("/run/vm:1".into())),
            ("vm1.qmp", Address::Unix("vm1.qmp".into())),
            ("vm:", Address::Unix("vm:".into())),
            ("vm:x1", Address::Unix("vm:x1".into())),
            ("./vm:1", Address::Unix("./vm:1".into())),
            ("localhost:4444", tcp("localhost", 4444)),
            ("127.0.0.1:1", tcp("127.0.0.1", 1)),
            ("[::1]:65535", tcp("::1", 65535)),
        ] {
            assert_eq!(text.parse::<Address>().unwrap(), address);
            assert_eq!(address.to_string(), text);
            let json = serde_json::to_string(&address).unwrap();
            assert_eq!(serde_json::from_str::<Address>(&json).unwrap(), address);
        }
        assert_eq!(Address::Unix("vm:1".into()).to_string(), "./vm:1");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for bad in ["", "\0", ":1", "[]:1", "h:0", "h:65536", "h:99999999999999999999"] {
            let error = bad.parse::<Address>().unwrap_err();
            assert!(error.to_string().contains("HOST:PORT"), "{error}");
        }
    }
}
