//! Profiles: holds of well-known databases, made of the database's own client and what it is told.
//!
//! | profile | what it does | positions | an account needs |
//! |---|---|---|---|
//! | postgresql | checkpoint, before the lock; the session stays open over the instant | `wal_lsn` before, `wal_lsn_after` | `pg_checkpoint` (15 and later; before: superuser) |
//! | mariadb | `FLUSH TABLES WITH READ LOCK` over the instant, engine logs flushed | `binlog`, `gtid_binlog_pos` | `RELOAD`, `BINLOG MONITOR` |
//! | mysql | the same, of MySQL 8.4 and later | `binlog`, `gtid_executed` | `RELOAD`, `REPLICATION CLIENT` |
//! | redis | writes paused over the instant, `SAVE` | | `+save +lastsave +client +echo` |
//!
//! PostgreSQL has no lock that stops all writers, and needs none: it is made to open at any one instant, and the
//! checkpoint leaves it little to replay. Its grade of application rests on the checkpoint and the frozen file systems.
//!
//! Passwords come from files that the clients read themselves (`PGPASSFILE`, `--defaults-extra-file`), never as arguments;
//! redis-cli gets its password by its environment. In the guest the client runs as an account of the guest, and the
//! database knows it by that (peer, unix_socket).

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::hold::Script;

/// A database that we know how to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// PostgreSQL.
    Postgresql,
    /// MariaDB, and MySQL before 8.4.
    Mariadb,
    /// MySQL 8.4 and later.
    Mysql,
    /// Redis.
    Redis,
}

/// How a client reaches its database; what is absent is the client's own default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// The client's program, when it is not the usual one.
    pub client: Option<String>,
    /// Host or directory of the socket.
    pub host: Option<String>,
    /// TCP port.
    pub port: Option<u16>,
    /// The database's user.
    pub user: Option<String>,
    /// The database to connect to.
    pub database: Option<String>,
    /// The client's own password file.
    pub password_file: Option<PathBuf>,
    /// The account of the guest that runs the client.
    pub guest_user: Option<String>,
}

const WAL_POSITION: &str =
    "CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END;\n";

impl Profile {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Postgresql => "postgresql",
            Self::Mariadb => "mariadb",
            Self::Mysql => "mysql",
            Self::Redis => "redis",
        }
    }

    /// What to run and to say.
    ///
    /// # Errors
    /// A password file that cannot be read.
    pub fn script(self, account: &Account, ready_within: Duration, limit: Duration) -> Result<Script, String> {
        let mut script = match self {
            Self::Postgresql => postgresql(account),
            Self::Mariadb => mariadb(account, "mariadb", "MASTER", ready_within, limit),
            Self::Mysql => mariadb(account, "mysql", "BINARY LOG", ready_within, limit),
            Self::Redis => redis(account, limit)?,
        };
        if let Some(user) = &account.guest_user {
            let mut run: Vec<_> = ["runuser", "-u", user, "--"].map(str::to_owned).into();
            run.append(&mut script.run);
            script.run = run;
        }
        Ok(script)
    }
}

/// `client [option value]…` for those that are given.
fn client(account: &Account, usual: &str, options: [(&str, Option<String>); 4]) -> Vec<String> {
    let mut run = vec![account.client.clone().unwrap_or_else(|| usual.to_owned())];
    for (option, value) in options {
        run.extend(value.into_iter().flat_map(|value| [option.to_owned(), value]));
    }
    run
}

fn postgresql(account: &Account) -> Script {
    let port = account.port.map(|p| p.to_string());
    // A maintenance database that every cluster has.
    let database = account.database.clone().or_else(|| Some("postgres".into()));
    let mut run = client(
        account,
        "psql",
        [("-h", account.host.clone()), ("-p", port), ("-U", account.user.clone()), ("-d", database)],
    );
    run.extend(["-X", "-q", "-A", "-t", "-w", "-v", "ON_ERROR_STOP=1"].map(str::to_owned));
    let file = account.password_file.as_ref().map(|f| ("PGPASSFILE".to_owned(), f.display().to_string()));
    let timeout = ("PGCONNECT_TIMEOUT".to_owned(), "10".to_owned());
    Script {
        run,
        env: file.into_iter().chain([timeout]).collect(),
        prepare: "SELECT 'version=' || current_setting('server_version');\nCHECKPOINT;\nSELECT 'PREPARED';\n".into(),
        input: format!("SELECT 'wal_lsn=' || {WAL_POSITION}SELECT 'READY';\n"),
        farewell: format!("SELECT 'wal_lsn_after=' || {WAL_POSITION}"),
        only: None,
    }
}

