//! `livebackup pki init|issue|list|revoke DIR …`

use std::fmt;
use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand};
use jiff::Timestamp;
use serde::Serialize;

use super::context::Context;
use super::exit::Code;
use super::table::Table;
use crate::pki::{self, Authority, Issued, Purpose, Role};

#[derive(Debug, Args)]
pub struct PkiArgs {
    #[command(subcommand)]
    command: PkiCommand,
}

#[derive(Debug, Subcommand)]
enum PkiCommand {
    /// Make a certificate authority in DIR
    Init(InitArgs),
    /// Make a certificate and its key, for one server or client
    Issue(IssueArgs),
    /// List all certificates
    List(ListArgs),
    /// Revoke certificates by name or serial number
    Revoke(RevokeArgs),
}

#[derive(Debug, Args)]
struct InitArgs {
    /// Where; keep it away from servers and clients: its key makes new ones.
    dir: PathBuf,
    /// What the authority is called.
    #[arg(long, default_value = "livebackup")]
    name: String,
    /// How long it is valid.
    #[arg(long, value_name = "DAYS", default_value_t = pki::DEFAULT_AUTHORITY_DAYS, value_parser = clap::value_parser!(u32).range(1..=36_500))]
    days: u32,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("purpose").required(true).args(["client", "server"])))]
struct IssueArgs {
    /// The authority.
    dir: PathBuf,
    /// Whose certificate: the name of a client stands in the server's configuration.
    name: String,
    /// For a client.
    #[arg(long)]
    client: bool,
    /// For a server that clients reach by this name or address. May be repeated.
    #[arg(long, value_name = "HOST")]
    server: Vec<String>,
    /// How long it is valid.
    #[arg(long, value_name = "DAYS", default_value_t = pki::DEFAULT_DAYS, value_parser = clap::value_parser!(u32).range(1..=36_500))]
    days: u32,
    /// Make another although there is one that is valid; the old one stays valid.
    #[arg(long)]
    renew: bool,
}

#[derive(Debug, Args)]
struct ListArgs {
    /// The authority.
    dir: PathBuf,
}

#[derive(Debug, Args)]
struct RevokeArgs {
    /// The authority.
    dir: PathBuf,
    /// A name, or a serial number (its first 8 digits will do).
    name: String,
}

/// A certificate, for people and programs.
#[derive(Serialize)]
struct Entry {
    name: String,
    purpose: &'static str,
    hosts: Vec<String>,
    serial: String,
    ends: Timestamp,
    days_left: i64,
    state: &'static str,
}

impl Entry {
    fn new(issued: &Issued, now: Timestamp) -> Self {
        let (about, days_left) = (&issued.about, issued.about.days_left(now));
        let state = match issued.revoked {
            Some(_) => "revoked",
            None if about.ends <= now => "expired",
            None if days_left < pki::WARN_DAYS => "ends soon",
            None => "valid",
        };
        let purpose = match about.role {
            Role::Server => "server",
            Role::Client => "client",
            Role::Other => "other",
        };
        Self {
            name: about.name.clone(),
            purpose,
            hosts: about.hosts.clone(),
            serial: about.serial.clone(),
            ends: about.ends,
            days_left,
            state,
        }
    }
}

#[derive(Serialize)]
struct InitReport {
    dir: PathBuf,
    ends: Timestamp,
}

impl fmt::Display for InitReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dir = self.dir.display();
        writeln!(f, "{dir} is a certificate authority now, valid until {:.0}", self.ends)?;
        writeln!(f, "next: livebackup pki issue {dir} NAME --server HOST   for each server")?;
        writeln!(f, "      livebackup pki issue {dir} NAME --client        for each client")
    }
}

#[derive(Serialize)]
struct IssueReport {
    #[serde(flatten)]
    entry: Entry,
    bundle: PathBuf,
}

impl fmt::Display for IssueReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Entry { name, purpose, ends, days_left, .. }, bundle) = (&self.entry, self.bundle.display());
        writeln!(f, "{name}: a {purpose}'s certificate, valid until {ends:.0} ({days_left} days)")?;
        match *purpose == "client" {
            true => writeln!(
                f,
                "move {bundle} to the client, as ~/.config/livebackup/tls or for --tls DIR; grant it VMs in a [[client]] table of the server"
            ),
            false => writeln!(f, "move {bundle} to the server, and name it in its configuration: [tls] dir = \"DIR\""),
        }
    }
}

#[derive(Serialize)]
struct ListReport {
    authority_ends: Timestamp,
    authority_days_left: i64,
    certificates: Vec<Entry>,
}

impl fmt::Display for ListReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the authority is valid until {:.0} ({} days)", self.authority_ends, self.authority_days_left)?;
        if self.certificates.is_empty() {
            return writeln!(f, "no certificates yet");
        }
        let mut table = Table::new(&["NAME", "FOR", "STATE", ">DAYS LEFT", "ENDS", "SERIAL", "HOSTS"]);
        for entry in &self.certificates {
            table.row([
                entry.name.clone(),
                entry.purpose.to_owned(),
                entry.state.to_owned(),
                entry.days_left.to_string(),
                format!("{:.0}", entry.ends),
                entry.serial.chars().take(12).collect(),
                entry.hosts.join(" "),
            ]);
        }
        write!(f, "{table}")
    }
}

#[derive(Serialize)]
struct RevokeReport {
    revoked: Vec<Entry>,
    crl: PathBuf,
}

impl fmt::Display for RevokeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for entry in &self.revoked {
            writeln!(f, "revoked: {}, serial {}", entry.name, entry.serial)?;
        }
        let crl = self.crl.display();
        writeln!(f, "copy {crl} to every server, over its crl file: the server reads it again by itself")
    }
}

pub fn run(context: &Context, args: &PkiArgs) -> anyhow::Result<Code> {
    let now = Timestamp::now();
    match &args.command {
        PkiCommand::Init(InitArgs { dir, name, days }) => {
            let authority = Authority::init(dir, name, *days)?;
            context.output.done(&InitReport { dir: dir.clone(), ends: authority.about()?.ends });
        }
        PkiCommand::Issue(args) => {
            let authority = Authority::open(&args.dir)?;
            let purpose = match args.client {
                true => Purpose::Client,
                false => Purpose::Server(args.server.clone()),
            };
            let about = authority.issue(&args.name, &purpose, args.days, args.renew)?;
            let entry = Entry::new(&Issued { about, revoked: None }, now);
            context.output.done(&IssueReport { entry, bundle: authority.bundle(&args.name) });
        }
        PkiCommand::List(ListArgs { dir }) => {
            let authority = Authority::open(dir)?;
            let own = authority.about()?;
            let certificates = authority.list()?.iter().map(|issued| Entry::new(issued, now)).collect();
            let authority_days_left = own.days_left(now);
            context.output.print(&ListReport { authority_ends: own.ends, authority_days_left, certificates });
        }
        PkiCommand::Revoke(RevokeArgs { dir, name }) => {
            let authority = Authority::open(dir)?;
            let revoked = authority.revoke(name)?;
            let revoked = revoked.into_iter().map(|about| Issued { about, revoked: Some(now) });
            let revoked = revoked.map(|issued| Entry::new(&issued, now)).collect();
            context.output.done(&RevokeReport { revoked, crl: authority.crl() });
        }
    }
    Ok(Code::Good)
}
