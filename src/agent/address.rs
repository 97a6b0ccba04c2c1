//! Where an agent is reached.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The unix socket of QEMU's chardev that leads to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address(pub PathBuf);

/// A text that is no agent's address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no agent's address: write unix:PATH, with the socket of the chardev of org.qemu.guest_agent.0")]
pub struct BadAddress(String);

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        let path = text.strip_prefix("unix:").unwrap_or(text);
        if path.is_empty() || path.contains('\0') {
            return Err(BadAddress(text.to_owned()));
        }
        Ok(Self(path.into()))
    }
}

impl TryFrom<String> for Address {
    type Error = BadAddress;

    fn try_from(text: String) -> Result<Self, BadAddress> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> String {
        address.to_string()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unix:{}", self.0.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_comes_back() {
        for text in ["unix:/run/vm1.qga", "/run/vm1.qga"] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address, Address("/run/vm1.qga".into()));
            assert_eq!(address.to_string(), "unix:/run/vm1.qga");
            let json = serde_json::to_string(&address).unwrap();
            assert_eq!(serde_json::from_str::<Address>(&json).unwrap(), address);
        }
        for bad in ["", "unix:", "a\0b"] {
            assert!(bad.parse::<Address>().unwrap_err().to_string().contains("unix:PATH"));
        }
    }
}
