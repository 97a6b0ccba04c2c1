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
//! ```

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::bad;
use crate::monitor::Address;
use crate::units::{GIB, KIB, MIB};
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
    /// The VMs: monitor, and name if given.
    pub vms: Vec<(Address, Option<String>)>,
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
        let mut vms = vec![];
        for vm in file.vm {
            let address = vm
                .monitor
                .strip_prefix("qmp:")
                .ok_or_else(|| format!("monitor = {:?}: write it as \"qmp:PATH\" or \"qmp:HOST:PORT\"", vm.monitor))?;
            vms.push((address.parse::<Address>().map_err(|e| e.to_string())?, vm.name));
        }
        let mut names: Vec<_> = vms.iter().filter_map(|(_, name)| name.as_ref()).collect();
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
        assert_eq!(config.vms, [(Address::Unix("/a".into()), None)]);
        for (text, says) in [
            (good.replace("127.0.0.1:0", "0.0.0.0:1"), "loopback"),
            (good.replace("127.0.0.1:0", "here"), "listen"),
            (good.replace("qmp:/a", "/a"), "qmp:PATH"),
            (good.replace("20 GiB", "lots"), "no size"),
            (good.replace("monitor", "monitr"), "monitr"),
            ("listen = \"unix:/x\"".into(), "names no VM"),
        ] {
            let said = Config::parse(&text).unwrap_err();
            assert!(said.contains(says), "{text}: {said}");
        }
    }
}
