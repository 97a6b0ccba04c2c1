//! Why a point is not served: what happened, to what, and what to do next.

use std::io;
use std::path::{Path, PathBuf};

use crate::repo::RepoError;
use crate::repo::point::ChoiceError;

/// An error of a map, before it serves.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// No disks can be chosen.
    #[error(transparent)]
    Choice(#[from] ChoiceError),
    /// There is nothing to serve.
    #[error("the restore point {point} of {vm:?} has no disks; choose another one with `livebackup points`")]
    NoDisks {
        /// The VM.
        vm: String,
        /// The point.
        point: String,
    },
    /// Others could reach it.
    #[error(
        "{address} can be reached from other hosts, and whoever reaches it reads the disks: nobody is asked who he is; \
         listen at 127.0.0.1:PORT, and come from another host by an ssh tunnel (ssh -L PORT:127.0.0.1:PORT HOST)"
    )]
    NotLoopback {
        /// What was asked for.
        address: String,
    },
    /// The address is none, or cannot be listened at.
    #[error("cannot listen at {address}: {source}; give HOST:PORT with a free port, or port 0 for any")]
    Tcp {
        /// What was asked for.
        address: String,
        /// The system's error.
        source: io::Error,
    },
    /// Somebody listens there.
    #[error("{} is in use: another program listens there; end it, or give another --socket", path.display())]
    SocketInUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("{} exists and is not a socket; give another --socket", path.display())]
    NotASocket {
        /// What was named.
        path: PathBuf,
    },
    /// No socket can have this name.
    #[error("a socket's path has {max} bytes at most, and {} has {}; give a shorter --socket", path.display(), path.as_os_str().len())]
    PathTooLong {
        /// What was named.
        path: PathBuf,
        /// The system's limit.
        max: usize,
    },
    /// Others can write where the socket would be.
    #[error("{} belongs to another user, or others can write to it: no place for a socket; give --socket", path.display())]
    NotPrivate {
        /// The directory.
        path: PathBuf,
    },
    /// There is no directory for sockets.
    #[error("{0}; give --socket")]
    NoPlace(String),
    /// The system refused something.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// `listen at`, …
        what: &'static str,
        /// Which file or directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The repository cannot be used.
    #[error("{0}")]
    Repo(Box<RepoError>),
}

impl MapError {
    /// Adds what was tried and where to the system's error.
    pub(super) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}

impl From<RepoError> for MapError {
    fn from(error: RepoError) -> Self {
        Self::Repo(Box::new(error))
    }
}
