//! Configuration of the service (TOML).
//!
//! ```toml
//! listen = "127.0.0.1:7870"        # or "unix:/run/livebackup/serve.sock"
//! state = "/var/lib/livebackup"    # may be left out
//! scratch = "/var/scratch"         # may be left out
//! scratch_budget = "20 GiB"        # may be left out
//!
//! [[vm]]
//! monitor = "qmp:/run/vm1.qmp"
//! name = "vm1"                     # may be left out: QEMU's -name, else its UUID
//! agent = "unix:/run/vm1.qga"      # may be left out: found through QEMU
//! freeze = "prefer"                # or "require", "never"; may be left out
//! freeze_lease_s = 10              # longest freeze; may be left out
//! freeze_mount_points = ["/"]      # may be left out: all file systems
//! ```

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::bad;
use crate::agent;
use crate::grade::Policy;
use crate::hooks::freeze::{DEFAULT_LEASE, MAX_LEASE};
use crate::monitor::Address;
use crate::units::{GIB, KIB, MIB};
use crate::vm::QuietOptions;
use crate::wire::Address as WireAddress;
use crate::wire::message::Failure;

/// Longest configuration file.
const MAX_CONFIG_BYTES: u64 = MIB;

/// The service's configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it listens.
    pub listen: WireAddress,
    /// State directory, if the file names one.
    pub state: Option<PathBuf>,
    /// Scratch directory.
    pub scratch: Option<PathBuf>,
    /// Most scratch of one session.
    pub scratch_budget_bytes: Option<u64>,
    /// The VMs.
    pub vms: Vec<VmConfig>,
}

/// One VM of the configuration.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// Its monitor.
    pub monitor: Address,
    /// Its name, if given.
    pub name: Option<String>,
    /// How it is made quiet.
    pub quiet: QuietOptions,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    listen: String,
    state: Option<PathBuf>,
    scratch: Option<PathBuf>,
    scratch_budget: Option<String>,
    #[serde(default)]
    vm: Vec<VmTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VmTable {
    monitor: String,
    name: Option<String>,
    agent: Option<agent::Address>,
    #[serde(default)]
    freeze: Policy,
    freeze_lease_s: Option<u64>,
    #[serde(default)]
    freeze_mount_points: Vec<String>,
}

impl VmTable {
    fn config(self) -> Result<VmConfig, String> {
        let address = self
            .monitor
            .strip_prefix("qmp:")
            .ok_or_else(|| format!("monitor = {:?}: write it as \"qmp:PATH\" or \"qmp:HOST:PORT\"", self.monitor))?;
        let monitor = address.parse::<Address>().map_err(|e| e.to_string())?;
        let lease = self.freeze_lease_s.map_or(DEFAULT_LEASE, Duration::from_secs);
        if lease.is_zero() || lease > MAX_LEASE {
            return Err(format!("freeze_lease_s is a number of seconds from 1 to {}", MAX_LEASE.as_secs()));
        }
        let quiet =
            QuietOptions { agent: self.agent, freeze: self.freeze, mount_points: self.freeze_mount_points, lease };
        Ok(VmConfig { monitor, name: self.name, quiet })
    }
}

impl Config {
    /// Reads the file.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let at = |e: &dyn std::fmt::Display| bad(format!("the configuration {}: {e}", path.display()));
        if std::fs::metadata(path).map_err(|e| at(&e))?.len() > MAX_CONFIG_BYTES {
            return Err(at(&"it is too large to be one"));
        }
        let text = std::fs::read_to_string(path).map_err(|e| at(&e))?;
        Self::parse(&text).map_err(|e| at(&e))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let file: File = toml::from_str(text).map_err(|e| e.to_string())?;
        if file.vm.is_empty() {
            return Err("it names no VM: add a [[vm]] table with monitor = \"qmp:…\"".into());
        }
        let vms = file.vm.into_iter().map(VmTable::config).collect::<Result<Vec<_>, _>>()?;
        let mut names: Vec<_> = vms.iter().filter_map(|vm| vm.name.as_ref()).collect();
        names.sort();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("two VMs are called {:?}: give each a name of its own", twice[0]));
        }
        let budget = file.scratch_budget.as_deref().map(parse_size).transpose()?;
        Ok(Self {
            listen: parse_listen(&file.listen)?,
            state: file.state,
            scratch: file.scratch,
            scratch_budget_bytes: budget,
            vms,
        })
    }
}

/// `20 GiB`, `500 MiB`, `4096`.
fn parse_size(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is no size: write it as \"20 GiB\"");
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match text[digits.len()..].trim() {
        "" | "B" => 1,
        "KiB" => KIB,
        "MiB" => MIB,
        "GiB" => GIB,
        "TiB" => 1024 * GIB,
        _ => return Err(bad()),
    };
    digits.trim().parse::<u64>().ok().and_then(|n| n.checked_mul(unit)).ok_or_else(bad)
}

fn parse_listen(text: &str) -> Result<WireAddress, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return Ok(WireAddress::Unix(path.into()));
    }
    let address: SocketAddr =
        text.parse().map_err(|_| format!("listen = {text:?}: write it as \"127.0.0.1:7870\" or \"unix:PATH\""))?;
    if !address.ip().is_loopback() {
        return Err(format!(
            "listen = {text:?} is not on the loopback, and this version cannot ask clients who they are: listen on 127.0.0.1 or a \
             unix socket, and let clients come through ssh -L"
        ));
    }
    Ok(WireAddress::Tcp(address.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_says_what_is_wrong_with_it() {
        let good = "listen = \"127.0.0.1:0\"\nscratch_budget = \"20 GiB\"\n[[vm]]\nmonitor = \"qmp:/a\"\n";
        let config = Config::parse(good).unwrap();
        assert_eq!(config.scratch_budget_bytes, Some(20 * GIB));
        assert_eq!(config.vms[0].monitor, Address::Unix("/a".into()));
        assert_eq!((&config.vms[0].name, config.vms[0].quiet.freeze), (&None, Policy::Prefer));
        let quiet = "agent = \"unix:/q\"\nfreeze = \"require\"\nfreeze_lease_s = 3\n";
        let config = Config::parse(&format!("{good}{quiet}")).unwrap();
        assert_eq!(config.vms[0].quiet.agent, Some(agent::Address("/q".into())));
        assert_eq!(config.vms[0].quiet.lease, Duration::from_secs(3));
        for (text, says) in [
            (good.replace("127.0.0.1:0", "0.0.0.0:1"), "loopback"),
            (good.replace("127.0.0.1:0", "here"), "listen"),
            (good.replace("qmp:/a", "/a"), "qmp:PATH"),
            (good.replace("20 GiB", "lots"), "no size"),
            (good.replace("monitor", "monitr"), "monitr"),
            ("listen = \"unix:/x\"".into(), "names no VM"),
            (format!("{good}freeze_lease_s = 61\n"), "from 1 to 60"),
            (format!("{good}freeze = \"maybe\"\n"), "maybe"),
            (format!("{good}agent = \"unix:\"\n"), "unix:PATH"),
        ] {
            let said = Config::parse(&text).unwrap_err();
            assert!(said.contains(says), "{text}: {said}");
        }
    }
}
