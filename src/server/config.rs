//! Configuration of the service (TOML).
//!
//! ```toml
//! listen = "127.0.0.1:7870"        # or "unix:/run/livebackup/serve.sock", or a list of addresses
//! state = "/var/lib/livebackup"    # may be left out
//! scratch = "/var/scratch"         # may be left out
//! scratch_budget = "20 GiB"        # may be left out
//! max_sessions = 8                 # backups at once; further ones wait; may be left out
//! limit_rate = "100 MiB"           # most that all sessions together send a second; may be left out
//! wire_compression = "auto"        # of what is sent over TCP: "none", "lz4", "zstd" or "auto", see `wire::packing`; a client may
//!                                  # ask for something else; may be left out
//! resume_grace_s = 60              # how long a backup whose client was lost is held for it; 0: not at all; may be left out
//! unix_group = "backup"            # who may use a unix socket besides root and the server's own user
//!
//! [tls]                            # needed off the loopback; every TCP address speaks TLS then
//! dir = "/etc/livebackup/tls"      # a bundle of `livebackup pki issue`; or cert, key, ca and crl by themselves
//! crl = "/etc/livebackup/crl.pem"  # may be left out; read again when it changes, as the others are
//!
//! [[client]]
//! name = "backup1"                 # the common name of its certificate
//! vms = ["vm1"]                    # or ["*"]
//! may = ["list", "backup"]         # may be left out; also "detach"
//!
//! [[vm]]
//! monitor = "qmp:/run/vm1.qmp"
//! name = "vm1"                     # may be left out: QEMU's -name, else its UUID
//! agent = "unix:/run/vm1.qga"      # may be left out: found through QEMU
//! freeze = "prefer"                # or "require", "never"; may be left out
//! freeze_lease_s = 10              # longest freeze; may be left out
//! freeze_mount_points = ["/"]      # may be left out: all file systems
//! trim = "prefer"                  # or "require", "never": the guest trims its file systems before a disk is read
//!                                  # whole (guest-fstrim, for up to 5 minutes); may be left out: "never"
//! max_added_write_latency_ms = 5   # what a backup may add to the guest's writes (p99); may be left out
//! max_read_rate = "200 MiB"        # read in a second, at most; may be left out
//! shutdown = "harvest"             # or "leave"; may be left out: "leave"
//! exclusive_device = ["vda"]       # or true: of all disks; may be left out: none; only with shutdown = "harvest"
//! attach = "on-demand"             # or "always"; may be left out: "always"
//! persistent_bitmaps = true        # qcow2 images keep our bitmaps; may be left out: false
//! skip_swap = true                 # swap is not backed up: the same as skip = ["swap"]; may be left out
//! skip = ["vd0=3", "vd1=label:scratch"]   # areas that are not backed up, as `area` has them; may be left out
//!
//! [[vm.hold]]                      # a database to be held; see `hooks::config`
//! profile = "postgresql"
//!
//! [[vm.hook]]                      # programs before and after a phase; see there, too
//! phase = "instant"
//! pre = ["/usr/local/bin/before"]
//! ```
//!
//! With `shutdown = "harvest"` QEMU waits, when the guest powers off, until its last bitmaps are taken, and is ended then:
//! tracking goes on when the virtual machine is started again. With `"leave"` QEMU ends as without us.
//!
//! With `exclusive_device` the tracking of a disk on a block device goes on, too: the operator says that nobody else writes to
//! the device between two runs of the virtual machine, no other QEMU and no rollback. It is checked by the host's counters and
//! by a fingerprint (digests of at most 66 MiB), see `vm::device`. Without it such a disk is read whole after each start.
//!
//! With `attach = "on-demand"` the VM's monitor, which serves one client at a time, is used only while a client asks for
//! something: the slot is free for others between backups. It needs `name`, since nobody asks QEMU for it, and goes not together
//! with `shutdown = "harvest"`, which needs the monitor all the time; `persistent_bitmaps` help there.
//!
//! With `persistent_bitmaps = true` our bitmaps are stored in those qcow2 images that stand on their own (no backing file, no
//! data file, `cache.no-flush` off): tracking goes on across any orderly end of QEMU, also one that nobody saw, and across a
//! start of the host. `livebackup detach` takes them out of the images again.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::bad;
use super::grants::{Grants, May};
use crate::agent;
use crate::area::Skip;
use crate::grade::Policy;
use crate::hooks::config::{HoldTable, HookTable, tables};
use crate::hooks::freeze::{DEFAULT_LEASE, MAX_LEASE};
use crate::impact::{Budget, MAX_BUDGET_MS};
use crate::monitor::Address;
use crate::units::{GIB, KIB, MIB};
use crate::vm::{Exclusive, PowerOff, QuietOptions};
use crate::wire::Address as WireAddress;
use crate::wire::message::Failure;
use crate::wire::packing::How;
use crate::wire::rate::MIN_SHARED_RATE;
use crate::wire::resume::{DEFAULT_GRACE, MAX_GRACE};
use crate::wire::tls::TlsFiles;

