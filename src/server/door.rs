//! The door: what a connection must show before it is spoken with.
//!
//! ```text
//! TCP with [tls]     TLS handshake ─► name of the certificate ─► its [[client]] table
//! TCP without        only on the loopback: everybody on this host
//! unix socket        peer credentials: root, the server's own user, or a member of `unix_group`
//! ```
//!
//! Few may shake hands at once, and each has little time for it, so that strangers cannot take the places of clients.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::unistd::{Gid, Group, Uid, User, getgrouplist};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Semaphore;

use super::bad;
use super::config::Config;
use super::grants::{Caller, Grants};
use crate::wire::Stream;
use crate::wire::message::{Failure, FailureCode};
use crate::wire::tls::{Acceptor, ends_soon};

/// Handshakes at once, at most.
const MAX_HANDSHAKES: usize = 32;

/// Connections of one client at once, at most.
const MAX_OF_ONE: usize = 32;

/// A connection that nothing is known of yet.
#[derive(Debug)]
pub enum Incoming {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a unix socket; how it is called in messages.
    Unix(UnixStream, String),
}

impl Incoming {
    /// Whether it came over TCP.
    pub fn is_tcp(&self) -> bool {
        matches!(self, Self::Tcp(_))
    }
}

/// Lets in who may come in.
#[derive(Debug)]
pub struct Door {
    tls: Option<Acceptor>,
    clients: Vec<Grants>,
    group: Option<Gid>,
    handshakes: Arc<Semaphore>,
    /// How many connections each client has.
    places: Arc<Mutex<HashMap<String, usize>>>,
}

/// A client's place among the connections; free again when it is dropped.
#[derive(Debug)]
pub struct Place {
    places: Arc<Mutex<HashMap<String, usize>>>,
    name: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        match places.get_mut(&self.name) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(places.remove(&self.name)),
        }
    }
}

impl Door {
    /// As the configuration says.
    pub fn new(config: &Config) -> Result<Self, Failure> {
        let tls = config.tls.clone().map(Acceptor::new).transpose().map_err(|e| bad(format!("[tls]: {e}")))?;
        let group = config.unix_group.as_deref().map(find_group).transpose()?;
        let clients = config.clients.clone();
        if tls.is_some() && clients.is_empty() {
            tracing::warn!("nobody can come in by TLS: the configuration has no [[client]] table");
        }
        Ok(Self { tls, clients, group, handshakes: Arc::new(Semaphore::new(MAX_HANDSHAKES)), places: Arc::default() })
    }

    /// For unix sockets that are for this user alone.
    pub fn private() -> Self {
        let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
        Self { tls: None, clients: vec![], group: None, handshakes, places: Default::default() }
    }

    /// The group that may use the unix socket.
    pub fn group(&self) -> Option<Gid> {
        self.group
    }

    /// Finds out who it is.
    pub async fn admit(&self, incoming: Incoming, limit: Duration) -> Result<(Stream, Caller), Failure> {
        match incoming {
            Incoming::Unix(stream, name) => {
                let caller = self.of_socket(&stream)?;
                Ok((Stream::unix(stream, name), caller))
            }
            Incoming::Tcp(stream) => match &self.tls {
                Some(tls) => self.of_tls(tls, stream, limit).await,
                None => {
                    let stream = Stream::tcp(stream).map_err(|e| bad(format!("a connection failed: {e}")))?;
                    let caller = Caller::Local(stream.peer().to_owned());
                    Ok((stream, caller))
                }
            },
        }
    }

    async fn of_tls(&self, tls: &Acceptor, stream: TcpStream, limit: Duration) -> Result<(Stream, Caller), Failure> {
        let Ok(_shaking) = self.handshakes.clone().try_acquire_owned() else {
            return Err(bad(format!("a connection was refused: {MAX_HANDSHAKES} others are in their TLS handshake")));
        };
        let (stream, about) = tls.accept(stream, limit).await?;
        if let Some(words) = ends_soon(&about) {
            tracing::warn!(peer = stream.peer(), "{words}");
        }
        let grants = self.clients.iter().find(|client| client.name == about.name).cloned();
        let grants = grants.unwrap_or_else(|| {
            tracing::warn!(peer = stream.peer(), "this client is not in the configuration, and gets nothing");
            Grants { name: about.name, vms: vec![], may: vec![] }
        });
        Ok((stream, Caller::Client(grants)))
    }

    /// A place for one more connection of a client, which must not take all of them. Local callers have no such limit.
    pub fn place(&self, caller: &Caller) -> Result<Option<Place>, Failure> {
        let Caller::Client(grants) = caller else { return Ok(None) };
        let name = grants.name.clone();
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let count = places.entry(name.clone()).or_default();
        if *count >= MAX_OF_ONE {
            return Err(bad(format!("a connection of {name:?} was refused: it has {MAX_OF_ONE}")));
        }
        *count += 1;
        Ok(Some(Place { places: self.places.clone(), name }))
    }

    fn of_socket(&self, stream: &UnixStream) -> Result<Caller, Failure> {
        let who = stream.peer_cred().map_err(|e| bad(format!("a connection's user cannot be found out: {e}")))?;
        let (uid, gid) = (Uid::from_raw(who.uid()), Gid::from_raw(who.gid()));
        let is_member = |group: Gid| gid == group || groups_of(uid, gid).contains(&group);
        if uid.is_root() || uid == nix::unistd::geteuid() || self.group.is_some_and(is_member) {
            return Ok(Caller::Local(format!("user {uid}")));
        }
        let what = format!("user {uid} was not let in: only root, the server's own user and members of unix_group are");
        Err(Failure::new(FailureCode::Denied, what))
    }
}

fn groups_of(uid: Uid, gid: Gid) -> Vec<Gid> {
    let user = User::from_uid(uid).ok().flatten();
    let name = user.and_then(|user| std::ffi::CString::new(user.name).ok());
    name.and_then(|name| getgrouplist(&name, gid).ok()).unwrap_or_default()
}

fn find_group(name: &str) -> Result<Gid, Failure> {
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid),
        Ok(None) => Err(bad(format!("unix_group = {name:?}: there is no such group"))),
        Err(e) => Err(bad(format!("unix_group = {name:?}: {e}"))),
    }
}
