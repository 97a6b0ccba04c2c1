//! Where a map listens, and how that is written as an NBD URI (uri.md of the NBD project).
//!
//! A unix socket is its owner's alone from the moment that it is there. Who makes one takes the lock of its directory
//! meanwhile: of two that start at once the second finds the first. A socket that nobody answers at is a killed map's and
//! is replaced; ours is removed when we end.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::geteuid;
use tokio::net::{TcpListener, UnixSocket, UnixStream};

use super::error::MapError;
use crate::nbd::server::Listener;
use crate::units::PointId;
use crate::vm::place;

/// Longest path of a socket (`sun_path`, with its end).
const MAX_PATH_BYTES: usize = 107;
/// Connections that wait to be taken up.
const BACKLOG: u32 = 64;
/// How often, and how many times, the lock of a directory is tried.
const TURN_EVERY: Duration = Duration::from_millis(20);
const TURN_TRIES: usize = 100;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum At {
    /// A unix socket.
    Socket(PathBuf),
    /// `HOST:PORT` of the loopback.
    Tcp(String),
}

/// A place that is listened at.
pub(super) struct Listening {
    pub listener: Listener,
    place: Place,
}

enum Place {
    /// The socket's path, and which file it is.
    Socket(PathBuf, (u64, u64)),
    Tcp(SocketAddr),
}

impl Listening {
    pub async fn open(at: Option<&At>, point: PointId) -> Result<Self, MapError> {
        match at {
            Some(At::Tcp(address)) => tcp(address).await,
            Some(At::Socket(path)) => socket(path).await,
            None => socket(&usual_socket(point)?).await,
        }
    }

    /// The URI of an export.
    pub fn uri(&self, export: &str) -> String {
        let export = escaped(export.as_bytes());
        match &self.place {
            Place::Socket(path, _) => format!("nbd+unix:///{export}?socket={}", escaped(path.as_os_str().as_bytes())),
            Place::Tcp(address) => format!("nbd://{address}/{export}"),
        }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // While we still listen: nobody can have taken ours for a dead one.
        if let Place::Socket(path, ours) = &self.place
            && identity(path).is_ok_and(|found| found == *ours)
        {
            let _ = fs::remove_file(path);
        }
    }
}

fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

async fn tcp(address: &str) -> Result<Listening, MapError> {
    let failed = |source| MapError::Tcp { address: address.to_owned(), source };
    let found: Vec<_> = tokio::net::lookup_host(address).await.map_err(failed)?.collect();
    if found.iter().any(|address| !address.ip().is_loopback()) {
        return Err(MapError::NotLoopback { address: address.to_owned() });
    }
    let listener = TcpListener::bind(&found[..]).await.map_err(failed)?;
    let place = Place::Tcp(listener.local_addr().map_err(failed)?);
    Ok(Listening { listener: Listener::Tcp(listener), place })
}

/// In the directory of locks and sockets: named after the point.
fn usual_socket(point: PointId) -> Result<PathBuf, MapError> {
    let dir = place::run_dir().map_err(|failure| MapError::NoPlace(failure.to_string()))?;
    let found = fs::metadata(&dir).map_err(MapError::io("look at", &dir))?;
    let others_write = found.mode() & 0o022 != 0;
    if found.uid() != geteuid().as_raw() || others_write {
        return Err(MapError::NotPrivate { path: dir });
    }
    Ok(dir.join(format!("map-{}.sock", point.short())))
}

async fn socket(path: &Path) -> Result<Listening, MapError> {
    let path = std::path::absolute(path).map_err(MapError::io("find", path))?;
    if path.as_os_str().len() > MAX_PATH_BYTES {
        return Err(MapError::PathTooLong { path, max: MAX_PATH_BYTES });
    }
    let _turn = turn(&path).await?;
    match fs::symlink_metadata(&path) {
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(MapError::io("look at", &path)(e)),
        Ok(found) if !found.file_type().is_socket() => return Err(MapError::NotASocket { path }),
        Ok(_) => match UnixStream::connect(&path).await {
            Err(e) if e.kind() == ErrorKind::ConnectionRefused => {
                fs::remove_file(&path).map_err(MapError::io("replace", &path))?;
            }
            // Also where it has more to do than it can take.
            _ => return Err(MapError::SocketInUse { path }),
        },
    }
    let failed = |e| MapError::io("listen at", &path)(e);
    let socket = UnixSocket::new_stream().map_err(failed)?;
    // Linux makes the file with the mode that the socket has before it is bound.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|e| failed(e.into()))?;
    socket.bind(&path).map_err(failed)?;
    let ours = identity(&path).map_err(failed)?;
    let listener = Listener::Unix(socket.listen(BACKLOG).map_err(failed)?);
    Ok(Listening { listener, place: Place::Socket(path, ours) })
}

/// The lock of the socket's directory.
async fn turn(path: &Path) -> Result<Flock<File>, MapError> {
    let dir = path.parent().unwrap_or(path);
    for _ in 0..TURN_TRIES {
        let opened = File::open(dir).map_err(MapError::io("open the directory", dir))?;
        match Flock::lock(opened, FlockArg::LockExclusiveNonblock) {
            Ok(held) => return Ok(held),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => tokio::time::sleep(TURN_EVERY).await,
            Err((_, e)) => return Err(MapError::io("lock the directory", dir)(e.into())),
        }
    }
    Err(MapError::io("lock the directory", dir)(std::io::Error::from(ErrorKind::ResourceBusy)))
}

/// Percent-encoded, but for letters, digits and what is never special in a URI.
fn escaped(bytes: &[u8]) -> String {
    let mut out = String::new();
    for byte in bytes {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => out.push(char::from(*byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_loopback_is_listened_at() {
        for refused in ["0.0.0.0:0", "[::]:0", "192.0.2.1:10809"] {
            assert!(matches!(tcp(refused).await, Err(MapError::NotLoopback { .. })), "{refused}");
        }
        for wrong in ["", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000"] {
            assert!(matches!(tcp(wrong).await, Err(MapError::Tcp { .. })), "{wrong}");
        }
        let listening = tcp("127.0.0.1:0").await.unwrap();
        let uri = listening.uri("a disk");
        assert!(uri.starts_with("nbd://127.0.0.1:") && uri.ends_with("/a%20disk") && !uri.contains(":0/"), "{uri}");
    }

    #[tokio::test]
    async fn a_socket_is_private_taken_once_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ä?");
        let first = socket(&path).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(first.uri("").ends_with("/%C3%A4%3F"), "{}", first.uri(""));
        assert!(matches!(socket(&path).await, Err(MapError::SocketInUse { .. })));
        drop(first);
        assert!(!path.exists());
        // A dead one's is replaced; what is none of ours is not removed.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let second = socket(&path).await.unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another's").unwrap();
        drop(second);
        assert!(path.exists());
        assert!(matches!(socket(&path).await, Err(MapError::NotASocket { .. })));
        let long = dir.path().join("x".repeat(MAX_PATH_BYTES));
        assert!(matches!(socket(&long).await, Err(MapError::PathTooLong { .. })));
    }
}