/// Sessions at once unless something else is configured.
const DEFAULT_SESSIONS: usize = 8;
/// Most that may be configured.
const MAX_SESSIONS: usize = 64;
/// Most addresses to listen at.
const MAX_ADDRESSES: usize = 16;
/// Longest configuration file.
const MAX_CONFIG_BYTES: u64 = MIB;

/// The service's configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it listens.
    pub listen: Vec<WireAddress>,
    /// The certificates, if TCP addresses speak TLS.
    pub tls: Option<TlsFiles>,
    /// Who gets what over TLS.
    pub clients: Vec<Grants>,
    /// Who may use a unix socket besides root and the server's own user.
    pub unix_group: Option<String>,
    /// Sessions at once, at most: each has a fleece, and holds up to 32 MiB in flight.
    pub max_sessions: usize,
    /// Most bytes that all sessions together send a second.
    pub limit_rate: Option<u64>,
    /// How data is compressed over TCP unless a client says otherwise.
    pub wire_compression: How,
    /// How long the session of a client whose connection was lost is held for it.
    pub resume_grace: Duration,
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
    /// What a backup may cost the guest.
    pub budget: Budget,
    /// What becomes of QEMU when the guest powers off.
    pub power_off: PowerOff,
    /// Whether images keep our bitmaps.
    pub persistent_bitmaps: bool,
    /// What is left out of its disks.
    pub skip: Vec<Skip>,
    /// Disks whose device nobody else writes to.
    pub exclusive_device: Exclusive,
    /// Whether it is attached only while somebody asks for it. It has a name then.
    pub on_demand: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    listen: Listen,
    tls: Option<TlsTable>,
    #[serde(default)]
    client: Vec<ClientTable>,
    unix_group: Option<String>,
    max_sessions: Option<usize>,
    resume_grace_s: Option<u64>,
    limit_rate: Option<String>,
    wire_compression: Option<String>,
    state: Option<PathBuf>,
    scratch: Option<PathBuf>,
    scratch_budget: Option<String>,
    #[serde(default)]
    vm: Vec<VmTable>,
}

