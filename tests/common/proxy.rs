//! A proxy that cuts connections at a byte.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    ToServer,
    ToClient,
}

/// Both directions are closed when so many bytes have gone this way.
pub type Cut = (Way, u64);

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    fn again(&self) -> Socket {
        match self {
            Socket::Tcp(socket) => Socket::Tcp(socket.try_clone().unwrap()),
            Socket::Unix(socket) => Socket::Unix(socket.try_clone().unwrap()),
        }
    }

    fn shutdown(&self) {
        let _ = match self {
            Socket::Tcp(socket) => socket.shutdown(Shutdown::Both),
            Socket::Unix(socket) => socket.shutdown(Shutdown::Both),
        };
    }

    fn read(&mut self, into: &mut [u8]) -> usize {
        let read = match self {
            Socket::Tcp(socket) => socket.read(into),
            Socket::Unix(socket) => socket.read(into),
        };
        read.unwrap_or(0)
    }

    fn write(&mut self, bytes: &[u8]) -> bool {
        match self {
            Socket::Tcp(socket) => socket.write_all(bytes).is_ok(),
            Socket::Unix(socket) => socket.write_all(bytes).is_ok(),
        }
    }
}

#[derive(Default)]
struct State {
    /// What becomes of the next connections; later ones are left alone.
    cuts: Mutex<VecDeque<Cut>>,
    /// Connections are refused.
    down: AtomicBool,
    /// A cut closes nothing: no more bytes go, until an end closes.
    stalls: AtomicBool,
    /// Go down with the next cut.
    fall: AtomicBool,
    /// What comes from clients is taken and goes nowhere.
    swallows: AtomicBool,
    swallowed: AtomicU64,
    /// Of the newest connection.
    open: Mutex<Vec<Socket>>,
    connections: AtomicU64,
    refused: AtomicU64,
    cut: AtomicU64,
    /// Bytes of all connections.
    to_server: AtomicU64,
    to_client: AtomicU64,
    /// Of each connection.
    each_to_client: Mutex<Vec<Arc<AtomicU64>>>,
}

/// The proxy. Its thread ends with the process.
pub struct Proxy {
    state: Arc<State>,
    /// `HOST:PORT`, of one in front of TCP.
    pub address: String,
    /// The socket, of one in front of a unix socket.
    pub socket: PathBuf,
}

impl Proxy {
    /// In front of a unix socket, beside it.
    pub fn unix(server: &Path) -> Proxy {
        let socket = server.with_extension("proxy");
        let listener = UnixListener::bind(&socket).unwrap();
        let (state, server) = (Arc::new(State::default()), server.to_owned());
        let shared = state.clone();
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let connect = || UnixStream::connect(&server).ok().map(Socket::Unix);
                serve(&shared, Socket::Unix(client), connect);
            }
        });
        Proxy { state, address: String::new(), socket }
    }

    /// In front of a TCP address.
    pub fn tcp(server: &str) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (state, server) = (Arc::new(State::default()), server.to_owned());
        let shared = state.clone();
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let connect = || TcpStream::connect(&server).ok().map(Socket::Tcp);
                serve(&shared, Socket::Tcp(client), connect);
            }
        });
        Proxy { state, address, socket: PathBuf::new() }
    }

    /// The next connections are cut so, one each.
    pub fn cut(&self, cuts: &[Cut]) {
        *self.state.cuts.lock().unwrap() = cuts.iter().copied().collect();
    }

    /// The next connections go no further, one each, until their client closes.
    pub fn stall(&self, at: &[Cut]) {
        self.state.stalls.store(true, Ordering::SeqCst);
        self.cut(at);
    }

    /// Refuses connections from the next cut on.
    pub fn fall_with_the_next_cut(&self) {
        self.state.fall.store(true, Ordering::SeqCst);
    }

    /// What comes from clients goes nowhere from now on.
    pub fn swallow(&self) {
        self.state.swallows.store(true, Ordering::SeqCst);
    }

    /// Bytes that went nowhere.
    pub fn swallowed(&self) -> u64 {
        self.state.swallowed.load(Ordering::SeqCst)
    }

    /// Closes the newest connection, and swallows nothing any more.
    pub fn sever(&self) {
        self.state.open.lock().unwrap().drain(..).for_each(|socket| socket.shutdown());
        self.state.swallows.store(false, Ordering::SeqCst);
    }

    /// Lets connections through again.
    pub fn rise(&self) {
        self.state.fall.store(false, Ordering::SeqCst);
        self.state.down.store(false, Ordering::SeqCst);
    }

    /// Connections that were cut.
    pub fn cuts_made(&self) -> u64 {
        self.state.cut.load(Ordering::SeqCst)
    }

    /// How many connections were refused.
    pub fn refused(&self) -> u64 {
        self.state.refused.load(Ordering::SeqCst)
    }

    /// Connections that were let through.
    pub fn connections(&self) -> u64 {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// Bytes that went to the client over each connection, in the order in which they came.
    pub fn bytes_to_client_of_each(&self) -> Vec<u64> {
        self.state.each_to_client.lock().unwrap().iter().map(|count| count.load(Ordering::SeqCst)).collect()
    }

    /// Bytes that went either way.
    pub fn bytes(&self, way: Way) -> u64 {
        self.state.counter(way).load(Ordering::SeqCst)
    }
}

impl State {
    fn counter(&self, way: Way) -> &AtomicU64 {
        match way {
            Way::ToServer => &self.to_server,
            Way::ToClient => &self.to_client,
        }
    }
}

fn serve(state: &Arc<State>, client: Socket, connect: impl Fn() -> Option<Socket>) {
    if state.down.load(Ordering::SeqCst) {
        state.refused.fetch_add(1, Ordering::SeqCst);
        return client.shutdown();
    }
    let Some(server) = connect() else { return client.shutdown() };
    state.connections.fetch_add(1, Ordering::SeqCst);
    let cut = state.cuts.lock().unwrap().pop_front();
    *state.open.lock().unwrap() = vec![client.again(), server.again()];
    let own = Arc::new(AtomicU64::new(0));
    state.each_to_client.lock().unwrap().push(own.clone());
    for (way, from, to) in [(Way::ToServer, &client, &server), (Way::ToClient, &server, &client)] {
        let (state, from, to) = (state.clone(), from.again(), to.again());
        let limit = cut.filter(|cut| cut.0 == way).map(|cut| cut.1);
        let own = own.clone();
        thread::spawn(move || pump(&state, way, from, to, limit, &own));
    }
}

fn pump(state: &State, way: Way, mut from: Socket, mut to: Socket, mut limit: Option<u64>, own: &AtomicU64) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        if limit == Some(0) {
            if state.fall.load(Ordering::SeqCst) {
                state.down.store(true, Ordering::SeqCst);
            }
            state.cut.fetch_add(1, Ordering::SeqCst);
            while state.stalls.load(Ordering::SeqCst) {
                thread::park();
            }
            break;
        }
        let most = limit.map_or(buffer.len(), |limit| buffer.len().min(limit as usize));
        let n = from.read(&mut buffer[..most]);
        state.counter(way).fetch_add(n as u64, Ordering::SeqCst);
        if way == Way::ToClient {
            own.fetch_add(n as u64, Ordering::SeqCst);
        }
        if n > 0 && way == Way::ToServer && state.swallows.load(Ordering::SeqCst) {
            state.swallowed.fetch_add(n as u64, Ordering::SeqCst);
            continue;
        }
        if n == 0 || !to.write(&buffer[..n]) {
            break;
        }
        limit = limit.map(|limit| limit - n as u64);
    }
    from.shutdown();
    to.shutdown();
}