/// `log` is what its language calls the binary log whose status is shown.
fn mariadb(account: &Account, usual: &str, log: &str, ready_within: Duration, limit: Duration) -> Script {
    let port = account.port.map(|p| p.to_string());
    let (socket, host) = match &account.host {
        Some(path) if path.starts_with('/') => (Some(path.clone()), None),
        host => (None, host.clone()),
    };
    let mut run = client(account, usual, [("-h", host), ("-P", port), ("-u", account.user.clone()), ("-S", socket)]);
    // It has to be the first.
    let file = account.password_file.as_ref().map(|f| format!("--defaults-extra-file={}", f.display()));
    run.splice(1..1, file);
    run.extend(["-N", "-B", "--unbuffered", "--skip-reconnect", "--connect-timeout=10"].map(str::to_owned));
    run.extend(account.database.clone());
    let wait_s = ready_within.as_secs().max(1);
    // The server itself drops a session that was forgotten.
    let forgotten_s = limit.as_secs().max(1) + 5;
    Script {
        run,
        // The first flush is without a lock: it leaves the second one little to do.
        prepare: format!(
            "SET SESSION lock_wait_timeout = {wait_s};\nSET SESSION wait_timeout = {forgotten_s};\n\
             SELECT CONCAT('version=', VERSION());\nFLUSH LOCAL TABLES;\nFLUSH LOCAL ENGINE LOGS;\nSELECT 'PREPARED';\n"
        ),
        input: format!(
            "FLUSH TABLES WITH READ LOCK;\nFLUSH LOCAL ENGINE LOGS;\nSHOW {log} STATUS;\n\
             SHOW GLOBAL VARIABLES WHERE Variable_name IN ('gtid_binlog_pos', 'gtid_executed', 'server_id');\n\
             SELECT 'READY';\n"
        ),
        farewell: "UNLOCK TABLES;\n".into(),
        ..Script::default()
    }
}

fn redis(account: &Account, limit: Duration) -> Result<Script, String> {
    let port = account.port.map(|p| p.to_string());
    let (socket, host) = match &account.host {
        Some(path) if path.starts_with('/') => (Some(path.clone()), None),
        host => (None, host.clone()),
    };
    let run =
        client(account, "redis-cli", [("-h", host), ("-p", port), ("-s", socket), ("--user", account.user.clone())]);
    let mut script = Script {
        run,
        prepare: "ECHO PREPARED\n".into(),
        input: format!("CLIENT PAUSE {} WRITE\nSAVE\nLASTSAVE\nECHO READY\n", limit.as_millis()),
        farewell: "CLIENT UNPAUSE\n".into(),
        only: Some(&["OK"]),
        ..Script::default()
    };
    if let Some(file) = &account.password_file {
        let text = std::fs::read_to_string(file).map_err(|e| format!("cannot read {}: {e}", file.display()))?;
        script.env.insert("REDISCLI_AUTH".into(), text.trim().to_owned());
    }
    Ok(script)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_password_is_an_argument() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("password");
        std::fs::write(&file, "geheim\n").unwrap();
        let account = Account { password_file: Some(file.clone()), guest_user: Some("u".into()), ..Account::default() };
        let time = Duration::from_secs(5);
        for profile in [Profile::Postgresql, Profile::Mariadb, Profile::Mysql, Profile::Redis] {
            let script = profile.script(&account, time, time).unwrap();
            assert!(!script.run.iter().any(|a| a.contains("geheim")), "{script:?}");
            assert_eq!(script.run[..4], ["runuser", "-u", "u", "--"]);
            assert!(script.prepare.contains("PREPARED"));
            assert!(script.input.ends_with("READY\n") || script.input.ends_with("'READY';\n"));
        }
        let script = Profile::Mariadb.script(&Account { guest_user: None, ..account }, time, time).unwrap();
        assert_eq!(script.run[1], format!("--defaults-extra-file={}", file.display()));
    }
}
