//! Where the service listens: TCP or a unix socket.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, UnixListener};

use nix::unistd::{Gid, chown};

use super::bad;
use super::door::Incoming;
use crate::wire::Address;
use crate::wire::message::Failure;

pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Opens an address; a unix socket is for its owner, and for `group` if there is one.
    pub async fn bind(address: &Address, group: Option<Gid>) -> Result<Self, Failure> {
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
                let listener = UnixListener::bind(path).map_err(at)?;
                // The door asks for the user too; the mode keeps others from waiting at it.
                restrict(path, group).map_err(at)?;
                Ok(Listener::Unix(listener, path.clone()))
            }
        }
    }

    /// The next connection.
    pub async fn accept(&self) -> std::io::Result<Incoming> {
        match self {
            Listener::Tcp(listener) => Ok(Incoming::Tcp(listener.accept().await?.0)),
            Listener::Unix(listener, path) => {
                Ok(Incoming::Unix(listener.accept().await?.0, format!("a client of {}", path.display())))
            }
        }
    }

    /// Where it listens.
    pub fn address(&self) -> Option<Address> {
        match self {
            Listener::Tcp(listener) => Some(Address::Tcp(listener.local_addr().ok()?.to_string())),
            Listener::Unix(_, path) => Some(Address::Unix(path.clone())),
        }
    }
}

fn restrict(path: &Path, group: Option<Gid>) -> std::io::Result<()> {
    if group.is_some() {
        chown(path, None, group)?;
    }
    let mode = if group.is_some() { 0o660 } else { 0o600 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix(_, path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}
