//! Holds and hooks as they are configured (TOML): in a server's `[[vm]]` tables, or in a file of their own.
//!
//! ```toml
//! [[hold]]
//! profile = "postgresql"           # or "mariadb", "mysql", "redis"; or a program of your own: run = ["/usr/local/bin/hold"]
//! where = "host"                   # or "guest": by the guest's agent; may be left out
//! policy = "require"               # or "prefer": go on without it, with the lower grade; may be left out
//! host = "10.0.0.5"                # or the directory (MariaDB, Redis: the path) of a socket of this host
//! port = 5432
//! user = "livebackup"
//! database = "postgres"
//! password_file = "/etc/livebackup/vm1.pgpass"   # PostgreSQL: PGPASSFILE; MariaDB: --defaults-extra-file
//! guest_user = "postgres"          # where = "guest": the guest's account that runs the client
//! client = "/usr/bin/psql"         # when it is not the usual one
//! name = "orders"                  # when there are several of a kind
//! ready_within_s = 30
//! limit_s = 30
//!
//! [[hook]]
//! phase = "instant"                # or "session", "backup" (at the client)
//! pre = ["/usr/local/bin/before"]
//! post = ["/usr/local/bin/after"]
//! limit_s = 60
//! ```

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::hold::{self, Hold, Place, Script};
use super::profile::{Account, Profile};
use super::program::{self, Hook, Phase};
use crate::grade::Policy;
use crate::units::MIB;

/// Longest file that is read.
const MAX_FILE_BYTES: u64 = MIB;

/// A hold's table.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HoldTable {
    name: Option<String>,
    profile: Option<Profile>,
    #[serde(default)]
    run: Vec<String>,
    #[serde(default, rename = "where")]
    place: PlaceName,
    #[serde(default)]
    policy: Policy,
    client: Option<String>,
    host: Option<String>,
    port: Option<u16>,
    user: Option<String>,
    database: Option<String>,
    password_file: Option<PathBuf>,
    guest_user: Option<String>,
    ready_within_s: Option<u64>,
    limit_s: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum PlaceName {
    #[default]
    Host,
    Guest,
}

/// A hook's table.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HookTable {
    phase: Phase,
    #[serde(default)]
    pre: Vec<String>,
    #[serde(default)]
    post: Vec<String>,
    limit_s: Option<u64>,
}

fn limit(seconds: Option<u64>, default: Duration, most: Duration) -> Result<Duration, String> {
    let limit = seconds.map_or(default, Duration::from_secs);
    if limit.is_zero() || limit > most {
        return Err(format!("a limit is a number of seconds from 1 to {}", most.as_secs()));
    }
    Ok(limit)
}

impl HoldTable {
    /// The hold.
    pub fn hold(self) -> Result<Hold, String> {
        let ready_within = limit(self.ready_within_s, hold::DEFAULT_READY_WITHIN, hold::MAX_LIMIT)?;
        let limit = limit(self.limit_s, hold::DEFAULT_LIMIT, hold::MAX_LIMIT)?;
        let place = match self.place {
            PlaceName::Host => Place::Host,
            PlaceName::Guest => Place::Guest,
        };
        let account = Account {
            client: self.client,
            host: self.host,
            port: self.port,
            user: self.user,
            database: self.database,
            password_file: self.password_file,
            guest_user: self.guest_user,
        };
        let usual = self.profile.map(|p| p.name().to_owned()).or_else(|| self.run.first().cloned());
        let name = self.name.or(usual).ok_or("a hold needs a profile, or a program: run = [\"/path\"]")?;
        let wrong = |what: &str| Err(format!("hold {name:?}: {what}"));
        if self.policy == Policy::Never {
            return wrong("its policy is require or prefer; leave it out to have none");
        }
        if place == Place::Host && account.guest_user.is_some() {
            return wrong("guest_user is for where = \"guest\"");
        }
        if place == Place::Guest && account.password_file.is_some() {
            return wrong("in the guest a client needs no password: let the database know its account (guest_user)");
        }
        let script = match (self.profile, self.run.is_empty()) {
            (Some(_), false) => return wrong("it has a profile and a program; it can have one of them"),
            (Some(profile), true) => profile.script(&account, ready_within, limit)?,
            (None, _) if account != Account::default() => return wrong("accounts are for profiles"),
            (None, _) => Script { run: self.run, ..Script::default() },
        };
        Ok(Hold { name, policy: self.policy, ready_within, limit, script, place })
    }
}

