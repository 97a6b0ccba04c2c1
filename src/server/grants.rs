//! Who may do what: a client's grants, and the question whether they cover a request. Pure.
//!
//! A local caller (a unix socket of the right user, the loopback without TLS) may do everything, as it could with QEMU's
//! own monitor. A client with a certificate gets what its `[[client]]` table says, and is told of nothing else: a VM that
//! it was not granted does not exist for it.

use serde::Deserialize;

use crate::wire::message::{Failure, FailureCode, Request};

/// Something that a client may do with its VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum May {
    /// See them: names, disks, status, what a backup would read.
    List,
    /// Back them up.
    Backup,
    /// Remove what livebackup put into them, which ends their incrementals.
    Detach,
}

impl May {
    /// What a client may do when its table does not say.
    pub const USUAL: [Self; 2] = [Self::List, Self::Backup];

    fn word(self) -> &'static str {
        match self {
            Self::List => "list",
            Self::Backup => "backup",
            Self::Detach => "detach",
        }
    }
}

/// A client's grants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grants {
    /// The common name of its certificate.
    pub name: String,
    /// Its VMs; `*` is all.
    pub vms: Vec<String>,
    /// What it may do with them.
    pub may: Vec<May>,
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// Somebody on this host; in words.
    Local(String),
    /// A client with a certificate and its grants.
    Client(Grants),
}

impl Caller {
    /// For messages.
    pub fn name(&self) -> &str {
        match self {
            Self::Local(words) => words,
            Self::Client(grants) => &grants.name,
        }
    }

    /// Who it is over several connections: whoever is local is the same.
    pub fn identity(&self) -> String {
        match self {
            Self::Local(_) => "local".to_owned(),
            Self::Client(grants) => format!("client {}", grants.name),
        }
    }

    /// Whether a VM exists for the caller.
    pub fn sees(&self, vm: &str) -> bool {
        match self {
            Self::Local(_) => true,
            Self::Client(grants) => grants.vms.iter().any(|granted| granted == "*" || granted == vm),
        }
    }

    /// Whether the grants cover a request. A VM that the caller does not see is left to the answer, which finds none.
    pub fn check(&self, request: &Request) -> Result<(), Failure> {
        let Self::Client(grants) = self else { return Ok(()) };
        let needs = match request {
            Request::List
            | Request::Disks { .. }
            | Request::Status { .. }
            | Request::Doctor { .. }
            | Request::Estimate(_) => May::List,
            Request::Begin(_)
            | Request::Ack(_)
            | Request::Resume(_)
            | Request::Join { .. }
            | Request::Received
            | Request::Leave { .. }
            | Request::BootFile(_) => May::Backup,
            Request::Detach { .. } => May::Detach,
        };
        if grants.may.contains(&needs) {
            return Ok(());
        }
        let what = format!(
            "client {:?} may not do that here: its [[client]] table in the server's configuration would have to say may = [… {:?}]",
            grants.name,
            needs.word()
        );
        Err(Failure::new(FailureCode::Denied, what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(vms: &[&str], may: &[May]) -> Caller {
        let vms = vms.iter().map(|vm| (*vm).to_owned()).collect();
        Caller::Client(Grants { name: "backup1".into(), vms, may: may.to_vec() })
    }

    #[test]
    fn a_client_gets_what_it_was_granted() {
        let one = client(&["vm1"], &May::USUAL);
        assert!(one.sees("vm1") && !one.sees("vm10") && !one.sees("VM1") && !one.sees("*"));
        assert!(client(&["*"], &[]).sees("anything") && !client(&[], &May::USUAL).sees("vm1"));
        one.check(&Request::List).unwrap();
        one.check(&Request::Begin(Default::default())).unwrap();
        let denied = one.check(&Request::Detach { vm: "vm1".into(), all: false }).unwrap_err();
        assert!(denied.code == FailureCode::Denied && denied.message.contains("\"detach\""), "{denied}");
        let watcher = client(&["vm1"], &[May::List]);
        watcher.check(&Request::Estimate(Default::default())).unwrap();
        assert!(watcher.check(&Request::Begin(Default::default())).is_err());
        assert!(client(&["*"], &[May::Backup]).check(&Request::Status { vm: None }).is_err());
        let local = Caller::Local("root".into());
        assert!(local.sees("vm1") && local.check(&Request::Detach { vm: "vm1".into(), all: true }).is_ok());
    }
}