/// One address or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum Listen {
    One(String),
    Several(Vec<String>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TlsTable {
    dir: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    ca: Option<PathBuf>,
    crl: Option<PathBuf>,
}

impl TlsTable {
    fn files(self) -> Result<TlsFiles, String> {
        let bundle = self.dir.as_deref().map(TlsFiles::in_dir);
        let one = |given: Option<PathBuf>, of: fn(&TlsFiles) -> &PathBuf, name: &str| {
            let found = given.or_else(|| bundle.as_ref().map(|files| of(files).clone()));
            found.ok_or_else(|| format!("[tls] lacks {name}: give dir = \"DIR\", or cert, key and ca"))
        };
        Ok(TlsFiles {
            cert: one(self.cert, |files| &files.cert, "cert")?,
            key: one(self.key, |files| &files.key, "key")?,
            ca: one(self.ca, |files| &files.ca, "ca")?,
            crl: self.crl.or_else(|| bundle.as_ref().and_then(|files| files.crl.clone())),
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClientTable {
    name: String,
    vms: Vec<String>,
    may: Option<Vec<May>>,
}

/// All disks, or some by name.
#[derive(Deserialize)]
#[serde(untagged)]
enum ExclusiveDevice {
    All(bool),
    Disks(Vec<String>),
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
    #[serde(default = "never")]
    trim: Policy,
    max_added_write_latency_ms: Option<u32>,
    max_read_rate: Option<String>,
    shutdown: Option<String>,
    attach: Option<String>,
    exclusive_device: Option<ExclusiveDevice>,
    #[serde(default)]
    persistent_bitmaps: bool,
    #[serde(default)]
    skip_swap: bool,
    #[serde(default)]
    skip: Vec<Skip>,
    #[serde(default)]
    hold: Vec<HoldTable>,
    #[serde(default)]
    hook: Vec<HookTable>,
}

fn never() -> Policy {
    Policy::Never
}

impl VmTable {
    fn config(self) -> Result<VmConfig, String> {
        if self.name.as_ref().is_some_and(|name| name.is_empty() || name.chars().any(char::is_control)) {
            return Err(format!(
                "the name of {} is {:?}: give it one or more characters that can be printed, or leave `name` out for the one that \
                 QEMU has",
                self.monitor,
                self.name.unwrap_or_default()
            ));
        }
        let address = self
            .monitor
            .strip_prefix("qmp:")
            .ok_or_else(|| format!("monitor = {:?}: write it as \"qmp:PATH\" or \"qmp:HOST:PORT\"", self.monitor))?;
        let monitor = address.parse::<Address>().map_err(|e| e.to_string())?;
        let lease = self.freeze_lease_s.map_or(DEFAULT_LEASE, Duration::from_secs);
        if lease.is_zero() || lease > MAX_LEASE {
            return Err(format!("freeze_lease_s is a number of seconds from 1 to {}", MAX_LEASE.as_secs()));
        }
        let (holds, hooks) = tables(self.hold, self.hook)?;
        let mount_points = self.freeze_mount_points;
        let (agent, freeze, trim) = (self.agent, self.freeze, self.trim);
        let quiet = QuietOptions { agent, freeze, mount_points, lease, trim, holds, hooks };
        if self.max_added_write_latency_ms.is_some_and(|ms| !(1..=MAX_BUDGET_MS).contains(&ms)) {
            return Err(format!("max_added_write_latency_ms is a number of milliseconds from 1 to {MAX_BUDGET_MS}"));
        }
        let max_read_rate = self.max_read_rate.as_deref().map(parse_size).transpose()?;
        if max_read_rate.is_some_and(|rate| rate < MIB) {
            return Err("max_read_rate is what is read in a second, \"1 MiB\" at least".to_owned());
        }
        let budget = Budget { max_added_write_latency_ms: self.max_added_write_latency_ms, max_read_rate };
        let power_off = match self.shutdown.as_deref() {
            None | Some("leave") => PowerOff::Leave,
            Some("harvest") => PowerOff::Harvest,
            Some(other) => return Err(format!("shutdown = {other:?}: write \"leave\" or \"harvest\"")),
        };
        let skip = self.skip_swap.then_some(Skip::SWAP).into_iter().chain(self.skip).collect();
        let on_demand = match self.attach.as_deref() {
            None | Some("always") => false,
            Some("on-demand") => true,
            Some(other) => return Err(format!("attach = {other:?}: write \"always\" or \"on-demand\"")),
        };
        if on_demand && power_off == PowerOff::Harvest {
            return Err("shutdown = \"harvest\" needs the monitor all the time, to see the guest power off, and attach = \"on-demand\" \
                        lets go of it: leave one of them out (persistent_bitmaps = true keeps the tracking of qcow2 images \
                        without the monitor)"
                .to_owned());
        }
        if on_demand && self.name.is_none() {
            return Err(format!("attach = \"on-demand\" of {}: give the VM a name = \"…\"", self.monitor));
        }
        let exclusive_device = match self.exclusive_device {
            None | Some(ExclusiveDevice::All(false)) => Exclusive::No,
            Some(ExclusiveDevice::All(true)) => Exclusive::All,
            Some(ExclusiveDevice::Disks(names)) => Exclusive::Disks(names),
        };
        if exclusive_device != Exclusive::No && power_off != PowerOff::Harvest {
            return Err("exclusive_device is for what is known of a device when the guest has powered off: add shutdown = \"harvest\""
                .to_owned());
        }
        let (name, persistent_bitmaps) = (self.name, self.persistent_bitmaps);
        Ok(VmConfig { monitor, name, quiet, budget, power_off, persistent_bitmaps, skip, on_demand, exclusive_device })
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
        no_two_alike(vms.iter().filter_map(|vm| vm.name.as_ref()), "VMs")?;
        let tls = file.tls.map(TlsTable::files).transpose()?;
        let clients: Vec<_> = file.client.into_iter().map(grants).collect();
        if !clients.is_empty() && tls.is_none() {
            return Err("a [[client]] proves its name by a certificate: add a [tls] table".into());
        }
        no_two_alike(clients.iter().map(|client| &client.name), "clients")?;
        let listen = match file.listen {
            Listen::One(text) => vec![text],
            Listen::Several(texts) => texts,
        };
        if listen.is_empty() || listen.len() > MAX_ADDRESSES {
            return Err(format!("listen names {} addresses: 1 to {MAX_ADDRESSES} are possible", listen.len()));
        }
        let listen: Result<_, _> = listen.iter().map(|text| parse_listen(text, tls.is_some())).collect();
        let max_sessions = file.max_sessions.unwrap_or(DEFAULT_SESSIONS);
        if !(1..=MAX_SESSIONS).contains(&max_sessions) {
            return Err(format!("max_sessions is a number from 1 to {MAX_SESSIONS}"));
        }
        let resume_grace = file.resume_grace_s.map_or(DEFAULT_GRACE, Duration::from_secs);
        if resume_grace > MAX_GRACE {
            return Err(format!("resume_grace_s is a number of seconds from 0 to {}", MAX_GRACE.as_secs()));
        }
        let limit_rate = file.limit_rate.as_deref().map(parse_size).transpose()?;
        if limit_rate.is_some_and(|rate| rate < MIN_SHARED_RATE) {
            return Err(
                "limit_rate is at least \"1 MiB\" a second: slower, its clients would be taken for stuck".into()
            );
        }
        let wire_compression = file.wire_compression.as_deref().map_or(Ok(How::Auto), str::parse)?;
        let budget = file.scratch_budget.as_deref().map(parse_size).transpose()?;
        Ok(Self {
            listen: listen?,
            tls,
            clients,
            unix_group: file.unix_group,
            max_sessions,
            resume_grace,
            limit_rate,
            wire_compression,
            state: file.state,
            scratch: file.scratch,
            scratch_budget_bytes: budget,
            vms,
        })
    }
}

fn grants(table: ClientTable) -> Grants {
    Grants { name: table.name, vms: table.vms, may: table.may.unwrap_or_else(|| May::USUAL.to_vec()) }
}

fn no_two_alike<'a>(names: impl Iterator<Item = &'a String>, what: &str) -> Result<(), String> {
    let mut names: Vec<_> = names.collect();
    names.sort();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(twice) => Err(format!("two {what} are called {:?}: give each a name of its own", twice[0])),
        None => Ok(()),
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

fn parse_listen(text: &str, tls: bool) -> Result<WireAddress, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return Ok(WireAddress::Unix(path.into()));
    }
    let address: SocketAddr =
        text.parse().map_err(|_| format!("listen = {text:?}: write it as \"127.0.0.1:7870\" or \"unix:PATH\""))?;
    if !tls && !address.ip().is_loopback() {
        return Err(format!(
            "listen = {text:?} is not on the loopback, where clients must prove who they are: add a [tls] table with certificates \
             (`livebackup pki` makes them), or listen on 127.0.0.1 or a unix socket"
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
        assert_eq!(config.resume_grace, DEFAULT_GRACE);
        let config = Config::parse(&format!("resume_grace_s = 0\n{good}")).unwrap();
        assert!(config.resume_grace.is_zero());
        let quiet = "agent = \"unix:/q\"\nfreeze = \"require\"\nfreeze_lease_s = 3\n";
        let config = Config::parse(&format!("{good}{quiet}")).unwrap();
        assert_eq!(config.vms[0].quiet.agent, Some(agent::Address("/q".into())));
        assert_eq!(config.vms[0].quiet.lease, Duration::from_secs(3));
        let client = "[[client]]\nname = \"a\"\nvms = [\"*\"]\nmay = [\"backup\"]\n";
        let tls = "[tls]\ndir = \"/tls\"\ncrl = \"/crl\"\n";
        let far = good.replace("\"127.0.0.1:0\"", "[\"0.0.0.0:1\", \"unix:/x\"]");
        let config = Config::parse(&format!("{far}{tls}{client}")).unwrap();
        assert_eq!(config.listen, [WireAddress::Tcp("0.0.0.0:1".into()), WireAddress::Unix("/x".into())]);
        let files = config.tls.unwrap();
        assert_eq!((files.key, files.crl), ("/tls/key.pem".into(), Some("/crl".into())));
        assert_eq!(config.clients[0].may, [May::Backup]);
        assert_eq!(config.vms[0].power_off, PowerOff::Leave);
        let config = Config::parse(&format!("{good}shutdown = \"harvest\"\n")).unwrap();
        assert_eq!((config.vms[0].power_off, config.vms[0].persistent_bitmaps), (PowerOff::Harvest, false));
        assert!(Config::parse(&format!("{good}persistent_bitmaps = true\n")).unwrap().vms[0].persistent_bitmaps);
        let config = Config::parse(&format!("{good}skip_swap = true\nskip = [\"vd0=2\"]\n")).unwrap();
        assert_eq!(config.vms[0].skip, [Skip::SWAP, "vd0=2".parse().unwrap()]);
        let config =
            Config::parse(&format!("{good}max_added_write_latency_ms = 5\nmax_read_rate = \"2 MiB\"\n")).unwrap();
        let budget = Budget { max_added_write_latency_ms: Some(5), max_read_rate: Some(2 * MIB) };
        assert_eq!(config.vms[0].budget, budget);
        let says = |value: &str| {
            let text = format!("{good}shutdown = \"harvest\"\nexclusive_device = {value}\n");
            Config::parse(&text).unwrap().vms.remove(0).exclusive_device
        };
        assert_eq!((says("true"), says("false")), (Exclusive::All, Exclusive::No));
        assert!(says("[\"vda\"]").has("vda") && !says("[\"vda\"]").has("vdb"));
        let tables = "[[vm.hold]]\nprofile = \"redis\"\n[[vm.hook]]\nphase = \"session\"\npost = [\"/x\"]\n";
        let config = Config::parse(&format!("{good}{tables}")).unwrap();
        assert_eq!((config.vms[0].quiet.holds.len(), config.vms[0].quiet.hooks.len()), (1, 1));
        for (text, says) in [
            (good.replace("127.0.0.1:0", "0.0.0.0:1"), "loopback"),
            (good.replace("127.0.0.1:0", "here"), "listen"),
            (good.replace("\"127.0.0.1:0\"", "[]"), "1 to 16"),
            (good.replace("\"127.0.0.1:0\"", "[\"unix:/x\", \"0.0.0.0:1\"]"), "loopback"),
            (format!("{good}[[client]]\nname = \"a\"\nvms = []\n"), "[tls]"),
            (format!("{good}[tls]\nkey = \"k\"\n"), "lacks cert"),
            (format!("{good}{tls}{client}{client}"), "two clients are called \"a\""),
            (format!("{good}{}", client.replace("backup", "restore")), "restore"),
            (good.replace("qmp:/a", "/a"), "qmp:PATH"),
            (good.replace("20 GiB", "lots"), "no size"),
            (good.replace("monitor", "monitr"), "monitr"),
            ("listen = \"unix:/x\"".into(), "names no VM"),
            (format!("limit_rate = \"1023 KiB\"\n{good}"), "at least"),
            (format!("wire_compression = \"gzip\"\n{good}"), "lz4"),
            (format!("resume_grace_s = 3601\n{good}"), "from 0 to 3600"),
            (format!("{good}freeze_lease_s = 61\n"), "from 1 to 60"),
            (format!("{good}freeze = \"maybe\"\n"), "maybe"),
            (format!("{good}agent = \"unix:\"\n"), "unix:PATH"),
            (format!("{good}shutdown = \"now\"\n"), "harvest"),
            (format!("{good}skip = [\"vd0\"]\n"), "label:NAME"),
            (format!("{good}max_added_write_latency_ms = 0\n"), "from 1 to"),
            (format!("{good}max_read_rate = \"1 KiB\"\n"), "1 MiB"),
            (format!("{good}exclusive_device = true\n"), "harvest"),
            (format!("{good}attach = \"never\"\n"), "on-demand"),
            (format!("{good}attach = \"on-demand\"\n"), "name"),
            (format!("{good}name = \"\"\n"), "the name of qmp:/a is \"\""),
            (format!("{good}name = \"a\\u001b[2J\"\n"), "can be printed"),
            (format!("{good}name = \"a\"\nattach = \"on-demand\"\nshutdown = \"harvest\"\n"), "all the time"),
        ] {
            let said = Config::parse(&text).unwrap_err();
            assert!(said.contains(says), "{text}: {said}");
        }
    }
}
