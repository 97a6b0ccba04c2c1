//! A socket, and the handshake on it under a time limit.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};

use super::client::{Client, ClientOptions};
use super::error::NegotiateError;
use super::negotiate::{Export, ListedExport, Wanted, list_exports, negotiate};

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// `HOST:PORT`.
    Tcp(String),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "{}", path.display()),
            Address::Tcp(host) => f.write_str(host),
        }
    }
}

/// How to connect.
#[derive(Clone, Copy, Debug)]
pub struct ConnectOptions {
    /// Limit of connecting and the whole handshake.
    pub handshake: Duration,
    /// Of the session.
    pub client: ClientOptions,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        ConnectOptions { handshake: Duration::from_secs(10), client: ClientOptions::default() }
    }
}

/// Connects to `address` and starts a session as `wanted`.
pub async fn connect(address: &Address, wanted: &Wanted, options: &ConnectOptions) -> Result<Client, NegotiateError> {
    let peer = address.to_string();
    limited(&peer, options.handshake, async {
        match address {
            Address::Unix(path) => {
                let mut stream = unix(path, &peer).await?;
                let export = negotiate(&mut stream, &peer, wanted).await?;
                let (read, write) = stream.into_split();
                Ok(Client::start(read, write, &peer, export, options.client))
            }
            Address::Tcp(host) => {
                let mut stream = tcp(host, &peer).await?;
                let export: Export = negotiate(&mut stream, &peer, wanted).await?;
                let (read, write) = stream.into_split();
                Ok(Client::start(read, write, &peer, export, options.client))
            }
        }
    })
    .await
}

/// Lists the exports at `address`.
pub async fn list(address: &Address, options: &ConnectOptions) -> Result<Vec<ListedExport>, NegotiateError> {
    let peer = address.to_string();
    limited(&peer, options.handshake, async {
        match address {
            Address::Unix(path) => list_exports(&mut unix(path, &peer).await?, &peer).await,
            Address::Tcp(host) => list_exports(&mut tcp(host, &peer).await?, &peer).await,
        }
    })
    .await
}

/// A unix socket whose queue of waiting clients is full refuses at once, where TCP would wait: so we do.
async fn unix(path: &Path, peer: &str) -> Result<UnixStream, NegotiateError> {
    const AGAIN_AFTER: Duration = Duration::from_millis(10);
    loop {
        match UnixStream::connect(path).await {
            Err(e) if e.kind() == ErrorKind::WouldBlock => tokio::time::sleep(AGAIN_AFTER).await,
            other => return other.map_err(|e| failed(peer, e)),
        }
    }
}

async fn tcp(host: &str, peer: &str) -> Result<TcpStream, NegotiateError> {
    let stream = TcpStream::connect(host).await.map_err(|e| failed(peer, e))?;
    stream.set_nodelay(true).map_err(|e| failed(peer, e))?;
    Ok(stream)
}

fn failed(peer: &str, source: std::io::Error) -> NegotiateError {
    NegotiateError::Connect { peer: peer.into(), source }
}

async fn limited<T>(
    peer: &str,
    after: Duration,
    work: impl Future<Output = Result<T, NegotiateError>>,
) -> Result<T, NegotiateError> {
    let timeout = || NegotiateError::Timeout { peer: peer.into(), after };
    tokio::time::timeout(after, work).await.map_err(|_| timeout())?
}
