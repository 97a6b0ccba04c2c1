//! What the tests of maps share: a running `livebackup map`, and a client that speaks byte by byte.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use livebackup::nbd::{Address, Client, ConnectOptions, Wanted, connect};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::restore_common::{CHUNK, Stored};

/// A running `livebackup map --json`; killed when dropped.
pub struct Running {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
    log: PathBuf,
    /// What it said first.
    pub said: Value,
}

/// How a map ended.
pub struct Ended {
    pub code: Option<i32>,
    /// What it said last.
    pub said: Value,
    pub log: String,
}

impl Running {
    /// Serves `point` of the repository with these further arguments.
    pub fn start(stored: &Stored, point: &str, arguments: &[&str]) -> Running {
        Self::try_start(stored, point, arguments).unwrap_or_else(|ended| panic!("{:?} {}", ended.said, ended.log))
    }

    /// As [`Running::start`], or how it ended at once.
    pub fn try_start(stored: &Stored, point: &str, arguments: &[&str]) -> Result<Running, Ended> {
        let log = stored.dir.path().join(format!("map-{}.log", livebackup::units::PackId::random().short()));
        let mut command = Command::new(env!("CARGO_BIN_EXE_livebackup"));
        command.args(["map", "--json"]).arg(stored.dir.path().join("repo")).arg(point).args(arguments);
        command.env("XDG_STATE_HOME", stored.dir.path()).env("XDG_RUNTIME_DIR", stored.dir.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(fs::File::create(&log).unwrap());
        let mut child = command.spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let said = line(&mut out);
        let running = Running { child, out, log, said };
        match running.said.get("exports") {
            Some(_) => Ok(running),
            None => {
                let said = running.said.clone();
                Err(Ended { said, ..running.wait() })
            }
        }
    }

    /// On a socket in the directory of what is stored.
    pub fn on_socket(stored: &Stored, arguments: &[&str]) -> Running {
        let socket = stored.dir.path().join("s");
        Self::start(stored, "vm", &[&["--socket", socket.to_str().unwrap()], arguments].concat())
    }

    /// The URI of a disk.
    pub fn uri(&self, disk: &str) -> String {
        let exports = self.said["exports"].as_array().unwrap();
        let export = exports.iter().find(|export| export["disk"] == disk).unwrap();
        export["uri"].as_str().unwrap().to_owned()
    }

    pub fn socket(&self) -> PathBuf {
        let uri = self.said["exports"][0]["uri"].as_str().unwrap();
        uri.split_once("?socket=").unwrap().1.into()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Most memory that it had so far, in bytes.
    pub fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    /// Tells it to stop, and waits: not long.
    pub fn end(self, signal: Signal) -> Ended {
        self.signal(signal);
        let begun = Instant::now();
        let ended = self.wait();
        assert!(begun.elapsed() < Duration::from_secs(10), "it took {:?} to end", begun.elapsed());
        ended
    }

    pub fn wait(mut self) -> Ended {
        let said = line(&mut self.out);
        let code = self.child.wait().unwrap().code();
        Ended { code, said, log: self.log() }
    }

    pub async fn client(&self, export: &str, contexts: &[&str]) -> Client {
        let wanted = Wanted { export: export.into(), contexts: contexts.iter().map(|c| c.to_string()).collect() };
        connect(&self.address(), &wanted, &ConnectOptions::default()).await.unwrap()
    }

    pub fn address(&self) -> Address {
        Address::Unix(self.socket())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the map's log:\n{}", self.log());
        }
    }
}

fn line(from: &mut impl BufRead) -> Value {
    let mut text = String::new();
    from.read_line(&mut text).unwrap();
    serde_json::from_str(&text).unwrap_or(Value::Null)
}

/// Which bytes of a disk are holes: chunks that are zero. Neighbours are one: (from, to, hole).
pub fn holes(bytes: &[u8]) -> Vec<(u64, u64, bool)> {
    let mut found: Vec<(u64, u64, bool)> = vec![];
    let mut at = 0;
    for chunk in bytes.chunks(CHUNK as usize) {
        let (end, hole) = (at + chunk.len() as u64, chunk.iter().all(|byte| *byte == 0));
        match found.last_mut() {
            Some(last) if last.2 == hole => last.1 = end,
            _ => found.push((at, end, hole)),
        }
        at = end;
    }
    found
}

/// Runs a client program; gives whether it succeeded, and what it printed.
pub fn program(name: &str, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(name).args(arguments).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|e| panic!("{name}: {e}; install libnbd-bin and qemu-utils"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

/// The wire, by hand: nothing here is the code under test.
pub struct Raw(pub UnixStream);

/// Error bit of option replies.
pub const ERROR: u32 = 1 << 31;

/// One message of the server after the handshake.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// Error, cookie.
    Simple(u32, u64),
    /// Done, kind, cookie, payload.
    Chunk(bool, u16, u64, Vec<u8>),
}

impl Raw {
    /// Connects, and reads the greeting.
    pub fn connect(socket: &Path) -> Raw {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut raw = Raw(stream);
        assert_eq!(raw.take(18), b"NBDMAGICIHAVEOPT\0\x03");
        raw
    }

    /// Connects, and takes all handshake flags.
    pub fn greeted(socket: &Path) -> Raw {
        let mut raw = Self::connect(socket);
        raw.say(&3u32.to_be_bytes());
        raw
    }

    /// A session of an export.
    pub fn session(socket: &Path, export: &str, structured: bool) -> Raw {
        let mut raw = Self::greeted(socket);
        if structured {
            assert_eq!(raw.option(8, b""), [(1, vec![])]);
        }
        let replies = raw.option(7, &go(export, &[]));
        assert_eq!(replies.last().unwrap().0, 1, "{replies:?}");
        raw
    }

    pub fn say(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    /// Whether the server has closed the connection, or does so now.
    pub fn is_closed(&mut self) -> bool {
        match self.0.read(&mut [0; 1]) {
            Ok(n) => n == 0,
            Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    /// Sends an option and gives its replies: kind, data; the last is an ACK or an error.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.say(&[b"IHAVEOPT", &option.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat());
        let mut replies = vec![];
        loop {
            assert_eq!(self.u64(), 0x0003_e889_0455_65a9);
            assert_eq!(self.u32(), option);
            let (kind, len) = (self.u32(), self.u32());
            let data = self.take(len as usize);
            replies.push((kind, data));
            if kind == 1 || kind & ERROR != 0 {
                return replies;
            }
        }
    }

    pub fn request(&mut self, flags: u16, command: u16, cookie: u64, offset: u64, len: u32) {
        let head = [&0x2560_9513_u32.to_be_bytes()[..], &flags.to_be_bytes(), &command.to_be_bytes()].concat();
        self.say(&[&head[..], &cookie.to_be_bytes(), &offset.to_be_bytes(), &len.to_be_bytes()].concat());
    }

    /// The next message; the data of a simple reply is not part of it.
    pub fn hear(&mut self) -> Heard {
        match self.u32() {
            0x6744_6698 => Heard::Simple(self.u32(), self.u64()),
            0x668e_33ef => {
                let flags_and_kind = self.u32();
                let (cookie, len) = (self.u64(), self.u32());
                let payload = self.take(len as usize);
                Heard::Chunk(flags_and_kind >> 16 == 1, flags_and_kind as u16, cookie, payload)
            }
            other => panic!("a message begins with {other:#x}"),
        }
    }

    /// All chunks of one structured reply: kind, payload.
    pub fn reply(&mut self, wanted: u64) -> Vec<(u16, Vec<u8>)> {
        let mut chunks = vec![];
        loop {
            let Heard::Chunk(done, kind, cookie, payload) = self.hear() else { panic!("a simple reply") };
            assert_eq!(cookie, wanted);
            chunks.push((kind, payload));
            if done {
                return chunks;
            }
        }
    }

    /// A read by simple replies.
    pub fn read_simple(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, u32> {
        self.request(0, 0, 99, offset, len);
        match self.hear() {
            Heard::Simple(0, 99) => Ok(self.take(len as usize)),
            Heard::Simple(error, 99) => Err(error),
            other => panic!("{other:?}"),
        }
    }
}

/// Data of GO and INFO.
pub fn go(export: &str, information: &[u16]) -> Vec<u8> {
    let mut out = (export.len() as u32).to_be_bytes().to_vec();
    out.extend(export.as_bytes());
    out.extend((information.len() as u16).to_be_bytes());
    information.iter().for_each(|i| out.extend(i.to_be_bytes()));
    out
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn queries(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut out = (export.len() as u32).to_be_bytes().to_vec();
    out.extend(export.as_bytes());
    out.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        out.extend((query.len() as u32).to_be_bytes());
        out.extend(query.as_bytes());
    }
    out
}