impl HookTable {
    /// The hook.
    pub fn hook(self) -> Result<Hook, String> {
        if self.pre.is_empty() && self.post.is_empty() {
            return Err("a hook needs a program: pre = [\"/path\"] or post = [\"/path\"]".into());
        }
        let limit = limit(self.limit_s, program::DEFAULT_LIMIT, program::MAX_LIMIT)?;
        Ok(Hook { phase: self.phase, pre: self.pre, post: self.post, limit })
    }
}

/// Holds and hooks of tables.
pub fn tables(holds: Vec<HoldTable>, hooks: Vec<HookTable>) -> Result<(Vec<Hold>, Vec<Hook>), String> {
    let holds = holds.into_iter().map(HoldTable::hold).collect::<Result<Vec<_>, _>>()?;
    let mut names: Vec<_> = holds.iter().map(|h| &h.name).collect();
    names.sort();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("two holds are called {:?}: give each a name of its own", twice[0]));
    }
    Ok((holds, hooks.into_iter().map(HookTable::hook).collect::<Result<_, _>>()?))
}

/// Reads a file of holds and hooks.
pub fn read(path: &Path) -> Result<(Vec<Hold>, Vec<Hook>), String> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        #[serde(default)]
        hold: Vec<HoldTable>,
        #[serde(default)]
        hook: Vec<HookTable>,
    }
    let at = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    if std::fs::metadata(path).map_err(|e| at(&e))?.len() > MAX_FILE_BYTES {
        return Err(at(&"it is too large to be a file of holds and hooks"));
    }
    let text = std::fs::read_to_string(path).map_err(|e| at(&e))?;
    let file: File = toml::from_str(&text).map_err(|e| at(&e))?;
    tables(file.hold, file.hook).map_err(|e| at(&e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Hold, String> {
        toml::from_str::<HoldTable>(text).map_err(|e| e.to_string())?.hold()
    }

    #[test]
    fn a_hold_says_what_is_wrong_with_it() {
        let hold = parse("profile = \"postgresql\"\nport = 5433\npolicy = \"require\"\nlimit_s = 3\n").unwrap();
        assert_eq!((hold.name.as_str(), hold.policy, hold.limit.as_secs()), ("postgresql", Policy::Require, 3));
        assert!(hold.script.run.windows(2).any(|w| w == ["-p", "5433"]), "{hold:?}");
        assert_eq!(parse("run = [\"/bin/hold\", \"x\"]\nname = \"n\"\n").unwrap().script.run, ["/bin/hold", "x"]);
        for (text, says) in [
            ("", "needs a profile"),
            ("profile = \"oracle\"\n", "oracle"),
            ("profile = \"redis\"\nrun = [\"x\"]\n", "one of them"),
            ("profile = \"redis\"\nlimit_s = 0\n", "from 1 to 600"),
            ("profile = \"redis\"\npolicy = \"never\"\n", "leave it out"),
            ("profile = \"redis\"\nguest_user = \"x\"\n", "where = \"guest\""),
            ("run = [\"x\"]\nuser = \"x\"\n", "for profiles"),
            ("profile = \"mariadb\"\nwhere = \"guest\"\npassword_file = \"/x\"\n", "no password"),
            ("profil = \"redis\"\n", "profil"),
        ] {
            let said = parse(text).unwrap_err();
            assert!(said.contains(says), "{text}: {said}");
        }
        let hook = |text| toml::from_str::<HookTable>(text).unwrap().hook();
        assert!(hook("phase = \"instant\"\n").unwrap_err().contains("needs a program"));
        assert_eq!(hook("phase = \"session\"\npre = [\"/x\"]\n").unwrap().limit, program::DEFAULT_LIMIT);
        let twice = [parse_table("profile = \"redis\"\n"), parse_table("profile = \"redis\"\n")];
        assert!(tables(twice.into(), vec![]).unwrap_err().contains("two holds"));
    }

    fn parse_table(text: &str) -> HoldTable {
        toml::from_str(text).unwrap()
    }
}
