//! Where the service listens: TCP or a unix socket.

use std::path::PathBuf;

use tokio::net::{TcpListener, UnixListener};

use super::bad;
use crate::wire::message::Failure;
use crate::wire::{Address, Stream};

pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    pub async fn bind(address: &Address) -> Result<Self, Failure> {
        let at =
            |e: std::io::Error| bad(format!("cannot listen at {address}: {e}; is another livebackup serve running?"));
        match address {
            Address::Tcp(text) => TcpListener::bind(text).await.map(Listener::Tcp).map_err(at),
            Address::Unix(path) => {
                // A socket that nobody answers at is a dead server's.
                use std::os::unix::fs::FileTypeExt;
                let socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
                if socket && std::os::unix::net::UnixStream::connect(path).is_err() {
                    let _ = std::fs::remove_file(path);
                }
                UnixListener::bind(path).map(|l| Listener::Unix(l, path.clone())).map_err(at)
            }
        }
    }

    pub async fn accept(&self) -> std::io::Result<Stream> {
        match self {
            Listener::Tcp(listener) => Stream::tcp(listener.accept().await?.0),
            Listener::Unix(listener, path) => {
                Ok(Stream::unix(listener.accept().await?.0, format!("a client of {}", path.display())))
            }
        }
    }

    pub fn address(&self) -> Option<Address> {
        match self {
            Listener::Tcp(listener) => Some(Address::Tcp(listener.local_addr().ok()?.to_string())),
            Listener::Unix(_, path) => Some(Address::Unix(path.clone())),
        }
    }
}
