//! Connects to a server: with TLS off the loopback, always; on it when `--tls` says so; never over a unix socket.

use std::path::PathBuf;

use super::context::Context;
use super::exit;
use crate::wire::tls::{Connector, ends_soon};
use crate::wire::{Address, Client, Timing};

/// Whether the host of `HOST:PORT` is this one, by its name alone.
fn is_loopback(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Connects.
pub async fn dial(context: &Context, address: &Address) -> anyhow::Result<Client> {
    let host_port = match address {
        Address::Tcp(host_port) => host_port,
        Address::Unix(_) => return Ok(Client::connect(address).await?),
    };
    let dir = match &context.tls {
        Some(dir) => dir.clone(),
        None if is_loopback(host_port) => return Ok(Client::connect(address).await?),
        None => usual_dir().filter(|dir| dir.is_dir()).ok_or_else(|| no_certificate(host_port))?,
    };
    let connector = Connector::open(&dir)?;
    if let Some(words) = ends_soon(connector.about()) {
        tracing::warn!("{words}");
    }
    Ok(Client::connect_tls(host_port, &connector, Timing::default()).await?)
}

/// Where a client's certificate is looked for.
fn usual_dir() -> Option<PathBuf> {
    let dir = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|dir| dir.is_absolute());
    let base = dir("XDG_CONFIG_HOME").or_else(|| Some(dir("HOME")?.join(".config")))?;
    Some(base.join("livebackup/tls"))
}

fn no_certificate(host_port: &str) -> anyhow::Error {
    let usual = usual_dir().map_or_else(|| "~/.config/livebackup/tls".to_owned(), |dir| dir.display().to_string());
    exit::usage(format!(
        "{host_port} is reached with TLS only, and there is no certificate in {usual}: put a bundle of \
         `livebackup pki issue DIR NAME --client` there, or name its directory by --tls DIR"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_the_loopback() {
        for here in ["127.0.0.1:1", "127.9.0.1:1", "[::1]:1", "localhost:1", "LOCALHOST:1"] {
            assert!(is_loopback(here), "{here}");
        }
        for there in ["192.0.2.1:1", "localhost.example:1", "127.0.0.1.example:1", "[::2]:1", "0.0.0.0:1"] {
            assert!(!is_loopback(there), "{there}");
        }
    }
}
